"""Whole sweeps on fake servers, in seconds: what is shared, lost, refused, refined and found."""

from __future__ import annotations

import asyncio
import json
import signal
import time

import numpy as np
import pytest
import xarray as xr
from conftest import QUIZ, start_fake_sweep
from fake_server import Cut, FakeServer

NAME = "step000000_slice0"
MEASURED = ("reward", "kl_k1", "kl_k3", "surrogate", "entropy", "completion_tokens", "base_reward", "realised_step")


def opened(output):
    with xr.open_dataset(output / f"landscape_{NAME}.nc") as data:
        return data.load()


def assert_same(output, whole):
    again = opened(output)
    for name in MEASURED:
        xr.testing.assert_equal(again[name], whole[name])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The dataset of an undisturbed sweep."""
    from conftest import FAKE_TOKEN, HELPERS

    from rlvr_landscape_plugin.sweep import main

    folder = tmp_path_factory.mktemp("whole")
    (folder / "sweep.toml").write_text(QUIZ)
    with pytest.MonkeyPatch.context() as patch, FakeServer() as server:
        patch.syspath_prepend(str(HELPERS / "tasksets"))
        arguments = ["@", str(folder / "sweep.toml"), "--output", str(folder / "out"), "--server.token", FAKE_TOKEN]
        assert main([*arguments, "--server.urls", json.dumps([server.url])]) == 0
    return opened(folder / "out")


def test_the_origin_is_exact_and_kl_grows_outward(whole):
    origin = whole.sel(alpha=0.0, beta=0.0)
    assert (origin.kl_k1 == 0).all()
    assert origin.reward.mean() > 0
    assert (whole.status != 2).all()
    kl = whole.kl_k3.mean(["prompt", "rollout"])
    assert kl[-1, -1] > kl[1, 2] > 0
    assert whole.attrs["title"] == "RLVR reward landscape, step 0, slice 0"
    assert json.loads(whole.attrs["servers"])[0]["points"] == 12


def test_a_finished_sweep_asks_no_server(whole, sweep_here, fake_server, tmp_path):
    assert sweep_here(fake_server)[0] == 0
    asked = sum(fake_server.asked.values())
    code, said = sweep_here(fake_server)
    assert code == 0
    assert "starting" not in said
    assert sum(fake_server.asked.values()) == asked
    assert_same(tmp_path / "out", whole)


def test_two_servers_share_one_queue(whole, sweep_here, fake_server, tmp_path):
    async def slow(route, count):
        await asyncio.sleep(0.05 if route == "generate" else 0)

    fake_server.before = slow
    with FakeServer(slow) as second:
        code, said = sweep_here(fake_server, second)
    assert code == 0, said
    assert_same(tmp_path / "out", whole)
    points = [facts["points"] for facts in json.loads(opened(tmp_path / "out").attrs["servers"])]
    assert sum(points) == 12
    assert min(points) >= 2


@pytest.mark.parametrize(("route", "at"), [("load", 1), ("move", 4), ("generate", 5), ("score", 3), ("checksums", 1)])
def test_a_cut_connection_is_reported_and_the_same_command_continues(
    whole, sweep_here, fake_server, tmp_path, route, at
):
    async def cut(asked, count):
        if asked == route and count >= at:
            raise Cut

    fake_server.before = cut
    code, said = sweep_here(fake_server)
    assert code == 2
    assert "connection failed" in said
    assert "the same command continues" in said
    assert "Traceback" not in said
    fake_server.before = None
    code, said = sweep_here(fake_server)
    assert code == 0, said
    assert_same(tmp_path / "out", whole)


def test_a_server_lost_on_the_way_leaves_its_points_to_the_other(whole, sweep_here, fake_server, tmp_path):
    async def dies(route, count):
        if route == "move" and count > 1:
            raise Cut

    async def slow(route, count):
        await asyncio.sleep(0.2 if route == "generate" else 0)

    fake_server.before = slow
    with FakeServer(dies) as dying:
        code, said = sweep_here(fake_server, dying)
    assert code == 0, said
    assert "the others continue" in said
    assert_same(tmp_path / "out", whole)


def test_a_server_that_was_away_is_waited_for(whole, sweep_here, fake_server, tmp_path):
    away: list[float] = []

    async def sleeps(route, count):
        if route == "move" and count == 4:
            away.append(time.monotonic())
        if away and time.monotonic() < away[0] + 1.0:
            raise Cut

    fake_server.before = sleeps
    code, said = sweep_here(fake_server, "--server.patience", "30")
    assert code == 0, said
    assert "trying again" in said
    assert_same(tmp_path / "out", whole)


def test_another_client_moving_the_server_is_noticed(sweep_here, fake_server):
    async def moved(route, count):
        if route == "info" and count == 6:
            fake_server._version = "another client's"

    fake_server.before = moved
    code, said = sweep_here(fake_server)
    assert code == 2 or "another client moved it" in said
    assert "exactly one sweep may use a server" in said


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"directions_dtype": "bfloat16"}, "holds the directions in bfloat16"),
        ({"protocol": 1}, "speaks landscape protocol 1"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(sweep_here, facts, message):
    with FakeServer(**facts) as server:
        code, said = sweep_here(server)
    assert code == 2
    assert message in said


@pytest.mark.parametrize(
    ("given", "fits"),
    [
        (("--server.dtype", "bfloat16"), False),
        (("--server.max-model-len", "2048"), False),
        (("--server.dtype", "float", "--server.max-model-len", "1024"), True),
    ],
)
def test_what_is_asked_of_a_server_that_runs_must_be_what_it_has(sweep_here, fake_server, tmp_path, given, fits):
    code, said = sweep_here(fake_server, *given, "--server.patience", "600")
    assert code == (0 if fits else 2)
    if not fits:
        assert f"not server.{given[0][9:].replace('-', '_')} = {given[1]}, which cannot change a server" in said
        assert not list((tmp_path / "out").rglob("points/*.nc"))


def test_a_refusal_that_would_be_repeated_ends_the_sweep_at_once(sweep_here, fake_server):
    async def refuse(route, count):
        if route == "load":
            raise RuntimeError("no direction can be made of it", 422)

    fake_server.before = refuse
    code, said = sweep_here(fake_server, "--server.patience", "600")
    assert code == 2
    assert "no direction can be made of it" in said
    assert fake_server.asked["load"] == 1


def test_a_server_with_another_dtype_is_refused_halfway(sweep_here, fake_server, tmp_path):
    async def cut(route, count):
        if route == "move" and count > 4:
            raise Cut

    fake_server.before = cut
    assert sweep_here(fake_server)[0] == 2
    with FakeServer(dtype="bfloat16") as other:
        code, said = sweep_here(other)
    assert code == 2
    assert "set server.dtype accordingly" in said


def test_a_server_that_reads_another_snapshot_is_refused(sweep_here, fake_server, monkeypatch):
    monkeypatch.setattr("fake_server.fingerprint", lambda spec, shapes: "0" * 64)
    code, said = sweep_here(fake_server)
    assert code == 2
    assert "another directions_fingerprint" in said


def test_a_wrong_token_is_named(sweep_here, fake_server):
    fake_server.token = "another"
    code, said = sweep_here(fake_server)
    assert code == 2
    assert "wrong or missing bearer token" in said


def test_shards_make_the_undivided_dataset(whole, sweep_here, fake_server, tmp_path):
    code, said = sweep_here(fake_server, "--shard", "2/2")
    assert code == 0
    assert "left to the shard that finishes last: 6 of 12 points are not measured yet" in said
    code, said = sweep_here(fake_server, "--shard", "1/2")
    assert code == 0, said
    assert_same(tmp_path / "out", whole)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_sweep_goes_on(whole, sweep_command, sweep_here, fake_server, tmp_path, how):
    async def slow(route, count):
        await asyncio.sleep(0.1 if route == "generate" else 0)

    fake_server.before = slow
    process = start_fake_sweep(sweep_command(fake_server))
    points = tmp_path / "out" / NAME / "points"
    deadline = time.monotonic() + 120
    while len(list(points.glob("a*.nc"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    kept = {path.name: path.read_bytes() for path in points.glob("a*.nc")}
    assert 3 <= len(kept) < 12
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command continues" in err
    fake_server.before = None
    code, said = sweep_here(fake_server)
    assert code == 0, said
    assert all((points / name).read_bytes() == content for name, content in kept.items())
    assert_same(tmp_path / "out", whole)


def test_other_settings_in_the_same_directory_are_refused_by_key(sweep_here, fake_server):
    assert sweep_here(fake_server)[0] == 0
    code, said = sweep_here(fake_server, "--seed", "7")
    assert code == 2
    assert "configuration.seed: 0 there, 7 asked for" in said


def test_a_sweep_whose_episodes_all_fail_stops_at_once(sweep_here, fake_server):
    code, said = sweep_here(
        fake_server, config=QUIZ.replace("num_prompts = 4", "num_prompts = 4\ntaskset.broken = true")
    )
    assert code == 2
    assert "this verifier is broken" in said
    assert fake_server.asked["move"] <= 2


PROGRESSIVE = QUIZ.replace("num_prompts = 4", "num_prompts = 66").replace("rollouts = 3", "rollouts = 2")
PROGRESSIVE = PROGRESSIVE.replace('snapshots = ["tiny-sorter"]', 'snapshots = ["tiny-sorter"]\nuntil_ci_width = 0.5')
PROGRESSIVE = PROGRESSIVE.replace('id = "tiny-quiz"', 'id = "tiny-quiz"\ntaskset.count = 66')


def test_a_progressive_sweep_begins_small_and_a_narrower_width_goes_on(sweep_here, fake_server, tmp_path):
    code, said = sweep_here(fake_server, config=PROGRESSIVE)
    assert code == 0, said
    first = opened(tmp_path / "out")
    record = json.loads(first.attrs["progressive"])
    assert record["looks"][0]["prompts"] == 64
    assert "prompts: correlation" in said
    code, said = sweep_here(fake_server, "--until-ci-width", "0.001", config=PROGRESSIVE)
    assert code == 0, said
    more = opened(tmp_path / "out")
    assert more.sizes["prompt"] == 66
    assert len(json.loads(more.attrs["progressive"])["looks"]) > 1
    same = more.reward.sel(alpha=first.alpha, beta=first.beta).isel(prompt=slice(first.sizes["prompt"]))
    np.testing.assert_array_equal(same.values, first.reward.values)


def test_ranges_are_found_by_probes_and_found_again(sweep_here, fake_server, tmp_path):
    config = QUIZ.replace("num_prompts = 4", "num_prompts = 8").replace(
        'id = "tiny-quiz"', 'id = "tiny-quiz"\ntaskset.count = 8'
    )
    given = ("--grid.find.prompts", "8", "--grid.find.kl", "0.2")
    code, said = sweep_here(fake_server, *given, config=config)
    assert code == 0, said
    assert "the configured range ×" in said
    record = json.loads((tmp_path / "out" / "range_step000000.json").read_text())["record"]
    data = opened(tmp_path / "out")
    assert data.alpha.values.max() == pytest.approx(0.15 * record["factor"])
    loads = fake_server.asked["load"]
    assert loads == 1, "probes and points share a slice"
    assert sweep_here(fake_server, *given, config=config)[0] == 0
    assert fake_server.asked["load"] == loads
    (tmp_path / "out" / "range_step000000.json").write_text("{")
    with pytest.warns(UserWarning, match="was moved to"):
        code, said = sweep_here(fake_server, *given, config=config)
    assert code == 0, said


@pytest.mark.slow
def test_a_job_array_of_submitit_makes_the_undivided_dataset(whole, sweep_command, fake_server, tmp_path):
    with FakeServer() as second:
        command = sweep_command(fake_server, second, "--cluster.shards", "2", "--cluster.executor", "local")
        process = start_fake_sweep(command, module="cluster")
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "landscape_step000000_slice0.nc" in out
    assert_same(tmp_path / "out", whole)
