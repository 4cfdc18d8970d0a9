"""pass@k, Cover@τ, tasks gained and lost, crossing: against SciPy, enumeration and known rates."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import xarray as xr
from rlvr_landscape_analysis import AnalysisError, synthetic_designs
from rlvr_landscape_analysis.statistics.boundary import (
    boundary,
    boundary_change,
    contrast,
    default_ks,
    fisher_exact,
    pass_at_k_values,
    wilson,
)
from scipy import special, stats


def test_pass_at_k_equals_counting_subsets():
    outcomes = np.array([1, 0, 0, 1, 0, 0, 0])
    for k in range(1, 8):
        share = np.mean([any(outcomes[list(chosen)]) for chosen in combinations(range(7), k)])
        assert pass_at_k_values(np.array([2]), np.array([7]), k)[0] == pytest.approx(share, abs=1e-12)


def test_pass_at_k_of_many_rollouts_equals_exact_binomials():
    solved, valid = np.array([0, 1, 17, 200, 256]), np.full(5, 256)
    for k in (1, 2, 16, 128, 256):
        exact = [1 - special.comb(256 - c, k, exact=True) / special.comb(256, k, exact=True) for c in solved]
        np.testing.assert_allclose(pass_at_k_values(solved, valid, k), exact, atol=1e-11)
    assert np.isnan(pass_at_k_values(np.array([1]), np.array([10]), 11)[0])


def test_pass_at_k_is_unbiased():
    rates = np.array([0.02, 0.1, 0.6])
    found = np.zeros((3, 2))
    for seed in range(400):
        data = synthetic_designs.boundary(np.repeat(rates, 4), rollouts=32, seed=seed)
        solved = data["base_reward"].values.astype(int).sum(1)
        found += pass_at_k_values(solved, np.full(12, 32), np.array([1, 16])).T.reshape(3, 4, 2).mean(1) / 400
    np.testing.assert_allclose(found, 1 - (1 - rates[:, None]) ** np.array([1, 16]), atol=0.02)


def test_cover_counts_rates_at_or_above():
    rates = np.repeat([0.0, 0.25, 1.0], 10)
    data = synthetic_designs.boundary(rates, rollouts=4)
    data["base_reward"][10:20] = [[1, 0, 0, 0]]
    found = boundary(data, taus=(0.2, 0.25, 0.26, 1.0))
    np.testing.assert_allclose(found["cover"], [2 / 3, 2 / 3, 1 / 3, 1 / 3])
    assert list(found["k"].values) == [1, 2, 4]
    assert default_ks(6) == [1, 2, 4, 6]
    assert default_ks(256)[-1] == 256
    reference = stats.binomtest(20, 30).proportion_ci(method="wilson")
    np.testing.assert_allclose(found["cover_interval"][0], [reference.low, reference.high], atol=1e-9)
    np.testing.assert_allclose(wilson(0, 30, 0.95), [0, stats.binomtest(0, 30).proportion_ci(method="wilson").high])


def test_fisher_equals_scipy():
    rng = np.random.default_rng(0)
    n0, n1 = rng.integers(1, 40, (2, 60))
    c0, c1 = rng.binomial(n0, 0.3), rng.binomial(n1, 0.4)
    tables = [[[a, m - a], [b, n - b]] for a, m, b, n in zip(c0, n0, c1, n1, strict=True)]
    reference = np.array([stats.fisher_exact(table)[1] for table in tables], dtype=float)
    np.testing.assert_allclose(fisher_exact(c0, n0, c1, n1), reference, atol=1e-9)


def test_gained_lost_and_support():
    first, last = np.zeros(40), np.zeros(40)
    first[:5], last[:5] = 0.5, 0.0
    first[5:12], last[5:12] = 0.0, 0.4
    first[12:30] = last[12:30] = 0.3
    found = boundary_change(
        synthetic_designs.boundary(first, rollouts=64, step=0), synthetic_designs.boundary(last, rollouts=64, step=40)
    )
    assert found["lost"].values.tolist() == [True] * 5 + [False] * 35
    assert found["gained"].values.nonzero()[0].tolist() == list(range(5, 12))
    assert (int(found["entered"]), int(found["left"]), int(found["never"])) == (7, 5, 10)
    assert float(found["entered_by_chance"]) < 0.01
    assert (found.attrs["first_step"], found.attrs["last_step"]) == (0, 40)


def test_support_that_changes_by_chance_is_expected():
    """Equal rates near 1/64: as many prompts enter and leave as dealing at random says."""
    entered, expected = [], []
    for seed in range(30):
        rates = np.full(60, 0.02)
        change = boundary_change(
            synthetic_designs.boundary(rates, rollouts=64, step=0, seed=seed),
            synthetic_designs.boundary(rates, rollouts=64, step=40, seed=seed),
        )
        entered.append(int(change["entered"]))
        expected.append(float(change["entered_by_chance"]))
        assert int(change["gained"].sum()) + int(change["lost"].sum()) <= 2
    assert np.mean(entered) == pytest.approx(np.mean(expected), rel=0.15)


def test_curves_cross_where_they_should():
    """Rates 0.02 everywhere against half 0.5 and half 0: pass@k is 1 − 0.98^k against ½(1 − 0.5^k)."""
    first, last = np.full(200, 0.02), np.repeat([0.5, 0.0], 100)
    change = boundary_change(
        synthetic_designs.boundary(first, rollouts=128, step=0), synthetic_designs.boundary(last, rollouts=128, step=9)
    )
    k = np.linspace(1, 128, 10000)
    truth = k[np.flatnonzero(0.5 * (1 - 0.5**k) < 1 - 0.98**k)[0]]
    low, high = change["crossing_interval"].values
    assert low <= truth <= high
    assert high < 80
    assert bool(change["crosses"])
    assert float(change["crossing_share"]) == 1
    assert float(change["difference"][0]) > 0 > float(change["difference"][-1])
    reverse = boundary_change(
        synthetic_designs.boundary(first, rollouts=128, step=0), synthetic_designs.boundary(first, rollouts=128, step=9)
    )
    assert not bool(reverse["crosses"])


def test_contrast_has_the_sign_of_what_was_done():
    """Reallocation without discovery against discovery; D at k = 64 tells them apart."""
    start = np.repeat([0.2, 0.0], 60)
    sharpened, discovered = np.repeat([0.6, 0.0], 60), np.concatenate([start[:60], np.repeat([0.4, 0.0], 30)])
    first = synthetic_designs.boundary(start, rollouts=64, step=0)
    for rates, sign in ((sharpened, -1), (discovered, 1)):
        change = boundary_change(first, synthetic_designs.boundary(rates, rollouts=64, step=40))
        assert np.sign(change["contrast_interval"].sel(k=64).values).tolist() == [sign, sign]
        both = contrast(first, synthetic_designs.boundary(rates, rollouts=64, step=40), 64)
        np.testing.assert_allclose(both.value, change["difference"].sel(k=[1, 64]))


def test_wrong_input_is_refused():
    data = synthetic_designs.boundary(np.full(10, 0.5), rollouts=8)
    with pytest.raises(AnalysisError, match="pass@9 needs 1 ≤ k ≤ 8"):
        boundary(data, ks=[1, 9])
    with pytest.raises(AnalysisError, match="different prompts"):
        boundary_change(data, synthetic_designs.boundary(np.full(10, 0.5), prompts_seed=1))
    with pytest.raises(AnalysisError, match="design"):
        boundary(xr.Dataset())
    with pytest.raises(AnalysisError, match="different rewards"):
        boundary_change(data.assign_attrs(pass_threshold=0.9), data)
