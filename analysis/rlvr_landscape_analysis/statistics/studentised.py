"""The interval of a corrected correlation: studentised where its own standard error can be trusted, else percentiles.

All in Fisher's z. The standard error of each resample comes from the influence of the prompts on it (a jackknife in
one step).
"""

from __future__ import annotations

import numpy as np

from rlvr_landscape_analysis.statistics.resample import Bootstrap

STUDENTISED = ((32, 0.95), (64, 0.8))
"""(prompts, reliability) from which on the studentised interval is used; below, percentiles shifted to the estimate
(docs/statistics.md)."""
EDGE = 1 - 1e-6
"""Largest correlation that has a finite z here."""
_BLOCK = 256


def interval_of_z(
    z: float,
    zs: np.ndarray,
    se: float,
    ses: np.ndarray,
    settings: Bootstrap,
    prompts: int,
    reliability: float,
) -> tuple[float, float]:
    """Bounds of z."""
    bias = _trimmed_mean(zs) - z
    usable = np.isfinite(ses) & (ses > 0)
    if (
        any(prompts >= least and reliability >= needed for least, needed in STUDENTISED)
        and np.isfinite(se)
        and usable.mean() >= settings.level
    ):
        t = (zs[usable] - z - bias) / ses[usable]
        low, high = settings.widening(prompts) * np.quantile(t, settings.tails)
        return z - bias - high * se, z - bias - low * se
    bounds = z + settings.widening(prompts) * (np.quantile(zs, settings.tails) - _trimmed_mean(zs))
    return float(bounds[0]), float(bounds[1])


def _trimmed_mean(values: np.ndarray) -> float:
    """Mean of the middle 80 %."""
    ordered = np.sort(values)
    cut = len(ordered) // 10
    return float(ordered[cut : len(ordered) - cut].mean())


def studentised(
    x: np.ndarray, y: np.ndarray, sx: np.ndarray, sy: np.ndarray, weights: np.ndarray
) -> tuple[float, np.ndarray, float, np.ndarray]:
    """Fisher's z of the corrected correlation and its jackknife standard error: measured, and for every resample.

    In a resample, pairs of copies of one prompt do not count, so its U estimates the same quantity as the measured one.
    """
    ones = np.ones((x.shape[1], 1))
    z, se = _influence(x, y, x.sum(1, keepdims=True), y.sum(1, keepdims=True), ones)
    zs, ses = np.empty(weights.shape[1]), np.empty(weights.shape[1])
    for start in range(0, weights.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        zs[block], ses[block] = _influence(x, y, sx[:, block], sy[:, block], np.ascontiguousarray(weights[:, block]))
    return float(z[0]), zs, float(se[0]), ses


def _influence(
    x: np.ndarray, y: np.ndarray, sx: np.ndarray, sy: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    count = weights.sum(0)
    square = weights**2
    pairs = count**2 - square.sum(0)
    own = {"xx": np.einsum("gi,gi->i", x, x), "xy": np.einsum("gi,gi->i", x, y), "yy": np.einsum("gi,gi->i", y, y)}
    total = {
        "xx": np.einsum("gb,gb->b", sx, sx),
        "xy": np.einsum("gb,gb->b", sx, sy),
        "yy": np.einsum("gb,gb->b", sy, sy),
    }
    u = {name: (total[name] - own[name] @ square) / pairs for name in own}
    with np.errstate(invalid="ignore", divide="ignore"):
        r = u["xy"] / np.sqrt(u["xx"] * u["yy"])
        # Where all variance is noise, only the sign is known.
        r = np.where((u["xx"] > 0) & (u["yy"] > 0), r, np.sign(u["xy"]))
        r = np.clip(r, -EDGE, EDGE)
        scale = 1.0 / ((count - 1.0) * (1.0 - r * r))
        cross = 0.5 * r * scale / u["xy"]
        first, second = -0.5 * r * scale / u["xx"], -0.5 * r * scale / u["yy"]
        # Influence of prompt i on z: its mean kernel with all other prompts.
        h = x.T @ (first * sx + cross * sy)
        h += y.T @ (second * sy + cross * sx)
        h -= weights * (np.outer(own["xx"], first) + np.outer(own["yy"], second) + np.outer(own["xy"], 2.0 * cross))
        h -= np.einsum("ib,ib->b", weights, h) / count
        h *= h
        se = 2.0 * np.sqrt(np.einsum("ib,ib->b", weights, h) / (count * (count - 1.0)))
    return np.arctanh(r), se
