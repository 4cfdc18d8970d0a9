"""The landscape over training as a film, by matplotlib's own writers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import Normalize

from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.figures.image import (
    MISSING_NOTE,
    draw_contours,
    draw_image,
    image_aspect,
    kl_levels,
    mark_origin,
)
from rlvr_landscape_analysis.figures.style import COLUMN_INCHES, NOTE_SIZE, join_notes, new_figure, styled
from rlvr_landscape_analysis.figures.values import Maps, as_map, collect, plane, require


@styled
def animate(
    maps: Maps,
    path: str | Path,
    writer: str = "gif",
    *,
    name: str = "reward",
    slice_seed: int | None = None,
    steps: Iterable[int] | None = None,
    frames_per_second: float = 2.0,
    dpi: int = 200,
) -> dict[str, Any]:
    """One frame per snapshot: a quantity as colour on one scale for all frames, KL contours, the step in the title.

    `maps` as for `landscape_panels`; of several slices one is shown (`slice_seed`, by default the first). `writer` is
    `gif` or `mp4`; the suffix is added when `path` has another. Returns `path`, `steps`, `limits` (of the colours),
    `figure` (holding the last frame). Raises `AnalysisError` for another writer, for `mp4` without ffmpeg, for a slice
    or step that is not there, and when no map has a value.
    """
    target = Path(path)
    if writer not in ("gif", "mp4"):
        raise AnalysisError(f"unknown writer {writer!r}; use 'gif' or 'mp4'")
    target = target if target.suffix == f".{writer}" else target.with_name(f"{target.name}.{writer}")
    pen = _pen(writer, frames_per_second)
    frames = _frames(maps, name, slice_seed, steps)
    values = np.concatenate([plane(map_, name).ravel() for map_ in frames.values() if require(map_, name)] or [[]])
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise AnalysisError(f"{name!r} was not measured at any of the steps {list(frames)}; there is nothing to show")
    limits = float(finite.min()), float(finite.max())
    kl = np.concatenate([plane(map_, "kl").ravel() for map_ in frames.values() if "kl" in map_] or [np.zeros(0)])
    levels = kl_levels(kl)

    aspect = max(image_aspect(map_) for map_ in frames.values())
    figure, ax = new_figure(COLUMN_INCHES, float(np.clip(0.25 + 0.65 * aspect, 0.5, 1.6)))
    target.parent.mkdir(parents=True, exist_ok=True)

    def draw(step: int) -> None:
        ax.clear()
        drawn = draw_image(ax, frames[step], name, norm=Normalize(*limits))
        lines = draw_contours(ax, frames[step], levels) if drawn["mesh"] is not None else None
        mark_origin(ax, frames[step], drawn["mesh"])
        ax.set_title(f"step {step}\n{_note(lines, drawn['missing'])}", fontsize=NOTE_SIZE)

    # One layout for all frames, from one that has a colour bar, so that nothing jumps.
    draw(next(step for step, map_ in frames.items() if name in map_ and np.isfinite(plane(map_, name)).any()))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    with pen.saving(figure, str(target), dpi):
        for step in frames:
            draw(step)
            pen.grab_frame()
    return {"path": target, "steps": list(frames), "limits": limits, "figure": figure}


def _note(lines: Any, missing: Any) -> str:
    # Never empty: the panel must not jump between frames.
    notes = ["lines: KL in nat" if lines is not None else "+: the checkpoint", MISSING_NOTE if missing else ""]
    return join_notes(notes, 60)


def _pen(writer: str, frames_per_second: float) -> Any:
    from matplotlib.animation import FFMpegWriter, PillowWriter

    if writer == "gif":
        return PillowWriter(fps=frames_per_second)  # pyright: ignore[reportArgumentType]
    if not FFMpegWriter.isAvailable():
        raise AnalysisError("mp4 needs the program ffmpeg, which is not installed; install ffmpeg, or use writer='gif'")
    return FFMpegWriter(fps=frames_per_second)  # pyright: ignore[reportArgumentType]


def _frames(maps: Maps, name: str, slice_seed: int | None, steps: Iterable[int] | None) -> dict[int, Any]:
    found = collect(maps)
    seeds = sorted({seed for _, seed in found})
    seed = seeds[0] if slice_seed is None else slice_seed
    if seed not in seeds:
        raise AnalysisError(f"there is no map of slice {seed}; there are {', '.join(map(str, seeds))}")
    known = [step for step, other in found if other == seed]
    chosen = known if steps is None else sorted({int(step) for step in steps})
    absent = [step for step in chosen if step not in known]
    if absent or not chosen:
        raise AnalysisError(f"there is no map of step {absent or 'any'}; there are {', '.join(map(str, known))}")
    return {step: as_map(found[step, seed], ("reward", "kl", name)) for step in chosen}
