"""A landscape draws the objectives that train: against loops over floats, and against the trainer's own loss."""

from __future__ import annotations

import importlib.util
import math
import types
from typing import Any

import numpy as np
import objectives_reference as reference
import pytest
import rlvr_landscape_analysis
import xarray as xr
from conftest import POLICY
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rlvr_landscape_plugin.config import SurrogateConfig, SweepConfig
from rlvr_landscape_plugin.episodes import ERROR, OK, Rollout, Segment
from rlvr_landscape_plugin.errors import ConfigurationError
from rlvr_landscape_plugin.objectives import OBJECTIVES, configure, group_advantages
from rlvr_landscape_plugin.serving.client import MoveResult
from rlvr_landscape_plugin.sweep.point import BaseBatch, PointMeter, objective_scores, token_scores

DRAWN = ("grpo", "dr_grpo", "dapo", "gspo", "grpo_n", "gspo_n", "kl_cov", "clip_cov")
AGGREGATIONS = [
    {"aggregation": "token_mean"},
    {"aggregation": "sequence_mean"},
    {"aggregation": "constant", "constant": 7.5},
]
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed (extra train)")


def problem(seed: int, prompts: int, rollouts: int, spread: float) -> tuple[BaseBatch, list[list[np.ndarray]]]:
    """A base batch with failed and silent rollouts among it, and its log-probabilities under other weights."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 6, (prompts, rollouts))
    status = np.where(rng.random((prompts, rollouts)) < 0.15, ERROR, OK).astype(np.int8)
    reward = np.where(status == ERROR, np.nan, np.round(rng.random((prompts, rollouts)), 1))
    old = [[-rng.uniform(0.05, 3, n).astype(np.float32) for n in row] for row in lengths]
    new = [[(cell + spread * rng.standard_normal(len(cell))).astype(np.float32) for cell in row] for row in old]
    segments = [[[Segment(np.arange(n + 1), np.arange(n + 1) > 0, np.zeros(n))] for n in row] for row in lengths]
    return BaseBatch(reward, status, group_advantages(reward, "std", 1e-8), segments, old), new


def padded(base: BaseBatch, new: list[list[np.ndarray]]) -> dict[str, np.ndarray]:
    """The same batch as arrays (sequence, token), failed rollouts outside the mask; written without `pad`."""
    cells = [cell for cell in np.ndindex(base.reward.shape) if base.status[cell] != ERROR]
    longest = max((len(new[p][r]) for p, r in cells), default=0)
    feeds = {name: np.zeros((len(cells), longest)) for name in ("logprobs", "old_logprobs")}
    mask = np.zeros((len(cells), longest), bool)
    for row, (p, r) in enumerate(cells):
        length = len(new[p][r])
        feeds["logprobs"][row, :length], feeds["old_logprobs"][row, :length] = new[p][r], base.logprobs[p][r]
        mask[row, :length] = True
    return {**feeds, "mask": mask, "advantages": np.array([base.advantage[cell] for cell in cells])}


def options_of(name: str, aggregation: dict[str, Any], kept: bool = False) -> dict[str, Any]:
    wide = {"clip_low": 0.2, "clip_high": 0.28} if "clip_low" in OBJECTIVES[name].options else {}
    shares = {"share": 0.3} if "share" in OBJECTIVES[name].options else {}
    low = {"low": -1.0} if "low" in OBJECTIVES[name].options else {}
    return aggregation | wide | shares | low | ({"normaliser": "kept"} if kept else {})


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda options: options["aggregation"])
@pytest.mark.parametrize("name", [*DRAWN, "grpo_n kept", "gspo_n kept"])
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(2, 4), st.sampled_from([0.0, 0.01, 0.3, 1.0]))
@settings(max_examples=25)
def test_values_per_completion_add_up_to_the_objective(name, aggregation, seed, prompts, rollouts, spread):
    base, new = problem(seed, prompts, rollouts, spread)
    if (base.status == ERROR).all():
        return
    name, _, kept = name.partition(" ")
    objective = configure(name, **options_of(name, aggregation, bool(kept)))
    feeds = padded(base, new)
    if not reference.clear_selection(name, dict(objective.options), feeds):
        return
    uniforms = np.random.default_rng(seed).random(feeds["mask"].shape)
    scores = objective_scores(base, new, objective, seed)
    expected = reference.objective(name, dict(objective.options), feeds, uniforms)
    total, weight = np.nansum(scores.surrogate), np.nansum(scores.weight)
    assert (total / weight if weight else 0.0) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    failed = base.status == ERROR
    for values in (scores.surrogate, scores.weight, scores.clip_fraction):
        np.testing.assert_array_equal(np.isnan(values), failed)
    at_origin = objective_scores(base, base.logprobs, objective, seed)
    np.testing.assert_array_equal(scores.weight, at_origin.weight)


def test_the_general_way_gives_what_the_usual_one_gives():
    base, new = problem(3, 4, 4, 0.4)
    scores = objective_scores(base, new, configure("grpo"), 0)
    for cell in np.ndindex(base.reward.shape):
        if base.status[cell] != ERROR:
            p, r = cell
            usual = token_scores(new[p][r], base.logprobs[p][r], float(base.advantage[cell]), 0.2, 0.2)
            assert scores.surrogate[cell] == pytest.approx(usual.surrogate, rel=1e-12, abs=1e-12)
            assert scores.clip_fraction[cell] == pytest.approx(usual.clip_fraction)
            assert scores.weight[cell] == len(base.logprobs[p][r])


def test_a_completion_without_finite_scores_is_missing_and_the_others_are_not():
    base, new = problem(1, 3, 3, 0.2)
    base.status[:] = OK
    new[1][2] = np.append(new[1][2][:1], [-np.inf]).astype(np.float32)
    base.logprobs[1][2] = np.full(len(new[1][2]), -1.0, np.float32)
    scores = objective_scores(base, new, configure("gspo"), 0)
    assert np.isnan(scores.surrogate[1, 2])
    assert np.isfinite(np.delete(scores.surrogate.ravel(), 5)).all()


# A whole point


class Client:
    """Scores with another policy than the one that sampled."""

    def __init__(self, score) -> None:
        self._score, self.moved = score, False

    async def move(self, alpha, beta):
        self.moved = (alpha, beta) != (0, 0)
        return MoveResult("1", 0.1, {})

    async def score(self, sequences, first=()):
        return [self._score(np.asarray(ids), self.moved) for ids in sequences]


class Runner:
    """Gives prepared rollouts for the base batch and for a point."""

    def __init__(self, rollouts: list[list[Rollout]]) -> None:
        self.rollouts = rollouts

    async def batch(self, tasks, rollouts, seed, progress):
        return [row[:rollouts] for row in self.rollouts[: len(tasks)]]


def rollouts_of(seed: int, prompts: int, rollouts: int, vocabulary: int) -> list[list[Rollout]]:
    """Conversations of two turns: prompt, reply, the environment's words, reply."""
    rng = np.random.default_rng(seed)

    def one() -> Rollout:
        lengths = rng.integers(2, 7, 4)
        sampled = np.concatenate([np.full(n, turn % 2 == 1) for turn, n in enumerate(lengths)])
        tokens = rng.integers(0, vocabulary, len(sampled)).astype(np.int32)
        segment = Segment(tokens, sampled, np.zeros(int(sampled.sum()), np.float32))
        return Rollout(float(np.round(rng.random(), 2)), OK, [segment])

    return [[one() for _ in range(rollouts)] for _ in range(prompts)]


