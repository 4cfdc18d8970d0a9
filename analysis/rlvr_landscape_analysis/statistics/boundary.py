"""What the checkpoint can reach with many tries: pass@k to k = 256, Cover@τ, tasks gained and lost, crossing curves.

Everything here is about the checkpoint itself, many rollouts per prompt; prompts are the units of sampling and no
direction was drawn. Snapshots are compared prompt by prompt. docs/statistics.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import gammaln, ndtri, stdtrit

from rlvr_landscape_analysis.designs import check_design, successes
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.results import BOUNDS
from rlvr_landscape_analysis.schema import pass_threshold
from rlvr_landscape_analysis.statistics.resample import MIN_PROMPTS, Bootstrap
from rlvr_landscape_analysis.statistics.two_way import TwoWay, prompt_means

TAUS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Success rates at which Cover@τ is given."""
CONTRAST_K = 16
"""Smallest k at which pass@k can tell exploitation from exploration (docs/statistics.md); stated before any data."""


def pass_at_k_values(solved: np.ndarray, valid: np.ndarray, k: np.ndarray | int) -> np.ndarray:
    """Unbiased pass@k per prompt, 1 − C(n−c, k)/C(n, k) (Chen et al. 2021, arXiv 2107.03374).

    `solved` c and `valid` n: int, (prompts,); `k`: a number or (ks,). Returns float64, (ks, prompts) or (prompts,),
    NaN where fewer than k rollouts are valid.
    """
    ks = np.atleast_1d(np.asarray(k, float))[:, None]
    n, c = np.asarray(valid, float)[None], np.asarray(solved, float)[None]
    with np.errstate(invalid="ignore"):
        miss = gammaln(n - c + 1) + gammaln(n - ks + 1) - gammaln(n - c - ks + 1) - gammaln(n + 1)
    values = np.where(n - c >= ks, 1 - np.exp(np.minimum(miss, 0)), 1.0)
    values = np.where(c == 0, 0.0, values)
    values = np.where(n >= ks, values, np.nan)
    return values[0] if np.ndim(k) == 0 else values


def default_ks(rollouts: int) -> list[int]:
    """1, 2, 4, … up to the number of rollouts, which is added if it is no power of two."""
    ks = [1 << i for i in range(int(rollouts).bit_length()) if 1 << i <= rollouts]
    return ks if ks and ks[-1] == rollouts else [*ks, int(rollouts)]


