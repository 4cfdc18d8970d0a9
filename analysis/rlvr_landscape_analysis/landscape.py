"""Quantities of a landscape, from its rollouts. Pure functions on labelled arrays; nothing is read or written.

Each accepts the raw dataset, dims (alpha, beta, prompt, rollout), or its reduction by `per_prompt`, dims (alpha, beta,
prompt). Statistics treat prompts as the independent units (Miller 2024, arXiv 2411.00640).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.datasets import NEEDED, check_landscape, is_reduced
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.schema import BASE_ROLLOUT, GRID, METRIC, ROLLOUT, SCHEMA, pass_threshold

_AVERAGED = [name for name, one in SCHEMA.items() if one.family in ("rollout", "completion") and name != "status"]


def per_prompt(data: xr.Dataset, *, threshold: float | None = None) -> xr.Dataset:
    """Reduce rollouts: float64 means per prompt, dims (alpha, beta, prompt); a reduced dataset is returned as it is.

    Averaged over the rollouts that did not fail: every float variable of the schema and every metric of the taskset.
    Added: `rollouts` (valid rollouts of a prompt at a point), `successes` (of them with reward ≥ `threshold`; default:
    as the sweep fixed it), `tokens` (prompt; mean completion tokens of the base batch, the denominator of J unless the
    dataset has `surrogate_weight`).
    Lazy arrays stay lazy. Attributes, coordinates and units are kept.
    """
    if is_reduced(data):
        return data
    check_landscape(data)
    variables: dict[str, xr.DataArray] = {}
    for name in (*_AVERAGED, *(str(name) for name in data.data_vars if str(name).startswith(METRIC))):
        if name not in data:
            continue
        variables[name] = rollout_mean(data[name])
    reward = data["reward"]
    valid = reward.notnull()
    variables["rollouts"] = valid.sum("rollout").assign_attrs(long_name="rollouts that did not fail", units="1")
    limit = pass_threshold(data.attrs, threshold)
    solved = (reward >= limit).sum("rollout")
    variables["successes"] = solved.assign_attrs(long_name=f"rollouts with reward >= {limit:g}", units="1")
    if "base_tokens" in data:
        variables["tokens"] = rollout_mean(data["base_tokens"])
    if "surrogate_weight" in data:
        variables["surrogate_weight"] = rollout_mean(data["surrogate_weight"])
    for name in ("realised_step", "displacement_radius"):
        if name in data:
            variables[name] = data[name]
    attrs = data.attrs | {"reduced": "per_prompt", "threshold": limit, "rollouts": data.sizes["rollout"]}
    return xr.Dataset(variables, attrs=attrs)


def rollout_mean(values: xr.DataArray) -> xr.DataArray:
    """Mean over `rollout` or `base_rollout` in float64, missing ones left out; NaN where none is left.

    Attributes are kept.
    """

    def mean(block: np.ndarray) -> np.ndarray:
        total = block.mean(axis=-1, dtype=np.float64)
        holes = np.isnan(total)
        if holes.any():
            rows = block[holes].astype(np.float64)
            count = (~np.isnan(rows)).sum(axis=-1)
            with np.errstate(invalid="ignore"):
                total[holes] = np.where(count > 0, np.nansum(rows, axis=-1) / count, np.nan)
        return total

    return xr.apply_ufunc(
        mean,
        values,
        input_core_dims=[[_rollouts(values) or ROLLOUT]],
        dask="parallelized",
        output_dtypes=[np.float64],
        keep_attrs=True,
    )


def point_mean(values: xr.DataArray) -> xr.Dataset:
    """Mean over prompts and rollouts with its standard error; prompts are the independent units.

    Dims (…, prompt[, rollout]) → variables `mean` and `standard_error` with dims (…). Missing rollouts are left out.
    The standard error is that of the mean of the prompts' means (Miller 2024, arXiv 2411.00640, clustered by prompt)
    and missing with one prompt. Units are kept; long names are set again.
    """
    cells = _per_prompt_array(values)
    mean, error = cells.mean("prompt", skipna=True), standard_error(cells)
    return _mean_and_error(values, mean, error, "mean {}", "standard error of the mean {}")


def difference_from_origin(values: xr.DataArray) -> xr.Dataset:
    """Each point minus the origin, paired by prompt: `mean` and `standard_error`, dims without prompt and rollout."""
    cells = _per_prompt_array(values)
    difference = cells - cells.sel(alpha=0.0, beta=0.0)
    names = "difference from the origin in mean {}", "standard error of the difference from the origin in {}"
    return _mean_and_error(values, difference.mean("prompt", skipna=True), standard_error(difference), *names)


def _rollouts(values: xr.DataArray) -> str | None:
    """The dimension of `values` that counts rollouts: those of a point, or the checkpoint's own."""
    return next((name for name in (ROLLOUT, BASE_ROLLOUT) if name in values.dims), None)


def _per_prompt_array(values: xr.DataArray) -> xr.DataArray:
    return rollout_mean(values) if _rollouts(values) else values.astype(np.float64)


