"""prime-rl's real `rl` and `inference` with this project's plugin, on CPUs: nothing of prime-rl is replaced or driven.

    scripts/setup_prime_rl.sh PRIME_RL_DIR
    PRIME_RL_DIR=… pytest -m "prime_rl and nightly"

Seven runs of the shipped configuration (12 minutes on two cores), each with launcher, two environment servers,
orchestrator, inference server, trainer and broadcast. What a CPU forces is in tests/helpers/prime_rl_cpu/.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from prime_rl_run import (
    POLICY,
    ROOT,
    Run,
    Workplace,
    bfloat16,
    inference,
    project,
    snapshots_equal_broadcasts,
    weights,
)

from rlvr_landscape_plugin.snapshot import open_snapshot

pytestmark = [pytest.mark.prime_rl, pytest.mark.nightly, pytest.mark.timeout(1200)]

SMALL_GRID = ["--grid.alpha.points", "3", "--grid.beta.points", "3", "--env.num_prompts", "6", "--env.rollouts", "4"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A directory to start prime-rl from; whatever still runs at the end is ended."""
    given = os.environ.get("PRIME_RL_DIR")
    if not given:
        pytest.skip("PRIME_RL_DIR is not set: give it the path of a prime-rl checkout")
    place = Workplace(Path(given).resolve(), tmp_path_factory.mktemp("prime_rl"))
    if not (place.bin / "rl").is_file():
        pytest.skip(f"{place.bin} has no `rl`: run scripts/setup_prime_rl.sh {given}")
    yield place
    for run in place.runs:
        run.end()


def finished(run: Run) -> Run:
    """Wait for a run that must end well."""
    assert run.wait() == 0, run.tail()
    assert "Training finished!" in run.log.read_text(), run.tail()
    return run


@pytest.fixture(scope="module")
def trained(workplace: Workplace) -> Run:
    """Three steps of the shipped configuration, W&B offline."""
    return finished(workplace.rl(monitors={"wandb": {"project": "landscape"}}))


def test_snapshots_are_the_policies_that_inference_got(trained):
    snapshots_equal_broadcasts(trained, (0, 1, 2, 3))
    assert not (trained.directory / "snapshots" / "failures.jsonl").exists()
    start, end = (weights(trained.directory / "snapshots" / f"step_00000{step}") for step in (0, 3))
    shipped = weights(POLICY)
    assert start.keys() == shipped.keys()
    assert all((start[name] == bfloat16(shipped[name])).all() for name in shipped)
    assert any((start[name] != end[name]).any() for name in start)


def test_manifests_name_run_trainer_and_objective(trained):
    manifest = open_snapshot(trained.directory / "snapshots" / "step_000002").manifest
    assert manifest is not None
    assert manifest.trainer["name"] == "prime-rl"
    assert len(manifest.run) == 32
    assert manifest.parent_run is None
    assert manifest.objective["name"] == "grpo"
    assert manifest.configuration["orchestrator"]["group_size"] == 4
    assert manifest.configuration["trainer"]["max_steps"] == 3


def test_metrics_of_each_step_agree_with_prime_rls_own(trained):
    metrics = trained.metrics()
    for step in (1, 2, 3):
        row = metrics[step]
        assert row["kl_k3/mean"] == pytest.approx(row["mismatch_kl/all/mean"], rel=1e-3, abs=1e-7)
        assert row["kl_k3/mean"] > 0
        assert 0 <= row["clip_fraction/mean"] <= 1
        assert row["importance_ratio/mean"] == pytest.approx(1, abs=0.2)
    assert metrics[3]["kl_k3/mean"] > metrics[1]["kl_k3/mean"]  # from step 2 on an update lies between


