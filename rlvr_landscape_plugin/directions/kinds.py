"""The kinds of directions: one small class each, and the table `KINDS` that a configuration's `kind` names.

A direction gives one tensor at a time, in float64, and computes it again instead of keeping it: it needs as much memory
as the largest tensor. Work that reads all weights is done in `compute`, which is not called if the direction's file
already exists.

A new kind is a subclass of `Direction` in `KINDS`, and its name among those of `config.DirectionConfig.kind`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from rlvr_landscape_plugin.directions.spec import (
    Axis,
    DirectionSpec,
    Part,
    SliceSpec,
    global_scales,
    scale_factor,
    scaled_direction,
)
from rlvr_landscape_plugin.directions.subspace import Subspace, subspace_of
from rlvr_landscape_plugin.directions.trajectory import Trajectory, combination, squared
from rlvr_landscape_plugin.errors import ConfigurationError, SnapshotError
from rlvr_landscape_plugin.files import file_sha256
from rlvr_landscape_plugin.schedule import format_schedule
from rlvr_landscape_plugin.snapshot import Snapshot, TensorInfo, read_tensor, safetensors_header


@dataclass(frozen=True)
class Request:
    """What defines a direction before it is computed."""

    spec: SliceSpec
    """The slice; its entry for `axis` says the kind, how to scale and whether to orthogonalise."""
    axis: Axis
    trajectory: Trajectory
    """The snapshot that the slice lies around, and the others of its run."""
    file: Path | None = None
    """The tensor file that the configuration names (`kind = "file"`)."""

    @property
    def direction(self) -> DirectionSpec:
        """The slice's entry for the axis."""
        return self.spec.direction(self.axis)

    @property
    def origin(self) -> Snapshot:
        """The snapshot that the slice lies around."""
        return self.trajectory.origin

    @cached_property
    def subspace(self) -> Subspace | None:
        """That of the origin, if it is an adapter."""
        return subspace_of(self.origin)

    @cached_property
    def names(self) -> list[str]:
        """The tensors that move, sorted."""
        return sorted(filter(self.spec.moves, self.origin.tensors))


class Direction(ABC):
    """One direction. Building it finds what it is computed from, and raises an error that names what is missing."""

    sources: Mapping[str, str] = {}
    """What it is computed from: `step <N>` or a file's name → SHA-256."""
    description: str
    """The direction in a few words, for datasets and figures."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._global_scale = 1.0

    @abstractmethod
    def compute(self) -> None:
        """Do the work that reads all weights; called once, before the first `scaled`."""

    @abstractmethod
    def scaled(self, name: str) -> np.ndarray:
        """The part in one tensor, scaled as the request says: float64, of the tensor's shape."""


class RandomDirection(Direction):
    """Drawn from the slice's seed, exactly as a server draws it. In a file only when it is orthogonalised."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.description = f"random, seed {request.spec.seed}"
        self._part: Part | None = None

    def compute(self) -> None:
        """Find the factor of `normalization = "global"`."""
        request = self.request
        self._global_scale = global_scales(request.spec, request.names, self._weight, self._part)[request.axis]

    def scaled(self, name: str) -> np.ndarray:
        """The float32 values that a server draws, as float64."""
        request = self.request
        drawn = scaled_direction(request.spec, request.axis, name, self._weight(name), self._global_scale, self._part)
        return drawn.astype(np.float64)

    def _weight(self, name: str) -> np.ndarray:
        return self.request.origin.read(name).astype(np.float32)


class SubspaceDirection(RandomDirection):
    """The part of a random direction in the subspace of the adapter that is measured (`lora`), or the part outside of
    it (`lora_complement`); the parts of one seed are parts of one noise."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        # Raises for a whole model.
        self._subspace, kind = request.subspace or Subspace(request.origin), request.direction.kind
        self._part = self._subspace.part
        self.description = f"{self._subspace.described(kind, request.names)}, seed {request.spec.seed}"

    def norm(self) -> float:
        """Length over all tensors where it is scaled per `tensor` or `global`."""
        direction, names = self.request.direction, self.request.names
        if direction.normalization != "global":
            names = [name for name in names if self._subspace.moves(direction.kind, name)]
        return math.sqrt(sum(squared(self._weight(name)) for name in names))


