"""The claims T1–T3 as sentences with numbers and a verdict.

Every verdict compares an interval with the band ±`NEGLIGIBLE`, fixed here before any data: *supported* when the
interval lies wholly beyond the band on the claimed side, *not supported* when it lies wholly on this side of the
band's edge, *undecided* otherwise, with the numbers of directions and prompts that would decide. Where the designs
that a claim needs were not measured, it is *not measurable*.

T1 and T2 rest on censuses: many random directions at radii that training reaches. A 2-D slice holds two directions and
one range, and the plain correlation over it follows that range; it is quoted at several ranges and never decides. T3
rests on boundaries: many rollouts of the checkpoint itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy.special import stdtrit

from rlvr_landscape_analysis.designs import CensusPoints
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.evidence import EvidenceAnalysis, RunEvidence
from rlvr_landscape_analysis.results import EARLY, NOT_MEASURABLE, NOT_SUPPORTED, SUPPORTED, UNDECIDED, Claim
from rlvr_landscape_analysis.statistics.boundary import CONTRAST_K, contrast
from rlvr_landscape_analysis.statistics.census import (
    REACH,
    Correlation,
    at_relative,
    pair_moments,
    pooled_correlation,
    within_reach,
)
from rlvr_landscape_analysis.statistics.path import displacement_position
from rlvr_landscape_analysis.statistics.resample import MIN_PROMPTS, Bootstrap
from rlvr_landscape_analysis.statistics.two_way import MIN_DIRECTIONS, TwoWay, over_runs

NEGLIGIBLE = 0.1
"""An effect smaller than this (a correlation, or a share of exploitation) does not count; fixed here, before any
data."""
EVEN = 0.5
"""Share of the gain in pass@1 that is exploitation when it is neither this nor exploration (claim T3)."""
TITLES = {
    "T1": "High-reward policies concentrate near the checkpoint in KL",
    "T2": "The concentration appears early, within the first ten updates",
    "T3": "Training acts as local exploitation rather than broad exploration",
}
RULES = {
    "T1": (
        f"Over random directions at radii up to {REACH:g} displacements of the run: supported when the interval of "
        f"the correlation of KL and reward lies below −{NEGLIGIBLE:g} and so do those of its change from step 0 at the "
        "same radii and of its difference from runs on random rewards, of which one must be measured (is it "
        f"training's doing?); not supported when one of them lies above −{NEGLIGIBLE:g}."
    ),
    "T2": (
        "With the correlation of KL and reward over random directions at the same relative radii: supported when the "
        f"interval of its change from step 0 to the last snapshot up to step {EARLY} lies below −{NEGLIGIBLE:g} and, "
        "where later snapshots were measured, that of the early change minus the later one lies below 0; not supported "
        f"when the first lies above −{NEGLIGIBLE:g} or the second above 0."
    ),
    "T3": (
        f"With X = 1 − Δpass@k / Δpass@1 at the largest k = 2^i of at least {CONTRAST_K} that was measured: supported "
        f"when pass@1 rose (interval above 0) and X lies above {EVEN + NEGLIGIBLE:g} (the interval of "
        f"Δpass@k − {EVEN - NEGLIGIBLE:g} Δpass@1 below 0); not supported when that interval lies above 0."
    ),
}
_MAX_FACTOR = 1000
"""Largest multiple of the present design that is offered as one that would decide."""


def all_claims(
    runs: Sequence[RunEvidence],
    *,
    settings: Bootstrap | None = None,
    threshold: float | None = None,
    ranges: Mapping[tuple[int, int], xr.Dataset] | None = None,
    analyses: Sequence[EvidenceAnalysis] = (),
) -> list[Claim]:
    """T1, T2 and T3 of runs of one objective, runs on other rewards among them as controls.

    `ranges`: (step, slice) → `ranges.plain_by_range` of 2-D slices, quoted beside T1 and T2. `analyses`: what
    `analyse_evidence` found, for the words about the frontier. `threshold`: the reward that passes, for T3.
    """
    chosen = settings or Bootstrap()
    trained = [run for run in runs if not run.control]
    controls = [run for run in runs if run.control]
    return [
        claim_t1(trained, controls, chosen, ranges),
        claim_t2(trained, chosen, ranges),
        claim_t3(trained, chosen, threshold, analyses),
    ]


def decide(interval: tuple[float, float], edge: float = -NEGLIGIBLE) -> str:
    """Supported when the whole interval lies below `edge`, not supported when it lies above, undecided otherwise."""
    low, high = interval
    if not np.isfinite([low, high]).all():
        return UNDECIDED
    return SUPPORTED if high < edge else NOT_SUPPORTED if low > edge else UNDECIDED


def together(verdicts: Sequence[str]) -> str:
    """Of conditions that all must hold."""
    if NOT_SUPPORTED in verdicts:
        return NOT_SUPPORTED
    return SUPPORTED if all(verdict == SUPPORTED for verdict in verdicts) else UNDECIDED


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


def claim_t1(
    runs: Sequence[RunEvidence],
    controls: Sequence[RunEvidence],
    settings: Bootstrap,
    ranges: Mapping[tuple[int, int], xr.Dataset] | None = None,
) -> Claim:
    """T1 over the trained snapshots (step ≥ 1) at radii that training reaches, against step 0 or random rewards."""
    censused = [run for run in runs if run.censuses]
    if not censused:
        return _not_measurable("T1", f"it needs a census, which has many random directions. {_published(ranges)}")
    if not any(step >= 1 for run in censused for step in run.points):
        return _not_measurable("T1", "only snapshot 0 was measured, nothing was trained yet", censused)
    chosen = {run.name: _reached(run) for run in censused}
    used = [run for run in censused if chosen[run.name]]
    if not used:
        near = _nearest([p for run in censused for p in run.points.values() if p.step >= 1])
        where = f"the nearest policy lies {near:.3g} displacements away" if np.isfinite(near) else "it has no run"
        return _not_measurable("T1", f"no census has a radius within {REACH:g} displacements: {where}", censused)
    few = _too_few([p for run in used for p in chosen[run.name]])
    if few:
        return _not_measurable("T1", few, used)
    level = mean_over_runs([_pooled(chosen[run.name], settings.level) for run in used], settings.level)
    verdicts = [decide(level.interval)]
    sentence = (
        f"At radii up to {REACH:g} displacements, KL and reward correlate over random directions by "
        f"{number(level.value, level.interval, settings)}."
    )
    if level.reason:
        sentence += f" ({level.reason}.)"
    compared, margins = [], [(level.influence, abs(level.value + NEGLIGIBLE))]
    for what, other, base in (
        ("From step 0 at the same radii", *_against_start(used, chosen, settings.level)),
        ("Against random rewards", level, _of_controls(controls, settings.level)),
    ):
        if base is None or other is None:
            continue
        value, interval = combination([other, base], [1.0, -1.0])
        compared.append(decide(interval))
        influence = _difference(other.influence, base.influence)
        margins.append((influence, abs(value + NEGLIGIBLE)))
        sentence += (
            f" {what}, where it is {number(base.value, base.interval, settings)}, it differs by "
            f"{number(value, interval, settings)}."
        )
    if compared:
        verdicts.append(together(compared))
        overturn = "a correlation as strong around step 0, or other directions at the same radii"
    else:
        verdicts.append(UNDECIDED)
        sentence += (
            " Nothing says yet whether training made it: no census of step 0 has these radii, nor has a control."
        )
        overturn = "a census of step 0 at the same radii with the same correlation"
    verdict = together(verdicts)
    directions, prompts = (None, None)
    if verdict == UNDECIDED and compared:
        directions, prompts = _largest(
            [
                needed(i, m, settings.level)
                for (i, m), v in zip(margins, [verdicts[0], *compared], strict=True)
                if v == UNDECIDED
            ]
        )
    return _claim(
        "T1",
        verdict,
        f"{sentence} {_published(ranges)}".strip(),
        level.value,
        level.interval,
        used,
        [p for run in used for p in chosen[run.name]],
        (directions, prompts),
        overturn,
    )


def claim_t2(
    runs: Sequence[RunEvidence], settings: Bootstrap, ranges: Mapping[tuple[int, int], xr.Dataset] | None = None
) -> Claim:
    """T2: the change of the correlation up to step 10 at the same relative radii, against the later change."""
    censused = [run for run in runs if run.censuses]
    if not censused:
        return _not_measurable("T2", f"it needs censuses of several steps. {_published(ranges)}")
    usable, lacking = [], ""
    for run in censused:
        steps = sorted(run.points)
        early = [step for step in steps if 1 <= step <= EARLY]
        missing = [
            words for absent, words in ((0 not in steps, "step 0"), (not early, f"a step from 1 to {EARLY}")) if absent
        ]
        if missing:
            lacking = f"it needs a census of {' and of '.join(missing)}"
            continue
        groups = [[0], [early[-1]], [step for step in steps if step > EARLY]]
        usable.append((run, groups))
    if not usable:
        return _not_measurable("T2", lacking, censused)
    few = _too_few([p for run, groups in usable for group in groups for p in (run.points[s] for s in group)])
    if few:
        return _not_measurable("T2", few, censused)
    # A run without later snapshots would change which runs are compared, so later snapshots count only where all runs
    # have them.
    later = all(groups[2] for _, groups in usable)
    series: list[list[Correlation]] = [[], [], []]
    radii: list[float] = []
    for run, groups in usable:
        kept = groups if later else groups[:2]
        points = [run.points[step] for group in kept for step in group]
        targets = common_radii(points)
        if not len(targets):
            return _not_measurable(
                "T2", f"{run.name}: its censuses have no relative radius in common (‖move‖ / ‖θ‖)", censused
            )
        radii += list(targets)
        for into, group in zip(series, kept, strict=False):
            own = [run.points[step] for step in group]
            into.append(_pooled(own, settings.level, [_at(p, targets) for p in own]))
    start, early_, *rest = (mean_over_runs(parts, settings.level) for parts in series if parts)
    change, interval = combination([early_, start], [1.0, -1.0])
    verdicts, margins = [decide(interval)], [(_difference(early_.influence, start.influence), abs(change + NEGLIGIBLE))]
    last_early = max(groups[1][0] for _, groups in usable)
    sentence = (
        f"At the same relative radii ({_span(radii)} of ‖θ‖) the correlation of KL and reward over directions is "
        f"{number(start.value, start.interval, settings)} at step 0 and "
        f"{number(early_.value, early_.interval, settings)} at step {last_early}: a change of "
        f"{number(change, interval, settings)}."
    )
    if rest:
        lead, lead_interval = combination([early_, start, rest[0]], [2.0, -1.0, -1.0])
        verdicts.append(decide(lead_interval, 0.0))
        if early_.influence is not None and start.influence is not None and rest[0].influence is not None:
            whole = early_.influence * 2.0 - start.influence - rest[0].influence
            margins.append((whole, abs(lead)))
        else:
            margins.append((None, np.nan))
        sentence += (
            f" After step {EARLY} it is {number(rest[0].value, rest[0].interval, settings)}; the early change minus "
            f"the later one is {number(lead, lead_interval, settings)}."
        )
    else:
        sentence += f" Nothing was measured after step {EARLY}, so the early change has no later one beside it."
    verdict = together(verdicts)
    wanted = (None, None)
    if verdict == UNDECIDED:
        open_ones = [
            needed(i, m, settings.level) for (i, m), v in zip(margins, verdicts, strict=True) if v == UNDECIDED
        ]
        wanted = _largest(open_ones)
    used = [p for run, groups in usable for group in groups for p in (run.points[s] for s in group)]
    return _claim(
        "T2",
        verdict,
        f"{sentence} {_published(ranges)}".strip(),
        change,
        interval,
        [run for run, _ in usable],
        used,
        wanted,
        "other directions at these radii, or a census of steps 1 to 10 at smaller ones",
    )


def claim_t3(
    runs: Sequence[RunEvidence],
    settings: Bootstrap,
    threshold: float | None = None,
    analyses: Sequence[EvidenceAnalysis] = (),
) -> Claim:
    """T3: how much of the gain in pass@1 came without a gain in pass@k, at the largest measured k of 16 or more."""
    frontier = _frontier(analyses)
    measured = [run for run in runs if len(run.boundaries) > 1]
    if not measured:
        why = f"it needs boundaries of two snapshots, with {CONTRAST_K} rollouts per task or more"
        return _not_measurable("T3", f"{why}.{frontier}" if frontier else why)
    rollouts = min(_rollouts(data) for run in measured for data in run.boundaries.values())
    if rollouts < CONTRAST_K:
        return _not_measurable(
            "T3", f"pass@k is needed at k = {CONTRAST_K} or more and {rollouts} rollouts per task were made", measured
        )
    k = 1 << (rollouts.bit_length() - 1)
    pairs = [(run, min(run.boundaries), max(run.boundaries)) for run in measured]
    changes = [contrast(run.boundaries[a], run.boundaries[b], k, threshold=threshold) for run, a, b in pairs]
    prompts = min(len(own) for change in changes for own in change.prompts.values())
    if prompts < MIN_PROMPTS:
        return _not_measurable("T3", f"only {prompts} tasks have {k} valid rollouts", measured)
    gain, cover, edge = (
        _over([change.linear(np.array(weights)) for change in changes], settings.level)
        for weights in ((1.0, 0.0), (0.0, 1.0), (-(EVEN - NEGLIGIBLE), 1.0))
    )
    rises = decide((-gain.interval[1], -gain.interval[0]), 0.0)
    verdict = decide(edge.interval, 0.0)
    if rises == NOT_SUPPORTED:
        return _not_measurable(
            "T3",
            f"pass@1 fell by {number(-gain.value, (-gain.interval[1], -gain.interval[0]), settings, digits=3)}, so "
            "there is no gain to take apart",
            measured,
        )
    verdict = NOT_SUPPORTED if verdict == NOT_SUPPORTED else together([rises, verdict])
    share = 1 - cover.value / gain.value if rises == SUPPORTED and gain.value > 0 else np.nan
    steps = " and ".join(sorted({f"step {a} to step {b}" for _, a, b in pairs}))
    sentence = (
        f"From {steps} pass@1 changed by {number(gain.value, gain.interval, settings, digits=3)} and pass@{k} by "
        f"{number(cover.value, cover.interval, settings, digits=3)}"
        + (f": {share:.0%} of the gain came without one in pass@{k}." if np.isfinite(share) else ".")
        + f" Δpass@{k} − {EVEN - NEGLIGIBLE:g} Δpass@1 is {number(edge.value, edge.interval, settings, digits=3)}."
        + frontier
    )
    wanted = None
    if verdict == UNDECIDED:
        open_ones = [
            needed(one.influence, abs(one.value), settings.level)[1]
            for one, state in ((gain, rises), (edge, decide(edge.interval, 0.0)))
            if state == UNDECIDED
        ]
        wanted = None if None in open_ones else max((n for n in open_ones if n is not None), default=None)
    return Claim(
        "T3",
        TITLES["T3"],
        verdict,
        sentence,
        RULES["T3"],
        edge.value,
        edge.interval,
        prompts,
        wanted,
        runs=len(measured),
        overturn=f"a gain in pass@k at a k beyond {k}, or on other tasks",
    )


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


def _at(points: CensusPoints, targets: np.ndarray) -> np.ndarray:
    weights = np.zeros(len(points.radius))
    for target in targets:
        found = at_relative(points, float(target))
        if found is not None:
            weights += found
    return weights


def _pooled(
    points: Sequence[CensusPoints], confidence: float, weights: Sequence[np.ndarray] | None = None
) -> Correlation:
    chosen = [within_reach(p) for p in points] if weights is None else weights
    return pooled_correlation([pair_moments(p, "kl_reward") for p in points], chosen, confidence)


def _reached(run: RunEvidence) -> list[CensusPoints]:
    return [p for p in run.points.values() if p.step >= 1 and within_reach(p).any()]


def _against_start(
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
            trained.append(_pooled(kept, confidence, weights))
            start.append(_pooled([zero], confidence, [at_zero]))
    if not start:
        return None, None
    return mean_over_runs(trained, confidence), mean_over_runs(start, confidence)


def _of_controls(controls: Sequence[RunEvidence], confidence: float) -> Estimate | None:
    found = [(run, _reached(run)) for run in controls if run.censuses]
    parts = [_pooled(points, confidence) for _, points in found if points]
    return mean_over_runs(parts, confidence) if parts else None


def _difference(one: TwoWay | None, other: TwoWay | None) -> TwoWay | None:
    return None if one is None or other is None else one - other


def _over(parts: Sequence[TwoWay], confidence: float) -> Estimate:
    value, variance, freedom = over_runs(parts)
    half = float(stdtrit(freedom, (1 + confidence) / 2) * np.sqrt(variance))
    whole = sum(parts[1:], parts[0]) * (1 / len(parts))
    return Estimate(value, (value - half, value + half), whole, len(parts))


def _rollouts(data: xr.Dataset) -> int:
    dims = [dim for dim in data["base_reward"].dims if dim != "prompt"]
    return int(data["base_reward"].notnull().sum(dims).max())


def _too_few(points: Sequence[CensusPoints]) -> str:
    for p in points:
        if p.directions < MIN_DIRECTIONS or p.prompts < MIN_PROMPTS:
            return (
                f"the census of step {p.step} has {p.directions} directions and {p.prompts} prompts, and "
                f"{MIN_DIRECTIONS} and {MIN_PROMPTS} are the least"
            )
    return ""


def _largest(found: Sequence[tuple[int | None, int | None]]) -> tuple[int | None, int | None]:
    """What would decide everything that is undecided; unknown where one part is unknown."""
    if not found or any(prompts is None for _, prompts in found):
        return None, None
    return (
        max((directions for directions, _ in found if directions is not None), default=None),
        max(prompts for _, prompts in found if prompts is not None),
    )


def _nearest(points: Sequence[CensusPoints]) -> float:
    lengths = [float(p.displacement.min()) for p in points if np.isfinite(p.displacement).all()]
    return min(lengths, default=np.nan)


def _claim(
    name: str,
    verdict: str,
    sentence: str,
    estimate: float,
    interval: tuple[float, float],
    runs: Sequence[RunEvidence],
    points: Sequence[CensusPoints],
    wanted: tuple[int | None, int | None],
    overturn: str,
) -> Claim:
    return Claim(
        name,
        TITLES[name],
        verdict,
        sentence,
        RULES[name],
        estimate,
        interval,
        min(p.prompts for p in points),
        wanted[1],
        runs=len(runs),
        directions=_directions(points),
        directions_needed=wanted[0],
        nearest=_nearest(points),
        overturn=overturn,
    )


def _directions(points: Sequence[CensusPoints]) -> int:
    """Different directions in all censuses together; paired censuses hold the same ones."""
    return sum({p.directions_key: p.directions for p in points}.values())


def _frontier(analyses: Sequence[EvidenceAnalysis]) -> str:
    """Whether training's own way leaves the cloud of random neighbours, in words."""
    parts = []
    for analysis in analyses:
        for step in sorted(analysis.path, reverse=True):
            data = analysis.path[step]
            i = displacement_position(data["position"].values)
            for name in data["path"].values:
                at = data.sel(path=name)
                if i is None or not np.isfinite(at["advantage"][i]):
                    continue
                here = at.isel(position=i)
                low, high = (float(v) for v in here["advantage_interval"].values)
                ratio = float(here["fisher_ratio"])
                words = (
                    f" From the checkpoint of step {step} back along {name}, at {float(here['kl']):.2g} nat, the "
                    f"reward differs from random directions at the same KL by "
                    f"{number(float(here['advantage']), (low, high), digits=3)}"
                )
                if np.isfinite(ratio):
                    words += f", and KL per squared length is {ratio:.3g} times theirs"
                parts.append(words + ".")
                break
            if parts:
                break
        if parts:
            break
    return "".join(parts)


