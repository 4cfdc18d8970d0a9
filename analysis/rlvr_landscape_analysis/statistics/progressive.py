"""Sweeps that stop when a number is known well enough: what to measure next, and when to stop.

What is measured so far is a rectangle: a subset of each axis, the first prompts, all of their rollouts. `look` gives
the interval of the *full* grid's value from it. The coarse grid is interpolated prompt by prompt, a linear map, so the
statistics of `correlation.py` hold unchanged; the interval is widened by an allowance for what a coarse grid cannot
see. `next_design` says what to measure next. The rule, its coverage and its limits: docs/statistics.md, "Progressive
sweeps".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.datasets import NEEDED, check_landscape
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.landscape import per_prompt, shells
from rlvr_landscape_analysis.schema import GRID
from rlvr_landscape_analysis.statistics.correlation import correlations
from rlvr_landscape_analysis.statistics.resample import Bootstrap

FIRST_PROMPTS = 64
"""Prompts of the first look; each later one doubles them."""
SHARE = 4 / 3
"""The allowance, as a share of the difference between a level's estimate and that of the next coarser one: enough where
a level's error is at most 4/7 of that of the coarser one."""
STATISTICS = {"correlation": ("none", "corrected"), "beyond_radius": ("shell", "contribution")}
"""Statistic → control and variable of `correlations`, pair `kl_reward`."""


@dataclass(frozen=True)
class Design:
    """A rectangle of a sweep: the points of `grid_levels(…)[level]` with the first `prompts` prompts."""

    level: int
    prompts: int


@dataclass(frozen=True)
class Look:
    """What is known after a design has been measured: the full grid's value and its interval."""

    design: Design
    estimate: float
    """NaN where it is not defined; `reason` says why."""
    low: float
    high: float
    """The interval, the allowance on both sides included, within [−1, 1]."""
    allowance: float
    """What the coarse grid may have missed, on either side; 0 at the full grid."""
    points: int
    """Measured points."""
    reason: str = ""
    """Why there is no value yet; empty otherwise."""

    @property
    def width(self) -> float:
        """Length of the interval; 2, all that a correlation can be, where it is not defined."""
        length = self.high - self.low
        return length if math.isfinite(length) and not self.reason else 2.0


def axis_levels(coordinates: np.ndarray) -> list[np.ndarray]:
    """Nested subsets of an axis as ascending index arrays, coarsest first, the whole axis last.

    `coordinates` are ascending with 0 among them. A coarser level keeps the origin and half of each side's coordinates
    (rounded up), spread evenly over the side, its far end always. Raises `AnalysisError` for other coordinates.
    """
    values = np.asarray(coordinates, dtype=float)
    if values.ndim != 1 or not np.isfinite(values).all() or (np.diff(values) <= 0).any():
        raise AnalysisError(f"coordinates of an axis must be ascending finite numbers, got {values.tolist()}")
    if not (values == 0).any():
        raise AnalysisError(f"a progressive sweep needs 0 on both axes, got {values.tolist()}")
    origin = int(np.flatnonzero(values == 0)[0])
    left, right = np.arange(origin)[::-1], np.arange(origin + 1, len(values))
    levels = [np.arange(len(values))]
    while max(len(left), len(right)) > 1:
        left, right = _half(left), _half(right)
        levels.append(np.concatenate([left[::-1], [origin], right]))
    return levels[::-1]


def _half(side: np.ndarray) -> np.ndarray:
    """Every second of one side's indices, which lead away from the origin; spread evenly, the last one kept."""
    kept = (len(side) + 1) // 2
    return side[np.floor(np.arange(1, kept + 1) * len(side) / max(kept, 1) + 0.5).astype(int) - 1]