def _mean_and_error(
    source: xr.DataArray, mean: xr.DataArray, error: xr.DataArray, mean_name: str, error_name: str
) -> xr.Dataset:
    name, units = source.attrs.get("long_name", str(source.name)), source.attrs.get("units", "1")
    mean.attrs = {"long_name": mean_name.format(name), "units": units, "ancillary_variables": "standard_error"}
    error.attrs = {"long_name": error_name.format(name), "units": units}
    return xr.Dataset({"mean": mean, "standard_error": error})


def standard_error(cells: xr.DataArray) -> xr.DataArray:
    """Standard error over `prompt`: sample standard deviation by √n, missing values left out; NaN with one prompt."""
    count = cells.notnull().sum("prompt")
    spread = cells.std("prompt", ddof=1, skipna=True) if cells.sizes["prompt"] > 1 else np.nan
    return xr.where(count > 1, spread / np.sqrt(count), np.nan)


def radius(data: xr.Dataset | xr.DataArray) -> xr.DataArray:
    """Nominal distance from the origin, √(α² + β²), dims (alpha, beta); in units of each direction's norm."""
    found = xr.apply_ufunc(np.hypot, data["alpha"], data["beta"])
    return found.rename("radius").assign_attrs(long_name="distance from the origin, sqrt(alpha^2 + beta^2)", units="1")


def kl(data: xr.Dataset, *, estimator: str = "k1") -> xr.Dataset:
    """KL divergence from the checkpoint per point, nat per completion: `mean` and `standard_error`.

    `estimator` is `k1` (unbiased, −log ρ summed) or `k3` (ρ − 1 − log ρ summed; Schulman 2020).
    """
    return point_mean(data[_kl_name(data, estimator)])


def _kl_name(data: xr.Dataset, estimator: str) -> str:
    name = f"kl_{estimator}"
    if name not in data:
        raise AnalysisError(f"no KL estimator {estimator!r}; the dataset has {[n for n in data if 'kl_' in str(n)]}")
    return name


def surrogate(data: xr.Dataset) -> xr.Dataset:
    """The objective J per point: `mean` and `standard_error`, dims (alpha, beta).

    J = Σ surrogate / Σ weight, a ratio of means over prompts; its standard error is that of the ratio (delta method:
    residuals s_i − J w_i, divided by the mean of w; Cochran 1977, §6). The weight is `base_tokens` for GRPO's clipped
    objective token by token, and `surrogate_weight` where the dataset holds another objective or aggregation.
    """
    reduced = per_prompt(data)
    if "tokens" not in reduced or "surrogate" not in reduced:
        raise AnalysisError("the surrogate needs the variables 'surrogate' and 'base_tokens'")
    weight = reduced["surrogate_weight"] if "surrogate_weight" in reduced else reduced["tokens"]
    sums, weights = reduced["surrogate"], weight.where(reduced["surrogate"].notnull())
    mean = sums.mean("prompt") / weights.mean("prompt")
    error = standard_error(sums - mean * weights) / weights.mean("prompt")
    name = "objective J" if "surrogate_weight" in reduced else "surrogate J per token"
    mean.attrs = {"long_name": name, "units": "1", "ancillary_variables": "standard_error"}
    error.attrs = {"long_name": "standard error of the surrogate J", "units": "1"}
    return xr.Dataset({"mean": mean, "standard_error": error})


def pass_at_k(data: xr.Dataset, k: int, *, threshold: float | None = None) -> xr.Dataset:
    """pass@k per point, unbiased, with its standard error over prompts; dims (alpha, beta).

    A rollout passes when reward ≥ `threshold` (default: that of `per_prompt`, 0.99). Per prompt with n valid rollouts,
    c of them passed: 1 − C(n−c, k)/C(n, k) (Chen et al. 2021, arXiv 2107.03374). Prompts with fewer than k valid
    rollouts are left out. Raises `AnalysisError` when k exceeds the number of rollouts.
    """
    cells = pass_at_k_cells(data, k, threshold=threshold)
    result = point_mean(cells)
    return result


def pass_at_k_cells(data: xr.Dataset, k: int, *, threshold: float | None = None) -> xr.DataArray:
    """pass@k per point and prompt, dims (alpha, beta, prompt); missing where fewer than k rollouts are valid."""
    if is_reduced(data):
        if threshold is not None and threshold != data.attrs["threshold"]:
            raise AnalysisError(
                f"the dataset was reduced at threshold {data.attrs['threshold']:g}; reduce it again at {threshold:g}"
            )
        reduced, rollouts = data, int(data.attrs["rollouts"])
    else:
        reduced = per_prompt(data[list(NEEDED)], threshold=threshold)
        rollouts = data.sizes["rollout"]
    if not 1 <= k <= rollouts:
        raise AnalysisError(f"pass@{k} needs 1 ≤ k ≤ {rollouts}, the number of rollouts per prompt")
    n, c = reduced["rollouts"], reduced["successes"]
    cells = xr.apply_ufunc(unbiased_pass_at_k, n, c, kwargs={"k": k}, dask="parallelized", output_dtypes=[np.float64])
    threshold_used = float(reduced.attrs["threshold"])
    return cells.rename(f"pass_at_{k}").assign_attrs(long_name=f"pass@{k}, reward >= {threshold_used:g}", units="1")


