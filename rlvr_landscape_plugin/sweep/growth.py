"""A sweep that grows: whether what an earlier sweep measured in a journal is part of what is asked for now.

Two sweeps may share a journal if they differ in nothing but how much they measure (`GROWING`). This is tested by asking
what the present configuration would have been with the earlier amounts: it must have the earlier identity to the last
key. Points that both ask for must be the same policies.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from rlvr_landscape_plugin.config import SweepConfig
from rlvr_landscape_plugin.designs import DESIGNS, Design, Point, Surroundings, find_designer
from rlvr_landscape_plugin.directions import AXES, GENERATOR
from rlvr_landscape_plugin.errors import StoreError
from rlvr_landscape_plugin.files import JsonObject
from rlvr_landscape_plugin.snapshot import Snapshot
from rlvr_landscape_plugin.store import Extent, refuse

PromptsHash = Callable[[int], str]
"""Hash of the first so many tasks."""

GROWING = {
    "env": ("num_prompts", "rollouts", "base_rollouts"),
    "grid": ("alpha", "beta"),
    "census": ("pairs", "radii", "num_radii", "smallest", "largest"),
    "path": ("directions", "positions"),
}
"""Table of the configuration → keys that say how much is measured."""

_Table = TypeVar("_Table", bound=BaseModel)


def extent_of(config: SweepConfig) -> Extent:
    """How much a configuration measures at each point."""
    env = config.env
    of_batch = config.surrogate.trained.of_batch
    return Extent(env.num_prompts, env.rollouts, env.own_rollouts, env.base_rollouts is not None, of_batch)


def snapshot_identity(config: SweepConfig, snapshot: Snapshot, prompts: PromptsHash) -> JsonObject:
    """What determines the numbers around a snapshot, whichever policies are measured."""
    return {
        "configuration": config.provenance(),
        "step": snapshot.step,
        "snapshot_sha256": snapshot.sha256,
        "directions_generator": GENERATOR,
        "prompts_sha256": prompts(config.env.num_prompts),
    }


def probes_identity(config: SweepConfig, snapshot: Snapshot, prompts: PromptsHash) -> JsonObject:
    """What determines what probes find: the identity around a snapshot without what a sweep may measure more of."""
    identity = snapshot_identity(config, snapshot, prompts)
    configuration = identity["configuration"]
    for key in GROWING["env"]:
        configuration["env"].pop(key, None)
    for axis in GROWING["grid"]:
        del configuration["grid"][axis]["points"]
    del identity["prompts_sha256"]
    return identity


def make_designs(config: SweepConfig, around: Surroundings) -> list[Design]:
    """The designs that a configuration asks for around one snapshot."""
    return list(find_designer(config.design, DESIGNS)(config, around))


class Growth:
    """Compares the earlier requests of one design's journal with what is asked for now (`store.requests.Agrees`)."""

    def __init__(self, config: SweepConfig, around: Surroundings, design: Design, prompts: PromptsHash) -> None:
        self._config, self._around, self._design, self._prompts = config, around, design, prompts

    def __call__(self, there: JsonObject) -> Extent:
        """The extent of an earlier request; raises `StoreError` naming every key in which it measured otherwise."""
        config, design = self._config, self._design
        root = Path(config.output) / design.journal_name
        asked = self._request(config, design)
        try:
            before = SweepConfig.from_provenance(there["configuration"])
        except (ValidationError, KeyError):
            refuse(root / "journal.json", there, asked)
            raise
        then = _with_amounts_of(before, config)
        same = [other for other in make_designs(then, self._around) if other.journal_name == design.journal_name]
        if not same:
            refuse(root / "journal.json", there, asked)
        refuse(root / "journal.json", there, self._request(then, same[0]))
        if changed := _other_policies(same[0], design):
            raise StoreError(
                f"{root} holds other policies under the same coordinates ({changed}); add new directions after the old "
                "ones, or choose another output directory"
            )
        return extent_of(then)

    def _request(self, config: SweepConfig, design: Design) -> JsonObject:
        identity = snapshot_identity(config, design.snapshot, self._prompts) | dict(design.identity)
        return json.loads(json.dumps({**identity, "axes": design.frame.axes}))


def _with_amounts_of(before: SweepConfig, asked: SweepConfig) -> SweepConfig:
    """The configuration `asked`, measuring as much as `before` did."""
    tables = {name: _kept(getattr(before, name), getattr(asked, name), keys) for name, keys in GROWING.items()}
    return asked.model_copy(update=tables)


def _kept(before: _Table, asked: _Table, keys: tuple[str, ...]) -> _Table:
    # A key that only one of the two has says what is measured, not how much.
    both = [key for key in keys if (getattr(before, key) is None) == (getattr(asked, key) is None)]
    return asked.model_copy(update={key: getattr(before, key) for key in both})


def _other_policies(before: Design, asked: Design) -> str:
    """A point that both designs have and that is another policy in each; empty if there is none."""
    where = {_coordinates(asked, point): point for point in asked.points}
    for point in before.points:
        other = where.get(_coordinates(before, point))
        if other is not None and _policy(before, point) != _policy(asked, other):
            return ", ".join(f"{name} = {value}" for name, value in _coordinates(before, point))
    return ""


def _coordinates(design: Design, point: Point) -> tuple[tuple[str, object], ...]:
    axes = design.frame.axes
    return tuple((name, axes[name][index]) for name, index in zip(design.frame.names, point.place, strict=True))


def _policy(design: Design, point: Point) -> object:
    """What the weights of a point are a function of, beside the snapshot: a direction with coordinate 0 is no part."""
    spec = design.slices[point.slice].spec.as_dict()
    at = dict(zip(AXES, (point.alpha, point.beta), strict=True))
    # Directions that are not drawn are named by the SHA-256 of their file.
    used = {axis: (at[axis], spec.get(axis)) for axis in AXES if at[axis]}
    drawn = any(direction is None or direction["kind"] == "random" for _, direction in used.values())
    rest = {key: value for key, value in spec.items() if key not in AXES and (drawn or key != "seed")}
    return (used, rest) if used else ()
