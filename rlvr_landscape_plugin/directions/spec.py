"""The slice: two directions in weight space, and how they are scaled.

A random direction is a pure function of (seed, axis, tensor name, shape), and where only its part in an adapter's
subspace or outside of it is kept (subspace.py), of the adapter. Neither the device, the process, the order of
tensors nor the tensor-parallel layout enters, so a random slice is reproducible from its `SliceSpec` and the snapshot
alone, and a server draws it itself. A direction that training gives (displacement, update, principal component, file),
and any that is orthogonalised, is computed once by `prepare_slice`, in float64 and one tensor at a time, and becomes a
float32 safetensors file that servers read and check by its SHA-256.
Everything here is NumPy on whole tensors with checkpoint (Hugging Face) names; the server cuts and fuses them.

Change the draw (`raw_direction`) only together with the name in `GENERATOR`: datasets record it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol

import numpy as np

from rlvr_landscape_plugin.config.designs import DRAWN_KINDS
from rlvr_landscape_plugin.errors import ConfigurationError
from rlvr_landscape_plugin.files import JsonObject

GENERATOR = "numpy-philox-sha256-v1"
"""Name of the random stream; part of every dataset's provenance."""

Axis = Literal["alpha", "beta"]
AXES: tuple[Axis, Axis] = ("alpha", "beta")
Normalization = Literal["none", "tensor", "filter", "global"]


class Part(Protocol):
    """Takes the part of drawn noise that a kind other than `random` keeps (`subspace.Subspace.part`)."""

    def __call__(self, kind: str, name: str, values: np.ndarray) -> np.ndarray:
        """The part of `values`, float64, of the same shape."""
        ...


@dataclass(frozen=True)
class DirectionSpec:
    """What defines one direction besides the slice's seed and globs."""

    kind: str = "random"
    """`random`, `lora`, `lora_complement`, `displacement`, `update`, `pca` or `file`; see `config.DirectionConfig`."""
    normalization: Normalization = "tensor"
    """As `SliceSpec.normalization`; `none` keeps the length that training gave."""
    component: int = 1
    """Which principal component (`pca`)."""
    orthogonal: bool = False
    """Whether its part along the other axis is removed."""
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
    each row (output neuron) of a matrix, vectors do not move (Li et al. 2018, arXiv 1712.09913). `global`: one factor
    for all tensors, ‖δ‖ = ‖θ‖."""
    include: tuple[str, ...] = ("*",)
    """Globs on checkpoint tensor names; only matching tensors move."""
    exclude: tuple[str, ...] = ()
    """Globs on checkpoint tensor names that do not move, stronger than `include`."""
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

    def as_dict(self) -> JsonObject:
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


def _norm(values: np.ndarray, axis: tuple[int, ...] | None = None) -> np.ndarray | np.float64:
    return np.sqrt(np.sum(np.square(values, dtype=np.float64), axis=axis, keepdims=axis is not None))


def _ratio(weight_norm: np.ndarray | np.float64, noise_norm: np.ndarray | np.float64) -> np.ndarray:
    """weight_norm / noise_norm in float64, 0 where the noise is 0 (an empty or constant-zero draw)."""
    weight_norm, noise_norm = np.asarray(weight_norm), np.asarray(noise_norm)
    return np.divide(weight_norm, noise_norm, out=np.zeros_like(weight_norm), where=noise_norm > 0)


def _drawn(spec: SliceSpec, axis: Axis, name: str, shape: tuple[int, ...], part: Part | None) -> np.ndarray:
    """The noise of an axis in one tensor before it is scaled: float32, or the float64 part of it that the kind keeps.

    Raises `ConfigurationError` for a kind that is not drawn, and for one that needs an adapter where there is none.
    """
    noise, kind = raw_direction(spec.seed, axis, name, shape), spec.direction(axis).kind
    if kind == "random":
        return noise
    if kind not in DRAWN_KINDS:
        raise ConfigurationError(f"slice.{axis}: kind = {kind!r} is not drawn from a seed; its file is missing")
    if part is None:
        raise ConfigurationError(f"slice.{axis}: kind = {kind!r} needs a snapshot that is a LoRA adapter")
    return part(kind, name, noise)


def scaled_direction(
    spec: SliceSpec, axis: Axis, name: str, weight: np.ndarray, global_scale: float, part: Part | None = None
) -> np.ndarray:
    """The random δ (axis alpha) or η (axis beta) for one tensor: float32, the shape of `weight`.

    Norms are taken in float64 and applied as one float32 factor (to a part of the noise, in float64). `global_scale` is
    used by `global` only (see `global_scales`). A tensor of zeros does not move under `tensor` and `filter`: its norm
    is 0. `part`: of the adapter that the kinds `lora` and `lora_complement` refer to.
    """
    if not spec.moves(name):
        return np.zeros(weight.shape, dtype=np.float32)
    noise = _drawn(spec, axis, name, weight.shape, part)
    factor = scale_factor(spec.direction(axis).normalization, weight, noise, global_scale)
    return np.multiply(noise, factor.astype(noise.dtype), out=noise).astype(np.float32, copy=False)


def scale_factor(
    normalization: Normalization, weight: np.ndarray, values: np.ndarray, global_scale: float
) -> np.ndarray | np.float64:
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


def global_scales(
    spec: SliceSpec, names: Iterable[str], weight: Callable[[str], np.ndarray], part: Part | None = None
) -> dict[Axis, float]:
    """The factor of `normalization = "global"` for each random axis: ‖θ‖ / ‖noise‖ over the tensors that move."""
    axes: list[Axis] = [axis for axis in AXES if spec.drawn(axis) and spec.direction(axis).normalization == "global"]
    theta = 0.0
    noise: dict[Axis, float] = {axis: 0.0 for axis in axes}
    for name in names if axes else ():
        if spec.moves(name):
            values = weight(name)
            theta += float(_norm(values)) ** 2
            for axis in axes:
                noise[axis] += float(_norm(_drawn(spec, axis, name, values.shape, part))) ** 2
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
