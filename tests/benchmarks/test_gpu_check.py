"""The check on a GPU: what it would run on which machine, its verdicts, and that its comparisons can fail."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import POLICY
from fake_server import FakeServer

from rlvr_landscape_plugin.config import ServerConfig
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.serving.protocol import TOKEN_VARIABLE
from rlvr_landscape_plugin.snapshot import open_snapshot

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check  # noqa: E402
import gpu_steps  # noqa: E402
from gpu_steps import Context, Outcome  # noqa: E402

H200 = gpu_check.Machine(("NVIDIA H200",), 139.8)


def sections(tmp_path, machine, rehearse=False) -> dict[str, Any]:
    return {section.name: section for section in gpu_check.plan(machine, tmp_path, rehearse, None)}


def test_a_rehearsal_runs_the_steps_that_a_gpu_runs(tmp_path):
    def steps(rehearse):
        machine = gpu_check.Machine((), 0.0) if rehearse else H200
        plan = sections(tmp_path, machine, rehearse).values()
        return [(section.name, [step.label for step in section.steps], section.start_seconds > 0) for section in plan]

    assert steps(True) == steps(False)


def test_what_a_machine_cannot_run_is_there_with_the_reason(tmp_path):
    one = sections(tmp_path, H200)
    assert one["two-gpus"].skipped == "this machine has 1 GPUs"
    assert "--smollm2" in one["smollm2"].skipped
    small = sections(tmp_path, gpu_check.Machine(("NVIDIA L4", "NVIDIA L4"), 22.5))
    assert small["two-gpus"].skipped is None
    assert small["big"].skipped == "a model of 7 B parameters and its directions need 70 GiB, the GPU has 22"


def test_vllms_share_of_the_gpu_leaves_room_for_the_slice(tmp_path):
    plan = sections(tmp_path, H200)
    # 7.6 B parameters: θ in bfloat16, δ and η in float32, within 90 % of what vLLM leaves.
    slice_gib = 10 * 7.6e9 / 2**30
    assert slice_gib < 0.9 * (1 - plan["big"].config.gpu_memory_utilization) * H200.memory_gib
    assert plan["eager"].config.extra_args == ["--enforce-eager"]
    assert plan["graphs"].config.extra_args == []


@pytest.mark.parametrize(
    ("outcome", "on_gpu", "on_cpu"),
    [
        (Outcome({}, {"bits": True}, {"speed": True}), "ok", "rehearsed"),
        (Outcome({}, {"bits": True}, {"speed": False}), "failed", "rehearsed"),
        (Outcome({}, {"bits": False}, {"speed": True}), "failed", "failed"),
        (Outcome({}, {"bits": True}), "ok", "ok"),
        (Outcome(skipped="does not fit"), "skipped", "skipped"),
    ],
)
def test_verdicts(outcome, on_gpu, on_cpu):
    assert gpu_check.verdict(outcome, rehearse=False) == on_gpu
    assert gpu_check.verdict(outcome, rehearse=True) == on_cpu


@pytest.fixture
def context(fake_server, tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, fake_server.token)
    return Context(fake_server.url, POLICY, tmp_path, True, ServerConfig(dtype="float32"), {})


async def origin(server: FakeServer) -> list[dict[str, str]]:
    async with LandscapeClient(server.url, server.token) as client:
        await client.load(str(POLICY), {"seed": 0})
        await client.move(0.0, 0.0)
        return await client.checksums()


def test_a_tour_ends_at_the_bits_it_began_with(fake_server, context):
    context.write("pristine.json", asyncio.run(origin(fake_server)))
    outcome = gpu_steps.run("tour", context)
    assert set(outcome.correct.values()) == {True}
    context.write("pristine.json", [{"weights": "others"}])
    assert gpu_steps.run("tour", context).correct["back at the snapshot's bits"] is False


class StaleServer(FakeServer):
    """Answers every request from the policy of the first one, as a captured graph with old weights would."""

    first: Any = None

    async def _generate(self, body: bytes) -> list[dict[str, Any]]:
        now = self._policy
        self.first = self._policy = self.first or now
        try:
            return await super()._generate(body)
        finally:
            self._policy = now


def test_graphs_that_decode_with_old_weights_are_found(context):
    assert set(gpu_steps.run("decode", context).correct.values()) == {True}
    with StaleServer() as server:
        stale = replace(context, url=server.url)
        outcome = gpu_steps.run("decode", stale)
    assert outcome.correct["sampled and scored log-probabilities agree at the moved point"] is False


def test_turns_of_a_conversation_are_its_runs_of_sampled_tokens():
    tokens = np.arange(10, dtype=np.int32)
    sampled = np.array([0, 0, 1, 1, 0, 0, 0, 1, 1, 1], bool)
    assert gpu_steps.sampled_turns(tokens, sampled) == [([0, 1], 2), ([0, 1, 2, 3, 4, 5, 6], 3)]


def checking(tmp_path, minutes=10.0):
    return gpu_check.Check(minutes, tmp_path, tmp_path, rehearse=True)


def lines(tmp_path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]


def test_a_step_that_fails_is_named_and_the_next_one_runs(fake_server, tmp_path):
    # The tour compares with what the trial left; before the trial it cannot run.
    steps = gpu_check.Step("tour", 60, "too early"), gpu_check.Step("trial", 60), gpu_check.Step("tour", 60)
    section = gpu_check.Section("bits", steps, model=POLICY)
    check = checking(tmp_path)

    async def run():
        for step in steps:
            await check.step(section, step, tmp_path, fake_server)

    asyncio.run(run())
    first, second, third = lines(tmp_path)
    assert first["verdict"] == "failed"
    assert "pristine.json" in first["error"]
    # A fake server knows no weights between a load and a move.
    assert (second["verdict"], second["facts"]["move_path"]) == ("failed", "kernel")
    assert second["correct"]["the trial leaves the weights as they were"] is False
    assert (third["verdict"], third["correct"]["back at the snapshot's bits"]) == ("ok", True)
    assert check.verdicts == {"bits: too early": "failed", "bits: trial": "failed", "bits: tour": "ok"}


def test_a_step_over_its_time_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LEAST", 0.0)
    step = gpu_check.Step("tour", 0.2)
    asyncio.run(checking(tmp_path).section(gpu_check.Section("bits", (step,), model=POLICY)))
    (line,) = lines(tmp_path)
    assert (line["verdict"], line["error"]) == ("failed", "took too long and was stopped")


def test_when_the_time_is_over_the_rest_is_not_run(tmp_path):
    step = gpu_check.Step("tour", 60)
    asyncio.run(checking(tmp_path, minutes=0.0).section(gpu_check.Section("bits", (step,), model=POLICY)))
    (line,) = lines(tmp_path)
    assert (line["verdict"], line["reason"]) == ("not run", "no time is left; try --only bits")


def test_a_random_model_is_written_whole(tmp_path):
    import torch
    from models import SIZES, parameters, random_qwen2

    snapshot = open_snapshot(random_qwen2(tmp_path / "model", "5m", torch.bfloat16))
    assert sum(np.prod(shape) for shape in snapshot.shapes.values()) == parameters("5m")
    assert 480e6 < parameters("0.5b") < 500e6
    assert 7.5e9 < parameters("7b") < 7.7e9
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"] == SIZES["5m"]["v"]


def test_without_a_gpu_the_command_says_what_to_do(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--output", str(tmp_path)]
    env = {"PATH": "/nowhere", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert done.stderr == "error: no NVIDIA GPU answers here (nvidia-smi); --rehearse runs the check on a CPU\n"
