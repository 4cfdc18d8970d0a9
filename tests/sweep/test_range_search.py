"""Finding the range of a grid with policies whose decline is known exactly."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from rlvr_landscape_plugin.config import FindRangeConfig, GridConfig
from rlvr_landscape_plugin.errors import TasksetError
from rlvr_landscape_plugin.sweep.range_search import Probe, find_range


def search(reward, kl_at, grid=None, **settings):
    """`find_range` where reward and KL (nat per token) are functions of the distance from the origin."""
    asked = []

    async def probe(points):
        asked.append(list(points))
        return [Probe(a, b, reward(math.hypot(a, b)), 0.01, kl_at(math.hypot(a, b))) for a, b in points]

    found = asyncio.run(find_range(grid or GridConfig(), FindRangeConfig(**settings), probe))
    return found, asked


@given(st.floats(0.01, 3.0), st.floats(0.2, 0.8))
def test_the_ends_keep_the_asked_share_of_the_reward(scale, retention):
    found, asked = search(lambda r: 0.4 * math.exp(-((r / scale) ** 2)), lambda r: r**2, retention=retention)
    end = found["factor"] * 0.15
    assert found["criterion"] == "reward"
    assert found["note"] == ""
    # Two digits of the factor and one interpolation over half an octave.
    assert math.exp(-((end / scale) ** 2)) == pytest.approx(retention, abs=0.08)
    assert len(asked) == len(found["probes"][1:]) / 4 + 1
    assert len(asked) <= 9, "a handful of probes"


def test_a_policy_that_earns_nothing_is_measured_by_its_kl():
    found, _ = search(lambda r: 0.0, lambda r: 8 * r**2, kl=0.5)
    assert found["criterion"] == "kl"
    assert 8 * (0.15 * found["factor"]) ** 2 == pytest.approx(0.5, rel=0.1)


def test_a_flat_and_a_dead_landscape_stop_at_the_bound_and_say_so():
    flat, _ = search(lambda r: 0.4, lambda r: 0.0, largest_factor=6)
    assert (flat["factor"], flat["note"]) == (6.0, "not met at the largest factor allowed")
    dead, _ = search(lambda r: 0.4 if r == 0 else 0.0, lambda r: 50.0, largest_factor=6)
    assert (dead["factor"], dead["note"]) == (pytest.approx(1 / 6, rel=0.05), "not met at the smallest factor allowed")


def test_every_end_of_an_uneven_grid_is_probed():
    grid = GridConfig.model_validate({"alpha": {"min": -0.1, "max": 0.3}, "beta": {"min": -0.2, "max": 0.05}})
    _, asked = search(lambda r: 0.4, lambda r: 0.0, grid, largest_factor=1.5)
    assert asked[0] == [(0.0, 0.0)]
    assert asked[1] == [(-0.1, 0.0), (0.3, 0.0), (0.0, -0.2), (0.0, 0.05)]


def test_a_probe_is_means_over_tasks_and_tokens():
    reward = np.array([[1.0, 0.0], [0.5, np.nan], [0.25, 0.75]])
    kl = np.array([[3.0, 5.0], [np.nan, 1.0], [2.0, 4.0]])
    tokens = np.array([[10, 20], [99, 5], [10, 15]])
    point = xr.Dataset({name: (("prompt", "rollout"), values) for name, values in (("reward", reward), ("kl_k1", kl))})
    probe = Probe.of(0.1, -0.1, point, tokens)
    assert (probe.reward, probe.reward_se) == (0.5, 0.0)
    assert probe.kl == pytest.approx(15 / 60)
    with pytest.raises(TasksetError, match=r"every rollout at \(0.1, -0.1\) failed"):
        Probe.of(0.1, -0.1, point * np.nan, tokens)
