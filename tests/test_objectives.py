"""Objectives against loops written from their equations: values, gradients, limits, edges, refusals."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math
import pickle
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import objectives_reference as reference
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlvr_landscape_plugin.errors import ConfigurationError, LandscapeError
from rlvr_landscape_plugin.objectives import (
    FEEDS,
    LANDSCAPE_FEEDS,
    OBJECTIVES,
    PRIME_RL_FEEDS,
    ReferenceSchedule,
    aggregate,
    check_feeds,
    clipped_term,
    configure,
    group_advantages,
    kl_term,
    pad,
)
from rlvr_landscape_plugin.sweep import point as measure

torch: Any = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed (extra cpu, gpu or train)")

AGGREGATIONS = [("token_mean", None), ("sequence_mean", None), ("constant", 7.5)]
PER_TOKEN = [name for name in OBJECTIVES if not name.startswith("gspo")]


def random_feeds(seed, sequences, tokens, spread, density, token_advantages=False):
    """Float64 feeds; whatever lies outside the mask is NaN or worse."""
    rng = np.random.default_rng(seed)
    shape = (sequences, tokens)
    mask = rng.random(shape) < density
    logprobs = -rng.uniform(0.05, 3, shape)
    feeds = {
        "logprobs": logprobs,
        "old_logprobs": logprobs - spread * rng.standard_normal(shape),
        "advantages": np.round(rng.standard_normal(shape if token_advantages else sequences), 3),
        "mask": mask,
        "entropies": np.round(rng.uniform(0, 2, shape), 1),
        "reference_logprobs": logprobs - 0.5 * rng.standard_normal(shape),
    }
    feeds["advantages"][rng.random(feeds["advantages"].shape) < 0.15] = 0.0
    for name, junk in (("logprobs", np.nan), ("old_logprobs", np.inf), ("entropies", np.nan)):
        feeds[name][~mask] = junk
    feeds["reference_logprobs"][~mask] = -np.inf
    if token_advantages:
        feeds["advantages"][~mask] = np.nan
    return feeds, rng.random(shape)


@st.composite
def problems(draw, name):
    """(objective, feeds, uniforms) with random options."""
    aggregation, constant = draw(st.sampled_from(AGGREGATIONS))
    options = {"aggregation": aggregation, "constant": constant}
    if draw(st.booleans()):
        options["kl_coefficient"] = draw(st.sampled_from([0.04, 1.5]))
        options["kl_estimator"] = draw(st.sampled_from(["k3", "k2"]))
    choices = {
        "clip_low": [0.2, 0.05, 1.0, 3e-4],
        "clip_high": [0.2, 0.28, 0.4, 4e-4],
        "normaliser": ["original", "kept"],
        "rho": [0.2, 0.5, 1.0],
        "share": [2e-3, 0.3, 1.0],
        "penalty": ["absolute", "k3"],
        "coefficient": [1.0, 0.3],
        "at_least": [0, 1],
        "low": [-0.5, 0.1],
        "high": [1.0, 5.0],
    }
    for key in OBJECTIVES[name].options:
        if key in choices and draw(st.booleans()):
            options[key] = draw(st.sampled_from(choices[key]))
    feeds, uniforms = random_feeds(
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 6)),
        draw(st.sampled_from([0.0, 1e-3, 0.2, 1.0])),
        draw(st.sampled_from([1.0, 0.7, 0.3, 0.0])),
        token_advantages=name in PER_TOKEN and draw(st.booleans()),
    )
    objective = configure(name, **options)
    assume(reference.clear_selection(name, dict(objective.options), feeds))
    return objective, feeds, uniforms


def as_torch(feeds, dtype=None):
    tensors = {name: torch.tensor(values) for name, values in feeds.items()}
    if dtype is not None:
        tensors = {name: t if name == "mask" else t.to(dtype) for name, t in tensors.items()}
    tensors["logprobs"].requires_grad_(True)
    return tensors


def value_and_gradient(objective, feeds, uniforms=None):
    tensors = as_torch(feeds if uniforms is None else {**feeds, "generator": uniforms})
    result = objective(**tensors)
    result.backward()
    return result.item(), tensors["logprobs"].grad.numpy()


def both(objective, feeds, uniforms=None):
    """J by NumPy, with torch's checked against it where there is torch."""
    extra = {} if uniforms is None else {"generator": uniforms}
    mine = objective(**feeds, **extra)
    assert mine.dtype == np.float64
    assert mine.shape == ()
    if torch is not None:
        assert value_and_gradient(objective, feeds, uniforms)[0] == pytest.approx(float(mine), rel=1e-12, abs=1e-14)
    return float(mine)


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=200)
@given(data=st.data())
def test_values_are_those_of_the_equations(name, data):
    objective, feeds, uniforms = data.draw(problems(name))
    expected = reference.objective(name, dict(objective.options), feeds, uniforms)
    assert both(objective, feeds, uniforms) == pytest.approx(expected, rel=1e-10, abs=1e-12)


