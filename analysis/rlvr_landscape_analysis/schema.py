"""Names of everything that a sweep or a training run leaves on disk: each is defined here only, for writers and
readers.

Dimensions, variables with their units, status flags and file names. The plugin writes with these names and the analysis
reads with them. Change a name here only together with a line in CHANGELOG.md: users' scripts contain these names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

PROMPT, ROLLOUT, BASE_ROLLOUT = "prompt", "rollout", "base_rollout"
GRID = ("alpha", "beta")
"""Dimensions of a point in the design `grid`; other designs name their own."""
PER_TASK = (PROMPT, ROLLOUT)
"""Dimensions of a value per rollout."""

OK, TRUNCATED, ERROR = 0, 1, 2
"""Values of `status`: a whole rollout, one cut by a length limit, one that failed. Only the last may lack a reward."""
STATUS_MEANINGS = "ok truncated error"
"""CF's `flag_meanings` of `status`, in the order of the values."""

SOLVED = 0.99
"""Reward from which a rollout counts as solved, unless the caller says otherwise."""

Family = Literal["rollout", "completion", "point", "base"]
"""What a variable describes: a fresh rollout at a point, a checkpoint completion at a point, a point, a checkpoint
completion."""


@dataclass(frozen=True)
class Variable:
    """One variable of a dataset."""

    family: Family
    dtype: str
    """NumPy's short name of the stored type, such as `f4`."""
    units: str
    long_name: str
    comment: str = ""
    attributes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Further netCDF attributes."""
    required: bool = True
    """Whether a point or a base batch without it is refused. One that is not required is a float, NaN where it is
    missing. Every variable that is added later is of that sort, because journals without it are continued."""

    def __post_init__(self) -> None:
        if not self.required and not self.dtype.startswith("f"):
            raise ValueError(f"{self.long_name}: dtype {self.dtype!r} cannot say that it is missing; use a float")

    def dims(self, point: tuple[str, ...], base_rollout: str = ROLLOUT) -> tuple[str, ...]:
        """Its dimensions where a point has the dimensions `point`; `base_rollout` names the checkpoint's rollouts."""
        return {
            "rollout": (*point, PROMPT, ROLLOUT),
            "completion": (*point, PROMPT, base_rollout),
            "point": point,
            "base": (PROMPT, base_rollout),
        }[self.family]

    @property
    def attrs(self) -> dict[str, Any]:
        """Its netCDF attributes."""
        described = {"long_name": self.long_name, "units": self.units}
        return described | ({"comment": self.comment} if self.comment else {}) | dict(self.attributes)

    @property
    def of_point(self) -> bool:
        """Whether it is measured at each point."""
        return self.family != "base"


_STATUS = MappingProxyType({"flag_values": np.array([OK, TRUNCATED, ERROR], np.int8), "flag_meanings": STATUS_MEANINGS})

