"""The result of an episode: its token sequences with log-probabilities, its reward and metrics, or why it failed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import verifiers.v1 as vf

    from rlvr_landscape_plugin.serving.client import Completion

OK, TRUNCATED, ERROR = 0, 1, 2
"""Rollout status, as in the dataset: finished, cut by a length limit, failed."""

Rollouts = Sequence[Sequence["Rollout"]]
"""Episodes of a batch: [task][rollout]."""


def sampling_seed(seed: int, stream: str, prompt: int, rollout: int, turn: int) -> int:
    """The sampler's seed of one turn, in [0, 2^63): a pure function of the arguments, which say which turn it is.

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
    """The result of one episode."""

    reward: float
    """Sum of the task's weighted rewards; NaN when `status` is ERROR."""
    status: int
    segments: list[Segment]
    error: str | None = None
    """Why it failed: type and message of the exception; None unless `status` is ERROR."""
    metrics: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Every metric that the taskset recorded, by name; empty when `status` is ERROR."""
    paid: bool = True
    """Whether the taskset recorded any reward at all, be it 0."""
    trace: vf.Trace | None = None
    """The verifiers trace, when asked to keep it."""

    @property
    def format_failure(self) -> float | None:
        """The metric of that name, where the taskset has one: share of replies without the asked-for format."""
        return self.metrics.get("format_failure")

    @property
    def completion_tokens(self) -> int:
        """Sampled tokens over all turns."""
        return sum(int(segment.sampled.sum()) for segment in self.segments)

    @property
    def sampled_logprobs(self) -> np.ndarray:
        """float32, all sampled tokens in order."""
        parts = [segment.logprobs for segment in self.segments]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


@dataclass(frozen=True)
class Failures:
    """How many episodes of a batch failed, and why the first of them failed."""

    failed: int
    episodes: int
    reason: str
    """Empty when none failed."""

    @classmethod
    def of(cls, rollouts: Rollouts) -> Failures:
        """Count the failures of a batch; the first is that of the lowest task, then of the lowest rollout."""
        flat = [rollout for row in rollouts for rollout in row]
        failed = [rollout for rollout in flat if rollout.status == ERROR]
        return cls(len(failed), len(flat), (failed[0].error or "no reason given") if failed else "")

    def __str__(self) -> str:
        first = f"; the first one: {self.reason}" if self.failed else ""
        return f"{self.failed} of {self.episodes} episodes failed{first}"


def segments_of(trace: vf.Trace) -> list[Segment]:
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


def segments_of_calls(calls: Sequence[tuple[list[int], Completion]]) -> list[Segment]:
    """The turns of an episode, (prompt, what was sampled) in their order, as sequences: as `segments_of` a trace.

    A turn whose prompt goes on from everything before it extends that sequence, any other begins one. Unlike a trace,
    this holds what was sampled also where a hook replaced the reply.
    """
    sequences: list[tuple[list[int], list[bool], list[np.ndarray]]] = []
    for prompt, completion in calls:
        before = next((s for s in reversed(sequences) if prompt[: len(s[0])] == s[0]), None)
        if before is None:
            before = ([], [], [])
            sequences.append(before)
        tokens, sampled, logprobs = before
        added = prompt[len(tokens) :]
        tokens += [*added, *completion.tokens.tolist()]
        sampled += [False] * len(added) + [True] * len(completion.tokens)
        logprobs.append(completion.logprobs)
    return [
        Segment(np.asarray(tokens, np.int32), np.asarray(sampled, bool), np.concatenate(logprobs).astype(np.float32))
        for tokens, sampled, logprobs in sequences
        if any(sampled)
    ]
