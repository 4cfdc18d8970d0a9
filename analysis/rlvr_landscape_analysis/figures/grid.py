"""From datasets to panels: which snapshots are there, their values as images, and the one way an image is drawn."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from rlvr_landscape_analysis.datasets import POINT, check_landscape
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.figures.style import (
    MISSING_EDGE,
    MISSING_FACE,
    MISSING_HATCH,
    halo,
    say_missing,
)
from rlvr_landscape_analysis.landscape import (
    difference_from_origin,
    pass_at_k,
    per_prompt,
    point_mean,
    radius,
    surrogate,
)

Maps = xr.Dataset | Mapping[Any, xr.Dataset] | Iterable[xr.Dataset]
"""One map or dataset (also with dims step, slice_seed), several, or a mapping from (step, slice_seed) or step."""

LABELS = {
    "reward": "mean reward",
    "kl": "KL from the checkpoint (nat)",
    "kl_k3": "KL from the checkpoint, k3 (nat)",
    "surrogate": "surrogate J (per token)",
    "entropy": "token entropy (nat)",
    "truncated": "share of truncated rollouts",
    "format_failure": "share of turns in a wrong format",
    "pass_1": "pass@1",
    "pass_k": "pass@k",
    "difference": "reward minus the checkpoint's",
    "adjusted_p": "p-value, FDR-adjusted",
    "radius": "distance from the origin",
    "realised_step": "realised step, ‖θ(α,β) − θ‖ / ‖θ‖",
    "displacement_radius": "distance from the checkpoint / its distance from snapshot 0",
}
"""Axis and colour-bar labels of the quantities of a map, with units."""
MISSING_NOTE = "crossed grey: not measured"

_RAW = {"kl": "kl_k1", "difference": "reward"}
_MEANS = ("reward", "kl", "kl_k3", "entropy", "truncated", "format_failure")


def collect(maps: Maps) -> dict[tuple[int, int], xr.Dataset]:
    """(step, slice_seed) → map or dataset, sorted; a dataset over steps or slices is taken apart.

    Step and slice come from the key of a mapping, else from the scalar coordinates, else they are 0. Raises
    `AnalysisError` when there is nothing, or two of one step and slice.
    """
    found: dict[tuple[int, int], xr.Dataset] = {}
    pairs: Iterable[tuple[Any, xr.Dataset]]
    if isinstance(maps, xr.Dataset):
        pairs = [(None, maps)]
    elif isinstance(maps, Mapping):
        pairs = [(key, data) for key, data in maps.items()]
    else:
        pairs = [(None, data) for data in maps]
    for key, data in pairs:
        for part in _parts(data):
            place = _place(key, part)
            if place in found:
                raise AnalysisError(f"two maps of step {place[0]}, slice {place[1]}; give each its own coordinates")
            found[place] = part.assign_coords(step=place[0], slice_seed=place[1])
    if not found:
        raise AnalysisError("there is no map to draw; give at least one")
    return dict(sorted(found.items()))


def _place(key: Any, data: xr.Dataset) -> tuple[int, int]:
    if isinstance(key, tuple):
        return int(key[0]), int(key[1])
    return _scalar(data, "step") if key is None else int(key), _scalar(data, "slice_seed")


def _parts(data: xr.Dataset) -> list[xr.Dataset]:
    parts = [data]
    for name in ("step", "slice_seed"):
        if name in data.dims:
            parts = [part.isel({name: i}) for part in parts for i in range(data.sizes[name])]
    return parts


def _scalar(data: xr.Dataset, name: str) -> int:
    return int(data[name].item()) if name in data.coords and data[name].ndim == 0 else 0


def as_map(data: xr.Dataset, names: Iterable[str] = ("reward", "kl")) -> xr.Dataset:
    """A map with coordinates in rising order; of a landscape dataset, raw or reduced, the quantities `names`.

    Raises `AnalysisError` when `data` is neither, or holds several steps or slices.
    """
    data = data.squeeze([name for name in ("step", "slice_seed") if data.sizes.get(name) == 1])
    several = [name for name in ("step", "slice_seed") if name in data.dims]
    if several:
        raise AnalysisError(f"one map is drawn here, the dataset has several along {several}; select one, as in .sel()")
    absent = [axis for axis in POINT if axis not in data.coords]
    if absent:
        raise AnalysisError(f"the dataset has no coordinate {' and no '.join(absent)}; give a map or a landscape")
    lacking = [axis for axis in POINT if axis not in data.dims]
    if lacking:
        data = data.expand_dims(lacking)
    if "prompt" not in data.dims:
        if "reward" not in data:
            raise AnalysisError(f"the dataset is no map: it has no 'reward', but {', '.join(map(str, data.data_vars))}")
        return data.sortby(list(POINT))
    return _reduce(data, list(names)).sortby(list(POINT))


def _reduce(data: xr.Dataset, names: list[str]) -> xr.Dataset:
    check_landscape(data)
    rollouts = data.sizes["rollout"] if "rollout" in data.dims else int(data.attrs["rollouts"])
    helpers = {"base_tokens", "tokens", "rollouts", "successes", "reward", "kl_k1"}
    wanted = helpers | {_RAW.get(name, name) for name in names}
    reduced = per_prompt(data[[name for name in data.data_vars if name in wanted]])
    out: dict[str, xr.DataArray] = {"radius": radius(reduced)}
    for name in names:
        source = _RAW.get(name, name)
        if name == "difference":
            if not _has_origin(reduced):
                continue
            pair = difference_from_origin(reduced["reward"])
        elif name in ("pass_1", "pass_k"):
            pair = pass_at_k(reduced, 1 if name == "pass_1" else rollouts)
        elif name == "surrogate" and {"surrogate", "tokens"} <= set(reduced.data_vars):
            pair = surrogate(reduced)
        elif name in _MEANS and source in reduced:
            pair = point_mean(reduced[source])
        else:
            continue
        out[name], out[f"{name}_se"] = pair["mean"], pair["standard_error"]
    attrs = data.attrs | {"prompts": data.sizes["prompt"], "rollouts": rollouts}
    return xr.Dataset(out, attrs=attrs).drop_vars("prompt", errors="ignore")


def _has_origin(data: xr.Dataset) -> bool:
    return all(bool((data[axis] == 0).any()) for axis in POINT)


def plane(map_: xr.Dataset, name: str) -> np.ndarray:
    """Values as an image, shape (beta, alpha): rows are y, so that α lies on the horizontal axis."""
    values = map_[name]
    if set(values.dims) != set(POINT):
        raise AnalysisError(f"{name!r} has dims {values.dims}, expected (alpha, beta)")
    return values.transpose("beta", "alpha").values.astype(float)


def at_origin(map_: xr.Dataset, name: str) -> float:
    """The value at the origin; NaN when the grid has none."""
    return float(map_[name].sel(alpha=0.0, beta=0.0)) if _has_origin(map_) else np.nan


def require(map_: xr.Dataset, name: str) -> bool:
    """Whether the map holds `name`; raises `AnalysisError` for a name that no map has."""
    if name in map_:
        return True
    if name in LABELS:
        return False
    raise AnalysisError(f"a map has no quantity {name!r}; this one has {', '.join(map(str, map_.data_vars))}")


def label_of(map_: xr.Dataset, name: str) -> str:
    """Label with units of a map's quantity."""
    attrs = map_[name].attrs if name in map_ else {}
    if name == "pass_k":
        found = re.search(r"pass@\d+", attrs.get("long_name", ""))
        return found[0] if found else f"pass@{map_.attrs.get('rollouts', 'k')}"
    if name == "reward":
        return reward_label(map_.attrs)
    if name in LABELS:
        return LABELS[name]
    units = attrs.get("units", "1")
    return attrs.get("long_name", name) + (f" ({units})" if units not in ("1", "") else "")


