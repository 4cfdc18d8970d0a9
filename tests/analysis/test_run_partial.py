"""Directories without a finished grid: censuses, paths and boundaries alone, and sweeps that are not finished."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from rlvr_landscape_analysis import AnalysisError, analyse_run
from rlvr_landscape_analysis.report.page import write_report


def census_directory(tmp_path, whole=True):
    """The real census of tests/analysis/data; not `whole`: its journal with the points of five of eight directions."""
    file = Path(__file__).parent / "data" / "census" / "census_step000000.nc"
    tmp_path.mkdir(exist_ok=True)
    if whole:
        shutil.copy(file, tmp_path)
        return tmp_path
    with xr.open_dataset(file) as data:
        data = data.load()
    folder = tmp_path / "step000000_census"
    (folder / "points").mkdir(parents=True)
    axes = {name: data[name].values.tolist() for name in ("direction", "sign", "radius")}
    journal = {"axes": axes, "configuration": {"census": {"unit": "theta"}}, "step": 0}
    (folder / "journal.json").write_text(json.dumps(journal | {"prompts_sha256": data.attrs["prompts_sha256"]}))
    data[["base_reward", "base_status"]].drop_vars(["step"], errors="ignore").to_netcdf(folder / "base.nc")
    names = ["reward", "kl_k1", "surrogate", "realised_step", "status"]
    for d, s, r in np.ndindex(8, 2, 3):
        if (d, s, r) < (5, 1, 0):
            point = data[names].isel(direction=d, sign=s, radius=r)
            point[names].reset_coords(drop=True).to_netcdf(folder / "points" / f"d{d:03d}_s{s:03d}_r{r:03d}.nc")
    (folder / "points" / ".d005_s001_r000.nc.tmp").write_bytes(b"half a file")
    return tmp_path


def test_a_directory_without_a_grid_is_analysed(tmp_path):
    analysis = analyse_run(census_directory(tmp_path))
    assert analysis.maps == {}
    assert analysis.evidence.census[0].attrs["directions"] == 8
    assert {claim.verdict for claim in analysis.claims} == {"not measurable"}
    assert "census_step000000.nc" in analysis.sources
    written = write_report(analysis, tmp_path / "report", animation=False)
    page = written[0].read_text()
    assert "Census of step 0." in page
    assert 'id="frontier"' in page
    assert page.count("Reward and KL of random directions, step 0") == 3, "alternative text, label and caption"
    assert "configuration_sha256" in page


def test_an_unfinished_census_gives_a_partial_report_that_says_so(tmp_path):
    analysis = analyse_run(census_directory(tmp_path, whole=False))
    (note,) = [note for note in analysis.notes if "Unfinished" in note]
    assert note == (
        "Unfinished: step 0, census: 33 of 48 points measured. The figures show its 5 directions that are whole; no "
        "claim rests on them."
    )
    whole = analyse_run(census_directory(tmp_path / "whole")).evidence.census[0]
    part = analysis.evidence.census[0]
    np.testing.assert_allclose(part["point_kl"], whole["point_kl"].isel(direction=slice(5)), rtol=1e-6)
    assert {claim.verdict for claim in analysis.claims} == {"not measurable"}
    page = write_report(analysis, tmp_path / "report", animation=False)[0].read_text()
    assert "33 of 48 points measured" in page


def test_an_unfinished_design_beside_a_finished_one_is_said(tmp_path):
    census_directory(tmp_path)
    (tmp_path / "step000010_boundary").mkdir()
    (tmp_path / "step000010_boundary" / "journal.json").write_text('{"axes": {}}')
    notes = analyse_run(tmp_path).notes
    assert "Unfinished: step 10, boundary: not finished." in notes


def test_a_directory_with_nothing_says_what_is_missing(tmp_path):
    with pytest.raises(AnalysisError, match="holds no finished landscape"):
        analyse_run(tmp_path)
    with pytest.raises(AnalysisError, match="holds nothing finished of step 7"):
        analyse_run(census_directory(tmp_path), steps=[7])


def test_a_dataset_of_another_design_than_its_name_says_is_refused(tmp_path):
    census_directory(tmp_path)
    shutil.copy(tmp_path / "census_step000000.nc", tmp_path / "path_step000000.nc")
    with pytest.raises(AnalysisError, match=r"path_step000000\.nc is of the design 'census', not of 'path'"):
        analyse_run(tmp_path)


def test_censuses_of_different_tasks_in_one_directory_are_refused(tmp_path):
    census_directory(tmp_path)
    with xr.open_dataset(tmp_path / "census_step000000.nc") as data:
        other = data.load().assign_coords(step=10).assign_attrs(prompts_sha256="another")
    other.to_netcdf(tmp_path / "census_step000010.nc")
    with pytest.raises(AnalysisError, match="different prompts; analyse them apart"):
        analyse_run(tmp_path)


def test_one_design_of_one_step_in_two_directories_is_refused(tmp_path):
    from rlvr_landscape_analysis.evidence import open_evidence

    folders = [census_directory(tmp_path / name) for name in ("one", "two")]
    with pytest.raises(AnalysisError, match="are both the census of step 0"):
        open_evidence(*folders)
