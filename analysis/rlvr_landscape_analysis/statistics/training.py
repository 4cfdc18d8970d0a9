"""Across snapshots: trend and change point of a correlation, exploitation index, agreement between slices.

The same prompts are measured at every snapshot, so one bootstrap draw is used for all of them and whatever prompts have
in common cancels from differences between snapshots. Time is ln(1 + step): most happens in the first updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import stdtrit

from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.landscape import pass_at_k_cells, per_prompt
from rlvr_landscape_analysis.results import BOUNDS
from rlvr_landscape_analysis.statistics.resample import MIN_PROMPTS, Bootstrap, centred_interval

CURVES = ("reward", "pass_1", "pass_k", "entropy")


def time_axis(steps: Sequence[int] | np.ndarray) -> np.ndarray:
    """ln(1 + step)."""
    return np.log1p(np.asarray(steps, dtype=float))


def snapshot_z(tables: xr.Dataset, pair: str, control: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, Fisher's z of the contribution (mean over slices), and its resamples (steps, resamples).

    Snapshots where no slice defines it are left out. `tables` is `correlations(…, replicates=True)` over dims
    (step, slice_seed).
    """
    chosen = tables.sel(pair=pair, control=control)
    z = chosen["z"].transpose("step", "slice_seed").values
    resampled = chosen["z_resampled"].transpose("step", "slice_seed", "resample").values
    steps, means, draws = [], [], []
    for i, step in enumerate(tables["step"].values):
        defined = np.isfinite(z[i])
        if defined.any():
            steps.append(int(step))
            means.append(z[i, defined].mean())
            draws.append(resampled[i, defined].mean(0))
    return np.array(steps, int), np.array(means), np.array(draws).reshape(len(steps), resampled.shape[-1])


def trend(steps: np.ndarray, z: np.ndarray, resampled: np.ndarray, settings: Bootstrap, prompts: int) -> dict:
    """Least-squares slope of z against ln(1 + step): `slope`, `slope_interval`, and Kendall's `tau` with the step."""
    if len(steps) < 3:
        return {"reason": f"a trend needs three snapshots with a defined value, there are {len(steps)}"}
    t = time_axis(steps)
    weights = (t - t.mean()) / ((t - t.mean()) ** 2).sum()
    slope = float(weights @ z)
    return {
        "slope": slope,
        "slope_interval": centred_interval(slope, weights @ resampled, settings, prompts),
        "tau": _kendall(steps, z),
        "reason": "",
    }


def _kendall(a: np.ndarray, b: np.ndarray) -> float:
    from scipy import stats

    result: Any = stats.kendalltau(a, b)
    return float(result.statistic)


