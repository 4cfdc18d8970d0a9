"""The journal: one directory per snapshot and design, in which every finished point is a file.

    journal.json       what is measured here; a directory of something else is refused
    base.nc            the checkpoint's own batch, tokens included
    points/*.nc        one file per finished point, or one per portion of a point (`names.py`)
    recheck.nc         the base batch scored again after the last point
    journal_2.json, base_2.nc, recheck_2.nc, …
                       of a sweep that grew the first one (`requests.py`)

A file appears under its name only when it is whole: written under a temporary name, synced, then linked without
overwriting. So the state of a sweep is the set of files; killing it loses at most the points in flight, and several
processes may share a directory. A point names the base batch that it was scored against, and a base batch names those
that it continues, so that points of two batches are never mixed in one dataset. Nothing here deletes a measurement;
files that cannot be used are moved aside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from rlvr_landscape_analysis.checksums import add_checksum, find_checksum
from rlvr_landscape_analysis.schema import (
    BASE_FILE,
    BASE_ROLLOUT,
    ERROR,
    POINTS_FOLDER,
    PROMPT,
    RECHECK_FILE,
    ROLLOUT,
    SCHEMA,
    numbered,
    variable_of,
)

from rlvr_landscape_plugin.errors import StoreError
from rlvr_landscape_plugin.files import (
    JsonObject,
    digest,
    move_aside,
    publish,
    read_checked_json,
    remove_stale,
    replace_text,
    writing,
)
from rlvr_landscape_plugin.store.cells import Cells, Extent, missing
from rlvr_landscape_plugin.store.frame import Frame, Place, Subset
from rlvr_landscape_plugin.store.names import PointNames
from rlvr_landscape_plugin.store.portions import joined
from rlvr_landscape_plugin.store.requests import AXES, Agrees, Requests

CHANGED = "its content is not what its checksum says"
"""Why a file with a wrong checksum is not used."""


class Journal:
    """One directory: one snapshot and the points of one frame around it."""

    def __init__(
        self, root: Path, frame: Frame, identity: JsonObject, extent: Extent, agrees: Agrees | None = None
    ) -> None:
        """Open or create. Raises `StoreError` naming the differing keys if `root` holds something else.

        `agrees` compares with the earlier requests of a journal that holds others; None: every other one is refused.
        """
        self.root = Path(root)
        self.frame, self.identity, self.extent = frame, dict(identity), extent
        self._bases: dict[str, _Base] | None = None
        self._names: tuple[int, PointNames] | None = None
        with writing(self.root):
            (self.root / POINTS_FOLDER).mkdir(parents=True, exist_ok=True)
        remove_stale(self.root)
        remove_stale(self.root / POINTS_FOLDER)
        self._requests = Requests(self.root, {**identity, AXES: frame.axes}, extent, agrees)

    @property
    def names(self) -> PointNames:
        """Names of its points' files."""
        axes = self._requests.axes
        if self._names is None or self._names[0] != len(axes):
            self._names = len(axes), PointNames(self.frame, axes, self._requests.first)
        return self._names[1]

    @property
    def began(self) -> tuple[dict[str, list[object]], Extent]:
        """Axes and extent of the sweep that began it."""
        return self._requests.axes[0], self._requests.first

    @property
    def identities(self) -> set[str]:
        """The digests of identity that files here may carry: of this sweep, and of those that it grew from."""
        return self._requests.identities()

    def own(self, name: str) -> Path:
        """The file of this request with the usual name `name`, such as `base_2.nc`."""
        return self.root / numbered(name, self._requests.number)

    def done(self) -> set[Place]:
        """The points that are whole. A damaged file is moved aside with a warning."""
        return {place for place, found in self.found().items() if not missing(found, self.extent)}

    def found(self) -> dict[Place, list[Cells]]:
        """Each point with files → the cells that they hold. A damaged file is moved aside with a warning."""
        held = {place: [cells for cells, path in files if self._readable(path)] for place, files in self._files()}
        return {place: cells for place, cells in held.items() if cells}

    def status(self) -> tuple[int, int]:
        """(finished points, all points), by names only."""
        whole = (not missing([cells for cells, _ in files], self.extent) for _, files in self._files())
        return sum(whole), self.frame.size

    def _files(self) -> list[tuple[Place, list[tuple[Cells, Path]]]]:
        """Each point with files, and those files in the order in which they count (`_in_order`)."""
        names, found = self.names, dict[Place, list[tuple[Cells, Path]]]()
        for path in (self.root / POINTS_FOLDER).glob("*.nc"):
            if named := names.parse(path.name):
                found.setdefault(named[0], []).append((named[1], path))
        return [(place, sorted(files, key=_in_order)) for place, files in found.items()]

    def _files_of(self, place: Place) -> list[tuple[Cells, Path]]:
        names = self.names
        paths = (self.root / POINTS_FOLDER).glob(f"{names.of_point(place)}*.nc")
        found = [(named[1], path) for path in paths if (named := names.parse(path.name)) and named[0] == place]
        return sorted(found, key=_in_order)

    def _readable(self, path: Path) -> bool:
        """Whether every value of a point can be read and belongs here; if not, the file is moved aside."""
        self._known_bases()  # a damaged base batch is no reason to doubt a point
        try:
            reason = self._unfit(path, _contents(path))
        except FileNotFoundError:
            return False
        except _DamagedError as error:
            reason = str(error)
        if reason:
            move_aside(path, reason)
        return not reason

    def _unfit(self, path: Path, point: xr.Dataset) -> str:
        """Why a point's file is not one of this journal; empty if it is."""
        if point.attrs.get("identity") not in self.identities:
            return "it is not a point of this sweep"
        if point.attrs.get("file", path.name) != path.name:
            return f"it is {point.attrs['file']} under another name"
        named = self.names.parse(path.name)
        if named is None:
            return "its name is none of a point of this sweep"
        return self._other_base(point) or _wrong_point(point, named[1])

    def _other_base(self, scored: xr.Dataset) -> str:
        if not self._bases_contain(scored):
            self._bases = None  # another process may have added one meanwhile
        return "" if self._bases_contain(scored) else "it was scored against another base batch"

    def _bases_contain(self, scored: xr.Dataset) -> bool:
        known = self._known_bases()
        accepted = {sha256 for name, base in known.items() for sha256 in (name, *base.contains)}
        return not known or scored.attrs.get("base_sha256") in accepted

    def _known_bases(self) -> dict[str, _Base]:
        """SHA-256 of each base batch here → what it is."""
        if not self._bases:
            found = {}
            for number in range(1, len(self._requests.everything) + 1):
                path = self.root / numbered(BASE_FILE, number)
                if (base := self._read_base(path)) is not None:
                    shape = base["base_reward"].shape
                    found[_content_digest(base)] = _Base(
                        path, shape, tuple(json.loads(base.attrs.get("contains", "[]")))
                    )
            self._bases = found
        return self._bases

    @property
    def base_sha256(self) -> str | None:
        """SHA-256 of the base batch of this extent; None before there is one."""
        shape = self.extent.prompts, self.extent.completions
        if shape not in {base.shape for base in self._known_bases().values()}:
            self._bases = None  # another process may have added it meanwhile
        return next((sha256 for sha256, base in self._known_bases().items() if base.shape == shape), None)

    def write_base(self, base: xr.Dataset) -> xr.Dataset:
        """Keep the checkpoint's own batch; returns the one kept: another process's if that was first."""
        shape = self.extent.prompts, self.extent.completions
        problem = _wrong_base(base) or ("" if base["base_reward"].shape == shape else f"it is not {shape} completions")
        if problem:
            raise StoreError(f"not a base batch: {problem}")
        self._requests.register()
        path, known = self.own(BASE_FILE), self._known_bases()
        contains = sorted({*known, *(sha256 for earlier in known.values() for sha256 in earlier.contains)})
        self._write(path, base.assign_attrs(contains=json.dumps(contains)) if contains else base)
        self._bases = None
        kept = self.read_base()
        if kept is None:
            raise StoreError(f"{path} vanished while it was written; run the same command again")
        return kept

    def read_base(self) -> xr.Dataset | None:
        """The checkpoint's own batch of this extent, or None."""
        sha256 = self.base_sha256
        return None if sha256 is None else self._read_base(self._known_bases()[sha256].path)

    @property
    def base_shapes(self) -> list[tuple[int, ...]]:
        """(tasks, completions per task) of every base batch here."""
        return [base.shape for base in self._known_bases().values()]

    def read_bases(self) -> list[xr.Dataset]:
        """Every base batch here, of whatever extent."""
        found = (self._read_base(base.path) for base in self._known_bases().values())
        return [base for base in found if base is not None]

    def _read_base(self, path: Path) -> xr.Dataset | None:
        base = self._read(path)
        if base is not None and not {base.attrs.get("identity", digest(self.identity))} <= self.identities:
            raise StoreError(f"{path} is the base batch of another sweep; move it away")
        return base

    def write_recheck(self, recheck: xr.Dataset) -> None:
        """Keep the recheck of the origin."""
        self._requests.register()
        self._write(self.own(RECHECK_FILE), recheck.assign_attrs(base_sha256=self.base_sha256 or ""))

    def read_recheck(self) -> xr.Dataset | None:
        """The recheck of the origin, or None. A damaged one, or one of another base batch, is moved aside."""
        path = self.own(RECHECK_FILE)
        try:
            recheck = _contents(path)
            ours = recheck.attrs.get("base_sha256") in (None, self.base_sha256) or self.base_sha256 is None
            reason = "" if ours else "it was scored against another base batch"
        except FileNotFoundError:
            return None
        except _DamagedError as error:
            recheck, reason = None, str(error)
        if not reason:
            return recheck
        move_aside(path, reason)
        return None

    def write_facts(self, name: str, facts: list[JsonObject]) -> None:
        """Write down, as JSON file `name` of this request, what the servers of this process said about themselves."""
        self._requests.register()
        content = {"servers": facts, "sha256": digest(facts)}
        replace_text(self.own(name), [json.dumps(content, indent=1, sort_keys=True)])

    def read_facts(self, name: str) -> list[JsonObject] | None:
        """What `write_facts` wrote, or None. A damaged file is moved aside."""
        content = read_checked_json(self.own(name), "servers")
        return None if content is None else content["servers"]

    def all_facts(self) -> list[JsonObject]:
        """What `write_facts` wrote for any request and share, in the order of the files' names."""
        contents = [read_checked_json(path, "servers") for path in sorted(self.root.glob("server*.json"))]
        return [facts for content in contents if content is not None for facts in content["servers"]]

    def write_point(self, place: Place, point: xr.Dataset, cells: Cells | None = None) -> None:
        """Keep what was measured at a point, dims (prompt, rollout) and per-point scalars.

        `cells`: which part of the point it is, if not all of the journal's extent. The completions of a part have the
        dimension `base_rollout` where they are not as many as its rollouts. What is there already stays. Refuses an
        unknown, missing or misshapen variable, and a missing reward of a rollout that did not fail.
        """
        cells = cells or self.extent.cells
        if not self.frame.holds(place):
            raise StoreError(f"point {place} is outside the {' × '.join(map(str, self.frame.shape)) or 'no'} points")
        if unknown := sorted(str(name) for name in point.data_vars if variable_of(str(name)) is None):
            raise StoreError(f"point {place} has variables that the schema does not know: {', '.join(unknown)}")
        if problem := _wrong_point(point, cells):
            raise StoreError(f"point {place}: {problem}")
        self._requests.register()
        path = self.root / POINTS_FOLDER / self.names.name(place, cells)
        if path.exists():
            self._readable(path)  # so that an unfit one does not stay
        if self._requests.number > 1:
            there = [held for held, other in self._files_of(place) if self._readable(other)]
            if missing(there, self.extent) == missing([*there, cells], self.extent):
                return
        marks = {"file": path.name}
        if base := self.base_sha256:
            marks["base_sha256"] = base
        self._write(path, point.assign_attrs(marks))

    def read_point(self, place: Place, prompts: int | None = None) -> xr.Dataset:
        """A finished point, its first `prompts` tasks (default: all); wall times of its portions are added up."""
        asked = self.extent if prompts is None else self.extent.of_first(prompts)
        files = [(cells, path) for cells, path in self._files_of(place) if cells.tasks.start < asked.prompts]
        if missing([cells for cells, _ in files], asked):
            raise StoreError(f"point {place} of {self.root} is not measured yet")
        portions = [(cells, portion) for cells, path in files if (portion := self._read(path)) is not None]
        if len(portions) != len(files):
            raise StoreError(f"files of point {place} vanished from {self.root}; run the same command again")
        return joined(portions, asked)

    def _read(self, path: Path) -> xr.Dataset | None:
        try:
            return _contents(path)
        except FileNotFoundError:
            return None
        except _DamagedError as error:
            raise StoreError(
                f"{path} is damaged: {error}; move it away and run the same command again "
                "(points that were scored against a lost base batch are then measured again)"
            ) from error

    def _write(self, path: Path, data: xr.Dataset) -> None:
        data = data.assign_attrs(identity=digest(self.identity))
        data = data.assign_attrs(sha256=_checksum(data))
        stored = {"zlib": True, "complevel": 1, "fletcher32": True}
        encoding = {name: stored for name in data.data_vars if data[name].size > 1}

        def write(scratch: Path) -> None:
            data.to_netcdf(scratch, engine="netcdf4", format="NETCDF4", encoding=encoding)
            add_checksum(scratch)

        publish(path, write)

    @property
    def whole(self) -> Subset:
        """All points and all tasks."""
        return self.frame.whole(self.extent.prompts)


