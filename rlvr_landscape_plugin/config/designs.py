"""Which policies are measured: the slices of a sweep, and the tables of its designs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from rlvr_landscape_plugin.config.base import LARGEST_SEED, StrictConfig

MOST_POINTS = 1_000_000
"""Points of one grid, and of one axis; more is a typing mistake."""
LARGEST_COORDINATE = 1e6
"""Largest |α| and |β|: with a direction as long as the weights, float32 weights stay finite far beyond it."""
LEAST_COORDINATE = 1e-30
"""Smallest end of an axis: float64 still tells evenly spaced coordinates below it apart."""
LARGEST_RATIO = 1e9
"""Largest ratio of the two ends of an axis: beyond it the shorter end is lost in the rounding of the longer."""


SUBSPACE_KINDS = ("lora", "lora_complement")
"""Kinds of directions that are the part of a random one in an adapter's subspace, or outside of it."""
DRAWN_KINDS = ("random", *SUBSPACE_KINDS)
"""Kinds of directions that follow from a seed."""


class AxisConfig(StrictConfig):
    """One axis of the grid, in units of the direction (`tensor`: α = 0.05 moves 5 % of a tensor's norm)."""

    min: float = -0.15
    """Smallest coordinate; must be below 0."""
    max: float = 0.15
    """Largest coordinate; must be above 0."""
    points: int = Field(default=7, ge=2, le=MOST_POINTS)
    """Number of evenly spaced coordinates. If 0 is not among them (an even number, an uneven range), it is added."""

    @model_validator(mode="after")
    def _range(self) -> AxisConfig:
        if self.min >= self.max:
            raise ValueError(f"min = {self.min} is not below max = {self.max}; swap them")
        if not self.min < 0 < self.max:
            raise ValueError(f"the range {self.min} … {self.max} must contain the origin 0 in its inside")
        short, long = sorted((-self.min, self.max))
        if long > LARGEST_COORDINATE or short < LEAST_COORDINATE or long > LARGEST_RATIO * short:
            raise ValueError(
                f"min = {self.min} and max = {self.max}: both must lie between {LEAST_COORDINATE:g} and "
                f"{LARGEST_COORDINATE:g} in size and differ by less than a factor of {LARGEST_RATIO:g}; coordinate 1 "
                "moves by the whole direction, normalization scales a direction that is short or long"
            )
        return self

    def values(self, factor: float = 1.0) -> np.ndarray:
        """Coordinates of the axis made `factor` times as long: float64, ascending, 0.0 among them exactly once."""
        low, high = self.min * factor, self.max * factor
        values = np.linspace(low, high, self.points)
        values[np.abs(values) <= 1e-12 * (high - low)] = 0.0
        return values if 0.0 in values else np.sort(np.append(values, 0.0))


class FindRangeConfig(StrictConfig):
    """Choose the range for each snapshot, by a few probes at the ends of the axes; see `sweep.range_search`."""

    retention: float = Field(default=0.5, gt=0, lt=1)
    """Share of the checkpoint's reward that policies at the ends of the axes keep on average."""
    kl: float = Field(default=0.5, gt=0)
    """Their mean KL divergence in nat per token, which decides where the checkpoint's own reward is not above 0."""
    prompts: int = Field(default=32, ge=8)
    """Tasks of a probe, the first of `env.num_prompts`."""
    largest_factor: float = Field(default=32, gt=1)
    """`min` and `max` of both axes are multiplied by at most this, and by at least 1 / this."""


class GridConfig(StrictConfig):
    """The points of the slice: every α with every β."""

    alpha: AxisConfig = AxisConfig()
    """Coordinates along δ."""
    beta: AxisConfig = AxisConfig()
    """Coordinates along η."""
    find: FindRangeConfig | None = None
    """Scale both axes by one factor per snapshot, found by probes; absent: `min` and `max` as they are."""

    @model_validator(mode="after")
    def _bounded(self) -> GridConfig:
        points = self.alpha.points * self.beta.points
        if points > MOST_POINTS:
            raise ValueError(
                f"alpha.points × beta.points = {points:,} points, at most {MOST_POINTS:,} can be measured; lower one"
            )
        if self.find is not None:
            farthest = max(-self.alpha.min, self.alpha.max, -self.beta.min, self.beta.max) * self.find.largest_factor
            if farthest > LARGEST_COORDINATE:
                raise ValueError(
                    f"find.largest_factor = {self.find.largest_factor:g} could make an axis {farthest:g} long, at most "
                    f"{LARGEST_COORDINATE:g} is allowed; lower it, or min and max"
                )
        return self


class DirectionConfig(StrictConfig):
    """One axis of the slice."""

    kind: Literal["random", "lora", "lora_complement", "displacement", "update", "pca", "file"] = "random"
    """`random`: drawn from the slice's seed. `lora`: its part in the subspace in which the adapter that is measured can
    move. `lora_complement`: its part outside of it. `displacement`: θ_t − θ_0 of the run. `update`: next snapshot −
    θ_t. `pca`: a principal component of the run's snapshots about the last. `file`: a tensor file, such as a
    gradient."""
    normalization: Literal["none", "tensor", "filter", "global"] | None = None
    """How the direction is scaled to the weights; default: `slice.normalization` for a random direction, otherwise
    `none`, so that coordinate 1 is the whole displacement, update or file (`pca`: as far as the run went)."""
    component: int = Field(default=1, ge=1)
    """Which principal component, 1 being the largest (`pca`)."""
    file: Path | None = None
    """A safetensors file with a tensor of the checkpoint's name and shape for each one that moves (`file`)."""

    @model_validator(mode="after")
    def _belongs_together(self) -> DirectionConfig:
        if (self.file is not None) != (self.kind == "file"):
            raise ValueError(f"kind = {self.kind!r} and file = {self.file}: set file with kind = 'file' and only then")
        if self.component != 1 and self.kind != "pca":
            raise ValueError(f"component = {self.component} needs kind = 'pca', not {self.kind!r}")
        if self.kind in DRAWN_KINDS and self.normalization == "none":
            raise ValueError("normalization = 'none' leaves a random direction without a unit; choose another")
        if self.kind in SUBSPACE_KINDS and self.normalization == "filter":
            raise ValueError(f"normalization = 'filter' scales rows, which leads out of kind = {self.kind!r}")
        return self