SCHEMA: dict[str, Variable] = {
    "reward": Variable("rollout", "f4", "1", "verifier reward of a fresh rollout"),
    "kl_k1": Variable(
        "completion",
        "f4",
        "nat",
        "KL divergence from the checkpoint policy, estimator k1, per checkpoint completion",
        "sum over sampled tokens of -log rho, rho = pi(alpha, beta) / pi(0, 0); unbiased for D_KL(pi(0,0) || pi)",
    ),
    "kl_k3": Variable(
        "completion",
        "f4",
        "nat",
        "KL divergence from the checkpoint policy, estimator k3, per checkpoint completion",
        "sum over sampled tokens of rho - 1 - log rho; non-negative, heavy-tailed far from the origin",
    ),
    "surrogate": Variable(
        "completion",
        "f4",
        "1",
        "clipped GRPO objective of a checkpoint completion, summed over its tokens",
        "sum over tokens of min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A); "
        "J = sum(surrogate) / sum(base_tokens)",
    ),
    "clip_fraction": Variable(
        "completion", "f4", "1", "share of a checkpoint completion's tokens where the clip binds"
    ),
    "entropy": Variable(
        "rollout",
        "f4",
        "nat",
        "mean surprisal of a fresh rollout's own tokens, nat per token",
        "mean over sampled tokens of -log pi(alpha, beta); estimates the token entropy",
    ),
    "completion_tokens": Variable("rollout", "i4", "token", "sampled tokens of a fresh rollout, all turns"),
    "truncated": Variable("rollout", "i1", "1", "whether a length limit cut a fresh rollout (0 or 1)"),
    "status": Variable(
        "rollout",
        "i1",
        "1",
        "outcome of a fresh rollout",
        "reward is missing where the rollout failed",
        _STATUS,
    ),
    "format_failure": Variable(
        "rollout", "f4", "1", "share of a fresh rollout's turns without the asked-for format", required=False
    ),
    "realised_step": Variable(
        "point",
        "f8",
        "1",
        "relative norm of the weight change that the server really holds",
        "norm(theta(alpha, beta) - theta) / norm(theta), both after rounding to the server's dtype",
    ),
    "seconds_move": Variable("point", "f4", "s", "wall time of moving the weights"),
    "seconds_sample": Variable("point", "f4", "s", "wall time of the fresh rollouts, rewards included"),
    "seconds_score": Variable("point", "f4", "s", "wall time of scoring the checkpoint's completions"),
    "base_reward": Variable("base", "f4", "1", "verifier reward of a checkpoint completion"),
    "base_status": Variable("base", "i1", "1", "outcome of a checkpoint rollout", "", _STATUS),
    "base_advantage": Variable("base", "f8", "1", "group-relative advantage of a checkpoint completion"),
    "base_tokens": Variable("base", "i4", "token", "sampled tokens of a checkpoint completion, all turns"),
    "surrogate_weight": Variable(
        "base",
        "f8",
        "1",
        "weight of a checkpoint completion in the objective",
        "J = sum(surrogate) / sum(surrogate_weight); absent for GRPO's clipped objective, token by token",
        required=False,
    ),
    "base_logprob": Variable(
        "base",
        "f8",
        "nat",
        "log-probability of a checkpoint completion, re-scored at the origin",
        "",
        MappingProxyType({"ancillary_variables": "base_sampled_logprob recheck_logprob"}),
    ),
    "base_sampled_logprob": Variable(
        "base",
        "f8",
        "nat",
        "log-probability of a checkpoint completion as the sampler saw it",
        "its difference from base_logprob is the numerical noise floor between decoding and scoring",
    ),
    "recheck_logprob": Variable(
        "base", "f8", "nat", "log-probability of a checkpoint completion, scored at the origin after the last point"
    ),
    "recheck_max_difference": Variable(
        "base",
        "f4",
        "nat",
        "largest difference of one token's log-probability between the first scoring and the recheck",
    ),
}
"""Every variable of a dataset that is measured."""

OF_GROUP = ("surrogate", "clip_fraction")
"""Variables of a completion that depend on its advantage, and so on all completions of its task."""

METRIC = "metric_"
"""Beginning of the names of a taskset's own metrics; one of them, `format_failure`, has its name from before."""


def metric_name(metric: str) -> str:
    """The variable that holds a metric of the taskset: its name, with `_` for what is no letter or digit."""
    return metric if metric == "format_failure" else METRIC + re.sub(r"\W+", "_", metric)


def variable_of(name: str) -> Variable | None:
    """What a variable of that name is: one of `SCHEMA`, or a metric of the taskset; None for any other."""
    if name.startswith(METRIC):
        long_name = f"metric {name.removeprefix(METRIC)!r} of a fresh rollout"
        return Variable("rollout", "f4", "1", long_name, "missing where the rollout failed or had none", required=False)
    return SCHEMA.get(name)


DISPLACEMENT_NORM = Variable("base", "f8", "1", "norm of the checkpoint's displacement from snapshot 0, ‖θ_t − θ_0‖")
"""A scalar: it has no dimension."""
DISPLACEMENT_RADIUS = Variable(
    "point",
    "f8",
    "1",
    "norm of the weight change in units of the checkpoint's displacement from snapshot 0",
    "realised_step * norm(theta) / displacement_norm",
)

JOURNAL_FILE, BASE_FILE, RECHECK_FILE = "journal.json", "base.nc", "recheck.nc"
POINTS_FOLDER, TRACES_FOLDER = "points", "traces"
"""Inside a journal: one file per point, and its conversations."""
DIRECTIONS_FOLDER = "directions"
"""Inside a sweep's output: the directions that servers do not draw themselves."""
TOKEN_LOGPROB = "sampled_logprob"
"""Variable of `base.nc`: log-probability of each sampled token as the sampler saw it, nat."""
RUN_FILE, METRICS_FILE, EVALUATIONS_FILE = "run.json", "metrics.jsonl", "evaluations.jsonl"
SNAPSHOTS_FOLDER = "snapshots"
"""Inside a training run's output."""

