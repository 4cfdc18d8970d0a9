"""Random Qwen2 models of the sizes that benchmarks move. Not a benchmark."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlvr_landscape_plugin.snapshot import open_snapshot

_SHARD = 2**32
"""Most bytes of a file of weights."""

SIZES: dict[str, dict[str, Any]] = {
    # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied.
    "5m": dict(zip("hilnkvt", (256, 704, 4, 4, 2, 4096, True), strict=True)),
    "20m": dict(zip("hilnkvt", (512, 1408, 6, 8, 2, 4096, False), strict=True)),
    "135m": dict(zip("hilnkvt", (576, 1536, 30, 9, 3, 49152, True), strict=True)),
    # Qwen2.5-0.5B and Qwen2.5-7B.
    "0.5b": dict(zip("hilnkvt", (896, 4864, 24, 14, 2, 151936, True), strict=True)),
    "7b": dict(zip("hilnkvt", (3584, 18944, 28, 28, 4, 152064, False), strict=True)),
}
"""The shapes of each size."""


def random_qwen2(folder: Path, size: str, dtype: torch.dtype, device: str = "cpu") -> Path:
    """Write a random Qwen2 with tiny-sorter's tokenizer to `folder`, the same each time on the same kind of device.

    Matrices and biases are normal with standard deviation 0.02, drawn on `device`; norms are 1.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = SIZES[size]
    config = Qwen2Config(
        vocab_size=shape["v"],
        hidden_size=shape["h"],
        intermediate_size=shape["i"],
        num_hidden_layers=shape["l"],
        num_attention_heads=shape["n"],
        num_key_value_heads=shape["k"],
        max_position_embeddings=2048,
        tie_word_embeddings=shape["t"],
        eos_token_id=2,
        dtype=dtype,
        architectures=["Qwen2ForCausalLM"],
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    draw = torch.Generator(device).manual_seed(0)
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        names.pop("lm_head.weight")
    placed: dict[str, str] = {}
    shards = list(_shards(names, dtype.itemsize))
    for number, part in enumerate(shards):
        tensors = {}
        for name in part:
            values = torch.ones(names[name], dtype=dtype, device=device)
            if not name.endswith("norm.weight"):
                values.normal_(0.0, 0.02, generator=draw)
            tensors[name] = values.cpu()
        file = "model.safetensors" if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        placed |= dict.fromkeys(part, file)
    if len(shards) > 1:
        total = sum(torch.Size(shape).numel() for shape in names.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in open_snapshot("tiny-sorter").path.iterdir():
        if "token" in file.name or file.name == "chat_template.jinja":
            shutil.copy(file, folder)
    return folder


def _shards(names: dict[str, tuple[int, ...]], itemsize: int) -> Iterator[list[str]]:
    """Names in groups whose tensors fit a file."""
    part: list[str] = []
    size = 0
    for name, shape in names.items():
        more = torch.Size(shape).numel() * itemsize
        if part and size + more > _SHARD:
            yield part
            part, size = [], 0
        part.append(name)
        size += more
    yield part


def parameters(size: str) -> int:
    """How many numbers a model of a size has."""
    shape = SIZES[size]
    hidden, kv = shape["h"], shape["h"] // shape["n"] * shape["k"]
    attention = 2 * hidden * hidden + 2 * hidden * kv + hidden + 2 * kv
    layer = attention + 3 * hidden * shape["i"] + 2 * hidden
    return shape["l"] * layer + hidden + shape["v"] * hidden * (1 if shape["t"] else 2)
