"""Progressive sweeps: which part of a grid is measured, what it says about the whole, when it is enough."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import rlvr_landscape_analysis as rla
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from rlvr_landscape_analysis import AnalysisError, Bootstrap, synthetic
from rlvr_landscape_analysis.datasets import list_run
from rlvr_landscape_analysis.report.page import write_report
from rlvr_landscape_analysis.statistics.progressive import (
    SHARE,
    Design,
    Look,
    axis_levels,
    final_reason,
    first_design,
    grid_levels,
    interpolated,
    look,
    next_design,
)
from scipy.interpolate import CubicSpline

HERE = Path(__file__).parent
REAL = sorted((HERE / "data/laptop").glob("*.nc"))
LONG = sorted((HERE / "data/long").glob("*.nc"))
"""Around five snapshots of a run of 40 steps."""
CLUB = sorted((HERE / "data/club").glob("*.nc"))
"""Around three snapshots of the same run, measured whole after a live progressive sweep."""
QUICK = Bootstrap(resamples=300)

sides = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=12)


@st.composite
def axes(draw):
    """Ascending coordinates around 0, unlike on both sides and unevenly spaced."""
    left, right = (np.cumsum(draw(sides)) for _ in range(2))
    return np.concatenate([-left[::-1], [0.0], right])


def part(data: xr.Dataset, design: Design) -> xr.Dataset:
    rows, columns = grid_levels(data["alpha"].values, data["beta"].values)[design.level]
    return data.isel(alpha=rows, beta=columns, prompt=slice(design.prompts))


def sweep(data: xr.Dataset, asked: float, statistic: str = "correlation", bootstrap: Bootstrap = QUICK) -> list[Look]:
    """All looks of a progressive sweep that measures what `data` holds."""
    axes = data["alpha"].values, data["beta"].values
    design, looks = first_design(*axes, data.sizes["prompt"]), []
    while design is not None:
        looks.append(look(part(data, design), *axes, design, statistic=statistic, bootstrap=bootstrap))
        design = next_design(looks[-1], asked, *axes, data.sizes["prompt"])
    return looks


def share(data: xr.Dataset, found: Look) -> float:
    """Rollouts of a look, of those of the full grid; the checkpoint's own batch counts in both."""
    prompts = data.sizes["prompt"]
    return (found.points * found.design.prompts + prompts) / ((data["alpha"].size * data["beta"].size + 1) * prompts)


@given(axes())
def test_levels_are_nested_and_keep_the_origin_and_both_ends(axis):
    levels = axis_levels(axis)
    np.testing.assert_array_equal(levels[-1], np.arange(len(axis)))
    for coarse, fine in pairwise(levels):
        assert set(coarse) < set(fine)
        assert (np.diff(coarse) > 0).all()
        # Half of each side, rounded up.
        for side in (axis < 0, axis > 0):
            assert side[coarse].sum() == (side[fine].sum() + 1) // 2
    coarsest = axis[levels[0]]
    assert coarsest.tolist() == [axis[0], 0.0, axis[-1]]


@pytest.mark.parametrize(
    ("points", "levels"),
    [
        (3, [[-1, 0, 1]]),
        (7, [[-3, 0, 3], [-3, -2, 0, 2, 3], [-3, -2, -1, 0, 1, 2, 3]]),
        (9, [[-4, 0, 4], [-4, -2, 0, 2, 4], [-4, -3, -2, -1, 0, 1, 2, 3, 4]]),
    ],
)
def test_levels_of_usual_axes(points, levels):
    axis = np.arange(points) - points // 2
    assert [axis[index].tolist() for index in axis_levels(axis)] == levels


