"""A slice made ready for a server: what it draws itself as a specification, everything else as files.

A file is computed once, in float64 and one tensor at a time, and rounded once to float32. It lies in a directory that
is named after the digest of its definition, so the next process and the next sweep find the same direction again, and
another definition never uses it. Servers check the file by its SHA-256.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from rlvr_landscape_plugin.config import DirectionConfig, SliceConfig
from rlvr_landscape_plugin.config.designs import DRAWN_KINDS
from rlvr_landscape_plugin.directions.kinds import KINDS, Direction, Request, fitting_tensors
from rlvr_landscape_plugin.directions.spec import (
    AXES,
    GENERATOR,
    Axis,
    DirectionSpec,
    Normalization,
    SliceSpec,
    fingerprint,
)
from rlvr_landscape_plugin.directions.trajectory import Trajectory, squared
from rlvr_landscape_plugin.errors import ConfigurationError, SnapshotError, StoreError
from rlvr_landscape_plugin.files import JsonObject, digest, file_sha256, publish_directory
from rlvr_landscape_plugin.snapshot import Snapshot, TensorInfo, read_tensor, safetensors_header, write_safetensors


@dataclass(frozen=True)
class PreparedSlice:
    """A slice around a snapshot, ready to be loaded by a server."""

    snapshot: Snapshot
    """The policy at the origin."""
    spec: SliceSpec
    """What defines the slice; the SHA-256 of each file is part of it."""
    files: Mapping[Axis, Path]
    """The file of each axis that a server cannot draw."""
    description: Mapping[Axis, str]
    """Each direction in a few words, for datasets and figures."""

    @cached_property
    def fingerprint(self) -> str:
        """What tells whether another machine draws the same directions (`spec.fingerprint`)."""
        return fingerprint(self.spec, self.snapshot.shapes)


def prepare_slice(slice_: SliceConfig, seed: int, trajectory: Trajectory, folder: Path) -> PreparedSlice:
    """The slice that a configuration and a seed name around a snapshot, with what a server cannot draw as files.

    `folder/<kind>_<digest of its definition>/` holds `direction.safetensors` (float32, names and shapes of the tensors
    that move) and `direction.json`, and appears under that name when it is whole. Raises `ConfigurationError`,
    `SnapshotError` or `StoreError` naming the key or file.
    """
    spec = SliceSpec(seed, slice_.normalization, tuple(slice_.include), tuple(slice_.exclude))
    files: dict[Axis, Path] = {}
    description: dict[Axis, str] = {}
    if not any(map(spec.moves, trajectory.origin.tensors)):
        raise ConfigurationError(f"slice.include = {slice_.include} and slice.exclude leave no tensor that moves")
    for axis in AXES:
        choice: DirectionConfig = getattr(slice_, axis)
        orthogonal = axis == "beta" and slice_.orthogonalize
        scale: Normalization = choice.normalization or (slice_.normalization if choice.kind in DRAWN_KINDS else "none")
        wanted = DirectionSpec(choice.kind, scale, choice.component, orthogonal)
        if choice.kind != "random" or orthogonal or scale != slice_.normalization:
            spec = replace(spec, **{axis: wanted})
        description[axis] = f"random, seed {seed}, scaled per {scale}"
        if choice.kind != "random" or orthogonal:
            try:
                direction = KINDS[choice.kind](Request(spec, axis, trajectory, choice.file))
                if choice.kind in DRAWN_KINDS and not orthogonal:
                    description[axis] = f"{direction.description}, scaled per {scale}"
                    continue
                made, files[axis], description[axis] = _find_or_write(direction, files.get("alpha"), folder)
            except (ConfigurationError, SnapshotError) as error:
                raise type(error)(f"slice.{axis} (kind = {choice.kind!r}): {error}") from error
            spec = replace(spec, **{axis: made})
    return PreparedSlice(trajectory.origin, spec, files, description)


def _find_or_write(direction: Direction, alpha: Path | None, folder: Path) -> tuple[DirectionSpec, Path, str]:
    """The direction's specification, its file (found or made) and its description; `alpha`: the file of δ, if any."""
    request = direction.request
    wanted = replace(request.direction, sources=direction.sources)
    definition = {
        "generator": GENERATOR,
        "wanted": asdict(wanted),
        "axis": request.axis,
        "moves": request.names,
        "scaled to": "" if wanted.normalization == "none" else request.origin.sha256,
        "seed": request.spec.seed if wanted.kind in DRAWN_KINDS else None,
        "orthogonal to": _definition_of_alpha(request) if wanted.orthogonal else None,
    }
    home = folder / f"{wanted.kind}_{digest(definition)[:16]}"
    if not home.is_dir():
        publish_directory(home, lambda scratch: _write(direction, alpha, definition, scratch))
    target, facts = home / "direction.safetensors", _read_facts(home / "direction.json")
    if facts.get("definition") != json.loads(json.dumps(definition)) or file_sha256(target) != facts.get("sha256"):
        raise StoreError(f"{target} is not the file that direction.json beside it names; remove {home} and run again")
    return replace(wanted, sha256=facts["sha256"]), target, facts["words"]


