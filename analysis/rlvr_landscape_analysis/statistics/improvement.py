"""Are there better policies next to the checkpoint? Tests of points against the origin, the best point, overlap.

Differences are paired by prompt; prompts are the independent units. The point with the highest measured reward is a
winner partly by luck, so its gain is measured on prompts that did not choose it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from scipy.special import stdtr, stdtrit

from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.landscape import per_prompt
from rlvr_landscape_analysis.results import BOUNDS
from rlvr_landscape_analysis.schema import GRID
from rlvr_landscape_analysis.statistics.resample import MIN_PROMPTS, Bootstrap, Cells, cells, centred_interval

SPLITS = 64
"""Random halvings of the prompts behind the best point's gain."""


def better_than_origin(data: xr.Dataset, *, level: float = 0.05) -> xr.Dataset:
    """One-sided paired t-test of every point's reward against the origin's; dims (alpha, beta).

    `difference`, `standard_error`, `p_value`, `adjusted_p` (Benjamini and Hochberg 1995; the points' differences share
    the origin and the prompts and depend positively on each other, where the procedure holds) and `better`
    (adjusted_p ≤ `level`: of the points called better, an expected share of at most `level` is not). Scalars: `share`,
    `count`, `tested`. The origin itself is missing. Raises `AnalysisError` without an origin or with one prompt.
    """
    if not 0 < level < 1:
        raise AnalysisError(f"the false discovery rate level = {level:g} must lie between 0 and 1")
    reduced = per_prompt(data)
    matrices = cells(reduced, {"reward": "reward"})
    origin = _origin(matrices)
    rewards = matrices.values["reward"]
    prompts = rewards.shape[1]
    if prompts < 2:
        raise AnalysisError("a test against the origin needs at least two prompts")
    differences = rewards - rewards[origin]
    mean, spread = differences.mean(1), differences.std(1, ddof=1)
    error = spread / np.sqrt(prompts)
    # Without any spread there is no t: an equal point is not better, and a constant gain is certain.
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(spread > 0, mean / error, np.where(mean > 0, np.inf, 0.0))
    p = stdtr(prompts - 1, -t)
    p = np.where((spread == 0) & (mean <= 0), 1.0, p)
    others = np.arange(len(mean)) != origin
    adjusted = np.full(len(mean), np.nan)
    if others.any():
        from scipy.stats import false_discovery_control

        adjusted[others] = false_discovery_control(p[others], method="bh")
    p[origin] = np.nan
    result = xr.Dataset(
        {
            "difference": _grid(reduced, matrices, mean, "difference from the origin in mean reward"),
            "standard_error": _grid(reduced, matrices, error, "standard error of the difference from the origin"),
            "p_value": _grid(reduced, matrices, p, "one-sided p-value of being better than the origin"),
            "adjusted_p": _grid(reduced, matrices, adjusted, "p-value adjusted for the false discovery rate"),
        }
    )
    result["better"] = (result["adjusted_p"] <= level).assign_attrs(long_name="significantly better than the origin")
    result["tested"] = ((), int(others.sum()), {"long_name": "points tested", "units": "1"})
    result["count"] = ((), int(result["better"].sum()), {"long_name": "points significantly better", "units": "1"})
    share = float(result["count"]) / others.sum() if others.any() else np.nan
    result["share"] = ((), share, {"long_name": "share of points significantly better than the origin", "units": "1"})
    return result.assign_attrs(level=level, prompts=prompts)


def best_point(data: xr.Dataset, *, bootstrap: Bootstrap | None = None) -> xr.Dataset:
    """Where the best neighbour lies and what it gains over the origin; scalars and dim `bound`.

    `alpha`, `beta`, `radius`, `kl` of the point with the highest mean reward, the origin left out; `naive_gain`: its
    measured gain, too high because it was chosen by the same rollouts; a negative gain means that the checkpoint is
    the best point. `gain`: chosen on a random half of the prompts,
    valued on the other half, averaged over both directions of 64 halvings: the expected gain of a point chosen with
    half of the prompts. `gain_interval`: Student's t over prompts. `chosen_share`: how often a half chose the same
    point as all prompts do.
    """
    settings = bootstrap or Bootstrap()
    names = {"reward": "reward", "kl": "kl_k1"}
    matrices = cells(data, names)
    origin = _origin(matrices)
    rewards, kl = matrices.values["reward"], matrices.values["kl"].mean(1)
    prompts = rewards.shape[1]
    others = np.arange(len(rewards)) != origin
    if not others.any():
        raise AnalysisError("the dataset has no point beside the origin")
    differences = rewards[others] - rewards[origin]
    best = int(np.argmax(differences.mean(1)))
    place = int(np.flatnonzero(others)[best])
    out: dict[str, float] = {
        "alpha": matrices.alpha[place],
        "beta": matrices.beta[place],
        "radius": matrices.radius[place],
        "kl": kl[place],
        "naive_gain": differences[best].mean(),
    }
    estimate = split_half_gain(differences, settings) if prompts >= MIN_PROMPTS else None
    out["gain"] = estimate[0] if estimate else np.nan
    out["chosen_share"] = estimate[2] if estimate else np.nan
    interval = estimate[1] if estimate else (np.nan, np.nan)
    reason = "" if estimate else f"only {prompts} prompts: no split-half gain below {MIN_PROMPTS}"
    return _scalars(out, {"gain_interval": interval}, _LONG_NAMES, reason)


