"""Figures, one function each: they draw what the statistics found and compute none of them.

Maps of one or several snapshots (`maps`, `relief`, `animation`), points of one map (`points`), series over training
(`series`), censuses, paths and boundaries (`evidence`). Every function returns its artists in a dict, leaves its inputs
and matplotlib's settings alone, and shows nothing; a quantity that is missing is said to be missing where it would have
been drawn. Inputs are the parts of `RunAnalysis` (results.py); maps may also be landscape datasets, raw or reduced by
`per_prompt`.
"""

from rlvr_landscape_analysis.figures.animation import animate
from rlvr_landscape_analysis.figures.censuses import compare_censuses
from rlvr_landscape_analysis.figures.evidence import (
    correlation_by_radius,
    curvature_over_training,
    density_by_radius,
    frontier,
    pass_at_k_by_step,
)
from rlvr_landscape_analysis.figures.maps import (
    difference_map,
    landscape_panels,
    panel_aspect,
    pass_and_entropy_maps,
    quantity_map,
    reward_landscape,
    surrogate_and_reward,
)
from rlvr_landscape_analysis.figures.points import kl_reward_scatter, radial_profile
from rlvr_landscape_analysis.figures.series import (
    compare_runs,
    controlled_over_training,
    correlation_over_training,
    early_correlation,
    training_curves,
)
from rlvr_landscape_analysis.figures.style import COLUMN_INCHES, PAGE_INCHES, STYLE, new_figure, save_figure
from rlvr_landscape_analysis.figures.surface import surface

__all__ = [
    "COLUMN_INCHES",
    "PAGE_INCHES",
    "STYLE",
    "animate",
    "compare_censuses",
    "compare_runs",
    "controlled_over_training",
    "correlation_by_radius",
    "correlation_over_training",
    "curvature_over_training",
    "density_by_radius",
    "difference_map",
    "early_correlation",
    "frontier",
    "kl_reward_scatter",
    "landscape_panels",
    "new_figure",
    "panel_aspect",
    "pass_and_entropy_maps",
    "pass_at_k_by_step",
    "quantity_map",
    "radial_profile",
    "reward_landscape",
    "save_figure",
    "surface",
    "surrogate_and_reward",
    "training_curves",
]
