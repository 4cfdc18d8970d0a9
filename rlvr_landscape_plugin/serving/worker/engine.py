"""Weight moves inside a vLLM worker, as a `WeightTransferEngine` named `landscape`.

The engine holds the unchanged ("pristine") snapshot and both directions, or draws the directions again (memory.py), and
writes `pristine + α δ + β η`, computed in float32 and cast once, in place (captured graphs keep their pointers). It
never adds to what is already there, so errors do not accumulate, and (0, 0) is the snapshot bit for bit. There are two
paths with the same result:

- `loader`: tensors under checkpoint names go through the model's own loader inside vLLM's layerwise reload, which knows
  every fused projection, tensor-parallel shard and packed kernel layout. Right for every model, and slow.
- `kernel` (kernel_layout.py): θ, δ and η went through the loader once, when the slice was loaded; a move is arithmetic
  on the parameters, bound by memory. It is used if a trial move to random coordinates left the same weights, by
  SHA-256, as the loader; one trial counts for all slices of a snapshot in which the same tensors move.

vLLM's worker calls return nothing to the front end, so each call leaves a small JSON report in a directory that the
endpoint created and named in the request.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlvr_landscape_plugin.directions import (
    AXES,
    SliceSpec,
    fingerprint,
)
from rlvr_landscape_plugin.serving import access, versions
from rlvr_landscape_plugin.serving.protocol import MOVE_PATH_VARIABLE
from rlvr_landscape_plugin.serving.worker import memory, waiting
from rlvr_landscape_plugin.serving.worker.ahead import DrawnAhead
from rlvr_landscape_plugin.serving.worker.kernel_layout import (
    Layout,
    Origin,
    UnsupportedLayoutError,
    build_layout,
)
from rlvr_landscape_plugin.serving.worker.packed import keep_plain, packable, repack_shared, unpacked
from rlvr_landscape_plugin.serving.worker.slice_tensors import MoveStats, Slice
from rlvr_landscape_plugin.serving.worker.source import Source, slice_key
from rlvr_landscape_plugin.snapshot import Snapshot

try:
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
except ImportError:
    versions.require()  # says what is wrong with this vLLM
    raise

logger = logging.getLogger("vllm.rlvr_landscape")

BACKEND = "landscape"


def register() -> None:
    """Entry point of `vllm.general_plugins`; safe to call any number of times in one process.

    In a vLLM that the plugin does not work in, only the log says so: the server may be one that needs no landscape.
    """
    try:
        versions.require()
    except versions.UnsupportedVllmError as error:
        logger.error("no weight engine %r in this server: %s", BACKEND, error)
        return
    waiting.sleep_while_waiting()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    try:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, "LandscapeEngine")
    except ValueError as error:
        if "already registered" not in str(error):
            raise


@dataclass
class LoadRequest(WeightTransferInitInfo):
    """Load a snapshot and a slice; the weights of the server do not change yet."""

    report: str
    """Directory for this call's reports, one `rank<N>.json` per worker."""
    snapshot: str = ""
    """Directory of the snapshot; empty: change nothing, report checksums of the weights in use."""
    slice: dict[str, Any] = field(default_factory=dict)
    directions: dict[str, str] = field(default_factory=dict)
    """Axis → file, for each axis whose direction is not drawn from the seed."""
    base: str = ""
    """Directory of the model that the snapshot belongs to, if it is an adapter."""
    ahead: bool = False
    """Load nothing now; begin to draw `slice` of the snapshot that is loaded, in the background."""


@dataclass
class MoveRequest(WeightTransferUpdateInfo):
    """Write θ + α δ + β η."""

    alpha: float
    beta: float
    report: str


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
                values = unpacked(module, parameter)
            digests[f"{name}.{attribute}"] = _digest(values)
    return digests


def _digest(values: torch.Tensor) -> str:
    raw = values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()


@dataclass
class _State:
    source: Source
    how: Slice | Layout
    """By checkpoint names for the loader, or in kernel layout."""
    names: tuple[str, ...]
    """Of the checkpoint's tensors, in the order in which a load takes them."""
    held_as: torch.dtype | None
    """Dtype of the directions; None: they are drawn for each move."""
    at: tuple[float, float] | None = None
    """Coordinates of the weights in the model; None: the model holds something else."""

    @property
    def on_host(self) -> int:
        """Bytes of the host's memory that δ and η take up, and θ where it is not mapped from files."""
        if isinstance(self.how, Layout):
            return self.how.nbytes if self.how.home.type == "cpu" else 0
        return sum(t.nbytes for pair in (self.how.held or {}).values() for t in pair if t.device.type == "cpu")


