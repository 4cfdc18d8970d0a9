"""The journal: one directory per snapshot and design, in which every finished point is a file.

    journal.json       what is measured here; a directory of something else is refused
    base.nc            the checkpoint's own batch, tokens included
    points/*.nc        one file per finished point; of a progressive sweep, one per portion of a point
    recheck.nc         the base batch scored again after the last point

A file appears under its name only when it is whole: written under a temporary name, synced, then linked without
overwriting. So the state of a sweep is the set of files; killing it loses at most the points in flight, and several
processes may share a directory. A point names the base batch that it was scored against, so that points of two batches
are never mixed in one dataset. Nothing here deletes a measurement; files that cannot be used are moved aside.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from rlvr_landscape_analysis.checksums import add_checksum, find_checksum
from rlvr_landscape_analysis.schema import (
    BASE_FILE,
    BASE_ROLLOUT,
    ERROR,
    JOURNAL_FILE,
    POINTS_FOLDER,
    PROMPT,
    RECHECK_FILE,
    ROLLOUT,
    SCHEMA,
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
from rlvr_landscape_plugin.store.frame import Frame, Place, Subset

CHANGED = "its content is not what its checksum says"
"""Why a file with a wrong checksum is not used."""


class Journal:
    """One directory: one snapshot and the points of one frame around it."""

    def __init__(self, root: Path, frame: Frame, identity: JsonObject) -> None:
        """Open or create. Raises `StoreError` naming the differing keys if `root` holds something else."""
        self.root = Path(root)
        self.frame, self.identity = frame, dict(identity)
        self._base_sha256: str | None = None
        self._prompts = 0
        with writing(self.root):
            (self.root / POINTS_FOLDER).mkdir(parents=True, exist_ok=True)
        remove_stale(self.root)
        remove_stale(self.root / POINTS_FOLDER)
        path = self.root / JOURNAL_FILE
        # The axes are written out: a configuration alone does not say which coordinates it became.
        asked = {**identity, "axes": frame.axes}
        if not path.exists():
            publish(path, lambda scratch: scratch.write_text(json.dumps(asked, indent=1, sort_keys=True)))
        try:
            stored = json.loads(path.read_text())
        except ValueError as error:
            raise StoreError(
                f"{path} is not readable JSON ({error}); move it away and run the same command again "
                "(every file here says by itself which sweep it belongs to)"
            ) from error
        if differences := _differences(stored, json.loads(json.dumps(asked))):
            listed = "\n".join(f"  {key}: {old!r} there, {new!r} asked for" for key, old, new in differences)
            raise StoreError(
                f"{self.root} holds a sweep of another configuration; choose another output directory, or go back to "
                f"what its journal.json says:\n{listed}"
            )

    def _path(self, place: Place, tasks: range | None = None) -> Path:
        return self.root / POINTS_FOLDER / self.frame.point_file(place, tasks)

    @property
    def prompts(self) -> int | None:
        """Tasks of the base batch; None before there is one."""
        return self._prompts if self._base_digest() is not None else None

    def _is_whole(self, end: float) -> bool:
        """Whether files that end here hold all prompts; asks the base batch only about portions."""
        return end == math.inf or end == self.prompts

    def done(self) -> set[Place]:
        """The points that are whole. A damaged file is moved aside with a warning."""
        return {place for place, end in self.covered().items() if self._is_whole(end)}

    def covered(self) -> dict[Place, float]:
        """Each point with files → how many of the first tasks they hold without a gap; inf: a file of all tasks."""
        ends = {place: self._chain(paths)[1] for place, paths in self._files().items()}
        return {place: end for place, end in ends.items() if end}

    def status(self) -> tuple[int, int]:
        """(finished points, all points), by names only."""
        finished = (self._chain(paths, by_name=True)[1] for paths in self._files().values())
        return sum(map(self._is_whole, finished)), self.frame.size

    def _files(self) -> dict[Place, dict[tuple[int, float], Path]]:
        """Point → (first task, end) → file; the end of a whole point is inf."""
        found: dict[Place, dict[tuple[int, float], Path]] = {}
        for path in (self.root / POINTS_FOLDER).glob("*.nc"):
            if named := self.frame.parse(path.name):
                place, tasks = named
                ends = (0, math.inf) if tasks is None else (tasks.start, tasks.stop)
                found.setdefault(place, {})[ends] = path
        return found

    def _chain(
        self, paths: Mapping[tuple[int, float], Path], by_name: bool = False, until: float = math.inf
    ) -> tuple[list[Path], float]:
        """Files that follow on each other from the first prompt, and where they end: past `until` only if they must."""
        reached: dict[float, tuple[float, Path] | None] = {0: None}
        for (start, stop), path in sorted(paths.items()):
            if start in reached and stop not in reached and (by_name or self._readable(path)):
                reached[stop] = (start, path)
        end = min((stop for stop in reached if stop >= until), default=max(reached))
        chain: list[Path] = []
        at = end
        while step := reached[at]:
            at = step[0]
            chain.insert(0, step[1])
        return chain, end

    def _readable(self, path: Path) -> bool:
        """Whether every value of a point can be read and belongs here; if not, the file is moved aside."""
        self._base_digest()  # a damaged base batch is no reason to doubt a point
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
        if point.attrs.get("identity") != digest(self.identity):
            return "it is not a point of this sweep"
        if point.attrs.get("file", path.name) != path.name:
            return f"it is {point.attrs['file']} under another name"
        named = self.frame.parse(path.name)
        tasks = named[1] if named else None
        if tasks is not None and point.sizes.get(PROMPT) != len(tasks):
            return f"it holds {point.sizes.get(PROMPT)} prompts, its name says {tasks.start} to {tasks.stop}"
        return self._other_base(point) or _wrong_point(point)

    def _other_base(self, scored: xr.Dataset) -> str:
        base = self._base_digest()
        other = base is not None and scored.attrs.get("base_sha256") != base
        return "it was scored against another base batch" if other else ""

    def _base_digest(self) -> str | None:
        if self._base_sha256 is None and (base := self.read_base()) is not None:
            self._base_sha256, self._prompts = _content_digest(base), base.sizes["prompt"]
        return self._base_sha256

    def write_base(self, base: xr.Dataset) -> xr.Dataset:
        """Keep the checkpoint's own batch; returns the one kept: another process's if that was first."""
        if problem := _wrong_base(base):
            raise StoreError(f"not a base batch: {problem}")
        self._write(self.root / BASE_FILE, base)
        kept = self.read_base()
        if kept is None:
            raise StoreError(f"{self.root / 'base.nc'} vanished while it was written; run the same command again")
        self._base_sha256, self._prompts = _content_digest(kept), kept.sizes["prompt"]
        return kept

    def read_base(self) -> xr.Dataset | None:
        """The checkpoint's own batch, or None."""
        base = self._read(self.root / BASE_FILE)
        if base is not None and base.attrs.get("identity", digest(self.identity)) != digest(self.identity):
            raise StoreError(f"{self.root / 'base.nc'} is the base batch of another sweep; move it away")
        return base

    def write_recheck(self, recheck: xr.Dataset) -> None:
        """Keep the recheck of the origin."""
        self._write(self.root / RECHECK_FILE, recheck.assign_attrs(base_sha256=self._base_digest() or ""))

    def read_recheck(self) -> xr.Dataset | None:
        """The recheck of the origin, or None. A damaged one, or one of another base batch, is moved aside."""
        path = self.root / RECHECK_FILE
        try:
            recheck = _contents(path)
            reason = "base_sha256" in recheck.attrs and self._other_base(recheck)
        except FileNotFoundError:
            return None
        except _DamagedError as error:
            recheck, reason = None, str(error)
        if not reason:
            return recheck
        move_aside(path, reason)
        return None

    def write_facts(self, name: str, facts: list[JsonObject]) -> None:
        """Write down, as JSON file `name`, what the servers of this process reported about themselves."""
        content = {"servers": facts, "sha256": digest(facts)}
        replace_text(self.root / name, [json.dumps(content, indent=1, sort_keys=True)])

    def read_facts(self, name: str) -> list[JsonObject] | None:
        """What `write_facts` wrote, or None. A damaged file is moved aside."""
        content = read_checked_json(self.root / name, "servers")
        return None if content is None else content["servers"]

    def write_point(self, place: Place, point: xr.Dataset, tasks: range | None = None) -> None:
        """Keep a finished point, dims (prompt, rollout) and per-point scalars; an existing one stays.

        `tasks`: which tasks it holds, if not all. Refuses an unknown, missing or misshapen variable, and a missing
        reward of a rollout that did not fail.
        """
        if not self.frame.holds(place):
            raise StoreError(f"point {place} is outside the {' × '.join(map(str, self.frame.shape)) or 'no'} points")
        if unknown := sorted(str(name) for name in point.data_vars if variable_of(str(name)) is None):
            raise StoreError(f"point {place} has variables that the schema does not know: {', '.join(unknown)}")
        if problem := _wrong_point(point):
            raise StoreError(f"point {place}: {problem}")
        if tasks is not None and len(tasks) != point.sizes[PROMPT]:
            raise StoreError(f"point {place} has {point.sizes[PROMPT]} prompts, not those of {tasks}")
        path = self._path(place, tasks)
        if path.exists():
            self._readable(path)  # so that an unfit one does not stay
        marks = {"file": path.name}
        if base := self._base_digest():
            marks["base_sha256"] = base
        self._write(path, point.assign_attrs(marks))

    def read_point(self, place: Place, prompts: int | None = None) -> xr.Dataset:
        """A finished point, its first `prompts` tasks (default: all); wall times of its portions are added up."""
        wanted = math.inf if prompts is None else prompts
        paths, end = self._chain(self._files().get(place, {}), by_name=True, until=wanted)
        if not self._is_whole(end) and end < wanted:
            raise StoreError(f"point {place} of {self.root} is not measured yet")
        portions = [portion for portion in map(self._read, paths) if portion is not None]
        if len(portions) != len(paths):
            raise StoreError(f"files of point {place} vanished from {self.root}; run the same command again")
        return _joined(portions).isel(prompt=slice(prompts))

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
        """All points and all tasks. Raises `StoreError` before there is a base batch."""
        if self.prompts is None:
            raise StoreError(f"{self.root} lacks the base batch; run the same sweep again to finish it")
        return self.frame.whole(self.prompts)