@given(axes(), axes())
def test_what_a_level_leaves_out_was_left_out_more_coarsely_before(alphas, betas):
    levels = grid_levels(alphas, betas)
    assert [len(index) for index in levels[-1]] == [len(alphas), len(betas)]
    for before, level in pairwise(levels):
        for axis, coarse, fine in zip((alphas, betas), before, level, strict=True):
            assert set(coarse) <= set(fine)
            assert len(fine) == len(axis) or len(coarse) < len(fine)


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ([-1.0, 1.0], "needs 0 on both axes"),
        ([1.0, 0.0, -1.0], "ascending finite"),
        ([0.0, 0.0, 1.0], "ascending finite"),
        ([0.0, np.nan], "ascending finite"),
        ([[0.0]], "ascending finite"),
    ],
)
def test_other_axes_are_refused(axis, message):
    with pytest.raises(AnalysisError, match=message):
        axis_levels(np.array(axis))


def test_interpolation_is_exact_for_polynomials_prompt_by_prompt():
    alphas, betas = np.array([-1, -0.7, -0.1, 0, 0.2, 0.6, 0.9, 1.5]), np.linspace(-2, 2, 5)
    a, b, prompt = alphas[:, None, None], betas[:, None], np.arange(3.0)
    # Level 1 of β is all of it, and four points of α give a cubic.
    values = prompt + (1 + prompt) * a**3 * b**2 - a * b + b**4
    full = xr.Dataset(
        {"reward": (("alpha", "beta", "prompt"), values, {"units": "1"})},
        {"alpha": alphas, "beta": betas, "step": 7},
        {"reduced": "per_prompt"},
    )
    rows, columns = grid_levels(alphas, betas)[1]
    assert (len(rows), len(columns)) == (5, 5)
    found = interpolated(full.isel(alpha=rows, beta=columns), alphas, betas)
    xr.testing.assert_allclose(found, full, rtol=1e-9, atol=1e-9)
    assert (found.attrs, found.reward.attrs) == (full.attrs, full.reward.attrs)
    assert interpolated(full, alphas, betas) is full


def test_a_prompt_that_is_missing_at_one_point_is_left_out_of_a_look():
    data = synthetic.landscape("mixed", points=9, prompts=48, seed=1)
    design = Design(1, 48)
    holed = data.copy(deep=True)
    holed.reward[0, 0, 5] = np.nan
    axes = data.alpha.values, data.beta.values
    found = look(part(holed, design), *axes, design, bootstrap=QUICK)
    without = data.isel(prompt=np.arange(48) != 5)
    assert found.estimate == pytest.approx(
        look(part(without, Design(1, 47)), *axes, Design(1, 47), bootstrap=QUICK).estimate, rel=1e-12
    )


@pytest.mark.parametrize(
    ("statistic", "control", "name"), [("correlation", "none", "corrected"), ("beyond_radius", "shell", "contribution")]
)
def test_a_look_at_everything_is_the_plain_analysis(statistic, control, name):
    data = synthetic.landscape("kl", points=7, prompts=64, seed=2)
    found = look(data, data.alpha.values, data.beta.values, Design(2, 64), statistic=statistic, bootstrap=QUICK)
    table = rla.correlations(data, bootstrap=QUICK).sel(pair="kl_reward", control=control)
    assert found.estimate == float(table[name])
    assert [found.low, found.high] == table[f"{name}_interval"].values.tolist()
    assert (found.allowance, found.points, found.reason) == (0.0, 49, "")
    assert sweep(data, 1e-3, statistic)[-1] == found


