"""Weight moves inside a vLLM worker, as a `WeightTransferEngine` named `landscape`.

The engine holds the pristine snapshot and both directions under their checkpoint names and writes
`pristine + α δ + β η`, computed in float32 and cast once, through the model's own loader inside vLLM's layerwise
reload: the one path that knows every fused projection, tensor-parallel shard and packed kernel layout, and that writes
in place (captured graphs keep their pointers). It never adds to what is already there, so nothing drifts and (0, 0) is
the snapshot bit for bit.

vLLM's worker calls return nothing to the front end, so each call leaves a small JSON report in a directory that the
endpoint created and named in the request.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from rlvr_landscape_plugin.directions import (
    AXES,
    Axis,
    SliceSpec,
    fingerprint,
    global_scales,
    open_direction,
    scaled_direction,
)
from rlvr_landscape_plugin.snapshot import Snapshot, compare_tensors, open_snapshot, read_tensor

BACKEND = "landscape"
_CPU_BLOCK, _GPU_BLOCK = 2**16, 2**26
"""Elements that a move handles at once: what fits a CPU's cache, what keeps a GPU busy."""


def register() -> None:
    """Entry point of `vllm.general_plugins`; safe to call any number of times in one process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    try:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, "LandscapeEngine")
    except ValueError as error:
        if "already registered" not in str(error):
            raise


@dataclass
class LoadRequest(WeightTransferInitInfo):
    """Take a snapshot and a slice in; the weights of the server do not change yet."""

    report: str
    """Directory for this call's reports, one `rank<N>.json` per worker."""
    snapshot: str = ""
    """Directory of the snapshot; empty: change nothing, report checksums of the weights in use."""
    slice: dict[str, Any] = field(default_factory=dict)
    directions: dict[str, str] = field(default_factory=dict)
    """Axis → file, for each axis whose direction is not drawn from the seed."""


@dataclass
class MoveRequest(WeightTransferUpdateInfo):
    """Write θ + α δ + β η."""

    alpha: float
    beta: float
    report: str


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


