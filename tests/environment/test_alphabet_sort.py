"""The environment: tasks and rewards of the published Alphabet-sort, against code written from its definition."""

from __future__ import annotations

import difflib
import itertools
import json
import os
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rlvr_alphabet_sort.names import builtin_source, given_names, surnames
from rlvr_alphabet_sort.rules import episode_reward, format_failures, tag_of
from rlvr_alphabet_sort.taskset import AlphabetSortConfig, AlphabetSortTaskset


def tasks(count: int, **options: object) -> list[dict]:
    config = AlphabetSortConfig(id="rlvr-alphabet-sort", **options)
    return [task.data.info for task in itertools.islice(AlphabetSortTaskset(config), count)]


def answer(turn: int, names: list[str]) -> str:
    return f"<{tag_of(turn)}>\n" + "\n".join(names) + f"\n</{tag_of(turn)}>"


def reward_by_definition(responses: list[str], truths: list[list[str]], power: int, per_turn: bool) -> float:
    """The published rule, spelled out with string search instead of regular expressions."""
    scores = []
    for turn, truth in enumerate(truths):
        opening, closing = f"<{tag_of(turn)}>", f"</{tag_of(turn)}>"
        text = responses[turn] if turn < len(responses) else ""
        found = []
        while opening in text:
            text = text[text.index(opening) + len(opening) :]
            if closing not in text:
                break
            body, text = text[: text.index(closing)], text[text.index(closing) + len(closing) :]
            lines = [line.strip().lower() for line in body.split("\n")]
            given_text = "\n".join(line for line in lines if line)
            expected = "\n".join(name.strip().lower() for name in truth)
            ratio = difflib.SequenceMatcher(None, given_text, expected).ratio() if given_text and expected else 0.0
            found.append(ratio**power if per_turn else ratio)
        good = bool(found) and all(found[k] < found[k + 1] for k in range(len(found) - 1))
        scores.append(found[-1] if good else 0.0)
    mean = sum(scores) / len(scores)
    return mean if per_turn else mean**power


names_lists = st.lists(st.sampled_from(["AdaLovelace", "KurtGoedel", "EmmyNoether // new name!", "x"]), min_size=1)
replies = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.builds(lambda turn, names: answer(turn, names), st.integers(0, 1), names_lists),
        st.builds(lambda a, b: answer(0, a) + answer(0, b) + answer(1, a) + answer(1, b), names_lists, names_lists),
    ),
    max_size=3,
)


@given(replies, st.lists(names_lists, min_size=1, max_size=3), st.integers(1, 6), st.booleans())
def test_reward_is_the_published_rule(responses, truths, power, per_turn):
    reward = episode_reward(responses, truths, power, per_turn)
    assert reward == reward_by_definition(responses, truths, power, per_turn)
    assert 0.0 <= reward <= 1.0


def test_true_answers_score_one_and_errors_less():
    for info in tasks(50, min_turns=2, max_turns=3):
        right = [answer(turn, names) for turn, names in enumerate(info["ground_truths"])]
        assert episode_reward(right, info["ground_truths"], 4, True) == 1.0
        assert episode_reward(right[:-1], info["ground_truths"], 4, True) < 1.0
        assert format_failures(right, info["num_turns"]) == 0.0
        assert format_failures(["no tags"] * 3, info["num_turns"]) == 1.0


def test_second_attempt_counts_only_if_it_improves():
    truth = [["AdaLovelace", "KurtGoedel"]]
    good, bad = answer(0, truth[0]), answer(0, ["AdaLovelace"])
    assert episode_reward([bad + good], truth, 4, True) == 1.0
    assert episode_reward([good + bad], truth, 4, True) == 0.0
    assert episode_reward([good + good], truth, 4, True) == 0.0


