"""What all figures share: sizes and fonts of a two-column paper, series styles, and how missing values look.

Nothing here touches pyplot or the global settings: `styled` applies the style to one function call.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

COLUMN_INCHES = 3.4
"""Width of one column of a two-column paper."""
PAGE_INCHES = 7.0
"""Width of both columns."""
NOTE_SIZE = 7
"""Font size of titles and notes, points."""
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.2,
    "hatch.linewidth": 0.4,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "savefig.dpi": 300,
}
LEGEND_ABOVE: Any = {
    "loc": "lower left",
    "bbox_to_anchor": (-0.02, 1.0),
    "frameon": False,
    "columnspacing": 1.2,
    "borderaxespad": 0.2,
}
"""Where a legend covers no band: above the axes."""
SERIES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
    {"color": "#E69F00", "marker": "v", "linestyle": (0, (5, 1, 1, 1))},
    {"color": "#000000", "marker": "P", "linestyle": (0, (1, 1))},
)
"""Okabe and Ito's colours, each with its own marker and line style, so that a grey print still tells them apart."""
MISSING_FACE, MISSING_EDGE, MISSING_HATCH = "0.88", "0.6", "xxxxx"

P = ParamSpec("P")
T = TypeVar("T")


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Run `draw` under `STYLE`; the settings of the process are as before afterwards."""

    @functools.wraps(draw)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return call


class SettledLayout(ConstrainedLayoutEngine):
    """Constrained layout, solved twice: after one solution, panels of equal aspect still push labels off the page."""

    def execute(self, fig: Figure) -> Any:
        super().execute(fig)
        return super().execute(fig)


@styled
def new_figure(width: float = COLUMN_INCHES, aspect: float = 0.9) -> tuple[Figure, Axes]:
    """A figure of one panel at column width, without pyplot's global state."""
    figure = Figure(figsize=(width, width * aspect), layout=SettledLayout())
    return figure, figure.add_subplot()


def new_panels(
    rows: int, columns: int, width: float, height: float, *, equal: bool = False, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of several panels and its axes, shape (rows, columns); `equal` closes the gaps of fixed aspects."""
    figure = Figure(figsize=(width, height), layout=SettledLayout(compress=equal))
    return figure, np.asarray(figure.subplots(rows, columns, squeeze=False, **options))


@styled
def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write `path` as .pdf and .png (fonts embedded, 300 dpi); returns both paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.with_name(path.name + suffix) for suffix in (".pdf", ".png")]
    for target in paths:
        figure.savefig(target)
    return paths


def halo(width: float = 1.6, colour: str = "0.25", alpha: float = 0.6) -> list[Any]:
    """Path effects that keep a thin mark visible on any colour."""
    return [withStroke(linewidth=width, foreground=colour, alpha=alpha)]


def join_notes(notes: Iterable[str], width: int) -> str:
    """Notes separated by semicolons, in lines of at most `width` characters where a note is not longer itself."""
    lines: list[str] = []
    for note in filter(None, notes):
        if lines and len(lines[-1]) + len(note) + 2 <= width:
            lines[-1] += f"; {note}"
        else:
            lines.append(note)
    return ";\n".join(lines)


def say_missing(ax: Axes, sentence: str, width: int = 30, *, axes: str = "") -> dict[str, Any]:
    """Fill the panel with hatched grey and `sentence`; returns `background` and `message`.

    `axes` (`x`, `y`, `xy`) names those that have no scale without values; their ticks go.
    """
    if "x" in axes:
        ax.set_xticks([])
    if "y" in axes:
        ax.set_yticks([])
    background = ax.add_patch(
        Rectangle(
            (0, 0),
            1,
            1,
            transform=ax.transAxes,
            facecolor=MISSING_FACE,
            edgecolor=MISSING_EDGE,
            hatch=MISSING_HATCH,
            linewidth=0,
            zorder=0,
        )
    )
    message = ax.text(
        0.5,
        0.5,
        textwrap.fill(sentence, width),
        transform=ax.transAxes,
        ha="center",
        va="center",
        fontsize=NOTE_SIZE,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
    )
    return {"background": background, "message": message}


def step_axis(ax: Axes, steps: Sequence[int] | np.ndarray) -> None:
    """Training steps on x: linear up to ten steps, else ln(1 + step), with a small tick at every snapshot.

    The first updates, where most happens, get as much room as the hundred that follow; the label names the scale.
    """
    ordered = np.unique(np.asarray(steps, dtype=float))
    first, last = ordered[0], ordered[-1]
    if last - first <= 10:
        margin = 0.05 * (last - first) or 0.5
        ax.set_xlim(first - margin, last + margin)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        ax.set_xticks(ordered, minor=True)
        ax.set_xlabel("training step")
        return
    low, high = _forward(np.array([first, last]))
    margin = 0.04 * (high - low)
    limits = _backward(np.array([low - margin, high + margin]))
    ax.set_xlim(float(limits[0]), float(limits[1]))
    ax.set_xscale("function", functions=(_forward, _backward))
    rounds = sorted({float(m * 10**p) for p in range(8) for m in (1, 2, 5)} | {0.0})
    ticks = [last]
    for tick in [first, *[tick for tick in rounds if first < tick < last]][::-1]:
        room = 0.022 * len(f"{tick:g}{ticks[-1]:g}") * (high - low)
        if abs(_forward(tick) - _forward(ticks[-1])) >= room:
            ticks.append(tick)
    ax.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    ax.set_xticks(ordered, labels=[""] * len(ordered), minor=True)
    ax.set_xlabel("training step, scale ln(1 + step)")


def _forward(x: Any) -> Any:
    return np.sign(x) * np.log1p(np.abs(x))


def _backward(y: Any) -> Any:
    return np.sign(y) * np.expm1(np.abs(y))


def number(value: float, digits: int = 2) -> str:
    """A number for a figure's text, with a true minus sign."""
    return f"{value:.{digits}f}".replace("-", "−")
