"""`rlvr-landscape status DIR`: how far a sweep is, from its files alone.

Points are counted by the names of their files, which any number of processes write. What a process is doing is read
from its sign of life (`heartbeat.py`). Nothing is written, no server is asked, and neither NumPy nor netCDF is loaded.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlvr_landscape_plugin.errors import StoreError
from rlvr_landscape_plugin.files import JsonObject
from rlvr_landscape_plugin.sweep.heartbeat import FAILED, FINISHED, INTERRUPTED, MEASURING

SILENT_SECONDS = 60.0
"""A process of another machine that has given no sign of life for so long counts as gone."""
LOST_SECONDS = 600.0
"""The same for one of this machine whose number exists: another process may have it by now."""
DEAD = "dead"
"""State of a process that reports `measuring` and is not there any more."""
STOPPED = "stopped"
"""State of a sweep that is not finished and that no process works on."""
_JOURNAL = re.compile(r"journal(?:_(\d+))?\.json")
_POINT = re.compile(r"((?:[a-z]+\d{3,}_)*[a-z]+\d{3,})(?:_p(\d{5,})-(\d{5,})(?:_r(\d{5,})-(\d{5,})_c\d{5,})?)?\.nc")
_PROCESS = re.compile(r"process_(\d+)of(\d+)\.json")


@dataclass
class Landscape:
    """One snapshot and design."""

    name: str
    step: int
    points: int
    """Finished."""
    points_asked: int
    """0 where only the checkpoint itself is measured."""
    episodes: int
    episodes_asked: int
    base: bool
    """Whether the checkpoint's own batch is there."""
    dataset: str | None
    """File of its dataset; None before it is written."""
    last: float | None
    """When the last point was written, in seconds since 1970."""
    moved_aside: int
    """Files that could not be used (`*.corrupt`)."""

    @property
    def finished(self) -> bool:
        """Whether its dataset holds what the last sweep asked for."""
        return self.dataset is not None


@dataclass
class Process:
    """One process of the sweep, as it reported itself."""

    shard: str
    host: str
    pid: int
    state: str
    """`measuring`, `finished`, `failed`, `interrupted`, or `dead`: it was measuring and is gone."""
    written: float
    """Its last sign of life, in seconds since 1970."""
    slice: str
    points: tuple[int, int]
    waiting: list[str]
    rate: float
    """Episodes per second over its last minutes."""
    servers: list[JsonObject]
    """`url`, `away`, `points`, `answered` (seconds since 1970)."""
    server_failures: int
    failed_episodes: int
    error: str
    at_most: bool
    """A progressive sweep: it may stop before everything is measured."""
    steps: list[int]
    messages: list[tuple[float, str]]

    @property
    def at_work(self) -> bool:
        """Whether it is there and measures."""
        return self.state == MEASURING


@dataclass
class Status:
    """A sweep's directory as its files show it."""

    output: str
    state: str
    """`measuring`, `finished`, `failed`, `interrupted` or `stopped`."""
    landscapes: list[Landscape]
    processes: list[Process]
    steps_asked: int
    """Snapshots that were asked for, where a process says so, or those that were begun."""
    shards_asked: int
    shards_absent: list[str]
    """Shards that have never reported."""
    points: int
    points_asked: int
    episodes: int
    episodes_asked: int
    rate: float
    """Episodes per second of all processes at work."""
    seconds_left: float | None
    """None where nobody measures or there is no rate yet."""
    at_most: bool
    bytes_used: int
    bytes_more: int | None
    """About what the rest will take; None before the first point."""
    bytes_free: int
    time: float
    datasets: list[str] = field(default_factory=list)
    """Every dataset in the directory."""


