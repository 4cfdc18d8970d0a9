"""Moves at memory speed: the slice in the layout that the kernels read.

Loading an unquantised checkpoint is linear: the model's loader copies, concatenates and cuts. So θ, δ and η go through
it once, into float32 stand-ins for the model's parameters, and a move is `p ← cast(θ + α δ + β η)` for each parameter,
in place, in blocks that fit a cache. Whether loading was linear is for the caller to check, by checksums after the same
move on both paths.

On a CPU vLLM keeps linear weights in opaque packed buffers, which nothing can write in place. Packing float32 only
permutes and pads, so θ, δ and η are packed too, by the same library (oneDNN, through torch), and a move writes the
packed buffer that the layer then multiplies with. Where that cannot be done (packed bfloat16 has another order than
float32), layers keep their weights as they are (`packed.keep_plain`).
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterable, Iterator
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

import torch

from rlvr_landscape_plugin.serving.worker.packed import PackedLinear, memory_of, pack, packable
from rlvr_landscape_plugin.serving.worker.threads import workers

_CPU_BLOCK, _GPU_BLOCK = 2**17, 2**24
"""Elements that a move handles at once: what stays in a core's cache, what keeps a GPU busy."""
_CHUNK = 2**20
"""Elements that a thread takes on at a time."""
_MOST_RUNS = 4096
"""Above this number of pieces of checkpoint tensors in one parameter, copies on other ranks are not distinguished."""
_STORED = (torch.float32, torch.bfloat16, torch.float16)

Weights = Iterable[tuple[str, torch.Tensor]]
Key = tuple[str, str]
"""Module's name and parameter's attribute."""


class UnsupportedLayoutError(Exception):
    """The model cannot move in kernel layout; the message says why."""


@dataclass
class Part:
    """One parameter of the model, its θ, δ and η as flat tensors of its length."""

    module: Any
    attribute: str
    theta: torch.Tensor
    """In the stored dtype."""
    delta: torch.Tensor
    eta: torch.Tensor
    """float32 or bfloat16, as δ."""
    shares: list[tuple[int, int, float]]
    """(start, stop, 1 / number of ranks with a copy) of the elements that come from the checkpoint."""
    packed: torch.Tensor | None = None
    """The oneDNN tensor that a linear layer of a CPU multiplies with; θ, δ and η are then in its order, padded."""

    def destination(self) -> torch.Tensor:
        """What a move writes, flat, and what the kernel will read; looked up each time, because a reload replaces
        it."""
        if self.packed is not None:
            self.module.cpu_linear = PackedLinear(self.packed)
            return memory_of(self.packed)
        live = getattr(self.module, self.attribute).detach()
        if live.numel() != self.theta.numel() or not live.is_contiguous():
            raise RuntimeError(f"{self.attribute} of a {type(self.module).__name__} no longer has the layout it had")
        return live.view(-1)


@dataclass
class Origin:
    """A checkpoint in kernel layout, which all slices around it share."""

    shapes: dict[str, tuple[int, ...]]
    """Checkpoint name → shape, in the order of loading."""
    theta: dict[Key, torch.Tensor]
    """Flat, one tensor per parameter that the checkpoint fills."""
    shares: dict[Key, list[tuple[int, int, float]]]
    packed: dict[Key, torch.Tensor]
    """oneDNN tensors that moves write; shared by all slices."""
    squared: float
    """Σ θ² under checkpoint names."""


