"""A sweep from beginning to end; `command.py` is its command line.

For each snapshot and design: roll the checkpoint's own batch at the origin, then for every point move, roll out, score
and journal; at the end one netCDF per snapshot and design. The state of a sweep is the set of files under `output`: the
same command continues where an earlier one stopped, several servers share one queue of points, and several processes
(`--shard i/n`) share one `output`. With `--grid.find.*` probes choose each snapshot's range first; with
`--until-ci-width` a slice is measured in rounds until its correlation is known well enough.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvr_landscape_analysis.schema import DIRECTIONS_FOLDER, VERIFIER

from rlvr_landscape_plugin.config import SweepConfig
from rlvr_landscape_plugin.designs import Surroundings
from rlvr_landscape_plugin.directions import AXES, Trajectory
from rlvr_landscape_plugin.display import Display
from rlvr_landscape_plugin.errors import StoreError
from rlvr_landscape_plugin.files import JsonObject
from rlvr_landscape_plugin.snapshot import Snapshot
from rlvr_landscape_plugin.store import consolidate, holds, keep_record, read_record
from rlvr_landscape_plugin.sweep.fleet import Fleet, Server, check_server, mixed_versions, with_server_logs
from rlvr_landscape_plugin.sweep.growth import probes_identity, snapshot_identity
from rlvr_landscape_plugin.sweep.heartbeat import Heartbeat
from rlvr_landscape_plugin.sweep.jobs import BaseBatchOnce, RangeJob, SliceJob
from rlvr_landscape_plugin.sweep.plan import Plan, Portion, make_plans
from rlvr_landscape_plugin.sweep.pool import PointQueue, Pool
from rlvr_landscape_plugin.sweep.provenance import dataset_annotations, dataset_attributes
from rlvr_landscape_plugin.sweep.snapshots import check_tensors, open_snapshots

if TYPE_CHECKING:
    import verifiers.v1 as vf

    from rlvr_landscape_plugin.episodes import ChatFormat, OpenedTaskset
    from rlvr_landscape_plugin.sweep.point import PointMeter
    from rlvr_landscape_plugin.sweep.range_search import Coordinates, Probe

logger = logging.getLogger("rlvr_landscape.sweep")


async def run_sweep(config: SweepConfig, display: Display, heartbeat: Heartbeat | None = None) -> list[Path]:
    """Measure everything that `config` asks for and is not measured yet; returns the datasets' paths.

    `heartbeat`: of a process that measures more than this; default: one of its own.
    """
    from rlvr_landscape_plugin.episodes import open_tasks

    snapshots = open_snapshots(config)
    opened = open_tasks(config.env)
    config = with_path(config, opened, snapshots[0], display)
    fleet = Fleet(config, snapshots, display)
    async with contextlib.AsyncExitStack() as stack:
        if heartbeat is None:
            own = Heartbeat(config, display)
            own.steps, own.fleet = [snapshot.step for snapshot in snapshots], fleet
            await stack.enter_async_context(own)
        else:
            heartbeat.fleet = fleet
        await stack.enter_async_context(fleet)
        return await Sweep(config, snapshots, opened.env, opened.tasks, fleet, display).run()


def with_path(config: SweepConfig, opened: OpenedTaskset, first: Snapshot, display: Display) -> SweepConfig:
    """The configuration with the path of its episodes, which is said where it is not the chat loop.

    Raises `SnapshotError` or `ConfigurationError` where there are tools and the policy could not call them.
    """
    from rlvr_landscape_plugin.episodes import ChatFormat, check_tool_parser

    chosen: JsonObject = {"path": opened.path}
    if opened.path == "verifiers":
        parser = check_tool_parser(ChatFormat(first.model), config.env.tool_parser) if opened.has_tools else None
        chosen |= {"harness": dict(opened.harness or {}), "tool_parser": parser}
        tools = f", tool calls as {parser!r}" if parser else ""
        why = f": {opened.reason}" if opened.reason else ""
        display.say(
            f"episodes are played by verifiers' own agents (harness {chosen['harness'].get('id')!r}{tools}), which is "
            f"slower than the chat loop{why}"
        )
    return config.model_copy(update={"env": config.env.model_copy(update=chosen)})


@dataclass(frozen=True)
class Sweep:
    """Everything that the steps of a sweep share."""

    config: SweepConfig
    snapshots: Sequence[Snapshot]
    env: Any
    """The taskset's environment, from `episodes.open_environment`."""
    tasks: Sequence[vf.Task]
    fleet: Fleet
    display: Display
    known: dict[Path, Snapshot] = field(default_factory=dict)
    """Snapshots that are open already, by directory."""

    async def run(self) -> list[Path]:
        """Measure what is missing, then write the datasets that are whole; returns their paths."""
        self.known.update({snapshot.path: snapshot for snapshot in self.snapshots})
        plans = [plan for snapshot in self.snapshots for plan in await self.plans(snapshot)]
        missing = [0 if self.is_kept(plan) else len({portion.place for portion in plan.missing()}) for plan in plans]
        open_plans = [plan for plan, count in zip(plans, missing, strict=True) if count or not plan.concluded]
        if open_plans:
            self.begin()
            first = "" if self.config.until_ci_width is None else " first"
            slices = sum(len(plan.design.slices) for plan in open_plans)
            total = sum(len(plan.points) for plan in plans)
            episodes, more = self.config.env.num_prompts * self.config.env.rollouts, self.config.until_ci_width
            self.display.begin(total - sum(missing), total, episodes, at_least=more is not None)
            self.display.say(f"starting: {sum(missing)} points in {slices} slices to measure{first}")
        for plan in open_plans:
            await self.measure(plan, await self.pool(plan.snapshot))
        return [path for plan in plans if (path := self.write(plan)) is not None]

    def is_kept(self, plan: Plan) -> bool:
        """Whether a plan's dataset holds everything, so that none of its points has to be read again."""
        return plan.refinement is None and holds(plan.journal, plan.dataset) and plan.concluded

    async def pool(self, first: Snapshot) -> Pool[Server]:
        """The servers, which only snapshots that fit get."""
        self.begin()
        return await self.fleet.pool(first)

    def begin(self) -> None:
        """Where something is to be measured, which a finished sweep need not wait for: raise `SnapshotError` unless the
        first snapshot's chat template renders the tasks, all snapshots share it, and their tensors fit their
        architectures."""
        from rlvr_landscape_plugin.episodes import check_chat

        if not self.fleet.needed:
            check_chat([self.snapshots[0].model, *(snapshot.path for snapshot in self.snapshots)], self.tasks)
            check_tensors(self.snapshots)
            self.fleet.needed = True

    def prompts(self, count: int) -> str:
        """Hash of the first `count` tasks."""
        from rlvr_landscape_plugin.episodes import load_tasks, prompts_hash
        from rlvr_landscape_plugin.episodes.tasksets import CHAT

        tasks = self.tasks
        if count > len(tasks):
            env = self.config.env
            tasks = load_tasks(self.env, count, runtime=env.runtime is not None, path=env.path or CHAT)
        return prompts_hash(tasks[:count])

    @functools.cached_property
    def chat(self) -> ChatFormat:
        """Tokenizer and chat template, those of the first snapshot."""
        from rlvr_landscape_plugin.episodes import ChatFormat

        return ChatFormat(self.snapshots[0].model)

    @property
    def reward_mode(self) -> str:
        """What the taskset pays: the verifier's score, or a control."""
        return str(getattr(self.env.taskset.config.task, "reward_mode", VERIFIER))

    def meter(self, server: Server) -> PointMeter:
        """What measures points on one server. Raises `ServerRefusalError` for a server that does not fit."""
        from rlvr_landscape_plugin.episodes import EpisodeRunner
        from rlvr_landscape_plugin.sweep.point import PointMeter

        config = self.config
        check_server(config.server, server.client.url, server.facts)
        runner = EpisodeRunner(
            self.env,
            self.chat,
            server.client,
            config.sampling.max_tokens,
            int(server.facts["max_model_len"]),
            config.env.max_concurrent,
            keep_traces=config.save_traces,
            runtime=config.env.runtime is not None,
            path=config.env.path,
            tool_parser=config.env.tool_parser,
            timeout=config.env.timeout,
        )
        env, client = config.env, server.client
        return PointMeter(client, runner, self.tasks, env.rollouts, config.seed, config.surrogate, env.base_rollouts)

    async def plans(self, snapshot: Snapshot) -> list[Plan]:
        """The plans of the designs around one snapshot, whose journals are begun where there are none."""
        if not any(Path(self.config.output).glob(f"step{snapshot.step:06d}_*/journal.json")):
            self.begin()
        trajectory = Trajectory.around(snapshot, self.config.slice.run, self.known)
        around = Surroundings(trajectory, Path(self.config.output).resolve() / DIRECTIONS_FOLDER)
        if self.config.grid.find is not None:
            around = Surroundings(trajectory, around.folder, await self.find_range(around))
        return make_plans(self.config, around, self.prompts, self.reward_mode)

    async def find_range(self, around: Surroundings) -> JsonObject:
        """The range of a snapshot's grids, found before or now, by probes along the first slice."""
        from rlvr_landscape_plugin.sweep.range_search import find_range

        config, snapshot, settings = self.config, around.snapshot, self.config.grid.find
        assert settings is not None
        slice_ = around.prepare(config, config.slice.seeds[0])
        spec = {"slice": slice_.spec.as_dict(), "directions_fingerprint": slice_.fingerprint}
        identity = probes_identity(config, snapshot, self.prompts) | spec
        earlier = snapshot_identity(config, snapshot, self.prompts) | spec
        path = Path(config.output) / f"range_step{snapshot.step:06d}.json"
        found = read_record(path, identity, earlier)
        if found is not None and found.get("prompts_sha256") not in (None, self.prompts(found["prompts"])):
            raise StoreError(f"{path}: its probes had other tasks; choose another output directory")
        if found is None:
            pool = await self.pool(snapshot)
            tasks = min(settings.prompts, config.env.num_prompts)
            job = RangeJob(slice_, config.server.directions_memory, self.meter, self.display, tasks)
            episodes = tasks * config.env.rollouts

            async def probe(points: Sequence[Coordinates]) -> Sequence[Probe]:
                job.points = list(points)
                base = 0 if job.ready else tasks * config.env.own_rollouts
                self.display.open(f"step {snapshot.step}, range", 0, len(points), episodes, base)
                await pool.work(PointQueue(range(len(points))), job, new_slice=not job.ready)
                return [job.found[index] for index in range(len(points))]

            with with_server_logs(pool.servers):
                found = await find_range(config.grid, settings, probe)
            seed = config.slice.seeds[0]
            found |= {"prompts": tasks, "prompts_sha256": self.prompts(tasks)}
            found |= {"rollouts": config.env.rollouts, "slice": seed}
            found = keep_record(path, identity, found)
        note = f" ({found['note']})" if found["note"] else ""
        self.display.say(f"step {snapshot.step}: the configured range × {found['factor']:g}{note}")
        return found

    async def measure(self, plan: Plan, pool: Pool[Server]) -> None:
        """Measure this process's share of a plan and check that the weights came back to where they were."""
        for server in pool.servers:
            server.points, server.origin = 0, None
        if (earlier := plan.journal.all_facts()) and (warning := mixed_versions(pool.servers, earlier)):
            self.display.say(warning)
        base = BaseBatchOnce(plan.journal, self.display)
        with with_server_logs(pool.servers):
            missing = plan.missing()
            indices = sorted({plan.design.by_place[portion.place].slice for portion in missing}) or [0]
            for index, following in itertools.zip_longest(indices, indices[1:]):
                job = self.job(plan, index, base, following)
                await self.measure_slice(plan, index, job, pool, missing)
            await job.conclude(pool.servers)

    def job(self, plan: Plan, index: int, base: BaseBatchOnce, following: int | None) -> SliceJob:
        """The job of one slice of a plan; `following`: the slice that is measured next."""
        slice_ = plan.design.slices[index]
        if slice_.files:
            described = " | ".join(f"{axis} {slice_.description[axis]}" for axis in AXES)
            self.display.say(f"{self.label(plan, index)}: {described}")
        memory = self.config.server.directions_memory
        return SliceJob(plan, index, base, memory, self.meter, self.display, following)

    async def measure_slice(
        self, plan: Plan, index: int, job: SliceJob, pool: Pool[Server], portions: Sequence[Portion]
    ) -> None:
        """Measure the points of one slice; a progressive sweep in as many rounds as its interim looks ask for.

        `portions`: what was missing of the plan before its first slice.
        """
        display, shown, entered = self.display, 0, False
        while True:
            # Reading all finished points again, for each of many slices, would take longer than the loads.
            known = portions if plan.refinement is None else plan.missing()
            missing = [p for p in known if plan.design.by_place[p.place].slice == index]
            if plan.refinement:
                for look in plan.refinement.looks[shown:]:
                    display.say(f"{plan.design.label}: {plan.refinement.describe(look)}")
                shown = len(plan.refinement.looks)
            if not missing and entered:
                break
            total = sum(point.slice == index for point in plan.points)
            done = total - len({portion.place for portion in missing})
            asked = sum(len(portion.cells.tasks) * len(portion.cells.rollouts) for portion in missing)
            each = round(asked / len(missing)) if missing else 0
            display.open(self.label(plan, index), done, done + len(missing), each, plan.base_episodes)
            await pool.work(PointQueue(missing), job, new_slice=not entered)
            entered = True
            if plan.refinement is None:
                break
        if plan.refinement:
            display.say(f"{plan.design.label}: {plan.refinement.outcome}")

    def label(self, plan: Plan, index: int) -> str:
        """Name of a slice on the screen."""
        count = len(plan.design.slices)
        return plan.design.label if count == 1 else f"{plan.design.label}, slice {index + 1} of {count}"

    def write(self, plan: Plan) -> Path | None:
        """Write a plan's dataset; None if other shards have not measured all of their points."""
        if waiting := plan.waiting_for:
            self.display.say(f"{plan.dataset.name} is left to the shard that finishes last: {waiting}")
            return None
        if plan.larger is not None:
            self.display.say(f"dataset {plan.dataset}, which holds more than is asked for and stays as it is")
            return plan.dataset
        attributes = dataset_attributes(self.config, plan)
        path = consolidate(plan.journal, plan.dataset, attributes, dataset_annotations(self.config, plan), plan.subset)
        self.display.say(f"dataset {path}")
        return path
