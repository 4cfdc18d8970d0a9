"""Rollouts that no policy sampled, and what gives them to a trainer in place of a server."""

from __future__ import annotations

import numpy as np

from rlvr_landscape_plugin.episodes import ERROR, OK, Rollout, Segment


def segment(*parts: tuple[bool, list[int]], first: float = -0.25) -> Segment:
    """Tokens of a conversation from (sampled, ids) parts; log-probabilities count down from `first`."""
    tokens = np.array([token for _, ids in parts for token in ids], np.int32)
    sampled = np.array([said for said, ids in parts for _ in ids], bool)
    return Segment(tokens, sampled, (first - np.arange(sampled.sum())).astype(np.float32))


TWO_TURNS = segment((False, [1, 2, 3]), (True, [10, 11]), (False, [4, 5]), (True, [12]))


def rollout(reward: float = 0.5, status: int = OK, *segments: Segment) -> Rollout:
    return Rollout(reward, status, list(segments or (TWO_TURNS,)), "it broke" if status == ERROR else None)


class Sampler:
    """Stands where the server does: random tokens, rewards that fail once, and a record of what was asked."""

    def __init__(self) -> None:
        self.pushed: list[int] = []
        self.asked: list[tuple[str, list[int]]] = []

    def push(self, save, step: int) -> None:
        self.pushed.append(step)

    def roll(self, practice, indices, rollouts, stream, progress):
        self.asked.append((stream, list(indices)))
        rng = np.random.default_rng(len(self.asked))

        def one(task: int, number: int) -> Rollout:
            progress()
            if (task, number) == (1, 0):
                return Rollout(float("nan"), ERROR, [], "it broke")
            ids = [rng.integers(3, 2000, size=rng.integers(1, 6)).tolist() for _ in range(4)]
            return rollout(float(rng.random()), OK, segment(*zip((False, True) * 2, ids, strict=True), first=-7.0))

        return [[one(index, number) for number in range(rollouts)] for index in indices]
