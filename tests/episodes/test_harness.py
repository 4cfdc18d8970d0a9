"""The harness `rlvr-chat`: verifiers' rollouts through it, with a scripted model, beside those of the stock `null`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import verifiers.v1 as vf
from aiohttp import web
from conftest import POLICY, ROOT
from pydantic import ValidationError
from verifiers.v1.mcp import SharedToolServer
from verifiers.v1.runtimes import make_runtime

from rlvr_chat import ChatHarness, ChatHarnessConfig
from rlvr_landscape_plugin.serving.client import LandscapeClient

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
needs_uv = pytest.mark.skipif(shutil.which("uv", path=PATH) is None, reason="the stock harness needs uv on the PATH")


class Letters(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    """Pays a point per letter of the last reply."""

    @vf.reward
    async def letters(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply))


def task(prompt: Any, **fields: Any) -> Letters:
    return Letters(vf.TaskData(idx=0, prompt=prompt, **fields), vf.TaskConfig())


def say(text: str, finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}


def call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return say("", "tool_calls", tool_calls=[{"id": f"call-{name}", "type": "function", "function": function}])


def fail(status: int, message: str) -> dict[str, Any]:
    return {"status": status, "error": {"message": message}}


class Model:
    """An OpenAI-compatible endpoint that answers by a script; the answer `None` never comes."""

    def __init__(self, script: list[Any]) -> None:
        self.script, self.url = list(script), ""
        self.requests: list[dict[str, Any]] = []
        self.asked, self.hung_up = asyncio.Event(), asyncio.Event()

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        self.asked.set()
        answer = self.script[len(self.requests) - 1]
        if answer is None:
            try:
                await asyncio.Event().wait()
            finally:
                self.hung_up.set()
        if "error" in answer:
            return web.json_response({"error": answer["error"]}, status=answer["status"])
        usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
        head = {"id": "1", "created": 1, "model": "policy"}
        if not body.get("stream"):
            choices = [{"index": 0, **answer}]
            return web.json_response({**head, "object": "chat.completion", "choices": choices, "usage": usage})
        delta = dict(answer["message"])
        if calls := delta.get("tool_calls"):
            delta["tool_calls"] = [{**item, "index": index} for index, item in enumerate(calls)]
        choices = [{"index": 0, "delta": delta, "finish_reason": answer["finish_reason"]}]
        chunk = {**head, "object": "chat.completion.chunk", "choices": choices, "usage": usage}
        return web.Response(text=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", content_type="text/event-stream")

    async def generate(self, request: web.Request) -> web.Response:
        """vLLM's token-in, token-out route, which verifiers' training client calls."""
        self.requests.append(await request.json())
        tokens = self.script[len(self.requests) - 1]
        logprobs = [{"token": f"token_id:{token}", "logprob": -token / 1000} for token in tokens]
        choice = {"index": 0, "token_ids": tokens, "finish_reason": "stop", "logprobs": {"content": logprobs}}
        return web.json_response({"request_id": "1", "choices": [choice]})


@contextlib.asynccontextmanager
async def serve(script: list[Any]) -> AsyncIterator[Model]:
    model, app = Model(script), web.Application()
    app.router.add_post("/v1/chat/completions", model.chat)
    app.router.add_post("/inference/v1/generate", model.generate)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    model.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield model
    finally:
        await runner.cleanup()


def player(model: Model, harness: str = "rlvr-chat", **agent: Any) -> vf.Agent:
    client = {"type": "eval", "base_url": model.url, "api_key_var": "NO_KEY"} | agent.pop("client", {})
    config = {"model": "policy", "harness": {"id": harness}, "runtime": {"type": "subprocess"}, "client": client}
    return vf.Agent(vf.AgentConfig.model_validate(config | agent))


async def play(
    model: Model, the_task: vf.Task, turns: list[str | None] | None = None, harness: str = "rlvr-chat", **agent: Any
) -> vf.Trace:
    """A rollout of `the_task`; `turns` are what the caller says, None for the reply to the task's own prompt."""
    async with asyncio.timeout(60):
        if turns is None:
            return await player(model, harness, **agent).run(the_task)
        async with player(model, harness, **agent).interaction(the_task) as interaction:
            for turn in turns:
                await interaction.turn(turn)
        return interaction.trace


OWN = {"id", "timestamp", "time", "timing", "traceback", "harness", "runtime", "base_url"}
"""What differs between any two runs, and the harness's own name."""


def comparable(record: Any) -> Any:
    """A record without what is a run's `OWN`."""
    return without(record, *OWN)


def without(record: Any, *names: str) -> Any:
    """A JSON value without the fields of these names, at any depth."""
    if isinstance(record, dict):
        return {key: without(value, *names) for key, value in record.items() if key not in names}
    return [without(item, *names) for item in record] if isinstance(record, list) else record