@dataclass
class Layout:
    """A slice in kernel layout."""

    parts: list[Part]
    home: torch.device
    """Where θ, δ and η are: with the parameters, or on the host."""
    origin: Origin | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of θ, δ and η."""
        return sum(tensor.nbytes for part in self.parts for tensor in (part.theta, part.delta, part.eta))

    def squared(self, attribute: str) -> float:
        """Σ of this rank's share of `theta`², `delta`² or `eta`², float64."""
        return sum(
            weight * float(getattr(part, attribute)[start:stop].to(torch.float32).square().sum(dtype=torch.float64))
            for part in self.parts
            for start, stop, weight in part.shares
        )

    @torch.no_grad()
    def write(self, alpha: float, beta: float) -> float:
        """Set every parameter to θ + α δ + β η; returns this rank's share of Σ (rounded(α, β) − rounded(0, 0))².

        When this returns or raises, nothing is being written any more.
        """
        targets = [part.destination() for part in self.parts]
        if alpha == 0 and beta == 0:
            for part, target in zip(self.parts, targets, strict=True):
                target.copy_(part.theta)
            return 0.0
        host = self.home.type == "cpu"
        size = _CHUNK if host else _GPU_BLOCK
        chunks = iter(
            [
                (tuple(t[at : min(at + size, stop)] for t in (target, part.theta, part.delta, part.eta)), weight)
                for part, target in zip(self.parts, targets, strict=True)
                for start, stop, weight in part.shares
                for at in range(start, stop, size)
            ]
        )
        if not host:
            return float(sum(weight * _move(tensors, alpha, beta).to(torch.float64) for tensors, weight in chunks))
        # Threads copy to a GPU on a stream of their own.
        devices = {target.device for target in targets if target.is_cuda}
        for device in devices:
            torch.cuda.synchronize(device)
        # One iterator for all threads, so that a core with other work takes fewer chunks.
        pool, threads = workers()
        futures = [pool.submit(_move_chunks, chunks, alpha, beta) for _ in range(threads)]
        wait(futures)
        for device in devices:
            torch.cuda.synchronize(device)
        return sum(future.result() for future in futures)


def _move(
    block: tuple[torch.Tensor, ...], alpha: float, beta: float, scratch: torch.Tensor | None = None
) -> torch.Tensor:
    """Write θ + α δ + β η, computed in float32 and cast once, into the first of `block` (out, θ, δ, η).

    Returns Σ (out − cast(θ))², float32. `scratch`: float32, at least as long.
    """
    out, theta, delta, eta = block
    if torch.float32 not in (theta.dtype, delta.dtype):
        theta = theta.to(torch.float32)
    direct = out.dtype == torch.float32 and out.device == theta.device
    moved = torch.add(theta, delta, alpha=alpha, out=out if direct else None).add_(eta, alpha=beta)
    if direct:
        step = torch.sub(moved, theta, out=None if scratch is None else scratch[: moved.numel()])
    else:
        rounded = moved.to(out.dtype)
        out.copy_(rounded)
        step = rounded.to(torch.float32).sub_(theta.to(out.dtype))
    return step.square_().sum()


@torch.no_grad()
def _move_chunks(chunks: Iterator[tuple[tuple[torch.Tensor, ...], float]], alpha: float, beta: float) -> float:
    scratch = torch.empty(_CPU_BLOCK, dtype=torch.float32)
    changed = 0.0
    for tensors, weight in chunks:
        for block in zip(*(tensor.split(_CPU_BLOCK) for tensor in tensors), strict=True):
            changed += weight * float(_move(block, alpha, beta, scratch))
    return changed


