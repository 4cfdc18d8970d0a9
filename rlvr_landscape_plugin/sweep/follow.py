"""`--follow RUN`: measure each snapshot of a training run as it appears, on servers of the sweep's own.

A snapshot has its name only when it is whole, so the directory of the run is all that is watched: every few seconds,
snapshots without a dataset are measured, earliest step first, each as a sweep of its own with the same settings. It
ends when every step of the run's schedule (in the first snapshot's manifest) was measured or reported as failed by the
trainer, and with an error when no new snapshot came for `follow_patience` seconds. The same command continues.

What a snapshot's measurement takes from snapshots that come later cannot be followed and is refused: directions of the
training run, and designs other than the grid.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvr_landscape_analysis.schema import DIRECTIONS_FOLDER

from rlvr_landscape_plugin.config.designs import DRAWN_KINDS
from rlvr_landscape_plugin.errors import ConfigurationError, SnapshotError
from rlvr_landscape_plugin.schedule import parse_schedule
from rlvr_landscape_plugin.snapshot import Snapshot, find_snapshots, open_snapshot, step_of_path
from rlvr_landscape_plugin.sweep.heartbeat import Heartbeat

if TYPE_CHECKING:
    from rlvr_landscape_plugin.config import SweepConfig
    from rlvr_landscape_plugin.display import Display

EVERY = 2.0
"""Seconds between two looks into the directory."""


async def follow_run(config: SweepConfig, display: Display) -> list[Path]:
    """Measure the snapshots of `config.follow` as they appear; returns the datasets' paths.

    Raises `ConfigurationError` for what cannot be followed, and `SnapshotError` where snapshots stop coming.
    """
    from rlvr_landscape_plugin.sweep.run import run_sweep

    check_followable(config)
    run = config.follow
    assert run is not None
    measured: dict[int, list[Path]] = {}
    heartbeat = Heartbeat(config, display)
    async with heartbeat, contextlib.AsyncExitStack() as stack:
        since, scheduled = time.monotonic(), None
        while scheduled is None or not scheduled <= measured.keys() | failed_steps(run):
            waiting = [path for path in snapshots_of(run) if path not in {Path(done) for done in _sources(measured)}]
            for path in waiting:
                snapshot = whole(path, config.base_model)
                if scheduled is None:
                    scheduled = scheduled_steps(snapshot)
                    heartbeat.steps = sorted(scheduled)
                    config = await stack.enter_async_context(_served(config, snapshot, display))
                    display.say(f"following {run}: {_plan(scheduled)}")
                present = config.model_copy(update={"follow": None, "snapshots": [str(path)]})
                measured[snapshot.step] = [path, *await run_sweep(present, display, heartbeat)]
                since = time.monotonic()
            if not waiting:
                if time.monotonic() - since > config.follow_patience:
                    raise SnapshotError(_stopped(run, scheduled, measured.keys(), config.follow_patience))
                await asyncio.sleep(EVERY)
    if lost := sorted((scheduled or set()) - measured.keys()):
        display.say(f"the trainer could not keep the snapshots of steps {_steps(lost)}, see failures.jsonl")
    return [dataset for paths in measured.values() for dataset in paths[1:]]


def _sources(measured: Mapping[int, list[Path]]) -> list[Path]:
    return [paths[0] for paths in measured.values()]


def check_followable(config: SweepConfig) -> None:
    """Refuse settings that need snapshots which a running training has not written yet."""
    problems = {
        "shards would each wait for the others' snapshots; give one process several server.urls": config.shard
        is not None,
        f"design = {config.design!r} can look at later snapshots; only 'grid' can be followed": config.design != "grid",
        "directions of the training run need its later snapshots; only random ones can be followed": not {
            config.slice.alpha.kind,
            config.slice.beta.kind,
        }
        <= set(DRAWN_KINDS),
    }
    for reason, holds in problems.items():
        if holds:
            raise ConfigurationError(f"follow = {str(config.follow)!r}: {reason}")
    if config.dry_run:
        raise ConfigurationError(
            f"follow = {str(config.follow)!r} with dry_run: name one snapshot instead, --snapshots "
            f"{config.follow}/snapshots/step_000000 --dry-run, and multiply by the number of snapshots"
        )


def snapshots_of(run: Path) -> list[Path]:
    """The snapshots that are there now, by step; none while the run has not made its directory."""
    try:
        return [path for path in find_snapshots(run) if step_of_path(path) is not None]
    except SnapshotError:
        return []


def whole(path: Path, base: str | None = None) -> Snapshot:
    """The snapshot in `path`, verified; one without a manifest may still be written and is refused.

    `base`: the model that adapters belong to, where they do not name it.
    """
    snapshot = open_snapshot(path, base)
    if snapshot.manifest is None:
        raise SnapshotError(
            f"{path} has no manifest.json, so nothing tells whether it is whole yet; follow only runs whose snapshots "
            "this project writes, and measure others when training has ended"
        )
    snapshot.verify()
    return snapshot


def scheduled_steps(snapshot: Snapshot) -> set[int]:
    """The steps that the run will keep, from the configuration in a snapshot's manifest (prime-rl's or TRL's)."""
    assert snapshot.manifest is not None
    configuration: Mapping[str, Any] = snapshot.manifest.configuration
    trainer = configuration.get("trainer")
    if isinstance(trainer, Mapping):
        text, last = trainer.get("loss", {}).get("kwargs", {}).get("snapshots", _PRIME_RL_DEFAULT), "max_steps"
        end = trainer.get(last)
    else:
        text, end = configuration.get("snapshots"), configuration.get("steps")
    if not isinstance(text, str) or not isinstance(end, int):
        raise SnapshotError(
            f"{snapshot.path / 'manifest.json'} does not tell the run's schedule and its last step, so nothing would "
            "tell when to stop; measure its snapshots by --snapshots"
        )
    return {step for step in parse_schedule(text) if step <= end}


