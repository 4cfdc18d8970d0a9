"""The slice: two directions in weight space, and how they are scaled.

A random direction is a pure function of (seed, axis, tensor name, shape). Neither the device, the process, the order of
tensors nor the tensor-parallel layout enters, so a random slice is reproducible from its `SliceSpec` and the snapshot
alone, and a server draws it itself. A direction that training gives (displacement, update, principal component, file),
and any that is orthogonalised, is computed once by `prepare_slice`, in float64 and one tensor at a time, and becomes a
float32 safetensors file that servers read and check by its SHA-256.
Everything here is NumPy on whole tensors with checkpoint (Hugging Face) names; the server cuts and fuses them.

Touch the draw (`raw_direction`) only with a new `GENERATOR` name: datasets record it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlvr_landscape_plugin.config import DirectionConfig, SliceConfig
from rlvr_landscape_plugin.errors import ConfigurationError, SnapshotError, StoreError
from rlvr_landscape_plugin.files import digest, file_sha256, publish_directory
from rlvr_landscape_plugin.schedule import format_schedule
from rlvr_landscape_plugin.snapshot import (
    Snapshot,
    TensorInfo,
    compare_tensors,
    find_snapshots,
    open_snapshot,
    read_tensor,
    safetensors_header,
    step_of_name,
    write_safetensors,
)

GENERATOR = "numpy-philox-sha256-v1"
"""Name of the random stream; part of every dataset's provenance."""

Axis = Literal["alpha", "beta"]
AXES: tuple[Axis, Axis] = ("alpha", "beta")
Normalization = Literal["none", "tensor", "filter", "global"]
_BLOCK = 2**20
"""Elements of each snapshot that the principal components' products handle at once."""


@dataclass(frozen=True)
class DirectionSpec:
    """What defines one direction besides the slice's seed and globs."""

    kind: str = "random"
    """`random`, `displacement`, `update`, `pca` or `file`; see `config.DirectionConfig`."""
    normalization: Normalization = "tensor"
    """As `SliceSpec.normalization`; `none` keeps the length that training gave."""
    component: int = 1
    """Which principal component (`pca`)."""
    orthogonal: bool = False
    """Whether its part along the other axis is taken out."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """What it was computed from: `step <N>` or a file's name → SHA-256."""
    sha256: str = ""
    """Of the file that holds it; empty: the server draws it from the slice's seed."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", dict(sorted(self.sources.items())))


@dataclass(frozen=True)
class SliceSpec:
    """What defines a slice besides the snapshot; JSON-able through `as_dict`."""

    seed: int
    """Any non-negative integer; 0 is a seed like any other."""
    normalization: Normalization = "tensor"
    """`tensor`: ‖δ_w‖ = ‖w‖ for each weight tensor (the default of the published experiment). `filter`: the same for
    each row (output neuron) of a matrix, vectors stand still (Li et al. 2018, arXiv 1712.09913). `global`: one factor
    for all tensors, ‖δ‖ = ‖θ‖."""
    include: tuple[str, ...] = ("*",)
    """Globs on checkpoint tensor names; only matching tensors move."""
    exclude: tuple[str, ...] = ()
    """Globs on checkpoint tensor names that stand still, stronger than `include`."""
    alpha: DirectionSpec | None = None
    """δ; None: drawn from `seed` and scaled as `normalization` says."""
    beta: DirectionSpec | None = None
    """η, likewise."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"slice seed must be a non-negative integer, got {self.seed}")
        if self.normalization not in ("tensor", "filter", "global"):
            raise ValueError(f"normalization must be tensor, filter or global, got {self.normalization!r}")
        object.__setattr__(self, "include", tuple(self.include))
        object.__setattr__(self, "exclude", tuple(self.exclude))
        for axis in AXES:
            if isinstance(given := getattr(self, axis), dict):
                object.__setattr__(self, axis, DirectionSpec(**given))

    def direction(self, axis: Axis) -> DirectionSpec:
        """What defines the direction of an axis."""
        return getattr(self, axis) or DirectionSpec("random", self.normalization)

    def drawn(self, axis: Axis) -> bool:
        """Whether the direction follows from the seed alone; otherwise it is in a file."""
        return not self.direction(axis).sha256

    def moves(self, name: str) -> bool:
        """Whether the tensor `name` takes part in the slice."""
        return any(fnmatch.fnmatchcase(name, glob) for glob in self.include) and not any(
            fnmatch.fnmatchcase(name, glob) for glob in self.exclude
        )

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able dict that `SliceSpec(**d)` turns back into an equal value."""
        data = asdict(self) | {"include": list(self.include), "exclude": list(self.exclude)}
        return {key: value for key, value in data.items() if key not in AXES or value is not None}


def raw_direction(seed: int, axis: Axis, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal draws for one tensor, float32, of `shape`.

    The Philox key is the first 128 bits of SHA-256 over generator, seed, axis and name: tensors of equal shape get
    independent noise, and no global state is used.
    """
    text = "\x00".join((GENERATOR, str(seed), axis, name)).encode()
    key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)


