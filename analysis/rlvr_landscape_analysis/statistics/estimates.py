"""Numbers over runs, directions and prompts: means over runs, differences with lopsided intervals, what would decide.

The claims are made of them (`claims.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from rlvr_landscape_analysis.statistics.census import Correlation
from rlvr_landscape_analysis.statistics.two_way import TwoWay, over_runs

_MAX_FACTOR = 1000
"""Largest multiple of the present design that is offered as one that would decide."""


@dataclass(frozen=True)
class Estimate:
    """A number over runs, directions and prompts."""

    value: float
    interval: tuple[float, float]
    influence: TwoWay | None
    """Of the mean over runs; None where it is not defined."""
    runs: int
    reason: str = ""


def mean_over_runs(parts: Sequence[Correlation], confidence: float) -> Estimate:
    """Mean correlation over runs with an interval over runs, directions and prompts; of one run, over the last two."""
    defined = [part for part in parts if part.influence is not None]
    if not defined:
        return Estimate(np.nan, (-1.0, 1.0), None, len(parts), parts[0].reason if parts else "no run")
    if len(parts) == 1:
        return Estimate(parts[0].value, parts[0].interval, parts[0].influence, 1)
    influences = [part.influence for part in defined if part.influence is not None]
    whole = sum(influences[1:], influences[0]) * (1 / len(influences))
    value, variance, freedom = over_runs(influences)
    half = float(stdtrit(freedom, (1 + confidence) / 2) * np.sqrt(variance))
    reason = f"{len(parts) - len(defined)} of {len(parts)} runs do not define it" if len(defined) < len(parts) else ""
    return Estimate(
        float(np.clip(value, -1, 1)), (max(value - half, -1.0), min(value + half, 1.0)), whole, len(defined), reason
    )


def combination(parts: Sequence[Estimate], factors: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Σ factor · estimate with an interval made of the estimates' own intervals (Zou 2007), correlations included.

    Intervals of correlations are asymmetric and can be [−1, 1]; this keeps both properties. Estimates that share
    prompts or directions are correlated, as their deviations say.
    """
    values = np.array([part.value for part in parts])
    c = np.asarray(factors, float)
    if not np.isfinite(values).all():
        bound = float(np.abs(c).sum())
        return np.nan, (-bound, bound)
    low, high = (np.array([part.interval[i] for part in parts]) for i in (0, 1))
    r = np.eye(len(parts))
    for i in range(len(parts)):
        for j in range(i):
            r[i, j] = r[j, i] = _correlation(parts[i].influence, parts[j].influence)
    value = float(c @ values)

    def reach(towards: np.ndarray, away: np.ndarray) -> float:
        steps = c * np.abs(np.where(c > 0, towards, away) - values)
        return float(np.sqrt(max(steps @ r @ steps, 0.0)))

    return value, (value - reach(low, high), value + reach(high, low))


def _correlation(one: TwoWay | None, other: TwoWay | None) -> float:
    if one is None or other is None:
        return 0.0
    a, b = float(one.variance()), float(other.variance())
    if min(a, b) <= 0:
        return 0.0
    shared = (float((one + other).variance()) - a - b) / 2
    return float(np.clip(shared / np.sqrt(a * b), -0.95, 0.95))


def needed(influence: TwoWay | None, margin: float, confidence: float) -> tuple[int | None, int | None]:
    """Directions and prompts with which the half-width would be `margin`, at the least cost; None where unknown.

    The parts of the variance that directions, prompts and both together have shrink with their numbers.
    """
    if influence is None or not np.isfinite(margin) or margin <= 0:
        return None, None
    directions, prompts, both = (float(part) for part in influence.parts())
    only_d, only_p = max(directions - both, 0.0), max(prompts - both, 0.0)
    k = max((len(own) for own in influence.directions.values()), default=0)
    n = max((len(own) for own in influence.prompts.values()), default=0)
    target = (margin / float(influence.quantile(confidence))) ** 2
    steps = 2.0 ** (np.arange(0, 81) / 8)
    a = steps if k else np.ones(1)
    variance = only_d / a[:, None] + only_p / steps[None] + both / (a[:, None] * steps[None])
    cost = np.where(variance <= target, a[:, None] * steps[None], np.inf)
    best = np.unravel_index(int(np.argmin(cost)), cost.shape)
    if not cost[best] <= _MAX_FACTOR:
        return None, None
    return (int(np.ceil(k * a[best[0]])) if k else None), int(np.ceil(n * steps[best[1]]))


def difference(one: TwoWay | None, other: TwoWay | None) -> TwoWay | None:
    """One minus the other; None where one is not defined."""
    return None if one is None or other is None else one - other


def over(parts: Sequence[TwoWay], confidence: float) -> Estimate:
    """Mean over runs of numbers about prompts, with its interval over runs and prompts."""
    value, variance, freedom = over_runs(parts)
    half = float(stdtrit(freedom, (1 + confidence) / 2) * np.sqrt(variance))
    whole = sum(parts[1:], parts[0]) * (1 / len(parts))
    return Estimate(value, (value - half, value + half), whole, len(parts))


def largest(found: Sequence[tuple[int | None, int | None]]) -> tuple[int | None, int | None]:
    """What would decide everything that is undecided; unknown where one part is unknown."""
    if not found or any(prompts is None for _, prompts in found):
        return None, None
    return (
        max((directions for directions, _ in found if directions is not None), default=None),
        max(prompts for _, prompts in found if prompts is not None),
    )
