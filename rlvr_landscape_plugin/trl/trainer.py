"""TRL's GRPOTrainer with the project's rollouts, objective, metrics, states and snapshots.

What is replaced, and why: the rollout function (episodes of the project against the project's server), the advantages
(`objectives.group_advantages`, the same numbers as in the landscape's surrogate) and the loss
(`objectives.Objective`). One call of the objective sees an update's whole share of the batch, so every objective is
exact, those with statistics of the batch included.

Order within a step, which is what makes a killed run resumable: update · metrics line · evaluation · training state,
complete only with its marker · snapshot. So a snapshot exists only where a state at its step or later exists, and no
step with a snapshot is ever trained twice.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import TrainerControl, TrainerState

with warnings.catch_warnings():
    # TRL's own vLLM client is not used; which versions of vLLM that one supports is of no concern here.
    warnings.simplefilter("ignore")
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

from rlvr_landscape_plugin.config import TrainConfig
from rlvr_landscape_plugin.files import writing
from rlvr_landscape_plugin.objectives import configure, group_advantages
from rlvr_landscape_plugin.tracking import Guard, project_of, set_defaults
from rlvr_landscape_plugin.trl.batch import TrainerBatch, batch_metrics, to_batch
from rlvr_landscape_plugin.trl.logprobs import log_probability, mean_kl
from rlvr_landscape_plugin.trl.lora import add_adapter
from rlvr_landscape_plugin.trl.optimizer import forget, make_optimizer
from rlvr_landscape_plugin.trl.reference import KLReference
from rlvr_landscape_plugin.trl.server import PolicyServer, Practice
from rlvr_landscape_plugin.trl.states import STATES_ARE_SAFE, complete, keep_last

_DECAYS = {"none": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
"""`optimizer.decay` in the words of transformers' schedulers."""


class Hooks(Protocol):
    """What the run does at the points of a step that the trainer announces (`train.Training`)."""

    def episode(self) -> None:
        """An episode of the batch finished."""
        ...

    def metrics(self, step: int, record: dict[str, float]) -> None:
        """A step is done; its metrics."""
        ...

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        ...

    def evaluate(self, step: int) -> float | None:
        """Weights have changed; called after every step. Returns the held-out reward if there was an evaluation."""
        ...

    def reset(self, step: int, reason: str) -> None:
        """The KL reference was reset after this step, and why."""
        ...

    def wants_state(self, step: int) -> bool:
        """Whether a training state is to be kept at this step."""
        ...

    def saved(self, step: int, state: Path) -> None:
        """A training state is complete, in this directory."""
        ...


class _SaveWhereAsked(TrainerCallback):
    def __init__(self, wanted: Callable[[int], bool]) -> None:
        self._wanted = wanted

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Ask for a training state, or for none."""
        control.should_save = self._wanted(state.global_step)


@dataclass
class _Monitor:
    """Some sequences of the present batch, on which policies are compared."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    mask: torch.Tensor
    previous: torch.Tensor
    """log π of the policy before the coming update, (sequence, token), nat."""


