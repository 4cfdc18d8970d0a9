"""The journal of points, and the netCDF file it becomes.

One directory per snapshot and slice:

    journal.json       what is measured here; a directory of something else is refused
    base.nc            the checkpoint's own batch, tokens included
    points/*.nc        one file per finished point
    recheck.nc         the base batch scored again after the last point

A file appears under its name only when it is whole: written under a temporary name, synced, then linked without
overwriting. So the state of a sweep is the set of files; killing it loses at most the points in flight, and several
processes may share a directory. A point names the base batch that it was scored against, so that points of two batches
never meet in one dataset. Nothing here deletes a measurement; files that cannot be used are moved aside.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import math
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from rlvr_landscape_plugin.config import digest
from rlvr_landscape_plugin.errors import StoreError

POINT = ("alpha", "beta")
CELL = ("prompt", "rollout")
FULL = (*POINT, *CELL)
ERROR = 2
"""Value of `status` for a rollout that failed; only such a rollout may lack a reward."""
STALE_SECONDS = 3600.0
"""Age at which a temporary file has certainly lost its writer."""


@dataclass(frozen=True)
class Variable:
    """One variable of the dataset."""

    dims: tuple[str, ...]
    dtype: str
    units: str
    long_name: str
    comment: str = ""
    extra: tuple[tuple[str, Any], ...] = ()
    required: bool = True


SCHEMA: dict[str, Variable] = {
    "reward": Variable(FULL, "f4", "1", "verifier reward of a fresh rollout"),
    "kl_k1": Variable(
        FULL,
        "f4",
        "nat",
        "KL divergence from the checkpoint policy, estimator k1, per checkpoint completion",
        "sum over sampled tokens of -log rho, rho = pi(alpha, beta) / pi(0, 0); unbiased for D_KL(pi(0,0) || pi)",
    ),
    "kl_k3": Variable(
        FULL,
        "f4",
        "nat",
        "KL divergence from the checkpoint policy, estimator k3, per checkpoint completion",
        "sum over sampled tokens of rho - 1 - log rho; non-negative, heavy-tailed far from the origin",
    ),
    "surrogate": Variable(
        FULL,
        "f4",
        "1",
        "clipped GRPO objective of a checkpoint completion, summed over its tokens",
        "sum over tokens of min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A); "
        "J = sum(surrogate) / sum(base_tokens)",
    ),
    "clip_fraction": Variable(FULL, "f4", "1", "share of a checkpoint completion's tokens where the clip binds"),
    "entropy": Variable(
        FULL,
        "f4",
        "nat",
        "mean surprisal of a fresh rollout's own tokens, nat per token",
        "mean over sampled tokens of -log pi(alpha, beta); estimates the token entropy",
    ),
    "completion_tokens": Variable(FULL, "i4", "token", "sampled tokens of a fresh rollout, all turns"),
    "truncated": Variable(FULL, "i1", "1", "whether a length limit cut a fresh rollout (0 or 1)"),
    "status": Variable(
        FULL,
        "i1",
        "1",
        "outcome of a fresh rollout",
        "reward is missing where the rollout failed",
        (("flag_values", np.array([0, 1, 2], np.int8)), ("flag_meanings", "ok truncated error")),
    ),
    "format_failure": Variable(
        FULL, "f4", "1", "share of a fresh rollout's turns without the asked-for format", required=False
    ),
    "realised_step": Variable(
        POINT,
        "f8",
        "1",
        "relative norm of the weight change that the server really holds",
        "norm(theta(alpha, beta) - theta) / norm(theta), both after rounding to the server's dtype",
    ),
    "seconds_move": Variable(POINT, "f4", "s", "wall time of moving the weights"),
    "seconds_sample": Variable(POINT, "f4", "s", "wall time of the fresh rollouts, rewards included"),
    "seconds_score": Variable(POINT, "f4", "s", "wall time of scoring the checkpoint's completions"),
    "base_reward": Variable(CELL, "f4", "1", "verifier reward of a checkpoint completion"),
    "base_status": Variable(
        CELL,
        "i1",
        "1",
        "outcome of a checkpoint rollout",
        "",
        (("flag_values", np.array([0, 1, 2], np.int8)), ("flag_meanings", "ok truncated error")),
    ),
    "base_advantage": Variable(CELL, "f8", "1", "group-relative advantage of a checkpoint completion"),
    "base_tokens": Variable(CELL, "i4", "token", "sampled tokens of a checkpoint completion, all turns"),
    "base_logprob": Variable(CELL, "f8", "nat", "log-probability of a checkpoint completion, re-scored at the origin"),
    "base_sampled_logprob": Variable(
        CELL,
        "f8",
        "nat",
        "log-probability of a checkpoint completion as the sampler saw it",
        "its difference from base_logprob is the numerical noise floor between decoding and scoring",
    ),
    "recheck_logprob": Variable(
        CELL, "f8", "nat", "log-probability of a checkpoint completion, scored at the origin after the last point"
    ),
    "recheck_max_difference": Variable(
        CELL, "f4", "nat", "largest difference of one token's log-probability between the first and last look"
    ),
}
"""Every variable of a landscape dataset that is measured."""

DISPLACEMENT_NORM = Variable((), "f8", "1", "norm of the checkpoint's displacement from snapshot 0, ‖θ_t − θ_0‖")
DISPLACEMENT_RADIUS = Variable(
    POINT,
    "f8",
    "1",
    "norm of the weight change in units of the checkpoint's displacement from snapshot 0",
    "realised_step * norm(theta) / displacement_norm",
)


@dataclass(frozen=True)
class Annotations:
    """What a dataset says besides its points: how far training had gone, and names of its own."""

    displacement_norm: float = math.nan
    """‖θ_t − θ_0‖; NaN where it is not known."""
    theta_norm: float = math.nan
    """‖θ_t‖."""
    displacement_comment: str = "not known: no training run was named"
    """What the displacement was computed from, or why it is not known."""
    long_names: Mapping[str, str] = field(default_factory=dict)
    """Variable or coordinate → the long name that replaces the usual one."""


class Journal:
    """One directory: one snapshot × one slice."""

    def __init__(self, root: Path, alphas: np.ndarray, betas: np.ndarray, identity: dict[str, Any]) -> None:
        """Open or create. Raises `StoreError` naming the differing keys if `root` holds something else."""
        self.root = Path(root)
        self.alphas, self.betas = np.asarray(alphas, np.float64), np.asarray(betas, np.float64)
        self.identity = identity
        self._base_sha256: str | None = None
        with _Disk(self.root):
            (self.root / "points").mkdir(parents=True, exist_ok=True)
        _remove_stale(self.root)
        path = self.root / "journal.json"
        # The axes are written out: a configuration alone does not say which coordinates it became.
        asked = {**identity, "axes": {"alpha": self.alphas.tolist(), "beta": self.betas.tolist()}}
        if not path.exists():
            self._publish(path, lambda scratch: scratch.write_text(json.dumps(asked, indent=1, sort_keys=True)))
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

    def _path(self, i: int, j: int) -> Path:
        return self.root / "points" / f"a{i:03d}_b{j:03d}.nc"

    def done(self) -> set[tuple[int, int]]:
        """Grid indices (i, j) whose file is whole. A damaged one is moved aside with a warning."""
        found = set()
        for i in range(len(self.alphas)):
            for j in range(len(self.betas)):
                if self._path(i, j).exists() and self._readable(self._path(i, j)):
                    found.add((i, j))
        return found

    def status(self) -> tuple[int, int]:
        """(finished points, all points), by names only."""
        total = len(self.alphas) * len(self.betas)
        return sum(1 for _ in (self.root / "points").glob("a*_b*.nc")), total

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
            _move_aside(path, reason)
        return not reason

    def _unfit(self, path: Path, point: xr.Dataset) -> str:
        """Why a point's file is not one of this journal; empty if it is."""
        if point.attrs.get("identity") != digest(self.identity):
            return "it is not a point of this sweep"
        if point.attrs.get("file", path.name) != path.name:
            return f"it is {point.attrs['file']} under another name"
        return self._other_base(point) or _wrong_shape(point, (FULL, POINT))

    def _other_base(self, scored: xr.Dataset) -> str:
        base = self._base_digest()
        other = base is not None and scored.attrs.get("base_sha256") != base
        return "it was scored against another base batch" if other else ""

    def _base_digest(self) -> str | None:
        if self._base_sha256 is None and (base := self.read_base()) is not None:
            self._base_sha256 = _content_digest(base)
        return self._base_sha256

    def write_base(self, base: xr.Dataset) -> xr.Dataset:
        """Keep the checkpoint's own batch; returns the one kept: another process's if that was first."""
        if problem := _wrong_shape(base, (CELL,), skip="recheck"):
            raise StoreError(f"not a base batch: {problem}")
        self._write(self.root / "base.nc", base)
        kept = self.read_base()
        if kept is None:
            raise StoreError(f"{self.root / 'base.nc'} vanished while it was written; run the same command again")
        self._base_sha256 = _content_digest(kept)
        return kept

    def read_base(self) -> xr.Dataset | None:
        """The checkpoint's own batch, or None."""
        base = self._read(self.root / "base.nc")
        if base is not None and base.attrs.get("identity", digest(self.identity)) != digest(self.identity):
            raise StoreError(f"{self.root / 'base.nc'} is the base batch of another sweep; move it away")
        return base

    def write_recheck(self, recheck: xr.Dataset) -> None:
        """Keep the last look at the origin."""
        self._write(self.root / "recheck.nc", recheck.assign_attrs(base_sha256=self._base_digest() or ""))

    def read_recheck(self) -> xr.Dataset | None:
        """The last look at the origin, or None. A damaged one, or one at another base batch, is moved aside."""
        path = self.root / "recheck.nc"
        try:
            recheck = _contents(path)
            reason = "base_sha256" in recheck.attrs and self._other_base(recheck)
        except FileNotFoundError:
            return None
        except _DamagedError as error:
            recheck, reason = None, str(error)
        if not reason:
            return recheck
        _move_aside(path, reason)
        return None

    def write_facts(self, name: str, facts: list[dict[str, Any]]) -> None:
        """Write down, as JSON file `name`, what the servers of this process said about themselves."""
        content = {"servers": facts, "sha256": digest(facts)}
        replace_text(self.root / name, [json.dumps(content, indent=1, sort_keys=True)])

    def read_facts(self, name: str) -> list[dict[str, Any]] | None:
        """What `write_facts` wrote, or None. A damaged file is moved aside."""
        path = self.root / name
        try:
            content = json.loads(path.read_text())
            if isinstance(content, list):  # written without a checksum
                return content
            if digest(content["servers"]) == content["sha256"]:
                return content["servers"]
            reason = "its content is not what its checksum says"
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error}; nothing was changed") from error
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        _move_aside(path, reason)
        return None

    def write_point(self, i: int, j: int, point: xr.Dataset) -> None:
        """Keep a finished point, dims (prompt, rollout) and per-point scalars; an existing one stays.

        Refuses an unknown, missing or misshapen variable, and a missing reward of a rollout that did not fail.
        """
        if not (0 <= i < len(self.alphas) and 0 <= j < len(self.betas)):
            raise StoreError(f"point ({i}, {j}) is outside the grid of {len(self.alphas)} × {len(self.betas)}")
        if unknown := sorted(str(name) for name in point.data_vars if name not in SCHEMA):
            raise StoreError(f"point ({i}, {j}) has variables that the schema does not know: {', '.join(unknown)}")
        if problem := _wrong_shape(point, (FULL, POINT)):
            raise StoreError(f"point ({i}, {j}): {problem}")
        path = self._path(i, j)
        if path.exists():
            self._readable(path)  # so that an unfit one does not stay
        marks = {"file": path.name}
        if base := self._base_digest():
            marks["base_sha256"] = base
        self._write(path, point.assign_attrs(marks))

    def read_point(self, i: int, j: int) -> xr.Dataset:
        """A finished point."""
        found = self._read(self._path(i, j))
        if found is None:
            raise StoreError(f"point ({i}, {j}) of {self.root} is not measured yet")
        return found

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
        self._publish(
            path, lambda scratch: data.to_netcdf(scratch, engine="netcdf4", format="NETCDF4", encoding=encoding)
        )

    def _publish(self, path: Path, write: Callable[[Path], Any]) -> None:
        """Write under a temporary name, sync, and link to `path` unless a whole file is already there."""
        scratch = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with _Disk(path):
                write(scratch)
                _sync(scratch)
                try:
                    os.link(scratch, path)
                except FileExistsError:
                    pass
                except OSError:  # a file system without hard links
                    if not path.exists():
                        os.rename(scratch, path)
                _sync(path.parent)
        finally:
            with contextlib.suppress(OSError):  # a read-only disk would hide the first error
                scratch.unlink(missing_ok=True)

    def consolidate(self, out: Path, attributes: Mapping[str, Any], notes: Annotations | None = None) -> Path:
        """Write the dataset of all points to `out`, dims (alpha, beta, prompt, rollout), one point in memory at a time.

        An `out` of the same identity is left as it is. Raises `StoreError` when points are missing or `out` belongs to
        something else.
        """
        identity = digest(self.identity)
        if out.exists():
            try:
                with xr.open_dataset(out, engine="netcdf4") as present:
                    same = present.attrs.get("identity") == identity
            except (OSError, ValueError, RuntimeError) as error:
                raise StoreError(f"{out} is not a readable dataset ({error}); move it away and run again") from error
            if not same:
                raise StoreError(f"{out} holds another landscape; move it away or choose another output directory")
            return out
        done = self.done()
        missing = [cell for cell in np.ndindex(len(self.alphas), len(self.betas)) if cell not in done]
        base, recheck = self.read_base(), self.read_recheck()
        if missing or base is None or recheck is None:
            of = f"{len(missing)} of {len(self.alphas) * len(self.betas)} points"
            what = of if missing else "the base batch or the last look at the origin"
            raise StoreError(f"{self.root} lacks {what}; run the same sweep again to finish it")
        self._publish(out, lambda scratch: self._fill(scratch, base, recheck, dict(attributes), notes or Annotations()))
        return out

    def _fill(
        self, scratch: Path, base: xr.Dataset, recheck: xr.Dataset, attributes: dict[str, Any], notes: Annotations
    ) -> None:
        import netCDF4

        configuration = json.dumps(self.identity.get("configuration", {}), sort_keys=True)
        stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with netCDF4.Dataset(scratch, "w", format="NETCDF4") as file:
            for name, size in (
                ("alpha", len(self.alphas)),
                ("beta", len(self.betas)),
                ("prompt", base.sizes["prompt"]),
                ("rollout", base.sizes["rollout"]),
            ):
                file.createDimension(name, size)
            for axis, symbol, values in (("alpha", "δ", self.alphas), ("beta", "η", self.betas)):
                usual = f"coordinate along direction {symbol}, in units of its norm"
                _coordinate(file, axis, values, notes.long_names.get(axis, usual))
            _coordinate(file, "prompt", np.arange(base.sizes["prompt"]), "index of the task in the prompt set")
            _coordinate(file, "rollout", np.arange(base.sizes["rollout"]), "index of the rollout of a task")
            _scalar(file, "step", self.identity.get("step", 0), "optimizer updates behind the checkpoint")
            _scalar(file, "slice_seed", self.identity.get("slice", {}).get("seed", 0), "seed of the slice's directions")
            sample = self.read_point(0, 0)
            variables = {}
            for name, variable in SCHEMA.items():
                source = sample if variable.dims in (FULL, POINT) else recheck if name.startswith("recheck") else base
                if name not in source:
                    if variable.required:
                        raise StoreError(f"{self.root}: measured files have no variable {name!r}; another version?")
                    continue
                named = replace(variable, long_name=notes.long_names.get(name, variable.long_name))
                variables[name] = _create(file, name, named, base.sizes)
                if variable.dims == CELL:
                    variables[name][:] = source[name].values
            for i, j in np.ndindex(len(self.alphas), len(self.betas)):
                point = self.read_point(i, j)
                for name, target in variables.items():
                    if SCHEMA[name].dims in (FULL, POINT):
                        target[i, j] = point[name].values
            norm = replace(DISPLACEMENT_NORM, comment=notes.displacement_comment)
            _create(file, "displacement_norm", norm, base.sizes)[...] = notes.displacement_norm
            radius = _create(file, "displacement_radius", DISPLACEMENT_RADIUS, base.sizes)
            radius[:] = variables["realised_step"][:].filled(np.nan) * (notes.theta_norm / notes.displacement_norm)
            file.setncatts(
                attributes
                | {
                    "configuration": configuration,
                    "configuration_sha256": digest(self.identity.get("configuration", {})),
                    "identity": digest(self.identity),
                    "history": f"{stamp} written by rlvr_landscape_plugin.sweep",
                }
            )


