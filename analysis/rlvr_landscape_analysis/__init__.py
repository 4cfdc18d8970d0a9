"""Analysis of landscape datasets: netCDF in; statistics, figures, tables and a report out.

Needs neither torch nor vllm nor verifiers. Importing it registers the accessor `ds.landscape`.
"""

from rlvr_landscape_analysis.accessor import LandscapeAccessor
from rlvr_landscape_analysis.datasets import open_landscape, open_run
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.landscape import (
    difference_from_origin,
    entropy,
    kl,
    pass_at_k,
    per_prompt,
    point_mean,
    radial_profile,
    radius,
    ray,
    surrogate,
)
from rlvr_landscape_analysis.results import Claim, RunAnalysis
from rlvr_landscape_analysis.run import analyse_run
from rlvr_landscape_analysis.statistics.claims import all_claims
from rlvr_landscape_analysis.statistics.correlation import correlations
from rlvr_landscape_analysis.statistics.curvature import quadratic_fit
from rlvr_landscape_analysis.statistics.diagnostics import (
    crossing,
    entropy_law,
    pass_at_k_curves,
    token_surprisal,
    two_stage,
)
from rlvr_landscape_analysis.statistics.improvement import best_point, better_than_origin, improvement, overlap
from rlvr_landscape_analysis.statistics.resample import Bootstrap
from rlvr_landscape_analysis.statistics.training import exploitation_index, over_training, slice_agreement

_FIGURES = ("new_figure", "reward_landscape", "save_figure")


def __getattr__(name: str) -> object:
    """Figures are imported when asked for, so that statistics do not wait for matplotlib."""
    if name in _FIGURES:
        from rlvr_landscape_analysis import figures

        return getattr(figures, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AnalysisError",
    "Bootstrap",
    "Claim",
    "LandscapeAccessor",
    "RunAnalysis",
    "all_claims",
    "analyse_run",
    "best_point",
    "better_than_origin",
    "correlations",
    "crossing",
    "difference_from_origin",
    "entropy",
    "entropy_law",
    "exploitation_index",
    "improvement",
    "kl",
    "new_figure",
    "open_landscape",
    "open_run",
    "over_training",
    "overlap",
    "pass_at_k",
    "pass_at_k_curves",
    "per_prompt",
    "point_mean",
    "quadratic_fit",
    "radial_profile",
    "radius",
    "ray",
    "reward_landscape",
    "save_figure",
    "slice_agreement",
    "surrogate",
    "token_surprisal",
    "two_stage",
]
