"""Policies along directions with a meaning, and how they compare with random ones at equal KL: the reward–KL frontier.

A path is not drawn at random, so its own numbers have errors over prompts only. A comparison with random directions has
errors over directions and prompts (`two_way.py`). Formulas: docs/statistics.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.designs import CensusPoints, base_values, check_design, prompt_values
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.results import BOUNDS
from rlvr_landscape_analysis.schema import PROMPT
from rlvr_landscape_analysis.statistics.resample import MIN_PROMPTS
from rlvr_landscape_analysis.statistics.two_way import (
    MIN_DIRECTIONS,
    TwoWay,
    covariances,
    from_leave_outs,
    leave_out_weights,
    prompt_means,
)

MIN_REACHED = 0.8
"""Share of the random rays that must reach a KL for a comparison there."""


@dataclass(frozen=True)
class PathPoints:
    """The policies of one path without missing values."""

    name: str
    position: np.ndarray
    """(positions,), in units of the path's vector; 0 is the checkpoint."""
    length: np.ndarray
    """Realised length of the move by ‖θ‖, (positions,); NaN where it is not known."""
    kl: np.ndarray
    """nat, (positions, N)."""
    reward: np.ndarray
    """(positions, N)."""
    base: np.ndarray
    """Reward of the checkpoint's own rollouts, (N,)."""
    prompts_key: tuple
    kept: np.ndarray
    """Which prompts of the dataset were used, bool (all prompts,)."""

    @property
    def change(self) -> np.ndarray:
        """Reward minus the checkpoint's, paired by prompt, (positions, N)."""
        return self.reward - self.base


def path_points(data: xr.Dataset, *, estimator: str = "k1", prompts: np.ndarray | None = None) -> list[PathPoints]:
    """The paths of a dataset as arrays. A position with more than half of its prompts missing is left out.

    `prompts` (bool, all prompts) restricts to prompts that another dataset has, too.
    """
    check_design(data, "path")
    if f"kl_{estimator}" not in data:
        raise AnalysisError(f"the path dataset has no KL estimator {estimator!r}")
    dims = ("path", "position")
    kl, reward = prompt_values(data[f"kl_{estimator}"], dims), prompt_values(data["reward"], dims)
    base = base_values(data)
    length = np.full(kl.shape[:2], np.nan)
    if "realised_step" in data:
        length = data["realised_step"].transpose(*dims).values.astype(float)
    position = data["position"].values.astype(float)
    good = np.isfinite(kl) & np.isfinite(reward)
    measured = good.mean(-1) >= 0.5
    kept = np.isfinite(base) if prompts is None else np.isfinite(base) & prompts
    kept = kept & np.where(measured[..., None], good, True).all((0, 1))
    if not measured.any() or not kept.any():
        raise AnalysisError("no position of the paths has values for the same prompts as the checkpoint")
    key = ("prompts", str(data.attrs.get("prompts_sha256")), kept.tobytes())
    return [
        PathPoints(
            name=str(name),
            position=position[measured[i]],
            length=length[i, measured[i]],
            kl=kl[i, measured[i]][:, kept],
            reward=reward[i, measured[i]][:, kept],
            base=base[kept],
            prompts_key=key,
            kept=kept,
        )
        for i, name in enumerate(data["path"].values)
        if measured[i].any()
    ]


