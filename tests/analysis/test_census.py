"""Statistics of a census against truths known by construction and against an independent computation."""

from __future__ import annotations

import numpy as np
import pytest
from rlvr_landscape_analysis import AnalysisError, synthetic_designs
from rlvr_landscape_analysis.designs import census_points
from rlvr_landscape_analysis.statistics.census import (
    at_relative,
    census,
    expected_largest,
    pair_moments,
    pooled_correlation,
    true_discoveries,
    within_reach,
)
from rlvr_landscape_analysis.synthetic_designs import CensusTruth
from scipy import stats

RADII = (1.25, 2.5, 5.0, 10.0)


def test_a_large_census_finds_the_truth():
    """Many directions and prompts: every interval (99.9 %) holds the truth and is narrow."""
    truth = CensusTruth(correlation=-0.5, drift=-0.04, spread=0.05, dimensions=10)
    data = synthetic_designs.census(truth, pairs=250, radii=RADII, prompts=250, rollouts=6, base_rollouts=32, seed=4)
    found = census(data, confidence=0.999)
    u = np.array(RADII) / 10
    known = {
        "kl": (truth.kl * u**2, 0.15 * truth.kl * u**2),
        "change": (truth.drift * u, 0.012),
        "density": (np.full(4, stats.norm.cdf(truth.drift / truth.spread)), [0.4, 0.25, 0.12, 0.08]),
        "best": (u * (truth.drift + truth.spread * expected_largest(500)), 0.03),
        "curvature": (np.full(4, 2 * truth.kl / 0.1**2), 100),
        "curvature_variation": (np.full(4, np.sqrt(2 / 10)), 0.1),
        "dimensions": (np.full(4, truth.dimensions), 5),
    }
    for name, (true, half) in known.items():
        low, high = found[f"{name}_interval"].values.T
        assert (low <= true).all(), name
        assert (high >= true).all(), name
        assert (high - low <= 2 * np.asarray(half)).all(), name
        assert ((low <= found[name]) & (found[name] <= high)).all(), name
    low, high = found["correlation_interval"].sel(pair="kl_reward").values[1:].T
    assert (low <= truth.correlation).all()
    assert (high >= truth.correlation).all()
    assert (high - low < [0.7, 0.4, 0.35]).all()
    np.testing.assert_allclose(found["spread"], truth.spread * u, rtol=0.2)


def test_correlations_equal_an_independent_computation():
    """Other code, NumPy alone: means over pairs of different directions and different prompts, written out."""
    data = synthetic_designs.census(pairs=5, prompts=9, radii=(1.0, 2.0), seed=1)
    found = census(data)
    kl = data["kl_k1"].values.astype(float).mean(-1)
    reward = data["reward"].values.astype(float).mean(-1)

    def moment(x, y):
        total = np.einsum("dsi,etj->dsietj", x, y)
        k, m, n = x.shape
        same = np.einsum("dsi,dsj->ij", x, y)
        apart = np.einsum("dsietj->deij", total)
        off = ~np.eye(n, dtype=bool)
        within = same[off].sum() / (k * m * n * (n - 1))
        between = sum(apart[d, e][off].sum() for d in range(k) for e in range(k) if d != e)
        return within - between / (k * (k - 1) * m * m * n * (n - 1))

    for r in range(2):
        x, y = kl[:, :, r], reward[:, :, r]
        uxx, uxy, uyy = moment(x, x), moment(x, y), moment(y, y)
        got = float(found["correlation"].sel(pair="kl_reward")[r])
        if min(uxx, uyy) > 0:
            assert got == pytest.approx(np.clip(uxy / np.sqrt(uxx * uyy), -1, 1), abs=1e-10)
        else:
            assert np.isnan(got)
        means = x.mean(-1).ravel(), y.mean(-1).ravel()
        assert float(found["plain"].sel(pair="kl_reward")[r]) == pytest.approx(stats.pearsonr(*means)[0], abs=1e-10)
        assert float(found["kl"][r]) == pytest.approx(x.mean(), abs=1e-12)


def test_noise_alone_is_no_correlation_and_no_density():
    """Rewards that vary by noise only: everything stays possible, nothing is better."""
    found = census(synthetic_designs.census(CensusTruth(drift=0, spread=0), seed=2))
    interval = found["correlation_interval"].sel(pair="kl_reward")
    assert (interval[:, 0] <= 0).all()
    assert (interval[:, 1] >= 0).all()
    assert (found["better"] <= 2).all()
    assert (found["density_lower"] == 0).all()


