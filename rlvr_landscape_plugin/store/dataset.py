"""A journal becomes one netCDF file: written point by point, so that one point at a time is in memory."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
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
from rlvr_landscape_plugin.store.cells import Extent, missing
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


@dataclass(frozen=True)
class Held:
    """What a dataset holds, or what a sweep asks for: coordinates, and how many values per point."""

    axes: Mapping[str, Sequence[object]]
    prompts: int
    rollouts: int
    """0 where there are no points."""
    completions: int

    @classmethod
    def of(cls, axes: Mapping[str, Sequence[object]], extent: Extent) -> Held:
        """What a sweep with these axes and extent asks for."""
        return cls(axes, extent.prompts, extent.rollouts if axes else 0, extent.completions)


def asked_for(journal: Journal, subset: Subset | None = None) -> Held:
    """What the sweep of a journal asks for, or the part of it that `subset` is."""
    subset = subset or journal.whole
    pairs = zip(journal.frame.dimensions, subset.indices, strict=True)
    axes = {dimension.name: dimension.values[list(chosen)].tolist() for dimension, chosen in pairs}
    return Held.of(axes, journal.extent.of_first(subset.prompts))


_KEYS = {"prompts": "env.num_prompts", "rollouts": "env.rollouts", "completions": "env.base_rollouts"}


def lacks(this: Held, other: Held) -> list[str]:
    """What `this` lacks of `other`, one text per axis and per key of the configuration."""
    found = []
    for name, values in other.axes.items():
        if absent := [value for value in values if value not in set(this.axes[name])]:
            listed = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in absent[:3])
            more = ", …" if len(absent) > 3 else ""
            hint = _nearest(absent[0], this.axes[name])
            found.append(f"{name} = {listed}{more} ({len(absent)} of {len(values)} values){hint}")
    for name, key in _KEYS.items():
        there, asked = getattr(other, name), getattr(this, name)
        # Without base_rollouts the two are one number.
        if asked < there and not (name == "completions" and (there, asked) == (other.rollouts, this.rollouts)):
            found.append(f"{key}: {there} there, {asked} asked for")
    return found


def _nearest(value: object, asked: Sequence[object]) -> str:
    """A hint where a coordinate is missing because of rounding only."""
    if isinstance(value, float):
        for other in asked:
            if isinstance(other, float) and math.isclose(value, other, rel_tol=1e-9):
                return (
                    f", while {other!r} is asked for; rounding makes this difference, but not if intervals are halved"
                )
    return ""


def held(journal: Journal, out: Path) -> Held | None:
    """What the dataset `out` of a journal holds; None where there is none.

    A damaged one is moved aside with a warning: the points have everything that it held. Raises `StoreError` when it
    belongs to something else, or where the system does not let it be read.
    """
    frame, damage, found = journal.frame, "", None
    same = False
    try:
        intact = find_checksum(out)
        if intact is False:
            damage = CHANGED
        else:
            with xr.open_dataset(out, engine="netcdf4") as present:
                same = present.attrs.get("identity") in journal.identities
                if same:
                    axes = {name: present[name].values.tolist() for name in frame.names}
                    sizes = present.sizes
                    rollouts = sizes[ROLLOUT] if axes else 0
                    completions = sizes[BASE_ROLLOUT if BASE_ROLLOUT in sizes else ROLLOUT]
                    found = Held(axes, sizes[PROMPT], rollouts, completions)
                for name in present.variables if intact is None else ():
                    present[name].values  # noqa: B018  an older version's file shows damage only where it is read
    except FileNotFoundError:
        return None
    except (ImportError, MemoryError, StoreError):
        raise
    except Exception as error:  # HDF5 and xarray raise many kinds of errors for a damaged file
        if isinstance(error, OSError) and (error.errno or 0) > 0:  # netCDF's own numbers are negative
            raise StoreError(f"{out} cannot be read: {error}; nothing was changed") from error
        damage = f"{type(error).__name__}: {error}"
    if damage:
        move_aside(out, damage, "is written again from its points")
        return None
    if not same:
        raise StoreError(f"{out} holds another landscape; move it away or choose another output directory")
    return found


def holds(journal: Journal, out: Path, subset: Subset | None = None) -> bool:
    """Whether `out` is the journal's dataset of `subset` (default: of everything), or of more. Raises as `held`."""
    present = held(journal, out)
    return present is not None and not lacks(present, asked_for(journal, subset))


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
    missing, or `out` belongs to something else or holds what the new one would lack.
    """
    remove_stale(out.parent)
    present, asked = held(journal, out), asked_for(journal, subset)
    if present is not None and not lacks(present, asked):
        return out
    if present is not None and (lost := lacks(asked, present)):
        raise StoreError(f"{out} holds more than would replace it: {'; '.join(lost)}; move it away, or ask for both")
    subset = subset or journal.whole
    found, extent = journal.found(), journal.extent.of_first(subset.prompts)
    lacking = [place for place in subset.places if missing(found.get(place, ()), extent)]
    base, recheck = journal.read_base(), journal.read_recheck()
    if lacking or base is None or recheck is None:
        of = f"{len(lacking)} of {len(subset.places)} points"
        what = of if lacking else "the base batch or the recheck of the origin"
        raise StoreError(f"{journal.root} lacks {what}; run the same sweep again to finish it")
    base, recheck = (data.isel(prompt=slice(subset.prompts)) for data in (base, recheck))
    writer = _Writer(journal, subset, base, recheck, notes or Annotations())
    history = _history(out) if present is not None else ""

    def write(scratch: Path) -> None:
        writer.write(scratch, attributes, history)
        add_checksum(scratch)

    publish(out, write, replace=out.exists())
    return out


def _history(out: Path) -> str:
    """What a dataset that will be replaced says about how it came about; a line per change."""
    with xr.open_dataset(out, engine="netcdf4") as present:
        text = str(present.attrs.get("history", ""))
    return f"{text}\n" if text else ""


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

    def write(self, scratch: Path, attributes: Mapping[str, object], history: str = "") -> None:
        """`history`: that of the dataset that this one replaces."""
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
                    "history": f"{history}{stamp} written by rlvr_landscape_plugin.sweep",
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