def _joined(portions: Sequence[xr.Dataset]) -> xr.Dataset:
    """Portions of one point, one after the other along `prompt`."""
    if len(portions) == 1:
        return portions[0]
    scalars = [name for name in portions[0].data_vars if PROMPT not in portions[0][name].dims]
    whole = xr.concat([portion.drop_vars(scalars) for portion in portions], PROMPT, combine_attrs="drop")
    for name in portions[0].data_vars:
        if name not in whole:
            values = [portion[name] for portion in portions]
            whole[name] = sum(values) if str(name).startswith("seconds_") else values[0]
    return whole


def keep_record(path: Path, identity: Mapping[str, object], record: JsonObject) -> JsonObject:
    """Keep a result that several slices share; returns what is kept: another process's if that was first."""
    content = {"record": record, "sha256": digest(record), "identity": digest(identity)}
    publish(path, lambda scratch: scratch.write_text(json.dumps(content, indent=1, sort_keys=True)))
    kept = read_record(path, identity)
    if kept is None:
        raise StoreError(f"{path} vanished while it was written; run the same command again")
    return kept


def read_record(path: Path, identity: Mapping[str, object]) -> JsonObject | None:
    """What `keep_record` kept, or None. A damaged file is moved aside, one of another sweep a `StoreError`."""
    content = read_checked_json(path, "record")
    if content is None:
        return None
    if content.get("identity") != digest(identity):
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


