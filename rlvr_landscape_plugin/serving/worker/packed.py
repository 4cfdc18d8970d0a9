"""Linear weights as a CPU's kernels hold them: packed by vLLM, or kept as they are. Changes no weight.

On a CPU vLLM keeps linear weights in opaque packed buffers (oneDNN's, through torch). This file reads them back, packs
as vLLM does, and takes layers out of packing where a move could not write them in place.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

_PACKED_FOR = 64
"""Rows of input that packed weights are laid out for; any number of rows may come."""


def pack(values: torch.Tensor) -> torch.Tensor:
    """A float32 weight, (out, in), as the oneDNN tensor that a linear layer multiplies with."""
    return torch.ops.mkldnn._reorder_linear_weight(values, _PACKED_FOR)


def packable(dtype: torch.dtype, ranks: int) -> bool:
    """Whether linear weights of a CPU server can be moved in packed form."""
    return dtype == torch.float32 and ranks == 1 and torch.backends.mkldnn.is_available()


def memory_of(packed: torch.Tensor) -> torch.Tensor:
    """The buffer of a oneDNN tensor, flat, float32; valid as long as `packed` lives."""
    size = torch.ops.mkldnn._nbytes(packed)
    buffer = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(packed))
    return torch.frombuffer(buffer, dtype=torch.float32)


@dataclass
class PackedLinear:
    """What a linear layer of a CPU multiplies with, as vLLM calls it."""

    packed: torch.Tensor

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")


def plain_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` by oneDNN; torch itself takes MKL for float32, which is half as fast on some CPUs."""
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


@torch.no_grad()
def keep_plain(model: Any, dtype: torch.dtype, ranks: int) -> None:
    """Let a CPU model multiply with its parameters as they are, and give back those that vLLM took away when packing.

    Layers that can be moved in packed form are left alone. Uses vLLM's own switch against packing
    (`_cpu_skip_gemm_dispatch`), which later reloads respect. Changes no weight; safe to call again.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not hasattr(module, "cpu_linear") or weight is None:
            continue
        if not weight.numel():
            if packable(dtype, ranks):
                continue
            module.weight = torch.nn.Parameter(unpacked(module, weight), requires_grad=False)
            module._cpu_skip_gemm_dispatch = True
        if getattr(module, "bias", None) is not None:
            module.bias.data = module.bias.data.to(dtype)
        module.cpu_linear = plain_linear


def unpacked(module: Any, parameter: torch.Tensor) -> torch.Tensor:
    """The weight, (out, in), of a layer packed for a CPU, exact.

    oneDNN itself reads back what was packed here; of a layer that vLLM packed, it is the product with the identity.
    """
    if isinstance(module.cpu_linear, PackedLinear):
        return module.cpu_linear.packed.to_dense()
    identity = torch.eye(module.input_size_per_partition, dtype=parameter.dtype)
    return module.cpu_linear(identity, parameter, None).t().contiguous()


def repack_shared(model: torch.nn.Module) -> None:
    """Let vLLM pack again what a reload leaves out on a CPU: a tied output head's own copy of the embedding."""
    for module in model.modules():
        weight, method = getattr(module, "weight", None), getattr(module, "quant_method", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel() and method is not None:
            method.process_weights_after_loading(module)
