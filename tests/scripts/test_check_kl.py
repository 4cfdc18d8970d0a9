"""scripts/check_kl.py: the KL of two points by other code, on a census that was computed without it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from conftest import POLICY
from reference import logprobs, perturbed
from script_module import script
from toy_run import make_toy_adapters

from rlvr_landscape_plugin.config import SweepConfig
from rlvr_landscape_plugin.snapshot import open_snapshot

ROOT = Path(__file__).parents[2]
RADII, SEED = (0.01, 0.1), 77
pytestmark = pytest.mark.nightly


def whole(adapter: Path, target: Path) -> Path:
    """A checkpoint of what an adapter and its base are together."""
    import shutil

    from safetensors.numpy import save_file

    snapshot = open_snapshot(adapter)
    shutil.copytree(POLICY, target)
    save_file({name: snapshot.read(name) for name in snapshot.shapes}, target / "model.safetensors", {"format": "pt"})
    return target


def write_census(folder: Path, policy: Path) -> Path:
    """A census of two directions around `policy`: its KL by tests/helpers/reference.py, one completion at a time."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 300, length).astype(np.int32) for length in (12, 9, 15)]
    flags = [np.arange(len(row)) >= 6 for row in rows]
    cells = [(0, 0), (0, 1), (1, 1)]  # completion (1, 0) failed before its first token
    kl = np.zeros((2, 2, 2, 2, 2))
    here = [
        logprobs(perturbed(policy, SEED, 0.0, 0.0), row)[flag[1:]].sum() for row, flag in zip(rows, flags, strict=True)
    ]
    # The two points that the script looks at: direction 0 at the smaller radius, direction 1 backwards at the larger.
    for place, coordinates in {(0, 0, 0): (RADII[0], 0.0), (1, 1, 1): (0.0, -RADII[1])}.items():
        moved = perturbed(policy, SEED, *coordinates)
        for cell, row, flag, start in zip(cells, rows, flags, here, strict=True):
            kl[(*place, *cell)] = start - logprobs(moved, row)[flag[1:]].sum()
    data = xr.Dataset(
        {"kl_k1": (("direction", "sign", "radius", "prompt", "rollout"), kl)},
        {
            "direction_seed": ("direction", [SEED, SEED]),
            "direction_axis": ("direction", ["alpha", "beta"]),
            "sign": [1, -1],
            "radius": [1.0, 10.0],
            "relative_radius": ("radius", list(RADII)),
            "step": 1,
        },
        {"configuration": json.dumps(SweepConfig.model_validate({"design": "census"}).provenance())},
    )
    base = xr.Dataset(
        {
            "segment_prompt": ("segment", [p for p, _ in cells]),
            "segment_rollout": ("segment", [r for _, r in cells]),
            "segment_length": ("segment", [len(row) for row in rows]),
            "token_id": ("token", np.concatenate(rows)),
            "token_sampled": ("token", np.concatenate(flags).astype(np.int8)),
        }
    )
    (folder / "step000001_census").mkdir(parents=True)
    base.to_netcdf(folder / "step000001_census" / "base.nc")
    data.to_netcdf(folder / "census_step000001.nc")
    return folder / "census_step000001.nc"


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Runs the script on a census and a snapshot: its exit code and what it wrote."""
    command = script("check_kl")

    def run(census: Path, snapshot: Path) -> tuple[int, dict]:
        target = tmp_path / "check.json"
        arguments = ["check_kl.py", str(census), "--snapshot", str(snapshot), "--write", str(target)]
        monkeypatch.setattr(sys, "argv", arguments)
        return command.main(), json.loads(target.read_text())

    return run


@pytest.mark.parametrize("adapted", [False, True])
def test_the_kl_of_both_points_is_found_and_another_one_is_told(tmp_path, check, adapted):
    snapshot = make_toy_adapters(tmp_path / "run", {1: 0.3})[1] if adapted else POLICY
    census = write_census(tmp_path / "out", whole(snapshot, tmp_path / "whole") if adapted else POLICY)
    code, found = check(census, snapshot)
    assert code == 0
    assert [point["relative_radius"] for point in found["points"]] == list(RADII)
    assert all(point["difference"] < 1e-5 and abs(point["sweep"]) > 1e-4 for point in found["points"])
    assert {point["tokens"] for point in found["points"]} == {6 + 3 + 9}
    with xr.open_dataset(census) as data:
        other = data.load().copy(deep=True)
    other["kl_k1"][1, 1, 1, 0, 0] += 0.1
    other.to_netcdf(census)
    code, found = check(census, snapshot)
    assert code == 1
    assert found["points"][1]["difference"] == pytest.approx(0.1 / 18, rel=1e-3)
