"""Reading a policy from disk: what is whole, what is not, and that the message names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlvr_landscape_plugin.errors import SnapshotError
from rlvr_landscape_plugin.snapshot import SHIPPED, compare_tensors, open_snapshot


def make(path: Path, files: dict[str, dict[str, np.ndarray]] | None = None) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    for name, tensors in (files or {"model.safetensors": {"w": np.ones((2, 3), np.float32)}}).items():
        save_file(tensors, path / name)
    return path


def test_the_shipped_policy_is_whole_small_and_safe():
    snapshot = open_snapshot("tiny-sorter")
    assert snapshot.step == 0
    assert sum(file.stat().st_size for file in snapshot.files) <= 8 * 2**20
    assert "lm_head.weight" not in snapshot.tensors
    config = json.loads((SHIPPED["tiny-sorter"] / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert not list(SHIPPED["tiny-sorter"].glob("*.bin"))
    assert (SHIPPED["tiny-sorter"] / "README.md").is_file()


def test_step_comes_from_manifest_then_name(tmp_path):
    assert open_snapshot(make(tmp_path / "step_000010")).step == 10
    assert open_snapshot(make(tmp_path / "final")).step == 0
    path = make(tmp_path / "step_3")
    (path / "manifest.json").write_text('{"step": 150}')
    assert open_snapshot(path).step == 150
    (path / "manifest.json").write_text("{}")
    with pytest.raises(SnapshotError, match="no integer 'step'"):
        open_snapshot(path)


def test_hash_changes_with_any_byte(tmp_path):
    first = open_snapshot(make(tmp_path / "a"))
    second = open_snapshot(make(tmp_path / "b"))
    assert first.sha256 == second.sha256
    changed = make(tmp_path / "c", {"model.safetensors": {"w": np.full((2, 3), np.nextafter(1, 2), np.float32)}})
    assert open_snapshot(changed).sha256 == first.sha256  # nextafter(1, 2) is 1 in float32
    changed = make(tmp_path / "d", {"model.safetensors": {"w": np.full((2, 3), 1.0000001, np.float32)}})
    assert open_snapshot(changed).sha256 != first.sha256


def test_shards_are_read_through_their_index(tmp_path):
    path = make(tmp_path / "s", {"1.safetensors": {"a": np.ones(2)}, "2.safetensors": {"b": np.ones(3)}})
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_snapshot(path).shapes == {"a": (2,), "b": (3,)}
    (path / "2.safetensors").unlink()
    with pytest.raises(SnapshotError, match=r"names 2.safetensors, which is missing"):
        open_snapshot(path)
    index["weight_map"] = {"a": "1.safetensors", "c": "1.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SnapshotError, match="lacks tensor 'c'"):
        open_snapshot(path)


def test_what_is_not_a_snapshot_is_named(tmp_path):
    with pytest.raises(SnapshotError, match="is not a directory"):
        open_snapshot(tmp_path / "absent")
    with pytest.raises(SnapshotError, match=r"no config\.json"):
        open_snapshot(tmp_path)
    path = make(tmp_path / "x")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(SnapshotError, match=r"holds no \*.safetensors"):
        open_snapshot(path)


@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b + b"x", lambda b: b[:4], lambda b: b"\xff" * len(b)])
def test_damaged_files_are_named(tmp_path, damage):
    path = make(tmp_path / "x")
    file = path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SnapshotError, match=r"model\.safetensors is not a whole safetensors file"):
        open_snapshot(path)


def test_differences_to_a_model_are_named(tmp_path):
    snapshot = open_snapshot(make(tmp_path / "x"))
    compare_tensors({"w": (2, 3)}, snapshot, "m")
    for expected, message in (
        ({"w": (3, 2)}, "has shape"),
        ({"w": (2, 3), "v": (1,)}, "'v' is missing"),
        ({}, "not part of the model"),
    ):
        with pytest.raises(SnapshotError, match=message):
            compare_tensors(expected, snapshot, "m")


def test_copies_of_the_shipped_policy_are_the_same_policy(tmp_path):
    shutil.copytree(SHIPPED["tiny-sorter"], tmp_path / "step_000007")
    copy = open_snapshot(tmp_path / "step_000007")
    assert copy.sha256 == open_snapshot("tiny-sorter").sha256
    assert copy.step == 7
