"""A census on a real server: its KL against a float32 forward pass of transformers."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
import reference
import xarray as xr
from conftest import POLICY, TASKSET

from rlvr_landscape_plugin.config import SweepConfig
from rlvr_landscape_plugin.display import Display
from rlvr_landscape_plugin.sweep.point import BaseBatch
from rlvr_landscape_plugin.sweep.run import run_sweep

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def measured(server, tmp_path_factory):
    """Three directions at two radii, and the checkpoint's own completions."""
    output = tmp_path_factory.mktemp("census")
    config = SweepConfig(
        output=output,
        design="census",
        census={"pairs": 3, "radii": [0.05, 0.2], "unit": "theta"},
        env={"taskset": TASKSET, "num_prompts": 4, "rollouts": 2},
        surrogate={"advantage_scale": "none"},
        sampling={"max_tokens": 96},
        server={"urls": [server.url], "token": server.token},
    )
    with Display() as display:
        asyncio.run(run_sweep(config, display))
    with xr.open_dataset(output / "census_step000000.nc") as data:
        return data.load(), BaseBatch.from_dataset(xr.open_dataset(output / "step000000_census" / "base.nc").load())


def test_kl_of_census_points_agrees_with_transformers(measured):
    data, base = measured
    seeds = [spec["seed"] for spec in json.loads(data.attrs["slices"])]
    checkpoint = reference.perturbed(POLICY, 0, 0.0, 0.0)
    for direction, sign, radius in ((0, 1, 0), (1, -1, 1), (2, -1, 0)):
        point = data.isel(direction=direction, radius=radius).sel(sign=sign)
        length = sign * float(point["relative_radius"])
        axis = str(point["direction_axis"].item())
        assert int(point["direction_seed"]) == seeds[direction // 2]
        coordinates = (length, 0.0) if axis == "alpha" else (0.0, length)
        model = reference.perturbed(POLICY, seeds[direction // 2], *coordinates)
        for p, r in np.ndindex(4, 2):
            (segment,) = base.segments[p][r]
            old, new = (reference.logprobs(m, segment.tokens)[segment.sampled[1:]] for m in (checkpoint, model))
            expected = {"kl_k1": np.sum(old - new), "kl_k3": np.sum(np.expm1(new - old) - (new - old))}
            for name, value in expected.items():
                assert float(point[name][p, r]) / len(old) == pytest.approx(value / len(old), abs=1e-3), name


def test_both_senses_are_equally_far(measured):
    data, _ = measured
    step = data["realised_step"]
    np.testing.assert_allclose(step, data["relative_radius"].broadcast_like(step).transpose(*step.dims), rtol=1e-5)
    assert (data["kl_k1"].mean(["prompt", "rollout"]).diff("radius") > 0).all()