def read_status(output: Path, now: float | None = None) -> Status:
    """The status of the sweep in `output`. Raises `StoreError` for a directory that is none."""
    now = time.time() if now is None else now
    output = Path(output)
    if not output.is_dir():
        what = "is a file" if output.exists() else "does not exist"
        raise StoreError(f"{output} {what}; give the output directory of a sweep")
    landscapes = [_landscape(folder) for folder in _journals(output)]
    processes = _processes(output, now)
    datasets = sorted(path.name for path in output.glob("*step*.nc") if not path.name.startswith("."))
    if not (landscapes or processes or datasets):
        raise StoreError(_foreign(output))
    at_work = [process for process in processes if process.at_work]
    begun = {landscape.step for landscape in landscapes}
    steps = begun.union(*(process.steps for process in processes))
    # Snapshots whose range is still looked for, or that training has not written yet, are as large as the others.
    factor = len(steps) / len(begun) if begun else 1
    asked = round(sum(found.points_asked for found in landscapes) * factor)
    episodes_asked = round(sum(found.episodes_asked for found in landscapes) * factor)
    episodes = sum(found.episodes for found in landscapes)
    rate = sum(process.rate for process in at_work)
    count = max((int(process.shard.partition("/")[2]) for process in processes), default=1)
    reported = {process.shard for process in processes}
    status = Status(
        output=str(output),
        state="",
        landscapes=landscapes,
        processes=processes,
        steps_asked=len(steps),
        shards_asked=count,
        shards_absent=[name for i in range(count) if (name := f"{i + 1}/{count}") not in reported and processes],
        points=sum(found.points for found in landscapes),
        points_asked=asked,
        episodes=episodes,
        episodes_asked=episodes_asked,
        rate=rate,
        seconds_left=(episodes_asked - episodes) / rate if rate and landscapes else None,
        at_most=any(process.at_most for process in processes),
        bytes_used=_bytes(output),
        bytes_more=None,
        bytes_free=shutil.disk_usage(output).free,
        time=now,
        datasets=datasets,
    )
    measured = sum(_bytes(folder / "points") for folder in _journals(output))
    if episodes and measured:
        # What is not measured yet goes into points' files, and once more everything without a dataset into one.
        unwritten = episodes_asked - sum(found.episodes_asked for found in landscapes if found.finished)
        status.bytes_more = round(measured / episodes * (max(episodes_asked - episodes, 0) + unwritten))
    status.state = _state(status, begun == steps)
    return status


def _state(status: Status, begun: bool) -> str:
    if any(process.at_work for process in status.processes):
        return MEASURING
    if begun and all(found.finished for found in status.landscapes):
        return FINISHED
    for state in (FAILED, INTERRUPTED):
        if any(process.state == state for process in status.processes):
            return state
    return STOPPED


def _foreign(output: Path) -> str:
    if (output / "snapshots").is_dir() or (output / "metrics.jsonl").exists():
        return (
            f"{output} is a training run, not a sweep; `rlvr-landscape snapshot ls {output}` lists its snapshots, and "
            f"`rlvr-landscape sweep --snapshots {output}/snapshots/step_*` measures them"
        )
    within = [path for path in sorted(output.iterdir()) if path.is_dir() and any(_journals(path))]
    hint = f"; did you mean {within[0]}?" if within else "; give the directory that a sweep has as its `output`"
    return f"{output} holds no sweep: no journal.json in its folders, no dataset, no process that reports{hint}"


