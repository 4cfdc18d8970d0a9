"""A LoRA adapter as PEFT saves it, and what a base model becomes with it: `W + scale · B A`, one tensor at a time.

    adapter_config.json  adapter_model.safetensors

`scale` is `lora_alpha / r`, or `lora_alpha / √r` with `use_rslora`; `rank_pattern` and `alpha_pattern` change r and
alpha for single modules. With `fan_in_fan_out` a weight is stored as (in, out), and Bᵀ and Aᵀ change places. Modules of
`modules_to_save` replace those of the base model. A merged tensor is computed in float64 when it is read, rounded once
to float32, and never written.

What would make a policy anything else (DoRA, biases, adapters of embeddings, a changed base model) is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from rlvr_landscape_plugin.errors import SnapshotError
from rlvr_landscape_plugin.files import JsonObject, digest, file_sha256
from rlvr_landscape_plugin.snapshot.tensors import DTYPES, TensorInfo, safetensors_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT writes before the names of the base model's modules."""
PAIR = ("lora_A.weight", "lora_B.weight")
"""What it writes after them."""
_MEANT = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("use_rslora", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    # Each belongs to something that is refused, and has a value also where that is off.
    *("megatron_core", "qalora_group_size", "bias", "init_lora_weights", "eva_config"),
}
"""Keys of adapter_config.json that are read, or that leave a saved adapter as it is. Any other key must be empty."""
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` that leave the base model as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it."""
_EMPTY = (None, False, "", [], {})


@dataclass(frozen=True)
class LowRank:
    """The change of one matrix: `scale · B A`, or its transpose."""

    a: TensorInfo
    """A, (rank, in)."""
    b: TensorInfo
    """B, (out, rank)."""
    scale: float
    transposed: bool
    """Whether the matrix is stored as (in, out)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix as it is stored."""
        shape = self.b.shape[0], self.a.shape[1]
        return (shape[1], shape[0]) if self.transposed else shape

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """(L, R), float64, with L R the change of the matrix as it is stored: L (rows, rank), R (rank, columns)."""
        a, b = self.a.read().astype(np.float64), self.b.read().astype(np.float64) * self.scale
        return (a.T, b.T) if self.transposed else (b, a)


@dataclass(frozen=True)
class MergedTensor(TensorInfo):
    """A tensor of the base model with the adapter's change; where it lies in a file is where the base's lies."""

    weight: TensorInfo | None = None
    change: LowRank | None = None

    def read(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """W + change, float32: of `shape`, or `count` of its elements, flat, from element `first` on."""
        assert self.weight is not None
        assert self.change is not None
        left, right = self.change.factors()
        columns = self.shape[1]
        size = math.prod(self.shape) if count is None else count
        top, bottom = first // columns, -(-(first + size) // columns)
        low = (left[top:bottom] @ right).reshape(-1)[first - top * columns :][:size]
        merged = (self.weight.read(first, size).astype(np.float64) + low).astype(np.float32)
        return merged.reshape(self.shape) if count is None else merged


@dataclass(frozen=True)
class Adapter:
    """An adapter's two files, read without its base model. Build it with `read_adapter`."""

    path: Path
    base_name: str
    """`base_model_name_or_path`: a directory or a Hub id; empty if there is none."""
    revision: str
    """Of the Hub id."""
    pairs: Mapping[str, LowRank]
    """Name of a tensor of the base model → its change."""
    replaced: Mapping[str, TensorInfo]
    """Name of a tensor of the base model → the one that takes its place."""
    whole_targets: tuple[str, ...]
    """Ends of the names of modules that are all adapted, where the configuration tells them."""

    @property
    def file(self) -> Path:
        """The file of the adapter's tensors."""
        return self.path / WEIGHTS

    @cached_property
    def meaning(self) -> str:
        """SHA-256, hex, over what the adapter does to a base model, whatever else its configuration says."""
        scales = {name: [pair.scale, pair.transposed] for name, pair in self.pairs.items()}
        return digest({"file": file_sha256(self.file), "scales": scales, "replaced": sorted(self.replaced)})

    def merged(self, base: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The tensors of `base` with the adapter's changes; raises `SnapshotError` naming what does not fit."""
        tensors = dict(base)
        for name in (*self.pairs, *self.replaced):
            if name not in base:
                hint = "; it is tied to another tensor" if name.startswith("lm_head.") else ""
                raise SnapshotError(f"{self.path} adapts {name!r}, which its base model does not have{hint}")
        for name, pair in self.pairs.items():
            weight = base[name]
            if weight.shape != pair.shape:
                raise SnapshotError(
                    f"{self.file}: the change of {name!r} has shape {list(pair.shape)}, the base model's tensor "
                    f"{list(weight.shape)}; see r and fan_in_fan_out in {CONFIG}, or name another base model"
                )
            tensors[name] = MergedTensor(weight.file, "F32", weight.shape, weight.start, weight, pair)
        for name, info in self.replaced.items():
            if info.shape != base[name].shape:
                raise SnapshotError(
                    f"{self.file}: {name!r} has shape {list(info.shape)}, the base model's {list(base[name].shape)}"
                )
            if "embed" in name and not any(other.startswith("lm_head.") for other in base):
                raise SnapshotError(
                    f"{self.path}: modules_to_save holds {name!r}, which the base model's output head is tied to; "
                    "whether the head follows it is not told, so merge this adapter with PEFT"
                )
            tensors[name] = info
        for name, info in base.items():
            module = name.removesuffix(".weight")
            adapted = name in self.pairs or name in self.replaced
            if len(info.shape) == 2 and not adapted and any(_ends(module, end) for end in self.whole_targets):
                raise SnapshotError(
                    f"{self.path / CONFIG} names {module} among its target_modules, but {WEIGHTS} has no tensors for "
                    "it; copy the adapter again"
                )
        return tensors


def read_adapter(path: Path) -> Adapter:
    """The adapter in a directory; raises `SnapshotError` naming key or tensor for what is not supported or damaged."""
    config = _config(path / CONFIG)
    file = path / WEIGHTS
    if not file.is_file():
        pickled = " (pickled adapter_model.bin is not read)" if (path / "adapter_model.bin").is_file() else ""
        raise SnapshotError(f"{path} has a {CONFIG} but no {WEIGHTS}{pickled}; save it with safe_serialization=True")
    halves: dict[str, dict[str, TensorInfo]] = {}
    replaced: dict[str, TensorInfo] = {}
    saved = config.get("modules_to_save") or []
    for key, info in safetensors_header(file).items():
        if info.dtype not in DTYPES:
            raise SnapshotError(f"{file}: tensor {key!r} is {info.dtype}, expected one of {', '.join(DTYPES)}")
        if not key.startswith(PREFIX):
            raise SnapshotError(f"{file}: tensor {key!r} does not begin with {PREFIX!r}, as PEFT's names do")
        name = key.removeprefix(PREFIX)
        module, part = (name.rsplit(".", 2)[0], ".".join(name.split(".")[-2:]))
        if part in PAIR and len(info.shape) == 2:
            halves.setdefault(module, {})[part] = info
        elif "lora_" not in name and _saved_whole(name, saved):
            replaced[name] = info
        else:
            raise SnapshotError(
                f"{file}: tensor {key!r} is not one of a LoRA pair of a linear layer ({', '.join(PAIR)}) nor of a "
                "module of modules_to_save; merge this adapter with PEFT"
            )
    if not halves:
        raise SnapshotError(f"{file} holds no LoRA pair ({', '.join(PAIR)})")
    pairs = {f"{module}.weight": _pair(path, config, module, parts) for module, parts in halves.items()}
    targets = config.get("target_modules")
    restricted = any(config.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    whole = tuple(targets) if isinstance(targets, list) and not restricted else ()
    base, revision = config.get("base_model_name_or_path") or "", config.get("revision") or "main"
    return Adapter(path, str(base), str(revision), pairs, replaced, whole)


def _pair(path: Path, config: JsonObject, module: str, parts: Mapping[str, TensorInfo]) -> LowRank:
    """The change of one module's weight."""
    if len(parts) < 2:
        raise SnapshotError(f"{path / WEIGHTS} has {next(iter(parts))} of {module}, but not its other half")
    a, b = (parts[part] for part in PAIR)
    rank = _of_pattern(config, "rank_pattern", module, config["r"])
    alpha = _of_pattern(config, "alpha_pattern", module, config["lora_alpha"])
    if a.shape[0] != rank or b.shape[1] != rank:
        raise SnapshotError(
            f"{path / WEIGHTS}: A of {module} is {list(a.shape)} and B is {list(b.shape)}, but {CONFIG} says rank "
            f"{rank}; copy both files again"
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LowRank(a, b, scale, bool(config.get("fan_in_fan_out")))


def _of_pattern(config: JsonObject, key: str, module: str, default: float) -> float:
    """The value of the first pattern that matches the end of a module's name, as PEFT chooses it."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _saved_whole(name: str, saved: Sequence[str]) -> bool:
    """Whether a tensor belongs to one of `modules_to_save`, which PEFT takes for ends of modules' names."""
    parts = name.split(".")[:-1]
    return any(".".join(parts[:count]).endswith(tuple(saved)) for count in range(1, len(parts) + 1))


def _ends(module: str, end: str) -> bool:
    return module == end or module.endswith(f".{end}")


def _config(file: Path) -> JsonObject:
    """The configuration, all of whose keys are understood."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except OSError as error:
        raise SnapshotError(f"{file} cannot be read: {error}") from error
    except (ValueError, AttributeError) as error:
        raise SnapshotError(f"{file} is not an adapter's configuration: {error!r}") from error
    if kind != "LORA":
        raise SnapshotError(f"{file}: peft_type is {kind!r}; only 'LORA' is supported, merge this adapter with PEFT")
    for key in ("r", "lora_alpha"):
        if isinstance(config.get(key), bool) or not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise SnapshotError(
                f"{file}: {key} is {config.get(key)!r}, expected a number above 0; write the value of the training run"
            )
    problems = {
        "bias": config.get("bias") not in (None, "none"),
        "init_lora_weights": config.get("init_lora_weights") not in _INITIAL,
        **{key: value not in _EMPTY for key, value in config.items() if key not in _MEANT},
    }
    for key, wrong in problems.items():
        if wrong:
            raise SnapshotError(
                f"{file}: {key} = {json.dumps(config[key])} makes it more than W + scale · B A, which is not "
                "supported; merge this adapter with PEFT (merge_and_unload) and measure the merged model"
            )
    return config
