"""What the servers of a pool do with a slice: load it, measure probes or points of it, compare the origin at the end.

After each measurement a server is asked for its snapshot, slice and weight version, so that no value is kept that comes
from other weights.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlvr_landscape_analysis.schema import TRACES_FOLDER

from rlvr_landscape_plugin.errors import ServerError
from rlvr_landscape_plugin.store import Journal, replace_text
from rlvr_landscape_plugin.sweep.fleet import Server, facts_to_keep

if TYPE_CHECKING:
    import xarray as xr

    from rlvr_landscape_plugin.directions import PreparedSlice
    from rlvr_landscape_plugin.display import Display
    from rlvr_landscape_plugin.episodes import Rollout
    from rlvr_landscape_plugin.files import JsonObject
    from rlvr_landscape_plugin.serving.client import LandscapeClient
    from rlvr_landscape_plugin.sweep.plan import Plan, Portion
    from rlvr_landscape_plugin.sweep.point import BaseBatch, PointMeter
    from rlvr_landscape_plugin.sweep.range_search import Coordinates, Probe

    MakeMeter = Callable[[Server], PointMeter]

LOADED = (
    *("parameters", "moving_parameters", "seconds", "move_path", "move_path_reason"),
    *("directions_memory", "directions_memory_reason", "directions_dtype"),
)
"""What a dataset keeps of a server's answer to loading the slice."""
ABSENT_SECONDS = 30.0
"""How long a server that is no longer in the slice may take to show its weights at the end."""


class Job:
    """A slice, and how a server loads it."""

    def __init__(self, slice_: PreparedSlice, directions_memory: str, meter: MakeMeter, display: Display) -> None:
        """`directions_memory`: what `server.directions_memory` asks for; a server that rounds the directions
        differently is refused."""
        self._slice, self._directions_memory = slice_, directions_memory
        self._meter, self._display = meter, display

    async def load(self, server: Server) -> None:
        """Let a server load the slice and move to its origin."""
        snapshot, client = self._slice.snapshot, server.client
        told = await client.info()
        server.draws_ahead = bool(told.get("draws_ahead"))
        server.facts |= facts_to_keep(told)
        server.meter = server.meter or self._meter(server)
        files = {axis: str(path) for axis, path in self._slice.files.items()}
        base = "" if snapshot.base is None else str(snapshot.base.path)
        facts = self._held(client, told) or await client.load(
            str(snapshot.path), self._slice.spec.as_dict(), files, base
        )
        for key, ours in self._fingerprints.items():
            if facts[key] != ours:
                raise ServerError(
                    f"{client.url} has another {key} for {snapshot.path}: {facts[key]} there, "
                    f"{ours} here; both sides must read the same files with the same NumPy"
                )
        if (facts["directions_dtype"] != "float32") != (self._directions_memory == "half"):
            raise ServerError(
                f"{client.url} holds the directions in {facts['directions_dtype']}, which is another slice than "
                f"server.directions_memory = {self._directions_memory!r}; change one of them (docs/servers.md)"
            )
        server.facts |= {key: facts[key] for key in LOADED}
        for error in facts.get("ahead", {}).get("errors", ()):
            self._display.say(
                f"{client.url} could not draw slice {self._slice.spec.seed} ahead ({error}); it was drawn when it was "
                "loaded, which changes no number"
            )
        await client.move(0.0, 0.0)

    def _held(self, client: LandscapeClient, told: JsonObject) -> JsonObject | None:
        """What the server said when this client loaded the slice, if it still holds it; probes may have loaded it.

        `told`: what the server says of itself now.
        """
        loaded = told["loaded"] or {}
        if told["state"] != "clean" or client.loaded is None or loaded.get("load") != client.loaded:
            return None
        return loaded if all(loaded.get(key) == value for key, value in self._fingerprints.items()) else None

    @property
    def _fingerprints(self) -> dict[str, str]:
        """What a server reports about a snapshot and slice, and what it has to report."""
        return {
            "snapshot_sha256": self._slice.snapshot.sha256,
            "directions_fingerprint": self._slice.fingerprint,
        }

    async def check_weights(self, server: Server, alpha: float, beta: float) -> None:
        """Raise unless the server still holds the weights of this sweep's last move, in this snapshot and slice.

        Another client may have moved it meanwhile, or loaded another slice.
        """
        facts = await server.client.info()
        loaded = facts["loaded"] or {}
        ours = all(loaded.get(key) == value for key, value in self._fingerprints.items())
        if not ours or (facts["version"], facts["at"]) != (server.client.version, [alpha, beta]):
            raise ServerError(
                f"{server.client.url} no longer holds the weights of this sweep: another client moved it to weight "
                f"version {facts['version']}; exactly one sweep may use a server at a time"
            )

    def _show(self, alpha: float, beta: float, reward: float, data: xr.Dataset) -> None:
        seconds = sum(float(data[f"seconds_{part}"]) for part in ("move", "sample", "score"))
        kl = float(data["kl_k1"].mean()) if "kl_k1" in data else math.nan
        self._display.point(alpha, beta, reward, kl, seconds)
        if failed := data.attrs.get("failed_episodes"):
            self._display.failed(int(failed))
            self._display.say(
                f"({alpha:g}, {beta:g}): {failed} of {data['status'].size} episodes failed; "
                f"the first one: {data.attrs['first_failure']}"
            )