@dataclass(frozen=True)
class _Base:
    """A base batch on disk."""

    path: Path
    shape: tuple[int, ...]
    """(tasks, completions per task)."""
    contains: tuple[str, ...]
    """SHA-256 of the base batches whose completions it has too."""


def _in_order(file: tuple[Cells, Path]) -> tuple[int, ...]:
    """Where two files hold the same cell, the first one counts: of fewer completions, so the earlier base batch."""
    cells, _ = file
    return (cells.scored, *(end for span in (cells.tasks, cells.rollouts) for end in (span.start, -span.stop)))


def keep_record(path: Path, identity: Mapping[str, object], record: JsonObject) -> JsonObject:
    """Keep a result that several slices share; returns what is kept: another process's if that was first."""
    content = {"record": record, "sha256": digest(record), "identity": digest(identity)}
    publish(path, lambda scratch: scratch.write_text(json.dumps(content, indent=1, sort_keys=True)))
    kept = read_record(path, identity)
    if kept is None:
        raise StoreError(f"{path} vanished while it was written; run the same command again")
    return kept


def read_record(path: Path, *identities: Mapping[str, object]) -> JsonObject | None:
    """What `keep_record` kept under one of the identities, or None.

    A damaged file is moved aside, one of another sweep a `StoreError`.
    """
    content = read_checked_json(path, "record")
    if content is None:
        return None
    if content.get("identity") not in [digest(identity) for identity in identities]:
        raise StoreError(f"{path} belongs to a sweep of another configuration; choose another output directory")
    return content["record"]


