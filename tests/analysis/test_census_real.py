"""A real census of an untrained policy: its statistics by other code (NumPy and SciPy, float64), and what T1 says.

`data/census` was measured by `configs/sweep/quickstart_census.toml` on two CPU cores.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import netCDF4
import numpy as np
import pytest
import xarray as xr
from rlvr_landscape_analysis.evidence import RunEvidence
from rlvr_landscape_analysis.statistics.census import census
from rlvr_landscape_analysis.statistics.claims import all_claims
from scipy import integrate, stats

FILE = Path(__file__).parent / "data" / "census" / "census_step000000.nc"


@pytest.fixture(scope="module")
def raw():
    """Float64 arrays: (direction, sign, radius, prompt) means over rollouts, and the checkpoint's (prompt,)."""
    with netCDF4.Dataset(FILE) as file:
        assert file["reward"].dimensions == ("direction", "sign", "radius", "prompt", "rollout")

        def mean(name):
            values = np.ma.filled(file[name][:].astype(np.float64), np.nan)
            assert np.isfinite(values).all()
            return values.mean(-1)

        found = {
            name: mean(source) for name, source in (("kl", "kl_k1"), ("reward", "reward"), ("surrogate", "surrogate"))
        }
        found["base"] = mean("base_reward")
        found["length"] = np.asarray(file["realised_step"][:], np.float64)
    return found


@pytest.fixture(scope="module")
def found():
    with xr.open_dataset(FILE) as data:
        return census(data.load())


def moment(x, y):
    """Covariance over directions of the true values: different directions and different prompts, written out."""
    k, m, n = x.shape
    off = ~np.eye(n, dtype=bool)
    products = np.einsum("dsi,etj->deij", x, y)[:, :, off].sum(-1)
    same = np.einsum("dsi,dsj->ij", x, y)[off].sum() / (k * m * n * (n - 1))
    apart = (products.sum() - np.trace(products)) / (k * (k - 1) * m * m * n * (n - 1))
    return same - apart


def close(value, expected):
    assert float(value) == pytest.approx(expected, abs=1e-10, rel=1e-10)


@pytest.mark.parametrize("r", range(3))
@pytest.mark.parametrize("second", ["reward", "surrogate"])
def test_correlations_over_directions(raw, found, r, second):
    x, y = raw["kl"][:, :, r], raw[second][:, :, r]
    uxx, uxy, uyy = moment(x, x), moment(x, y), moment(y, y)
    got = found.isel(radius=r).sel(pair=f"kl_{second}")
    close(got["plain"], stats.pearsonr(x.mean(-1).ravel(), y.mean(-1).ravel())[0])
    if min(uxx, uyy) <= 0:
        assert np.isnan(got["correlation"])
        assert got["correlation_interval"].values.tolist() == [-1, 1]
    else:
        close(got["correlation"], np.clip(uxy / np.sqrt(uxx * uyy), -1, 1))
    for i, (values, u) in enumerate(((x, uxx), (y, uyy))):
        close(got["reliability"][i], np.clip(u / values.mean(-1).var(), 0, 1))


@pytest.mark.parametrize("r", range(3))
def test_means_spread_density_and_the_best(raw, found, r):
    change = raw["reward"][:, :, r] - raw["base"]
    got = found.isel(radius=r)
    close(got["kl"], raw["kl"][:, :, r].mean())
    close(got["change"], change.mean())
    close(got["curvature"], np.mean(2 * raw["kl"][:, :, r].mean(-1) / raw["length"][:, :, r] ** 2))
    np.testing.assert_allclose(got["point_change"], change.mean(-1), rtol=0, atol=1e-10)
    square = moment(change, change)
    spread = np.sqrt(max(square, 0))
    close(got["spread"], spread)
    if square > 0:
        close(got["density"], stats.norm.cdf(change.mean() / spread))
    # E[largest of 16] = ∫ 1 − Φ^16 − (1 − Φ)^16 … over the positive half, by quadrature.
    largest = integrate.quad(lambda z: 1 - stats.norm.cdf(z) ** 16, 0, 12)[0]
    largest -= integrate.quad(lambda z: stats.norm.cdf(z) ** 16, -12, 0)[0]
    assert float(got["best"]) == pytest.approx(change.mean() + largest * spread, abs=1e-6)


