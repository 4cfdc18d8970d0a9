"""The supervised warm start: what it shows a model, and that it leaves a checkpoint that is better at it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
from rlvr_word_problems.rules import is_correct

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "warm_start.py"
TINY = ROOT / "rlvr_landscape_plugin" / "policies" / "tiny_sorter"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def test_every_completion_shown_is_paid():
    spec = util.spec_from_file_location("warm_start", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = util.module_from_spec(spec)
    spec.loader.exec_module(script)
    from rlvr_word_problems.taskset import WordProblemsConfig, WordProblemsTaskset

    config = WordProblemsConfig(id="rlvr-word-problems", seed=script.SEED, max_steps=5)
    for example, task in zip(script.examples(50, {"max_steps": 5}), WordProblemsTaskset(config), strict=False):
        assert example["prompt"][0]["content"] == task.data.prompt
        assert is_correct(example["completion"][0]["content"], task.data.answer)


@pytest.mark.slow
def test_a_few_steps_make_the_replies_likelier(tmp_path):
    first = run("--model", str(TINY), "--out", str(tmp_path / "a"), "--steps", "10", "--batch", "4", "--lr", "1e-9")
    second = run("--model", str(TINY), "--out", str(tmp_path / "b"), "--steps", "20", "--batch", "4", "--lr", "1e-3")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    before, after = (json.loads(done.stdout.splitlines()[-1]) for done in (first, second))
    assert after["loss"] < before["loss"] - 1
    assert before["sha256"] != after["sha256"]
    kept = (tmp_path / "b" / "chat_template.jinja").read_bytes()
    assert kept == (TINY / "chat_template.jinja").read_bytes()
    again = run("--model", str(TINY), "--out", str(tmp_path / "b"))
    assert (again.returncode, "exists" in again.stderr) == (1, True)
    same = run("--model", str(TINY), "--out", str(tmp_path / "b"), "--steps", "20", "--batch", "4", "--lr", "1e-3")
    assert (same.returncode, "is there already" in same.stdout) == (0, True), same.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nowhere"), "is not a directory"),
        (("--model", str(TINY), "--taskset", '{"seed": 3}'), "--taskset: seed is 101 here"),
        (("--model", str(TINY), "--taskset", '{"largest": 1}'), "largest"),
        (("--model", str(TINY), "--steps", "0"), "must be at least 1"),
    ],
)
def test_mistakes_are_named(tmp_path, arguments, message):
    done = run(*arguments, "--out", str(tmp_path / "x"))
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()
