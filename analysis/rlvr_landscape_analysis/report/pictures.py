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


LANDSCAPE_WORDS = (
    "Colour: mean reward. Lines: KL in nat. Cross: the checkpoint. Dots: points whose reward does not differ from the "
    "checkpoint's by two standard errors."
)


@dataclass(frozen=True)
class Leading:
    """The figure that opens the page, with values under the pointer."""

    name: str
    """Of its data and its files."""
    title: str
    caption: str
    image: Image
    seen: str
    """What a reader looks at, for the first lines of the page."""


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
    leading: Leading | None = None
    """The figure that opens the page; drawn nowhere else."""
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

    def draw_leading(self) -> None:
        """The one large figure that opens the page: the frontier of the last census, else the last landscape."""
        found = self.analysis.evidence
        if found is not None and found.census:
            step = max(found.census)
            self.progress(f"frontier of step {step}")
            census, paths = found.census[step], found.path.get(step)
            figure, ax = drawing.new_figure(width=drawing.PAGE_INCHES, aspect=0.5)
            out = drawing.frontier(census, paths, ax=ax)
            if out["message"] is None:
                image = self._save(figure, "frontier")
                self.data["frontier"] = frontier_data(census, paths, ax)
                self.leading = Leading(
                    "frontier",
                    f"Reward and KL of random directions{' and of paths' if paths is not None else ''}, step {step}",
                    "Each point is a random policy. Grey line and band: their mean at each radius. Hollow marks: "
                    "towards step 0; numbers: position in units of the path's vector. "
                    f"{self.analysis.bootstrap.level:.0%} intervals.",
                    image,
                    "The figure shows policies around the checkpoint. Each point is one of them: the checkpoint, moved "
                    "along a random direction of weight space. Its height says how much reward that gains or loses.",
                )
                return
        shown = [(key, image) for key, image in self.landscapes if image.png is not None]
        if shown:
            key, image = shown.pop()
            self.landscapes = [one for one in self.landscapes if one[0] != key]
            words = f"Step {key[0]}, slice {key[1]}"
            seen = (
                "The map shows policies around the checkpoint (the cross). Each square is one of them: the checkpoint, "
                "moved along two directions of weight space. Its colour is the mean reward of that policy; the lines "
                "say how far it is from the checkpoint as a distribution (KL)."
            )
            self.leading = Leading(landscape_name(key), f"Reward landscape. {words}", LANDSCAPE_WORDS, image, seen)

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


def _place(ax: Axes) -> list[float]:
    """Left, bottom, width and height of the axes as fractions of the image that was drawn last."""
    box, whole = ax.get_window_extent(), figure_of(ax).bbox
    parts = (box.x0 / whole.width, box.y0 / whole.height, box.width / whole.width, box.height / whole.height)
    return [float(part) for part in parts]


def hover_data(values: xr.Dataset, ax: Axes) -> dict[str, Any]:
    """What the page needs to show a landscape's values under the pointer.

    `axes`: left, bottom, width and height of the axes as fractions of the image that was drawn last; `xlim`, `ylim`;
    `alpha`, `beta`, ascending; `rows`: for every quantity its name, values and standard errors (or null), indexed
    [alpha][beta], null where missing.
    """
    ordered = values.sortby(list(GRID))

    def matrix(name: str) -> list[list[float | None]]:
        found = ordered[name].transpose(*GRID).values
        return [[_number(value) for value in row] for row in found]

    return {
        "axes": _place(ax),
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


def frontier_data(census: xr.Dataset, paths: xr.Dataset | None, ax: Axes) -> dict[str, Any]:
    """What the page needs to show the values of a frontier's policies under the pointer, from left to right.

    `axes` as in `hover_data`; `x`, `y`: places of the policies as fractions of the axes; `rows`: for every quantity its
    name and one value per policy, null where it has none.
    """
    policies: list[dict[str, Any]] = []
    for place in np.ndindex(*(census.sizes[dim] for dim in ("radius", "direction", "sign"))):
        here = dict(zip(("radius", "direction", "sign"), place, strict=True))
        point = census[["point_kl", "point_change"]].isel(here)
        policies.append(
            {
                "policy": f"random direction {place[1]}, {'+' if int(census['sign'][place[2]]) > 0 else '−'}",
                "KL, nat": float(point["point_kl"]),
                "reward minus the checkpoint's": float(point["point_change"]),
                "distance by ‖θ‖": float(census["relative"][place[0]]),
                "distance / training's own": float(census["displacement"][place[0]]),
            }
        )
    for name in () if paths is None else paths["path"].values:
        for i, position in enumerate(paths["position"].values if paths is not None else ()):
            assert paths is not None
            here = paths.sel(path=name).isel(position=i)
            policies.append(
                {
                    "policy": f"path {name}",
                    "position on the path": float(position),
                    "KL, nat": float(here["kl"]),
                    "reward minus the checkpoint's": float(here["change"]),
                }
            )
    names = list(dict.fromkeys(name for policy in policies for name in policy))
    x, y = names[1], "reward minus the checkpoint's"
    drawn = [one for one in policies if one[x] > 0 and math.isfinite(one[x]) and math.isfinite(one[y])]
    drawn.sort(key=lambda one: one[x])
    screen = ax.transData.transform([(one[x], one[y]) for one in drawn])
    inside = ax.transAxes.inverted().transform(screen)

    def shown(value: Any) -> str | float | None:
        return value if value is None or isinstance(value, str) else _number(value)

    return {
        "axes": _place(ax),
        "x": [float(f"{place:.5g}") for place in inside[:, 0]],
        "y": [float(f"{place:.5g}") for place in inside[:, 1]],
        "rows": [{"name": name, "values": [shown(one.get(name)) for one in drawn]} for name in names],
    }


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