def _norm(values: np.ndarray, axis: tuple[int, ...] | None = None) -> Any:
    return np.sqrt(np.sum(np.square(values, dtype=np.float64), axis=axis, keepdims=axis is not None))


def _ratio(weight_norm: Any, noise_norm: Any) -> np.ndarray:
    """weight_norm / noise_norm in float64, 0 where the noise is 0 (an empty or constant-zero draw)."""
    weight_norm, noise_norm = np.asarray(weight_norm), np.asarray(noise_norm)
    return np.divide(weight_norm, noise_norm, out=np.zeros_like(weight_norm), where=noise_norm > 0)


def scaled_direction(spec: SliceSpec, axis: Axis, name: str, weight: np.ndarray, global_scale: float) -> np.ndarray:
    """The random δ (axis alpha) or η (axis beta) for one tensor: float32, the shape of `weight`.

    Norms are taken in float64 and applied as one float32 factor. `global_scale` is used by `global` only (see
    `global_scales`). A tensor of zeros stands still under `tensor` and `filter`: its norm is 0.
    """
    if not spec.moves(name):
        return np.zeros(weight.shape, dtype=np.float32)
    noise = raw_direction(spec.seed, axis, name, weight.shape)
    return noise * _factor(spec.direction(axis).normalization, weight, noise, global_scale).astype(np.float32)


def _factor(normalization: Normalization, weight: np.ndarray, values: np.ndarray, global_scale: float) -> Any:
    """What scales `values`, a direction's part in one tensor, to `weight`: float64, broadcastable."""
    if normalization == "none":
        return np.float64(1.0)
    if normalization == "global":
        return np.float64(global_scale)
    if normalization == "tensor":
        return _ratio(_norm(weight), _norm(values))
    if weight.ndim < 2:
        return np.float64(0.0)
    rest = tuple(range(1, weight.ndim))
    return _ratio(_norm(weight, rest), _norm(values, rest))


def global_scales(spec: SliceSpec, names: Iterable[str], weight: Callable[[str], np.ndarray]) -> dict[Axis, float]:
    """The factor of `normalization = "global"` for each random axis: ‖θ‖ / ‖noise‖ over the tensors that move."""
    axes: list[Axis] = [axis for axis in AXES if spec.drawn(axis) and spec.direction(axis).normalization == "global"]
    theta = 0.0
    noise: dict[Axis, float] = {axis: 0.0 for axis in axes}
    for name in names if axes else ():
        if spec.moves(name):
            values = weight(name)
            theta += float(_norm(values)) ** 2
            for axis in axes:
                noise[axis] += float(_norm(raw_direction(spec.seed, axis, name, values.shape))) ** 2
    scales: dict[Axis, float] = {axis: 1.0 for axis in AXES}
    for axis in axes:
        scales[axis] = math.sqrt(theta / noise[axis]) if noise[axis] else 0.0
    return scales


