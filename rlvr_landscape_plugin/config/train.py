"""The configuration of a training run on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlvr_landscape_plugin.config.base import MOST_EPISODES, LogService, StrictConfig
from rlvr_landscape_plugin.config.sweep import SamplingConfig, ServerConfig
from rlvr_landscape_plugin.files import JsonObject
from rlvr_landscape_plugin.schedule import LIMIT, parse_schedule

LARGEST_TRAINING_SEED = 2**32 - 1
"""torch, NumPy and transformers share the seed, and NumPy's global generator takes 32 bits."""


class TrainEnvConfig(StrictConfig):
    """What the policy practises: any taskset that a sweep can drive."""

    id: str = "rlvr-alphabet-sort"
    """Taskset id, as for `vf-eval`; its package must be installed."""
    taskset: dict[str, Any] = {}
    """Options of the taskset. Its `seed` must differ from `evaluation.taskset`'s."""
    num_tasks: int = Field(default=4096, ge=1, le=MOST_EPISODES)
    """The first so many tasks are practised, in order, and again from the start when they are used up."""
    tasks_per_batch: int = Field(default=32, ge=1, le=MOST_EPISODES)
    """Tasks (groups) in one batch of rollouts."""
    rollouts: int = Field(default=16, ge=2, le=MOST_EPISODES)
    """Episodes per task: the group that advantages are relative to."""
    max_concurrent: int = Field(default=512, ge=1)
    """Episodes in flight."""
    runtime: Literal["subprocess"] | None = None
    """Where a task's setup() and the rewards that need a runtime run, as in a sweep. `subprocess`: on this machine, as
    this user and without isolation. Default: such tasksets are refused."""

    @model_validator(mode="after")
    def _enough(self) -> TrainEnvConfig:
        if self.num_tasks < self.tasks_per_batch:
            raise ValueError(
                f"num_tasks = {self.num_tasks} is less than tasks_per_batch = {self.tasks_per_batch}; raise num_tasks"
            )
        if self.tasks_per_batch * self.rollouts > MOST_EPISODES:
            raise ValueError(
                f"tasks_per_batch × rollouts = {self.tasks_per_batch * self.rollouts:,} episodes in one batch, at most "
                f"{MOST_EPISODES:,} can be held; lower one"
            )
        return self


class ObjectiveConfig(StrictConfig):
    """What training maximises, by its name in `objectives.OBJECTIVES`."""

    name: str = "grpo"
    """`grpo`, `dr_grpo`, `dapo`, `gspo`, `grpo_n`, `gspo_n`, `forking_tokens`, `kl_cov`, `clip_cov`."""
    options: dict[str, Any] = {}
    """Changes to the objective's own options, as for `objectives.configure`."""
    advantage_scale: Literal["std", "none"] | None = None
    """`std`: (r − mean)/(std + eps) within the group. `none`: r − mean. Default: that of the objective's source."""
    advantage_eps: float = Field(default=1e-8, gt=0)
    """Guard of the division."""

    @model_validator(mode="after")
    def _known(self) -> ObjectiveConfig:
        from rlvr_landscape_plugin.objectives import configure

        configure(self.name, **self.options)
        return self


class ReferenceConfig(StrictConfig):
    """When the policy becomes the KL reference and the optimizer's state is reset (`objectives.ReferenceSchedule`)."""

    every: int | None = Field(default=None, ge=1)
    """Optimizer updates since the last reset."""
    patience: int | None = Field(default=None, ge=1)
    """Held-out evaluations in a row without improvement."""
    min_improvement: float = Field(default=0.0, ge=0)
    """Held-out reward above the best since the last reset that counts as improvement."""
    max_drop: float | None = Field(default=None, ge=0)
    """Held-out reward below the best since the last reset that causes a reset."""

    @model_validator(mode="after")
    def _some(self) -> ReferenceConfig:
        if self.every is None and self.patience is None and self.max_drop is None:
            raise ValueError("[reference] never resets: set every, patience or max_drop, or leave the table out")
        return self


class OptimizerConfig(StrictConfig):
    """How the weights follow the gradient."""

    name: Literal["muon", "adamw"] = "muon"
    """`muon`: Muon for the matrices of the layers, AdamW for embeddings, norms and biases. `adamw`: AdamW for all."""
    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate of AdamW."""
    muon_lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate of Muon: the spectral norm of one update of a matrix."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of both."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rates rise to their peak from 0, so the first of them changes nothing."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How they fall from there to 0 at the last step; `steps` then belongs to the run and cannot be raised later."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients with a larger norm are scaled down to it."""
    updates_per_batch: int = Field(default=1, ge=1)
    """Optimizer updates (steps) from one batch of rollouts, each on its own share of the batch."""


