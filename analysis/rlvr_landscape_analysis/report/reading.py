"""Numbers of a `RunAnalysis` as cells of a table, with their intervals and reasons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.report.table import Cell, Value


def value_of(
    data: xr.Dataset, name: str, where: Mapping | None = None, why: str = "", *, interval: str | None = None
) -> Value:
    """A scalar of the analysis with its interval and reason; tolerates that any of them is absent."""
    bounds_name = interval or f"{name}_interval"
    if name not in data:
        return Value(None, bounded=bounds_name in data, reason=why or "not part of this analysis")
    number = _pick(data[name], where)
    low = high = None
    if bounds_name in data:
        bounds = _pick_array(data[bounds_name], where)
        low, high = (float(bounds.sel(bound=bound)) for bound in ("low", "high"))
    reason = text_of(data, "reason", where) or why
    return Value(number, low, high, bounded=bounds_name in data, reason=reason)


def _pick_array(array: xr.DataArray, where: Mapping | None) -> xr.DataArray:
    return array.sel({dim: label for dim, label in (where or {}).items() if dim in array.dims})


def _pick(array: xr.DataArray, where: Mapping | None) -> float:
    return float(_pick_array(array, where))


def text_of(data: xr.Dataset, name: str, where: Mapping | None = None) -> str:
    if name not in data:
        return ""
    chosen = _pick_array(data[name], where)
    return str(chosen.item()) if chosen.ndim == 0 else ""


def steps_of(data: xr.Dataset) -> list[int]:
    return [int(step) for step in np.atleast_1d(data["step"].values)] if "step" in data.coords else []


def snapshots_of(data: xr.Dataset) -> Iterator[tuple[dict[str, Cell], xr.Dataset]]:
    """Labels and values of every (step, slice_seed) of the dataset."""
    for step in steps_of(data):
        for seed in map(int, np.atleast_1d(data["slice_seed"].values)):
            where = {dim: label for dim, label in (("step", step), ("slice_seed", seed)) if dim in data.dims}
            yield {"step": str(step), "slice_seed": str(seed)}, data.sel(where)
