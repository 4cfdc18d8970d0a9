"""The checkpoint's own completions: what every moved policy is compared with, in memory and as a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xarray as xr
from rlvr_landscape_analysis.schema import BASE_ROLLOUT, PROMPT, ROLLOUT

from rlvr_landscape_plugin.episodes import Failures, Segment
from rlvr_landscape_plugin.errors import StoreError

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

    from rlvr_landscape_plugin.serving.client import LandscapeClient

DIMS = (PROMPT, ROLLOUT)
OWN_DIMS = (PROMPT, BASE_ROLLOUT)
"""Of the checkpoint's own completions, where it has another number of rollouts than the points."""


class Completion(NamedTuple):
    """One completion of the checkpoint, without what depends on the others."""

    reward: float
    status: int
    segments: list[Segment]
    logprobs: np.ndarray
    """As in `BaseBatch.logprobs`."""

    def is_same(self, other: Completion) -> bool:
        """Whether these are the same tokens with the same log-probabilities."""
        pairs = zip(self.segments, other.segments, strict=False)
        return (
            len(self.segments) == len(other.segments)
            and all(np.array_equal(mine.tokens, its.tokens) for mine, its in pairs)
            and np.array_equal(self.logprobs, other.logprobs)
        )


@dataclass
class BaseBatch:
    """The checkpoint's own completions, with everything a moved policy is compared to."""

    reward: np.ndarray
    """float64 (prompt, rollout); NaN where the rollout failed."""
    status: np.ndarray
    """int8 (prompt, rollout)."""
    advantage: np.ndarray
    """float64 (prompt, rollout)."""
    segments: list[list[list[Segment]]]
    """[prompt][rollout] → token sequences."""
    logprobs: list[list[np.ndarray]]
    """[prompt][rollout] → log π_checkpoint of its sampled tokens, re-scored at the origin, nat."""
    weight: np.ndarray | None = None
    """float64 (prompt, rollout): each completion's weight in J, NaN where the rollout failed; None for the usual
    objective, whose weight is the number of tokens."""
    apart: bool = False
    """Whether its rollouts have a dimension of their own, because points have another number of them."""
    failures: Failures | None = None
    """Its failed episodes; None if it was read from the disk."""

    @property
    def dims(self) -> tuple[str, str]:
        """Dimensions of a value per completion."""
        return OWN_DIMS if self.apart else DIMS

    @property
    def tokens(self) -> np.ndarray:
        """int32 (prompt, rollout): sampled tokens."""
        return np.array([[len(cell) for cell in row] for row in self.logprobs], dtype=np.int32)

    def part(self, prompts: range) -> BaseBatch:
        """The base batch of some consecutive prompts."""
        some = slice(prompts.start, prompts.stop)
        return replace(
            self,
            reward=self.reward[some],
            status=self.status[some],
            advantage=self.advantage[some],
            segments=self.segments[some],
            logprobs=self.logprobs[some],
            weight=None if self.weight is None else self.weight[some],
        )

    def cell(self, prompt: int, rollout: int) -> Completion:
        """One completion."""
        at = prompt, rollout
        return Completion(
            float(self.reward[at]), int(self.status[at]), self.segments[prompt][rollout], self.logprobs[prompt][rollout]
        )

    def to_dataset(self) -> xr.Dataset:
        """Everything, tokens included, as a dataset that `from_dataset` reads back bit for bit."""
        cells = [(p, r) for p in range(self.reward.shape[0]) for r in range(self.reward.shape[1])]
        flat = [(p, r, segment) for p, r in cells for segment in self.segments[p][r]]
        sampled = np.array([[_sum(part.logprobs for part in cell) for cell in row] for row in self.segments])
        rescored = np.array([[float(np.sum(cell, dtype=np.float64)) for cell in row] for row in self.logprobs])

        def join(parts: Sequence[np.ndarray], dtype: DTypeLike) -> np.ndarray:
            return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)

        dims = self.dims
        return xr.Dataset(
            {
                "base_reward": (dims, self.reward),
                "base_status": (dims, self.status),
                "base_advantage": (dims, self.advantage),
                "base_tokens": (dims, self.tokens),
                "base_logprob": (dims, rescored),
                "base_sampled_logprob": (dims, sampled),
                **({} if self.weight is None else {"surrogate_weight": (dims, self.weight)}),
                "segment_prompt": ("segment", np.array([p for p, _, _ in flat], np.int32)),
                "segment_rollout": ("segment", np.array([r for _, r, _ in flat], np.int32)),
                "segment_length": ("segment", np.array([len(s.tokens) for _, _, s in flat], np.int32)),
                "token_id": ("token", join([s.tokens for _, _, s in flat], np.int32)),
                "token_sampled": ("token", join([s.sampled for _, _, s in flat], np.int8)),
                "sampled_logprob": ("sampled_token", join([s.logprobs for _, _, s in flat], np.float32)),
                "rescored_logprob": (
                    "sampled_token",
                    join([self.logprobs[p][r] for p, r in cells if self.segments[p][r]], np.float32),
                ),
            }
        )

    @classmethod
    def from_dataset(cls, data: xr.Dataset) -> BaseBatch:
        """The inverse of `to_dataset`."""
        prompts, rollouts = data["base_reward"].shape
        segments: list[list[list[Segment]]] = [[[] for _ in range(rollouts)] for _ in range(prompts)]
        logprobs: list[list[list[np.ndarray]]] = [[[] for _ in range(rollouts)] for _ in range(prompts)]
        ids, flags = data["token_id"].values, data["token_sampled"].values.astype(bool)
        drawn, rescored = data["sampled_logprob"].values, data["rescored_logprob"].values
        token = sampled = 0
        for p, r, length in zip(
            data["segment_prompt"].values, data["segment_rollout"].values, data["segment_length"].values, strict=True
        ):
            mask = flags[token : token + length]
            count = int(mask.sum())
            segments[p][r].append(Segment(ids[token : token + length], mask, drawn[sampled : sampled + count]))
            logprobs[p][r].append(rescored[sampled : sampled + count])
            token, sampled = token + int(length), sampled + count
        return cls(
            data["base_reward"].values.astype(np.float64),
            data["base_status"].values.astype(np.int8),
            data["base_advantage"].values.astype(np.float64),
            segments,
            [[np.concatenate(cell) if cell else np.zeros(0, np.float32) for cell in row] for row in logprobs],
            data["surrogate_weight"].values.astype(np.float64) if "surrogate_weight" in data else None,
            apart=data["base_reward"].dims == OWN_DIMS,
        )


