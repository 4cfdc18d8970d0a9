"""A quadratic around the origin: gradient and curvature of reward or KL in the slice, with errors over prompts."""

from __future__ import annotations

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.results import BOUNDS
from rlvr_landscape_analysis.statistics.resample import MIN_PROMPTS, Bootstrap, cells, centred_interval

TERMS = ("constant", "gradient_alpha", "gradient_beta", "hessian_aa", "hessian_ab", "hessian_bb")
MIN_POINTS = 9
"""Fewest points for six coefficients."""


def quadratic_fit(
    data: xr.Dataset, *, variable: str = "reward", reach: float = 0.5, bootstrap: Bootstrap | None = None
) -> xr.Dataset:
    """Least squares of c + g·x + ½ xᵀHx to the point means near the origin; dims (term, eigen, bound).

    Points with (α/α_max)² + (β/β_max)² ≤ reach² count, at least nine (then the nearest ones). The fit is linear in the
    means, so each prompt has its own coefficients; `coefficient` is their mean, `standard_error` their spread by √n,
    `coefficient_interval` from the bootstrap over prompts. `curvature` (eigen: low, high) are the eigenvalues of H with
    `curvature_interval`: reward per unit step squared. `r_squared` says how much of the means' variance a quadratic
    describes, `points` how many were used. KL's H is the Fisher information restricted to the slice. Values are
    missing, with a `reason`, on a grid without enough points or with too few prompts for an interval.
    """
    if not 0 < reach <= 2:
        raise AnalysisError(f"reach {reach:g} must lie between 0 and 2")
    settings = bootstrap or Bootstrap()
    matrices = cells(data, {"value": variable})
    alpha, beta = matrices.alpha, matrices.beta
    spans = [np.abs(axis).max() for axis in (alpha, beta)]
    values, prompts = matrices.values["value"], len(matrices.kept)
    out = {
        "coefficient": np.full(6, np.nan),
        "standard_error": np.full(6, np.nan),
        "coefficient_interval": np.full((6, 2), np.nan),
        "curvature": np.full(2, np.nan),
        "curvature_interval": np.full((2, 2), np.nan),
    }
    if min(spans) == 0 or len(alpha) < MIN_POINTS:
        return _fit_dataset(out, np.nan, len(alpha), f"only {len(alpha)} points, or a single row of them", variable)
    scaled = np.hypot(alpha / spans[0], beta / spans[1])
    near = scaled <= reach + 1e-9
    if near.sum() < MIN_POINTS:
        near = scaled <= np.sort(scaled)[MIN_POINTS - 1] + 1e-9
    x, y = alpha[near] / spans[0], beta[near] / spans[1]
    design = np.stack([np.ones_like(x), x, y, x**2 / 2, x * y, y**2 / 2], axis=1)
    if np.linalg.matrix_rank(design) < 6:
        return _fit_dataset(out, np.nan, int(near.sum()), "the points near the origin do not fix a quadratic", variable)
    units = np.array([1, spans[0], spans[1], spans[0] ** 2, spans[0] * spans[1], spans[1] ** 2])
    solve = np.linalg.pinv(design) / units[:, None]
    own = solve @ values[near]
    coefficients = own.mean(1)
    out["coefficient"] = coefficients
    out["curvature"] = np.linalg.eigvalsh(_hessian(coefficients))
    means = values[near].mean(1)
    fitted = design @ (coefficients * units)
    total = ((means - means.mean()) ** 2).sum()
    r_squared = 1 - ((means - fitted) ** 2).sum() / total if total > 0 else np.nan
    reason = ""
    if prompts < MIN_PROMPTS:
        reason = f"only {prompts} prompts: no interval below {MIN_PROMPTS}"
    if prompts > 1:
        out["standard_error"] = own.std(1, ddof=1) / np.sqrt(prompts)
    weights = matrices.weights(settings)
    resampled = own @ weights / weights.sum(0)
    for i in range(6):
        out["coefficient_interval"][i] = centred_interval(coefficients[i], resampled[i], settings, prompts)
    eigen = np.linalg.eigvalsh(_hessian(resampled.T))
    for i in range(2):
        out["curvature_interval"][i] = centred_interval(out["curvature"][i], eigen[:, i], settings, prompts)
    return _fit_dataset(out, r_squared, int(near.sum()), reason, variable)


def _hessian(coefficients: np.ndarray) -> np.ndarray:
    """(…, 6) → (…, 2, 2)."""
    aa, ab, bb = coefficients[..., 3], coefficients[..., 4], coefficients[..., 5]
    return np.stack([np.stack([aa, ab], -1), np.stack([ab, bb], -1)], -2)


def _fit_dataset(out: dict[str, np.ndarray], r_squared: float, points: int, reason: str, variable: str) -> xr.Dataset:
    unit = "nat" if variable.startswith("kl") else "1"
    dims = {
        "coefficient": ("term",),
        "standard_error": ("term",),
        "coefficient_interval": ("term", "bound"),
        "curvature": ("eigen",),
        "curvature_interval": ("eigen", "bound"),
    }
    names = {
        "coefficient": "coefficient of the quadratic",
        "standard_error": "its standard error",
        "coefficient_interval": "its interval",
        "curvature": "eigenvalue of the Hessian in the slice",
        "curvature_interval": "its interval",
    }
    variables = {
        name: (dims[name], value, {"long_name": f"{names[name]}, {variable}", "units": unit})
        for name, value in out.items()
    }
    dataset = xr.Dataset(variables, {"term": list(TERMS), "eigen": ["low", "high"], "bound": list(BOUNDS)})
    dataset["r_squared"] = ((), r_squared, {"long_name": "variance of the means that the quadratic describes"})
    dataset["points"] = ((), points, {"long_name": "points used"})
    dataset["reason"] = ((), reason, {"long_name": "why a value is missing"})
    return dataset