class _DamagedError(Exception):
    """A file whose content is not what was written."""


def _contents(path: Path) -> xr.Dataset:
    """A netCDF file of the journal, undecoded and in memory.

    Raises `FileNotFoundError`, `_DamagedError` for its content, `StoreError` where the system does not let it be read.
    """
    import netCDF4
    from xarray.backends import NetCDF4DataStore

    try:
        intact = find_checksum(path)
        raw = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}; nothing was changed") from error
    if intact is False:
        raise _DamagedError(CHANGED)
    try:
        # From memory: whatever is wrong from here on is the content, not a disk or a lack of file handles.
        with netCDF4.Dataset(path.name, memory=raw) as file:
            data = xr.open_dataset(NetCDF4DataStore(file), decode_cf=False).load()
        whole = data.attrs.get("sha256", "") in ("", _checksum(data))
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # HDF5 and xarray raise many kinds of errors for a damaged file
        if isinstance(error, OSError) and (error.errno or 0) > 0:  # netCDF's own numbers are negative
            raise StoreError(f"{path} cannot be read: {error}; nothing was changed") from error
        raise _DamagedError(f"{type(error).__name__}: {error}") from error
    if not whole:
        raise _DamagedError(CHANGED)
    return data


def _wrong_point(data: xr.Dataset, cells: Cells) -> str:
    """What in these cells of a point breaks `SCHEMA`; empty if nothing does."""
    base_rollout = BASE_ROLLOUT if BASE_ROLLOUT in data.dims else ROLLOUT
    families = {"point", *(["rollout"] if cells.rollouts else []), *(["completion"] if cells.scored else [])}
    measured = {**SCHEMA, **{str(name): variable_of(str(name)) for name in data.data_vars}}
    known = {name: v for name, v in measured.items() if v is not None and v.of_point}
    expected = {name: v.dims((), base_rollout) for name, v in known.items() if v.family in families}
    if too_many := sorted(name for name, v in known.items() if name in data and v.family not in families):
        return f"it has {', '.join(too_many)}, of which these cells have none"
    sizes = {PROMPT: len(cells.tasks)}
    if cells.scored:
        sizes[base_rollout] = cells.scored
    if cells.rollouts:
        sizes[ROLLOUT] = len(cells.rollouts)
    return _wrong_dims(data, expected, sizes) or _lost_rewards(data, "")


