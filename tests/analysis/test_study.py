"""Claims over several runs from the command line: what is written, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from rlvr_landscape_analysis import synthetic_designs
from rlvr_landscape_analysis.designs import census_points
from rlvr_landscape_analysis.study import main
from rlvr_landscape_analysis.synthetic_designs import CensusTruth, PathTruth

START, LATER = (0.004, 0.008, 0.016, 0.03), (0.4, 0.8, 1.6, 3.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs and a control; censuses, paths and boundaries in directories of their own, as sweeps leave them."""
    root = tmp_path_factory.mktemp("runs")
    for r, (name, correlation) in enumerate({"a": -0.8, "b": -0.8, "random": 0.0}.items()):
        for design in ("census", "path", "boundary"):
            (root / name / design).mkdir(parents=True)
        for step in (0, 10):
            unit, radii = ("theta", START) if step == 0 else ("displacement", LATER)
            truth = CensusTruth(correlation=0.0 if step == 0 else correlation, spread=0.06)
            data = synthetic_designs.census(truth, pairs=48, rollouts=8, unit=unit, radii=radii, step=step)
            # Runs draw other directions after step 0, which they share.
            if step:
                data = synthetic_designs.census(
                    truth, pairs=48, rollouts=8, unit=unit, radii=radii, step=step + 100 * r
                ).assign_coords(step=step)
            seeds = 1000 * (r if step else 0) + step + np.arange(48) // 2
            data = data.assign_coords(direction_seed=("direction", seeds))
            mode = {"training_reward_mode": "random"} if name == "random" and step else {}
            data.assign_attrs(mode).to_netcdf(root / name / "census" / f"census_step{step:06d}.nc")
            rates = np.repeat([0.3 + 0.04 * step, 0.0], 32)
            boundary = synthetic_designs.boundary(rates, rollouts=64, step=step, seed=r).assign_attrs(mode)
            boundary.to_netcdf(root / name / "boundary" / f"boundary_step{step:06d}.nc")
        path = synthetic_designs.path({"displacement": PathTruth(kl=0.5)}, rollouts=8).assign_attrs(mode)
        path.to_netcdf(root / name / "path" / "path_step000010.nc")
    return root


def arguments(root, *names):
    return [f"{name}={','.join(str(root / name / kind) for kind in ('census', 'path', 'boundary'))}" for name in names]


def test_a_study_of_two_runs_and_a_control(runs, tmp_path, capsys):
    assert main([*arguments(runs, "a", "b", "random"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "T1 supported" in printed
    assert "T3 supported" in printed
    page = (tmp_path / "out" / "claims.md").read_text()
    assert "2 runs, 96 random directions" in page
    assert "from runs on random rewards" in page
    assert "random (trained on random rewards)" in page
    import pandas as pd

    table = pd.read_csv(tmp_path / "out" / "census.csv")
    assert len(table) == 3 * 2 * 4
    assert {"run", "step", "radius", "correlation_kl_reward", "correlation_kl_reward_low", "density_high"} <= set(table)
    path = pd.read_csv(tmp_path / "out" / "path.csv")
    assert {"path", "position", "advantage", "advantage_low", "fisher_ratio"} <= set(path)
    assert set(pd.read_csv(tmp_path / "out" / "boundary.csv")["k"]) == {1, 2, 4, 8, 16, 32, 64}
    assert (tmp_path / "out" / "figures" / "a_frontier_step000010.pdf").is_file()
    assert (tmp_path / "out" / "figures" / "b_boundary.png").is_file()


def test_runs_share_directions_where_their_seeds_agree(runs):
    import xarray as xr

    def key(name, step):
        with xr.open_dataset(runs / name / "census" / f"census_step{step:06d}.nc") as data:
            return census_points([data.load()], run=name)[0].directions_key

    assert key("a", 0) == key("b", 0)
    assert key("a", 10) != key("b", 10)


def test_what_cannot_be_a_study_is_said(runs, tmp_path, capsys):
    def error(*given):
        assert main([*given, "--out", str(tmp_path)]) == 2
        return capsys.readouterr().err

    assert "is not NAME=DIR" in error("somewhere")
    assert "is not a directory" in error(f"a={tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    assert "has no finished census" in error(f"a={tmp_path / 'empty'}")
    one = arguments(runs, "a")[0]
    assert "two runs are called 'a'" in error(one, one)
    twice = f"a={runs / 'a' / 'census'},{runs / 'b' / 'census'}"
    assert "are both the census of step 0" in error(twice)