@needs_torch
@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=60)
@given(data=st.data())
def test_gradients_are_the_slopes_of_the_equations(name, data):
    objective, feeds, uniforms = data.draw(problems(name))
    _, mine = value_and_gradient(objective, feeds, uniforms)
    slopes, smooth = reference.gradient(name, dict(objective.options), feeds, uniforms)
    assert not mine[~feeds["mask"]].any()
    np.testing.assert_allclose(mine[smooth], slopes[smooth], rtol=1e-4, atol=1e-6)


def test_most_tokens_of_the_gradient_test_are_smooth():
    feeds, uniforms = random_feeds(0, 4, 6, 0.2, 1.0)
    for name in set(OBJECTIVES) - {"dr_grpo"}:
        _, smooth = reference.gradient(name, dict(OBJECTIVES[name].options), feeds, uniforms)
        assert smooth.mean() > 0.8, name


def test_defaults_are_those_of_the_sources():
    expected = {
        "grpo": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "token_mean"},
        "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "constant"},
        "dapo": {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token_mean"},
        "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_mean"},
        "grpo_n": {"normaliser": "original", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "token_mean"},
        "gspo_n": {"normaliser": "original", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_mean"},
        "forking_tokens": {"rho": 0.2, "clip_low": 0.2, "clip_high": 0.28, "aggregation": "token_mean"},
        "kl_cov": {"share": 2e-3, "coefficient": 1.0, "penalty": "absolute", "aggregation": "token_mean"},
        "clip_cov": {"share": 2e-4, "low": 1.0, "high": 5.0, "clip_low": 1.0, "clip_high": 1.0},
    }
    assert set(OBJECTIVES) == set(expected)
    for name, options in expected.items():
        assert options.items() <= OBJECTIVES[name].options.items()
        assert OBJECTIVES[name].options["kl_coefficient"] == 0
        assert OBJECTIVES[name].name == name
        assert OBJECTIVES[name].advantage_scale == ("none" if name == "dr_grpo" else "std")


# Limits


seeds = st.integers(0, 2**32 - 1)


@given(seeds)
def test_dapo_with_equal_bounds_is_grpo(seed):
    feeds, _ = random_feeds(seed, 3, 5, 0.4, 0.8)
    assert both(configure("dapo", clip_high=0.2), feeds) == both(OBJECTIVES["grpo"], feeds)


@needs_torch
@given(seeds, st.sampled_from(["token_mean", "sequence_mean"]))
def test_gspo_on_one_token_sequences_is_grpo(seed, aggregation):
    feeds, _ = random_feeds(seed, 5, 1, 0.4, 0.8)
    pair = [configure(name, clip_low=0.2, clip_high=0.28, aggregation=aggregation) for name in ("gspo", "grpo")]
    (value, slope), (grpo_value, grpo_slope) = (value_and_gradient(objective, feeds) for objective in pair)
    assert value == pytest.approx(grpo_value, rel=1e-12, abs=1e-14)
    np.testing.assert_allclose(slope, grpo_slope, rtol=1e-12, atol=1e-14)


@given(seeds, st.sampled_from(["original", "kept"]), st.sampled_from(["grpo", "gspo"]))
def test_the_negative_variants_on_negative_advantages_are_their_parents(seed, normaliser, parent):
    feeds, _ = random_feeds(seed, 4, 5, 0.4, 0.8)
    feeds["advantages"] = -0.1 - np.abs(feeds["advantages"])
    assert both(configure(f"{parent}_n", normaliser=normaliser), feeds) == both(OBJECTIVES[parent], feeds)
    feeds["advantages"] *= -1
    assert both(configure(f"{parent}_n", normaliser=normaliser), feeds) == 0


@needs_torch
@given(seeds, st.sampled_from(["grpo", "dapo", "grpo_n", "kl_cov", "clip_cov", "gspo"]))
def test_at_ratio_one_the_gradient_is_the_policy_gradient(seed, name):
    feeds, uniforms = random_feeds(seed, 3, 5, 0.0, 0.8)
    assume(feeds["mask"].any())
    options = {"aggregation": "token_mean"} | ({"share": 0.0, "at_least": 0} if name.endswith("cov") else {})
    value, slope = value_and_gradient(configure(name, **options), feeds, uniforms)
    weights = np.minimum(feeds["advantages"], 0) if name == "grpo_n" else feeds["advantages"]
    per_token = np.where(feeds["mask"], weights[:, None], 0) / feeds["mask"].sum()
    np.testing.assert_allclose(slope, per_token, rtol=1e-12, atol=1e-15)
    assert value == pytest.approx(per_token.sum(), abs=1e-12)


@given(seeds)
def test_forking_tokens_with_all_tokens_is_dapo_and_the_share_is_of_the_batch(seed):
    feeds, _ = random_feeds(seed, 4, 5, 0.4, 1.0)
    assert both(configure("forking_tokens", rho=1.0), feeds) == both(OBJECTIVES["dapo"], feeds)
    feeds["entropies"] = np.random.default_rng(seed).permutation(20.0 * np.arange(20)).reshape(4, 5)
    kept = configure("forking_tokens").token_terms(**feeds).counted
    np.testing.assert_array_equal(kept, feeds["entropies"] >= 320)


