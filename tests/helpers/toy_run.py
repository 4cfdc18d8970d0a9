"""Training runs of a few snapshots, made in a second: tiny-sorter, moved by seeded noise, or with random adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from rlvr_landscape_plugin.snapshot import Manifest, open_snapshot, write_safetensors, write_snapshot


def make_run(folder: Path, steps: dict[int, float]) -> dict[int, Path]:
    """Snapshots `folder/step_<N>`: each tensor moved by this share of its norm, along one direction for all steps."""
    source = open_snapshot("tiny-sorter")
    made = {}
    for step, share in steps.items():

        def fill(scratch: Path, share: float = share) -> None:
            for file in source.path.iterdir():
                if file.suffix != ".safetensors" and file.name != "manifest.json" and file.is_file():
                    shutil.copy(file, scratch / file.name)
            write_safetensors(
                scratch / "model.safetensors", source.shapes, (moved(name, share) for name in source.shapes)
            )

        def moved(name: str, share: float) -> np.ndarray:
            values = source.read(name).astype(np.float64)
            noise = np.random.default_rng(abs(hash_of(name))).standard_normal(values.shape)
            norm = np.linalg.norm(noise)
            return (values + share * np.linalg.norm(values) / (norm or 1.0) * noise).astype(np.float32)

        made[step] = write_snapshot(folder, Manifest(step=step, run="toy"), fill)
    return made


RANK = 2
"""Of the toy adapters; their scale is 2."""


def make_toy_adapters(folder: Path, steps: dict[int, float]) -> dict[int, Path]:
    """PEFT adapters `folder/step_<N>` of tiny-sorter's q_proj and down_proj: A of every step is the same, B is one draw
    times the step's number."""
    source = open_snapshot("tiny-sorter")
    targets = [name for name in source.shapes if name.endswith(("q_proj.weight", "down_proj.weight"))]
    made = {}
    for step, length in steps.items():

        def fill(scratch: Path, length: float = length) -> None:
            draw, pairs = np.random.default_rng(0), {}
            for name in targets:
                (rows, columns), module = source.shapes[name], f"base_model.model.{name.removesuffix('.weight')}"
                pairs[f"{module}.lora_A.weight"] = draw.normal(size=(RANK, columns)) / columns**0.5
                pairs[f"{module}.lora_B.weight"] = length * 0.1 * draw.normal(size=(rows, RANK))
            shapes = {name: values.shape for name, values in pairs.items()}
            values = (array.astype(np.float32) for array in pairs.values())
            write_safetensors(scratch / "adapter_model.safetensors", shapes, values)
            config = {"peft_type": "LORA", "base_model_name_or_path": "tiny-sorter", "r": RANK, "lora_alpha": 2 * RANK}
            config |= {"target_modules": ["q_proj", "down_proj"], "bias": "none"}
            (scratch / "adapter_config.json").write_text(json.dumps(config))

        made[step] = write_snapshot(folder, Manifest(step=step, run="toy-lora"), fill)
    return made


def hash_of(name: str) -> int:
    """A seed that is the same in every process."""
    return int.from_bytes(name.encode(), "little") % 2**32
