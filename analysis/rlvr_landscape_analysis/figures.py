"""Figures, one function each. They take `ax`, return what they drew, and never show anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlvr_landscape_analysis.landscape import difference_from_origin, point_mean

COLUMN_INCHES = 3.4
"""Width of one column of a two-column paper."""
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.4,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "savefig.dpi": 300,
}


def new_figure(width: float = COLUMN_INCHES, aspect: float = 0.9) -> tuple[Figure, Axes]:
    """A figure of one panel at column width, without pyplot's global state."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, width * aspect), layout="constrained")
        return figure, figure.add_subplot()


def reward_landscape(
    data: xr.Dataset, ax: Axes | None = None, *, vmin: float | None = None, vmax: float | None = None
) -> dict[str, Any]:
    """Mean reward as colour, KL from the checkpoint as contour lines, the origin as a cross.

    `data` is one landscape (dims alpha, beta, prompt, rollout; another slice or step is selected by the caller).
    Dots mark points whose reward does not differ from the origin's by two standard errors, paired over prompts.
    `vmin` and `vmax` fix the colour scale, to share it between panels. Returns the artists: `mesh`, `contours` (None
    where KL is constant), `origin`, `dots`, `colorbar`, `ax`.
    """
    if ax is None:
        _, ax = new_figure()
    with matplotlib.rc_context(STYLE):
        return _draw(data, ax, vmin, vmax)


def _draw(data: xr.Dataset, ax: Axes, vmin: float | None, vmax: float | None) -> dict[str, Any]:
    alpha, beta = data["alpha"].values, data["beta"].values
    # Rows of a mesh are y: dims (beta, alpha) put α on the horizontal axis whatever the dataset's order.
    reward = point_mean(data["reward"])["mean"].transpose("beta", "alpha").values
    kl = point_mean(data["kl_k1"])["mean"].transpose("beta", "alpha").values
    mesh = ax.pcolormesh(alpha, beta, reward, shading="nearest", cmap="viridis", vmin=vmin, vmax=vmax, rasterized=True)
    contours = _contours(ax, alpha, beta, kl)
    difference = difference_from_origin(data["reward"]).transpose("beta", "alpha")
    same = np.abs(difference["mean"].values) < 2 * difference["standard_error"].values
    same &= ~((beta[:, None] == 0) & (alpha[None, :] == 0))
    rows, columns = np.nonzero(same)
    dots = ax.plot(alpha[columns], beta[rows], "o", ms=2.0, color="white", mec="black", mew=0.4, ls="none")[0]
    origin = ax.plot(0, 0, "+", ms=9, mew=1.6, color="black")[0]
    origin.set_path_effects(_halo())
    ax.set_aspect("equal")
    ax.set_xlabel("step along direction δ, α")
    ax.set_ylabel("step along direction η, β")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.set_title(_title(data, contours is not None, bool(len(rows))), fontsize=7)
    # Inside the panel's own frame, so that the bar is as tall as a panel of equal aspect.
    bar = ax.inset_axes((1.04, 0.0, 0.05, 1.0))
    colorbar = ax.figure.colorbar(mesh, cax=bar, label="mean reward")
    return {"mesh": mesh, "contours": contours, "origin": origin, "dots": dots, "colorbar": colorbar, "ax": ax}


def _contours(ax: Axes, alpha: np.ndarray, beta: np.ndarray, kl: np.ndarray) -> Any:
    if min(kl.shape) < 2 or not np.isfinite(kl).any():
        return None
    # k1 may be slightly negative near the origin, where there is nothing to contour.
    top = float(np.nanmax(kl))
    levels = [level for level in MaxNLocator(6).tick_values(0.0, top) if 0 < level < top]
    if not levels:
        return None
    lines = ax.contour(alpha, beta, kl, levels=levels, colors="white", linewidths=0.8)
    lines.set_path_effects(_halo())
    ax.clabel(lines, fmt=lambda value: f"{value:g}", fontsize=6, inline_spacing=2)
    return lines


def _halo() -> list[Any]:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=1.6, foreground="0.25", alpha=0.6)]


def _title(data: xr.Dataset, lines: bool, dots: bool) -> str:
    parts = [f"{word} {int(data[name])}" for name, word in (("step", "step"), ("slice_seed", "slice")) if name in data]
    parts.append(f"{data.sizes['prompt']} prompts × {data.sizes['rollout']} rollouts")
    legend = ["lines: KL in nat"] * lines + ["dots: within 2 SE of the origin"] * dots
    return "\n".join(filter(None, [", ".join(parts), "; ".join(legend)]))


def panel_aspect(data: xr.Dataset) -> float:
    """Height by width of a one-panel figure that this landscape fills."""
    width, height = (float(np.ptp(data[name].values)) for name in ("alpha", "beta"))
    return float(np.clip(0.25 + 0.65 * height / width, 0.4, 1.6))


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write `path` as .pdf and .png (fonts embedded, 300 dpi); returns both paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.with_name(path.name + suffix) for suffix in (".pdf", ".png")]
    with matplotlib.rc_context(STYLE):
        for target in paths:
            figure.savefig(target)
    return paths
