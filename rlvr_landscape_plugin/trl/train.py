"""Training in a run directory, from its last complete state on."""

from __future__ import annotations

import copy
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rlvr_landscape_plugin.config import TrainConfig
from rlvr_landscape_plugin.display import TrainingDisplay
from rlvr_landscape_plugin.errors import SnapshotError
from rlvr_landscape_plugin.snapshot import Snapshot, open_snapshot
from rlvr_landscape_plugin.tracking import require
from rlvr_landscape_plugin.trl.batch import evaluation_metrics
from rlvr_landscape_plugin.trl.run_directory import WEIGHT_FILES, RunDirectory, Save, alone
from rlvr_landscape_plugin.trl.states import check_state, complete_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlvr_landscape_plugin.trl.server import PolicyServer, Practice
    from rlvr_landscape_plugin.trl.trainer import LandscapeGRPOTrainer


def train(config: TrainConfig) -> None:
    """Train from the last complete state, or from the start, to `config.steps`."""
    require(config.log)
    run = RunDirectory(config, open_snapshot(config.model))
    with alone(run.root), TrainingDisplay(config.steps, config.batch) as display:
        states = complete_states(run.states)
        step, state = states[-1] if states else (0, None)
        if step >= config.steps:
            display.say(f"{run.root} has {step} steps already; raise steps to continue")
            return
        if state is not None:
            check_state(state)
        run.rewind(step)
        Training(config, run, display).go(step, state)


def load_policy(base: Snapshot) -> PreTrainedModel:
    """The policy in float32, on the CPU. Raises `SnapshotError` where transformers cannot make it from `base`, and for
    weights that are not finite."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlvr_landscape_plugin.snapshot.architecture import check_architecture

    if base.adapter is not None:
        raise SnapshotError(f"{base.path} is an adapter; training starts from a whole model, with or without [lora]")
    # Otherwise weights that are missing would be drawn at random, with a warning only.
    if reason := check_architecture(base):
        raise SnapshotError(f"transformers cannot make a model from {base.path / 'config.json'}: {reason}")
    base.check_finite()
    return AutoModelForCausalLM.from_pretrained(str(base.path), dtype=torch.float32, local_files_only=True)


class Training:
    """One command's share of a run. It does what the trainer announces (`trainer.Hooks`): journal, evaluate, keep."""

    def __init__(self, config: TrainConfig, run: RunDirectory, display: TrainingDisplay) -> None:
        self.config, self.run, self.display = config, run, display
        self.server: PolicyServer
        self.held_out: Practice
        self.trainer: LandscapeGRPOTrainer

    def go(self, step: int, state: Path | None) -> None:
        """Train from `state`, of step `step`, or from the start."""
        import torch
        import transformers

        from rlvr_landscape_plugin.trl.server import PolicyServer, Practice
        from rlvr_landscape_plugin.trl.trainer import make_trainer

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        config, run = self.config, self.run
        practised = Practice.practised(config)
        self.held_out = Practice.held_out(config)
        model = load_policy(run.base)
        base = copy.deepcopy(model)
        self.display.say(f"starting a vLLM server for {run.base.path.name} (log: {run.log})")
        with PolicyServer(config, run.base, run.scratch, run.log) as self.server:
            tokenizer = self.server.tokenizer
            self.trainer = make_trainer(config, model, base, tokenizer, self.server, practised, run.states, self)
            if state is None:
                self.evaluate(0)
                self._snapshot(self.trainer.save_policy, 0)
            else:
                self.display.say(f"continuing from step {step}")
                self.trainer.reference.restore(state)
                self._snapshot(lambda folder: _copy_weights(state, folder), step)
            self.display.start(step)
            self.trainer.train(resume_from_checkpoint=str(state) if state is not None else None)

    def episode(self) -> None:
        """An episode of the batch finished."""
        self.display.episode()

    def metrics(self, step: int, record: dict[str, float]) -> None:
        """Write the line of a step."""
        self.run.metrics.append({"step": step, **record})
        self.display.step(step, record)

    def evaluate(self, step: int) -> float | None:
        """Evaluate on the held-out tasks if it is time; returns their mean reward."""
        every = self.config.evaluation.every
        due = step % every == 0 or step == self.config.steps
        if not due or self.run.evaluations.at(step) is not None:
            return None
        started = time.perf_counter()
        self.server.push(self.trainer.save_policy, step)
        indices = range(len(self.held_out.tasks))
        groups = self.server.roll(self.held_out, indices, self.config.evaluation.rollouts, "held-out")
        first = self.run.evaluations.at(0)
        start = first["task_rewards"] if first else None
        found = evaluation_metrics(groups, self.config.evaluation.threshold, start)
        self.run.evaluations.append({"step": step, **found, "seconds": time.perf_counter() - started})
        gain = f"  gain {found['gain']:+.3f} ± {found['gain_se'] or 0:.3f}" if "gain" in found else ""
        reward, error = found["reward"], found["reward_se"] or 0
        self.display.say(f"step {step}  held-out reward {reward:.3f} ± {error:.3f}{gain}")
        return reward

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.display.say(text)

    def reset(self, step: int, reason: str) -> None:
        """Write down that the KL reference was reset."""
        self.run.resets.append({"step": step, "reason": reason})
        self.display.say(f"step {step}  KL reference and optimizer reset ({reason})")

    def wants_state(self, step: int) -> bool:
        """Whether a training state is to be kept at this step."""
        return step in self.run.schedule or step % self.config.state_every == 0 or step == self.config.steps

    def saved(self, step: int, state: Path) -> None:
        """Keep the snapshot of a step whose training state is complete."""
        self._snapshot(self.trainer.save_policy, step)

    def _snapshot(self, save: Save, step: int) -> None:
        if path := self.run.snapshot(save, step):
            self.display.say(f"snapshot {path}")


def _copy_weights(state: Path, folder: Path) -> None:
    for file in state.iterdir():
        if file.suffix == ".safetensors" or file.name in WEIGHT_FILES:
            shutil.copyfile(file, folder / file.name)
