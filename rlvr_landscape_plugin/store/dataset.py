"""A journal becomes one netCDF file: written point by point, so that one point at a time is in memory."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from rlvr_landscape_analysis.checksums import add_checksum, find_checksum
from rlvr_landscape_analysis.schema import (
    BASE_ROLLOUT,
    DISPLACEMENT_NORM,
    DISPLACEMENT_RADIUS,
    PROMPT,
    ROLLOUT,
    SCHEMA,
    Variable,
    variable_of,
)

from rlvr_landscape_plugin.errors import StoreError
from rlvr_landscape_plugin.files import digest, move_aside, publish, remove_stale
from rlvr_landscape_plugin.store.frame import Dimension, Label, Subset
from rlvr_landscape_plugin.store.journal import CHANGED, Journal


@dataclass(frozen=True)
class Annotations:
    """What a dataset holds besides its points: how far training had gone, and names that replace the usual ones."""

    displacement_norm: float = math.nan
    """‖θ_t − θ_0‖; NaN where it is not known."""
    theta_norm: float = math.nan
    """‖θ_t‖."""
    displacement_comment: str = "not known: no training run was named"
    """What the displacement was computed from, or why it is not known."""
    long_names: Mapping[str, str] = field(default_factory=dict)
    """Variable → the long name that replaces the usual one."""
    comments: Mapping[str, str] = field(default_factory=dict)
    """Variable → the comment that replaces the usual one."""


def holds(journal: Journal, out: Path, subset: Subset | None = None) -> bool:
    """Whether `out` is the journal's dataset of `subset` (default: of everything), or of more.

    A damaged one is moved aside with a warning: the points have everything that it held. Raises `StoreError` when it
    belongs to something else, or where the system does not let it be read.
    """
    frame, damage = journal.frame, ""
    try:
        intact = find_checksum(out)
        if intact is False:
            damage = CHANGED
        else:
            with xr.open_dataset(out, engine="netcdf4") as present:
                same = present.attrs.get("identity") == digest(journal.identity)
                values = {name: present[name].values for name in frame.names} if same else {}
                prompts = present.sizes[PROMPT]
                for name in present.variables if intact is None else ():
                    present[name].values  # noqa: B018  an older version's file shows damage only where it is read
    except FileNotFoundError:
        return False
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # HDF5 and xarray raise many kinds of errors for a damaged file
        if isinstance(error, OSError) and (error.errno or 0) > 0:  # netCDF's own numbers are negative
            raise StoreError(f"{out} cannot be read: {error}; nothing was changed") from error
        damage = f"{type(error).__name__}: {error}"
    if damage:
        move_aside(out, damage, "is written again from its points")
        return False
    if not same:
        raise StoreError(f"{out} holds another landscape; move it away or choose another output directory")
    if subset is None and journal.prompts is None:
        return tuple(map(len, values.values())) == frame.shape
    subset = subset or journal.whole
    there = (
        np.isin(dimension.values[list(indices)], values[dimension.name]).all()
        for dimension, indices in zip(frame.dimensions, subset.indices, strict=True)
    )
    return all(there) and prompts >= subset.prompts


def consolidate(
    journal: Journal,
    out: Path,
    attributes: Mapping[str, object],
    notes: Annotations | None = None,
    subset: Subset | None = None,
) -> Path:
    """Write the dataset of all points to `out`, dims (those of the frame …, prompt, rollout).

    `subset`: what a progressive sweep measured, if not everything. An `out` of this journal that holds as much is
    left as it is; one that holds less, or is damaged, is replaced by the whole. Raises `StoreError` when points are
    missing or `out` belongs to something else.
    """
    remove_stale(out.parent)
    if holds(journal, out, subset):
        return out
    subset = subset or journal.whole
    found = journal.covered()
    missing = [place for place in subset.places if found.get(place, 0) < subset.prompts]
    base, recheck = journal.read_base(), journal.read_recheck()
    if missing or base is None or recheck is None:
        of = f"{len(missing)} of {len(subset.places)} points"
        what = of if missing else "the base batch or the recheck of the origin"
        raise StoreError(f"{journal.root} lacks {what}; run the same sweep again to finish it")
    base, recheck = (data.isel(prompt=slice(subset.prompts)) for data in (base, recheck))
    writer = _Writer(journal, subset, base, recheck, notes or Annotations())

    def write(scratch: Path) -> None:
        writer.write(scratch, attributes)
        add_checksum(scratch)

    publish(out, write, replace=out.exists())
    return out


def landscapes(output: Path) -> list[Path]:
    """The finished datasets of a run directory, sorted by name."""
    return sorted(Path(output).glob("landscape_step*_slice*.nc"))


class _Writer:
    def __init__(
        self, journal: Journal, subset: Subset, base: xr.Dataset, recheck: xr.Dataset, notes: Annotations
    ) -> None:
        self._journal, self._subset, self._base, self._recheck, self._notes = journal, subset, base, recheck, notes
        self._base_rollout = BASE_ROLLOUT if BASE_ROLLOUT in base.dims else ROLLOUT
        # CF's way to say that scalars are coordinates of a variable; xarray reads them as such.
        labels = journal.frame.labels
        self._scalars = ["step", *(name for name, label in labels.items() if not label.dims)]

    def write(self, scratch: Path, attributes: Mapping[str, object]) -> None:
        import netCDF4

        journal, subset, notes = self._journal, self._subset, self._notes
        places = subset.places
        sample = journal.read_point(places[0], subset.prompts) if places else xr.Dataset()
        configuration = journal.identity.get("configuration", {})
        stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with netCDF4.Dataset(scratch, "w", format="NETCDF4") as file:
            self._coordinates(file, sample)
            variables = {}
            for name, variable in SCHEMA.items():
                if variable.of_point and not places:
                    continue
                source = sample if variable.of_point else self._recheck if name.startswith("recheck") else self._base
                if name not in source:
                    if variable.required:
                        raise StoreError(f"{journal.root}: measured files have no variable {name!r}; another version?")
                    continue
                variables[name] = self._create(file, name, self._annotated(name, variable))
                if not variable.of_point:
                    variables[name][:] = source[name].values
            for at, place in zip(np.ndindex(subset.shape), places, strict=True) if places else ():
                point = journal.read_point(place, subset.prompts)
                for name in map(str, point.data_vars):
                    variable = variable_of(name)
                    # Points written by different versions, or metrics that only some rollouts have: missing at others.
                    if variable is not None and variable.of_point:
                        if name not in variables:
                            variables[name] = self._create(file, name, self._annotated(name, variable))
                        variables[name][at] = point[name].values
            norm = replace(DISPLACEMENT_NORM, comment=notes.displacement_comment)
            self._create(file, "displacement_norm", norm, ())[...] = notes.displacement_norm
            if places:
                unit = notes.theta_norm / notes.displacement_norm if notes.displacement_norm else math.nan
                radius = self._create(file, "displacement_radius", DISPLACEMENT_RADIUS)
                radius[:] = variables["realised_step"][:].filled(np.nan) * unit
            file.setncatts(
                dict(attributes)
                | {
                    "configuration": json.dumps(configuration, sort_keys=True),
                    "configuration_sha256": digest(configuration),
                    "identity": digest(journal.identity),
                    "history": f"{stamp} written by rlvr_landscape_plugin.sweep",
                }
            )

    def _annotated(self, name: str, variable: Variable) -> Variable:
        notes = self._notes
        long_name = notes.long_names.get(name, variable.long_name)
        return replace(variable, long_name=long_name, comment=notes.comments.get(name, variable.comment))

    def _coordinates(self, file: Any, sample: xr.Dataset) -> None:
        frame, indices = self._journal.frame, self._subset.indices
        for dimension, chosen in zip(frame.dimensions, indices, strict=True):
            file.createDimension(dimension.name, len(chosen))
        tasks = {PROMPT: (self._subset.prompts, "index of the task in the prompt set")}
        if ROLLOUT in sample.dims or self._base_rollout == ROLLOUT:
            count = sample.sizes.get(ROLLOUT, self._base.sizes[self._base_rollout])
            tasks[ROLLOUT] = (count, "index of the rollout of a task")
        if self._base_rollout != ROLLOUT:
            count = self._base.sizes[self._base_rollout]
            tasks[self._base_rollout] = (count, "index of the checkpoint's own rollout of a task")
        for name, (size, _) in tasks.items():
            file.createDimension(name, size)
        for dimension, chosen in zip(frame.dimensions, indices, strict=True):
            _coordinate(file, dimension.name, (dimension.name,), dimension.values[list(chosen)], dimension)
        for name, (size, long_name) in tasks.items():
            _coordinate(file, name, (name,), np.arange(size), Label((name,), np.arange(size), long_name))
        step = np.asarray(int(self._journal.identity.get("step", 0)), np.int64)
        _coordinate(file, "step", (), step, Label((), step, "optimizer updates behind the checkpoint"))
        chosen_of = dict(zip(frame.names, indices, strict=True))
        for name, label in frame.labels.items():
            values = label.values[np.ix_(*(chosen_of[dim] for dim in label.dims))] if label.dims else label.values
            _coordinate(file, name, label.dims, values, label)

    def _create(self, file: Any, name: str, variable: Variable, dims: tuple[str, ...] | None = None) -> Any:
        point = self._journal.frame.names
        if dims is None:
            dims = variable.dims(point, self._base_rollout)
        chunks = None
        if variable.of_point and len(dims) > len(point):
            chunks = (*(1 for _ in point), *(len(file.dimensions[dim]) for dim in dims[len(point) :]))
        fill = np.nan if variable.dtype.startswith("f") else False
        created = file.createVariable(
            name,
            variable.dtype,
            dims,
            zlib=True,
            complevel=4,
            shuffle=True,
            chunksizes=chunks,
            fill_value=fill,
        )
        created.setncatts(variable.attrs | {"coordinates": " ".join(self._scalars)})
        return created


def _coordinate(file: Any, name: str, dims: tuple[str, ...], values: Any, said: Dimension | Label) -> None:
    values = np.asarray(values)
    created = file.createVariable(name, str if values.dtype.kind in "UO" else values.dtype, dims)
    created[...] = values.astype(object) if values.dtype.kind in "UO" else values
    created.setncatts({"long_name": said.long_name, "units": said.units})