class _Disk:
    """Turns a full or read-only disk into a `StoreError` that says what is safe."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, (OSError, RuntimeError)) or isinstance(error, StoreError):
            return
        folder = next((p for p in (self._path, *self._path.parents) if p.is_dir()), Path())
        free = shutil.disk_usage(folder).free
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or free < 2**16
        what = f"the disk is full ({free:,} bytes free)" if full else str(error)
        raise StoreError(
            f"cannot write {self._path}: {what}; "
            "finished points are safe, run the same command again when there is room"
        ) from error


def replace_text(path: Path, parts: Iterable[str]) -> None:
    """Write `parts` under a temporary name and rename it to `path`. Raises `StoreError` for a disk that refuses."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _Disk(path):
            path.parent.mkdir(exist_ok=True)
            with scratch.open("w") as sink:
                sink.writelines(parts)
            os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


class _DamagedError(Exception):
    """A file whose content is not what was written."""


def _contents(path: Path) -> xr.Dataset:
    """A netCDF file of the journal, undecoded and in memory.

    Raises `FileNotFoundError`, `_DamagedError` for its content, `StoreError` where the system does not let it be read.
    """
    import netCDF4
    from xarray.backends import NetCDF4DataStore

    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}; nothing was changed") from error
    try:
        # From memory: whatever is wrong from here on is the content, not a disk or a lack of file handles.
        with netCDF4.Dataset(path.name, memory=raw) as file:
            data = xr.open_dataset(NetCDF4DataStore(file), decode_cf=False).load()
        whole = data.attrs.get("sha256", "") in ("", _checksum(data))
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # HDF5 and xarray stumble over damage in many ways
        if isinstance(error, OSError) and (error.errno or 0) > 0:  # netCDF's own numbers are negative
            raise StoreError(f"{path} cannot be read: {error}; nothing was changed") from error
        raise _DamagedError(f"{type(error).__name__}: {error}") from error
    if not whole:
        raise _DamagedError("its content is not what its checksum says")
    return data


