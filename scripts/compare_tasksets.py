"""The tasksets of verifiers' repository in a sweep's episodes and in `vf-eval`, episode by episode.

    python scripts/compare_tasksets.py --folder path/to/verifiers/environments --write docs/tasksets.md

One vLLM server with tiny-sorter, whose chat template is exchanged for one that also shows tools, answers both sides at
temperature 0: the episodes of a sweep (`EpisodeRunner`, on the path that is chosen automatically), and `vf-eval` as a
user runs it, with verifiers' own client, harness and processes. Replies, rewards and metrics of each episode must be
equal. So small a policy earns little, so each taskset is also played with scripted replies, good and bad ones by turns,
against verifiers' own rollout with the same replies (`--scripted-only` leaves the vLLM server out).

A taskset that cannot be measured gets the message that the attempt ended with. Rows are printed as they come; `--write`
puts them into the table of a page, where the rows of other tasksets stay.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlvr_landscape_plugin.config import EnvConfig, ServerConfig
from rlvr_landscape_plugin.episodes import (
    ChatFormat,
    EpisodeRunner,
    OpenedTaskset,
    Rollout,
    check_tool_parser,
    open_tasks,
)
from rlvr_landscape_plugin.episodes.tasksets import role_config
from rlvr_landscape_plugin.errors import LandscapeError, TasksetError
from rlvr_landscape_plugin.serving.client import Completion, LandscapeClient
from rlvr_landscape_plugin.serving.launch import LocalServer, free_port, local_server
from rlvr_landscape_plugin.serving.protocol import TOKEN_VARIABLE, Sampling
from rlvr_landscape_plugin.snapshot import SHIPPED

sys.path.insert(0, str(Path(__file__).parent))
from taskset_cases import CASES, Call, Case, answer_of, write_stand_ins

if TYPE_CHECKING:
    import verifiers.v1 as vf

MAX_TOKENS, MAX_MODEL_LEN = 64, 2048
SEEDS = 10**6
BEGIN, END = "<!-- compare_tasksets.py: rows -->", "<!-- end of rows -->"
HEAD = (
    "| taskset | path | episodes/s | beside `vf-eval`, tiny-sorter at temperature 0 | beside verifiers' own rollout, "
    "scripted replies |\n|---|---|---|---|---|"
)
LATENCY = ("latency", "fastest")
"""What code_golf measures with a clock; no two runs agree."""


@dataclass(frozen=True)
class Played:
    """What an episode came to, comparable between the two sides."""

    replies: tuple[str, ...]
    rewards: dict[str, float]
    metrics: dict[str, float]

    @classmethod
    def of(cls, record: dict[str, Any]) -> Played:
        """From verifiers' own record of a trace."""
        nodes = [node["message"] for node in record["nodes"] if node.get("sampled")]
        replies = (json.dumps([m.get("content") or "", _calls(m)]) for m in nodes)
        rewards = {name: _number(value) for name, value in record["rewards"].items() if name not in LATENCY}
        metrics = {name: value for name, value in record["metrics"].items() if name not in LATENCY}
        return cls(tuple(replies), rewards, metrics)

    @property
    def paid(self) -> float:
        """The sum of its rewards."""
        return sum(self.rewards.values())