def test_shares_of_tokens_are_not_off_by_one_through_floating_point():
    assert 0.07 * 100 > 7
    assert 0.29 * 100 < 29
    feeds, uniforms = random_feeds(1, 10, 10, 0.4, 1.0)
    feeds["entropies"] = np.arange(100.0).reshape(10, 10)
    assert configure("forking_tokens", rho=0.07).token_terms(**feeds).counted.sum() == 7
    clip_cov = configure("clip_cov", share=0.29, low=-9.0, high=9.0, clip_high=9.0)
    assert clip_cov.token_terms(**feeds, generator=uniforms).bound.sum() == 29


def test_sequences_of_very_different_lengths_weigh_as_the_aggregation_says():
    mask = np.zeros((2, 1000), dtype=bool)
    mask[0, 0], mask[1] = True, True
    zeros = np.zeros(mask.shape)
    feeds = {"logprobs": zeros, "old_logprobs": zeros, "advantages": np.array([1.0, -1.0]), "mask": mask}
    assert both(configure("grpo"), feeds) == pytest.approx(-999 / 1001)
    assert both(configure("grpo", aggregation="sequence_mean"), feeds) == pytest.approx(0)
    assert both(configure("grpo", aggregation="constant", constant=1000), feeds) == pytest.approx(-999 / 2000)
    assert both(configure("dr_grpo", constant=1000), feeds) == pytest.approx(-999 / 2000)
    assert both(OBJECTIVES["gspo"], feeds) == pytest.approx(0)
    assert both(configure("gspo", aggregation="token_mean"), feeds) == pytest.approx(-999 / 1001)


# Edges


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (2, 0), (1, 1)])
@pytest.mark.parametrize("kl_coefficient", [0.0, 0.1])
def test_nothing_sampled_gives_zero_with_zero_gradient(name, shape, kl_coefficient):
    constant = {"constant": 10} if name == "dr_grpo" else {}
    objective = configure(name, kl_coefficient=kl_coefficient, **constant)
    feeds, uniforms = random_feeds(0, *shape, 0.4, 0.0)
    assert both(objective, feeds, uniforms) == 0
    if torch is not None:
        assert not value_and_gradient(objective, feeds, uniforms)[1].any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_token(name):
    constant = {"constant": 1} if name == "dr_grpo" else {}
    objective = configure(name, **constant)
    feeds, uniforms = random_feeds(3, 1, 1, 0.3, 1.0)
    feeds["advantages"] = np.array([-0.7])
    expected = reference.objective(name, dict(objective.options), feeds, uniforms)
    assert both(objective, feeds, uniforms) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("reward", [0.3, 0.1, 1 / 3, 1e9, 0.0])
@pytest.mark.parametrize("normaliser", ["original", "kept"])
def test_equal_rewards_teach_nothing(name, reward, normaliser):
    options = {"normaliser": normaliser} if "normaliser" in OBJECTIVES[name].options else {}
    options |= {"constant": 10} if name == "dr_grpo" else {}
    feeds, uniforms = random_feeds(5, 6, 4, 0.3, 1.0)
    feeds["advantages"] = group_advantages(np.full((1, 6), reward), "none", 1e-8)[0]
    assert not feeds["advantages"].any()
    objective = configure(name, **options)
    if name == "kl_cov":
        objective = configure(name, coefficient=0.0)
    assert both(objective, feeds, uniforms) == 0
    assert not (name.endswith("_n") and normaliser == "kept" and objective.token_terms(**feeds).counted.any())


@needs_torch
@pytest.mark.parametrize(("advantage", "outside"), [(1.0, 1), (-1.0, -1)])
def test_the_clip_binds_beyond_its_bounds_and_not_at_them(advantage, outside):
    for side, bound in ((1, 1.25), (-1, 0.5)):
        for step in (-1, 0, 1):
            ratio = np.nextafter(bound, 9 if step > 0 else 0) if step else bound
            log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
            ratio = float(torch.exp(log_ratio.detach()))
            value, bound_token = clipped_term(log_ratio, torch.tensor([advantage]), 0.5, 0.25)
            value.sum().backward()
            beyond = side == outside and (ratio - bound) * side > 0
            assert bool(bound_token) is beyond
            assert log_ratio.grad.item() == (0 if beyond else ratio * advantage)
            assert value.item() == (bound if beyond else ratio) * advantage


@pytest.mark.parametrize(("ratio", "advantage", "value"), [(1.25, 2, 2.5), (2, 2, 2.5), (0.25, 2, 0.5), (0.5, -2, -1)])
def test_known_terms(ratio, advantage, value):
    got, bound = clipped_term(np.array([math.log(ratio)]), np.array([advantage]), 0.5, 0.25)
    assert got[0] == pytest.approx(value, rel=1e-15)
    assert bound[0] == (ratio == 2)


