"""How the files of a journal's points are named: `a003_b004.nc`, or with the cells that a file holds.

    a003_b004.nc                               everything that the sweep asked for which began the journal
    a003_b004_p00032-00064.nc                  the same on tasks 32 to 63
    a003_b004_p00000-00032_r00002-00004_c00004.nc
                                               fresh rollouts 2 and 3 of tasks 0 to 31, and the first 4 completions

An index counts the coordinates of an axis in the order in which the journal first met them. So a file keeps its name
when coordinates are added between the old ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property

from rlvr_landscape_plugin.store.cells import Cells, Extent
from rlvr_landscape_plugin.store.frame import Frame, Place


def met_order(axes: Sequence[Mapping[str, Sequence[object]]], name: str) -> list[object]:
    """The coordinates of one axis in the order in which these requests first named them."""
    return list(dict.fromkeys(value for asked in axes for value in asked[name]))


class PointNames:
    """Names of the files of one frame's points, and back."""

    def __init__(self, frame: Frame, axes: Sequence[Mapping[str, Sequence[object]]], first: Extent) -> None:
        """`axes`: what each sweep asked for, in order; the frame's own among them. `first`: extent of the first."""
        self._frame, self._first = frame, first
        self._indices: list[list[int]] = []
        for name, values in frame.axes.items():
            met = {value: index for index, value in enumerate(met_order(axes, name))}
            self._indices.append([met[value] for value in values])
        self._places = [{index: at for at, index in enumerate(indices)} for indices in self._indices]

    def of_point(self, place: Place) -> str:
        """What the names of all files of a point begin with."""
        parts = zip(self._frame.dimensions, self._indices, place, strict=True)
        return "_".join(f"{dimension.prefix}{indices[at]:03d}" for dimension, indices, at in parts)

    def name(self, place: Place, cells: Cells) -> str:
        """The name of the file with these cells of a point."""
        text = self.of_point(place)
        usual = cells.rollouts == range(self._first.rollouts) and cells.scored == self._first.completions
        if not usual or cells.tasks != range(self._first.prompts):
            text += f"_p{cells.tasks.start:05d}-{cells.tasks.stop:05d}"
        if not usual:
            text += f"_r{cells.rollouts.start:05d}-{cells.rollouts.stop:05d}_c{cells.scored:05d}"
        return f"{text}.nc"

    def parse(self, name: str) -> tuple[Place, Cells] | None:
        """The inverse of `name`; None for a name that is none of this frame's points."""
        match = self._pattern.fullmatch(name)
        if match is None:
            return None
        groups = match.groups()
        start, stop, first, last, scored = (None if group is None else int(group) for group in groups[-5:])
        place = tuple(places.get(int(index)) for places, index in zip(self._places, groups[:-5], strict=True))
        if None in place:
            return None
        usual = self._first.cells
        cells = Cells(
            usual.tasks if start is None or stop is None else range(start, stop),
            usual.rollouts if first is None or last is None else range(first, last),
            usual.scored if scored is None else scored,
        )
        return tuple(at for at in place if at is not None), cells

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        indices = "_".join(rf"{re.escape(dimension.prefix)}(\d{{3,}})" for dimension in self._frame.dimensions)
        return re.compile(rf"{indices}(?:_p(\d{{5,}})-(\d{{5,}})(?:_r(\d{{5,}})-(\d{{5,}})_c(\d{{5,}}))?)?\.nc")
