"""What the servers of a crew do with a slice: enter it, measure probes or points of it, look back at the end.

After each measurement a server is asked where it stands, so that nothing is kept that other weights gave.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvr_landscape_plugin.directions import Axis, SliceSpec
from rlvr_landscape_plugin.errors import ServerError
from rlvr_landscape_plugin.snapshot import Snapshot
from rlvr_landscape_plugin.store import point_name, replace_text
from rlvr_landscape_plugin.sweep.pool import Cell

if TYPE_CHECKING:
    import xarray as xr

    from rlvr_landscape_plugin.display import Display
    from rlvr_landscape_plugin.episodes import Rollout
    from rlvr_landscape_plugin.serving.client import LandscapeClient
    from rlvr_landscape_plugin.sweep.plan import Plan
    from rlvr_landscape_plugin.sweep.point import BaseBatch, PointMeter
    from rlvr_landscape_plugin.sweep.range_search import Coordinates, Probe

LOADED = (
    *("parameters", "moving_parameters", "seconds", "move_path", "move_path_reason"),
    *("directions_memory", "directions_memory_reason", "directions_dtype"),
)
"""What a dataset keeps of a server's answer to loading the slice."""
ABSENT_SECONDS = 30.0
"""How long a server that is no longer in the slice may take to show its weights at the end."""


@dataclass
class Server:
    """A server in use: its client and what it said about itself."""

    client: LandscapeClient
    facts: dict[str, Any] = field(default_factory=dict)
    """Empty until it first answered."""
    log: Path | None = None
    present: bool = False
    """Whether it stands in the present slice (`crew.Member`)."""
    meter: PointMeter | None = None
    origin: list[dict[str, str]] | None = None
    """Checksums of its weights at the origin of the present slice."""
    points: int = 0
    """Points of the present slice that it measured."""


def lasting(facts: dict[str, Any]) -> dict[str, Any]:
    """What a dataset keeps of a server's facts: not where its weights stand now, nor where its files lie."""
    kept = {key: value for key, value in facts.items() if key not in ("at", "loaded", "state", "version")}
    return kept | {"model": Path(str(facts["model"])).name}


@dataclass(frozen=True)
class Target:
    """A slice as a server is told to take it in, and what it must then say of it."""

    snapshot: Snapshot
    spec: SliceSpec
    files: Mapping[Axis, Path]
    identity: Mapping[str, Any]


class Entry:
    """A slice, and how a server enters it."""

    def __init__(self, target: Target, meter: Callable[[Server], PointMeter], display: Display) -> None:
        self._target, self._identity = target, target.identity
        self._meter, self._display = meter, display
        self._base: BaseBatch | None = None
        self._first = asyncio.Lock()

    async def take_in(self, server: Server) -> None:
        """Bring a server to the origin of the slice."""
        snapshot, client = self._target.snapshot, server.client
        server.facts |= lasting(await client.info())
        server.meter = server.meter or self._meter(server)
        facts = await client.load(
            str(snapshot.path),
            self._target.spec.as_dict(),
            {axis: str(path) for axis, path in self._target.files.items()},
        )
        for key in ("snapshot_sha256", "directions_fingerprint"):
            if facts[key] != self._identity[key]:
                raise ServerError(
                    f"{client.url} has another {key} for {snapshot.path}: {facts[key]} there, "
                    f"{self._identity[key]} here; both sides must read the same files with the same NumPy"
                )
        asked = self._identity.get("configuration", {}).get("server", {}).get("directions_memory", "float32")
        if (facts["directions_dtype"] != "float32") != (asked == "half"):
            raise ServerError(
                f"{client.url} holds the directions in {facts['directions_dtype']}, which is another slice than "
                f"server.directions_memory = {asked!r}; change one of them (docs/servers.md)"
            )
        server.facts |= {key: facts[key] for key in LOADED}
        await client.move(0.0, 0.0)

    async def check_standing(self, server: Server, alpha: float, beta: float) -> None:
        """Raise unless the server stands where this sweep last moved it, in this snapshot and slice.

        Another client may have moved it meanwhile, or loaded another slice.
        """
        facts = await server.client.info()
        loaded = facts["loaded"] or {}
        ours = all(loaded.get(key) == self._identity[key] for key in ("snapshot_sha256", "directions_fingerprint"))
        if not ours or (facts["version"], facts["at"]) != (server.client.version, [alpha, beta]):
            raise ServerError(
                f"{server.client.url} no longer holds the weights of this sweep: another client moved it to weight "
                f"version {facts['version']}; exactly one sweep may use a server at a time"
            )

    def _show(self, alpha: float, beta: float, reward: float, data: xr.Dataset) -> None:
        seconds = sum(float(data[f"seconds_{part}"]) for part in ("move", "sample", "score"))
        self._display.point(alpha, beta, reward, float(data["kl_k1"].mean()), seconds)
        if failed := data.attrs.get("failed_episodes"):
            self._display.say(
                f"({alpha:g}, {beta:g}): {failed} of {data['status'].size} episodes failed; "
                f"the first one: {data.attrs['first_failure']}"
            )