def build_layout(
    model: Any,
    dtype: torch.dtype,
    theta: dict[str, torch.Tensor],
    delta: Iterable[torch.Tensor | None],
    eta: Iterable[torch.Tensor | None],
    directions_dtype: torch.dtype,
    home: torch.device,
    ranks: int = 1,
    origin: Origin | None = None,
) -> Layout:
    """Send θ (checkpoint names), δ and η through the model's loader; its weights stay as they are.

    `delta` and `eta` are in the order of `theta`, None for tensors that do not move, and are read one at a time; their
    values must be exact in `directions_dtype`. `ranks` is the tensor-parallel size. `origin`: that of an earlier layout
    of the same checkpoint in the same place; then only δ and η are sent. Raises `UnsupportedLayoutError`, also for a
    model that does not hold every tensor exactly once (which is known for one rank only).
    """
    modules = dict(model.named_modules())
    if origin is None:
        origin = _origin(model, modules, dtype, theta, home, ranks)
    first, given_first = _flat(model, origin.shapes, delta, directions_dtype, home, origin.packed, origin.theta)
    second, given_second = _flat(model, origin.shapes, eta, directions_dtype, home, origin.packed, origin.theta)
    parts = [
        Part(
            *(modules[key[0]], key[1], values, first[key], second[key]),
            shares=origin.shares[key],
            packed=origin.packed.get(key),
        )
        for key, values in origin.theta.items()
    ]
    layout = Layout(parts, home, origin)
    given = (origin.squared, given_first, given_second)
    held = [layout.squared(attribute) for attribute in ("theta", "delta", "eta")]
    if ranks == 1 and any(abs(a - b) > 1e-9 * b for a, b in zip(held, given, strict=True)):
        raise UnsupportedLayoutError("the model does not hold every tensor of the checkpoint exactly once")
    return layout


def _origin(
    model: Any,
    modules: dict[str, Any],
    dtype: torch.dtype,
    theta: dict[str, torch.Tensor],
    home: torch.device,
    ranks: int,
) -> Origin:
    """A checkpoint in kernel layout; raises `UnsupportedLayoutError`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in theta.items()}
    kinds = {tensor.dtype for tensor in theta.values()}
    stored = kinds.pop() if len(kinds) == 1 and kinds <= set(_STORED) else torch.float32
    chosen, owners = _owners(model, dtype, shapes, home, ranks)
    packed = {
        key: pack(torch.empty(shape, dtype=torch.float32))
        for key, shape in chosen.items()
        if not getattr(modules[key[0]], key[1]).numel()
    }
    # Packed in float32; a checkpoint of 16-bit floats stays so where parameters are written as they are.
    flat, squared = _flat(model, shapes, theta.values(), torch.float32 if packed else stored, home, packed, chosen)
    shares = {key: [(0, values.numel(), 1.0)] if ranks == 1 else owners[key] for key, values in flat.items()}
    return Origin(shapes, flat, shares, packed, squared)


def _flat(
    model: Any,
    shapes: dict[str, tuple[int, ...]],
    tensors: Iterable[torch.Tensor | None],
    dtype: torch.dtype,
    home: torch.device,
    packed: dict[Key, torch.Tensor],
    chosen: Iterable[Key],
) -> tuple[dict[Key, torch.Tensor], float]:
    """Tensors of a checkpoint (None: zeros) in kernel layout, flat, of `dtype`; and the sum of their squares."""
    given = 0.0

    def named() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal given
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            if tensor is None:
                yield name, torch.zeros((), dtype=torch.float32).expand(shape)
                continue
            values = tensor.to(torch.float32)
            given += float(values.square().sum(dtype=torch.float64))
            yield name, values

    captured = _capture(model, named(), home, torch.float32 if packed else dtype)
    if home.type != "cpu":
        return {key: captured[key].view(-1) for key in chosen}, given
    lengths = {key: memory_of(packed[key]).numel() if key in packed else captured[key].numel() for key in chosen}
    result = dict(zip(lengths, _empty(sum(lengths.values()), dtype).split(list(lengths.values())), strict=True))
    for key, place in result.items():
        values = captured.pop(key)
        if key in packed:
            values = pack(values)
        place.copy_(memory_of(values) if key in packed else values.view(-1))
    return result, given


def _empty(length: int, dtype: torch.dtype) -> torch.Tensor:
    """One flat tensor, on huge pages where a host has them: a move reads three of these from end to end."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(length, dtype=dtype)
    pages = mmap.mmap(-1, max(1, length * dtype.itemsize))
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=length)