def fingerprint(spec: SliceSpec, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """SHA-256 over the slice, and the first 64 draws of every moving tensor on each random axis.

    It tells whether another NumPy still draws the same slice: NumPy promises the stream of bits, not of normals.
    """
    hasher = hashlib.sha256(repr(sorted(spec.as_dict().items())).encode())
    for name in sorted(shapes):
        count = min(64, math.prod(shapes[name]))
        if spec.moves(name) and count:
            for axis in filter(spec.drawn, AXES):
                hasher.update(raw_direction(spec.seed, axis, name, (count,)).astype("<f4").tobytes())
    return hasher.hexdigest()


@dataclass(frozen=True)
class Trajectory:
    """The snapshots of the training run that a snapshot belongs to."""

    origin: Snapshot
    """The snapshot that a slice lies around."""
    folder: Path
    """Where the others were looked for."""
    paths: Mapping[int, Path]
    """Step → directory; empty if the folder holds no `step_<N>`."""
    known: dict[Path, Snapshot]
    """Directory → snapshot for those that are open: trajectories that share this read and hash each one once."""

    @classmethod
    def around(cls, origin: Snapshot, run: Path | None, known: dict[Path, Snapshot] | None = None) -> Trajectory:
        """Look for snapshots in the directory `run`, or in the one that holds `origin`; opens none of them.

        Raises `SnapshotError` when `run` is given and holds none.
        """
        folder = Path(run) if run is not None else origin.path.parent
        try:
            found = find_snapshots(folder)
        except SnapshotError as error:
            if run is not None:
                raise SnapshotError(f"slice.run: {error}") from error
            found = []
        paths = {step_of_name(path): path.resolve() for path in found if path.name.startswith("step_")}
        return cls(origin, folder, paths, {} if known is None else known)

    def open(self, step: int) -> Snapshot:
        """The snapshot of `step`; raises `SnapshotError` unless it is one of the same model, run and name."""
        if step == self.origin.step:
            return self.origin
        path = self.paths[step]
        snapshot = self.known[path] = self.known.get(path) or open_snapshot(path)
        if snapshot.step != step:
            raise SnapshotError(f"{snapshot.path} says step {snapshot.step} in its manifest.json; rename the directory")
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
        """‖θ_t − θ_0‖ and ‖θ_t‖; without a fitting snapshot 0 the former is NaN and the comment says why."""
        theta = math.nan
        try:
            theta = math.sqrt(sum(_squared(self.origin.read(name)) for name in self.origin.tensors))
            first = self.first()
            change, source = [(1.0, self.origin), (-1.0, first)], first.sha256
            norm = math.sqrt(sum(_squared(_combination(change, name)) for name in self.origin.tensors))
        except SnapshotError as error:
            return Displacement(math.nan, theta, f"not known: {error}")
        return Displacement(norm, theta, f"norm(theta - theta_0) over all tensors; theta_0 has sha256 {source}")


@dataclass(frozen=True)
class Displacement:
    """How far training has moved a snapshot: the yardstick of a slice's radius."""

    norm: float
    """‖θ_t − θ_0‖ over all tensors, float64; NaN where it is not known."""
    theta: float
    """‖θ_t‖ over all tensors, float64."""
    comment: str
    """What it was computed from, or why it is not known."""


def _squared(values: np.ndarray) -> float:
    return float(np.sum(np.square(values, dtype=np.float64)))


def _combination(terms: Sequence[tuple[float, Snapshot]], name: str) -> np.ndarray:
    """Σ coefficient · tensor in float64."""
    total = np.zeros(terms[0][1].tensors[name].shape)
    for coefficient, snapshot in terms:
        total += coefficient * snapshot.read(name).astype(np.float64)
    return total


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
        squared = [0.0]

        def tensors() -> Iterable[np.ndarray]:
            for name in self.names:
                values = self._scaled(name)
                if other is not None:
                    values = values - along * other(name).astype(np.float64)
                with np.errstate(over="ignore"):
                    rounded = values.astype(np.float32)
                if not np.isfinite(rounded).all():
                    raise SnapshotError(f"tensor {name!r} of the direction overflows float32; scale it down")
                squared[0] += _squared(rounded)
                yield rounded

        write_safetensors(file, {name: self.origin.shapes[name] for name in self.names}, tensors())
        if squared[0] == 0:
            raise ConfigurationError("the direction is zero in every tensor that moves; choose another")
        if squared[0] < 1e-12 * before:
            raise ConfigurationError("it is parallel to alpha: nothing is left of it; set slice.orthogonalize = false")
        return math.sqrt(squared[0])

    def _unscaled(self, name: str) -> np.ndarray:
        if self.terms:
            return _combination(self.terms, name)
        return read_tensor(self.tensors, name).astype(np.float64)

    def _global_scale(self) -> float:
        if self.wanted.kind == "random":
            return global_scales(self.spec, self.names, self.origin.read)[self.axis]
        if self.wanted.normalization != "global":
            return 1.0
        theta = sum(_squared(self.origin.read(name)) for name in self.names)
        length = sum(_squared(self._unscaled(name)) for name in self.names)
        return math.sqrt(theta / length) if length else 0.0

    def _scaled(self, name: str) -> np.ndarray:
        if self.wanted.kind == "random":
            weight = self.origin.read(name).astype(np.float32)
            return scaled_direction(self.spec, self.axis, name, weight, self.scale).astype(np.float64)
        values = self._unscaled(name)
        if self.wanted.normalization == "none":
            return values
        return values * _factor(self.wanted.normalization, self.origin.read(name), values, self.scale)

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
