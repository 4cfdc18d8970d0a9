"""Paths against random directions at equal KL, against truths known by construction."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from rlvr_landscape_analysis import AnalysisError, synthetic_designs
from rlvr_landscape_analysis.designs import census_points
from rlvr_landscape_analysis.evidence import RunEvidence, analyse_evidence
from rlvr_landscape_analysis.statistics.path import (
    compared_position,
    path,
    path_points,
    prompts_of,
    rays_at,
)
from rlvr_landscape_analysis.synthetic_designs import CensusTruth, PathTruth

RADII = (1.25, 2.5, 5.0, 10.0)


def true_random_change(truth: CensusTruth, kl: float) -> float:
    """Mean over directions of the reward change at a KL: u = √(kl / (K g)) along each, mean over g."""
    g = np.random.default_rng(0).gamma(truth.dimensions / 2, 2 / truth.dimensions, 400_000)
    known = (g - 1) / np.sqrt(2 / truth.dimensions)
    u = np.sqrt(kl / (truth.kl * g))
    return float(np.mean(u * (truth.drift + truth.spread * truth.correlation * known)))


def test_advantage_and_fisher_ratio_find_the_truth():
    ground, along = CensusTruth(kl=8.0), {"displacement": PathTruth(kl=1.0)}
    points = census_points([synthetic_designs.census(ground, pairs=300, radii=RADII, prompts=300, rollouts=4)])[0]
    data = synthetic_designs.path(along, prompts=300, rollouts=16)
    found = path(data, points).sel(path="displacement")
    for x in (-1.0, 0.5, 1.0, 1.5):
        here = found.sel(position=x)
        truth = along["displacement"]
        kl = truth.kl * x**2
        assert float(here["kl"]) == pytest.approx(kl, rel=0.15)
        assert float(here["change"]) == pytest.approx(truth.slope * x - truth.bend * x**2, abs=0.02)
        random = true_random_change(ground, kl)
        assert float(here["random_change"]) == pytest.approx(random, abs=0.006)
        assert float(here["advantage"]) == pytest.approx(truth.slope * x - truth.bend * x**2 - random, abs=0.02)
        # 2 KL / length² is 2 · 1 / 0.01² along the path and 2 · 8 / 0.1² over random directions.
        assert float(here["fisher_ratio"]) == pytest.approx(2e4 / 1600, rel=0.2)
    assert np.isnan(found["advantage"].sel(position=0.0))
    assert "KL from the checkpoint" in str(found["reason"].sel(position=0.0).item())


def test_what_no_ray_reaches_is_not_compared():
    points = census_points([synthetic_designs.census(CensusTruth(kl=1.0), radii=RADII)])[0]
    found = path(synthetic_designs.path({"a": PathTruth(kl=2.0)}), points).sel(path="a", position=1.5)
    assert np.isnan(found["advantage"])
    assert "random rays reach" in str(found["reason"].item())
    assert np.isfinite(found["kl_interval"]).all()


def test_rays_are_linear_in_the_root_of_kl():
    kl = np.array([[1.0, 4.0, 9.0]])
    values = np.array([[0.1, 0.2, 0.5]])
    np.testing.assert_allclose(rays_at(kl, np.array([0.0, 0.25, 1.0, 2.25, 9.0]), values), [[0, 0.05, 0.1, 0.15, 0.5]])
    assert np.isnan(rays_at(kl, np.array([9.1]), values)).all()
    np.testing.assert_allclose(rays_at(np.array([[1.0, 0.5, 4.0]]), np.array([1.0]), values), [[0.1]])


def test_a_path_alone_has_its_own_numbers():
    data = synthetic_designs.path({"a": PathTruth(), "b": PathTruth(slope=0.0)})
    found = path(data)
    assert found["advantage"].isnull().all()
    assert found["change_interval"].notnull().all()
    change = path_points(data)[0].change
    np.testing.assert_allclose(found["change"].sel(path="a")[0], change[0].mean())


def test_a_path_is_read_where_random_directions_reach_its_kl():
    positions, nan = [-1.5, -1.0, -0.5, -0.25, 0.0, 0.5], np.nan

    def along(*advantage):
        return xr.Dataset({"advantage": ("position", np.array(advantage))}, {"position": positions})

    assert compared_position(along(0.1, 0.1, 0.1, 0.1, nan, 0.1)) == 1, "the target itself, and nothing beyond it"
    assert compared_position(along(0.1, nan, 0.1, 0.1, nan, 0.1)) == 2
    assert compared_position(along(0.1, nan, nan, nan, nan, 0.1)) is None
    assert compared_position(along(0.1, nan, nan, nan, nan, 0.1), target=1.0) == 5


def test_a_position_that_failed_is_left_out_and_a_prompt_too():
    data = synthetic_designs.path({"a": PathTruth(), "b": PathTruth()})
    data["reward"][0, 2] = np.nan
    data["reward"][1, 1, 7] = np.nan
    one, other = path_points(data)
    assert len(one.position) == 5
    assert len(other.position) == 6
    assert one.kl.shape[1] == 63
    found = path(data)
    assert np.isnan(found["kl"].sel(path="a", position=0.0))
    assert found["kl"].sel(path="b").notnull().all()


@pytest.mark.parametrize("prompts", [16, 128])
def test_a_path_on_more_or_fewer_tasks_than_the_census_is_shown_alone_and_a_note_says_why(prompts):
    around, along = synthetic_designs.census(radii=RADII), synthetic_designs.path({"a": PathTruth()}, prompts=prompts)
    with pytest.raises(AnalysisError, match="different prompts"):
        prompts_of(along, census_points([around])[0])
    found = analyse_evidence(RunEvidence("run", {10: around}, {10: along}))
    (note,) = [note for note in found.notes if "path of step 10 is not compared with the census" in note]
    assert f"measured on {prompts} prompts and the census on 64" in note
    assert found.path[10].attrs["prompts"] == prompts
    assert found.path[10]["advantage"].isnull().all()


def test_path_and_census_must_belong_together():
    points = census_points([synthetic_designs.census(radii=RADII)])[0]
    with pytest.raises(AnalysisError, match="different prompts"):
        path(synthetic_designs.path({"a": PathTruth()}, seed=1), points)
    with pytest.raises(AnalysisError, match="step 20"):
        path(synthetic_designs.path({"a": PathTruth()}, step=20), points)
    broken = synthetic_designs.census(radii=RADII)
    broken["reward"][:, :, :, 3] = np.nan
    around = census_points([broken])[0]
    data = synthetic_designs.path({"a": PathTruth()})
    assert path(data, around, census_kept=prompts_of(data, around)).attrs["prompts"] == 63