IMAGE = [
    {"type": "text", "text": "What is this?"},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
]
OVERFLOW = "This model's maximum context length is 1024 tokens"
SCENARIOS: dict[str, tuple[vf.Task, list[str | None] | None, list[Any], dict[str, Any]]] = {
    "a prompt": (task("Hello", system_prompt="Be brief."), None, [say("Hi.")], {"sampling": {"temperature": 0}}),
    "user speaks first": (task(None, system_prompt="Sort."), ["b a", "c"], [say("a b"), say("a b c", "length")], {}),
    "prompt speaks first": (task("Hello"), [None, "And?"], [say("Hi."), say("")], {}),
    "image": (task([vf.UserMessage.model_validate({"content": IMAGE})]), None, [say("A cat")], {}),
    "tools it does not have": (
        task("Hello"),
        None,
        [call("search", '{"q": 1}'), call("f", "[1]"), call("g", "{"), say("Sorry.")],
        {},
    ),
    "turn limit": (task(None), ["a", "b"], [say("A")], {"max_turns": 1}),
    "a transient failure": (task("Hello"), None, [fail(503, "busy"), say("Hi.")], {}),
    "a lasting failure": (task("Hello"), None, [fail(404, "no such model")], {}),
    "context full at first": (task("Hello"), None, [fail(400, OVERFLOW)], {}),
    "context full later": (task(None), ["a", "b"], [say("A"), fail(400, OVERFLOW)], {}),
}


@pytest.mark.slow
@needs_uv
async def test_traces_are_those_of_the_stock_harness(monkeypatch):
    monkeypatch.setenv("PATH", PATH)

    async def record(name: str, harness: str) -> tuple[Any, list[Any]]:
        the_task, turns, script, options = SCENARIOS[name]
        async with serve(script) as model:
            trace = await play(model, the_task, turns, harness, **options)
        # `index` is a leftover of the stream from which the stock harness puts a reply together.
        asked = [[without(message, "index") for message in request["messages"]] for request in model.requests]
        return comparable(trace.to_record()), asked

    async def records(harness: str) -> dict[str, Any]:
        played = await asyncio.gather(*(record(name, harness) for name in SCENARIOS))
        return dict(zip(SCENARIOS, played, strict=True))

    ours, stock = await records("rlvr-chat"), await records("null")
    for name in SCENARIOS:
        assert ours[name] == stock[name], name
    assert ours["a prompt"][0]["rewards"]["letters"]["score"] == 3.0
    assert ours["turn limit"][0]["stop_condition"] == "max_turns"
    assert [e["type"] for e in ours["a lasting failure"][0]["errors"]] == ["ProviderError"]
    assert ours["context full later"][0]["ok"] is True


@needs_uv
async def test_training_tokens_are_those_of_the_stock_harness(monkeypatch):
    """With verifiers' training client, as under prime-rl: token ids, masks and log-probabilities in the trace."""
    from transformers import AutoTokenizer

    monkeypatch.setenv("PATH", PATH)
    encode = AutoTokenizer.from_pretrained(str(POLICY)).encode
    script = [encode(f"{text}<|im_end|>", add_special_tokens=False) for text in ("a b", "a b c")]
    client = {"type": "train", "renderer_model_name": str(POLICY)}
    records = []
    for harness in ("rlvr-chat", "null"):
        async with serve(script) as model:
            trace = await play(model, task(None), ["b a", "and c"], harness, client=client)
        assert trace.ok, trace.errors
        records.append((comparable(trace.to_record()), [request["token_ids"] for request in model.requests]))
        (branch,) = trace.branches
        assert [t for t, kept in zip(branch.token_ids, branch.sampled_mask, strict=True) if kept] == script[0] + script[
            1
        ]
        assert sum(branch.logprobs) == pytest.approx(-sum(map(sum, script)) / 1000)
    assert records[0] == records[1]


async def test_no_process_is_started(monkeypatch):
    async def forbidden(*argv: Any, **options: Any) -> None:
        raise AssertionError(f"started {argv}")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", forbidden)
    async with serve([say("A"), say("B")]) as model:
        trace = await play(model, task(None), ["a", "b"])
    assert trace.ok
    assert [message.content for message in trace.assistant_messages] == ["A", "B"]


async def test_what_it_cannot_honour_is_refused(tmp_path):
    with pytest.raises(ValidationError, match=r"unset harness.env and harness.forward_env"):
        vf.AgentConfig.model_validate({"harness": {"id": "rlvr-chat", "env": {"KEY": "1"}}})
    harness = ChatHarness(ChatHarnessConfig(id="rlvr-chat"))
    with pytest.raises(ValueError, match=r"runtime.type = 'subprocess'"):
        await harness.setup(make_runtime(vf.DockerConfig()))
    async with serve([]) as model:
        tools = {"search": SharedToolServer(url="http://127.0.0.1:1", local=True)}
        with pytest.raises(ValueError, match="does not support MCP tools"):
            await player(model).run(task("Hello"), tools=tools)
        with pytest.raises(ValueError, match="no native skill support"):
            await play(model, task("Hello", skills=[tmp_path]))
        with pytest.raises(ValueError, match="requires image"):
            await play(model, task("Hello", image="python:3.12"))
    assert model.requests == []