@needs_torch
def test_overflowing_ratios_reach_neither_value_nor_gradient_of_tokens_that_are_idle_or_bound():
    log_ratio = torch.tensor([1000.0, 1000.0, -1000.0, 0.0], dtype=torch.float64, requires_grad=True)
    value, _ = clipped_term(log_ratio, torch.tensor([0.0, 2.0, -1.0, 3.0]), 0.2, 0.2)
    assert value.tolist() == [0, 2.4, -0.8, 3]
    value.sum().backward()
    assert log_ratio.grad.tolist() == [0, 0, 0, 3]
    mine, _ = clipped_term(np.array([1000.0, 1000.0, 1000.0]), np.array([0.0, 2.0, -1.0]), 0.2, 0.2)
    np.testing.assert_array_equal(mine, [0, 2.4, -np.inf])


@needs_torch
@pytest.mark.parametrize("name", OBJECTIVES)
def test_float32_and_half_precision_inputs(name):
    objective = configure(name, **({"constant": 10} if name == "dr_grpo" else {}))
    feeds, uniforms = random_feeds(7, 3, 5, 0.2, 0.8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors = as_torch(feeds, dtype)
        result = objective(**tensors, generator=torch.tensor(uniforms))
        assert result.dtype == torch.float32
        result.backward()
        assert tensors["logprobs"].grad.dtype == dtype
        exact = {key: np.asarray(t.detach().to(torch.float64)) for key, t in tensors.items() if key != "mask"}
        expected = reference.objective(name, dict(objective.options), exact | {"mask": feeds["mask"]}, uniforms)
        assert result.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@needs_torch
def test_only_the_current_policy_carries_a_gradient():
    feeds, uniforms = random_feeds(11, 3, 5, 0.2, 0.8)
    for name in OBJECTIVES:
        tensors = as_torch(feeds)
        others = [tensors[key].requires_grad_(True) for key in FEEDS if key not in ("logprobs", "mask", "generator")]
        options = {"kl_coefficient": 0.1} | ({"constant": 10} if name == "dr_grpo" else {})
        configure(name, **options)(**tensors, generator=torch.tensor(uniforms)).backward()
        assert [other.grad for other in others] == [None] * len(others)


def test_integer_masks_are_masks():
    feeds, _ = random_feeds(13, 3, 5, 0.2, 0.6)
    assert both(OBJECTIVES["grpo"], feeds | {"mask": feeds["mask"].astype(np.int64)}) == both(OBJECTIVES["grpo"], feeds)


# Random draws


def test_clip_cov_draws_what_its_generator_says_and_nothing_else():
    feeds, _ = random_feeds(17, 4, 6, 0.3, 1.0)
    objective = configure("clip_cov", low=-9.0, high=9.0, share=0.25)
    uniforms = np.random.default_rng(3).random((4, 6))
    from_generator = objective(**feeds, generator=np.random.default_rng(3))
    assert from_generator == objective(**feeds, generator=uniforms)
    dropped = objective.token_terms(**feeds, generator=uniforms).bound
    assert dropped.sum() == 6
    assert uniforms[dropped].max() < uniforms[~dropped].min()
    if torch is not None:
        again = objective(**as_torch(feeds), generator=np.random.default_rng(3)).item()
        assert again == pytest.approx(float(from_generator), rel=1e-12)
    with pytest.raises(ValueError, match=r"numpy\.random\.Generator or uniforms"):
        objective(**feeds, generator=3)
    with pytest.raises(ValueError, match=r"uniforms.*has shape"):
        objective(**feeds, generator=uniforms[:2])


def test_clip_cov_never_draws_a_token_that_the_clip_has_taken():
    feeds, uniforms = random_feeds(17, 4, 6, 1.0, 1.0)
    clips = {"clip_low": 0.2, "clip_high": 0.2}
    clipped = configure("grpo", **clips).token_terms(**feeds)
    assert 3 < clipped.bound.sum() < 21
    every = configure("clip_cov", low=-99.0, high=99.0, share=1.0, **clips).token_terms(**feeds, generator=uniforms)
    np.testing.assert_array_equal(every.value, np.where(clipped.bound, clipped.value, 0))
    assert every.counted.all()


def test_every_candidate_of_clip_cov_is_equally_likely():
    feeds, _ = random_feeds(17, 2, 5, 0.3, 1.0)
    objective = configure("clip_cov", low=-9.0, high=9.0, share=0.3)
    rng = np.random.default_rng(0)
    draws = sum(objective.token_terms(**feeds, generator=rng).bound.astype(int) for _ in range(1000))
    assert draws.sum() == 3000
    assert abs(draws - 300).max() < 5 * math.sqrt(1000 * 0.3 * 0.7)


# Advantages


def test_selection_by_sign_follows_statistics_of_the_full_group():
    rewards = np.array([[1.0, 0.6, 0.2, 0.0], [0.5, 0.5, 0.4, np.nan]])
    feeds, _ = random_feeds(19, 8, 4, 0.3, 1.0)
    for scale in ("std", "none"):
        mine = group_advantages(rewards, scale, 1e-8)
        full = [reference.advantages(group, scale, 1e-8) for group in rewards.tolist()]
        np.testing.assert_allclose(mine, full, rtol=1e-12, atol=1e-15)
        np.testing.assert_array_equal(mine < 0, [[False, False, True, True], [False, False, True, False]])
        for normaliser in ("original", "kept"):
            objective = configure("grpo_n", normaliser=normaliser)
            expected = reference.objective(
                "grpo_n", dict(objective.options), feeds | {"advantages": np.array(full).reshape(-1)}
            )
            assert both(objective, feeds | {"advantages": mine.reshape(-1)}) == pytest.approx(expected, rel=1e-12)


@given(seeds, st.integers(1, 5), st.integers(1, 8), st.sampled_from(["std", "none"]), st.floats(0, 0.5))
def test_advantages_are_their_definition_in_both_libraries(seed, prompts, rollouts, scale, failures):
    rng = np.random.default_rng(seed)
    rewards = rng.random((prompts, rollouts))
    rewards[rng.random(rewards.shape) < failures] = np.nan
    mine = group_advantages(rewards, scale, 1e-8)
    expected = [reference.advantages(group, scale, 1e-8) for group in rewards.tolist()]
    np.testing.assert_allclose(mine, expected, rtol=1e-9, atol=1e-12)
    assert mine.dtype == np.float64
    if torch is not None:
        theirs = group_advantages(torch.tensor(rewards), scale, 1e-8)
        assert theirs.dtype == torch.float64
        np.testing.assert_allclose(theirs.numpy(), mine, rtol=1e-9, atol=1e-12)


def test_a_reward_that_is_its_groups_mean_has_no_sign():
    rewards = np.array([[0.1, 0.2, 0.3]])
    assert rewards[0, 1] - rewards.mean() != 0
    assert group_advantages(rewards, "std", 1e-8)[0, 1] == 0
    with pytest.raises(ValueError, match="expected 'std' or 'none'"):
        group_advantages(rewards, "sd", 1e-8)


# The landscape


@given(seeds, st.integers(0, 8), st.sampled_from([-1.5, 0.0, 0.75, 2.0]), st.sampled_from([0.0, 0.01, 1.0, 5.0]))
def test_the_landscape_draws_the_same_objective(seed, tokens, advantage, spread):
    assert measure.group_advantages is group_advantages
    rng = np.random.default_rng(seed)
    old = -rng.uniform(0, 4, tokens)
    new = old + spread * rng.standard_normal(tokens)
    scores = measure.token_scores(new, old, advantage, 0.2, 0.28)
    # Bit for bit what it was before there was one definition.
    ratio = np.exp(new - old)
    plain, clipped = ratio * advantage, np.clip(ratio, 0.8, 1.28) * advantage
    assert scores.surrogate == np.minimum(plain, clipped).sum()
    assert scores.clip_fraction == (np.mean(clipped < plain) if tokens else 0)
    feeds = {"logprobs": new[None], "old_logprobs": old[None], "advantages": np.array([advantage])}
    batch = configure("dapo")(**feeds, mask=np.ones((1, tokens), dtype=bool))
    assert scores.surrogate / max(tokens, 1) == pytest.approx(batch, rel=1e-12, abs=1e-15)


# One sequence at a time


@needs_torch
@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "grpo_n", "gspo_n"])
@settings(max_examples=25)
@given(seed=seeds, kl_coefficient=st.sampled_from([0.0, 0.3]), spread=st.sampled_from([1e-3, 0.5]))
def test_sums_over_sequences_divided_by_all_tokens_are_the_batch(name, seed, kl_coefficient, spread):
    feeds, _ = random_feeds(seed, 4, 5, spread, 0.6)
    assume(feeds["mask"].any())
    objective = configure(name, aggregation="token_mean", kl_coefficient=kl_coefficient)
    assert objective.per_sequence_sum == {"token_mean"}
    value, slope = value_and_gradient(objective, feeds)
    logprobs = torch.tensor(feeds["logprobs"], requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(4):
        rows = {key: torch.tensor(feeds[key][i]) for key in ("old_logprobs", "reference_logprobs", "mask")}
        advantages = torch.full((5,), feeds["advantages"][i], dtype=torch.float64)
        part = objective.sequence_sum(logprobs=logprobs[i], advantages=advantages, **rows)
        assert part.shape == ()
        total = total + part
    total = total / int(feeds["mask"].sum())
    total.backward()
    assert total.item() == pytest.approx(value, rel=1e-10, abs=1e-13)
    np.testing.assert_allclose(logprobs.grad.numpy(), slope, rtol=1e-10, atol=1e-13)


def test_weights_scale_each_token_of_a_sequence_sum():
    feeds, _ = random_feeds(23, 1, 6, 0.3, 0.6)
    assert 0 < feeds["mask"].sum() < 6
    rows = {key: feeds[key][0] for key in ("logprobs", "old_logprobs", "mask", "reference_logprobs")}
    rows["advantages"] = np.full(6, feeds["advantages"][0])
    weights = np.where(rows["mask"], np.arange(6.0), np.nan)
    objective = configure("grpo", kl_coefficient=0.2)
    (sequence,) = reference.sequences(feeds)
    ((row,), _) = reference.grpo([sequence], objective.options)
    log_r = [r - new for r, new in zip(sequence["reference"], sequence["logprob"], strict=True)]
    row = [value - 0.2 * reference.k3(x) for value, x in zip(row, log_r, strict=True)]
    expected = sum(w * v for w, v in zip(weights[rows["mask"]], row, strict=True))
    assert objective.sequence_sum(**rows, weights=weights) == pytest.approx(expected, rel=1e-12)
    assert objective.sequence_sum(**rows) == pytest.approx(sum(row), rel=1e-12)
    with pytest.raises(ValueError, match="weights has shape"):
        objective.sequence_sum(**rows, weights=weights[:2])
    with pytest.raises(ConfigurationError, match="reference_logprobs are not available"):
        objective.sequence_sum(**rows | {"reference_logprobs": None})


# Needs and refusals


def test_what_each_trainer_can_run():
    possible = {"grpo", "dapo", "grpo_n"}
    for name, objective in OBJECTIVES.items():
        objective = configure(name, constant=10) if name == "dr_grpo" else objective
        check_feeds(objective, FEEDS, "TRL")
        if name in possible:
            check_feeds(objective, PRIME_RL_FEEDS, "prime-rl's custom loss", per_sequence=True)
        else:
            with pytest.raises(ConfigurationError, match=rf"'{name}'.* prime-rl's custom loss"):
                check_feeds(objective, PRIME_RL_FEEDS, "prime-rl's custom loss", per_sequence=True)
        if name != "forking_tokens":
            check_feeds(objective, LANDSCAPE_FEEDS, "the landscape")
    for name in ("gspo", "gspo_n"):
        by_token = configure(name, aggregation="token_mean")
        check_feeds(by_token, PRIME_RL_FEEDS, "prime-rl's custom loss", per_sequence=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("forking_tokens", {}, "'forking_tokens'.*2506.01939.*entropies are not available to prime-rl's custom loss"),
        ("clip_cov", {}, "'clip_cov'.*generator is not available to prime-rl's custom loss"),
        ("kl_cov", {}, "'kl_cov'.*prime-rl's custom loss.*statistics of the whole batch"),
        (
            "grpo",
            {"aggregation": "sequence_mean"},
            "'grpo'.*'sequence_mean' needs the number of sequences.*token_mean",
        ),
        ("dr_grpo", {"constant": 64}, "'dr_grpo'.*'constant' needs the number of sequences"),
        ("grpo_n", {"normaliser": "kept"}, "'grpo_n'.*kept tokens; use normaliser = 'original'"),
        ("grpo", {"kl_coefficient": 0.04}, "'grpo'.*reference_logprobs are not available to prime-rl's custom loss"),
    ],
)
def test_refusals_name_the_objective_the_trainer_and_what_is_missing(name, options, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        check_feeds(configure(name, **options), PRIME_RL_FEEDS, "prime-rl's custom loss", per_sequence=True)
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), LandscapeError)


