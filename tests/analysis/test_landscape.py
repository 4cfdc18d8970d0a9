"""Reading and reducing: every number against a plain loop, SciPy or a closed form."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import rlvr_landscape_analysis as rla
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from rlvr_landscape_analysis import AnalysisError, synthetic
from rlvr_landscape_analysis.datasets import list_run
from rlvr_landscape_analysis.landscape import shells
from rlvr_landscape_analysis.schema import BASE_ROLLOUT, SCHEMA
from scipy import stats
from scipy.interpolate import RegularGridInterpolator


@pytest.fixture
def data():
    return synthetic.landscape("mixed", points=(7, 5), prompts=20, rollouts=4, seed=3)


def with_holes(data: xr.Dataset) -> xr.Dataset:
    """Some rollouts failed, one prompt failed altogether at one point."""
    data = data.copy(deep=True)
    rng = np.random.default_rng(0)
    data["reward"] = data.reward.where(xr.DataArray(rng.random(data.reward.shape) > 0.1, dims=data.reward.dims))
    data.reward[0, 0, 3] = np.nan
    return data


def test_the_mean_and_its_error_are_those_of_the_prompts_means(data):
    data = with_holes(data)
    found = rla.point_mean(data.reward)
    for i in range(7):
        for j in range(5):
            own = [np.nanmean(row) for row in data.reward.values[i, j].astype(float) if np.isfinite(row).any()]
            assert found["mean"].values[i, j] == pytest.approx(np.mean(own), rel=1e-12)
            assert found["standard_error"].values[i, j] == pytest.approx(stats.sem(own), rel=1e-10)


def test_reduced_and_raw_datasets_give_the_same(data):
    reduced = data.landscape.per_prompt()
    assert data.landscape.per_prompt().identical(reduced)
    assert reduced.landscape.per_prompt() is reduced
    for name in ("reward", "kl_k1", "entropy"):
        xr.testing.assert_allclose(data.landscape.mean(name), reduced.landscape.mean(name))
    xr.testing.assert_allclose(data.landscape.surrogate(), reduced.landscape.surrogate())
    xr.testing.assert_allclose(data.landscape.pass_at_k(3), reduced.landscape.pass_at_k(3))


def test_the_checkpoint_may_have_more_rollouts_than_a_point():
    whole = synthetic.landscape("mixed", points=(5, 3), prompts=20, rollouts=6, seed=3)
    own = [name for name, one in SCHEMA.items() if name in whole and one.family in ("completion", "base")]
    fresh = [name for name in whole.data_vars if name not in own]
    data = xr.merge([whole[own].rename(rollout=BASE_ROLLOUT), whole[fresh].isel(rollout=slice(4))])
    assert data["kl_k1"].sizes[BASE_ROLLOUT] == 6
    assert data.sizes["rollout"] == 4
    xr.testing.assert_allclose(data.landscape.surrogate(), whole.landscape.surrogate())
    xr.testing.assert_allclose(data.landscape.kl(), whole.landscape.kl())
    xr.testing.assert_allclose(data.landscape.mean("reward"), rla.point_mean(whole["reward"].isel(rollout=slice(4))))
    reduced = data.landscape.per_prompt()
    assert reduced.attrs["rollouts"] == 4
    assert BASE_ROLLOUT not in reduced.dims


@given(n=st.integers(1, 9), c=st.integers(0, 9), k=st.integers(1, 9))
def test_pass_at_k_is_the_share_of_k_subsets_with_a_success(n, c, k):
    c, k = min(c, n), min(k, n)
    outcome = [1.0] * c + [0.0] * (n - c)
    subsets = list(combinations(outcome, k))
    expected = sum(any(s) for s in subsets) / len(subsets)
    reward = np.array(outcome).reshape(1, 1, 1, n)
    data = xr.Dataset(
        {name: (("alpha", "beta", "prompt", "rollout"), reward) for name in ("reward", "kl_k1")},
        {"alpha": [0.0], "beta": [0.0]},
    )
    found = float(rla.pass_at_k(data, k)["mean"])
    assert found == pytest.approx(expected, abs=1e-12)
    assert found == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-12)


def test_pass_at_k_leaves_failed_rollouts_out(data):
    data = data.copy(deep=True)
    data.reward[:] = 1.0
    data.reward[..., 0, :2] = np.nan
    assert (rla.pass_at_k(data, 2)["mean"] == 1).all()
    data.reward[..., 0, 2] = 0.0
    # Prompt 0 has one success in two valid rollouts: pass@1 is a half there, pass@3 is not known.
    expected = (19 + 0.5) / 20
    np.testing.assert_allclose(rla.pass_at_k(data, 1)["mean"], expected)
    np.testing.assert_allclose(rla.pass_at_k(data, 3)["mean"], 1.0)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_names_the_number_of_rollouts(data, k):
    with pytest.raises(AnalysisError, match="1 ≤ k ≤ 4"):
        data.landscape.pass_at_k(k)


def test_another_threshold_needs_another_reduction(data):
    assert float(data.landscape.pass_at_k(1, threshold=0.5)["mean"].mean()) > float(
        data.landscape.pass_at_k(1)["mean"].mean()
    )
    with pytest.raises(AnalysisError, match="reduced at threshold"):
        data.landscape.per_prompt().landscape.pass_at_k(1, threshold=0.5)


def test_the_surrogate_is_a_ratio_of_sums_with_the_error_of_a_ratio(data):
    found = data.landscape.surrogate()
    s, t = data.surrogate.values.astype(float), data.base_tokens.values.astype(float)
    np.testing.assert_allclose(found["mean"], s.sum((-1, -2)) / t.sum(), rtol=1e-10)
    # Delta method by jackknife: leave one prompt out.
    i, j = 1, 2
    own, tokens = s[i, j].sum(-1), t.sum(-1)
    without = [(own.sum() - own[p]) / (tokens.sum() - tokens[p]) for p in range(20)]
    jackknife = np.sqrt(19 / 20 * ((np.array(without) - np.mean(without)) ** 2).sum())
    assert found["standard_error"].values[i, j] == pytest.approx(jackknife, rel=0.05)


def test_differences_are_paired_by_prompt(data):
    found = rla.difference_from_origin(data.reward)
    own = data.reward.values.astype(float).mean(-1)
    d = own[5, 1] - own[3, 2]
    assert found["mean"].values[5, 1] == pytest.approx(d.mean(), rel=1e-10)
    assert found["standard_error"].values[5, 1] == pytest.approx(stats.sem(d), rel=1e-10)
    assert found["mean"].values[3, 2] == 0


def test_radius_and_shells_on_a_grid_that_is_not_square():
    alpha, beta = np.array([-0.1, 0.0, 0.1]), np.array([-0.2, -0.1, 0.0, 0.1])
    radii, index = shells(alpha, beta)
    grid = np.hypot(*np.meshgrid(alpha, beta, indexing="ij"))
    np.testing.assert_allclose(radii[index].reshape(grid.shape), grid)
    assert len(radii) == 5
    # The published grid has 61 distinct radii.
    assert len(shells(np.linspace(-0.05, 0.05, 21), np.linspace(-0.05, 0.05, 21))[0]) == 61


def test_radial_profile_is_the_mean_over_a_shell(data):
    found = data.landscape.radial_profile("reward")
    own = data.reward.values.astype(float).mean(-1)
    radii, index = shells(data.alpha.values, data.beta.values)
    flat = own.reshape(-1, 20)
    for shell, radius in enumerate(radii):
        rows = flat[index == shell].mean(0)
        assert found["radius"].values[shell] == pytest.approx(radius)
        assert found["mean"].values[shell] == pytest.approx(rows.mean(), rel=1e-10)
        assert found["standard_error"].values[shell] == pytest.approx(stats.sem(rows), rel=1e-8)
    assert found["points"].sum() == 35


@pytest.mark.parametrize("angle", [0.0, 0.4, np.pi / 2, 2.0])
def test_a_ray_interpolates_between_grid_points(data, angle):
    mean = data.landscape.mean("reward")["mean"]
    found = rla.ray(mean, angle)
    reference = RegularGridInterpolator((data.alpha.values, data.beta.values), mean.values)
    r = found["distance"].values
    assert len(r) >= 3
    assert 0.0 in r
    inside = np.clip(np.stack([r * np.cos(angle), r * np.sin(angle)], 1), -0.05, 0.05)
    np.testing.assert_allclose(found.values, reference(inside), atol=1e-12)


def test_entropy_has_quantiles_over_prompts(data):
    found = data.landscape.entropy()
    own = data.entropy.values.astype(float).mean(-1)
    np.testing.assert_allclose(
        found["quantile_of_prompts"].transpose("quantile", "alpha", "beta"), np.quantile(own, [0.1, 0.5, 0.9], axis=-1)
    )
    assert found["mean"].attrs["units"] == "nat"


def test_a_run_is_one_lazy_dataset(tmp_path):
    synthetic.write_run(tmp_path, steps=(0, 5), slices=(0, 3), prompts=8, points=5)
    run = rla.open_run(tmp_path)
    assert run.reward.dims == ("step", "slice_seed", "alpha", "beta", "prompt", "rollout")
    assert run.reward.chunks is not None, "nothing is read before it is asked for"
    one = synthetic.landscape("mixed", prompts=8, points=5, step=5, slice_seed=3)
    np.testing.assert_array_equal(run.reward.sel(step=5, slice_seed=3), one.reward)
    lazy = run.landscape.per_prompt()
    assert lazy.reward.chunks is not None
    np.testing.assert_allclose(lazy.reward.sel(step=5, slice_seed=3), one.landscape.per_prompt().reward)
    assert list(rla.open_run(tmp_path, steps=[5]).step) == [5]
    with pytest.raises(AnalysisError, match="no dataset of steps"):
        rla.open_run(tmp_path, steps=[7])


def test_a_combination_that_was_not_measured_is_missing(tmp_path):
    synthetic.write_run(tmp_path, steps=(0, 5), slices=(0,), prompts=8, points=5)
    synthetic.write_run(tmp_path, steps=(5,), slices=(1,), prompts=8, points=5)
    run = rla.open_run(tmp_path)
    assert run.reward.sel(step=0, slice_seed=1).isnull().all()
    assert run.reward.sel(step=5, slice_seed=1).notnull().all()


def test_unlike_datasets_are_refused(tmp_path):
    synthetic.write_run(tmp_path, steps=(0,), prompts=8, points=5)
    synthetic.write_run(tmp_path, steps=(1,), prompts=9, points=5)
    with pytest.raises(AnalysisError, match="8 and 9 prompts"):
        rla.open_run(tmp_path)
    other = tmp_path / "other"
    synthetic.write_run(other, steps=(0,), prompts=8, points=5)
    synthetic.write_run(other, steps=(1,), prompts=8, points=7)
    with pytest.raises(AnalysisError, match="different grids"):
        rla.open_run(other)
    third = tmp_path / "third"
    synthetic.write_run(third, steps=(0,), prompts=8, points=5, seed=0)
    synthetic.write_run(third, steps=(1,), prompts=8, points=5, seed=1)
    with pytest.raises(AnalysisError, match="different prompts"):
        rla.open_run(third)
    fourth = tmp_path / "fourth"
    synthetic.write_run(fourth, steps=(0,), prompts=8, points=5)
    synthetic.landscape(prompts=8, points=5, step=1).drop_vars("entropy").to_netcdf(
        fourth / "landscape_step000001_slice0.nc"
    )
    with pytest.raises(AnalysisError, match="different variables \\(entropy\\)"):
        rla.open_run(fourth)


def test_what_is_not_a_landscape_is_named(tmp_path, data):
    with pytest.raises(AnalysisError, match="does not exist"):
        rla.open_landscape(tmp_path / "none.nc")
    (tmp_path / "junk.nc").write_text("junk")
    with pytest.raises(AnalysisError, match="cannot be read as netCDF"):
        rla.open_landscape(tmp_path / "junk.nc")
    data.drop_vars("kl_k1").to_netcdf(tmp_path / "lacking.nc")
    with pytest.raises(AnalysisError, match="it has no kl_k1"):
        rla.open_landscape(tmp_path / "lacking.nc")
    with pytest.raises(AnalysisError, match="no variable 'rewards'; it has"):
        data.landscape.mean("rewards")
    with pytest.raises(AnalysisError, match="missing or repeated"):
        data.assign_coords(alpha=[0.0] * 7).landscape.per_prompt()
    with pytest.raises(AnalysisError, match="'rollout' is empty"):
        data.isel(rollout=[]).landscape.per_prompt()


def test_an_unfinished_journal_is_told(tmp_path):
    folder = tmp_path / "step000004_slice1"
    (folder / "points").mkdir(parents=True)
    (folder / "journal.json").write_text('{"axes": {"alpha": [0, 1], "beta": [0, 1, 2]}}')
    (folder / "points" / "a0000_b0000.nc").touch()
    with pytest.raises(AnalysisError, match="step 4, slice 1: 1 of 6 points measured"):
        list_run(tmp_path)
    synthetic.write_run(tmp_path, steps=(0,), prompts=8, points=5)
    files, unfinished = list_run(tmp_path)
    assert [file.step for file in files] == [0]
    assert unfinished == ["step 4, slice 1: 1 of 6 points measured"]


def test_one_prompt_has_no_error_and_one_rollout_is_enough(data):
    single = data.isel(prompt=[0])
    assert single.landscape.mean()["standard_error"].isnull().all()
    assert single.landscape.mean()["mean"].notnull().all()
    assert data.isel(rollout=[0]).landscape.mean()["standard_error"].notnull().all()


def test_importing_is_light():
    code = (
        "import sys, time; start = time.process_time(); import rlvr_landscape_analysis; "
        "print(time.process_time() - start); "
        "print([m for m in ('torch', 'vllm', 'verifiers', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    times = []
    for _ in range(3):
        lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        assert lines[1] == "[]"
        times.append(float(lines[0]))
    assert min(times) < 2.0
