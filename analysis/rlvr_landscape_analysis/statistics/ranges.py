"""The published number, the plain correlation of KL and reward over a slice, at several ranges of the same slice.

It follows the range: near the checkpoint noise hides it, far away the distance alone makes it nearly −1
(docs/statistics.md). So it is shown at several ranges and never decides a claim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.results import BOUNDS
from rlvr_landscape_analysis.statistics.correlation import correlations
from rlvr_landscape_analysis.statistics.resample import Bootstrap

SHARES = (0.25, 0.5, 1.0)
"""Parts of the slice's range, in both axes."""
MIN_SIDE = 3
"""Fewest coordinates along each axis."""


def crop(data: xr.Dataset, share: float) -> xr.Dataset:
    """The points whose |α| and |β| are at most `share` of the slice's largest, up to rounding."""
    kept = {}
    for axis in ("alpha", "beta"):
        values = np.abs(data[axis].values.astype(float))
        kept[axis] = np.flatnonzero(values <= share * values.max() * (1 + 1e-9))
    return data.isel(kept)


def plain_by_range(
    data: xr.Dataset, *, shares: Sequence[float] = SHARES, bootstrap: Bootstrap | None = None, estimator: str = "k1"
) -> xr.Dataset:
    """Plain Pearson correlation of KL and reward over the points within each share of the range; dims (share, bound).

    `plain` and `plain_interval` (over prompts, this slice), `half_width` (share; the larger of both axes), `points`,
    `nearest`: length of the shortest move in displacements of the run (NaN where there is none). A range with fewer
    than 3 coordinates along an axis, or with the same points as the next smaller one, is missing with a `reason`.
    """
    plain, bounds = np.full(len(shares), np.nan), np.full((len(shares), 2), np.nan)
    width, points = np.full(len(shares), np.nan), np.zeros(len(shares), int)
    reasons = [""] * len(shares)
    before = 0
    for i, share in enumerate(shares):
        part = crop(data, share)
        points[i] = part.sizes["alpha"] * part.sizes["beta"]
        width[i] = max(float(np.abs(part[axis].values).max()) for axis in ("alpha", "beta"))
        if min(part.sizes["alpha"], part.sizes["beta"]) < MIN_SIDE:
            reasons[i] = f"only {part.sizes['alpha']} × {part.sizes['beta']} points lie within ±{width[i]:g}"
        elif points[i] == before:
            reasons[i] = "the grid has no other points there than within the smaller range"
        else:
            table = correlations(part, bootstrap=bootstrap, estimator=estimator, controls=["none"])
            chosen = table.sel(pair="kl_reward", control="none")
            plain[i], bounds[i] = float(chosen["pearson"]), chosen["pearson_interval"].values
            reasons[i] = str(chosen["reason"].item()) if np.isnan(plain[i]) else ""
            before = points[i]
    nearest = np.nan
    if "displacement_radius" in data:
        lengths = data["displacement_radius"].values.ravel().astype(float)
        lengths = lengths[np.isfinite(lengths) & (lengths > 0)]
        nearest = float(lengths.min()) if len(lengths) else np.nan
    return xr.Dataset(
        {
            "plain": ("share", plain, {"long_name": "plain correlation of KL and reward over the slice", "units": "1"}),
            "plain_interval": (("share", "bound"), bounds, {"long_name": "its interval over prompts", "units": "1"}),
            "half_width": ("share", width, {"long_name": "largest coordinate", "units": "1"}),
            "points": ("share", points, {"long_name": "points used", "units": "1"}),
            "nearest": ((), nearest, {"long_name": "shortest move, in displacements of the run", "units": "1"}),
            "reason": ("share", np.array(reasons, dtype=str), {"long_name": "why a value is missing"}),
        },
        {"share": list(shares), "bound": list(BOUNDS)},
    )
