"""The one way a map is drawn on axes: as an image with its colour bar, KL contours and the checkpoint's mark."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from rlvr_landscape_analysis.figures.style import (
    MISSING_EDGE,
    MISSING_FACE,
    MISSING_HATCH,
    halo,
    say_missing,
)
from rlvr_landscape_analysis.figures.values import label_of, plane, require
from rlvr_landscape_analysis.schema import DIRECTION_ATTRIBUTE, GRID

MISSING_NOTE = "crossed grey: not measured"


def edges(values: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cell borders half-way between the points; a single row gets a visible thickness that means nothing."""
    if len(values) == 1:
        half = float(np.ptp(other)) / 8 or 0.5
        return np.array([values[0] - half, values[0] + half])
    middle = (values[1:] + values[:-1]) / 2
    return np.concatenate([[2 * values[0] - middle[0]], middle, [2 * values[-1] - middle[-1]]])


def borders(map_: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Cell borders along α and β."""
    alpha, beta = (map_[axis].values.astype(float) for axis in GRID)
    return edges(alpha, beta), edges(beta, alpha)


def image_aspect(map_: xr.Dataset) -> float:
    """Height by width of the map's image."""
    alpha, beta = (np.sort(np.atleast_1d(map_[axis].values).astype(float)) for axis in GRID)
    return float(np.ptp(edges(beta, alpha)) / np.ptp(edges(alpha, beta)))


def draw_image(
    ax: Axes,
    map_: xr.Dataset,
    name: str,
    *,
    cmap: str = "viridis",
    norm: Normalize | None = None,
    colorbar: bool = True,
    bar_label: bool = True,
) -> dict[str, Any]:
    """One quantity as colour at its place. Returns `mesh`, `missing`, `colorbar` (each or None) and `message`.

    Points without a value are crossed grey; a map without any says so in words.
    """
    x, y = borders(map_)
    frame(ax, map_)
    absent = not require(map_, name)
    values = np.full((len(y) - 1, len(x) - 1), np.nan) if absent else plane(map_, name)
    if not np.isfinite(values).any():
        what = "was not measured" if absent else "has no value at any point"
        message = say_missing(ax, f"{label_of(map_, name)} {what}", width=22)["message"]
        return {"mesh": None, "missing": None, "colorbar": None, "message": message}
    missing = cells(ax, map_, ~np.isfinite(values), facecolor=MISSING_FACE, edgecolor=MISSING_EDGE, hatch=MISSING_HATCH)
    mesh = ax.pcolormesh(x, y, values, cmap=cmap, norm=norm, rasterized=True)
    bar = add_colorbar(ax, mesh, label_of(map_, name) if bar_label else "") if colorbar else None
    return {"mesh": mesh, "missing": missing, "colorbar": bar, "message": None}


def add_colorbar(ax: Axes, mesh: Any, label: str) -> Any:
    """A colour bar inside the panel's own frame, so that it is as tall as a panel of equal aspect."""
    figure = ax.get_figure()
    assert figure is not None
    # A strip's bar has the strip's height, so its width and its label are fitted to that.
    aspect = float(np.ptp(ax.get_ylim()) / np.ptp(ax.get_xlim()))
    thickness = 0.05 * float(np.clip(aspect, 0.5, 2.0))
    if aspect < 0.5:
        label = textwrap.fill(label, 16)
    bar = figure.colorbar(mesh, cax=ax.inset_axes((1.04, 0.0, thickness, 1.0)), label=label)
    if not isinstance(mesh.norm, TwoSlopeNorm):
        bar.ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    return bar


def frame(ax: Axes, map_: xr.Dataset) -> None:
    """Limits, equal aspect, ticks and labels of a slice."""
    for axis, name, values, bounds in zip(
        (ax.xaxis, ax.yaxis), ("α", "β"), (map_[a].values for a in GRID), borders(map_), strict=True
    ):
        direction, of = ("δ", "alpha") if name == "α" else ("η", "beta")
        words = re.split(r"; | of ", str(map_.attrs.get(DIRECTION_ATTRIBUTE.format(axis=of), "random")))[0]
        axis.set_label_text(f"step along {direction}, {name}" if words.startswith("random") else f"{words}: {name}")
        if len(values) == 1:
            axis.set_label_text(name)
            axis.set_ticks([values[0]])
        else:
            axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        (ax.set_xlim if axis is ax.xaxis else ax.set_ylim)(bounds[0], bounds[-1])
    ax.set_aspect("equal")


def cells(ax: Axes, map_: xr.Dataset, chosen: np.ndarray, **style: Any) -> PatchCollection | None:
    """Rectangles over the points `chosen` (beta, alpha); None when there are none."""
    if not chosen.any():
        return None
    x, y = borders(map_)
    width, height = np.diff(x).tolist(), np.diff(y).tolist()
    boxes = [
        Rectangle((float(x[column]), float(y[row])), width[column], height[row])
        for row, column in np.argwhere(chosen).tolist()
    ]
    patches = PatchCollection(boxes, linewidth=0, **style)
    ax.add_collection(patches, autolim=False)
    return patches


def kl_levels(kl: np.ndarray, count: int = 8) -> list[float]:
    """Contour levels …, 0.5, 1, 2, 5, 10, 20, … below the largest KL, the `count` largest of them.

    KL grows with the square of the distance, so levels of equal ratio lie at equal distances, near the checkpoint too.
    The lowest is above half of the smallest positive KL, below which nothing was measured.
    """
    positive = kl[np.isfinite(kl) & (kl > 0)]
    if not len(positive):
        return []
    low, top = float(positive.min()) / 2, float(positive.max())
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(top))) + 1)
    levels = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    return [level for level in levels if low < level < top][-count:]


def draw_contours(ax: Axes, map_: xr.Dataset, levels: list[float] | None = None, *, count: int = 8) -> Any:
    """KL as labelled contour lines; None where the grid or the KL has nothing to contour."""
    if "kl" not in map_:
        return None
    kl = plane(map_, "kl")
    levels = kl_levels(kl, count) if levels is None else levels
    finite = kl[np.isfinite(kl)]
    levels = [level for level in levels if len(finite) and finite.min() < level < finite.max()]
    if min(kl.shape) < 2 or not levels:
        return None
    alpha, beta = (map_[axis].values for axis in GRID)
    lines = ax.contour(alpha, beta, kl, levels=levels, colors="white", linewidths=0.8)
    lines.set_path_effects(halo())
    for text in ax.clabel(lines, fmt=lambda value: f"{value:g}", fontsize=6, inline_spacing=2):
        text.set_path_effects(halo(1.4, "0.2", 0.8))
    return lines


def mark_origin(ax: Axes, map_: xr.Dataset, mesh: Any) -> Any:
    """A cross at the checkpoint; None when the grid does not reach it or there is no `mesh`."""
    if mesh is None:
        return None
    x, y = borders(map_)
    if not (x[0] <= 0 <= x[-1] and y[0] <= 0 <= y[-1]):
        return None
    origin = ax.plot(0, 0, "+", ms=9, mew=1.6, color="black", zorder=5)[0]
    origin.set_path_effects(halo(2.6, "white", 0.8))
    return origin


def centred_norm(values: np.ndarray, centre: float) -> TwoSlopeNorm:
    """Colours that change sign at `centre`, equally far on both sides, so that equal distances look equal."""
    distance = np.abs(values[np.isfinite(values)] - centre)
    half = float(distance.max()) if len(distance) and distance.max() > 0 else 1e-3 * max(1.0, abs(centre))
    return TwoSlopeNorm(centre, centre - half, centre + half)
