"""How fast episodes run: this project's in-process loop against `vf-eval` with the stock `null` harness.

    python benchmarks/rollouts.py

One local server, the same taskset, the same sampling, 128 two-turn episodes either way. The stock side is timed from
its first rollout's start to its last score, as its own traces say, so its start-up does not count. Then whole grid
points (move, score, sample) are measured for the client's share: the CPU seconds of this process over the wall seconds
of the point, an upper bound on the time spent outside the server, because most of them pass while the server computes.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from workload import MAX_TOKENS, TASKSET, evaluate

from rlvr_landscape_plugin.config import EnvConfig, ServerConfig, SurrogateConfig
from rlvr_landscape_plugin.episodes import (
    ChatFormat,
    EpisodeRunner,
    Rollout,
    load_tasks,
    open_environment,
    sampling_seed,
)
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.serving.launch import local_server
from rlvr_landscape_plugin.snapshot import open_snapshot
from rlvr_landscape_plugin.sweep.point import PointMeter

PROMPTS, ROLLOUTS = 32, 4


@dataclass
class Ours:
    """Batches of episodes and grid points of the in-process loop."""

    batches: list[float]
    """Seconds of each batch."""
    rewards: list[float]
    """Of every episode of the batches."""
    tokens: list[int]
    """Sampled tokens of each batch."""
    walls: list[float]
    """Seconds of each grid point."""
    cpus: list[float]
    """CPU seconds of this process in each grid point."""
    last: list[list[Rollout]]
    """The last batch: [prompt][rollout]."""


async def ours(
    client: LandscapeClient,
    policy: Path,
    repeats: int,
    prompts: int = PROMPTS,
    rollouts: int = ROLLOUTS,
    max_concurrent: int = 512,
) -> Ours:
    """Batches and grid points in turn, on a server that holds `policy`."""
    env = open_environment(EnvConfig().id, TASKSET)
    tasks, chat = load_tasks(env, prompts), ChatFormat(policy)
    found = Ours([], [], [], [], [], [])
    await client.load(str(policy), {"seed": 0})
    await client.move(0.0, 0.0)
    runner = EpisodeRunner(env, chat, client, MAX_TOKENS, 1024, max_concurrent)
    meter = PointMeter(client, runner, tasks, rollouts, 0, SurrogateConfig())
    base = await meter.base(quiet)
    for repeat in range(repeats):
        started = time.perf_counter()
        found.last = await runner.batch(tasks, rollouts, seeds(repeat), quiet)
        found.batches.append(time.perf_counter() - started)
        found.rewards += [cell.reward for row in found.last for cell in row]
        found.tokens.append(sum(cell.completion_tokens for row in found.last for cell in row))
        started, used = time.perf_counter(), time.process_time()
        await meter.point(base, 0.05, 0.05 * repeat, quiet)
        found.walls.append(time.perf_counter() - started)
        found.cpus.append(time.process_time() - used)
    return found


def seeds(repeat: int) -> Callable[[int, int, int], int]:
    """The sampling seeds of a batch, by prompt, rollout and turn."""
    return lambda prompt, rollout, turn: sampling_seed(repeat, "benchmark", prompt, rollout, turn)


def quiet() -> None:
    """No progress bar."""


async def run(repeats: int) -> None:
    """Both sides on one server."""
    policy = open_snapshot("tiny-sorter").path
    episodes = PROMPTS * ROLLOUTS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with local_server(ServerConfig(), policy, [policy], folder / "server.log") as server:
            async with LandscapeClient(server.url, server.token) as client:
                first = await ours(client, policy, repeats)
            (folder / "eval").mkdir()
            stock = await asyncio.to_thread(evaluate, server, folder / "eval", "null", PROMPTS, ROLLOUTS, 1.0)
            async with LandscapeClient(server.url, server.token) as client:
                second = await ours(client, policy, repeats)
    batches, walls, cpus = first.batches + second.batches, first.walls + second.walls, first.cpus + second.cpus
    seconds = statistics.median(batches)
    share = statistics.median(cpu / wall for cpu, wall in zip(cpus, walls, strict=True))
    table = Table("", "seconds", "episodes / s", "mean reward", title=f"{episodes} two-turn episodes, tiny-sorter")
    table.add_row(
        *("vf-eval, null harness", f"{stock.seconds:.1f}", f"{episodes / stock.seconds:.2f}"),
        f"{statistics.mean(stock.rewards):.3f}",
    )
    table.add_row(
        "in process",
        f"{seconds:.2f}",
        f"{episodes / seconds:.1f}",
        f"{statistics.mean(first.rewards + second.rewards):.3f}",
    )
    Console().print(table)
    print(f"one grid point: {statistics.median(walls):.2f} s, client CPU {100 * share:.1f} % of it")
    result = {
        "ratio": round(stock.seconds / seconds, 1),
        "client_share": round(share, 3),
        "stock_seconds": round(stock.seconds, 1),
        "seconds": round(seconds, 2),
        "seconds_per_point": round(statistics.median(walls), 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="batches and points before and after the stock side")
    asyncio.run(run(parser.parse_args().repeats))