def meter_of(client: Any, runner: Any, surrogate: SurrogateConfig, prompts: int, rollouts: int, **options):
    return PointMeter(client, runner, [None] * prompts, rollouts, 0, surrogate, **options)  # pyright: ignore[reportArgumentType]


def toy_score(ids: np.ndarray, moved: bool) -> np.ndarray:
    return (-1.0 - 0.1 * (ids[1:] % 7) - (0.3 * (ids[1:] % 3) if moved else 0.0)).astype(np.float32)


async def landscape(surrogate: SurrogateConfig, **options: Any) -> tuple[xr.Dataset, BaseBatch]:
    """Two points, the origin and another, as the dataset of a slice."""
    runner = Runner(rollouts_of(5, 4, 4, 50))
    meter = meter_of(Client(toy_score), runner, surrogate, 4, 4, **options)
    base = await meter.base(lambda: None)
    points = []
    for alpha in (0.0, 0.1):
        data, _ = await meter.point(base, alpha, 0.0, lambda: None)
        points.append(data.expand_dims(alpha=[alpha], beta=[0.0]))
    whole = xr.concat(points, "alpha", combine_attrs="drop")
    own = base.to_dataset().drop_dims(["segment", "token", "sampled_token"])
    return xr.merge([whole, own]).assign_coords(prompt=range(4), rollout=range(4), step=0, slice_seed=0), base


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"objective": "dapo"},
        {"objective": "gspo", "options": {"clip_low": 0.2, "clip_high": 0.2}},
        {"objective": "grpo_n", "options": {"normaliser": "kept"}},
        {"objective": "dr_grpo", "options": {"constant": 20}},
        {"options": {"aggregation": "sequence_mean"}},
    ],
)
async def test_the_analysis_averages_as_the_objective_says(given):
    surrogate = SurrogateConfig.model_validate(given)
    data, base = await landscape(surrogate)
    assert ("surrogate_weight" in data) == (given != {})
    result = rlvr_landscape_analysis.surrogate(data)["mean"].sel(beta=0.0)
    objective = surrogate.trained
    for alpha, moved in ((0.0, False), (0.1, True)):
        new = [[toy_score(cell[0].tokens, moved)[cell[0].sampled[1:]] for cell in row] for row in base.segments]
        expected = reference.objective(objective.name, dict(objective.options), padded(base, new))
        assert float(result.sel(alpha=alpha)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


async def test_the_usual_objective_leaves_the_dataset_as_it_was():
    data, base = await landscape(SurrogateConfig())
    assert base.weight is None
    assert not [name for name in data.data_vars if "weight" in str(name)]


async def test_a_base_batch_with_its_weights_survives_the_disk():
    _, base = await landscape(SurrogateConfig(objective="gspo"))
    again = BaseBatch.from_dataset(base.to_dataset())
    assert base.weight is not None
    np.testing.assert_array_equal(again.weight, base.weight)
    np.testing.assert_array_equal(base.part(range(1, 3)).weight, base.weight[1:3])


async def test_the_checkpoint_may_have_rollouts_of_its_own():
    runner = Runner(rollouts_of(5, 4, 6, 50))
    meter = meter_of(Client(toy_score), runner, SurrogateConfig(objective="gspo"), 4, 2, base_rollouts=6)
    base = await meter.base(lambda: None)
    own = base.to_dataset()
    assert own["base_reward"].dims == own["surrogate_weight"].dims == ("prompt", "base_rollout")
    assert own["base_reward"].shape == (4, 6)
    again = BaseBatch.from_dataset(own)
    assert again.apart
    data, _ = await meter.point(again, 0.1, 0.0, lambda: None)
    assert data["reward"].shape == (4, 2)
    assert data["reward"].dims == ("prompt", "rollout")
    assert data["kl_k1"].shape == data["surrogate"].shape == (4, 6)
    assert data["kl_k1"].dims == ("prompt", "base_rollout")


async def test_an_objective_of_the_whole_batch_is_not_measured_on_some_tasks():
    runner = Runner(rollouts_of(5, 4, 4, 50))
    meter = meter_of(Client(toy_score), runner, SurrogateConfig(objective="kl_cov"), 4, 4)
    base = await meter.base(lambda: None)
    with pytest.raises(ConfigurationError, match="'kl_cov' depends on the whole batch"):
        await meter.point(base, 0.1, 0.0, lambda: None, range(1, 3))


# The configuration


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective": "gsop"}, "did you mean 'gspo'"),
        ({"objective": "forking_tokens"}, "entropies are not available to a landscape"),
        ({"objective": "grpo", "options": {"kl_coefficient": 0.04}}, "reference_logprobs are not available"),
        ({"objective": "dr_grpo"}, "give `constant`"),
        ({"objective": "gspo", "options": {"clip": 1}}, "unknown option of gspo: 'clip'"),
        ({"objective": "gspo", "clip_low": 0.1}, r"clip_low = 0.1 is for objective = 'grpo'.*options.clip_low"),
        ({"options": {"clip_low": 0.1}}, "options.clip_low of objective 'grpo' is clip_low of this table"),
    ],
)
def test_what_a_landscape_cannot_draw_is_refused_by_name(given, message):
    with pytest.raises(ValidationError, match=message):
        SurrogateConfig.model_validate(given)


