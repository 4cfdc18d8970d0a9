"""On which grid the correlations of each dataset are computed, where progressive sweeps stopped at other grids."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.datasets import RunFile
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.schema import PROGRESSIVE

Grid = tuple[np.ndarray, np.ndarray]


def common_grids(files: list[RunFile], designs: list[xr.Dataset], notes: list[str]) -> list[Grid]:
    """The grid on which each dataset's correlations are computed.

    That of its points, or, of a progressive sweep, the finest known one around them: its full grid where its record has
    the axes, or that of another progressive dataset of the run. So snapshots are compared on the same grid.
    """
    own = [(design["alpha"].values, design["beta"].values) for design in designs]
    records = [_record(file, design) for file, design in zip(files, designs, strict=True)]
    known = [grid for grid, record in zip(own, records, strict=True) if record is not None]
    for full in (record["full"] for record in records if record and "full" in record):
        if "alpha" in full and "beta" in full:
            known.append((np.asarray(full["alpha"], float), np.asarray(full["beta"], float)))
    found = []
    for file, grid, record in zip(files, own, records, strict=True):
        around = [] if record is None else [other for other in known if _refines(other, grid)]
        finest = max(around, key=grid_size, default=grid)
        if grid_size(finest) > grid_size(grid):
            outcome = record.get("outcome") if record else None
            notes.append(
                f"step {file.step}, slice {file.slice_seed}: a progressive sweep stopped at {_shape(grid)} points"
                f"{f' ({outcome})' if outcome else ''}. Its correlations are those of their interpolation to "
                f"{_shape(finest)} points, with intervals that hold no allowance for what the coarse grid may have "
                "missed; maps and all else are those of its points."
            )
        found.append(finest)
    if any(not (np.array_equal(a, found[0][0]) and np.array_equal(b, found[0][1])) for a, b in found):
        notes.append("The grids differ between datasets, so correlations over training compare different ranges.")
    return found


def _record(file: RunFile, design: xr.Dataset) -> dict[str, Any] | None:
    """The record of a progressive sweep; None where the dataset is not from such a sweep."""
    if PROGRESSIVE not in design.attrs:
        return None
    try:
        record = json.loads(design.attrs[PROGRESSIVE])
    except ValueError as error:
        raise AnalysisError(f"{file.path}: its attribute 'progressive' is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise AnalysisError(f"{file.path}: its attribute 'progressive' is {record!r}, expected a JSON object")
    return record


def _refines(finer: Grid, coarse: Grid) -> bool:
    """Whether `coarse` is some points of `finer`, its ends and the origin among them."""
    return all(
        np.isin(few, many).all() and few.min() == many.min() and few.max() == many.max() and (few == 0).any()
        for few, many in zip(coarse, finer, strict=True)
    )


def grid_size(grid: Grid) -> int:
    return len(grid[0]) * len(grid[1])


def _shape(grid: Grid) -> str:
    return f"{len(grid[0])} × {len(grid[1])}"
