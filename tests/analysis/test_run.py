"""A whole run: what is computed, what is said when something is missing."""

from __future__ import annotations

import numpy as np
import pytest
import rlvr_landscape_analysis as rla
import xarray as xr
from rlvr_landscape_analysis import AnalysisError, Bootstrap, synthetic

QUICK = Bootstrap(resamples=200)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    synthetic.write_run(root, steps=(0, 1, 20), slices=(0,), points=5, prompts=24, rollouts=4)
    synthetic.write_run(root, steps=(1,), slices=(7,), points=5, prompts=24, rollouts=4)
    return root


@pytest.fixture(scope="module")
def analysis(run):
    return rla.analyse_run(run, bootstrap=QUICK)


def test_every_dataset_is_there_and_what_is_not_says_so(analysis):
    assert set(analysis.maps) == {(0, 0), (1, 0), (1, 7), (20, 0)}
    table = analysis.correlations
    assert table.corrected.dims == ("step", "slice_seed", "pair", "control")
    missing = table.sel(step=0, slice_seed=7)
    assert missing.pearson.isnull().all()
    assert (missing.reason == "not measured").all()
    assert str(analysis.improvement.reason.sel(step=0, slice_seed=7).item()) == "not measured"
    assert analysis.slices is not None
    assert int(analysis.slices.slices.sel(step=1, pair="kl_reward", control="none")) == 2


def test_the_numbers_are_those_of_the_single_datasets(run, analysis):
    one = rla.open_landscape(run / "landscape_step000020_slice0.nc")
    xr.testing.assert_allclose(
        analysis.correlations.corrected.sel(step=20, slice_seed=0),
        rla.correlations(one, bootstrap=QUICK).corrected,
    )
    np.testing.assert_allclose(analysis.maps[20, 0].reward, one.landscape.mean()["mean"])
    np.testing.assert_allclose(analysis.maps[20, 0].pass_k, one.landscape.pass_at_k(4)["mean"])
    np.testing.assert_allclose(
        analysis.training.reward.sel(step=20), one.landscape.mean()["mean"].sel(alpha=0, beta=0), rtol=1e-12
    )
    assert analysis.k == 4


def test_the_whole_is_in_agreement_with_the_contract(analysis):
    for map_ in analysis.maps.values():
        for name in ("reward", "kl", "kl_k3", "surrogate", "entropy", "truncated", "pass_1", "pass_k"):
            assert map_[name].dims == ("alpha", "beta")
            assert map_[f"{name}_se"].dims == ("alpha", "beta")
            assert "units" in map_[name].attrs
        assert {"difference", "difference_se", "adjusted_p", "better", "radius"} <= set(map_.data_vars)
        assert map_.attrs["prompts"] == 24
    assert set(analysis.diagnostics) == {
        "entropy_law_training",
        "entropy_law_slice",
        "two_stage",
        "pass_at_k",
        "crossing",
    }
    assert list(analysis.curvature["quantity"].values) == ["reward", "kl"]
    assert [claim.name for claim in analysis.claims] == ["T1", "T2", "T3"]


def test_steps_can_be_chosen(run):
    assert set(rla.analyse_run(run, bootstrap=QUICK, steps=[20]).maps) == {(20, 0)}
    with pytest.raises(AnalysisError, match="no finished dataset of step 3; finished: 0, 1, 20"):
        rla.analyse_run(run, bootstrap=QUICK, steps=[3])


def change(run, tmp_path, edit):
    for path in run.glob("*_slice0.nc"):
        with xr.open_dataset(path) as data:
            data = data.load()
        if path.name == "landscape_step000020_slice0.nc":
            data = edit(data)
        data.to_netcdf(tmp_path / path.name)
    return tmp_path


