"""Across snapshots: trend, change point, exploitation, companion diagnostics, claims."""

from __future__ import annotations

import numpy as np
import pytest
import rlvr_landscape_analysis as rla
import xarray as xr
from rlvr_landscape_analysis import AnalysisError, Bootstrap, synthetic
from rlvr_landscape_analysis.statistics.training import change_point, exploitation_index, slice_agreement, trend
from scipy import stats
from scipy.optimize import curve_fit

QUICK = Bootstrap(resamples=300)
STEPS = np.array([0, 1, 2, 5, 10, 20, 50])


def draws(z, spread=0.02, seed=0):
    return z[:, None] + np.random.default_rng(seed).normal(0, spread, (len(z), 300))


def test_the_trend_is_the_least_squares_slope_in_log_time():
    z = np.array([0.0, -0.3, -0.35, -0.6, -0.8, -0.9, -1.1])
    found = trend(STEPS, z, draws(z), QUICK, 100)
    expected = stats.linregress(np.log1p(STEPS), z)
    assert found["slope"] == pytest.approx(expected.slope, abs=1e-12)
    assert found["tau"] == pytest.approx(stats.kendalltau(STEPS, z).statistic)
    assert found["slope_interval"][0] < found["slope"] < found["slope_interval"][1] < 0
    assert "three snapshots" in trend(STEPS[:2], z[:2], draws(z[:2]), QUICK, 100)["reason"]


def test_the_change_point_is_the_best_split():
    z = np.array([0.1, 0.0, -0.05, -0.8, -0.75, -0.85, -0.8])
    found = change_point(STEPS, z, draws(z), QUICK, 100)
    errors = [((z[:s] - z[:s].mean()) ** 2).sum() + ((z[s:] - z[s:].mean()) ** 2).sum() for s in range(1, 7)]
    assert found["change_step"] == STEPS[1 + int(np.argmin(errors))] == 5
    assert found["change"] == pytest.approx(z[3:].mean() - z[:3].mean())
    total = ((z - z.mean()) ** 2).sum()
    assert found["explained"] == pytest.approx(1 - min(errors) / total)
    assert found["change_interval"] == (5.0, 5.0)


def checkpoint(p1, pk):
    return {"pass_1": np.asarray(p1, float), "pass_k": np.asarray(pk, float)}


def test_exploitation_and_exploration_are_told_apart():
    rng = np.random.default_rng(0)
    n = 200
    base1, basek = rng.uniform(0.1, 0.4, n), rng.uniform(0.5, 0.8, n)
    gain = rng.uniform(0.1, 0.3, n)
    sharpened = exploitation_index(checkpoint(base1, basek), checkpoint(base1 + gain, basek), QUICK)
    assert sharpened["index"] == pytest.approx(1.0)
    assert sharpened["contrast_interval"][1] < 0
    explored = exploitation_index(checkpoint(base1, basek), checkpoint(base1 + gain, basek + gain), QUICK)
    assert explored["index"] == pytest.approx(0.0, abs=1e-12)
    assert explored["contrast_interval"][0] > 0
    still = exploitation_index(checkpoint(base1, basek), checkpoint(base1 + rng.normal(0, 0.1, n), basek), QUICK)
    assert np.isnan(still["index"])
    assert "did not rise" in still["reason"]
    nothing = exploitation_index(checkpoint([0.0] * 20, [0.0] * 20), checkpoint([0.0] * 20, [0.0] * 20), QUICK)
    assert "no rollout of either snapshot passes" in nothing["reason"]
    assert "contrast" not in nothing
    few = exploitation_index(checkpoint([0.1], [0.2]), checkpoint([0.2], [0.2]), QUICK)
    assert "only 1 prompts" in few["reason"]


def test_prompts_lost_at_one_snapshot_leave_the_comparison():
    first, last = checkpoint([0.0] * 20, [0.5] * 20), checkpoint([0.5] * 20, [0.5] * 20)
    last["pass_k"][3] = np.nan
    assert exploitation_index(first, last, QUICK)["prompts"] == 19


def test_the_entropy_law_is_scipys_fit():
    rng = np.random.default_rng(0)
    h = np.linspace(0.1, 1.2, 12)
    r = -0.3 * np.exp(h) + 1.1 + rng.normal(0, 0.01, 12)
    found = rla.entropy_law(h, r)
    (a, b), covariance = curve_fit(lambda x, a, b: -a * np.exp(x) + b, h, r, p0=(1, 1))
    assert float(found.a) == pytest.approx(a, rel=1e-6)
    assert float(found.a_standard_error) == pytest.approx(np.sqrt(covariance[0, 0]), rel=1e-4)
    line = stats.linregress(np.exp(h), r)
    assert float(found.a) == pytest.approx(-line.slope, abs=1e-10)
    assert float(found.b) == pytest.approx(line.intercept, abs=1e-10)
    assert float(found.a_standard_error) == pytest.approx(line.stderr, abs=1e-10)
    assert float(found.b_standard_error) == pytest.approx(line.intercept_stderr, abs=1e-10)
    assert float(found.r_squared) == pytest.approx(line.rvalue**2, abs=1e-10)
    assert float(found.ceiling) == pytest.approx(b - a, rel=1e-6)
    np.testing.assert_allclose(found.residual, r - (-float(found.a) * np.exp(h) + float(found.b)), atol=1e-12)
    assert "four observations" in str(rla.entropy_law(h[:3], r[:3]).reason.item())
    assert "the same" in str(rla.entropy_law(np.ones(5), r[:5]).reason.item())


