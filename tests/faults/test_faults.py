"""Faults in sweeps against the session's servers: each cheap kind once; the whole campaign nightly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from campaign import FAILED, KINDS, SKIPPED, Campaign, Host, schedule, table
from conftest import POLICY

from rlvr_landscape_plugin.directions import PreparedSlice, SliceSpec
from rlvr_landscape_plugin.errors import ServerError
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.snapshot import open_snapshot
from rlvr_landscape_plugin.sweep.fleet import Server
from rlvr_landscape_plugin.sweep.jobs import Job

CHEAP = [
    "client: kill -9",
    "server: engine stopped for a while",
    "connection: cut",
    "weights: another slice loaded behind the client's back",
    "disk: full",
    "disk: read-only for a while",
    "client: no file handles left",
    "file: damaged midway",
]
"""Ctrl-C and further moments of kill -9: test_sweep.py."""


@pytest.mark.server
@pytest.mark.slow
def test_a_sweep_survives_each_cheap_fault_or_refuses_and_continues(server, second_server, playground, tmp_path):
    hosts = [Host.of(server, [POLICY, playground]), Host.of(second_server, [POLICY])]
    campaign = Campaign(hosts, tmp_path, seed=1)
    try:
        records = list(campaign.run(dict(enumerate(CHEAP))))
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
@pytest.mark.timeout(4000)
def test_the_whole_campaign(tmp_path):
    command = [
        sys.executable,
        str(Path(__file__).with_name("campaign.py")),
        "--results",
        str(tmp_path / "faults.jsonl"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["faults"] == 100


def test_the_schedule_is_a_function_of_the_seed_and_has_every_kind():
    drawn = schedule(100, 0, list(KINDS))
    assert drawn == schedule(150, 0, list(KINDS))[:100]
    assert set(drawn) == set(KINDS)
    assert drawn != schedule(100, 1, list(KINDS))
