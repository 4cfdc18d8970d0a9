"""What a sweep measures around one snapshot in one design, in which order, and which part of it is not measured yet.
Starts no server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rlvr_landscape_plugin.config import SweepConfig
from rlvr_landscape_plugin.designs import DESIGNS, Design, Point, Surroundings, find_designer
from rlvr_landscape_plugin.directions import GENERATOR, Displacement
from rlvr_landscape_plugin.files import JsonObject
from rlvr_landscape_plugin.snapshot import Snapshot
from rlvr_landscape_plugin.store import Journal, Place, Subset, holds
from rlvr_landscape_plugin.sweep.progressive import Refinement, check_progressive


class Portion(NamedTuple):
    """A point and a range of tasks, measured together."""

    place: Place
    start: int
    """The first of the tasks."""
    stop: int
    """The end of them."""


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
        # Without the base batch that they were scored against, points may be of no use.
        covered = self.journal.covered() if self.journal.read_base() is not None else {}
        while True:
            stop = self.subset.prompts if self.subset else self.tasks
            starts = ((point.place, covered.get(point.place, 0)) for point in self.points)
            missing = [Portion(place, int(start), stop) for place, start in starts if start < stop]
            if missing or self.refinement is None or not self.refinement.advance():
                return missing

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
        if self.journal.read_facts(self.own_facts) is None:
            return False
        done, total = self.journal.status()
        return (done < total and self.refinement is None) or self.journal.read_recheck() is not None

    @property
    def waiting_for(self) -> str:
        """What other shards have not measured yet, as a sentence; empty when the dataset can be written."""
        if self.share[1] == 1 or holds(self.journal, self.dataset):
            return ""
        done, total = self.journal.status()
        if done < total:
            return f"{total - done} of {total} points are not measured yet"
        absent = [name for name in self.facts if self.journal.read_facts(name) is None]
        return f"no {', '.join(absent)} yet" if absent else ""


def make_plans(config: SweepConfig, around: Surroundings, prompts: str, reward_mode: str) -> list[Plan]:
    """Open or create the journals of the designs around one snapshot; `prompts`: the hash of the prompt set.

    Raises `ConfigurationError`, `SnapshotError` or `StoreError` naming key or file.
    """
    designs = find_designer(config.design, DESIGNS)(config, around)
    return [_plan(config, around, design, prompts, reward_mode) for design in designs]


def _plan(config: SweepConfig, around: Surroundings, design: Design, prompts: str, reward_mode: str) -> Plan:
    root, total = Path(config.output), config.env.num_prompts
    if config.until_ci_width is not None:
        check_progressive(design.frame, total, config.until_ci_width, config.until_ci_of)
    identity = snapshot_identity(config, design.snapshot, prompts) | dict(design.identity)
    journal = Journal(root / design.journal_name, design.frame, identity)
    dataset = root / design.dataset_name
    # Read before anything is measured, so that a damaged snapshot 0 is reported at once, not after hours.
    done = holds(journal, dataset)
    far = Displacement(math.nan, math.nan, "") if done else around.trajectory.displacement
    refinement = None
    if config.until_ci_width is not None:
        refinement = Refinement(journal, total, config.until_ci_width, config.until_ci_of)
    return Plan(design, journal, dataset, far, reward_mode, config.share, total, around.found, refinement)


def snapshot_identity(config: SweepConfig, snapshot: Snapshot, prompts: str) -> JsonObject:
    """What determines the numbers around a snapshot, whichever policies are measured."""
    return {
        "configuration": config.provenance(),
        "step": snapshot.step,
        "snapshot_sha256": snapshot.sha256,
        "directions_generator": GENERATOR,
        "prompts_sha256": prompts,
    }
