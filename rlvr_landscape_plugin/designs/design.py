"""What a design is: which policies around a snapshot are measured, in which order, and how they are labelled.

A design is an ordered list of slices (pairs of directions) and of points on them, with the dimensions of the dataset
that they become. Plan, jobs, journal and dataset writer know points only. A new design is one module here with a
function of the type `Designer`; nothing in this folder uses servers.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rlvr_landscape_analysis.schema import design_file, design_name

from rlvr_landscape_plugin.directions import PreparedSlice, Trajectory, prepare_slice
from rlvr_landscape_plugin.errors import ConfigurationError
from rlvr_landscape_plugin.files import JsonObject, digest
from rlvr_landscape_plugin.snapshot import Snapshot
from rlvr_landscape_plugin.store.frame import Frame, Place

if TYPE_CHECKING:
    from rlvr_landscape_plugin.config import SweepConfig


@dataclass(frozen=True)
class Point:
    """One policy of a design."""

    place: Place
    """Its index along each dimension of the dataset."""
    slice: int
    """Index into the design's slices."""
    alpha: float
    beta: float


@dataclass(frozen=True)
class Design:
    """Which policies around one snapshot are measured. One journal and one dataset."""

    kind: str
    """Its name in a configuration, such as `grid`."""
    snapshot: Snapshot
    frame: Frame
    slices: tuple[PreparedSlice, ...]
    points: tuple[Point, ...]
    """In the order of measurement; the points of one slice are consecutive."""
    identity: Mapping[str, object]
    """What of it determines the numbers beyond the configuration and the snapshot, JSON-able."""
    label: str
    """What it is called while it is measured."""
    attributes: Mapping[str, object] = field(default_factory=dict)
    """Global attributes of its dataset beside those that every dataset has."""
    journal_name: str = ""
    """Directory of its journal; default: by step and kind."""
    dataset_name: str = ""
    """File of its dataset; default: by step and kind."""

    def __post_init__(self) -> None:
        step = self.snapshot.step
        object.__setattr__(self, "journal_name", self.journal_name or design_name(step, self.kind))
        object.__setattr__(self, "dataset_name", self.dataset_name or design_file(step, self.kind))
        wrong = [point.place for point in self.points if not self.frame.holds(point.place)]
        if wrong or len({point.place for point in self.points}) != self.frame.size:
            raise ValueError(f"design {self.kind!r}: its points are not those of its dimensions {self.frame.shape}")

    @cached_property
    def by_place(self) -> dict[Place, Point]:
        """Its points by their places."""
        return {point.place: point for point in self.points}

    def share(self, index: int, count: int) -> list[Point]:
        """The `index`-th (from 1) of `count` shares of the points, in order: whole slices where there are enough."""
        if len(self.slices) >= count > 1:
            return [point for point in self.points if point.slice % count == index - 1]
        return list(self.points[index - 1 :: count])


def drawn_identity(slices: Sequence[PreparedSlice]) -> JsonObject:
    """Identity of a design of many slices: one hash over what defines each of them."""
    drawn = [{"slice": slice_.spec.as_dict(), "fingerprint": slice_.fingerprint} for slice_ in slices]
    return {"slices_sha256": digest(drawn)}


def drawn_attributes(slices: Sequence[PreparedSlice]) -> JsonObject:
    """Attributes of its dataset: what is needed to draw each of them again."""
    return {"slices": json.dumps([slice_.spec.as_dict() for slice_ in slices], sort_keys=True)}


@dataclass(frozen=True)
class Surroundings:
    """What a design is made from, beside the configuration."""

    trajectory: Trajectory
    """The snapshot, and the run it belongs to."""
    folder: Path
    """Where direction files go."""
    found: JsonObject | None = None
    """The range of the grid where probes found one (`sweep.range_search`)."""

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot that is measured around."""
        return self.trajectory.origin

    def prepare(self, config: SweepConfig, seed: int) -> PreparedSlice:
        """The slice that the configuration and a seed name around the snapshot."""
        return prepare_slice(config.slice, seed, self.trajectory, self.folder)


Designer = Callable[["SweepConfig", Surroundings], Sequence[Design]]
"""Makes the designs that a configuration asks for around one snapshot; raises `ConfigurationError` naming the key."""


def find_designer(name: str, known: Mapping[str, str]) -> Designer:
    """The designer of a name in `known` (name → import path), or of an import path such as `package.module.function`.

    Raises `ConfigurationError` for a name that is neither.
    """
    path = known.get(name, name)
    module, _, function = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"design = {name!r} is neither one of {', '.join(known)} nor an import path of a designer: {error}"
        ) from error
