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

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.designs import CensusPoints, successes
from rlvr_landscape_analysis.evidence import EvidenceAnalysis, RunEvidence
from rlvr_landscape_analysis.results import EARLY, NOT_MEASURABLE, NOT_SUPPORTED, SUPPORTED, UNDECIDED, Claim
from rlvr_landscape_analysis.schema import pass_threshold
from rlvr_landscape_analysis.statistics.boundary import CONTRAST_K, contrast, pass_at_k_values
from rlvr_landscape_analysis.statistics.census import (
    REACH,
    Correlation,
)
from rlvr_landscape_analysis.statistics.comparable import (
    against_start,
    at,
    common_radii,
    count_directions,
    nearest,
    of_controls,
    pooled,
    reached,
    too_few,
)
from rlvr_landscape_analysis.statistics.estimates import (
    Estimate,
    combination,
    difference,
    largest,
    mean_over_runs,
    needed,
    over,
)
from rlvr_landscape_analysis.statistics.resample import MIN_PROMPTS, Bootstrap
from rlvr_landscape_analysis.statistics.two_way import TwoWay
from rlvr_landscape_analysis.statistics.wording import correlation, frontier_words, number, published_words, span

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
        f"With X = 1 − Δpass@k / Δpass@1 at the largest k = 2^i of at least {CONTRAST_K} that was measured and at "
        f"which pass@k of the first step leaves room for a rise whose interval would lie above {EVEN - NEGLIGIBLE:g} "
        "Δpass@1 (where there is none, no training could refute the claim, and it is not measurable): supported when "
        "pass@1 rose (interval above 0) "
        f"and X lies above {EVEN + NEGLIGIBLE:g} (the interval of Δpass@k − {EVEN - NEGLIGIBLE:g} Δpass@1 below 0); "
        "not supported when that interval lies above 0."
    ),
}


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


def _in_a_part(runs: Sequence[RunEvidence]) -> str:
    """Why a claim about policies all around a checkpoint cannot be judged by these runs; empty if it can."""
    kinds = sorted({run.restricted for run in runs} - {""})
    return f"its census has directions of the kind {', '.join(kinds)} only, a part of the weight space" if kinds else ""


