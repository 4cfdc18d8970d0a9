"""What a sweep measures of one snapshot and slice, in which order, and what of it is left. Starts no server."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlvr_landscape_plugin.config import SweepConfig
from rlvr_landscape_plugin.directions import (
    GENERATOR,
    Axis,
    Displacement,
    SliceSpec,
    Trajectory,
    fingerprint,
    prepare_slice,
)
from rlvr_landscape_plugin.snapshot import Snapshot
from rlvr_landscape_plugin.store import Cell, Journal, Rectangle
from rlvr_landscape_plugin.sweep.progressive import Refinement, check_progressive

DIRECTIONS = "directions"
"""Directory under `output` for the directions that servers do not draw themselves."""
Portion = tuple[int, int, int, int]
"""Grid indices (i, j) of a point, the first of the tasks to measure there, and the end of them."""


def grid_order(alphas: np.ndarray, betas: np.ndarray) -> list[tuple[int, int]]:
    """Every (i, j), the origin first and then outward: an interrupted sweep is already a smaller landscape."""
    cells = [(i, j) for i in range(len(alphas)) for j in range(len(betas))]
    return sorted(cells, key=lambda cell: (alphas[cell[0]] ** 2 + betas[cell[1]] ** 2, cell))


def shard_cells(alphas: np.ndarray, betas: np.ndarray, share: tuple[int, int]) -> list[tuple[int, int]]:
    """The i-th of n shares of the grid, (i, n) = `share`: every n-th point of `grid_order`."""
    index, count = share
    return grid_order(alphas, betas)[index - 1 :: count]


def slice_name(step: int, seed: int) -> str:
    """Name of the directory, and of the dataset, of one snapshot and slice."""
    return f"step{step:06d}_slice{seed}"


@dataclass
class Plan:
    """One snapshot × one slice, and the directory where its points go."""

    snapshot: Snapshot
    spec: SliceSpec
    journal: Journal
    dataset: Path
    identity: dict[str, Any]
    files: dict[Axis, Path]
    """The file of each direction that servers do not draw themselves."""
    words: dict[Axis, str]
    """Each direction in words."""
    displacement: Displacement
    reward_mode: str
    """What the taskset pays: the verifier's score, or a control."""
    share: tuple[int, int]
    """(i, n): this process measures the i-th of n shares of the points."""
    prompts: int
    """Tasks of the whole prompt set."""
    range_found: dict[str, Any] | None = None
    """How the range was found, if by probes."""
    refinement: Refinement | None = None
    """How far a progressive sweep of it is; None: everything is measured."""

    @property
    def part(self) -> Rectangle | None:
        """What is measured now, or was measured last; None: everything."""
        return self.refinement.rectangle if self.refinement else None

    @property
    def cells(self) -> list[Cell]:
        """The points of `part` that are this process's, in their order."""
        cells = shard_cells(self.journal.alphas, self.journal.betas, self.share)
        if self.part is None:
            return cells
        inside = set(self.part.cells)
        return [cell for cell in cells if cell in inside]

    @property
    def missing(self) -> list[Portion]:
        """What this process still has to measure now, in order; reads every finished point.

        A progressive sweep takes all looks that what is measured allows.
        """
        # Without the base batch that they were scored against, points may be of no use.
        covered = self.journal.covered() if self.journal.read_base() is not None else {}
        while True:
            stop = self.part.prompts if self.part else self.prompts
            missing = [(*cell, int(start), stop) for cell in self.cells if (start := covered.get(cell, 0)) < stop]
            if missing or self.refinement is None or not self.refinement.advance():
                return missing

    @property
    def facts(self) -> list[str]:
        """Files with what the servers of each share said about themselves, in the order of the shares."""
        count = self.share[1]
        return ["server.json"] if count == 1 else [f"server_{i + 1}of{count}.json" for i in range(count)]

    @property
    def own_facts(self) -> str:
        """The one of this process; written when its share is measured and checked."""
        return self.facts[self.share[0] - 1]

    @property
    def concluded(self) -> bool:
        """Whether nothing is left for this process to do after its points, the second look at the origin included."""
        if self.journal.read_facts(self.own_facts) is None:
            return False
        done, total = self.journal.status()
        return (done < total and self.refinement is None) or self.journal.read_recheck() is not None

    @property
    def others(self) -> str:
        """What other shards still owe, in words; empty when the dataset can be written."""
        if self.share[1] == 1 or self.journal.holds(self.dataset):
            return ""
        done, total = self.journal.status()
        if done < total:
            return f"{total - done} of {total} points are not measured yet"
        absent = [name for name in self.facts if self.journal.read_facts(name) is None]
        return f"no {', '.join(absent)} yet" if absent else ""


def plan_slice(
    config: SweepConfig,
    trajectory: Trajectory,
    seed: int,
    prompts: str,
    reward_mode: str,
    found: dict[str, Any] | None,
) -> Plan:
    """Open or create the journal of one slice; `prompts`: their hash, `found`: the range, if probes found it.

    Raises `ConfigurationError`, `SnapshotError` or `StoreError` naming key or file.
    """
    snapshot = trajectory.origin
    name = slice_name(snapshot.step, seed)
    root = Path(config.output)
    spec, files, words = prepare_slice(config.slice, seed, trajectory, root.resolve() / DIRECTIONS)
    identity = slice_identity(config, snapshot, spec, prompts) | ({"range_factor": found["factor"]} if found else {})
    factor = found["factor"] if found else 1.0
    alphas, betas = config.grid.alpha.values(factor), config.grid.beta.values(factor)
    total = config.env.num_prompts
    if config.until_ci_width is not None:
        check_progressive(alphas, betas, total, config.until_ci_width, config.until_ci_of)
    journal = Journal(root / name, alphas, betas, identity)
    dataset = root / f"landscape_{name}.nc"
    # Asked for before anything is measured, so that a damaged snapshot 0 is known before the hours, not after.
    far = trajectory.displacement if not journal.holds(dataset) else Displacement(math.nan, math.nan, "")
    refinement = None
    if config.until_ci_width is not None:
        refinement = Refinement(journal, total, config.until_ci_width, config.until_ci_of)
    return Plan(
        *(snapshot, spec, journal, dataset, identity, files, words, far, reward_mode, config.share, total),
        found,
        refinement,
    )


def slice_identity(config: SweepConfig, snapshot: Snapshot, spec: SliceSpec, prompts: str) -> dict[str, Any]:
    """Everything that determines the numbers of one snapshot and slice."""
    return {
        "configuration": config.provenance(),
        "step": snapshot.step,
        "snapshot_sha256": snapshot.sha256,
        "slice": spec.as_dict(),
        "directions_generator": GENERATOR,
        "directions_fingerprint": fingerprint(spec, snapshot.shapes),
        "prompts_sha256": prompts,
    }
