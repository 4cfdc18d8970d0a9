"""Reading a policy from disk: what is whole, what is not, and that the message names the file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from rlvr_landscape_plugin.errors import ConfigurationError, SnapshotError, StoreError
from rlvr_landscape_plugin.schedule import format_schedule, parse_schedule
from rlvr_landscape_plugin.snapshot import (
    MANIFEST,
    SHIPPED,
    Manifest,
    compare_tensors,
    find_snapshots,
    main,
    open_snapshot,
    write_snapshot,
)
from rlvr_landscape_plugin.snapshot import snapshot as module


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


def weights(*names: str) -> dict[str, np.ndarray]:
    return {name: np.ones((2, 3), np.float32) for name in names}


def test_without_an_index_a_second_file_of_weights_is_refused(tmp_path):
    path = make(tmp_path / "x", {"model.safetensors": weights("a", "b"), "old_model.safetensors": weights("b", "c")})
    with pytest.raises(SnapshotError, match=r"tensor 'b' twice, in model\.safetensors and in old_model\.safetensors"):
        open_snapshot(path)
    path = make(tmp_path / "y", {"model.safetensors": weights("a"), "adapter.safetensors": weights("lora_A")})
    snapshot = open_snapshot(path)
    with pytest.raises(SnapshotError, match=r"tensor 'lora_A' in adapter\.safetensors is not part of the model"):
        compare_tensors({"a": (2, 3)}, snapshot, "m")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "1.safetensors", "b": "1.safetensors"}, r"1\.safetensors lacks tensor 'b' \(and 0 more\)"),
        ({"a": "../1.safetensors"}, r"puts tensor 'a' into '\.\./1\.safetensors', outside the snapshot"),
        ({"a": "/etc/passwd"}, "puts tensor 'a' into '/etc/passwd', outside the snapshot"),
        ({"a": ""}, "outside the snapshot"),
        ({"a": 3}, r"names 3, which is missing"),
        (["a"], "is not a safetensors index"),
        ({"a": "1.safetensors", "c": "3.safetensors"}, r"tensor 'c' twice|holds tensor 'a' twice"),
        ({"a": "1.safetensors", "b": "2.safetensors"}, "holds model.safetensors and model.safetensors.index.json"),
    ],
)
def test_an_index_that_does_not_fit_the_files_is_refused(tmp_path, weight_map, message):
    files = {"1.safetensors": weights("a"), "2.safetensors": weights("b"), "3.safetensors": weights("a", "c")}
    if "holds model" in message:
        files["model.safetensors"] = weights("a", "b")
    path = make(tmp_path / "inner" / "x", files)
    save_file(weights("a"), path.parent / "1.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(SnapshotError, match=message):
        open_snapshot(path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json", "model.safetensors.index.json"])
def test_links_that_lead_out_of_a_snapshot_are_refused(tmp_path, name):
    path = make(tmp_path / "x")
    (path / MANIFEST).write_text('{"step": 1}')
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model.safetensors"}}')
    assert open_snapshot(path).step == 1
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SnapshotError, match=rf"{name} is a link to .*elsewhere, outside the snapshot; copy"):
        open_snapshot(path)
    (path / name).unlink()
    (tmp_path / "elsewhere").rename(path / "inside")
    (path / name).symlink_to("inside")
    assert open_snapshot(path).step == 1


def test_the_links_of_the_hugging_face_cache_are_followed(tmp_path):
    path = make(tmp_path / "models--a--b" / "snapshots" / "0123abcd")
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for number, file in enumerate(list(path.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("../../blobs") / str(number))
    assert open_snapshot(path).shapes == {"w": (2, 3)}


def test_links_that_lead_to_themselves_are_named(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(SnapshotError, match=r"loop"):
        open_snapshot(tmp_path / "loop")
    path = make(tmp_path / "x")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(SnapshotError, match=r"model\.safetensors (cannot be followed|is not a file)"):
        open_snapshot(path)
    with pytest.raises(SnapshotError, match="is not a directory"):
        find_snapshots(tmp_path / "loop")


@pytest.mark.parametrize(("dtype", "size"), [("I8", 1), ("F8_E4M3", 1), ("U8", 1), ("I64", 8), ("F4", 1)])
def test_weights_that_cannot_be_moved_are_refused_at_opening(tmp_path, dtype, size):
    path = make(tmp_path / "x")
    header = json.dumps({"w": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4 * size]}}).encode()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * size))
    with pytest.raises(SnapshotError, match=rf"model\.safetensors: tensor 'w' is {dtype}, .* not quantised"):
        open_snapshot(path)


def test_a_header_that_promises_other_sizes_is_refused(tmp_path):
    path = make(tmp_path / "x")
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}).encode()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(SnapshotError, match="tensor 'w' has 12 bytes, 16 expected"):
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


def test_the_architecture_in_config_json_decides_which_tensors_belong(tmp_path):
    from rlvr_landscape_plugin.snapshot.architecture import check_architecture

    assert check_architecture(open_snapshot("tiny-sorter")) is None
    path = tmp_path / "stray"
    shutil.copytree(SHIPPED["tiny-sorter"], path)
    save_file(weights("lora_A"), path / "adapter.safetensors")
    with pytest.raises(SnapshotError, match=r"'lora_A' in adapter\.safetensors is not part of the model"):
        check_architecture(open_snapshot(path))
    (path / "config.json").write_text("{}")
    assert "model" in str(check_architecture(open_snapshot(path)))


def test_copies_of_the_shipped_policy_are_the_same_policy(tmp_path):
    shutil.copytree(SHIPPED["tiny-sorter"], tmp_path / "step_000007")
    copy = open_snapshot(tmp_path / "step_000007")
    assert copy.sha256 == open_snapshot("tiny-sorter").sha256
    assert copy.step == 7


def fill(value: float = 1.0, shards: bool = False):
    """What a trainer puts into a snapshot: config, tokenizer, weights in one file or in two shards."""

    def put(folder: Path) -> None:
        (folder / "config.json").write_text('{"hidden_size": 3}')
        (folder / "tokenizer.json").write_text("{}")
        tensors = {"a": np.full((2, 3), value, np.float32), "b": np.zeros(4, np.float32)}
        if not shards:
            save_file(tensors, folder / "model.safetensors")
            return
        for number, (name, tensor) in enumerate(tensors.items(), 1):
            save_file({name: tensor}, folder / f"model-{number}.safetensors")
        weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return put


MANIFEST_10 = Manifest(
    step=10,
    trainer={"name": "trl", "version": "1.16.0"},
    run="run-1",
    parent_run="run-0",
    configuration={"seed": 0},
    objective={"name": "grpo", "options": {}},
    metrics={"reward": 0.5, "entropy": 0.6},
)


def flip(file: Path, offset: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def test_a_written_snapshot_says_where_it_comes_from_and_what_is_in_it(tmp_path):
    path = write_snapshot(tmp_path, MANIFEST_10, fill())
    assert path == tmp_path / "step_000010"
    snapshot = open_snapshot(path)
    snapshot.verify()
    assert snapshot.step == 10
    assert snapshot.manifest is not None
    assert set(snapshot.manifest.files) == {"config.json", "model.safetensors", "tokenizer.json"}
    for name in ("trainer", "run", "parent_run", "configuration", "objective", "metrics"):
        assert getattr(snapshot.manifest, name) == getattr(MANIFEST_10, name)
    assert [item.name for item in tmp_path.iterdir()] == ["step_000010"]
    assert path.stat().st_mode & 0o755 == 0o755


def test_a_manifest_of_another_tool_with_a_step_only_is_enough(tmp_path):
    path = make(tmp_path / "x")
    (path / MANIFEST).write_text('{"step": 4, "note": "mine"}')
    snapshot = open_snapshot(path)
    assert snapshot.step == 4
    assert len(snapshot.sha256) == 64
    with pytest.raises(SnapshotError, match="nothing to verify it against"):
        snapshot.verify()


def test_a_snapshot_that_exists_is_never_overwritten(tmp_path):
    path = write_snapshot(tmp_path, MANIFEST_10, fill())
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()}
    assert write_snapshot(tmp_path, MANIFEST_10, fill()) == path
    with pytest.raises(SnapshotError, match=r"step_000010 exists with another model\.safetensors"):
        write_snapshot(tmp_path, MANIFEST_10, fill(2.0))
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()} == before
    assert [item.name for item in tmp_path.iterdir()] == ["step_000010"]


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def fail(folder: Path) -> None:
        fill()(folder)
        raise OSError("disk full")

    def no_weights(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    for broken, error in ((fail, StoreError), (no_weights, SnapshotError)):
        with pytest.raises(error):
            write_snapshot(tmp_path, MANIFEST_10, broken)
        assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_snapshot(tmp_path):
    code = (
        "import os, pathlib, sys\n"
        "from rlvr_landscape_plugin.snapshot import Manifest, write_snapshot\n"
        "def put(folder):\n"
        "    (folder / 'config.json').write_text('{}')\n"
        "    os._exit(9)\n"
        "write_snapshot(pathlib.Path(sys.argv[1]), Manifest(step=3), put)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    with pytest.raises(SnapshotError, match="holds no snapshots"):
        find_snapshots(tmp_path)


def damages(path: Path) -> dict[str, tuple]:
    return {
        "flipped weight": (lambda: flip(path / "model-2.safetensors"), r"model-2\.safetensors is not the file"),
        "flipped config": (lambda: flip(path / "config.json", 2), r"config\.json"),
        "missing shard": (
            lambda: (path / "model-1.safetensors").unlink(),
            r"names model-1\.safetensors, which is miss",
        ),
        "missing tokenizer": (lambda: (path / "tokenizer.json").unlink(), r"names tokenizer\.json, which is missing"),
        "foreign config": (
            lambda: (path / "config.json").write_text('{"hidden_size": 4}'),
            r"config\.json is not the file",
        ),
        "foreign file": (
            lambda: (path / "generation_config.json").write_text("{}"),
            r"generation_config\.json is not among",
        ),
        "overgrown": (lambda: (path / "tokenizer.json").write_text("{}  "), r"tokenizer\.json .* 4 bytes on disk, 2"),
    }


@pytest.mark.parametrize("kind", list(damages(Path())))
def test_damage_is_refused_by_name_where_a_sweep_looks_and_by_verify(tmp_path, capsys, kind):
    path = write_snapshot(tmp_path / "snapshots", MANIFEST_10, fill(shards=True))
    damage, message = damages(path)[kind]
    damage()
    with pytest.raises(SnapshotError, match=message):
        _ = open_snapshot(path).sha256  # what a sweep and a server do with every snapshot
    assert main(["verify", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "refused" in captured.out
    assert "Traceback" not in captured.err
    assert path.name in captured.err


def sharded(folder: Path) -> None:
    """tiny-sorter in two shards."""
    _copy(SHIPPED["tiny-sorter"], folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def foreign_config(path: Path) -> None:
    """The configuration of a wider model, otherwise valid."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))


