"""Episodes → what TRL's rollout function returns, and what is reported about them. NumPy only.

TRL knows a prompt and a completion only. An episode of several turns is one sequence: its prompt ends before the
policy's first token, everything after it is the completion, and `env_mask` is 0 for the tokens of the environment in
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlvr_landscape_plugin.episodes import ERROR, TRUNCATED, Rollout
from rlvr_landscape_plugin.errors import TasksetError
from rlvr_landscape_plugin.files import JsonObject


@dataclass(frozen=True)
class TrainerBatch:
    """One batch of groups as TRL's columns, one entry per episode, the episodes of a task next to each other."""

    prompt_ids: list[list[int]]
    """Tokens before the policy's first."""
    completion_ids: list[list[int]]
    """All tokens from there on, including those of the environment."""
    env_mask: list[list[int]]
    """1 where the policy sampled the token."""
    logprobs: list[list[float]]
    """log π of the sampled tokens as the sampler saw them, nat; 0 at the environment's."""
    rewards: np.ndarray
    """float64 (task, rollout); NaN where the episode failed."""


def to_batch(groups: Sequence[Sequence[Rollout]], filler: int) -> TrainerBatch:
    """The batch of `groups[task][rollout]`.

    An episode that failed before the policy's first token still needs its row: one token `filler`, masked out. Raises
    `TasksetError` for an episode that branched into several sequences, which one completion cannot hold.
    """
    rows = [_row(rollout, filler) for group in groups for rollout in group]
    prompt_ids, completion_ids, env_mask, logprobs = (list(column) for column in zip(*rows, strict=True))
    rewards = np.array([[rollout.reward for rollout in group] for group in groups], dtype=np.float64)
    return TrainerBatch(prompt_ids, completion_ids, env_mask, logprobs, rewards)


def _row(rollout: Rollout, filler: int) -> tuple[list[int], list[int], list[int], list[float]]:
    if len(rollout.segments) > 1:
        raise TasksetError(
            f"an episode of this taskset branched into {len(rollout.segments)} token sequences; training needs "
            "episodes that only ever append to their conversation"
        )
    if not rollout.segments:
        return [filler], [filler], [0], [0.0]
    segment = rollout.segments[0]
    start = int(np.argmax(segment.sampled))
    sampled = segment.sampled[start:]
    if rollout.status == ERROR:
        # The reward of a failed episode is unknown, so its tokens are masked and do not count.
        sampled = np.zeros_like(sampled)
    logprobs = np.zeros(len(sampled), np.float32)
    logprobs[segment.sampled[start:]] = segment.logprobs
    return (
        segment.tokens[:start].tolist(),
        segment.tokens[start:].tolist(),
        sampled.astype(int).tolist(),
        logprobs.tolist(),
    )


def batch_metrics(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """What the sampler saw: `reward` and its standard deviation over all episodes and, as `signal`, the share of groups
    whose rewards differ; `response_tokens` per episode; shares of `truncated` and `failed` episodes."""
    rewards = np.array([[rollout.reward for rollout in group] for group in groups], dtype=np.float64)
    flat = [rollout for group in groups for rollout in group]
    seen = np.isfinite(rewards)
    if not seen.any():
        first = next((rollout.error for rollout in flat if rollout.error), "no reason given")
        raise TasksetError(f"every one of {len(flat)} episodes failed: {first}")
    spread = [row[ok].max() > row[ok].min() if ok.any() else False for row, ok in zip(rewards, seen, strict=True)]
    return {
        "reward": float(rewards[seen].mean()),
        "reward_std": float(rewards[seen].std()),
        "signal": float(np.mean(spread)),
        "response_tokens": float(np.mean([rollout.completion_tokens for rollout in flat])),
        "truncated": float(np.mean([rollout.status == TRUNCATED for rollout in flat])),
        "failed": float(np.mean([rollout.status == ERROR for rollout in flat])),
    }


def pass_at_k(passed: np.ndarray, k: int) -> np.ndarray:
    """Unbiased pass@k per task from `passed` (task, rollout; bool), float64; ValueError unless 1 ≤ k ≤ rollouts."""
    from rlvr_landscape_analysis.landscape import unbiased_pass_at_k

    n = passed.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} rollouts per task")
    return unbiased_pass_at_k(np.full(len(passed), n), passed.sum(axis=1), k)


def evaluation_metrics(
    groups: Sequence[Sequence[Rollout]], threshold: float, start: Sequence[float | None] | None
) -> JsonObject:
    """An evaluation on held-out tasks: `reward` with its standard error over tasks, pass@1 and pass@n, entropy, length.

    `task_rewards` are the means per task. Given those of step 0 as `start`, `gain` is the mean difference to them and
    `gain_se` its standard error, paired by task. A failed episode counts in no mean; a task without any is null.
    """
    rewards = np.array([[rollout.reward for rollout in group] for group in groups], dtype=np.float64)
    seen = np.isfinite(rewards)
    if not seen.any():
        raise TasksetError("every held-out episode failed")
    counts = seen.sum(axis=1)
    means = np.where(counts > 0, np.where(seen, rewards, 0).sum(axis=1) / np.maximum(counts, 1), np.nan)
    n = rewards.shape[1]
    passed = seen & (np.where(seen, rewards, -np.inf) >= threshold)
    surprisal = np.concatenate([rollout.sampled_logprobs for group in groups for rollout in group])
    flat = [rollout for group in groups for rollout in group]
    result: JsonObject = {
        "reward": float(np.nanmean(means)),
        "reward_se": _standard_error(means),
        "pass_1": float(pass_at_k(passed, 1).mean()),
        f"pass_{n}": float(pass_at_k(passed, n).mean()),
        "entropy": float(-surprisal.mean(dtype=np.float64)),
        "response_tokens": float(np.mean([rollout.completion_tokens for rollout in flat])),
        "failed": float(np.mean(~seen)),
        "task_rewards": [None if np.isnan(mean) else float(mean) for mean in means],
    }
    if start is not None:
        before = np.array([np.nan if value is None else value for value in start], dtype=np.float64)
        result["gain"] = float(np.nanmean(means - before))
        result["gain_se"] = _standard_error(means - before)
    return result


def _standard_error(values: np.ndarray) -> float | None:
    values = values[np.isfinite(values)]
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
