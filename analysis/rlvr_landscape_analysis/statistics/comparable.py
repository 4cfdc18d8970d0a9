"""Which radii of which censuses are compared: those that training reaches, and those that several snapshots share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rlvr_landscape_analysis.designs import CensusPoints
from rlvr_landscape_analysis.evidence import RunEvidence
from rlvr_landscape_analysis.statistics.census import (
    Correlation,
    at_relative,
    pair_moments,
    pooled_correlation,
    within_reach,
)
from rlvr_landscape_analysis.statistics.estimates import Estimate, mean_over_runs
from rlvr_landscape_analysis.statistics.resample import MIN_PROMPTS
from rlvr_landscape_analysis.statistics.two_way import MIN_DIRECTIONS


def common_radii(points: Sequence[CensusPoints]) -> np.ndarray:
    """Relative radii (‖move‖ / ‖θ‖) that lie within the measured range of every census: those of the first one.

    Where none of the first one's radii lies in all ranges, the middle of what is common; empty where nothing is.
    """
    if any(not np.isfinite(p.relative).all() for p in points):
        return np.zeros(0)
    low, high = max(p.relative.min() for p in points), min(p.relative.max() for p in points)
    slack = 1.1
    own = points[0].relative
    inside = own[(own >= low / slack) & (own <= high * slack)]
    if len(inside):
        return inside
    return np.array([np.sqrt(low * high)]) if low <= high * slack else np.zeros(0)


def at(points: CensusPoints, targets: np.ndarray) -> np.ndarray:
    """Weights of a census's radii that stand for moves of the relative lengths `targets`."""
    weights = np.zeros(len(points.radius))
    for target in targets:
        found = at_relative(points, float(target))
        if found is not None:
            weights += found
    return weights


def pooled(
    points: Sequence[CensusPoints], confidence: float, weights: Sequence[np.ndarray] | None = None
) -> Correlation:
    """KL and reward pooled over snapshots and radii; by default the radii that training reaches."""
    chosen = [within_reach(p) for p in points] if weights is None else weights
    return pooled_correlation([pair_moments(p, "kl_reward") for p in points], chosen, confidence)


def reached(run: RunEvidence) -> list[CensusPoints]:
    """The trained snapshots of a run that have a radius which training reaches."""
    return [p for p in run.points.values() if p.step >= 1 and within_reach(p).any()]


def against_start(
    runs: Sequence[RunEvidence], chosen: Mapping[str, list[CensusPoints]], confidence: float
) -> tuple[Estimate | None, Estimate | None]:
    """The trained snapshots and step 0, both at the radii that both have."""
    trained, start = [], []
    for run in runs:
        zero = run.points.get(0)
        if zero is None or not np.isfinite(zero.relative).all():
            continue
        kept, weights, at_zero = [], [], np.zeros(len(zero.radius))
        for points in chosen[run.name]:
            own = np.zeros(len(points.radius))
            for r in np.flatnonzero(within_reach(points)):
                found = at_relative(zero, float(points.relative[r])) if np.isfinite(points.relative[r]) else None
                if found is not None:
                    own[r] = 1
                    at_zero += found
            if own.any():
                kept.append(points)
                weights.append(own)
        if kept:
            trained.append(pooled(kept, confidence, weights))
            start.append(pooled([zero], confidence, [at_zero]))
    if not start:
        return None, None
    return mean_over_runs(trained, confidence), mean_over_runs(start, confidence)


def of_controls(controls: Sequence[RunEvidence], confidence: float) -> Estimate | None:
    """The correlation of runs on other rewards at the radii that they reach; None where none was measured."""
    found = [(run, reached(run)) for run in controls if run.censuses]
    parts = [pooled(points, confidence) for _, points in found if points]
    return mean_over_runs(parts, confidence) if parts else None


def too_few(points: Sequence[CensusPoints]) -> str:
    """Why a census is too small to decide anything; empty where none is."""
    for p in points:
        if p.directions < MIN_DIRECTIONS or p.prompts < MIN_PROMPTS:
            return (
                f"the census of step {p.step} has {p.directions} directions and {p.prompts} prompts, and "
                f"{MIN_DIRECTIONS} and {MIN_PROMPTS} are the least"
            )
    return ""


def nearest(points: Sequence[CensusPoints]) -> float:
    """Length of the shortest move in displacements; NaN where there is no run."""
    lengths = [float(p.displacement.min()) for p in points if np.isfinite(p.displacement).all()]
    return min(lengths, default=np.nan)


def count_directions(points: Sequence[CensusPoints]) -> int:
    """Different directions in all censuses together; paired censuses hold the same ones."""
    return sum({p.directions_key: p.directions for p in points}.values())
