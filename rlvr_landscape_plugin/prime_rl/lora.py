"""Snapshots of a LoRA run of prime-rl: the adapter of each scheduled step, as files that PEFT loads.

    adapters/step_<N>/adapter_config.json  adapter_model.safetensors  manifest.json

prime-rl keeps the pair of a module as A (rank, in) and B (out, rank), and adds s · B·A·x to the frozen layer's output
with s = alpha / rank rounded to bfloat16. PEFT names the same tensors `base_model.model.<module>.lora_A.weight` and
scales by `lora_alpha / r`, so `lora_alpha` is written such that this is s exactly. Target modules are written by their
full names: a suffix could match a module that was not trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlvr_landscape_plugin.errors import ConfigurationError, SnapshotError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_PAIR = ("lora_A.weight", "lora_B.weight")


def check_lora(lora: Any) -> None:
    """Refuse what an adapter's two files cannot hold; `lora` is prime-rl's `[trainer.model.lora]`."""
    if lora.modules_to_save:
        raise ConfigurationError(
            f"trainer.model.lora.modules_to_save = {lora.modules_to_save!r} trains whole modules beside the adapter, "
            'which its snapshot would lack; empty it, or set trainer.loss.kwargs.snapshots = "None"'
        )


def adapter_tensors() -> dict[str, Any]:
    """The adapter's tensors under PEFT's names, whole, on the CPU; a collective call, every rank gets them.

    Raises `SnapshotError` for modules other than linear layers, whose adapters PEFT has no such names for.
    """
    from prime_rl.trainer.lora import get_lora_state
    from torch.distributed.tensor import DTensor

    tensors: dict[str, Any] = {}
    for name, value in get_lora_state().adapter_state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        tensors[_PREFIX + name] = whole.detach().to("cpu").contiguous()
    if foreign := [name for name, value in tensors.items() if not name.endswith(_PAIR) or value.ndim != 2]:
        raise SnapshotError(
            f"{foreign[0].removeprefix(_PREFIX)} is no adapter of a linear layer; snapshots of adapters are for those"
        )
    return tensors


def adapter_config(lora: Any, tensors: dict[str, Any], base: str) -> dict[str, Any]:
    """The content of adapter_config.json for `tensors` of `adapter_tensors`; `base`: the model that was adapted."""
    import torch

    scale = torch.tensor(lora.alpha / lora.rank).to(torch.bfloat16).item()
    modules = {name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for name in tensors}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": scale * lora.rank,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "target_modules": sorted(modules),
        "modules_to_save": None,
    }


def write_adapter(folder: Path, lora: Any, tensors: dict[str, Any], base: str) -> None:
    """Write the adapter's two files into `folder`."""
    from safetensors.torch import save_file

    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(adapter_config(lora, tensors, base), indent=1) + "\n")


def check_adapter(folder: Path) -> None:
    """Raise `SnapshotError` unless the two files can be read back and belong together."""
    from rlvr_landscape_plugin.snapshot import safetensors_header

    tensors = safetensors_header(folder / WEIGHTS)
    try:
        targets = json.loads((folder / CONFIG).read_text())["target_modules"]
    except (OSError, ValueError, KeyError) as error:
        raise SnapshotError(f"{folder / CONFIG} is not an adapter's configuration: {error!r}") from error
    expected = {f"{_PREFIX}{module}.{part}" for module in targets for part in _PAIR}
    if expected != set(tensors):
        other = sorted(expected ^ set(tensors))[0]
        raise SnapshotError(f"{folder}: {CONFIG} and {WEIGHTS} do not name the same modules, see {other}")
