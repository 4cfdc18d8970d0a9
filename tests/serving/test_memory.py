"""How the directions are kept: chosen by free memory or by a person, the same slice in every mode, and said so."""

from __future__ import annotations

import asyncio
import math

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (extra cpu or gpu)")

import numpy as np
import torch
from conftest import POLICY, ServerThread
from safetensors.torch import load_file
from test_engine import POINTS, call, engine, load, nearest_bfloat16, random_qwen2, reported, same

from rlvr_landscape_plugin.config import ServerConfig, SweepConfig
from rlvr_landscape_plugin.directions import AXES, DirectionSpec, SliceSpec, global_scales, scaled_direction
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.serving.launch import environment
from rlvr_landscape_plugin.serving.protocol import DIRECTIONS_MEMORY_VARIABLE, MOVE_PATH_VARIABLE
from rlvr_landscape_plugin.serving.worker import memory
from rlvr_landscape_plugin.serving.worker.engine import LandscapeEngine, LoadRequest
from rlvr_landscape_plugin.snapshot import file_sha256, write_safetensors

__all__ = ["engine"]  # a fixture

pytestmark = pytest.mark.server
GIB = 2**30


@pytest.mark.parametrize(
    ("wish", "device", "host", "mode", "on_device"),
    [
        ("auto", (10, 20), (12, 64), "float32", True),
        ("auto", (19, 20), (20, 64), "float32", False),
        ("auto", (19, 20), (20, 24), "regenerated", False),
        ("auto", None, (20, 64), "float32", False),
        ("auto", None, (20, 24), "regenerated", False),
        ("auto", None, (20, math.inf), "float32", False),
        ("float32", (19, 20), (20, 24), "float32", False),
        ("half", (10, 20), (12, 64), "half", True),
        ("half", (19, 20), (20, 24), "half", False),
        ("regenerated", (1, 20), (1, 64), "regenerated", False),
    ],
)
def test_free_memory_chooses_between_equals_and_a_person_between_others(wish, device, host, mode, on_device):
    on_gpu = None if device is None else (device[0] * GIB, device[1] * GIB)
    choice = memory.choose(wish, on_gpu, (host[0] * GIB, host[1] * GIB))
    assert (choice.mode, choice.on_device) == (mode, on_device)
    assert (DIRECTIONS_MEMORY_VARIABLE in choice.reason) == (wish != "auto")
    if wish == "auto" and not on_device:
        assert f"{host[0]} GiB needed of {host[1]} GiB free on the host" in choice.reason


def test_free_memory_is_that_of_the_tightest_group(tmp_path):
    def put(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert memory.free_on_host(tmp_path) == math.inf
    put("proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:   8000 kB\n")
    put("proc/self/cgroup", "0::/job/step\n")
    assert memory.free_on_host(tmp_path) == 8000 * 1024
    put("sys/fs/cgroup/job/step/memory.max", "max\n")
    put("sys/fs/cgroup/job/step/memory.current", "10\n")
    put("sys/fs/cgroup/job/step/memory.stat", "anon 5\ninactive_file 0\n")
    put("sys/fs/cgroup/job/memory.max", "5000000\n")
    put("sys/fs/cgroup/job/memory.current", "3000000\n")
    put("sys/fs/cgroup/job/memory.stat", "anon 5\ninactive_file 400000\n")
    assert memory.free_on_host(tmp_path) == 2_400_000, "the group around this one has the limit"
    put("proc/self/cgroup", "5:cpuset:/\n4:cpu,memory:/seen/from/outside\n0::/\n")
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "1000000\n")
    put("sys/fs/cgroup/memory/memory.usage_in_bytes", "900000\n")
    put("sys/fs/cgroup/memory/memory.stat", "total_inactive_file 50000\ninactive_file 7\n")
    assert memory.free_on_host(tmp_path) == 150_000, "a container of version 1 sees its own group only"
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert memory.free_on_host(tmp_path) == 8000 * 1024