def _move_aside(path: Path, reason: str) -> None:
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.corrupt")
    try:
        os.replace(path, aside)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"{path} is of no use ({reason}) and cannot be moved aside: {error}") from error
    warnings.warn(f"{path} was moved to {aside.name} and will be measured again: {reason}", stacklevel=4)


def _wrong_shape(data: xr.Dataset, families: tuple[tuple[str, ...], ...], skip: str = "\0") -> str:
    """What in a file of points or of the base batch breaks `SCHEMA`; empty if nothing does."""
    sizes = {dim: data.sizes.get(dim, 0) for dim in CELL}
    if not all(sizes.values()):
        return f"it needs the dimensions prompt and rollout, it has {dict(data.sizes)}"
    for name, variable in SCHEMA.items():
        if variable.dims not in families or name.startswith(skip):
            continue
        dims = tuple(dim for dim in variable.dims if dim in CELL)
        if name not in data:
            if variable.required:
                return f"it has no variable {name!r}"
        elif data[name].dims != dims:
            return f"variable {name!r} has dims {data[name].dims} instead of {dims}"
    for prefix in ("", "base_"):
        if f"{prefix}reward" in data:
            lost = data[f"{prefix}reward"].isnull() & (data[f"{prefix}status"] != ERROR)
            if lost.any():
                return f"{int(lost.sum())} values of {prefix}reward are missing without status {ERROR} (error)"
    return ""


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


