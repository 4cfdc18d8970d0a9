"""Better points, the best point, overlap, curvature: against SciPy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import rlvr_landscape_analysis as rla
import xarray as xr
from rlvr_landscape_analysis import AnalysisError, Bootstrap, synthetic
from rlvr_landscape_analysis.landscape import per_prompt
from rlvr_landscape_analysis.statistics.improvement import split_half_gain
from scipy import stats

QUICK = Bootstrap(resamples=300)


@pytest.fixture(scope="module")
def data():
    return synthetic.landscape("tilt", points=(7, 5), prompts=60, rollouts=3, seed=2)


def own(data: xr.Dataset, name: str = "reward") -> np.ndarray:
    return per_prompt(data)[name].transpose("alpha", "beta", "prompt").values


def test_p_values_are_scipys_paired_t_tests(data):
    found = rla.better_than_origin(data)
    values = own(data)
    p = np.full((7, 5), np.nan)
    for i in range(7):
        for j in range(5):
            if (i, j) != (3, 2):
                p[i, j] = stats.ttest_rel(values[i, j], values[3, 2], alternative="greater").pvalue
    np.testing.assert_allclose(found.p_value, p, rtol=1e-9)
    tested = np.isfinite(p)
    adjusted = stats.false_discovery_control(p[tested])
    np.testing.assert_allclose(found.adjusted_p.values[tested], adjusted, rtol=1e-9)
    assert int(found["count"]) == (adjusted <= 0.05).sum() > 0
    assert float(found.share) == pytest.approx((adjusted <= 0.05).sum() / 34)
    assert not found.better.sel(alpha=0, beta=0)


def test_the_map_keeps_its_axes_when_coordinates_run_backwards(data):
    back = data.isel(alpha=slice(None, None, -1))
    xr.testing.assert_allclose(rla.better_than_origin(data), rla.better_than_origin(back).sortby("alpha"))


def test_points_without_any_spread_are_decided_by_their_mean(data):
    flat = data.copy(deep=True)
    flat.reward[:] = 0.25
    flat.reward[0, 0] = 0.5
    flat.reward[1, 1] = 0.0
    found = rla.better_than_origin(flat)
    assert float(found.p_value[0, 0]) == 0
    assert float(found.p_value[1, 1]) == float(found.p_value[2, 2]) == 1
    assert int(found["count"]) == 1


def test_the_best_neighbour_is_never_the_origin(data):
    found = rla.best_point(data, bootstrap=QUICK)
    mean = own(data).mean(-1)
    mean[3, 2] = -np.inf
    i, j = np.unravel_index(mean.argmax(), mean.shape)
    assert float(found.alpha) == data.alpha.values[i]
    assert float(found.beta) == data.beta.values[j]
    assert float(found.naive_gain) == pytest.approx(mean[i, j] - own(data)[3, 2].mean())
    assert float(found.kl) == pytest.approx(float(data.landscape.kl()["mean"][i, j]))
    peak = synthetic.landscape("radial", points=7, prompts=200, seed=1)
    assert float(rla.best_point(peak, bootstrap=QUICK).gain) < 0, "the checkpoint is the best point"


def test_the_naive_gain_of_a_flat_landscape_is_luck_and_the_split_half_gain_is_not():
    naive, honest = [], []
    for seed in range(40):
        data = synthetic.landscape("flat", points=7, prompts=40, rollouts=2, seed=seed)
        found = rla.best_point(data, bootstrap=Bootstrap(resamples=100, seed=seed))
        naive.append(float(found.naive_gain))
        honest.append(float(found.gain))
    assert np.mean(naive) > 0.04
    assert abs(np.mean(honest)) < 3 * np.std(honest) / np.sqrt(40) + 1e-3


def test_with_one_clear_winner_the_split_half_gain_is_its_mean():
    rng = np.random.default_rng(0)
    differences = rng.normal(0, 0.1, (5, 50))
    differences[2] += 5.0
    gain, (low, high), share, chosen = split_half_gain(differences, QUICK)
    assert share == 1.0
    assert chosen[2] == 1.0
    assert gain == pytest.approx(differences[2].mean(), abs=1e-12)
    t = stats.ttest_1samp(differences[2], 0).confidence_interval()
    assert (low, high) == pytest.approx((t.low, t.high), rel=0.02)


def test_overlap_of_a_kl_landscape_is_full_and_of_a_flat_one_is_chance():
    full = rla.overlap(synthetic.landscape("kl", points=9, prompts=400, rollouts=4), bootstrap=QUICK)
    assert float(full.overlap) > 0.9
    assert float(full.radial_chance) < float(full.overlap)
    values = [
        float(rla.overlap(synthetic.landscape("flat", points=7, prompts=16, seed=s), bootstrap=QUICK).overlap)
        for s in range(60)
    ]
    assert np.mean(values) == pytest.approx(float(full.chance), abs=0.06)
    assert float(full.chance) == pytest.approx(16 / 80)


def test_overlap_counts_common_points(data):
    found = rla.overlap(data, share=0.3, bootstrap=QUICK)
    reward, kl = own(data).mean(-1).ravel(), own(data, "kl_k1").mean(-1).ravel()
    keep = np.arange(35) != 17
    reward, kl = reward[keep], kl[keep]
    size = round(0.3 * 34)
    common = set(np.argsort(-reward, kind="stable")[:size]) & set(np.argsort(kl, kind="stable")[:size])
    assert float(found.overlap) == pytest.approx(len(common) / size)
    assert found.overlap_interval[0] <= found.overlap <= found.overlap_interval[1]


@pytest.mark.parametrize("share", [0.0, 1.0, 0.001])
def test_an_impossible_region_is_refused(data, share):
    with pytest.raises(AnalysisError):
        rla.overlap(data, share=share)


def test_no_origin_is_said(data):
    without = data.isel(alpha=[0, 1, 2, 4, 5, 6])
    for function in (rla.better_than_origin, rla.best_point):
        with pytest.raises(AnalysisError, match="no usable point at the origin"):
            function(without)


def test_one_prompt_is_refused_or_said(data):
    with pytest.raises(AnalysisError, match="two prompts"):
        rla.better_than_origin(data.isel(prompt=[0]))
    found = rla.best_point(data.isel(prompt=[0]), bootstrap=QUICK)
    assert np.isnan(found.gain)
    assert "only 1 prompts" in str(found.reason.item())


def quadratic(gradient, hessian, points=9, prompts=50, noise=0.0, half_widths=(0.1, 0.05)):
    """A dataset whose reward is an exact quadratic per prompt, coefficients varying between prompts."""
    rng = np.random.default_rng(1)
    alphas, betas = (np.linspace(-h, h, points) for h in half_widths)
    a, b = np.meshgrid(alphas, betas, indexing="ij")
    vary = rng.normal(0, 1, (prompts, 2)) - 0
    vary -= vary.mean(0)
    g = np.asarray(gradient)[:, None] + vary.T
    reward = 0.5 + g[0] * a[..., None] + g[1] * b[..., None]
    reward = reward + (0.5 * (hessian[0][0] * a**2 + 2 * hessian[0][1] * a * b + hessian[1][1] * b**2))[..., None]
    reward = (reward + noise * rng.normal(size=reward.shape))[..., None]
    return xr.Dataset(
        {n: (("alpha", "beta", "prompt", "rollout"), reward) for n in ("reward", "kl_k1")},
        {"alpha": alphas, "beta": betas},
    )


def test_a_quadratic_is_found_exactly():
    hessian = [[-40.0, 6.0], [6.0, -10.0]]
    found = rla.quadratic_fit(quadratic((1.5, -2.0), hessian), bootstrap=QUICK)
    expected = [0.5, 1.5, -2.0, -40.0, 6.0, -10.0]
    np.testing.assert_allclose(found.coefficient, expected, atol=1e-9)
    np.testing.assert_allclose(found.curvature, np.linalg.eigvalsh(hessian), atol=1e-9)
    assert float(found.r_squared) == pytest.approx(1, abs=1e-9)


def test_its_errors_are_those_of_the_prompts():
    found = rla.quadratic_fit(quadratic((1.5, -2.0), [[-4.0, 0], [0, -1.0]], prompts=200), bootstrap=Bootstrap())
    # Each prompt's gradient is known exactly, so the error is its standard error over prompts.
    rng = np.random.default_rng(1)
    vary = rng.normal(0, 1, (200, 2))
    error = found.standard_error.sel(term=["gradient_alpha", "gradient_beta"])
    np.testing.assert_allclose(error, stats.sem(vary), rtol=1e-6)
    low, high = found.coefficient_interval.sel(term="gradient_alpha").values
    assert (high - low) / 2 == pytest.approx(1.97 * float(error[0]), rel=0.1)


def test_too_small_a_grid_has_no_quadratic(data):
    for small in (data.isel(alpha=[2, 3]), data.isel(beta=[2]), data.isel(alpha=[3], beta=[2])):
        found = rla.quadratic_fit(small, bootstrap=QUICK)
        assert found.coefficient.isnull().all()
        assert str(found.reason.item())