def split_half_gain(
    differences: np.ndarray, settings: Bootstrap
) -> tuple[float, tuple[float, float], float, np.ndarray]:
    """Gain of the point that half of the prompts choose, valued on the other half; see `best_point`.

    `differences` is (points, prompts). Returns the gain, its interval, the share of halves that choose the overall
    best point, and how often each point was chosen, weighted as in the gain (points,).
    """
    points, prompts = differences.shape
    rng = np.random.default_rng(np.random.SeedSequence([settings.seed, prompts, 1]))
    half = prompts // 2
    overall = int(np.argmax(differences.mean(1)))
    totals, counts = np.zeros(prompts), np.zeros(prompts)
    chosen = np.zeros(points)
    within = []
    for _ in range(SPLITS):
        order = rng.permutation(prompts)
        for choosing, valuing in ((order[:half], order[half:]), (order[half:], order[:half])):
            pick = int(np.argmax(differences[:, choosing].sum(1)))
            chosen[pick] += len(valuing)
            values = differences[pick, valuing]
            totals[valuing] += values
            counts[valuing] += 1
            within.append(values.var(ddof=1))
    gain = float(totals.sum() / counts.sum())
    # Between a prompt's variance at one point (too wide where the choice varies) and that of its average over choices
    # (too narrow there); both agree where the choice is clear. Coverage: docs/statistics.md.
    error = float(np.sqrt((np.mean(within) + (totals / counts).var(ddof=1)) / 2 / prompts))
    t = stdtrit(prompts - 1, settings.tails[1])
    return gain, (gain - t * error, gain + t * error), float(chosen[overall] / chosen.sum()), chosen / chosen.sum()


def overlap(data: xr.Dataset, *, share: float = 0.2, bootstrap: Bootstrap | None = None) -> xr.Dataset:
    """How far the region of highest reward and the region of lowest KL are the same points; scalars and dim `bound`.

    Both regions hold the best `share` of the points, origin left out. `overlap` is the share of one that lies in the
    other, with an interval over prompts; `chance` its value if the regions were placed independently (= `share`);
    `radial_chance` its value if KL were as measured and rewards were shuffled within shells of equal radius, so what
    the radius alone explains (mean of 200 shuffles); `radial_high` the 95th percentile of those shuffles.
    """
    if not 0 < share < 1:
        raise AnalysisError(f"share {share:g} must lie between 0 and 1")
    settings = bootstrap or Bootstrap()
    matrices = cells(data, {"reward": "reward", "kl": "kl_k1"})
    origin = matrices.origin
    keep = np.ones(len(matrices.alpha), bool)
    if origin is not None:
        keep[origin] = False
    rewards, kl = (matrices.values[name][keep] for name in ("reward", "kl"))
    points = len(rewards)
    size = round(share * points)
    if not 1 <= size < points:
        raise AnalysisError(f"a region of {share:g} of {points} points is empty or everything; use another share")
    weights = matrices.weights(settings)
    value = float(_overlaps(rewards.mean(1)[None], kl.mean(1)[None], size)[0])
    resampled = _overlaps((rewards @ weights).T, (kl @ weights).T, size)
    interval = centred_interval(value, resampled, settings, rewards.shape[1], low=0, high=1)
    rng = np.random.default_rng(np.random.SeedSequence([settings.seed, points, 2]))
    shell = matrices.shell[keep]
    shuffled = np.tile(rewards.mean(1), (200, 1))
    for members in (np.flatnonzero(shell == s) for s in np.unique(shell)):
        shuffled[:, members] = rng.permuted(shuffled[:, members], axis=1)
    null = _overlaps(shuffled, np.tile(kl.mean(1), (200, 1)), size)
    out = {
        "overlap": value,
        "chance": size / points,
        "radial_chance": float(null.mean()),
        "radial_high": float(np.quantile(null, 0.95)),
    }
    reason = "" if np.isfinite(interval[0]) else f"only {rewards.shape[1]} prompts: no interval below {MIN_PROMPTS}"
    return _scalars(out, {"overlap_interval": interval}, _LONG_NAMES, reason).assign_attrs(share=share)


