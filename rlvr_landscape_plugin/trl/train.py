"""A run directory, and training in it.

    run.json            identity: run id, parent run, configuration, checksum of the starting policy
    metrics.jsonl       one line per step
    evaluations.jsonl   one line per held-out look
    resets.jsonl        one line per reset of the KL reference, where [reference] asks for resets
    snapshots/          step_<N>/, what sweeps measure
    state/              checkpoint-<N>/, what a killed run continues from; the last two
    server.log          the vLLM server's

The same command continues a run that was killed; another configuration in the same directory is refused. Lines of steps
after the state that a run continues from are dropped: those steps are trained again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlvr_landscape_plugin.config import TrainConfig
from rlvr_landscape_plugin.errors import StoreError
from rlvr_landscape_plugin.schedule import parse_schedule
from rlvr_landscape_plugin.snapshot import MANIFEST, Manifest, Snapshot, open_snapshot, snapshot_name, write_snapshot
from rlvr_landscape_plugin.trl.batch import evaluation_metrics

_WEIGHTS = {"model.safetensors.index.json", MANIFEST}


class Lines:
    """A journal of JSON lines keyed by step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Every whole line; a line that a kill cut short is passed over."""
        if not self.path.is_file():
            return []
        lines = []
        for text in self.path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
        return lines

    def at(self, step: int) -> dict[str, Any] | None:
        """The line of a step."""
        return next((line for line in self.read() if line["step"] == step), None)

    def append(self, line: dict[str, Any]) -> None:
        """Add a line and sync it."""
        with self.path.open("a") as sink:
            sink.write(json.dumps(line) + "\n")
            sink.flush()
            os.fsync(sink.fileno())

    def keep_until(self, step: int) -> None:
        """Drop the lines of later steps, and what is left of a line cut short."""
        text = "".join(json.dumps(line) + "\n" for line in self.read() if line["step"] <= step)
        _write(self.path, text)


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.write_text(text)
    os.replace(scratch, path)


class Run:
    """The directory of one run."""

    def __init__(self, config: TrainConfig, base: Snapshot) -> None:
        self.config, self.base = config, base
        self.root = config.output
        self.metrics = Lines(self.root / "metrics.jsonl")
        self.evaluations = Lines(self.root / "evaluations.jsonl")
        self.resets = Lines(self.root / "resets.jsonl")
        self.states = self.root / "state"
        self.snapshots = self.root / "snapshots"
        self.schedule = set(parse_schedule(config.snapshots))
        self.identity = self._open()

    def _open(self) -> dict[str, Any]:
        wanted = {
            "configuration": self.config.provenance(),
            "policy_sha256": self.base.sha256,
        }
        file = self.root / "run.json"
        if not file.is_file():
            if self.root.is_dir() and any(self.root.iterdir()):
                raise StoreError(f"{self.root} is not empty and no run; give output another directory")
            self.root.mkdir(parents=True, exist_ok=True)
            parent = self.base.manifest.run if self.base.manifest is not None else ""
            identity = {"id": uuid.uuid4().hex, "parent_run": parent or None, **wanted}
            _write(file, json.dumps(identity, indent=1) + "\n")
            return identity
        try:
            stored = json.loads(file.read_text())
            known = {key: stored[key] for key in ("id", "parent_run", *wanted)}
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{file} is damaged ({error!r}); give output another directory") from error
        differing = _differences(known["configuration"], wanted["configuration"])
        if known["policy_sha256"] != wanted["policy_sha256"]:
            differing.append(f"the starting policy ({self.config.model}) has other bytes than before")
        if differing:
            raise StoreError(
                f"{self.root} holds a run of another configuration: {'; '.join(differing)}; "
                "give output another directory"
            )
        return known

    def fill(self, save: Any, folder: Path) -> None:
        """Put a policy into `folder`: weights from `save`, everything else byte for byte from the starting policy."""
        save(folder)
        for file in folder.iterdir():
            if file.suffix != ".safetensors" and file.name not in _WEIGHTS:
                file.unlink()
        for file in self.base.path.iterdir():
            if file.is_file() and file.suffix not in (".safetensors", ".md") and file.name not in _WEIGHTS:
                shutil.copyfile(file, folder / file.name)

    def snapshot(self, save: Any, step: int) -> Path | None:
        """Write the snapshot of `step` if the schedule names it and it is not there yet."""
        target = self.snapshots / snapshot_name(step)
        if step not in self.schedule or target.exists():
            return None
        line = dict(self.metrics.at(step) or {})
        look = dict(self.evaluations.at(step) or {})
        look.pop("task_rewards", None)
        manifest = Manifest(
            step=step,
            trainer={"name": "trl", "version": version("trl")},
            run=self.identity["id"],
            parent_run=self.identity["parent_run"],
            configuration=self.config.provenance(),
            objective=self.config.objective.model_dump(mode="json"),
            metrics=line | ({"evaluation": look} if look else {}),
        )
        return write_snapshot(self.snapshots, manifest, lambda folder: self.fill(save, folder))


def _differences(stored: Any, wanted: Any, path: str = "") -> list[str]:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        return [
            text
            for key in sorted({*stored, *wanted})
            for text in _differences(stored.get(key), wanted.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if stored == wanted else [f"{path} was {stored!r}, is {wanted!r}"]


class Display:
    """Progress on stderr: a bar on a terminal, one line per step elsewhere."""

    def __init__(self, steps: int, batch: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, note="")
        self._batch, self._episodes, self._last = batch, 0, ""

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, markup=False)

    def start(self, step: int) -> None:
        """Where the run continues."""
        self._bar.update(self._task, completed=step)

    def episode(self) -> None:
        """An episode finished."""
        self._episodes += 1
        self._bar.update(self._task, note=f"{self._last}  {self._episodes}/{self._batch} episodes")

    def step(self, step: int, record: dict[str, Any]) -> None:
        """A step finished."""
        self._episodes = 0
        self._last = (
            f"reward {record['reward']:.3f}  entropy {record['entropy']:.3f} nat  "
            f"KL from base {record['kl_base']:.3f} nat"
        )
        self._bar.update(self._task, completed=step, note=self._last)
        if not self._console.is_terminal:
            self.say(f"step {step}  {self._last}  {record['seconds']:.1f} s")


def train(config: TrainConfig) -> None:
    """Train from the last complete state, or from the start, to `config.steps`."""
    base = open_snapshot(config.model)
    run = Run(config, base)
    with alone(run.root), Display(config.steps, config.batch) as display:
        _train(config, run, display)


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Hold the run's directory; raises `StoreError` where another process trains in it. A killed one holds nothing."""
    with (root / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(
                f"another process is training in {root}; wait for it, or give output another one"
            ) from error
        yield


def _train(config: TrainConfig, run: Run, display: Display) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    from rlvr_landscape_plugin.trl.server import PolicyServer, Practice
    from rlvr_landscape_plugin.trl.trainer import Hooks, complete_states, make_trainer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    states = complete_states(run.states)
    step, state = states[-1] if states else (0, None)
    whole = {path for _, path in states}
    if step >= config.steps:
        display.say(f"{run.root} has {step} steps already; raise steps to continue")
        return
    run.metrics.keep_until(step)
    run.evaluations.keep_until(step)
    if run.resets.path.is_file():
        run.resets.keep_until(step)
    for leftover in run.states.glob("checkpoint-*"):
        if leftover not in whole:
            shutil.rmtree(leftover)
    for leftover in run.snapshots.glob(".step_*.tmp"):
        shutil.rmtree(leftover)

    practice = Practice(config.env.id, dict(config.env.taskset), config.env.num_tasks)
    held_out = Practice(config.env.id, config.held_out_taskset, config.evaluation.num_tasks)
    model, base = (
        AutoModelForCausalLM.from_pretrained(str(run.base.path), dtype=torch.float32, local_files_only=True)
        for _ in range(2)
    )
    display.say(f"starting a vLLM server for {run.base.path.name} (log: {_log(config)})")
    with PolicyServer(config, run.base, run.root / "scratch", _log(config)) as server:

        def evaluate(at: int) -> float | None:
            due = at % config.evaluation.every == 0 or at == config.steps
            if not due or run.evaluations.at(at) is not None:
                return None
            started = time.perf_counter()
            server.push(trainer.save_policy, at)
            indices = range(config.evaluation.num_tasks)
            cells = server.roll(held_out, indices, config.evaluation.rollouts, "held-out")
            first = run.evaluations.at(0)
            look = evaluation_metrics(cells, config.evaluation.threshold, first["task_rewards"] if first else None)
            run.evaluations.append({"step": at, **look, "seconds": time.perf_counter() - started})
            gain = f"  gain {look['gain']:+.3f} ± {look['gain_se'] or 0:.3f}" if "gain" in look else ""
            display.say(f"step {at}  held-out reward {look['reward']:.3f} ± {look['reward_se'] or 0:.3f}{gain}")
            return look["reward"]

        def reset(at: int, reason: str) -> None:
            run.resets.append({"step": at, "reason": reason})
            display.say(f"step {at}  KL reference and optimizer reset ({reason})")

        def metrics(at: int, record: dict[str, Any]) -> None:
            run.metrics.append({"step": at, **record})
            display.step(at, record)

        def saved(at: int, folder: Path) -> None:
            if path := run.snapshot(trainer.save_policy, at):
                display.say(f"snapshot {path}")

        def wants_state(at: int) -> bool:
            return at in run.schedule or at % config.state_every == 0 or at == config.steps

        hooks = Hooks(metrics, evaluate, reset, saved, display.episode, wants_state)
        tokenizer = server.tokenizer
        trainer = make_trainer(config, model, base, tokenizer, server, practice, run.states, hooks)
        if state is None:
            evaluate(0)
            if path := run.snapshot(trainer.save_policy, 0):
                display.say(f"snapshot {path}")
        else:
            display.say(f"continuing from step {step}")
            trainer.restore_reference(state)
            if path := run.snapshot(lambda folder: _copy_weights(state, folder), step):
                display.say(f"snapshot {path}")
        display.start(step)
        trainer.train(resume_from_checkpoint=str(state) if state is not None else None)


def _copy_weights(state: Path, folder: Path) -> None:
    for file in state.iterdir():
        if file.suffix == ".safetensors" or file.name in _WEIGHTS:
            shutil.copyfile(file, folder / file.name)


def _log(config: TrainConfig) -> Path:
    return config.server.log or config.output / "server.log"
