"""Growth on a real server: old values stay bit for bit, new ones are those of a sweep that asked for all at once."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from conftest import start_sweep

SAMPLED = ("reward", "completion_tokens", "status", "base_reward", "base_tokens", "base_advantage")
"""Follow from which tokens were sampled."""
SCORED = ("kl_k1", "kl_k3", "surrogate", "entropy", "base_logprob")
"""Computed in floating point."""


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
    # Another batch rounds log-probabilities otherwise, and so may sample another token here and there.
    for name in SAMPLED:
        assert float((data[name] != at_once[name]).mean()) < 0.05, name
    same = (data.base_tokens == at_once.base_tokens) & (data.base_advantage == at_once.base_advantage)
    for name in SCORED:
        near = np.isclose(data[name], at_once[name], rtol=1e-3, atol=2e-2) | ~same.broadcast_like(data[name])
        assert float(near.mean()) > 0.95, name
    assert (data.kl_k1.sel(alpha=0.0, beta=0.0) == 0).all()