def _published(ranges: Mapping[tuple[int, int], xr.Dataset] | None) -> str:
    """The plain correlation over a slice at several ranges, with the note that it decides nothing."""
    if not ranges:
        return ""
    key = max(ranges)
    data = ranges[key]
    known = [
        f"{signed(float(data['plain'][i]))} within ±{float(data['half_width'][i]):g}"
        for i in range(data.sizes["share"])
        if np.isfinite(data["plain"][i])
    ]
    if not known:
        return ""
    near = float(data["nearest"])
    where = f" The slice's nearest policy lies {near:.3g} displacements away." if np.isfinite(near) and near > 1 else ""
    return (
        f"The published number, the plain correlation over a 2-D slice, is {', '.join(known)} at step {key[0]}: it "
        f"depends on the range, and two directions are too few, so it decides nothing.{where}"
    )


def _not_measurable(name: str, why: str, runs: Sequence[RunEvidence] = ()) -> Claim:
    sentence = f"This cannot be answered: {why.rstrip('. ')}."
    return Claim(
        name,
        TITLES[name],
        NOT_MEASURABLE,
        sentence,
        RULES[name],
        np.nan,
        (np.nan, np.nan),
        0,
        runs=len(runs),
        overturn="",
    )


def _span(radii: Sequence[float]) -> str:
    low, high = min(radii), max(radii)
    return f"{low:.3g}" if np.isclose(low, high) else f"{low:.3g} to {high:.3g}"


