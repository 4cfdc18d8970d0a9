"""A training run of a few snapshots, made in a second: tiny-sorter, moved by seeded noise."""

from __future__ import annotations

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


def hash_of(name: str) -> int:
    """A seed that is the same in every process."""
    return int.from_bytes(name.encode(), "little") % 2**32
