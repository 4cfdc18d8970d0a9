"""A snapshot with its two directions as tensors under checkpoint names, and the arithmetic of a move on them.

This is the path through the model's own loader; kernel_layout.py is the fast one. Nothing here knows of vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from rlvr_landscape_plugin.config.designs import DRAWN_KINDS
from rlvr_landscape_plugin.directions import (
    AXES,
    Axis,
    SliceSpec,
    Subspace,
    global_scales,
    open_direction,
    scaled_direction,
)
from rlvr_landscape_plugin.serving.worker.threads import in_threads
from rlvr_landscape_plugin.snapshot import Snapshot, read_tensor

_CPU_BLOCK, _GPU_BLOCK = 2**16, 2**26
"""Elements that a move through the loader handles at once: what fits a CPU's cache, what keeps a GPU busy."""


@dataclass
class MoveStats:
    """Sums of one move over all tensors, float64."""

    changed: float = 0.0
    """Σ (rounded(α, β) − rounded(0, 0))² after rounding to the server's dtype."""
    theta: float = 0.0
    """Σ θ²."""

    @property
    def realised_step(self) -> float:
        """‖θ(α,β) − θ‖ / ‖θ‖ as the server really holds it, dimensionless."""
        return math.sqrt(self.changed / self.theta) if self.theta else 0.0


