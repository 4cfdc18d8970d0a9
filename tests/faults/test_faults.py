"""Faults in sweeps: a short form on toy servers, each cheap kind once on the session's servers, all of them nightly."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="fastapi comes with vLLM")

import fault_servers
from campaign import Campaign, read, schedule, summary, table, toy_hosts, wall_seconds, write_table
from conftest import POLICY
from fault_files import HOW, damaged
from fault_servers import RealHost, Violation
from fault_sweeps import FAILED, KINDS, REAL, REPAIRED, SKIPPED, TOY, same_landscape

from rlvr_landscape_plugin.directions import PreparedSlice, SliceSpec
from rlvr_landscape_plugin.errors import ServerError
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.snapshot import open_snapshot
from rlvr_landscape_plugin.sweep.fleet import Server
from rlvr_landscape_plugin.sweep.jobs import Job

SHORT = [
    "client: kill -9 while the dataset is written",
    "server: a move that cannot be undone",
    "weights: updated past the routes",
    "file: damaged midway",
    "file: the dataset damaged",
    "attack: a path out of the roots",
]
"""Seconds each, and nothing that another test does as well."""
CHEAP = [
    "client: kill -9",
    "server: engine stopped for a while",
    "connection: cut",
    "weights: another slice loaded behind the client's back",
    "disk: full",
    "disk: read-only for a while",
    "file: damaged midway",
]
"""Ctrl-C and further moments of kill -9: test_sweep.py."""


@pytest.fixture
def forking(monkeypatch):
    """The environment of commands that are forked, put back afterwards."""
    for name in ("PYTHONPATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(sys, "path", list(sys.path))
    fault_servers.prepare_to_fork()


@pytest.fixture
def toys(tmp_path, forking):
    hosts = toy_hosts(tmp_path)
    yield hosts
    for host in hosts:
        host.close()


@pytest.mark.slow
def test_a_sweep_on_toy_servers_survives_each_fault_or_refuses_and_continues(toys, tmp_path):
    campaign = Campaign(toys, tmp_path, 1, TOY, ["plain"])
    try:
        records = list(campaign.run(dict(enumerate((TOY, kind) for kind in SHORT))))
        whole = campaign.references["plain"]
    finally:
        campaign.close()
    assert [record["kind"] for record in records] == SHORT
    assert not [record for record in records if record["outcome"] == FAILED], table(records)
    assert all(record["outcome"] != SKIPPED or "mount" in record["detail"] for record in records)
    assert whole.reward.mean() > 0
    check_that_differences_are_seen(whole, tmp_path / "other.nc")


def check_that_differences_are_seen(whole, path):
    """A campaign that compares nothing would find nothing."""
    whole.to_netcdf(path)
    same_landscape(path, whole, True)
    other = whole.copy(deep=True)
    other["reward"][1, 2, 0, 0] += 1e-6
    path.unlink()
    other.to_netcdf(path)
    with pytest.raises(Violation, match="other values of reward"):
        same_landscape(path, whole, True)


@pytest.mark.server
@pytest.mark.slow
def test_a_sweep_survives_each_cheap_fault_or_refuses_and_continues(server, second_server, playground, tmp_path):
    hosts = [RealHost(server, [POLICY, playground]), RealHost(second_server, [POLICY])]
    campaign = Campaign(hosts, tmp_path, 1, REAL)
    try:
        records = list(campaign.run(dict(enumerate((REAL, kind) for kind in CHEAP))))
    finally:
        campaign.close()
        for host in hosts:
            host.close()
    assert [record["kind"] for record in records] == CHEAP
    assert not [record for record in records if record["outcome"] == FAILED], table(records)
    assert all(record["outcome"] != SKIPPED or "mount" in record["detail"] for record in records)


@pytest.mark.server
async def test_a_move_along_the_slice_of_another_client_is_noticed(server):
    spec, snapshot = SliceSpec(seed=0), open_snapshot(POLICY)
    unused: Any = None
    job = Job(PreparedSlice(snapshot, spec, {}, {}), "auto", unused, unused)
    async with LandscapeClient(server.url, server.token) as ours, LandscapeClient(server.url, server.token) as other:
        await ours.load(str(POLICY), spec.as_dict())
        await ours.move(0.1, 0.0)
        await job.check_weights(Server(ours), 0.1, 0.0)
        await other.load(str(POLICY), SliceSpec(seed=7).as_dict())
        with pytest.raises(ServerError, match="another client loaded tiny_sorter since load"):
            await ours.move(0.1, 0.0)
        await other.move(0.1, 0.0)
        with pytest.raises(ServerError, match="no longer holds the weights of this sweep"):
            await job.check_weights(Server(ours), 0.1, 0.0)


@pytest.mark.nightly
@pytest.mark.server
@pytest.mark.timeout(6000)
def test_the_whole_campaign(tmp_path):
    results = tmp_path / "faults.jsonl"
    command = [sys.executable, str(Path(__file__).with_name("campaign.py")), "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert len(read(results)) >= 300
    assert sum(wall_seconds(read(results)).values()) < 90 * 60


def test_the_schedule_is_a_function_of_the_seed_and_has_every_kind():
    count = sum(weight for weight, _ in KINDS.values())
    drawn = schedule(count, 0, list(KINDS))
    assert count >= 300
    assert drawn == schedule(count + 50, 0, list(KINDS))[:count]
    assert set(drawn) == set(KINDS)
    assert drawn != schedule(count, 1, list(KINDS))


@pytest.mark.parametrize("how", HOW)
def test_damage_changes_a_file(how):
    content = bytes(range(200))
    assert all(damaged(content, how, random.Random(seed)) != content for seed in range(50))


def test_the_table_counts_outcomes_and_is_put_between_its_marks(tmp_path):
    records = [
        {"index": 0, "bench": TOY, "kind": "client: Ctrl-C", "outcome": REPAIRED, "wall_seconds": 60.0},
        {"index": 1, "bench": REAL, "kind": "client: Ctrl-C", "outcome": FAILED, "wall_seconds": 120.0},
    ]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table of the campaign: begin -->\nold\n<!-- table of the campaign: end -->\nafter\n")
    write_table(page, f"{summary(records, 3)}\n\n{table(records)}")
    text = page.read_text()
    assert text.startswith("before\n<!--")
    assert text.endswith("-->\nafter\n")
    assert "old" not in text
    assert "`--seed 3`: 2 faults (1 on toy servers in 1 minutes, 1 on vLLM in 2 minutes), 3 minutes in all" in text
    assert "1 violations" in text
    assert "| client: Ctrl-C | 2 | 1 | 1 | 1 |" in text
    assert "| all | 2 | 1 | 1 | 1 |" in text
