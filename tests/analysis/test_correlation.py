"""Correlations against SciPy and slow loops written from the definitions; intervals against known truths."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import rlvr_landscape_analysis as rla
import xarray as xr
from rlvr_landscape_analysis import Bootstrap, synthetic
from rlvr_landscape_analysis.landscape import per_prompt
from rlvr_landscape_analysis.statistics.correlation import CONTROLS, correlations
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

QUICK = Bootstrap(resamples=200)


def matrices(data: xr.Dataset) -> dict[str, np.ndarray]:
    reduced = per_prompt(data)
    names = {"kl": "kl_k1", "reward": "reward", "surrogate": "surrogate"}
    return {label: reduced[name].values.reshape(-1, data.sizes["prompt"]) for label, name in names.items()}


@pytest.fixture(scope="module")
def data():
    return synthetic.landscape("mixed", points=(7, 9), prompts=40, rollouts=3, seed=5)


@pytest.fixture(scope="module")
def table(data):
    return correlations(data, bootstrap=QUICK, replicates=True)


@pytest.fixture(scope="module")
def residuals(data):
    """Control → label → residuals per prompt (points, prompts), by least squares on indicator or radius columns."""
    alpha, beta = np.meshgrid(data.alpha.values, data.beta.values, indexing="ij")
    rho = np.hypot(alpha, beta).ravel() / 0.05
    keys = np.round(rho, 9)
    one = np.ones_like(rho)[:, None]
    indicators = (keys[:, None] == np.unique(keys)[None]).astype(float)
    columns = {
        "none": one,
        "linear": np.stack([one[:, 0], rho], 1),
        "smooth": np.stack([rho**p for p in (0, 2, 4, 6)], 1),
        "shell": indicators,
    }
    found = {}
    for control, design in columns.items():
        hat = design @ np.linalg.pinv(design)
        found[control] = {name: m - hat @ m for name, m in matrices(data).items()}
    hat = indicators @ np.linalg.pinv(indicators)
    found["radial"] = {name: hat @ m - m.mean(0) for name, m in matrices(data).items()}
    origin = int(np.argmin(rho))
    left = {name: np.delete(m, origin, axis=0) for name, m in matrices(data).items()}
    found["no_origin"] = {name: m - m.mean(0) for name, m in left.items()}
    return found


PAIRS = [("kl", "reward"), ("kl", "surrogate"), ("surrogate", "reward")]


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("pair", PAIRS)
def test_plain_values_are_scipys_on_the_residual_means(table, residuals, control, pair):
    x, y = (residuals[control][name].mean(1) for name in pair)
    found = table.sel(pair="_".join(pair), control=control)
    assert float(found.pearson) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-10)
    x, y = (np.round(v / np.abs(v).max(), 11) for v in (x, y))  # equal rewards stay equal
    assert float(found.spearman) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-10)


def test_the_linear_control_is_the_textbook_partial_correlation(data, table):
    m = {name: values.mean(1) for name, values in matrices(data).items()}
    rho = np.hypot(*np.meshgrid(data.alpha.values, data.beta.values, indexing="ij")).ravel()
    r_xy, r_xz, r_yz = (
        stats.pearsonr(a, b).statistic for a, b in ((m["kl"], m["reward"]), (m["kl"], rho), (m["reward"], rho))
    )
    expected = (r_xy - r_xz * r_yz) / np.sqrt((1 - r_xz**2) * (1 - r_yz**2))
    assert float(table.pearson.sel(pair="kl_reward", control="linear")) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("control", CONTROLS)
def test_corrected_values_use_pairs_of_different_prompts_only(table, residuals, control):
    x, y = (residuals[control][name] for name in ("kl", "reward"))
    n = x.shape[1]

    def moment(a, b):
        return np.mean([a[:, i] @ b[:, j] for i in range(n) for j in range(n) if i != j])

    expected = moment(x, y) / np.sqrt(moment(x, x) * moment(y, y))
    found = table.sel(pair="kl_reward", control=control)
    assert float(found.corrected) == pytest.approx(np.clip(expected, -1, 1), abs=1e-10)
    reliability = [moment(m, m) / (m.mean(1) @ m.mean(1)) for m in (x, y)]
    np.testing.assert_allclose(found.reliability, np.clip(reliability, 0, 1), atol=1e-10)


def test_the_correction_is_the_published_one_from_two_way_residuals(data, table):
    """r = (s_xy − s_exey) / √((s_x² − s_ex²)(s_y² − s_ey²)) with interaction residuals."""
    m = matrices(data)
    n, g = m["kl"].shape[1], m["kl"].shape[0]

    def residual(v):
        return v - v.mean(1, keepdims=True) - v.mean(0, keepdims=True) + v.mean()

    def noise(a, b):
        return (residual(a) * residual(b)).sum() / (n * (n - 1)) / (g - 1)

    def spread(a, b):
        return np.cov(a.mean(1), b.mean(1))[0, 1]

    x, y = m["kl"], m["reward"]
    expected = (spread(x, y) - noise(x, y)) / np.sqrt((spread(x, x) - noise(x, x)) * (spread(y, y) - noise(y, y)))
    assert float(table.corrected.sel(pair="kl_reward", control="none")) == pytest.approx(expected, abs=1e-10)


def test_contributions_add_up_to_the_corrected_plain_correlation(table):
    c = table.contribution
    np.testing.assert_allclose(c.sel(control="shell") + c.sel(control="radial"), c.sel(control="none"), atol=1e-10)
    np.testing.assert_allclose(c.sel(control="none"), table.corrected.sel(control="none"), atol=1e-12)


def test_resampled_values_are_those_of_the_resampled_dataset(data):
    """A bootstrap draw by matrix product equals analysing the resampled prompts, copies of a prompt not paired."""
    settings = Bootstrap(resamples=100, seed=7)
    weights = settings.weights(40)
    table = correlations(data, bootstrap=settings, replicates=True, controls=("none", "shell"))
    draw = 13
    picks = np.repeat(np.arange(40), weights[:, draw].astype(int))
    assert len(picks) == 40
    m = matrices(data)
    x, y = (m[name] - m[name].mean(0) for name in ("kl", "reward"))

    def moment(a, b):
        return np.mean([a[:, i] @ b[:, j] for i in picks for j in picks if i != j])

    expected = np.arctanh(moment(x, y) / np.sqrt(moment(x, x) * moment(y, y)))
    found = table.sel(pair="kl_reward", control="none")
    shift = float(found.z) - np.median(_unshifted(data, weights))
    assert float(found.z_resampled[draw]) == pytest.approx(expected + shift, abs=1e-9)


def _unshifted(data, weights):
    m = matrices(data)
    x, y = (m[name] - m[name].mean(0) for name in ("kl", "reward"))
    square = weights**2

    def moment(a, b):
        return ((a @ weights) * (b @ weights)).sum(0) - (a * b).sum(0) @ square

    return np.arctanh(moment(x, y) / np.sqrt(moment(x, x) * moment(y, y)))


def test_the_jackknife_error_is_that_of_leaving_prompts_out(data):
    from rlvr_landscape_analysis.statistics.studentised import _influence

    m = matrices(data)
    x, y = (m[name] - m[name].mean(0) for name in ("kl", "reward"))
    ones = np.ones((40, 1))
    _, se = _influence(x, y, x.sum(1, keepdims=True), y.sum(1, keepdims=True), ones)
    without = []
    for i in range(40):
        keep = np.arange(40) != i
        a, b = x[:, keep], y[:, keep]
        value, _ = _influence(a, b, a.sum(1, keepdims=True), b.sum(1, keepdims=True), ones[:39])
        without.append(value[0])
    jackknife = np.sqrt(39 / 40 * ((np.array(without) - np.mean(without)) ** 2).sum())
    assert se[0] == pytest.approx(jackknife, rel=0.05)


def test_the_same_seed_gives_the_same_intervals_and_prompts_stay_paired():
    first = synthetic.landscape("kl", points=5, prompts=30, step=0)
    second = synthetic.landscape("kl", points=5, prompts=30, step=1)
    one, again = (correlations(first, bootstrap=QUICK) for _ in range(2))
    xr.testing.assert_identical(one, again)
    assert QUICK.weights(30) is QUICK.weights(30)
    assert int(correlations(second, bootstrap=QUICK).step) == 1


def test_radius_only_landscapes_leave_nothing_after_the_control():
    """Strong plain correlation, controlled interval around zero (30 datasets, at most 4 misses of a 95 % interval)."""
    misses = 0
    for seed in range(30):
        data = synthetic.landscape("radial", points=7, prompts=128, rollouts=2, seed=seed)
        found = correlations(data, bootstrap=QUICK, controls=("none", "shell")).sel(pair="kl_reward")
        assert float(found.corrected_interval.sel(control="none", bound="high")) < -0.85
        for name in ("contribution_interval", "pearson_interval", "corrected_interval"):
            low, high = found[name].sel(control="shell").values
            assert np.isfinite([low, high]).all()
        low, high = found.contribution_interval.sel(control="shell").values
        misses += not low <= 0 <= high
        assert float(found.radial_share.sel(quantity="reward")) > 0.97
    assert misses <= 4


def test_a_real_effect_of_kl_survives_the_control():
    for seed in range(10):
        data = synthetic.landscape("kl", points=9, prompts=128, rollouts=2, seed=seed)
        found = correlations(data, bootstrap=QUICK).sel(pair="kl_reward", control="shell")
        assert float(found.corrected_interval.sel(bound="high")) < -0.7
        assert float(found.contribution_interval.sel(bound="high")) < 0


def test_heavy_noise_attenuates_the_plain_value_and_not_the_corrected_one():
    """Noise alone can pull a strong correlation towards zero."""
    plain, corrected = [], []
    truth = synthetic.truth("radial", *(np.linspace(-0.05, 0.05, 9),) * 2)
    true = stats.pearsonr(truth.kl.values.ravel(), truth.reward.values.ravel()).statistic
    rng = np.random.default_rng(0)
    for seed in range(40):
        data = synthetic.landscape("radial", points=9, prompts=64, rollouts=1, seed=seed)
        noisy = data.assign(reward=data.reward + rng.normal(0, 2.0, data.reward.shape).astype("f4"))
        found = correlations(noisy, bootstrap=QUICK, controls=("none",)).sel(pair="kl_reward", control="none")
        plain.append(float(found.pearson))
        corrected.append(float(found.corrected))
    assert abs(np.mean(plain)) < 0.75
    assert np.nanmedian(corrected) == pytest.approx(true, abs=0.08)


def test_an_asymmetric_grid_says_what_is_not_defined():
    data = synthetic.landscape("kl", points=9, prompts=32)
    data = data.isel(alpha=[0, 2, 4, 5], beta=[1, 4, 8])
    data = data.assign_coords(alpha=[-0.05, -0.02, 0.0, 0.01], beta=[-0.04, 0.0, 0.055])
    found = correlations(data, bootstrap=QUICK).sel(pair="kl_reward")
    assert np.isnan(found.corrected.sel(control="shell"))
    assert "too few points of equal radius" in str(found.reason.sel(control="shell").item())
    assert np.isfinite(found.corrected.sel(control="smooth"))


def test_undefined_is_said_and_never_a_silent_nan(data):
    cases = {
        "one prompt": data.isel(prompt=[0]),
        "constant reward": data.assign(reward=xr.zeros_like(data.reward)),
        "no surrogate": data.drop_vars("surrogate"),
        "single point": data.isel(alpha=[3], beta=[4]),
        "one row": data.isel(beta=[4]),
    }
    for name, case in cases.items():
        found = correlations(case, bootstrap=QUICK)
        missing = found.pearson.isnull() | found.corrected.isnull()
        assert missing.any() or name == "one row", name
        assert (found.reason.where(missing, "x") != "").all(), name
    assert "only 1 prompts" in correlations(cases["one prompt"], bootstrap=QUICK).reason.values[0, 0]
    assert (
        "reward the same at all points" in correlations(cases["constant reward"], bootstrap=QUICK).reason.values[0, 0]
    )
    assert "no surrogate" in correlations(cases["no surrogate"], bootstrap=QUICK).reason.values[1, 0]


def test_holes_are_left_out_and_counted(data):
    holed = data.copy(deep=True)
    holed.reward[:, :, 3] = np.nan  # one prompt failed everywhere
    holed.reward[0, 0, :30] = np.nan  # one point lost most of its prompts
    holed.reward[2, 2, 5, 0] = np.nan  # one rollout failed
    found = correlations(holed, bootstrap=QUICK).sel(pair="kl_reward", control="none")
    assert int(found.points) == 62
    assert int(found.prompts) == 39
    kept = np.delete(np.arange(40), 3)
    reward = holed.reward.values.astype(float).reshape(63, 40, 3)[1:, kept]
    kl = holed.kl_k1.values.astype(float).reshape(63, 40, 3)[1:, kept]
    expected = stats.pearsonr(np.nanmean(reward, -1).mean(-1), kl.mean(-1).mean(-1)).statistic
    assert float(found.pearson) == pytest.approx(expected, abs=1e-10)
    with pytest.raises(rla.AnalysisError, match="most are missing in 'reward'"):
        correlations(data.assign(reward=data.reward * np.nan), bootstrap=QUICK)


@pytest.mark.parametrize("bad", [{"resamples": 10}, {"level": 0.2}, {"level": 1.0}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(rla.AnalysisError):
        Bootstrap(**bad)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scenario",
    [("kl", 9, 128, 4, 0.6), ("mixed", 9, 128, 4, 0.3), ("tilt", 9, 128, 4, 0.6), ("mixed", 7, 256, 4, 0.3)],
    ids=lambda s: "-".join(map(str, s)),
)
def test_intervals_cover_the_truth(scenario):
    """500 datasets each; 92–98 % (docs/statistics.md has the whole table)."""
    import coverage as script

    with script.workers(2) as pool:
        found = dict(zip(script.COLUMNS, script.coverage(scenario, 500, pool), strict=True))
    for name in ("correlation", "partial (linear)", "within shells", "beyond radius", "best-point gain"):
        assert 0.92 <= found[name] <= 0.98, found


@pytest.mark.slow
def test_the_test_against_the_origin_keeps_its_level():
    """On a flat landscape any point called better is a false discovery: at most 5 % of datasets (binomial slack)."""
    import coverage as script

    with script.workers(2) as pool:
        found = script.coverage(("flat", 7, 64, 2, 0.5), 500, pool)
    share = dict(zip(script.COLUMNS, found, strict=True))["FDR"]
    assert share <= stats.binom.ppf(0.999, 500, 0.05) / 500