def test_a_coarse_look_is_the_interpolated_landscape_and_an_allowance():
    """Against SciPy's own cubic spline along each axis and a parabola for three points."""
    data = rla.per_prompt(synthetic.landscape("mixed", points=9, prompts=64, seed=3)[["reward", "kl_k1"]])
    axis = data.alpha.values
    design = Design(1, 64)

    def spread(values: xr.DataArray, step: int) -> np.ndarray:
        block, knots = values.values[::step, ::step], axis[::step]
        for dim in (0, 1):
            if len(knots) == 3:
                moved = np.moveaxis(block, dim, 0)
                parabola = np.polynomial.polynomial.polyfit(knots, moved.reshape(3, -1), 2)
                flat = np.polynomial.polynomial.polyval(axis, parabola).T
                block = np.moveaxis(flat.reshape(len(axis), *moved.shape[1:]), 0, dim)
            else:
                block = CubicSpline(knots, block, axis=dim)(axis)
        return block

    def table(step: int) -> xr.Dataset:
        made = data.copy(
            data={name: spread(data[name], step) for name in ("reward", "kl_k1")}
            | {name: data[name].values for name in data.data_vars if name not in ("reward", "kl_k1")}
        )
        return rla.correlations(made, bootstrap=QUICK).sel(pair="kl_reward", control="none")

    fine, rough = table(2), table(4)
    allowance = SHARE * abs(float(fine.corrected) - float(rough.corrected))
    found = look(part(data, design), axis, axis, design, bootstrap=QUICK)
    assert found.estimate == pytest.approx(float(fine.corrected), abs=1e-9)
    assert found.allowance == pytest.approx(allowance, abs=1e-9)
    low, high = fine.corrected_interval.values
    assert [found.low, found.high] == pytest.approx([low - allowance, high + allowance], abs=1e-9)
    assert found.points == 25


def test_bad_requests_are_refused():
    data = synthetic.landscape("mixed", points=5, prompts=16)
    axes = data.alpha.values, data.beta.values
    with pytest.raises(AnalysisError, match="level 2 does not exist; this grid has levels 0 to 1"):
        look(data, *axes, Design(2, 16))
    with pytest.raises(AnalysisError, match="level 0 has alpha at"):
        look(data, *axes, Design(0, 16))
    with pytest.raises(AnalysisError, match="the design has 8 prompts, the data 16"):
        look(data, *axes, Design(1, 8))
    with pytest.raises(AnalysisError, match="unknown statistic 'spearman'; known: correlation, beyond_radius"):
        look(data, *axes, Design(1, 16), statistic="spearman")
    with pytest.raises(AnalysisError, match="no kl_k1"):
        look(data.drop_vars("kl_k1"), *axes, Design(1, 16))
    lopsided = np.array([-0.1, 0.0, 0.03])
    with pytest.raises(AnalysisError, match="make both axes symmetric"):
        look(data, lopsided, lopsided * 1.7, Design(0, 16), statistic="beyond_radius")


designs = st.builds(Design, st.integers(0, 2), st.integers(1, 300))
looks = st.builds(
    lambda design, low, width, allowance, reason: Look(design, low, low, low + width, allowance, 9, reason),
    designs,
    st.floats(-1, 0),
    st.floats(0, 1),
    st.floats(0, 0.5),
    st.sampled_from(["", "no variation of reward"]),
)


@given(looks, st.floats(0.01, 1.5))
def test_a_sweep_only_grows_and_ends(found, asked):
    axis, prompts = np.linspace(-1, 1, 9), 300
    axis[4] = 0
    following = next_design(found, asked, axis, axis, prompts)
    reached = not found.reason and found.high - found.low <= asked
    if reached or found.design == Design(2, prompts):
        assert following is None
    else:
        assert following is not None
        grown = (following.level - found.design.level, following.prompts > found.design.prompts)
        assert grown in ((1, False), (0, True))
        assert following.prompts <= min(2 * found.design.prompts, prompts)


def test_the_grid_is_refined_where_the_allowance_is_the_problem_and_else_the_prompts():
    axis = np.linspace(-1, 1, 9)
    axis[4] = 0

    def after(allowance: float, level: int = 1, prompts: int = 32, low: float = -0.9) -> Design | None:
        return next_design(Look(Design(level, prompts), -0.8, low, -0.7, allowance, 25), 0.1, axis, axis, 100)

    assert first_design(axis, axis, 100) == Design(1, 64)
    assert after(0.03) == Design(2, 32)
    assert after(0.02) == Design(1, 64)
    assert after(0.02, prompts=64) == Design(1, 100)
    assert after(0.02, prompts=100) == Design(2, 100)
    assert after(0.0, level=2, prompts=64) == Design(2, 100)
    assert after(0.0, level=2, prompts=100) is None
    assert after(0.03, low=-0.79) is None


