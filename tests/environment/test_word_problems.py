"""`rlvr-word-problems`: the stories against a reader of their text, the verifier, and options that cannot work."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rlvr_word_problems import WordProblemsEnv, WordProblemsTaskset
from rlvr_word_problems.rules import final_answer, is_correct, random_reward
from rlvr_word_problems.stories import OPERATIONS, PEOPLE, THINGS, Settings, make_problem
from rlvr_word_problems.taskset import WordProblemsConfig, WordProblemsTask
from verifiers.v1.trace import Trace
from verifiers.v1.utils.loaders import environment_class, resolve_env_config, taskset_class


def tasks(count: int, **options: Any) -> list[WordProblemsTask]:
    """The first tasks of the stream with these options."""
    config = WordProblemsConfig(id="rlvr-word-problems", **options)
    return list(itertools.islice(WordProblemsTaskset(config), count))


def read(text: str) -> tuple[int, list[str], list[int]]:
    """Answer, operations and every amount of a problem, from its English alone."""
    total, found, seen = 0, [], []
    for sentence in re.findall(r"[^.?]+[.?]", text.split("\n")[0]):
        numbers = [int(number) for number in re.findall(r"\d+", sentence)]
        seen += numbers
        match sentence.split():
            case [_, "has", *_]:
                total = numbers[0]
            case _ if "more" in sentence.split():
                total, _ = total + numbers[0], found.append("add")
            case _ if re.search(r"gives \d+ \w+ to|loses|sells", sentence):
                total, _ = total - numbers[0], found.append("subtract")
            case _ if "boxes" in sentence:
                total, _ = total + numbers[0] * numbers[1], found.append("boxes")
            case _ if "twice" in sentence:
                total, _ = total * 2, found.append("double")
            case _ if "bags" in sentence:
                assert total % numbers[0] == 0
                total, _ = total // numbers[0], found.append("share")
            case ["How", "many", *_]:
                pass
            case _:
                raise AssertionError(f"a sentence of an unknown kind: {sentence!r}")
        assert total >= 0
        seen.append(total)
    return total, found, seen


@given(
    seed=st.integers(0, 10**6),
    steps=st.tuples(st.integers(1, 4), st.integers(0, 3)),
    largest=st.integers(3, 2000),
    operations=st.lists(st.sampled_from(OPERATIONS), min_size=1, unique=True),
)
@settings(max_examples=150)
def test_the_answer_is_what_a_reader_of_the_text_finds(seed, steps, largest, operations) -> None:
    fewest, most = steps[0], sum(steps)
    if not {"add", "subtract"} <= set(operations):
        operations = [*{*operations, "add", "subtract"}]
    shape = {"min_steps": fewest, "max_steps": most, "largest": largest, "operations": operations}
    for task in tasks(5, seed=seed, **shape):
        answer, found, seen = read(str(task.data.prompt))
        assert answer == task.data.answer
        assert fewest <= len(found) <= most
        assert set(found) <= set(operations)
        assert max(seen) <= largest
        assert "share" not in found[:-1]


@given(seed=st.integers(0, 10**6), number=st.integers(0, 1000), steps=st.integers(1, 6))
@settings(max_examples=150)
def test_the_working_leads_to_the_answer(seed, number, steps) -> None:
    problem = make_problem(Settings(steps, steps, 50, OPERATIONS), seed, number)
    amount = int(re.findall(r"\d+", problem.text)[0])
    lines = problem.working.splitlines()
    assert len(lines) == len(read(problem.text)[1])
    for line in lines:
        left, right = line.split(" = ")
        assert left.startswith(f"{amount} ")
        amount = int(right)
        assert eval(left) == amount
    assert amount == problem.answer


@pytest.mark.parametrize("operation", ["add", "subtract", "boxes", "double"])
def test_one_operation_alone(operation) -> None:
    for task in tasks(50, operations=[operation], max_steps=1):
        answer, found, _ = read(str(task.data.prompt))
        assert (answer, found) == (task.data.answer, [operation])


def test_every_operation_person_and_thing_occurs() -> None:
    texts = [str(task.data.prompt) for task in tasks(1500)]
    assert {name for text in texts for name in read(text)[1]} == set(OPERATIONS)
    words = set(re.findall(r"\w+", " ".join(texts)))
    assert words >= set(PEOPLE) | set(THINGS)


def test_one_thing_is_singular() -> None:
    text = " ".join(str(task.data.prompt) for task in tasks(1500))
    assert re.findall(r"\b1 (?:more )?(\w+)", text)
    assert not [word for word in re.findall(r"\b1 (?:more )?(\w+)", text) if word in THINGS]


def test_a_task_depends_on_options_seed_and_number_only() -> None:
    longer = tasks(40, seed=5)
    assert [task.data for task in tasks(10, seed=5)] == [task.data for task in longer[:10]]
    assert [task.hash for task in tasks(10, seed=5)] == [task.hash for task in longer[:10]]
    assert len({str(task.data.prompt) for task in longer}) == len(longer)
    assert not {str(t.data.prompt) for t in tasks(40, seed=6)} & {str(t.data.prompt) for t in longer}


def test_a_known_task() -> None:
    """The stream is a contract: published numbers depend on it."""
    assert str(tasks(1)[0].data.prompt) == (
        "Lina has 14 lemons. Then Lina loses 11 lemons. How many lemons does Lina have now?\n"
        "End your reply with the answer on a line of its own, like this: #### 42"
    )


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("14 - 11 = 3\n#### 3", 3),
        ("#### 3\n", 3),
        ("  ####3.", 3),
        ("#### 1,234", 1234),
        ("#### -7", -7),
        ("#### 007", 7),
        ("#### 1\n#### 2", 2),
        ("#### 3\nNo, wait.", 3),
        ("#### 3\n#### I do not know", None),
        ("#### 3 lemons", None),
        ("#### 3.5", None),
        ("#### 1,23", None),
        ("#### ³", None),
        ("#### ", None),
        ("The answer is #### 3", None),
        ("3", None),
        ("", None),
        ("#### " + "9" * 5000, None),
    ],
)
def test_final_answer(reply, answer) -> None:
    assert final_answer(reply) == answer


@given(reply=st.text(alphabet="#0123456789,.- \nab"), answer=st.integers(-5, 50))
def test_only_the_right_number_on_the_last_line_pays(reply, answer) -> None:
    assert is_correct(f"{reply}\n#### {answer}", answer)
    assert not is_correct(f"{reply}\n#### {answer + 1}", answer)


async def scored(task: WordProblemsTask, reply: str) -> dict[str, Any]:
    """Rewards and metrics that verifiers' own `Task.score` records."""
    trace = SimpleNamespace(metrics={}, rewards={}, last_reply=reply, num_turns=1)
    for name in ("record_metric", "record_metrics", "record_reward"):
        setattr(trace, name, getattr(Trace, name).__get__(trace))
    await task.score(trace)  # type: ignore[arg-type]
    return {"rewards": {name: reward.score for name, reward in trace.rewards.items()}, "metrics": trace.metrics}