def load_slice(engine: LandscapeEngine, spec: SliceSpec, files: dict[str, str]) -> dict:
    return reported(lambda folder: engine.init_transfer_engine(LoadRequest(folder, str(POLICY), spec.as_dict(), files)))


@pytest.mark.parametrize("mode", ["float32", "half", "regenerated"])
@pytest.mark.parametrize("normalization", ["tensor", "global"])
def test_every_mode_moves_along_the_slice_and_back(engine, tmp_path, monkeypatch, mode, normalization):
    """η drawn from the seed, δ from a file, one tensor standing still; against float64."""
    monkeypatch.setenv(DIRECTIONS_MEMORY_VARIABLE, mode)
    theta = {name: tensor.numpy() for name, tensor in load_file(POLICY / "model.safetensors").items()}
    still = "model.norm.weight"
    file = tmp_path / "direction.safetensors"
    draw = np.random.default_rng(0)
    given = {n: 1e-8 * draw.standard_normal(w.shape, dtype="f4") for n, w in theta.items() if n != still}
    write_safetensors(file, {name: values.shape for name, values in given.items()}, given.values())
    alpha = DirectionSpec("file", "none", sha256=file_sha256(file))
    spec = SliceSpec(3, normalization, exclude=(still,), alpha=alpha)
    facts = load_slice(engine, spec, {"alpha": str(file)})
    assert facts["directions_dtype"] == ("bfloat16" if mode == "half" else "float32")
    assert facts["moving_parameters"] == sum(values.size for values in given.values())
    origin = engine.model.state()

    outcome = call(engine, 3e5, -0.15)
    scales = global_scales(spec, theta, theta.__getitem__)
    changed = 0.0
    for name, values in engine.model.state().items():
        weight = theta[name].astype(np.float64)
        if name == still:
            assert np.array_equal(values.numpy(), theta[name])
            continue
        delta, eta = given[name], scaled_direction(spec, "beta", name, theta[name], scales["beta"])
        if mode == "half":
            delta, eta = nearest_bfloat16(delta), nearest_bfloat16(eta)
        expected = weight + 3e5 * delta.astype(np.float64) - 0.15 * eta.astype(np.float64)
        scale = np.abs(weight).max() + np.abs(expected).max()
        np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=3e-7 * scale, err_msg=name)
        changed += float(np.square(expected - weight).sum())
    assert outcome["changed"] == pytest.approx(changed, rel=1e-4)
    call(engine, 0.0, 0.0)
    assert same(engine.model.state(), origin)
    assert all(np.array_equal(origin[name].numpy(), theta[name]) for name in theta)


def test_half_precision_turns_a_random_direction_by_a_tenth_of_a_degree():
    weight = load_file(POLICY / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].numpy()
    for axis in AXES:
        exact = torch.from_numpy(scaled_direction(SliceSpec(0), axis, "w", weight, 1.0)).double()
        rounded = exact.to(memory.HALF).double()
        assert (rounded - exact).norm() / exact.norm() < 0.0018
        assert rounded.norm() / exact.norm() == pytest.approx(1, abs=2e-5)
        assert ((rounded - exact).abs() <= exact.abs() / 256).all()


def test_a_slice_that_fits_nowhere_is_regenerated(engine, monkeypatch):
    monkeypatch.delenv(DIRECTIONS_MEMORY_VARIABLE, raising=False)
    need = 8 * load(engine)["moving_parameters"]
    for free, workers, expected in (
        (1.3 * need, 1, "float32 on the host"),
        (1.2 * need, 1, "regenerated for each move"),
        (1.3 * need, 2, "regenerated for each move"),
        (2.6 * need, 2, "float32 on the host"),
    ):
        monkeypatch.setattr(memory, "free_on_host", lambda free=free: free)
        monkeypatch.setattr(engine.parallel_config, "local_world_size", workers, raising=False)
        engine._state = None
        facts = load(engine)
        assert (facts["directions_memory"], facts["directions_dtype"]) == (expected, "float32")
        assert "GiB free on the host" in facts["directions_memory_reason"]
    monkeypatch.setattr(memory, "free_on_host", lambda: 0.6 * need)
    facts = load(engine)
    assert facts["directions_memory"] == "float32 on the host", "what the slice before gives back counts as free"