def _definition_of_alpha(request: Request) -> dict[str, object]:
    drawn = {"seed": request.spec.seed, "scaled to": request.origin.sha256} if request.spec.drawn("alpha") else {}
    return asdict(request.spec.direction("alpha")) | drawn


def _write(direction: Direction, alpha: Path | None, definition: Mapping[str, object], folder: Path) -> None:
    """Write the direction's two files into `folder`."""
    direction.compute()
    file = folder / "direction.safetensors"
    norm = _write_tensors(direction, _alpha(direction.request, alpha), file)
    wanted, parts = direction.request.direction, [direction.description]
    if wanted.normalization != "none":
        parts.append(f"scaled per {wanted.normalization}")
    if wanted.orthogonal:
        parts.append("orthogonalised against alpha")
    facts = {
        "definition": definition,
        "sha256": file_sha256(file),
        "norm": norm,
        "words": "; ".join([*parts, f"norm {norm:.6g}"]),
    }
    (folder / "direction.json").write_text(json.dumps(facts, indent=1) + "\n")


def _alpha(request: Request, file: Path | None) -> Callable[[str], np.ndarray] | None:
    """δ as the server holds it, float64, where the direction is orthogonalised against it."""
    if not request.direction.orthogonal:
        return None
    if file is not None:
        tensors = safetensors_header(file)
        return lambda name: read_tensor(tensors, name).astype(np.float64)
    of_alpha = replace(request, axis="alpha")
    drawn = KINDS[of_alpha.direction.kind](of_alpha)
    drawn.compute()
    return drawn.scaled


def _write_tensors(direction: Direction, alpha: Callable[[str], np.ndarray] | None, file: Path) -> float:
    """Write the direction, without its part along `alpha`; returns its norm."""
    names, shapes = direction.request.names, direction.request.origin.shapes
    along, before, total = 0.0, 0.0, 0.0
    if alpha is not None:
        along, before = _projection(direction, alpha)

    def tensors() -> Iterable[np.ndarray]:
        nonlocal total
        for name in names:
            values = direction.scaled(name)
            if alpha is not None:
                values = values - along * alpha(name)
            with np.errstate(over="ignore"):
                rounded = values.astype(np.float32)
            if not np.isfinite(rounded).all():
                raise SnapshotError(f"tensor {name!r} of the direction overflows float32; scale it down")
            total += squared(rounded)
            yield rounded

    write_safetensors(file, {name: shapes[name] for name in names}, tensors())
    if total == 0:
        raise ConfigurationError("the direction is zero in every tensor that moves; choose another")
    if total < 1e-12 * before:
        raise ConfigurationError("it is parallel to alpha: nothing is left of it; set slice.orthogonalize = false")
    return math.sqrt(total)


def _projection(direction: Direction, alpha: Callable[[str], np.ndarray]) -> tuple[float, float]:
    """⟨η, δ⟩ / ⟨δ, δ⟩ (0 where δ is 0) and ⟨η, η⟩ over all tensors that move."""
    dot = theirs_squared = ours_squared = 0.0
    for name in direction.request.names:
        theirs, ours = alpha(name), direction.scaled(name)
        dot += float(np.vdot(theirs, ours))
        theirs_squared += float(np.vdot(theirs, theirs))
        ours_squared += float(np.vdot(ours, ours))
    return dot / theirs_squared if theirs_squared else 0.0, ours_squared


def open_direction(
    spec: SliceSpec, axis: Axis, file: Path, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorInfo]:
    """The tensors of a direction's file; raises `SnapshotError` unless it is the one that `spec` names, whole."""
    if (found := file_sha256(file)) != spec.direction(axis).sha256:
        raise SnapshotError(
            f"{file} is not the direction that slice.{axis} names: SHA-256 {found[:12]}… on disk, "
            f"{spec.direction(axis).sha256[:12]}… expected; remove its directory and run the sweep again"
        )
    return fitting_tensors(file, {name: shape for name, shape in shapes.items() if spec.moves(name)}, spec)


def _read_facts(file: Path) -> JsonObject:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{file} is damaged ({error}); remove {file.parent} and run again") from error
