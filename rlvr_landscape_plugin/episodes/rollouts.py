"""What an episode leaves: its token sequences, log-probabilities, reward and status. NumPy only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

OK, TRUNCATED, ERROR = 0, 1, 2
"""Rollout status, as in the dataset: finished, cut by a length limit, failed."""


def sampling_seed(seed: int, stream: str, prompt: int, rollout: int, turn: int) -> int:
    """The sampler's seed of one turn, in [0, 2^63): a pure function of where the turn stands.

    The same at every grid point, so that neighbouring policies share their randomness (common random numbers).
    """
    text = f"{seed}/{stream}/{prompt}/{rollout}/{turn}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


@dataclass
class Segment:
    """One token sequence of a rollout and which of its tokens the policy sampled."""

    tokens: np.ndarray
    """int32, whole sequence."""
    sampled: np.ndarray
    """bool, same length."""
    logprobs: np.ndarray
    """float32, log π of the sampled tokens as the sampler saw them, nat, length `sampled.sum()`."""


@dataclass
class Rollout:
    """What remains of one episode."""

    reward: float
    """Sum of the task's weighted rewards; NaN when `status` is ERROR."""
    status: int
    segments: list[Segment]
    error: str | None = None
    format_failure: float | None = None
    """The taskset's metric of that name, where it has one: share of replies without the asked-for format."""
    trace: Any = None
    """The verifiers trace, when asked to keep it."""

    @property
    def completion_tokens(self) -> int:
        """Sampled tokens over all turns."""
        return sum(int(segment.sampled.sum()) for segment in self.segments)

    @property
    def sampled_logprobs(self) -> np.ndarray:
        """float32, all sampled tokens in order."""
        parts = [segment.logprobs for segment in self.segments]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def segments_of(trace: Any) -> list[Segment]:
    """Each branch as one token sequence; a sampled token shared by branches counts in the first only."""
    segments, counted = [], set()
    for branch in trace.branches:
        tokens: list[int] = []
        sampled: list[bool] = []
        logprobs: list[float] = []
        for node in branch.nodes:
            first = id(node) not in counted
            counted.add(id(node))
            tokens += node.token_ids
            sampled += node.mask if first else [False] * len(node.mask)
            logprobs += node.logprobs if first else []
        if any(sampled):
            segments.append(
                Segment(np.asarray(tokens, np.int32), np.asarray(sampled, bool), np.asarray(logprobs, np.float32))
            )
    return segments
