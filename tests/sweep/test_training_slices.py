"""Slices along training's own directions, and spurious rewards, on a real server and as a user runs them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import xarray as xr
from conftest import POLICY, TASKSET, start_sweep
from rlvr_alphabet_sort.rules import random_reward

from rlvr_landscape_plugin.config import SliceConfig
from rlvr_landscape_plugin.directions import SliceSpec, Trajectory, prepare_slice
from rlvr_landscape_plugin.errors import ServerError
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.serving.protocol import Sampling
from rlvr_landscape_plugin.snapshot import Manifest, open_snapshot, snapshot_name, write_snapshot

pytestmark = pytest.mark.server
STEPS = (0, 3, 4)


def make_run(root: Path, steps: tuple[int, ...] = STEPS) -> Path:
    """A run of tiny-sorter: a seeded random walk of its weights, with manifests."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(POLICY / "model.safetensors")
    generator = np.random.default_rng(5)
    for step in range(max(steps) + 1):
        if step:
            for name, values in tensors.items():
                noise = 0.03 * values.std() * generator.standard_normal(values.shape)
                tensors[name] = (values + noise).astype(np.float32)
        if step in steps:

            def fill(folder: Path) -> None:
                for file in POLICY.iterdir():
                    if file.suffix not in (".safetensors", ".md"):
                        shutil.copyfile(file, folder / file.name)
                save_file(tensors, folder / "model.safetensors", {"format": "pt"})

            write_snapshot(root / "snapshots", Manifest(step, run="c0ffee"), fill)
    return root / "snapshots"


@pytest.fixture(scope="module")
def run(playground) -> Path:
    return make_run(playground / "run")


def at(run: Path, step: int) -> Path:
    return run / snapshot_name(step)


def prompts(count: int) -> list[list[int]]:
    from rlvr_landscape_plugin.episodes import ChatFormat, load_tasks, open_environment

    chat = ChatFormat(POLICY)
    tasks = load_tasks(open_environment("rlvr-alphabet-sort", TASKSET), count)
    return [chat.opening(json.dumps([{"role": "user", "content": t.data.info["user_turns"][0]}])) for t in tasks]


def difference(run: Path, one: int, other: int) -> float:
    a, b = open_snapshot(at(run, one)), open_snapshot(at(run, other))
    return float(np.sqrt(sum(np.sum((a.read(n).astype(float) - b.read(n).astype(float)) ** 2) for n in a.tensors)))


def norm(run: Path, step: int) -> float:
    a = open_snapshot(at(run, step))
    return float(np.sqrt(sum(np.sum(a.read(n).astype(float) ** 2) for n in a.tensors)))


def prepare(run: Path, step: int, folder: Path, **options):
    around = Trajectory.around(open_snapshot(at(run, step)), None)
    prepared = prepare_slice(SliceConfig(**options), 0, around, folder)
    return prepared.spec, {axis: str(path) for axis, path in prepared.files.items()}


@pytest.mark.parametrize(
    ("place", "step"), [((-1.0, 0.0), 0), ((0.0, 1.0), 4)], ids=["back to snapshot 0", "on to the next snapshot"]
)
async def test_a_whole_step_is_the_other_snapshot(server, playground, run, place, step):
    """Every way of looking at the moved weights agrees with a fresh load of the snapshot that they should be."""
    options = {"alpha": {"kind": "displacement"}, "beta": {"kind": "update"}}
    spec, files = prepare(run, 3, playground / "directions", **options)
    greedy = Sampling(temperature=0.0)
    async with LandscapeClient(server.url, server.token, sampling=greedy) as client:

        async def look() -> tuple[list[np.ndarray], list[list[int]]]:
            said = await asyncio.gather(*(client.generate(p, 0, 32) for p in prompts(6)))
            whole = [np.concatenate([p, c.tokens]).astype(np.int32) for p, c in zip(prompts(6), said, strict=True)]
            return await client.score(whole), [c.tokens.tolist() for c in said]

        await client.load(str(at(run, step)), {"seed": 0})
        await client.move(0, 0)
        expected, decoded = await look()
        await client.load(str(at(run, 3)), spec.as_dict(), files)
        await client.move(0, 0)
        home = await client.checksums()
        between, _ = await look()
        moved = await client.move(*place)
        found, again = await look()
        assert again == decoded
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
        assert any(len(a) != len(b) or np.abs(a - b).max() > 0.01 for a, b in zip(between, expected, strict=True))
        assert moved.realised_step == pytest.approx(difference(run, 3, step) / norm(run, 3), rel=1e-5)
        ids = np.array(prompts(1)[0], np.int32)
        model = reference.perturbed(at(run, step), 0, 0.0, 0.0)
        np.testing.assert_allclose((await client.score([ids]))[0], reference.logprobs(model, ids), atol=1e-3)
        await client.move(0, 0)
        assert await client.checksums() == home