class RangeJob(Job):
    """Probes around one snapshot as the servers of a pool work on them (`pool.Job`)."""

    def __init__(
        self, slice_: PreparedSlice, directions_memory: str, meter: MakeMeter, display: Display, tasks: int
    ) -> None:
        """`tasks`: the first so many are probed."""
        super().__init__(slice_, directions_memory, meter, display)
        self._base: BaseBatch | None = None
        self._first = asyncio.Lock()
        self._tasks = range(tasks)
        self.points: list[Coordinates] = []
        self.found: dict[int, Probe] = {}
        """Index into `points` → what was measured there."""

    @property
    def ready(self) -> bool:
        """Whether the checkpoint's own batch exists."""
        return self._base is not None

    async def enter(self, server: Server) -> None:
        """Bring a server to the origin; the checkpoint's own batch on the tasks of a probe exists afterwards."""
        await self.load(server)
        assert server.meter is not None
        async with self._first:
            if self._base is None:
                base = await server.meter.base(self._display.episode, self._tasks)
                await self.check_weights(server, 0.0, 0.0)
                self._base = base

    async def measure(self, server: Server, portion: int, wanted: Callable[[], bool]) -> None:
        """Measure one probe: `portion` is its index into `points`."""
        from rlvr_landscape_plugin.sweep.range_search import Probe

        assert server.meter is not None
        assert self._base is not None
        alpha, beta = self.points[portion]
        data, _ = await server.meter.point(self._base, alpha, beta, self._display.episode, self._tasks)
        await self.check_weights(server, alpha, beta)
        if wanted():
            self.found[portion] = found = Probe.of(alpha, beta, data, self._base.tokens)
            self._show(alpha, beta, found.reward, data)


class BaseBatchOnce:
    """The checkpoint's own batch of a journal: the stored one, or else the one that the first server measures."""

    def __init__(self, journal: Journal, display: Display) -> None:
        self._journal, self._display = journal, display
        self._batch: BaseBatch | None = None
        self._first = asyncio.Lock()

    @property
    def batch(self) -> BaseBatch:
        """The batch, which exists once a server has entered a slice."""
        assert self._batch is not None
        return self._batch

    async def get(self, server: Server, job: Job) -> BaseBatch:
        """The batch; `server` stands at the origin of the job's slice."""
        from rlvr_landscape_plugin.sweep.point import BaseBatch

        assert server.meter is not None
        async with self._first:
            stored = self._journal.read_base()
            earlier = [] if stored is not None else self._journal.read_bases()
            for known in (*earlier, *([] if stored is None else [stored])):
                self._check_dtype(server, known)
            if stored is None:
                batches = [BaseBatch.from_dataset(known) for known in earlier]
                base = await server.meter.base(self._display.episode, earlier=batches)
                if base.failures and base.failures.failed:
                    self._display.say(f"the checkpoint's own batch: {base.failures}")
                batch = base.to_dataset()
                await job.check_weights(server, 0.0, 0.0)
                stored = self._journal.write_base(batch.assign_attrs(server_dtype=server.facts["dtype"]))
                self._check_dtype(server, stored)
            self._batch = self._batch or BaseBatch.from_dataset(stored)
            return self._batch

    def _check_dtype(self, server: Server, stored: xr.Dataset) -> None:
        if server.facts["dtype"] != stored.attrs["server_dtype"]:
            raise ServerError(
                f"{server.client.url} holds weights in {server.facts['dtype']}, the points in {self._journal.root} "
                f"were measured in {stored.attrs['server_dtype']}; set server.dtype accordingly"
            )


