"""The designs `census`, `path` and `boundary`: what they measure, in sweeps on a fake server."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr
from toy_run import make_run

from rlvr_landscape_plugin.config import SweepConfig
from rlvr_landscape_plugin.designs import Surroundings
from rlvr_landscape_plugin.designs.census import census_designs
from rlvr_landscape_plugin.designs.path import path_designs
from rlvr_landscape_plugin.directions import Trajectory, global_scales, scaled_direction
from rlvr_landscape_plugin.snapshot import open_snapshot

ENV = """
[env]
id = "tiny-quiz"
num_prompts = 3
rollouts = 2
{more}
[sampling]
max_tokens = 12
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Steps 0, 1 and 4, at relative distances 0, 0.01 and 0.04 from step 0."""
    return make_run(tmp_path_factory.mktemp("run"), {0: 0.0, 1: 0.01, 4: 0.04})


def around(run, step, tmp_path):
    return Surroundings(Trajectory.around(open_snapshot(run[step]), None, {}), tmp_path / "directions")


def census(run, step, tmp_path, **options):
    slice_ = options.pop("slice", {})
    config = SweepConfig(design="census", census={"pairs": 3, "radii": [0.5, 2.0], **options}, slice=slice_)
    (design,) = census_designs(config, around(run, step, tmp_path))
    return design


def norm_of_move(design, point):
    """‖α δ + β η‖ at a point, from the directions as a server draws them."""
    slice_ = design.slices[point.slice]
    snapshot, spec = slice_.snapshot, slice_.spec
    scales = global_scales(spec, snapshot.tensors, lambda name: snapshot.read(name).astype(np.float32))
    total = 0.0
    for name in snapshot.tensors:
        weight = snapshot.read(name).astype(np.float32)
        delta, eta = (scaled_direction(spec, axis, name, weight, scales[axis]) for axis in ("alpha", "beta"))
        total += float(np.sum((point.alpha * delta.astype(np.float64) + point.beta * eta) ** 2))
    return np.sqrt(total)


def distance(a, b):
    return np.sqrt(sum(float(np.sum((a.read(n).astype(np.float64) - b.read(n)) ** 2)) for n in a.tensors))


@pytest.mark.parametrize("normalization", ["tensor", "global"])
def test_radii_are_distances_in_units_of_the_displacement(run, tmp_path, normalization):
    design = census(run, 4, tmp_path, slice={"normalization": normalization})
    displacement = distance(open_snapshot(run[4]), open_snapshot(run[0]))
    assert len(design.slices) == 2
    for place in ((0, 0, 0), (1, 1, 1), (2, 0, 1)):
        point = design.by_place[place]
        assert norm_of_move(design, point) == pytest.approx((0.5, 2.0)[place[2]] * displacement, rel=1e-5)


def test_an_antithetic_pair_is_one_direction_and_two_pairs_share_a_slice(run, tmp_path):
    design = census(run, 4, tmp_path)
    for direction in range(3):
        there, back = (design.by_place[direction, sign, 1] for sign in (0, 1))
        assert (there.alpha, there.beta) == (-back.alpha, -back.beta)
        assert there.slice == back.slice == direction // 2
        assert (there.alpha == 0) == (direction == 1)
    slices = [point.slice for point in design.points]
    assert slices == sorted(slices)


def test_directions_are_fresh_for_each_snapshot_or_the_same(run, tmp_path):
    seeds = {
        kind: [[s.spec.seed for s in census(run, step, tmp_path, directions=kind).slices] for step in (1, 4)]
        for kind in ("fresh", "paired")
    }
    assert seeds["paired"][0] == seeds["paired"][1]
    assert len({seed for pair in seeds["fresh"] for seed in pair}) == 4
    assert seeds["fresh"] == [[s.spec.seed for s in census(run, step, tmp_path).slices] for step in (1, 4)]


def test_step_0_is_measured_in_units_of_the_runs_last_displacement(run, tmp_path):
    design, last = census(run, 0, tmp_path), distance(open_snapshot(run[4]), open_snapshot(run[0]))
    assert design.attributes["radius_unit_norm"] == pytest.approx(last, rel=1e-9)
    assert "step 4" in design.attributes["radius_unit_comment"]
    other = census(run, 4, tmp_path, reference=1)
    assert other.attributes["radius_unit_norm"] == pytest.approx(distance(open_snapshot(run[1]), open_snapshot(run[0])))


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        (4, {"slice": {"normalization": "filter"}}, "radii need directions as long as the weights"),
        (4, {"slice": {"alpha": {"kind": "displacement"}}}, "draws all its directions"),
        (4, {"slice": {"seeds": [0, 1]}}, "raise census.pairs"),
        (4, {"reference": 0}, None),
    ],
)
def test_what_a_census_cannot_do_is_refused(run, tmp_path, step, options, message):
    if message is None:
        assert census(run, step, tmp_path, **options).attributes["radius_unit_norm"] > 0
        return
    with pytest.raises(ValueError, match=message):
        census(run, step, tmp_path, **options)


def test_without_a_run_the_unit_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"no later snapshot .* set census.unit = 'theta'"):
        census({0: "tiny-sorter"}, 0, tmp_path)
    assert census({0: "tiny-sorter"}, 0, tmp_path, unit="theta").attributes["radius_unit"] == "theta"


def test_a_snapshot_equal_to_step_0_has_no_unit(tmp_path):
    still = make_run(tmp_path / "still", {0: 0.0, 1: 0.0})
    with pytest.raises(ValueError, match=r"step 1 .* is where step 0 is"):
        census(still, 1, tmp_path)


def test_a_census_is_swept(run, sweep_here, fake_server, tmp_path):
    config = f'snapshots = ["{run[4]}"]\ndesign = "census"\n[census]\npairs = 3\nradii = [0.5, 2.0]\n' + ENV.format(
        more=""
    )
    code, said = sweep_here(fake_server, config=config)
    assert code == 0, said
    assert "starting: 12 points in 2 slices" in said
    assert fake_server.asked["load"] == 2
    with xr.open_dataset(tmp_path / "out" / "census_step000004.nc") as data:
        assert dict(data.sizes) == {"direction": 3, "sign": 2, "radius": 2, "prompt": 3, "rollout": 2}
        assert data.sign.values.tolist() == [1, -1]
        assert data.radius.values.tolist() == [0.5, 2.0]
        assert data.direction_axis.values.tolist() == ["alpha", "beta", "alpha"]
        assert data.attrs["design"] == "census"
        assert data.attrs["directions"] == "fresh"
        unit = data.attrs["radius_unit_norm"]
        assert data.displacement_norm.item() == pytest.approx(unit, rel=1e-6)
        theta = np.sqrt(sum(float(np.sum(np.square(v.astype(np.float64)))) for v in weights(run[4])))
        np.testing.assert_allclose(data.relative_radius, data.radius * unit / theta, rtol=1e-6)
        radii = data.radius.broadcast_like(data.displacement_radius)
        np.testing.assert_allclose(data.displacement_radius, radii.transpose(*data.displacement_radius.dims), rtol=1e-6)
        configuration = json.loads(data.attrs["configuration"])
        assert configuration["census"]["pairs"] == 3
        assert "grid" not in configuration
    again, said = sweep_here(config=config.replace("[0.5, 2.0]", "[0.5, 3.0]"))
    assert again == 2
    assert "radius = 2 (1 of 2 values)" in said


def weights(path):
    snapshot = open_snapshot(path)
    return [snapshot.read(name) for name in snapshot.tensors]


def test_positions_on_the_displacement_lead_back_to_snapshot_0(run, tmp_path):
    config = SweepConfig(design="path", path={"directions": [{"kind": "displacement"}, {"kind": "update"}]})
    (design,) = path_designs(config, around(run, 1, tmp_path))
    assert design.frame.axes["path"] == ["displacement", "update"]
    slice_ = design.slices[0]
    from safetensors.numpy import load_file

    delta, eta = (load_file(slice_.files[axis]) for axis in ("alpha", "beta"))
    here, first, following = (open_snapshot(run[step]) for step in (1, 0, 4))
    back = design.by_place[0, config.path.positions.index(-1.0)]
    assert (back.alpha, back.beta) == (-1.0, 0.0)
    half = design.by_place[1, config.path.positions.index(0.5)]
    assert (half.alpha, half.beta) == (0.0, 0.5)
    for name in here.tensors:
        np.testing.assert_allclose(here.read(name) - delta[name], first.read(name), atol=1e-6)
        np.testing.assert_allclose(here.read(name) + eta[name], following.read(name), atol=1e-6)


@pytest.mark.parametrize(
    ("step", "kind", "message"),
    [(0, "displacement", "nothing has moved yet"), (4, "update", "no snapshot after step 4")],
)
def test_a_path_that_a_snapshot_does_not_have_is_refused(run, tmp_path, step, kind, message):
    config = SweepConfig(design="path", path={"directions": [{"kind": kind}]})
    with pytest.raises(ValueError, match=message):
        path_designs(config, around(run, step, tmp_path))


def test_paths_between_policies_of_different_shapes_are_refused(run, tmp_path):
    from rlvr_landscape_plugin.snapshot import write_safetensors

    file = tmp_path / "gradient.safetensors"
    write_safetensors(file, {"model.norm.weight": (3,)}, [np.ones(3, np.float32)])
    config = SweepConfig(design="path", path={"directions": [{"kind": "file", "file": file}]})
    with pytest.raises(ValueError, match=r"gradient\.safetensors"):
        path_designs(config, around(run, 4, tmp_path))


def test_paths_are_swept(run, sweep_here, fake_server, tmp_path):
    kinds = '[{ kind = "displacement" }, { kind = "random" }, { kind = "update" }]'
    table = f"[path]\ndirections = {kinds}\npositions = [-0.5, 0.0, 0.5]\n"
    config = f'snapshots = ["{run[1]}"]\ndesign = "path"\n{table}' + ENV.format(more="")
    code, said = sweep_here(fake_server, config=config)
    assert code == 0, said
    with xr.open_dataset(tmp_path / "out" / "path_step000001.nc") as data:
        assert data.path.values.tolist() == ["displacement", "random", "update"]
        assert dict(data.sizes) == {"path": 3, "position": 3, "prompt": 3, "rollout": 2}
        assert (data.kl_k1.sel(position=0.0) == 0).all()
        assert "step 1 - step 0" in data.path_description.values[0]


def test_a_boundary_is_the_checkpoints_own_batch(run, sweep_here, fake_server, tmp_path):
    config = f'snapshots = ["{run[4]}"]\ndesign = "boundary"\n' + ENV.format(more="base_rollouts = 9")
    code, said = sweep_here(fake_server, "--env.pass_threshold", "0.5", config=config)
    assert code == 0, said
    with xr.open_dataset(tmp_path / "out" / "boundary_step000004.nc") as data:
        assert data.attrs["pass_threshold"] == 0.5
        assert "training_reward_mode" not in data.attrs
        assert dict(data.sizes) == {"prompt": 3, "base_rollout": 9}
        assert data.base_reward.dims == ("prompt", "base_rollout")
        assert "reward" not in data
        assert data.attrs["design"] == "boundary"
        assert np.isfinite(data.recheck_logprob).all()
    assert fake_server.asked["move"] >= 2
    code, said = sweep_here("--env.pass_threshold", "0.5", config=config)
    assert code == 0
    assert "starting" not in said
    code, said = sweep_here("--env.pass_threshold", "0.6", config=config)
    assert code == 2, "the reward that passes is fixed before the data"
    assert "env.pass_threshold: 0.5 there, 0.6 asked for" in said


def test_a_snapshot_that_a_control_trained_says_so(run, sweep_here, fake_server, tmp_path):
    import shutil

    copy = tmp_path / "control" / "step_000004"
    shutil.copytree(run[4], copy)
    taskset = {"task": {"reward_mode": "random"}}
    (copy / "manifest.json").write_text(json.dumps({"step": 4, "configuration": {"env": {"taskset": taskset}}}))
    config = f'snapshots = ["{copy}"]\ndesign = "boundary"\n' + ENV.format(more="base_rollouts = 3")
    code, said = sweep_here(fake_server, config=config)
    assert code == 0, said
    with xr.open_dataset(tmp_path / "out" / "boundary_step000004.nc") as data:
        assert data.attrs["training_reward_mode"] == "random"
        assert data.attrs["pass_threshold"] == 0.99
        assert "reward_mode" not in data.attrs


def test_a_boundary_without_its_number_of_rollouts_is_refused(run, sweep_here, fake_server):
    config = f'snapshots = ["{run[4]}"]\ndesign = "boundary"\n' + ENV.format(more="")
    code, said = sweep_here(fake_server, config=config)
    assert code == 2
    assert "env.base_rollouts" in said


def test_a_grid_may_have_another_number_of_rollouts_at_its_origin(sweep_here, fake_server, tmp_path):
    table = "[grid.alpha]\npoints = 3\n[grid.beta]\npoints = 2\n"
    config = f'snapshots = ["tiny-sorter"]\n{table}' + ENV.format(more="base_rollouts = 5")
    code, said = sweep_here(fake_server, config=config)
    assert code == 0, said
    with xr.open_dataset(tmp_path / "out" / "landscape_step000000_slice0.nc") as data:
        assert data.reward.dims == ("alpha", "beta", "prompt", "rollout")
        assert data.kl_k1.dims == ("alpha", "beta", "prompt", "base_rollout")
        assert data.sizes["rollout"] == 2
        assert data.sizes["base_rollout"] == 5
        assert np.isfinite(data.kl_k1).all()


def test_displacements_need_step_0_of_the_run(tmp_path):
    late = make_run(tmp_path / "late", {2: 0.02, 4: 0.04})
    with pytest.raises(ValueError, match=r"no snapshot of step 0; .* or set census\.unit = 'theta'"):
        census(late, 4, tmp_path)


def test_a_path_to_a_policy_of_another_shape_is_refused(run, tmp_path):
    import shutil

    from safetensors.numpy import load_file, save_file

    other = tmp_path / "mixed"
    for step in (0, 4):
        shutil.copytree(run[step], other / run[step].name)
        (other / run[step].name / "manifest.json").unlink()
    weights_of_0 = other / run[0].name / "model.safetensors"
    tensors = load_file(weights_of_0)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    save_file(tensors, weights_of_0)
    config = SweepConfig(design="path", path={"directions": [{"kind": "displacement"}]})
    around_4 = Surroundings(Trajectory.around(open_snapshot(other / run[4].name), None, {}), tmp_path / "directions")
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        path_designs(config, around_4)