class LandscapeGRPOTrainer(GRPOTrainer):
    """One run; build it with `make_trainer`."""

    _in_bfloat16 = False
    """Whether the update multiplies matrices in bfloat16."""
    _recomputes = False
    """Whether its backward pass computes activations again."""

    def __init__(
        self,
        run: TrainConfig,
        base: PreTrainedModel,
        server: PolicyServer,
        practice: Practice,
        hooks: Hooks,
        **options: Any,
    ) -> None:
        """`base` is a copy of the policy at the start; `options` are GRPOTrainer's."""
        self._run, self._server, self._practice, self._hooks = run, server, practice, hooks
        self._filler = int(options["processing_class"].eos_token_id)
        self._objective = configure(run.objective.name, **run.objective.options)
        self._in_bfloat16, self._recomputes = run.precision == "bfloat16", run.gradient_checkpointing
        self._base = base.requires_grad_(False).eval()
        self.reference = KLReference(self._base, run.reference)
        self._batch: TrainerBatch | None = None
        self._monitor: _Monitor | None = None
        self._batch_metrics: dict[str, float] = {}
        self._update_metrics: dict[str, float] = {}
        self._clock = time.perf_counter()
        super().__init__(rollout_func=self._roll, reward_funcs=verifier, **options)
        self.remove_callback(PrinterCallback)
        self.add_callback(_SaveWhereAsked(hooks.wants_state))

    @property
    def _policy(self) -> PreTrainedModel:
        """The policy that is trained, without what accelerate may have wrapped around it."""
        return cast(PreTrainedModel, self.accelerator.unwrap_model(self.model))

    # Rollouts

    def save_policy(self, folder: Path) -> None:
        """Write the present weights with their config as a snapshot directory that a server can read."""
        # PEFT would ask the Hub whether the vocabulary was extended.
        options: dict[str, Any] = {} if self._run.lora is None else {"save_embedding_layers": False}
        self._policy.save_pretrained(folder, **options)

    def _roll(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        rollouts, step = self._run.env.rollouts, self.state.global_step
        indices = [int(index) for index in prompts[::rollouts]]
        if [int(index) for index in prompts] != [index for index in indices for _ in range(rollouts)]:
            raise RuntimeError("TRL no longer repeats each prompt side by side; groups would mix tasks")
        clock = [time.perf_counter()]
        self._server.push(self.save_policy, step)
        clock.append(time.perf_counter())
        # Indices repeat when the tasks are used up, the step does not.
        groups = self._server.roll(self._practice, indices, rollouts, f"train/{step}", self._hooks.episode)
        clock.append(time.perf_counter())
        self._batch = to_batch(groups, filler=self._filler)
        self._batch_metrics = batch_metrics(groups)
        self._batch_metrics |= dict(zip(("seconds_push", "seconds_rollouts"), np.diff(clock).tolist(), strict=True))
        rewards = [None if math.isnan(reward) else reward for reward in self._batch.rewards.ravel().tolist()]
        return {
            "prompt_ids": self._batch.prompt_ids,
            "completion_ids": self._batch.completion_ids,
            "logprobs": self._batch.logprobs,
            "env_mask": self._batch.env_mask,
            "episode_reward": rewards,
        }

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        assert self._batch is not None
        scale = self._run.objective.advantage_scale or self._objective.advantage_scale
        advantages = group_advantages(self._batch.rewards, scale, self._run.objective.advantage_eps)
        output["advantages"] = torch.from_numpy(advantages.ravel()).to(output["advantages"])
        self._watch(_joined(output))
        return output

    def _watch(self, inputs: dict[str, torch.Tensor]) -> None:
        """Choose sequences of a new batch for the KL measurements, and compare the sampling policy with the base."""
        count = len(inputs["input_ids"])
        chosen = torch.linspace(0, count - 1, min(self._run.monitor_rollouts, count)).round().long()
        part = {name: values[chosen] for name, values in inputs.items() if values is not None}
        with torch.no_grad():
            present, _ = log_probability(self._policy, part)
            base, _ = log_probability(self._base, part)
        self._monitor = _Monitor(part["input_ids"], part["attention_mask"], part["mask"], present)
        self._batch_metrics["kl_base"] = mean_kl(present, base, part["mask"])
        difference = (present - part["sampled"])[part["mask"]].abs()
        self._batch_metrics["sampler_difference"] = float(difference.mean()) if len(difference) else 0.0

    # The update

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        started = time.perf_counter()
        joined = _joined(inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._in_bfloat16):
            logprobs, entropies = log_probability(model, joined, recompute=self._recomputes)
        feeds = {
            "logprobs": logprobs,
            "old_logprobs": joined["sampled"],
            "advantages": inputs["advantages"],
            "mask": joined["mask"],
        }
        if "entropies" in self._objective.needs:
            feeds["entropies"] = entropies
        if "generator" in self._objective.needs:
            feeds["generator"] = self._generator()
        if "reference_logprobs" in self._objective.needs:
            with torch.no_grad():
                feeds["reference_logprobs"], _ = log_probability(self.reference.model, joined)
        value = self._objective(**feeds)
        mask = joined["mask"]
        if "generator" in feeds:
            # The same random draws a second time, so that the tokens counted are those that were clipped.
            feeds["generator"] = self._generator()
        with torch.no_grad():
            bound = self._objective.token_terms(**{name: _detached(feed) for name, feed in feeds.items()}).bound
            tokens = mask.sum().clamp(min=1)
            self._update_metrics = {
                "objective": float(value),
                "entropy": float(entropies[mask].sum() / tokens),
                "clip_fraction": float((bound & mask).sum() / tokens),
                "tokens": int(mask.sum()),
                "seconds_forward": time.perf_counter() - started,
            }
        return -value

    def _generator(self) -> np.random.Generator:
        return np.random.default_rng([self._run.seed, self.state.global_step])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's hook after every step: assemble the step's metrics, then evaluate if it is time."""
        if "grad_norm" not in logs:
            super().log(logs, start_time)
            return
        monitor = self._monitor
        assert monitor is not None
        with torch.no_grad():
            inputs = {"input_ids": monitor.input_ids, "attention_mask": monitor.attention_mask, "mask": monitor.mask}
            present, _ = log_probability(self._policy, inputs)
        moved = mean_kl(monitor.previous, present, monitor.mask)
        monitor.previous = present
        step = self.state.global_step
        record = {
            **self._batch_metrics,
            **self._update_metrics,
            "kl_previous": moved,
            "grad_norm": float(logs["grad_norm"]),
            "learning_rate": float(logs["learning_rate"]),
            "seconds": time.perf_counter() - self._clock,
        }
        # TRL adds its own metrics, and hands all to `report_to`.
        super().log(logs | record, start_time)
        self._hooks.metrics(step, record)
        held_out = self._hooks.evaluate(step)
        if held_out is not None:
            super().log({"eval_reward": held_out})
        if reason := self.reference.reset_due(step, held_out):
            self.reference.reset(self._policy)
            forget(self.optimizer)
            self._hooks.reset(step, reason)
        self._clock = time.perf_counter()

    # States

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        root, step = Path(str(self.args.output_dir)), self.state.global_step
        state = root / f"checkpoint-{step}"
        with writing(state, STATES_ARE_SAFE):
            super()._save_checkpoint(model, trial)
            self.reference.save(state)
        complete(state)
        self._hooks.saved(step, state)
        keep_last(root)
        self._clock = time.perf_counter()


def verifier(
    prompts: object, completions: object, episode_reward: list[float | None], **rest: object
) -> list[float | None]:
    """TRL's reward function: the taskset's own reward of each episode, None where the episode failed."""
    return episode_reward


def _detached(feed: object) -> object:
    return feed.detach() if isinstance(feed, torch.Tensor) else feed


def _joined(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """TRL's columns side by side: whole sequences, and the mask of the tokens that the policy sampled."""
    mask = inputs["completion_mask"].bool() & inputs["tool_mask"].bool()
    return {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        "mask": mask,
        "sampled": inputs["sampling_per_token_logps"],
    }


def make_trainer(
    config: TrainConfig,
    model: PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    server: PolicyServer,
    practice: Practice,
    states: Path,
    hooks: Hooks,
) -> LandscapeGRPOTrainer:
    """The trainer of a run, ready for `train(resume_from_checkpoint=…)`.

    `model` is trained; `base`, another copy of the same policy, stays what training started from.
    """
    from datasets import Dataset

    trained: Any = model if config.lora is None else add_adapter(model, config.lora, config.seed)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is marked experimental; it is what we need
    logging.getLogger("trl").setLevel(logging.ERROR)
    updates = config.optimizer.updates_per_batch
    arguments = GRPOConfig(
        output_dir=str(states),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=config.batch // updates,
        gradient_accumulation_steps=1,
        steps_per_generation=updates,
        num_generations=config.env.rollouts,
        max_completion_length=config.server.max_model_len,
        max_steps=config.steps,
        learning_rate=config.optimizer.lr,
        lr_scheduler_type=_DECAYS[config.optimizer.decay],
        warmup_steps=config.optimizer.warmup_steps,
        max_grad_norm=config.optimizer.max_grad_norm,
        beta=0.0,
        temperature=1.0,
        shuffle_dataset=False,
        remove_unused_columns=False,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="no",
        report_to=[] if config.log is None else [config.log],
        run_name=config.output.resolve().name,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=config.seed,
    )
    if config.log is not None:
        set_defaults()
        # The callback of W&B reads its project from there, that of trackio from the arguments.
        arguments.project = os.environ["WANDB_PROJECT"] = project_of(config.log, config.log_project)
    trainer = LandscapeGRPOTrainer(
        config,
        base,
        server,
        practice,
        hooks,
        model=trained,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [str(index) for index in range(len(practice.tasks))]}),
        processing_class=tokenizer,
        optimizers=(make_optimizer(trained, config.optimizer), None),
    )
    if config.log is not None:
        _guard_reports(trainer, config.log, hooks.say)
    return trainer


def _guard_reports(trainer: LandscapeGRPOTrainer, service: str, say: Callable[[str], None]) -> None:
    """Put a guard around the callback that `report_to` made: a failing service does not end the training."""
    (kind,) = get_reporting_integration_callbacks([service])
    (callback,) = [item for item in trainer.callback_handler.callbacks if isinstance(item, kind)]
    trainer.remove_callback(callback)
    guard, guarded = Guard(service, say), TrainerCallback()
    for event in (name for name in dir(TrainerCallback) if name.startswith("on_")):
        setattr(guarded, event, functools.partial(guard, getattr(callback, event)))
    trainer.add_callback(guarded)
    trainer.args.report_to = []  # TRL also sends its own timings, past all callbacks, to what is named here