async def test_files_other_than_the_named_are_refused_and_change_nothing(server, playground, run, tmp_path):
    spec, files = prepare(run, 3, playground / "directions", alpha={"kind": "displacement"})
    other = prepare(run, 4, playground / "directions", alpha={"kind": "displacement"})[1]
    outside = prepare(run, 3, tmp_path / "directions", alpha={"kind": "displacement"})[1]
    async with LandscapeClient(server.url, server.token) as client:
        await client.load(str(at(run, 3)), spec.as_dict(), files)
        await client.move(0.5, 0)
        before, version = await client.checksums(), client.version
        for given, message in (
            (other, r"is not the direction that slice\.alpha names"),
            (outside, "direction alpha .* is outside the server's RLVR_LANDSCAPE_ROOTS"),
            ({}, r"slice\.alpha is not drawn from the seed, and no file came with it"),
        ):
            with pytest.raises(ServerError, match=message):
                await client.load(str(at(run, 3)), spec.as_dict(), given)
        assert await client.checksums() == before
        client.version = version
        assert len((await client.score([np.arange(9, dtype=np.int32)]))[0]) == 8


ALONG = ["--slice.alpha.kind", "displacement", "--slice.orthogonalize", "true", "--grid.alpha.min", "-1"]
ALONG += ["--grid.alpha.max", "0.5", "--grid.alpha.points", "4"]


def sweep(output: Path, server, *arguments: str) -> tuple[int, str]:
    process = start_sweep(output, server, *arguments)
    _, err = process.communicate(timeout=400)
    return process.returncode, err


@pytest.fixture(scope="module")
def finished(server, playground, run) -> Path:
    """A sweep of step 3 and of step 4 along the displacement and a random direction orthogonal to it."""
    output = playground / "sweep" / "out"
    code, err = sweep(output, server, "--snapshots", json.dumps([str(at(run, 3)), str(at(run, 4))]), *ALONG)
    assert code == 0, err
    return output


def test_the_dataset_says_how_far_it_reaches(finished, run):
    with xr.open_dataset(finished / "landscape_step000003_slice0.nc") as data:
        assert data.alpha.values.tolist() == [-1.0, -0.5, 0.0, 0.5]
        assert float(data.displacement_norm) == pytest.approx(difference(run, 3, 0), rel=1e-9)
        assert open_snapshot(at(run, 0)).sha256 in data.displacement_norm.attrs["comment"]
        along = data.displacement_radius.sel(beta=0.0)
        np.testing.assert_allclose(along, [1.0, 0.5, 0.0, 0.5], rtol=1e-4)
        # The axes are orthogonal, so the squares of the two parts add up.
        across = data.displacement_radius.sel(alpha=0.0)
        np.testing.assert_allclose(data.displacement_radius**2, along**2 + across**2, rtol=1e-3, atol=1e-9)
        for name in ("displacement_norm", "displacement_radius"):
            assert data[name].attrs["units"] == "1"
            assert data[name].attrs["long_name"]
        assert data.attrs["direction_alpha"].startswith("displacement, step 3 - step 0; norm ")
        assert data.attrs["direction_beta"].startswith(
            "random, seed 0; scaled per tensor; orthogonalised against alpha"
        )
        assert "displacement" in data.alpha.attrs["long_name"]
        assert "reward_mode" not in data.attrs
        spec = SliceSpec(**json.loads(data.attrs["slice"]))
        for axis, kind in (("alpha", "displacement"), ("beta", "random")):
            direction = spec.direction(axis)  # type: ignore[arg-type]
            assert direction.kind == kind
            (file,) = (
                path
                for path in (finished / "directions").glob(f"{kind}_*/direction.safetensors")
                if hashlib.sha256(path.read_bytes()).hexdigest() == direction.sha256
            )
            assert file.is_file()
        assert not spec.drawn("alpha")
        assert data.attrs["directions_fingerprint"]
        assert float(data.kl_k3.mean(["prompt", "rollout"]).sel(alpha=-1.0, beta=0.0)) > 0
        assert (data.sel(alpha=0.0, beta=0.0).kl_k1 == 0).all()


def test_datasets_of_a_run_stack(finished):
    with xr.open_mfdataset(str(finished / "landscape_step*_slice0.nc"), combine="nested", concat_dim="step") as stacked:
        assert stacked.displacement_norm.dims == ("step",)
        assert stacked.displacement_radius.sizes["step"] == 2
        assert bool((stacked.displacement_norm.diff("step") > 0).all())