class _Given(Direction):
    """Values that exist before they are scaled to the weights, each tensor by itself or all by one factor."""

    @abstractmethod
    def unscaled(self, name: str) -> np.ndarray:
        """The part in one tensor before it is scaled: float64, of the tensor's shape."""

    def compute(self) -> None:
        """Find the factor of `normalization = "global"`: ‖θ‖ over the direction's norm, 0 where that is 0."""
        request = self.request
        if request.direction.normalization == "global":
            theta = sum(squared(request.origin.read(name)) for name in request.names)
            length = sum(squared(self.unscaled(name)) for name in request.names)
            self._global_scale = math.sqrt(theta / length) if length else 0.0

    def scaled(self, name: str) -> np.ndarray:
        """The part in one tensor, scaled as the request says: float64, of the tensor's shape."""
        values, normalization = self.unscaled(name), self.request.direction.normalization
        if normalization == "none":
            return values
        return values * scale_factor(normalization, self.request.origin.read(name), values, self._global_scale)


class _Combination(_Given):
    """Σ coefficient · snapshot."""

    def __init__(self, request: Request, terms: Sequence[tuple[float, Snapshot]]) -> None:
        super().__init__(request)
        self.terms = list(terms)
        self.sources = {f"step {snapshot.step}": snapshot.sha256 for _, snapshot in terms}

    def unscaled(self, name: str) -> np.ndarray:
        """The combination of one tensor, float64."""
        return combination(self.terms, name)


class DisplacementDirection(_Combination):
    """θ_t − θ_0: all that training did so far."""

    def __init__(self, request: Request) -> None:
        super().__init__(request, [(1.0, request.origin), (-1.0, request.trajectory.first())])
        self.description = f"displacement, step {request.origin.step} - step 0"


class UpdateDirection(_Combination):
    """θ_u − θ_t: what training did next, u being the next snapshot that was kept."""

    def __init__(self, request: Request) -> None:
        following = request.trajectory.following()
        super().__init__(request, [(1.0, following), (-1.0, request.origin)])
        self.description = f"update, step {following.step} - step {request.origin.step}"


class PrincipalDirection(_Combination):
    """A principal component of the run's snapshots about the last one."""

    def __init__(self, request: Request) -> None:
        snapshots = request.trajectory.all()
        if len(snapshots) < 2:
            raise SnapshotError(
                f"{request.trajectory.folder} holds {len(snapshots)} snapshots of a run, principal components need at "
                "least 2; name the run's directory with slice.run"
            )
        super().__init__(request, [(math.nan, snapshot) for snapshot in snapshots])
        steps = format_schedule(snapshot.step for snapshot in snapshots)
        self._component = request.direction.component
        self.description = f"principal component {self._component} of the steps {steps}"

    def compute(self) -> None:
        """Find the coefficients: a pass over all snapshots."""
        snapshots = [snapshot for _, snapshot in self.terms]
        self.terms, share = principal_terms(snapshots, self.request.names, self._component)
        self.description += f"; {share:.1%} of the squared distances from the last, scaled to the run's length"
        super().compute()