def _wrong_point(data: xr.Dataset) -> str:
    """What in a point breaks `SCHEMA`; empty if nothing does."""
    base_rollout = BASE_ROLLOUT if BASE_ROLLOUT in data.dims else ROLLOUT
    measured = {**SCHEMA, **{str(name): variable_of(str(name)) for name in data.data_vars}}
    expected = {name: v.dims((), base_rollout) for name, v in measured.items() if v is not None and v.of_point}
    return _wrong_dims(data, expected, ROLLOUT) or _lost_rewards(data, "")


def _wrong_base(data: xr.Dataset) -> str:
    """What in a base batch breaks `SCHEMA`; empty if nothing does."""
    base_rollout = BASE_ROLLOUT if BASE_ROLLOUT in data.dims else ROLLOUT
    names = [name for name, variable in SCHEMA.items() if not variable.of_point and not name.startswith("recheck")]
    expected = {name: SCHEMA[name].dims((), base_rollout) for name in names}
    return _wrong_dims(data, expected, base_rollout) or _lost_rewards(data, "base_")


def _wrong_dims(data: xr.Dataset, expected: Mapping[str, tuple[str, ...]], rollout: str) -> str:
    if not all(data.sizes.get(dim, 0) for dim in (PROMPT, rollout)):
        return f"it needs the dimensions {PROMPT} and {rollout}, it has {dict(data.sizes)}"
    for name, dims in expected.items():
        if name not in data:
            if SCHEMA[name].required:
                return f"it has no variable {name!r}"
        elif data[name].dims != dims:
            return f"variable {name!r} has dims {data[name].dims} instead of {dims}"
    return ""


def _lost_rewards(data: xr.Dataset, prefix: str) -> str:
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


def _differences(old: object, new: object, prefix: str = "") -> list[tuple[str, object, object]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [d for key in sorted({*old, *new}) for d in _differences(old.get(key), new.get(key), f"{prefix}.{key}")]
    return [] if old == new else [(prefix.lstrip("."), old, new)]
