"""Errors over directions and prompts, against brute force and against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from rlvr_landscape_analysis import AnalysisError
from rlvr_landscape_analysis.statistics.two_way import (
    covariances,
    fieller,
    from_leave_outs,
    means,
    over_runs,
    prompt_means,
    stack,
)

RNG = np.random.default_rng(0)


def naive_covariance(x: np.ndarray, y: np.ndarray) -> float:
    """By loops over members, directions and prompts: pairs of different directions, products of different prompts."""
    k, members, n = x.shape
    within, between = [], []
    for i in range(n):
        for j in range(n):
            if i == j:
                continue
            for d in range(k):
                within += [x[d, s, i] * y[d, s, j] for s in range(members)]
                for e in range(k):
                    if e != d:
                        between += [x[d, s, i] * y[e, t, j] for s in range(members) for t in range(members)]
    return float(np.mean(within) - np.mean(between))


@pytest.mark.parametrize("members", [1, 2])
def test_covariance_and_all_leave_outs_equal_loops(members):
    x, y = RNG.normal(size=(2, 4, members, 5))
    table = covariances(x, y)
    assert table.shape == (5, 6)
    assert table[-1, -1] == pytest.approx(naive_covariance(x, y), abs=1e-12)
    for d in range(4):
        without = np.delete(x, d, 0), np.delete(y, d, 0)
        assert table[d, -1] == pytest.approx(naive_covariance(*without), abs=1e-12)
        for i in range(5):
            assert table[d, i] == pytest.approx(naive_covariance(*(np.delete(a, i, 2) for a in without)), abs=1e-12)
    for i in range(5):
        assert table[-1, i] == pytest.approx(naive_covariance(np.delete(x, i, 2), np.delete(y, i, 2)), abs=1e-12)


def test_covariance_is_unbiased_under_noise_and_dependent_signs():
    """True covariance 0.5; each prompt adds noise of variance 4 that both quantities share; signs are antithetic."""
    found = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        odd = rng.normal(size=(8, 1)) * np.array([1.0, -1.0])
        noise = 2 * rng.normal(size=(8, 2, 12))
        x = odd[..., None] + noise
        y = 0.5 * odd[..., None] + noise
        found.append(covariances(x, y)[-1, -1])
    assert np.mean(found) == pytest.approx(0.5, abs=4 * float(np.std(found)) / 20)


def test_variance_of_a_mean_has_its_three_parts():
    """σ_D² = 1, σ_P² = 4, σ_DP² = 9 with 10 directions and 12 prompts."""
    found, variances = [], []
    for seed in range(500):
        rng = np.random.default_rng(seed)
        values = rng.normal(size=(10, 1)) + 2 * rng.normal(size=(1, 12)) + 3 * rng.normal(size=(10, 12))
        estimate = means(values, "d", "p")
        found.append(float(estimate.value))
        variances.append([*map(float, estimate.parts()), float(estimate.variance())])
    true = np.array([1 / 10 + 9 / 120, 4 / 12 + 9 / 120, 9 / 120, 1 / 10 + 4 / 12 + 9 / 120])
    np.testing.assert_allclose(np.mean(variances, 0), true, rtol=0.06)
    assert np.var(found) == pytest.approx(true[3], rel=0.15)


def test_mean_equals_numpy_and_prompts_alone_equal_student():
    values = RNG.normal(size=(6, 9))
    assert float(means(values, "d", "p").value) == pytest.approx(values.mean(), abs=1e-14)
    alone = prompt_means(values[0], "p")
    assert float(alone.variance()) == pytest.approx(values[0].var(ddof=1) / 9, rel=1e-12)
    assert float(alone.freedom()) == pytest.approx(8)
    from scipy import stats

    low, high = stats.t.interval(0.95, 8, values[0].mean(), stats.sem(values[0]))
    np.testing.assert_allclose([float(end) for end in alone.interval()], [low, high])


def test_shared_prompts_cancel_and_fresh_directions_do_not():
    prompts = RNG.normal(size=(1, 20)) * 5
    one, other = (means(prompts + 0.1 * RNG.normal(size=(10, 20)), key, "p") for key in ("a", "b"))
    difference = one - other
    assert float(difference.variance()) < 0.01 * float(one.variance())
    apart = means(prompts + 0.1 * RNG.normal(size=(10, 20)), "c", "other prompts")
    assert float((one - apart).variance()) == pytest.approx(float(one.variance() + apart.variance()), rel=1e-3)


def test_estimates_with_one_key_must_have_the_same_units():
    with pytest.raises(AnalysisError, match="20 units in one estimate and 19"):
        _ = prompt_means(RNG.normal(size=20), "p") + prompt_means(RNG.normal(size=19), "p")


def test_fieller_is_the_ratios_interval_where_the_denominator_is_sure_and_everything_where_it_is_not():
    numerator = prompt_means(1 + 0.01 * RNG.normal(size=50), "p")
    sure = prompt_means(2 + 0.01 * RNG.normal(size=50), "p")
    low, high = fieller(numerator, sure, -1, 1, 0.95)
    assert low <= 0.5 + 0.01
    assert high >= 0.5 - 0.01
    assert high - low < 0.02
    unsure = prompt_means(RNG.normal(size=50), "p")
    unsure = unsure - prompt_means(np.full(50, float(unsure.value)), "p")
    assert fieller(numerator * 0.0, unsure, -1, 1, 0.95) == (-1, 1)


def test_several_runs_hold_the_spread_between_runs():
    """Between runs σ = 1, shared prompts σ = 1, 4 runs and 30 prompts: the mean of many studies has this variance."""
    found, variances = [], []
    for seed in range(500):
        rng = np.random.default_rng(seed)
        prompts, runs = rng.normal(size=30), rng.normal(size=4)
        estimates = [prompt_means(run + prompts + 0.5 * rng.normal(size=30), "p") for run in runs]
        mean, variance, freedom = over_runs(estimates)
        found.append(mean)
        variances.append(variance)
        assert 1 <= freedom <= 33
    true = 1 / 4 + 1 / 30 + 0.25 / 120
    assert np.var(found) == pytest.approx(true, rel=0.2)
    assert np.mean(variances) == pytest.approx(true, rel=0.1)
    single = prompt_means(RNG.normal(size=30), "p")
    assert over_runs([single])[1] == pytest.approx(float(single.variance()))
    with pytest.raises(AnalysisError, match="no run"):
        over_runs([])


def test_stacking_keeps_covariances():
    values = RNG.normal(size=(8, 10))
    one, other = means(values, "d", "p"), means(2 * values + 1, "d", "p")
    both = stack(one, other)
    variance, _ = both.quadratic(np.array([[1.0, 0.0], [2.0, -1.0]]))
    assert variance[0] == pytest.approx(float(one.variance()))
    assert variance[1] == pytest.approx(0, abs=1e-12)


def test_a_table_without_variation_has_no_variance():
    assert float(from_leave_outs(np.ones((5, 7)), "d", "p").variance()) == 0
