"""One grid point: move, score, sample → arrays with dims (prompt, rollout).

Definitions are those of docs/measurement.md: rewards come from fresh rollouts of the moved policy; KL and surrogate
come from the checkpoint's own completions, scored under the moved weights in one teacher-forced pass. All sums over
tokens are taken in float64. Nothing here depends on designs, files or progress bars.

There are two ways to compute the surrogate. GRPO's clipped objective, the default, is summed completion by completion
(`token_scores`). Any other objective of `objectives.OBJECTIVES` is computed for all completions at once, because its
terms may depend on the batch; then the base batch has a weight per completion, and J = Σ surrogate / Σ
surrogate_weight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from rlvr_landscape_analysis.schema import metric_name

from rlvr_landscape_plugin.config import SurrogateConfig
from rlvr_landscape_plugin.episodes import ERROR, TRUNCATED, EpisodeRunner, Failures, Rollout, sampling_seed
from rlvr_landscape_plugin.errors import ConfigurationError, TasksetError
from rlvr_landscape_plugin.objectives import Completions, Objective, clipped_term, group_advantages, pad
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.store import Cells, Extent, missing
from rlvr_landscape_plugin.sweep.base_batch import (
    DIMS,
    BaseBatch,
    Completion,
    known_completions,
    rescored_dataset,
    score_segments,
)

if TYPE_CHECKING:
    import verifiers.v1 as vf
    from numpy.typing import DTypeLike

__all__ = [
    "BaseBatch",
    "ObjectiveScores",
    "PointMeter",
    "TokenScores",
    "check_failures",
    "objective_scores",
    "rescored_dataset",
    "score_segments",
    "token_scores",
]


@dataclass(frozen=True)
class TokenScores:
    """What one completion says about a moved policy; sums over its sampled tokens."""

    kl_k1: float
    """Σ −log ρ, nat."""
    kl_k3: float
    """Σ (ρ − 1 − log ρ), nat."""
    surrogate: float
    """Σ min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A)."""
    clip_fraction: float
    """Share of tokens where the clip binds; 0 without tokens."""


def token_scores(moved: np.ndarray, checkpoint: np.ndarray, advantage: float, low: float, high: float) -> TokenScores:
    """Estimators from the log-probabilities of one checkpoint completion under both policies (1-D, nat).

    ρ = π_moved / π_checkpoint. k1 and k3: Schulman 2020; the surrogate: GRPO's clipped objective without its KL term
    (`objectives.clipped_term`).
    """
    log_ratio = np.asarray(moved, dtype=np.float64) - np.asarray(checkpoint, dtype=np.float64)
    with np.errstate(over="ignore"):
        ratio = np.exp(log_ratio)
    terms, bound = clipped_term(log_ratio, advantage, low, high)
    return TokenScores(
        kl_k1=float(-log_ratio.sum()),
        kl_k3=float((ratio - 1.0 - log_ratio).sum()),
        surrogate=float(terms.sum()),
        clip_fraction=float(np.mean(bound)) if len(ratio) else 0.0,
    )


@dataclass
class PointMeter:
    """Measures points of one snapshot and slice on one server."""

    client: LandscapeClient
    runner: EpisodeRunner
    tasks: Sequence[vf.Task]
    rollouts: int
    seed: int
    surrogate: SurrogateConfig
    base_rollouts: int | None = None
    """Rollouts per task of the checkpoint's own batch, which then has a dimension for them; None: `rollouts`."""

    async def base(
        self, progress: Callable[[], None], prompts: range | None = None, earlier: Sequence[BaseBatch] = ()
    ) -> BaseBatch:
        """Sample and re-score the checkpoint's own batch, on some or all tasks; the server must stand at the origin.

        `earlier`: batches of all tasks with fewer tasks or completions, whose completions are taken over. Advantages
        and weights are always those of the whole new batch. Raises `TasksetError` where every episode failed, or none
        recorded a reward.
        """
        completions = self.rollouts if self.base_rollouts is None else self.base_rollouts
        prompts = prompts or range(len(self.tasks))
        cells = known_completions(earlier)
        extent = Extent(len(prompts), completions, 0)
        known = [Cells(range(batch.reward.shape[0]), range(batch.reward.shape[1]), 0) for batch in earlier]
        new: list[list[Rollout]] = []
        for part in missing(known, extent):
            tasks = range(prompts.start + part.tasks.start, prompts.start + part.tasks.stop)
            batch = await self._sample("base", tasks, part.rollouts, progress)
            # Sampling has left their beginnings in the prefix cache, further than the first sampled token.
            segments = [[cell.segments for cell in row] for row in batch]
            scored = await score_segments(self.client, segments, share=False)
            for p, row in zip(part.tasks, range(len(batch)), strict=True):
                for r, cell, logprobs in zip(part.rollouts, batch[row], scored[row], strict=True):
                    cells[p, r] = Completion(cell.reward, cell.status, cell.segments, logprobs)
            new += batch
        rows = [[cells[p, r] for r in range(completions)] for p in range(len(prompts))]
        if all(cell.status == ERROR for row in rows for cell in row):
            check_failures(new, "of the checkpoint's own batch")
        if not earlier and not any(cell.paid for row in new for cell in row if cell.status != ERROR):
            raise TasksetError(
                "the taskset recorded no reward in any episode of the checkpoint's own batch; a landscape would be 0 "
                "everywhere. Give its tasks a @vf.reward, or record one in run() or finalize() of its environment"
            )
        reward = np.array([[cell.reward for cell in row] for row in rows], dtype=np.float64)
        base = BaseBatch(
            reward,
            np.array([[cell.status for cell in row] for row in rows], dtype=np.int8),
            group_advantages(reward, self.surrogate.advantage_scale, self.surrogate.advantage_eps),
            [[cell.segments for cell in row] for row in rows],
            [[cell.logprobs for cell in row] for row in rows],
            apart=self.base_rollouts is not None,
            failures=Failures.of(new),
        )
        if not self.surrogate.is_usual:
            base.weight = objective_scores(base, base.logprobs, self.surrogate.trained, self.seed).weight
        return base

    async def point(
        self,
        base: BaseBatch,
        alpha: float,
        beta: float,
        progress: Callable[[], None],
        prompts: range | None = None,
        rollouts: range | None = None,
        score: bool = True,
    ) -> tuple[xr.Dataset, list[list[Rollout]]]:
        """Move to (α, β), roll out and score. The dataset has dims (prompt, rollout) and per-point scalars.

        `base` is the base batch of all tasks. `prompts` and `rollouts`: which of them to measure (default: all); what
        they sample does not depend on which others are measured with them. `score`: whether the completions of these
        tasks are scored; they have a dimension of their own unless all rollouts are measured. At the origin the scores
        are those of the base batch, so that ρ = 1 holds there exactly. Where episodes failed, the attributes
        `failed_episodes` and `first_failure` say how many and why. Raises `TasksetError` where the whole point failed.
        """
        if prompts is None:
            prompts = range(len(self.tasks))
        every = range(self.rollouts)
        rollouts = every if rollouts is None else rollouts
        whole = len(prompts) == len(base.reward)
        base = base.part(prompts)
        base.apart = base.apart or rollouts != every
        clock = [time.perf_counter()]
        move = await self.client.move(alpha, beta)
        clock.append(time.perf_counter())
        # Before sampling: a score takes prompts from the prefix cache, and has to do without what was sampled into it.
        scores: dict[str, tuple[tuple[str, str], np.ndarray]] = {}
        if score:
            origin = alpha == 0 and beta == 0
            scored = base.logprobs if origin else await score_segments(self.client, base.segments)
            scores = self._scores(base, scored, whole)
        clock.append(time.perf_counter())
        batch = await self._sample("fresh", prompts, rollouts, progress) if rollouts else []
        clock.append(time.perf_counter())
        # A few episodes may well fail all together, and would not end a sweep that measures them with the others.
        failures = (
            check_failures(batch, f"at ({alpha:g}, {beta:g})") if whole and rollouts == every else Failures.of(batch)
        )
        data = xr.Dataset(self._fresh(batch)).assign(scores)
        for name, seconds in zip(("seconds_move", "seconds_score", "seconds_sample"), np.diff(clock), strict=True):
            data[name] = ((), float(seconds))
        data["realised_step"] = ((), move.realised_step)
        data.attrs["weight_version"] = move.version
        if failures.failed:
            data.attrs |= {"failed_episodes": failures.failed, "first_failure": failures.reason}
        return data, batch

    async def _sample(
        self, stream: str, prompts: range, rollouts: range, progress: Callable[[], None]
    ) -> list[list[Rollout]]:
        def seed(prompt: int, rollout: int, turn: int) -> int:
            return sampling_seed(self.seed, stream, prompts[prompt], rollouts[rollout], turn)

        return await self.runner.batch(self.tasks[prompts.start : prompts.stop], len(rollouts), seed, progress)

    def _scores(
        self, base: BaseBatch, scored: list[list[np.ndarray]], whole: bool
    ) -> dict[str, tuple[tuple[str, str], np.ndarray]]:
        """What the completions say, under their log π after the move (`scored`)."""
        low, high = self.surrogate.clip_low, self.surrogate.clip_high
        names = ("kl_k1", "kl_k3", "surrogate", "clip_fraction")
        scores = {name: np.full(base.reward.shape, np.nan) for name in names}
        for cell in np.ndindex(base.reward.shape):
            if base.status[cell] != ERROR:
                p, r = cell
                result = token_scores(scored[p][r], base.logprobs[p][r], float(base.advantage[cell]), low, high)
                for name in names:
                    scores[name][cell] = getattr(result, name)
        if not self.surrogate.is_usual:
            objective = self.surrogate.trained
            if objective.of_batch and not whole:
                raise ConfigurationError(
                    f"surrogate.objective = {objective.name!r} depends on the whole batch and cannot be measured on "
                    "some of the tasks; choose another objective, or measure all tasks at once"
                )
            drawn = objective_scores(base, scored, objective, self.seed)
            scores["surrogate"], scores["clip_fraction"] = drawn.surrogate, drawn.clip_fraction

        return {name: (base.dims, values) for name, values in scores.items()}

    def _fresh(self, batch: Sequence[Sequence[Rollout]]) -> dict[str, tuple[tuple[str, str], np.ndarray]]:
        """What the fresh rollouts say; empty where there are none."""

        def fresh(value: Callable[[Rollout], float], dtype: DTypeLike) -> tuple[tuple[str, str], np.ndarray]:
            return DIMS, np.array([[value(cell) for cell in row] for row in batch], dtype=dtype)

        if not batch:
            return {}
        return {
            "reward": fresh(lambda cell: cell.reward, np.float64),
            "status": fresh(lambda cell: cell.status, np.int8),
            "truncated": fresh(lambda cell: cell.status == TRUNCATED, np.int8),
            "completion_tokens": fresh(lambda cell: cell.completion_tokens, np.int32),
            "entropy": fresh(_mean_surprisal, np.float64),
            **_metrics(batch),
        }


