"""The verifier's rules, as properties and against a second implementation."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlvr_alphabet_sort.names import given_names, surnames
from rlvr_alphabet_sort.rules import episode_reward, format_failures, similarity, tag_of, turn_score

from . import reference

NAMES = st.builds(str.__add__, st.sampled_from(given_names()[:40]), st.sampled_from(surnames()[:40]))
LISTS = st.lists(NAMES, min_size=1, max_size=8, unique=True)
TRUTHS = st.lists(LISTS, min_size=1, max_size=4)
POWERS = st.integers(1, 8)
PIECES = st.one_of(
    NAMES,
    st.sampled_from(
        [
            "<alphabetical_sorted>",
            "</alphabetical_sorted>",
            "<combined_alphabetical_sorted>",
            "</combined_alphabetical_sorted>",
            " // new name!",
            "\n",
            "  ",
        ]
    ),
    st.text(max_size=6),
)
RESPONSES = st.lists(st.lists(PIECES, max_size=14).map("".join), max_size=4)


def answer(names: list[str], turn: int) -> str:
    """A well-formed answer."""
    return f"<{tag_of(turn)}>\n" + "\n".join(names) + f"\n</{tag_of(turn)}>"


@given(RESPONSES, TRUTHS, POWERS, st.booleans())
def test_reward_is_a_share_and_follows_the_definition(
    responses: list[str], truths: list[list[str]], power: int, per_turn: bool
) -> None:
    value = episode_reward(responses, truths, power, per_turn)
    assert 0.0 <= value <= 1.0
    assert value == reference.reward(responses, truths, power, per_turn)


@given(TRUTHS, st.data(), POWERS, st.booleans())
def test_well_formed_answers_follow_the_definition(
    truths: list[list[str]], data: st.DataObject, power: int, per_turn: bool
) -> None:
    said = [
        "".join(answer(data.draw(st.permutations(truth)), turn) for _ in range(data.draw(st.integers(0, 3))))
        for turn, truth in enumerate(truths)
    ]
    assert episode_reward(said, truths, power, per_turn) == reference.reward(said, truths, power, per_turn)


@given(TRUTHS, POWERS, st.booleans())
def test_exact_answers_score_one(truths: list[list[str]], power: int, per_turn: bool) -> None:
    said = [answer(truth, turn) for turn, truth in enumerate(truths)]
    assert episode_reward(said, truths, power, per_turn) == 1.0
    shouted = [answer([f"  {name.upper()} " for name in truth], turn) for turn, truth in enumerate(truths)]
    assert episode_reward(shouted, truths, power, per_turn) == 1.0


@given(LISTS, st.lists(LISTS, min_size=2, max_size=4), st.integers(0, 2), POWERS)
def test_attempts_count_only_while_each_improves(
    truth: list[str], tries: list[list[str]], turn: int, power: int
) -> None:
    single = [turn_score(answer(names, turn), turn, truth, power) for names in tries]
    several = turn_score("\n".join(answer(names, turn) for names in tries), turn, truth, power)
    improving = all(later > earlier for earlier, later in pairwise(single))
    assert several == (single[-1] if improving else 0.0)


@settings(max_examples=50)
@given(LISTS, LISTS, POWERS)
def test_a_higher_power_never_pays_more(truth: list[str], tried: list[str], power: int) -> None:
    said = answer(tried, 0)
    assert turn_score(said, 0, truth, power + 1) <= turn_score(said, 0, truth, power)


def test_what_scores_zero() -> None:
    truth = ["AdaLovelace", "AlanTuring"]
    assert episode_reward([], [truth], 4, True) == 0.0
    assert episode_reward(["\n".join(truth)], [truth], 4, True) == 0.0
    assert episode_reward([answer(truth, 1)], [truth], 4, True) == 0.0
    assert episode_reward([answer([], 0)], [truth], 4, True) == 0.0
    assert episode_reward([], [], 4, True) == 0.0


def test_powers_by_hand() -> None:
    truth = ["ab"]
    half = answer(["a"], 0)
    assert similarity("a", truth) == pytest.approx(2 / 3)
    assert episode_reward([half], [truth, truth], 2, True) == pytest.approx((2 / 3) ** 2 / 2)
    assert episode_reward([half], [truth, truth], 2, False) == pytest.approx((1 / 3) ** 2)


def test_format_failures_counts_turns_without_a_list() -> None:
    truth = ["AdaLovelace"]
    assert format_failures([answer(truth, 0), answer(truth, 1)], 2) == 0.0
    assert format_failures([answer(truth, 0), "no list"], 2) == 0.5
    assert format_failures([answer(truth, 1)], 2) == 1.0
    assert format_failures([], 0) == 0.0