def load_tensors(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    """Every tensor as stored, mapped from its file; refuses NaN and infinity, naming file and tensor.

    What an adapter changes is merged, in float32 and in memory; the rest stays mapped from its base model's files.
    """
    from safetensors import safe_open

    if snapshot.adapter is not None and snapshot.base is not None:
        changed = [*snapshot.adapter.pairs, *snapshot.adapter.replaced]
        merged = {name: torch.from_numpy(snapshot.read(name)) for name in changed}
        return load_tensors(snapshot.base) | merged
    tensors: dict[str, torch.Tensor] = {}
    for file in snapshot.files:
        with safe_open(str(file), framework="pt", device="cpu") as handle:
            own = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
        # One thread per tensor: threads within a tensor wait for each other, which is slow on a busy machine.
        finite = in_threads(lambda tensor: bool(torch.isfinite(tensor).all()), own.values())
        for name, whole in zip(own, finite, strict=True):
            if not whole:
                raise ValueError(f"{file}: tensor {name!r} holds NaN or infinity; this snapshot cannot be measured")
        tensors |= own
    return tensors


def squared(theta: Mapping[str, torch.Tensor]) -> float:
    """Σ θ² over all tensors, float64."""
    return sum(in_threads(lambda t: float(t.to(torch.float32).square().sum(dtype=torch.float64)), theta.values()))


@dataclass
class Slice:
    """A snapshot with its two directions, as tensors under checkpoint names. Knows nothing of vLLM."""

    spec: SliceSpec
    theta: dict[str, torch.Tensor]
    """Pristine weights in the stored dtype."""
    draw: Callable[[Axis, str], torch.Tensor]
    """The part of a direction in a tensor that moves, on the CPU: the same at each call, also in threads."""
    held: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None
    """(δ, η) of each tensor that moves, beside `theta`; None: drawn whenever they are needed."""
    known_square: float | None = None
    """Σ θ², where it is known already."""

    @classmethod
    def build(
        cls,
        theta: dict[str, torch.Tensor],
        spec: SliceSpec,
        files: Mapping[str, str] | None = None,
        dtype: torch.dtype = torch.float32,
        subspace: Subspace | None = None,
        known_square: float | None = None,
    ) -> Slice:
        """Directions that are drawn from the seed, or read from `files`, when needed; rounded to `dtype`.

        `theta`: CPU tensors. `subspace`: that of the snapshot, if it is an adapter. Raises `SnapshotError` for a file
        that is not the one `spec` names, `ValueError` if one is missing, and for a kind that cannot be drawn here.
        """

        def weight(name: str) -> np.ndarray:
            return theta[name].to(torch.float32).numpy()

        shapes = {name: tuple(tensor.shape) for name, tensor in theta.items()}
        read = {}
        for axis in AXES:
            if not spec.drawn(axis):
                if axis not in (files or {}):
                    raise ValueError(f"slice.{axis} is not drawn from the seed, and no file came with it")
                read[axis] = open_direction(spec, axis, Path((files or {})[axis]), shapes)
                for name in read[axis]:
                    read_tensor(read[axis], name)  # NaN is refused here, not in the middle of a move
        part = None if subspace is None else subspace.part
        kinds = {spec.direction(axis).kind for axis in AXES if spec.drawn(axis)} - {"random"}
        if kinds and (subspace is None or not kinds <= set(DRAWN_KINDS)):
            raise ValueError(f"directions of kind {sorted(kinds)} cannot be drawn around this snapshot")
        scales = global_scales(spec, theta, weight, part)

        def draw(axis: Axis, name: str) -> torch.Tensor:
            if axis in read:
                values = read_tensor(read[axis], name)
            else:
                values = scaled_direction(spec, axis, name, weight(name), scales[axis], part)
            return torch.from_numpy(values).to(dtype)

        return cls(spec, theta, draw, known_square=known_square)

    @property
    def moving(self) -> list[str]:
        """Names of the tensors that take part."""
        return [name for name in self.theta if self.spec.moves(name)]

    def hold(self, device: torch.device) -> Slice:
        """The same slice with θ, δ and η resident on `device`."""
        pairs = zip(self.moving, self._pairs(self.moving), strict=True)
        held = {name: (delta.to(device), eta.to(device)) for name, (delta, eta) in pairs}
        theta = {name: tensor.to(device) for name, tensor in self.theta.items()}
        return Slice(self.spec, theta, self.draw, held, self.theta_squared)

    def along(self, axis: Axis) -> Iterator[torch.Tensor | None]:
        """The direction of an axis, drawn tensor by tensor in the order of `theta`; None where it does not move."""
        return in_threads(lambda name: self.draw(axis, name) if self.spec.moves(name) else None, self.theta)

    def _pairs(self, names: Iterable[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if (held := self.held) is not None:
            return (held[name] for name in names)
        wanted: Iterator[tuple[Axis, str]] = ((axis, name) for name in names for axis in AXES)
        parts = in_threads(lambda part: self.draw(*part), wanted)
        return zip(parts, parts, strict=True)

    @cached_property
    def theta_squared(self) -> float:
        """Σ θ² over all tensors, float64."""
        return squared(self.theta) if self.known_square is None else self.known_square

    def at(self, alpha: float, beta: float, dtype: torch.dtype, stats: MoveStats) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, θ + α δ + β η) in `dtype`, one tensor at a time, adding to `stats` on the way."""
        moving = [] if alpha == 0 and beta == 0 else self.moving
        stats.theta = self.theta_squared
        directions = self._pairs(moving)
        for name, theta in self.theta.items():
            if not (moving and self.spec.moves(name)):
                yield name, theta.to(dtype)
                continue
            moved = torch.empty_like(theta, dtype=dtype)
            stats.changed += _move(theta, *next(directions), alpha, beta, moved)
            yield name, moved


def _move(
    theta: torch.Tensor, delta: torch.Tensor, eta: torch.Tensor, alpha: float, beta: float, out: torch.Tensor
) -> float:
    """Write θ + α δ + β η, computed in float32 and cast once, into `out`; returns Σ (out − cast(θ))², float64.

    Block by block, so that a CPU reads each operand from memory once.
    """
    changed = 0.0
    size = _CPU_BLOCK if theta.device.type == "cpu" else _GPU_BLOCK
    flat = [tensor.reshape(-1) for tensor in (theta, delta, eta)]
    target = out.view(-1)
    for start in range(0, target.numel(), size):
        origin, first, second = (tensor[start : start + size] for tensor in flat)
        moved = torch.add(origin.to(torch.float32), first.to(torch.float32), alpha=alpha)
        block = moved.add_(second.to(torch.float32), alpha=beta).to(out.dtype)
        target[start : start + size] = block
        step = block.to(torch.float32) - origin.to(out.dtype).to(torch.float32)
        changed += float(torch.dot(step, step))
    return changed
