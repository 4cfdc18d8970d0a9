"""What users name as snapshots: directories as trainers name them, runs, patterns, Hub ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlvr_landscape_plugin.errors import SnapshotError
from rlvr_landscape_plugin.snapshot import expand, find_snapshots, open_snapshot, run_directory

LAYOUTS = {
    "TRL": "checkpoint-100",
    "OpenRLHF": "global_step100_hf",
    "verl": "global_step_100/actor/huggingface",
    "verl, merged": "global_step_100",
    "prime-rl": "weights/step_100",
    "this project": "snapshots/step_000100",
}


def make(path: Path, value: float = 1.0) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    save_file({"w": np.full((2, 3), value, np.float32)}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("name", LAYOUTS.values(), ids=LAYOUTS)
def test_directories_named_by_a_trainer_tell_their_step(tmp_path, name):
    snapshot = open_snapshot(make(tmp_path / "run" / name))
    assert (snapshot.step, snapshot.tells_step) == (100, True)


@pytest.mark.parametrize("name", ["final", "checkpoint", "step_one", "qwen-2.5", "actor", "step_10_old", "v100"])
def test_a_name_without_a_step_is_not_taken_for_one(tmp_path, name):
    snapshot = open_snapshot(make(tmp_path / name))
    assert (snapshot.step, snapshot.tells_step) == (0, False)


@pytest.mark.parametrize("name", LAYOUTS.values(), ids=LAYOUTS)
def test_a_run_is_all_of_its_steps_in_their_order(tmp_path, name):
    names = [name.replace("000100", "100").replace("100", step) for step in ("20", "3", "100")]
    for number, each in enumerate(names):
        make(tmp_path / "run" / each, number)
    found = expand(str(tmp_path / "run"))
    assert [open_snapshot(path).step for path in found] == [3, 20, 100]
    assert [Path(path) for path in found] == [tmp_path / "run" / names[index] for index in (1, 0, 2)]
    home = Path(names[0]).parts[0] if names[0].startswith(("weights", "snapshots")) else "."
    assert run_directory(Path(found[0])) == tmp_path / "run" / home
    assert find_snapshots(run_directory(Path(found[0]))) == [Path(path) for path in found]


def test_a_pattern_is_all_that_it_matches_in_the_order_of_the_steps(tmp_path):
    for step in (100, 20, 3):
        make(tmp_path / f"checkpoint-{step}")
    make(tmp_path / "other")
    found = expand(str(tmp_path / "checkpoint-*"))
    assert [open_snapshot(path).step for path in found] == [3, 20, 100]
    assert expand(str(tmp_path / "checkpoint-?")) == [str(tmp_path / "checkpoint-3")]
    with pytest.raises(SnapshotError, match=r"no directory matches .*absent-\*"):
        expand(str(tmp_path / "absent-*"))


def test_a_snapshot_that_lies_among_others_is_itself(tmp_path):
    """As TRL's output directory, with the last policy and all checkpoints."""
    run = make(tmp_path / "run")
    make(run / "checkpoint-5")
    assert expand(str(run)) == [str(run)]
    assert find_snapshots(run) == [run / "checkpoint-5"]


def test_of_a_step_with_an_adapter_and_the_base_model_the_adapter_is_meant(tmp_path):
    """As verl and older versions of prime-rl save LoRA runs: the base model beside each adapter."""
    base = make(tmp_path / "verl" / "global_step_10" / "actor" / "huggingface")
    adapter = base.with_name("lora_adapter")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert find_snapshots(tmp_path / "verl") == [adapter]
    weights = make(tmp_path / "prime" / "weights" / "step_10")
    (weights / "lora_adapters").mkdir()
    (weights / "lora_adapters" / "adapter_config.json").write_text("{}")
    assert find_snapshots(tmp_path / "prime") == [weights / "lora_adapters"]


def test_two_snapshots_of_one_step_are_refused(tmp_path):
    make(tmp_path / "checkpoint-5")
    make(tmp_path / "step_5")
    with pytest.raises(SnapshotError, match=r"checkpoint-5 and .*step_5 both say step 5"):
        expand(str(tmp_path))


def test_what_openrlhf_keeps_for_resuming_is_passed_over(tmp_path):
    """`global_step5` in `_actor/` has DeepSpeed's states; beside it lie the Hugging Face directories."""
    make(tmp_path / "global_step5_hf")
    (tmp_path / "global_step5").mkdir()
    assert find_snapshots(tmp_path) == [tmp_path / "global_step5_hf"]


def test_a_step_without_weights_is_listed_and_refused_by_name(tmp_path):
    (tmp_path / "global_step_5" / "actor").mkdir(parents=True)
    (found,) = expand(str(tmp_path / "global_step_5"))
    with pytest.raises(SnapshotError, match=r"global_step_5 has no config\.json"):
        open_snapshot(found)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The Hub's cache on this machine, without a network: one repository with a branch and a tag."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--lab--policy"
    make(repository / "snapshots" / COMMIT)
    (repository / "blobs").mkdir()
    for number, file in enumerate(list((repository / "snapshots" / COMMIT).iterdir())):
        file.rename(repository / "blobs" / str(number))
        file.symlink_to(Path("../../blobs") / str(number))
    (repository / "refs").mkdir()
    for name in ("main", "checkpoint-40"):
        (repository / "refs" / name).write_text(COMMIT)
    return repository


def test_a_hub_id_with_its_revision_is_found_in_the_cache(cache):
    for reference, step, tells in (
        ("lab/policy@main", 0, False),
        ("lab/policy@checkpoint-40", 40, True),
        (f"lab/policy@{COMMIT}", 0, False),
    ):
        assert expand(reference) == [reference]
        snapshot = open_snapshot(reference)
        assert snapshot.path == cache / "snapshots" / COMMIT
        assert (snapshot.step, snapshot.tells_step) == (step, tells)
        assert snapshot.shapes == {"w": (2, 3)}


def test_a_hub_id_that_is_not_in_the_cache_is_refused_by_name(cache):
    with pytest.raises(SnapshotError, match=r"lab/other@main could not be had from the Hub or from its cache"):
        open_snapshot("lab/other@main")
    with pytest.raises(SnapshotError, match=r"'lab/policy' is not a directory .* Hub id with its revision .*@main"):
        open_snapshot("lab/policy")


def test_a_directory_that_looks_like_a_hub_id_is_a_directory(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "lab" / "policy@main", 2.0)
    assert open_snapshot("lab/policy@main").path == tmp_path / "lab" / "policy@main"
