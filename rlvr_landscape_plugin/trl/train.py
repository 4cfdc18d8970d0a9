"""Training in a run directory, from its last complete state on."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from rlvr_landscape_plugin.config import TrainConfig
from rlvr_landscape_plugin.snapshot import open_snapshot
from rlvr_landscape_plugin.trl.batch import evaluation_metrics
from rlvr_landscape_plugin.trl.run_directory import WEIGHT_FILES, Run, alone


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


def _train(config: TrainConfig, run: Run, display: Display) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    from rlvr_landscape_plugin.trl.server import PolicyServer, Practice
    from rlvr_landscape_plugin.trl.states import complete_states
    from rlvr_landscape_plugin.trl.trainer import Hooks, make_trainer

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
        if file.suffix == ".safetensors" or file.name in WEIGHT_FILES:
            shutil.copyfile(file, folder / file.name)


def _log(config: TrainConfig) -> Path:
    return config.server.log or config.output / "server.log"