class SliceConfig(StrictConfig):
    """The directions; see `directions.SliceSpec`."""

    seeds: list[int] = Field(default=[0], min_length=1)
    """One slice per seed; the same seed draws the same noise for every snapshot."""
    normalization: Literal["tensor", "filter", "global"] = "tensor"
    """How random directions are scaled to the weights."""
    alpha: DirectionConfig = DirectionConfig()
    """The direction δ of the axis α."""
    beta: DirectionConfig = DirectionConfig()
    """The direction η of the axis β."""
    orthogonalize: bool = False
    """Remove from η its part along δ (Gram-Schmidt over all weights that move), after both are scaled."""
    run: Path | None = None
    """Directory of the training run whose snapshots the directions and `displacement_norm` refer to; default: the
    directory that holds the measured snapshot."""
    include: list[str] = Field(default=["*"], min_length=1)
    """Globs of checkpoint tensor names that move."""
    exclude: list[str] = []
    """Globs of checkpoint tensor names that do not move."""

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) != len(seeds) or min(seeds) < 0 or max(seeds) > LARGEST_SEED:
            raise ValueError(f"seeds must be distinct integers between 0 and {LARGEST_SEED} (2^63 - 1), got {seeds}")
        return seeds

    @model_validator(mode="after")
    def _seeds_matter(self) -> SliceConfig:
        for axis in (self.alpha, self.beta):
            if axis.kind in SUBSPACE_KINDS and self.normalization == "filter" and axis.normalization is None:
                raise ValueError(f"normalization = 'filter' scales rows, which leads out of kind = {axis.kind!r}")
        if len(self.seeds) > 1 and not {self.alpha.kind, self.beta.kind} & set(DRAWN_KINDS):
            raise ValueError(f"seeds = {self.seeds} would measure one slice several times: no axis is random; give one")
        return self


class CensusConfig(StrictConfig):
    """The design `census`: many random directions, each walked both ways, at a few radii."""

    pairs: int = Field(default=32, ge=2, le=10_000)
    """Random directions; each is walked both ways (an antithetic pair), so a census has 2 × `pairs` rays."""
    radii: list[float] = Field(default=[], max_length=1000)
    """Distances from the checkpoint, ascending; default: `num_radii` of them, evenly spaced in logarithms."""
    num_radii: int = Field(default=4, ge=1, le=1000)
    """Number of radii where `radii` is empty."""
    smallest: float = Field(default=0.3, gt=0)
    """The smallest of them."""
    largest: float = Field(default=9.0, gt=0)
    """The largest of them. By default 0.3, 0.9, 2.9 and 9: T1 looks at those up to 3 displacements."""
    unit: Literal["displacement", "theta"] = "displacement"
    """What radius 1 is. `displacement`: ‖θ_t − θ_0‖, how far the run has moved this snapshot (for snapshot 0: how far
    it moves the run's last). `theta`: ‖θ_t‖ over the tensors that move."""
    reference: int | None = Field(default=None, ge=0)
    """Step whose displacement is the unit for every snapshot; default: each snapshot's own."""
    directions: Literal["fresh", "paired"] = "fresh"
    """`fresh`: every snapshot has directions of its own. `paired`: the same random numbers for all snapshots."""

    @model_validator(mode="after")
    def _ascending(self) -> CensusConfig:
        values = self.values()
        if not (np.isfinite(values).all() and (values > 0).all() and (np.diff(values) > 0).all()):
            raise ValueError(f"radii = {values.tolist()} must be positive and ascending")
        if self.reference is not None and self.unit == "theta":
            raise ValueError("reference is a step whose displacement is the unit; with unit = 'theta' leave it out")
        return self

    def values(self) -> np.ndarray:
        """The radii, float64, ascending."""
        if self.radii:
            return np.array(self.radii)
        if self.num_radii == 1:
            return np.array([self.smallest])
        return np.geomspace(self.smallest, self.largest, self.num_radii)


class PathConfig(StrictConfig):
    """The design `path`: policies along directions that mean something."""

    directions: list[DirectionConfig] = Field(default=[DirectionConfig(kind="displacement")], min_length=1)
    """One path each, as `slice.alpha` names a direction; without a `normalization` position 1 is the whole of it."""
    positions: list[float] = Field(default=[-1.5, -1.25, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5], min_length=2)
    """Where on each path policies are measured, ascending. 0 is the checkpoint; on the path of the displacement −1 is
    snapshot 0."""

    @field_validator("positions")
    @classmethod
    def _ascending(cls, positions: list[float]) -> list[float]:
        if not (np.isfinite(positions).all() and (np.diff(positions) > 0).all()):
            raise ValueError(f"positions = {positions} must be finite and ascending")
        if max(map(abs, positions)) > LARGEST_COORDINATE:
            raise ValueError(f"positions reach {max(map(abs, positions)):g}, at most {LARGEST_COORDINATE:g} is allowed")
        return positions

    @field_validator("directions")
    @classmethod
    def _distinct(cls, directions: list[DirectionConfig]) -> list[DirectionConfig]:
        if any(one == other for i, one in enumerate(directions) for other in directions[:i]):
            raise ValueError("two of the directions are the same path; leave one out")
        return directions
