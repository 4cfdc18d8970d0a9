"""The frame of a dataset: which dimensions its points have.

A design (`designs/`) makes one; journal and dataset writer use nothing else of a design.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

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
