"""A map as a surface: for talks and first looks; heights are read more exactly from a flat map."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.figures.image import kl_levels
from rlvr_landscape_analysis.figures.style import COLUMN_INCHES, NOTE_SIZE, join_notes, number, styled
from rlvr_landscape_analysis.figures.values import as_map, heading, label_of, plane, require


@styled
def surface(
    data: xr.Dataset, name: str = "reward", ax: Axes | None = None, *, elevation: float = 28, azimuth: float = -58
) -> dict[str, Any]:
    """A quantity as height over the slice, KL contours on the floor, a stem at the origin.

    `data` is one map (dims alpha, beta) or one landscape; `ax` must have the projection `3d`. Points without a value
    leave a hole in the surface and a cross on the floor. A grid of one row becomes a line. Returns `surface` (None for
    a line), `line`, `contours`, `origin`, `missing`, `message`, `ax`. Raises `AnalysisError` for a flat `ax` or a name
    that no map has.
    """
    map_ = as_map(data, (name, "reward", "kl"))
    present = require(map_, name)
    if ax is None:
        figure = Figure(figsize=(COLUMN_INCHES, 0.9 * COLUMN_INCHES))
        figure.subplots_adjust(left=0.02, right=0.86, bottom=0.05, top=0.88)
        ax = figure.add_subplot(projection="3d")
    space: Any = ax
    if not hasattr(space, "plot_surface"):
        raise AnalysisError("a surface needs an Axes with projection='3d', such as figure.add_subplot(projection='3d')")
    space.view_init(elev=elevation, azim=azimuth)
    out: dict[str, Any] = dict.fromkeys(("surface", "line", "contours", "origin", "missing", "message"))
    height = plane(map_, name) if present else np.full((map_.sizes["beta"], map_.sizes["alpha"]), np.nan)
    finite = height[np.isfinite(height)]
    if not len(finite):
        space.set_axis_off()
        what = "has no value at any point" if present else "was not measured"
        out["message"] = space.text2D(
            0.5, 0.5, f"{label_of(map_, name)}\n{what}", transform=space.transAxes, ha="center", va="center",
            bbox={"facecolor": "0.88", "edgecolor": "0.6", "hatch": "xxxxx", "linewidth": 0, "pad": 12},
        )  # fmt: skip
        space.set_title(heading(map_), fontsize=NOTE_SIZE)
        return out | {"ax": ax}
    x, y = np.meshgrid(map_["alpha"].values, map_["beta"].values)
    low, high = float(finite.min()), float(finite.max())
    room = (high - low) or max(abs(high), 1.0) * 0.1
    floor = low - 0.45 * room
    notes = []
    if min(height.shape) > 1:
        out["surface"] = space.plot_surface(
            x, y, np.ma.masked_invalid(height), cmap="viridis", rstride=1, cstride=1, linewidth=0.15,
            edgecolor=(0, 0, 0, 0.35), antialiased=True, rasterized=True, vmin=low, vmax=high,
        )  # fmt: skip
        kl = plane(map_, "kl") if "kl" in map_ else np.full(height.shape, np.nan)
        finite_kl = kl[np.isfinite(kl)]
        levels = [level for level in kl_levels(kl, 5) if finite_kl.min() < level < finite_kl.max()]
        if levels:
            out["contours"] = space.contour(
                x, y, np.ma.masked_invalid(kl), levels=levels, zdir="z", offset=floor, cmap="cividis", linewidths=0.9
            )
            notes.append(f"floor: KL of {', '.join(f'{level:g}' for level in levels)} nat")
    else:
        out["line"] = space.plot(x.ravel(), y.ravel(), height.ravel(), "o-", color="#0072B2")[0]
    holes = ~np.isfinite(height)
    if holes.any():
        crosses = {"ls": "none", "marker": "x", "color": "0.35"}
        out["missing"] = space.plot(x[holes], y[holes], np.full(holes.sum(), floor), ms=4, **crosses)[0]
        notes.append("×: not measured")
    here = (x == 0) & (y == 0) & ~holes
    if here.any():
        top = float(height[here][0])
        out["origin"] = space.plot(
            [0, 0], [0, 0], [floor, top], color="black", lw=0.9, marker="+", ms=7, mew=1.3, zorder=10
        )[0]
        notes.append("stem: the checkpoint")
    space.set_zlim(floor, high + 0.05 * room)
    space.set_xlabel("α", labelpad=-6)
    space.set_ylabel("β", labelpad=-5)
    space.set_zlabel(label_of(map_, name), labelpad=-4)
    for axis, bins in ((space.xaxis, 4), (space.yaxis, 4), (space.zaxis, 7)):
        axis.set_major_locator(MaxNLocator(bins, steps=[1, 2, 5, 10]))
        axis.set_tick_params(pad=-2, labelsize=6)
    if map_.sizes["beta"] > 1:
        # The lowest β would stand on the highest α.
        space.set_yticks([tick for tick in space.yaxis.get_majorticklocs() if y.min() < tick <= y.max() + 1e-9])
    # Below the lowest value there is only the floor, so no height is labelled there.
    ticks = [tick for tick in space.zaxis.get_majorticklocs() if low - 0.1 * room <= tick <= high + 0.05 * room]
    space.set_zticks(ticks)
    digits = max(0, int(np.ceil(-np.log10(np.min(np.diff(ticks)))))) if len(ticks) > 1 else 2
    space.set_zticklabels([number(tick, digits) for tick in ticks])
    space.set_title("\n".join(filter(None, [heading(map_), join_notes(notes, 60)])), fontsize=NOTE_SIZE)
    return out | {"ax": ax}