def claim_t1(
    runs: Sequence[RunEvidence],
    controls: Sequence[RunEvidence],
    settings: Bootstrap,
    ranges: Mapping[tuple[int, int], xr.Dataset] | None = None,
) -> Claim:
    """T1 over the trained snapshots (step ≥ 1) at radii that training reaches, against step 0 or random rewards."""
    censused = [run for run in runs if run.censuses and not run.restricted]
    if not censused and (reason := _in_a_part(runs)):
        return _not_measurable("T1", reason)
    if not censused:
        return _not_measurable("T1", f"it needs a census, which has many random directions. {published_words(ranges)}")
    if not any(step >= 1 for run in censused for step in run.points):
        return _not_measurable("T1", "only snapshot 0 was measured, nothing was trained yet", censused)
    chosen = {run.name: reached(run) for run in censused}
    used = [run for run in censused if chosen[run.name]]
    if not used:
        near = nearest([p for run in censused for p in run.points.values() if p.step >= 1])
        where = f"the nearest policy lies {near:.3g} displacements away" if np.isfinite(near) else "it has no run"
        return _not_measurable("T1", f"no census has a radius within {REACH:g} displacements: {where}", censused)
    few = too_few([p for run in used for p in chosen[run.name]])
    if few:
        return _not_measurable("T1", few, used)
    level = mean_over_runs([pooled(chosen[run.name], settings.level) for run in used], settings.level)
    verdicts = [decide(level.interval)]
    sentence = (
        f"At radii up to {REACH:g} displacements, the correlation of KL and reward over random directions is "
        f"{correlation(level.value, level.interval, settings)}."
    )
    if level.reason:
        sentence += f" ({level.reason[:1].upper()}{level.reason[1:]}.)"
    compared, margins = [], [(level.influence, abs(level.value + NEGLIGIBLE))]
    for what, other, base in (
        ("step 0 at the same radii", *against_start(used, chosen, settings.level)),
        ("runs on random rewards", level, of_controls(controls, settings.level)),
    ):
        if base is None or other is None:
            continue
        value, interval = combination([other, base], [1.0, -1.0])
        compared.append(decide(interval))
        influence = difference(other.influence, base.influence)
        margins.append((influence, abs(value + NEGLIGIBLE)))
        sentence += (
            f" Its difference from {what}, where it is {correlation(base.value, base.interval, settings)}, is "
            f"{correlation(value, interval, settings, terms=2)}."
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
        directions, prompts = largest(
            [
                needed(i, m, settings.level)
                for (i, m), v in zip(margins, [verdicts[0], *compared], strict=True)
                if v == UNDECIDED
            ]
        )
    return _claim(
        "T1",
        verdict,
        f"{sentence} {published_words(ranges)}".strip(),
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
    censused = [run for run in runs if run.censuses and not run.restricted]
    if not censused and (reason := _in_a_part(runs)):
        return _not_measurable("T2", reason)
    if not censused:
        return _not_measurable("T2", f"it needs censuses of several steps. {published_words(ranges)}")
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
    few = too_few([p for run, groups in usable for group in groups for p in (run.points[s] for s in group)])
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
            into.append(pooled(own, settings.level, [at(p, targets) for p in own]))
    start, early_, *rest = (mean_over_runs(parts, settings.level) for parts in series if parts)
    change, interval = combination([early_, start], [1.0, -1.0])
    verdicts, margins = [decide(interval)], [(difference(early_.influence, start.influence), abs(change + NEGLIGIBLE))]
    last_early = max(groups[1][0] for _, groups in usable)
    sentence = (
        f"At the same relative radii ({span(radii)} of ‖θ‖) the correlation of KL and reward over directions is "
        f"{correlation(start.value, start.interval, settings)} at step 0 and "
        f"{correlation(early_.value, early_.interval, settings)} at step {last_early}; the change is "
        f"{correlation(change, interval, settings, terms=2)}."
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
            f" After step {EARLY} it is {correlation(rest[0].value, rest[0].interval, settings)}; the early change "
            f"minus the later one is {correlation(lead, lead_interval, settings, terms=4)}."
        )
    else:
        sentence += f" Nothing was measured after step {EARLY}, so the early change has no later one beside it."
    verdict = together(verdicts)
    wanted = (None, None)
    if verdict == UNDECIDED:
        open_ones = [
            needed(i, m, settings.level) for (i, m), v in zip(margins, verdicts, strict=True) if v == UNDECIDED
        ]
        wanted = largest(open_ones)
    used = [p for run, groups in usable for group in groups for p in (run.points[s] for s in group)]
    return _claim(
        "T2",
        verdict,
        f"{sentence} {published_words(ranges)}".strip(),
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
    frontier = frontier_words(analyses)
    measured = [run for run in runs if len(run.boundaries) > 1]
    if not measured:
        why = f"it needs boundaries of two snapshots, with {CONTRAST_K} rollouts per task or more"
        return _not_measurable("T3", f"{why}.{frontier}" if frontier else why)
    rollouts = min(_rollouts(data) for run in measured for data in run.boundaries.values())
    if rollouts < CONTRAST_K:
        return _not_measurable(
            "T3", f"pass@k is needed at k = {CONTRAST_K} or more and {rollouts} rollouts per task were made", measured
        )
    pairs = [(run, min(run.boundaries), max(run.boundaries)) for run in measured]
    k = _open_k(pairs, 1 << (rollouts.bit_length() - 1), threshold, settings.level)
    changes = _changes(pairs, k, threshold)
    prompts = min(len(own) for change in changes for own in change.prompts.values())
    if prompts < MIN_PROMPTS:
        return _not_measurable("T3", f"only {prompts} tasks have {k} valid rollouts", measured)
    gain, cover, edge = _effects(changes, settings.level)
    rises = decide((-gain.interval[1], -gain.interval[0]), 0.0)
    verdict = decide(edge.interval, 0.0)
    if rises == NOT_SUPPORTED:
        return _not_measurable(
            "T3",
            f"pass@1 fell by {number(-gain.value, (-gain.interval[1], -gain.interval[0]), settings, digits=3)}, so "
            "there is no gain to take apart",
            measured,
        )
    room = _room(pairs, k, threshold)
    if rises == SUPPORTED and room <= _least_rise(gain, edge):
        return _not_measurable(
            "T3",
            f"pass@{k} is {1 - room:.3f} at the first step already and can rise by {room:.3f} at most, and only a rise "
            f"beyond {_least_rise(gain, edge):.3f} could be told from {EVEN - NEGLIGIBLE:g} times the gain in pass@1, "
            f"{number(gain.value, gain.interval, settings, digits=3)}: no training could show exploration here; take "
            f"harder tasks or a higher pass threshold.{frontier}",
            measured,
        )
    verdict = NOT_SUPPORTED if verdict == NOT_SUPPORTED else together([rises, verdict])
    share = 1 - cover.value / gain.value if rises == SUPPORTED and gain.value > 0 else np.nan
    steps = " and ".join(sorted({f"step {a} to step {b}" for _, a, b in pairs}))
    sentence = (
        f"From {steps} pass@1 changed by {number(gain.value, gain.interval, settings, digits=3)} and pass@{k} by "
        f"{number(cover.value, cover.interval, settings, digits=3)}"
        + (f": {share:.0%} of the gain came without one in pass@{k}." if share >= 0 else ".")
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


_Pair = tuple[RunEvidence, int, int]
"""A run, its first and its last step with a boundary."""


def _room(pairs: Sequence[_Pair], k: int, threshold: float | None) -> float:
    """By how much pass@k can rise from the first step: mean over runs."""
    first = [run.boundaries[step] for run, step, _ in pairs]
    counts = [successes(data, pass_threshold(data.attrs, threshold)) for data in first]
    return 1 - float(np.mean([np.nanmean(pass_at_k_values(solved, valid, k)) for solved, valid in counts]))


def _changes(pairs: Sequence[_Pair], k: int, threshold: float | None) -> list[TwoWay]:
    """Δpass@1 and Δpass@k of each run."""
    return [contrast(run.boundaries[a], run.boundaries[b], k, threshold=threshold) for run, a, b in pairs]


def _effects(changes: Sequence[TwoWay], level: float) -> tuple[Estimate, Estimate, Estimate]:
    """Δpass@1, Δpass@k, and Δpass@k − 0.4 Δpass@1, which decides: means over runs."""
    gain, cover, edge = (
        over([change.linear(np.array(weights)) for change in changes], level)
        for weights in ((1.0, 0.0), (0.0, 1.0), (-(EVEN - NEGLIGIBLE), 1.0))
    )
    return gain, cover, edge


def _least_rise(gain: Estimate, edge: Estimate) -> float:
    """How far pass@k must rise until the interval of Δpass@k − 0.4 Δpass@1, as wide as it is, lies above 0."""
    return (EVEN - NEGLIGIBLE) * gain.value + (edge.interval[1] - edge.interval[0]) / 2


def _open_k(pairs: Sequence[_Pair], largest: int, threshold: float | None, level: float) -> int:
    """The largest k = 2^i up to `largest` at which exploration could show; `CONTRAST_K` where there is none."""
    k = largest
    while k > CONTRAST_K:
        gain, _, edge = _effects(_changes(pairs, k, threshold), level)
        if _room(pairs, k, threshold) > _least_rise(gain, edge):
            break
        k //= 2
    return k


def _rollouts(data: xr.Dataset) -> int:
    dims = [dim for dim in data["base_reward"].dims if dim != "prompt"]
    return int(data["base_reward"].notnull().sum(dims).max())


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
        directions=count_directions(points),
        directions_needed=wanted[0],
        nearest=nearest(points),
        overturn=overturn,
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
