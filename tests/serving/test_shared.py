"""Scores whose prompts come from the prefix cache: what is missing is found in other sequences, or scored again."""

from __future__ import annotations

import json
import sys
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_landscape_plugin.serving.protocol import ROOTS_VARIABLE, TOKEN_VARIABLE, pack, unpack_logprobs
from rlvr_landscape_plugin.serving.shared import Scored, completed

BLOCK = 4


def truth(tokens: np.ndarray) -> np.ndarray:
    """A log π of `tokens[1:]` that depends on all tokens before."""
    return np.array([-(hash(tokens[: at + 1].tobytes()) % 1000) / 100 for at in range(1, len(tokens))], np.float32)


def engine(sequences: list[np.ndarray], first: list[int]) -> list[Scored]:
    """What vLLM computes of `sequences`, one after the other: nothing for tokens of whole blocks that came before."""
    cache: set[bytes] = set()
    answers = []
    for tokens, at in zip(sequences, first, strict=True):
        held = [end for end in range(BLOCK, len(tokens), BLOCK) if tokens[:end].tobytes() in cache]
        logprobs = truth(tokens)
        logprobs[: max(held, default=0)] = np.nan
        answers.append(Scored(tokens, at, max(held, default=0), logprobs))
        cache |= {tokens[:end].tobytes() for end in range(BLOCK, len(tokens) + 1, BLOCK)}
    return answers


def computed_by_one(scored: list[Scored], tokens: np.ndarray) -> bool:
    """Whether the last of `tokens`, after all others of them, was computed for one of the sequences."""
    at = len(tokens) - 1
    return any(one.cached < at and np.array_equal(one.tokens[: at + 1], tokens) for one in scored)


@settings(max_examples=100)
@given(st.data())
def test_what_is_filled_in_is_what_the_policy_says(data):
    prompts = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=3))
    sequences, first = [], []
    for prompt in prompts:
        for completion in data.draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), max_size=6)):
            sequences.append(np.array([*prompt, *completion], np.int32))
            first.append(len(prompt))
    scored = engine(sequences, first)
    for one in scored:
        filled = completed(one, scored)
        if filled.missing:
            assert filled is one
            assert any(not computed_by_one(scored, one.tokens[: at + 1]) for at in one.missing)
            continue
        answer = filled.answer()
        assert np.isnan(answer[: one.first - 1]).all()
        np.testing.assert_array_equal(answer[one.first - 1 :], truth(one.tokens)[one.first - 1 :])


def test_a_token_is_taken_only_from_a_sequence_that_computed_it_after_the_same_tokens():
    tokens = np.arange(12, dtype=np.int32)
    other = tokens.copy()
    other[9] = 77
    known = Scored(other, 4, 0, truth(other))
    reaches = Scored(tokens, 4, 8, np.where(np.arange(11) < 8, np.nan, truth(tokens)).astype(np.float32))
    np.testing.assert_array_equal(completed(reaches, [known]).answer()[3:], truth(tokens)[3:])
    other[8] = 77  # token 8 needs the output of token 7, which came from the cache
    parted = Scored(other, 4, 0, truth(other))
    assert completed(reaches, [parted]).missing == range(4, 9)
    blind = Scored(tokens, 4, 8, reaches.logprobs)
    assert completed(reaches, [blind]).missing == range(4, 9)


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """`client, engine = await serve()`: the routes in front of a toy engine whose prefix cache works as vLLM's."""
    pytest.importorskip("fastapi", reason="fastapi comes with vLLM")
    from toy_engine import ToyEngine, client_of, routes_of, stand_ins

    monkeypatch.setenv(TOKEN_VARIABLE, "token")
    monkeypatch.setenv(ROOTS_VARIABLE, str(tmp_path))
    for name, module in stand_ins().items():
        monkeypatch.setitem(sys.modules, name, module)

    async def start(**options: Any) -> tuple[httpx.AsyncClient, Any]:
        toy = ToyEngine(tmp_path, **options)
        routes, app = await routes_of(toy)
        routes._state, routes._version = "clean", toy.version
        return client_of(app), toy

    return start


async def score(client: httpx.AsyncClient, sequences: list[np.ndarray], first: list[int]) -> list[np.ndarray]:
    body = {"sequences": [pack(tokens) for tokens in sequences], "first": first}
    answer = await client.post("/score", json=body)
    assert answer.status_code == 200, answer.text
    lines = {line["i"]: line for line in map(json.loads, answer.text.splitlines())}
    assert not [line for line in lines.values() if "error" in line]
    return [unpack_logprobs(lines[index]["logprobs"]) for index in range(len(sequences))]


def completions(toy: Any, count: int) -> tuple[list[np.ndarray], int]:
    prompt = np.arange(100, 117, dtype=np.int32)
    said = [toy.policy.sample(prompt, seed, 12)[0] for seed in range(count)]
    return [np.concatenate([prompt, tokens]) for tokens in said], len(prompt)


async def test_completions_of_one_prompt_compute_it_once(serve):
    client, toy = await serve()
    sequences, first = completions(toy, 40)
    scored = await score(client, sequences, [first] * 40)
    for tokens, logprobs in zip(sequences, scored, strict=True):
        np.testing.assert_array_equal(logprobs[first - 1 :], toy.policy.score(tokens)[first - 1 :])
        assert np.isnan(logprobs[: first - 1]).all()
    assert toy.computed < 0.6 * sum(map(len, sequences))


async def test_what_was_sampled_before_is_scored_again_and_not_taken_for_a_score(serve):
    client, toy = await serve()
    sequences, first = completions(toy, 12)
    for tokens in sequences:
        toy._keep(tokens)
    for tokens, logprobs in zip(sequences, await score(client, sequences, [first] * 12), strict=True):
        np.testing.assert_array_equal(logprobs[first - 1 :], toy.policy.score(tokens)[first - 1 :])


@pytest.mark.parametrize("chunked", [True, False])
async def test_nothing_is_shared_in_chunks_or_unless_asked_for(serve, chunked):
    """A prompt that is computed in chunks can be put off and found in the cache later, which no answer says."""
    client, toy = await serve(chunked=chunked)
    sequences, at = completions(toy, 6)
    for tokens, logprobs in zip(sequences, await score(client, sequences, [at] * 6 if chunked else []), strict=True):
        np.testing.assert_array_equal(logprobs[at - 1 :], toy.policy.score(tokens)[at - 1 :])
    assert toy.computed == sum(map(len, sequences))


@pytest.mark.parametrize("first", [[3], [0, 3], [3, -1]])
async def test_a_first_token_for_each_sequence_or_for_none(serve, first):
    client, toy = await serve()
    sequences, _ = completions(toy, 2)
    answer = await client.post("/score", json={"sequences": [pack(t) for t in sequences], "first": first})
    assert answer.status_code == 422
    assert "first must be empty" in answer.text
