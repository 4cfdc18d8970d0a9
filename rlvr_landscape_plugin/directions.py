"""The slice: two seeded directions in weight space, and how they are scaled.

A direction is a pure function of (seed, axis, tensor name, shape). Neither the device, the process, the order of
tensors nor the tensor-parallel layout enters, so a slice is reproducible from its `SliceSpec` and the snapshot alone.
Everything here is NumPy on whole tensors with checkpoint (Hugging Face) names; the server cuts and fuses them.

Touch the draw (`raw_direction`) only with a new `GENERATOR` name: datasets record it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

GENERATOR = "numpy-philox-sha256-v1"
"""Name of the random stream; part of every dataset's provenance."""

Axis = Literal["alpha", "beta"]
AXES: tuple[Axis, Axis] = ("alpha", "beta")
Normalization = Literal["tensor", "filter", "global"]


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

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"slice seed must be a non-negative integer, got {self.seed}")
        if self.normalization not in ("tensor", "filter", "global"):
            raise ValueError(f"normalization must be tensor, filter or global, got {self.normalization!r}")
        object.__setattr__(self, "include", tuple(self.include))
        object.__setattr__(self, "exclude", tuple(self.exclude))

    def moves(self, name: str) -> bool:
        """Whether the tensor `name` takes part in the slice."""
        return any(fnmatch.fnmatchcase(name, glob) for glob in self.include) and not any(
            fnmatch.fnmatchcase(name, glob) for glob in self.exclude
        )

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able dict that `SliceSpec(**d)` turns back into an equal value."""
        return asdict(self) | {"include": list(self.include), "exclude": list(self.exclude)}


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
    """weight_norm / noise_norm as float32, 0 where the noise is 0 (an empty or constant-zero draw)."""
    weight_norm, noise_norm = np.asarray(weight_norm), np.asarray(noise_norm)
    return np.divide(weight_norm, noise_norm, out=np.zeros_like(weight_norm), where=noise_norm > 0).astype(np.float32)


def scaled_direction(spec: SliceSpec, axis: Axis, name: str, weight: np.ndarray, global_scale: float) -> np.ndarray:
    """δ (axis alpha) or η (axis beta) for one tensor: float32, the shape of `weight`.

    Norms are taken in float64 and applied as one float32 factor. `global_scale` is used by `global` only (see
    `global_scales`). A tensor of zeros stands still under `tensor` and `filter`: its norm is 0.
    """
    if not spec.moves(name):
        return np.zeros(weight.shape, dtype=np.float32)
    noise = raw_direction(spec.seed, axis, name, weight.shape)
    if spec.normalization == "global":
        return noise * np.float32(global_scale)
    if spec.normalization == "tensor":
        return noise * _ratio(_norm(weight), _norm(noise))
    if weight.ndim < 2:
        return np.zeros_like(noise)
    rest = tuple(range(1, weight.ndim))
    return noise * _ratio(_norm(weight, rest), _norm(noise, rest))


def global_scales(spec: SliceSpec, names: Iterable[str], weight: Callable[[str], np.ndarray]) -> dict[Axis, float]:
    """The factor of `normalization = "global"` for each axis: ‖θ‖ / ‖noise‖ over the tensors that move."""
    if spec.normalization != "global":
        return {axis: 1.0 for axis in AXES}
    theta, noise = 0.0, dict.fromkeys(AXES, 0.0)
    for name in names:
        if spec.moves(name):
            values = weight(name)
            theta += float(_norm(values)) ** 2
            for axis in AXES:
                noise[axis] += float(_norm(raw_direction(spec.seed, axis, name, values.shape))) ** 2
    return {axis: math.sqrt(theta / noise[axis]) if noise[axis] else 0.0 for axis in AXES}


def fingerprint(spec: SliceSpec, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """SHA-256 over the first 64 draws of every moving tensor on both axes.

    It tells whether another NumPy still draws the same slice: NumPy promises the stream of bits, not of normals.
    """
    digest = hashlib.sha256(repr(sorted(spec.as_dict().items())).encode())
    for name in sorted(shapes):
        count = min(64, math.prod(shapes[name]))
        if spec.moves(name) and count:
            for axis in AXES:
                digest.update(raw_direction(spec.seed, axis, name, (count,)).astype("<f4").tobytes())
    return digest.hexdigest()