def grid_levels(alphas: np.ndarray, betas: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Nested subsets of the grid, index arrays of both axes, coarsest first, the full grid last.

    The axis that has fewer levels is whole while the other is still refined, so that what a level leaves out was left
    out more coarsely in the level before.
    """
    one, other = axis_levels(alphas), axis_levels(betas)
    depth = max(len(one), len(other))
    return [(one[min(level, len(one) - 1)], other[min(level, len(other) - 1)]) for level in range(depth)]


def check_statistic(statistic: str, alphas: np.ndarray, betas: np.ndarray) -> None:
    """Raise `AnalysisError` unless `statistic` is known and the full grid can give it."""
    if statistic not in STATISTICS:
        raise AnalysisError(f"unknown statistic {statistic!r}; known: {', '.join(STATISTICS)}")
    radii, index = shells(np.asarray(alphas, float), np.asarray(betas, float))
    if statistic == "beyond_radius" and len(index) - len(radii) < 3:
        raise AnalysisError(
            "statistic 'beyond_radius' compares points of equal radius, and this grid has too few of them; make both "
            "axes symmetric, or use 'correlation'"
        )


def first_design(alphas: np.ndarray, betas: np.ndarray, prompts: int) -> Design:
    """What to measure first, of a sweep with `prompts` prompts: the coarsest level that has one to compare with."""
    return Design(min(1, len(grid_levels(alphas, betas)) - 1), min(FIRST_PROMPTS, prompts))


def next_design(look: Look, asked: float, alphas: np.ndarray, betas: np.ndarray, prompts: int) -> Design | None:
    """What to measure after `look`; None to stop: the width `asked` is reached, or everything is measured.

    Finer where the allowance takes more than half of the width asked for, otherwise twice the prompts; where one of
    them is exhausted, the other.
    """
    level, measured = look.design.level, look.design.prompts
    if not look.reason and look.width <= asked:
        return None
    finer = Design(level + 1, measured) if level + 1 < len(grid_levels(alphas, betas)) else None
    more = Design(level, min(2 * measured, prompts)) if measured < prompts else None
    blind = not look.reason and 2 * look.allowance > asked / 2
    return (finer or more) if blind else (more or finer)


def final_reason(look: Look, asked: float, prompts: int) -> str:
    """How a progressive sweep ended, in words."""
    where = f"{look.design.prompts} of {prompts} prompts at {look.points} points"
    if look.reason:
        return f"not reached: {look.reason}"
    if look.width <= asked:
        return f"reached: width {look.width:.3g} ≤ {asked:g} with {where}"
    needed = math.ceil(look.design.prompts * (look.width / asked) ** 2 - 1e-6)
    return f"not reached: width {look.width:.3g} > {asked:g} with {where}; about {needed} prompts would do"


def look(
    data: xr.Dataset,
    alphas: np.ndarray,
    betas: np.ndarray,
    design: Design,
    *,
    statistic: str = "correlation",
    bootstrap: Bootstrap | None = None,
) -> Look:
    """The full grid's `statistic` from the rectangle `design`, with its interval.

    `data` holds exactly that rectangle, dims (alpha, beta, prompt[, rollout]), variables reward and kl_k1, others
    ignored; `alphas` and `betas` are the full axes. `statistic`: `correlation`, the noise-corrected Pearson
    correlation of KL and reward, or `beyond_radius`, the part of it that distance cannot explain. Raises
    `AnalysisError` when data and design disagree.
    """
    check_statistic(statistic, alphas, betas)
    settings = bootstrap or Bootstrap()
    axes = np.asarray(alphas, dtype=float), np.asarray(betas, dtype=float)
    levels = grid_levels(*axes)
    if not 0 <= design.level < len(levels):
        raise AnalysisError(f"level {design.level} does not exist; this grid has levels 0 to {len(levels) - 1}")
    check_landscape(data)
    for name, axis, index in zip(GRID, axes, levels[design.level], strict=True):
        if not np.array_equal(data[name].values, axis[index]):
            raise AnalysisError(
                f"level {design.level} has {name} at {axis[index].tolist()}, the data at {data[name].values.tolist()}"
            )
    if data.sizes["prompt"] != design.prompts:
        raise AnalysisError(f"the design has {design.prompts} prompts, the data {data.sizes['prompt']}")
    points = len(levels[design.level][0]) * len(levels[design.level][1])
    reduced = per_prompt(data[list(NEEDED)])
    value, low, high, reason = _value(interpolated(reduced, *axes), statistic, settings)
    allowance = 0.0
    if not reason and design.level < len(levels) - 1:
        allowance, reason = _allowance(reduced, levels[: design.level + 1], axes, statistic, value)
    if reason:
        return Look(design, math.nan, math.nan, math.nan, math.nan, points, reason)
    return Look(design, value, max(low - allowance, -1.0), min(high + allowance, 1.0), allowance, points)


def interpolated(reduced: xr.Dataset, alphas: np.ndarray, betas: np.ndarray) -> xr.Dataset:
    """A coarse landscape, dims (alpha, beta, prompt), on the grid `alphas` × `betas` around it, prompt by prompt.

    Splines along each axis, cubic where it has four points or more: a linear map, exact at the measured points. A
    prompt that is missing at one point is missing at all. Attributes and scalar coordinates are kept.
    """
    axes = dict(zip(GRID, (alphas, betas), strict=True))
    if all(np.array_equal(reduced[name].values, axis) for name, axis in axes.items()):
        return reduced
    first, second = (_spline(reduced[name].values, axis) for name, axis in axes.items())
    variables = {}
    for name, values in reduced.data_vars.items():
        if {*GRID, "prompt"} == set(values.dims):
            block = np.tensordot(first, values.transpose(*GRID, "prompt").values, axes=1)
            variables[name] = ((*GRID, "prompt"), np.matmul(second, block), values.attrs)
    kept = {name: value for name, value in reduced.coords.items() if name not in GRID}
    return xr.Dataset(variables, kept | axes, reduced.attrs)


def _spline(knots: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The linear map from values at `knots` to those of the interpolating spline at `where`: (where, knots)."""
    if np.array_equal(knots, where):
        return np.eye(len(knots))
    from scipy.interpolate import make_interp_spline

    return make_interp_spline(knots, np.eye(len(knots)), k=min(3, len(knots) - 1))(where)


def _allowance(
    reduced: xr.Dataset,
    levels: list[tuple[np.ndarray, np.ndarray]],
    axes: tuple[np.ndarray, np.ndarray],
    statistic: str,
    value: float,
) -> tuple[float, str]:
    """How far `value`, of the last of `levels`, may lie from that of the full grid; or why that is not known."""
    if len(levels) < 2:
        return math.nan, "the coarsest level has none to compare with"
    kept = {name: np.isin(*pair) for name, pair in zip(GRID, zip(*levels[-1:-3:-1], strict=True), strict=True)}
    rough, *_, reason = _value(interpolated(reduced.isel(kept), *axes), statistic, Bootstrap(resamples=100))
    return SHARE * abs(value - rough), reason


def _value(data: xr.Dataset, statistic: str, settings: Bootstrap) -> tuple[float, float, float, str]:
    """Estimate and interval of a landscape on its full grid; or why there is none."""
    control, name = STATISTICS[statistic]
    try:
        table = correlations(data, bootstrap=settings, controls=(control,)).sel(pair="kl_reward", control=control)
    except AnalysisError as error:
        return math.nan, math.nan, math.nan, str(error)
    found = (float(table[name]), *table[f"{name}_interval"].values.tolist())
    if all(map(math.isfinite, found)):
        return *found, ""
    return math.nan, math.nan, math.nan, str(table["reason"].item()) or f"{statistic} is not defined"