def test_the_report_works_and_names_the_directions(finished):
    done = subprocess.run(
        [sys.executable, "-m", "rlvr_landscape_analysis", str(finished), "--resamples", "100"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    page = (finished / "report" / "report.html").read_text()
    assert "alpha is no random direction (displacement, step 3 - step 0" in page
    assert "distance / training&#x27;s own" in page or "distance / training's own" in page


def test_a_finished_sweep_is_not_measured_again_and_another_direction_is_refused(finished, run):
    snapshots = ["--snapshots", json.dumps([str(at(run, 3)), str(at(run, 4))])]
    before = {path: path.stat().st_mtime_ns for path in finished.glob("directions/*/*")}
    code, err = sweep(finished, None, *snapshots, *ALONG)
    assert code == 0, err
    assert "starting" not in err
    assert {path: path.stat().st_mtime_ns for path in finished.glob("directions/*/*")} == before
    code, err = sweep(finished, None, *snapshots, *ALONG, "--slice.alpha.normalization", "global")
    assert code == 2
    assert "slice.alpha.normalization" in err
    assert "slice.alpha.sha256" in err
    assert "Traceback" not in err


def test_a_run_whose_snapshot_0_changed_is_another_slice(finished, run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy / "snapshots")
    first = at(copy / "snapshots", 0)
    shutil.rmtree(first)
    shutil.copytree(POLICY, first)
    (first / "model.safetensors").unlink()
    from safetensors.numpy import load_file, save_file

    tensors = load_file(POLICY / "model.safetensors")
    tensors["model.norm.weight"] = (tensors["model.norm.weight"] * np.float32(1.001)).astype(np.float32)
    save_file(tensors, first / "model.safetensors", {"format": "pt"})
    code, err = sweep(finished, None, "--snapshots", json.dumps([str(at(run, 3))]), "--slice.run", str(copy), *ALONG)
    assert code == 2
    assert "configuration" not in err.split("go back to")[1]
    assert "slice.alpha.sources.step 0" in err


def test_step_0_has_no_yardstick_and_says_so(server, run, playground):
    output = playground / "start" / "out"
    code, err = sweep(output, server, "--snapshots", json.dumps([str(at(run, 0))]), "--grid.beta.points", "2")
    assert code == 0, err
    with xr.open_dataset(output / "landscape_step000000_slice0.nc") as data:
        assert np.isnan(data.displacement_norm)
        assert data.displacement_radius.isnull().all()
        assert "is step 0 itself" in data.displacement_norm.attrs["comment"]
        assert data.attrs["direction_alpha"] == "random, seed 0, scaled per tensor"
    assert not (output / "directions").exists()


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        (0, ["--slice.alpha.kind", "displacement"], "slice.alpha (kind = 'displacement'): "),
        (4, ["--slice.beta.kind", "update"], "has no snapshot after step 4"),
        (4, ["--slice.beta.kind", "pca", "--slice.beta.component", "3"], "component = 3 is beyond the rank 2"),
        (4, ["--slice.beta.kind", "file"], "set file with kind = 'file'"),
        (4, ["--slice.beta.kind", "file", "--slice.beta.file", "/nowhere"], "/nowhere is not a file"),
        (4, ["--slice.beta.kind", "gradient"], "slice.beta.kind"),
    ],
)
def test_mistakes_get_a_message_and_no_server(run, tmp_path, step, options, message):
    code, err = sweep(tmp_path / "out", None, "--snapshots", json.dumps([str(at(run, step))]), *options)
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err
    assert "starting" not in err


def test_an_output_that_the_server_may_not_read_is_named(server, run, tmp_path):
    code, err = sweep(
        tmp_path / "out", server, "--snapshots", json.dumps([str(at(run, 3))]), "--slice.alpha.kind", "displacement"
    )
    assert code == 2
    assert "is outside the server's RLVR_LANDSCAPE_ROOTS" in err
    assert "Traceback" not in err


def test_a_random_reward_is_named_everywhere(server, tmp_path):
    taskset = json.dumps({**TASKSET, "task": {"reward_mode": "random"}})
    options = ["--env.taskset", taskset, "--grid.beta.points", "2", "--save-traces"]
    code, err = sweep(tmp_path / "out", server, *options)
    assert code == 0, err
    with xr.open_dataset(tmp_path / "out" / "landscape_step000000_slice0.nc") as data:
        assert data.attrs["reward_mode"] == "random"
        assert data.attrs["title"].endswith("random reward")
        assert data.reward.attrs["long_name"] == "random reward (a control, not the verifier's) of a fresh rollout"
        assert data.base_reward.attrs["long_name"].startswith("random reward (a control")
        assert set(np.unique(data.reward)) == {0.0, 1.0}
        assert json.loads(data.attrs["configuration"])["env"]["taskset"]["task"]["reward_mode"] == "random"
        for (i, j), name in np.ndenumerate(np.array([["a000_b000", "a000_b001"]])):
            lines = (tmp_path / "out" / "step000000_slice0" / "traces" / f"{name}.jsonl").read_text().splitlines()
            for cell, line in zip(np.ndindex(6, 3), lines, strict=True):
                trace = json.loads(line)
                assert list(trace["rewards"]) == ["random_reward"]
                assert 0 <= trace["metrics"]["verifier_reward"] <= 1
                replies = [n["message"]["content"] for n in trace["nodes"] if n["sampled"]]
                expected = random_reward(trace["task"]["data"]["info"]["user_turns"], replies)
                assert float(data.reward[i, j][cell]) == expected
    done = subprocess.run(
        [sys.executable, "-m", "rlvr_landscape_analysis", str(tmp_path / "out"), "--resamples", "100"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "report" / "report.html").read_text()
    assert "<b>Control.</b> Every reward here is random" in page
    assert "<dt>reward_mode</dt><dd>random</dd>" in page
