"""What a census shows about the neighbourhood of a checkpoint, radius by radius.

Directions are the unit of sampling (an antithetic pair is one), prompts the other; every interval is about other
directions *and* other prompts (`two_way.py`). At one radius all policies are equally far from the checkpoint, so no
correction for the distance is needed. docs/statistics.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy.special import ndtr, stdtr

from rlvr_landscape_analysis.designs import CensusPoints, census_points
from rlvr_landscape_analysis.results import BOUNDS
from rlvr_landscape_analysis.statistics.improvement import split_half_gain
from rlvr_landscape_analysis.statistics.resample import MIN_PROMPTS, Bootstrap
from rlvr_landscape_analysis.statistics.two_way import (
    MIN_DIRECTIONS,
    TwoWay,
    covariances,
    fieller,
    from_leave_outs,
    means,
    stack,
)

CENSUS_PAIRS = {"kl_reward": ("kl", "reward"), "kl_surrogate": ("kl", "surrogate")}
REACH = 3.0
"""Radii up to this many displacements of the run count as what training reaches."""
SPREAD_DIRECTIONS = 16
"""With fewer directions the variation of KL over directions gets no interval: a variance of few skewed values has none
that holds (docs/statistics.md)."""


@dataclass(frozen=True)
class Correlation:
    """A correlation over directions, noise taken out."""

    value: float
    """NaN where one of the two does not vary beyond noise."""
    interval: tuple[float, float]
    influence: TwoWay | None
    """First-order deviations of `value`, for contrasts; None where it is not defined."""
    numerator: TwoWay
    """U_xy of the pooled moments."""
    reason: str = ""


def pair_moments(points: CensusPoints, pair: str) -> TwoWay:
    """U_xx, U_xy, U_yy of the pair at every radius, shape (radii, 3), each quantity in units of its measured spread.

    The measured standard deviation over points (noise included) is a fixed unit here: it makes radii comparable, so
    that they can be pooled, and cancels from each correlation.
    """
    first, second = (points.values[name] for name in CENSUS_PAIRS[pair])
    tables = []
    for x, y in zip(first, second, strict=True):
        x, y = (values / _scale(values) for values in (x, y))
        tables.append(np.stack([covariances(x, x), covariances(x, y), covariances(y, y)], -1))
    return from_leave_outs(np.stack(tables, 2), points.directions_key, points.prompts_key)


def _scale(values: np.ndarray) -> float:
    spread = float(values.mean(-1).std())
    return spread if spread > 0 else 1.0


def pooled_correlation(
    moments: Sequence[TwoWay], weights: Sequence[np.ndarray], confidence: float = 0.95, second: str = "reward"
) -> Correlation:
    """One correlation of several radii or snapshots: Σ w U_xy / √(Σ w U_xx · Σ w U_yy), with its interval.

    Radii where the reward varies more beyond noise weigh more, as in a pooled within-group correlation. The interval
    holds the values ρ that Σ w U_xy − ρ √(…) = 0 does not rule out (Fieller), so it is [−1, 1] where nothing varies
    beyond noise. `second` is what the second quantity is called where this is so.
    """
    parts = [one * np.asarray(w, float)[:, None] for one, w in zip(moments, weights, strict=True)]
    total = [part.total() for part in parts]
    whole = sum(total[1:], total[0])
    uxx, uxy, uyy = whole.value
    numerator = whole[1]
    if uxx <= 0 or uyy <= 0:
        name = "KL" if uxx <= 0 else f"the {second}"
        return Correlation(np.nan, (-1.0, 1.0), None, numerator, f"{name} does not vary over directions beyond noise")
    size = float(np.sqrt(uxx * uyy))
    denominator = whole.linear(np.array([size / 2 / uxx, 0.0, size / 2 / uyy]), value=size)
    ratio = float(uxy / size)
    influence = stack(numerator, denominator).linear(np.array([1.0, -np.clip(ratio, -1, 1)]) / size, value=ratio)
    return Correlation(
        float(np.clip(ratio, -1, 1)), fieller(numerator, denominator, -1.0, 1.0, confidence), influence, numerator
    )


def at_relative(points: CensusPoints, relative: float, *, slack: float = 0.1) -> np.ndarray | None:
    """Weights of the radii that stand for a move of length `relative` · ‖θ‖: linear in ln(radius) between two of them.

    None where it lies outside the measured radii by more than the share `slack`.
    """
    own = points.relative
    if not np.isfinite(own).all():
        return None
    position = np.interp(np.log(relative), np.log(own), np.arange(len(own)))
    if not own[0] / (1 + slack) <= relative <= own[-1] * (1 + slack):
        return None
    low = int(np.floor(position))
    weights = np.zeros(len(own))
    share = position - low
    weights[low] = 1 - share
    if share > 0:
        weights[low + 1] = share
    return weights


def within_reach(points: CensusPoints, reach: float = REACH) -> np.ndarray:
    """1 for radii up to `reach` displacements of the run, else 0; all 0 where there is no run."""
    with np.errstate(invalid="ignore"):
        return (points.displacement <= reach * 1.001).astype(float)


def census(
    data: xr.Dataset | CensusPoints,
    *,
    confidence: float = 0.95,
    fdr: float = 0.05,
    seed: int = 0,
    estimator: str = "k1",
) -> xr.Dataset:
    """All statistics of one census; dims (radius, pair, member, bound).

    - `kl` (nat) and `change` (ΔR, reward minus the checkpoint's): means over directions, with `<name>_interval`;
    - `correlation` (pair) over directions at the radius, noise taken out, with its interval; `plain`, Pearson of the
      points' means, noise left in; `reliability` (member): share of the variance over points that is no noise;
    - `spread`: standard deviation of the true ΔR over directions; `density`: share of directions with ΔR > 0 if ΔR is
      normal over them, with its interval; `density_lower`: share of the measured policies that are better at the least
      (closed testing, no model of directions), `better`: policies that are better at the false discovery rate `fdr`;
    - `best`: expected ΔR of the best of as many random policies as were measured (normal model), with its interval;
      `best_measured`: ΔR of the policy chosen by half of the prompts, valued on the other half, with its interval over
      prompts;
    - `curvature` 2 KL / length², nat, mean over directions, which estimates ‖θ‖² tr F / n near the checkpoint, with its
      interval; `curvature_variation`, its coefficient of variation over directions, and `dimensions` = 2 / its square,
      the effective number of directions that KL knows, with their intervals.

    - `point_kl`, `point_change` (radius, direction, sign): KL and ΔR of every measured policy, means over prompts.

    Lengths are in units of ‖θ‖. Coordinates along `radius`: `relative`, `displacement` (NaN where there is no run).
    Scalars: step, directions, prompts; `reason` (radius) why a value is missing.
    """
    points = data if isinstance(data, CensusPoints) else census_points([data], estimator=estimator)[0]
    radii = len(points.radius)
    out: dict[str, np.ndarray] = {name: np.full(radii, np.nan) for name in _LONG_NAMES if name not in _PAIRED}
    out |= {f"{name}_interval": np.full((radii, 2), np.nan) for name in _BOUNDED if name not in _PAIRED}
    out |= {name: np.full((radii, len(CENSUS_PAIRS)), np.nan) for name in ("correlation", "plain")}
    out |= {"correlation_interval": np.full((radii, len(CENSUS_PAIRS), 2), np.nan)}
    out |= {"reliability": np.full((radii, len(CENSUS_PAIRS), 2), np.nan)}
    reasons = [""] * radii
    lacking = _too_few(points)
    for p, (pair, members) in enumerate(CENSUS_PAIRS.items()):
        if not set(members) <= set(points.values):
            continue
        for r in range(radii):
            out["plain"][r, p] = _plain(points, members, r)
        if lacking:
            continue
        moments = pair_moments(points, pair)
        for r in range(radii):
            found = pooled_correlation([moments], [np.eye(radii)[r]], confidence, members[1])
            out["correlation"][r, p] = found.value
            out["correlation_interval"][r, p] = found.interval
            out["reliability"][r, p] = np.clip(moments.value[r, [0, 2]], 0, 1)
            reasons[r] = reasons[r] or found.reason
    for r in range(radii):
        for name, value in _at_radius(points, r, confidence, fdr, seed, bool(lacking)).items():
            out[name][r] = value
        reasons[r] = lacking or reasons[r]
    return _dataset(points, out, reasons, confidence, fdr)


def _too_few(points: CensusPoints) -> str:
    if points.directions < MIN_DIRECTIONS:
        return f"only {points.directions} directions: no interval and no correction below {MIN_DIRECTIONS}"
    if points.prompts < MIN_PROMPTS:
        return f"only {points.prompts} prompts: no interval and no correction below {MIN_PROMPTS}"
    return ""


def _plain(points: CensusPoints, members: tuple[str, str], r: int) -> float:
    x, y = (points.values[name][r].mean(-1).ravel() for name in members)
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size > 0 else np.nan


def _at_radius(
    points: CensusPoints, r: int, confidence: float, fdr: float, seed: int, means_only: bool
) -> dict[str, float | tuple[float, float]]:
    change, kl = points.change[r], points.values["kl"][r]
    bent = 2 * kl / points.length[r][..., None] ** 2
    out: dict[str, float | tuple[float, float]] = {
        "kl": float(kl.mean()),
        "change": float(change.mean()),
        "curvature": float(bent.mean()),
    }
    if means_only:
        return out
    keys = points.directions_key, points.prompts_key
    mu = means(change.mean(1), *keys)
    for name, estimate in (("kl", means(kl.mean(1), *keys)), ("curvature", means(bent.mean(1), *keys))):
        out[f"{name}_interval"] = _pair_of(estimate.positive_interval(confidence))
    out["change_interval"] = _pair_of(mu.interval(confidence))
    variance = from_leave_outs(covariances(change, change), *keys)
    out |= _density(mu, variance, confidence)
    out |= _best(mu, variance, 2 * points.directions, confidence)
    out |= _tests(change.reshape(-1, points.prompts), confidence, fdr)
    gain, interval, _, _ = split_half_gain(change.reshape(-1, points.prompts), Bootstrap(seed=seed, level=confidence))
    out |= {"best_measured": gain, "best_measured_interval": interval}
    return out | _variation(bent.mean(1), keys, confidence)


def _density(mu: TwoWay, variance: TwoWay, confidence: float) -> dict[str, float | tuple[float, float]]:
    """Φ(μ/τ): the share of directions with ΔR > 0 if ΔR is normal with mean μ and standard deviation τ over them."""
    square = float(variance.value)
    if square <= 0:
        return {"spread": 0.0, "density_interval": (0.0, 1.0)}
    spread = float(np.sqrt(square))
    tau = variance.linear_scalar(1 / (2 * spread), spread)
    low, high = fieller(mu, tau, -8.0, 8.0, confidence)
    return {
        "spread": spread,
        "density": float(ndtr(mu.value / spread)),
        "density_interval": (0.0 if low <= -7.99 else float(ndtr(low)), 1.0 if high >= 7.99 else float(ndtr(high))),
    }


def expected_largest(count: int) -> float:
    """Mean of the largest of `count` independent standard normal values."""
    x = np.linspace(-10, 10, 20001)
    return float(np.trapezoid(x * np.gradient(ndtr(x) ** count, x), x))


def _best(mu: TwoWay, variance: TwoWay, count: int, confidence: float) -> dict[str, float | tuple[float, float]]:
    factor = expected_largest(count)
    square = float(variance.value)
    spread = float(np.sqrt(max(square, 0.0)))
    # The error of the spread is skewed, so it is taken in the logarithm if there is one; near zero only the upper bound
    # is known.
    if square > 2 * float(np.sqrt(variance.variance())):
        squares = variance.positive_interval(confidence)
    else:
        squares = variance.interval(confidence)
    bottom, top = (float(np.sqrt(max(float(end), 0.0))) for end in squares)
    low, high = _pair_of(mu.interval(confidence))
    value = float(mu.value) + factor * spread
    # Both errors are put together as those of a sum (Zou and Donner 2008).
    return {
        "best": value,
        "best_interval": (
            value - float(np.hypot(mu.value - low, factor * (spread - bottom))),
            value + float(np.hypot(high - mu.value, factor * (top - spread))),
        ),
    }


def _pair_of(bounds: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    return float(bounds[0]), float(bounds[1])


def _tests(change: np.ndarray, confidence: float, fdr: float) -> dict[str, float | tuple[float, float]]:
    from scipy.stats import false_discovery_control

    prompts = change.shape[1]
    spread = change.std(1, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(spread > 0, change.mean(1) / (spread / np.sqrt(prompts)), np.sign(change.mean(1)) * np.inf)
    p = np.where(np.isnan(t), 1.0, stdtr(prompts - 1, -t))
    return {
        "better": float((false_discovery_control(p, method="bh") <= fdr).sum()),
        "density_lower": true_discoveries(p, 1 - confidence) / len(p),
    }


def true_discoveries(p: np.ndarray, alpha: float) -> int:
    """How many of the hypotheses are false at the least, with confidence 1 − `alpha` (Goeman and Solari 2011).

    Closed testing with Simes' test: m − h, where h is the largest size of a set of the largest p-values that Simes does
    not reject. It holds under the positive dependence that comparisons with one checkpoint have.
    """
    ordered = np.sort(p)
    m = len(ordered)
    for size in range(m, 0, -1):
        tail = ordered[m - size :]
        if (tail > alpha * np.arange(1, size + 1) / size).all():
            return m - size
    return m


def _variation(bent: np.ndarray, keys: tuple, confidence: float) -> dict[str, float | tuple[float, float]]:
    """Coefficient of variation of 2 KL / length² over directions, noise taken out; `bent` is (K, N)."""
    mean = means(bent, *keys)
    if float(mean.value) <= 0:
        return {}
    square = from_leave_outs(covariances(bent[:, None], bent[:, None]), *keys)
    level = mean.linear_scalar(2 * float(mean.value), float(mean.value) ** 2)
    if bent.shape[0] < SPREAD_DIRECTIONS:
        with np.errstate(divide="ignore"):
            ratio = max(float(square.value / level.value), 0.0)
            return {"curvature_variation": float(np.sqrt(ratio)), "dimensions": float(np.divide(2, ratio))}
    low, high = fieller(square, level, -0.5, 8.0, confidence)
    low, high = max(low, 0.0), np.inf if high >= 7.999 else max(high, 0.0)
    ratio = max(float(square.value / level.value), 0.0)
    if low > 0:
        # A variance of few directions is skewed: its upper bound is further away than Fieller's, which is linear in it.
        slope = stack(square, level).linear(np.array([1.0, -ratio]) / float(level.value), value=ratio)
        high = max(high, float(slope.positive_interval(confidence)[1]))
    with np.errstate(divide="ignore"):
        return {
            "curvature_variation": float(np.sqrt(ratio)),
            "curvature_variation_interval": (float(np.sqrt(low)), float(np.sqrt(high))),
            "dimensions": float(np.divide(2, ratio)),
            "dimensions_interval": (float(np.divide(2, high)), float(np.divide(2, low))),
        }


_BOUNDED = (
    "kl",
    "change",
    "correlation",
    "density",
    "best",
    "best_measured",
    "curvature",
    "curvature_variation",
    "dimensions",
)
_PAIRED = ("correlation", "plain", "reliability")
_LONG_NAMES = {
    "kl": ("KL divergence from the checkpoint, mean over directions", "nat"),
    "change": ("reward minus the checkpoint's, mean over directions", "1"),
    "correlation": ("correlation over directions at this radius, noise taken out", "1"),
    "plain": ("Pearson correlation of the measured points at this radius, noise left in", "1"),
    "reliability": ("share of the variance over points that is not sampling noise", "1"),
    "spread": ("standard deviation of the true reward change over directions", "1"),
    "density": ("share of directions that improve the reward, normal model", "1"),
    "density_lower": ("share of the measured policies that improve the reward at the least", "1"),
    "better": ("measured policies that improve the reward, false discovery rate controlled", "1"),
    "best": ("expected reward change of the best of as many random policies as measured", "1"),
    "best_measured": ("reward change of the policy that half of the prompts choose, on the other half", "1"),
    "curvature": ("2 KL / length^2, mean over directions, length in units of the norm of theta", "nat"),
    "curvature_variation": ("coefficient of variation of 2 KL / length^2 over directions", "1"),
    "dimensions": ("effective number of directions that KL knows, 2 / variation^2", "1"),
}


def _dataset(
    points: CensusPoints, out: dict[str, np.ndarray], reasons: list[str], confidence: float, fdr: float
) -> xr.Dataset:
    variables = {}
    for name, values in out.items():
        base = name.removesuffix("_interval")
        dims: tuple[str, ...] = ("radius", "pair") if base in _PAIRED else ("radius",)
        if name.endswith("_interval"):
            dims = (*dims, "bound")
        elif name == "reliability":
            dims = (*dims, "member")
        long_name, units = _LONG_NAMES[base]
        tail = ", interval" if name.endswith("_interval") else ""
        variables[name] = (dims, values, {"long_name": long_name + tail, "units": units})
    for name, own in (("kl", points.values["kl"]), ("change", points.change)):
        long_name, units = _LONG_NAMES[name]
        attrs = {"long_name": long_name.removesuffix(", mean over directions"), "units": units}
        variables[f"point_{name}"] = (("radius", "direction", "sign"), own.mean(-1), attrs)
    variables["reason"] = ("radius", np.array(reasons, dtype=str), {"long_name": "why a value is missing"})
    coords = {
        "radius": ("radius", points.radius, {"long_name": "length of the move", "units": points.unit}),
        "relative": ("radius", points.relative, {"long_name": "length of the move by the norm of theta", "units": "1"}),
        "displacement": (
            "radius",
            points.displacement,
            {"long_name": "length of the move in displacements of the run", "units": "1"},
        ),
        "pair": list(CENSUS_PAIRS),
        "member": ["first", "second"],
        "bound": list(BOUNDS),
        "sign": [1, -1],
        "step": points.step,
    }
    attrs = {
        "directions": points.directions,
        "prompts": points.prompts,
        "policies": 2 * points.directions * len(points.radius),
        "radius_unit": points.unit,
        "confidence": confidence,
        "fdr": fdr,
    }
    return xr.Dataset(variables, coords, attrs)
