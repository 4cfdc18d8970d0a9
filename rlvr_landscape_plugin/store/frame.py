"""The frame of a dataset: which dimensions its points have, and how a point's file is named.

A design (`designs/`) makes one; journal and dataset writer use nothing else of a design.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

Place = tuple[int, ...]
"""A point: its index along each dimension of the frame."""


@dataclass(frozen=True)
class Dimension:
    """One dimension of the points of a dataset, with its coordinate."""

    name: str
    prefix: str
    """Letters that stand for it in file names."""
    values: np.ndarray
    """The coordinate, one value per index: numbers or strings."""
    long_name: str
    units: str = "1"


@dataclass(frozen=True)
class Label:
    """A further coordinate, along some of the dimensions or none."""

    dims: tuple[str, ...]
    values: np.ndarray
    long_name: str
    units: str = "1"


@dataclass(frozen=True)
class Subset:
    """A part of a frame and of the prompt set: some indices of each dimension × the first `prompts` tasks."""

    indices: tuple[tuple[int, ...], ...]
    """For each dimension its indices, ascending."""
    prompts: int

    @property
    def places(self) -> list[Place]:
        """Its points, the last dimension running fastest."""
        return list(itertools.product(*self.indices)) if self.indices else []

    @property
    def shape(self) -> tuple[int, ...]:
        """Indices along each dimension."""
        return tuple(map(len, self.indices))


@dataclass(frozen=True)
class Frame:
    """The dimensions of the points. Without any there are no points, only the checkpoint's own batch."""

    dimensions: tuple[Dimension, ...]
    labels: Mapping[str, Label] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the dimensions."""
        return tuple(dimension.name for dimension in self.dimensions)

    @property
    def shape(self) -> tuple[int, ...]:
        """Indices along each dimension."""
        return tuple(len(dimension.values) for dimension in self.dimensions)

    @property
    def size(self) -> int:
        """Number of points."""
        return math.prod(self.shape) if self.dimensions else 0

    @property
    def axes(self) -> dict[str, list[object]]:
        """Dimension → its coordinate, JSON-able."""
        return {dimension.name: dimension.values.tolist() for dimension in self.dimensions}

    def holds(self, place: Place) -> bool:
        """Whether `place` is one of its points."""
        return (
            bool(self.dimensions)
            and len(place) == len(self.shape)
            and all(0 <= index < count for index, count in zip(place, self.shape, strict=True))
        )

    def whole(self, prompts: int) -> Subset:
        """All points, and the first `prompts` tasks."""
        return Subset(tuple(tuple(range(count)) for count in self.shape), prompts)

    def point_file(self, place: Place, tasks: range | None = None) -> str:
        """File name of a point, or of the portion of it that holds only these tasks."""
        parts = [f"{d.prefix}{index:03d}" for d, index in zip(self.dimensions, place, strict=True)]
        if tasks is not None:
            parts.append(f"p{tasks.start:05d}-{tasks.stop:05d}")
        return "_".join(parts) + ".nc"

    def parse(self, name: str) -> tuple[Place, range | None] | None:
        """The inverse of `point_file`; None for a name that is none of this frame's points."""
        match = self._pattern.fullmatch(name)
        if match is None:
            return None
        *indices, start, stop = match.groups()
        place = tuple(map(int, indices))
        return (place, None if start is None else range(int(start), int(stop))) if self.holds(place) else None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        indices = "_".join(rf"{re.escape(dimension.prefix)}(\d{{3,}})" for dimension in self.dimensions)
        return re.compile(rf"{indices}(?:_p(\d{{5,}})-(\d{{5,}}))?\.nc")
