"""The pictures of a report: drawn, written as PDF and PNG, and kept small enough to stand in its page."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlvr_landscape_analysis import figures as drawing
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.report.files import write_whole
from rlvr_landscape_analysis.report.recipes import Key, Recipe
from rlvr_landscape_analysis.results import RunAnalysis
from rlvr_landscape_analysis.schema import GRID, landscape_file

INLINE_DPI = 150
MAX_LANDSCAPES = 12
"""Landscapes shown in the page, each with the values under the pointer; more would be slow to open."""
MAX_INLINE_BYTES = 18_000_000
"""Images inline before base64 adds a third; what goes beyond stays a file."""


def landscape_name(key: Key) -> str:
    """Name of a landscape's files, as a sweep names its dataset."""
    return landscape_file(*key).removesuffix(".nc")


def shown_landscapes(keys: Sequence[Key], most: int = MAX_LANDSCAPES) -> list[Key]:
    """Which landscapes the page shows: all of them if they fit, else one slice per snapshot, spread over training."""
    ordered = sorted(keys)
    if len(ordered) <= most:
        return ordered
    first: dict[int, Key] = {}
    for key in ordered:
        first.setdefault(key[0], key)
    candidates = list(first.values())
    if len(candidates) <= most:
        return candidates
    chosen = np.unique(np.round(np.linspace(0, len(candidates) - 1, most)).astype(int))
    return [candidates[i] for i in chosen]


def figure_of(ax: Axes) -> Figure:
    """The figure that an axes is part of."""
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("the axes belong to no figure")
    return figure


@dataclass(frozen=True)
class Image:
    """A drawn figure."""

    files: list[str]
    """Its files, relative to the report."""
    size: tuple[int, int]
    """Width and height in CSS pixels."""
    png: bytes | None
    """What the page shows; None where it shows only the files."""

    @property
    def wide(self) -> bool:
        """Whether it takes the whole width of the page."""
        return self.size[0] > 1.5 * drawing.COLUMN_INCHES * INLINE_DPI


@dataclass
class Pictures:
    """What has been drawn of an analysis into `folder`."""

    analysis: RunAnalysis
    folder: Path
    progress: Callable[[str], None]
    written: list[Path] = field(default_factory=list)
    landscapes: list[tuple[Key, Image]] = field(default_factory=list)
    charts: list[tuple[Recipe, Image]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    """Title of what could not be drawn, and why."""
    movies: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    """Landscape → `hover_data`, of those that the page shows."""
    inline_bytes: int = 0

    def draw_landscapes(self) -> None:
        shown = set(shown_landscapes(list(self.analysis.maps)))
        for key, values in sorted(self.analysis.maps.items()):
            self.progress(f"landscape of step {key[0]}, slice {key[1]}")
            ax = drawing.reward_landscape(values)["ax"]
            name = landscape_name(key)
            image = self._save(figure_of(ax), name, inline=key in shown)
            if image.png is not None:
                self.data[name] = hover_data(values, ax)
            self.landscapes.append((key, image))

    def draw_recipes(self, chosen: Sequence[Recipe]) -> None:
        for recipe in chosen:
            self.progress(recipe.title)
            try:
                drawn = recipe.draw()
            except AnalysisError as error:
                self.missing.append((recipe.title, str(error)))
                continue
            figure = drawn["figure"] if "figure" in drawn else figure_of(drawn["ax"])
            self.charts.append((recipe, self._save(figure, recipe.name, recipe.inline)))

    def animate(self) -> None:
        """A film over training, as a file only: inline, it would be large and could not be stopped."""
        if len({step for step, _ in self.analysis.maps}) < 2:
            return
        self.progress("animation")
        target = self.folder / "figures" / "landscape.gif"
        partial = target.with_name(".landscape.partial.gif")
        try:
            drawing.animate(self.analysis.maps, partial, "gif")
            os.replace(partial, target)
        except AnalysisError as error:
            self.missing.append(("Animation over training", str(error)))
            return
        finally:
            partial.unlink(missing_ok=True)
        self.movies.append(f"figures/{target.name}")
        self.written.append(target)

    def _save(self, figure: Figure, name: str, inline: bool = True) -> Image:
        paths = [
            write_whole(self.folder / "figures" / f"{name}.{kind}", render(figure, kind)) for kind in ("pdf", "png")
        ]
        self.written += paths
        # Rendered last: a layout depends on the resolution, and the positions of the axes are asked for afterwards.
        png = render(figure, "png", INLINE_DPI) if inline else None
        if png is not None and self.inline_bytes + len(png) > MAX_INLINE_BYTES:
            png = None
        self.inline_bytes += len(png or b"")
        width, height = figure.get_size_inches()
        size = (round(width * INLINE_DPI), round(height * INLINE_DPI))
        return Image([f"figures/{path.name}" for path in paths], size, png)


def render(figure: Figure, kind: str, dpi: int | None = None) -> bytes:
    """A figure as the bytes of a `pdf` or `png`, without a date; uncropped, so that positions in it stay true."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(drawing.STYLE):
        options: dict[str, Any] = {"metadata": {"CreationDate": None}} if kind == "pdf" else {}
        figure.savefig(buffer, format=kind, dpi=dpi or drawing.STYLE["savefig.dpi"], **options)
    return buffer.getvalue()


_ROWS = (
    ("radius", "radius", None),
    ("displacement_radius", "distance / training's own", None),
    ("reward", "reward", "reward_se"),
    ("difference", "difference from the origin", "difference_se"),
    ("kl", "KL, nat", "kl_se"),
    ("surrogate", "surrogate", "surrogate_se"),
)


def hover_data(values: xr.Dataset, ax: Axes) -> dict[str, Any]:
    """What the page needs to show a landscape's values under the pointer.

    `axes`: left, bottom, width and height of the axes as fractions of the image that was drawn last; `xlim`, `ylim`;
    `alpha`, `beta`, ascending; `rows`: for every quantity its name, values and standard errors (or null), indexed
    [alpha][beta], null where missing.
    """
    box, whole = ax.get_window_extent(), figure_of(ax).bbox
    ordered = values.sortby(list(GRID))

    def matrix(name: str) -> list[list[float | None]]:
        found = ordered[name].transpose(*GRID).values
        return [[_number(value) for value in row] for row in found]

    return {
        "axes": [
            float(fraction)
            for fraction in (
                box.x0 / whole.width,
                box.y0 / whole.height,
                box.width / whole.width,
                box.height / whole.height,
            )
        ],
        "xlim": [float(limit) for limit in ax.get_xlim()],
        "ylim": [float(limit) for limit in ax.get_ylim()],
        "alpha": [float(a) for a in ordered["alpha"].values],
        "beta": [float(b) for b in ordered["beta"].values],
        "rows": [
            {
                "name": title,
                "values": matrix(name),
                "errors": matrix(error) if error is not None and error in ordered else None,
            }
            for name, title, error in _ROWS
            if name in ordered
        ],
    }


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
