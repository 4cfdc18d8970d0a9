"""Two or more censuses of one snapshot side by side, such as inside and outside the subspace of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.figures.evidence import AXES
from rlvr_landscape_analysis.figures.style import PAGE_INCHES, SERIES, new_panels, say_missing, styled

QUANTITIES = {
    "change": "reward minus the checkpoint's",
    "kl": "KL, nat per completion",
}


@styled
def compare_censuses(censuses: Mapping[str, xr.Dataset]) -> dict[str, Any]:
    """Mean reward change and mean KL of random policies against their distance, one line per census.

    `censuses`: name → what `statistics.census.census` found, all of one snapshot. Bands and bars are the intervals of
    the means over directions; dots are the measured policies. Where every census knows its distances in displacements
    of the run they are drawn so, else in units of ‖θ‖. Returns `series` (name → quantity → line), `points`, `legend`,
    `messages` and `axes` (quantity → axes). Raises `AnalysisError` for fewer than two censuses, or different snapshots.
    """
    if len(censuses) < 2:
        raise AnalysisError(f"{len(censuses)} census cannot be compared with another; give two")
    steps = {int(data["step"]) for data in censuses.values()}
    if len(steps) > 1:
        raise AnalysisError(f"the censuses are of the steps {sorted(steps)}; compare those of one snapshot")
    along = "displacement" if all(_finite(data["displacement"]) for data in censuses.values()) else "relative"
    _, axes = new_panels(1, len(QUANTITIES), PAGE_INCHES, 2.7)
    by_quantity = dict(zip(QUANTITIES, axes.ravel(), strict=True))
    out: dict[str, Any] = {"series": {name: {} for name in censuses}, "points": {}, "messages": {}, "axes": by_quantity}
    for quantity, ax in by_quantity.items():
        ax.set_xlabel(AXES[along])
        ax.set_ylabel(QUANTITIES[quantity])
        ax.set_xscale("log")
        if quantity == "change":
            ax.axhline(0, color="0.6", linewidth=0.6, zorder=0)
        for index, (name, data) in enumerate(censuses.items()):
            style, x, y = SERIES[index % len(SERIES)], data[along].values.astype(float), data[quantity].values
            if not np.isfinite(y).any():
                continue
            measured = data[f"point_{quantity}"].transpose("radius", ...)
            spread = np.broadcast_to(x[:, None], (len(x), measured[0].size)) * 1.03 ** (index - 0.5)
            dots = {"s": 4, "color": style["color"], "alpha": 0.35, "linewidths": 0, "rasterized": True}
            out["points"][name, quantity] = ax.scatter(spread.ravel(), measured.values.ravel(), **dots)
            low, high = data[f"{quantity}_interval"].transpose(..., "bound").values.T
            ax.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
            (out["series"][name][quantity],) = ax.plot(x, y, label=name, zorder=3, **style)
        if not any(quantity in lines for lines in out["series"].values()):
            out["messages"][quantity] = say_missing(ax, f"no census knows {QUANTITIES[quantity]}", axes="xy")
    out["legend"] = by_quantity["change"].legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none")
    return out


def _finite(values: xr.DataArray) -> bool:
    return bool(np.isfinite(values.values).all())
