"""Reading datasets of the designs `census`, `path` and `boundary`, and reducing their rollouts to values per prompt.

A *census* holds random directions, each in both senses at several radii. A *path* holds policies along directions with
a meaning. A *boundary* holds the checkpoint itself with many rollouts. docs/dataset.md has their dimensions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.datasets import check_checksum, reading
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.schema import (
    BASE_FILE,
    BASE_ROLLOUT,
    ERROR,
    JOURNAL_FILE,
    POINTS_FOLDER,
    PROMPT,
    ROLLOUT,
    SOLVED,
)

POINT_DIMS = {"census": ("direction", "sign", "radius"), "path": ("path", "position"), "boundary": ()}
"""Dimensions of a point, by design."""
NEEDED = {
    "census": ("reward", "kl_k1", "base_reward"),
    "path": ("reward", "kl_k1", "base_reward"),
    "boundary": ("base_reward",),
}
DESIGN_FILE = re.compile(r"(census|path|boundary)_step(\d+)\.nc$")
DESIGN_JOURNAL = re.compile(r"step(\d+)_(census|path|boundary)")
_CENSUS_POINT = re.compile(r"d(\d+)_s(\d+)_r(\d+)\.nc")
_ROLLOUTS = (ROLLOUT, BASE_ROLLOUT, "rollout_base")


def open_design(path: str | Path, design: str | None = None) -> xr.Dataset:
    """One dataset of a census, path or boundary, lazily; of `design` where it is named.

    Raises `AnalysisError` naming the file and what it lacks.
    """
    check_checksum(path)
    with reading(path):
        data = xr.open_dataset(path, engine="netcdf4")
    try:
        check_design(data, design or str(data.attrs.get("design", "")), str(path))
    except AnalysisError:
        data.close()
        raise
    return data


def check_design(data: xr.Dataset, design: str, where: str = "the dataset") -> None:
    """Raise `AnalysisError` unless `data` is a dataset of `design` with what its statistics need."""
    found = str(data.attrs.get("design", ""))
    if design not in POINT_DIMS:
        known = ", ".join(POINT_DIMS)
        raise AnalysisError(f"{where} is of the design {design!r}; a census, path or boundary is needed ({known})")
    if found != design:
        raise AnalysisError(f"{where} is of the design {found or 'grid'!r}, not of {design!r}")
    for name in NEEDED[design]:
        if name not in data:
            raise AnalysisError(f"{where} is no {design}: it has no variable {name!r}")
        dims = PROMPT if name.startswith("base_") else (*POINT_DIMS[design], PROMPT)
        lacking = [dim for dim in ([dims] if isinstance(dims, str) else dims) if dim not in data[name].dims]
        if lacking:
            raise AnalysisError(f"{where}: variable {name!r} has no dimension {', '.join(lacking)}")
    if "step" not in data.coords and "step" not in data:
        raise AnalysisError(f"{where} does not say which step it was measured at: it has no scalar 'step'")
    if design == "census" and sorted(np.sign(data["sign"].values).tolist()) != [-1, 1]:
        raise AnalysisError(
            f"{where}: a census walks every direction both ways (sign = +1, -1), this one has "
            f"sign = {data['sign'].values.tolist()}"
        )


def list_designs(path: str | Path) -> dict[str, dict[int, Path]]:
    """Design → step → file of the finished censuses, paths and boundaries in a directory; empty where none is."""
    found: dict[str, dict[int, Path]] = {design: {} for design in POINT_DIMS}
    for file in sorted(Path(path).iterdir()):
        if match := DESIGN_FILE.fullmatch(file.name):
            found[match[1]][int(match[2])] = file
    return found


@dataclass(frozen=True)
class Unfinished:
    """A census, path or boundary whose journal is there and whose dataset is not."""

    folder: Path
    design: str
    step: int
    done: int
    """Points measured so far."""
    total: int
    """Points in all; 0 where the journal does not say."""

    def __str__(self) -> str:
        if self.design == "boundary":
            return f"step {self.step}, boundary: not finished"
        of = f" of {self.total}" if self.total else ""
        return f"step {self.step}, {self.design}: {self.done}{of} points measured"


def list_unfinished(path: str | Path) -> list[Unfinished]:
    """The censuses, paths and boundaries of a directory that are being measured, or were interrupted."""
    root = Path(path)
    finished = list_designs(root)
    found = []
    for folder in sorted(root.iterdir()):
        match = DESIGN_JOURNAL.fullmatch(folder.name)
        if match and (folder / JOURNAL_FILE).is_file() and int(match[1]) not in finished[match[2]]:
            try:
                total = math.prod(map(len, json.loads((folder / JOURNAL_FILE).read_text())["axes"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                total = 0
            done = len(list((folder / POINTS_FOLDER).glob("[!.]*.nc")))
            found.append(Unfinished(folder, match[2], int(match[1]), done, total if match[2] != "boundary" else 0))
    return found


def partial_census(found: Unfinished) -> xr.Dataset | None:
    """An unfinished census as far as it is measured, missing elsewhere; None where nothing can be said yet.

    Its directions have no seeds and its radii no unit but ‖θ‖: the dataset, which has them, is written at the end.
    """
    try:
        journal = json.loads((found.folder / JOURNAL_FILE).read_text())
        axes = {name: np.asarray(journal["axes"][name]) for name in POINT_DIMS["census"]}
        with xr.open_dataset(found.folder / BASE_FILE, engine="netcdf4") as base:
            data = base[[name for name in ("base_reward", "base_status") if name in base]].load()
        shape, unit = tuple(map(len, axes.values())), journal["configuration"]["census"]["unit"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    values: dict[str, np.ndarray] = {}
    dims: dict[str, tuple] = {}
    for file in sorted((found.folder / POINTS_FOLDER).glob("[!.]*.nc")):
        match = _CENSUS_POINT.fullmatch(file.name)
        if match is None:
            continue
        with reading(file), xr.open_dataset(file, engine="netcdf4") as point:
            for name in ("reward", "kl_k1", "surrogate", "realised_step"):
                if name in point:
                    own = point[name].values.astype(np.float64)
                    dims[name] = (*axes, *point[name].dims)
                    values.setdefault(name, np.full((*shape, *own.shape), np.nan))[tuple(map(int, match.groups()))] = (
                        own
                    )
    if not {"reward", "kl_k1"} <= set(values):
        return None
    data = data.assign({name: (dims[name], array) for name, array in values.items()}).assign_coords(axes)
    data = data.assign_coords(step=found.step, radius=np.asarray(axes["radius"], float))
    attrs = {"design": "census", "radius_unit": unit, "prompts_sha256": journal.get("prompts_sha256", "")}
    return data.assign_attrs(attrs)


def prompt_values(values: xr.DataArray, dims: Sequence[str]) -> np.ndarray:
    """Means over rollouts in float64 with the dimensions (*dims, prompt); NaN where no rollout is left."""
    over = [dim for dim in values.dims if dim in _ROLLOUTS]
    mean = values.astype(np.float64).mean(over, skipna=True) if over else values.astype(np.float64)
    return mean.transpose(*dims, PROMPT).values


def base_values(data: xr.Dataset) -> np.ndarray:
    """Mean reward of the checkpoint's own rollouts, shape (prompts,); failed rollouts are left out."""
    reward = data["base_reward"]
    if "base_status" in data:
        reward = reward.where(data["base_status"] != ERROR)
    return prompt_values(reward, ())