def test_the_usual_objective_has_the_identity_it_always_had():
    usual = SweepConfig().provenance()["surrogate"]
    assert usual == {"advantage_eps": 1e-8, "advantage_scale": "std", "clip_high": 0.2, "clip_low": 0.2}
    other = SweepConfig.model_validate({"surrogate": {"objective": "dr_grpo", "options": {"constant": 64}}})
    assert other.provenance()["surrogate"] == usual | {
        "objective": "dr_grpo",
        "options": {"constant": 64},
        "advantage_scale": "none",
    }
    assert SweepConfig.from_provenance(other.provenance()).provenance() == other.provenance()
    kept = SweepConfig.model_validate(
        {"surrogate": {"objective": "dr_grpo", "options": {"constant": 64}, "advantage_scale": "std"}}
    )
    assert kept.surrogate.advantage_scale == "std"


def test_a_progressive_sweep_refuses_an_objective_of_the_whole_batch():
    with pytest.raises(ValidationError, match=r"'clip_cov' with until_ci_width = 0\.1"):
        SweepConfig.model_validate({"until_ci_width": 0.1, "surrogate": {"objective": "clip_cov"}})


# The trainer


@needs_trl
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grpo", {}),
        ("grpo", {"aggregation": "sequence_mean"}),
        ("dapo", {}),
        ("gspo", {"clip_low": 0.05, "clip_high": 0.05}),
        ("grpo_n", {}),
        ("grpo_n", {"normaliser": "kept"}),
        ("gspo_n", {}),
        ("dr_grpo", {"constant": 24}),
        ("kl_cov", {"share": 0.1}),
    ],
)
async def test_the_landscape_at_a_point_is_minus_the_trainers_loss(name, options):
    torch = importlib.import_module("torch")
    from transformers import AutoModelForCausalLM

    from rlvr_landscape_plugin.trl.batch import to_batch
    from rlvr_landscape_plugin.trl.trainer import LandscapeGRPOTrainer

    policies = []
    for noise in (0.0, 0.03):
        model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                weight += (
                    noise * weight.norm() / math.sqrt(weight.numel()) * torch.randn(weight.shape, generator=generator)
                )
        policies.append(model)

    def score(ids: np.ndarray, moved: bool) -> np.ndarray:
        with torch.no_grad():
            logits = policies[moved](torch.tensor(ids, dtype=torch.long)[None]).logits[0, :-1].double()
        chosen = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(ids, dtype=torch.long)[1:, None])[:, 0]
        return chosen.numpy().astype(np.float32)

    clips = {key: options[key] for key in ("clip_low", "clip_high") if key in options and name == "grpo"}
    surrogate = SurrogateConfig(objective=name, options=options, **clips)
    runner = Runner(rollouts_of(7, 3, 4, 2000))
    meter = meter_of(Client(score), runner, surrogate, 3, 4)
    base = await meter.base(lambda: None)
    data, _ = await meter.point(base, 0.1, 0.2, lambda: None)
    weight = base.tokens if base.weight is None else base.weight
    drawn = float(data["surrogate"].sum()) / weight.sum()

    # The same batch as TRL's columns: prompts padded on the left, completions on the right.
    for row, scored in zip(runner.rollouts, base.logprobs, strict=True):
        for rollout, logprobs in zip(row, scored, strict=True):
            rollout.segments[0].logprobs = logprobs
    batch = to_batch(runner.rollouts, filler=0)
    before, after = (max(map(len, rows)) for rows in (batch.prompt_ids, batch.completion_ids))

    def right(rows: list[list[Any]]):
        return torch.tensor([row + [0] * (after - len(row)) for row in rows])

    inputs = {
        "prompt_ids": torch.tensor([[0] * (before - len(row)) + row for row in batch.prompt_ids]),
        "prompt_mask": torch.tensor([[0] * (before - len(row)) + [1] * len(row) for row in batch.prompt_ids]),
        "completion_ids": right(batch.completion_ids),
        "completion_mask": right([[1] * len(row) for row in batch.completion_ids]),
        "tool_mask": right(batch.env_mask),
        "sampling_per_token_logps": right(batch.logprobs),
        "advantages": torch.tensor(base.advantage.ravel()),
    }
    trainer = LandscapeGRPOTrainer.__new__(LandscapeGRPOTrainer)
    trainer._objective = configure(name, **options)
    trainer.state = types.SimpleNamespace(global_step=0)
    loss = float(trainer._compute_loss(policies[1], inputs))
    assert drawn != 0
    assert drawn == pytest.approx(-loss, rel=2e-4, abs=2e-6)