def test_weights_and_biases_gets_the_metrics_by_name(trained, workplace):
    files = list(map(str, (trained.directory / "wandb").glob("offline-run-*/run-*.wandb")))
    assert len(files) == 2  # offline, orchestrator and trainer have a run each
    code = (
        "import json, sys\n"
        "from wandb.proto.wandb_internal_pb2 import Record\n"
        "from wandb.sdk.internal.datastore import DataStore\n"
        "names = set()\n"
        "for file in sys.argv[1:]:\n"
        "    store = DataStore()\n"
        "    store.open_for_scan(file)\n"
        "    while (data := store.scan_data()) is not None:\n"
        "        record = Record()\n"
        "        record.ParseFromString(data)\n"
        "        names |= {item.key or '.'.join(item.nested_key) for item in record.history.item}\n"
        "print(json.dumps(sorted(names)))\n"
    )
    done = subprocess.run([str(workplace.bin / "python"), "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = set(json.loads(done.stdout))
    assert {f"{name}/mean" for name in ("clip_fraction", "importance_ratio", "kl_k1", "kl_k3")} <= names


def test_a_sweep_on_prime_rls_own_inference_and_its_report(trained, workplace):
    roots = trained.directory / "snapshots"
    token = secrets.token_hex(32)
    steps = [str(roots / f"step_00000{step}") for step in (0, 3)]
    output = workplace.root / "landscape-data"
    options = ["@", str(ROOT / "configs" / "sweep" / "paper.toml"), "--snapshots", *steps, "--output", str(output)]
    options += ["--surrogate.advantage_scale", "none", "--env.taskset.source", "builtin", "--env.num_prompts", "6"]
    options += [*SMALL_GRID, "--env.max_concurrent", "64", "--sampling.max_tokens", "64"]
    options += ["--server.dtype", "float32", "--server.max_model_len", "1024"]
    with inference(workplace, roots / "step_000000", token, roots) as url:
        done = project(
            workplace, "rlvr_landscape_plugin.sweep", *options, "--server.urls", url, RLVR_LANDSCAPE_TOKEN=token
        )
        assert done.returncode == 0, done.stdout + done.stderr
    datasets = sorted(output.glob("*.nc"))
    assert len(datasets) == 2, done.stdout
    report = project(workplace, "rlvr_landscape_analysis", str(output))
    assert report.returncode == 0, report.stdout + report.stderr
    assert list(output.rglob("*.html"))


def kill_at(run: Run, mark: Path) -> str:
    """Wait until the trainer stands in the middle of a file, kill it, wait for the launcher; the file's path."""
    process, file = run.wait_for(mark).split(maxsplit=1)
    os.kill(int(process), signal.SIGKILL)
    assert run.wait() != 0
    return file


def test_a_trainer_killed_while_it_writes_snapshots_leaves_whole_ones(workplace):
    """Killed in a shard, resumed, killed while publishing, resumed again: GRPO-N."""
    first = workplace.root / "first"
    run = workplace.rl(
        variant="grpo_n", env={"PRIME_RL_STALL": r"\.step_000002\.shards/", "PRIME_RL_STALL_MARK": str(first)}
    )
    assert kill_at(run, first).endswith("0.safetensors")
    snapshots_are(run, (0, 1))
    kept = (run.directory / "snapshots" / "step_000001" / "manifest.json").read_bytes()
    one = open_snapshot(run.directory / "snapshots" / "step_000001").manifest

    second = workplace.root / "second"
    stall = {"PRIME_RL_STALL": r"\.step_000002\.[^/]*\.tmp/", "PRIME_RL_STALL_MARK": str(second)}
    # The orchestrator's checkpoints are ahead of the killed trainer's: a bare --resume would take one that it lacks.
    run = workplace.rl("--resume.step", "1", variant="grpo_n", env=stall)
    assert "/.step_000002." in kill_at(run, second)
    snapshots_are(run, (0, 1))

    run = finished(workplace.rl("--resume.step", "1", variant="grpo_n"))
    assert "Resuming training from checkpoint step 1" in run.trainer_log
    for step in (1, 2, 3):  # the broadcast of step 0 was cleaned by prime-rl
        compare_with_broadcast(run, step)
    snapshots_are(run, (0, 1, 2, 3))
    hidden = [path.name for path in (run.directory / "snapshots").iterdir() if path.name.startswith(".")]
    assert hidden == []
    assert not (run.directory / "snapshots" / "failures.jsonl").exists()
    assert (run.directory / "snapshots" / "step_000001" / "manifest.json").read_bytes() == kept
    three = open_snapshot(run.directory / "snapshots" / "step_000003").manifest
    assert one is not None
    assert three is not None
    assert (three.objective["name"], three.parent_run) == ("grpo_n", one.run)
    assert three.run != one.run


def snapshots_are(run: Run, steps: tuple[int, ...]) -> None:
    """Check that exactly these snapshots have their name, and that each is whole, by the user's command too."""
    root = run.directory / "snapshots"
    assert sorted(path.name for path in root.glob("step_*")) == [f"step_{step:06d}" for step in steps]
    for step in steps:
        open_snapshot(root / f"step_{step:06d}").verify()


def compare_with_broadcast(run: Run, step: int) -> None:
    sent = weights(run.directory / "broadcasts" / f"step_{step}")
    for name, values in weights(run.directory / "snapshots" / f"step_{step:06d}").items():
        assert (values == sent[name]).all(), (step, name)


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes at `place`."""
    place.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_and_two_trainer_ranks(workplace):
    """GSPO-N on two ranks: the third snapshot does not fit, room is made, the fourth does."""
    others = sum(file.stat().st_size for file in POLICY.iterdir() if file.suffix != ".safetensors")
    one = 2 * sum(math.prod(shape) for shape in open_snapshot(POLICY).shapes.values()) + others
    with small_disk(workplace.root / "disk", int(2.5 * one)) as disk:
        changes: dict[str, Any] = {
            "trainer": {"loss": {"kwargs": {"directory": str(disk)}}},
            "deployment": {"num_train_gpus": 2},
        }
        run = workplace.rl(variant="gspo_n", **changes)

        def make_room() -> None:
            while run.process.poll() is None:
                if (disk / "failures.jsonl").exists():
                    shutil.rmtree(disk / "step_000000")
                    return
                time.sleep(0.02)

        watcher = threading.Thread(target=make_room)
        watcher.start()
        finished(run)
        watcher.join()
        (line,) = (disk / "failures.jsonl").read_text().splitlines()
        assert json.loads(line)["step"] == 2
        assert "No space left on device" in json.loads(line)["error"]
        assert "No snapshot of step 2; training continues" in run.trainer_log
        assert sorted(path.name for path in disk.iterdir()) == ["failures.jsonl", "step_000001", "step_000003"]
        for step in (1, 3):
            snapshot = open_snapshot(disk / f"step_{step:06d}")
            snapshot.verify()
            assert len(snapshot.files) == 2
            sent = weights(run.directory / "broadcasts" / f"step_{step}")
            for name, values in weights(snapshot.path).items():
                assert (values == sent[name]).all(), (step, name)
    row = run.metrics()[3]
    assert row["kl_k3/mean"] == pytest.approx(row["mismatch_kl/all/mean"], rel=1e-3, abs=1e-7)


def test_a_sweep_follows_a_run_that_goes_on(workplace):
    """Clip-Higher: three snapshots are measured, on a server that the sweep starts, before training has ended."""
    run = workplace.rl(
        variant="clip_higher",
        max_steps=1000,
        ckpt={"interval": 1000},
        trainer={"loss": {"kwargs": {"snapshots": "0, 1, 3"}}},
    )
    output = workplace.root / "followed"
    options = ["@", str(ROOT / "configs" / "sweep" / "paper.toml"), "--follow", str(run.directory)]
    options += ["--surrogate.advantage_scale", "none", "--output", str(output), "--follow-patience", "300"]
    options += ["--env.taskset.source", "builtin", *SMALL_GRID, "--env.max_concurrent", "64"]
    options += ["--sampling.max_tokens", "64", "--server.device", "cpu", "--server.dtype", "float32"]
    options += ["--server.max_model_len", "1024", "--server.max_num_seqs", "64"]
    done = project(workplace, "rlvr_landscape_plugin.sweep", *options)
    assert done.returncode == 0, done.stdout + done.stderr + run.tail()
    assert run.process.poll() is None, run.tail()  # training goes on
    assert max(run.metrics()) > 3
    run.end()

    assert "3 snapshots, steps 0, 1, 3" in done.stdout + done.stderr
    datasets = sorted(output.glob("*.nc"))
    assert [file.name for file in datasets] == [f"landscape_step{step:06d}_slice0.nc" for step in (0, 1, 3)]
    for step, file in zip((0, 1, 3), datasets, strict=True):
        snapshot = open_snapshot(run.directory / "snapshots" / f"step_{step:06d}")
        assert snapshot.manifest is not None
        assert snapshot.manifest.objective["options"]["clip_high"] == 0.28
        with xr.open_dataset(file) as landscape:
            assert landscape.attrs["snapshot_sha256"] == snapshot.sha256
            assert landscape.reward.shape == (3, 3, 6, 4)
            assert np.isfinite(landscape.reward).all()


def test_random_rewards_run(workplace):
    """Its list of sources replaces the overlay's, so the overlay's changes are made in a copy of the file."""
    data = tomllib.loads((ROOT / "configs" / "train" / "prime_rl" / "random_rewards.toml").read_text())
    (source,) = data["orchestrator"]["train"]["source"]
    source["env"]["taskset"] |= {"source": "builtin", "max_names_per_turn": 3}
    source["env"]["agent"] = {"harness": {"id": "rlvr-chat"}, "runtime": {"type": "subprocess"}}
    variant = workplace.root / "random_rewards.json"
    variant.write_text(json.dumps(data))
    run = finished(workplace.rl(variant=variant, max_steps=1))
    snapshots_equal_broadcasts(run, (0, 1))
    (traces,) = (run.directory / "rollouts" / "step_1" / "train" / "effective").glob("traces.jsonl")
    rewards = [json.loads(line)["traces"][0]["rewards"] for line in traces.read_text().splitlines()]
    assert {next(iter(names)) for names in rewards} == {"random_reward"}
    assert {names["random_reward"]["score"] for names in rewards} <= {0.0, 1.0}