def sampled(claim: Claim) -> str:
    """What a verdict rests on, in words: runs, directions, prompts, and the nearest policy."""
    if not claim.prompts:
        return ""
    words = ["one run" if claim.runs == 1 else f"{claim.runs} runs"]
    if claim.directions:
        words.append(f"{claim.directions} random directions, each in both senses")
    words.append(f"{claim.prompts} prompts")
    text = ", ".join(words)
    if np.isfinite(claim.nearest):
        text += f"; the nearest policy lies {claim.nearest:.3g} displacements away"
    return text


def check_runs(runs: Sequence[RunEvidence]) -> None:
    """Raise `AnalysisError` when two runs have one name: their directions would be treated as the same."""
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AnalysisError(f"two runs are called {twice[0]!r}; give each a name of its own")


def number(value: float, interval: tuple[float, ...], settings: Bootstrap | None = None, *, digits: int = 2) -> str:
    """`−0.81 [−0.87, −0.59]`, with the level when it is not 95 %."""
    level = f" ({settings.level:.0%})" if settings is not None and settings.level != 0.95 else ""
    low, high = (signed(bound, digits) for bound in interval)
    return f"{signed(value, digits)} [{low}, {high}]{level}"


def signed(value: float, digits: int = 2) -> str:
    """With a sign, which zero lacks after rounding."""
    if not np.isfinite(value):
        return "not defined"
    text = f"{value:+.{digits}f}"
    return text[1:] if not float(text) else text.replace("-", "−")