class FileDirection(_Given):
    """The tensors of a safetensors file, such as a gradient."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        file = request.file
        if file is None:
            raise ConfigurationError("kind = 'file' needs a file")
        shapes = {name: request.origin.shapes[name] for name in request.names}
        self._tensors = fitting_tensors(file, shapes, request.spec)
        self.sources = {file.name: file_sha256(file)}
        self.description = f"file {file.name}"

    def unscaled(self, name: str) -> np.ndarray:
        """One tensor of the file, float64."""
        return read_tensor(self._tensors, name).astype(np.float64)


KINDS: Mapping[str, Callable[[Request], Direction]] = {
    "random": RandomDirection,
    "lora": SubspaceDirection,
    "lora_complement": SubspaceDirection,
    "displacement": DisplacementDirection,
    "update": UpdateDirection,
    "pca": PrincipalDirection,
    "file": FileDirection,
}
"""`kind` of a direction's configuration → its class."""


def fitting_tensors(file: Path, shapes: Mapping[str, tuple[int, ...]], spec: SliceSpec) -> dict[str, TensorInfo]:
    """The tensors of `file` that move; raises `SnapshotError` unless their names and shapes are exactly `shapes`."""
    if not file.is_file():
        raise SnapshotError(f"{file} is not a file; give a safetensors file with a tensor for each one that moves")
    found = {name: info for name, info in safetensors_header(file).items() if spec.moves(name)}
    for name, shape in shapes.items():
        if name not in found:
            raise SnapshotError(f"{file} has no tensor {name!r}; add it, or leave it out with slice.exclude")
        if found[name].shape != tuple(shape):
            raise SnapshotError(f"{file}: tensor {name!r} has shape {list(found[name].shape)}, expected {list(shape)}")
    if foreign := sorted(set(found) - set(shapes)):
        raise SnapshotError(
            f"{file}: tensor {foreign[0]!r} is not part of the checkpoint; names are the checkpoint's own"
        )
    return found


_BLOCK = 2**20
"""Elements of each snapshot that the principal components' products handle at once."""


def principal_terms(
    snapshots: Sequence[Snapshot], names: Iterable[str], component: int
) -> tuple[list[tuple[float, Snapshot]], float]:
    """A principal component of a run as Σ coefficient · θ over its `snapshots`, and its share of the squared length.

    Li et al. 2018 (arXiv 1712.09913, §7): the right singular vectors of M = [θ_0 − θ_n; …; θ_{n−1} − θ_n], not centred
    again, over the tensors `names`; θ_0 and θ_n are the first and the last of `snapshots`. The vector points the way
    training went (θ_n − θ_0 has no negative part along it) and is as long as ‖θ_n − θ_0‖. Raises
    `ConfigurationError` if M has fewer components: singular values below 1e-5 of the largest count as zero.
    """
    *earlier, last = snapshots
    gram = np.zeros((len(earlier), len(earlier)))
    for name in names:
        size = math.prod(last.tensors[name].shape)
        for start in range(0, size, _BLOCK):
            count = min(_BLOCK, size - start)
            end = last.tensors[name].read(start, count).astype(np.float64)
            rows = np.stack([snapshot.tensors[name].read(start, count) - end for snapshot in earlier])
            gram += rows @ rows.T
    squares, vectors = np.linalg.eigh(gram)
    squares, vectors = squares[::-1], vectors[:, ::-1]
    rank = int(np.sum(squares > 1e-10 * squares[0])) if squares[0] > 0 else 0
    if component > rank:
        raise ConfigurationError(
            f"component = {component} is beyond the rank {rank} of the run's {len(snapshots)} snapshots "
            f"(steps {format_schedule(snapshot.step for snapshot in snapshots)}); lower it or keep more snapshots"
        )
    vector = vectors[:, component - 1]
    pivot = vector[0] if abs(vector[0]) > 1e-9 else vector[np.argmax(np.abs(vector))]
    # Row 0 is θ_0 − θ_n, so training went against a direction on which it has a positive part.
    factors = -np.sign(pivot) * vector * math.sqrt(gram[0, 0] / squares[component - 1])
    terms = [(float(factor), snapshot) for factor, snapshot in zip(factors, earlier, strict=True)]
    return [*terms, (float(-factors.sum()), last)], float(squares[component - 1] / np.trace(gram))
