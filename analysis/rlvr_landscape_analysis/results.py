"""What an analysis of a run consists of: the values that statistics pass to figures, tables and report.

`analyse_run` (run.py) fills it; figures and report only read it. Missing is NaN in numbers and always comes with a
reason in words (`reason` variables, `RunAnalysis.notes`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from rlvr_landscape_analysis.statistics.resample import Bootstrap

if TYPE_CHECKING:
    from rlvr_landscape_analysis.evidence import EvidenceAnalysis

BOUNDS = ("low", "high")
"""Coordinate of dimension `bound`."""

PAIRS = ("kl_reward", "kl_surrogate", "surrogate_reward")
PAIR_NAMES = {
    "kl_reward": "KL and reward",
    "kl_surrogate": "KL and surrogate",
    "surrogate_reward": "surrogate and reward",
}
CONTROLS = ("none", "no_origin", "linear", "smooth", "shell", "radial")
CONTROL_NAMES = {
    "none": "plain",
    "no_origin": "plain, origin left out",
    "linear": "partial, linear in the radius",
    "smooth": "partial, cubic in the squared radius",
    "shell": "within shells of equal radius",
    "radial": "radial null: shell means alone",
}
STATISTIC_NAMES = {
    ("pearson", "none"): "Pearson",
    ("corrected", "none"): "corrected",
    ("corrected", "shell"): "within shells",
    ("contribution", "shell"): "beyond the radius",
    ("corrected", "radial"): "radial null",
    ("corrected", "linear"): "linear partial",
    ("corrected", "smooth"): "smooth",
    ("spearman", "none"): "Spearman",
}
"""(variable of `RunAnalysis.correlations`, control) → the one name that tables, figures and the glossary give it."""


def statistic_name(variable: str, control: str) -> str:
    """The name of a correlation in tables and figures."""
    return STATISTIC_NAMES.get((variable, control)) or f"{variable}, {CONTROL_NAMES.get(control, control)}"


SUPPORTED, NOT_SUPPORTED = "supported", "not supported"
UNDECIDED = "undecided at this sample size"
NOT_MEASURABLE = "not measurable"
VERDICTS = (SUPPORTED, NOT_SUPPORTED, UNDECIDED, NOT_MEASURABLE)
"""What a claim's verdict can be."""
EARLY = 10
"""Last step that counts as early (claim T2)."""


@dataclass(frozen=True)
class Claim:
    """A claim under test, as a sentence with its numbers and a verdict."""

    name: str
    """`T1`, `T2` or `T3`."""
    title: str
    """What the claim says, in plain words."""
    verdict: str
    """One of `VERDICTS`."""
    sentence: str
    """The verdict with its numbers and intervals."""
    rule: str
    """When the verdict would have been which."""
    estimate: float
    interval: tuple[float, float]
    prompts: int
    prompts_needed: int | None = None
    """Prompts that would decide it if the estimate stays; only when undecided."""
    runs: int = 0
    """Training runs that it rests on."""
    directions: int = 0
    """Random directions that it rests on, an antithetic pair being one; 0 where none is needed."""
    directions_needed: int | None = None
    """Directions that would decide it, together with `prompts_needed`."""
    nearest: float = math.nan
    """Shortest move that was measured, in displacements of the run; NaN where there is none."""
    overturn: str = ""
    """What would overturn the verdict, in words."""


@dataclass
class RunAnalysis:
    """Everything computed from one run."""

    path: Path
    bootstrap: Bootstrap
    k: int
    """k of pass@k: the number of rollouts per prompt."""
    maps: dict[tuple[int, int], xr.Dataset]
    """(step, slice_seed) → point values, dims (alpha, beta): `reward`, `kl`, `kl_k3`, `surrogate`, `entropy`,
    `truncated`, `pass_1`, `pass_k`, each with `<name>_se`; `difference`, `difference_se` (reward minus origin's, paired
    by prompt), `adjusted_p`, `better` (bool); `radius`. Variables that the dataset lacks are absent. Scalar coordinates
    step and slice_seed; attributes of the source dataset (provenance) plus `prompts` and `rollouts`."""
    correlations: xr.Dataset
    """Dims (step, slice_seed, pair, control, bound, member): see `correlation.correlations`."""
    improvement: xr.Dataset
    """Dims (step, slice_seed, bound): see `improvement.improvement`."""
    curvature: xr.Dataset
    """Dims (step, slice_seed, term, eigen, bound): see `curvature.quadratic_fit`."""
    profiles: dict[tuple[int, int], xr.Dataset]
    """(step, slice_seed) → means per shell, dim radius: `reward`, `kl`, each with `<name>_se`, and `points`."""
    training: xr.Dataset
    """Dims (step, bound): `reward`, `pass_1`, `pass_k`, `entropy`, `kl_scale` at the checkpoint, each with
    `<name>_interval`."""
    over_training: xr.Dataset
    """Trend, change point, exploitation index: see `training.py`. Scalars and small dims; NaN with a `reason`."""
    diagnostics: dict[str, xr.Dataset]
    """`entropy_law_training`, `entropy_law_slice` (dim step), `two_stage`, `pass_at_k` (dims step, k, bound),
    `crossing` (dims k, bound: last minus first snapshot), `token_surprisal` (dim step, quantile) when traces were
    kept."""
    slices: xr.Dataset | None
    """Agreement between slices of one snapshot, dims (step, pair, control, bound); None with one slice each."""
    claims: list[Claim]
    ranges: dict[tuple[int, int], xr.Dataset] = field(default_factory=dict)
    """(step, slice_seed) → the plain correlation at several ranges of the slice: see `ranges.plain_by_range`."""
    evidence: EvidenceAnalysis | None = None
    """Statistics of the censuses, paths and boundaries beside the slices; None where there are none."""
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    """File of every census, path and boundary → its attributes (provenance)."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know: unfinished journals, points or prompts left out, quantities that are not defined."""
