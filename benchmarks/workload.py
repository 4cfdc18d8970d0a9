"""What the benchmarks of episodes share: the tasks they roll out, and `vf-eval` on those tasks. Not a benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rlvr_landscape_plugin.serving.launch import LocalServer
from rlvr_landscape_plugin.serving.protocol import TOKEN_VARIABLE

TASKSET = {"min_turns": 2, "max_turns": 2, "max_names_per_turn": 3, "seed": 12345}
MAX_TOKENS = 96
"""Per turn."""


@dataclass
class Evaluation:
    """One run of `vf-eval`."""

    seconds: float
    """From its first rollout's start to its last score, as its own traces say: without its start-up."""
    rewards: list[float]
    """Of each episode, in the order of the tasks."""


def evaluate(
    server: LocalServer, folder: Path, harness: str, prompts: int, rollouts: int, temperature: float
) -> Evaluation:
    """`vf-eval` with one harness. Exits with its output if it fails, and if it leaves too few whole traces."""
    flags = [part for key, value in TASKSET.items() for part in (f"--env.taskset.{key.replace('_', '-')}", str(value))]
    command = [
        *("vf-eval", "rlvr-alphabet-sort", "--model", "policy", "-n", str(prompts), "-r", str(rollouts), *flags),
        *("--client.base-url", f"{server.url}/v1", "--client.api-key-var", TOKEN_VARIABLE),
        *("--env.agent.harness.id", harness, "--env.agent.runtime.type", "subprocess"),
        *("--sampling.temperature", str(temperature), "--sampling.max-tokens", str(MAX_TOKENS)),
        *("--no-push", "--no-rich", "--output-dir", str(folder)),
    ]
    env = os.environ | {TOKEN_VARIABLE: server.token, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"vf-eval with {harness} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    lines = [line for path in folder.rglob("traces.jsonl") for line in path.read_text().splitlines()]
    traces = [trace for line in lines for trace in json.loads(line)["traces"] if trace["ok"]]
    if len(traces) != prompts * rollouts:
        raise SystemExit(
            f"vf-eval with {harness} left {len(traces)} whole traces below {folder}, expected {prompts * rollouts}"
        )
    traces.sort(key=lambda trace: trace["task"]["data"]["idx"])
    start = min(trace["timing"]["start"] for trace in traces)
    end = max(trace["timing"]["scoring"]["end"] for trace in traces)
    return Evaluation(end - start, [sum(r["score"] * r["weight"] for r in t["rewards"].values()) for t in traces])