@dataclass(frozen=True)
class CensusPoints:
    """A census as arrays without missing values."""

    step: int
    unit: str
    """What `radius` is measured in: `displacement` (of the run so far, ‖θ_t − θ_0‖) or `theta` (‖θ_t‖)."""
    radius: np.ndarray
    """(radii,)"""
    relative: np.ndarray
    """Realised length of the move by ‖θ‖, mean over directions, (radii,); NaN where it is not known."""
    displacement: np.ndarray
    """The same in displacements of the run, (radii,); NaN where there is no run."""
    length: np.ndarray
    """Realised length by ‖θ‖ (or the nominal radius, where it is not known) of every point, (radii, K, 2)."""
    values: dict[str, np.ndarray]
    """`reward`, `kl`, and where measured `surrogate`: (radii, K, 2, N), signs +1 and −1."""
    base: np.ndarray
    """Mean reward of the checkpoint's own rollouts, (N,)."""
    directions_key: tuple
    prompts_key: tuple
    all_directions: int
    all_prompts: int

    @property
    def change(self) -> np.ndarray:
        """Reward minus the checkpoint's, paired by prompt, (radii, K, 2, N)."""
        return self.values["reward"] - self.base

    @property
    def directions(self) -> int:
        """K, pairs of policies that were used."""
        return self.values["reward"].shape[1]

    @property
    def prompts(self) -> int:
        """N, prompts that were used."""
        return self.values["reward"].shape[3]