class SliceJob(Job):
    """One slice of a plan as the servers of a pool work on it (`pool.Job`)."""

    def __init__(
        self,
        plan: Plan,
        index: int,
        base: BaseBatchOnce,
        directions_memory: str,
        meter: MakeMeter,
        display: Display,
        following: int | None = None,
    ) -> None:
        """`index`: which slice of the plan's design; `base`: shared by all of them; `following`: the next slice."""
        super().__init__(plan.design.slices[index], directions_memory, meter, display)
        self._following = None if following is None else plan.design.slices[following]
        self._plan, self._journal, self._base = plan, plan.journal, base

    async def enter(self, server: Server) -> None:
        """Bring a server to the origin of the slice; the checkpoint's own batch exists afterwards."""
        await self.load(server)
        origin = await server.client.checksums()
        await self.check_weights(server, 0.0, 0.0)
        if server.origin is not None and server.origin != origin:
            raise ServerError(f"{server.client.url} came back with other weights at the origin than it had before")
        server.origin = origin
        await self._draw_ahead(server)
        await self._base.get(server, self)

    async def _draw_ahead(self, server: Server) -> None:
        """Let a server draw the next slice while it measures this one; a refusal costs time only, and is said once."""
        if self._following is None or self._following.files or not server.draws_ahead:
            return
        try:
            answer = await server.client.draw_ahead(self._following.spec.as_dict())
            reason = "" if answer["begun"] else str(answer["reason"])
        except ServerError as error:
            reason = str(error)
        if reason and reason != server.said:
            self._display.say(f"{server.client.url} draws no directions ahead: {reason}")
        server.said = reason

    async def measure(self, server: Server, portion: Portion, wanted: Callable[[], bool]) -> None:
        """Measure a portion of a point and journal it, unless another server was first."""
        assert server.meter is not None
        base = self._base.batch
        point = self._plan.design.by_place[portion.place]
        cells = portion.cells
        data, batch = await server.meter.point(
            base, point.alpha, point.beta, self._display.episode, cells.tasks, cells.rollouts, cells.scored > 0
        )
        await self.check_weights(server, point.alpha, point.beta)
        if not wanted():
            return
        if server.meter.runner.keep_traces and batch:
            name = self._journal.names.name(point.place, cells)
            _write_traces((self._journal.root / TRACES_FOLDER / name).with_suffix(".jsonl"), batch)
        self._journal.write_point(point.place, data, cells)
        server.points += 1
        server.measured += 1
        self._show(point.alpha, point.beta, float(data["reward"].mean()) if "reward" in data else math.nan, data)

    async def conclude(self, servers: Sequence[Server]) -> None:
        """After the last point: recheck the origin, compare the weights there, record which servers measured."""
        from rlvr_landscape_plugin.sweep.point import rescored_dataset

        present = [server for server in servers if server.present]
        if not present:
            await self.enter(servers[0])
            servers[0].present = True
            present = [servers[0]]
        done, total = self._journal.status()
        if (done == total or self._plan.refinement) and self._journal.read_recheck() is None:
            await present[0].client.move(0.0, 0.0)
            base = await self._base.get(present[0], self)
            recheck = await rescored_dataset(present[0].client, base)
            await self.check_weights(present[0], 0.0, 0.0)
            self._journal.write_recheck(recheck)
        used = [server for server in servers if server.present or server.points]
        for server in used:
            checked = await self._came_back(server)
            server.facts |= {"points": server.points, "origin_checked_after": checked}
            if not checked:
                self._display.say(f"{server.client.url} left before the end; its weights were not compared again")
        earlier = self._journal.read_facts(self._plan.own_facts) or []
        self._journal.write_facts(self._plan.own_facts, earlier + [server.facts for server in used])

    async def _came_back(self, server: Server) -> bool:
        """Whether the weights at the origin could be compared with those before; raises if they differ."""
        try:
            # A server that has left may never answer again, so it is not waited for as long as the others.
            async with asyncio.timeout(None if server.present else ABSENT_SECONDS):
                await server.client.move(0.0, 0.0)
                weights = await server.client.checksums()
                await self.check_weights(server, 0.0, 0.0)
        except (ServerError, TimeoutError):
            if server.present:
                raise
            return False
        if weights != server.origin:
            raise ServerError(
                f"{server.client.url}: the weights at the origin are not bit-identical to those before the sweep; "
                "do not trust the points of this slice"
            )
        return True


def _write_traces(path: Path, batch: Sequence[Sequence[Rollout]]) -> None:
    """Traces of one point in verifiers' own record format, one JSON object per line."""
    traces = (rollout.trace for row in batch for rollout in row if rollout.trace is not None)
    replace_text(path, (json.dumps(trace.to_record()) + "\n" for trace in traces))