METRIC_UNITS = MappingProxyType(
    {"entropy": "nat", "kl_previous": "nat", "kl_base": "nat", "response_tokens": "token", "seconds": "s"}
)
"""Units of the numbers in a training run's journals; all others have the unit 1."""
TASK_REWARDS = "task_rewards"
"""Key of a held-out evaluation: mean reward per task, null where every episode failed."""

PROMPTS_SHA256, PROGRESSIVE, SYNTHETIC = "prompts_sha256", "progressive", "synthetic"
"""Attributes of a dataset: digest of its prompts, the record of a progressive sweep as JSON, and, only where the values
were computed instead of measured, the name of the truth behind them."""
DIRECTION_ATTRIBUTE = "direction_{axis}"
"""Attribute that says which direction an axis follows."""
DIRECTION_KIND = "direction_kind"
"""Attribute of a census whose directions are no random ones of the whole weight space: their kind."""
REWARD_MODE = "reward_mode"
"""Option of a taskset's table `task`, and attribute of datasets whose rewards are a control."""
PASS_THRESHOLD = "pass_threshold"
"""Attribute of a dataset: the reward from which a rollout passes, as the sweep's configuration fixed it."""
TRAINED_ON = "training_reward_mode"
"""Attribute of a dataset around a snapshot whose training was paid by a control: its reward mode."""
VERIFIER = "verifier"
"""The reward mode of a taskset whose reward is that of its verifier, and of one that has no such option."""

LANDSCAPE_FILE = re.compile(r"landscape_step(\d+)_slice(-?\d+)\.nc$")
"""Dataset of one snapshot and slice of the design `grid`: step and seed of the slice."""
GRID_JOURNAL = re.compile(r"step(\d+)_slice(-?\d+)$")
"""Its journal's directory."""
GRID_POINT_FILE = re.compile(r"(a\d+_b\d+)(?:_p\d+-\d+(?:_r\d+-\d+_c\d+)?)?\.nc")
"""A point in that journal, and a portion of one."""


def numbered(name: str, number: int) -> str:
    """The file of the number-th request to a journal, from 1: `base.nc`, then `base_2.nc`, `base_3.nc`, …"""
    stem, dot, ending = name.partition(".")
    return name if number == 1 else f"{stem}_{number}{dot}{ending}"


def numbered_glob(name: str) -> str:
    """A glob for the files of that name of all requests."""
    stem, dot, ending = name.partition(".")
    return f"{stem}*{dot}{ending}"


def number_of(path: Path) -> int:
    """The inverse of `numbered`."""
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isdecimal() else 1


def reward_mode(taskset: Mapping[str, Any]) -> str:
    """The reward mode of a taskset with these options (`env.taskset` of a configuration)."""
    return str(taskset.get("task", {}).get(REWARD_MODE, VERIFIER))


def paid_by(attributes: Mapping[Any, Any]) -> str:
    """The reward mode of a dataset with these attributes."""
    return str(attributes.get(REWARD_MODE, VERIFIER))


def pass_threshold(attributes: Mapping[Any, Any], asked: float | None = None) -> float:
    """The reward that passes: as asked for, else as the dataset's sweep fixed it, else `SOLVED`."""
    return float(attributes.get(PASS_THRESHOLD, SOLVED) if asked is None else asked)


def grid_name(step: int, slice_seed: int) -> str:
    """Name of the journal of one snapshot and slice of the design `grid`."""
    return f"step{step:06d}_slice{slice_seed}"


def design_name(step: int, design: str) -> str:
    """Name of the journal of one snapshot and another design."""
    return f"step{step:06d}_{design}"


def landscape_file(step: int, slice_seed: int) -> str:
    """Name of the dataset of one snapshot and slice of the design `grid`."""
    return f"landscape_{grid_name(step, slice_seed)}.nc"


def design_file(step: int, design: str) -> str:
    """Name of the dataset of one snapshot and another design."""
    return f"{design}_step{step:06d}.nc"