def test_failed_rollouts_and_lost_points_are_told(run, tmp_path):
    def edit(data):
        data.reward[0, 0] = np.nan
        data.reward[1, 1, 2] = np.nan
        return data

    found = rla.analyse_run(change(run, tmp_path, edit), bootstrap=QUICK)
    notes = " ".join(found.notes)
    assert "of the rollouts failed" in notes
    assert "1 points have too few values" in notes
    assert "1 prompts are missing at some point" in notes
    assert found.maps[20, 0].reward.isnull().sum() == 1


def test_a_constant_reward_is_said_not_guessed(run, tmp_path):
    found = rla.analyse_run(change(run, tmp_path, lambda d: d.assign(reward=d.reward * 0 + 0.5)), bootstrap=QUICK)
    here = found.correlations.sel(step=20, slice_seed=0, pair="kl_reward", control="none")
    assert np.isnan(here.pearson)
    assert "reward the same at all points" in str(here.reason.item())
    assert not found.maps[20, 0].better.any()


@pytest.mark.parametrize("kept", [{"prompt": [0]}, {"rollout": [0]}, {"alpha": [2], "beta": [2]}], ids=str)
def test_one_of_anything_ends_in_words(run, tmp_path, kept):
    for path in run.glob("*_slice0.nc"):
        with xr.open_dataset(path) as data:
            data.isel(kept).to_netcdf(tmp_path / path.name)
    if "prompt" in kept:
        with pytest.raises(AnalysisError, match="two prompts"):
            rla.analyse_run(tmp_path, bootstrap=QUICK)
    elif "alpha" in kept:
        with pytest.raises(AnalysisError, match="no point beside the origin"):
            rla.analyse_run(tmp_path, bootstrap=QUICK)
    else:
        found = rla.analyse_run(tmp_path, bootstrap=QUICK)
        assert found.k == 1
        assert found.claims[2].verdict == "not measurable"


def test_a_file_under_a_wrong_name_is_refused(run, tmp_path):
    (tmp_path / "landscape_step000003_slice0.nc").write_bytes((run / "landscape_step000001_slice0.nc").read_bytes())
    with pytest.raises(AnalysisError, match="does not agree with its name"):
        rla.analyse_run(tmp_path, bootstrap=QUICK)


def test_grids_may_differ_between_snapshots_and_a_note_says_so(tmp_path):
    synthetic.write_run(tmp_path, steps=(0,), points=5, prompts=12)
    synthetic.write_run(tmp_path, steps=(1,), points=7, prompts=12)
    found = rla.analyse_run(tmp_path, bootstrap=QUICK)
    assert "grids differ" in " ".join(found.notes)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.01), (0.2, 0.8), (0.02, 0.03)])
def test_a_damaged_dataset_is_named(tmp_path, start, end):
    path = synthetic.write_run(tmp_path, steps=(0, 1), points=5, prompts=16, rollouts=4)[1]
    content = bytearray(path.read_bytes())
    part = slice(int(start * len(content)), int(end * len(content)))
    content[part] = bytes(255 - byte for byte in content[part])
    path.write_bytes(content)
    with pytest.raises(AnalysisError, match=rf"{path.name} cannot be read as netCDF .*copy it again"):
        rla.analyse_run(tmp_path, bootstrap=QUICK)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("status", 7, "status has values other than 0, 1 and 2"), ("reward", np.nan, "1 values of reward are missing")],
)
def test_values_that_no_sweep_writes_are_refused(tmp_path, name, value, message):
    (path,) = synthetic.write_run(tmp_path, steps=(0,), points=5, prompts=16, rollouts=4)
    with xr.open_dataset(path) as opened:
        data = opened.load()
    data["status"] = data["truncated"].astype("i1")
    data["status"][0, 0, 3, 0] = 2
    data["reward"][0, 0, 3, 0] = np.nan
    data.to_netcdf(path)
    rla.analyse_run(tmp_path, bootstrap=QUICK)
    data[name][1, 2, 3, 0] = value
    data.to_netcdf(path)
    with pytest.raises(AnalysisError, match=f"{path.name} is damaged: {message}"):
        rla.analyse_run(tmp_path, bootstrap=QUICK)
