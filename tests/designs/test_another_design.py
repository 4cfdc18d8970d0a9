"""A design that somebody else adds, in a file of its own: swept, killed, continued, consolidated and opened."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import xarray as xr
from conftest import start_fake_sweep

from rlvr_landscape_plugin.directions import SliceSpec, fingerprint
from rlvr_landscape_plugin.snapshot import open_snapshot

DESIGN = """
snapshots = ["tiny-sorter"]
design = "toy_design.lines"
design_options = { seeds = [3, 5, 8], distances = [0.0, 0.1, 0.2, 0.4] }
[env]
id = "tiny-quiz"
num_prompts = 4
rollouts = 2
[sampling]
max_tokens = 12
"""
NAME = "step000000_lines"


@pytest.fixture
def dataset(sweep_here, fake_server, tmp_path):
    code, said = sweep_here(fake_server, config=DESIGN)
    assert code == 0, said
    assert "starting: 12 points in 3 slices to measure" in said
    with xr.open_dataset(tmp_path / "out" / "lines_step000000.nc") as data:
        yield data.load()


def test_its_dataset_has_its_own_dimensions(dataset):
    assert dict(dataset.sizes) == {"line": 3, "distance": 4, "prompt": 4, "rollout": 2}
    assert dataset.reward.dims == ("line", "distance", "prompt", "rollout")
    assert dataset.realised_step.dims == ("line", "distance")
    assert dataset.base_reward.dims == ("prompt", "rollout")
    assert dataset.line.values.tolist() == [3, 5, 8]
    assert dataset.distance.values.tolist() == [0.0, 0.1, 0.2, 0.4]
    assert dataset.attrs["design"] == "lines"
    assert {"step", "line", "distance", "prompt", "rollout"} == set(dataset.coords)
    configuration = json.loads(dataset.attrs["configuration"])
    assert configuration["design"] == "toy_design.lines"
    assert "grid" not in configuration
    for name, variable in dataset.variables.items():
        assert variable.attrs.get("long_name"), name


def test_every_line_is_another_direction_through_one_origin(dataset):
    assert (dataset.kl_k1.sel(distance=0.0) == 0).all()
    kl = dataset.kl_k1.mean(["prompt", "rollout"])
    assert (kl.sel(distance=0.4) > kl.sel(distance=0.1)).all()
    assert len(np.unique(kl.sel(distance=0.2))) == 3
    np.testing.assert_allclose(dataset.realised_step, dataset.distance.broadcast_like(dataset.realised_step))


def test_each_slice_is_loaded_once_and_the_base_batch_is_sampled_once(dataset, fake_server):
    assert fake_server.asked["load"] == 3
    shapes = open_snapshot("tiny-sorter").shapes
    ours = [fingerprint(SliceSpec(seed), shapes) for seed in (3, 5, 8)]
    # Twelve points and the base batch, one turn each, in one request each.
    assert fake_server.asked["generate"] == 13
    assert len(set(ours)) == 3


def test_a_killed_sweep_goes_on_where_it_was(dataset, sweep_command, sweep_here, fake_server, tmp_path):
    output = tmp_path / "killed"
    process = start_fake_sweep(sweep_command(fake_server, config=DESIGN, output=output))
    points = output / NAME / "points"
    deadline = time.monotonic() + 60
    while len(list(points.glob("l*.nc"))) < 5 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    kept = {path.name: path.read_bytes() for path in points.glob("l*.nc")}
    assert 5 <= len(kept) < 12
    code, said = sweep_here(fake_server, config=DESIGN, output=output)
    assert code == 0, said
    assert f"starting: {12 - len(kept)} points" in said
    assert all((points / name).read_bytes() == content for name, content in kept.items())
    with xr.open_dataset(output / "lines_step000000.nc") as again:
        for name in ("reward", "kl_k1", "surrogate", "base_reward", "completion_tokens"):
            xr.testing.assert_equal(again[name], dataset[name])
        assert again.attrs["identity"] == dataset.attrs["identity"]


def test_shards_take_whole_lines_and_make_the_same_dataset(dataset, sweep_here, fake_server, tmp_path):
    output = tmp_path / "shards"
    for shard in ("1/2", "2/2"):
        before = fake_server.asked["load"]
        code, said = sweep_here(fake_server, "--shard", shard, config=DESIGN, output=output)
        assert code == 0, said
        assert fake_server.asked["load"] - before == {"1/2": 2, "2/2": 1}[shard]
    with xr.open_dataset(output / "lines_step000000.nc") as again:
        xr.testing.assert_equal(again.reward, dataset.reward)


def test_other_lines_in_the_same_directory_are_refused(dataset, sweep_here, fake_server):
    code, said = sweep_here(fake_server, config=DESIGN.replace("0.4]", "0.5]"))
    assert code == 2
    assert "axes.distance: [0.0, 0.1, 0.2, 0.4] there, [0.0, 0.1, 0.2, 0.5] asked for" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("toy_design.lines", "toy_design.circles"), "design = 'toy_design.circles' is neither one of grid"),
        (("[env]", "[grid.alpha]\npoints = 3\n[env]"), "belongs to design = 'grid'"),
        (("[env]", "until_ci_width = 0.1\n[env]"), "refines a grid"),
    ],
)
def test_what_does_not_fit_the_design_is_refused(sweep_here, fake_server, change, message):
    code, said = sweep_here(fake_server, config=DESIGN.replace(*change))
    assert code == 2
    assert message in said
