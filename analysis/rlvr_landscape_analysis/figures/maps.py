"""Maps over a slice: reward with KL contours, surrogate, pass@k, entropy, and differences from the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.figures.image import (
    MISSING_NOTE,
    add_colorbar,
    cells,
    centred_norm,
    draw_contours,
    draw_image,
    image_aspect,
    kl_levels,
    mark_origin,
)
from rlvr_landscape_analysis.figures.style import (
    COLUMN_INCHES,
    NOTE_SIZE,
    PAGE_INCHES,
    join_notes,
    new_figure,
    new_panels,
    say_missing,
    styled,
)
from rlvr_landscape_analysis.figures.values import Maps, as_map, at_origin, collect, heading, label_of, plane, require

DIVERGING = "RdBu_r"


@styled
def reward_landscape(
    data: xr.Dataset, ax: Axes | None = None, *, vmin: float | None = None, vmax: float | None = None
) -> dict[str, Any]:
    """Mean reward as colour, KL from the checkpoint as contour lines, the origin as a cross.

    `data` is one map (dims alpha, beta) or one landscape (dims alpha, beta, prompt[, rollout]); another slice or step
    is selected by the caller. Dots mark points whose reward does not differ from the origin's by two standard errors,
    paired over prompts. `vmin` and `vmax` fix the colour scale, to share it between panels. Returns the artists:
    `mesh`, `contours` (None where KL is constant), `origin`, `dots`, `missing` (None when every point was measured),
    `colorbar`, `ax`. Raises `AnalysisError` when `data` is neither.
    """
    map_ = as_map(data, ("reward", "kl", "difference"))
    if ax is None:
        _, ax = new_figure(aspect=panel_aspect(map_))
    drawn = draw_image(ax, map_, "reward", norm=Normalize(vmin, vmax))
    contours = draw_contours(ax, map_)
    rows, columns = np.nonzero(_like_origin(map_))
    alpha, beta = map_["alpha"].values, map_["beta"].values
    dots = ax.plot(alpha[columns], beta[rows], "o", ms=2.0, color="white", mec="black", mew=0.4, ls="none")[0]
    notes = [
        "lines: KL in nat" if contours is not None else "",
        "dots: within 2 SE of the origin" if len(rows) else "",
        MISSING_NOTE if drawn["missing"] is not None else "",
    ]
    ax.set_title("\n".join(filter(None, [heading(map_), join_notes(notes, 52)])), fontsize=NOTE_SIZE)
    return drawn | {"contours": contours, "origin": mark_origin(ax, map_, drawn["mesh"]), "dots": dots, "ax": ax}


def _like_origin(map_: xr.Dataset) -> np.ndarray:
    """Points other than the origin whose reward differs from the origin's by less than two standard errors."""
    if not {"difference", "difference_se"} <= set(map_.data_vars):
        return np.zeros((map_.sizes["beta"], map_.sizes["alpha"]), bool)
    same = np.abs(plane(map_, "difference")) < 2 * plane(map_, "difference_se")
    return same & ~((map_["beta"].values[:, None] == 0) & (map_["alpha"].values[None, :] == 0))


