"""The snapshots of a sweep: what `snapshots` names, opened and compared with each other before a server starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlvr_landscape_plugin.errors import ConfigurationError, SnapshotError
from rlvr_landscape_plugin.snapshot import Snapshot, compare_tensors, expand, open_snapshot
from rlvr_landscape_plugin.snapshot.architecture import check_architecture

if TYPE_CHECKING:
    from rlvr_landscape_plugin.config import SweepConfig

logger = logging.getLogger("rlvr_landscape.sweep")


def named_snapshots(config: SweepConfig) -> list[Snapshot]:
    """The snapshots that the configuration names, each of another step and all of one architecture; reads no weights.

    Raises `SnapshotError` for what cannot be opened, `ConfigurationError` for two snapshots of one step.
    """
    paths = [path for reference in config.snapshots for path in expand(reference)]
    bases: dict[Path, Snapshot] = {}
    snapshots = []
    for path in paths:
        snapshot = open_snapshot(path, config.base_model)
        if snapshot.base is not None:
            # One object, so that the base of many adapters is hashed once.
            snapshot = replace(snapshot, base=bases.setdefault(snapshot.base.path, snapshot.base))
        snapshots.append(snapshot)
    steps: dict[int, Path] = {}
    for snapshot in snapshots:
        if snapshot.step in steps:
            raise ConfigurationError(
                f"snapshots {steps[snapshot.step]} and {snapshot.path} both say step {snapshot.step}; "
                "name the directories step_<N> or give each a manifest.json with its step"
            )
        steps[snapshot.step] = snapshot.path
        compare_tensors(snapshots[0].shapes, snapshot, f"the first snapshot ({snapshots[0].path.name})")
    return snapshots


def open_snapshots(config: SweepConfig) -> list[Snapshot]:
    """`named_snapshots`, whose weights differ from each other; reads every weight file.

    Raises `SnapshotError` for two snapshots with the same weights, unless `allow_equal_snapshots`.
    """
    snapshots = named_snapshots(config)
    for snapshot in snapshots:
        if not snapshot.tells_step:
            logger.warning(
                "%s does not tell its step, neither by its name nor in a manifest.json; it counts as step 0",
                snapshot.path,
            )
    if not config.allow_equal_snapshots:
        check_different(snapshots)
    return snapshots


def check_tensors(snapshots: Sequence[Snapshot]) -> None:
    """Raise `SnapshotError` unless the snapshots' tensors are those of their architecture, and finite; loads torch."""
    if reason := check_architecture(snapshots[0]):
        logger.warning("cannot check the tensors of %s ahead of the server: %s", snapshots[0].path, reason)
    # Many adapters share one base, which is read once.
    bases = {id(snapshot.base): snapshot.base for snapshot in snapshots if snapshot.base is not None}
    for snapshot in (*bases.values(), *snapshots):
        snapshot.check_finite()


def check_different(snapshots: Sequence[Snapshot]) -> None:
    """Raise `SnapshotError` where two steps have the same weights.

    A step whose manifest says that its learning rate was 0 may equal the step before it: the first step of a warm-up
    changes nothing.
    """
    seen: dict[str, Snapshot] = {}
    for snapshot in sorted(snapshots, key=lambda snapshot: snapshot.step):
        earlier = seen.setdefault(snapshot.sha256, snapshot)
        if earlier is snapshot or _had_no_learning_rate(snapshot, earlier):
            continue
        raise SnapshotError(
            f"{earlier.path} (step {earlier.step}) and {snapshot.path} (step {snapshot.step}) have the same weights. "
            "Some trainers save the base model at every step of a LoRA run: prime-rl in weights/ (its issue 1707), "
            "verl's merger in huggingface/. Then name the adapters instead (docs/checkpoints.md). Where training "
            "really changed nothing, as in a step of a warm-up, leave one out, or set allow_equal_snapshots = true"
        )


def _had_no_learning_rate(snapshot: Snapshot, earlier: Snapshot) -> bool:
    metrics = snapshot.manifest.metrics if snapshot.manifest is not None else {}
    return snapshot.step == earlier.step + 1 and metrics.get("learning_rate") == 0
