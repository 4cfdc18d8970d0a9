"""What a sweep measures around one snapshot in one design, in which order, and which part of it is not measured yet.
Starts no server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlvr_landscape_plugin.config import SweepConfig
from rlvr_landscape_plugin.designs import Design, Point, Surroundings
from rlvr_landscape_plugin.directions import Displacement
from rlvr_landscape_plugin.errors import StoreError
from rlvr_landscape_plugin.snapshot import Snapshot
from rlvr_landscape_plugin.store import Cells, Held, Journal, Place, Subset, asked_for, held, holds, lacks, missing
from rlvr_landscape_plugin.sweep.growth import Growth, PromptsHash, extent_of, make_designs, snapshot_identity
from rlvr_landscape_plugin.sweep.progressive import Refinement, check_progressive


class Portion(NamedTuple):
    """A point and some of its cells, measured together."""

    place: Place
    cells: Cells


@dataclass(frozen=True)
class Plan:
    """One design around one snapshot, and the journal where its points go."""

    design: Design
    journal: Journal
    dataset: Path
    displacement: Displacement
    reward_mode: str
    """What the taskset pays: the verifier's score, or a control."""
    share: tuple[int, int]
    """(i, n): this process measures the i-th of n shares of the points."""
    tasks: int
    """Tasks of the whole prompt set."""
    range_found: Mapping[str, object] | None = None
    """How the range was found, if by probes."""
    refinement: Refinement | None = None
    """State of its progressive sweep; None: it is not progressive, everything is measured."""
    larger: Held | None = None
    """What its dataset holds, where that is more than is asked for: then nothing is measured and the dataset stays."""

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot that is measured around."""
        return self.design.snapshot

    @property
    def subset(self) -> Subset | None:
        """What is measured now, or was measured last; None: everything."""
        return self.refinement.subset if self.refinement else None

    @property
    def points(self) -> list[Point]:
        """The points of `subset` that this process measures, in their order."""
        points = self.design.share(*self.share)
        if self.subset is None:
            return points
        inside = set(self.subset.places)
        return [point for point in points if point.place in inside]

    def missing(self) -> list[Portion]:
        """What this process still has to measure now, in order; reads every finished point.

        A progressive sweep makes every interim look that the points measured so far allow.
        """
        if self.larger is not None:
            return []
        # Without the base batch that they were scored against, points may be of no use.
        found = self.journal.found() if self.journal.base_shapes else {}
        while True:
            extent = self.journal.extent
            if self.subset is not None:
                extent = extent.of_first(self.subset.prompts)
            portions = [
                Portion(point.place, cells)
                for point in self.points
                for cells in missing(found.get(point.place, ()), extent)
            ]
            if portions or self.refinement is None or not self.refinement.advance():
                return portions

    @property
    def base_episodes(self) -> int:
        """Episodes of the checkpoint's own batch that are not there yet."""
        extent = self.journal.extent
        known = np.zeros((extent.prompts, extent.completions), bool)
        for prompts, completions in self.journal.base_shapes:
            known[:prompts, :completions] = True
        return int((~known).sum())

    @property
    def facts(self) -> list[str]:
        """Files with what the servers of each share reported about themselves, in the order of the shares."""
        count = self.share[1]
        return ["server.json"] if count == 1 else [f"server_{i + 1}of{count}.json" for i in range(count)]

    @property
    def own_facts(self) -> str:
        """The one of this process; written when its share is measured and checked."""
        return self.facts[self.share[0] - 1]

    @property
    def concluded(self) -> bool:
        """Whether this process has finished everything, including the recheck of the origin."""
        if self.larger is not None:
            return True
        if self.journal.read_facts(self.own_facts) is None:
            return False
        done, total = self.journal.status()
        return (done < total and self.refinement is None) or self.journal.read_recheck() is not None

    @property
    def waiting_for(self) -> str:
        """What other shards have not measured yet, as a sentence; empty when the dataset can be written."""
        if self.share[1] == 1 or self.larger is not None or holds(self.journal, self.dataset):
            return ""
        done, total = self.journal.status()
        if done < total:
            return f"{total - done} of {total} points are not measured yet"
        absent = [name for name in self.facts if self.journal.read_facts(name) is None]
        return f"no {', '.join(absent)} yet" if absent else ""


def make_plans(config: SweepConfig, around: Surroundings, prompts: PromptsHash, reward_mode: str) -> list[Plan]:
    """Open or create the journals of the designs around one snapshot.

    Raises `ConfigurationError`, `SnapshotError` or `StoreError` naming key or file.
    """
    return [_plan(config, around, design, prompts, reward_mode) for design in make_designs(config, around)]


def _plan(config: SweepConfig, around: Surroundings, design: Design, prompts: PromptsHash, reward_mode: str) -> Plan:
    root, total = Path(config.output), config.env.num_prompts
    if config.until_ci_width is not None:
        check_progressive(design.frame, total, config.until_ci_width, config.until_ci_of)
    identity = snapshot_identity(config, design.snapshot, prompts) | dict(design.identity)
    growth = Growth(config, around, design, prompts)
    journal = Journal(root / design.journal_name, design.frame, identity, extent_of(config), growth)
    dataset = root / design.dataset_name
    present, asked = held(journal, dataset), asked_for(journal)
    larger = present if present is not None and not lacks(present, asked) and lacks(asked, present) else None
    if larger is None:
        _check_grows(journal, dataset, present, asked)
    # Read before anything is measured, so that a damaged snapshot 0 is reported at once, not after hours.
    done = present is not None and not lacks(present, asked)
    far = Displacement(math.nan, math.nan, "") if done else around.trajectory.displacement
    refinement = None
    if config.until_ci_width is not None and larger is None:
        refinement = Refinement(journal, total, config.until_ci_width, config.until_ci_of, present)
    return Plan(design, journal, dataset, far, reward_mode, config.share, total, around.found, refinement, larger)


def _check_grows(journal: Journal, dataset: Path, present: Held | None, asked: Held) -> None:
    """Raise `StoreError` where a sweep asks for less than its dataset holds, or than what began its journal."""
    there, where = (present, dataset) if present is not None else (Held.of(*journal.began), journal.root)
    if lost := lacks(asked, there):
        raise StoreError(
            f"{where} holds what is not asked for now: {'; '.join(lost)}. A sweep can grow but not shrink: ask for "
            "this too, or choose another output directory"
        )