async def test_a_lost_interception_server_is_an_interception_error():
    harness = ChatHarness(ChatHarnessConfig(id="rlvr-chat"))
    context = vf.ModelContext(model="policy", client=vf.EvalClientConfig())
    rest: Any = (None, None, "http://127.0.0.1:1/v1", "secret", {}, vf.TaskData(idx=0, prompt="Hello"))
    with pytest.raises(vf.InterceptionError, match="'rlvr-chat' lost the interception server"):
        await harness.launch(context, *rest)


async def test_a_deadline_ends_the_request():
    async with serve([None]) as model:
        trace = await play(model, task("Hello"), timeout={"rollout": 0.5})
        await asyncio.wait_for(model.hung_up.wait(), 5)
    assert (trace.is_timeout, trace.num_turns, trace.ok) == (True, 0, True)


async def test_cancelling_a_rollout_ends_the_request():
    async with serve([None]) as model:
        rollout = asyncio.create_task(play(model, task("Hello")))
        await asyncio.wait_for(model.asked.wait(), 10)
        rollout.cancel()
        with pytest.raises(asyncio.CancelledError):
            await rollout
        await asyncio.wait_for(model.hung_up.wait(), 5)


def documented_command() -> list[str]:
    """The vf-eval command of docs/servers.md, as typed."""
    text = (ROOT / "docs" / "servers.md").read_text()
    (block,) = re.findall(r"^    (vf-eval rlvr-alphabet-sort .*?)\n\n", text, re.DOTALL | re.MULTILINE)
    return shlex.split(block.replace("\\\n", " "))


@needs_uv
@pytest.mark.server
@pytest.mark.slow
async def test_the_documented_command_writes_the_traces_of_the_stock_harness(server, tmp_path):
    async with LandscapeClient(server.url, server.token) as client:
        await client.load(str(POLICY), {"seed": 0})
        await client.move(0, 0)

    def evaluate(harness: str) -> list[Any]:
        """Traces of four tasks, greedily decoded, in the order of the tasks."""
        command = documented_command()
        changes = {"-n": "4", "--client.base-url": f"{server.url}/v1", "--env.agent.harness.id": harness}
        for flag, value in (changes | {"--sampling.temperature": "0", "--sampling.max-tokens": "48"}).items():
            command[command.index(flag) + 1] = value
        env = os.environ | {"RLVR_LANDSCAPE_TOKEN": server.token, "PATH": PATH}
        command += ["--output-dir", str(tmp_path / harness)]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        (path,) = (tmp_path / harness).rglob("traces.jsonl")
        traces = [trace for line in path.read_text().splitlines() for trace in json.loads(line)["traces"]]
        return sorted(map(comparable, traces), key=lambda trace: trace["task"]["data"]["idx"])

    ours, stock = evaluate("rlvr-chat"), evaluate("null")
    assert ours == stock
    assert [len(trace["calls"]) for trace in ours] == [2] * 4
    assert all(call["usage"]["completion_tokens"] > 0 for trace in ours for call in trace["calls"])


@pytest.mark.parametrize("reply", ["five", "four"])
async def test_a_sweeps_own_runtime_gives_what_verifiers_rollout_gives(reply, monkeypatch):
    """Rewards and metrics of tasks that are scored in a runtime: the in-process loop beside verifiers' own rollout."""
    import numpy as np

    from rlvr_landscape_plugin.episodes import ChatFormat, EpisodeRunner, load_tasks, open_environment
    from rlvr_landscape_plugin.serving.client import Completion

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers" / "tasksets"))
    env = open_environment("runtime-quiz", {})
    chat = ChatFormat(POLICY)

    class Says:
        async def generate(self, prompt, seed, max_tokens):
            ids = np.asarray(chat.tokenizer.encode(reply + "<|im_end|>", add_special_tokens=False), np.int32)
            return Completion(ids, np.zeros(len(ids), np.float32), "stop")

    runner = EpisodeRunner(env, chat, Says(), 64, 512, keep_traces=True, runtime=True)
    for quiz in load_tasks(env, 3, runtime=True):
        ours = (await runner.episode(quiz, lambda turn: 0)).trace
        async with serve([say(reply)]) as model:
            theirs = await play(model, quiz)
        assert ours is not None
        assert theirs.rewards
        assert (ours.rewards, ours.metrics, ours.info) == (theirs.rewards, theirs.metrics, theirs.info)
        assert ours.agent.runtime.type == theirs.agent.runtime.type
