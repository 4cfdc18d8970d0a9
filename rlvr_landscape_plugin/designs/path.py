"""The design `path`: policies along directions that mean something, such as training's own. Dims (path, position).

Position 0 is the checkpoint and 1 the whole direction: on the path of the displacement, −1 is snapshot 0 and positive
positions go on where training was heading. Two paths share one slice, and so one load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rlvr_landscape_plugin.designs.design import Design, Point, Surroundings, drawn_attributes, drawn_identity
from rlvr_landscape_plugin.directions import AXES, prepare_slice
from rlvr_landscape_plugin.errors import ConfigurationError
from rlvr_landscape_plugin.store.frame import Dimension, Frame, Label

if TYPE_CHECKING:
    from rlvr_landscape_plugin.config import DirectionConfig, SweepConfig


def path_designs(config: SweepConfig, around: Surroundings) -> list[Design]:
    """The paths through one snapshot.

    Raises `ConfigurationError` or `SnapshotError` for a direction that this snapshot does not have, such as the
    displacement of step 0.
    """
    snapshot, chosen = around.snapshot, config.path.directions
    if config.slice.alpha.kind != "random" or config.slice.beta.kind != "random" or config.slice.orthogonalize:
        raise ConfigurationError(
            "design = 'path' takes its directions from path.directions; leave slice.alpha, .beta out"
        )
    if len(config.slice.seeds) > 1:
        raise ConfigurationError(f"slice.seeds = {config.slice.seeds} with design = 'path': give one, for random paths")
    slices = []
    for first in range(0, len(chosen), 2):
        pair: dict[str, DirectionConfig] = dict(zip(AXES, chosen[first : first + 2], strict=False))
        table = config.slice.model_copy(update=pair)
        # A random path beside another one takes the axis's own noise of this seed, so seeds differ between slices.
        seed = config.slice.seeds[0] + first // 2
        slices.append(prepare_slice(table, seed, around.trajectory, around.folder))
    positions = config.path.positions
    order = sorted(range(len(positions)), key=lambda at: (abs(positions[at]), at))
    points = tuple(
        Point((path, at), path // 2, *((positions[at], 0.0) if path % 2 == 0 else (0.0, positions[at])))
        for first in range(0, len(chosen), 2)
        for at in order
        for path in range(first, min(first + 2, len(chosen)))
    )
    names = _names(chosen)
    described = np.array([slices[path // 2].description[AXES[path % 2]] for path in range(len(chosen))])
    frame = Frame(
        (
            Dimension("path", "p", np.array(names), "which path"),
            Dimension(
                "position", "x", np.array(positions), "position on the path; 0 is the checkpoint, 1 the whole of it"
            ),
        ),
        {"path_description": Label(("path",), described, "what the path is")},
    )
    return [
        Design(
            kind="path",
            snapshot=snapshot,
            frame=frame,
            slices=tuple(slices),
            points=points,
            identity=drawn_identity(slices),
            label=f"step {snapshot.step}, paths",
            attributes=drawn_attributes(slices),
        )
    ]


def _names(chosen: list[DirectionConfig]) -> list[str]:
    """One short name per path: the kind, with what tells two of one kind apart."""
    names: list[str] = []
    for direction in chosen:
        name = direction.kind
        if direction.kind == "pca":
            name = f"pca{direction.component}"
        elif direction.file is not None:
            name = direction.file.stem
        if direction.normalization is not None:
            name += f"_{direction.normalization}"
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names
