"""One grid point: move, sample, score → arrays with dims (prompt, rollout).

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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from rlvr_landscape_analysis.schema import BASE_ROLLOUT, PROMPT, ROLLOUT, metric_name

from rlvr_landscape_plugin.config import SurrogateConfig
from rlvr_landscape_plugin.episodes import ERROR, TRUNCATED, EpisodeRunner, Failures, Rollout, Segment, sampling_seed
from rlvr_landscape_plugin.errors import ConfigurationError, TasksetError
from rlvr_landscape_plugin.objectives import Completions, Objective, clipped_term, group_advantages, pad
from rlvr_landscape_plugin.serving.client import LandscapeClient

if TYPE_CHECKING:
    import verifiers.v1 as vf
    from numpy.typing import DTypeLike

DIMS = (PROMPT, ROLLOUT)
OWN_DIMS = (PROMPT, BASE_ROLLOUT)
"""Of the checkpoint's own completions, where it has another number of rollouts than the points."""


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


def _sum(parts: Iterable[np.ndarray]) -> float:
    return float(sum(float(np.sum(part, dtype=np.float64)) for part in parts))


async def score_segments(client: LandscapeClient, segments: list[list[list[Segment]]]) -> list[list[np.ndarray]]:
    """log π of every sampled token under the server's present weights: [prompt][rollout] → float32, nat."""
    places = [(p, r, s) for p, row in enumerate(segments) for r, cell in enumerate(row) for s in range(len(cell))]
    scored = await client.score([segments[p][r][s].tokens for p, r, s in places])
    parts: list[list[list[np.ndarray]]] = [[[] for _ in row] for row in segments]
    for (p, r, s), logprobs in zip(places, scored, strict=True):
        # logprobs[t] belongs to token t + 1; the first token of a sequence is never sampled.
        parts[p][r].append(logprobs[segments[p][r][s].sampled[1:]])
    return [[np.concatenate(cell) if cell else np.zeros(0, np.float32) for cell in row] for row in parts]


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

    async def base(self, progress: Callable[[], None], prompts: range | None = None) -> BaseBatch:
        """Sample and re-score the checkpoint's own batch, on some or all tasks; the server must stand at the origin.

        Raises `TasksetError` where every episode failed, or none recorded a reward.
        """
        rollouts = self.rollouts if self.base_rollouts is None else self.base_rollouts
        batch = await self._sample("base", prompts or range(len(self.tasks)), rollouts, progress)
        failures = check_failures(batch, "of the checkpoint's own batch")
        if not any(rollout.paid for row in batch for rollout in row if rollout.status != ERROR):
            raise TasksetError(
                "the taskset recorded no reward in any episode of the checkpoint's own batch; a landscape would be 0 "
                "everywhere. Give its tasks a @vf.reward, or record one in run() or finalize() of its environment"
            )
        reward = np.array([[cell.reward for cell in row] for row in batch], dtype=np.float64)
        segments = [[cell.segments for cell in row] for row in batch]
        base = BaseBatch(
            reward,
            np.array([[cell.status for cell in row] for row in batch], dtype=np.int8),
            group_advantages(reward, self.surrogate.advantage_scale, self.surrogate.advantage_eps),
            segments,
            await score_segments(self.client, segments),
            apart=self.base_rollouts is not None,
            failures=failures,
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
    ) -> tuple[xr.Dataset, list[list[Rollout]]]:
        """Move to (α, β), roll out and score. The dataset has dims (prompt, rollout) and per-point scalars.

        `base` is the base batch of all tasks. `prompts`: the tasks to measure (default: all); their rollouts do not
        depend on which other tasks are measured with them. At the origin the scores are those of the base batch, so
        that ρ = 1 holds there exactly. Where episodes failed, the attributes `failed_episodes` and `first_failure` say
        how many and why. Raises `TasksetError` where all of them did.
        """
        if prompts is None:
            prompts = range(len(self.tasks))
        whole = len(prompts) == len(base.reward)
        base = base.part(prompts)
        clock = [time.perf_counter()]
        move = await self.client.move(alpha, beta)
        clock.append(time.perf_counter())
        batch = await self._sample("fresh", prompts, self.rollouts, progress)
        clock.append(time.perf_counter())
        failures = check_failures(batch, f"at ({alpha:g}, {beta:g})")
        origin = alpha == 0 and beta == 0
        scored = base.logprobs if origin else await score_segments(self.client, base.segments)
        clock.append(time.perf_counter())
        data = self._arrays(base, batch, scored, whole)
        for name, seconds in zip(("seconds_move", "seconds_sample", "seconds_score"), np.diff(clock), strict=True):
            data[name] = ((), float(seconds))
        data["realised_step"] = ((), move.realised_step)
        data.attrs["weight_version"] = move.version
        if failures.failed:
            data.attrs |= {"failed_episodes": failures.failed, "first_failure": failures.reason}
        return data, batch

    async def _sample(
        self, stream: str, prompts: range, rollouts: int, progress: Callable[[], None]
    ) -> list[list[Rollout]]:
        def seed(prompt: int, rollout: int, turn: int) -> int:
            return sampling_seed(self.seed, stream, prompts[prompt], rollout, turn)

        return await self.runner.batch(self.tasks[prompts.start : prompts.stop], rollouts, seed, progress)

    def _arrays(
        self, base: BaseBatch, batch: list[list[Rollout]], scored: list[list[np.ndarray]], whole: bool
    ) -> xr.Dataset:
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

        def fresh(value: Callable[[Rollout], float], dtype: DTypeLike) -> tuple[tuple[str, str], np.ndarray]:
            return DIMS, np.array([[value(cell) for cell in row] for row in batch], dtype=dtype)

        data = {
            **{name: (base.dims, values) for name, values in scores.items()},
            "reward": fresh(lambda cell: cell.reward, np.float64),
            "status": fresh(lambda cell: cell.status, np.int8),
            "truncated": fresh(lambda cell: cell.status == TRUNCATED, np.int8),
            "completion_tokens": fresh(lambda cell: cell.completion_tokens, np.int32),
            "entropy": fresh(_mean_surprisal, np.float64),
        }
        return xr.Dataset(data | _metrics(batch))


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
