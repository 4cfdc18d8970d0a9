"""Tasksets in a sweep's own chat loop beside verifiers' rollouts: `python scripts/compare_tasksets.py ID …`.

    python scripts/compare_tasksets.py alphabet_sort reverse_text gsm8k --runtime

Each episode is played twice with the same replies, which a script says instead of a policy: by the in-process loop of a
sweep, and by verifiers itself (`Env.run_episode`, as `vf-eval` calls it) against a local endpoint, through the harness
`rlvr-chat`. Rewards and metrics must be equal, episode by episode. Prints the rows of the table in docs/tasksets.md.

A reply is the task's answer, where its data has one, or some words of the last message, by turns, so that both good and
bad replies are scored. Tasks come from the installed package of that name; a directory with tasksets, such as
`environments/` of a checkout of verifiers, may be given with `--folder`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlvr_landscape_plugin.episodes import ChatFormat, EpisodeRunner, load_tasks, open_environment
from rlvr_landscape_plugin.errors import TasksetError
from rlvr_landscape_plugin.serving.client import Completion
from rlvr_landscape_plugin.snapshot import SHIPPED

if TYPE_CHECKING:
    import verifiers.v1 as vf

Reply = Callable[[int], str]
"""Turn → what the policy says."""


def script_of(task: vf.Task, rollout: int) -> Reply:
    """What is said in an episode: by turns the answer and words of the prompt, beginning with either."""
    data = task.data.model_dump()
    info = data.get("info") or {}
    answer = data.get("answer") or info.get("answer") or ""
    truths = info.get("ground_truths") or []
    words = (task.data.prompt_text or json.dumps(info)).split()

    def reply(turn: int) -> str:
        if (turn + rollout) % 2 == 0 and truths:
            tag = "alphabetical_sorted" if turn == 0 else "combined_alphabetical_sorted"
            return f"<{tag}>\n" + "\n".join(truths[min(turn, len(truths) - 1)]) + f"\n</{tag}>"
        if (turn + rollout) % 2 == 0 and answer:
            return f"<reversed_text>{answer}</reversed_text>\n#### {answer}"
        rng = np.random.default_rng([task.data.idx or 0, rollout, turn])
        return f"[{rng.choice(words)[:5].strip('.,:;')}] " + " ".join(words[-3:][::-1])

    return reply


class Scripted:
    """A server that says what the script says; `seed` carries the episode and the turn."""

    def __init__(self, chat: ChatFormat, replies: Sequence[Sequence[Reply]]) -> None:
        self._chat, self._replies = chat, replies

    async def generate(self, prompt: Sequence[int] | np.ndarray, seed: int, max_tokens: int) -> Completion:
        task, rollout, turn = seed // 10**6, seed // 10**3 % 10**3, seed % 10**3
        text = self._replies[task][rollout](turn) + "<|im_end|>"
        ids = np.asarray(self._chat.tokenizer.encode(text, add_special_tokens=False), np.int32)
        return Completion(ids, np.zeros(len(ids), np.float32), "stop")


async def verifiers_own(
    env_id: str, options: dict[str, object], tasks: Sequence[vf.Task], replies: Sequence[Sequence[Reply]]
) -> list[vf.Trace]:
    """The traces of the same episodes, played by verifiers against an OpenAI-compatible endpoint, in order."""
    from aiohttp import web
    from verifiers.v1.clients import EvalClientConfig, ModelContext
    from verifiers.v1.configs.agent import AgentConfig
    from verifiers.v1.env import EnvConfig
    from verifiers.v1.types import SamplingConfig
    from verifiers.v1.utils.generic import concrete_type
    from verifiers.v1.utils.loaders import environment_class

    current: list[tuple[Reply, int]] = []

    async def chat(request: web.Request) -> web.Response:
        await request.json()
        reply, turn = current[-1]
        current[-1] = (reply, turn + 1)
        message = {"role": "assistant", "content": reply(turn)}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        head = {"id": "1", "created": 1, "model": "policy", "object": "chat.completion"}
        return web.json_response({**head, "choices": [choice], "usage": usage})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    serving = web.AppRunner(app)
    await serving.setup()
    await web.TCPSite(serving, "127.0.0.1", 0).start()
    cls = environment_class(env_id)
    config_cls = concrete_type(cls, EnvConfig) or EnvConfig
    (role,) = [name for name, field in config_cls.model_fields.items() if isinstance(field.default, AgentConfig)]
    agent = {"harness": {"id": "rlvr-chat"}, "runtime": {"type": "subprocess"}}
    env = cls(config_cls.model_validate({"taskset": {"id": env_id, **options}, role: agent}))
    client = EvalClientConfig(base_url=f"http://127.0.0.1:{serving.addresses[0][1]}/v1", api_key_var="NO_KEY")
    context = ModelContext(model="policy", client=client, sampling=SamplingConfig(max_tokens=4096))
    traces = []
    try:
        async with env.serving():
            for task, row in zip(tasks, replies, strict=True):
                for reply in row:
                    current.append((reply, 0))
                    episode = await env.run_episode(task, context)
                    if not episode.ok or len(episode.traces) != 1:
                        errors = [*episode.errors, *(e for t in episode.traces for e in t.errors)]
                        raise TasksetError(f"verifiers' own rollout failed: {errors[0].message if errors else '?'}")
                    traces.append(episode.traces[0])
    finally:
        await serving.cleanup()
    return traces


async def compare(env_id: str, options: dict[str, object], count: int, rollouts: int, runtime: bool) -> str:
    """One row of the table."""
    try:
        env = open_environment(env_id, options)
        available = sum(1 for _ in itertools.islice(iter(env.taskset), count))
        tasks = load_tasks(env, available, runtime)
    except (TasksetError, OSError, ImportError) as error:
        return f"| `{env_id}` | refused | | {error} |"
    chat = ChatFormat(SHIPPED["tiny-sorter"])
    replies = [[script_of(task, rollout) for rollout in range(rollouts)] for task in tasks]
    runner = EpisodeRunner(env, chat, Scripted(chat, replies), 4096, 10**6, keep_traces=True, runtime=runtime)

    def seed(task: int, rollout: int, turn: int) -> int:
        return task * 10**6 + rollout * 10**3 + turn

    try:
        await runner.batch(tasks[:1], 1, seed, lambda: None)  # what is imported or installed at first is not timed
        started = time.perf_counter()
        batch = await runner.batch(tasks, rollouts, seed, lambda: None)
    except TasksetError as error:
        return f"| `{env_id}` | refused at its first episode | | {error} |"
    rate = len(tasks) * rollouts / (time.perf_counter() - started)
    ours = [rollout for row in batch for rollout in row]
    if errors := [rollout.error for rollout in ours if rollout.error]:
        return f"| `{env_id}` | fails | | {errors[0]} |"
    theirs = await verifiers_own(env_id, options, tasks, replies)
    different = [
        index
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True))
        if mine.trace is None or (mine.trace.rewards, mine.trace.metrics) != (other.rewards, other.metrics)
    ]
    path = "chat loop and subprocess" if runtime and runner.known(tasks[0]).needs_runtime else "chat loop"
    rewards = np.array([rollout.reward for rollout in ours])
    verdict = f"equal in {len(ours)} of {len(ours)}" if not different else f"**{len(different)} of {len(ours)} differ**"
    spread = f"rewards {rewards.min():g} to {rewards.max():g}, mean {rewards.mean():.3f}"
    speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
    return f"| `{env_id}` | {path} | {speed} | {verdict} ({spread}) |"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tasksets", nargs="+", help="ids, each with JSON options after a colon if it needs any")
    parser.add_argument("--folder", type=Path, action="append", default=[], help="a directory that holds tasksets")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--rollouts", type=int, default=2)
    parser.add_argument("--runtime", action="store_true", help="let tasks run programs on this machine")
    given = parser.parse_args(argv)
    for folder in given.folder:
        sys.path[:0] = [str(path) for path in (folder, *folder.iterdir()) if path.is_dir()]
    print("| taskset | path | episodes/s | rewards and metrics beside verifiers' own |\n|---|---|---|---|")
    for text in given.tasksets:
        env_id, _, options = text.partition(":")
        row = compare(env_id, json.loads(options or "{}"), given.tasks, given.rollouts, given.runtime)
        print(asyncio.run(row), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
