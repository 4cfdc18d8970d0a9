"""Where tasks come from: sources, seeds, and options that cannot work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import verifiers.v1 as vf
from pydantic import ValidationError
from rlvr_alphabet_sort import AlphabetSortEnv, AlphabetSortTaskset
from rlvr_alphabet_sort.names import builtin_source, given_names, surnames
from rlvr_alphabet_sort.taskset import SEED, AlphabetSortConfig
from verifiers.v1.utils.loaders import environment_class, resolve_env_config, taskset_class

from . import reference
from .conftest import first_tasks, make_taskset


def infos(count: int = 40, **options: Any) -> list[dict[str, Any]]:
    """The contents of the first tasks."""
    return [task.data.info for task in first_tasks(count, **options)]


def test_builtin_names_are_many_and_well_formed() -> None:
    for names in (given_names(), surnames()):
        assert len(names) == len(set(names)) >= 300
        assert all(re.fullmatch(r"[A-Z][a-z]+", name) for name in names)
    for name in builtin_source(3)(0)[0]:
        assert reference.given_name(name) in given_names()
        assert reference.surname(name) in surnames()


def test_a_seed_names_one_stream() -> None:
    assert infos(seed=5) == infos(seed=5)
    assert infos() == infos(seed=SEED)
    streams = [json.dumps(infos(seed=seed)) for seed in (0, 1, 5, SEED, 12345, 2001)]
    assert len(set(streams)) == len(streams)


def test_seed_zero_is_a_seed(names_file: Path, name_lists: list[list[str]]) -> None:
    expected = reference.episodes(name_lists, 0, (1, 3), (1, 5))
    assert infos(seed=0, source=str(names_file)) == [next(expected) for _ in range(40)]


def test_two_iterations_are_the_same_and_do_not_disturb_each_other() -> None:
    taskset = make_taskset()
    one, other = iter(taskset), iter(taskset)
    pairs = [(next(one).data, next(other).data) for _ in range(20)]
    assert all(a == b for a, b in pairs)


def test_the_builtin_stream_goes_on_with_new_names() -> None:
    source = builtin_source(SEED)
    assert source(0) != source(1)
    tasks = infos(1100, min_turns=2, max_turns=2)
    assert len({json.dumps(info) for info in tasks}) == len(tasks)


def test_builtin_lists_are_long_enough_for_long_conversations() -> None:
    assert all(
        len(info["ground_truths"][-1]) == 60
        for info in infos(20, min_turns=6, max_turns=6, min_names_per_turn=10, max_names_per_turn=10)
    )


def test_shape_of_conversations() -> None:
    for info in infos(60, min_turns=2, max_turns=3, min_names_per_turn=2, max_names_per_turn=4):
        assert info["num_turns"] == len(info["user_turns"]) == len(info["ground_truths"])
        assert 2 <= info["num_turns"] <= 3
        sizes = [len(truth) for truth in info["ground_truths"]]
        added = [later - earlier for earlier, later in zip([0, *sizes], sizes, strict=False)]
        assert all(2 <= count <= 4 for count in added)


def test_jsonl_source_cycles_with_new_splits(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text('\n{"names": ["Ada Lovelace", "Alan Turing", "Grace Hopper"]}\n\n', encoding="utf-8")
    tasks = infos(30, source=str(path), min_turns=1, max_turns=1, max_names_per_turn=3)
    assert {name for info in tasks for name in info["ground_truths"][0]} == {"AdaLovelace", "AlanTuring", "GraceHopper"}
    assert len({json.dumps(info) for info in tasks}) > 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no name lists"),
        ('{"names": ["AdaLovelace"]}\nnot json\n', "line 2"),
        ('{"people": ["AdaLovelace"]}\n', "line 1"),
        ('{"names": "AdaLovelace"}\n', "list of non-empty strings"),
        ('{"names": ["AdaLovelace", 3]}\n', "list of non-empty strings"),
        ('["AdaLovelace"]\n', "line 1"),
    ],
)
def test_a_broken_jsonl_source_says_where(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "names.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        first_tasks(1, source=str(path))


def test_an_endless_stream_without_tasks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text('{"names": ["AdaLovelace"]}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"long enough.*lower min_turns/max_turns"):
        first_tasks(1, source=str(path), min_turns=2, max_turns=2)


@pytest.mark.parametrize(
    ("options", "mentioned"),
    [
        ({"min_turns": 4}, ["min_turns = 4", "max_turns = 3", "lower min_turns"]),
        ({"max_turns": 0}, ["min_turns = 1", "max_turns = 0"]),
        ({"min_turns": 0}, ["min_turns", "greater than or equal to 1"]),
        ({"min_names_per_turn": 6}, ["min_names_per_turn = 6", "max_names_per_turn = 5"]),
        ({"min_names_per_turn": 0}, ["min_names_per_turn", "greater than or equal to 1"]),
        ({"source": "no/such/file.jsonl"}, ["no/such/file.jsonl", "'builtin'", "'hf'", "JSONL"]),
        ({"task": {"similarity_power": 0}}, ["similarity_power"]),
        ({"min_turn": 2}, ["min_turn"]),
    ],
)
def test_options_that_cannot_work_are_refused_with_a_reason(options: dict[str, Any], mentioned: list[str]) -> None:
    with pytest.raises(ValidationError) as failure:
        AlphabetSortConfig(id="rlvr-alphabet-sort", **options)
    assert all(text in str(failure.value) for text in mentioned), str(failure.value)


def test_the_hub_source_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlvr_alphabet_sort.names.find_spec", lambda name: None)
    with pytest.raises(ValidationError, match="pip install"):
        AlphabetSortConfig(id="rlvr-alphabet-sort", source="hf")


def test_the_hub_source_reads_the_published_dataset(
    monkeypatch: pytest.MonkeyPatch, name_lists: list[list[str]], names_file: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, list[str]]]:
        asked.append((name, split))
        return [{"names": names} for names in name_lists]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert infos(source="hf") == infos(source=str(names_file))
    assert asked == [("kalomaze/alphabetic-arxiv-authors-it1", "train")]


def test_verifiers_finds_the_classes_and_the_tool_less_harness() -> None:
    assert taskset_class("rlvr-alphabet-sort") is AlphabetSortTaskset
    assert environment_class("rlvr-alphabet-sort") is AlphabetSortEnv
    config = resolve_env_config({"taskset": {"id": "rlvr-alphabet-sort"}})
    assert config.agent_harnesses()["agent"].id == "null"
    assert config.agent.runtime.type == "subprocess"
    assert isinstance(vf.load_environment(config), vf.SingleAgentEnv)
    pinned = resolve_env_config({"taskset": {"id": "rlvr-alphabet-sort"}, "agent": {"harness": {"id": "bash"}}})
    assert pinned.agent_harnesses()["agent"].id == "bash"
