"""The design `census`: many random directions through the checkpoint, each walked both ways, at a few radii.

A slice holds two directions, so two pairs share one load. The unit of sampling is the direction: with K of them, K
independent answers to what lies at each radius. Dims (direction, sign, radius).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from rlvr_landscape_analysis.schema import DIRECTION_KIND

from rlvr_landscape_plugin.config.designs import DRAWN_KINDS
from rlvr_landscape_plugin.designs.design import Design, Point, Surroundings, drawn_attributes, drawn_identity
from rlvr_landscape_plugin.directions import AXES, PreparedSlice, prepare_slice
from rlvr_landscape_plugin.directions.kinds import Request, SubspaceDirection
from rlvr_landscape_plugin.directions.trajectory import squared
from rlvr_landscape_plugin.errors import ConfigurationError, SnapshotError
from rlvr_landscape_plugin.snapshot import Snapshot
from rlvr_landscape_plugin.store.frame import Dimension, Frame, Label

if TYPE_CHECKING:
    from rlvr_landscape_plugin.config import SweepConfig

SIGNS = (1, -1)
"""Both ways along a direction."""


def census_designs(config: SweepConfig, around: Surroundings) -> list[Design]:
    """The census around one snapshot.

    Raises `ConfigurationError` for slices that are not two random directions of one kind, as long as the weights that
    they move, and where the unit of the radii is a displacement that is not known.
    """
    census, snapshot = config.census, around.snapshot
    _check(config)
    slices = tuple(_slices(config, around))
    theta = math.sqrt(sum(squared(snapshot.read(name)) for name in snapshot.tensors if slices[0].spec.moves(name)))
    unit, said = _unit(config, around, theta)
    radii = census.values()
    relative = radii * unit / theta
    lengths = _lengths(slices[0], around, theta)
    points = tuple(
        Point((pair, way, at), pair // 2, *_coordinates(pair, sign * float(distance), lengths))
        for first in range(0, census.pairs, 2)
        for at, distance in enumerate(relative)
        for pair in range(first, min(first + 2, census.pairs))
        for way, sign in enumerate(SIGNS)
    )
    seeds = np.array([slices[pair // 2].spec.seed for pair in range(census.pairs)], np.int64)
    axes = np.array([AXES[pair % 2] for pair in range(census.pairs)])
    frame = Frame(
        (
            Dimension("direction", "d", np.arange(census.pairs), "index of the random direction"),
            Dimension("sign", "s", np.array(SIGNS), "which way along the direction"),
            Dimension("radius", "r", radii, f"distance from the checkpoint, in units of {said}"),
        ),
        {
            "direction_seed": Label(("direction",), seeds, "seed of the slice that holds the direction"),
            "direction_axis": Label(("direction",), axes, "axis of that slice"),
            "relative_radius": Label(
                ("radius",), relative, "distance from the checkpoint over the norm of its weights"
            ),
        },
    )
    return [
        Design(
            kind="census",
            snapshot=snapshot,
            frame=frame,
            slices=slices,
            points=points,
            identity=drawn_identity(slices) | {"relative_radii": relative.tolist()},
            label=f"step {snapshot.step}, census",
            attributes={
                "directions": census.directions,
                **({} if (kind := config.slice.alpha.kind) == "random" else {DIRECTION_KIND: kind}),
                "radius_unit": census.unit,
                "radius_unit_norm": unit,
                "radius_unit_comment": said,
            }
            | drawn_attributes(slices),
        )
    ]


def _check(config: SweepConfig) -> None:
    table = config.slice
    if table.alpha.kind not in DRAWN_KINDS or table.alpha.kind != table.beta.kind or table.orthogonalize:
        raise ConfigurationError(
            "design = 'census' draws all its directions alike: leave slice.alpha, slice.beta and slice.orthogonalize "
            "out, or give both axes the kind 'lora' or 'lora_complement' (design = 'path' measures along directions of "
            "training)"
        )
    scales = {"": table.normalization, "alpha.": table.alpha.normalization, "beta.": table.beta.normalization}
    for key, given in scales.items():
        if given not in (None, "tensor", "global"):
            raise ConfigurationError(
                f"slice.{key}normalization = {given!r} with design = 'census': radii need directions as long as the "
                "weights; choose 'tensor' or 'global'"
            )
    if len(table.seeds) > 1:
        raise ConfigurationError(
            f"slice.seeds = {table.seeds} with design = 'census': one seed draws all its directions; raise census.pairs"
        )


def _slices(config: SweepConfig, around: Surroundings) -> Iterable[PreparedSlice]:
    """A slice for every two directions, each with a seed of its own."""
    whose = "all snapshots" if config.census.directions == "paired" else f"step {around.snapshot.step}"
    for index in range((config.census.pairs + 1) // 2):
        text = f"census\x00{config.slice.seeds[0]}\x00{whose}\x00{index}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")
        yield prepare_slice(config.slice, seed, around.trajectory, around.folder)


def _lengths(slice_: PreparedSlice, around: Surroundings, theta: float) -> tuple[float, float]:
    """‖θ‖ over the length of δ and of η: not 1 where a direction moves some of the weights only."""
    ratios = []
    for axis in AXES:
        request = Request(slice_.spec, axis, around.trajectory)
        ratios.append(1.0 if request.direction.kind == "random" else theta / SubspaceDirection(request).norm())
    return ratios[0], ratios[1]


def _coordinates(pair: int, distance: float, lengths: tuple[float, float]) -> tuple[float, float]:
    """The coordinates at a distance, in units of ‖θ‖, along a pair's direction."""
    return (distance * lengths[0], 0.0) if pair % 2 == 0 else (0.0, distance * lengths[1])


def _unit(config: SweepConfig, around: Surroundings, theta: float) -> tuple[float, str]:
    """The norm that radius 1 stands for, and what it is, in words."""
    census, trajectory = config.census, around.trajectory
    if census.unit == "theta":
        return theta, "the norm of the weights that move"
    step = trajectory.origin.step if census.reference is None else census.reference
    if step == 0:
        later = [found for found in trajectory.paths if found > 0]
        if not later:
            raise ConfigurationError(
                f"census.unit = 'displacement' around {trajectory.origin.path.name}: {trajectory.folder} holds no "
                "later snapshot that training has moved; name the run with slice.run, or set census.unit = 'theta'"
            )
        step = max(later)
    try:
        norm = _displacement(trajectory.open(step) if step in trajectory.paths else trajectory.origin, around)
    except (SnapshotError, KeyError) as error:
        raise ConfigurationError(
            f"census.unit = 'displacement' around {trajectory.origin.path.name}: {error}; name the run with slice.run, "
            "or set census.unit = 'theta'"
        ) from error
    if norm == 0:
        raise ConfigurationError(
            f"census.unit = 'displacement': step {step} of {trajectory.folder} is where step 0 is, so nothing can be "
            "measured in units of its displacement; set census.reference to a later step"
        )
    return norm, f"the displacement of step {step} from step 0"


def _displacement(snapshot: Snapshot, around: Surroundings) -> float:
    """‖θ_t − θ_0‖ over the tensors that move, float64."""
    first = around.trajectory.start()
    total = 0.0
    for name in snapshot.tensors:
        total += squared(snapshot.read(name).astype(np.float64) - first.read(name))
    return math.sqrt(total)