def _journals(output: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(path for path in output.iterdir() if (path / "journal.json").is_file())
    return []


def _json(path: Path) -> JsonObject:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise StoreError(f"{path} is not a JSON object")
    return content


def _landscape(folder: Path) -> Landscape:
    """Counts of one journal; it belongs to the sweep that asked last (`journal_<N>.json`)."""
    numbered = {int(found[1] or 1): path for path in folder.iterdir() if (found := _JOURNAL.fullmatch(path.name))}
    first, last = _json(numbered[1]), _json(numbered[max(numbered)])
    try:
        tasks, rollouts, own = _extent(last)
        asked = math.prod(len(values) for values in last["axes"].values()) if last["axes"] else 0
        step, design = int(last["step"]), str(last["configuration"].get("design", "grid"))
        began = _extent(first)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{numbered[max(numbered)]} is not a journal of this project: {error!r}") from error
    finished, episodes, newest = 0, 0, None
    for cells, written in _points(folder / "points", began[:2]):
        count = _covered(cells, tasks, rollouts)
        finished += count == tasks * rollouts
        episodes += count
        newest = written if newest is None else max(newest, written)
    base = any((folder / name).is_file() for name in ("base.nc", *(f"base_{n}.nc" for n in numbered)))
    own_asked = tasks * own
    names = (f"landscape_{folder.name}.nc", f"{design}_step{step:06d}.nc", f"{folder.name}.nc")
    dataset = next((path for name in names if (path := folder.parent / name).is_file()), None)
    if dataset is not None and dataset.stat().st_mtime < numbered[max(numbered)].stat().st_mtime:
        dataset = None  # that of an earlier request, which this one grows
    return Landscape(
        name=folder.name,
        step=step,
        points=finished,
        points_asked=asked,
        episodes=episodes + own_asked * base,
        episodes_asked=asked * tasks * rollouts + own_asked,
        base=base,
        dataset=None if dataset is None else dataset.name,
        last=newest,
        moved_aside=sum(1 for _ in folder.rglob("*.corrupt")),
    )


def _extent(request: JsonObject) -> tuple[int, int, int]:
    """Tasks, rollouts at a point, and completions of the checkpoint's own batch."""
    env = request["configuration"]["env"]
    return int(env["num_prompts"]), int(env["rollouts"]), int(env.get("base_rollouts") or env["rollouts"])


_Cells = tuple[int, int, int, int]
"""First task, end of the tasks, first rollout, end of the rollouts."""


def _points(folder: Path, began: tuple[int, int]) -> Iterator[tuple[list[_Cells], float]]:
    """For every point with files: what each of them holds, by its name, and when the last one was written."""
    tasks, rollouts = began
    found: dict[str, tuple[list[_Cells], float]] = {}
    with contextlib.suppress(OSError):
        for item in os.scandir(folder):
            if not (named := _POINT.fullmatch(item.name)):
                continue
            point, *ends = named.groups()
            first, stop, low, high = (None if end is None else int(end) for end in ends)
            cells = (first or 0, tasks if stop is None else stop, low or 0, rollouts if high is None else high)
            with contextlib.suppress(FileNotFoundError):
                held, newest = found.get(point, ([], 0.0))
                found[point] = [*held, cells], max(newest, item.stat().st_mtime)
    yield from found.values()


def _covered(cells: Sequence[_Cells], tasks: int, rollouts: int) -> int:
    """Episodes of the first `tasks` × `rollouts` that some file holds."""
    if any(a <= 0 and b >= tasks and c <= 0 and d >= rollouts for a, b, c, d in cells):
        return tasks * rollouts
    held = bytearray(tasks * rollouts)
    for first, stop, low, high in cells:
        for task in range(first, min(stop, tasks)):
            end = min(high, rollouts)
            held[task * rollouts + low : task * rollouts + end] = b"\x01" * max(end - low, 0)
    return sum(held)


def _processes(output: Path, now: float) -> list[Process]:
    """Those that reported, of the newest number of shards, and any that is still at work."""
    found: list[tuple[int, Process]] = []
    for path in sorted(output.glob("process_*of*.json")):
        if not (named := _PROCESS.fullmatch(path.name)):
            continue
        with contextlib.suppress(StoreError, KeyError, TypeError):
            facts = _json(path)
            kept = {name: facts[name] for name in Process.__dataclass_fields__}
            process = Process(**kept)
            if process.state == MEASURING and not _is_there(process, now):
                process.state = DEAD
            found.append((int(named[2]), process))
    if not found:
        return []
    newest = max(found, key=lambda item: item[1].written)[0]
    kept_ones = [process for count, process in found if count == newest or process.at_work]
    return sorted(kept_ones, key=lambda process: int(process.shard.partition("/")[0]))


def _is_there(process: Process, now: float) -> bool:
    here = process.host == socket.gethostname()
    if now - process.written > (LOST_SECONDS if here else SILENT_SECONDS):
        return False
    if not here:
        return True
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total
