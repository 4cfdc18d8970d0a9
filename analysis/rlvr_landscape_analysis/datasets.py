"""Datasets of landscapes on disk: open one, list or open those of a run, and check them.

Two forms of one landscape are accepted everywhere: the dataset as the sweep wrote it, dims (alpha, beta, prompt,
rollout), and its reduction by `landscape.per_prompt`, dims (alpha, beta, prompt), which is sixteen times smaller and
all that the statistics need.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.checksums import find_checksum
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.schema import (
    BASE_FILE,
    ERROR,
    GRID,
    GRID_JOURNAL,
    GRID_POINT_FILE,
    JOURNAL_FILE,
    LANDSCAPE_FILE,
    OK,
    PER_TASK,
    POINTS_FOLDER,
    PROGRESSIVE,
    PROMPT,
    PROMPTS_SHA256,
    ROLLOUT,
    TRUNCATED,
    number_of,
    numbered_glob,
    paid_by,
)

_REBUILT = "copy it again, or run the sweep's command again, which rebuilds it from its points"

NEEDED = ("reward", "kl_k1")
"""Variables without which a dataset is no landscape."""


@dataclass(frozen=True)
class RunFile:
    """One finished dataset of a run."""

    path: Path
    step: int
    slice_seed: int


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever a damaged file makes netCDF and xarray raise inside becomes an `AnalysisError` that names `path`.

    For everything that reads values too: a dataset is read when its values are asked for, long after it was opened.
    """
    try:
        yield
    except (AnalysisError, MemoryError, ImportError):
        raise
    except FileNotFoundError as error:
        raise AnalysisError(f"{path} does not exist") from error
    except Exception as error:  # HDF5, netCDF and xarray raise many kinds of errors for a damaged file
        raise AnalysisError(
            f"{path} cannot be read as netCDF ({type(error).__name__}: {error}): it is damaged or no netCDF; {_REBUILT}"
        ) from error


def check_checksum(path: str | Path) -> None:
    """Raise `AnalysisError` where a netCDF file is not as its checksum says; a file without one passes."""
    with reading(path):
        intact = find_checksum(path)
    if intact is False:
        raise AnalysisError(f"{path} is damaged: its content is not what its checksum says; {_REBUILT}")


def open_landscape(path: str | Path) -> xr.Dataset:
    """One dataset as the sweep wrote it, lazily.

    Raises `AnalysisError` naming file and variable when it is damaged or not a landscape.
    """
    check_checksum(path)
    with reading(path):
        data = xr.open_dataset(path, engine="netcdf4")
    try:
        with reading(path):
            check_landscape(data, str(path))
    except AnalysisError:
        data.close()
        raise
    return data


def check_values(data: xr.Dataset, where: str = "the dataset") -> None:
    """Raise `AnalysisError` where a sweep cannot have written the values, which means that the file is damaged.

    Reads `reward` and `status` (of the points and of the base batch): flags are those of the schema, and a reward is
    missing only where the rollout failed.
    """
    for status, reward in (("status", "reward"), ("base_status", "base_reward")):
        if status not in data:
            continue
        flags = data[status].values
        if not np.isin(flags, (OK, TRUNCATED, ERROR)).all():
            raise AnalysisError(f"{where} is damaged: {status} has values other than {OK}, {TRUNCATED} and {ERROR}")
        lost = int((data[reward].isnull().values & (flags != ERROR)).sum()) if reward in data else 0
        if lost:
            raise AnalysisError(f"{where} is damaged: {lost} values of {reward} are missing where no rollout failed")


def check_landscape(data: xr.Dataset, where: str = "the dataset") -> None:
    """Raise `AnalysisError` unless `data` has the variables and dimensions of a landscape (raw or per prompt)."""
    missing = [name for name in (*NEEDED, *GRID) if name not in data.variables]
    if missing:
        raise AnalysisError(f"{where} is not a landscape dataset: it has no {', '.join(missing)}")
    dims = set(data["reward"].dims)
    lacking = [dim for dim in (*GRID, PROMPT) if dim not in dims]
    if lacking:
        raise AnalysisError(f"{where}: variable 'reward' has no dimension {', '.join(lacking)}")
    for name in GRID:
        values = data[name].values
        if not np.isfinite(values).all() or len(np.unique(values)) != len(values):
            raise AnalysisError(f"{where}: coordinate {name!r} has missing or repeated values")
    if is_reduced(data):
        return
    if ROLLOUT not in dims:
        raise AnalysisError(f"{where}: variable 'reward' has no dimension rollout")
    for name in PER_TASK:
        if data.sizes[name] == 0:
            raise AnalysisError(f"{where}: dimension {name!r} is empty")


def list_run(path: str | Path) -> tuple[list[RunFile], list[str]]:
    """The finished grids of a run directory by step and slice, and a line for each unfinished journal.

    Raises `AnalysisError` when none is finished.
    """
    files, unfinished = list_grids(path)
    if not files:
        detail = f" Unfinished: {'; '.join(unfinished)}." if unfinished else ""
        raise AnalysisError(
            f"{path} holds no finished landscape_step*_slice*.nc.{detail} Run the sweep's command again to finish it."
        )
    return files, unfinished


