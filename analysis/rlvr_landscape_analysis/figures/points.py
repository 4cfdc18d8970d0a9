"""The points of one map without their place: KL against reward, and means over shells of equal radius."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.figures.series import chosen_table, draw_series
from rlvr_landscape_analysis.figures.style import (
    COLUMN_INCHES,
    NOTE_SIZE,
    SERIES,
    new_figure,
    new_panels,
    number,
    say_missing,
    styled,
)
from rlvr_landscape_analysis.figures.values import LABELS, as_map, heading, label_of, plane, reward_label
from rlvr_landscape_analysis.results import statistic_name


@styled
def kl_reward_scatter(
    data: xr.Dataset,
    correlations: xr.Dataset | None = None,
    ax: Axes | None = None,
    *,
    errors: bool = True,
    value: str = "corrected",
) -> dict[str, Any]:
    """KL against mean reward, one point per policy of the slice, coloured by its distance from the origin.

    `data` is one map (dims alpha, beta; `kl`, `reward` with `<name>_se`, `radius`) or one landscape. `errors` draws
    thin bars of two standard errors. With a `correlations` table (results.py), `value`, one of its variables, stands in
    the title with its interval, without control and within shells of equal radius, by the names that tables use.
    Returns `points`, `bars` (None without), `origin`, `colorbar`, `text` (lines about r), `message`, `ax`. Raises
    `AnalysisError` when the table has no such step, slice or value.
    """
    map_ = as_map(data, ("reward", "kl"))
    if ax is None:
        _, ax = new_figure(aspect=0.82)
    lines = [] if correlations is None else _correlation_lines(map_, correlations, value)
    absent = [name for name in ("kl", "reward") if name not in map_]
    shape = (map_.sizes["beta"], map_.sizes["alpha"])
    kl, reward = (plane(map_, n) if n in map_ else np.full(shape, np.nan) for n in ("kl", "reward"))
    alpha, beta = np.meshgrid(map_["alpha"].values, map_["beta"].values)
    usable = np.isfinite(kl) & np.isfinite(reward)
    ax.set_xlabel(LABELS["kl"])
    ax.set_ylabel(label_of(map_, "reward"))
    out: dict[str, Any] = dict.fromkeys(("points", "bars", "origin", "colorbar", "message"))
    left_out = int((~usable).sum())
    if not usable.any():
        what = " and ".join(absent) or "KL together with reward"
        out["message"] = say_missing(ax, f"{what} was not measured at any point", axes="xy")["message"]
    else:
        if errors and {"kl_se", "reward_se"} <= set(map_.data_vars):
            bounds: dict[str, Any] = {
                axis: np.nan_to_num(2 * plane(map_, f"{name}_se")[usable])
                for axis, name in (("xerr", "kl"), ("yerr", "reward"))
            }
            out["bars"] = ax.errorbar(
                kl[usable], reward[usable], fmt="none", ecolor="0.72", elinewidth=0.4, zorder=1, **bounds
            )
        radii = np.hypot(alpha, beta)[usable]
        style: dict[str, Any] = {"s": 11, "cmap": "viridis", "edgecolors": "black", "linewidths": 0.25, "zorder": 2}
        out["points"] = ax.scatter(kl[usable], reward[usable], c=radii, **style)
        here = usable & (alpha == 0) & (beta == 0)
        if here.any():
            out["origin"] = ax.plot(kl[here], reward[here], "+", ms=9, mew=1.6, color="#D55E00", zorder=4)[0]
        figure = ax.get_figure()
        assert figure is not None
        bar = ax.inset_axes((1.03, 0.0, 0.045, 1.0))
        out["colorbar"] = figure.colorbar(out["points"], cax=bar, label=LABELS["radius"])
    notes = [
        "+: the checkpoint" if out["origin"] is not None else "",
        "bars: 2 SE" if out["bars"] is not None else "",
        f"{left_out} points not measured" if left_out and usable.any() else "",
    ]
    ax.set_title("\n".join(filter(None, [heading(map_), *lines, "; ".join(filter(None, notes))])), fontsize=NOTE_SIZE)
    return out | {"text": lines, "ax": ax}


def _correlation_lines(map_: xr.Dataset, correlations: xr.Dataset, value: str) -> list[str]:
    chosen = chosen_table(correlations, "kl_reward", value)
    for name in ("step", "slice_seed"):
        known = [int(one) for one in chosen[name].values]
        if name in map_.coords and len(known):
            here = int(map_[name])
        elif len(known) == 1:
            here = known[0]
        else:
            raise AnalysisError(f"the map has no coordinate {name!r} that says which of {known} of the table it is")
        if here not in known:
            raise AnalysisError(f"the table of correlations has no {name} {here}; it has {known}")
        chosen = chosen.sel({name: here})
    lines = []
    for control in ("none", "shell"):
        if control not in chosen["control"].values:
            continue
        words = statistic_name(value, control)
        r = float(chosen[value].sel(control=control))
        if not np.isfinite(r):
            lines.append(f"{words} r is not defined")
            continue
        bounds = ""
        if f"{value}_interval" in chosen:
            interval = chosen[f"{value}_interval"].sel(control=control)
            low, high = (float(interval.sel(bound=bound)) for bound in ("low", "high"))
            bounds = f" [{number(low)}, {number(high)}]" if np.isfinite([low, high]).all() else ", no interval"
        lines.append(f"{words} r = {number(r)}{bounds}")
    return lines


@styled
def radial_profile(profile: xr.Dataset) -> dict[str, Any]:
    """Mean reward and KL over the points of equal radius, with bands of two standard errors.

    `profile` has dim radius: `reward`, `kl`, each with `<name>_se` (`RunAnalysis.profiles`). Returns `reward` and `kl`
    with the artists `line`, `band`, `bars`, `gaps`, `ax`; `figure`, `axes`. Raises `AnalysisError` without radius.
    """
    if "radius" not in profile.dims:
        raise AnalysisError(f"a radial profile has the dimension radius, this has {dict(profile.sizes)}")
    profile = profile.sortby("radius")
    figure, axes = new_panels(2, 1, COLUMN_INCHES, 3.6, sharex=True)
    labels = {"reward": reward_label(profile.attrs), "kl": "KL (nat)"}
    radii = profile["radius"].values.astype(float)
    drawn: dict[str, Any] = {}
    for ax, name, style in zip(axes[:, 0], ("reward", "kl"), SERIES, strict=False):
        ax.set_ylabel(labels[name])
        margin = 0.04 * float(np.ptp(radii)) or 0.5
        ax.set_xlim(radii[0] - margin, radii[-1] + margin)
        mean = profile[name].values.astype(float) if name in profile else np.full(len(radii), np.nan)
        half = 2 * profile[f"{name}_se"].values if f"{name}_se" in profile else np.full(len(radii), np.nan)
        if not np.isfinite(mean).any():
            message = say_missing(ax, f"{LABELS[name]} was not measured at any radius", width=40, axes="y")["message"]
            drawn[name] = dict.fromkeys(("line", "band", "bars", "gaps")) | {"ax": ax, "message": message}
            continue
        drawn[name] = draw_series(ax, radii, mean, mean - half, mean + half, style) | {"ax": ax, "message": None}
    axes[1, 0].set_xlabel(LABELS["radius"])
    shown = any(panel["band"] is not None for panel in drawn.values())
    notes = [heading(profile), "bands: 2 SE, prompts as clusters" if shown else "no standard error: one prompt"]
    axes[0, 0].set_title("; ".join(filter(None, notes)), fontsize=NOTE_SIZE)
    return drawn | {"figure": figure, "axes": axes[:, 0]}