def test_two_stages_are_found_where_they_are():
    rng = np.random.default_rng(0)
    t = np.log1p(STEPS)

    def series(shape, n=300):
        return [np.clip(0.6 + value + rng.normal(0, 0.05, n), 0, 1) for value in shape]

    down_up = np.where(t < t[3], -0.1 * t, -0.1 * t[3] + 0.1 * (t - t[3]))
    assert str(rla.two_stage(STEPS, series(down_up), QUICK).stage.item()) == "two stages"
    assert float(rla.two_stage(STEPS, series(down_up), QUICK).bend) == STEPS[3]
    assert str(rla.two_stage(STEPS, series(-0.05 * t), QUICK).stage.item()) == "exploitation"
    assert str(rla.two_stage(STEPS, series(0.05 * t), QUICK).stage.item()) == "exploration"
    assert str(rla.two_stage(STEPS, series(0 * t), QUICK).stage.item()) == "undecided"
    assert "five snapshots" in str(rla.two_stage([0, 1], series(0 * t)[:2], QUICK).reason.item())


@pytest.mark.slow
@pytest.mark.parametrize("snapshots", [5, 10, 25])
@pytest.mark.parametrize("wandering", [False, True])
def test_a_flat_curve_is_given_a_stage_in_five_percent_at_most(snapshots, wandering):
    """64 prompts of unequal difficulty whose mean never changes, four rollouts; prompts stand still or wander apart."""
    steps = np.unique(np.round(np.geomspace(1, 150, snapshots - 1)).astype(int))
    steps = [0, *steps, *range(151, 151 + snapshots - 1 - len(steps))]
    named, p_values = 0, []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        rates = np.repeat(rng.beta(0.8, 1.2, (1, 64)), snapshots, 0)
        if wandering:
            walk = np.cumsum(rng.normal(0, 0.05, (snapshots, 64)), 0)
            rates = 0.5 + 0.35 * np.tanh(walk)
        cells = list(rng.binomial(4, rates) / 4)
        found = rla.two_stage(steps, cells, Bootstrap(resamples=400, seed=seed))
        named += str(found.stage.item()) != "undecided"
        p_values.append(float(found.flat_p))
    # 5 % of 400 is 20, its standard error 4.4; 29 is two of them above.
    assert named <= 29
    assert np.mean(np.array(p_values) <= 0.05) <= 29 / 400
    assert np.mean(np.array(p_values) <= 0.5) == pytest.approx(0.5, abs=0.1)


def test_a_crossing_of_pass_at_k():
    base = synthetic.landscape("flat", points=3, prompts=300, rollouts=8, seed=0)
    first, last = base.copy(deep=True), base.copy(deep=True)
    rng = np.random.default_rng(0)
    # First: every prompt succeeds sometimes. Last: half of the prompts always, the others never.
    first.reward[:] = rng.random(first.reward.shape) < 0.3
    last.reward[:] = 0
    last.reward[:, :, :150] = 1
    found = rla.crossing(first, last)
    assert float(found.difference.sel(k=1)) > 0 > float(found.difference.sel(k=8))
    assert found.significant
    ks = found.k.values[found.difference.values < 0]
    assert float(found.crossing_k) == ks[0]
    none = rla.crossing(last, last)
    assert np.isnan(none.crossing_k)
    assert "no crossing up to k = 8" in str(none.reason.item())
    with pytest.raises(AnalysisError, match="cannot be paired"):
        rla.crossing(first, last.isel(prompt=slice(0, 9)))


def test_pass_at_k_curves_rise_with_k():
    data = {s: synthetic.landscape("mixed", points=3, prompts=40, rollouts=6, seed=1, step=s) for s in (0, 3)}
    found = rla.pass_at_k_curves(data)
    assert (found.pass_at_k.diff("k") >= -1e-12).all()
    origin = data[3].sel(alpha=[0], beta=[0])
    np.testing.assert_allclose(found.pass_at_k.sel(step=3, k=6), rla.pass_at_k(origin, 6)["mean"].item())


def test_token_surprisal_reads_the_journal(tmp_path):
    logprob = -np.random.default_rng(0).exponential(0.3, 1000).astype("f4")
    xr.Dataset({"sampled_logprob": ("sampled_token", logprob)}).to_netcdf(tmp_path / "base.nc")
    found = rla.token_surprisal(tmp_path / "base.nc")
    own = -logprob.astype(float)
    assert float(found["mean"]) == pytest.approx(own.mean())
    np.testing.assert_allclose(found.surprisal, np.quantile(own, found["quantile"]))
    assert float(found.top_share) == pytest.approx(np.sort(own)[-200:].sum() / own.sum())
    xr.Dataset({"other": ("x", [1.0])}).to_netcdf(tmp_path / "no.nc")
    with pytest.raises(AnalysisError, match="no log-probabilities per token"):
        rla.token_surprisal(tmp_path / "no.nc")
    with pytest.raises(AnalysisError, match=r"absent\.nc does not exist"):
        rla.token_surprisal(tmp_path / "absent.nc")


def test_slices_are_combined_by_fishers_z():
    z = np.array([-1.0, -0.8, -1.2])
    table = xr.Dataset(
        {"z": (("step", "slice_seed", "pair", "control"), z.reshape(1, 3, 1, 1))},
        {"step": [4], "slice_seed": [0, 1, 2], "pair": ["kl_reward"], "control": ["none"]},
    )
    found = slice_agreement(table, 0.95).squeeze()
    t = stats.t.interval(0.95, 2, z.mean(), stats.sem(z))
    assert float(found["mean"]) == pytest.approx(np.tanh(z.mean()))
    np.testing.assert_allclose(found["mean_interval"], np.tanh(t), rtol=1e-9)
    assert slice_agreement(table.isel(slice_seed=[0]), 0.95) is None
