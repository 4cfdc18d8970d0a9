"""Synthetic landscapes whose truth is known exactly, in the schema of a real dataset.

For tests, benchmarks and tutorials: they are what the coverage tables in docs/statistics.md were measured on. Nothing
here is ever mixed into an analysis of real data; every dataset made here says so in its attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.schema import GRID, PROMPT, PROMPTS_SHA256, ROLLOUT, SCHEMA, SYNTHETIC, landscape_file

LEVELS = 4
"""A synthetic reward is one of 0, 1/4, … 1."""


@dataclass(frozen=True)
class Shape:
    """What a landscape is on average: reward in (0, 1), KL in nat and surrogate, for coordinates scaled to [−1, 1]."""

    reward: Callable[[np.ndarray, np.ndarray], np.ndarray]
    kl: Callable[[np.ndarray, np.ndarray], np.ndarray]
    description: str


def _well(k: np.ndarray, scale: float) -> np.ndarray:
    return 0.05 + 0.6 * np.exp(-k / scale)


SHAPES = {
    "radial": Shape(
        lambda x, y: _well(x**2 + y**2, 0.8),
        lambda x, y: 2.0 * (x**2 + y**2),
        "reward and KL depend on the radius alone",
    ),
    "kl": Shape(
        lambda x, y: _well(x**2 + 3 * y**2 + 0.3 * x * y, 1.5),
        lambda x, y: x**2 + 3 * y**2 + 0.3 * x * y,
        "reward is a function of KL, and KL is not round",
    ),
    "mixed": Shape(
        lambda x, y: (
            0.12 + 0.35 * np.exp(-(x**2 + y**2) / 0.8) + 0.1 * np.sin(2 * x) * np.cos(2 * y) * np.exp(-(x**2) - y**2)
        ),
        lambda x, y: x**2 + 2 * y**2,
        "a round peak with a second one beside it; KL is mildly oval",
    ),
    "tilt": Shape(
        lambda x, y: 0.4 + 0.1 * x - 0.1 * y**2 + 0.1 * x * y,
        lambda x, y: x**2 + 1.5 * y**2,
        "reward rises along α: better policies exist next to the checkpoint",
    ),
    "flat": Shape(
        lambda x, y: np.full(np.broadcast(x, y).shape, 0.4),
        lambda x, y: x**2 + 1.5 * y**2,
        "reward is the same everywhere",
    ),
    "narrow": Shape(
        lambda x, y: _well(x**2 + y**2, 0.05),
        lambda x, y: 2.0 * (x**2 + y**2),
        "a round peak no wider than the gaps of a coarse grid",
    ),
    "cliff": Shape(
        lambda x, y: 0.05 + 0.6 / (1 + np.exp((np.hypot(x, 1.3 * y) - 0.5) / 0.08)),
        lambda x, y: x**2 + 2 * y**2,
        "reward drops from high to low within a twelfth of the range",
    ),
    "second": Shape(
        lambda x, y: _well(x**2 + y**2, 0.8) + 0.3 * np.exp(-((x - 0.5) ** 2 + (y - 0.5) ** 2) / 0.02),
        lambda x, y: x**2 + 2 * y**2,
        "a round peak, and a small narrow one beside it",
    ),
}


def truth(shape: str, alphas: np.ndarray, betas: np.ndarray) -> xr.Dataset:
    """Expected reward, KL (nat) and surrogate at every point: what infinitely many prompts would give."""
    if shape not in SHAPES:
        raise AnalysisError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    chosen = SHAPES[shape]
    x, y = _scaled(alphas, betas)
    # The surrogate rises along (1, 0.5) to first order and falls with KL as clipping sets in.
    kl = chosen.kl(x, y)
    values = {"reward": chosen.reward(x, y), "kl": kl, "surrogate": 0.02 * x + 0.01 * y - 0.03 * kl}
    return xr.Dataset(
        {name: (("alpha", "beta"), value) for name, value in values.items()}, coords={"alpha": alphas, "beta": betas}
    )


def _scaled(alphas: np.ndarray, betas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half = max(np.abs(alphas).max(), np.abs(betas).max())
    x, y = np.meshgrid(np.asarray(alphas) / half, np.asarray(betas) / half, indexing="ij")
    return x, y


def landscape(
    shape: str = "mixed",
    *,
    points: int | tuple[int, int] = 9,
    half_width: float = 0.05,
    prompts: int = 128,
    rollouts: int = 4,
    heterogeneity: float = 0.3,
    seed: int = 0,
    step: int = 0,
    slice_seed: int = 0,
    lift: float = 0.0,
) -> xr.Dataset:
    """One sampled landscape in the schema of docs/dataset.md, dims (alpha, beta, prompt, rollout).

    Prompts differ in difficulty, in how they respond to a move, and in the scale of their KL (gamma distributed with
    coefficient of variation `heterogeneity`, 0…1); all these effects have mean zero, so `truth` is exact. KL of a
    completion is its expectation minus a linear term that all points share, as the log-ratio of a real completion is
    to first order; so its noise is correlated between points. `lift` is added to the logit of the reward everywhere.
    """
    nx, ny = (points, points) if isinstance(points, int) else points
    alphas, betas = (np.linspace(-half_width, half_width, n) if n > 1 else np.zeros(1) for n in (nx, ny))
    rng = np.random.default_rng(np.random.SeedSequence([seed, step, slice_seed % 2**32]))
    x, y = _scaled(alphas, betas)
    expected = truth(shape, alphas, betas)
    mean = expected["reward"].values
    if lift:
        mean = 1 / (1 + (1 / mean - 1) * np.exp(-lift))
    room = mean * (1 - mean)
    ability, taste = rng.uniform(-1, 1, (2, prompts))
    chance = mean[..., None] + heterogeneity * room[..., None] * (0.6 * ability + 0.4 * taste * x[..., None])
    solved = rng.binomial(LEVELS, chance[..., None], (nx, ny, prompts, rollouts))
    scale = rng.gamma(1 / heterogeneity**2, heterogeneity**2, prompts) if heterogeneity else np.ones(prompts)
    linear = rng.normal(size=(2, prompts, rollouts))
    drift = np.sqrt(2 * scale)[:, None] * (x[..., None, None] * linear[0] + y[..., None, None] * linear[1])
    kl = expected["kl"].values[..., None, None] * scale[:, None] - drift
    tokens = rng.integers(40, 100, (prompts, rollouts))
    advantage = rng.normal(size=(prompts, rollouts))
    gain = expected["surrogate"].values[..., None, None] * tokens * (1 + 0.3 * rng.normal(size=(prompts, 1)))
    surrogate = advantage * tokens + gain + 0.5 * drift
    at_origin = (x == 0) & (y == 0)
    kl[at_origin] = 0.0
    entropy = (0.2 + 0.15 * (x**2 + y**2))[..., None, None] * rng.gamma(20, 1 / 20, (nx, ny, prompts, rollouts))
    values = {
        "reward": solved / LEVELS,
        "kl_k1": kl,
        "kl_k3": np.maximum(np.expm1(-np.clip(kl, -20, 20) / 9) * 9 + kl, 0),
        "surrogate": surrogate,
        "entropy": entropy,
        "truncated": rng.random(kl.shape) < 0.01,
        "base_reward": solved[nx // 2, ny // 2] / LEVELS,
        "base_advantage": advantage,
        "base_tokens": tokens,
    }
    variables = {
        name: (SCHEMA[name].dims(GRID), value.astype(SCHEMA[name].dtype), SCHEMA[name].attrs)
        for name, value in values.items()
    }
    coords = {
        "alpha": ("alpha", alphas, {"long_name": "coordinate along direction δ", "units": "1"}),
        "beta": ("beta", betas, {"long_name": "coordinate along direction η", "units": "1"}),
        PROMPT: np.arange(prompts),
        ROLLOUT: np.arange(rollouts),
        "step": step,
        "slice_seed": slice_seed,
    }
    attrs = {SYNTHETIC: shape, "synthetic_seed": seed, PROMPTS_SHA256: f"synthetic {seed} {prompts}"}
    return xr.Dataset(variables, coords, attrs)


def write_run(path, steps=(0, 1, 10), slices=(0,), **options) -> list:
    """Write one synthetic dataset per step and slice into `path`, named as a sweep names them; returns the paths.

    `options` are those of `landscape`; `shape` may be a mapping from step to shape.
    """
    from pathlib import Path

    root = Path(path)
    root.mkdir(parents=True, exist_ok=True)
    shape = options.pop("shape", "mixed")
    written = []
    for step in steps:
        for slice_seed in slices:
            one = shape if isinstance(shape, str) else shape[step]
            data = landscape(one, step=step, slice_seed=slice_seed, **options)
            target = root / landscape_file(step, slice_seed)
            data.to_netcdf(target, engine="netcdf4", encoding={n: {"zlib": True} for n in data.data_vars})
            written.append(target)
    return written
