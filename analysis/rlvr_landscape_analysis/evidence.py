"""The censuses, paths and boundaries of training runs: the data that the claims need, read and analysed together.

A run's snapshots share their prompts, so all arrays are reduced to the prompts that all snapshots have before anything
is compared. Several runs of one objective are analysed together; a run whose rewards are not the verifier's is a
control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.designs import (
    CensusPoints,
    Unfinished,
    census_points,
    list_designs,
    list_unfinished,
    open_design,
    partial_census,
)
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.schema import DIRECTION_KIND, TRAINED_ON, VERIFIER, design_file, paid_by
from rlvr_landscape_analysis.statistics.boundary import boundary, boundary_change
from rlvr_landscape_analysis.statistics.census import census
from rlvr_landscape_analysis.statistics.path import path as path_statistics
from rlvr_landscape_analysis.statistics.path import prompts_of
from rlvr_landscape_analysis.statistics.resample import Bootstrap


@dataclass
class RunEvidence:
    """The datasets of one run, by step."""

    name: str
    censuses: dict[int, xr.Dataset] = field(default_factory=dict)
    paths: dict[int, xr.Dataset] = field(default_factory=dict)
    boundaries: dict[int, xr.Dataset] = field(default_factory=dict)
    unfinished: list[Unfinished] = field(default_factory=list)
    """What is being measured, or was interrupted; no claim rests on it."""

    @property
    def reward_mode(self) -> str:
        """`verifier`, or the name of the control that gave the run's rewards. Raises `AnalysisError` where its datasets
        disagree."""
        modes = {
            paid_by(data.attrs) for group in (self.censuses, self.paths, self.boundaries) for data in group.values()
        }
        if len(modes) > 1:
            raise AnalysisError(
                f"{self.name}: its datasets were paid by different rewards ({', '.join(sorted(modes))})"
            )
        return modes.pop() if modes else VERIFIER

    @property
    def restricted(self) -> str:
        """The kind of the censuses' directions where these are a part of the weight space only; else empty."""
        return next((str(d.attrs[DIRECTION_KIND]) for d in self.censuses.values() if DIRECTION_KIND in d.attrs), "")

    @property
    def trained_on(self) -> str:
        """What paid its training: `verifier`, or the name of a control. Raises `AnalysisError` where its datasets
        disagree."""
        groups = (self.censuses, self.paths, self.boundaries)
        modes = {
            str(data.attrs.get(TRAINED_ON, VERIFIER)) for group in groups for step, data in group.items() if step > 0
        }
        if len(modes) > 1:
            raise AnalysisError(
                f"{self.name}: its snapshots were trained on different rewards ({', '.join(sorted(modes))})"
            )
        return modes.pop() if modes else VERIFIER

    @property
    def control(self) -> bool:
        """Whether the rewards of its training, or those of its points, carry no information about the task."""
        return self.reward_mode != VERIFIER or self.trained_on != VERIFIER

    @cached_property
    def points(self) -> dict[int, CensusPoints]:
        """Step → the census as arrays, on the prompts that the run's censuses share."""
        steps = sorted(self.censuses)
        labels = [f"{self.name}, census of step {step}" for step in steps]
        found = census_points([self.censuses[step] for step in steps], run=self.name, names=labels)
        return dict(zip(steps, found, strict=True))

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        """File of each dataset → its attributes."""
        groups = {"census": self.censuses, "path": self.paths, "boundary": self.boundaries}
        return {
            design_file(step, design): dict(data.attrs)
            for design, group in groups.items()
            for step, data in group.items()
        }

    def __bool__(self) -> bool:
        return bool(self.censuses or self.paths or self.boundaries or self.unfinished)


def open_evidence(*paths: str | Path, steps: set[int] | None = None, name: str = "") -> RunEvidence:
    """The finished censuses, paths and boundaries of one run, in memory; empty where there is none.

    `paths`: output directories of sweeps, one or several (a census, a path and a boundary are sweeps of their own).
    `steps` restricts the snapshots. Raises `AnalysisError` naming a file that is not what its name says, or two
    directories that hold the same design of the same step.
    """
    run = RunEvidence(name or (Path(paths[0]).name if paths else ""))
    groups = {"census": run.censuses, "path": run.paths, "boundary": run.boundaries}
    seen: dict[tuple[str, int], Path] = {}
    for root in map(Path, paths):
        if not root.is_dir():
            raise AnalysisError(f"{root} is not a directory; give the output directory of a sweep")
        for design, files in list_designs(root).items():
            for step, file in files.items():
                if steps is not None and step not in steps:
                    continue
                if (design, step) in seen:
                    raise AnalysisError(f"{file} and {seen[design, step]} are both the {design} of step {step}")
                seen[design, step] = file
                with open_design(file, design) as data:
                    if int(data["step"]) != step:
                        measured = int(data["step"])
                        raise AnalysisError(f"{file}: it was measured at step {measured}, its name says {step}")
                    groups[design][step] = data.load()
        run.unfinished += [one for one in list_unfinished(root) if steps is None or one.step in steps]
    return run