def test_check_feeds_takes_names():
    check_feeds("grpo", PRIME_RL_FEEDS, "prime-rl's custom loss", per_sequence=True)
    with pytest.raises(ConfigurationError, match="unknown objective: 'grpoo'; did you mean 'grpo'"):
        check_feeds("grpoo", PRIME_RL_FEEDS, "prime-rl's custom loss")


def test_needs_are_all_that_is_read():
    feeds, uniforms = random_feeds(29, 3, 4, 0.3, 0.8)
    feeds["generator"] = uniforms
    for name in OBJECTIVES:
        objective = configure(name, kl_coefficient=0.1, **({"constant": 9} if name == "dr_grpo" else {}))
        value = objective(**{key: feeds[key] for key in objective.needs})
        assert value == objective(**feeds)
        for key in objective.needs:
            with pytest.raises(ConfigurationError, match=f"'{name}'.*{key} (is|are) not available to this call"):
                objective(**{other: feeds[other] for other in objective.needs - {key}})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grpo", {"clip_hi": 0.3}, "unknown option of grpo: 'clip_hi'; did you mean 'clip_high'"),
        ("grpo", {"rho": 0.3}, "unknown option of grpo: 'rho'"),
        ("grpo", {"clip_low": 1.5}, "clip_low is 1.5, expected a number from 0 to 1"),
        ("grpo", {"clip_high": -0.1}, "clip_high is -0.1"),
        ("grpo", {"clip_high": "wide"}, "clip_high is 'wide'"),
        ("grpo", {"aggregation": "mean"}, "aggregation is 'mean', expected one of token_mean, sequence_mean, constant"),
        ("grpo", {"constant": 100}, "constant = 100 and aggregation = 'token_mean', which ignores it"),
        ("grpo", {"aggregation": "constant"}, "give `constant`"),
        ("dr_grpo", {}, "dr_grpo with aggregation = 'constant' divides by a stated constant"),
        ("dr_grpo", {"constant": 0}, "constant is 0, expected a positive number"),
        ("grpo", {"kl_coefficient": math.nan}, "kl_coefficient is nan"),
        ("grpo", {"kl_estimator": "k1"}, "expected gradient is 0"),
        ("grpo_n", {"normaliser": "all"}, "normaliser is 'all', expected 'original' or 'kept'"),
        ("forking_tokens", {"rho": 20}, "rho is 20, expected a share"),
        ("kl_cov", {"share": 2}, r"share is 2, expected a share from 0 to 1 \(not percent\)"),
        ("kl_cov", {"penalty": "k1"}, "expected 'absolute' or 'k3'"),
        ("clip_cov", {"low": 6.0}, "low = 6.0 is above high = 5.0; swap them"),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(ConfigurationError, match=message):
        configure(name, **options)


