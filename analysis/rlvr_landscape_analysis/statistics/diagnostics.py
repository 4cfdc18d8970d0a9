"""Companion diagnostics: entropy law, two stages, pass@k crossing, token surprisal. Sources in docs/statistics.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from scipy.special import stdtrit

from rlvr_landscape_analysis.datasets import check_checksum, reading
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.landscape import pass_at_k_cells, per_prompt
from rlvr_landscape_analysis.results import BOUNDS
from rlvr_landscape_analysis.schema import PROGRESSIVE, TOKEN_LOGPROB
from rlvr_landscape_analysis.statistics.resample import MIN_PROMPTS, Bootstrap
from rlvr_landscape_analysis.statistics.training import mean_interval, time_axis

SURPRISAL_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.8, 0.9, 0.95, 0.99)


def entropy_law(entropy: np.ndarray, reward: np.ndarray, *, level: float = 0.95) -> xr.Dataset:
    """Least squares of R = −a·exp(H) + b (Cui et al. 2025, arXiv 2505.22617, eq. 1); dims (observation, bound).

    `entropy` H (nat per token) and `reward` R are matching values over training or a slice; missing pairs are left
    out. The law is linear in exp(H): `a`, `b` with standard errors and Student intervals, `ceiling` = b − a (R at H =
    0), `r_squared`, `residual`. The errors assume independent observations, which points of one slice are not:
    over a slice read them as a description. Fewer than four pairs, or equal entropies, give a `reason` and no numbers.
    """
    h, r = np.ravel(np.asarray(entropy, float)), np.ravel(np.asarray(reward, float))
    usable = np.isfinite(h) & np.isfinite(r)
    floats = dict.fromkeys(("a", "b", "a_standard_error", "b_standard_error", "ceiling", "r_squared"), np.nan)
    intervals = {name: np.full(2, np.nan) for name in ("a_interval", "b_interval")}
    residual, reason = np.full(len(h), np.nan), ""
    x, y = np.exp(h[usable]), r[usable]
    n = len(x)
    if n < 4:
        reason = f"a fit with an error needs four observations, there are {n}"
    elif np.ptp(x) <= 1e-12 * np.abs(x).max():
        reason = "entropy is the same in all observations"
    else:
        design = np.stack([-x, np.ones(n)], axis=1)
        (a, b), *_ = np.linalg.lstsq(design, y, rcond=None)
        rest = y - design @ (a, b)
        residual[usable] = rest
        variance = rest @ rest / (n - 2)
        errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * variance)
        t = stdtrit(n - 2, (1 + level) / 2)
        total = ((y - y.mean()) ** 2).sum()
        floats = {
            "a": a,
            "b": b,
            "a_standard_error": errors[0],
            "b_standard_error": errors[1],
            "ceiling": b - a,
            "r_squared": 1 - rest @ rest / total if total > 0 else np.nan,
        }
        intervals = {
            "a_interval": np.array([a - t * errors[0], a + t * errors[0]]),
            "b_interval": np.array([b - t * errors[1], b + t * errors[1]]),
        }
        if total == 0:
            reason = "reward is the same in all observations; R² is not defined"
    result = xr.Dataset(
        {name: ((), float(value)) for name, value in floats.items()}
        | {name: ("bound", value) for name, value in intervals.items()}
        | {"residual": ("observation", residual), "observations": ((), n), "reason": ((), reason)},
        {"bound": list(BOUNDS)},
    )
    for name, label in {
        "a": "slope a of R = -a exp(H) + b",
        "b": "level b of R = -a exp(H) + b",
        "ceiling": "reward at zero entropy, b - a",
        "residual": "reward minus the law",
    }.items():
        result[name].attrs = {"long_name": label, "units": "1"}
    return result


def pass_at_k_curves(cells: Mapping[int, xr.Dataset], *, level: float = 0.95) -> xr.Dataset:
    """pass@k of the checkpoints for k = 1 … rollouts; dims (step, k, bound), with Student intervals over prompts.

    `cells` is step → dataset (raw or reduced) of one slice; its origin is used.
    """
    steps = sorted(cells)
    origins = {step: per_prompt(cells[step]).sel(alpha=[0.0], beta=[0.0]) for step in steps}
    top = min(int(origins[step].attrs["rollouts"]) for step in steps)
    ks = np.arange(1, top + 1)
    mean, bounds = np.full((len(steps), top), np.nan), np.full((len(steps), top, 2), np.nan)
    for i, step in enumerate(steps):
        for j, k in enumerate(ks):
            values = pass_at_k_cells(origins[step], int(k)).values.ravel()
            mean[i, j], bounds[i, j] = mean_interval(values, level)
    return xr.Dataset(
        {
            "pass_at_k": (("step", "k"), mean, {"long_name": "pass@k of the checkpoint", "units": "1"}),
            "pass_at_k_interval": (("step", "k", "bound"), bounds, {"long_name": "its interval", "units": "1"}),
        },
        {"step": steps, "k": ks, "bound": list(BOUNDS)},
    )


def crossing(first: xr.Dataset, last: xr.Dataset, *, level: float = 0.95) -> xr.Dataset:
    """pass@k of the later snapshot minus the earlier one, paired by prompt; dims (k, bound).

    RLVR that only sharpens wins at small k and loses at large k (Yue et al. 2025, arXiv 2504.13837): `crossing_k` is
    the first k at which the difference turns negative after having been positive, `significant` whether the interval at
    k = 1 lies above 0 and that at the largest k below 0. k is limited by the number of rollouts. Snapshots of
    progressive sweeps are compared on the first prompts, which all have; others must have the same number.
    """
    origins = [per_prompt(data).sel(alpha=[0.0], beta=[0.0]) for data in (first, last)]
    prompts = [origin.sizes["prompt"] for origin in origins]
    if prompts[0] != prompts[1]:
        if not all(PROGRESSIVE in origin.attrs for origin in origins):
            raise AnalysisError("the two snapshots have different numbers of prompts and cannot be paired")
        origins = [origin.isel(prompt=slice(min(prompts))) for origin in origins]
    top = min(int(origin.attrs["rollouts"]) for origin in origins)
    ks = np.arange(1, top + 1)
    mean, bounds = np.full(top, np.nan), np.full((top, 2), np.nan)
    for j, k in enumerate(ks):
        one, other = (pass_at_k_cells(origin, int(k)).values.ravel() for origin in origins)
        mean[j], bounds[j] = mean_interval(other - one, level)
    below = np.flatnonzero(mean < 0)
    positive = np.flatnonzero(mean > 0)
    crosses = len(positive) > 0 and (below > positive[0]).any()
    crossing_k = float(ks[below[below > positive[0]][0]]) if crosses else np.nan
    significant = bool(bounds[0, 0] > 0 and bounds[-1, 1] < 0)
    if crosses:
        reason = ""
    elif top < 2:
        reason = "one rollout per prompt: only pass@1 is known"
    else:
        reason = f"no crossing up to k = {top}, the number of rollouts"
    return xr.Dataset(
        {
            "difference": ("k", mean, {"long_name": "pass@k, later minus earlier snapshot", "units": "1"}),
            "difference_interval": (("k", "bound"), bounds, {"long_name": "its interval", "units": "1"}),
            "crossing_k": ((), crossing_k, {"long_name": "first k at which the earlier snapshot wins", "units": "1"}),
            "significant": ((), significant),
            "reason": ((), reason),
        },
        {"k": ks, "bound": list(BOUNDS)},
    )


def two_stage(steps: Sequence[int], cells: Sequence[np.ndarray], settings: Bootstrap) -> xr.Dataset:
    """Exploitation first, exploration later (Yao et al. 2025, arXiv 2510.04028), looked for in a capability curve.

    `cells` holds one array (prompts,) per snapshot: pass@k of the checkpoint for the largest k; of unequal arrays the
    first prompts, which all have. A broken line with one bend in ln(1 + step) is fitted to the means, the bend at the
    inner snapshot with the least squared error. `before` and `after` are its slopes, `bend` the step, `explained` the
    share of the straight line's squared error that the bend takes away.

    The bend is chosen by the data, so the intervals of the slopes hold for *all* bends at once: their half-width is
    that of the largest |t| over all bends and both slopes when the prompts' curves, their mean taken out, get random
    signs. So a flat curve is given a stage in at most 1 − confidence of cases, whatever the number of snapshots
    (`flat_p`: share of random signs with a |t| as large as the measured one). `stage` is `two stages` when `before`
    lies significantly below 0 and `after` above 0, `exploitation` when coverage falls and never rises, `exploration`
    when it rises and never falls, else `undecided`. Five snapshots are needed.
    """
    labels = {
        "before": "slope of pass@k against ln(1 + step) before the bend",
        "after": "slope of pass@k against ln(1 + step) after the bend",
        "bend": "step of the bend",
        "explained": "share of the straight line's squared error that the bend takes away",
        "flat_p": "p-value of a flat curve",
    }
    out: dict[str, float] = dict.fromkeys(labels, np.nan)
    bounds = {"before": (np.nan, np.nan), "after": (np.nan, np.nan)}
    stage, reason = "undecided", ""
    common = min(map(len, cells), default=0)
    values = np.array([row[:common] for row in cells], dtype=float)
    usable = np.isfinite(values).all(axis=0) if values.size else np.zeros(0, bool)
    prompts = int(usable.sum())
    if len(steps) < 5:
        reason = f"five snapshots are needed, there are {len(steps)}"
    elif prompts < MIN_PROMPTS:
        reason = f"only {prompts} prompts are valid at every snapshot"
    else:
        t = time_axis(steps)
        own = values[:, usable]
        mean = own.mean(1)
        line_error = _squared_error(np.stack([np.ones_like(t), t], axis=1), mean)
        designs = [np.column_stack([np.ones_like(t), np.minimum(t, c), np.maximum(t - c, 0)]) for c in t[1:-1]]
        errors = np.array([_squared_error(design, mean) for design in designs])
        best = int(errors.argmin())
        slopes = np.concatenate([np.linalg.pinv(design)[1:] @ own for design in designs])
        error = slopes.std(1, ddof=1) / np.sqrt(prompts)
        largest = _largest_t(slopes - slopes.mean(1, keepdims=True), settings)
        out["flat_p"] = (1 + float((largest >= np.abs(_studentised(slopes)).max()).sum())) / (1 + len(largest))
        critical = float(np.quantile(largest, settings.level))
        for i, name in enumerate(("before", "after")):
            row = 2 * best + i
            out[name] = float(slopes[row].mean())
            half = critical * float(error[row])
            bounds[name] = (out[name] - half, out[name] + half)
        out["bend"] = float(steps[best + 1])
        out["explained"] = 1 - errors[best] / line_error if line_error > 1e-18 else 0.0
        signs = [int(low > 0) - int(high < 0) for low, high in (bounds["before"], bounds["after"])]
        if signs == [-1, 1]:
            stage = "two stages"
        elif min(signs) == -1 and max(signs) <= 0:
            stage = "exploitation"
        elif max(signs) == 1 and min(signs) >= 0:
            stage = "exploration"
    variables = {name: ((), float(out[name]), {"long_name": label}) for name, label in labels.items()}
    variables |= {f"{name}_interval": ("bound", np.array(bound)) for name, bound in bounds.items()}
    variables |= {"stage": ((), stage), "reason": ((), reason), "prompts": ((), prompts)}
    return xr.Dataset(variables, {"bound": list(BOUNDS)})


def _studentised(values: np.ndarray) -> np.ndarray:
    """Mean by its standard error over the last axis; 0 where all are 0."""
    mean, error = values.mean(-1), values.std(-1, ddof=1) / np.sqrt(values.shape[-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error > 0, mean / error, np.where(np.abs(mean) > 1e-15, np.inf, 0.0))


def _largest_t(centred: np.ndarray, settings: Bootstrap) -> np.ndarray:
    """Largest |t| over the rows of `centred` (slopes, prompts) when prompts get random signs, (resamples,)."""
    prompts = centred.shape[1]
    rng = np.random.default_rng(np.random.SeedSequence([settings.seed, prompts, 3]))
    signs = rng.choice(np.array([-1.0, 1.0]), size=(prompts, settings.resamples))
    mean = centred @ signs / prompts
    square = (centred**2).mean(1, keepdims=True)
    error = np.sqrt(np.maximum(square - mean**2, 0) / (prompts - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(error > 1e-15, np.abs(mean) / error, 0.0)
    return t.max(0)


def _squared_error(design: np.ndarray, values: np.ndarray) -> float:
    rest = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return float(rest @ rest)


def token_surprisal(base: str | Path) -> xr.Dataset:
    """Distribution of −log π over the checkpoint's own sampled tokens, nat; dims (quantile).

    `base` is the journal's `base.nc`. A token's surprisal is a one-sample estimate of the entropy at its position;
    `mean` estimates the token entropy, `top_share` is the share of all surprisal that the 20 % most surprising tokens
    carry (compare the forking tokens of Wang et al. 2025, arXiv 2506.01939, who rank by true entropy).
    """
    check_checksum(base)
    with reading(base), xr.open_dataset(base, engine="netcdf4", decode_cf=False) as data:
        if TOKEN_LOGPROB not in data:
            raise AnalysisError(f"{base} holds no log-probabilities per token ({TOKEN_LOGPROB!r})")
        surprisal = -data[TOKEN_LOGPROB].values.astype(float)
    surprisal = surprisal[np.isfinite(surprisal)]
    reason = "" if len(surprisal) else "no sampled tokens"
    levels = (
        np.quantile(surprisal, SURPRISAL_QUANTILES) if len(surprisal) else np.full(len(SURPRISAL_QUANTILES), np.nan)
    )
    top = np.sort(surprisal)[len(surprisal) - int(np.ceil(0.2 * len(surprisal))) :]
    total = surprisal.sum()
    share = float(top.sum() / total) if total > 0 else np.nan
    return xr.Dataset(
        {
            "surprisal": ("quantile", levels, {"long_name": "surprisal of a sampled token", "units": "nat"}),
            "mean": ((), float(surprisal.mean()) if len(surprisal) else np.nan, {"long_name": "mean", "units": "nat"}),
            "top_share": ((), share, {"long_name": "surprisal carried by the top 20 % of tokens", "units": "1"}),
            "tokens": ((), len(surprisal)),
            "reason": ((), reason),
        },
        {"quantile": list(SURPRISAL_QUANTILES)},
    )