def test_a_mode_that_is_none_is_refused_by_name(engine, monkeypatch):
    load(engine)
    monkeypatch.setenv(DIRECTIONS_MEMORY_VARIABLE, "float16")
    assert load(engine)["error"] == (
        "RLVR_LANDSCAPE_DIRECTIONS_MEMORY is 'float16' in the server's environment; it must be auto, float32, half or "
        "regenerated"
    )
    assert call(engine, 0.1, 0.0)["weights"] == "moved", "the slice before stays in force"


def test_a_launched_server_is_told_and_only_half_is_provenance(monkeypatch):
    monkeypatch.setenv(DIRECTIONS_MEMORY_VARIABLE, "half")
    assert environment(ServerConfig(), "t", [])[DIRECTIONS_MEMORY_VARIABLE] == "auto", "never by inheritance"
    assert environment(ServerConfig(directions_memory="half"), "t", [])[DIRECTIONS_MEMORY_VARIABLE] == "half"
    plain = SweepConfig().provenance()
    for mode in ("float32", "regenerated"):
        assert SweepConfig(server=ServerConfig(directions_memory=mode)).provenance() == plain
    half = SweepConfig(server=ServerConfig(directions_memory="half")).provenance()
    assert half["server"] == plain["server"] | {"directions_memory": "half"}
    assert SweepConfig.from_provenance(half).provenance() == half
    with pytest.raises(ValueError, match="directions_memory"):
        ServerConfig(directions_memory="float16")  # pyright: ignore[reportArgumentType]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2])
def test_both_paths_leave_the_same_bits_on_gpus(tmp_path, monkeypatch, ranks):
    """One device, then tensor parallelism over two: a key-value head that both hold, biases, bfloat16."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices, found {torch.cuda.device_count()}")
    snapshot = random_qwen2(tmp_path / "policy", "bfloat16", False)

    async def travel(url: str, token: str) -> tuple[dict, list, list]:
        async with LandscapeClient(url, token) as client:
            facts, held, steps = await client.load(str(snapshot), {"seed": 0}), [], []
            for alpha, beta in POINTS:
                steps.append((await client.move(alpha, beta)).realised_step)
                held.append(await client.checksums())
            return facts, held, steps

    def trip(path: str, mode: str) -> tuple[dict, list, list]:
        monkeypatch.setenv(MOVE_PATH_VARIABLE, path)
        config = ServerConfig(
            device="cuda",
            tensor_parallel_size=ranks,
            gpu_memory_utilization=0.5,
            directions_memory=mode,  # pyright: ignore[reportArgumentType]
            extra_args=["--enforce-eager"],
        )
        server = ServerThread(config, snapshot, [snapshot], tmp_path / f"{path}-{mode}.log")
        try:
            return asyncio.run(travel(server.server.url, server.server.token))
        finally:
            server.close()

    held = {}
    for mode, dtype in (("float32", "float32"), ("half", "bfloat16")):
        kernel, loader = trip("kernel", mode), trip("loader", mode)
        assert (kernel[0]["move_path"], loader[0]["move_path"]) == ("kernel", "loader")
        assert kernel[0]["directions_memory"].startswith(f"{dtype} on cuda")
        assert kernel[1] == loader[1], mode
        assert kernel[1][0] == kernel[1][3] != kernel[1][1], "the origin is the snapshot bit for bit"
        assert kernel[2] == pytest.approx(loader[2], rel=1e-5)
        held[mode] = kernel[1]
    assert held["half"] != held["float32"]
    assert trip("kernel", "regenerated")[1] == held["float32"]