def test_the_registrys_dr_grpo_asks_for_its_constant():
    feeds, _ = random_feeds(0, 2, 3, 0.1, 1.0)
    with pytest.raises(ConfigurationError, match="divides by a stated constant"):
        OBJECTIVES["dr_grpo"](**feeds)
    with pytest.raises(ConfigurationError, match="divides by a stated constant"):
        aggregate(feeds["logprobs"], feeds["mask"], "constant")


def test_bad_arrays_are_refused():
    feeds, _ = random_feeds(31, 3, 4, 0.3, 1.0)
    objective = configure("grpo", kl_coefficient=0.1)
    for name in ("old_logprobs", "reference_logprobs", "mask"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(3, 3\).*\(3, 4\)"):
            objective(**feeds | {name: feeds[name][:, :3]})
    with pytest.raises(ValueError, match=r"advantages has shape \(2,\).* or \(sequence,\)"):
        objective(**feeds | {"advantages": np.zeros(2)})
    with pytest.raises(ValueError, match=r"logprobs has shape \(12,\), expected \(sequence, token\)"):
        objective(**feeds | {"logprobs": feeds["logprobs"].ravel()})
    with pytest.raises(ValueError, match="mask has dtype float64"):
        objective(**feeds | {"mask": feeds["mask"].astype(float)})
    with pytest.raises(ValueError, match="logprobs has dtype int64"):
        objective(**feeds | {"logprobs": feeds["logprobs"].astype(np.int64)})
    for name in ("logprobs", "old_logprobs", "reference_logprobs"):
        for value, word in ((np.nan, "nan"), (-np.inf, "-inf")):
            values = feeds[name].copy()
            values[2, 1] = values[2, 3] = value
            with pytest.raises(ValueError, match=rf"{name} is {word} at sampled token 1 of sequence 2 \(2 such"):
                objective(**feeds | {name: values})
    with pytest.raises(ValueError, match="advantages is nan"):
        objective(**feeds | {"advantages": np.array([0.0, np.nan, 0.0])})
    with pytest.raises(TypeError, match="unknown feeds logprob; known: logprobs, "):
        objective(**feeds, logprob=feeds["logprobs"])
    with pytest.raises(ValueError, match="differ within a sequence"):
        OBJECTIVES["gspo"](**feeds | {"advantages": np.arange(12.0).reshape(3, 4)})
    if torch is not None:
        with pytest.raises(TypeError):
            objective(**feeds | {"mask": torch.tensor(feeds["mask"])})


def test_objectives_pickle_copy_and_compare():
    objective = configure("gspo", clip_high=0.5)
    assert pickle.loads(pickle.dumps(objective)) == copy.deepcopy(objective) == objective != OBJECTIVES["gspo"]
    assert OBJECTIVES["gspo"].options["clip_high"] == 4e-4
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.name = "other"


def test_importing_objectives_loads_no_torch():
    code = "import sys, rlvr_landscape_plugin.objectives; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


# Regularisation


def test_kl_terms_are_their_estimators():
    rng = np.random.default_rng(0)
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.4, 0.2])
    draws = rng.choice(3, size=400_000, p=p)
    truth = float(np.sum(p * np.log(p / q)))
    assert kl_term(np.log(p)[draws], np.log(q)[draws]).mean() == pytest.approx(truth, rel=0.02)
    assert kl_term(np.log(p)[draws], np.log(q)[draws], "k2").mean() == pytest.approx(truth, rel=0.05)
    with pytest.raises(ConfigurationError, match="expected gradient is 0"):
        kl_term(np.log(p), np.log(q), "k1")