def path(
    data: xr.Dataset,
    around: CensusPoints | None = None,
    *,
    census_kept: np.ndarray | None = None,
    confidence: float = 0.95,
    estimator: str = "k1",
) -> xr.Dataset:
    """KL, reward and length along paths, and against the random directions of a census; dims (path, position, bound).

    - `kl` (nat), `reward`, `change` (ΔR from the checkpoint, paired by prompt) with `<name>_interval` over prompts;
      `length` by ‖θ‖; `curvature` = 2 KL / length², nat.
    With a census `around` of the same checkpoint and prompts, at the position's own KL:
    - `random_change`: mean ΔR of random directions; `advantage`: the path's ΔR minus it, with its interval over
      directions and prompts; `advantage_in_spreads`: the advantage by the standard deviation of the true ΔR over random
      directions there;
    - `fisher_ratio`: KL per squared length along the path over that of random directions, with its interval;
    - `reached`: share of the random rays that reach this KL. Below 0.8 nothing is compared.

    Rays are interpolated linearly in √KL, from the checkpoint itself (KL 0, ΔR 0) outwards. The checkpoint itself
    (position 0) is compared with nothing. `census_kept`: the prompts of the census that `around` holds.
    """
    paths = path_points(data, estimator=estimator, prompts=census_kept)
    if around is not None:
        _check_pair(data, paths[0], around)
    names = [one.name for one in paths]
    positions = np.unique(np.concatenate([one.position for one in paths]))
    shape = (len(paths), len(positions))
    bounded = ("kl", "reward", "change", "advantage", "fisher_ratio")
    out = {name: np.full(shape, np.nan) for name in _LONG_NAMES}
    out |= {f"{name}_interval": np.full((*shape, 2), np.nan) for name in bounded}
    reasons = np.full(shape, "", dtype=object)
    for p, one in enumerate(paths):
        columns = np.searchsorted(positions, one.position)
        found = _along(one, confidence)
        compared, why = _against(one, around, confidence) if around is not None else ({}, [])
        for name, values in (found | compared).items():
            out[name][p, columns] = values
        for column, reason in zip(columns, why, strict=False):
            reasons[p, column] = reason
    variables: dict[str, Any] = {}
    for name, values in out.items():
        base = name.removesuffix("_interval")
        dims = ("path", "position", "bound") if name.endswith("_interval") else ("path", "position")
        long_name, units = _LONG_NAMES[base]
        tail = ", interval" if name.endswith("_interval") else ""
        variables[name] = (dims, values, {"long_name": long_name + tail, "units": units})
    variables["reason"] = (("path", "position"), reasons.astype(str), {"long_name": "why a value is missing"})
    coords = {
        "path": names,
        "position": ("position", positions, {"long_name": "position in units of the path's vector", "units": "1"}),
        "bound": list(BOUNDS),
        "step": int(data["step"]),
    }
    attrs = {
        "prompts": int(paths[0].kept.sum()),
        "directions": 0 if around is None else around.directions,
        "confidence": confidence,
    }
    return xr.Dataset(variables, coords, attrs)


def _check_pair(data: xr.Dataset, one: PathPoints, around: CensusPoints) -> None:
    if int(data["step"]) != around.step:
        raise AnalysisError(f"the path is of step {int(data['step'])}, the census of step {around.step}")
    if one.prompts_key != around.prompts_key:
        raise AnalysisError(
            "path and census were measured on different prompts, or other prompts are missing in each; "
            "measure both on the same tasks"
        )