def flip_weight(path: Path) -> None:
    flip(path / "model-2.safetensors")


def lose_shard(path: Path) -> None:
    (path / "model-1.safetensors").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "manifest", "expected"),
    [
        # Without a manifest nothing tells a flipped bit of a weight from a trained one.
        (flip_weight, True, "model-2.safetensors is not the file that manifest.json names"),
        (lose_shard, True, "manifest.json names model-1.safetensors, which is missing"),
        (lose_shard, False, "model.safetensors.index.json names model-1.safetensors, which is missing"),
        (foreign_config, True, "config.json is not the file that manifest.json names"),
        (foreign_config, False, "does not fit the architecture in its config.json"),
    ],
)
def test_a_sweep_refuses_damage_by_name_before_anything_starts(tmp_path, damage, manifest, expected):
    path = write_snapshot(tmp_path / "snapshots", Manifest(step=3), sharded)
    if not manifest:
        (path / MANIFEST).unlink()
    damage(path)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "rlvr_landscape_plugin.sweep", "--snapshots", f'["{path}"]'),
            *("--output", str(tmp_path / "out"), "--env.num-prompts", "1"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr
    assert "starting" not in result.stderr
    assert not list((tmp_path / "out").rglob("*")), "nothing was begun"


def _copy(source: Path, target: Path) -> None:
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)