class LoraConfig(StrictConfig):
    """Train a LoRA adapter (PEFT's) instead of the weights; snapshots are then adapters."""

    rank: int = Field(default=16, ge=1, le=4096)
    """r: A has so many rows, B so many columns."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapter's product B A is scaled by alpha / rank."""
    rslora: bool = False
    """Scale it by alpha / √rank instead."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Ends of the names of the adapted modules, such as `q_proj`; `all-linear`: every linear layer but the output
    head."""
    modules_to_save: list[str] = []
    """Ends of the names of modules that are trained as a whole, beside the adapter."""


class EvaluationConfig(StrictConfig):
    """Evaluation on held-out tasks: the same tasks and sampling seeds every time."""

    every: int = Field(default=10, ge=1)
    """Steps between two evaluations; there is one at step 0 and one at the last step."""
    num_tasks: int = Field(default=256, ge=2, le=MOST_EPISODES)
    """So many tasks of the held-out task stream, from `first_task` on."""
    rollouts: int = Field(default=16, ge=1, le=MOST_EPISODES)
    """Episodes per task; the largest k of pass@k."""
    taskset: dict[str, Any] = {"seed": 2001}
    """Changes to `env.taskset`, table by table, that make the tasks others, such as another seed; `{}` for a taskset
    that has no such option: held-out tasks are then later ones of the same stream. Where training is paid by a control
    (`task.reward_mode`), held-out tasks are paid by the verifier, unless this names a mode too."""
    first_task: int | None = Field(default=None, ge=0, le=MOST_EPISODES)
    """Position of the first held-out task in its stream. Default: 0, or, where `taskset` leaves the tasks as they are,
    `env.num_tasks`, the first task that is not practised."""
    threshold: float = 0.99
    """Reward from which an episode counts as passed."""

    @model_validator(mode="after")
    def _bounded(self) -> EvaluationConfig:
        if self.num_tasks * self.rollouts > MOST_EPISODES:
            raise ValueError(
                f"num_tasks × rollouts = {self.num_tasks * self.rollouts:,} episodes in one evaluation, at most "
                f"{MOST_EPISODES:,} can be held; lower one"
            )
        return self


