"""The portions of a point become one dataset again, cell by cell, as if all had been measured at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from rlvr_landscape_analysis.schema import BASE_ROLLOUT, OF_GROUP, PROMPT, ROLLOUT, variable_of

from rlvr_landscape_plugin.store.cells import Cells, Extent

Portion = tuple[Cells, xr.Dataset]


def joined(portions: Sequence[Portion], asked: Extent) -> xr.Dataset:
    """The point that these portions make up, dims (prompt, rollout[, base_rollout]); together they have every cell.

    Of a cell that several portions have, the value of the first counts. What depends on the advantages of a task
    (`OF_GROUP`) comes only from portions that were scored with all completions that are asked for.
    """
    (cells, only), *others = portions
    if cells == asked.cells and not others:
        # Written in one piece, which is how it is returned.
        return only
    used: set[int] = set()
    data: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for name in dict.fromkeys(str(name) for _, portion in portions for name in portion.data_vars):
        variable = variable_of(name)
        if variable is None or variable.family == "point":
            continue
        fresh = variable.family == "rollout"
        having = [
            (index, cells, portion[name].values)
            for index, (cells, portion) in enumerate(portions)
            if name in portion and (name not in OF_GROUP or asked.judges(cells))
        ]
        if not having:
            continue
        dims = PROMPT, BASE_ROLLOUT if asked.apart and not fresh else ROLLOUT
        width = asked.rollouts if fresh else asked.completions
        dtype = np.result_type(*(values.dtype for _, _, values in having))
        whole = np.full((asked.prompts, width), np.nan if dtype.kind == "f" else 0, dtype)
        empty = np.ones(whole.shape, bool)
        for index, cells, values in having:
            first = cells.rollouts.start if fresh else 0
            tasks = slice(cells.tasks.start, cells.tasks.stop)
            there = np.zeros_like(empty)
            there[tasks, first : first + values.shape[1]] = True
            new = there & empty
            if new.any():
                used.add(index)
                placed = np.zeros_like(whole)
                inside = placed[tasks, first : first + values.shape[1]]
                inside[...] = values[: inside.shape[0], : inside.shape[1]]
                whole[new] = placed[new]
                empty &= ~new
        data[name] = (dims, whole)
    parts = [portion for index, (_, portion) in enumerate(portions) if index in used]
    result = xr.Dataset(data)
    for name in parts[0].data_vars:
        variable = variable_of(str(name))
        if variable is not None and variable.family == "point":
            values = [float(part[name]) for part in parts]
            result[name] = ((), np.asarray(sum(values) if str(name).startswith("seconds_") else values[0]))
    return result