def reward_label(attrs: Mapping[Any, Any]) -> str:
    """Label of the mean reward; a control (`reward_mode` other than the verifier's) is named."""
    mode = attrs.get("reward_mode", "verifier")
    return LABELS["reward"] if mode == "verifier" else f"mean {mode} reward (a control)"


def edges(values: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cell borders half-way between the points; a single row gets a visible thickness that means nothing."""
    if len(values) == 1:
        half = float(np.ptp(other)) / 8 or 0.5
        return np.array([values[0] - half, values[0] + half])
    middle = (values[1:] + values[:-1]) / 2
    return np.concatenate([[2 * values[0] - middle[0]], middle, [2 * values[-1] - middle[-1]]])


def borders(map_: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Cell borders along α and β."""
    alpha, beta = (map_[axis].values.astype(float) for axis in POINT)
    return edges(alpha, beta), edges(beta, alpha)


def image_aspect(map_: xr.Dataset) -> float:
    """Height by width of the map's image."""
    alpha, beta = (np.sort(np.atleast_1d(map_[axis].values).astype(float)) for axis in POINT)
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
        (ax.xaxis, ax.yaxis), ("α", "β"), (map_[a].values for a in POINT), borders(map_), strict=True
    ):
        direction, of = ("δ", "alpha") if name == "α" else ("η", "beta")
        words = re.split(r"; | of ", str(map_.attrs.get(f"direction_{of}", "random")))[0]
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
    """Round contour levels strictly between 0 and the largest KL; k1 may lie slightly below 0 near the origin."""
    if not np.isfinite(kl).any():
        return []
    top = float(np.nanmax(kl))
    return (
        [
            float(level)
            for level in MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(0.0, top)
            if 0 < level < top
        ]
        if top > 0
        else []
    )


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
    alpha, beta = (map_[axis].values for axis in POINT)
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


def heading(map_: xr.Dataset, *, size: bool = True) -> str:
    """`step 10, slice 0, 1024 prompts × 16 rollouts`, as far as the map knows."""
    parts = [f"{word} {int(map_[name])}" for name, word in (("step", "step"), ("slice_seed", "slice")) if name in map_]
    if size and {"prompts", "rollouts"} <= set(map_.attrs):
        parts.append(f"{map_.attrs['prompts']} prompts × {map_.attrs['rollouts']} rollouts")
    if map_.attrs.get("reward_mode", "verifier") != "verifier":
        parts.append(f"{map_.attrs['reward_mode']} reward")
    return ", ".join(parts)
