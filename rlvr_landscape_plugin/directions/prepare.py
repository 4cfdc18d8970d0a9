"""Directions that a server cannot draw, computed once and kept as files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlvr_landscape_plugin.config import DirectionConfig, SliceConfig
from rlvr_landscape_plugin.directions.kinds import principal_terms
from rlvr_landscape_plugin.directions.spec import (
    AXES,
    GENERATOR,
    Axis,
    DirectionSpec,
    Normalization,
    SliceSpec,
    global_scales,
    scale_factor,
    scaled_direction,
)
from rlvr_landscape_plugin.directions.trajectory import Trajectory, combination, squared
from rlvr_landscape_plugin.errors import ConfigurationError, SnapshotError, StoreError
from rlvr_landscape_plugin.files import digest, file_sha256, publish_directory
from rlvr_landscape_plugin.schedule import format_schedule
from rlvr_landscape_plugin.snapshot import Snapshot, TensorInfo, read_tensor, safetensors_header, write_safetensors


def prepare_slice(
    slice_: SliceConfig, seed: int, trajectory: Trajectory, folder: Path
) -> tuple[SliceSpec, dict[Axis, Path], dict[Axis, str]]:
    """The slice that a configuration and a seed name around a snapshot, with what a server cannot draw as files.

    Returns the slice, the file of each axis that has one, and each axis in words. A file is computed once:
    `folder/<kind>_<digest of its definition>/` holds `direction.safetensors` (float32, names and shapes of the tensors
    that move) and `direction.json`, and appears under that name when it is whole. Raises `ConfigurationError`,
    `SnapshotError` or `StoreError` naming the key or file.
    """
    spec = SliceSpec(seed, slice_.normalization, tuple(slice_.include), tuple(slice_.exclude))
    files: dict[Axis, Path] = {}
    words: dict[Axis, str] = {}
    if not any(map(spec.moves, trajectory.origin.tensors)):
        raise ConfigurationError(f"slice.include = {slice_.include} and slice.exclude leave no tensor that moves")
    for axis in AXES:
        choice: DirectionConfig = getattr(slice_, axis)
        orthogonal = axis == "beta" and slice_.orthogonalize
        scale: Normalization = choice.normalization or (slice_.normalization if choice.kind == "random" else "none")
        wanted = DirectionSpec(choice.kind, scale, choice.component, orthogonal)
        if choice.kind != "random" or orthogonal or scale != slice_.normalization:
            spec = replace(spec, **{axis: wanted})
        words[axis] = f"random, seed {seed}, scaled per {scale}"
        if choice.kind != "random" or orthogonal:
            try:
                made, files[axis], words[axis] = _Direction(spec, axis, trajectory, choice.file, files).file(folder)
            except (ConfigurationError, SnapshotError) as error:
                raise type(error)(f"slice.{axis} (kind = {choice.kind!r}): {error}") from error
            spec = replace(spec, **{axis: made})
    return spec, files, words


class _Direction:
    """One direction on its way into a file: float64, one tensor at a time, asked for again rather than kept."""

    def __init__(
        self, spec: SliceSpec, axis: Axis, trajectory: Trajectory, file: Path | None, others: Mapping[Axis, Path]
    ) -> None:
        self.spec, self.origin = spec, trajectory.origin
        self.axis: Axis = axis
        self.wanted = spec.direction(axis)
        self.others = others
        self.names = sorted(filter(spec.moves, self.origin.tensors))
        self.sources: dict[str, str] = {}
        self.words, self.share, self.scale = self.wanted.kind, math.nan, 1.0
        self.terms: list[tuple[float, Snapshot]] = []
        self.tensors: Mapping[str, TensorInfo] = {}
        kind, step = self.wanted.kind, self.origin.step
        if kind == "random":
            self.words = f"random, seed {spec.seed}"
            return
        if kind == "file":
            assert file is not None
            self.tensors = _fitting_tensors(file, {name: self.origin.shapes[name] for name in self.names}, spec)
            self.sources = {file.name: file_sha256(file)}
            self.words = f"file {file.name}"
            return
        if kind == "displacement":
            first = trajectory.first()
            self.terms = [(1.0, self.origin), (-1.0, first)]
            self.words = f"displacement, step {step} - step 0"
        elif kind == "update":
            following = trajectory.following()
            self.terms = [(1.0, following), (-1.0, self.origin)]
            self.words = f"update, step {following.step} - step {step}"
        else:
            snapshots = trajectory.all()
            if len(snapshots) < 2:
                raise SnapshotError(
                    f"{trajectory.folder} holds {len(snapshots)} snapshots of a run, principal components need at "
                    "least 2; name the run's directory with slice.run"
                )
            # The coefficients come later: they cost a pass over all snapshots that an existing file makes needless.
            self.terms = [(math.nan, snapshot) for snapshot in snapshots]
            steps = format_schedule(snapshot.step for snapshot in snapshots)
            self.words = f"principal component {self.wanted.component} of the steps {steps}"
        self.sources = {f"step {snapshot.step}": snapshot.sha256 for _, snapshot in self.terms}

    def file(self, folder: Path) -> tuple[DirectionSpec, Path, str]:
        """The direction's specification, its file (found or made) and the direction in words."""
        definition = {
            "generator": GENERATOR,
            "wanted": asdict(replace(self.wanted, sources=self.sources)),
            "axis": self.axis,
            "moves": self.names,
            "scaled to": "" if self.wanted.normalization == "none" else self.origin.sha256,
            "seed": self.spec.seed if self.wanted.kind == "random" else None,
            "orthogonal to": self._other_definition() if self.wanted.orthogonal else None,
        }
        home = folder / f"{self.wanted.kind}_{digest(definition)[:16]}"
        if not home.is_dir():
            self._write(home, definition)
        target, facts = home / "direction.safetensors", _read_facts(home / "direction.json")
        if facts.get("definition") != json.loads(json.dumps(definition)) or file_sha256(target) != facts.get("sha256"):
            raise StoreError(
                f"{target} is not the file that direction.json beside it names; remove {home} and run again"
            )
        return replace(self.wanted, sources=self.sources, sha256=facts["sha256"]), target, facts["words"]

    def _other_definition(self) -> dict[str, Any]:
        other = self.spec.direction("alpha")
        drawn = {"seed": self.spec.seed, "scaled to": self.origin.sha256}
        return asdict(other) | (drawn if self.spec.drawn("alpha") else {})

    def _write(self, home: Path, definition: dict[str, Any]) -> None:
        def fill(folder: Path) -> None:
            norm = self._fill(folder / "direction.safetensors")
            facts = {
                "definition": definition,
                "sha256": file_sha256(folder / "direction.safetensors"),
                "norm": norm,
                "words": self._in_words(norm),
            }
            (folder / "direction.json").write_text(json.dumps(facts, indent=1) + "\n")

        publish_directory(home, fill)

    def _in_words(self, norm: float) -> str:
        parts = [self.words]
        if self.wanted.kind == "pca":
            parts.append(f"{self.share:.1%} of the squared distances from the last, scaled to the run's length")
        if self.wanted.normalization != "none":
            parts.append(f"scaled per {self.wanted.normalization}")
        if self.wanted.orthogonal:
            parts.append("orthogonalised against alpha")
        return "; ".join([*parts, f"norm {norm:.6g}"])

    def _fill(self, file: Path) -> float:
        """Write the direction; returns its norm."""
        if self.wanted.kind == "pca":
            snapshots = [snapshot for _, snapshot in self.terms]
            self.terms, self.share = principal_terms(snapshots, self.names, self.wanted.component)
        self.scale = self._global_scale()
        along, before = 0.0, 0.0
        other: Callable[[str], np.ndarray] | None = None
        if self.wanted.orthogonal:
            other = self._other()
            dot = other_squared = 0.0
            for name in self.names:
                theirs, ours = other(name).astype(np.float64), self._scaled(name)
                dot += float(np.vdot(theirs, ours))
                other_squared += float(np.vdot(theirs, theirs))
                before += float(np.vdot(ours, ours))
            along = dot / other_squared if other_squared else 0.0
        total = [0.0]

        def tensors() -> Iterable[np.ndarray]:
            for name in self.names:
                values = self._scaled(name)
                if other is not None:
                    values = values - along * other(name).astype(np.float64)
                with np.errstate(over="ignore"):
                    rounded = values.astype(np.float32)
                if not np.isfinite(rounded).all():
                    raise SnapshotError(f"tensor {name!r} of the direction overflows float32; scale it down")
                total[0] += squared(rounded)
                yield rounded

        write_safetensors(file, {name: self.origin.shapes[name] for name in self.names}, tensors())
        if total[0] == 0:
            raise ConfigurationError("the direction is zero in every tensor that moves; choose another")
        if total[0] < 1e-12 * before:
            raise ConfigurationError("it is parallel to alpha: nothing is left of it; set slice.orthogonalize = false")
        return math.sqrt(total[0])

    def _unscaled(self, name: str) -> np.ndarray:
        if self.terms:
            return combination(self.terms, name)
        return read_tensor(self.tensors, name).astype(np.float64)

    def _global_scale(self) -> float:
        if self.wanted.kind == "random":
            return global_scales(self.spec, self.names, self.origin.read)[self.axis]
        if self.wanted.normalization != "global":
            return 1.0
        theta = sum(squared(self.origin.read(name)) for name in self.names)
        length = sum(squared(self._unscaled(name)) for name in self.names)
        return math.sqrt(theta / length) if length else 0.0

    def _scaled(self, name: str) -> np.ndarray:
        if self.wanted.kind == "random":
            weight = self.origin.read(name).astype(np.float32)
            return scaled_direction(self.spec, self.axis, name, weight, self.scale).astype(np.float64)
        values = self._unscaled(name)
        if self.wanted.normalization == "none":
            return values
        return values * scale_factor(self.wanted.normalization, self.origin.read(name), values, self.scale)

    def _other(self) -> Callable[[str], np.ndarray]:
        """δ as the server will hold it, float32."""
        if "alpha" in self.others:
            tensors = safetensors_header(self.others["alpha"])
            return lambda name: read_tensor(tensors, name)

        def weight(name: str) -> np.ndarray:
            return self.origin.read(name).astype(np.float32)

        scale = global_scales(self.spec, self.names, weight)["alpha"]
        return lambda name: scaled_direction(self.spec, "alpha", name, weight(name), scale)


