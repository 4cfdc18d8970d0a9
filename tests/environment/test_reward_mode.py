"""The controls: what is paid instead of the verifier's score, and that every result says so."""

from __future__ import annotations

import hashlib
import json
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import verifiers.v1 as vf
from pydantic import ValidationError
from rlvr_alphabet_sort.rules import random_reward, tag_of
from rlvr_alphabet_sort.taskset import AlphabetSortConfig, AlphabetSortTask
from verifiers.v1.configs.cli.eval import default_run_name
from verifiers.v1.serve.server import EnvServer
from verifiers.v1.trace import Trace
from verifiers.v1.utils.loaders import resolve_env_config

from . import reference
from .conftest import first_tasks

SHAPE: dict[str, int] = {"min_turns": 2, "max_turns": 2, "max_names_per_turn": 3}


async def scored(task: AlphabetSortTask, replies: list[str]) -> Trace:
    """The trace that verifiers' own `Task.score` leaves."""
    trace = SimpleNamespace(
        metrics={}, rewards={}, assistant_messages=[SimpleNamespace(content=text) for text in replies]
    )
    for name in ("record_metric", "record_metrics", "record_reward"):
        setattr(trace, name, getattr(Trace, name).__get__(trace))
    await task.score(trace)  # type: ignore[arg-type]
    return trace  # type: ignore[return-value]


def answers(task: AlphabetSortTask, rng: random.Random) -> list[str]:
    """Replies of mixed quality."""
    said = []
    for turn, truth in enumerate(task.data.info["ground_truths"]):
        names = truth[:]
        if rng.random() < 0.6:
            rng.shuffle(names)
        said.append(f"<{tag_of(turn)}>\n" + "\n".join(names[: rng.randint(1, len(names))]) + f"\n</{tag_of(turn)}>")
    return said


def paired(mode: str, count: int = 40) -> list[tuple[AlphabetSortTask, AlphabetSortTask]]:
    """The same tasks under the verifier and under `mode`."""
    plain = first_tasks(count, **SHAPE)
    other = first_tasks(count, **SHAPE, task={"reward_mode": mode})
    assert [task.hash for task in plain] == [task.hash for task in other], "a control changes no task"
    return list(zip(plain, other, strict=True))


async def test_by_default_nothing_is_added() -> None:
    for task in first_tasks(20, **SHAPE):
        replies = answers(task, random.Random(task.data.idx))
        trace = await scored(task, replies)
        assert list(trace.rewards) == ["alphabet_sort"]
        assert list(trace.metrics) == ["format_failure"]
        expected = reference.reward(replies, task.data.info["ground_truths"], 4, True)
        assert trace.rewards["alphabet_sort"].value == expected
    assert AlphabetSortConfig(id="rlvr-alphabet-sort").name == "rlvr-alphabet-sort"


async def test_inverted_pays_one_minus_the_verifier() -> None:
    for plain, inverted in paired("inverted"):
        replies = answers(plain, random.Random(plain.data.idx))
        was, now = await scored(plain, replies), await scored(inverted, replies)
        assert list(now.rewards) == ["inverted_reward"]
        assert now.rewards["inverted_reward"].value == 1 - was.rewards["alphabet_sort"].value
        assert now.metrics["verifier_reward"] == was.rewards["alphabet_sort"].value
        assert now.metrics["format_failure"] == was.metrics["format_failure"]


async def test_random_is_a_fair_coin_that_ignores_quality() -> None:
    coin, quality = [], []
    for plain, chosen in paired("random", 250):
        for attempt in range(8):
            replies = answers(plain, random.Random(f"{plain.data.idx}/{attempt}"))
            replies[0] += f" {attempt}"  # small names make equal replies likely, which would be paid equally
            now = await scored(chosen, replies)
            assert list(now.rewards) == ["random_reward"]
            coin.append(now.rewards["random_reward"].value)
            quality.append(now.metrics["verifier_reward"])
    n = len(coin)
    assert set(coin) == {0.0, 1.0}
    assert abs(np.mean(coin) - 0.5) < 4 * 0.5 / np.sqrt(n)
    assert np.std(quality) > 0.1
    assert abs(np.corrcoef(coin, quality)[0, 1]) < 4 / np.sqrt(n)


def test_random_is_the_documented_bit_of_the_conversation() -> None:
    turns, replies = ["sort Ada", "now Bob"], ["x", "y"]
    text = json.dumps(["rlvr-alphabet-sort random reward", turns, replies])
    assert random_reward(turns, replies) == hashlib.sha256(text.encode()).digest()[0] % 2
    variants = [(turns, replies), (turns[::-1], replies), (turns, replies[::-1]), (turns, ["xy"]), (turns, ["", "xy"])]
    many = {tuple(random_reward([*t, str(i)], r) for i in range(64)) for t, r in variants}
    assert len(many) == len(variants), "task, reply and where a reply ends all enter"


async def test_a_server_that_rebuilds_tasks_pays_the_same() -> None:
    """verifiers' environment server makes tasks from wire data and the `task` table alone."""
    config: Any = resolve_env_config(
        {"taskset": {"id": "rlvr-alphabet-sort", **SHAPE, "task": {"reward_mode": "random"}}}
    )
    env = vf.load_environment(config)
    task_type = type(env.taskset).task_type()
    stub = SimpleNamespace(data_cls=task_type.data_type(), task_cls=task_type, env=env)
    for task, _ in zip(env.taskset, range(10), strict=False):
        rebuilt = EnvServer._build_task(stub, task.data.model_dump(mode="json"))  # type: ignore[arg-type]
        replies = answers(task, random.Random(0))  # type: ignore[arg-type]
        here, there = await scored(task, replies), await scored(rebuilt, replies)  # type: ignore[arg-type]
        assert list(there.rewards) == ["random_reward"]
        assert here.rewards == there.rewards


@pytest.mark.parametrize("mode", ["random", "inverted"])
def test_results_are_labelled_with_the_control(mode: str) -> None:
    config: Any = resolve_env_config({"taskset": {"id": "rlvr-alphabet-sort", "task": {"reward_mode": mode}}})
    assert config.taskset.name == f"rlvr-alphabet-sort-{mode}-reward"
    assert f"rlvr-alphabet-sort-{mode}-reward--" in default_run_name(config, "m")
    assert config.model_dump(mode="json")["taskset"]["task"]["reward_mode"] == mode
    assert config.taskset.id == "rlvr-alphabet-sort"


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(ValidationError, match="'verifier', 'random' or 'inverted'"):
        AlphabetSortConfig(id="rlvr-alphabet-sort", task={"reward_mode": "spurious"})  # type: ignore[arg-type]