class TrainConfig(StrictConfig):
    """A training run on this machine: TRL's GRPOTrainer, the taskset's own episodes, snapshots for the sweep."""

    output: Path = Path("outputs/train")
    """Directory of the run: snapshots/, metrics.jsonl, evaluations.jsonl, state/, run.json, server.log."""
    model: str = "tiny-sorter"
    """The policy to start from: a Hugging Face checkpoint directory, or `tiny-sorter`."""
    steps: int = Field(default=100, ge=1, le=LIMIT)
    """Optimizer updates; a finished run continues when this is raised (unless `optimizer.decay`)."""
    seed: int = Field(default=0, ge=0, le=LARGEST_TRAINING_SEED)
    """Seed of all sampling."""
    snapshots: str = "0-10, 20-150:10"
    """Steps whose policy is kept, as in `schedule.parse_schedule`; those beyond `steps` are never reached."""
    state_every: int = Field(default=5, ge=1)
    """Steps between two saved training states, besides the steps with a snapshot: what a killed run loses at most."""
    env: TrainEnvConfig = TrainEnvConfig()
    """The tasks."""
    sampling: SamplingConfig = SamplingConfig()
    """The sampler; `temperature` and `top_p` must be 1, since the objective compares with the policy itself."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is maximised."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How."""
    lora: LoraConfig | None = None
    """Train an adapter; absent: all weights."""
    reference: ReferenceConfig | None = None
    """Resets of the KL reference (ProRL); absent: the reference is the policy at the start."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The held-out tasks."""
    monitor_rollouts: int = Field(default=128, ge=1)
    """Episodes of each batch on which KL divergences are measured."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Matrix products of the update's passes. `bfloat16` is faster on a CPU with AVX512-BF16 or AMX, and less exact.
    Weights, optimizer and what is measured stay float32."""
    gradient_checkpointing: bool = False
    """Keep the activations of 16 episodes at a time only, and compute the others again in the backward pass: the memory
    of an update does not grow with its batch, and its forward pass runs twice."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the trainer; default: torch's own choice."""
    server: ServerConfig = ServerConfig()
    """The local inference server; `urls` must be empty."""
    log: LogService | None = None
    """Also send each step to Weights & Biases (`wandb`) or trackio, as TRL's `report_to`; the extra of that name."""
    log_project: str | None = None
    """Project there; default: WANDB_PROJECT or TRACKIO_PROJECT, else `rlvr-landscape`."""
    dry_run: bool = False
    """Print the resolved configuration and the cost, then stop."""

    @field_validator("snapshots")
    @classmethod
    def _schedule(cls, text: str) -> str:
        if 0 not in parse_schedule(text):
            raise ValueError(f"snapshots = {text!r} leaves out step 0, to which everything is compared; add '0'")
        return text

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.sampling.temperature != 1 or self.sampling.top_p != 1:
            raise ValueError(
                f"sampling.temperature = {self.sampling.temperature} and sampling.top_p = {self.sampling.top_p} must "
                "be 1 in training: the objective's ratios are those of the policy itself"
            )
        if self.reference is not None and not self.objective.options.get("kl_coefficient"):
            raise ValueError(
                "[reference] resets what the objective does not use: set objective.options.kl_coefficient above 0, or "
                "leave the table out"
            )
        if self.reference is not None and self.lora is not None:
            raise ValueError("[reference] resets a whole policy and cannot be used with [lora]; leave one table out")
        if self.server.urls:
            raise ValueError("server.urls must be empty: training starts a server of its own, whose weights it changes")
        batch, updates = self.env.tasks_per_batch * self.env.rollouts, self.optimizer.updates_per_batch
        if batch % updates:
            raise ValueError(
                f"a batch of env.tasks_per_batch × env.rollouts = {batch} episodes is not divisible by "
                f"optimizer.updates_per_batch = {updates}"
            )
        off = [s for s in (*parse_schedule(self.snapshots), self.state_every) if s % updates and s <= self.steps]
        if off:
            raise ValueError(
                f"snapshots and state_every must fall on multiples of optimizer.updates_per_batch = {updates}, where a "
                f"batch is used up and a run can continue; {off[0]} does not"
            )
        if self._same_stream and self.first_held_out < self.env.num_tasks:
            raise ValueError(
                f"evaluation.first_task = {self.first_held_out} with evaluation.taskset = {self.evaluation.taskset}: "
                "the held-out tasks would be the practised ones; leave first_task out, or set it to env.num_tasks = "
                f"{self.env.num_tasks} or more"
            )
        return self

    @property
    def _same_stream(self) -> bool:
        """Whether held-out tasks come from the stream of tasks that are practised."""
        return _drop_reward_mode(self.held_out_taskset) == _drop_reward_mode(self.env.taskset)

    @property
    def first_held_out(self) -> int:
        """Position of the first held-out task in its stream."""
        if self.evaluation.first_task is not None:
            return self.evaluation.first_task
        return self.env.num_tasks if self._same_stream else 0

    @property
    def held_out_taskset(self) -> JsonObject:
        """The options of the held-out tasks: `env.taskset` as `evaluation.taskset` changes it, paid by the verifier."""
        practised = dict(self.env.taskset)
        if "reward_mode" in practised.get("task", {}):
            practised = _merged(practised, {"task": {"reward_mode": "verifier"}})
        return _merged(practised, self.evaluation.taskset)

    @property
    def batch(self) -> int:
        """Episodes in one batch of rollouts."""
        return self.env.tasks_per_batch * self.env.rollouts

    def provenance(self) -> JsonObject:
        """What determines the run, JSON-able; what only concerns speed is left out, `steps` too without a decay."""
        data = self.model_dump(
            mode="json",
            exclude={"output", "steps", "threads", "gradient_checkpointing", "log", "log_project", "dry_run", "server"},
        )
        del data["env"]["max_concurrent"]
        if data["env"]["runtime"] is None:
            del data["env"]["runtime"]
        # Runs of before there was this option continue.
        if self.evaluation.first_task is None:
            del data["evaluation"]["first_task"]
        if self.lora is None:
            del data["lora"]
        if self.precision == "float32":
            del data["precision"]
        if self.optimizer.decay != "none":
            data["steps"] = self.steps
        return data | {"server": {"dtype": self.server.dtype, "max_model_len": self.server.max_model_len}}


def _merged(options: JsonObject, changes: JsonObject) -> JsonObject:
    """`options` with `changes` on top; tables in both are merged in turn."""
    both = {key: _merged(options[key], value) for key, value in changes.items() if _are_tables(options.get(key), value)}
    return options | changes | both


def _are_tables(*values: object) -> bool:
    return all(isinstance(value, dict) for value in values)


def _drop_reward_mode(options: JsonObject) -> JsonObject:
    """What makes the tasks: all options but the one that only changes what is paid."""
    task = {key: value for key, value in options.get("task", {}).items() if key != "reward_mode"}
    return {key: value for key, value in options.items() if key != "task"} | ({"task": task} if task else {})


def train_report(config: TrainConfig) -> str:
    """The resolved configuration and an upper bound on what it costs."""
    steps = [step for step in parse_schedule(config.snapshots) if step <= config.steps]
    evaluations = 1 + -(-config.steps // config.evaluation.every)
    episodes = config.batch * -(-config.steps // config.optimizer.updates_per_batch)
    held_out = evaluations * config.evaluation.num_tasks * config.evaluation.rollouts
    dump = config.model_dump(mode="json", exclude={"server": {"token"}})
    return "\n".join(
        [
            json.dumps(dump, indent=2),
            f"steps       {config.steps}, {config.batch // config.optimizer.updates_per_batch} episodes each",
            f"episodes    {episodes:,} of training, {held_out:,} held out in {evaluations} evaluations",
            f"snapshots   {len(steps)}: {', '.join(map(str, steps))}",
            f"output      {config.output}",
        ]
    )