def _repack_shared(model: torch.nn.Module) -> None:
    """Let vLLM pack again what a reload passes over on a CPU: a tied output head's own copy of the embedding."""
    for module in model.modules():
        weight, method = getattr(module, "weight", None), getattr(module, "quant_method", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel() and method is not None:
            method.process_weights_after_loading(module)


@torch.no_grad()
def checksums(model: Any) -> dict[str, str]:
    """SHA-256 of every parameter as the kernels hold it.

    On a CPU vLLM keeps linear weights in packed form only; those are read back through the kernel itself, as its
    product with the identity, which is exact.
    """
    digests = {}
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            values = parameter.detach()
            if not values.numel() and hasattr(module, "cpu_linear"):
                # A packed layer has lost its shape; the module still knows it.
                identity = torch.eye(module.input_size_per_partition, dtype=values.dtype)
                values = module.cpu_linear(identity, parameter, None)
            raw = values.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            digests[f"{name}.{attribute}"] = hashlib.sha256(raw).hexdigest()
    return digests


def _load_tensors(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    """Every tensor as stored, on the CPU; refuses NaN and infinity, naming file and tensor."""
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    for file in snapshot.files:
        with safe_open(str(file), framework="pt", device="cpu") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                tensor = handle.get_tensor(name)
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"{file}: tensor {name!r} holds NaN or infinity; this snapshot cannot be measured")
                tensors[name] = tensor
    return tensors


@dataclass
class Slice:
    """A snapshot with its two directions, as tensors under checkpoint names. Knows nothing of vLLM."""

    spec: SliceSpec
    theta: dict[str, torch.Tensor]
    """Pristine weights in the stored dtype."""
    directions: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """(δ, η), float32; tensors that stand still are left out."""

    @classmethod
    def build(
        cls,
        theta: dict[str, torch.Tensor],
        spec: SliceSpec,
        device: torch.device,
        files: Mapping[str, str] | None = None,
    ) -> Slice:
        """Draw and scale the random directions, read the others from `files`.

        `theta` (CPU tensors) is moved to `device` together with them. Raises `SnapshotError` for a file that is not the
        one `spec` names, `ValueError` if one is missing.
        """

        def weight(name: str) -> Any:
            return theta[name].to(torch.float32).numpy()

        shapes = {name: tuple(tensor.shape) for name, tensor in theta.items()}
        read = {}
        for axis in AXES:
            if not spec.drawn(axis):
                if axis not in (files or {}):
                    raise ValueError(f"slice.{axis} is not drawn from the seed, and no file came with it")
                read[axis] = open_direction(spec, axis, Path((files or {})[axis]), shapes)

        def direction(axis: Axis, name: str, values: Any) -> torch.Tensor:
            if axis in read:
                return torch.from_numpy(read_tensor(read[axis], name)).to(device)
            return torch.from_numpy(scaled_direction(spec, axis, name, values, scales[axis])).to(device)

        scales = global_scales(spec, theta, weight)
        directions = {}
        for name in theta:
            if spec.moves(name):
                values = weight(name)
                directions[name] = (direction("alpha", name, values), direction("beta", name, values))
        return cls(spec, {name: tensor.to(device) for name, tensor in theta.items()}, directions)

    @cached_property
    def theta_squared(self) -> float:
        """Σ θ² over all tensors, float64."""
        return sum(float(torch.sum(t.to(torch.float32).square(), dtype=torch.float64)) for t in self.theta.values())

    def at(self, alpha: float, beta: float, dtype: torch.dtype, stats: MoveStats) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, θ + α δ + β η) in `dtype`, one tensor at a time, adding to `stats` on the way."""
        still = alpha == 0 and beta == 0
        stats.theta = self.theta_squared
        for name, theta in self.theta.items():
            if still or name not in self.directions:
                yield name, theta.to(dtype)
                continue
            moved = torch.empty_like(theta, dtype=dtype)
            stats.changed += _move(theta, *self.directions[name], alpha, beta, moved)
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
        block = torch.add(origin.to(torch.float32), first, alpha=alpha).add_(second, alpha=beta).to(out.dtype)
        target[start : start + size] = block
        step = block.to(torch.float32) - origin.to(out.dtype).to(torch.float32)
        changed += float(torch.dot(step, step))
    return changed


@dataclass
class _State:
    snapshot: Snapshot
    slice: Slice
    at: tuple[float, float] | None = None
    """Coordinates of the weights in the model; None: the model holds something else."""


class LandscapeEngine(WeightTransferEngine[LoadRequest, MoveRequest]):
    """One per worker. `init_transfer_engine` takes a slice in, `update_weights` moves."""

    init_info_cls = LoadRequest
    update_info_cls = MoveRequest
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._state: _State | None = None

    def init_transfer_engine(self, init_info: LoadRequest) -> None:
        """Read, check and scale; on any error the slice held before stays in force and the report says what failed."""
        if not init_info.snapshot:
            self._report(init_info.report, checksums(self.model))
            return
        started = time.perf_counter()
        try:
            self._check_kernels()
            snapshot = open_snapshot(init_info.snapshot)
            served = open_snapshot(self.model_config.model)
            compare_tensors(served.shapes, snapshot, f"the model this server runs ({served.path.name})")
            spec = SliceSpec(**init_info.slice)
            previous = self._state
            same_bytes = previous is not None and previous.snapshot.sha256 == snapshot.sha256
            theta = _load_tensors(snapshot)
            built = Slice.build(theta, spec, self._home(theta), init_info.directions)
        except (ValueError, OSError, TypeError) as error:
            self._report(init_info.report, {"error": str(error)})
            return
        at = previous.at if previous is not None and same_bytes and previous.at == (0.0, 0.0) else None
        facts = {
            "snapshot_sha256": snapshot.sha256,
            "directions_fingerprint": fingerprint(spec, snapshot.shapes),
            "dtype": str(self.model_config.dtype).removeprefix("torch."),
            "device": str(self.device),
            "parameters": sum(math.prod(shape) for shape in snapshot.shapes.values()),
            "moving_parameters": sum(delta.numel() for delta, _ in built.directions.values()),
            "seconds": time.perf_counter() - started,
        }
        self._state = _State(snapshot, built, at)
        self._report(init_info.report, facts)

    def _check_kernels(self) -> None:
        """Refuse a server whose compiled graph would go on using the weights it was compiled with."""
        if self.device.type == "cpu" and not self.model_config.enforce_eager:
            raise ValueError(
                "this CPU server was started without --enforce-eager: its compiled graph keeps packed copies of the "
                "linear weights, which no move reaches; start it again with --enforce-eager"
            )

    def _home(self, theta: dict[str, torch.Tensor]) -> torch.device:
        """The worker's device if three float32 copies fit into what is free there, else the host's memory."""
        if self.device.type != "cuda":
            return torch.device("cpu")
        need = 3 * 4 * sum(tensor.numel() for tensor in theta.values())
        free, _ = torch.cuda.mem_get_info(self.device)
        return self.device if need < 0.9 * free else torch.device("cpu")

    def start_weight_update(self) -> None:
        """Nothing to prepare: a move is whole within `receive_weights`."""

    def finish_weight_update(self) -> None:
        """Nothing to finish."""

    def receive_weights(self, update_info: MoveRequest) -> None:
        """Move. If writing fails half-way, go back to the coordinates before; the report says which it was."""
        started = time.perf_counter()
        state = self._state
        if state is None:
            self._report(update_info.report, {"error": "no snapshot is loaded on this worker", "weights": "unchanged"})
            return
        before = state.at
        state.at = None
        try:
            stats = self._write(state.slice, update_info.alpha, update_info.beta)
        except Exception as error:  # a mixture of two policies must be repaired or declared, whatever raised
            outcome = {"error": f"{type(error).__name__}: {error}", "weights": "dirty"}
            if before is not None:
                try:
                    self._write(state.slice, *before)
                    state.at = before
                    outcome["weights"] = "restored"
                except Exception as second:
                    outcome["error"] += f"; going back failed too: {type(second).__name__}: {second}"
            self._report(update_info.report, outcome)
            return
        state.at = (update_info.alpha, update_info.beta)
        self._report(
            update_info.report,
            {"realised_step": stats.realised_step, "weights": "moved", "seconds": time.perf_counter() - started},
        )

    def _write(self, slice_: Slice, alpha: float, beta: float) -> MoveStats:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        stats = MoveStats()
        initialize_layerwise_reload(self.model)
        try:
            tensors = slice_.at(alpha, beta, self.model_config.dtype, stats)
            loader: Any = self.model.load_weights
            loader((name, tensor.to(self.device)) for name, tensor in tensors)
        finally:
            finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _repack_shared(self.model)
        return stats

    def _report(self, directory: str, content: dict[str, Any]) -> None:
        path = Path(directory) / f"rank{self.parallel_config.rank}.json"
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(content))
        os.replace(scratch, path)

    def shutdown(self) -> None:
        """Forget slice and snapshot; the model keeps the weights it has."""
        self._state = None