async def test_rewards_and_metrics() -> None:
    (task,) = tasks(1)
    assert await scored(task, "so\n#### 3") == {"rewards": {"correct": 1.0}, "metrics": {"format_failure": 0.0}}
    assert await scored(task, "#### 4") == {"rewards": {"correct": 0.0}, "metrics": {"format_failure": 0.0}}
    assert await scored(task, "three") == {"rewards": {"correct": 0.0}, "metrics": {"format_failure": 1.0}}


async def test_a_control_names_itself_and_keeps_the_verifier() -> None:
    (inverted,) = tasks(1, task={"reward_mode": "inverted"})
    found = await scored(inverted, "#### 3")
    assert found == {"rewards": {"inverted_reward": 0.0}, "metrics": {"verifier_reward": 1.0, "format_failure": 0.0}}
    many = tasks(400, task={"reward_mode": "random"})
    paid = [(await scored(task, "#### 3"))["rewards"]["random_reward"] for task in many]
    assert set(paid) == {0.0, 1.0}
    assert 0.4 < sum(paid) / len(paid) < 0.6
    assert paid[0] == random_reward(str(many[0].data.prompt), "#### 3")
    assert many[0].hash == tasks(1)[0].hash, "a control changes no task"
    config = WordProblemsConfig(id="rlvr-word-problems", task={"reward_mode": "random"})  # type: ignore[arg-type]
    assert config.name == "rlvr-word-problems-random-reward"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_steps": 4}, "min_steps = 4 exceeds max_steps = 3"),
        ({"operations": ["share"]}, "can tell no story"),
        ({"operations": []}, "can tell no story"),
        ({"operations": ["add", "add"]}, "names one twice"),
        ({"operations": ["divide"]}, "operations"),
        ({"largest": 2}, "largest"),
        ({"min_steps": 0}, "min_steps"),
        ({"level": 3}, "level"),
    ],
)
def test_options_that_cannot_work(options, message) -> None:
    with pytest.raises(ValidationError, match=message):
        WordProblemsConfig(id="rlvr-word-problems", **options)


def test_a_story_that_cannot_be_told() -> None:
    with pytest.raises(ValueError, match="no story of 5 steps was found with largest = 3"):
        tasks(1, operations=["double"], largest=3, min_steps=5, max_steps=5)


def test_verifiers_finds_the_taskset_and_its_environment() -> None:
    assert taskset_class("rlvr-word-problems") is WordProblemsTaskset
    assert environment_class("rlvr-word-problems") is WordProblemsEnv
    config = resolve_env_config({"taskset": {"id": "rlvr-word-problems", "largest": 9}})
    assert config.taskset.largest == 9
    assert config.agent.harness.id == "null"