def test_big_files_are_read_once(tmp_path, monkeypatch):
    path = write_snapshot(tmp_path, MANIFEST_10, fill(shards=True))
    read: list[str] = []
    digest = module.file_sha256
    monkeypatch.setattr(module, "file_sha256", lambda file: read.append(file.name) or digest(file))
    snapshot = open_snapshot(path)
    assert not [name for name in read if name.endswith(".safetensors")]
    _ = snapshot.sha256, snapshot.sha256
    snapshot.verify()
    assert sorted(name for name in read if name.endswith(".safetensors")) == [
        "model-1.safetensors",
        "model-2.safetensors",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no integer 'step'"),
        ('{"step": -1}', "no integer 'step'"),
        ('{"step": "3"}', "no integer 'step'"),
        ('{"step": 1, "files": ["config.json"]}', r"manifest\.json: 'files' is a list, expected a table"),
        ('{"step": 1, "files": {"config.json": "abc"}}', r"entry of 'config\.json' in 'files' is damaged"),
        ('{"step": 1, "files": {"../x": {"size": 1, "sha256": "%s"}}}' % ("0" * 64), r"entry of '\.\./x'"),
    ],
)
def test_damaged_manifests_are_named(tmp_path, content, message):
    path = make(tmp_path / "x")
    (path / MANIFEST).write_text(content)
    with pytest.raises(SnapshotError, match=message):
        open_snapshot(path)


