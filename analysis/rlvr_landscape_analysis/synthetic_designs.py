"""Synthetic censuses, paths and boundaries whose truth is known exactly, in the schema of real datasets.

`synthetic.py` makes landscapes on a grid. For tests, benchmarks and examples; every dataset made here says so in its
attributes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.synthetic import LEVELS

SIGNS = (1, -1)


@dataclass(frozen=True)
class CensusTruth:
    """What a census measures, at the largest radius; smaller radii follow from it.

    With u = radius / largest radius, a direction has the KL `kl` · u² · g, where g has mean 1 and the coefficient of
    variation √(2 / `dimensions`), as a quadratic form of a random direction has; and the reward difference
    `drift` · u + `spread` · u · z, where z has mean 0, variance 1 and the correlation `correlation` with g.
    """

    correlation: float = -0.4
    """Of KL and ΔR over directions, at every radius."""
    drift: float = -0.05
    """Mean ΔR at the largest radius."""
    spread: float = 0.04
    """Standard deviation of ΔR over directions there."""
    kl: float = 4.0
    """Mean KL there, nat."""
    dimensions: float = 12.0
    """Effective number of directions that KL knows, (tr F)² / tr F²."""
    odd: float = 0.7
    """Share of the variance of z, apart from g, that changes its sign with the direction."""
    common: bool = False
    """Give each direction one z for all radii (a ray that is good is good everywhere); otherwise each radius has its
    own."""


def census(
    truth: CensusTruth = CensusTruth(),
    *,
    pairs: int = 32,
    radii: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0),
    prompts: int = 64,
    rollouts: int = 2,
    base_rollouts: int = 8,
    heterogeneity: float = 0.3,
    interaction: float = 0.05,
    unit: str = "displacement",
    directions: str = "fresh",
    seed: int = 0,
    step: int = 10,
) -> xr.Dataset:
    """One sampled census, dims (direction, sign, radius, prompt, rollout).

    Prompts differ in difficulty, in the scale of their KL and in how they respond to a move (coefficient of variation
    `heterogeneity`), and each prompt responds to each direction in its own way (standard deviation `interaction` of
    its reward at the largest radius). All these effects have mean zero, so `truth` is exact. Prompts depend on `seed`
    alone, directions on `seed` and, unless they are `paired`, on `step`.
    """
    of_directions = np.random.default_rng(np.random.SeedSequence([seed, 2, 0 if directions == "paired" else step + 1]))
    rng = np.random.default_rng(np.random.SeedSequence([seed, 3, step]))
    u = np.asarray(radii, float) / max(radii)
    shape = (pairs, 2, len(u))
    sign = np.array(SIGNS, float)[None, :, None]
    g = of_directions.gamma(truth.dimensions / 2, 2 / truth.dimensions, pairs)[:, None, None]
    rest = of_directions.normal(size=(2, pairs, 2, 1 if truth.common else len(u)))
    odd = np.sqrt(truth.odd) * sign * rest[0][:, :1] + np.sqrt(1 - truth.odd) * rest[1]
    known = (g - 1) / np.sqrt(2 / truth.dimensions)
    z = truth.correlation * known + np.sqrt(1 - truth.correlation**2) * odd
    change = np.broadcast_to(u * (truth.drift + truth.spread * z), shape)
    kl = np.broadcast_to(truth.kl * u**2 * g, shape)

    start, response, kl_scale = _prompts(seed, prompts, heterogeneity)
    own = interaction * np.sqrt(3) * rng.uniform(-1, 1, (pairs, 2, 1, prompts)) * u[:, None]
    chance = np.clip(start + change[..., None] * response + own, 0, 1)
    reward = rng.binomial(LEVELS, chance[..., None], (*chance.shape, rollouts)) / LEVELS
    mean_kl = kl[..., None] * kl_scale * (1 + heterogeneity * rng.uniform(-1, 1, (pairs, 2, 1, prompts)))
    noise = rng.normal(size=(pairs, 1, 1, prompts, base_rollouts))
    kl_k1 = mean_kl[..., None] + (sign[..., None, None] * noise) * np.sqrt(2 * mean_kl)[..., None]
    tokens = rng.integers(40, 100, (prompts, base_rollouts))
    surrogate = -0.03 * kl_k1 * tokens / 70 + 0.1 * rng.normal(size=kl_k1.shape)
    base = _base_rewards(seed, step, start, base_rollouts)
    point, rolled, scored = ("direction", "sign", "radius"), ("prompt", "rollout"), ("prompt", "base_rollout")
    relative = np.asarray(radii, float) * (1.0 if unit == "theta" else 0.01)
    variables = {
        "reward": ((*point, *rolled), reward.astype("f4")),
        "kl_k1": ((*point, *scored), kl_k1.astype("f4")),
        "surrogate": ((*point, *scored), surrogate.astype("f4")),
        "realised_step": (point, np.broadcast_to(relative, shape).copy()),
        "base_reward": (scored, base.astype("f4")),
        "base_tokens": (scored, tokens.astype("i4")),
    }
    if unit == "displacement":
        variables["displacement_radius"] = (point, np.broadcast_to(np.asarray(radii, float), shape).copy())
    coords = {
        "direction": np.arange(pairs),
        "sign": list(SIGNS),
        "radius": ("radius", np.asarray(radii, float), {"long_name": "length of the move", "units": unit}),
        "prompt": np.arange(prompts),
        "step": step,
    }
    attrs = {
        "design": "census",
        "directions": directions,
        "radius_unit": unit,
        "synthetic": "census",
        "synthetic_seed": seed,
        "prompts_sha256": f"synthetic {seed} {prompts}",
    }
    return xr.Dataset(variables, coords, attrs)


def _prompts(seed: int, prompts: int, heterogeneity: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expected reward at the checkpoint, response to a move (mean 1) and scale of the KL (mean 1) of every prompt."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
    start = 0.5 + 0.15 * rng.uniform(-1, 1, prompts)
    response = 1 + heterogeneity * rng.uniform(-1, 1, prompts) * np.sqrt(3)
    scale = rng.gamma(1 / heterogeneity**2, heterogeneity**2, prompts) if heterogeneity else np.ones(prompts)
    return start, response, scale


@dataclass(frozen=True)
class PathTruth:
    """A path: KL = `kl` · x², ΔR = `slope` · x − `bend` · x² at position x."""

    kl: float = 2.0
    """nat at position 1."""
    slope: float = 0.06
    bend: float = 0.04
    length: float = 0.01
    """Length of the move at position 1, by ‖θ‖."""


def path(
    truths: dict[str, PathTruth],
    *,
    positions: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5),
    prompts: int = 64,
    rollouts: int = 2,
    base_rollouts: int = 8,
    heterogeneity: float = 0.3,
    interaction: float = 0.05,
    seed: int = 0,
    step: int = 10,
) -> xr.Dataset:
    """Sampled paths, dims (path, position, prompt, rollout), around the checkpoint of `census` with the same `seed`.

    Prompts are those of the census and respond in the same way; the checkpoint's own rollouts are the census's, too,
    when `base_rollouts` agree.
    """
    start, response, kl_scale = _prompts(seed, prompts, heterogeneity)
    rng = np.random.default_rng(np.random.SeedSequence([seed, 4, step]))
    x = np.asarray(positions, float)
    change = np.array([truth.slope * x - truth.bend * x**2 for truth in truths.values()])
    kl = np.array([truth.kl * x**2 for truth in truths.values()])
    own = interaction * np.sqrt(3) * rng.uniform(-1, 1, (len(truths), 1, prompts)) * x[:, None]
    chance = np.clip(start + change[..., None] * response + own, 0, 1)
    reward = rng.binomial(LEVELS, chance[..., None], (*chance.shape, rollouts)) / LEVELS
    mean_kl = (kl[..., None] * kl_scale)[..., None]
    kl_k1 = mean_kl + np.sign(x)[:, None, None] * np.sqrt(2 * mean_kl) * rng.normal(
        size=(len(truths), 1, prompts, base_rollouts)
    )
    dims, scored = ("path", "position", "prompt", "rollout"), ("prompt", "base_rollout")
    length = np.array([np.abs(x) * truth.length for truth in truths.values()])
    variables = {
        "reward": (dims, reward.astype("f4")),
        "kl_k1": ((*dims[:2], *scored), kl_k1.astype("f4")),
        "realised_step": (dims[:2], length),
        "base_reward": (scored, _base_rewards(seed, step, start, base_rollouts).astype("f4")),
    }
    coords = {"path": list(truths), "position": x, "prompt": np.arange(prompts), "step": step}
    attrs = {"design": "path", "synthetic": "path", "synthetic_seed": seed}
    return xr.Dataset(variables, coords, attrs | {"prompts_sha256": f"synthetic {seed} {prompts}"})


def _base_rewards(seed: int, step: int, start: np.ndarray, rollouts: int) -> np.ndarray:
    rng = np.random.default_rng(np.random.SeedSequence([seed, 7, step]))
    return rng.binomial(LEVELS, start[:, None], (len(start), rollouts)) / LEVELS


def boundary(
    rates: np.ndarray,
    *,
    rollouts: int = 256,
    seed: int = 0,
    step: int = 0,
    prompts_seed: int = 0,
) -> xr.Dataset:
    """One sampled boundary, dims (prompt, base_rollout): prompt i is solved at the rate `rates[i]`, reward 0 or 1."""
    rates = np.asarray(rates, float)
    rng = np.random.default_rng(np.random.SeedSequence([seed, 5, step]))
    reward = (rng.random((len(rates), rollouts)) < rates[:, None]).astype("f4")
    tokens = rng.integers(40, 100, reward.shape).astype("i4")
    dims = ("prompt", "base_rollout")
    attrs = {"design": "boundary", "synthetic": "boundary", "synthetic_seed": seed}
    attrs |= {"prompts_sha256": f"synthetic {prompts_seed} {len(rates)}"}
    coords = {"prompt": np.arange(len(rates)), "base_rollout": np.arange(rollouts), "step": step}
    return xr.Dataset({"base_reward": (dims, reward), "base_tokens": (dims, tokens)}, coords, attrs)


def rates_over_training(
    steps: tuple[int, ...] = (0, 10, 40), *, prompts: int = 64, discovery: float = 0.0, seed: int = 0
) -> dict[int, np.ndarray]:
    """Success rates of the same prompts by step: training sharpens what was reachable, and forgets the rarest.

    Rates p become p^(1/(1 + t)) or so for prompts above the median and vanish for some below it, t growing with
    ln(1 + step); `discovery` is the share of the prompts with rate 0 that become solvable.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, 6]))
    start = np.where(rng.random(prompts) < 0.25, 0.0, rng.beta(0.5, 1.5, prompts))
    luck, fate = rng.random((2, prompts))
    found = {}
    for step in steps:
        t = np.log1p(step) / np.log(41)
        grown = start ** (1 / (1 + 1.5 * t))
        kept = np.where((start < 0.1) & (start > 0) & (fate < 0.5 * t), 0.0, grown)
        found[step] = np.where((start == 0) & (luck < discovery * t), 0.3 * t, kept)
    return found