def open_direction(
    spec: SliceSpec, axis: Axis, file: Path, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorInfo]:
    """The tensors of a direction's file; raises `SnapshotError` unless it is the one that `spec` names, whole."""
    if (found := file_sha256(file)) != spec.direction(axis).sha256:
        raise SnapshotError(
            f"{file} is not the direction that slice.{axis} names: SHA-256 {found[:12]}… on disk, "
            f"{spec.direction(axis).sha256[:12]}… expected; remove its directory and run the sweep again"
        )
    return _fitting_tensors(file, {name: shape for name, shape in shapes.items() if spec.moves(name)}, spec)


def _fitting_tensors(file: Path, shapes: Mapping[str, tuple[int, ...]], spec: SliceSpec) -> dict[str, TensorInfo]:
    """The tensors of `file`; raises `SnapshotError` unless those that move are exactly `shapes`."""
    if not file.is_file():
        raise SnapshotError(f"{file} is not a file; give a safetensors file with a tensor for each one that moves")
    found = {name: info for name, info in safetensors_header(file).items() if spec.moves(name)}
    for name, shape in shapes.items():
        if name not in found:
            raise SnapshotError(f"{file} has no tensor {name!r}; add it, or let it stand still with slice.exclude")
        if found[name].shape != tuple(shape):
            raise SnapshotError(f"{file}: tensor {name!r} has shape {list(found[name].shape)}, expected {list(shape)}")
    if foreign := sorted(set(found) - set(shapes)):
        raise SnapshotError(
            f"{file}: tensor {foreign[0]!r} is not part of the checkpoint; names are the checkpoint's own"
        )
    return found


def _read_facts(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{file} is damaged ({error}); remove {file.parent} and run again") from error
