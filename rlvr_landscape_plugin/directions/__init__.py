"""The directions of a slice: what defines them, how they are drawn or computed."""

from rlvr_landscape_plugin.directions.kinds import principal_terms
from rlvr_landscape_plugin.directions.prepare import PreparedSlice, open_direction, prepare_slice
from rlvr_landscape_plugin.directions.spec import (
    AXES,
    GENERATOR,
    Axis,
    DirectionSpec,
    SliceSpec,
    fingerprint,
    global_scales,
    raw_direction,
    scaled_direction,
)
from rlvr_landscape_plugin.directions.subspace import Subspace, subspace_of
from rlvr_landscape_plugin.directions.trajectory import Displacement, Trajectory

__all__ = [
    "AXES",
    "Axis",
    "DirectionSpec",
    "Displacement",
    "GENERATOR",
    "PreparedSlice",
    "SliceSpec",
    "Subspace",
    "Trajectory",
    "fingerprint",
    "global_scales",
    "open_direction",
    "prepare_slice",
    "principal_terms",
    "raw_direction",
    "scaled_direction",
    "subspace_of",
]