@pytest.mark.parametrize("r", range(3))
def test_tests_of_single_policies(raw, found, r):
    change = (raw["reward"][:, :, r] - raw["base"]).reshape(16, 64)
    p = stats.ttest_1samp(change, 0, axis=1, alternative="greater").pvalue
    assert int(found["better"][r]) == int((stats.false_discovery_control(p) <= 0.05).sum())
    # Closed testing by brute force: a number is the least that improve if every larger set of nulls is rejected.
    ordered = np.sort(p)

    def rejected(values):
        return (np.sort(values) <= 0.05 * np.arange(1, len(values) + 1) / len(values)).any()

    most_nulls = max((s for s in range(1, 17) if not rejected(ordered[16 - s :])), default=0)
    assert float(found["density_lower"][r]) == pytest.approx((16 - most_nulls) / 16)


@pytest.mark.parametrize("r", range(3))
def test_the_interval_of_the_mean_change_by_leaving_out_one_by_one(raw, found, r):
    change = (raw["reward"][:, :, r] - raw["base"]).mean(1)
    k, n = change.shape
    full = change.mean()
    rows = np.array([np.delete(change, d, 0).mean() for d in range(k)])
    columns = np.array([np.delete(change, i, 1).mean() for i in range(n)])
    cells = np.array([[np.delete(np.delete(change, d, 0), i, 1).mean() for i in range(n)] for d in range(k)])
    one = (k - 1) / k * np.sum((rows - rows.mean()) ** 2)
    other = (n - 1) / n * np.sum((columns - columns.mean()) ** 2)
    inner = cells - rows[:, None] - columns + full
    both = (k - 1) * (n - 1) / (k * n) * np.sum((inner - inner.mean()) ** 2)
    variance = max(one + other - both, one, other)
    freedom = (one + other) ** 2 / (one**2 / (k - 1) + other**2 / (n - 1))
    half = stats.t.ppf(0.975, freedom) * np.sqrt(variance)
    np.testing.assert_allclose(found["change_interval"][r], [full - half, full + half], rtol=0, atol=1e-10)


def part(data, directions, step):
    """Some directions of the census, as if they had been measured around a snapshot that training reached."""
    chosen = data.isel(direction=list(directions)).assign_coords(step=step)
    if step:
        # As far as the policy at the largest radius, so that every radius counts as reached.
        far = chosen["relative_radius"].values.max() / 3
        chosen["displacement_radius"] = chosen["realised_step"] / far
        chosen.attrs = chosen.attrs | {"radius_unit": "displacement"}
    return chosen


def test_an_untrained_policy_does_not_pass_t1():
    """Real directions around an untrained policy, half of them called step 0 and half step 10, in every way."""
    with xr.open_dataset(FILE) as data:
        data = data.load()
    alone = all_claims([RunEvidence("untrained", {0: data})])[0]
    assert alone.verdict == "not measurable"
    verdicts = []
    for chosen in combinations(range(8), 4):
        rest = sorted(set(range(8)) - set(chosen))
        run = RunEvidence("untrained", {0: part(data, rest, 0), 10: part(data, chosen, 10)})
        claim = all_claims([run])[0]
        assert claim.directions == 4
        assert "from step 0 at the same radii" in claim.sentence
        verdicts.append(claim.verdict)
    assert "supported" not in verdicts


def test_a_correlation_that_step_0_has_too_is_not_trainings_doing():
    """Eight directions each: the same real census as step 0 and as step 10 has a contrast of 0."""
    with xr.open_dataset(FILE) as data:
        data = data.load()
    run = RunEvidence("untrained", {0: part(data, range(8), 0), 10: part(data, range(8), 10)})
    claim = all_claims([run])[0]
    assert "is 0.00 [" in claim.sentence
    assert claim.verdict != "supported"
