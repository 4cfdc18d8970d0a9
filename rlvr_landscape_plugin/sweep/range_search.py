"""How far a grid reaches: the range where a landscape is neither flat nor zero everywhere, found by a few probes.

A probe is a small measurement: a policy at one end of an axis, on the first few tasks. Both axes are scaled by one
factor, so that the policies at their four ends keep the asked share of the checkpoint's reward on average. If the
checkpoint has no reward that could be lost, their KL divergence decides. Nothing here depends on servers or files.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import xarray as xr

from rlvr_landscape_plugin.config import FindRangeConfig, GridConfig
from rlvr_landscape_plugin.errors import TasksetError
from rlvr_landscape_plugin.files import JsonObject

Coordinates = tuple[float, float]
SIGNIFICANT = 2.0
"""The reward decides the range if the checkpoint's reward is at least this many standard errors above zero."""


@dataclass(frozen=True)
class Probe:
    """What one policy showed on the tasks of a probe."""

    alpha: float
    beta: float
    reward: float
    """Mean over tasks of the rollouts that did not fail."""
    reward_se: float
    """Its standard error over tasks."""
    kl: float
    """D_KL from the checkpoint (k1), nat per token."""

    @classmethod
    def of(cls, alpha: float, beta: float, point: xr.Dataset, tokens: np.ndarray) -> Probe:
        """From a measured point, dims (prompt, rollout), and the checkpoint's completion lengths (same shape)."""
        means = point["reward"].mean("rollout").values
        means = means[np.isfinite(means)]
        if len(means) < 2:
            raise TasksetError(f"every rollout at ({alpha:g}, {beta:g}) failed; no range can be found")
        valid = np.isfinite(point["kl_k1"].values)
        kl = float(point["kl_k1"].values[valid].sum() / max(1, tokens[valid].sum()))
        return cls(alpha, beta, float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means))), kl)


async def find_range(
    grid: GridConfig, settings: FindRangeConfig, probe: Callable[[Sequence[Coordinates]], Awaitable[Sequence[Probe]]]
) -> JsonObject:
    """Probe the origin, then the ends of both axes at factors 1, 2, 4, … or 1, 1/2, … until the target is bracketed.

    One more probe half-way (in logarithms), then interpolation. Returns, JSON-able, `factor` (two significant digits),
    `criterion` (`reward` or `kl`), `target`, `note` (why the target was not met, else empty) and all `probes`.
    """
    (origin,) = await probe([(0.0, 0.0)])
    by_reward = origin.reward > SIGNIFICANT * origin.reward_se and origin.reward > 0
    target = math.log(settings.retention) if by_reward else -math.log(settings.kl)
    seen: dict[float, float] = {}
    probes = [origin]

    async def level(exponent: float) -> float:
        """Logarithm of what the policies at the ends keep, at factor 2^exponent; it falls with the factor."""
        factor = 2.0**exponent
        ends = [(end * factor, 0.0) for end in (grid.alpha.min, grid.alpha.max)]
        ends += [(0.0, end * factor) for end in (grid.beta.min, grid.beta.max)]
        found = await probe(ends)
        probes.extend(found)
        left = np.mean([one.reward for one in found]) / origin.reward if by_reward else None
        kl = float(np.mean([one.kl for one in found]))
        seen[exponent] = math.log(max(left, 1e-6)) if left is not None else -math.log(max(kl, 1e-6))
        return seen[exponent]

    limit = math.log2(settings.largest_factor)
    outward = await level(0.0) >= target
    inner = outer = 0.0
    while (seen[outer] >= target) == outward and abs(outer) < limit:
        inner, outer = outer, max(-limit, min(limit, outer + (1 if outward else -1)))
        await level(outer)
    note = ""
    if (seen[outer] >= target) == outward:
        exponent, note = outer, f"not met at the {'largest' if outward else 'smallest'} factor allowed"
    else:
        low, high = min(inner, outer), max(inner, outer)
        middle = (low + high) / 2
        low, high = (middle, high) if await level(middle) >= target else (low, middle)
        # From the lower end, which meets the target, to the upper one, which does not.
        fall = seen[low] - seen[high]
        exponent = low + (high - low) * min(1.0, max(0.0, (seen[low] - target) / fall)) if fall > 0 else low
    return {
        "factor": float(f"{2.0**exponent:.2g}"),
        "criterion": "reward" if by_reward else "kl",
        "target": settings.retention if by_reward else settings.kl,
        "note": note,
        "probes": [asdict(one) for one in probes],
    }
