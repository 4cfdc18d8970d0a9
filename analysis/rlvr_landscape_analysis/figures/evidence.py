"""Figures of censuses, paths and boundaries: what the claims rest on.

They draw what `statistics/census.py`, `path.py` and `boundary.py` found. Every value has its interval; axes are scaled
to the data; a quantity that no dataset defines is said to be missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.figures.style import (
    LEGEND_ABOVE,
    NOTE_SIZE,
    PAGE_INCHES,
    SERIES,
    new_figure,
    new_panels,
    number,
    say_missing,
    step_axis,
    styled,
)
from rlvr_landscape_analysis.results import PAIR_NAMES
from rlvr_landscape_analysis.statistics.claims import NEGLIGIBLE
from rlvr_landscape_analysis.statistics.path import compared_position
from rlvr_landscape_analysis.statistics.wording import says_something

CLOUD, CLOUD_MEAN = "0.72", "0.35"
"""Greys of random directions: the policies, and their mean."""
AXES = {
    "displacement": "distance in displacements ‖θₜ − θ₀‖ of the run",
    "relative": "distance ‖move‖ / ‖θ‖",
    "kl": "KL from the checkpoint, nat per completion",
}


@styled
def frontier(census: xr.Dataset, path: xr.Dataset | None = None, ax: Axes | None = None) -> dict[str, Any]:
    """Reward change against KL: random directions as a cloud with their mean, paths as lines with their intervals.

    `census` and `path` are `statistics.census.census` and `statistics.path.path` of one checkpoint. KL is on a
    logarithmic axis, so the checkpoint itself (KL 0, change 0) is the horizontal line. Paths are drawn apart for
    negative positions (towards θ_0 on the displacement's path; hollow) and positive ones; the position is written at
    the ends. Returns `cloud`, `mean`, `band`, `paths` (name → list of artists), `zero`, `legend`, `message`, `ax`.
    """
    if ax is None:
        _, ax = new_figure(aspect=0.85)
    ax.set_xlabel(AXES["kl"])
    ax.set_ylabel("reward minus the checkpoint's")
    out: dict[str, Any] = {"cloud": None, "mean": None, "band": None, "paths": {}, "zero": None, "ax": ax}
    out |= {"legend": None, "message": None}
    x, y = census["point_kl"].values.ravel(), census["point_change"].values.ravel()
    shown = np.isfinite(x) & np.isfinite(y) & (x > 0)
    if not shown.any():
        out["message"] = say_missing(ax, "no random direction has a KL above 0", axes="xy")
        return out
    out["zero"] = ax.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    out["cloud"] = ax.scatter(
        x[shown], y[shown], s=5, color=CLOUD, linewidths=0, zorder=1, label="random policies", rasterized=True
    )
    kl, change = census["kl"].values, census["change"].values
    order = np.argsort(kl)
    order = order[kl[order] > 0]
    low, high = census["change_interval"].values[order].T
    out["band"] = ax.fill_between(kl[order], low, high, color=CLOUD_MEAN, alpha=0.25, linewidth=0, zorder=2)
    (out["mean"],) = ax.plot(
        kl[order], change[order], color=CLOUD_MEAN, marker="_", markersize=6, zorder=3, label="their mean"
    )
    for i, name in enumerate(() if path is None else path["path"].values):
        out["paths"][str(name)] = _draw_path(ax, path, str(name), SERIES[i % len(SERIES)])
    ax.set_xscale("log")
    ax.margins(x=0.06, y=0.1)
    ax.autoscale_view()
    if len(order):
        # Near the checkpoint an estimate of KL is noise, which may be any number of decades below the mean.
        ax.set_xlim(left=0.3 * kl[order][0])
    # The band often fills the axes.
    out["legend"] = ax.legend(ncols=2, **LEGEND_ABOVE)
    return out


def _draw_path(ax: Axes, path: xr.Dataset | None, name: str, style: Mapping[str, Any]) -> list[Any]:
    if path is None:
        return []
    chosen = path.sel(path=name)
    artists: list[Any] = []
    label: str | None = name
    for side in (1.0, -1.0):
        rows = chosen.isel(position=np.flatnonzero(np.sign(chosen["position"].values) == side))
        kl, change = rows["kl"].values, rows["change"].values
        order = np.argsort(kl)
        order = order[np.isfinite(change[order]) & (kl[order] > 0)]
        if not len(order):
            continue
        low, high = rows["change_interval"].values[order].T
        errors = np.abs(np.stack([change[order] - low, high - change[order]]))
        face = style["color"] if side > 0 else "white"
        artists.append(
            ax.errorbar(
                kl[order],
                change[order],
                yerr=np.where(np.isfinite(errors), errors, 0.0),
                color=style["color"],
                marker=style["marker"],
                linestyle=style["linestyle"] if side > 0 else (0, (2, 1.5)),
                markerfacecolor=face,
                elinewidth=0.7,
                zorder=5,
                label=label,
            )
        )
        label = None
        last = order[-1]
        # Beyond the end of its bar, where neither bar nor marker lies.
        end, gap = (high[-1], 2) if side > 0 else (low[-1], -2)
        artists.append(
            ax.annotate(
                f"{float(rows['position'][last]):+g}".replace("-", "−"),
                (kl[last], end if np.isfinite(end) else change[last]),
                xytext=(0, gap),
                textcoords="offset points",
                ha="center",
                va="bottom" if side > 0 else "top",
                fontsize=NOTE_SIZE,
                color=style["color"],
                zorder=6,
            )
        )
    return artists


@styled
def correlation_by_radius(
    censuses: Mapping[int, xr.Dataset], pair: str = "kl_reward", against: str = "", ax: Axes | None = None
) -> dict[str, Any]:
    """Correlation over directions against the radius, one line per step; intervals are bands, or bars where many.

    `against`: `displacement`, `relative` or `kl`; by default displacements where every census has them, else ‖θ‖. The
    grey stripe is what counts as none (±0.1). Crosses at the lower edge are radii where nothing is known: the
    interval is all of −1 to 1. Returns `series` (step → `line`, `band`, `bars`), `unknown` (step → line), `stripe`,
    `legend`, `message`, `ax`.
    """
    if ax is None:
        _, ax = new_figure(aspect=0.8)
    ax.set_ylabel(f"correlation of {PAIR_NAMES.get(pair, pair)}\nover directions, noise taken out")
    out = _radius_frame(censuses, against, ax)
    out["unknown"] = {}
    known = {step: says_something(data.sel(pair=pair), "correlation", 2.0) for step, data in censuses.items()}
    if not any(bool(mask.any()) for mask in known.values()):
        out["message"] = say_missing(ax, "no radius where reward varies over directions beyond noise", axes="xy")
        return out
    out["stripe"] = ax.axhspan(-NEGLIGIBLE, NEGLIGIBLE, color="0.9", linewidth=0, zorder=0)
    ax.axhline(0, color="0.6", linewidth=0.6, zorder=1)
    styles = _styles(censuses)
    for i, (step, style) in enumerate(styles):
        data = censuses[step].sel(pair=pair)
        out["series"][step] = _line(
            ax, out["x"](censuses[step]), data, "correlation", known[step].values, style, step, (i, len(styles))
        )
        nothing = out["x"](censuses[step])[~known[step].values]
        if len(nothing):
            out["unknown"][step] = ax.plot(
                *(nothing * 1.035 ** (i - (len(styles) - 1) / 2), np.full(len(nothing), 0.03)),
                transform=ax.get_xaxis_transform(),
                color=style["color"],
                **{"marker": "x", "markersize": 4, "linestyle": ""},
            )[0]
    if out["unknown"]:
        ax.plot([], [], marker="x", markersize=4, linestyle="", color=CLOUD_MEAN, label="nothing known")
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, -1.05), min(high, 1.05))
    out["legend"] = _step_legend(ax, censuses)
    return out


@styled
def density_by_radius(censuses: Mapping[int, xr.Dataset], against: str = "", ax: Axes | None = None) -> dict[str, Any]:
    """Share of directions that improve the reward against the radius (normal model), one line per step.

    Small ticks (`lower`) mark the share that improves at the least, without a model of directions; where there is only
    a tick, the interval of the share is all of 0 to 1. Returns as `correlation_by_radius`, and `lower` (step → line).
    """
    if ax is None:
        _, ax = new_figure(aspect=0.8)
    ax.set_ylabel("share of directions that improve reward")
    out = _radius_frame(censuses, against, ax)
    known = {step: says_something(data, "density", 1.0) for step, data in censuses.items()}
    if not any(bool(mask.any()) for mask in known.values()):
        out["message"] = say_missing(ax, "no radius where reward varies over directions beyond noise", axes="xy")
        return out
    out["lower"] = {}
    styles = _styles(censuses)
    for i, (step, style) in enumerate(styles):
        data, x = censuses[step], out["x"](censuses[step])
        out["series"][step] = _line(ax, x, data, "density", known[step].values, style, step, (i, len(styles)))
        out["lower"][step] = ax.plot(
            x, data["density_lower"].values, linestyle="", marker="_", markersize=6, color=style["color"], zorder=4
        )[0]
    ax.plot([], [], marker="_", markersize=6, linestyle="", color=CLOUD_MEAN, label="at the least")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    ax.set_ylim(-0.02, 1.02)
    out["legend"] = _step_legend(ax, censuses)
    return out


@styled
def pass_at_k_by_step(
    boundaries: Mapping[int, xr.Dataset], changes: Mapping[int, xr.Dataset] | None = None, ax: Axes | None = None
) -> dict[str, Any]:
    """pass@k of the checkpoints against k, one line per step; intervals are bands, or bars where many.

    `changes` (step → `boundary_change`): a dotted line marks the k at which the curve of that step falls below the
    first one's. Returns `series` (step → `line`, `band`, `bars`), `crossings` (step → line), `legend`, `message`, `ax`.
    """
    if ax is None:
        _, ax = new_figure(aspect=0.8)
    ax.set_xlabel("k, tries per task")
    ax.set_ylabel("pass@k of the checkpoint")
    out: dict[str, Any] = {"series": {}, "crossings": {}, "legend": None, "message": None, "ax": ax}
    if not boundaries:
        out["message"] = say_missing(ax, "no boundary was measured", axes="xy")
        return out
    styles = _styles(boundaries)
    for i, (step, style) in enumerate(styles):
        data = boundaries[step]
        known = data["pass_at_k"].notnull().values
        out["series"][step] = _line(
            ax, data["k"].values.astype(float), data, "pass_at_k", known, style, step, (i, len(styles))
        )
        crossing = float((changes or {})[step]["crossing_k"]) if step in (changes or {}) else np.nan
        if np.isfinite(crossing):
            out["crossings"][step] = ax.axvline(crossing, color=style["color"], linewidth=0.7, linestyle=":", zorder=1)
            ax.annotate(
                f"k = {number(crossing, 0)}",
                (crossing, 0.02 + 0.06 * (len(out["crossings"]) % 3)),  # one above the other: they may be close
                xycoords=("data", "axes fraction"),
                xytext=(2, 0),
                textcoords="offset points",
                fontsize=NOTE_SIZE,
                color=style["color"],
            )
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, 0.0), min(high, 1.02))
    out["legend"] = _step_legend(ax, boundaries)
    return out


@styled
def curvature_over_training(
    censuses: Mapping[int, xr.Dataset], paths: Mapping[int, xr.Dataset] | None = None, position: float = -1.0
) -> dict[str, Any]:
    """KL per squared length over training: over random directions, and the ratio of a path's to theirs.

    Left: 2 KL / length² at the smallest radius of each census, mean over directions. Right: the Fisher ratio of every
    path at `position` (−1: θ_0 on the displacement's path), on a logarithmic axis; 1 is what a random direction has.
    Where random directions do not reach the KL of that position, it is that of the farthest one on the way to it that
    they reach; the position is then written beside the point.
    Returns `curvature` and `ratios` (path → artist), `axes`, `figure`, `messages`.
    """
    figure, axes = new_panels(1, 2, PAGE_INCHES, 2.5)
    left, right = axes[0]
    out: dict[str, Any] = {"curvature": None, "ratios": {}, "axes": [left, right], "figure": figure, "messages": []}
    left.set_ylabel("2 KL / length², nat, over\nrandom directions (‖θ‖ = 1)")
    right.set_ylabel("KL per squared length,\npath / random directions")
    steps = sorted(step for step, data in censuses.items() if np.isfinite(data["curvature"].values).any())
    if steps:
        first = {step: censuses[step].isel(radius=int(np.argmin(censuses[step]["radius"].values))) for step in steps}
        values = np.array([float(first[step]["curvature"]) for step in steps])
        bounds = np.array([first[step]["curvature_interval"].values for step in steps])
        out["curvature"] = _bars(left, np.array(steps, float), values, bounds, SERIES[0], "random directions")
        left.set_yscale("log")
        _plain_log(left)
        step_axis(left, steps)
    else:
        out["messages"].append(say_missing(left, "no census was measured", axes="xy"))
    found: dict[str, list[tuple[int, float, np.ndarray]]] = {}
    labels: list[tuple[int, float, float]] = []
    for step, data in sorted((paths or {}).items()):
        for name in data["path"].values:
            place = compared_position(data.sel(path=name), position, "fisher_ratio")
            if place is not None:
                here = data.sel(path=name).isel(position=place)
                ratio, at = float(here["fisher_ratio"]), float(here["position"])
                found.setdefault(str(name), []).append((step, ratio, here["fisher_ratio_interval"].values))
                # Points side by side share a label.
                near = any(s == step and a == at and 2 / 3 < r / ratio < 3 / 2 for s, a, r in labels)
                if not np.isclose(at, position) and not near:
                    labels.append((step, at, ratio))
                    last = step == max(paths or {}) > min(paths or {})
                    right.annotate(
                        f"at {at:+g}".replace("-", "−"),
                        (step, ratio),
                        xytext=(-4 if last else 4, 3),
                        textcoords="offset points",
                        ha="right" if last else "left",
                        fontsize=NOTE_SIZE,
                    )
    if not found:
        message = "random directions of the same step\nreach the KL of no path"
        out["messages"].append(say_missing(right, message, axes="xy"))
        return out
    for i, (name, rows) in enumerate(found.items()):
        at, values = np.array([row[0] for row in rows], float), np.array([row[1] for row in rows])
        out["ratios"][name] = _bars(right, at, values, np.array([row[2] for row in rows]), SERIES[i % 6], name)
    right.axhline(1, color="0.6", linewidth=0.6, zorder=0)
    right.set_yscale("log")
    _plain_log(right)
    step_axis(right, sorted({row[0] for rows in found.values() for row in rows}))
    right.legend(loc="best", frameon=False)
    return out


def _bars(ax: Axes, x: np.ndarray, y: np.ndarray, bounds: np.ndarray, style: Mapping[str, Any], label: str) -> Any:
    errors = np.abs(np.stack([y - bounds[:, 0], bounds[:, 1] - y]))
    return ax.errorbar(
        x,
        y,
        yerr=np.where(np.isfinite(errors), errors, 0.0),
        color=style["color"],
        marker=style["marker"],
        linestyle=style["linestyle"],
        elinewidth=0.8,
        label=label,
    )


def _plain_log(ax: Axes) -> None:
    """Ticks at 1, 2 and 5 in plain numbers: a range of less than a decade would otherwise have one."""
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(_plain))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _plain(value: float, _: object = None) -> str:
    """A tick in plain digits: 1 600, not 1.6e+03."""
    return f"{value:,.0f}".replace(",", "\u202f") if value >= 1000 else f"{value:g}"


def _radius_frame(censuses: Mapping[int, xr.Dataset], against: str, ax: Axes) -> dict[str, Any]:
    if not censuses:
        raise AnalysisError("there is no census to draw")
    have = {
        name: all(np.isfinite(data[name].values).all() for data in censuses.values())
        for name in ("displacement", "relative")
    }
    chosen = against or ("displacement" if have["displacement"] else "relative" if have["relative"] else "radius")
    if chosen not in ("radius", *AXES):
        raise AnalysisError(f"a radius is drawn against displacement, relative or kl, not {chosen!r}")
    if chosen in have and not have[chosen]:
        raise AnalysisError(f"not every census knows its radii as {chosen}")
    unit = {str(data.attrs.get("radius_unit", "")) for data in censuses.values()}
    ax.set_xlabel(AXES.get(chosen, f"radius ({' or '.join(sorted(unit))})"))
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(_plain))
    ax.xaxis.set_minor_formatter(NullFormatter())

    def at(data: xr.Dataset) -> np.ndarray:
        return data[chosen].values.astype(float)

    return {"series": {}, "stripe": None, "legend": None, "message": None, "ax": ax, "x": at}


def _styles(by_step: Mapping[int, Any]) -> list[tuple[int, Mapping[str, Any]]]:
    """Six steps at most, the first and the last among them, each with a style of its own."""
    steps: Sequence[int] = sorted(by_step)
    if len(steps) > len(SERIES):
        picked = np.unique(np.round(np.linspace(0, len(steps) - 1, len(SERIES))).astype(int))
        steps = [steps[i] for i in picked]
    return [(step, SERIES[i]) for i, step in enumerate(steps)]


MAX_BANDS = 2
"""Series with bands; of more, bands would cover each other, so intervals are bars side by side."""


def _line(
    ax: Axes,
    x: np.ndarray,
    data: xr.Dataset,
    name: str,
    known: np.ndarray,
    style: Mapping[str, Any],
    step: int,
    place: tuple[int, int],
) -> dict[str, Any]:
    """One series; `place`: which of how many. Returns `line` and `band`, or `bars` where there are many.

    A value without a neighbour has a bar in any case: a band of one point could not be seen.
    """
    low, high = (np.where(known, end, np.nan) for end in data[f"{name}_interval"].transpose(..., "bound").values.T)
    y = np.where(known, data[name].values, np.nan)
    index, many = place
    if many <= MAX_BANDS:
        band = ax.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        (line,) = ax.plot(x, y, label=f"step {step}", zorder=3, **style)
        near = np.pad(known, 1)
        alone = known & ~near[:-2] & ~near[2:]
        bars = (
            ax.vlines(x[alone], low[alone], high[alone], color=style["color"], linewidth=0.8) if alone.any() else None
        )
        return {"line": line, "band": band, "bars": bars}
    x = x * 1.035 ** (index - (many - 1) / 2)
    bars = ax.vlines(x[known], low[known], high[known], color=style["color"], linewidth=0.8, alpha=0.7, zorder=2)
    # A legend looks for a place among lines only, and would cover bars.
    gap = np.full(known.sum(), np.nan)
    ax.plot(np.repeat(x[known], 3), np.ravel([low[known], high[known], gap], order="F"), linestyle="none")
    (line,) = ax.plot(x, y, label=f"step {step}", zorder=3, **style)
    return {"line": line, "band": None, "bars": bars}


def _step_legend(ax: Axes, by_step: Mapping[int, Any]) -> Any:
    """The legend of series by step, which names the steps that have none."""
    if len(by_step) < 2:
        return None
    legend = ax.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none")
    rest = sorted(set(by_step) - {step for step, _ in _styles(by_step)})
    if rest:
        steps = "step" if len(rest) == 1 else "steps"
        named = f"{steps} {', '.join(map(str, rest))}" if len(rest) <= 3 else f"{len(rest)} steps"
        legend.set_title(f"(without {named})")
        legend.get_title().set_fontsize(NOTE_SIZE)
    return legend
