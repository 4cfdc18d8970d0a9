"""The state of a progressive sweep of one slice: what it has measured, what its interim analyses found, and what is
measured next.

The rule itself (levels of the grid, intervals, when to stop) is `rlvr_landscape_analysis.statistics.progressive`, which
a replay of finished datasets uses too. Here it is applied to a journal.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import xarray as xr
from rlvr_landscape_analysis import AnalysisError
from rlvr_landscape_analysis.schema import GRID, PER_TASK
from rlvr_landscape_analysis.statistics import progressive
from rlvr_landscape_analysis.statistics.resample import MIN_PROMPTS

from rlvr_landscape_plugin.errors import ConfigurationError, StoreError
from rlvr_landscape_plugin.files import JsonObject
from rlvr_landscape_plugin.store import Frame, Held, Journal, Subset

Statistic = Literal["correlation", "beyond_radius"]


def check_progressive(frame: Frame, prompts: int, asked: float, statistic: Statistic) -> None:
    """Raise `ConfigurationError` for points and a prompt set that can never give the interval asked for."""
    if frame.names != GRID:
        raise ConfigurationError(
            f"until_ci_width = {asked} refines a grid of two axes; this design has {', '.join(frame.names) or 'none'}"
        )
    if prompts < MIN_PROMPTS:
        raise ConfigurationError(
            f"until_ci_width = {asked} needs an interval, which env.num_prompts = {prompts} cannot give; "
            f"set it to {MIN_PROMPTS} at least, better to some hundreds"
        )
    try:
        progressive.check_statistic(statistic, *(dimension.values for dimension in frame.dimensions))
    except AnalysisError as error:
        raise ConfigurationError(f"until_ci_width = {asked} with this grid: {error}") from error


class Refinement:
    """The looks (interim analyses) at one slice so far, and the part of it that is measured now or was measured last.

    Decisions are a function of the journal's files, so the same command takes them again when it continues.
    """

    def __init__(
        self, journal: Journal, prompts: int, asked: float, statistic: Statistic, present: Held | None = None
    ) -> None:
        """`prompts`: all that may be measured. `present`: what the dataset holds already, which stays part of it. The
        grid has passed `check_progressive`."""
        self._journal, self._prompts, self._asked, self._statistic = journal, prompts, asked, statistic
        alpha, beta = journal.frame.dimensions
        self._axes = alpha.values, beta.values
        self._present = present
        self._levels = progressive.grid_levels(*self._axes)
        self._design = progressive.first_design(*self._axes, prompts)
        self.looks: list[progressive.Look] = []

    @property
    def subset(self) -> Subset:
        """What is measured now, or was measured last: what is analysed, and what the dataset held before."""
        analysed, present = self._analysed, self._present
        if present is None:
            return analysed
        indices = [
            tuple(sorted({*chosen, *np.flatnonzero(np.isin(axis, np.asarray(present.axes[name]))).tolist()}))
            for name, axis, chosen in zip(GRID, self._axes, analysed.indices, strict=True)
        ]
        return Subset(tuple(indices), max(analysed.prompts, present.prompts))

    @property
    def _analysed(self) -> Subset:
        """What the next look is at."""
        rows, columns = self._levels[self._design.level]
        return Subset((tuple(rows.tolist()), tuple(columns.tolist())), self._design.prompts)

    def advance(self) -> bool:
        """Analyse the present subset, which is completely measured; returns whether another one is to be measured."""
        if not self.looks or self.looks[-1].design != self._design:
            try:
                look = progressive.look(self._data(), *self._axes, self._design, statistic=self._statistic)
            except AnalysisError as error:
                raise StoreError(f"{self._journal.root}: what is measured cannot be analysed: {error}") from error
            self.looks.append(look)
        following = progressive.next_design(self.looks[-1], self._asked, *self._axes, self._prompts)
        if following is not None:
            self._design = following
        return following is not None

    def _data(self) -> xr.Dataset:
        subset = self._analysed
        names = ("reward", "kl_k1")
        points = [self._journal.read_point(place, subset.prompts)[list(names)] for place in subset.places]
        stacked = {name: np.stack([point[name].values for point in points]) for name in names}
        return xr.Dataset(
            {
                name: ((*GRID, *PER_TASK), values.reshape(*subset.shape, *values.shape[1:]))
                for name, values in stacked.items()
            },
            {name: axis[list(chosen)] for name, axis, chosen in zip(GRID, self._axes, subset.indices, strict=True)},
        )

    def describe(self, look: progressive.Look) -> str:
        """A look in one line."""
        rows, columns = self._levels[look.design.level]
        where = f"{len(rows)} × {len(columns)} points × {look.design.prompts} prompts"
        if look.reason:
            return f"{where}: {self._statistic} not defined ({look.reason})"
        interval = f"[{look.low:+.3f}, {look.high:+.3f}], width {look.width:.3f}"
        return f"{where}: {self._statistic} {look.estimate:+.3f} {interval}"

    @property
    def outcome(self) -> str:
        """How it ended, in words."""
        return progressive.final_reason(self.looks[-1], self._asked, self._prompts)

    def record(self) -> JsonObject:
        """JSON-able: what was asked, every look, and how it ended. Numbers that are not defined are None."""

        def number(value: float) -> float | None:
            return float(value) if np.isfinite(value) else None

        return {
            "asked_width": self._asked,
            "statistic": self._statistic,
            "full": {**dict(zip(GRID, (a.tolist() for a in self._axes), strict=True)), "prompts": self._prompts},
            "looks": [
                {
                    "level": look.design.level,
                    "points": look.points,
                    "prompts": look.design.prompts,
                    "estimate": number(look.estimate),
                    "low": number(look.low),
                    "high": number(look.high),
                    "allowance": number(look.allowance),
                    "reason": look.reason,
                }
                for look in self.looks
            ],
            "outcome": self.outcome,
        }
