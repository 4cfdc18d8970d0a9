"""The configuration of a sweep, and of a server of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlvr_landscape_plugin.config.base import LARGEST_SEED, MOST_EPISODES, LogService, StrictConfig
from rlvr_landscape_plugin.config.designs import CensusConfig, GridConfig, PathConfig, SliceConfig
from rlvr_landscape_plugin.files import JsonObject
from rlvr_landscape_plugin.objectives import LANDSCAPE_FEEDS, Objective, check_feeds, configure

PASSES = 0.99
"""Reward from which a rollout passes: `schema.SOLVED` of the analysis, whose import would load xarray for `--help`."""
DESIGN_TABLES = ("grid", "census", "path")
"""Tables of the configuration that belong to the design of that name."""


class EnvConfig(StrictConfig):
    """The tasks: any chat taskset of verifiers with a single agent."""

    id: str = "rlvr-alphabet-sort"
    """Taskset id, as for `vf-eval`; its package must be installed."""
    taskset: dict[str, Any] = {}
    """Options of the taskset (what `vf-eval` takes as `--env.taskset.*`)."""
    num_prompts: int = Field(default=32, ge=1, le=MOST_EPISODES)
    """The first so many tasks of the taskset, the same at every point of every snapshot."""
    rollouts: int = Field(default=4, ge=1, le=MOST_EPISODES)
    """Episodes per task and point."""
    base_rollouts: int | None = Field(default=None, ge=1)
    """Episodes per task in the checkpoint's own batch, which then have a dimension of their own (`base_rollout`);
    default: `rollouts`."""
    pass_threshold: float = PASSES
    """Reward from which a rollout passes, for pass@k. It is part of what a dataset is, so it is fixed before the data;
    another one in the same `output` is refused."""
    max_concurrent: int = Field(default=512, ge=1)
    """Episodes in flight per server."""
    runtime: Literal["subprocess"] | None = None
    """Where programs of a taskset run (setup(), rewards, tools, harnesses). `subprocess`: on this machine, as this user
    and without isolation, including whatever they do with a reply. Default: tasksets that need programs are refused."""
    path: Literal["auto", "chat", "verifiers"] = "auto"
    """How episodes are played. `chat`: in the fast loop of this process, without tools or hooks. `verifiers`: by
    verifiers' own agents, which needs `runtime`. `auto`: `chat` where it can."""
    options: dict[str, Any] = {}
    """Options of the environment beside its taskset's (what `vf-eval` takes as `--env.*`)."""
    harness: dict[str, Any] | None = None
    """Harness on the path `verifiers`, such as `{"id": "bash"}`. Default: the environment's own, else a plain chat."""
    tool_parser: str | None = None
    """How the policy writes tool calls: `hermes`, `qwen3`, `qwen3.5`, `glm` or `deepseek-v3`. Default: as its chat
    template shows."""
    timeout: float = Field(default=600, gt=0)
    """Seconds until an episode on the path `verifiers` counts as failed."""

    @property
    def own_rollouts(self) -> int:
        """Episodes per task in the checkpoint's own batch."""
        return self.base_rollouts or self.rollouts

    @model_validator(mode="after")
    def _bounded(self) -> EnvConfig:
        for name, count in (("rollouts", self.rollouts), ("base_rollouts", self.own_rollouts)):
            if self.num_prompts * count > MOST_EPISODES:
                raise ValueError(
                    f"num_prompts × {name} = {self.num_prompts * count:,} episodes in one batch, at most "
                    f"{MOST_EPISODES:,} can be held; lower one"
                )
        return self


class SamplingConfig(StrictConfig):
    """How completions are sampled. Scoring (KL, surrogate) is always at temperature 1."""

    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature. KL and surrogate are those of the policy only at 1."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus; 1 samples from the whole distribution."""
    max_tokens: int = Field(default=512, ge=1)
    """Limit per turn, in tokens."""