def test_a_known_conversation(tmp_path: Path):
    """Checked by hand against the published environment's output for this name list and its default seed."""
    path = tmp_path / "names.jsonl"
    path.write_text(json.dumps({"names": ["Ada Lovelace", "Kurt Goedel", "Emmy Noether", "Alan Turing"]}) + "\n")
    info = tasks(1, source=str(path), min_turns=2, max_turns=2, max_names_per_turn=2)[0]
    rng = random.Random(1337420)
    rng.randint(2, 2)
    counts = [rng.randint(1, 2), rng.randint(1, 2)]
    by_first = rng.choice([True, False])
    assert f"by {'FIRST' if by_first else 'LAST'} name" in info["user_turns"][0]
    assert [len(truth) for truth in info["ground_truths"]] == [counts[0], sum(counts)]
    assert all("// new name!" in name for name in info["ground_truths"][1] if name[:3] not in info["user_turns"][0])


@pytest.mark.skipif("VERIFIERS_DIR" not in os.environ, reason="needs a verifiers checkout in VERIFIERS_DIR")
@pytest.mark.parametrize("options", [{}, {"min_turns": 2, "max_turns": 2}, {"max_names_per_turn": 12}])
def test_tasks_and_rewards_of_the_published_environment(tmp_path, monkeypatch, options):
    import asyncio

    import datasets

    lists = [{"names": names} for names in builtin_source(3)(0)[:200]]
    path = tmp_path / "names.jsonl"
    path.write_text("\n".join(json.dumps(entry) for entry in lists))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: lists)
    monkeypatch.syspath_prepend(str(Path(os.environ["VERIFIERS_DIR"]) / "environments" / "alphabet_sort"))
    sys.modules.pop("alphabet_sort", None)
    from alphabet_sort.taskset import AlphabetSortConfig as PublishedConfig
    from alphabet_sort.taskset import AlphabetSortTaskset as PublishedTaskset

    published = itertools.islice(PublishedTaskset(PublishedConfig(id="alphabet-sort", **options)), 500)
    config = AlphabetSortConfig(id="rlvr-alphabet-sort", source=str(path), **options)
    ours = itertools.islice(AlphabetSortTaskset(config), 500)
    rng = random.Random(0)
    for theirs, mine in zip(published, ours, strict=True):
        assert theirs.data.info == mine.data.info
        assert theirs.data.idx == mine.data.idx
        said = [answer(t, rng.sample(names, k=len(names))) for t, names in enumerate(mine.data.info["ground_truths"])]
        trace = type("T", (), {"assistant_messages": [type("M", (), {"content": text}) for text in said]})
        assert asyncio.run(theirs.alphabet_sort(trace)) == asyncio.run(mine.alphabet_sort(trace))


def test_streams_repeat_by_seed_and_seed_zero_is_a_seed():
    assert tasks(20, seed=0) == tasks(20, seed=0)
    assert tasks(20, seed=0) != tasks(20)
    assert tasks(5, seed=12345) != tasks(5, seed=2001)


def test_builtin_names_have_one_inner_capital_and_are_many():
    assert len(given_names()) > 300
    assert len(surnames()) > 300
    for name in (*given_names(), *surnames()):
        assert name.isascii()
        assert name.isalpha()
        assert name == name.capitalize()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_turns": 3, "max_turns": 2}, "min_turns = 3 exceeds max_turns = 2"),
        ({"min_names_per_turn": 6}, "min_names_per_turn = 6 exceeds max_names_per_turn = 5"),
        ({"min_turns": 0}, "greater than or equal to 1"),
        ({"sead": 1}, "sead"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        AlphabetSortConfig(id="rlvr-alphabet-sort", **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no name lists"),
        ("{}", "line 1"),
        ('{"names": [1]}', "list of non-empty strings"),
        ('{"names": ["OnlyOne"]}', "no name list .* is long enough"),
    ],
)
def test_bad_sources_are_named(tmp_path, text, message):
    path = tmp_path / "names.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        tasks(1, source=str(path), min_turns=2, max_turns=2)
    with pytest.raises(ValueError, match="is no file"):
        tasks(1, source=str(tmp_path / "absent.jsonl"))
