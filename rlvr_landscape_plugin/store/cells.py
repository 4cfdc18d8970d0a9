"""The cells of a point: which of its values a file holds, and which are not measured yet.

A point has one fresh rollout per (task, rollout), and one score per completion of the checkpoint's own batch. A sweep
that grows adds tasks, rollouts or completions, so a point may lie in several files, each with a rectangle of cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import numpy as np


class Cells(NamedTuple):
    """A rectangle of fresh rollouts, and for the same tasks the first completions of the checkpoint."""

    tasks: range
    rollouts: range
    """Fresh rollouts of each of these tasks; may be empty."""
    scored: int
    """The first so many completions of each of these tasks were scored; 0: none."""


@dataclass(frozen=True)
class Extent:
    """How much is measured at a point."""

    prompts: int
    rollouts: int
    """Fresh rollouts per task."""
    completions: int
    """Completions per task of the checkpoint's own batch."""
    apart: bool = False
    """Whether the completions have a dimension of their own (`base_rollout`)."""
    of_batch: bool = False
    """Whether the objective of one completion depends on the completions of all tasks."""

    @property
    def cells(self) -> Cells:
        """All of it."""
        return Cells(range(self.prompts), range(self.rollouts), self.completions)

    def of_first(self, prompts: int) -> Extent:
        """The same on the first `prompts` tasks."""
        return replace(self, prompts=prompts)

    def judges(self, cells: Cells) -> bool:
        """Whether the objective was computed in these cells as this extent computes it.

        Advantages are relative to all completions of a task. So one more completion changes the objective of the
        others; for an objective of the whole batch, one more task does too.
        """
        return cells.scored == self.completions and (not self.of_batch or cells.tasks == range(self.prompts))


def missing(found: Iterable[Cells], asked: Extent) -> list[Cells]:
    """What is still to be measured at a point that has files with the cells `found`: as few rectangles as there are.

    Rollouts that are there are never asked for again. Completions are scored again where the advantages of their task
    have changed.
    """
    lacking = np.ones((asked.prompts, asked.rollouts), bool)
    unscored = np.ones(asked.prompts, bool)
    for cells in found:
        tasks = slice(cells.tasks.start, cells.tasks.stop)
        lacking[tasks, cells.rollouts.start : cells.rollouts.stop] = False
        if asked.judges(cells):
            unscored[tasks] = False
    parts: list[Cells] = []
    for tasks in _alike(lacking, None if asked.of_batch else unscored):
        spans = list(_spans(lacking[tasks.start]))
        scored = asked.completions if unscored[tasks.start] and not asked.of_batch else 0
        if scored and not spans:
            spans = [range(0)]
        parts += [Cells(tasks, span, 0 if at else scored) for at, span in enumerate(spans)]
    if asked.of_batch and unscored.any():
        whole = range(asked.prompts)
        at = next((index for index, cells in enumerate(parts) if cells.tasks == whole), None)
        if at is None:
            parts.append(Cells(whole, range(0), asked.completions))
        else:
            parts[at] = parts[at]._replace(scored=asked.completions)
    return parts


def _alike(lacking: np.ndarray, unscored: np.ndarray | None) -> Iterator[range]:
    """Runs of consecutive tasks that lack the same."""
    keys = [(row.tobytes(), unscored is not None and bool(unscored[task])) for task, row in enumerate(lacking)]
    start = 0
    for _, group in groupby(keys):
        stop = start + len(list(group))
        yield range(start, stop)
        start = stop


def _spans(row: np.ndarray) -> Iterator[range]:
    """Where consecutive values are true."""
    start = 0
    for value, group in groupby(row.tolist()):
        stop = start + len(list(group))
        if value:
            yield range(start, stop)
        start = stop
