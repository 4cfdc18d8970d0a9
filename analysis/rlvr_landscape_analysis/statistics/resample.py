"""Resampling prompts as matrix products.

All points of a landscape share their prompts, so a bootstrap draw is one weight per prompt, the same for every point,
variable, snapshot and slice (cluster bootstrap, Wagstaff et al. 2009). With the means per prompt in a matrix (points,
prompts) and the weights in (prompts, resamples), all resampled means are one product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xarray as xr
from scipy.special import ndtri, stdtrit

from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.landscape import per_prompt, shells
from rlvr_landscape_analysis.schema import GRID

MIN_PROMPTS = 8
"""With fewer prompts no interval is given: resampling so few units means nothing."""


@dataclass(frozen=True)
class Bootstrap:
    """How prompts are resampled. The same object gives the same draws for the same number of prompts."""

    resamples: int = 2000
    seed: int = 0
    level: float = 0.95
    largest: int = 0
    """Prompts of the largest dataset, where others hold only its first ones: their draws then go together with its, as
    far as the prompts are the same."""

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise AnalysisError(f"{self.resamples} resamples are too few for an interval; use at least 100")
        if not 0.5 <= self.level < 1:
            raise AnalysisError(f"confidence level {self.level:g} must lie between 0.5 and 1")

    def weights(self, prompts: int) -> np.ndarray:
        """Multinomial counts, float64, shape (prompts, resamples); every column sums to `prompts`. Read-only."""
        if prompts < self.largest:
            return _prefix_weights(prompts, self.resamples, self.seed, self.largest)
        return _weights(prompts, self.resamples, self.seed)

    @property
    def tails(self) -> tuple[float, float]:
        """The two probabilities that bound the interval."""
        return (1 - self.level) / 2, (1 + self.level) / 2

    def widening(self, prompts: int) -> float:
        """Factor ≥ 1 for small samples: Student's t with prompts − 1 degrees against the normal, and √(n/(n−1))."""
        t, z = stdtrit(prompts - 1, self.tails[1]), ndtri(self.tails[1])
        return float(t / z * np.sqrt(prompts / (prompts - 1)))


@lru_cache(maxsize=4)
def _weights(prompts: int, resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(np.random.SeedSequence([seed, prompts, resamples]))
    drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    weights = np.ascontiguousarray(drawn.T, dtype=np.float64)
    weights.setflags(write=False)
    return weights


@lru_cache(maxsize=8)
def _prefix_weights(prompts: int, resamples: int, seed: int, largest: int) -> np.ndarray:
    """Multinomial counts of the first `prompts` of `largest`, made from the counts of all of them.

    How often the first prompts are drawn among all is multinomial given its sum; evenly drawn units that are added or
    taken away bring the sum to `prompts` and leave it multinomial.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, prompts, resamples, largest]))
    weights = _weights(largest, resamples, seed)[:prompts].T.astype(np.int64)
    for row, lacking in zip(weights, prompts - weights.sum(1), strict=True):
        if lacking >= 0:
            row += rng.multinomial(lacking, np.full(prompts, 1 / prompts))
        else:
            row -= rng.multivariate_hypergeometric(row, -lacking)
    made = np.ascontiguousarray(weights.T, dtype=np.float64)
    made.setflags(write=False)
    return made


@dataclass(frozen=True)
class Cells:
    """A landscape as matrices: which points and prompts are usable, and their means per prompt."""

    alpha: np.ndarray
    """α of each used point, shape (points,)."""
    beta: np.ndarray
    """β of each used point."""
    shell: np.ndarray
    """Index of each used point's shell of equal radius."""
    values: dict[str, np.ndarray]
    """Variable → float64 (points, prompts), without missing values."""
    kept: np.ndarray
    """Indices of the used prompts in the dataset."""
    all_points: int
    all_prompts: int

    @property
    def radius(self) -> np.ndarray:
        """Distance of each point from the origin."""
        return np.hypot(self.alpha, self.beta)

    @property
    def origin(self) -> int | None:
        """Row of the origin, or None when it is not among the used points."""
        found = np.flatnonzero((self.alpha == 0) & (self.beta == 0))
        return int(found[0]) if len(found) else None

    def weights(self, bootstrap: Bootstrap) -> np.ndarray:
        """The bootstrap's weights of the used prompts, shape (used prompts, resamples)."""
        weights = bootstrap.weights(self.all_prompts)
        return weights if len(self.kept) == self.all_prompts else weights[self.kept]


def cells(data: xr.Dataset, names: dict[str, str]) -> Cells:
    """The variables `names` (label → variable of the reduced dataset) without missing values.

    A point is left out when more than half of its prompts are missing; then a prompt is left out when it is missing at
    any remaining point. What was left out is stated in `all_points` and `all_prompts`. Raises `AnalysisError` naming
    the variable when nothing usable remains.
    """
    reduced = per_prompt(data)
    for variable in names.values():
        if variable not in reduced:
            raise AnalysisError(f"the dataset has no variable {variable!r}")
    alpha, beta = reduced["alpha"].values.astype(float), reduced["beta"].values.astype(float)
    grid_alpha, grid_beta = (a.ravel() for a in np.meshgrid(alpha, beta, indexing="ij"))
    _, shell = shells(alpha, beta)
    stacked = {
        label: np.ascontiguousarray(
            reduced[variable].transpose(*GRID, "prompt").values.reshape(len(grid_alpha), -1), dtype=np.float64
        )
        for label, variable in names.items()
    }
    good = np.logical_and.reduce([np.isfinite(matrix) for matrix in stacked.values()])
    points = good.mean(axis=1) >= 0.5
    prompts = good[points].all(axis=0) if points.any() else np.zeros(good.shape[1], bool)
    if not prompts.any() or not points.any():
        worst = min(stacked, key=lambda label: np.isfinite(stacked[label]).mean())
        raise AnalysisError(f"no prompt has values at all points; most are missing in {names[worst]!r}")
    if not (points.all() and prompts.all()):
        stacked = {label: np.ascontiguousarray(matrix[points][:, prompts]) for label, matrix in stacked.items()}
    kept = np.flatnonzero(prompts)
    return Cells(grid_alpha[points], grid_beta[points], shell[points], stacked, kept, len(points), len(prompts))


def centred_interval(
    value: float,
    resampled: np.ndarray,
    bootstrap: Bootstrap,
    prompts: int,
    *,
    low: float = -np.inf,
    high: float = np.inf,
) -> tuple[float, float]:
    """Percentiles of the resampled values, shifted so that their median is `value`, clipped to [low, high].

    The shift removes what resampling itself adds (a resampled landscape is noisier than the measured one). Missing
    resamples make the interval missing unless they are fewer than the tails.
    """
    finite = resampled[np.isfinite(resampled)]
    if not np.isfinite(value) or prompts < MIN_PROMPTS or len(finite) < bootstrap.level * len(resampled):
        return np.nan, np.nan
    deviations = finite - np.median(finite)
    bounds = value + bootstrap.widening(prompts) * np.quantile(deviations, bootstrap.tails)
    return float(np.clip(bounds[0], low, high)), float(np.clip(bounds[1], low, high))
