"""From datasets to what is drawn: which snapshots are there, their quantities as maps and images, and their labels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.datasets import check_landscape
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.landscape import (
    difference_from_origin,
    pass_at_k,
    per_prompt,
    point_mean,
    radius,
    surrogate,
)
from rlvr_landscape_analysis.schema import GRID, VERIFIER, paid_by

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
    absent = [axis for axis in GRID if axis not in data.coords]
    if absent:
        raise AnalysisError(f"the dataset has no coordinate {' and no '.join(absent)}; give a map or a landscape")
    lacking = [axis for axis in GRID if axis not in data.dims]
    if lacking:
        data = data.expand_dims(lacking)
    if "prompt" not in data.dims:
        if "reward" not in data:
            raise AnalysisError(f"the dataset is no map: it has no 'reward', but {', '.join(map(str, data.data_vars))}")
        return data.sortby(list(GRID))
    return _reduce(data, list(names)).sortby(list(GRID))


def _reduce(data: xr.Dataset, names: list[str]) -> xr.Dataset:
    check_landscape(data)
    rollouts = data.sizes["rollout"] if "rollout" in data.dims else int(data.attrs["rollouts"])
    helpers = {"base_tokens", "tokens", "surrogate_weight", "rollouts", "successes", "reward", "kl_k1"}
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
    attrs = data.attrs | {
        "prompts": data.sizes["prompt"],
        "rollouts": rollouts,
        "threshold": reduced.attrs["threshold"],
    }
    return xr.Dataset(out, attrs=attrs).drop_vars("prompt", errors="ignore")


def _has_origin(data: xr.Dataset) -> bool:
    return all(bool((data[axis] == 0).any()) for axis in GRID)


def plane(map_: xr.Dataset, name: str) -> np.ndarray:
    """Values as an image, shape (beta, alpha): rows are y, so that α lies on the horizontal axis."""
    values = map_[name]
    if set(values.dims) != set(GRID):
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
    if name in ("pass_1", "pass_k"):
        found = re.search(r"pass@\d+", attrs.get("long_name", ""))
        known = found[0] if found else "pass@1" if name == "pass_1" else f"pass@{map_.attrs.get('rollouts', 'k')}"
        return known + (f" (reward ≥ {map_.attrs['threshold']:g})" if "threshold" in map_.attrs else "")
    if name == "reward":
        return reward_label(map_.attrs)
    if name in LABELS:
        return LABELS[name]
    units = attrs.get("units", "1")
    return attrs.get("long_name", name) + (f" ({units})" if units not in ("1", "") else "")


def reward_label(attrs: Mapping[Any, Any]) -> str:
    """Label of the mean reward; a control (`reward_mode` other than the verifier's) is named."""
    mode = paid_by(attrs)
    return LABELS["reward"] if mode == VERIFIER else f"mean {mode} reward (a control)"


def heading(map_: xr.Dataset, *, size: bool = True) -> str:
    """`step 10, slice 0, 1024 prompts × 16 rollouts`, as far as the map knows."""
    parts = [f"{word} {int(map_[name])}" for name, word in (("step", "step"), ("slice_seed", "slice")) if name in map_]
    if size and {"prompts", "rollouts"} <= set(map_.attrs):
        parts.append(f"{map_.attrs['prompts']} prompts × {map_.attrs['rollouts']} rollouts")
    if paid_by(map_.attrs) != VERIFIER:
        parts.append(f"{paid_by(map_.attrs)} reward")
    return ", ".join(parts)
