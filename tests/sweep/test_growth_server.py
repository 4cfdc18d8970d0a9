"""Growth on a real server: old values stay bit for bit, new ones are those of a sweep that asked for all at once."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from conftest import start_sweep

SAMPLED = ("reward", "completion_tokens", "status", "base_reward", "base_tokens", "base_advantage")
"""Follow from which tokens were sampled."""
SCORED = ("kl_k1", "kl_k3", "surrogate", "entropy", "base_logprob")
"""Computed in floating point, which another batch rounds otherwise."""


def amounts(points, prompts, rollouts):
    options = {"grid.alpha.points": points, "grid.beta.points": 2, "env.num-prompts": prompts, "env.rollouts": rollouts}
    return [text for key, value in options.items() for text in (f"--{key}", str(value))]


def swept(output, server, *arguments):
    process = start_sweep(output, server, *arguments)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    with xr.open_dataset(output / "landscape_step000000_slice0.nc", engine="netcdf4") as data:
        return data.load()


@pytest.mark.server
@pytest.mark.nightly
def test_a_sweep_grows_on_a_real_server(server, tmp_path):
    old = swept(tmp_path / "a" / "out", server, *amounts(2, 3, 2))
    data = swept(tmp_path / "a" / "out", server, *amounts(3, 4, 3))
    part = data.sel(alpha=old.alpha, beta=old.beta).isel(prompt=slice(3), rollout=slice(2))
    for name in ("reward", "kl_k1", "kl_k3", "entropy", "completion_tokens", "base_reward", "base_logprob"):
        assert part[name].values.tobytes() == old[name].values.tobytes(), name
    at_once = swept(tmp_path / "b" / "out", server, *amounts(3, 4, 3))
    for name in SAMPLED:
        np.testing.assert_array_equal(data[name], at_once[name], err_msg=name)
    for name in SCORED:
        np.testing.assert_allclose(data[name], at_once[name], rtol=1e-3, atol=1e-3, err_msg=name)
    assert (data.kl_k1.sel(alpha=0.0, beta=0.0) == 0).all()