class LandscapeEngine(versions.NoTrainer, WeightTransferEngine[LoadRequest, MoveRequest]):
    """One per worker. `init_transfer_engine` loads a slice, `update_weights` moves."""

    init_info_cls = LoadRequest
    update_info_cls = MoveRequest
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        access.refuse_development_mode()
        self._state: _State | None = None
        self._plain = False
        """Whether linear layers of this CPU hold their weights as they are from now on."""
        self._tried: set[tuple[object, ...]] = set()
        """What a trial of the kernel path was passed for: snapshot, tensors that move, place and dtype of the
        directions."""
        self._seconds: dict[str, float] = {}
        """What loading the present slice spent its time on."""
        self._ahead: DrawnAhead | None = None
        """The slice that is probably loaded next."""
        self._source: Source | None = None
        """The snapshot that was loaded last."""
        self._origin: tuple[object, Origin] | None = None
        """It in kernel layout, and where."""

    def init_transfer_engine(self, init_info: LoadRequest) -> None:
        """Read, check and scale; after any error the report says what failed, and the slice that was loaded before
        stays loaded.

        Raises `AccessError` for a report directory that the routes did not make.

        Only if weights could not be put back after the trial of the kernel path is no slice held, and the report says
        `dirty`.
        """
        access.check_report_directory(init_info.report)
        if init_info.ahead:
            self._report(init_info.report, self._draw_ahead(init_info.slice))
            return
        if not init_info.snapshot:
            self._report(init_info.report, checksums(self.model))
            return
        started = time.perf_counter()
        self._seconds = {}
        # Before any worker of this machine frees memory or takes more.
        free = memory.free_on_host() / self._workers + (0 if self._state is None else self._state.on_host)
        free += 0 if self._ahead is None else self._ahead.nbytes
        try:
            wish = memory.asked()
            self._check_kernels()
            source = self._opened(init_info.snapshot, init_info.base)
            snapshot = source.snapshot
            files = {
                axis: str(access.confined(file, f"direction {axis}")) for axis, file in init_info.directions.items()
            }
            spec = SliceSpec(**init_info.slice)
            dtype = memory.HALF if wish == "half" else torch.float32
            ahead, self._ahead = self._ahead, None
            slice_ = None
            if ahead is not None:
                if ahead.key == slice_key(snapshot, spec, dtype):
                    slice_ = ahead.take()
                else:
                    ahead.cancel()
                    ahead = None
            if slice_ is None:
                slice_ = source.slice(spec, files, dtype)
            if snapshot.adapter is not None:
                source.theta = None
            moving = sum(slice_.theta[name].numel() for name in slice_.moving)
        except (ValueError, OSError, TypeError) as error:
            self._report(init_info.report, {"error": str(error)})
            return
        self._seconds["read"] = time.perf_counter() - started
        at = None
        if self._state is not None and self._state.at == (0.0, 0.0):
            at = (0.0, 0.0) if self._state.source.snapshot.sha256 == snapshot.sha256 else None
        # Its memory is needed for the next.
        self._state = None
        try:
            how, reason, place = self._choose(slice_, snapshot, wish, free)
        except Exception as error:  # the check writes weights; if they could not be put back, nothing is known of them
            outcome = {"error": f"checking the moves failed: {type(error).__name__}: {error}", "weights": "dirty"}
            self._report(init_info.report, outcome)
            return
        self._state = _State(
            *(source, how, tuple(slice_.theta)),
            held_as=None if place.mode == "regenerated" else dtype,
            at=at,
        )
        drawn = {"parts": 0, "ready": 0, "errors": []}
        if ahead is not None:
            drawn = {"parts": ahead.count, "ready": ahead.used, "errors": ahead.errors[:3]}
            ahead.cancel()
        for error in drawn["errors"]:
            logger.error("landscape: drawing slice %s ahead failed: %s", spec.seed, error)
        kernel = isinstance(how, Layout)
        held = str(dtype).removeprefix("torch.")
        where = f"{held} on {self.device if place.on_device else 'the host'}"
        if place.mode == "regenerated":
            where = "regenerated for each move"
        facts = {
            "snapshot_sha256": snapshot.sha256,
            "directions_fingerprint": fingerprint(spec, snapshot.shapes),
            "dtype": str(self.model_config.dtype).removeprefix("torch."),
            "device": str(self.device),
            "parameters": sum(math.prod(shape) for shape in snapshot.shapes.values()),
            "moving_parameters": moving,
            "theta": source.theta_squared,
            "theta_share": how.squared("theta") if isinstance(how, Layout) else source.theta_squared / self._ranks,
            "move_path": "kernel" if kernel else "loader",
            "move_path_reason": reason,
            "directions_memory": where,
            "directions_memory_reason": place.reason,
            "directions_dtype": held,
            "ahead": drawn,
            "seconds": time.perf_counter() - started,
            "seconds_of": {what: round(seconds, 4) for what, seconds in self._seconds.items()},
        }
        spent = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in self._seconds.items())
        logger.info(
            "landscape: %s moves by the %s path (%s), directions %s (%s), loaded in %.1f s (%s)",
            *(snapshot.path.name, facts["move_path"], reason, where, place.reason, facts["seconds"], spent),
        )
        self._report(init_info.report, facts)

    def _opened(self, path: str, base: str) -> Source:
        """The snapshot at `path`: the one that was read before, as long as its files do not change."""
        self._source = Source.opened(path, base, self.model_config.model, self._source)
        return self._source

    def _draw_ahead(self, slice_: dict[str, Any]) -> dict[str, Any]:
        """Begin to draw a slice of the snapshot that is loaded; says why not, where it does not begin."""
        state = self._state
        if state is None:
            return {"error": "no snapshot is loaded on this worker"}
        try:
            spec = SliceSpec(**slice_)
        except (ValueError, TypeError) as error:
            return {"error": f"not a slice: {error}"}
        if reason := self._not_ahead(state, spec):
            return {"begun": False, "reason": reason}
        dtype = state.held_as or torch.float32
        key = slice_key(state.source.snapshot, spec, dtype)
        if self._ahead is not None:
            if self._ahead.key == key:
                return {"begun": True, "reason": ""}
            self._ahead.cancel()
        names = [name for name in state.names if spec.moves(name)]
        self._ahead = DrawnAhead(key, names, functools.partial(state.source.slice, spec, {}, dtype))
        return {"begun": True, "reason": ""}

    def _not_ahead(self, state: _State, spec: SliceSpec) -> str:
        """Why a slice is not drawn ahead; empty if it can be."""
        if not all(spec.drawn(axis) for axis in AXES):
            return "its directions are read from files"
        if state.held_as is None:
            return "directions are drawn for each move"
        moving = sum(math.prod(shape) for name, shape in state.source.snapshot.shapes.items() if spec.moves(name))
        free = memory.free_on_host() / self._workers + (0 if self._ahead is None else self._ahead.nbytes)
        return memory.too_little(2 * state.held_as.itemsize * moving, free)

    @property
    def _ranks(self) -> int:
        return getattr(self.parallel_config, "tensor_parallel_size", 1)

    @property
    def _workers(self) -> int:
        """Workers of this server on this machine, which share its memory."""
        return getattr(self.parallel_config, "local_world_size", 1)

    def _choose(
        self, slice_: Slice, snapshot: Snapshot, wish: memory.Asked, free: float
    ) -> tuple[Slice | Layout, str, memory.Memory]:
        """The kernel path if the model allows it and it passes its check, else the loader's; why; and the memory.

        `free`: this worker's share of the host's memory, bytes. The weights are afterwards what they were.
        """
        unfit = self._unfit(slice_)
        if unfit is None:
            place = self._place(slice_, wish, free, kernel=True)
            try:
                if place.mode == "regenerated":
                    raise UnsupportedLayoutError(f"it needs resident directions ({place.reason})")
                if self.device.type == "cpu" and not packable(self.model_config.dtype, self._ranks):
                    self._plain = True
                    self._keep_plain()
                return *self._checked(slice_, snapshot, place), place
            except UnsupportedLayoutError as error:
                logger.warning("landscape: moves take the slow path through the loader: %s", error)
                unfit = str(error)
        self._origin = None
        place = self._place(slice_, wish, free, kernel=False)
        if place.mode != "regenerated":
            slice_ = slice_.hold(self.device if place.on_device else torch.device("cpu"))
        return slice_, unfit, place

    def _place(self, slice_: Slice, wish: memory.Asked, free: float, kernel: bool) -> memory.Memory:
        """Where the directions go.

        Ranks share the kernel layout's tensors, the loader's are whole on each of them. Loading a slice in kernel
        layout needs one more direction on the host for a short time, and a copy of the weights.
        """
        size = memory.HALF.itemsize if wish == "half" else torch.float32.itemsize
        theta = sum(tensor.nbytes for tensor in slice_.theta.values())
        weights = sum(tensor.numel() for tensor in slice_.theta.values())
        if kernel:
            if self.device.type == "cpu" and packable(self.model_config.dtype, self._ranks):
                theta = torch.float32.itemsize * weights
            on_device = (theta + 2 * size * weights) / self._ranks
            on_host = (theta + 3 * size * weights + self.model_config.dtype.itemsize * weights) / self._ranks
        else:
            # On the host θ stays mapped from its files.
            on_host = 2 * size * sum(slice_.theta[name].numel() for name in slice_.moving)
            on_device = theta + on_host
        device = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            device = (on_device, torch.cuda.mem_get_info(self.device)[0])
        return memory.choose(wish, device, (on_host, free))

    def _unfit(self, slice_: Slice) -> str | None:
        """Why the kernel path is not even tried."""
        if os.environ.get(MOVE_PATH_VARIABLE, "kernel") != "kernel":
            return f"{MOVE_PATH_VARIABLE} asks for it"
        if not slice_.moving:
            return "no tensor moves"
        if getattr(self.model_config, "quantization", None):
            return "the model is quantised"
        if getattr(self.parallel_config, "pipeline_parallel_size", 1) > 1:
            return "pipeline parallelism"
        return None

    def _checked(self, slice_: Slice, snapshot: Snapshot, place: memory.Memory) -> tuple[Layout, str]:
        """Both paths to random coordinates, which must leave the same bits; then back to the weights before.

        Once per snapshot, tensors that move, and place and dtype of the directions: whether the paths agree depends on
        the model and the layout, not on the numbers of a direction. Later slices are only brought into the layout.
        """
        home = self.device if place.on_device else torch.device("cpu")
        held_as = memory.HALF if place.mode == "half" else torch.float32
        where = (snapshot.sha256, home)
        if self._origin is not None and self._origin[0] != where:
            # Its memory is needed.
            self._origin = None
        kind = (snapshot.sha256, tuple(slice_.moving), home, held_as)
        if kind in self._tried:
            layout = self._laid_out(slice_, home, held_as, None if self._origin is None else self._origin[1])
            self._origin = None if layout.origin is None else (where, layout.origin)
            return layout, "same weights as by the loader in the trial of an earlier slice"
        draw = random.Random(snapshot.sha256)
        point = (draw.uniform(0.5, 1.5), -draw.uniform(0.5, 1.5))
        tensors = [*self.model.parameters(), *self.model.buffers()]
        before = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]
        # What packs weights also makes a new function, so the old ones still hold the old weights.
        kernels = [(module, module.cpu_linear) for module in self.model.modules() if hasattr(module, "cpu_linear")]

        def put_back() -> None:
            with torch.no_grad():
                for tensor, values in before:
                    tensor.copy_(values)
            for module, kernel in kernels:
                module.cpu_linear = kernel

        def held() -> dict[str, str]:
            return checksums(self.model) | {name: _digest(buffer) for name, buffer in self.model.named_buffers()}

        try:
            with self._timed("trial"):
                self._write_by_loader(slice_, *point)
                expected = held()
                # Weights that the kernel path did not write would now differ.
                put_back()
            layout = self._laid_out(slice_, home, held_as)
            with self._timed("trial"):
                self._write(layout, *point)
                same = held() == expected
            if not same:
                raise UnsupportedLayoutError("its weights differ from the loader's in a trial move")
        except UnsupportedLayoutError:
            raise
        except Exception as error:
            raise UnsupportedLayoutError(f"a trial move failed: {type(error).__name__}: {error}") from error
        finally:
            put_back()
        self._tried.add(kind)
        self._origin = None if layout.origin is None else (where, layout.origin)
        return layout, f"same weights as by the loader at ({point[0]:.3f}, {point[1]:.3f})"

    def _laid_out(
        self, slice_: Slice, home: torch.device, held_as: torch.dtype, origin: Origin | None = None
    ) -> Layout:
        """The slice in kernel layout; raises `UnsupportedLayoutError`. The weights stay as they are."""
        delta, eta = (slice_.along(axis) for axis in AXES)
        try:
            with self._timed("draw"):
                return build_layout(
                    *(self.model, self.model_config.dtype, slice_.theta, delta, eta, held_as, home),
                    ranks=self._ranks,
                    origin=origin,
                )
        except UnsupportedLayoutError:
            raise
        except Exception as error:
            raise UnsupportedLayoutError(f"a trial move failed: {type(error).__name__}: {error}") from error

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[what] = self._seconds.get(what, 0.0) + time.perf_counter() - started

    def _check_kernels(self) -> None:
        """Refuse a server whose compiled graph would still use the weights it was compiled with."""
        if self.device.type == "cpu" and not self.model_config.enforce_eager:
            raise ValueError(
                "this CPU server was started without --enforce-eager: its compiled graph keeps packed copies of the "
                "linear weights, which no move reaches; start it again with --enforce-eager"
            )

    def start_weight_update(self) -> None:
        """Nothing to prepare: a move is whole within `receive_weights`."""

    def finish_weight_update(self) -> None:
        """Nothing to finish."""

    def receive_weights(self, update_info: MoveRequest) -> None:
        """Move. If writing fails half-way, go back to the coordinates before; the report says which it was."""
        access.check_report_directory(update_info.report)
        started = time.perf_counter()
        state = self._state
        if state is None:
            self._report(update_info.report, {"error": "no snapshot is loaded on this worker", "weights": "unchanged"})
            return
        before = state.at
        state.at = None
        try:
            changed = self._write(state.how, update_info.alpha, update_info.beta)
        except Exception as error:  # after any error, a mixture of two policies must be repaired or reported
            outcome = {"error": f"{type(error).__name__}: {error}", "weights": "dirty"}
            if before is not None:
                try:
                    self._write(state.how, *before)
                    state.at = before
                    outcome["weights"] = "restored"
                except Exception as second:
                    outcome["error"] += f"; going back failed too: {type(second).__name__}: {second}"
            self._report(update_info.report, outcome)
            return
        state.at = (update_info.alpha, update_info.beta)
        self._report(
            update_info.report,
            {
                "changed": changed,
                "theta": state.source.theta_squared,
                "weights": "moved",
                "seconds": time.perf_counter() - started,
            },
        )

    def _write(self, how: Slice | Layout, alpha: float, beta: float) -> float:
        """Move; returns this rank's share of Σ (rounded(α, β) − rounded(0, 0))²."""
        if isinstance(how, Slice):
            return self._write_by_loader(how, alpha, beta)
        self._keep_plain()
        return how.write(alpha, beta)

    def _keep_plain(self) -> None:
        if self.device.type == "cpu":
            keep_plain(self.model, self.model_config.dtype, self._ranks)

    def _write_by_loader(self, slice_: Slice, alpha: float, beta: float) -> float:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        stats = MoveStats()
        with versions.worker_config(self.vllm_config):
            initialize_layerwise_reload(self.model)
            try:
                tensors = slice_.at(alpha, beta, self.model_config.dtype, stats)
                loader: Any = self.model.load_weights
                loader((name, tensor.to(self.device)) for name, tensor in tensors)
            finally:
                finalize_layerwise_reload(self.model, self.model_config)
            if self._plain:
                self._keep_plain()
            elif self.device.type == "cpu":
                repack_shared(self.model)
        # Every rank reads the whole checkpoint.
        return stats.changed / self._ranks

    def _report(self, directory: str, content: dict[str, Any]) -> None:
        path = Path(directory) / f"rank{self.parallel_config.rank}.json"
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(content))
        os.replace(scratch, path)

    def shutdown(self) -> None:
        """Drop slice and snapshot; the model keeps the weights it has."""
        self._state = self._source = self._origin = None
        if self._ahead is not None:
            self._ahead.cancel()
            self._ahead = None