def unbiased_pass_at_k(rollouts: np.ndarray, passed: np.ndarray, k: int) -> np.ndarray:
    """1 − C(n − c, k) / C(n, k) for n `rollouts` of which c `passed`, float64; NaN where n < k.

    Unbiased for the probability that one of k rollouts passes (Chen et al. 2021, arXiv 2107.03374, eq. 1).
    """
    n, c = np.asarray(rollouts, np.float64), np.asarray(passed, np.float64)
    miss = np.ones(np.broadcast(n, c).shape)
    # The ratio of binomials as a product of k factors; a factor of zero or less ends it.
    for i in range(k):
        miss *= np.clip(n - c - i, 0, None) / np.clip(n - i, 1, None)
    return np.where(n >= k, 1.0 - miss, np.nan)


def entropy(data: xr.Dataset, quantiles: Iterable[float] = (0.1, 0.5, 0.9)) -> xr.Dataset:
    """Token entropy per point, nat per token: `mean`, `standard_error`, and `quantile` over prompts.

    From the mean surprisal of each fresh rollout's own tokens, whose expectation is the entropy. Dims (alpha, beta) and
    (quantile, alpha, beta).
    """
    if "entropy" not in data:
        raise AnalysisError("the dataset has no variable 'entropy'")
    cells = _per_prompt_array(data["entropy"])
    result = point_mean(cells)
    spread = cells.chunk({"prompt": -1}) if cells.chunks else cells
    levels = spread.quantile(list(quantiles), dim="prompt", skipna=True)
    result["quantile_of_prompts"] = levels.assign_attrs(long_name="entropy of a prompt, quantiles", units="nat")
    return result


def ray(values: xr.DataArray, angle: float) -> xr.DataArray:
    """A map along the ray through the origin at `angle` (radians from the α axis), dim `distance`, both directions.

    Bilinear between grid points; distances are the radii at which the grid has points on its axes, as far as the ray
    stays inside the grid. `values` has dims (alpha, beta, …).
    """
    alpha, beta = (np.sort(values[name].values) for name in GRID)
    for name, axis in zip(GRID, (alpha, beta), strict=True):
        if len(axis) < 2:
            raise AnalysisError(f"a ray needs at least two values of {name!r}")
    steps = np.unique(np.round(np.concatenate([alpha, beta]), 12))
    x, y = steps * np.cos(angle), steps * np.sin(angle)
    slack = 1e-9 * max(np.ptp(alpha), np.ptp(beta))
    inside = (x >= alpha[0] - slack) & (x <= alpha[-1] + slack) & (y >= beta[0] - slack) & (y <= beta[-1] + slack)
    distance = xr.DataArray(
        steps[inside], dims="distance", attrs={"long_name": f"distance along the ray at {angle:.3g} rad", "units": "1"}
    )
    where = {
        "alpha": xr.DataArray(np.clip(x[inside], alpha[0], alpha[-1]), dims="distance"),
        "beta": xr.DataArray(np.clip(y[inside], beta[0], beta[-1]), dims="distance"),
    }
    found = values.sortby(list(GRID)).interp(where, method="linear")
    return found.assign_coords(distance=distance).assign_attrs(values.attrs)


def radial_profile(values: xr.DataArray) -> xr.Dataset:
    """Mean over the points of equal radius: `mean`, `standard_error` (prompts as clusters), `points`; dim `radius`.

    `values` has dims (alpha, beta, prompt[, rollout]); the shell's mean is taken per prompt first, so that the
    standard error knows that all points share their prompts.
    """
    cells = _per_prompt_array(values)
    radii, index = shells(cells["alpha"].values, cells["beta"].values)
    matrix = cells.stack(point=list(GRID)).transpose("point", "prompt", ...).values
    counts = np.bincount(index)
    means = np.full((len(radii), *matrix.shape[1:]), np.nan)
    for shell in range(len(radii)):
        rows = matrix[index == shell]
        count = (~np.isnan(rows)).sum(0)
        means[shell] = np.where(count > 0, np.nansum(rows, axis=0) / np.maximum(count, 1), np.nan)
    dims = ("radius", "prompt", *[d for d in cells.dims if d not in (*GRID, "prompt")])
    profile = xr.DataArray(means, dims=dims, coords={"radius": radii}, attrs=values.attrs, name=values.name)
    result = point_mean(profile)
    result["points"] = ("radius", counts, {"long_name": "grid points at this radius", "units": "1"})
    result["radius"].attrs = {"long_name": "distance from the origin", "units": "1"}
    return result


def shells(alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct radii of the grid alpha × beta (C order) and the shell of each point; equal up to rounding (1e-9)."""
    radii = np.hypot(alpha[:, None], beta[None, :]).ravel()
    scale = radii.max() or 1.0
    keys = np.round(radii / scale, 9)
    distinct, index = np.unique(keys, return_inverse=True)
    return np.array([radii[index == i].mean() for i in range(len(distinct))]), index