def change_point(steps: np.ndarray, z: np.ndarray, resampled: np.ndarray, settings: Bootstrap, prompts: int) -> dict:
    """One change of level: the split with the least squared error around two means.

    `change_step` is the first snapshot after the change, `change_interval` its percentiles over resamples (steps),
    `change` the difference after − before in z with its interval over resamples of the measured split, `explained`
    the share of the variance over snapshots that the split takes away.
    """
    if len(steps) < 4:
        return {"reason": f"a change point needs four snapshots with a defined value, there are {len(steps)}"}
    splits = np.arange(1, len(steps))
    after = np.arange(len(steps))[None] >= splits[:, None]
    contrast = after / after.sum(1, keepdims=True) - ~after / (~after).sum(1, keepdims=True)
    # Between-group sum of squares: n_a n_b / n · (mean difference)²
    gain = (after.sum(1) * (~after).sum(1) / len(steps))[:, None]

    def found(series: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        difference = contrast @ series
        between = gain * difference**2
        return between.argmax(0), between.max(0)

    index, between = found(z[:, None])
    draws, _ = found(resampled)
    total = ((z - z.mean()) ** 2).sum()
    best = int(index[0])
    change = float(contrast[best] @ z)
    change_steps = steps[splits[draws]]
    return {
        "change_step": int(steps[splits[best]]),
        "change_interval": tuple(np.quantile(change_steps, settings.tails, method="nearest").astype(float)),
        "change": change,
        "change_size_interval": centred_interval(change, contrast[best] @ resampled, settings, prompts),
        "explained": float(between[0] / total) if total > 0 else np.nan,
        "reason": "",
    }


def over_training(
    tables: xr.Dataset, settings: Bootstrap, prompts: int, controls: Sequence[str] = ("none", "shell", "smooth")
) -> xr.Dataset:
    """Trend and change point of the KL–reward correlation under several controls; dims (control, bound)."""
    floats = ("slope", "tau", "change_step", "change", "explained")
    intervals = ("slope_interval", "change_interval", "change_size_interval")
    out: dict[str, np.ndarray] = {name: np.full(len(controls), np.nan) for name in floats}
    out |= {name: np.full((len(controls), 2), np.nan) for name in intervals}
    reasons = []
    for c, control in enumerate(controls):
        series = snapshot_z(tables, "kl_reward", control)
        parts = [trend(*series, settings, prompts), change_point(*series, settings, prompts)]
        for part in parts:
            for name, value in part.items():
                if name in out:
                    out[name][c] = value
        reasons.append("; ".join(filter(None, (part["reason"] for part in parts))))
    names = {
        "slope": "slope of Fisher's z of the KL–reward correlation against ln(1 + step)",
        "tau": "Kendall's rank correlation of the KL–reward correlation with the step",
        "change_step": "first snapshot after the change of level",
        "change": "change of level in Fisher's z",
        "explained": "share of the variance over snapshots that the change explains",
        "slope_interval": "interval of the slope",
        "change_interval": "interval of the change point",
        "change_size_interval": "interval of the change of level",
    }
    variables = {
        name: (("control", "bound") if values.ndim == 2 else ("control",), values, {"long_name": names[name]})
        for name, values in out.items()
    }
    variables["reason"] = (("control",), np.array(reasons, dtype=str), {"long_name": "why a value is missing"})
    return xr.Dataset(variables, {"control": list(controls), "bound": list(BOUNDS)})


def checkpoint_cells(data: xr.Dataset, k: int) -> dict[str, np.ndarray]:
    """Values per prompt at the origin: `reward`, `pass_1`, `pass_k`, `entropy`, each (prompts,), missing as NaN."""
    here = per_prompt(data)
    if not ((here["alpha"] == 0).any() and (here["beta"] == 0).any()):
        raise AnalysisError("the dataset has no point at the origin")
    here = here.sel(alpha=[0.0], beta=[0.0])
    found = {"reward": here["reward"], "pass_1": pass_at_k_cells(here, 1), "pass_k": pass_at_k_cells(here, k)}
    if "entropy" in here:
        found["entropy"] = here["entropy"]
    return {name: values.squeeze(["alpha", "beta"]).values.astype(float) for name, values in found.items()}


def checkpoint_curves(cells: dict[int, dict[str, np.ndarray]], k: int, confidence: float) -> xr.Dataset:
    """Reward, pass@1, pass@k and entropy of the checkpoints over training, with Student intervals over prompts.

    `cells` is step → `checkpoint_cells`. Dims (step, bound).
    """
    steps = sorted(cells)
    names = [name for name in CURVES if any(name in cells[step] for step in steps)]
    labels = {
        "reward": ("mean reward of the checkpoint", "1"),
        "pass_1": ("pass@1 of the checkpoint", "1"),
        "pass_k": (f"pass@{k} of the checkpoint", "1"),
        "entropy": ("token entropy of the checkpoint", "nat"),
    }
    variables = {}
    for name in names:
        mean, bounds = np.full(len(steps), np.nan), np.full((len(steps), 2), np.nan)
        for i, step in enumerate(steps):
            mean[i], bounds[i] = mean_interval(cells[step].get(name, np.full(1, np.nan)), confidence)
        attrs = {"long_name": labels[name][0], "units": labels[name][1]}
        variables[name] = ("step", mean, attrs)
        variables[f"{name}_interval"] = (
            ("step", "bound"),
            bounds,
            {**attrs, "long_name": attrs["long_name"] + ", interval"},
        )
    return xr.Dataset(variables, {"step": steps, "bound": list(BOUNDS)}, {"k": k})


def mean_interval(values: np.ndarray, confidence: float) -> tuple[float, tuple[float, float]]:
    """Mean and Student's interval over prompts, missing values left out; NaN bounds below two values."""
    values = values[np.isfinite(values)]
    if not len(values):
        return np.nan, (np.nan, np.nan)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, (np.nan, np.nan)
    half = stdtrit(len(values) - 1, (1 + confidence) / 2) * values.std(ddof=1) / np.sqrt(len(values))
    return mean, (mean - float(half), mean + float(half))


def exploitation_index(
    first: dict[str, np.ndarray], last: dict[str, np.ndarray], settings: Bootstrap
) -> dict[str, float | tuple[float, float] | str]:
    """How far the gain in pass@1 between two snapshots came without a gain in pass@k.

    X = 1 − Δpass@k / Δpass@1: 1 when training only made likely what was reachable in k tries (local exploitation),
    0 when coverage grew as much as the average success did (exploration), above 1 when coverage shrank. The contrast
    D = Δpass@k − ½ Δpass@1 needs no division (claim T3 rests on boundaries, `boundary.py`). Of snapshots with
    different numbers of prompts, the first ones that both have are compared. Returns `gain` (Δpass@1), `coverage`
    (Δpass@k), `contrast` (D), each with `<name>_interval`; `index` with its interval where the interval of `gain` lies
    above 0; `prompts`; `reason`.
    """
    common = min(len(first["pass_1"]), len(last["pass_1"]))
    first, last = ({name: values[:common] for name, values in cells.items()} for cells in (first, last))
    usable = np.isfinite(first["pass_1"] + first["pass_k"] + last["pass_1"] + last["pass_k"])
    prompts = int(usable.sum())
    out: dict[str, float | tuple[float, float] | str] = {"prompts": prompts, "index": np.nan, "reason": ""}
    out["index_interval"] = (np.nan, np.nan)
    if prompts == 0:
        return out | {"reason": "no prompt has enough valid rollouts at both snapshots"}
    if not (first["pass_k"][usable].any() or last["pass_k"][usable].any()):
        return out | {"reason": "no rollout of either snapshot passes; a lower threshold may tell them apart"}
    weights = settings.weights(len(usable))[usable]
    count = weights.sum(0)
    d1, dk = (last[name][usable] - first[name][usable] for name in ("pass_1", "pass_k"))
    draws1, drawsk = d1 @ weights / count, dk @ weights / count
    for name, value, draws in (
        ("gain", d1.mean(), draws1),
        ("coverage", dk.mean(), drawsk),
        ("contrast", dk.mean() - d1.mean() / 2, drawsk - draws1 / 2),
    ):
        out[name] = float(value)
        out[f"{name}_interval"] = centred_interval(float(value), draws, settings, prompts)
    if prompts < MIN_PROMPTS:
        return out | {"reason": f"only {prompts} prompts: no interval below {MIN_PROMPTS}"}
    if not centred_interval(float(d1.mean()), draws1, settings, prompts)[0] > 0:
        return out | {"reason": "pass@1 did not rise beyond its uncertainty, so the ratio is not defined"}
    out["index"] = float(1 - dk.mean() / d1.mean())
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(draws1 > 0, 1 - drawsk / draws1, np.nan)
    finite = ratios[np.isfinite(ratios)]
    if len(finite) >= settings.level * len(ratios):
        out["index_interval"] = tuple(np.quantile(finite, settings.tails))
    return out


def slice_agreement(tables: xr.Dataset, level: float) -> xr.Dataset | None:
    """Contributions (`none`: corrected correlations) of several slices of one snapshot as one value.

    `mean` = tanh of the mean of Fisher's z over slices with Student's interval over slices, which is
    what holds for *another* random slice; `spread` the standard deviation of z; `slices` how many. Dims (step, pair,
    control, bound). None when no snapshot has two slices.
    """
    z = tables["z"].transpose("step", "slice_seed", "pair", "control")
    count = z.notnull().sum("slice_seed")
    if not (count >= 2).any():
        return None
    many = count >= 2
    mean, spread = z.mean("slice_seed"), z.std("slice_seed", ddof=1)
    t = xr.apply_ufunc(lambda n: stdtrit(np.maximum(n - 1, 1), (1 + level) / 2), count)
    half = t * spread / np.sqrt(count)
    bounds = xr.concat([mean - half, mean + half], dim=xr.DataArray(list(BOUNDS), dims="bound", name="bound"))
    result = xr.Dataset(
        {
            "mean": xr.apply_ufunc(np.tanh, mean).where(many),
            "mean_interval": xr.apply_ufunc(np.tanh, bounds).where(many),
            "spread": spread.where(many),
            "slices": count,
        }
    )
    labels = {
        "mean": "contribution to the corrected correlation, mean over slices",
        "mean_interval": "its interval over slices",
        "spread": "standard deviation of Fisher's z over slices",
        "slices": "slices with a defined value",
    }
    for name, label in labels.items():
        result[name].attrs = {"long_name": label, "units": "1"}
    return result.transpose("step", "pair", "control", "bound", ...)