def _owners(
    model: Any, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]], home: torch.device, ranks: int
) -> tuple[dict[Key, torch.Size], dict[Key, list[tuple[int, int, float]]]]:
    """The parameters that the checkpoint fills with their shapes, and for several ranks the shares of each.

    Found by loading tensors that hold their own number everywhere.
    """
    numbers = {name: number for number, name in enumerate(shapes, 1)}
    marks = _capture(
        model,
        ((name, torch.full((), numbers[name], dtype=torch.float32).expand(shape)) for name, shape in shapes.items()),
        home,
        torch.float32,
    )
    chosen: dict[int, Key] = {}
    runs: dict[Key, list[tuple[int, int, int]]] = {}
    held: dict[int, int] = {}
    modules = dict(model.named_modules())
    for key, mark in marks.items():
        module = modules[key[0]]
        live = getattr(module, key[1])
        what = f"{key[0]}.{key[1]}"
        empty = torch.isnan(mark)
        if empty.all():
            continue
        if empty.any():
            raise UnsupportedLayoutError(f"the loader fills {what} only in part")
        packed = not live.numel() and hasattr(module, "cpu_linear") and mark.ndim == 2 and packable(dtype, ranks)
        fits = packed or (live.shape == mark.shape and live.is_contiguous())
        if live.dtype != dtype or not (fits and mark.is_contiguous()):
            raise UnsupportedLayoutError(
                f"{what} is {list(live.shape)} {live.dtype} for the kernels, {list(mark.shape)} {dtype} when loaded"
            )
        if id(live) in chosen:
            raise UnsupportedLayoutError(f"{what} is loaded twice")
        chosen[id(live)] = key
        if ranks == 1:
            continue
        values, counts = torch.unique_consecutive(mark.view(-1), return_counts=True)
        if len(values) > _MOST_RUNS:
            raise UnsupportedLayoutError(f"{what} interleaves checkpoint tensors")
        stop = 0
        for number, count in zip(values.tolist(), counts.tolist(), strict=True):
            stop += count
            if number:
                runs.setdefault(key, []).append((stop - count, stop, int(number)))
                held[int(number)] = held.get(int(number), 0) + count
    sizes = {numbers[name]: math.prod(shape) for name, shape in shapes.items()}

    # Ranks hold equal shares but for the padding of the vocabulary, hence the rounding.
    shares = {
        key: [(start, stop, 1 / max(1, round(ranks * held[n] / sizes[n]))) for start, stop, n in runs.get(key, [])]
        for key in chosen.values()
    }
    return {key: marks[key].shape for key in chosen.values()}, shares


@torch.no_grad()
def _capture(model: Any, weights: Weights, home: torch.device, dtype: torch.dtype) -> dict[Key, torch.Tensor]:
    """What the model's loader makes of `weights`: one tensor of `dtype` per parameter, NaN where it writes nothing.

    The parameters are exchanged for stand-ins meanwhile, in the layout that vLLM recorded when it built the model.
    """
    from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader, get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta

    before = [
        (module, dict(module._parameters), dict(module._buffers), set(module._non_persistent_buffers_set))
        for module in model.modules()
    ]
    captured: dict[Key, torch.Tensor] = {}
    try:
        for name, module in model.named_modules():
            restore_layer_on_meta(module, get_layerwise_info(module))
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    stand_in: Any = torch.empty_strided(
                        parameter.shape, parameter.stride(), dtype=dtype, device=home
                    ).fill_(torch.nan)
                    stand_in.__class__ = parameter.__class__
                    vars(stand_in).update(vars(parameter))
                    stand_in.weight_loader = _get_original_loader(parameter)
                    module._parameters[attribute] = captured[name, attribute] = stand_in
        model.load_weights(weights)
    except (RuntimeError, ValueError, AttributeError, KeyError, TypeError, AssertionError) as error:
        raise UnsupportedLayoutError(f"loading aside failed: {type(error).__name__}: {error}") from error
    finally:
        for module, parameters, buffers, non_persistent in before:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set = non_persistent
    return {key: tensor.detach().as_subclass(torch.Tensor) for key, tensor in captured.items()}
