"""Reading a landscape dataset and reducing its rollouts to points. Pure functions on labelled arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

CELL = ("prompt", "rollout")
NEEDED = ("reward", "kl_k1")


def open_landscape(path: str | Path) -> xr.Dataset:
    """One dataset as the sweep wrote it, lazily.

    Raises ValueError naming file and variable when it is not a landscape.
    """
    data = xr.open_dataset(path, engine="netcdf4")
    missing = [name for name in (*NEEDED, "alpha", "beta") if name not in data.variables]
    if missing:
        data.close()
        raise ValueError(f"{path} is not a landscape dataset: it has no {', '.join(missing)}")
    return data


def point_mean(values: xr.DataArray) -> xr.Dataset:
    """Mean over prompts and rollouts with its standard error; prompts are the independent units.

    Dims (…, prompt, rollout) → variables `mean` and `standard_error` with dims (…). Missing rollouts are left out. The
    standard error is that of the mean of the prompts' means (Miller 2024, arXiv 2411.00640, clustered by prompt) and
    missing with one prompt. Units are kept; long names are set anew.
    """
    name, units = values.attrs.get("long_name", str(values.name)), values.attrs.get("units", "1")
    per_prompt = values.mean("rollout", skipna=True)
    mean, error = per_prompt.mean("prompt", skipna=True), _standard_error(per_prompt)
    mean.attrs = {"long_name": f"mean {name}", "units": units}
    error.attrs = {"long_name": f"standard error of the mean {name}", "units": units}
    return xr.Dataset({"mean": mean, "standard_error": error})


def difference_from_origin(values: xr.DataArray) -> xr.Dataset:
    """Each point minus the origin, paired by prompt: `mean` and `standard_error`, dims without prompt and rollout."""
    per_prompt = values.mean("rollout", skipna=True)
    difference = per_prompt - per_prompt.sel(alpha=0.0, beta=0.0)
    name, units = values.attrs.get("long_name", str(values.name)), values.attrs.get("units", "1")
    mean, error = difference.mean("prompt", skipna=True), _standard_error(difference)
    mean.attrs = {"long_name": f"difference from the origin in mean {name}", "units": units}
    error.attrs = {"long_name": f"standard error of the difference from the origin in {name}", "units": units}
    return xr.Dataset({"mean": mean, "standard_error": error})


def _standard_error(per_prompt: xr.DataArray) -> xr.DataArray:
    count = per_prompt.notnull().sum("prompt")
    spread = per_prompt.std("prompt", ddof=1, skipna=True) if per_prompt.sizes["prompt"] > 1 else np.nan
    return xr.where(count > 1, spread / np.sqrt(count), np.nan)
