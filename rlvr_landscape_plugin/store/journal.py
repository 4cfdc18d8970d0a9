"""The journal of points, and the netCDF file it becomes.

One directory per snapshot and slice:

    journal.json       what is measured here; a directory of something else is refused
    base.nc            the checkpoint's own batch, tokens included
    points/*.nc        one file per finished point; of a progressive sweep, one per point and range of prompts
    recheck.nc         the base batch scored again after the last point

A file appears under its name only when it is whole: written under a temporary name, synced, then linked without
overwriting. So the state of a sweep is the set of files; killing it loses at most the points in flight, and several
processes may share a directory. A point names the base batch that it was scored against, so that points of two batches
never meet in one dataset. Nothing here deletes a measurement; files that cannot be used are moved aside.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from rlvr_landscape_plugin.errors import StoreError
from rlvr_landscape_plugin.files import (
    digest,
    move_aside,
    publish,
    read_checked_json,
    remove_stale,
    replace_text,
    writing,
)

POINT = ("alpha", "beta")
CELL = ("prompt", "rollout")
FULL = (*POINT, *CELL)
Cell = tuple[int, int]
"""Grid indices (i, j) of a point."""
ERROR = 2
"""Value of `status` for a rollout that failed; only such a rollout may lack a reward."""


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
    "surrogate_weight": Variable(
        CELL,
        "f8",
        "1",
        "weight of a checkpoint completion in the objective",
        "J = sum(surrogate) / sum(surrogate_weight); absent for GRPO's clipped objective, token by token",
        required=False,
    ),
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
class Rectangle:
    """A part of the grid and of the prompt set: some α × some β × the first `prompts` tasks."""

    rows: tuple[int, ...]
    """Indices of α, ascending."""
    columns: tuple[int, ...]
    """Indices of β, ascending."""
    prompts: int

    @property
    def cells(self) -> list[Cell]:
        """Its points."""
        return [(i, j) for i in self.rows for j in self.columns]


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
        self._prompts = 0
        with writing(self.root):
            (self.root / "points").mkdir(parents=True, exist_ok=True)
        remove_stale(self.root)
        remove_stale(self.root / "points")
        path = self.root / "journal.json"
        # The axes are written out: a configuration alone does not say which coordinates it became.
        asked = {**identity, "axes": {"alpha": self.alphas.tolist(), "beta": self.betas.tolist()}}
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

    def _path(self, i: int, j: int, prompts: range | None = None) -> Path:
        return self.root / "points" / point_name(i, j, prompts)

    @property
    def prompts(self) -> int | None:
        """Tasks of the base batch; None before there is one."""
        return self._prompts if self._base_digest() is not None else None

    def _is_whole(self, end: float) -> bool:
        """Whether files that end here hold all prompts; asks the base batch only about portions."""
        return end == math.inf or end == self.prompts

    def done(self) -> set[Cell]:
        """Grid indices (i, j) of the points that are whole. A damaged file is moved aside with a warning."""
        return {cell for cell, end in self.covered().items() if self._is_whole(end)}

    def covered(self) -> dict[Cell, float]:
        """Each point with files → how many prompts they hold, the first counted on; inf: a file of all prompts."""
        ends = {cell: self._chain(paths)[1] for cell, paths in self._files().items()}
        return {cell: end for cell, end in ends.items() if end}

    def status(self) -> tuple[int, int]:
        """(finished points, all points), by names only."""
        finished = (self._chain(paths, by_name=True)[1] for paths in self._files().values())
        return sum(map(self._is_whole, finished)), len(self.alphas) * len(self.betas)

    def _files(self) -> dict[Cell, dict[tuple[int, float], Path]]:
        """Point → (first prompt, end) → file; the end of a whole point is inf."""
        found: dict[Cell, dict[tuple[int, float], Path]] = {}
        for path in (self.root / "points").glob("a*_b*.nc"):
            if match := _POINT_FILE.fullmatch(path.name):
                i, j, start, stop = match.groups()
                ends = (0, math.inf) if start is None else (int(start), int(stop))
                if int(i) < len(self.alphas) and int(j) < len(self.betas):
                    found.setdefault((int(i), int(j)), {})[ends] = path
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
        match = _POINT_FILE.fullmatch(path.name)
        if match and match[3] and point.sizes.get("prompt") != int(match[4]) - int(match[3]):
            return f"it holds {point.sizes.get('prompt')} prompts, its name says {match[3]} to {match[4]}"
        return self._other_base(point) or _wrong_shape(point, (FULL, POINT))

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
        if problem := _wrong_shape(base, (CELL,), skip="recheck"):
            raise StoreError(f"not a base batch: {problem}")
        self._write(self.root / "base.nc", base)
        kept = self.read_base()
        if kept is None:
            raise StoreError(f"{self.root / 'base.nc'} vanished while it was written; run the same command again")
        self._base_sha256, self._prompts = _content_digest(kept), kept.sizes["prompt"]
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
        move_aside(path, reason)
        return None

    def write_facts(self, name: str, facts: list[dict[str, Any]]) -> None:
        """Write down, as JSON file `name`, what the servers of this process said about themselves."""
        content = {"servers": facts, "sha256": digest(facts)}
        replace_text(self.root / name, [json.dumps(content, indent=1, sort_keys=True)])

    def read_facts(self, name: str) -> list[dict[str, Any]] | None:
        """What `write_facts` wrote, or None. A damaged file is moved aside."""
        content = read_checked_json(self.root / name, "servers")
        return None if content is None else content["servers"]

    def write_point(self, i: int, j: int, point: xr.Dataset, prompts: range | None = None) -> None:
        """Keep a finished point, dims (prompt, rollout) and per-point scalars; an existing one stays.

        `prompts`: which tasks it holds, if not all. Refuses an unknown, missing or misshapen variable, and a missing
        reward of a rollout that did not fail.
        """
        if not (0 <= i < len(self.alphas) and 0 <= j < len(self.betas)):
            raise StoreError(f"point ({i}, {j}) is outside the grid of {len(self.alphas)} × {len(self.betas)}")
        if unknown := sorted(str(name) for name in point.data_vars if name not in SCHEMA):
            raise StoreError(f"point ({i}, {j}) has variables that the schema does not know: {', '.join(unknown)}")
        if problem := _wrong_shape(point, (FULL, POINT)):
            raise StoreError(f"point ({i}, {j}): {problem}")
        if prompts is not None and len(prompts) != point.sizes["prompt"]:
            raise StoreError(f"point ({i}, {j}) has {point.sizes['prompt']} prompts, not those of {prompts}")
        path = self._path(i, j, prompts)
        if path.exists():
            self._readable(path)  # so that an unfit one does not stay
        marks = {"file": path.name}
        if base := self._base_digest():
            marks["base_sha256"] = base
        self._write(path, point.assign_attrs(marks))

    def read_point(self, i: int, j: int, prompts: int | None = None) -> xr.Dataset:
        """A finished point, its first `prompts` tasks (default: all); wall times of its parts are added up."""
        wanted = math.inf if prompts is None else prompts
        paths, end = self._chain(self._files().get((i, j), {}), by_name=True, until=wanted)
        if not self._is_whole(end) and end < wanted:
            raise StoreError(f"point ({i}, {j}) of {self.root} is not measured yet")
        parts = [part for part in map(self._read, paths) if part is not None]
        if len(parts) != len(paths):
            raise StoreError(f"files of point ({i}, {j}) vanished from {self.root}; run the same command again")
        return _joined(parts).isel(prompt=slice(prompts))

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
        publish(path, lambda scratch: data.to_netcdf(scratch, engine="netcdf4", format="NETCDF4", encoding=encoding))

    @property
    def full(self) -> Rectangle:
        """The whole grid and all prompts. Raises `StoreError` before there is a base batch."""
        if self.prompts is None:
            raise StoreError(f"{self.root} lacks the base batch; run the same sweep again to finish it")
        return Rectangle(tuple(range(len(self.alphas))), tuple(range(len(self.betas))), self.prompts)

    def holds(self, out: Path, part: Rectangle | None = None) -> bool:
        """Whether `out` is this journal's dataset of `part` (default: of everything), or of more.

        Raises `StoreError` when it belongs to something else or cannot be read.
        """
        if not out.exists():
            return False
        try:
            with xr.open_dataset(out, engine="netcdf4") as present:
                same = present.attrs.get("identity") == digest(self.identity)
                alphas, betas, prompts = present["alpha"].values, present["beta"].values, present.sizes["prompt"]
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise StoreError(f"{out} is not a readable dataset ({error}); move it away and run again") from error
        if not same:
            raise StoreError(f"{out} holds another landscape; move it away or choose another output directory")
        if part is None and self.prompts is None:
            return (len(alphas), len(betas)) == (len(self.alphas), len(self.betas))
        part = part or self.full
        rows = np.isin(self.alphas[list(part.rows)], alphas)
        columns = np.isin(self.betas[list(part.columns)], betas)
        return bool(rows.all() and columns.all()) and prompts >= part.prompts

    def consolidate(
        self,
        out: Path,
        attributes: Mapping[str, Any],
        notes: Annotations | None = None,
        part: Rectangle | None = None,
    ) -> Path:
        """Write the dataset of all points to `out`, dims (alpha, beta, prompt, rollout), one point in memory at a time.

        `part`: what a progressive sweep measured, if not everything. An `out` of this journal that holds as much is
        left as it is; one that holds less is replaced by the whole. Raises `StoreError` when points are missing or
        `out` belongs to something else.
        """
        remove_stale(out.parent)
        if self.holds(out, part):
            return out
        part = part or self.full
        found = self.covered()
        missing = [cell for cell in part.cells if found.get(cell, 0) < part.prompts]
        base, recheck = self.read_base(), self.read_recheck()
        if missing or base is None or recheck is None:
            of = f"{len(missing)} of {len(part.cells)} points"
            what = of if missing else "the base batch or the last look at the origin"
            raise StoreError(f"{self.root} lacks {what}; run the same sweep again to finish it")
        base, recheck = (data.isel(prompt=slice(part.prompts)) for data in (base, recheck))
        facts, notes = dict(attributes), notes or Annotations()
        publish(out, lambda scratch: self._fill(scratch, part, base, recheck, facts, notes), replace=out.exists())
        return out

    def _fill(
        self,
        scratch: Path,
        part: Rectangle,
        base: xr.Dataset,
        recheck: xr.Dataset,
        attributes: dict[str, Any],
        notes: Annotations,
    ) -> None:
        import netCDF4

        alphas, betas = self.alphas[list(part.rows)], self.betas[list(part.columns)]
        configuration = json.dumps(self.identity.get("configuration", {}), sort_keys=True)
        stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with netCDF4.Dataset(scratch, "w", format="NETCDF4") as file:
            for name, size in (
                ("alpha", len(alphas)),
                ("beta", len(betas)),
                ("prompt", base.sizes["prompt"]),
                ("rollout", base.sizes["rollout"]),
            ):
                file.createDimension(name, size)
            for axis, symbol, values in (("alpha", "δ", alphas), ("beta", "η", betas)):
                usual = f"coordinate along direction {symbol}, in units of its norm"
                _coordinate(file, axis, values, notes.long_names.get(axis, usual))
            _coordinate(file, "prompt", np.arange(base.sizes["prompt"]), "index of the task in the prompt set")
            _coordinate(file, "rollout", np.arange(base.sizes["rollout"]), "index of the rollout of a task")
            _scalar(file, "step", self.identity.get("step", 0), "optimizer updates behind the checkpoint")
            _scalar(file, "slice_seed", self.identity.get("slice", {}).get("seed", 0), "seed of the slice's directions")
            sample = self.read_point(*part.cells[0], part.prompts)
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
            for place, cell in zip(np.ndindex(len(alphas), len(betas)), part.cells, strict=True):
                point = self.read_point(*cell, part.prompts)
                for name, target in variables.items():
                    if SCHEMA[name].dims in (FULL, POINT):
                        target[place] = point[name].values
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


_POINT_FILE = re.compile(r"a(\d{3,})_b(\d{3,})(?:_p(\d{5,})-(\d{5,}))?\.nc")


def point_name(i: int, j: int, prompts: range | None = None) -> str:
    """File name of a point, or of the part of it that holds only these prompts."""
    part = "" if prompts is None else f"_p{prompts.start:05d}-{prompts.stop:05d}"
    return f"a{i:03d}_b{j:03d}{part}.nc"


def _joined(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """Parts of one point, one after the other along `prompt`."""
    if len(parts) == 1:
        return parts[0]
    cells = [part.drop_vars([name for name in part.data_vars if part[name].dims != CELL]) for part in parts]
    whole = xr.concat(cells, "prompt", combine_attrs="drop")
    for name in parts[0].data_vars:
        if name not in whole:
            values = [part[name] for part in parts]
            whole[name] = sum(values) if str(name).startswith("seconds_") else values[0]
    return whole


def keep_record(path: Path, identity: Mapping[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Keep what was found out once for several slices; returns what is kept: another process's if that was first."""
    content = {"record": record, "sha256": digest(record), "identity": digest(identity)}
    publish(path, lambda scratch: scratch.write_text(json.dumps(content, indent=1, sort_keys=True)))
    kept = read_record(path, identity)
    if kept is None:
        raise StoreError(f"{path} vanished while it was written; run the same command again")
    return kept


def read_record(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
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
