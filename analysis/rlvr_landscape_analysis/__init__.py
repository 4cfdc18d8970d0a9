"""Analysis of landscape datasets: netCDF in, figures out. Needs neither torch nor vllm nor verifiers."""

from rlvr_landscape_analysis.figures import new_figure, reward_landscape, save_figure
from rlvr_landscape_analysis.landscape import difference_from_origin, open_landscape, point_mean

__all__ = ["difference_from_origin", "new_figure", "open_landscape", "point_mean", "reward_landscape", "save_figure"]