def _metrics(batch: Sequence[Sequence[Rollout]]) -> dict[str, tuple[tuple[str, str], np.ndarray]]:
    """Every metric that a rollout of the batch recorded, as a variable; NaN for a rollout without it.

    Raises `TasksetError` for two metrics whose variables would have one name.
    """
    found: dict[str, str] = {}
    for metric in sorted({metric for row in batch for cell in row for metric in cell.metrics}):
        if (other := found.setdefault(metric_name(metric), metric)) != metric:
            raise TasksetError(
                f"the taskset's metrics {other!r} and {metric!r} would both be the variable {metric_name(metric)!r}; "
                "rename one of them"
            )
    missing = float("nan")
    return {
        name: (DIMS, np.array([[cell.metrics.get(metric, missing) for cell in row] for row in batch], np.float64))
        for name, metric in found.items()
    }


@dataclass(frozen=True)
class ObjectiveScores:
    """What an objective makes of every completion of the base batch; arrays (prompt, rollout), NaN for a failed one."""

    surrogate: np.ndarray
    """float64; J = Σ surrogate / Σ weight."""
    weight: np.ndarray
    """float64, the same at every point."""
    clip_fraction: np.ndarray
    """float64, share of its tokens whose gradient the objective's clip removes; 0 without tokens."""


