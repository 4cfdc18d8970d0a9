"""The claims T1–T3 (SPEC §1) as sentences with numbers and a verdict.

Every verdict compares an interval with bounds stated beforehand. What counts is the part of the KL–reward correlation
that is *not* the radius: the contribution of differences within shells of equal radius, corrected for sampling noise.
The plain correlation is negative for any landscape that falls off with distance (docs/statistics.md), so it is quoted
and never decides.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.results import (
    CONTROL_NAMES,
    EARLY,
    NOT_MEASURABLE,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    Claim,
)
from rlvr_landscape_analysis.statistics.resample import Bootstrap, centred_interval
from rlvr_landscape_analysis.statistics.training import snapshot_z

NEGLIGIBLE = 0.1
"""A correlation nearer to zero than this does not count as an effect; stated here, before any data."""
TITLES = {
    "T1": "High-reward policies concentrate near the checkpoint in KL",
    "T2": "The concentration appears early, within the first ten updates",
    "T3": "Training acts as local exploitation rather than broad exploration",
}


def all_claims(
    tables: xr.Dataset, exploitation: Mapping | None, improvement: xr.Dataset | None, settings: Bootstrap
) -> list[Claim]:
    """T1, T2 and T3 of a run.

    `tables`: `correlations(…, replicates=True)` over (step, slice_seed). `exploitation`: `exploitation_index` between
    the first and the last snapshot with `first_step` and `last_step` added, or None with a single snapshot.
    `improvement`: over (step, slice_seed), for the words about the neighbourhood.
    """
    return [claim_t1(tables, settings), claim_t2(tables, settings), claim_t3(exploitation, improvement)]


def decide(
    estimate: float, interval: tuple[float, float], prompts: int, *, supports_below: float, refutes_above: float
) -> tuple[str, int | None]:
    """Verdict of an interval, and the number of prompts that would decide it if the estimate stayed.

    Supported when the whole interval lies below `supports_below`; not supported when it lies above `refutes_above`
    (≤ `supports_below`) and not below; else undecided. Half-widths shrink with the root of the number of prompts.
    """
    low, high = interval
    if not np.isfinite([estimate, low, high]).all():
        return UNDECIDED, None
    if high < supports_below:
        return SUPPORTED, None
    if low > refutes_above:
        return NOT_SUPPORTED, None
    needed = []
    if estimate < supports_below:
        needed.append((high - estimate) / (supports_below - estimate))
    if estimate > refutes_above:
        needed.append((estimate - low) / (estimate - refutes_above))
    factor = min(needed) if needed else np.inf
    return UNDECIDED, int(np.ceil(prompts * factor**2)) if np.isfinite(factor) and factor < 1e4 else None


def claim_t1(tables: xr.Dataset, settings: Bootstrap) -> Claim:
    """T1 over the trained snapshots (step ≥ 1): mean contribution beyond the radius."""
    rule = (
        "Supported when the whole interval of what differences within shells of equal radius contribute to the "
        "KL–reward correlation, mean over the trained snapshots, lies below 0; not supported when it lies above "
        f"−{NEGLIGIBLE:g}."
    )
    trained = tables.isel(step=tables["step"].values >= 1)
    prompts = int(tables["prompts"].max()) if tables["prompts"].size else 0
    if not trained.sizes["step"]:
        return _not_measurable("T1", rule, prompts, "only snapshot 0 was measured, nothing was trained yet")
    control = _control(trained)
    if control is None:
        return _undefined("T1", rule, prompts, _first_reason(trained, "shell"))
    steps, z, draws = snapshot_z(trained, "kl_reward", control)
    value = z.mean()
    bounds = centred_interval(value, draws.mean(0), settings, prompts)
    verdict, needed = decide(value, bounds, prompts, supports_below=0.0, refutes_above=float(-np.arctanh(NEGLIGIBLE)))
    estimate, interval = float(np.tanh(value)), (float(np.tanh(bounds[0])), float(np.tanh(bounds[1])))
    each = tables.sel(pair="kl_reward", control=control)["contribution_interval"].sel(step=steps, bound="high")
    negative = int((each.mean("slice_seed") < 0).sum())
    sentence = (
        f"Over {len(steps)} trained snapshot{'s' * (len(steps) != 1)}, KL differences beyond the radius "
        f"({CONTROL_NAMES[control]}) contribute {number(estimate, interval, settings)} to the KL–reward correlation; "
        f"at {negative} of them the interval lies below 0. {_plain_words(trained)}"
    )
    return Claim("T1", TITLES["T1"], verdict, sentence, rule, estimate, interval, prompts, needed)


def _plain_words(tables: xr.Dataset) -> str:
    """The plain correlation next to what the radius alone gives."""
    words = []
    for control, name in (("none", "The plain correlation"), ("radial", "the radial null")):
        if control not in tables["control"].values:
            continue
        value = float(
            np.tanh(
                np.arctanh(tables["corrected"].sel(pair="kl_reward", control=control).clip(-0.999999, 0.999999)).mean()
            )
        )
        if np.isfinite(value):
            words.append(f"{name} is {_signed(value)}")
    if len(words) < 2:
        return "The plain correlation is not defined here." if not words else f"{words[0]}."
    share = tables["radial_share"].sel(quantity="reward")
    known = (
        f"; {float(share.mean()):.0%} of the reward's variation goes with the radius" if share.notnull().any() else ""
    )
    return f"{words[0]}, {words[1]} (what distance from the origin alone would give){known}."


def claim_t2(tables: xr.Dataset, settings: Bootstrap) -> Claim:
    """T2: the fall of the controlled correlation up to step 10 against its fall afterwards (in Fisher's z)."""
    rule = (
        f"Supported when the correlation within shells falls from snapshot 0 to the last snapshot up to step {EARLY} "
        "(interval of the change below 0) and that fall exceeds the later one (interval of their difference above 0); "
        f"not supported when the early change lies above −{NEGLIGIBLE:g} or the later fall is the larger one."
    )
    prompts = int(tables["prompts"].max()) if tables["prompts"].size else 0
    measured = tables["step"].values
    early_steps = measured[(measured >= 1) & (measured <= EARLY)]
    late_steps = measured[measured > EARLY]
    lacking = [
        words
        for missing, words in (
            (0 not in measured, "snapshot 0"),
            (not len(early_steps), f"a snapshot from step 1 to {EARLY}"),
            (not len(late_steps), f"a snapshot after step {EARLY}"),
        )
        if missing
    ]
    if lacking:
        return _not_measurable("T2", rule, prompts, f"it needs {' and '.join(lacking)}")
    control = _control(tables)
    if control is None:
        return _undefined("T2", rule, prompts, _first_reason(tables, "shell"))
    steps, z, draws = snapshot_z(tables, "kl_reward", control)
    groups = [steps == 0, steps == early_steps.max(), steps > EARLY]
    if not all(group.any() for group in groups):
        return _undefined(
            "T2", rule, prompts, "reward or KL does not vary beyond sampling noise at one of these snapshots"
        )
    (z0, d0), (ze, de), (zl, dl) = ((z[group].mean(), draws[group].mean(0)) for group in groups)
    early, later = ze - z0, zl - ze
    early_bounds = centred_interval(early, de - d0, settings, prompts)
    lead = later - early
    lead_bounds = centred_interval(lead, (dl - de) - (de - d0), settings, prompts)
    threshold = float(-np.arctanh(NEGLIGIBLE))
    first, first_needed = decide(early, early_bounds, prompts, supports_below=0.0, refutes_above=threshold)
    # The lead of the early fall: positive supports, so its sign is turned for `decide`.
    second, second_needed = decide(
        -lead, (-lead_bounds[1], -lead_bounds[0]), prompts, supports_below=0.0, refutes_above=0.0
    )
    if NOT_SUPPORTED in (first, second):
        verdict, needed = NOT_SUPPORTED, None
    elif first == second == SUPPORTED:
        verdict, needed = SUPPORTED, None
    else:
        verdict = UNDECIDED
        open_ones = [n for v, n in ((first, first_needed), (second, second_needed)) if v == UNDECIDED]
        needed = None if None in open_ones else max(n for n in open_ones if n is not None)
    sentence = (
        f"Beyond the radius ({CONTROL_NAMES[control]}), the contribution to the KL–reward correlation is "
        f"{_signed(np.tanh(z0))} at step 0, {_signed(np.tanh(ze))} at step {int(early_steps.max())} and "
        f"{_signed(np.tanh(zl))} on average after step {EARLY}: an early change of "
        f"{number(early, early_bounds, settings)} and a later one of {_signed(later)} in Fisher's z. "
        f"{_plain_series(tables, int(early_steps.max()))}"
    )
    return Claim("T2", TITLES["T2"], verdict, sentence, rule, float(early), early_bounds, prompts, needed)


def _plain_series(tables: xr.Dataset, early: int) -> str:
    steps, z, _ = snapshot_z(tables, "kl_reward", "none")
    known = dict(zip(steps.tolist(), np.tanh(z), strict=True))
    parts = [f"{_signed(known[step])} at step {step}" for step in (0, early) if step in known]
    return f"The plain correlation is {' and '.join(parts)}." if parts else ""


def claim_t3(exploitation: Mapping | None, improvement: xr.Dataset | None) -> Claim:
    """T3: did pass@k grow with pass@1? See `training.exploitation_index`."""
    rule = (
        "With D = Δpass@k − ½ Δpass@1 between the first and the last snapshot: supported when pass@1 rose (interval "
        "above 0) and the interval of D lies below 0; not supported when the interval of D lies above 0; a run whose "
        "pass@1 did not rise beyond its uncertainty decides nothing."
    )
    if exploitation is None:
        return _not_measurable("T3", rule, 0, "it needs two snapshots")
    prompts = int(exploitation["prompts"])
    if "contrast" not in exploitation or exploitation.get("k", 2) < 2:
        why = exploitation["reason"] or "one rollout per prompt: pass@k is pass@1"
        return _not_measurable("T3", rule, prompts, why)
    contrast, bounds = float(exploitation["contrast"]), tuple(exploitation["contrast_interval"])
    gain, gain_bounds = float(exploitation["gain"]), tuple(exploitation["gain_interval"])
    first, first_needed = decide(-gain, (-gain_bounds[1], -gain_bounds[0]), prompts, supports_below=0, refutes_above=0)
    second, second_needed = decide(contrast, bounds, prompts, supports_below=0.0, refutes_above=0.0)
    if second == NOT_SUPPORTED:
        verdict, needed = NOT_SUPPORTED, None
    elif first == second == SUPPORTED:
        verdict, needed = SUPPORTED, None
    else:
        verdict = UNDECIDED
        open_ones = [n for v, n in ((first, first_needed), (second, second_needed)) if v == UNDECIDED]
        needed = None if None in open_ones or not open_ones else max(n for n in open_ones if n is not None)
    k = int(exploitation.get("k", 0))
    index = float(exploitation["index"])
    index_bounds = exploitation["index_interval"]
    ratio = (
        f"The exploitation index is {number(index, tuple(index_bounds))}."
        if np.isfinite([index, *index_bounds]).all()
        else f"The exploitation index is not defined: {exploitation['reason'] or 'its interval is unbounded'}."
    )
    sentence = (
        f"From step {exploitation['first_step']} to step {exploitation['last_step']} pass@1 changed by "
        f"{number(gain, gain_bounds, digits=3)} and pass@{k} by "
        f"{number(float(exploitation['coverage']), tuple(exploitation['coverage_interval']), digits=3)}. {ratio}"
        f"{_neighbourhood(improvement)}"
    )
    return Claim("T3", TITLES["T3"], verdict, sentence, rule, contrast, (bounds[0], bounds[1]), prompts, needed)


def _neighbourhood(improvement: xr.Dataset | None) -> str:
    if improvement is None or not improvement["gain"].notnull().any():
        return ""
    parts = []
    for position, word in ((0, "first"), (-1, "last")):
        here = improvement[["gain", "gain_interval"]].isel(step=position).mean("slice_seed")
        low, high = (float(here["gain_interval"].sel(bound=bound)) for bound in ("low", "high"))
        if np.isfinite([float(here["gain"]), low, high]).all():
            parts.append(f"{number(float(here['gain']), (low, high), digits=3)} at the {word} snapshot")
    return f" The best neighbour in the slice gains {' and '.join(parts)}." if parts else ""


def _control(tables: xr.Dataset) -> str | None:
    """Shells where they are defined, else the smooth control."""
    for control in ("shell", "smooth"):
        if control in tables["control"].values and len(snapshot_z(tables, "kl_reward", control)[0]):
            return control
    return None


def _first_reason(tables: xr.Dataset, control: str) -> str:
    reasons = tables["reason"].sel(pair="kl_reward", control=control).values.ravel()
    return next((str(reason) for reason in reasons if reason), "no snapshot defines it")


def _not_measurable(name: str, rule: str, prompts: int, why: str) -> Claim:
    sentence = f"This run cannot answer it: {why}."
    return Claim(name, TITLES[name], NOT_MEASURABLE, sentence, rule, np.nan, (np.nan, np.nan), prompts)


def _undefined(name: str, rule: str, prompts: int, why: str) -> Claim:
    sentence = f"Nothing can be said yet: {why}."
    return Claim(name, TITLES[name], UNDECIDED, sentence, rule, np.nan, (np.nan, np.nan), prompts)


def number(value: float, interval: tuple[float, ...], settings: Bootstrap | None = None, *, digits: int = 2) -> str:
    """`−0.81 [−0.87, −0.59]`, with the level when it is not 95 %."""
    level = f" ({settings.level:.0%})" if settings is not None and settings.level != 0.95 else ""
    low, high = (_signed(bound, digits) for bound in interval)
    return f"{_signed(value, digits)} [{low}, {high}]{level}"


def _signed(value: float, digits: int = 2) -> str:
    """With a sign, which zero lacks after rounding."""
    if not np.isfinite(value):
        return "not defined"
    text = f"{value:+.{digits}f}"
    return text[1:] if not float(text) else text.replace("-", "−")
