"""Directions are what they were at commit 0ef8472: identities, folder names, file bytes and words.

`data/directions_0ef8472.json` was written by `measure` below with the code of that commit. Sums of float64 differ in
their last bit between processors, so the bytes of a file that depends on one are frozen by their norm (in its words)
and by a few values instead of a checksum.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlvr_landscape_plugin.config import SliceConfig
from rlvr_landscape_plugin.directions import Trajectory, fingerprint, prepare_slice
from rlvr_landscape_plugin.snapshot import open_snapshot

FROZEN = Path(__file__).parent / "data" / "directions_0ef8472.json"
SHAPES = {"embed.weight": (30, 8), "layers.0.q.weight": (8, 8), "norm.weight": (8,), "q.bias": (8,)}
STEPS = (0, 1, 2, 5, 10)
CASES: dict[str, dict[str, Any]] = {
    "random": {"normalization": "filter", "exclude": ["norm*"]},
    "global": {"normalization": "global"},
    "displacement": {"alpha": {"kind": "displacement"}, "beta": {"kind": "update"}},
    "displacement of some": {"alpha": {"kind": "displacement"}, "include": ["layers.*", "q.*"]},
    "displacement per tensor": {"alpha": {"kind": "displacement", "normalization": "tensor"}},
    "update per filter": {"alpha": {"kind": "update", "normalization": "filter"}},
    "update, global": {"alpha": {"kind": "update", "normalization": "global"}},
    "pca": {"alpha": {"kind": "pca"}, "beta": {"kind": "pca", "component": 3}},
    "file": {"alpha": {"kind": "file", "file": "gradient.safetensors"}},
    "file per tensor": {"beta": {"kind": "file", "file": "gradient.safetensors", "normalization": "tensor"}},
    "orthogonal random": {"orthogonalize": True},
    "orthogonal to displacement": {"alpha": {"kind": "displacement"}, "orthogonalize": True},
    "orthogonal pca": {"beta": {"kind": "pca"}, "orthogonalize": True, "normalization": "global"},
    "two scales": {"beta": {"kind": "random", "normalization": "filter"}},
}


def exact(step: int, number: int, shape: tuple[int, ...]) -> np.ndarray:
    """Multiples of 1/64 that every machine makes alike, float32."""
    index = np.arange(int(np.prod(shape))).reshape(shape)
    return ((index * (7 + number) + step * (index % 5 - 1) + 13 * number) % 97 - 48).astype(np.float32) / 64


def build(root: Path) -> None:
    for step in STEPS:
        folder = root / "run" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        tensors = {name: exact(step, number, shape) for number, (name, shape) in enumerate(SHAPES.items())}
        tensors["norm.weight"] = exact(0, 2, SHAPES["norm.weight"])
        save_file(tensors, folder / "model.safetensors")
    save_file({name: exact(3, 9, shape) for name, shape in SHAPES.items()}, root / "gradient.safetensors")


def measure(root: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What a slice's preparation gives: everything that other files and servers refer to."""
    trajectory = Trajectory.around(open_snapshot(root / "run" / "step_000005"), None)
    prepared = prepare_slice(SliceConfig(**options), 7, trajectory, root / "directions")
    spec, files = prepared.spec, prepared.files
    return {
        "spec": json.loads(json.dumps(spec.as_dict())),
        "fingerprint": fingerprint(spec, SHAPES),
        "words": dict(prepared.description),
        "folders": {axis: file.parent.name for axis, file in files.items()},
        "definitions": {axis: json.loads((file.parent / "direction.json").read_text()) for axis, file in files.items()},
        "values": {axis: load_file(file)["layers.0.q.weight"][0].tolist() for axis, file in files.items()},
    }


def without_bytes(found: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the last bit of a sum."""
    copy = json.loads(json.dumps(found))
    for axis in copy["folders"]:
        del copy["spec"][axis]["sha256"], copy["definitions"][axis]["sha256"], copy["definitions"][axis]["norm"]
    return {key: copy[key] for key in ("spec", "words", "folders", "definitions")}


@pytest.mark.parametrize("case", CASES)
def test_directions_are_those_of_before(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    build(tmp_path)
    found, frozen = measure(tmp_path, CASES[case]), json.loads(FROZEN.read_text())[case]
    assert without_bytes(found) == without_bytes(frozen)
    for axis, values in frozen["values"].items():
        np.testing.assert_allclose(found["values"][axis], values, rtol=1e-6, atol=1e-7)
    if case in ("random", "global", "two scales", "displacement", "displacement of some", "file"):
        assert found == frozen, "differences are exact, and so are the bytes"
