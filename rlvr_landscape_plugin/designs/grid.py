"""The design `grid`: every α with every β on a 2-D slice, one dataset per snapshot and slice."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from rlvr_landscape_analysis.schema import GRID, grid_name, landscape_file

from rlvr_landscape_plugin.designs.design import Design, Point, Surroundings
from rlvr_landscape_plugin.directions import AXES, PreparedSlice
from rlvr_landscape_plugin.store.frame import Dimension, Frame, Label, Place

if TYPE_CHECKING:
    from rlvr_landscape_plugin.config import SweepConfig


def grid_designs(config: SweepConfig, around: Surroundings) -> list[Design]:
    """One grid per seed of `slice.seeds`, its range scaled where probes found another."""
    factor = around.found["factor"] if around.found else 1.0
    axes = config.grid.alpha.values(factor), config.grid.beta.values(factor)
    scaled = {"range_factor": factor} if around.found else {}
    return [_grid(around.prepare(config, seed), *axes, scaled) for seed in config.slice.seeds]


def _grid(slice_: PreparedSlice, alphas: np.ndarray, betas: np.ndarray, scaled: dict[str, float]) -> Design:
    snapshot, spec = slice_.snapshot, slice_.spec
    name = grid_name(snapshot.step, spec.seed)
    described = {
        axis: f"coordinate along direction {symbol} ({slice_.description[axis]}), in units of it"
        if spec.direction(axis).kind != "random"
        else f"coordinate along direction {symbol}, in units of its norm"
        for axis, symbol in zip(AXES, "δη", strict=True)
    }
    return Design(
        kind="grid",
        snapshot=snapshot,
        frame=grid_frame(alphas, betas, spec.seed, described),
        slices=(slice_,),
        points=tuple(
            Point(place, 0, float(alphas[place[0]]), float(betas[place[1]])) for place in grid_order(alphas, betas)
        ),
        identity={"slice": spec.as_dict(), "directions_fingerprint": slice_.fingerprint, **scaled},
        label=name,
        attributes={
            "slice": json.dumps(spec.as_dict(), sort_keys=True),
            **{f"direction_{axis}": slice_.description[axis] for axis in AXES},
        },
        journal_name=name,
        dataset_name=landscape_file(snapshot.step, spec.seed),
    )


def grid_frame(alphas: np.ndarray, betas: np.ndarray, seed: int = 0, described: dict[str, str] | None = None) -> Frame:
    """The frame of a grid: dims (alpha, beta), and the slice's seed as a scalar coordinate."""
    usual = {
        axis: f"coordinate along direction {symbol}, in units of its norm"
        for axis, symbol in zip(GRID, "δη", strict=True)
    }
    names = usual | (described or {})
    dimensions = (
        Dimension("alpha", "a", np.asarray(alphas, np.float64), names["alpha"]),
        Dimension("beta", "b", np.asarray(betas, np.float64), names["beta"]),
    )
    return Frame(dimensions, {"slice_seed": Label((), np.asarray(seed, np.int64), "seed of the slice's directions")})


def grid_order(alphas: np.ndarray, betas: np.ndarray) -> list[Place]:
    """Every (i, j), the origin first and then outward: an interrupted sweep is already a smaller landscape."""
    places = [(i, j) for i in range(len(alphas)) for j in range(len(betas))]
    return sorted(places, key=lambda place: (alphas[place[0]] ** 2 + betas[place[1]] ** 2, place))
