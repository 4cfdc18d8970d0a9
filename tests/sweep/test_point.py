"""Estimators of one point against plain loops, closed forms and SciPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from rlvr_landscape_plugin.config import SurrogateConfig
from rlvr_landscape_plugin.episodes import Segment, sampling_seed
from rlvr_landscape_plugin.sweep.point import BaseBatch, PointMeter, group_advantages, token_scores

logprobs = st.integers(0, 12).flatmap(
    lambda n: st.tuples(*(arrays(np.float64, n, elements=st.floats(-12, 0)) for _ in range(2)))
)


@given(logprobs, st.floats(-3, 3), st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.1, 0.4)]))
def test_token_scores_are_their_definition(pair, advantage, clip):
    moved, checkpoint = pair
    low, high = clip
    k1 = k3 = surrogate = bound = 0.0
    for new, old in zip(moved, checkpoint, strict=True):
        ratio = math.exp(new - old)
        k1 += -(new - old)
        k3 += ratio - 1 - (new - old)
        kept = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
        surrogate += kept
        bound += kept < ratio * advantage
    result = token_scores(moved, checkpoint, advantage, low, high)
    assert result.kl_k1 == pytest.approx(k1, abs=1e-9)
    assert result.kl_k3 == pytest.approx(k3, rel=1e-9, abs=1e-9)
    assert result.surrogate == pytest.approx(surrogate, rel=1e-9, abs=1e-9)
    assert result.clip_fraction == pytest.approx(bound / len(moved) if len(moved) else 0.0)
    assert result.kl_k3 >= -1e-9


def test_equal_policies_give_exact_zeros_and_the_advantage():
    values = np.array([-1.0, -0.25, -3.0])
    result = token_scores(values, values, 0.75, 0.2, 0.2)
    assert (result.kl_k1, result.kl_k3, result.clip_fraction) == (0.0, 0.0, 0.0)
    assert result.surrogate == 3 * 0.75


def test_both_estimators_find_a_known_kl():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.4, 0.2])
    draws = np.random.default_rng(0).choice(3, size=200_000, p=p)
    result = token_scores(np.log(q)[draws], np.log(p)[draws], 0.0, 0.2, 0.2)
    truth = stats.entropy(p, q)
    assert result.kl_k1 / len(draws) == pytest.approx(truth, abs=0.002)
    assert result.kl_k3 / len(draws) == pytest.approx(truth, abs=0.0005)


def test_advantages_are_z_scores_within_the_group():
    rewards = np.random.default_rng(0).random((5, 8))
    np.testing.assert_allclose(group_advantages(rewards, "std", 1e-12), stats.zscore(rewards, axis=1), rtol=1e-9)
    np.testing.assert_allclose(group_advantages(rewards, "none", 1e-8), rewards - rewards.mean(1, keepdims=True))


def test_equal_rewards_and_failed_rollouts_carry_no_advantage():
    assert not group_advantages(np.full((2, 4), 0.3), "none", 1e-8).round(12).any()
    mixed = group_advantages(np.array([[1.0, 0.0, np.nan]]), "std", 1e-12)
    np.testing.assert_allclose(mixed, [[1.0, -1.0, 0.0]])


@given(st.integers(0, 2**31), st.integers(0, 2000), st.integers(0, 63), st.integers(0, 5))
def test_seeds_fit_the_sampler_and_depend_on_everything(seed, prompt, rollout, turn):
    value = sampling_seed(seed, "fresh", prompt, rollout, turn)
    assert 0 <= value < 2**63
    others = {
        sampling_seed(seed + 1, "fresh", prompt, rollout, turn),
        sampling_seed(seed, "base", prompt, rollout, turn),
        sampling_seed(seed, "fresh", prompt + 1, rollout, turn),
        sampling_seed(seed, "fresh", prompt, rollout + 1, turn),
        sampling_seed(seed, "fresh", prompt, rollout, turn + 1),
    }
    assert len(others | {value}) == 6


async def test_a_portion_draws_what_it_draws_among_all():
    """The seed belongs to the place of task and rollout in the whole set, wherever a portion begins."""

    class Runner:
        async def batch(self, tasks, rollouts, seed, progress):
            return [[(task, seed(p, r, 1)) for r in range(rollouts)] for p, task in enumerate(tasks)]

    anything: Any = Runner()
    meter = PointMeter(anything, anything, list("abcde"), 2, 7, SurrogateConfig())  # pyright: ignore[reportArgumentType]
    whole = await meter._sample("fresh", range(5), range(4), lambda: None)
    assert await meter._sample("fresh", range(2, 4), range(4), lambda: None) == whole[2:4]
    assert await meter._sample("fresh", range(2, 4), range(1, 3), lambda: None) == [row[1:3] for row in whole[2:4]]
    assert whole[2][1] == ("c", sampling_seed(7, "fresh", 2, 1, 1))


def test_a_part_of_the_base_batch_is_that_of_its_tasks():
    base = base_batch(np.random.default_rng(1), prompts=5)
    part = base.part(range(2, 4))
    np.testing.assert_array_equal(part.reward, base.reward[2:4])
    np.testing.assert_array_equal(part.advantage, base.advantage[2:4])
    np.testing.assert_array_equal(part.tokens, base.tokens[2:4])
    assert part.segments == base.segments[2:4]


def base_batch(rng: np.random.Generator, prompts: int = 3, rollouts: int = 2) -> BaseBatch:
    segments, scored = [], []
    for _ in range(prompts):
        row, lows = [], []
        for r in range(rollouts):
            cell = []
            for length in ((), (7,), (5, 9))[(r + len(segments)) % 3]:
                mask = rng.random(length) < 0.5
                mask[0] = False
                cell.append(
                    Segment(rng.integers(0, 99, length).astype(np.int32), mask, -rng.random(mask.sum()).astype("f4"))
                )
            row.append(cell)
            count = sum(int(s.sampled.sum()) for s in cell)
            lows.append(-rng.random(count).astype(np.float32))
        segments.append(row)
        scored.append(lows)
    shape = (prompts, rollouts)
    return BaseBatch(rng.random(shape), np.zeros(shape, np.int8), rng.random(shape), segments, scored)


def test_a_base_batch_survives_the_disk_bit_for_bit(tmp_path):
    import xarray as xr

    base = base_batch(np.random.default_rng(0))
    base.to_dataset().to_netcdf(tmp_path / "base.nc")
    with xr.open_dataset(tmp_path / "base.nc") as data:
        again = BaseBatch.from_dataset(data.load())
    np.testing.assert_array_equal(again.reward, base.reward)
    np.testing.assert_array_equal(again.tokens, base.tokens)
    for mine, theirs in zip(again.segments, base.segments, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            for left, right in zip(a, b, strict=True):
                np.testing.assert_array_equal(left.tokens, right.tokens)
                np.testing.assert_array_equal(left.sampled, right.sampled)
                np.testing.assert_array_equal(left.logprobs, right.logprobs)
    for mine, theirs in zip(again.logprobs, base.logprobs, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