def test_what_is_not_defined_never_stops_a_sweep():
    data = synthetic.landscape("mixed", points=5, prompts=80)
    flat = data.assign(reward=data.reward * 0 + 0.5)
    found = sweep(flat, 2.0)
    assert [one.design for one in found] == [Design(1, 64), Design(1, 80)]
    assert all(np.isnan(one.estimate) and one.width == 2 for one in found)
    assert "reward the same at all points" in final_reason(found[-1], 2.0, 80)
    few = sweep(data.isel(prompt=slice(6)), 1.9)
    assert "only 6 prompts" in few[-1].reason
    gone = data.copy(deep=True)
    gone.reward[0, 0] = np.nan
    assert sweep(gone, 1.9)[0].reason == ""
    nine = synthetic.landscape("mixed", points=9, prompts=32).copy(deep=True)
    nine.reward[0, 0] = np.nan
    first, last = sweep(nine, 1.9)
    assert "no prompt has values at all points" in first.reason
    assert (last.design, last.reason) == (Design(2, 32), "")


def test_the_end_is_told_in_words():
    def told(low: float, high: float, prompts: int = 64, reason: str = "") -> str:
        return final_reason(Look(Design(1, prompts), -0.8, low, high, 0.01, 25, reason), 0.1, 64)

    assert told(-0.85, -0.76) == "reached: width 0.09 ≤ 0.1 with 64 of 64 prompts at 25 points"
    assert told(-0.9, -0.7) == (
        "not reached: width 0.2 > 0.1 with 64 of 64 prompts at 25 points; about 256 prompts would do"
    )
    assert told(np.nan, np.nan, reason="only 6 prompts") == "not reached: only 6 prompts"


@pytest.mark.parametrize("path", REAL + LONG + CLUB, ids=lambda path: f"{path.parent.name} {path.stem[10:20]}")
def test_real_snapshots_need_few_rollouts_and_their_full_value_is_covered(path):
    data = rla.per_prompt(rla.open_landscape(path)[["reward", "kl_k1"]]).load()
    most = {0.2: 0.33, 0.1: 0.5, 0.05: 1.0}
    for statistic in ("correlation", "beyond_radius"):
        everything = sweep(data, 1e-6, statistic, Bootstrap())[-1]
        assert everything.points == data.alpha.size * data.beta.size
        for asked, limit in most.items():
            found = sweep(data, asked, statistic, Bootstrap())[-1]
            assert found.width <= asked
            assert found.low <= everything.estimate <= found.high
            assert share(data, found) <= limit


@pytest.mark.parametrize("path", CLUB, ids=lambda path: path.stem[10:20])
def test_intervals_cover_whichever_prompts_come_first(path):
    """Around step 40, ⅔ of the difference between two levels would cover in 3 of 4 orders only."""
    data = rla.per_prompt(rla.open_landscape(path)[["reward", "kl_k1"]]).load()
    full = sweep(data, 1e-6)[-1].estimate
    rng = np.random.default_rng(0)
    orders = [rng.permutation(data.sizes["prompt"]) for _ in range(20)]
    stopped = [sweep(data.isel(prompt=order).assign_coords(prompt=data.prompt), 0.1)[-1] for order in orders]
    assert sum(one.low <= full <= one.high for one in stopped) >= 18
    assert np.mean([share(data, one) for one in stopped]) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "asked", "points"), [("mixed", 0.3, 25), ("cliff", 0.15, 81)])