def _along(one: PathPoints, confidence: float) -> dict[str, np.ndarray]:
    found = {"length": one.length}
    for name, values in (("kl", one.kl), ("reward", one.reward), ("change", one.change)):
        found[name] = values.mean(1)
        if values.shape[1] >= MIN_PROMPTS:
            found[f"{name}_interval"] = np.stack(prompt_means(values.T, "p").interval(confidence), -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found["curvature"] = np.where(one.length > 0, 2 * one.kl.mean(1) / one.length**2, np.nan)
    return found


def rays_at(kl: np.ndarray, targets: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` of rays where their KL is `targets`, linear in √KL from 0 at the checkpoint; NaN beyond the last radius.

    `kl` and `values`: (rays, radii) in the order of rising radii; `targets`: (targets,). Returns (rays, targets). A KL
    that falls along a ray (noise) counts as not rising.
    """
    root = np.sqrt(np.maximum.accumulate(np.clip(kl, 0, None), axis=1))
    root = np.concatenate([np.zeros((len(kl), 1)), root], axis=1)
    known = np.concatenate([np.zeros((len(kl), 1)), values], axis=1)
    goal = np.sqrt(np.clip(targets, 0, None))
    upper = (root[:, :, None] < goal[None, None]).sum(1)
    beyond = upper >= root.shape[1]
    upper = np.clip(upper, 1, root.shape[1] - 1)
    rows = np.arange(len(kl))[:, None]
    left, right = root[rows, upper - 1], root[rows, upper]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(right > left, (goal - left) / (right - left), 1.0)
    found = known[rows, upper - 1] + share * (known[rows, upper] - known[rows, upper - 1])
    return np.where(beyond, np.nan, found)


def _against(one: PathPoints, around: CensusPoints, confidence: float) -> tuple[dict[str, np.ndarray], list[str]]:
    count = len(one.position)
    names = ("random_change", "advantage", "advantage_in_spreads", "fisher_ratio", "reached")
    found = {name: np.full(count, np.nan) for name in names}
    found |= {f"{name}_interval": np.full((count, 2), np.nan) for name in ("advantage", "fisher_ratio")}
    if around.directions < MIN_DIRECTIONS or around.prompts < MIN_PROMPTS:
        return found, [f"only {around.directions} directions and {around.prompts} prompts"] * count
    reasons = []
    rays = _ray_table(one, around)
    for i in range(count):
        values, reached = rays["change"][..., i], rays["reached"][..., i]
        found["reached"][i] = reached[-1].mean()
        if one.kl[i].mean() <= 0 or one.position[i] == 0:
            reasons.append("its KL from the checkpoint is not above 0")
            continue
        if found["reached"][i] < MIN_REACHED:
            reasons.append(f"only {found['reached'][i]:.0%} of the random rays reach its KL")
            continue
        reasons.append("")
        keys = around.directions_key, one.prompts_key
        random, own = _over_directions(values, keys), _own_change(one, i)
        advantage = own - random
        found["random_change"][i] = float(random.value)
        found["advantage"][i] = float(advantage.value)
        found["advantage_interval"][i] = [float(end) for end in advantage.interval(confidence)]
        spread = _spread_at(one, around, i)
        found["advantage_in_spreads"][i] = float(advantage.value) / spread if spread > 0 else np.nan
        if np.isfinite(one.length[i]) and one.length[i] > 0 and np.isfinite(around.length).all():
            ratio = _ratio(one, rays["inverse"][..., i], i, keys)
            found["fisher_ratio"][i] = float(ratio.value)
            found["fisher_ratio_interval"][i] = [float(end) for end in ratio.positive_interval(confidence)]
    return found, reasons


def _ray_table(one: PathPoints, around: CensusPoints) -> dict[str, np.ndarray]:
    """Rays at the path's KLs, with every prompt left out: (N + 1, K, 2, positions)."""
    w = leave_out_weights(around.prompts)
    w = w / w.sum(1, keepdims=True)
    targets = one.kl @ w.T
    kl, change = (np.einsum("rdsn,bn->bdsr", own, w) for own in (around.values["kl"], around.change))
    length = np.moveaxis(around.length, 0, -1).reshape(-1, len(around.radius))
    shape = (len(w), around.directions, 2, len(one.position))
    found = {name: np.empty(shape) for name in ("change", "inverse", "reached")}
    for b in range(len(w)):
        own = kl[b].reshape(-1, kl.shape[-1])
        at = rays_at(own, targets[:, b], change[b].reshape(own.shape))
        distance = rays_at(own, targets[:, b], length)
        found["change"][b] = at.reshape(shape[1:])
        found["reached"][b] = np.isfinite(at).reshape(shape[1:])
        with np.errstate(invalid="ignore", divide="ignore"):
            found["inverse"][b] = (1 / distance**2).reshape(shape[1:])
    return found


def _over_directions(values: np.ndarray, keys: tuple) -> TwoWay:
    """Mean over directions of what is known with every prompt left out, (N + 1, K, 2); rays that do not reach are out.

    Whether a ray reaches is decided with all prompts, so that leaving one out changes values and not the set.
    """
    known = np.isfinite(values[-1])
    filled = np.where(known[None] & np.isfinite(values), values, np.where(known, values[-1], 0.0)[None])
    v = leave_out_weights(values.shape[1])
    sums = np.einsum("ad,bds->ab", v, np.where(known, filled, 0.0))
    counts = v @ known.sum(1)
    return from_leave_outs(sums / counts[:, None], *keys)


def _own_change(one: PathPoints, i: int) -> TwoWay:
    return prompt_means(one.change[i], one.prompts_key)


def _spread_at(one: PathPoints, around: CensusPoints, i: int) -> float:
    """Standard deviation over directions of the true ΔR at the path's KL, noise taken out."""
    kl = np.moveaxis(around.values["kl"].mean(-1), 0, -1)
    target = one.kl[i].mean(keepdims=True)
    rows = kl.reshape(-1, kl.shape[-1])
    # The interpolation is linear in the values, so each prompt has its own value on each ray.
    per_radius = [
        rays_at(rows, target, np.eye(kl.shape[-1])[r][None].repeat(len(rows), 0)) for r in range(kl.shape[-1])
    ]
    weights = np.nan_to_num(np.concatenate(per_radius, axis=1)).reshape(*kl.shape)
    values = np.einsum("rdsn,dsr->dsn", around.change, weights)
    reached = np.isfinite(per_radius[0]).reshape(kl.shape[:2]).all(1)
    if reached.sum() < MIN_DIRECTIONS:
        return 0.0
    square = float(covariances(values[reached], values[reached])[-1, -1])
    return float(np.sqrt(max(square, 0.0)))


def _ratio(one: PathPoints, inverse: np.ndarray, i: int, keys: tuple) -> TwoWay:
    """(1 / length²) of the path over the mean of (1 / length²) of random rays, at equal KL.

    KL is the same on both sides, so it cancels; its error moves the point at which the rays are taken.
    """
    random = _over_directions(inverse, keys)
    own = 1 / float(one.length[i]) ** 2
    value = own / float(random.value)
    return random.linear_scalar(-value / float(random.value), value)


_LONG_NAMES = {
    "kl": ("KL divergence from the checkpoint", "nat"),
    "reward": ("mean reward", "1"),
    "change": ("reward minus the checkpoint's", "1"),
    "length": ("length of the move by the norm of theta", "1"),
    "curvature": ("2 KL / length^2", "nat"),
    "random_change": ("mean reward change of random directions at the same KL", "1"),
    "advantage": ("reward change minus that of random directions at the same KL", "1"),
    "advantage_in_spreads": ("advantage by the standard deviation over random directions", "1"),
    "fisher_ratio": ("KL per squared length over that of random directions, at the same KL", "1"),
    "reached": ("share of the random rays that reach the KL", "1"),
}


def compared_position(along: xr.Dataset, target: float = -1.0, value: str = "advantage") -> int | None:
    """Index of the position of one path where it was compared with random directions; None where it was nowhere.

    `target` if `value` is known there, else the farthest one on the way to it: random directions may not reach the KL
    of the target.
    """
    positions, known = along["position"].values.astype(float), np.isfinite(along[value].values)
    between = (np.sign(positions) == np.sign(target)) & (np.abs(positions) <= abs(target) * (1 + 1e-9)) & known
    return int(np.flatnonzero(between)[np.argmax(np.abs(positions[between]))]) if between.any() else None


def prompts_of(data: xr.Dataset, points: CensusPoints) -> np.ndarray:
    """Which prompts of a dataset a census's arrays hold, bool (all prompts,).

    Raises `AnalysisError` where the two were measured on different prompts.
    """
    _, measured, kept = points.prompts_key
    own, count = str(data.attrs.get("prompts_sha256")), data.sizes[PROMPT]
    if own != measured or count != points.all_prompts:
        raise AnalysisError(
            f"the path was measured on {count} prompts and the census on {points.all_prompts} different prompts "
            "(prompts_sha256 differs); measure both on the same tasks"
        )
    return np.frombuffer(kept, dtype=bool)
