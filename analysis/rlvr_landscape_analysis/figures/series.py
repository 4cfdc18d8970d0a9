"""Series over training: correlations with their intervals, and what the checkpoints themselves score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.figures.style import (
    LEGEND_ABOVE,
    NOTE_SIZE,
    PAGE_INCHES,
    SERIES,
    SettledLayout,
    new_figure,
    new_panels,
    say_missing,
    step_axis,
    styled,
)
from rlvr_landscape_analysis.figures.values import reward_label
from rlvr_landscape_analysis.results import CONTROL_NAMES, EARLY, PAIR_NAMES, statistic_name
from rlvr_landscape_analysis.schema import VERIFIER, paid_by

VALUE_NAMES = {
    "corrected": "corrected for sampling noise",
    "pearson": "Pearson, as measured",
    "spearman": "Spearman, as measured",
    "contribution": "contribution to the corrected r",
}


@styled
def correlation_over_training(
    correlations: xr.Dataset,
    pair: str = "kl_reward",
    control: str = "none",
    value: str = "corrected",
    steps: Iterable[int] | None = None,
    ax: Axes | None = None,
) -> dict[str, Any]:
    """A correlation over the slice against the training step, with its interval as a band .

    `correlations` has dims (step, slice_seed, pair, control, bound); `value` is `corrected`, `pearson` or another of
    its variables with `<value>_interval`. The vertical axis goes from −1 to 1, but for a `contribution`, a part of a
    correlation, over the range that it has. `steps` restricts the snapshots. One line per slice; crosses on the lower
    edge mark snapshots where the value is not defined, and a thin bar there is all that is known. Returns `series`:
    slice_seed → artists `line`, `band`, `bars`, `gaps`; `zero`, `legend`, `message`, `ax`. A series without any value
    gives a panel that says so, with the table's reason. Raises `AnalysisError` for a pair, control, value or step that
    the table does not have.
    """
    table = chosen_table(correlations, pair, value, [control], steps).sel(control=control)
    if ax is None:
        _, ax = new_figure(aspect=0.72)
    what = f"correlation of {PAIR_NAMES.get(pair, pair)}"
    ax.set_ylabel(f"{what}\n{_manner(value, control)}")
    at, slices = table["step"].values, table["slice_seed"].values
    _correlation_frame(ax, at, table if value == "contribution" else None)
    out: dict[str, Any] = {"series": {}, "zero": None, "legend": None, "message": None, "ax": ax}
    if not _anything(table, value):
        out["message"] = _say_undefined(ax, f"{what} is not defined at any snapshot", table)
        return out
    out["zero"] = _zero(ax)
    for i, seed in enumerate(slices):
        style = SERIES[i % len(SERIES)]
        rows = table.sel(slice_seed=seed)
        label = f"slice {int(seed)}" if len(slices) > 1 else None
        out["series"][int(seed)] = _draw_table(ax, at, rows, value, style, label, place=i, many=len(slices))
    out["legend"] = _legend(ax, gaps=[s["gaps"] for s in out["series"].values()])
    return out


def early_correlation(correlations: xr.Dataset, **options: Any) -> dict[str, Any]:
    """`correlation_over_training` over the first ten steps, on a linear axis; the same options and artists."""
    chosen: dict[str, Any] = {"steps": range(EARLY + 1), **options}
    return correlation_over_training(correlations, **chosen)


@styled
def controlled_over_training(
    correlations: xr.Dataset,
    pair: str = "kl_reward",
    value: str = "corrected",
    control: str = "shell",
    null: str = "radial",
    steps: Iterable[int] | None = None,
    ax: Axes | None = None,
) -> dict[str, Any]:
    """The plain correlation beside the one with the radius controlled for, and the radial null as a grey band.

    `correlations` as for `correlation_over_training`. Where the plain line lies in the band, the radius alone explains
    it; the controlled line is what is left. With several slices, each draws its lines in the same colours. Returns
    `plain`, `controlled`, `null`: slice_seed → artists `line`, `band`, `bars`, `gaps`; `zero`, `legend`, `message`,
    `ax`. Series without any value are named as not defined in the legend.
    """
    table = chosen_table(correlations, pair, value, ["none", control, null], steps)
    if ax is None:
        _, ax = new_figure(aspect=0.8)
    what = f"correlation of {PAIR_NAMES.get(pair, pair)}"
    ax.set_ylabel(f"{what}\n({VALUE_NAMES.get(value, value)})")
    at, slices = table["step"].values, table["slice_seed"].values
    _correlation_frame(ax, at)
    out: dict[str, Any] = {"plain": {}, "controlled": {}, "null": {}, "zero": None, "legend": None, "message": None}
    if not _anything(table, value):
        out["message"] = _say_undefined(ax, f"{what} is not defined at any snapshot", table)
        return out | {"ax": ax}
    out["zero"] = _zero(ax)
    grey = {"color": "0.45", "marker": "", "linestyle": (0, (1, 1))}
    parts = (("null", null, grey), ("plain", "none", SERIES[0]), ("controlled", control, SERIES[1]))
    for place, (role, name, style) in enumerate(parts):
        rows = table.sel(control=name)
        words = statistic_name(value, name)
        undefined = not _anything(rows, value)
        for i, seed in enumerate(slices):
            label = None if i else words + (" (not defined)" if undefined else "")
            one = rows.sel(slice_seed=seed)
            out[role][int(seed)] = _draw_table(ax, at, one, value, style, label, place=place, many=len(slices))
    gaps = [artists["gaps"] for role in ("plain", "controlled", "null") for artists in out[role].values()]
    out["legend"] = _legend(ax, gaps=gaps, columns=1)
    return out | {"ax": ax}


def chosen_table(
    correlations: xr.Dataset,
    pair: str,
    value: str,
    controls: Iterable[str] = (),
    steps: Iterable[int] | None = None,
) -> xr.Dataset:
    """One pair of a table of correlations, dims (step, slice_seed, control[, bound]), steps in rising order.

    Keeps `value`, its interval and `reason`, as far as they are there. Raises `AnalysisError` naming what is missing.
    """
    if value not in correlations:
        known = sorted(str(name) for name in correlations.data_vars if f"{name}_interval" in correlations)
        raise AnalysisError(f"the table has no correlation {value!r}; it has {', '.join(known)}")
    for name, wanted in (("pair", [pair]), ("control", list(controls))):
        known = [str(one) for one in np.atleast_1d(correlations[name].values)] if name in correlations.coords else []
        absent = [one for one in wanted if one not in known]
        if absent:
            raise AnalysisError(f"the table has no {name} {absent[0]!r}; it has {', '.join(known)}")
    table = correlations[[n for n in (value, f"{value}_interval", "reason") if n in correlations]]
    for name in ("pair", "control", "step", "slice_seed"):
        if name not in table.dims:
            table = table.expand_dims(name) if name in table.coords else table.expand_dims({name: [0]})
    table = table.sel(pair=pair).sortby("step")
    if steps is not None:
        wanted_steps = {int(step) for step in steps}
        known_steps = [int(step) for step in table["step"].values]
        kept = [step for step in known_steps if step in wanted_steps]
        if not kept:
            raise AnalysisError(f"the table has none of the steps asked for; it has {known_steps}")
        table = table.sel(step=kept)
    return table


def draw_series(
    ax: Axes,
    at: np.ndarray,
    value: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    style: dict[str, Any],
    label: str | None = None,
    *,
    shade: float = 0.2,
    gap_height: float = 0.03,
) -> dict[str, Any]:
    """A line with markers, a band between `low` and `high`, thin bars at every point, crosses where `value` is missing.

    Where only the bounds are known the bar is dotted. A series without any value draws no crosses: the caller says so.
    Returns `line`, `band`, `bars`, `gaps`, the last three None when there is nothing to draw.
    """
    line = ax.plot(at, value, label=label, zorder=3, mec="white", mew=0.3, **style)[0]
    holes, bounded = ~np.isfinite(value), np.isfinite(low) & np.isfinite(high)
    band = bars = gaps = None
    colour = style["color"]
    if (bounded & ~holes).any():
        where = list(bounded & ~holes)
        band = ax.fill_between(at, low, high, where=where, color=colour, alpha=shade, linewidth=0, zorder=1)
    if bounded.any():
        patterns: Any = [":" if hole else "-" for hole in holes[bounded]]
        bars = ax.vlines(
            at[bounded],
            low[bounded],
            high[bounded],
            color=colour,
            linestyles=patterns,
            linewidth=0.5,
            alpha=0.6,
            zorder=2,
        )
    if holes.any() and not holes.all():
        gaps = ax.plot(
            at[holes], np.full(holes.sum(), gap_height), "x", ms=3.5, mew=0.9, color=style["color"], ls="none",
            transform=ax.get_xaxis_transform(), zorder=4,
        )[0]  # fmt: skip
    return {"line": line, "band": band, "bars": bars, "gaps": gaps}


def _draw_table(
    ax: Axes,
    at: np.ndarray,
    rows: xr.Dataset,
    value: str,
    style: dict[str, Any],
    label: str | None,
    *,
    place: int,
    many: int,
) -> dict[str, Any]:
    low = high = np.full(len(at), np.nan)
    if f"{value}_interval" in rows:
        low, high = (rows[f"{value}_interval"].sel(bound=bound).values for bound in ("low", "high"))
    shade = {1: 0.2, 2: 0.16, 3: 0.12}.get(many, 0.07) * (1 if style["marker"] else 1.8)
    height = 0.03 + 0.035 * (place % 6)
    return draw_series(ax, at, rows[value].values, low, high, style, label, shade=shade, gap_height=height)


def _correlation_frame(ax: Axes, at: np.ndarray, parts: xr.Dataset | None = None) -> None:
    """From −1 to 1 for correlations; of contributions, `parts` of one, the range that these have, with 0 in it."""
    step_axis(ax, at)
    if parts is not None:
        values = np.concatenate([parts[name].values.ravel() for name in parts if parts[name].dtype.kind == "f"])
        values = np.append(values[np.isfinite(values)], 0.0)
        margin = 0.08 * float(np.ptp(values)) or 0.1
        ax.set_ylim(float(values.min()) - margin, float(values.max()) + margin)
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        return
    ax.set_ylim(-1.05, 1.05)
    ax.set_yticks([-1, -0.5, 0, 0.5, 1], labels=["−1", "−0.5", "0", "0.5", "1"])


def _zero(ax: Axes) -> Any:
    return ax.axhline(0, color="0.5", lw=0.6, zorder=0)


def _manner(value: str, control: str) -> str:
    manner = VALUE_NAMES.get(value, value)
    return f"({manner})" if control == "none" else f"({manner};\n{CONTROL_NAMES.get(control, control)})"


def _anything(table: xr.Dataset, value: str) -> bool:
    return bool(np.isfinite(table[value].values).any())


def _say_undefined(ax: Axes, sentence: str, table: xr.Dataset) -> Any:
    reasons = [str(one) for one in np.unique(table["reason"].values)] if "reason" in table else []
    reasons = [one for one in reasons if one]
    return say_missing(ax, f"{sentence}: {reasons[0]}" if reasons else sentence, width=44)["message"]


def _legend(ax: Axes, gaps: list[Any], columns: int = 3) -> Any:
    """Above the axes, where it covers no band; None when there is nothing to tell apart."""
    handles: list[Any] = []
    lines, labels = ax.get_legend_handles_labels()
    for line in lines:
        colour = getattr(line, "get_color", lambda: "0.5")()
        handles.append((Patch(facecolor=colour, alpha=0.2, linewidth=0), line))
    crossed = [artist for artist in gaps if artist is not None]
    if crossed:
        handles, labels = [*handles, crossed[0]], [*labels, "not defined or not measured"]
    if not handles:
        return None
    return ax.legend(handles, labels, ncols=columns, handlelength=2.6, labelspacing=0.3, **LEGEND_ABOVE)


@styled
def training_curves(training: xr.Dataset) -> dict[str, Any]:
    """Reward, pass@1 and pass@k of the checkpoints over training on the left, token entropy on the right.

    `training` has dims (step, bound): `reward`, `pass_1`, `pass_k`, `entropy` with `<name>_interval`, attribute `k`.
    Bands are the intervals; markers and small ticks are the snapshots. Returns one entry per quantity with `line`,
    `band`, `bars`, `gaps` (missing quantities: None), `legend`, `messages`, `figure`, `axes`.
    """
    if "step" not in training.dims:
        raise AnalysisError(f"training curves have the dimension step, this has {dict(training.sizes)}")
    training = training.sortby("step")
    at = training["step"].values
    k = training.attrs.get("k", "k")
    left = {"reward": reward_label(training.attrs), "pass_1": "pass@1", "pass_k": f"pass@{k}"}
    figure, axes = new_panels(1, 2, PAGE_INCHES, 2.3)
    out: dict[str, Any] = {"figure": figure, "axes": axes[0], "messages": []}
    crossed: list[Any] = []
    for ax, names, words in (
        (axes[0, 0], left, "reward; share solved"),
        (axes[0, 1], {"entropy": "token entropy"}, "token entropy (nat)"),
    ):
        step_axis(ax, at)
        ax.set_ylabel(words)
        measured = [n for n in names if n in training and np.isfinite(training[n].values).any()]
        if not measured:
            said = f"{' and '.join(names.values())} not measured at any snapshot"
            out["messages"].append(say_missing(ax, said, width=40, axes="y")["message"])
        for place, name in enumerate(names):
            style = SERIES[place if ax is axes[0, 0] else 3]
            if name not in measured:
                out[name] = None
                if measured:
                    ax.plot([], [], label=f"{names[name]} (not measured)", **style)
                continue
            low = high = np.full(len(at), np.nan)
            if f"{name}_interval" in training:
                low, high = (training[f"{name}_interval"].sel(bound=bound).values for bound in ("low", "high"))
            height = 0.03 + 0.05 * place
            out[name] = draw_series(
                ax, at, training[name].values.astype(float), low, high, style, names[name], gap_height=height
            )
            crossed.append(out[name]["gaps"])
        if measured:
            low_limit, high_limit = ax.get_ylim()
            ax.set_ylim(min(0.0, low_limit) if ax is axes[0, 0] else low_limit, high_limit)
    out["legend"] = _legend(axes[0, 0], gaps=crossed)
    return out


@styled
def compare_runs(runs: Mapping[str, xr.Dataset]) -> dict[str, Any]:
    """Held-out reward of several training runs on the left, token entropy on the right (held-out and in training).

    `runs` are datasets of `open_training` by label. Bands are the paired interval of the gain over step 0, so runs that
    start from one policy start from one point. Labels that differ in a number at their end (`grpo-0`, `grpo-1`) share a
    style and an entry of the legend. A run that a control paid is named so there. Returns one entry per label with
    `reward` (artists of a series) and `entropy` (the held-out line), and `legend`, `figure`, `axes`.
    """
    figure, axes = new_panels(1, 2, PAGE_INCHES, 2.4)
    reward_axes, entropy_axes = axes[0]
    out: dict[str, Any] = {"figure": figure, "axes": axes[0]}
    kinds: dict[tuple[str, str], list[str]] = {}
    for label, run in runs.items():
        kinds.setdefault((_without_number(label), paid_by(run.attrs)), []).append(label)
    for label, run in runs.items():
        kind = (_without_number(label), paid_by(run.attrs))
        style = SERIES[list(kinds).index(kind) % len(SERIES)]
        alike = kinds[kind]
        notes = [f"{len(alike)} runs"] if len(alike) > 1 else []
        notes += [f"{kind[1]} reward"] if kind[1] != VERIFIER else []
        name = kind[0] if len(alike) > 1 else label
        shown = f"{name} ({', '.join(notes)})" if notes else name
        if label != alike[0]:
            shown = "_"  # matplotlib leaves it out of the legend
        first = float(run["held_out"][0])
        low, high = (first + run["gain_interval"].sel(bound=bound).values for bound in ("low", "high"))
        drawn = draw_series(reward_axes, run["look"].values, run["held_out"].values, low, high, style, shown)
        entropy_axes.plot(run["step"], run["entropy"], color=style["color"], lw=0.5, alpha=0.5)
        line = entropy_axes.plot(run["look"], run["held_out_entropy"], mec="white", mew=0.3, **style)[0]
        out[label] = {"reward": drawn, "entropy": line}
    tasks = {int(run.attrs["tasks"]) for run in runs.values()}
    confidence = {float(run.attrs["level"]) for run in runs.values()}
    reward_axes.set_ylabel("held-out reward")
    entropy_axes.set_ylabel("token entropy (nat)")
    for ax in axes[0]:
        ax.set_xlabel("training step")
        ax.margins(x=0.03)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    note = (
        f"{', '.join(map(str, sorted(tasks)))} held-out tasks; bands: {100 * max(confidence):g} % interval of the gain"
    )
    figure.supxlabel(f"{note}; thin lines: entropy of the training batches", fontsize=NOTE_SIZE)
    out["legend"] = _legend(reward_axes, gaps=[], columns=3)
    # Its width must not be taken from the axes; its height still is.
    out["legend"].set_in_layout(False)
    layout = figure.get_layout_engine()
    assert isinstance(layout, SettledLayout)
    layout.set(rect=(0, 0, 1, 1 - 0.08 * math.ceil(len(kinds) / 3)))
    return out


def _without_number(label: str) -> str:
    """`grpo-0` → `grpo`; other labels as they are."""
    stem, _, number = label.rpartition("-")
    return stem if stem and number.isdigit() else label