def test_closed_testing_counts_true_discoveries():
    """Against the definition: the largest set that Simes does not reject, by trying all of them."""
    from itertools import combinations

    rng = np.random.default_rng(0)
    for _ in range(20):
        p = np.round(rng.uniform(size=7) ** 3, 4)
        largest = 0
        for size in range(1, 8):
            for members in combinations(p, size):
                if (np.sort(members) > 0.1 * np.arange(1, size + 1) / size).all():
                    largest = max(largest, size)
        assert true_discoveries(p, 0.1) == 7 - largest
    assert true_discoveries(np.zeros(5), 0.05) == 5


def test_expected_largest_of_normals():
    assert expected_largest(1) == pytest.approx(0, abs=1e-6)
    assert expected_largest(2) == pytest.approx(1 / np.sqrt(np.pi), abs=1e-6)
    draws = np.random.default_rng(0).normal(size=(40000, 64)).max(1)
    assert expected_largest(64) == pytest.approx(draws.mean(), abs=0.01)


def test_radii_pool_and_interpolate():
    points = census_points([synthetic_designs.census(CensusTruth(correlation=-0.6), radii=RADII, seed=4)])[0]
    np.testing.assert_array_equal(within_reach(points, 3.0), [1, 1, 0, 0])
    weights = at_relative(points, np.sqrt(0.025 * 0.05))
    assert weights is not None
    np.testing.assert_allclose(weights, [0, 0.5, 0.5, 0])
    assert at_relative(points, 0.5) is None
    assert at_relative(points, 0.001) is None
    last = at_relative(points, 0.1)
    assert last is not None
    np.testing.assert_allclose(last, [0, 0, 0, 1], atol=1e-12)
    moments = pair_moments(points, "kl_reward")
    alone = pooled_correlation([moments], [np.eye(4)[3]])
    both = pooled_correlation([moments], [np.ones(4)])
    assert alone.interval[1] - alone.interval[0] < 1
    assert both.interval[0] <= -0.6 <= both.interval[1]
    scaled = pooled_correlation([moments], [np.ones(4) * 7])
    assert scaled.value == pytest.approx(both.value)
    assert scaled.interval == pytest.approx(both.interval, abs=1e-3)


def test_directions_and_prompts_that_are_missing_are_left_out():
    data = synthetic_designs.census(pairs=8, prompts=20, radii=(1.0, 2.0), seed=0)
    data["reward"][3, 0, 1] = np.nan
    data["reward"][:, :, :, 5] = np.nan
    points = census_points([data])[0]
    assert (points.directions, points.prompts, points.all_directions, points.all_prompts) == (7, 19, 8, 20)
    data["reward"][...] = np.nan
    with pytest.raises(AnalysisError, match="no direction"):
        census_points([data])


def test_too_few_directions_or_prompts_have_no_interval():
    few = census(synthetic_designs.census(pairs=3, prompts=20))
    assert few["correlation_interval"].isnull().all()
    assert "3 directions" in str(few["reason"][0].item())
    assert few["kl"].notnull().all()
    assert "5 prompts" in str(census(synthetic_designs.census(pairs=6, prompts=5))["reason"][0].item())


def test_snapshots_share_prompts_and_paired_directions():
    fresh, paired = (
        census_points([synthetic_designs.census(step=step, directions=how, pairs=6, prompts=10) for step in (0, 10)])
        for how in ("fresh", "paired")
    )
    assert fresh[0].prompts_key == fresh[1].prompts_key
    assert fresh[0].directions_key != fresh[1].directions_key
    assert paired[0].directions_key == paired[1].directions_key
    other = synthetic_designs.census(step=10, seed=1, pairs=6, prompts=10)
    with pytest.raises(AnalysisError, match="different prompts"):
        census_points([synthetic_designs.census(step=0, pairs=6, prompts=10), other])


def test_a_census_is_checked():
    data = synthetic_designs.census(pairs=4, prompts=8)
    with pytest.raises(AnalysisError, match="'grid', not of 'census'"):
        census(data.assign_attrs(design=""))
    with pytest.raises(AnalysisError, match="base_reward"):
        census(data.drop_vars("base_reward"))
    with pytest.raises(AnalysisError, match="both ways"):
        census(data.isel(sign=[0]))


def test_what_does_not_vary_is_named():
    truth = CensusTruth(correlation=0.0, spread=0.0, kl=8.0)
    flat = synthetic_designs.census(truth, pairs=8, prompts=32, radii=(1.0, 10.0), rollouts=2, seed=1)
    assert str(census(flat)["reason"][1].item()) == "the reward does not vary over directions beyond noise"