def test_stopped_intervals_cover_the_truth(shape, asked, points):
    """50 sweeps: 95 % intervals cover at least 44 with a probability of 99 %; the benchmark has the large numbers."""
    inside, used, stopped = 0, [], []
    for seed in range(50):
        data = rla.per_prompt(synthetic.landscape(shape, points=9, prompts=128, seed=seed)[["reward", "kl_k1"]])
        truth = synthetic.truth(shape, data.alpha.values, data.beta.values)
        value = np.corrcoef(truth.reward.values.ravel(), truth.kl.values.ravel())[0, 1]
        found = sweep(data, asked)[-1]
        inside += found.low <= value <= found.high
        used.append(share(data, found))
        stopped.append(found.points)
    assert inside >= 44
    assert np.mean(used) < 0.6
    assert np.median(stopped) == points


# A run whose snapshots stopped at different designs


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Step 0 stopped at 5 × 5 points and 40 prompts; steps 1 and 5 measured 9 × 9 points and 64 prompts."""
    root = tmp_path_factory.mktemp("stopped")
    for step, design in ((0, Design(1, 40)), (1, Design(2, 64)), (5, Design(2, 64))):
        whole = synthetic.landscape("kl", points=9, prompts=64, rollouts=4, seed=5, lift=0.1 * step)
        data = part(whole, design).assign_coords(step=step)
        data.attrs["progressive"] = json.dumps({"outcome": "reached: width 0.09"})
        data.to_netcdf(root / f"landscape_step{step:06d}_slice0.nc")
    return root


def rewritten(stopped, target, edit):
    for path in stopped.glob("*.nc"):
        with xr.open_dataset(path) as data:
            edit(data.load()).to_netcdf(target / path.name)
    return target


@pytest.mark.slow
def test_snapshots_that_stopped_elsewhere_are_compared_on_one_grid(stopped, tmp_path):
    found = rla.analyse_run(stopped, bootstrap=QUICK)
    coarse, fine = (rla.open_landscape(stopped / f"landscape_step{step:06d}_slice0.nc") for step in (0, 1))
    axes = fine.alpha.values, fine.beta.values
    paired = replace(QUICK, largest=64)
    expected = rla.correlations(interpolated(rla.per_prompt(coarse), *axes), bootstrap=paired)
    for name in ("corrected", "contribution_interval"):
        xr.testing.assert_allclose(found.correlations[name].sel(step=0, slice_seed=0), expected[name])
    assert found.maps[0, 0].sizes == {"alpha": 5, "beta": 5}
    assert [found.maps[step, 0].attrs["prompts"] for step in (0, 1)] == [40, 64]
    notes = " ".join(found.notes)
    assert "stopped at 40 to 64 prompts" in notes
    assert "stopped at 5 × 5 points (reached: width 0.09)" in notes
    assert "grids differ" not in notes
    assert int(found.over_training.exploitation_prompts) == 40
    one, other = (rla.per_prompt(data).isel(prompt=slice(40)) for data in (coarse, fine.assign_coords(step=5)))
    with xr.open_dataset(stopped / "landscape_step000005_slice0.nc") as last:
        other = rla.per_prompt(last.isel(prompt=slice(40)))
        gain = float((rla.pass_at_k(other, 1)["mean"] - rla.pass_at_k(one, 1)["mean"]).sel(alpha=0, beta=0))
    assert float(found.over_training.exploitation_gain) == pytest.approx(gain, abs=1e-12)
    assert float(found.diagnostics["crossing"].difference.sel(k=1)) == pytest.approx(gain, abs=1e-12)
    report = write_report(found, tmp_path / "report", animation=False)
    assert "stopped at 5 × 5 points" in report[0].read_text()


def test_the_full_grid_of_the_record_counts_where_no_snapshot_measured_it(stopped, tmp_path):
    with xr.open_dataset(stopped / "landscape_step000001_slice0.nc") as whole:
        axis = whole.alpha.values
    record = json.dumps({"full": {"alpha": axis.tolist(), "beta": axis.tolist()}})

    def recorded(data):
        kept = data if data.alpha.size == 5 else part(data, Design(1, 64))
        return kept.assign_attrs(progressive=record)

    found = rla.analyse_run(rewritten(stopped, tmp_path, recorded), bootstrap=QUICK)
    assert (found.correlations.points.sel(pair="kl_reward", control="none") == 81).all()
    assert {map_.reward.shape for map_ in found.maps.values()} == {(5, 5)}


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_record_that_cannot_be_read_is_named(stopped, tmp_path, text):
    with pytest.raises(AnalysisError, match=r"slice0\.nc: its attribute 'progressive' is"):
        rla.analyse_run(rewritten(stopped, tmp_path, lambda data: data.assign_attrs(progressive=text)))


def test_without_the_mark_of_a_progressive_sweep_they_are_refused(stopped, tmp_path):
    def unmarked(data):
        del data.attrs["progressive"]
        return data

    with pytest.raises(AnalysisError, match="have 40 and 64 prompts"):
        rla.analyse_run(rewritten(stopped, tmp_path, unmarked), bootstrap=QUICK)


def test_other_prompts_are_refused_and_so_is_a_common_array(stopped, tmp_path):
    def other(data):
        if int(data.step) == 1:
            data.attrs["prompts_sha256"] = "others"
        return data

    with pytest.raises(AnalysisError, match="different prompts"):
        rla.analyse_run(rewritten(stopped, tmp_path, other), bootstrap=QUICK)
    with pytest.raises(AnalysisError, match="have 40 and 64 prompts"):
        rla.open_run(stopped)


def test_a_coarse_snapshot_with_a_lost_point_keeps_to_its_own_points(stopped, tmp_path):
    def lost(data):
        if int(data.step) == 0:
            data.reward[0, 0] = np.nan
        return data

    found = rla.analyse_run(rewritten(stopped, tmp_path, lost), bootstrap=QUICK)
    assert "cannot be interpolated" in " ".join(found.notes)
    assert int(found.correlations.points.sel(step=0, slice_seed=0, pair="kl_reward", control="none")) == 24


def test_two_stages_use_the_prompts_that_all_snapshots_have():
    cells = [np.arange(n) % 3 / 2 for n in (64, 40, 64, 50, 64)]
    found = rla.two_stage([0, 1, 5, 10, 20], cells, Bootstrap(resamples=200, largest=64))
    assert int(found.prompts) == 40


def test_draws_of_the_first_prompts_go_together_with_those_of_all():
    whole, first = (Bootstrap(resamples=4000, largest=60).weights(n) for n in (60, 20))
    np.testing.assert_array_equal(whole, Bootstrap(resamples=4000).weights(60))
    assert (first.sum(0) == 20).all()
    # Multinomial: variance 1 − 1/n, covariance −1/n.
    covariance = np.cov(first)
    np.testing.assert_allclose(np.diag(covariance), 0.95, atol=0.12)
    assert covariance[np.triu_indices(20, 1)].mean() == pytest.approx(-0.05, abs=0.003)
    together = [np.corrcoef(one, other)[0, 1] for one, other in zip(first, whole[:20], strict=True)]
    assert min(together) > 0.8
    assert not first.flags.writeable


def test_points_of_an_unfinished_progressive_journal_are_counted_once(tmp_path):
    folder = tmp_path / "step000004_slice1"
    (folder / "points").mkdir(parents=True)
    (folder / "journal.json").write_text(json.dumps({"axes": {"alpha": [-1, 0, 1], "beta": [0, 1]}}))
    for name in ("a000_b000_p00000-00032.nc", "a000_b000_p00032-00064.nc", "a002_b001_p00000-00032.nc", "a001_b001.nc"):
        (folder / "points" / name).touch()
    (folder / "points" / "a000_b001.nc.corrupt").touch()
    (folder / "points" / ".a000_b001.nc.77.tmp").touch()
    synthetic.write_run(tmp_path, steps=(0,), prompts=8, points=5)
    assert list_run(tmp_path)[1] == ["step 4, slice 1: 3 of 6 points measured"]