def _calls(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [(call["name"], call["arguments"]) for call in message.get("tool_calls") or []]


def _number(value: Any) -> float:
    return float(value["score"] * value.get("weight", 1.0)) if isinstance(value, dict) else float(value or 0.0)


def policy_with_tools(folder: Path) -> Path:
    """tiny-sorter with a chat template that also shows tools; without tools it renders as the shipped one."""
    policy = Path(shutil.copytree(SHIPPED["tiny-sorter"], folder / "tiny-sorter-with-tools"))
    template = (Path(__file__).parent / "tool_chat_template.jinja").read_text().rstrip("\n")
    (policy / "chat_template.jinja").write_text(template)
    return policy


# Scripted replies


Batch = Sequence[Sequence[Rollout]]
"""Episodes: [task][rollout]."""


class Scripted:
    """Says what the script says; `seed` carries episode and turn. Serves both sides, so that they hear the same."""

    def __init__(self, case: Case, chat: ChatFormat, tasks: Sequence[vf.Task]) -> None:
        self._case, self._chat, self._tasks = case, chat, tasks

    def reply(self, task: int, rollout: int, turn: int, said: str) -> Call | str:
        """The good reply in even rollouts, some words in odd ones; later turns of a chat alternate."""
        the_task = self._tasks[task]
        if (rollout + (0 if said else turn)) % 2 == 0:
            return answer_of(self._case, the_task, said)
        words = (the_task.data.prompt_text or "no words here").split()
        rng = np.random.default_rng([task, rollout, turn])
        return f"[{rng.choice(words)[:5].strip('.,:;')}] " + " ".join(words[-3:][::-1])

    async def generate(self, prompt: Sequence[int] | np.ndarray, seed: int, max_tokens: int) -> Completion:
        """The reply as tokens."""
        task, rollout, turn = seed // SEEDS, seed // 1000 % 1000, seed % 1000
        text = self._chat.tokenizer.decode(list(prompt))
        tool = re.findall(r"<\|im_start\|>tool\n(.*?)<\|im_end\|>", str(text), re.DOTALL)
        reply = self.reply(task, rollout, turn, tool[-1] if tool else "")
        if isinstance(reply, Call):
            body = json.dumps({"name": reply.name, "arguments": dict(reply.arguments)})
            reply = f"<tool_call>\n{body}\n</tool_call>"
        ids = np.asarray(self._chat.tokenizer.encode(reply + "<|im_end|>", add_special_tokens=False), np.int32)
        return Completion(ids, np.full(len(ids), -1.0, np.float32), "stop")


async def scripted_rollouts(
    opened: OpenedTaskset, case: Case, settings: EnvConfig, script: Scripted, rollouts: int
) -> list[list[Played]]:
    """The same episodes by verifiers itself (`Env.run_episode`), against an OpenAI-compatible endpoint."""
    from aiohttp import web
    from verifiers.v1.clients import EvalClientConfig, ModelContext
    from verifiers.v1.types import Sampling as VerifiersSampling

    from rlvr_landscape_plugin.episodes.tasksets import VERIFIERS, open_environment, with_harness

    now = [0, 0, 0]

    async def chat(request: web.Request) -> web.Response:
        body = await request.json()
        messages = body["messages"]
        tool = [message["content"] for message in messages if message["role"] == "tool"]
        reply = script.reply(now[0], now[1], now[2], _text(tool[-1]) if tool else "")
        now[2] += 1
        message: dict[str, Any] = {"role": "assistant", "content": reply}
        if isinstance(reply, Call):
            function = {"name": reply.name, "arguments": json.dumps(dict(reply.arguments))}
            call = {"id": f"call_{now[2]}", "type": "function", "function": function}
            message = {"role": "assistant", "content": "", "tool_calls": [call]}
        finish = "tool_calls" if isinstance(reply, Call) else "stop"
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        head = {"id": "1", "created": 1, "model": "policy", "usage": usage}
        if not body.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": finish}
            return web.json_response({**head, "object": "chat.completion", "choices": [choice]})
        for index, call in enumerate(message.get("tool_calls", [])):
            call["index"] = index
        chunk = {
            **head,
            "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": message, "finish_reason": finish}],
        }
        return web.Response(text=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n", content_type="text/event-stream")

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    serving = web.AppRunner(app, access_log=None)
    await serving.setup()
    await web.TCPSite(serving, "127.0.0.1", 0).start()
    env = open_environment(
        settings.id, settings.taskset, settings.options, harness=opened.harness or settings.harness, path=VERIFIERS
    )
    env = with_harness(env, opened.tasks)
    client = EvalClientConfig(base_url=f"http://127.0.0.1:{serving.addresses[0][1]}/v1", api_key_var="NO_KEY")
    context = ModelContext(model="policy", client=client, sampling=VerifiersSampling(max_tokens=4096))
    rows: list[list[Played]] = []
    try:
        async with env.serving():
            for index, task in enumerate(opened.tasks):
                rows.append([])
                for rollout in range(rollouts):
                    now[:] = [index, rollout, 0]
                    episode = await env.run_episode(task, context)
                    errors = [*episode.errors, *(e for t in episode.traces if not t.ok for e in t.errors)]
                    if errors or len(episode.traces) != 1:
                        raise TasksetError(f"verifiers' own rollout failed: {errors[0].message if errors else '?'}")
                    rows[-1].append(Played.of(episode.traces[0].to_record()))
    finally:
        await serving.cleanup()
    return rows


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


# The policy


def vf_eval(opened: OpenedTaskset, settings: EnvConfig, server: LocalServer, folder: Path) -> dict[str, Played]:
    """The episodes of `vf-eval` on the same server, one for each task, by the task's name."""
    role = next(name for name, value in opened.env.config if value is role_config(opened.env))
    harness = dict(opened.harness or {"id": "null"})
    if harness["id"] == "rlvr-chat":
        harness = {"id": "null"}  # verifiers' own
    seat = {"harness": harness, "runtime": {"type": "subprocess"}}
    config = {
        "env": {**settings.options, "taskset": {"id": settings.id, **settings.taskset}, role: seat},
        "model": "policy",
        "client": {"base_url": f"{server.url}/v1", "api_key_var": TOKEN_VARIABLE},
        "sampling": {"temperature": 0.0, "max_tokens": MAX_TOKENS},
        "select": {"limit": len(opened.tasks)},
        "push": False,
        "rich": None,
        "output_dir": str(folder / "vf-eval" / settings.id),
    }
    file = folder / f"{settings.id}.json"
    file.write_text(json.dumps(config))
    command = [str(Path(sys.executable).parent / "vf-eval"), "@", str(file)]
    env = os.environ | {TOKEN_VARIABLE: server.token}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise TasksetError(f"vf-eval ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    found: dict[str, Played] = {}
    for path in (folder / "vf-eval" / settings.id).rglob("traces.jsonl"):
        for line in path.read_text().splitlines():
            for trace in json.loads(line)["traces"]:
                if trace["errors"]:
                    raise TasksetError(f"an episode of vf-eval failed: {trace['errors'][0]['message'][:300]}")
                found[_name(trace["task"]["data"])] = Played.of(trace)
    return found


def _name(data: dict[str, Any]) -> str:
    return f"{data.get('idx')}/{data.get('name')}"


def _seed(task: int, rollout: int, turn: int) -> int:
    return task * SEEDS + rollout * 1000 + turn


async def our_batch(runner: EpisodeRunner, tasks: Sequence[vf.Task], rollouts: int) -> tuple[Batch, float]:
    """Episodes of a sweep and how many there were in a second."""
    started = time.perf_counter()
    batch = await runner.batch(tasks, rollouts, _seed, lambda: None)
    rate = len(tasks) * rollouts / (time.perf_counter() - started)
    if failed := [rollout.error for row in batch for rollout in row if rollout.error]:
        raise TasksetError(f"{len(failed)} of {len(tasks) * rollouts} episodes failed: {failed[0]}")
    return batch, rate


def _verdict(ours: Sequence[Played], theirs: Sequence[Played]) -> str:
    different = [index for index, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other]
    paid = np.array([one.paid for one in ours])
    spread = f"rewards {paid.min():.3g} to {paid.max():.3g}" if paid.min() != paid.max() else f"all {paid.min():.3g}"
    if different:
        first = different[0]
        print(f"different, episode {first}:\n  ours   {ours[first]}\n  theirs {theirs[first]}", file=sys.stderr)
        return f"**{len(different)} of {len(ours)} differ** ({spread})"
    return f"equal in {len(ours)} of {len(ours)} ({spread})"


def _played(batch: Batch) -> list[list[Played]]:
    return [[Played.of(r.trace.to_record()) for r in row if r.trace is not None] for row in batch]


async def compare(
    env_id: str, given: argparse.Namespace, policy: Path, server: LocalServer | None, folder: Path
) -> str:
    """One row of the table."""
    case = CASES.get(env_id, Case())
    taskset = dict(case.taskset)
    async with contextlib.AsyncExitStack() as stack:
        if env_id == "deepwiki":
            taskset["task"] = {"tools": {"url": await stack.enter_async_context(_deepwiki(folder))}}
        try:
            settings, opened = _opened(env_id, case, taskset, given.tasks)
            return await _measured(settings, opened, case, given.rollouts, policy, server, folder)
        except (LandscapeError, OSError, ImportError) as error:
            message = re.sub(r"\s+", " ", str(error)).replace("|", "\\|").replace(str(folder), "…")
            note = f" ({case.note})" if case.note else ""
            if len(message) > 400:
                message = f"{message[:130]} … {message[-250:]}"  # a traceback ends with what happened
            return f"| `{env_id}` | not measured | | {message}{note} | |"


def _opened(env_id: str, case: Case, taskset: dict[str, object], most: int) -> tuple[EnvConfig, OpenedTaskset]:
    for count in range(most, 0, -1):
        settings = EnvConfig(
            id=env_id,
            taskset=taskset,
            options=dict(case.options),
            harness=None if case.harness is None else dict(case.harness),
            num_prompts=count,
            runtime="subprocess",
        )
        try:
            return settings, open_tasks(settings)
        except TasksetError as error:
            if "were asked for" not in str(error) or count == 1:
                raise
    raise AssertionError("at least one task is asked for")


async def _measured(
    settings: EnvConfig,
    opened: OpenedTaskset,
    case: Case,
    rollouts: int,
    policy: Path,
    server: LocalServer | None,
    folder: Path,
) -> str:
    chat, tasks = ChatFormat(policy), opened.tasks
    parser = check_tool_parser(chat, None) if opened.path == "verifiers" and opened.has_tools else None
    shared: dict[str, Any] = {
        "keep_traces": True,
        "runtime": True,
        "path": opened.path,
        "tool_parser": parser,
        "timeout": 240.0,
    }
    script = Scripted(case, chat, tasks)
    runner = EpisodeRunner(opened.env, chat, script, 4096, 10**6, **shared)
    batch, rate = await our_batch(runner, tasks, rollouts)
    theirs = await scripted_rollouts(opened, case, settings, script, rollouts)
    scripted = _verdict([p for row in _played(batch) for p in row], [p for row in theirs for p in row])
    at_zero = "not asked"
    if server is not None:
        sampling = Sampling(temperature=0.0)
        async with LandscapeClient(server.url, server.token, sampling=sampling) as client:
            await client.load(str(policy), {"seed": 0})
            await client.move(0.0, 0.0)
            runner = EpisodeRunner(opened.env, chat, client, MAX_TOKENS, MAX_MODEL_LEN, **shared)
            batch, _ = await our_batch(runner, tasks, 1)
            _, rate = await our_batch(runner, tasks, rollouts)
            found = await asyncio.to_thread(vf_eval, opened, settings, server, folder)
        names = [_name(task.data.model_dump(mode="json")) for task in tasks]
        at_zero = _verdict([row[0] for row in _played(batch)], [found[name] for name in names])
    path = opened.path if opened.harness is None else f"{opened.path}, harness `{opened.harness['id']}`"
    note = f" ({case.note})" if case.note else ""
    speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
    return f"| `{settings.id}` | {path}{note} | {speed} | {at_zero} | {scripted} |"


@contextlib.asynccontextmanager
async def _deepwiki(folder: Path) -> AsyncIterator[str]:
    port = free_port()
    env = os.environ | {"MCP_PORT": str(port)}
    process = await asyncio.create_subprocess_exec(sys.executable, str(folder / "deepwiki_stand_in.py"), env=env)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.1):
                break
            await asyncio.sleep(0.1)
        await asyncio.sleep(2)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.terminate()
        await process.wait()


def write_rows(page: Path, rows: dict[str, str]) -> None:
    """Put rows into the table of a page; the rows of other tasksets stay."""
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page} has no lines {BEGIN!r} and {END!r}")
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    known = {m[1]: line for line in table.splitlines() if (m := re.match(r"\| `(\w+)` \|", line))}
    lines = [line for _, line in sorted((known | rows).items())]
    page.write_text(before + "\n".join([BEGIN, "", HEAD, *lines, "", END]) + after)