def _overlaps(rewards: np.ndarray, kl: np.ndarray, size: int) -> np.ndarray:
    """Rows are landscapes; ties go to the earlier point."""
    high = np.argsort(-rewards, axis=1, kind="stable")[:, :size]
    low = np.argsort(kl, axis=1, kind="stable")[:, :size]
    marks = np.zeros(rewards.shape, bool)
    np.put_along_axis(marks, high, True, axis=1)
    return np.take_along_axis(marks, low, axis=1).mean(1)


def improvement(data: xr.Dataset, *, bootstrap: Bootstrap | None = None, level: float = 0.05) -> xr.Dataset:
    """Summary of one landscape; dim `bound`: `better_share`, `better_count`, `best_<…>`, `gain`, `overlap`."""
    tests = better_than_origin(data, level=level)
    best = best_point(data, bootstrap=bootstrap)
    regions = overlap(data, bootstrap=bootstrap)
    reason = "; ".join(dict.fromkeys(str(part["reason"].item()) for part in (best, regions) if part["reason"].item()))
    best = best.rename({name: f"best_{name}" for name in ("alpha", "beta", "radius", "kl")}).drop_vars("reason")
    counts = tests[["share", "count", "tested"]].rename(share="better_share", count="better_count")
    merged = xr.merge([counts, best, regions.drop_vars("reason")], combine_attrs="drop")
    merged["reason"] = ((), reason)
    return merged.assign_attrs(level=level, region=regions.attrs["share"])


def _origin(matrices: Cells) -> int:
    origin = matrices.origin
    if origin is None:
        raise AnalysisError("the dataset has no usable point at the origin; nothing can be compared with it")
    return origin


def _grid(data: xr.Dataset, matrices: Cells, values: np.ndarray, long_name: str) -> xr.DataArray:
    """Values of the used points as a map; points that were left out are missing."""
    full = xr.DataArray(
        np.full((data.sizes["alpha"], data.sizes["beta"]), np.nan),
        dims=GRID,
        coords={name: data[name] for name in GRID},
        attrs={"long_name": long_name, "units": "1"},
    )
    rows = np.searchsorted(np.sort(data["alpha"].values), matrices.alpha)
    columns = np.searchsorted(np.sort(data["beta"].values), matrices.beta)
    orders = [np.argsort(data[name].values) for name in GRID]
    full.values[orders[0][rows], orders[1][columns]] = values
    return full


_LONG_NAMES = {
    "alpha": "α of the neighbour with the highest reward",
    "beta": "β of the neighbour with the highest reward",
    "radius": "its distance from the origin",
    "kl": "its KL divergence from the checkpoint",
    "naive_gain": "its measured gain over the origin, chosen and valued by the same rollouts",
    "gain": "gain over the origin of a point chosen by half of the prompts, valued on the other half",
    "chosen_share": "how often a half chooses the same point as all prompts",
    "overlap": "share of the low-KL region that lies in the high-reward region",
    "chance": "overlap of independent regions",
    "radial_chance": "overlap if reward depended on the radius alone",
    "radial_high": "95th percentile of the overlap if reward depended on the radius alone",
}


def _scalars(
    values: dict[str, float], intervals: dict[str, tuple[float, float]], names: dict[str, str], reason: str
) -> xr.Dataset:
    variables: dict[str, Any] = {
        name: ((), float(value), {"long_name": names[name], "units": "nat" if name == "kl" else "1"})
        for name, value in values.items()
    }
    for name, interval in intervals.items():
        long_name = names[name.removesuffix("_interval")] + ", interval"
        variables[name] = ("bound", np.asarray(interval, float), {"long_name": long_name, "units": "1"})
    variables["reason"] = ((), reason, {"long_name": "why a value is missing"})
    return xr.Dataset(variables, {"bound": list(BOUNDS)})