@needs_torch
def test_k2_has_the_gradient_of_the_kl_and_k3_has_not():
    """Exact expectations over three actions instead of samples."""
    logits = torch.tensor([0.3, -0.5, 0.9], dtype=torch.float64, requires_grad=True)
    reference_logprobs = torch.log(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64))

    def slope(term):
        logprobs = torch.log_softmax(logits, 0)
        weights = torch.exp(logprobs.detach())
        return torch.autograd.grad((weights * term(logprobs)).sum(), logits)[0]

    logprobs = torch.log_softmax(logits, 0)
    kl = (torch.exp(logprobs) * (logprobs - reference_logprobs)).sum()
    true = torch.autograd.grad(kl, logits)[0]
    torch.testing.assert_close(slope(lambda x: kl_term(x, reference_logprobs, "k2")), true)
    assert (slope(lambda x: kl_term(x, reference_logprobs, "k3")) - true).abs().max() > 0.05
    assert slope(lambda x: x - reference_logprobs).abs().max() < 1e-12


def test_the_reference_is_reset_on_an_interval():
    schedule = ReferenceSchedule(every=3)
    assert [step for step in range(1, 11) if schedule.reset_due(step) == "interval"] == [3, 6, 9]


def test_the_reference_is_reset_on_a_plateau_and_on_a_drop():
    schedule = ReferenceSchedule(patience=2, min_improvement=0.01, max_drop=0.2)
    metrics = [0.1, 0.3, 0.305, 0.29, 0.28, 0.4, 0.15, 0.1, 0.1, 0.1]
    reasons = [schedule.reset_due(step, metric) for step, metric in enumerate(metrics)]
    assert reasons == [None, None, None, "plateau", None, None, "drop", None, "plateau", None]
    assert schedule.last_reset == 8


