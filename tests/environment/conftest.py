"""Name lists and streams of tasks that the environment's tests share."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from rlvr_alphabet_sort.names import builtin_source
from rlvr_alphabet_sort.taskset import AlphabetSortConfig, AlphabetSortTask, AlphabetSortTaskset


def make_taskset(**options: Any) -> AlphabetSortTaskset:
    """The taskset with these options."""
    return AlphabetSortTaskset(AlphabetSortConfig(id="rlvr-alphabet-sort", **options))


def first_tasks(count: int, **options: Any) -> list[AlphabetSortTask]:
    """The first `count` tasks of the stream with these options."""
    return list(itertools.islice(make_taskset(**options), count))


@pytest.fixture(scope="session")
def name_lists() -> list[list[str]]:
    """Lists of unequal length; some too short for some tasks, some with spaces, repetitions and single words."""
    lists = [names[: 3 + 5 * (i % 6)] for i, names in enumerate(builtin_source(7)(0)[:90])]
    lists[4] = ["Ada Lovelace", "AdaLovelace", "Grace B Hopper", "Plato", "EdsgerDijkstra", "plato", "AlanTuring"]
    return [list(names) for names in lists]


@pytest.fixture(scope="session")
def names_file(name_lists: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`name_lists` as a JSONL file."""
    path = tmp_path_factory.mktemp("names") / "names.jsonl"
    path.write_text("\n".join(json.dumps({"names": names}) for names in name_lists) + "\n", encoding="utf-8")
    return path