class SurrogateConfig(StrictConfig):
    """The training objective that the landscape reports, computed by the functions that also train; default: GRPO's
    clipped objective."""

    objective: str = "grpo"
    """`grpo`, `dr_grpo`, `dapo`, `gspo`, `grpo_n`, `gspo_n`, `kl_cov`, `clip_cov`: see docs/objectives.md."""
    options: dict[str, Any] = {}
    """Options of that objective, as in training; the clip range of `grpo` is `clip_low` and `clip_high` below."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """ε below of `grpo`: ratios under 1 − ε are clipped."""
    clip_high: float = Field(default=0.2, gt=0)
    """ε above of `grpo`: ratios over 1 + ε are clipped."""
    advantage_scale: Literal["std", "none"] = "std"
    """`std`: (r − mean)/(std + eps), population standard deviation of the group. `none`: r − mean, as prime-rl 0.8.
    Another objective's default is that of its source (`dr_grpo`: `none`)."""
    advantage_eps: float = Field(default=1e-8, gt=0)
    """Guard of the division."""

    @model_validator(mode="after")
    def _can_be_drawn(self) -> SurrogateConfig:
        for key in ("clip_low", "clip_high"):
            if self.objective != "grpo" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} = {getattr(self, key)} is for objective = 'grpo'; for {self.objective!r} write "
                    f"options.{key}"
                )
            if self.objective == "grpo" and key in self.options:
                raise ValueError(f"options.{key} of objective 'grpo' is {key} of this table; write it there")
        objective = self.trained
        check_feeds(objective, LANDSCAPE_FEEDS, "a landscape")
        if "advantage_scale" not in self.model_fields_set:
            self.advantage_scale = "none" if objective.advantage_scale == "none" else "std"
        return self

    @property
    def trained(self) -> Objective:
        """The objective with its options."""
        clips = {"clip_low": self.clip_low, "clip_high": self.clip_high} if self.objective == "grpo" else {}
        return configure(self.objective, **clips, **self.options)

    @property
    def is_usual(self) -> bool:
        """Whether it is GRPO's clipped objective, averaged over tokens, as in every landscape before this option
        existed."""
        return self.objective == "grpo" and not self.options


class ServerConfig(StrictConfig):
    """The vLLM servers. Only `dtype`, `device`, `max_model_len` and `directions_memory = "half"` may change a result;
    the rest is about speed."""

    urls: list[str] = []
    """Servers to use; empty starts one here, on loopback, and ends it after the sweep."""
    token: str | None = None
    """Bearer token of the servers in `urls`; default: environment variable RLVR_LANDSCAPE_TOKEN. Never stored."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the local server runs."""
    dtype: str = "auto"
    """Weights' dtype; `auto` is float32 on a CPU and the checkpoint's own on a GPU."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the local server; default: a free one."""
    max_model_len: int = Field(default=1024, ge=16)
    """Longest conversation, in tokens."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Sequences decoded together."""
    max_num_batched_tokens: int = Field(default=8192, ge=16)
    """Tokens scheduled together. Scoring holds this many × vocabulary × 4 bytes beside the weights."""
    gpu_memory_utilization: float = Field(default=0.7, gt=0, le=1)
    """vLLM's share of a GPU; the slice's float32 copies (12 bytes per parameter) need memory beside it."""
    directions_memory: Literal["auto", "float32", "half", "regenerated"] = "auto"
    """How a server started here keeps the directions. `auto`: float32 on the GPU, else on the host, else `regenerated`
    (drawn again for each move: slow, the same weights), whichever fits. `half`: in 16 bits, which rounds the directions
    and so changes them. Servers in `urls` have the environment variable RLVR_LANDSCAPE_DIRECTIONS_MEMORY instead."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """KV cache of a CPU server, GiB."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs per model replica."""
    enable_prefix_caching: bool = True
    """Reuse the prompt's keys and values between rollouts; every move empties this cache."""
    extra_args: list[str] = []
    """Further arguments for vLLM's API server, as they are."""
    start_timeout: float = Field(default=600, gt=0)
    """Seconds until a started server must answer."""
    request_timeout: float = Field(default=600, gt=0)
    """Seconds without a byte from the server until a request counts as failed."""
    patience: float = Field(default=300, ge=0)
    """Seconds without any of `urls` until a sweep gives up; it does not wait for a server that it started itself."""
    log: Path | None = None
    """Log of the local server; default: server.log in `output`."""

    @model_validator(mode="after")
    def _token_fits_a_header(self) -> ServerConfig:
        # Of the whole table, because the message about one field would print the token.
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.strip()):
            raise ValueError(
                "token must be visible ASCII characters in one line, without a line end; write it again as one line"
            )
        return self


