"""How fast `vf-eval` runs: with the harness `rlvr-chat` against the stock `null`, everything else the same.

    python benchmarks/harness.py

One local server, the same two-turn tasks, greedy decoding. Either side is timed from its first rollout's start to its
last score, as its own traces say, so the start of `vf-eval` does not count. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from workload import Evaluation, evaluate

from rlvr_landscape_plugin.config import ServerConfig
from rlvr_landscape_plugin.serving.launch import local_server
from rlvr_landscape_plugin.snapshot import open_snapshot


async def run(episodes: int, repeats: int) -> None:
    """Both sides on one server, `rlvr-chat` before and after `null`."""
    policy = open_snapshot("tiny-sorter").path
    with tempfile.TemporaryDirectory() as name:

        async def one(harness: str, number: int) -> Evaluation:
            folder = Path(name, f"{harness}-{number}")
            folder.mkdir()
            return await asyncio.to_thread(evaluate, server, folder, harness, episodes, 1, 0.0)

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