def census_points(
    censuses: Iterable[xr.Dataset], *, estimator: str = "k1", run: str = "", names: Sequence[str] = ()
) -> list[CensusPoints]:
    """Censuses of one run as arrays, on the prompts (and, if paired, the directions) that all of them have.

    A direction with more than half of its values missing at some point is left out, then a prompt that is missing at
    any remaining point. Directions are the same where their seeds are (`direction_seed`, `direction_axis`); datasets
    without seeds are distinguished by `run` and, unless they are paired, by step. Raises `AnalysisError` where nothing
    is left or the datasets do not belong together.
    """
    datasets = list(censuses)
    labels = list(names) or [f"census of step {int(data['step'])}" for data in datasets]
    raw, usable_pairs = [], []
    for data, label in zip(datasets, labels, strict=True):
        check_design(data, "census", label)
        ordered = data.sel(sign=sorted(data["sign"].values, key=lambda sign: -sign))
        dims = ("radius", "direction", "sign")
        kl_name = f"kl_{estimator}"
        if kl_name not in ordered:
            raise AnalysisError(f"{label} has no KL estimator {estimator!r}")
        arrays = {"reward": prompt_values(ordered["reward"], dims), "kl": prompt_values(ordered[kl_name], dims)}
        if "surrogate" in ordered:
            arrays["surrogate"] = prompt_values(ordered["surrogate"], dims)
        good = np.logical_and.reduce([np.isfinite(values) for values in arrays.values()])
        usable_pairs.append((good.mean(-1) >= 0.5).all((0, 2)))
        raw.append((ordered, arrays, good, base_values(ordered)))
    if not raw:
        return []
    hashes = {str(data.attrs.get("prompts_sha256")) for data in datasets}
    if len(hashes) > 1 or len({data.sizes[PROMPT] for data in datasets}) > 1:
        raise AnalysisError(f"{' and '.join(labels[:2])} were measured on different prompts; analyse them apart")
    paired = (
        all(data.attrs.get("directions") == "paired" for data in datasets)
        and len({len(pairs) for pairs in usable_pairs}) == 1
    )
    if paired:
        usable_pairs = [np.logical_and.reduce(usable_pairs)] * len(raw)
    prompts = np.ones(datasets[0].sizes[PROMPT], bool)
    for (_, _, good, base), pairs, label in zip(raw, usable_pairs, labels, strict=True):
        if not pairs.any():
            raise AnalysisError(f"{label}: no direction was measured both ways at all radii")
        prompts &= good[:, pairs].all((0, 1, 2)) & np.isfinite(base)
    if not prompts.any():
        raise AnalysisError(f"{labels[0]}: no prompt has values at all points")
    prompts_key = ("prompts", hashes.pop(), prompts.tobytes())
    found = []
    for (data, arrays, _, base), pairs in zip(raw, usable_pairs, strict=True):
        step = int(data["step"])
        radius = data["radius"].values.astype(float)
        relative = _point_values(data, "realised_step", pairs)
        displacement = _point_values(data, "displacement_radius", pairs)
        unit = str(data.attrs.get("radius_unit", "theta"))
        nominal = np.broadcast_to(radius[:, None, None], relative.shape)
        found.append(
            CensusPoints(
                step=step,
                unit=unit,
                radius=radius,
                relative=relative.mean((1, 2)),
                displacement=displacement.mean((1, 2)),
                length=np.where(np.isfinite(relative), relative, nominal),
                values={name: np.ascontiguousarray(own[:, pairs][..., prompts]) for name, own in arrays.items()},
                base=base[prompts],
                directions_key=_directions_key(data, pairs, (run, "paired" if paired else step)),
                prompts_key=prompts_key,
                all_directions=len(pairs),
                all_prompts=len(prompts),
            )
        )
    return found


def _directions_key(data: xr.Dataset, pairs: np.ndarray, otherwise: tuple) -> tuple:
    seeds = [data[name].values[pairs] for name in ("direction_seed", "direction_axis") if name in data]
    if not seeds:
        return ("directions", *otherwise, pairs.tobytes())
    return ("directions", *(tuple(own.tolist()) for own in seeds))


def _point_values(data: xr.Dataset, name: str, pairs: np.ndarray) -> np.ndarray:
    if name not in data:
        return np.full((data.sizes["radius"], int(pairs.sum()), 2), np.nan)
    return data[name].transpose("radius", "direction", "sign").values.astype(float)[:, pairs]


def successes(data: xr.Dataset, threshold: float = SOLVED) -> tuple[np.ndarray, np.ndarray]:
    """Solved and valid rollouts of the checkpoint per prompt, int (prompts,) each; reward ≥ `threshold` solves."""
    reward = data["base_reward"]
    if "base_status" in data:
        reward = reward.where(data["base_status"] != ERROR)
    over = [dim for dim in reward.dims if dim != PROMPT]
    solved = (reward >= threshold - 1e-9).sum(over)
    return solved.values.astype(int), reward.notnull().sum(over).values.astype(int)
