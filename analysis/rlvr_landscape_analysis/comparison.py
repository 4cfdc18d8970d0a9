"""Two runs, or two datasets, side by side: each quantity on both sides, and their difference with an interval.

What is compared is what both sides measured alike: the grids and censuses of the same step (two single datasets may be
of different steps), at the radii that both have. Where the prompts are the same, the difference is paired by prompt:
what both sides owe to an easy or a hard prompt cancels. Prompts are sampled, and so are the directions of a census; the
directions of a grid are taken as they are (two_way.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.designs import (
    DESIGN_FILE,
    CensusPoints,
    base_values,
    census_points,
    list_designs,
    open_design,
)
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.landscape import per_prompt
from rlvr_landscape_analysis.schema import GRID, LANDSCAPE_FILE, PROMPT, PROMPTS_SHA256, paid_by
from rlvr_landscape_analysis.statistics.comparable import at, common_radii
from rlvr_landscape_analysis.statistics.path import path_points
from rlvr_landscape_analysis.statistics.resample import MIN_PROMPTS
from rlvr_landscape_analysis.statistics.two_way import MIN_DIRECTIONS, TwoWay, means, prompt_means

Key = tuple[str, int, int]
"""Design, step, seed of the slice (0 where a design has none)."""
QUANTITIES = {
    "reward": "mean reward",
    "change": "reward minus the checkpoint's",
    "kl": "KL from the checkpoint (nat)",
}
"""Quantity → what it is called."""
COMPARED = ("grid", "census", "path", "boundary")
"""Designs that are compared; of a boundary, the checkpoint alone."""


@dataclass(frozen=True)
class Difference:
    """One quantity at one radius on both sides."""

    landscape: str
    """What was measured: design and step."""
    radius: float
    """Distance from the checkpoint: of a grid in its own unit, of a census by the norm of the weights; of a path its
    position, which is negative towards step 0; 0: the checkpoint itself."""
    quantity: str
    """A key of `QUANTITIES`."""
    first: TwoWay
    second: TwoWay
    paired: bool
    """Whether both sides have the same prompts."""
    prompts: tuple[int, int]
    directions: tuple[int, int]
    """Random directions of a census; (0, 0) elsewhere."""

    @property
    def difference(self) -> TwoWay:
        """Second minus first."""
        return self.second - self.first

    @property
    def reason(self) -> str:
        """Why there is no interval; empty where there is one."""
        if min(self.prompts) < MIN_PROMPTS:
            return f"an interval needs {MIN_PROMPTS} prompts, there are {min(self.prompts)}"
        if self.directions != (0, 0) and min(self.directions) < MIN_DIRECTIONS:
            return f"an interval needs {MIN_DIRECTIONS} directions, there are {min(self.directions)}"
        return ""


@dataclass(frozen=True)
class Comparison:
    """Everything that two sides have in common."""

    names: tuple[str, str]
    rows: list[Difference]
    confidence: float
    notes: list[str] = field(default_factory=list)


def compare(first: str | Path, second: str | Path, confidence: float = 0.95) -> Comparison:
    """Compare two output directories of sweeps, or two of their datasets.

    Raises `AnalysisError` for what cannot be read, for sides that have nothing in common, and for differences that make
    their numbers incomparable: other tasks, another sampler, another objective, another reward.
    """
    if not 0.5 <= confidence < 1:
        raise AnalysisError(f"confidence {confidence:g} must lie between 0.5 and 1")
    paths = Path(first), Path(second)
    sides = tuple(_datasets(path) for path in paths)
    names = _names(*paths)
    pairs, notes = _pairs(sides[0], sides[1], names)
    rows: list[Difference] = []
    read = {"grid": _of_grids, "path": _of_paths}
    for one, other in pairs:
        files = sides[0][one], sides[1][other]
        with _opened(one, files[0]) as a, _opened(other, files[1]) as b:
            check_comparable(a, b, files)
            label = _label(one, other)
            rows += read[one[0]](a, b, label, notes) if one[0] in read else _of_designs(a, b, one[0], label, notes)
    return Comparison(names, rows, confidence, list(dict.fromkeys(notes)))


def _names(first: Path, second: Path) -> tuple[str, str]:
    """The shortest ends of both paths that differ."""
    one, other = first.resolve().parts, second.resolve().parts
    if one == other:
        raise AnalysisError(f"{first} and {second} are the same")
    for length in range(1, max(len(one), len(other)) + 1):
        names = "/".join(one[-length:]).removesuffix(".nc"), "/".join(other[-length:]).removesuffix(".nc")
        if names[0] != names[1]:
            return names
    raise AssertionError("different paths differ somewhere")


def _datasets(path: Path) -> dict[Key, Path]:
    """The finished datasets of a directory, or the one file."""
    if path.is_file():
        if match := LANDSCAPE_FILE.match(path.name):
            return {("grid", int(match[1]), int(match[2])): path}
        if match := DESIGN_FILE.fullmatch(path.name):
            return {(match[1], int(match[2]), 0): path}
        raise AnalysisError(
            f"{path} has no name that a sweep gives to a dataset, such as landscape_step000000_slice0.nc"
        )
    if not path.is_dir():
        raise AnalysisError(f"{path} does not exist; give the output directory of a sweep, or one of its datasets")
    matches = ((file, LANDSCAPE_FILE.match(file.name)) for file in sorted(path.iterdir()))
    found = {("grid", int(match[1]), int(match[2])): file for file, match in matches if match}
    found |= {(design, step, 0): file for design, files in list_designs(path).items() for step, file in files.items()}
    if not found:
        raise AnalysisError(f"{path} holds no finished dataset; run its sweep to the end, or name another directory")
    return found


def _pairs(
    first: Mapping[Key, Path], second: Mapping[Key, Path], names: tuple[str, str]
) -> tuple[list[tuple[Key, Key]], list[str]]:
    """Datasets that belong together, and what is left out."""
    alone = list(first), list(second)
    if len(first) == len(second) == 1 and alone[0][0][0] == alone[1][0][0] in COMPARED:
        return [(alone[0][0], alone[1][0])], []
    common = sorted(key for key in first.keys() & second.keys() if key[0] in COMPARED)
    if not common:
        has = ("; ".join(_label(key, key) for key in sorted(side)) for side in (first, second))
        raise AnalysisError(
            f"nothing to compare: {names[0]} has {next(has)}; {names[1]} has {next(has)}. Both need the same design at "
            f"the same step ({', '.join(COMPARED)}), or name one dataset of each"
        )
    notes = [
        f"Only in {name}, left out: {_label(key, key)}."
        for name, side in zip(names, (first, second), strict=True)
        for key in sorted(side)
        if key not in common
    ]
    return [(key, key) for key in common], notes


def _label(one: Key, other: Key) -> str:
    def said(key: Key) -> str:
        return f"step {key[1]}" + (f", slice {key[2]}" if key[0] == "grid" else "")

    return f"{one[0]}, {said(one)}" if one == other else f"{one[0]}, {said(one)} / {said(other)}"


def _opened(key: Key, file: Path) -> xr.Dataset:
    if key[0] != "grid":
        return open_design(file, key[0])
    from rlvr_landscape_analysis.datasets import open_landscape

    return open_landscape(file)


def check_comparable(first: xr.Dataset, second: xr.Dataset, files: Sequence[Path]) -> None:
    """Raise `AnalysisError` naming every setting that makes the numbers of two datasets incomparable."""
    sides = [_settings(data) for data in (first, second)]
    keys = sorted(sides[0].keys() | sides[1].keys())
    problems = [
        f"  {key}: {sides[0].get(key)!r} and {sides[1].get(key)!r}"
        for key in keys
        if sides[0].get(key) != sides[1].get(key)
    ]
    if problems:
        listed = "\n".join(problems)
        raise AnalysisError(f"{files[0]} and {files[1]} cannot be compared, they measured different things:\n{listed}")


def _settings(data: xr.Dataset) -> dict[str, Any]:
    """What has to agree: the tasks (not which of them were drawn), the sampler, the objective, the reward."""
    try:
        configuration = json.loads(str(data.attrs.get("configuration", "{}")))
    except ValueError:
        configuration = {}
    taskset = {key: value for key, value in configuration.get("env", {}).get("taskset", {}).items() if key != "seed"}
    found = {"reward": paid_by(data.attrs), "taskset": data.attrs.get("taskset")}
    tables = (
        ("env.taskset", taskset),
        ("sampling", configuration.get("sampling", {})),
        ("surrogate", configuration.get("surrogate", {})),
        ("env", {"pass_threshold": configuration.get("env", {}).get("pass_threshold")}),
    )
    return found | {f"{name}.{key}": value for name, table in tables for key, value in table.items()}


def _same_prompts(first: xr.Dataset, second: xr.Dataset, label: str, notes: list[str]) -> bool:
    hashes = [data.attrs.get(PROMPTS_SHA256) for data in (first, second)]
    same = hashes[0] is not None and hashes[0] == hashes[1] and first.sizes[PROMPT] == second.sizes[PROMPT]
    if not same:
        notes.append(f"{label}: the prompts are not the same, so its differences are not paired.")
    return same


def _of_grids(first: xr.Dataset, second: xr.Dataset, label: str, notes: list[str]) -> list[Difference]:
    """Means over the points of equal radius that lie on both grids."""
    same = _same_prompts(first, second, label, notes)
    reduced = [per_prompt(data)[["reward", "kl_k1"]].transpose(*GRID, PROMPT).load() for data in (first, second)]
    usable = [_complete(data) for data in reduced]
    if same:
        usable = [usable[0] & usable[1]] * 2
    shells = [_shells(data) for data in reduced]
    rows = []
    for radius in (common := [radius for radius in shells[0] if radius in shells[1]]):
        values = []
        for data, own, prompts in zip(reduced, shells, usable, strict=True):
            reward, kl = (data[name].values[..., prompts] for name in ("reward", "kl_k1"))
            found = {"reward": reward[own[radius]].mean(0), "kl": kl[own[radius]].mean(0)}
            values.append(found | {"change": found["reward"] - reward[own[0.0]][0]})
        counts = int(usable[0].sum()), int(usable[1].sum())
        keys = [("prompts", 0 if same else side) for side in (0, 1)]
        for quantity in ("reward", "change", "kl") if radius else ("reward",):
            sides = [prompt_means(own[quantity], key) for own, key in zip(values, keys, strict=True)]
            rows.append(Difference(label, radius, quantity, sides[0], sides[1], same, counts, (0, 0)))
    left = len(shells[0]) + len(shells[1]) - 2 * len(common)
    if left:
        notes.append(f"{label}: {left} radii are on one grid only and are left out.")
    if any(not own.all() for own in usable):
        notes.append(f"{label}: prompts that are missing at some point are left out.")
    return rows


def _complete(data: xr.Dataset) -> np.ndarray:
    """Which prompts have values at all points, bool (prompts,)."""
    return np.logical_and.reduce([np.isfinite(data[name].values).all((0, 1)) for name in ("reward", "kl_k1")])


def _shells(data: xr.Dataset) -> dict[float, np.ndarray]:
    """Radius → which points have it, bool (alpha, beta); the same radius of two grids is the same number."""
    radius = np.hypot(data["alpha"].values[:, None], data["beta"].values[None])
    rounded = np.vectorize(lambda value: float(f"{value:.9g}"))(radius)
    return {float(value): rounded == value for value in np.unique(rounded)}


def _of_paths(first: xr.Dataset, second: xr.Dataset, label: str, notes: list[str]) -> list[Difference]:
    """Each path that both have, at the positions that both have."""
    same = _same_prompts(first, second, label, notes)
    sides = [path_points(data) for data in (first, second)]
    if same:  # the prompts of a dataset are those of all its paths
        both = sides[0][0].kept & sides[1][0].kept
        sides = [path_points(data, prompts=both) for data in (first, second)]
    named = [{one.name: one for one in side} for side in sides]
    keys = [("prompts", 0 if same else side) for side in (0, 1)]
    rows, left = [], sorted(named[0].keys() ^ named[1].keys())
    for name in (name for name in named[0] if name in named[1]):
        pair = named[0][name], named[1][name]
        counts = pair[0].reward.shape[1], pair[1].reward.shape[1]
        for position in np.intersect1d(pair[0].position, pair[1].position):
            places = [int(np.flatnonzero(one.position == position)[0]) for one in pair]
            for quantity in ("reward", "change", "kl") if position else ("reward",):
                one, other = (
                    prompt_means(getattr(side, quantity)[place], key)
                    for side, place, key in zip(pair, places, keys, strict=True)
                )
                rows.append(Difference(f"{label}, {name}", float(position), quantity, one, other, same, counts, (0, 0)))
    if left:
        notes.append(f"{label}: only on one side, left out: {', '.join(left)}.")
    if not rows:
        notes.append(f"{label}: the two have no path with a position in common.")
    return rows


def _of_designs(first: xr.Dataset, second: xr.Dataset, design: str, label: str, notes: list[str]) -> list[Difference]:
    """The checkpoint itself, and a census at the relative lengths that both have."""
    same = _same_prompts(first, second, label, notes)
    own = [base_values(data) for data in (first, second)]
    usable = [np.isfinite(values) for values in own]
    if same:
        usable = [usable[0] & usable[1]] * 2
    keys = [("prompts", 0 if same else side) for side in (0, 1)]
    sides = [prompt_means(own[side][usable[side]], ("checkpoint", keys[side])) for side in (0, 1)]
    counts = int(usable[0].sum()), int(usable[1].sum())
    rows = [Difference(label, 0.0, "reward", sides[0], sides[1], same, counts, (0, 0))]
    if design != "census":
        return rows
    points = census_points([first, second]) if same else [census_points([data])[0] for data in (first, second)]
    for target in common_radii(points):
        weights = [at(one, np.array([target])) for one in points]
        for quantity in ("reward", "change", "kl"):
            both = [
                _of_census(one, weight, quantity, side, same)
                for side, (one, weight) in enumerate(zip(points, weights, strict=True))
            ]
            one, other = points
            used = (one.prompts, other.prompts), (one.directions, other.directions)
            rows.append(Difference(label, float(target), quantity, both[0], both[1], same, *used))
    if not len(common_radii(points)):
        notes.append(f"{label}: the two censuses have no length in common (realised, by the norm of the weights).")
    return rows


def _of_census(points: CensusPoints, weight: np.ndarray, quantity: str, side: int, same: bool) -> TwoWay:
    """Mean over directions, both ways along each, and prompts, at the radii that `weight` names."""
    values = points.change if quantity == "change" else points.values[quantity]
    at_length = np.tensordot(weight / weight.sum(), values, axes=1).mean(1)
    # Directions of two different weights are two samples, unless their seeds say that they are the same ones.
    return means(at_length, points.directions_key, (points.prompts_key, 0 if same else side))
