"""Scores of sequences whose beginnings are shared: vLLM computes a prompt once for all its completions.

A score asks for log-probabilities from some token on (`first`), usually the first sampled one, so what comes before may
be taken from the prefix cache, where the engine then computes no log-probability. vLLM takes the longest beginning that
it has, which may reach beyond `first`: into a completion that begins as another one. The tokens that are missing then
were computed for that other one, under the same weights and after the same tokens, and are taken from there
(`completed`); whatever is in no sequence of the call must be scored again without the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class Scored:
    """One sequence, and what the engine computed for it."""

    tokens: np.ndarray
    """The whole sequence, int32."""
    first: int
    """The first token whose log π is asked for."""
    cached: int
    """Tokens at the beginning that came from the cache."""
    logprobs: np.ndarray
    """log π of `tokens[1:]`, float32, nat. That of token t means nothing unless t > `cached`."""

    @property
    def beginning(self) -> bytes:
        """What comes before `first`; only sequences with the same one are asked for what is missing."""
        return self.tokens[: self.first].tobytes()

    @property
    def missing(self) -> range:
        """Tokens whose log π is asked for and was not computed; token t needs the output of token t − 1."""
        return range(self.first, min(self.cached + 1, len(self.tokens)))

    def answer(self) -> np.ndarray:
        """log π of `tokens[1:]`, float32; NaN for tokens that were not asked for."""
        answer = self.logprobs.copy()
        answer[: self.first - 1] = np.nan
        return answer


def completed(one: Scored, others: Sequence[Scored]) -> Scored:
    """`one` with its missing tokens taken from others of its call; as it is where one of them is in none."""
    logprobs, known = one.logprobs.copy(), np.zeros(len(one.tokens), dtype=bool)
    for other in others:
        length = min(len(one.tokens), len(other.tokens))
        differ = np.flatnonzero(one.tokens[:length] != other.tokens[:length])
        alike = int(differ[0]) if len(differ) else length
        begin, end = max(other.cached + 1, one.first), min(alike, one.cached + 1)
        if begin < end:
            logprobs[begin - 1 : end - 1] = other.logprobs[begin - 1 : end - 1]
            known[begin:end] = True
    if not known[one.missing.start : one.missing.stop].all():
        return one
    return Scored(one.tokens, one.first, one.first - 1, logprobs)
