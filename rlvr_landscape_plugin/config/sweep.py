"""The configuration of a sweep, and of a server of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from rlvr_landscape_plugin.config.base import LARGEST_SEED, MOST_EPISODES, StrictConfig
from rlvr_landscape_plugin.objectives import LANDSCAPE_FEEDS, Objective, check_feeds, configure

MOST_POINTS = 1_000_000
"""Points of one grid, and of one axis; more is a typing mistake."""
LARGEST_COORDINATE = 1e6
"""Largest |α| and |β|: with a direction as long as the weights, float32 weights stay finite far beyond it."""
LEAST_COORDINATE = 1e-30
"""Smallest end of an axis: float64 still tells evenly spaced coordinates below it apart."""
LARGEST_RATIO = 1e9
"""Largest ratio of the two ends of an axis: beyond it the shorter end is lost in the rounding of the longer."""


class AxisConfig(StrictConfig):
    """One axis of the grid, in units of the direction (`tensor`: α = 0.05 moves 5 % of a tensor's norm)."""

    min: float = -0.15
    """Smallest coordinate; must be below 0."""
    max: float = 0.15
    """Largest coordinate; must be above 0."""
    points: int = Field(default=7, ge=2, le=MOST_POINTS)
    """Number of evenly spaced coordinates. If 0 is not among them (an even number, an uneven range), it is added."""

    @model_validator(mode="after")
    def _range(self) -> AxisConfig:
        if self.min >= self.max:
            raise ValueError(f"min = {self.min} is not below max = {self.max}; swap them")
        if not self.min < 0 < self.max:
            raise ValueError(f"the range {self.min} … {self.max} must contain the origin 0 in its inside")
        short, long = sorted((-self.min, self.max))
        if long > LARGEST_COORDINATE or short < LEAST_COORDINATE or long > LARGEST_RATIO * short:
            raise ValueError(
                f"min = {self.min} and max = {self.max}: both must lie between {LEAST_COORDINATE:g} and "
                f"{LARGEST_COORDINATE:g} in size and differ by less than a factor of {LARGEST_RATIO:g}; coordinate 1 "
                "moves by the whole direction, normalization scales a direction that is short or long"
            )
        return self

    def values(self, factor: float = 1.0) -> np.ndarray:
        """Coordinates of the axis made `factor` times as long: float64, ascending, 0.0 among them exactly once."""
        low, high = self.min * factor, self.max * factor
        values = np.linspace(low, high, self.points)
        values[np.abs(values) <= 1e-12 * (high - low)] = 0.0
        return values if 0.0 in values else np.sort(np.append(values, 0.0))


class FindRangeConfig(StrictConfig):
    """Choose the range for each snapshot, by a few probes at the ends of the axes; see `ranges.find_range`."""

    retention: float = Field(default=0.5, gt=0, lt=1)
    """Share of the checkpoint's reward that policies at the ends of the axes keep on average."""
    kl: float = Field(default=0.5, gt=0)
    """Their mean KL divergence in nat per token, which decides where the checkpoint's own reward is not above 0."""
    prompts: int = Field(default=32, ge=8)
    """Tasks of a probe, the first of `env.num_prompts`."""
    largest_factor: float = Field(default=32, gt=1)
    """`min` and `max` of both axes are multiplied by at most this, and by at least 1 / this."""


class GridConfig(StrictConfig):
    """The points of the slice: every α with every β."""

    alpha: AxisConfig = AxisConfig()
    """Coordinates along δ."""
    beta: AxisConfig = AxisConfig()
    """Coordinates along η."""
    find: FindRangeConfig | None = None
    """Scale both axes by one factor per snapshot, found by probes; absent: `min` and `max` as they are."""

    @model_validator(mode="after")
    def _bounded(self) -> GridConfig:
        points = self.alpha.points * self.beta.points
        if points > MOST_POINTS:
            raise ValueError(
                f"alpha.points × beta.points = {points:,} points, at most {MOST_POINTS:,} can be measured; lower one"
            )
        if self.find is not None:
            farthest = max(-self.alpha.min, self.alpha.max, -self.beta.min, self.beta.max) * self.find.largest_factor
            if farthest > LARGEST_COORDINATE:
                raise ValueError(
                    f"find.largest_factor = {self.find.largest_factor:g} could make an axis {farthest:g} long, at most "
                    f"{LARGEST_COORDINATE:g} is allowed; lower it, or min and max"
                )
        return self


class DirectionConfig(StrictConfig):
    """One axis of the slice."""

    kind: Literal["random", "displacement", "update", "pca", "file"] = "random"
    """`random`: drawn from the slice's seed. `displacement`: θ_t − θ_0 of the run. `update`: next snapshot − θ_t.
    `pca`: a principal component of the run's snapshots about the last. `file`: a tensor file, such as a gradient."""
    normalization: Literal["none", "tensor", "filter", "global"] | None = None
    """How the direction is scaled to the weights; default: `slice.normalization` for a random direction, otherwise
    `none`, so that coordinate 1 is the whole displacement, update or file (`pca`: as far as the run went)."""
    component: int = Field(default=1, ge=1)
    """Which principal component, 1 being the largest (`pca`)."""
    file: Path | None = None
    """A safetensors file with a tensor of the checkpoint's name and shape for each one that moves (`file`)."""

    @model_validator(mode="after")
    def _belongs_together(self) -> DirectionConfig:
        if (self.file is not None) != (self.kind == "file"):
            raise ValueError(f"kind = {self.kind!r} and file = {self.file}: set file with kind = 'file' and only then")
        if self.component != 1 and self.kind != "pca":
            raise ValueError(f"component = {self.component} needs kind = 'pca', not {self.kind!r}")
        if self.kind == "random" and self.normalization == "none":
            raise ValueError("normalization = 'none' leaves a random direction without a unit; choose another")
        return self


class SliceConfig(StrictConfig):
    """The directions; see `directions.SliceSpec`."""

    seeds: list[int] = Field(default=[0], min_length=1)
    """One slice per seed; the same seed draws the same noise for every snapshot."""
    normalization: Literal["tensor", "filter", "global"] = "tensor"
    """How random directions are scaled to the weights."""
    alpha: DirectionConfig = DirectionConfig()
    """The direction δ of the axis α."""
    beta: DirectionConfig = DirectionConfig()
    """The direction η of the axis β."""
    orthogonalize: bool = False
    """Take out of η its part along δ (Gram-Schmidt over all weights that move), after both are scaled."""
    run: Path | None = None
    """Directory of the training run whose snapshots the directions and `displacement_norm` refer to; default: the
    directory that holds the measured snapshot."""
    include: list[str] = Field(default=["*"], min_length=1)
    """Globs of checkpoint tensor names that move."""
    exclude: list[str] = []
    """Globs of checkpoint tensor names that stand still."""

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) != len(seeds) or min(seeds) < 0 or max(seeds) > LARGEST_SEED:
            raise ValueError(f"seeds must be distinct integers between 0 and {LARGEST_SEED} (2^63 - 1), got {seeds}")
        return seeds

    @model_validator(mode="after")
    def _seeds_matter(self) -> SliceConfig:
        if len(self.seeds) > 1 and "random" not in (self.alpha.kind, self.beta.kind):
            raise ValueError(f"seeds = {self.seeds} would measure one slice several times: no axis is random; give one")
        return self


