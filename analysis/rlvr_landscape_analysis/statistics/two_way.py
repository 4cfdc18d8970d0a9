"""Errors of numbers about directions: directions and prompts are both sampled, so both are left out in turn.

A census holds K directions × N prompts. Another study would draw other directions *and* other prompts, and the variance
of a mean over both is

    V = σ_D²/K + σ_P²/N + σ_DP²/(K N)

Leaving out one direction at a time estimates the first and the last term together, one prompt at a time the second and
the last, one of each (their interaction) the last alone; so V is the first plus the second minus the third (two-way
clustering: Cameron, Gelbach and Miller 2011; Owen 2007 for why resampling both with replacement is too wide instead).
An antithetic pair is one direction. All numbers here are smooth functions of means and of U-statistics, whose leave-out
values have closed forms, so nothing is drawn at random and an interval is the same every time.

A `TwoWay` keeps every deviation, not only the variance: differences between snapshots that share prompts, or
directions, know what they share.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from rlvr_landscape_analysis.errors import AnalysisError

MIN_DIRECTIONS = 4
"""With fewer directions no interval is given."""
FIELLER_GRID = 4001
"""Values of a ratio that are tried."""


@dataclass(frozen=True)
class TwoWay:
    """Estimates (any shape S) with their deviations; add, subtract and scale them like numbers.

    The keys say what is shared: two estimates with the same key of prompts were measured on the same prompts, in the
    same order. The scale of the deviations is such that the variance is the sum of their squares.
    """

    value: np.ndarray
    """float64, shape S."""
    directions: Mapping[Hashable, np.ndarray]
    """Key of a set of directions → (directions, *S)."""
    prompts: Mapping[Hashable, np.ndarray]
    """Key of a set of prompts → (prompts, *S)."""
    both: Mapping[Hashable, np.ndarray]
    """(key of directions, key of prompts) → (directions, prompts, *S)."""

    def __add__(self, other: TwoWay) -> TwoWay:
        return TwoWay(
            self.value + other.value,
            _merged(self.directions, other.directions),
            _merged(self.prompts, other.prompts),
            _merged(self.both, other.both),
        )

    def __sub__(self, other: TwoWay) -> TwoWay:
        return self + other * -1.0

    def __mul__(self, factor: float | np.ndarray) -> TwoWay:
        return TwoWay(
            self.value * factor,
            *({key: own * factor for key, own in part.items()} for part in (self.directions, self.prompts, self.both)),
        )

    __rmul__ = __mul__

    def __getitem__(self, index) -> TwoWay:
        """Some of the estimates; `index` addresses S."""
        pick = index if isinstance(index, tuple) else (index,)
        return TwoWay(
            self.value[pick],
            {key: own[(slice(None), *pick)] for key, own in self.directions.items()},
            {key: own[(slice(None), *pick)] for key, own in self.prompts.items()},
            {key: own[(slice(None), slice(None), *pick)] for key, own in self.both.items()},
        )

    def linear(self, coefficients: np.ndarray, value: float | np.ndarray | None = None) -> TwoWay:
        """Σ coefficients · estimates over the last axis of S: a smooth function by its gradient, with its `value`."""
        return TwoWay(
            np.asarray(self.value @ coefficients if value is None else value, float),
            *(
                {key: own @ coefficients for key, own in part.items()}
                for part in (self.directions, self.prompts, self.both)
            ),
        )

    def total(self) -> TwoWay:
        """Sum over the first axis of S."""
        return TwoWay(
            self.value.sum(0),
            {key: own.sum(1) for key, own in self.directions.items()},
            {key: own.sum(1) for key, own in self.prompts.items()},
            {key: own.sum(2) for key, own in self.both.items()},
        )

    def linear_scalar(self, slope: float, value: float) -> TwoWay:
        """A smooth function of one estimate: its `value` there and its derivative."""
        return TwoWay(np.asarray(value, float), *((self * slope)._parts()))

    def _parts(self) -> tuple[Mapping, Mapping, Mapping]:
        return self.directions, self.prompts, self.both

    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Variances from leaving out directions, prompts, and their interaction; shape S each."""
        shape = np.shape(self.value)
        one, other = (
            sum(((own**2).sum(0) for own in part.values()), np.zeros(shape)) for part in (self.directions, self.prompts)
        )
        return one, other, sum(((own**2).sum((0, 1)) for own in self.both.values()), np.zeros(shape))

    def variance(self) -> np.ndarray:
        """V of the module's head; never below that of directions or of prompts alone."""
        directions, prompts, both = self.parts()
        return np.maximum(directions + prompts - both, np.maximum(directions, prompts))

    def freedom(self) -> np.ndarray:
        """Degrees of freedom of the variance (Satterthwaite): the fewer directions, the wider Student's t."""
        directions, prompts, _ = self.parts()
        return self._freedom(directions, prompts)

    def _freedom(self, directions: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        k = sum(len(own) - 1 for own in self.directions.values())
        n = sum(len(own) - 1 for own in self.prompts.values())
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = directions**2 / max(k, 1) + prompts**2 / max(n, 1)
            found = (directions + prompts) ** 2 / terms
        return np.where(terms > 0, np.clip(found, 1, None), max(min(k, n), 1))

    def quadratic(self, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Variance and degrees of freedom of many linear combinations, one per row of `coefficients` (rows, S)."""
        size = coefficients.shape[1]
        grams = []
        for part in (self.directions, self.prompts, self.both):
            rows = [own.reshape(-1, size) for own in part.values()]
            grams.append(sum((own.T @ own for own in rows), np.zeros((size, size))))
        directions, prompts, both = (np.einsum("rs,st,rt->r", coefficients, gram, coefficients) for gram in grams)
        variance = np.maximum(directions + prompts - both, np.maximum(directions, prompts))
        return variance, self._freedom(directions, prompts)

    def quantile(self, confidence: float) -> np.ndarray:
        """Student's t that bounds the interval."""
        return stdtrit(self.freedom(), (1 + confidence) / 2)

    def interval(self, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Value ± t · √V, shape S each."""
        half = self.quantile(confidence) * np.sqrt(self.variance())
        return self.value - half, self.value + half

    def positive_interval(self, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Value · e^{± t √V / value}: an interval in the logarithm, for what is positive and skewed (scalars)."""
        if not float(self.value) > 0:
            return np.array(np.nan), np.array(np.nan)
        factor = np.exp(self.quantile(confidence) * np.sqrt(self.variance()) / self.value)
        return self.value / factor, self.value * factor


def _merged(one: Mapping[Hashable, np.ndarray], other: Mapping[Hashable, np.ndarray]) -> dict[Hashable, np.ndarray]:
    merged = dict(one)
    for key, values in other.items():
        if key in merged and merged[key].shape[0] != values.shape[0]:
            raise AnalysisError(
                f"{key} names {merged[key].shape[0]} units in one estimate and {values.shape[0]} in another; "
                "estimates that share prompts or directions must use the same ones"
            )
        merged[key] = merged[key] + values if key in merged else values
    return merged


def from_leave_outs(table: np.ndarray, directions: Hashable, prompts: Hashable) -> TwoWay:
    """Of a statistic with every direction, every prompt and every pair of both left out.

    `table` has shape (K + 1, N + 1, *S): row d without direction d, the last row with all; columns likewise. Its last
    entry is the estimate.
    """
    k, n = table.shape[0] - 1, table.shape[1] - 1
    full = table[-1, -1]
    rows = table[:-1, -1] - table[:-1, -1].mean(0)
    columns = table[-1, :-1] - table[-1, :-1].mean(0)
    inner = table[:-1, :-1] - table[:-1, -1:] - table[-1:, :-1] + full
    inner = inner - inner.mean((0, 1))
    return TwoWay(
        np.asarray(full, float),
        {directions: -np.sqrt((k - 1) / k) * rows},
        {prompts: -np.sqrt((n - 1) / n) * columns},
        {(directions, prompts): np.sqrt((k - 1) * (n - 1) / (k * n)) * inner},
    )


def leave_out_weights(units: int) -> np.ndarray:
    """0/1 weights, shape (units + 1, units): row u without unit u, the last row with all."""
    weights = np.ones((units + 1, units))
    weights[np.arange(units), np.arange(units)] = 0.0
    return weights


def means(values: np.ndarray, directions: Hashable, prompts: Hashable) -> TwoWay:
    """Mean over directions and prompts of `values` (directions, prompts, *S)."""
    k, n = values.shape[:2]
    v, w = leave_out_weights(k), leave_out_weights(n)
    sums = np.einsum("ad,di...->ai...", v, values)
    table = np.einsum("bi,ai...->ab...", w, sums)
    counts = v.sum(1)[:, None] * w.sum(1)[None]
    return from_leave_outs(table / counts.reshape(counts.shape + (1,) * (values.ndim - 2)), directions, prompts)


def prompt_means(values: np.ndarray, prompts: Hashable) -> TwoWay:
    """Mean over prompts alone of `values` (prompts, *S): no direction was drawn for it."""
    n = len(values)
    mean = values.mean(0)
    return TwoWay(mean, {}, {prompts: (values - mean) / np.sqrt(n * (n - 1))}, {})


def covariances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Covariance over directions of two true values, with every direction and prompt left out; (K + 1, N + 1).

    `x`, `y`: (K, members, N), values per prompt; the members of a direction (its two signs) are points of their own,
    but only pairs of *different* directions count in the product of means, and only products of *different* prompts
    count anywhere. So sampling noise and the dependence between the two signs leave no bias.
    """
    k, members, n = x.shape
    if k < 3 or n < 3:
        raise AnalysisError(f"a covariance with one direction and prompt left out needs three of each, not {k} and {n}")
    sx, sy = x.sum(-1), y.sum(-1)
    own = ((sx * sy) - (x * y).sum(-1)).sum(1)
    own_i = (x * sy[..., None] + sx[..., None] * y - 2 * x * y).sum(1)
    within = _left_out(own, own_i)
    dx, dy = x.sum(1), y.sum(1)
    dsx, dsy = dx.sum(1), dy.sum(1)
    same = _left_out(dsx * dsy - (dx * dy).sum(1), dx * dsy[:, None] + dsx[:, None] * dy - 2 * dx * dy)
    v = leave_out_weights(k)
    gx, gy = v @ dx, v @ dy
    tx, ty = gx.sum(1, keepdims=True), gy.sum(1, keepdims=True)
    every = tx * ty - (gx * gy).sum(1, keepdims=True)
    total = np.concatenate([every - tx * gy - gx * ty + 2 * gx * gy, every], axis=1)
    ks = np.append(np.full(k, k - 1.0), k)[:, None]
    ns = np.append(np.full(n, n - 1.0), n)[None]
    pairs = ns * (ns - 1)
    return within / (ks * members * pairs) - (total - same) / (ks * (ks - 1) * members**2 * pairs)


def _left_out(own: np.ndarray, per_prompt: np.ndarray) -> np.ndarray:
    """Σ over directions of a sum over pairs of prompts, with units left out: `own` (K,), what a prompt adds (K, N)."""
    table = np.empty((len(own) + 1, per_prompt.shape[1] + 1))
    prompts = per_prompt.sum(0)
    table[-1, -1] = own.sum()
    table[:-1, -1] = own.sum() - own
    table[-1, :-1] = own.sum() - prompts
    table[:-1, :-1] = own.sum() - own[:, None] - prompts[None] + per_prompt
    return table


def fieller(numerator: TwoWay, denominator: TwoWay, low: float, high: float, confidence: float) -> tuple[float, float]:
    """Values ρ in [low, high] that `numerator` − ρ · `denominator` = 0 does not rule out (Fieller 1954); their hull.

    Unlike an interval of the ratio itself it stays honest where the denominator is not known to differ from 0: then
    everything, or everything on one side, remains.
    """
    both = stack(numerator, denominator)
    grid = np.linspace(low, high, FIELLER_GRID)
    value = numerator.value - grid * denominator.value
    variance, freedom = both.quadratic(np.stack([np.ones_like(grid), -grid], -1))
    inside = np.abs(value) <= stdtrit(freedom, (1 + confidence) / 2) * np.sqrt(variance)
    if not inside.any():
        nearest = float(grid[np.abs(value).argmin()])
        return nearest, nearest
    kept = grid[inside]
    return float(kept[0]), float(kept[-1])


def stack(*estimates: TwoWay) -> TwoWay:
    """Estimates of one shape as the last axis of one `TwoWay`."""
    return TwoWay(
        np.stack([estimate.value for estimate in estimates], -1),
        *(_stacked([getattr(e, name) for e in estimates]) for name in ("directions", "prompts", "both")),
    )


def _stacked(parts: Sequence[Mapping[Hashable, np.ndarray]]) -> dict[Hashable, np.ndarray]:
    found = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        zero = next(np.zeros_like(part[key]) for part in parts if key in part)
        found[key] = np.stack([part.get(key, zero) for part in parts], -1)
    return found


def over_runs(estimates: Sequence[TwoWay]) -> tuple[float, float, float]:
    """Mean over runs, its variance and degrees of freedom; estimates are scalars of runs that share prompts.

    Runs, directions and prompts are all sampled. Differences between runs hold the runs' own spread and that of their
    directions; what all share through the prompts is added, and what both counted is taken away. One run has the
    variance of its directions and prompts alone: nothing is then known of another run.
    """
    if not estimates:
        raise AnalysisError("no run to average over")
    mean = sum(estimates[1:], estimates[0]) * (1 / len(estimates))
    runs = len(estimates)
    if runs == 1:
        return float(mean.value), float(mean.variance()), float(mean.freedom())
    values = np.array([float(estimate.value) for estimate in estimates])
    between = values.var(ddof=1) / runs
    prompts = float(mean.parts()[1])
    shared = 0.0
    for estimate in estimates:
        shared += float((estimate - mean).parts()[1]) / (runs * (runs - 1))
    # Runs that share directions as well (one step 0 for all, say) differ less than their own errors say.
    variance = max(between + prompts - shared, between, float(mean.variance()))
    n = sum(len(own) - 1 for own in mean.prompts.values())
    freedom = (between + prompts) ** 2 / (between**2 / (runs - 1) + prompts**2 / max(n, 1)) if variance > 0 else 1.0
    return float(mean.value), variance, max(freedom, 1.0)