_PRIME_RL_DEFAULT = "0-10, 20-150:10"
"""The schedule of `prime_rl.adapter.LossKwargs` where the run sets none; a test compares the two."""


def failed_steps(run: Path) -> set[int]:
    """Steps whose snapshot the trainer could not write, from its failures.jsonl."""
    found: set[int] = set()
    for file in (run / folder / "failures.jsonl" for folder in ("snapshots", "adapters", ".")):
        if file.is_file():
            for line in file.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line may be half written
                    found.add(int(json.loads(line)["step"]))
    return found


@contextlib.asynccontextmanager
async def _served(config: SweepConfig, first: Snapshot, display: Display) -> AsyncIterator[SweepConfig]:
    """The configuration with servers for the whole run: those given, or one started here, which may read the run."""
    if config.server.urls:
        yield config
        return
    from rlvr_landscape_plugin.sweep.fleet import own_server

    log = Path(config.server.log or Path(config.output) / "server.log")
    display.say(f"starting a vLLM server for the whole run (log: {log})")
    folders = [first.path.parent, first.model, Path(config.output).resolve() / DIRECTIONS_FOLDER]
    async with own_server(config.server, first.model, folders, log, display) as local:
        server = config.server.model_copy(update={"urls": [local.url], "token": local.token})
        yield config.model_copy(update={"server": server})


def _plan(scheduled: set[int]) -> str:
    return f"{len(scheduled)} snapshots, steps {_steps(sorted(scheduled))}"


def _steps(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) if len(steps) <= 12 else f"{steps[0]} to {steps[-1]}"


def _stopped(run: Path, scheduled: set[int] | None, measured: Any, patience: float) -> str:
    if scheduled is None:
        return f"{run} had no snapshot for {patience:g} s (follow_patience); is this the directory of a run?"
    missing = _steps(sorted(scheduled - set(measured)))
    return (
        f"{run} had no new snapshot for {patience:g} s (follow_patience); steps {missing} are missing. What was "
        "measured is kept; the same command continues when training does"
    )