class EnvConfig(StrictConfig):
    """What the policy is asked: any single-agent chat taskset of verifiers."""

    id: str = "rlvr-alphabet-sort"
    """Taskset id, as for `vf-eval`; its package must be installed."""
    taskset: dict[str, Any] = {}
    """Options of the taskset (what `vf-eval` takes as `--env.taskset.*`)."""
    num_prompts: int = Field(default=32, ge=1, le=MOST_EPISODES)
    """The first so many tasks of the taskset, the same at every point of every snapshot."""
    rollouts: int = Field(default=4, ge=1, le=MOST_EPISODES)
    """Episodes per task and point, and per task in the checkpoint's own batch."""
    max_concurrent: int = Field(default=512, ge=1)
    """Episodes in flight per server."""

    @model_validator(mode="after")
    def _bounded(self) -> EnvConfig:
        if self.num_prompts * self.rollouts > MOST_EPISODES:
            raise ValueError(
                f"num_prompts × rollouts = {self.num_prompts * self.rollouts:,} episodes per point, at most "
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
    """The training objective that the landscape reports, by the functions that train; default: GRPO's clipped one."""

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
        """Whether it is GRPO's clipped objective, averaged over tokens, as every landscape before had it."""
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
    """vLLM's share of a GPU; the slice's float32 copies (12 bytes per parameter) need room beside it."""
    directions_memory: Literal["auto", "float32", "half", "regenerated"] = "auto"
    """How a server started here keeps the directions. `auto`: float32 on the GPU, else on the host, else `regenerated`
    (drawn again for each move: slow, the same weights), whichever fits. `half`: in 16 bits, other directions by their
    rounding. Servers in `urls` have the environment variable RLVR_LANDSCAPE_DIRECTIONS_MEMORY instead."""
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
    """Seconds without any of `urls` until a sweep gives up; a server that it launched itself is not waited for."""
    log: Path | None = None
    """Log of the local server; default: server.log in `output`."""


class SweepConfig(StrictConfig):
    """A sweep: snapshots × designs, by default a grid on each slice."""

    output: Path = Path("outputs/sweep")
    """Directory of the journal and the datasets."""
    snapshots: list[str] = Field(default=["tiny-sorter"], min_length=1)
    """Hugging Face checkpoint directories, or `tiny-sorter`, the policy shipped with the package."""
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Seed of all sampling: the same (prompt, rollout, turn) draws the same noise at every point."""
    design: str = "grid"
    """Which policies around each snapshot are measured: a name in `designs.DESIGNS`, or a designer's import path."""
    design_options: dict[str, Any] = {}
    """Options of a designer that is named by its import path."""
    grid: GridConfig = GridConfig()
    """The points of the design `grid`."""
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
    dry_run: bool = False
    """Print the resolved configuration and the expected cost, then stop."""

    @model_validator(mode="after")
    def _belongs_to_the_design(self) -> SweepConfig:
        if self.design_options and "." not in self.design:
            raise ValueError(f"design_options are for a designer named by its import path, not for {self.design!r}")
        if self.design != "grid" and self.grid != GridConfig():
            raise ValueError(f"[grid] belongs to design = 'grid', not to {self.design!r}; leave the table out")
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

    def provenance(self) -> dict[str, Any]:
        """What determines the numbers, JSON-able; `from_provenance` turns it back into a configuration."""
        data = self.model_dump(
            mode="json",
            exclude={
                *("output", "snapshots", "save_traces", "shard", "until_ci_width", "until_ci_of", "dry_run", "server")
            },
        )
        # A slice's own seed is part of its identity, the list of all of them is not.
        del data["slice"]["seeds"], data["slice"]["run"], data["env"]["max_concurrent"]
        # A slice of two plain random directions is named as before there were others: old journals continue.
        plain = SliceConfig().model_dump(mode="json")
        for key in ("alpha", "beta", "orthogonalize"):
            if data["slice"][key] == plain[key]:
                del data["slice"][key]
        if data["grid"]["find"] is None:
            del data["grid"]["find"]
        # The usual objective is named as before there were others.
        if data["surrogate"]["objective"] == "grpo":
            del data["surrogate"]["objective"]
        if not data["surrogate"]["options"]:
            del data["surrogate"]["options"]
        # A grid is named as before there were other designs; of those, only their own options count.
        if data["design"] == "grid":
            del data["design"]
        else:
            del data["grid"]
        if not data["design_options"]:
            del data["design_options"]
        server: dict[str, Any] = {"dtype": self.server.dtype, "max_model_len": self.server.max_model_len}
        if self.server.directions_memory == "half":
            server["directions_memory"] = "half"
        return data | {"server": server}

    @classmethod
    def from_provenance(cls, data: dict[str, Any]) -> SweepConfig:
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


def dry_run_report(config: SweepConfig) -> str:
    """The resolved configuration, the number of points, an upper bound on the tokens, and the disk space."""
    alphas, betas = config.grid.alpha.values(), config.grid.beta.values()
    slices = len(config.snapshots) * len(config.slice.seeds)
    points = len(alphas) * len(betas)
    batch = config.env.num_prompts * config.env.rollouts
    episodes = slices * (points + 1) * batch
    dump = config.model_dump(mode="json", exclude={"server": {"token"}})
    generated = episodes * config.sampling.max_tokens
    scored = slices * (points + 1) * batch * config.server.max_model_len
    # Nine float32 values per rollout and point, halved by compression in practice, kept once in the journal too.
    disk = slices * points * batch * 9 * 4 * 2
    most = "at most " if config.until_ci_width is not None else ""
    probes = "" if config.grid.find is None else ", ranges to be found by probes"
    return "\n".join(
        [
            json.dumps(dump, indent=2),
            f"grid        {most}{len(alphas)} × {len(betas)} = {points} points, {slices} slices "
            f"({len(config.snapshots)} snapshots × {len(config.slice.seeds)} seeds){probes}",
            f"episodes    {most}{episodes:,} ({config.env.num_prompts} prompts × {config.env.rollouts} rollouts "
            "per point)",
            f"sampled     at most {generated:,} tokens per turn of an episode",
            f"scored      at most {scored:,} tokens (episodes are usually far shorter than max_model_len)",
            f"disk        at most {disk / 2**20:,.1f} MiB",
            f"output      {config.output}",
        ]
    )