class RangeJob(Entry):
    """Probes around one snapshot as the servers of a crew work on them (`crew.Job`)."""

    def __init__(self, target: Target, meter: Callable[[Server], PointMeter], display: Display, tasks: int) -> None:
        super().__init__(target, meter, display)
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
        await self.take_in(server)
        assert server.meter is not None
        async with self._first:
            if self._base is None:
                base = await server.meter.base(self._display.episode, self._tasks)
                await self.check_standing(server, 0.0, 0.0)
                self._base = base

    async def measure(self, server: Server, cell: Cell, wanted: Callable[[], bool]) -> None:
        """Measure one probe."""
        from rlvr_landscape_plugin.sweep.range_search import Probe

        assert server.meter is not None
        assert self._base is not None
        (index,) = cell
        alpha, beta = self.points[index]
        data, _ = await server.meter.point(self._base, alpha, beta, self._display.episode, self._tasks)
        await self.check_standing(server, alpha, beta)
        if wanted():
            self.found[index] = found = Probe.of(alpha, beta, data, self._base.tokens)
            self._show(alpha, beta, found.reward, data)


class SliceJob(Entry):
    """One slice as the servers of a crew work on it (`crew.Job`)."""

    def __init__(self, plan: Plan, meter: Callable[[Server], PointMeter], display: Display) -> None:
        super().__init__(Target(plan.snapshot, plan.spec, plan.files, plan.identity), meter, display)
        self._plan, self._journal = plan, plan.journal

    async def enter(self, server: Server) -> None:
        """Bring a server to the origin of the slice; the checkpoint's own batch exists afterwards."""
        await self.take_in(server)
        origin = await server.client.checksums()
        await self.check_standing(server, 0.0, 0.0)
        if server.origin is not None and server.origin != origin:
            raise ServerError(f"{server.client.url} came back with other weights at the origin than it had before")
        server.origin = origin
        await self._base_batch(server)

    async def _base_batch(self, server: Server) -> BaseBatch:
        """The checkpoint's own batch: the stored one, else measured by the first server that gets here."""
        from rlvr_landscape_plugin.sweep.point import BaseBatch

        assert server.meter is not None
        async with self._first:
            stored = self._journal.read_base()
            if stored is None:
                base = await server.meter.base(self._display.episode)
                if base.failures and base.failures.failed:
                    self._display.say(f"the checkpoint's own batch: {base.failures}")
                batch = base.to_dataset()
                await self.check_standing(server, 0.0, 0.0)
                stored = self._journal.write_base(batch.assign_attrs(server_dtype=server.facts["dtype"]))
            if server.facts["dtype"] != stored.attrs["server_dtype"]:
                raise ServerError(
                    f"{server.client.url} holds weights in {server.facts['dtype']}, the points in {self._journal.root} "
                    f"were measured in {stored.attrs['server_dtype']}; set server.dtype accordingly"
                )
            self._base = self._base or BaseBatch.from_dataset(stored)
            return self._base

    async def measure(self, server: Server, cell: Cell, wanted: Callable[[], bool]) -> None:
        """Measure a point and journal it, unless another server was first."""
        assert server.meter is not None
        assert self._base is not None
        i, j, start, stop = cell
        alpha, beta = float(self._journal.alphas[i]), float(self._journal.betas[j])
        # A part of the tasks is named as such; what holds all of them is a whole point.
        part = None if (start, stop) == (0, self._plan.prompts) else range(start, stop)
        data, batch = await server.meter.point(self._base, alpha, beta, self._display.episode, part)
        await self.check_standing(server, alpha, beta)
        if not wanted():
            return
        if server.meter.runner.keep_traces:
            _write_traces((self._journal.root / "traces" / point_name(i, j, part)).with_suffix(".jsonl"), batch)
        self._journal.write_point(i, j, data, part)
        server.points += 1
        self._show(alpha, beta, float(data["reward"].mean()), data)

    async def conclude(self, servers: Sequence[Server]) -> None:
        """After the last point: look at the origin again, compare the weights there, write down who measured."""
        from rlvr_landscape_plugin.sweep.point import rescored_dataset

        present = [server for server in servers if server.present]
        if not present:
            await self.enter(servers[0])
            servers[0].present = True
            present = [servers[0]]
        done, total = self._journal.status()
        if (done == total or self._plan.refinement) and self._journal.read_recheck() is None:
            await present[0].client.move(0.0, 0.0)
            base = await self._base_batch(present[0])
            recheck = await rescored_dataset(present[0].client, base)
            await self.check_standing(present[0], 0.0, 0.0)
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
            # One that is no longer present may be stopped for good; the others have a right to their time.
            async with asyncio.timeout(None if server.present else ABSENT_SECONDS):
                await server.client.move(0.0, 0.0)
                weights = await server.client.checksums()
                await self.check_standing(server, 0.0, 0.0)
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