def test_a_reference_schedule_continues_from_its_saved_state():
    metrics = [0.1, 0.3, 0.2, 0.2, 0.5, 0.4, 0.3, 0.3]

    def reasons(schedule, steps):
        return [schedule.reset_due(step, metrics[step]) for step in steps]

    straight = reasons(ReferenceSchedule(every=5, patience=2), range(8))
    first = ReferenceSchedule(every=5, patience=2)
    halves = reasons(first, range(4)) + reasons(ReferenceSchedule(**dataclasses.asdict(first)), range(4, 8))
    assert halves == straight
    assert set(straight) == {None, "plateau"} or "interval" in straight


def test_bad_reference_schedules_are_refused():
    with pytest.raises(ConfigurationError, match="needs every, patience or max_drop"):
        ReferenceSchedule()
    with pytest.raises(ConfigurationError, match="every is 0"):
        ReferenceSchedule(every=0)
    with pytest.raises(ConfigurationError, match="max_drop is -1"):
        ReferenceSchedule(max_drop=-1)
    with pytest.raises(ValueError, match="NaN"):
        ReferenceSchedule(patience=1).reset_due(4, math.nan)
    assert "reinitialise" in (ReferenceSchedule.__doc__ or "")


# Layout


def test_pad_makes_rows_and_keeps_boundaries():
    values, mask = pad([np.array([1.0, 2.0]), np.zeros(0), np.array([3.0])])
    np.testing.assert_array_equal(values, [[1, 2], [0, 0], [3, 0]])
    np.testing.assert_array_equal(mask, [[True, True], [False, False], [True, False]])
    assert mask.dtype == bool
    with pytest.raises(ValueError, match="at least one sequence"):
        pad([])


@needs_torch
def test_a_packed_batch_is_its_padded_one():
    feeds, _ = random_feeds(37, 3, 5, 0.3, 1.0)
    lengths = [5, 1, 3]
    packed = torch.cat([torch.tensor(feeds["logprobs"][i, :n]) for i, n in enumerate(lengths)]).requires_grad_(True)
    logprobs, mask = pad(packed.split(lengths))
    old, _ = pad([torch.tensor(feeds["old_logprobs"][i, :n]) for i, n in enumerate(lengths)])
    arguments = {"old_logprobs": old, "advantages": torch.tensor(feeds["advantages"]), "mask": mask}
    OBJECTIVES["gspo"](logprobs=logprobs, **arguments).backward()
    padded = feeds | {"mask": np.arange(5) < np.array(lengths)[:, None]}
    _, slope = value_and_gradient(OBJECTIVES["gspo"], padded)
    np.testing.assert_allclose(packed.grad.numpy(), slope[padded["mask"]], rtol=1e-12)


def test_groups_of_two_have_advantages_without_size_and_say_so_once():
    from rlvr_landscape_plugin import objectives

    objectives._warn_of_pairs.cache_clear()
    rewards = np.array([[0.5, 0.5], [0.1, 0.9], [0.50, 0.51]])
    with pytest.warns(UserWarning, match="two rollouts per task .* every advantage is -1, 0 or 1"):
        advantages = group_advantages(rewards, "std", 1e-12)
    np.testing.assert_allclose(advantages, [[0, 0], [-1, 1], [-1, 1]], atol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group_advantages(rewards, "std", 1e-12)
        objectives._warn_of_pairs.cache_clear()
        np.testing.assert_allclose(group_advantages(rewards, "none", 1e-12), [[0, 0], [-0.4, 0.4], [-0.005, 0.005]])
        group_advantages(np.zeros((2, 3)), "std", 1e-12)
