"""The claims' words: what was sampled, the published number with its range, the frontier, numbers with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.evidence import EvidenceAnalysis
from rlvr_landscape_analysis.results import Claim
from rlvr_landscape_analysis.statistics.path import compared_position
from rlvr_landscape_analysis.statistics.resample import Bootstrap


def frontier_words(analyses: Sequence[EvidenceAnalysis]) -> str:
    """Whether training's own way leaves the cloud of random neighbours, in words."""
    parts = []
    for analysis in analyses:
        for step in sorted(analysis.path, reverse=True):
            data = analysis.path[step]
            for name in data["path"].values:
                i = compared_position(data.sel(path=name))
                if i is None:
                    continue
                here = data.sel(path=name).isel(position=i)
                low, high = (float(v) for v in here["advantage_interval"].values)
                ratio = float(here["fisher_ratio"])
                words = (
                    f" From the checkpoint of step {step} back along {name} (position "
                    f"{signed(float(here['position']))}, {float(here['kl']):.2g} nat), the reward differs from random "
                    f"directions at the same KL by "
                    f"{number(float(here['advantage']), (low, high), digits=3)}"
                )
                if np.isfinite(ratio):
                    words += f", and KL per squared length is {three_digits(ratio)} times theirs"
                parts.append(words + ".")
                break
            if parts:
                break
        if parts:
            break
    return "".join(parts)


def published_words(ranges: Mapping[tuple[int, int], xr.Dataset] | None) -> str:
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


def span(radii: Sequence[float]) -> str:
    """`0.01 to 0.03`, or one number."""
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


def number(value: float, interval: tuple[float, ...], settings: Bootstrap | None = None, *, digits: int = 2) -> str:
    """`−0.81 [−0.87, −0.59]`, with the level when it is not 95 %; `unknown` for a number that is not defined."""
    if not np.isfinite(value):
        return "unknown"
    level = f" ({settings.level:.0%})" if settings is not None and settings.level != 0.95 else ""
    low, high = (signed(bound, digits) for bound in interval)
    return f"{signed(value, digits)} [{low}, {high}]{level}"


def correlation(
    value: float, interval: tuple[float, float], settings: Bootstrap | None = None, *, terms: float = 1
) -> str:
    """`number` of a correlation, or of a sum of so many; `unknown` where the interval holds every possible value."""
    if interval[0] <= -terms and interval[1] >= terms:
        return "unknown"
    return number(value, interval, settings)


def says_something(data: xr.Dataset, name: str, span: float) -> xr.DataArray:
    """Where a value of a census's statistics is known, bool: an interval of nearly all of its `span` says nothing."""
    interval = data[f"{name}_interval"]
    return data[name].notnull() & (interval.sel(bound="high") - interval.sel(bound="low") < 0.95 * span)


def three_digits(value: float) -> str:
    """Three digits, and none after the point from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def signed(value: float, digits: int = 2) -> str:
    """With a sign, which zero lacks after rounding."""
    if not np.isfinite(value):
        return "not defined"
    text = f"{value:+.{digits}f}"
    return text[1:] if not float(text) else text.replace("-", "−")