class SweepConfig(StrictConfig):
    """A sweep: snapshots × designs, by default a grid on each slice."""

    output: Path = Path("outputs/sweep")
    """Directory of the journal and the datasets."""
    snapshots: list[str] = Field(default=["tiny-sorter"], min_length=1)
    """Snapshots: Hugging Face checkpoint directories and PEFT adapters, runs that hold them, patterns, Hub ids with a
    revision (`org/name@main`), or `tiny-sorter`, the policy shipped with the package; see docs/checkpoints.md."""
    base_model: str | None = None
    """The model that adapters among the snapshots belong to, as one of `snapshots`; default: the one that their
    adapter_config.json names."""
    allow_equal_snapshots: bool = False
    """Measure snapshots of different steps also where they have the same weights."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Seed of all sampling: the same (prompt, rollout, turn) draws the same noise at every point."""
    design: str = "grid"
    """Which policies around each snapshot are measured: a name in `designs.DESIGNS`, or a designer's import path."""
    design_options: dict[str, Any] = {}
    """Options of a designer that is named by its import path."""
    grid: GridConfig = GridConfig()
    """The points of the design `grid`."""
    census: CensusConfig = CensusConfig()
    """The points of the design `census`."""
    path: PathConfig = PathConfig()
    """The points of the design `path`."""
    slice: SliceConfig = SliceConfig()
    """The directions."""
    env: EnvConfig = EnvConfig()
    """The tasks."""
    sampling: SamplingConfig = SamplingConfig()
    """The sampler."""
    surrogate: SurrogateConfig = SurrogateConfig()
    """The objective."""
    server: ServerConfig = ServerConfig()
    """The inference servers."""
    save_traces: bool = False
    """Keep every conversation in verifiers' own trace format beside the points."""
    shard: str | None = None
    """`i/n`: measure only the i-th of n shares of every slice's points (i = 1 … n). All shards share `output`; the one
    that finishes last writes the datasets."""
    until_ci_width: float | None = Field(default=None, gt=0, lt=2)
    """Progressive: begin with a coarse grid and few prompts, and refine until the 95 % interval of the KL–reward
    correlation is not wider than this. `grid` and `env.num_prompts` are then the most that is measured."""
    until_ci_of: Literal["correlation", "beyond_radius"] = "correlation"
    """Which number `until_ci_width` is about: the noise-corrected Pearson correlation over the grid, or the part of it
    that distance from the origin cannot explain."""
    follow: Path | None = None
    """A training run that goes on: measure each of its snapshots as it appears, instead of `snapshots`."""
    follow_patience: float = Field(default=7200, gt=0)
    """Seconds without a new snapshot after which following ends with an error."""
    log: LogService | None = None
    """Also send each point to Weights & Biases (`wandb`) or trackio; the extra of that name. Their environment
    variables hold, such as WANDB_MODE. A failure there never ends a sweep."""
    log_project: str | None = None
    """Project there; default: WANDB_PROJECT or TRACKIO_PROJECT, else `rlvr-landscape`."""
    dry_run: bool = False
    """Print what would be measured, what it would cost and what is missing, then stop."""
    show_config: bool = False
    """With `dry_run`: print the resolved configuration as well."""
    rate: float | None = Field(default=None, gt=0)
    """With `dry_run`: episodes per second of all servers together, from which its hours follow."""
    probe: bool = False
    """With `dry_run`: measure that rate, and the length of conversations, for half a minute on the servers."""

    @model_validator(mode="after")
    def _belongs_to_the_design(self) -> SweepConfig:
        if self.design_options and "." not in self.design:
            raise ValueError(f"design_options are for a designer named by its import path, not for {self.design!r}")
        for name in DESIGN_TABLES:
            if self.design != name and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"[{name}] belongs to design = {name!r}, not to {self.design!r}; leave the table out")
        if self.design == "boundary" and self.env.base_rollouts is None:
            raise ValueError("design = 'boundary' measures the checkpoint itself: say how often with env.base_rollouts")
        return self

    @model_validator(mode="after")
    def _belongs_to_a_dry_run(self) -> SweepConfig:
        given = [name for name in ("show_config", "rate", "probe") if getattr(self, name)]
        if given and not self.dry_run:
            raise ValueError(f"{given[0]} = {getattr(self, given[0])} is about dry_run; add --dry-run, or leave it out")
        if self.rate is not None and self.probe:
            raise ValueError(f"rate = {self.rate} with probe: a probe measures the rate; leave one of them out")
        return self

    @model_validator(mode="after")
    def _whole(self) -> SweepConfig:
        if self.shard is not None and self.share[1] > 1 and self.until_ci_width is not None:
            raise ValueError(
                f"shard = {self.shard!r} with until_ci_width = {self.until_ci_width}: a progressive sweep decides on "
                "all points after each round; give one process several server.urls instead"
            )
        if self.until_ci_width is not None and self.surrogate.trained.of_batch:
            raise ValueError(
                f"surrogate.objective = {self.surrogate.objective!r} with until_ci_width = {self.until_ci_width}: its "
                "terms depend on the whole batch, a progressive sweep measures some tasks after others; choose another "
                "objective, or leave until_ci_width out"
            )
        return self

    @field_validator("shard")
    @classmethod
    def _shard(cls, text: str | None) -> str | None:
        if text is not None:
            match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
            if match is None or int(match[1]) > int(match[2]):
                raise ValueError(f"shard = {text!r} is not i/n with 1 ≤ i ≤ n, such as '2/8'")
        return text

    @property
    def share(self) -> tuple[int, int]:
        """(i, n) of `shard`; (1, 1) without one."""
        first, _, of = (self.shard or "1/1").partition("/")
        return int(first), int(of)

    def provenance(self) -> JsonObject:
        """What determines the numbers, JSON-able; `from_provenance` turns it back into a configuration."""
        data = self.model_dump(
            mode="json",
            exclude={
                *("output", "snapshots", "save_traces", "shard", "until_ci_width", "until_ci_of", "server"),
                *("dry_run", "show_config", "rate", "probe", "log", "log_project"),
                *("follow", "follow_patience", "base_model", "allow_equal_snapshots"),
            },
        )
        # A slice's own seed is part of its identity, the list of all of them is not.
        del data["slice"]["seeds"], data["slice"]["run"], data["env"]["max_concurrent"]
        # A slice of two plain random directions is named as before there were others: old journals continue.
        plain = SliceConfig().model_dump(mode="json")
        for key in ("alpha", "beta", "orthogonalize"):
            if data["slice"][key] == plain[key]:
                del data["slice"][key]
        if self.grid.find is None:
            del data["grid"]["find"]
        if data["env"]["runtime"] is None:
            del data["env"]["runtime"]
        # Episodes of the chat loop are named as before there was another path.
        del data["env"]["timeout"]
        if not data["env"]["options"]:
            del data["env"]["options"]
        if self.env.path != "verifiers":
            del data["env"]["path"], data["env"]["harness"], data["env"]["tool_parser"]
        # The usual objective is named as before there were others.
        if data["surrogate"]["objective"] == "grpo":
            del data["surrogate"]["objective"]
        if not data["surrogate"]["options"]:
            del data["surrogate"]["options"]
        # A grid is named as before there were other designs; of those, only their own options count.
        for name in DESIGN_TABLES:
            if name != self.design:
                del data[name]
        if self.design == "grid":
            del data["design"]
        if data["env"]["base_rollouts"] is None:
            del data["env"]["base_rollouts"]
        # Datasets of before there was this option have its default.
        if data["env"]["pass_threshold"] == PASSES:
            del data["env"]["pass_threshold"]
        if not data["design_options"]:
            del data["design_options"]
        server: JsonObject = {"dtype": self.server.dtype, "max_model_len": self.server.max_model_len}
        if self.server.directions_memory == "half":
            server["directions_memory"] = "half"
        return data | {"server": server}

    @classmethod
    def from_provenance(cls, data: JsonObject) -> SweepConfig:
        """A configuration that measures the same numbers."""
        return cls.model_validate(data)


class LaunchConfig(StrictConfig):
    """A server of its own, for `vf-eval` or for sweeps elsewhere (`python -m rlvr_landscape_plugin.serving.launch`)."""

    model: str = "tiny-sorter"
    """Hugging Face checkpoint directory, or `tiny-sorter`."""
    roots: list[Path] = []
    """Directories that the server may read snapshots from; default: the one that holds `model`."""
    server: ServerConfig = ServerConfig()
    """How it runs; `urls` is not used."""
