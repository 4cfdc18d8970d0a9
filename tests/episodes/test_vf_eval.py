"""`vf-eval` as the environment's README writes it, on the real server: stock harness, stock route, our rules."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import POLICY, ROOT
from environment.reference import reward as published_reward
from rlvr_alphabet_sort.rules import random_reward

from rlvr_landscape_plugin.serving.client import LandscapeClient

pytestmark = [pytest.mark.server, pytest.mark.slow]


def readme_command() -> list[str]:
    """The vf-eval command of the environment's README, as typed."""
    text = (ROOT / "environments" / "rlvr_alphabet_sort" / "README.md").read_text()
    (block,) = re.findall(r"```bash\n[^`]*?(vf-eval rlvr-alphabet-sort .*?)```", text, re.DOTALL)
    return shlex.split(block.replace("\\\n", " "))


@pytest.mark.parametrize("mode", ["verifier", "random"])
async def test_the_readme_command_gives_the_rewards_of_the_rules(server, tmp_path, mode):
    if shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is None:
        pytest.skip("the stock harness needs uv on the PATH")
    async with LandscapeClient(server.url, server.token) as client:
        await client.load(str(POLICY), {"seed": 0})
        await client.move(0, 0)
    command = readme_command()
    command[command.index("-n") + 1] = "6"
    command[command.index("--client.base-url") + 1] = f"{server.url}/v1"
    key = command[command.index("--client.api-key-var") + 1]
    command += [] if mode == "verifier" else ["--env.taskset.task.reward-mode", mode]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path)],
        env=os.environ | {"PATH": path, key: server.token},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(line) for file in tmp_path.rglob("*.jsonl") for line in file.read_text().splitlines()]
    traces = [trace for record in records for trace in record.get("traces", [record]) if trace.get("nodes")]
    assert len(traces) == 6
    for trace in traces:
        replies = [n["message"].get("content") or "" for n in trace["nodes"] if n.get("sampled")]
        truths = trace["task"]["data"]["info"]["ground_truths"]
        reward = sum(r["score"] * r["weight"] for r in trace["rewards"].values())
        verified = published_reward(replies, truths, 4, True)
        if mode == "verifier":
            assert reward == pytest.approx(verified, abs=1e-12)
        else:
            assert list(trace["rewards"]) == ["random_reward"]
            assert reward == random_reward(trace["task"]["data"]["info"]["user_turns"], replies)
            assert trace["metrics"]["verifier_reward"] == pytest.approx(verified, abs=1e-12)
        assert len(replies) == len(truths) == 2