async def run(given: argparse.Namespace, folder: Path) -> None:
    """Compare, print and write."""
    policy = policy_with_tools(folder)
    async with contextlib.AsyncExitStack() as stack:
        server = None
        if not given.scripted_only:
            arguments = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
            config = ServerConfig(max_model_len=MAX_MODEL_LEN, extra_args=arguments)
            server = await stack.enter_async_context(local_server(config, policy, [policy], folder / "server.log"))
        print(HEAD)
        for env_id in given.tasksets or CASES:
            row = await compare(env_id, given, policy, server, folder)
            print(row, flush=True)
            if given.write is not None:
                write_rows(given.write, {env_id: row})


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tasksets", nargs="*", help=f"ids; default: {', '.join(CASES)}")
    parser.add_argument("--folder", type=Path, action="append", default=[], help="a directory that holds tasksets")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--rollouts", type=int, default=2)
    parser.add_argument("--scripted-only", action="store_true", help="no vLLM server and no vf-eval")
    parser.add_argument("--write", type=Path, help="the page whose table gets the rows")
    given = parser.parse_args(argv)
    found = [str(path.resolve()) for folder in given.folder for path in (folder, *folder.iterdir()) if path.is_dir()]
    sys.path[:0] = found
    # Tool servers and vf-eval are processes of their own.
    os.environ["PYTHONPATH"] = os.pathsep.join([*found, os.environ.get("PYTHONPATH", "")])
    given.write = given.write and given.write.resolve()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        os.environ |= write_stand_ins(folder)
        os.chdir(folder)
        try:
            asyncio.run(run(given, folder))
        finally:
            os.chdir("/")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
