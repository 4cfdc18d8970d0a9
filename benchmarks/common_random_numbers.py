"""What common random numbers are worth: the noise of a reward difference with shared and with independent seeds.

    python benchmarks/common_random_numbers.py

tiny-sorter on a local server, one random slice. At the origin and at points along δ the same tasks are rolled out with
the sweep's own seeds and with independent ones. The standard error of the mean reward difference to the origin, over
tasks (clusters), is compared at equal numbers of rollouts. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from workload import MAX_TOKENS, TASKSET

from rlvr_landscape_plugin.config import EnvConfig, ServerConfig
from rlvr_landscape_plugin.episodes import ChatFormat, EpisodeRunner, load_tasks, open_environment, sampling_seed
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.serving.launch import local_server
from rlvr_landscape_plugin.snapshot import open_snapshot

PAIRS = [(0.0, 0.005), (0.0, 0.01), (0.0, 0.02), (0.02, 0.03), (0.0, 0.05), (0.05, 0.06), (0.0, 0.1), (0.1, 0.11)]
"""Neighbouring coordinates along δ whose rewards are compared."""


def standard_error(difference: np.ndarray) -> float:
    """Standard error of the mean of `difference` (task, rollout), tasks being the clusters."""
    means = difference.mean(axis=1)
    return float(means.std(ddof=1) / np.sqrt(len(means)))


async def run(tasks_count: int, rollouts: int) -> None:
    """Measure every coordinate once per stream of seeds; print the table and the JSON line."""
    policy = open_snapshot("tiny-sorter").path
    env = open_environment(EnvConfig().id, TASKSET)
    tasks, chat = load_tasks(env, tasks_count), ChatFormat(policy)
    rewards: dict[tuple[float, str], np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        async with local_server(ServerConfig(), policy, [policy], Path(folder) / "server.log") as server:
            async with LandscapeClient(server.url, server.token) as client:
                await client.load(str(policy), {"seed": 0})
                runner = EpisodeRunner(env, chat, client, MAX_TOKENS, 1024)
                for alpha in sorted({alpha for pair in PAIRS for alpha in pair}):
                    await client.move(alpha, 0.0)
                    for stream in ("fresh", f"independent {alpha}"):

                        def seed(prompt: int, rollout: int, turn: int, stream: str = stream) -> int:
                            return sampling_seed(0, stream, prompt, rollout, turn)

                        batch = await runner.batch(tasks, rollouts, seed, lambda: None)
                        rewards[alpha, stream.split()[0]] = np.array([[cell.reward for cell in row] for row in batch])
    table = Table(
        "from α",
        "to α",
        "difference",
        "s.e., common seeds",
        "s.e., independent",
        "ratio",
        title=f"reward difference, {tasks_count} tasks × {rollouts} rollouts",
    )
    ratios = {}
    for near, far in PAIRS:
        shared = rewards[far, "fresh"] - rewards[near, "fresh"]
        # The two sides of an independent pair share the tasks and nothing else, as without common random numbers.
        independent = rewards[far, "independent"] - rewards[near, "independent"]
        errors = standard_error(shared), standard_error(independent)
        ratios[f"{near:g}-{far:g}"] = round(errors[0] / errors[1], 3)
        table.add_row(
            *(f"{value:g}" for value in (near, far)),
            f"{shared.mean():+.4f}",
            *(f"{error:.4f}" for error in errors),
            f"{errors[0] / errors[1]:.2f}",
        )
    Console().print(table)
    print(json.dumps({"standard_error_ratio": ratios}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=128)
    parser.add_argument("--rollouts", type=int, default=8)
    given = parser.parse_args()
    asyncio.run(run(given.tasks, given.rollouts))
