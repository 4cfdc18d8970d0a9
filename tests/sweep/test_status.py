"""`rlvr-landscape status`: sweeps on fake servers, finished, killed, sharded and old, and directories that are none."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import xarray as xr
from conftest import ROOT, start_fake_sweep

from rlvr_landscape_plugin.cli import main
from rlvr_landscape_plugin.errors import StoreError
from rlvr_landscape_plugin.sweep import heartbeat as module
from rlvr_landscape_plugin.sweep.heartbeat import process_file
from rlvr_landscape_plugin.sweep.status import _covered, read_status
from rlvr_landscape_plugin.sweep.status_command import line, text

EPISODES = 13 * 4 * 3
"""Of the small sweep: 12 points and the checkpoint's own batch, 4 tasks × 3 rollouts."""


def gone() -> int:
    """The number of a process that is not there any more."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def report(output, share, **changes):
    """Leave the sign of life of a process of this machine that measured a moment ago."""
    facts = {
        "shard": "{}/{}".format(*share),
        "host": module.socket.gethostname(),
        "pid": os.getpid(),
        "started": time.time() - 60,
        "state": "measuring",
        "error": "",
        "written": time.time(),
        "steps": [0],
        "slice": "step000000_slice0",
        "points": [1, 6],
        "episodes": 24,
        "failed_episodes": 0,
        "rate": 2.0,
        "waiting": [],
        "servers": [{"url": "http://127.0.0.1:8000", "away": False, "points": 1, "answered": time.time() - 3}],
        "server_failures": 0,
        "at_most": False,
        "messages": [],
    }
    output.mkdir(exist_ok=True)
    (output / process_file(share)).write_text(json.dumps(facts | changes))


def test_a_finished_sweep(sweep_here, fake_server, tmp_path, capsys):
    assert sweep_here(fake_server)[0] == 0
    status = read_status(tmp_path / "out")
    with xr.open_dataset(tmp_path / "out" / "landscape_step000000_slice0.nc") as data:
        points = data["reward"].isel(prompt=0, rollout=0).size
        assert status.episodes == data["reward"].size + data["base_reward"].size == EPISODES
    assert (status.state, status.points, status.points_asked) == ("finished", points, points)
    assert status.episodes == status.episodes_asked
    assert status.landscapes[0].dataset == "landscape_step000000_slice0.nc"
    assert (status.seconds_left, status.bytes_more) == (None, 0)
    assert [process.state for process in status.processes] == ["finished"]
    assert status.processes[0].servers[0]["points"] == points
    assert main(["status", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "finished" in said.out
    assert "points     12 of 12 (100%)" in said.out
    assert said.err == f"next: rlvr-landscape report {tmp_path / 'out'}\n"


def test_a_sweep_that_goes_on_is_killed_and_lacks_shards(fake_server, sweep_command, tmp_path, capsys):
    stuck = []

    async def stick(route, count):
        if route == "generate" and count > 8:
            stuck.append(route)
            await asyncio.sleep(120)

    fake_server.before = stick
    output = tmp_path / "out"
    process = start_fake_sweep(sweep_command(fake_server, "--shard", "2/3", "--slice.seeds", "[0, 1]"))
    try:
        until = time.monotonic() + 300
        while not stuck or not (seen := read_status(output).processes) or seen[0].slice == "":
            assert time.monotonic() < until
            time.sleep(0.2)
        status = read_status(output)
        assert status.state == "measuring"
        assert status.points_asked == 24
        assert status.points == len(list(output.glob("*/points/*.nc"))) > 0
        assert status.shards_absent == ["1/3", "3/3"]
        assert status.processes[0].pid == process.pid
        server = status.processes[0].servers[0]
        assert server["url"] == fake_server.url
        assert time.time() - server["answered"] < 60
        assert "never started: shard 1/3, 3/3" in text(status)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    status = read_status(output)
    assert (status.state, status.processes[0].state) == ("stopped", "dead")
    assert main(["status", str(output)]) == 0
    said = capsys.readouterr()
    assert "shard 2/3  dead; sign of life" in said.out
    assert "once more for --shard 2/3, 1/3, 3/3" in said.err


def test_three_processes_at_work_are_added_up(tmp_path):
    output = tmp_path / "out"
    for shard in (1, 2):
        report(output, (shard, 3), rate=1.5)
    report(output, (3, 3), rate=0.0, waiting=["starting the vLLM server"], servers=[], slice="")
    report(output, (1, 1), state="finished", written=time.time() - 999)
    status = read_status(output)
    assert [process.shard for process in status.processes] == ["1/3", "2/3", "3/3"]
    assert status.rate == 3.0
    assert "shard 3/3  measuring, starting the vLLM server; sign of life" in text(status)
    assert "2 of 3" not in line(status)
    assert "3 of 3 shards at work" in line(status)


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, "measuring"),
        ({"pid": None}, "dead"),
        ({"written": 100}, "dead"),
        ({"host": "elsewhere", "pid": None}, "measuring"),
        ({"host": "elsewhere", "written": 100}, "dead"),
        ({"state": "failed", "error": "no server"}, "failed"),
    ],
)
def test_a_process_is_there_where_its_machine_says_so_or_it_reported_lately(tmp_path, changes, state):
    if changes.get("pid", 0) is None:
        changes = changes | {"pid": gone()}
    if "written" in changes:
        changes = changes | {"written": time.time() - 1000}
    report(tmp_path / "out", (1, 1), **changes)
    status = read_status(tmp_path / "out")
    assert status.processes[0].state == state
    assert status.state == {"dead": "stopped"}.get(state, state)
    assert ("no server" in text(status)) == (state == "failed")


@pytest.mark.parametrize("name", ["finished", "killed", "progressive"])
def test_sweeps_of_older_versions_are_counted_by_their_files(tmp_path, name):
    with tarfile.open(ROOT / "tests" / "freeze" / "data" / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    output = tmp_path / name
    status = read_status(output)
    found = status.landscapes[0]
    whole = {path.name for path in (output / found.name / "points").glob("a???_b???.nc")}
    assert found.points >= len(whole)
    assert found.points_asked == 9
    assert status.processes == []
    assert "none has reported here" in text(status)
    assert (status.state == "finished") == (name != "killed")


def test_a_snapshot_that_is_not_there_yet_counts_as_the_others(sweep_here, fake_server, tmp_path):
    assert sweep_here(fake_server)[0] == 0
    report(tmp_path / "out", (1, 1), steps=[0, 10, 20], rate=12.0)
    status = read_status(tmp_path / "out")
    assert (status.points, status.points_asked, status.steps_asked) == (12, 36, 3)
    assert status.seconds_left == pytest.approx(2 * EPISODES / 12)
    assert "3, 1 of them begun" in text(status)


def test_rows_fit_80_columns(sweep_here, fake_server, tmp_path):
    assert sweep_here(fake_server)[0] == 0
    report(tmp_path / "out", (1, 1), host="gpu-042", pid=1234567)
    lines = text(read_status(tmp_path / "out")).replace(str(tmp_path / "out"), "outputs/mine").splitlines()
    assert max(map(len, lines)) <= 100
    assert max(len(row) for row in lines if "sign of life" not in row) <= 80


def make_training_run(folder):
    (folder / "snapshots").mkdir(parents=True)


def make_parent(folder):
    (folder / "mine" / "step000000_slice0").mkdir(parents=True)
    (folder / "mine" / "step000000_slice0" / "journal.json").write_text("{}")


def make_damaged(folder):
    (folder / "step000000_slice0").mkdir(parents=True)
    (folder / "step000000_slice0" / "journal.json").write_text("{")


def make_file(folder):
    folder.write_text("")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "does not exist; give the output directory of a sweep"),
        (make_file, "is a file"),
        (lambda folder: folder.mkdir(), "holds no sweep: no journal.json"),
        (make_training_run, "is a training run, not a sweep"),
        (make_parent, "did you mean"),
        (make_damaged, "journal.json cannot be read"),
    ],
    ids=["absent", "file", "empty", "training", "parent", "damaged"],
)
def test_a_directory_that_is_no_sweep_is_named(tmp_path, make, message, capsys):
    make(tmp_path / "there")
    with pytest.raises(StoreError, match=message):
        read_status(tmp_path / "there")
    assert main(["status", str(tmp_path / "there")]) == 2
    assert message in capsys.readouterr().err


def test_json_has_the_numbers(sweep_here, fake_server, tmp_path, capsys):
    assert sweep_here(fake_server)[0] == 0
    assert main(["status", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["points"], found["episodes"]) == ("finished", 12, EPISODES)
    assert found["landscapes"][0]["points_asked"] == 12
    assert found["processes"][0]["servers"][0]["points"] == 12


def test_watching_ends_with_the_sweep(tmp_path, capsys):
    output = tmp_path / "out"
    report(output, (1, 1), pid=gone())
    assert main(["status", str(output), "--watch", "--every", "0.1"]) == 1
    assert "stopped" in capsys.readouterr().out
    assert main(["status", str(output), "--every", "0"]) == 2


def test_portions_are_united_as_sets_of_cells():
    draw = random.Random(3)
    for _ in range(50):
        tasks, rollouts = draw.randint(1, 9), draw.randint(1, 5)
        held, cells = np.zeros((tasks, rollouts), bool), []
        for _ in range(draw.randint(0, 4)):
            a, b = sorted(draw.choices(range(12), k=2))
            c, d = sorted(draw.choices(range(7), k=2))
            held[a:b, c:d] = True
            cells.append((a, b, c, d))
        assert _covered(cells, tasks, rollouts) == held.sum()


def test_a_disk_that_refuses_the_sign_of_life_does_not_stop_the_sweep(sweep_here, fake_server, tmp_path, monkeypatch):
    def refuse(path, parts, **_):
        raise StoreError(f"cannot write {path}: the disk is full")

    monkeypatch.setattr(module, "replace_text", refuse)
    code, said = sweep_here(fake_server)
    assert code == 0
    assert said.count("will not see this process") == 1
    assert not list((tmp_path / "out").glob("process_*"))


def test_a_sweep_that_grew_is_counted_by_what_was_asked_last(sweep_here, fake_server, tmp_path):
    assert sweep_here(fake_server, "--env.num-prompts", "2", "--env.rollouts", "2")[0] == 0
    small = read_status(tmp_path / "out")
    assert (small.state, small.points, small.episodes) == ("finished", 12, 13 * 2 * 2)
    assert sweep_here(fake_server)[0] == 0
    grown = read_status(tmp_path / "out")
    assert (grown.state, grown.points, grown.episodes) == ("finished", 12, EPISODES)
    assert sweep_here(fake_server, "--grid.beta.points", "7", "--shard", "1/2")[0] == 0
    again = read_status(tmp_path / "out")
    assert again.points_asked == 3 * 7
    assert 12 < again.points < again.points_asked
    assert again.state != "finished"
    assert again.landscapes[0].dataset is None