def known_completions(batches: Iterable[BaseBatch]) -> dict[tuple[int, int], Completion]:
    """(prompt, rollout) → the completion, of all batches together. Raises `StoreError` where two batches differ."""
    found: dict[tuple[int, int], Completion] = {}
    for batch in batches:
        for prompt, rollout in np.ndindex(batch.reward.shape):
            cell = batch.cell(prompt, rollout)
            if not found.setdefault((prompt, rollout), cell).is_same(cell):
                raise StoreError(
                    f"two base batches of one journal differ in completion {rollout} of task {prompt}: two sweeps that "
                    "grew it ran at once; choose another output directory"
                )
    return found


def _sum(parts: Iterable[np.ndarray]) -> float:
    return float(sum(float(np.sum(part, dtype=np.float64)) for part in parts))


async def score_segments(
    client: LandscapeClient, segments: list[list[list[Segment]]], share: bool = True
) -> list[list[np.ndarray]]:
    """log π of every sampled token under the server's present weights: [prompt][rollout] → float32, nat.

    `share`: what comes before a completion's first sampled token may be computed once for all that begin with it.
    """
    places = [(p, r, s) for p, row in enumerate(segments) for r, cell in enumerate(row) for s in range(len(cell))]
    # A segment in which nothing was sampled needs only to be answered.
    first = [max(1, int(np.argmax(segments[p][r][s].sampled))) for p, r, s in places] if share else []
    scored = await client.score([segments[p][r][s].tokens for p, r, s in places], first)
    parts: list[list[list[np.ndarray]]] = [[[] for _ in row] for row in segments]
    for (p, r, s), logprobs in zip(places, scored, strict=True):
        # logprobs[t] belongs to token t + 1; the first token of a sequence is never sampled.
        parts[p][r].append(logprobs[segments[p][r][s].sampled[1:]])
    return [[np.concatenate(cell) if cell else np.zeros(0, np.float32) for cell in row] for row in parts]


async def rescored_dataset(client: LandscapeClient, base: BaseBatch) -> xr.Dataset:
    """The base batch scored a second time: how far two passes over the same weights differ, per completion.

    `recheck_logprob`: Σ log π, nat. `recheck_max_difference`: the largest |difference| of one token's log π, nat.
    """
    again = await score_segments(client, base.segments)
    pairs = [list(zip(*rows, strict=True)) for rows in zip(again, base.logprobs, strict=True)]
    return xr.Dataset(
        {
            "recheck_logprob": (
                base.dims,
                np.array([[float(np.sum(new, dtype=np.float64)) for new, _ in r] for r in pairs]),
            ),
            "recheck_max_difference": (
                base.dims,
                np.array([[float(np.max(np.abs(new - old), initial=0.0)) for new, old in r] for r in pairs]),
            ),
        }
    )
