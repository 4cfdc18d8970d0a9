"""Datasets of commit 0ef8472 are opened, analysed and reported; quantities are compared with NumPy in float64."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import netCDF4
import numpy as np
import pytest
import rlvr_landscape_analysis as rla
import xarray as xr
from old_data import dataset_of, unpack
from rlvr_landscape_analysis.__main__ import main

METHODS: dict[str, Callable[[xr.Dataset], xr.Dataset | xr.DataArray]] = {
    "best_point": lambda ds: ds.landscape.best_point(),
    "better_than_origin": lambda ds: ds.landscape.better_than_origin(),
    "correlations": lambda ds: ds.landscape.correlations(),
    "difference": lambda ds: ds.landscape.difference("entropy"),
    "entropy": lambda ds: ds.landscape.entropy(),
    "kl": lambda ds: ds.landscape.kl(estimator="k3"),
    "mean": lambda ds: ds.landscape.mean("completion_tokens"),
    "overlap": lambda ds: ds.landscape.overlap(),
    "pass_at_k": lambda ds: ds.landscape.pass_at_k(2, threshold=0.5),
    "per_prompt": lambda ds: ds.landscape.per_prompt(),
    "quadratic_fit": lambda ds: ds.landscape.quadratic_fit(),
    "radial_profile": lambda ds: ds.landscape.radial_profile("surrogate"),
    "radius": lambda ds: ds.landscape.radius,
    "ray": lambda ds: ds.landscape.ray("reward", 0.7),
    "surrogate": lambda ds: ds.landscape.surrogate(),
}
NOT_DEFINED = {
    "per_prompt": {"displacement_radius"},  # a snapshot at step 0 is displaced by nothing
    "better_than_origin": {"p_value", "adjusted_p"},  # not at the origin itself
    "correlations": {"corrected"},  # not where a control leaves no signal; `reason` says so
}
"""Variables that have some values which are not finite, and why."""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The old progressive sweep: 66 tasks, enough for every interval."""
    return unpack("progressive", tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def raw(output: Path) -> dict[str, np.ndarray]:
    """Its variables by the netCDF library alone, float64."""
    with netCDF4.Dataset(dataset_of(output)) as file:
        return {name: np.asarray(variable[...], np.float64) for name, variable in file.variables.items()}


@pytest.fixture(scope="module")
def landscape(output: Path) -> xr.Dataset:
    """The same as users open it."""
    return rla.open_landscape(dataset_of(output)).load()


def correlation(raw: dict[str, np.ndarray]) -> float:
    """Pearson's, of the points' mean KL and mean reward."""
    kl, reward = (raw[name].mean((2, 3)).ravel() for name in ("kl_k1", "reward"))
    return np.corrcoef(kl, reward)[0, 1]


def test_every_method_of_the_accessor_is_called_here() -> None:
    public = {name for name in vars(rla.LandscapeAccessor) if not name.startswith("_")}
    assert public == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_methods_give_finite_numbers(method: str, landscape: xr.Dataset) -> None:
    found = METHODS[method](landscape)
    variables = found.data_vars if isinstance(found, xr.Dataset) else {"value": found}
    numbers = {name: values for name, values in variables.items() if values.dtype.kind in "fiub"}
    assert numbers
    odd = {name for name, values in numbers.items() if not np.isfinite(values.values.astype(float)).all()}
    assert odd == NOT_DEFINED.get(method, set())


def test_quantities_are_those_of_the_file(landscape: xr.Dataset, raw: dict[str, np.ndarray]) -> None:
    methods, over = landscape.landscape, (2, 3)
    reward, passed = raw["reward"], raw["reward"] >= 0.5
    expected = {
        "reward": (methods.mean()["mean"], reward.mean(over)),
        "reward_error": (
            methods.mean()["standard_error"],
            reward.mean(3).std(2, ddof=1) / np.sqrt(reward.shape[2]),
        ),
        "kl": (methods.kl()["mean"], raw["kl_k1"].mean(over)),
        "surrogate": (methods.surrogate()["mean"], raw["surrogate"].sum(over) / raw["base_tokens"].sum()),
        "pass_1": (methods.pass_at_k(1, threshold=0.5)["mean"], passed.mean(over)),
        "pass_2": (methods.pass_at_k(2, threshold=0.5)["mean"], passed.any(3).mean(2)),
        "radius": (methods.radius, np.hypot(raw["alpha"][:, None], raw["beta"][None, :])),
    }
    for name, (found, value) in expected.items():
        np.testing.assert_allclose(found.values, value, rtol=1e-6, atol=1e-7, err_msg=name)
    found = methods.correlations().pearson.sel(pair="kl_reward", control="none")
    assert found.item() == pytest.approx(correlation(raw), rel=1e-6)


@pytest.mark.parametrize("sweep", ["finished", "progressive"])
def test_a_run_opens_with_its_step_and_slice(sweep: str, tmp_path: Path) -> None:
    output = unpack(sweep, tmp_path)
    run = rla.open_run(output)
    assert (run.step.values.tolist(), run.slice_seed.values.tolist()) == ([0], [0])
    with netCDF4.Dataset(dataset_of(output)) as file:
        np.testing.assert_array_equal(run.reward.isel(step=0, slice_seed=0), file["reward"][...])


def test_a_report_is_written(output: Path, raw: dict[str, np.ndarray], tmp_path: Path) -> None:
    assert main([str(output), "--out", str(tmp_path), "--resamples", "100", "--no-animation"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "T1" in page
    assert "not measurable" in page  # one snapshot at step 0 shows no effect of training
    with (tmp_path / "tables" / "correlations.csv").open() as source:
        found = {(row["pair"], row["quantity"]): row["estimate"] for row in csv.DictReader(source)}
    assert float(found["kl_reward", "pearson_none"]) == pytest.approx(correlation(raw), rel=1e-6)
    assert len(list((tmp_path / "figures").glob("*.png"))) >= 8
    assert (output / "figures" / "landscape_step000000_slice0.png").is_file()