def list_grids(path: str | Path) -> tuple[list[RunFile], list[str]]:
    """As `list_run`, also where no grid is finished. Raises `AnalysisError` where `path` is no directory."""
    root = Path(path)
    if not root.is_dir():
        raise AnalysisError(f"{root} is not a directory; give the output directory of a sweep")
    found = [(file, LANDSCAPE_FILE.match(file.name)) for file in sorted(root.iterdir())]
    files = [RunFile(file, int(match[1]), int(match[2])) for file, match in found if match]
    finished = {(file.step, file.slice_seed) for file in files}
    unfinished = []
    for folder in sorted(root.iterdir()):
        match = GRID_JOURNAL.match(folder.name)
        if not match or not (folder / JOURNAL_FILE).is_file() or (int(match[1]), int(match[2])) in finished:
            continue
        # A point of a progressive sweep may lie in several files, one per range of prompts.
        names = [GRID_POINT_FILE.fullmatch(file.name) for file in (folder / POINTS_FOLDER).glob("*.nc")]
        done = len({name[1] for name in names if name})
        total = _journal_points(folder)
        of = f" of {total}" if total else ""
        unfinished.append(f"step {int(match[1])}, slice {int(match[2])}: {done}{of} points measured")
    return sorted(files, key=lambda file: (file.step, file.slice_seed)), unfinished


def _journal_points(folder: Path) -> int | None:
    """Points that the last sweep asked for; one that grew has a request of its own."""
    try:
        last = max(folder.glob(numbered_glob(JOURNAL_FILE)), key=number_of)
        axes = json.loads(last.read_text())["axes"]
        return len(axes["alpha"]) * len(axes["beta"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def base_batch_of(folder: Path, prompts: int, completions: int) -> Path | None:
    """The base batch in a journal that a dataset with so many tasks, and completions of each, was made from.

    A sweep that grew has several, and a progressive sweep has more tasks in it than in the dataset. Raises
    `AnalysisError` for a damaged one.
    """
    files = sorted(folder.glob(numbered_glob(BASE_FILE)), key=number_of)
    for path in files if len(files) > 1 else ():
        check_checksum(path)
        with reading(path), xr.open_dataset(path, engine="netcdf4", decode_cf=False) as data:
            tasks, own = data["base_reward"].shape
        if tasks >= prompts and own == completions:
            return path
    return files[0] if len(files) == 1 else None


def open_run(
    path: str | Path, *, steps: Iterable[int] | None = None, slices: Iterable[int] | None = None
) -> xr.Dataset:
    """All snapshots and slices of a run as one lazy dataset, dims (step, slice_seed, alpha, beta, prompt, rollout).

    Variables stay on disk (dask arrays) until they are asked for. A combination that was not measured is missing.
    Raises `AnalysisError` when the files do not belong together: other grids, prompts or variables.
    """
    files, _ = list_run(path)
    wanted_steps, wanted_slices = (None if w is None else set(w) for w in (steps, slices))
    files = [
        file
        for file in files
        if (wanted_steps is None or file.step in wanted_steps)
        and (wanted_slices is None or file.slice_seed in wanted_slices)
    ]
    if not files:
        raise AnalysisError(f"{path} holds no dataset of steps {wanted_steps} and slices {wanted_slices}")
    opened = []
    for file in files:
        check_checksum(file.path)
        with reading(file.path):
            opened.append(xr.open_dataset(file.path, engine="netcdf4", chunks={}))
            check_landscape(opened[-1], str(file.path))
    check_same_design(opened, [str(file.path) for file in files], grids=True)
    by_step: dict[int, list[xr.Dataset]] = {}
    for data in opened:
        by_step.setdefault(int(data["step"]), []).append(data)
    rows = [xr.concat(by_step[step], dim="slice_seed", **_CONCAT) for step in sorted(by_step)]
    return xr.concat(rows, dim="step", **_CONCAT)


_CONCAT: dict[str, Any] = {
    "join": "outer",
    "combine_attrs": "drop_conflicts",
    "coords": "minimal",
    "compat": "override",
}


def check_same_design(datasets: Iterable[xr.Dataset], names: Iterable[str], *, grids: bool = False) -> None:
    """Raise `AnalysisError` unless the datasets share prompts, what paid them and variables.

    Progressive sweeps (attribute `progressive`) may have stopped at different numbers of the same prompts. With
    `grids`, these and the coordinates alpha and beta must agree as well.
    """
    first: tuple[str, xr.Dataset] | None = None
    for name, data in zip(names, datasets, strict=True):
        if first is None:
            first = name, data
            continue
        reference_name, reference = first
        both = f"{reference_name} and {name}"
        progressive = not grids and all(PROGRESSIVE in d.attrs for d in (reference, data))
        known = progressive and PROMPTS_SHA256 in data.attrs
        if data.sizes[PROMPT] != reference.sizes[PROMPT] and not known:
            raise AnalysisError(f"{both} have {reference.sizes['prompt']} and {data.sizes['prompt']} prompts")
        paid = [paid_by(d.attrs) for d in (reference, data)]
        if paid[0] != paid[1]:
            raise AnalysisError(f"{both} were paid by different rewards ({paid[0]} and {paid[1]}); analyse them apart")
        hashes = [d.attrs.get(PROMPTS_SHA256) for d in (reference, data)]
        if hashes[0] != hashes[1]:
            raise AnalysisError(f"{both} were measured on different prompts (prompts_sha256 differs)")
        if set(map(str, data.data_vars)) ^ set(map(str, reference.data_vars)):
            odd = ", ".join(sorted(set(map(str, data.data_vars)) ^ set(map(str, reference.data_vars))))
            raise AnalysisError(f"{both} have different variables ({odd}); they come from different versions")
        if grids and any(not np.array_equal(data[axis].values, reference[axis].values) for axis in GRID):
            raise AnalysisError(f"{both} have different grids; open them one by one, or choose steps= and slices=")


def is_reduced(data: xr.Dataset) -> bool:
    """Whether `data` is what `per_prompt` returns."""
    return data.attrs.get("reduced") == "per_prompt"