def test_keys_of_a_manifest_that_mean_something_else_are_passed_over(tmp_path, capsys):
    path = make(tmp_path / "step_000004")
    content = {"step": 4, "trainer": "name", "run": 3, "metrics": {"reward": "high"}, "objective": None, "files": None}
    (path / MANIFEST).write_text(json.dumps(content))
    manifest = open_snapshot(path).manifest
    assert manifest == Manifest(step=4, metrics={"reward": "high"})
    assert main(["ls", str(tmp_path)]) == 0
    assert "no checksums" in capsys.readouterr().out


def test_the_command_lists_and_verifies_a_run(tmp_path, capsys):
    for step in (10, 2):
        write_snapshot(tmp_path / "snapshots", Manifest(step=step, run="abc", metrics={"reward": 0.25}), fill(step))
    assert [path.name for path in find_snapshots(tmp_path)] == ["step_000002", "step_000010"]
    assert main(["ls", str(tmp_path)]) == 0
    assert "complete" in (listed := capsys.readouterr().out)
    assert "0.250" in listed
    assert main(["verify", str(tmp_path / "snapshots")]) == 0
    assert capsys.readouterr().out.count("verified") == 2
    assert main(["verify", str(make(tmp_path / "plain"))]) == 2
    assert "nothing to verify" in capsys.readouterr().err
    assert main(["ls", str(tmp_path / "absent")]) == 2
    assert "is not a directory" in capsys.readouterr().err


def test_reading_and_writing_need_no_torch():
    code = "import sys, rlvr_landscape_plugin.snapshot; print({'torch', 'transformers', 'rich'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@given(st.sets(st.integers(0, 400), min_size=1, max_size=60))
def test_schedules_survive_the_round_trip(steps):
    assert parse_schedule(format_schedule(steps)) == tuple(sorted(steps))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=6))
def test_schedules_mean_what_they_say(items):
    text = ", ".join(f"{first}-{first + number * stride}:{stride}" for first, number, stride in items)
    expected = {first + i * stride for first, number, stride in items for i in range(number + 1)}
    assert parse_schedule(text) == tuple(sorted(expected))


def test_the_schedule_of_the_published_run():
    steps = parse_schedule("0-10, 20-150:10")
    assert steps == (*range(11), *range(20, 151, 10))
    assert format_schedule(steps) == "0-10, 20-150:10"
    assert parse_schedule(" 7 ") == (7,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("1,,2", "item '' is empty"),
        ("1-", "neither a step nor a range"),
        ("-3", "neither a step nor a range"),
        ("1.5", "neither"),
        ("9-3", r"runs backwards; write 3-9"),
        ("0-10:0", "stride of '0-10:0' is 0"),
        ("0-10:4", "end the range at 8 or 12"),
        ("0-99999999", "more than 1,000,000 steps"),
    ],
)
def test_mistakes_in_a_schedule_are_quoted(text, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_schedule(text)


def test_an_empty_schedule_has_no_text():
    with pytest.raises(ConfigurationError, match="needs steps"):
        format_schedule([])