def _remove_stale(root: Path) -> None:
    """Remove temporary files that a killed writer left behind long ago."""
    for scratch in (*root.glob(".*.tmp"), *(root / "points").glob(".*.tmp")):
        try:
            if time.time() - scratch.stat().st_mtime > STALE_SECONDS:
                scratch.unlink(missing_ok=True)
        except OSError:
            continue


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _create(file: Any, name: str, variable: Variable, sizes: Mapping[Any, int]) -> Any:
    chunks = (1, 1, sizes["prompt"], sizes["rollout"]) if variable.dims == FULL else None
    fill = np.nan if variable.dtype.startswith("f") else False
    created = file.createVariable(
        name,
        variable.dtype,
        variable.dims,
        zlib=True,
        complevel=4,
        shuffle=True,
        chunksizes=chunks,
        fill_value=fill,
    )
    # CF's way to say that two scalars are coordinates of this variable; xarray reads them as such.
    created.setncatts({"long_name": variable.long_name, "units": variable.units, "coordinates": "step slice_seed"})
    created.setncatts(dict(variable.extra))
    if variable.comment:
        created.comment = variable.comment
    if name == "base_logprob":
        created.ancillary_variables = "base_sampled_logprob recheck_logprob"
    return created


def _coordinate(file: Any, name: str, values: np.ndarray, long_name: str) -> None:
    created = file.createVariable(name, values.dtype, (name,))
    created[:] = values
    created.setncatts({"long_name": long_name, "units": "1"})


def _scalar(file: Any, name: str, value: int, long_name: str) -> None:
    created = file.createVariable(name, "i8", ())
    created[...] = value
    created.setncatts({"long_name": long_name, "units": "1"})


def _differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [d for key in sorted({*old, *new}) for d in _differences(old.get(key), new.get(key), f"{prefix}.{key}")]
    return [] if old == new else [(prefix.lstrip("."), old, new)]


def landscapes(output: Path) -> Iterator[Path]:
    """The finished datasets of a run directory, sorted by name."""
    yield from sorted(Path(output).glob("landscape_step*_slice*.nc"))
