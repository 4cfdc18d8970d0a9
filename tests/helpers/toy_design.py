"""A design as somebody else would add one: lines through the checkpoint, one coordinate on each of several slices.

design = "toy_design.lines"
design_options = { seeds = [3, 5, 8], distances = [0.0, 0.1, 0.2] }
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlvr_landscape_plugin.config import SweepConfig
from rlvr_landscape_plugin.designs import Design, Point, Surroundings
from rlvr_landscape_plugin.store import Dimension, Frame


def lines(config: SweepConfig, around: Surroundings) -> Sequence[Design]:
    """One line along δ for each seed of the options."""
    seeds = [int(seed) for seed in config.design_options["seeds"]]
    distances = [float(distance) for distance in config.design_options["distances"]]
    slices = tuple(around.prepare(config, seed) for seed in seeds)
    frame = Frame(
        (
            Dimension("line", "l", np.array(seeds), "seed of the line's direction"),
            Dimension("distance", "d", np.array(distances), "distance along δ, in units of its norm"),
        )
    )
    points = [Point((i, j), i, distance, 0.0) for i in range(len(seeds)) for j, distance in enumerate(distances)]
    identity = {"design": "lines", "directions_fingerprints": [slice_.fingerprint for slice_ in slices]}
    return [Design("lines", around.snapshot, frame, slices, tuple(points), identity, "lines")]
