"""How fast `vf-eval` runs: with the harness `rlvr-chat` against the stock `null`, everything else the same.

    python benchmarks/harness.py

One local server, the same two-turn tasks, greedy decoding. Either side is timed from its first rollout's start to its
last score, as its own traces say, so the start of `vf-eval` does not count. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlvr_landscape_plugin.config import ServerConfig
from rlvr_landscape_plugin.serving.launch import LocalServer, local_server
from rlvr_landscape_plugin.snapshot import open_snapshot

TASKSET = {"min_turns": 2, "max_turns": 2, "max_names_per_turn": 3, "seed": 12345}
MAX_TOKENS = 96


@dataclass
class Evaluation:
    """One run of `vf-eval`."""

    seconds: float
    rewards: list[float]
    """Of each episode, in the order of the tasks."""


def evaluate(server: LocalServer, harness: str, episodes: int, folder: Path) -> Evaluation:
    """`vf-eval` with one harness. Exits with its output if it fails or leaves other than `episodes` traces."""
    flags = [part for key, value in TASKSET.items() for part in (f"--env.taskset.{key.replace('_', '-')}", str(value))]
    command = [
        *("vf-eval", "rlvr-alphabet-sort", "--model", "policy", "-n", str(episodes), "-r", "1", *flags),
        *("--client.base-url", f"{server.url}/v1", "--client.api-key-var", "LOCAL_API_KEY"),
        *("--env.agent.harness.id", harness, "--env.agent.runtime.type", "subprocess"),
        *("--sampling.temperature", "0", "--sampling.max-tokens", str(MAX_TOKENS)),
        *("--no-push", "--no-rich", "--output-dir", str(folder)),
    ]
    env = os.environ | {"LOCAL_API_KEY": "none", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"vf-eval with {harness} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    lines = [line for path in folder.rglob("traces.jsonl") for line in path.read_text().splitlines()]
    traces = [trace for line in lines for trace in json.loads(line)["traces"] if trace["ok"]]
    if len(traces) != episodes:
        raise SystemExit(f"vf-eval with {harness} left {len(traces)} whole traces below {folder}, expected {episodes}")
    traces.sort(key=lambda trace: trace["task"]["data"]["idx"])
    start = min(trace["timing"]["start"] for trace in traces)
    end = max(trace["timing"]["scoring"]["end"] for trace in traces)
    return Evaluation(end - start, [sum(r["score"] * r["weight"] for r in t["rewards"].values()) for t in traces])


async def run(episodes: int, repeats: int) -> None:
    """Both sides on one server, `rlvr-chat` before and after `null`."""
    policy = open_snapshot("tiny-sorter").path
    with tempfile.TemporaryDirectory() as name:

        async def one(harness: str, number: int) -> Evaluation:
            folder = Path(name, f"{harness}-{number}")
            folder.mkdir()
            return await asyncio.to_thread(evaluate, server, harness, episodes, folder)

        async with local_server(ServerConfig(), policy, [policy], Path(name, "server.log")) as server:
            before = [await one("rlvr-chat", number) for number in range(repeats)]
            stock = await one("null", 0)
            after = [await one("rlvr-chat", repeats + number) for number in range(repeats)]
    seconds = statistics.median(side.seconds for side in before + after)
    table = Table("harness", "seconds", "episodes / s", "mean reward", title=f"{episodes} two-turn episodes, vf-eval")
    for harness, taken, rewards in (("null", stock.seconds, stock.rewards), ("rlvr-chat", seconds, before[0].rewards)):
        table.add_row(harness, f"{taken:.1f}", f"{episodes / taken:.2f}", f"{statistics.mean(rewards):.3f}")
    Console().print(table)
    equal = [ours == theirs for ours, theirs in zip(before[0].rewards, stock.rewards, strict=True)]
    result = {
        "ratio": round(stock.seconds / seconds, 1),
        "episodes": episodes,
        "stock_seconds": round(stock.seconds, 1),
        "seconds": round(seconds, 2),
        "equal_rewards": sum(equal),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=128, help="rollouts of either side, one of each task")
    parser.add_argument("--repeats", type=int, default=2, help="runs of rlvr-chat before and after the stock side")
    options = parser.parse_args()
    asyncio.run(run(options.episodes, options.repeats))