def boundary(
    data: xr.Dataset,
    *,
    ks: Sequence[int] | None = None,
    taus: Sequence[float] = TAUS,
    threshold: float | None = None,
    confidence: float = 0.95,
) -> xr.Dataset:
    """pass@k and Cover@τ of one checkpoint; dims (k, tau, bound).

    - `pass_at_k` (k): mean over prompts of the unbiased estimate, with Student's interval over prompts;
    - `cover` (tau): share of prompts whose measured success rate is at least τ (Cover@τ, arXiv 2510.08325), with
      Wilson's interval over prompts. It is about the measured rate of n rollouts: near τ the rate itself is uncertain;
    - `rate` (prompt): measured success rate; `solved`, `valid` (prompt).

    A rollout passes when its reward ≥ `threshold` (default: the dataset's attribute `pass_threshold`, else 0.99). `ks`
    are by default the powers of two up to the number of rollouts. Raises `AnalysisError` for a k beyond it.
    """
    check_design(data, "boundary")
    limit = pass_threshold(data.attrs, threshold)
    solved, valid = successes(data, limit)
    rollouts = int(valid.max(initial=0))
    chosen = _checked_ks(ks, rollouts)
    values = pass_at_k_values(solved, valid, np.array(chosen))
    mean, bounds = zip(*(student(row, confidence) for row in values), strict=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = np.where(valid > 0, solved / valid, np.nan)
    known = np.isfinite(rate)
    tau = np.asarray(taus, float)
    # The slack keeps a rate such as 13/260 at the τ that it equals.
    covered = (rate[known][None] >= tau[:, None] - 1e-12).sum(1)
    reason = "" if known.sum() >= MIN_PROMPTS else f"only {int(known.sum())} prompts: no interval below {MIN_PROMPTS}"
    variables: dict[str, Any] = {
        "pass_at_k": ("k", np.array(mean), {"long_name": "pass@k of the checkpoint", "units": "1"}),
        "pass_at_k_interval": (("k", "bound"), np.array(bounds), {"long_name": "its interval", "units": "1"}),
        "cover": ("tau", covered / max(known.sum(), 1), {"long_name": "share of prompts solved at rate tau or more"}),
        "cover_interval": (
            ("tau", "bound"),
            np.array([wilson(int(count), int(known.sum()), confidence) for count in covered]),
            {"long_name": "its interval", "units": "1"},
        ),
        "rate": ("prompt", rate, {"long_name": "measured success rate of the prompt", "units": "1"}),
        "solved": ("prompt", solved),
        "valid": ("prompt", valid),
        "reason": ((), reason),
    }
    coords = {
        "k": chosen,
        "tau": tau,
        "bound": list(BOUNDS),
        "prompt": data["prompt"].values,
        "step": int(data["step"]),
    }
    attrs = {"threshold": limit, "rollouts": rollouts, "prompts": int(known.sum()), "confidence": confidence}
    attrs |= {"prompts_sha256": data.attrs.get("prompts_sha256", "")}
    return xr.Dataset(variables, coords, attrs)


def _checked_ks(ks: Sequence[int] | None, rollouts: int) -> list[int]:
    if rollouts < 1:
        raise AnalysisError("no rollout of this boundary is valid")
    chosen = default_ks(rollouts) if ks is None else sorted({int(k) for k in ks})
    wrong = [k for k in chosen if not 1 <= k <= rollouts]
    if wrong:
        raise AnalysisError(f"pass@{wrong[0]} needs 1 ≤ k ≤ {rollouts}, the number of rollouts per prompt")
    return chosen


def student(values: np.ndarray, confidence: float) -> tuple[float, tuple[float, float]]:
    """Mean and Student's interval over prompts, missing values left out; no interval below `MIN_PROMPTS`."""
    values = values[np.isfinite(values)]
    if not len(values):
        return np.nan, (np.nan, np.nan)
    mean = float(values.mean())
    if len(values) < MIN_PROMPTS:
        return mean, (np.nan, np.nan)
    half = float(stdtrit(len(values) - 1, (1 + confidence) / 2) * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, (mean - half, mean + half)


def wilson(count: int, total: int, confidence: float) -> tuple[float, float]:
    """Wilson's interval of a share (Wilson 1927)."""
    if total < 1:
        return np.nan, np.nan
    z = float(ndtri((1 + confidence) / 2))
    share = count / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * np.sqrt(share * (1 - share) / total + z * z / (4 * total**2))
    return max(float(centre - half), 0.0), min(float(centre + half), 1.0)


def boundary_change(
    first: xr.Dataset,
    last: xr.Dataset,
    *,
    ks: Sequence[int] | None = None,
    threshold: float | None = None,
    confidence: float = 0.95,
    fdr: float = 0.05,
    bootstrap: Bootstrap | None = None,
) -> xr.Dataset:
    """The later checkpoint against the earlier one, prompt by prompt; dims (k, bound, prompt).

    - `difference` (k): pass@k, later minus earlier, with Student's interval over prompts;
    - `contrast` (k): D = Δpass@k − ½ Δpass@1 with its interval; `exploitation` (k): 1 − Δpass@k / Δpass@1;
    - `crossing_k`: the first k at which the later checkpoint loses after having won; `crossing_interval` its
      percentiles over resampled prompts (infinite where a resample does not cross), `crossing_share` the share of them
      that cross; `crosses`: whether the interval of the difference lies above 0 at k = 1 and below 0 at the largest k;
    - `gained`, `lost` (prompt, bool): success rates that differ by Fisher's exact test, false discovery rate `fdr`;
    - `entered`, `left`: prompts solved by the later checkpoint and never by the earlier one, and the reverse
      (arXiv 2507.14843: empirical support gained and lost), with `entered_by_chance`, `left_by_chance`, the numbers
      that equal success rates would give, all successes of a prompt divided between both checkpoints at random.

    Raises `AnalysisError` when the two were measured on different prompts or with different thresholds.
    """
    check_design(first, "boundary")
    check_design(last, "boundary")
    if (
        first.attrs.get("prompts_sha256") != last.attrs.get("prompts_sha256")
        or first.sizes["prompt"] != last.sizes["prompt"]
    ):
        raise AnalysisError("the two boundaries were measured on different prompts and cannot be paired")
    limits = [pass_threshold(data.attrs, threshold) for data in (first, last)]
    if limits[0] != limits[1]:
        raise AnalysisError(f"the two boundaries pass at different rewards ({limits[0]:g} and {limits[1]:g})")
    (c0, n0), (c1, n1) = (successes(data, limits[0]) for data in (first, last))
    chosen = _checked_ks(ks, int(min(n0.max(initial=0), n1.max(initial=0))))
    if 1 not in chosen:
        chosen = [1, *chosen]
    one, other = (pass_at_k_values(c, n, np.array(chosen)) for c, n in ((c0, n0), (c1, n1)))
    delta = other - one
    mean, bounds = zip(*(student(row, confidence) for row in delta), strict=True)
    contrast, contrast_bounds = zip(*(student(row - delta[0] / 2, confidence) for row in delta), strict=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        exploitation = 1 - np.array(mean) / mean[0]
    settings = bootstrap or Bootstrap(level=confidence)
    crossing, interval, share = _crossing(np.array(chosen), delta, settings)
    p = fisher_exact(c0, n0, c1, n1)
    gained, lost = _significant(p, c0, n0, c1, n1, fdr)
    variables: dict[str, Any] = {
        "difference": ("k", np.array(mean), {"long_name": "pass@k, later minus earlier snapshot", "units": "1"}),
        "difference_interval": (("k", "bound"), np.array(bounds)),
        "contrast": ("k", np.array(contrast), {"long_name": "change of pass@k minus half the change of pass@1"}),
        "contrast_interval": (("k", "bound"), np.array(contrast_bounds)),
        "exploitation": ("k", exploitation, {"long_name": "1 - change of pass@k / change of pass@1", "units": "1"}),
        "crossing_k": ((), crossing, {"long_name": "first k at which the earlier snapshot wins", "units": "1"}),
        "crossing_interval": ("bound", np.array(interval)),
        "crossing_share": ((), share, {"long_name": "share of resamples of prompts that cross", "units": "1"}),
        "crosses": ((), bool(bounds[0][0] > 0 and bounds[-1][1] < 0)),
        "p_value": ("prompt", p, {"long_name": "Fisher's exact test of equal success rates, two-sided", "units": "1"}),
        "gained": ("prompt", gained),
        "lost": ("prompt", lost),
    }
    chance = _by_chance(c0, n0, c1, n1)
    for name, count, expected in (
        ("entered", int(((c0 == 0) & (c1 > 0) & (n0 > 0)).sum()), chance[0]),
        ("left", int(((c1 == 0) & (c0 > 0) & (n1 > 0)).sum()), chance[1]),
    ):
        variables[name] = ((), count)
        variables[f"{name}_by_chance"] = ((), expected)
    variables["never"] = ((), int(((c0 == 0) & (c1 == 0)).sum()), {"long_name": "prompts that neither solved"})
    coords = {"k": chosen, "bound": list(BOUNDS), "prompt": first["prompt"].values}
    attrs = {
        "first_step": int(first["step"]),
        "last_step": int(last["step"]),
        "prompts": int(np.isfinite(delta[0]).sum()),
        "rollouts": int(min(n0.max(), n1.max())),
        "threshold": limits[0],
        "confidence": confidence,
        "fdr": fdr,
    }
    return xr.Dataset(variables, coords, attrs)


def contrast(first: xr.Dataset, last: xr.Dataset, k: int, *, threshold: float | None = None) -> TwoWay:
    """Δpass@1 and Δpass@k, shape (2,), as means over prompts with their deviations: T3 rests on them."""
    (c0, n0), (c1, n1) = (successes(data, pass_threshold(data.attrs, threshold)) for data in (first, last))
    values = pass_at_k_values(c1, n1, np.array([1, k])) - pass_at_k_values(c0, n0, np.array([1, k]))
    kept = np.isfinite(values).all(0)
    key = ("prompts", str(first.attrs.get("prompts_sha256")), kept.tobytes())
    return prompt_means(values[:, kept].T, key)


def _crossing(ks: np.ndarray, delta: np.ndarray, settings: Bootstrap) -> tuple[float, tuple[float, float], float]:
    kept = np.isfinite(delta).all(0)
    own = delta[:, kept]
    if own.shape[1] < MIN_PROMPTS or len(ks) < 2:
        return np.nan, (np.nan, np.nan), np.nan
    weights = settings.weights(delta.shape[1])[kept]
    measured = _first_crossing(ks, own.mean(1)[:, None])[0]
    draws = _first_crossing(ks, own @ weights / weights.sum(0))
    bounds = np.quantile(draws, settings.tails, method="nearest")
    return (
        measured if np.isfinite(measured) else np.nan,
        (float(bounds[0]), float(bounds[1])),
        float(np.isfinite(draws).mean()),
    )


def _first_crossing(ks: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """k at which each column turns negative after having been positive, between two ks on a scale of ln k; else inf."""
    found = np.full(curves.shape[1], np.inf)
    won = np.maximum.accumulate(curves > 0, axis=0)
    for i in range(1, len(ks)):
        turns = won[i - 1] & (curves[i] < 0) & (curves[i - 1] >= 0) & ~np.isfinite(found)
        if turns.any():
            before, after = curves[i - 1, turns], curves[i, turns]
            share = before / (before - after)
            found[turns] = np.exp(np.log(ks[i - 1]) + share * (np.log(ks[i]) - np.log(ks[i - 1])))
    return found


def fisher_exact(c0: np.ndarray, n0: np.ndarray, c1: np.ndarray, n1: np.ndarray) -> np.ndarray:
    """Two-sided p of equal success rates per prompt: dealings of all successes that are no likelier than this one."""
    p = np.ones(len(c0))
    for i, (a, m, b, n) in enumerate(zip(c0, n0, c1, n1, strict=True)):
        total = a + b
        if not m or not n or total in (0, m + n):
            continue
        x = np.arange(max(0, total - n), min(m, total) + 1)
        log_p = _log_hypergeometric(x, m, n, total)
        own = log_p[int(a - x[0])]
        p[i] = min(float(np.exp(log_p[log_p <= own + 1e-7]).sum()), 1.0)
    return p


def _log_hypergeometric(x: np.ndarray, m: int, n: int, total: int) -> np.ndarray:
    """ln P(x of `total` successes fall among the m rollouts of the earlier checkpoint, the rest among n)."""

    def choose(a, b):
        return gammaln(a + 1) - gammaln(b + 1) - gammaln(a - b + 1)

    return choose(float(m), x) + choose(float(n), total - x) - choose(float(m + n), float(total))


def _significant(
    p: np.ndarray, c0: np.ndarray, n0: np.ndarray, c1: np.ndarray, n1: np.ndarray, fdr: float
) -> tuple[np.ndarray, np.ndarray]:
    from scipy.stats import false_discovery_control

    found = false_discovery_control(p, method="bh") <= fdr
    rise = c1 / np.maximum(n1, 1) - c0 / np.maximum(n0, 1)
    return found & (rise > 0), found & (rise < 0)


def _by_chance(c0: np.ndarray, n0: np.ndarray, c1: np.ndarray, n1: np.ndarray) -> tuple[float, float]:
    entered, left = 0.0, 0.0
    for a, m, b, n in zip(c0, n0, c1, n1, strict=True):
        total = int(a + b)
        if not m or not n or not total:
            continue
        if total <= n:
            entered += float(np.exp(_log_hypergeometric(np.array([0.0]), m, n, total))[0])
        if total <= m:
            left += float(np.exp(_log_hypergeometric(np.array([float(total)]), m, n, total))[0])
    return entered, left
