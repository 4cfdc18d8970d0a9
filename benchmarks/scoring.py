"""What a score costs when prompts are computed once for all their completions, against once per completion.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --policy models/smollm2-135m-instruct --taskset rlvr-word-problems \\
        --options '{"min_steps": 2, "max_steps": 2, "seed": 12345}' --prompts 32 --rollouts 2 --max-tokens 48

One local server. The policy's own completions are scored at several points of a slice, each time with empty caches:
once as a point does, with the first token that is needed (`first`), and once without, in turns that alternate. The
values must agree to 1e-4 nat per token. The last line is one JSON object with medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from workload import TASKSET

from rlvr_landscape_plugin.config import EnvConfig, ServerConfig, SurrogateConfig
from rlvr_landscape_plugin.episodes import ChatFormat, EpisodeRunner, load_tasks, open_environment
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.serving.launch import local_server
from rlvr_landscape_plugin.snapshot import open_snapshot
from rlvr_landscape_plugin.sweep.base_batch import score_segments
from rlvr_landscape_plugin.sweep.point import PointMeter

TOLERANCE = 1e-4
"""nat per token, float32."""


async def run(options: argparse.Namespace) -> None:
    """Score the same completions either way, in turns, and print a table."""
    policy = open_snapshot(options.policy).path
    config = ServerConfig(max_model_len=options.length, max_num_seqs=128)
    env = open_environment(options.taskset, json.loads(options.options))
    tasks, chat = load_tasks(env, options.prompts), ChatFormat(policy)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    worst, equal = 0.0, True
    with tempfile.TemporaryDirectory() as name:
        async with local_server(config, policy, [policy], Path(name, "server.log")) as server:
            async with LandscapeClient(server.url, server.token) as client:
                await client.load(str(policy), {"seed": 0})
                await client.move(0.0, 0.0)
                runner = EpisodeRunner(env, chat, client, options.max_tokens, options.length, 512)
                meter = PointMeter(client, runner, tasks, options.rollouts, 0, SurrogateConfig())
                base = await meter.base(lambda: None)
                for repeat in range(options.repeats):
                    alpha, found = 1e-3 * (repeat + 1), {}
                    for share in (True, False) if repeat % 2 else (False, True):
                        await client.move(alpha, 0.0)
                        start = time.perf_counter()
                        scored = await score_segments(client, base.segments, share)
                        seconds[share].append(time.perf_counter() - start)
                        found[share] = np.concatenate([cell for row in scored for cell in row])
                    worst = max(worst, float(np.abs(found[True] - found[False]).max()))
                    equal &= bool(np.array_equal(found[True], found[False]))
    if not worst <= TOLERANCE:
        raise SystemExit(f"the two ways differ by {worst:g} nat at a token")
    tokens = sum(len(segment.tokens) for row in base.segments for cell in row for segment in cell)
    sampled = sum(int(segment.sampled.sum()) for row in base.segments for cell in row for segment in cell)
    alone, shared = statistics.median(seconds[False]), statistics.median(seconds[True])
    table = Table("prompts", "seconds", title=f"{tokens:,} tokens scored for {sampled:,} log-probabilities")
    table.add_row("once per completion", f"{alone:.2f}")
    table.add_row("shared", f"{shared:.2f}")
    Console().print(table)
    result = {
        "speedup": round(alone / shared, 2),
        "seconds": {"alone": round(alone, 2), "shared": round(shared, 2)},
        "repeats": options.repeats,
        "tokens": tokens,
        "sampled": sampled,
        "largest_difference": worst,
        "equal_bits": equal,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="tiny-sorter", help="a snapshot")
    parser.add_argument("--taskset", default=EnvConfig().id)
    parser.add_argument("--options", default=json.dumps(TASKSET), help="of the taskset, JSON")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=96, help="per turn")
    parser.add_argument("--length", type=int, default=1024, help="longest conversation, in tokens")
    parser.add_argument("--repeats", type=int, default=5, help="points at which both ways are timed")
    asyncio.run(run(parser.parse_args()))