def check_runs(runs: Sequence[RunEvidence]) -> None:
    """Raise `AnalysisError` when two runs have one name: their directions would be treated as the same."""
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AnalysisError(f"two runs are called {twice[0]!r}; give each a name of its own")


@dataclass
class EvidenceAnalysis:
    """The statistics of one run's censuses, paths and boundaries."""

    name: str
    census: dict[int, xr.Dataset]
    """Step → `statistics.census.census`."""
    path: dict[int, xr.Dataset]
    """Step → `statistics.path.path`, against the census of the same step where there is one."""
    boundary: dict[int, xr.Dataset]
    """Step → `statistics.boundary.boundary`."""
    change: dict[int, xr.Dataset]
    """Step → `statistics.boundary.boundary_change` from the run's first boundary."""
    notes: list[str] = field(default_factory=list)


def analyse_evidence(
    run: RunEvidence,
    *,
    bootstrap: Bootstrap | None = None,
    threshold: float | None = None,
    fdr: float = 0.05,
) -> EvidenceAnalysis:
    """All statistics of one run's censuses, paths and boundaries.

    `threshold`: the reward that passes (default: as the sweep fixed it). A path whose prompts are not those of the
    census of its step is analysed alone, and a note says so.
    """
    settings = bootstrap or Bootstrap()
    confidence = settings.level
    notes: list[str] = []
    censuses = {
        step: census(points, confidence=confidence, fdr=fdr, seed=settings.seed) for step, points in run.points.items()
    }
    for step, points in run.points.items():
        if points.directions < points.all_directions or points.prompts < points.all_prompts:
            notes.append(
                f"{run.name}, census of step {step}: {points.all_directions - points.directions} directions and "
                f"{points.all_prompts - points.prompts} prompts are missing somewhere and are left out."
            )
        if run.restricted:
            notes.append(f"{run.name}, census of step {step}: all its directions are of the kind {run.restricted!r}.")
        shortest = float(np.nanmin(points.displacement)) if np.isfinite(points.displacement).any() else np.nan
        if shortest > 1:
            notes.append(
                f"{run.name}, census of step {step}: its nearest policy lies {shortest:.3g} displacements of the run "
                "away, further than training went."
            )
    for one in run.unfinished:
        found = partial_census(one) if one.design == "census" and one.step not in censuses else None
        used = ""
        if found is not None:
            try:
                (points,) = census_points([found], run=run.name, names=[f"{run.name}, census of step {one.step}"])
                censuses[one.step] = census(points, confidence=confidence, fdr=fdr, seed=settings.seed)
                used = f" The figures show its {points.directions} directions that are whole; no claim rests on them."
            except AnalysisError:
                used = " None of its directions is whole."
        notes.append(f"Unfinished: {one}.{used}")
    paths = {}
    for step, data in sorted(run.paths.items()):
        around = run.points.get(step)
        try:
            kept = None if around is None else prompts_of(data, around)
            paths[step] = path_statistics(data, around, census_kept=kept, confidence=confidence)
        except AnalysisError as error:
            if around is None:
                raise
            notes.append(f"{run.name}, path of step {step} is not compared with the census: {error}.")
            paths[step] = path_statistics(data, confidence=confidence)
    boundaries = {
        step: boundary(data, threshold=threshold, confidence=confidence)
        for step, data in sorted(run.boundaries.items())
    }
    first = min(run.boundaries, default=0)
    changes = {
        step: boundary_change(
            run.boundaries[first], run.boundaries[step], threshold=threshold, confidence=confidence, bootstrap=settings
        )
        for step in sorted(run.boundaries)
        if step != first
    }
    return EvidenceAnalysis(run.name, dict(sorted(censuses.items())), paths, boundaries, changes, notes)
