"""Where a progressive sweep of one slice stands: what it has measured, what that says, and what comes next.

The rule itself (levels of the grid, intervals, when to stop) is `rlvr_landscape_analysis.statistics.progressive`, which
a replay of finished datasets uses too. Here it is applied to a journal.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import xarray as xr
from rlvr_landscape_analysis import AnalysisError
from rlvr_landscape_analysis.statistics import progressive
from rlvr_landscape_analysis.statistics.resample import MIN_PROMPTS

from rlvr_landscape_plugin.errors import ConfigurationError, StoreError
from rlvr_landscape_plugin.store import FULL, POINT, Journal, Rectangle

Statistic = Literal["correlation", "beyond_radius"]


def check_progressive(alphas: np.ndarray, betas: np.ndarray, prompts: int, asked: float, statistic: Statistic) -> None:
    """Raise `ConfigurationError` for a grid and a prompt set that can never give the interval asked for."""
    if prompts < MIN_PROMPTS:
        raise ConfigurationError(
            f"until_ci_width = {asked} needs an interval, which env.num_prompts = {prompts} cannot give; "
            f"set it to {MIN_PROMPTS} at least, better to some hundreds"
        )
    try:
        progressive.check_statistic(statistic, alphas, betas)
    except AnalysisError as error:
        raise ConfigurationError(f"until_ci_width = {asked} with this grid: {error}") from error


class Refinement:
    """The looks at one slice so far, and the rectangle that is measured now or was measured last.

    Decisions are a function of the journal's files, so the same command takes them again when it continues.
    """

    def __init__(self, journal: Journal, prompts: int, asked: float, statistic: Statistic) -> None:
        """`prompts`: all that may be measured. The grid has passed `check_progressive`."""
        self._journal, self._prompts, self._asked, self._statistic = journal, prompts, asked, statistic
        self._axes = journal.alphas, journal.betas
        self._levels = progressive.grid_levels(*self._axes)
        self._design = progressive.first_design(*self._axes, prompts)
        self.looks: list[progressive.Look] = []

    @property
    def rectangle(self) -> Rectangle:
        """What is measured now, or was measured last."""
        rows, columns = self._levels[self._design.level]
        return Rectangle(tuple(rows.tolist()), tuple(columns.tolist()), self._design.prompts)

    def advance(self) -> bool:
        """Look at the present rectangle, which is whole; returns whether there is another one to measure."""
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
        part = self.rectangle
        names = ("reward", "kl_k1")
        points = [self._journal.read_point(i, j, part.prompts)[list(names)] for i, j in part.cells]
        shape = len(part.rows), len(part.columns)
        return xr.Dataset(
            {
                name: (FULL, np.stack([p[name].values for p in points]).reshape(*shape, *points[0][name].shape))
                for name in names
            },
            {"alpha": self._axes[0][list(part.rows)], "beta": self._axes[1][list(part.columns)]},
        )

    def words(self, look: progressive.Look) -> str:
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

    def record(self) -> dict[str, Any]:
        """JSON-able: what was asked, every look, and how it ended. Numbers that are not defined are None."""

        def number(value: float) -> float | None:
            return float(value) if np.isfinite(value) else None

        return {
            "asked_width": self._asked,
            "statistic": self._statistic,
            "full": {**dict(zip(POINT, (a.tolist() for a in self._axes), strict=True)), "prompts": self._prompts},
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
