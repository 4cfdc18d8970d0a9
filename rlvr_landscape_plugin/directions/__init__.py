"""The directions of a slice: what defines them, how they are drawn or computed."""

from rlvr_landscape_plugin.directions.spec import (
    AXES,
    GENERATOR,
    Axis,
    DirectionSpec,
    Displacement,
    SliceSpec,
    Trajectory,
    fingerprint,
    global_scales,
    open_direction,
    prepare_slice,
    principal_terms,
    raw_direction,
    scaled_direction,
)

__all__ = [
    "AXES",
    "Axis",
    "DirectionSpec",
    "Displacement",
    "GENERATOR",
    "SliceSpec",
    "Trajectory",
    "fingerprint",
    "global_scales",
    "open_direction",
    "prepare_slice",
    "principal_terms",
    "raw_direction",
    "scaled_direction",
]
