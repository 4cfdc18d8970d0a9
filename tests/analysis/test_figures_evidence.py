"""Figures of censuses, paths and boundaries draw the numbers that the statistics found, and say what is missing."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
from rlvr_landscape_analysis import AnalysisError, Bootstrap, figures, synthetic_designs
from rlvr_landscape_analysis.evidence import RunEvidence, analyse_evidence
from rlvr_landscape_analysis.statistics.census import census as statistics_of
from rlvr_landscape_analysis.synthetic_designs import CensusTruth, PathTruth


@pytest.fixture(scope="module")
def found():
    run = RunEvidence("run")
    for step in (0, 10, 40):
        truth = CensusTruth(correlation=-0.6, spread=0.06, kl=8.0)
        run.censuses[step] = synthetic_designs.census(truth, step=step, rollouts=8)
        run.paths[step] = synthetic_designs.path({"displacement": PathTruth(kl=0.5), "next": PathTruth()}, step=step)
    for step, rates in synthetic_designs.rates_over_training((0, 10, 40)).items():
        run.boundaries[step] = synthetic_designs.boundary(rates, rollouts=64, step=step)
    return analyse_evidence(run, bootstrap=Bootstrap(resamples=100))


def test_the_frontier_draws_every_random_policy_and_every_position(found):
    census, path = found.census[40], found.path[40]
    drawn = figures.frontier(census, path)
    cloud = drawn["cloud"].get_offsets()
    kl = census["point_kl"].values.ravel()
    np.testing.assert_allclose(np.sort(cloud[:, 0]), np.sort(kl[kl > 0]))
    np.testing.assert_allclose(drawn["mean"].get_ydata(), census["change"])
    for name in ("displacement", "next"):
        lines = [artist for artist in drawn["paths"][name] if hasattr(artist, "lines")]
        points = np.concatenate([bars.lines[0].get_ydata() for bars in lines])
        here = path["change"].sel(path=name).values[path["position"] != 0]
        np.testing.assert_allclose(np.sort(points), np.sort(here))
    assert drawn["ax"].get_xscale() == "log"
    assert "nat" in drawn["ax"].get_xlabel()
    assert figures.frontier(census)["paths"] == {}


def test_the_frontiers_legend_covers_nothing_and_leaves_the_axes_their_width(found, tmp_path):
    drawn = figures.frontier(found.census[40], found.path[40].sel(path=["displacement"]))
    ax = drawn["ax"]
    figures.save_figure(ax.figure, tmp_path / "frontier")
    legend, axes = drawn["legend"].get_window_extent(), ax.get_window_extent()
    assert legend.y0 >= axes.y1 - 1
    assert axes.width > 0.7 * ax.figure.bbox.width


def test_two_censuses_of_one_snapshot_are_compared(found):
    other = synthetic_designs.census(CensusTruth(correlation=-0.2, spread=0.03, kl=2.0), step=40, rollouts=8, seed=5)
    two = {"inside": found.census[40], "outside": statistics_of(other)}
    drawn = figures.compare_censuses(two)
    for name, data in two.items():
        for quantity in ("change", "kl"):
            np.testing.assert_allclose(drawn["series"][name][quantity].get_ydata(), data[quantity])
            dots = drawn["points"][name, quantity].get_offsets()[:, 1]
            np.testing.assert_allclose(np.sort(dots), np.sort(data[f"point_{quantity}"].values.ravel()))
    assert [text.get_text() for text in drawn["legend"].get_texts()] == ["inside", "outside"]
    assert "nat" in drawn["axes"]["kl"].get_ylabel()
    with pytest.raises(AnalysisError, match="give two"):
        figures.compare_censuses({"inside": found.census[40]})
    with pytest.raises(AnalysisError, match=r"of the steps \[10, 40\]"):
        figures.compare_censuses({"a": found.census[10], "b": found.census[40]})


def test_series_against_the_radius(found):
    drawn = figures.correlation_by_radius(found.census)
    for step, data in found.census.items():
        y = drawn["series"][step]["line"].get_ydata()
        shown = np.isfinite(y)
        assert shown.any()
        np.testing.assert_allclose(y[shown], data["correlation"].sel(pair="kl_reward").values[shown])
        assert drawn["series"][step]["bars"] is not None
    two = {step: found.census[step] for step in (0, 40)}
    assert figures.correlation_by_radius(two)["series"][0]["band"] is not None
    assert "‖move‖" in figures.density_by_radius(two, against="relative")["ax"].get_xlabel()
    shares = figures.density_by_radius(two)
    np.testing.assert_allclose(shares["lower"][40].get_ydata(), found.census[40]["density_lower"])
    unknown = found.census[40].copy(deep=True)
    unknown["density"][:] = 0.4
    unknown["density_interval"].values[0] = 0.0, 1.0
    unknown["density_interval"].values[1:] = 0.2, 0.6
    share = figures.density_by_radius({0: found.census[0], 40: unknown})["series"][40]["line"].get_ydata()
    assert np.isnan(share[0])
    assert (share[1:] == 0.4).all()
    assert "nat" in figures.correlation_by_radius(two, against="kl")["ax"].get_xlabel()
    with pytest.raises(AnalysisError, match="not 'steps'"):
        figures.correlation_by_radius(two, against="steps")
    with pytest.raises(AnalysisError, match="no census"):
        figures.correlation_by_radius({})


def test_what_is_not_defined_is_said(found):
    empty = found.census[0].copy(deep=True)
    empty["correlation"][...] = np.nan
    empty["density"][...] = np.nan
    empty["point_kl"][...] = np.nan
    for drawn in (
        figures.correlation_by_radius({0: empty}),
        figures.density_by_radius({0: empty}),
        figures.frontier(empty),
        figures.pass_at_k_by_step({}),
    ):
        assert drawn["message"] is not None
    both = figures.curvature_over_training({}, {})
    assert len(both["messages"]) == 2


def test_pass_at_k_marks_the_crossing(found):
    changes = {step: change.copy(deep=True) for step, change in found.change.items()}
    changes[40]["crossing_k"] = ((), 20.0)
    changes[10]["crossing_k"] = ((), np.nan)
    drawn = figures.pass_at_k_by_step(found.boundary, changes)
    assert list(drawn["crossings"]) == [40]
    assert drawn["crossings"][40].get_xdata()[0] == 20.0
    np.testing.assert_allclose(drawn["series"][10]["line"].get_ydata(), found.boundary[10]["pass_at_k"])


def test_curvature_and_ratio_over_training(found):
    drawn = figures.curvature_over_training(found.census, found.path)
    np.testing.assert_allclose(
        drawn["curvature"].lines[0].get_ydata(), [float(found.census[step]["curvature"][0]) for step in (0, 10, 40)]
    )
    expected = [float(found.path[step]["fisher_ratio"].sel(path="displacement", position=-1.0)) for step in (0, 10, 40)]
    np.testing.assert_allclose(drawn["ratios"]["displacement"].lines[0].get_ydata(), expected)
    assert not drawn["messages"]


def test_one_step_has_a_whole_number_on_its_axis(found):
    drawn = figures.curvature_over_training({40: found.census[40]}, {40: found.path[40]})
    ticks = drawn["axes"][1].get_xticks()
    assert 40 in ticks
    assert (ticks == np.round(ticks)).all()


def test_at_most_six_steps_and_settings_stay(found, tmp_path):
    before = dict(matplotlib.rcParams)
    many = {step: found.census[0] for step in range(20)}
    drawn = figures.correlation_by_radius(many)
    assert len(drawn["series"]) == 6
    assert {0, 19} <= set(drawn["series"])
    assert drawn["legend"].get_title().get_text() == "(without 14 steps)"
    seven = figures.correlation_by_radius(dict.fromkeys((0, 1, 2, 5, 10, 20, 40), many[0]))
    assert seven["legend"].get_title().get_text() == "(without step 5)"
    assert not figures.correlation_by_radius({0: many[0], 1: many[1]})["legend"].get_title().get_text()
    paths = figures.save_figure(drawn["ax"].figure, tmp_path / "correlation")
    assert all(path.stat().st_size > 1000 for path in paths)
    assert dict(matplotlib.rcParams) == before


def test_a_lonely_value_has_a_bar(found):
    """A correlation that is known at one radius only: its interval as a band would be invisible."""
    census = found.census[40].copy(deep=True)
    census["correlation"][:-1] = np.nan
    drawn = figures.correlation_by_radius({40: census})["series"][40]
    (segment,) = drawn["bars"].get_segments()
    np.testing.assert_allclose(segment[:, 1], census["correlation_interval"].sel(pair="kl_reward")[-1])
    assert figures.correlation_by_radius({40: found.census[40]})["series"][40]["bars"] is None
