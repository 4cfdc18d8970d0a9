"""Given the same names and seed, tasks and rewards are those of the published environment."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import verifiers.v1 as vf
from rlvr_alphabet_sort.taskset import SEED

from . import reference
from .conftest import first_tasks

SHAPES: list[dict[str, int]] = [
    {},
    {"min_turns": 2, "max_turns": 2},
    {"min_turns": 1, "max_turns": 5, "min_names_per_turn": 2, "max_names_per_turn": 9},
    {"min_turns": 4, "max_turns": 4, "min_names_per_turn": 1, "max_names_per_turn": 1},
]
DEFAULTS = {"min_turns": 1, "max_turns": 3, "min_names_per_turn": 1, "max_names_per_turn": 5}


@pytest.fixture(scope="session")
def published() -> Iterator[ModuleType]:
    """The published environment's module, from a checkout of verifiers."""
    checkout = os.environ.get("VERIFIERS_DIR")
    if not checkout:
        pytest.skip("needs a checkout of verifiers in VERIFIERS_DIR")
    folder = Path(checkout) / "environments" / "alphabet_sort"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist; VERIFIERS_DIR must be a checkout of verifiers")
    pytest.importorskip("datasets")
    sys.path.insert(0, str(folder))
    yield importlib.import_module("alphabet_sort.taskset")
    sys.path.remove(str(folder))


def replies(truth: list[str], turn: int, rng: random.Random) -> str:
    """An answer of any quality: right, shuffled, cut, in another tag, attempted several times, or nothing."""
    tag = "alphabetical_sorted" if turn == 0 else "combined_alphabetical_sorted"
    parts = ["Here you are:"]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        lines = truth[: rng.randint(0, len(truth))] if rng.random() < 0.4 else truth[:]
        if rng.random() < 0.5:
            rng.shuffle(lines)
        space = rng.choice(["", " ", "\n"])
        parts.append(f"<{tag}>\n" + "\n".join(space + line.upper() for line in lines) + f"\n</{tag}>")
    return "\n".join(parts)[: rng.choice([10_000, 10_000, 60])]


def published_reward(task: Any, responses: list[str]) -> float:
    """The published task's own reward of these responses."""
    trace = SimpleNamespace(assistant_messages=[SimpleNamespace(content=text) for text in responses])
    return asyncio.run(type(task).alphabet_sort(task, trace))


@pytest.mark.parametrize("shape", SHAPES)
def test_tasks_follow_the_definition(shape: dict[str, int], name_lists: list[list[str]], names_file: Path) -> None:
    size = DEFAULTS | shape
    expected = reference.episodes(
        name_lists,
        SEED,
        (size["min_turns"], size["max_turns"]),
        (size["min_names_per_turn"], size["max_names_per_turn"]),
    )
    tasks = first_tasks(250, source=str(names_file), **shape)
    assert [task.data.info for task in tasks] == list(itertools.islice(expected, len(tasks)))
    assert [task.data.idx for task in tasks] == list(range(len(tasks)))
    assert all(task.data.prompt is None for task in tasks)


@pytest.mark.parametrize("shape", SHAPES)
def test_tasks_are_the_published_ones(
    shape: dict[str, int],
    published: ModuleType,
    name_lists: list[list[str]],
    names_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(published, "load_dataset", lambda *_, **__: [{"names": names} for names in name_lists])
    config = published.AlphabetSortConfig(id="alphabet-sort", **shape)
    theirs = list(itertools.islice(published.AlphabetSortTaskset(config), 250))
    ours = first_tasks(250, source=str(names_file), **shape)
    assert [task.data.info for task in ours] == [task.data.info for task in theirs]
    assert [task.data.idx for task in ours] == [task.data.idx for task in theirs]


@pytest.mark.parametrize("scoring", [{}, {"power_per_turn": False}, {"similarity_power": 1}])
def test_rewards_are_the_published_ones(
    scoring: dict[str, Any],
    published: ModuleType,
    name_lists: list[list[str]],
    names_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(published, "load_dataset", lambda *_, **__: [{"names": names} for names in name_lists])
    config = published.AlphabetSortConfig(id="alphabet-sort", task=published.AlphabetSortTaskConfig(**scoring))
    theirs = itertools.islice(published.AlphabetSortTaskset(config), 150)
    rng = random.Random(0)
    values = []
    for task, upstream in zip(first_tasks(150, source=str(names_file), task=scoring), theirs, strict=True):
        truths = task.data.info["ground_truths"]
        said = [replies(list(truth), turn, rng) for turn, truth in enumerate(truths)][: rng.choice([1, 9, 9])]
        values.append(published_reward(task, said))
        assert values[-1] == published_reward(upstream, said)
    assert len(set(values)) > 30


def test_task_score_is_the_pure_function() -> None:
    task = first_tasks(1, min_turns=2, max_turns=2)[0]
    truths = task.data.info["ground_truths"]
    said = [
        "<alphabetical_sorted>" + "\n".join(truths[0]) + "</alphabetical_sorted>",
        "<combined_alphabetical_sorted>" + "\n".join(truths[1][::-1]) + "</combined_alphabetical_sorted>",
    ]
    assert published_reward(task, said) == reference.reward(said, truths, 4, True)
    assert isinstance(task, vf.Task)