@styled
def landscape_panels(
    maps_or_datasets: Maps, steps: Iterable[int] | None = None, shared: bool = False
) -> dict[str, Any]:
    """Snapshots side by side: mean reward as colour, KL as contour lines, the origin as a cross.

    `maps_or_datasets`: a mapping (step, slice_seed) → map or landscape dataset (dims alpha, beta[, prompt, rollout]),
    several of them, or one dataset over step and slice_seed. `steps`: which snapshots, by default 0, 1 and the last.
    Every panel has its own colour scale; with `shared`, all have one, and the same contour levels. Rows are slices; up
    to three columns a row. Returns `figure`, `axes` (rows, columns), `panels`: (step, slice_seed) → artists `mesh`,
    `contours`, `origin`, `missing`, `colorbar`; and `colorbar`, the shared one or None. Raises `AnalysisError` for a
    step that is not there.
    """
    found = collect(maps_or_datasets)
    known = sorted({step for step, _ in found})
    chosen = _chosen_steps(known, steps)
    slices = sorted({seed for step, seed in found if step in chosen})
    maps = {key: as_map(data) for key, data in found.items() if key[0] in chosen}
    per_row = min(3, len(chosen))
    blocks = -(-len(chosen) // per_row)
    rewards = np.concatenate([plane(map_, "reward").ravel() for map_ in maps.values()])
    kl = np.concatenate([plane(map_, "kl").ravel() for map_ in maps.values() if "kl" in map_] or [np.zeros(0)])
    norm, levels = (_range(rewards), kl_levels(kl, 7)) if shared else (None, None)

    rows, width = blocks * len(slices), COLUMN_INCHES if len(chosen) == 1 else PAGE_INCHES
    aspect = float(np.clip(max(image_aspect(map_) for map_ in maps.values()), 0.3, 2.0))
    image = {1: 2.3, 2: 2.3}.get(per_row, 1.75 if shared else 1.5)
    figure, axes = new_panels(rows, per_row, width, rows * (image * aspect + 0.42) + 0.5, equal=True)
    panels: dict[tuple[int, int], dict[str, Any]] = {}
    same_grid = len({(map_["alpha"].values.tobytes(), map_["beta"].values.tobytes()) for map_ in maps.values()}) == 1
    for place in range(rows * per_row):
        row, column = divmod(place, per_row)
        ax, index = axes[row, column], (row // len(slices)) * per_row + column
        if index >= len(chosen):
            ax.remove()
            axes[row, column] = None
            continue
        key = chosen[index], slices[row % len(slices)]
        below = row + 1 < rows and index + (per_row if row % len(slices) == len(slices) - 1 else 0) < len(chosen)
        last = column == per_row - 1 or index == len(chosen) - 1 or (chosen[index + 1], key[1]) not in maps
        panels[key] = _panel(ax, maps.get(key), key, norm, levels, len(slices) > 1, last)
        if same_grid and key in maps:
            _label_outer(ax, left=column == 0, bottom=not below)
    bar = None
    if shared:
        drawn = [panel for panel in panels.values() if panel["mesh"] is not None]
        if drawn:
            right = max(drawn, key=lambda panel: (panel["column"], -panel["row"]))
            bar = add_colorbar(right["ax"], right["mesh"], label_of(next(iter(maps.values())), "reward"))
    notes = [
        "lines: KL in nat" if any(panel["contours"] is not None for panel in panels.values()) else "",
        "+: the checkpoint",
        "one colour scale" if shared and len(panels) > 1 else "",
        MISSING_NOTE if any(panel["missing"] is not None for panel in panels.values()) else "",
    ]
    figure.supxlabel(join_notes(notes, 60 if per_row == 1 else 120), fontsize=NOTE_SIZE)
    return {"figure": figure, "axes": axes, "panels": panels, "colorbar": bar}


def _chosen_steps(known: list[int], steps: Iterable[int] | None) -> list[int]:
    if steps is None:
        early = [step for step in known if step in (0, 1)] or known[:1]
        return list(dict.fromkeys([*early, known[-1]]))
    chosen = list(dict.fromkeys(int(step) for step in steps))
    absent = [step for step in chosen if step not in known]
    if absent or not chosen:
        raise AnalysisError(f"there is no map of step {absent or 'any'}; there are {', '.join(map(str, known))}")
    return chosen


def _range(values: np.ndarray) -> Normalize | None:
    finite = values[np.isfinite(values)]
    return Normalize(float(finite.min()), float(finite.max())) if len(finite) else None


def _panel(
    ax: Axes,
    map_: xr.Dataset | None,
    key: tuple[int, int],
    norm: Normalize | None,
    levels: list[float] | None,
    name_slice: bool,
    last: bool,
) -> dict[str, Any]:
    title = f"step {key[0]}" + (f", slice {key[1]}" if name_slice else "")
    ax.set_title(title)
    spec = ax.get_subplotspec()
    assert spec is not None
    where = {"ax": ax, "row": spec.rowspan.start, "column": spec.colspan.start}
    if map_ is None:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_box_aspect(1)
        message = say_missing(ax, f"{title} was not measured", width=18)["message"]
        return where | dict.fromkeys(("mesh", "contours", "origin", "missing", "colorbar")) | {"message": message}
    drawn = draw_image(ax, map_, "reward", norm=norm, colorbar=norm is None, bar_label=last)
    return (
        where
        | drawn
        | {"contours": draw_contours(ax, map_, levels, count=7), "origin": mark_origin(ax, map_, drawn["mesh"])}
    )


def _label_outer(ax: Axes, *, left: bool, bottom: bool) -> None:
    if not left:
        ax.set_ylabel("")
        ax.tick_params(labelleft=False)
    if not bottom:
        ax.set_xlabel("")
        ax.tick_params(labelbottom=False)


@styled
def quantity_map(
    data: xr.Dataset,
    name: str,
    ax: Axes | None = None,
    *,
    vmin: float | None = None,
    vmax: float | None = None,
    cmap: str = "viridis",
    contours: bool = False,
) -> dict[str, Any]:
    """One quantity of a map as colour: pass@k, entropy, truncation, a standard error, …; the origin as a cross.

    `data` is one map (dims alpha, beta) or one landscape. `contours` adds KL. A quantity that was not measured gives a
    panel that says so. Returns `mesh`, `missing`, `colorbar`, `message`, `contours`, `origin`, `ax`. Raises
    `AnalysisError` for a name that no map has.
    """
    map_ = as_map(data, (name, "reward", "kl"))
    require(map_, name)
    if ax is None:
        _, ax = new_figure(aspect=panel_aspect(map_))
    drawn = draw_image(ax, map_, name, cmap=cmap, norm=Normalize(vmin, vmax))
    lines = draw_contours(ax, map_) if contours and drawn["mesh"] is not None else None
    notes = ["lines: KL in nat" if lines is not None else "", MISSING_NOTE if drawn["missing"] is not None else ""]
    ax.set_title("\n".join(filter(None, [heading(map_), join_notes(notes, 52)])), fontsize=NOTE_SIZE)
    return drawn | {"contours": lines, "origin": mark_origin(ax, map_, drawn["mesh"]), "ax": ax}


def _pair(map_: xr.Dataset, panels: list[dict[str, Any]], note: str) -> dict[str, Any]:
    """Two quantities side by side over the same extent; `panels` are the options of `draw_image` with `name`."""
    height = 2.3 * float(np.clip(image_aspect(map_), 0.3, 2.0)) + 0.95
    figure, axes = new_panels(1, 2, PAGE_INCHES, height, equal=True)
    drawn = {}
    for ax, options in zip(axes[0], panels, strict=True):
        artists = draw_image(ax, map_, **options)
        drawn[options["name"]] = artists | {"origin": mark_origin(ax, map_, artists["mesh"]), "ax": ax}
    _label_outer(axes[0, 1], left=False, bottom=True)
    missing = any(panel["missing"] is not None for panel in drawn.values())
    notes = [heading(map_), "+: the checkpoint", note, MISSING_NOTE if missing else ""]
    figure.supxlabel(join_notes(notes, 120), fontsize=NOTE_SIZE)
    return drawn | {"figure": figure, "axes": axes[0]}


@styled
def pass_and_entropy_maps(data: xr.Dataset) -> dict[str, Any]:
    """pass@k and token entropy of one map side by side.

    `data` is one map (dims alpha, beta) or one landscape. Returns `pass_k` and `entropy`, each with the artists of
    `quantity_map`, `figure` and `axes`. What was not measured says so.
    """
    map_ = as_map(data, ("pass_k", "entropy", "reward", "kl"))
    values = map_["pass_k"]
    nothing = bool(values.notnull().any()) and not bool((values > 0).any())
    note = f"no rollout passes: {label_of(map_, 'pass_k')} is 0 at every point" if nothing else ""
    scale = Normalize(0, None if not nothing else 1)
    return _pair(map_, [{"name": "pass_k", "norm": scale}, {"name": "entropy", "cmap": "cividis"}], note)


@styled
def surrogate_and_reward(data: xr.Dataset) -> dict[str, Any]:
    """The training objective's view of the slice beside the reward's, each as change from the origin's value.

    `data` is one map (dims alpha, beta) or one landscape. Colours diverge at the origin's value, equally far on both
    sides; without a value there, the colours are those of a plain magnitude and the note says so. Returns `surrogate`
    and `reward`, each with `mesh`, `missing`, `colorbar`, `origin`, `ax`, `message`; `figure` and `axes`.
    """
    map_ = as_map(data, ("surrogate", "reward", "kl"))
    panels, plain = [], []
    for name in ("surrogate", "reward"):
        centre = at_origin(map_, name) if name in map_ else np.nan
        if np.isfinite(centre):
            panels.append({"name": name, "cmap": DIVERGING, "norm": centred_norm(plane(map_, name), centre)})
            continue
        panels.append({"name": name})
        if name in map_:
            plain.append(name)
    note = "white: the origin's value" if len(plain) < 2 else ""
    if plain:
        note = "; ".join(filter(None, [note, f"{' and '.join(plain)} at the origin not measured, no centre"]))
    return _pair(map_, panels, note)


@styled
def difference_map(data: xr.Dataset, ax: Axes | None = None) -> dict[str, Any]:
    """Reward minus the origin's, paired by prompt, as colour diverging at 0.

    `data` is one map (`difference`, `difference_se` and, for rings, `better`; dims alpha, beta) or one landscape, which
    has no `better`. Hatched: |difference| < 2 SE. Rings: better than the origin after control of the false discovery
    rate. Returns `mesh`, `missing`, `colorbar`, `message`, `hatched` (None without), `rings`, `origin`, `ax`.
    """
    map_ = as_map(data, ("reward", "kl", "difference"))
    if ax is None:
        _, ax = new_figure(aspect=panel_aspect(map_))
    norm = centred_norm(plane(map_, "difference"), 0.0) if "difference" in map_ else None
    drawn = draw_image(ax, map_, "difference", cmap=DIVERGING, norm=norm)
    measured = drawn["mesh"] is not None
    unsure = _like_origin(map_)
    hatched = cells(ax, map_, unsure, facecolor="none", edgecolor="0.35", hatch="/////") if measured else None
    better = np.zeros_like(unsure)
    if measured and "better" in map_:
        better = (plane(map_, "better") > 0) & np.isfinite(plane(map_, "difference"))
    rows, columns = np.nonzero(better)
    alpha, beta = map_["alpha"].values, map_["beta"].values
    rings = ax.plot(alpha[columns], beta[rows], "o", ms=5, mfc="none", mec="black", mew=1.0, ls="none")[0]
    no_error = measured and not np.isfinite(plane(map_, "difference_se")).any() if "difference_se" in map_ else measured
    notes = [
        "hatched: within 2 SE of the origin" if hatched is not None else "",
        "rings: better, FDR-controlled" if len(rows) else "",
        "no standard error, so nothing is hatched" if no_error else "",
        MISSING_NOTE if drawn["missing"] is not None else "",
    ]
    ax.set_title("\n".join(filter(None, [heading(map_), join_notes(notes, 52)])), fontsize=NOTE_SIZE)
    return drawn | {"hatched": hatched, "rings": rings, "origin": mark_origin(ax, map_, drawn["mesh"]), "ax": ax}


def panel_aspect(data: xr.Dataset) -> float:
    """Height by width of a one-panel figure that this landscape fills."""
    return float(np.clip(0.25 + 0.65 * image_aspect(data), 0.5, 1.6))