def _wrong_base(data: xr.Dataset) -> str:
    """What in a base batch breaks `SCHEMA`; empty if nothing does."""
    base_rollout = BASE_ROLLOUT if BASE_ROLLOUT in data.dims else ROLLOUT
    names = [name for name, variable in SCHEMA.items() if not variable.of_point and not name.startswith("recheck")]
    expected = {name: SCHEMA[name].dims((), base_rollout) for name in names}
    return _wrong_dims(data, expected, {PROMPT: None, base_rollout: None}) or _lost_rewards(data, "base_")


def _wrong_dims(data: xr.Dataset, expected: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int | None]) -> str:
    """`sizes`: dimension → its size; None: any but 0."""
    if not all(data.sizes.get(dim, 0) for dim in sizes):
        return f"it needs the dimensions {' and '.join(sizes)}, it has {dict(data.sizes)}"
    if wrong := [
        f"{data.sizes[dim]} {dim}s, not {size}" for dim, size in sizes.items() if size not in (None, data.sizes[dim])
    ]:
        return f"it has {', '.join(wrong)}"
    for name, dims in expected.items():
        if name not in data:
            if SCHEMA[name].required:
                return f"it has no variable {name!r}"
        elif data[name].dims != dims:
            return f"variable {name!r} has dims {data[name].dims} instead of {dims}"
    return ""


def _lost_rewards(data: xr.Dataset, prefix: str) -> str:
    if f"{prefix}reward" not in data:
        return ""
    lost = int((data[f"{prefix}reward"].isnull() & (data[f"{prefix}status"] != ERROR)).sum())
    return f"{lost} values of {prefix}reward are missing without status {ERROR} (error)" if lost else ""


def _content_digest(data: xr.Dataset) -> str:
    """SHA-256 over names, dims, dtypes and values; attributes do not count."""
    total = hashlib.sha256()
    for name in sorted(map(str, data.data_vars)):
        values = np.ascontiguousarray(data[name].values)
        total.update(f"{name}{data[name].dims}{values.shape}{values.dtype.str}".encode())
        total.update(values.tobytes())
    return total.hexdigest()


def _checksum(data: xr.Dataset) -> str:
    """SHA-256 over values and attributes but the one that holds it."""
    attributes = {name: str(value) for name, value in data.attrs.items() if name != "sha256"}
    return digest([_content_digest(data), attributes])
