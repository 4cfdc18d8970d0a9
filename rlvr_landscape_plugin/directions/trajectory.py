"""The snapshots of a training run, and how far training moved its policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from rlvr_landscape_plugin.errors import SnapshotError
from rlvr_landscape_plugin.snapshot import (
    Snapshot,
    compare_tensors,
    find_snapshots,
    open_snapshot,
    run_directory,
    step_of_path,
)


@dataclass(frozen=True)
class Trajectory:
    """The snapshots of the training run that a snapshot belongs to."""

    origin: Snapshot
    """The snapshot that a slice lies around."""
    folder: Path
    """Directory in which the other snapshots were searched."""
    paths: Mapping[int, Path]
    """Step → directory; empty if the folder holds no `step_<N>`."""
    known: dict[Path, Snapshot]
    """Directory → snapshot for those that are open: trajectories that share this read and hash each one once."""

    @classmethod
    def around(cls, origin: Snapshot, run: Path | None, known: dict[Path, Snapshot] | None = None) -> Trajectory:
        """Look for snapshots in the directory `run`, or in the one that holds `origin`; opens none of them.

        Raises `SnapshotError` when `run` is given and holds none.
        """
        folder = Path(run) if run is not None else run_directory(origin.path)
        try:
            found = find_snapshots(folder)
        except SnapshotError as error:
            if run is not None:
                raise SnapshotError(f"slice.run: {error}") from error
            found = []
        paths = {step: path.resolve() for path in found if (step := step_of_path(path)) is not None}
        return cls(origin, folder, paths, {} if known is None else known)

    def open(self, step: int) -> Snapshot:
        """The snapshot of `step`; raises `SnapshotError` unless it is one of the same model, run and name."""
        if step == self.origin.step:
            return self.origin
        path = self.paths[step]
        snapshot = self.known[path] = self.known.get(path) or open_snapshot(path, self.origin.base)
        if snapshot.step != step:
            raise SnapshotError(f"{snapshot.path} says step {snapshot.step} in its manifest.json; rename the directory")
        adapters = [s.adapter.base_name for s in (self.origin, snapshot) if s.adapter is not None]
        if len(set(adapters)) > 1:
            raise SnapshotError(
                f"{snapshot.path} is an adapter of {adapters[1]}, {self.origin.path} of {adapters[0]}: their "
                "difference is no step of training"
            )
        compare_tensors(self.origin.shapes, snapshot, f"the snapshot {self.origin.path}")
        ours, theirs = (s.manifest.run if s.manifest is not None else "" for s in (self.origin, snapshot))
        if ours and theirs and ours != theirs:
            raise SnapshotError(
                f"{snapshot.path} is of run {theirs[:12]}, {self.origin.path} of run {ours[:12]}: their difference "
                "is no step of training; set slice.run to the directory of the right run"
            )
        return snapshot

    def first(self) -> Snapshot:
        """Snapshot 0 of the run; raises `SnapshotError` saying where it was looked for."""
        if self.origin.step == 0:
            raise SnapshotError(f"{self.origin.path.name} is step 0 itself: nothing has moved yet")
        return self.start()

    def start(self) -> Snapshot:
        """Snapshot 0 of the run, also where it is the origin; where an adapter's run kept none, its base model, from
        which it started. Raises `SnapshotError` saying where it was looked for.
        """
        if 0 not in self.paths and self.origin.base is not None:
            return replace(self.origin.base, step=0)
        if 0 not in self.paths:
            raise SnapshotError(f"{self.folder} has no snapshot of step 0; name the run's directory with slice.run")
        return self.open(0)

    def following(self) -> Snapshot:
        """The next snapshot of the run; raises `SnapshotError` if there is none."""
        later = [step for step in self.paths if step > self.origin.step]
        if not later:
            raise SnapshotError(
                f"{self.folder} has no snapshot after step {self.origin.step}; name the run's directory with "
                "slice.run, or leave out the last snapshot"
            )
        return self.open(min(later))

    def all(self) -> list[Snapshot]:
        """Every snapshot of the run, by step."""
        return [self.open(step) for step in sorted(self.paths)]

    @cached_property
    def displacement(self) -> Displacement:
        """‖θ_t − θ_0‖ and ‖θ_t‖; without a fitting snapshot 0 the former is NaN and the comment says why.

        0 where the snapshot equals step 0, as after a step whose learning rate was 0: no radius is a multiple of it.
        """
        theta = math.nan
        try:
            theta = math.sqrt(sum(squared(self.origin.read(name)) for name in self.origin.tensors))
            first = self.first()
            change, source = [(1.0, self.origin), (-1.0, first)], first.sha256
            norm = math.sqrt(sum(squared(combination(change, name)) for name in self.origin.tensors))
        except SnapshotError as error:
            return Displacement(math.nan, theta, f"not known: {error}")
        comment = f"norm(theta - theta_0) over all tensors; theta_0 has sha256 {source}"
        if norm == 0:
            comment += "; the snapshot equals step 0, so displacement_radius is missing"
        return Displacement(norm, theta, comment)


@dataclass(frozen=True)
class Displacement:
    """How far training has moved a snapshot: the unit of a slice's radius."""

    norm: float
    """‖θ_t − θ_0‖ over all tensors, float64; NaN where it is not known."""
    theta: float
    """‖θ_t‖ over all tensors, float64."""
    comment: str
    """What it was computed from, or why it is not known."""


def squared(values: np.ndarray) -> float:
    return float(np.sum(np.square(values, dtype=np.float64)))


def combination(terms: Sequence[tuple[float, Snapshot]], name: str) -> np.ndarray:
    """Σ coefficient · tensor in float64."""
    total = np.zeros(terms[0][1].tensors[name].shape)
    for coefficient, snapshot in terms:
        total += coefficient * snapshot.read(name).astype(np.float64)
    return total
