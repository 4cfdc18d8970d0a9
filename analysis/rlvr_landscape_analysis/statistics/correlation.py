"""Correlations over the grid of one landscape: plain, corrected for sampling noise, controlled for the radius.

Let x_i and y_i be the values of two quantities at all points, as vectors, for prompt i of N, and Q a projection over
the points that removes what is controlled for. With U_xy the mean of x_i·Q y_j over pairs of *different* prompts,

    plain      r = X·QY / √(X·QX · Y·QY),     X = mean_i x_i
    corrected  r = U_xy / √(U_xx U_yy)

    contribution  = U_xy / √(U°_xx U°_yy),   U° without any control

U is X·QY minus its sampling noise, estimated from the residuals of prompts (Spearman 1904), so the corrected value
estimates the correlation of the landscape that infinitely many prompts would show. Controls differ in Q only. A
contribution is a part of the corrected plain correlation: those of `shell` and `radial` add up to it, and they stay
defined where a control leaves no variation at all. docs/statistics.md explains each and its intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.results import BOUNDS, CONTROLS, PAIRS
from rlvr_landscape_analysis.statistics.resample import MIN_PROMPTS, Bootstrap, Cells, cells, centred_interval
from rlvr_landscape_analysis.statistics.studentised import EDGE, interval_of_z, studentised

VARIABLES = {"kl": "kl_k1", "reward": "reward", "surrogate": "surrogate"}
MEMBERS = {
    "kl_reward": ("kl", "reward"),
    "kl_surrogate": ("kl", "surrogate"),
    "surrogate_reward": ("surrogate", "reward"),
}
QUANTITIES = ("kl", "reward", "surrogate")
MIN_FREEDOM = 3
"""Fewest dimensions that a control must leave."""
SPLITS = 32
"""Random halvings behind the reliability of ranks."""


def correlations(
    data: xr.Dataset,
    *,
    bootstrap: Bootstrap | None = None,
    estimator: str = "k1",
    controls: Sequence[str] = CONTROLS,
    replicates: bool = False,
) -> xr.Dataset:
    """All correlations of one landscape with their intervals; dims (pair, control, bound, member).

    - `pearson`, `spearman`: of the points' means, with `<name>_interval`, which say how far the *same* statistic
      would move with other prompts;
    - `corrected` with `corrected_interval`: Pearson without the attenuation by sampling noise, which aims at the
      landscape itself; `spearman_corrected`: Spearman divided by the root of both rank reliabilities (approximate);
    - `contribution` with `contribution_interval`: what the part that the control leaves adds to the corrected plain
      correlation (`none`: all of it; `shell`: what is not the radius; `radial`: what is).
      `radial_share` (quantity) with its interval: share of a quantity's variation over the slice, noise taken out,
      that shell means describe;
    - `reliability` (member first, second): share of the variance over points that is not noise;
    - `prompts`, `points`: used; `reason`: why a value is missing, empty otherwise.

    `estimator` chooses the KL (`k1`, `k3`). With `replicates` (dim resample): `z` and `z_resampled`, Fisher's z of
    `contribution`, the resamples shifted so that their median is `z`; `pearson_resampled` and `spearman_resampled` as
    they come. A pair whose variable is not in the dataset is missing with a reason. Scalar coordinates step and
    slice_seed are kept.
    """
    settings = bootstrap or Bootstrap()
    names = {label: f"kl_{estimator}" if label == "kl" else variable for label, variable in VARIABLES.items()}
    present = {label: variable for label, variable in names.items() if variable in data}
    matrices = cells(data, present)
    weights = matrices.weights(settings)
    table = _empty(list(controls), settings.resamples if replicates else None)
    table["prompts"][...] = len(matrices.kept)
    whole = project(matrices, "none")
    whole_sums = {name: values @ weights for name, values in whole.values.items()}
    totals = {name: _Moments(v, v, whole_sums[name], whole_sums[name], weights) for name, v in whole.values.items()}
    _radial_share(table, matrices, totals, weights, settings)
    for c, control in enumerate(controls):
        projection = whole if control == "none" else project(matrices, control)
        table["points"][:, c] = projection.points
        if control == "none":
            sums = whole_sums
        else:
            sums = {name: values @ weights for name, values in projection.values.items()}
        for p, pair in enumerate(PAIRS):
            first, second = MEMBERS[pair]
            absent = [names[m] for m in (first, second) if m not in present]
            reason = f"the dataset has no {' and no '.join(absent)}" if absent else projection.reason
            if reason:
                table["reason"][p, c] = reason
                continue
            x, y = projection.values[first], projection.values[second]
            outcome = _pair(x, y, sums[first], sums[second], weights, settings, labels=(first, second))
            if not outcome.get("reason") or "reliability" in outcome:
                ends = None if control == "no_origin" else (totals[first], totals[second])
                outcome |= _contribution(x, y, sums[first], sums[second], ends, weights, settings)
            for name, value in outcome.items():
                if name in table:
                    table[name][p, c] = value
    return _dataset(table, list(controls), data)


@dataclass(frozen=True)
class Projection:
    """Values per prompt with the control removed: label → (rows, prompts); inner products of rows are what counts."""

    values: dict[str, np.ndarray]
    points: int
    reason: str = ""


def project(matrices: Cells, control: str) -> Projection:
    """Remove a control; docs/statistics.md says what each leaves."""
    values, points = matrices.values, len(matrices.alpha)
    if control == "no_origin":
        origin = matrices.origin
        if origin is None:
            return Projection({}, points, "the origin is not among the points")
        keep = np.arange(points) != origin
        values, points = {name: matrix[keep] for name, matrix in values.items()}, points - 1
    if control in ("none", "no_origin"):
        if points - 1 < MIN_FREEDOM:
            return Projection({}, points, f"only {points} points")
        return Projection({name: matrix - matrix.mean(0) for name, matrix in values.items()}, points)
    if control in ("linear", "smooth"):
        rho = matrices.radius / (matrices.radius.max() or 1.0)
        terms = [rho**p for p in ((0, 1) if control == "linear" else (0, 2, 4, 6))]
        basis, singular, _ = np.linalg.svd(np.stack(terms, axis=1), full_matrices=False)
        basis = basis[:, singular > 1e-10 * singular[0]]
        if points - basis.shape[1] < MIN_FREEDOM:
            return Projection({}, points, f"only {points} points")
        return Projection({name: matrix - basis @ (basis.T @ matrix) for name, matrix in values.items()}, points)
    _, shell = np.unique(matrices.shell, return_inverse=True)
    counts = np.bincount(shell)
    means = {name: _shell_means(matrix, shell, counts) for name, matrix in values.items()}
    if control == "shell":
        inside = points - len(counts)
        if inside < MIN_FREEDOM:
            return Projection({}, points, "the grid has too few points of equal radius; see the control 'smooth'")
        return Projection({name: matrix - means[name][shell] for name, matrix in values.items()}, points)
    if control == "radial":
        if len(counts) - 1 < MIN_FREEDOM:
            return Projection({}, points, f"only {len(counts)} different radii")
        return Projection({name: means[name][shell] - matrix.mean(0) for name, matrix in values.items()}, points)
    raise ValueError(f"unknown control {control!r}; known: {', '.join(CONTROLS)}")


def _shell_means(matrix: np.ndarray, shell: np.ndarray, counts: np.ndarray) -> np.ndarray:
    order = np.argsort(shell, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.add.reduceat(matrix[order], starts, axis=0) / counts[:, None]


def corrected_moments(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """U_xx, U_xy, U_yy of two projected matrices (points, prompts): means over pairs of different prompts."""
    prompts = x.shape[1]
    pairs = prompts * (prompts - 1)

    def moment(a: np.ndarray, b: np.ndarray) -> float:
        return float((a.sum(1) @ b.sum(1) - np.einsum("gi,gi->", a, b)) / pairs)

    return moment(x, x), moment(x, y), moment(y, y)


def _pair(
    x: np.ndarray,
    y: np.ndarray,
    sx: np.ndarray,
    sy: np.ndarray,
    weights: np.ndarray,
    settings: Bootstrap,
    labels: tuple[str, str],
) -> dict[str, object]:
    prompts = x.shape[1]
    mx, my = x.mean(1), y.mean(1)
    size = np.array([mx @ mx, my @ my])
    scale = np.array([np.einsum("gi,gi->", x, x), np.einsum("gi,gi->", y, y)]) / prompts
    flat = [label for label, s, whole in zip(labels, size, scale, strict=True) if s <= 1e-24 * max(whole, 1e-300)]
    if flat:
        return {"reason": f"{' and '.join(flat)} the same at all points once the control is taken out"}
    out: dict[str, object] = {}
    out["pearson"] = pearson = float(np.clip((mx @ my) / np.sqrt(size[0] * size[1]), -1, 1))
    out["spearman"] = spearman = float(_correlate(_ranks(mx[None]), _ranks(my[None]))[0])
    if prompts < MIN_PROMPTS:
        out["reason"] = f"only {prompts} prompts: no interval and no correction below {MIN_PROMPTS}"
        return out
    resampled = _correlate(sx.T, sy.T, centre=False)
    out["pearson_resampled"] = resampled
    out["pearson_interval"] = np.tanh(centred_interval(float(_fisher(pearson)), _fisher(resampled), settings, prompts))
    ranks = _correlate(_ranks(sx.T), _ranks(sy.T))
    out["spearman_resampled"] = ranks
    out["spearman_interval"] = centred_interval(spearman, ranks, settings, prompts, low=-1, high=1)
    out["spearman_corrected"] = _corrected_ranks(x, y, spearman, settings.seed)
    uxx, uxy, uyy = corrected_moments(x, y)
    reliability = np.clip(np.array([uxx, uyy]) / size, 0.0, 1.0)
    out["reliability"] = reliability
    noisy = [label for label, u in zip(labels, (uxx, uyy), strict=True) if u <= 0]
    if noisy:
        out["reason"] = f"no variation of {' and '.join(noisy)} beyond sampling noise: any value is possible"
        out["corrected_interval"] = (-1.0, 1.0)
        return out
    value = np.clip(uxy / np.sqrt(uxx * uyy), -1.0, 1.0)
    out["corrected"] = value
    z, zs, se, ses = studentised(x, y, sx, sy, weights)
    out["corrected_interval"] = np.tanh(interval_of_z(z, zs, se, ses, settings, prompts, float(reliability.min())))
    return out


class _Moments:
    """U of two projected matrices: measured, and for every resample (pairs of copies of one prompt do not count)."""

    def __init__(self, x: np.ndarray, y: np.ndarray, sx: np.ndarray, sy: np.ndarray, weights: np.ndarray) -> None:
        prompts = x.shape[1]
        own = np.einsum("gi,gi->i", x, y)
        self.measured = float((x.sum(1) @ y.sum(1) - own.sum()) / (prompts * (prompts - 1))) if prompts > 1 else np.nan
        square = weights**2
        pairs = weights.sum(0) ** 2 - square.sum(0)
        total = np.einsum("gb,gb->b", sx, sy)
        with np.errstate(invalid="ignore", divide="ignore"):
            self.resampled = (total - own @ square) / pairs


def _contribution(
    x: np.ndarray,
    y: np.ndarray,
    sx: np.ndarray,
    sy: np.ndarray,
    totals: tuple[_Moments, _Moments] | None,
    weights: np.ndarray,
    settings: Bootstrap,
) -> dict[str, object]:
    """What x and y add to the corrected plain correlation, its interval and resamples.

    `totals` are the moments of both quantities without a control (of x and y themselves if None).
    """
    first, second = totals or (_Moments(x, x, sx, sx, weights), _Moments(y, y, sy, sy, weights))
    cross = _Moments(x, y, sx, sy, weights)
    if min(first.measured, second.measured) <= 0:
        return {"contribution_interval": (-1.0, 1.0)}
    value = float(np.clip(cross.measured / np.sqrt(first.measured * second.measured), -1, 1))
    with np.errstate(invalid="ignore"):
        draws = cross.resampled / np.sqrt(first.resampled * second.resampled)
    draws = np.where((first.resampled > 0) & (second.resampled > 0), draws, np.sign(cross.resampled))
    z, zs = float(_fisher(value)), _fisher(draws)
    bounds = centred_interval(z, zs, settings, x.shape[1])
    return {
        "contribution": value,
        "contribution_interval": np.tanh(bounds),
        "z": z,
        "z_resampled": zs - np.median(zs) + z,
    }


def _radial_share(
    table: dict[str, np.ndarray],
    matrices: Cells,
    totals: dict[str, _Moments],
    weights: np.ndarray,
    settings: Bootstrap,
) -> None:
    radial = project(matrices, "radial")
    prompts = len(matrices.kept)
    for q, name in enumerate(QUANTITIES):
        if name not in radial.values or name not in totals or prompts < MIN_PROMPTS:
            continue
        shape = radial.values[name]
        sums = shape @ weights
        part, total = _Moments(shape, shape, sums, sums, weights), totals[name]
        if total.measured <= 0:
            continue
        value = float(np.clip(part.measured / total.measured, 0, 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            draws = np.where(total.resampled > 0, part.resampled / total.resampled, np.nan)
        table["radial_share"][q] = value
        table["radial_share_interval"][q] = centred_interval(value, draws, settings, prompts, low=0, high=1)


def _fisher(r: float | np.ndarray) -> np.ndarray:
    return np.arctanh(np.clip(r, -EDGE, EDGE))


def _correlate(a: np.ndarray, b: np.ndarray, *, centre: bool = True) -> np.ndarray:
    """Pearson of matching rows."""
    if centre:
        a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.einsum("bg,bg->b", a, b) / np.sqrt(np.einsum("bg,bg->b", a, a) * np.einsum("bg,bg->b", b, b))


def _ranks(rows: np.ndarray) -> np.ndarray:
    """Ranks within each row, ties averaged. Equal up to rounding (1e-11 of the row's largest value) is equal."""
    scale = np.abs(rows).max(axis=1, keepdims=True)
    rows = np.round(rows / np.where(scale > 0, scale, 1.0), 11)
    order = np.argsort(rows, axis=1)
    ordered = np.take_along_axis(rows, order, axis=1)
    ranks = np.empty(rows.shape)
    np.put_along_axis(ranks, order, np.arange(1.0, rows.shape[1] + 1)[None], axis=1)
    tied = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
    if len(tied):
        from scipy.stats import rankdata

        ranks[tied] = rankdata(rows[tied], axis=1)
    return ranks


def _corrected_ranks(x: np.ndarray, y: np.ndarray, spearman: float, seed: int) -> float:
    """Spearman divided by √(both rank reliabilities), from random halves of the prompts, stepped up to all."""
    prompts = x.shape[1]
    rng = np.random.default_rng(np.random.SeedSequence([seed, prompts]))
    halves = np.zeros((prompts, SPLITS))
    for split in range(SPLITS):
        halves[rng.permutation(prompts)[: prompts // 2], split] = 1.0
    reliabilities = []
    for matrix in (x, y):
        one, other = _ranks((matrix @ halves).T), _ranks((matrix @ (1.0 - halves)).T)
        half = float(_correlate(one, other).mean())
        reliabilities.append(2 * half / (1 + half) if half > 0 else 0.0)
    if min(reliabilities) <= 0:
        return np.nan
    return float(np.clip(spearman / np.sqrt(reliabilities[0] * reliabilities[1]), -1, 1))


def _empty(controls: list[str], resamples: int | None) -> dict[str, np.ndarray]:
    shape = (len(PAIRS), len(controls))
    table = {
        name: np.full(shape, np.nan)
        for name in ("pearson", "spearman", "corrected", "contribution", "spearman_corrected")
    }
    bounded = ("pearson", "spearman", "corrected", "contribution")
    table |= {f"{name}_interval": np.full((*shape, 2), np.nan) for name in bounded}
    table |= {"radial_share": np.full(3, np.nan), "radial_share_interval": np.full((3, 2), np.nan)}
    table |= {"reliability": np.full((*shape, 2), np.nan)}
    table |= {"prompts": np.zeros(shape, int), "points": np.zeros(shape, int), "reason": np.full(shape, "", object)}
    if resamples is not None:
        table |= {"z": np.full(shape, np.nan)}
        table |= {name: np.full((*shape, resamples), np.nan) for name in _DRAWS}
    return table


_LONG_NAMES = {
    "pearson": "Pearson correlation over the points",
    "spearman": "Spearman correlation over the points",
    "corrected": "Pearson correlation corrected for sampling noise",
    "contribution": "part of the corrected plain correlation that the control leaves",
    "radial_share": "share of the variation over the slice that shell means describe, noise taken out",
    "spearman_corrected": "Spearman correlation divided by the root of the rank reliabilities",
    "reliability": "share of the variance over points that is not sampling noise",
    "prompts": "prompts used",
    "points": "points used",
    "reason": "why a value is missing",
    "z": "Fisher's z of the contribution",
    "z_resampled": "resampled z, shifted to z",
    "pearson_resampled": "resampled Pearson correlation",
    "spearman_resampled": "resampled Spearman correlation",
}
_DRAWS = ("z_resampled", "pearson_resampled", "spearman_resampled")
_LAST = dict.fromkeys(_DRAWS, "resample") | {"reliability": "member"}


def _dataset(table: dict[str, np.ndarray], controls: list[str], data: xr.Dataset) -> xr.Dataset:
    variables = {}
    for name, values in table.items():
        dims: tuple[str, ...] = ("quantity",) if name.startswith("radial_share") else ("pair", "control")
        if name.endswith("_interval"):
            dims = (*dims, "bound")
        elif name in _LAST:
            dims = (*dims, _LAST[name])
        base = name.removesuffix("_interval")
        long_name = _LONG_NAMES[base] + (", interval" if name.endswith("_interval") else "")
        if name == "reason":
            values = values.astype(str)
        variables[name] = (dims, values, {"long_name": long_name, "units": "1"})
    coords = {
        "pair": list(PAIRS),
        "control": controls,
        "bound": list(BOUNDS),
        "member": ["first", "second"],
        "quantity": list(QUANTITIES),
    }
    scalars = {name: int(data[name]) for name in ("step", "slice_seed") if name in data.coords and data[name].ndim == 0}
    return xr.Dataset(variables, coords | scalars)