def objective_scores(
    base: BaseBatch, scored: Sequence[Sequence[np.ndarray]], objective: Objective, seed: int
) -> ObjectiveScores:
    """Compute `objective` for the base batch under moved weights, whose log π is `scored` ([prompt][rollout], nat).

    `seed` is for objectives that draw tokens at random; they draw the same ones at every point. A completion with a
    log-probability that is not finite, which happens far from the origin, is missing.
    """
    nothing = np.full(base.reward.shape, np.nan)
    surrogate, weight, clip_fraction = nothing, nothing.copy(), nothing.copy()
    cells = [cell for cell in np.ndindex(base.reward.shape) if base.status[cell] != ERROR]
    if not cells:
        return ObjectiveScores(surrogate, weight, clip_fraction)
    old, mask = pad([np.asarray(base.logprobs[p][r], np.float64) for p, r in cells])
    new, _ = pad([np.asarray(scored[p][r], np.float64) for p, r in cells])
    broken = (mask & ~np.isfinite(new)).any(axis=1)
    mask = mask & ~broken[:, None]
    advantages = np.array([base.advantage[cell] for cell in cells], np.float64)
    feeds = {"logprobs": new, "old_logprobs": old, "advantages": advantages, "mask": mask}
    if "generator" in objective.needs:
        feeds["generator"] = np.random.default_rng(seed).random(mask.shape)
    result: Completions = objective.per_completion(**feeds)
    bound = (result.bound & mask).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
    for row, cell in enumerate(cells):
        if not broken[row]:
            surrogate[cell], weight[cell], clip_fraction[cell] = result.value[row], result.weight[row], bound[row]
    return ObjectiveScores(surrogate, weight, clip_fraction)


def check_failures(batch: Sequence[Sequence[Rollout]], where: str) -> Failures:
    """The failed episodes of a batch. Raises `TasksetError` with the first reason where every episode did."""
    failures = Failures.of(batch)
    if failures.failed == failures.episodes:
        raise TasksetError(
            f"every one of {failures.episodes} episodes {where} failed; the first one: {failures.reason}. "
            "A verifier must give every reply a reward, also one that it cannot read (docs/tasksets.md)"
        )
    return failures


def _mean_surprisal(rollout: Rollout) -> float:
    logprobs = rollout.sampled_logprobs
    return float(-np.mean(logprobs, dtype=np.float64)) if len(logprobs) else float("nan")
