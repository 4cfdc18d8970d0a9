"""The weight engine without a server: what a failed move leaves behind, and the two ways to move vLLM's own models."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (extra cpu or gpu)")

import numpy as np
import torch
from conftest import POLICY
from safetensors.torch import load_file, save_file
from toy_run import make_toy_adapters

from rlvr_landscape_plugin.directions import AXES, DirectionSpec, SliceSpec, Subspace, scaled_direction
from rlvr_landscape_plugin.serving import access, versions
from rlvr_landscape_plugin.serving.launch import free_port
from rlvr_landscape_plugin.serving.protocol import DIRECTIONS_MEMORY_VARIABLE, MOVE_PATH_VARIABLE, ROOTS_VARIABLE
from rlvr_landscape_plugin.serving.worker import engine as engine_module
from rlvr_landscape_plugin.serving.worker import kernel_layout, slice_tensors
from rlvr_landscape_plugin.serving.worker.engine import (
    LandscapeEngine,
    LoadRequest,
    MoveRequest,
    MoveStats,
    Slice,
    _digest,
    checksums,
    register,
)
from rlvr_landscape_plugin.serving.worker.kernel_layout import Layout, Part
from rlvr_landscape_plugin.serving.worker.packed import unpacked
from rlvr_landscape_plugin.snapshot import file_sha256, open_snapshot, write_safetensors

pytestmark = pytest.mark.server


class Model(torch.nn.Module):
    """Stands for vLLM's model: one flat module with a loader that can be made to fail half-way."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = {name: name.replace(".", "_") for name in tensors}
        for name, tensor in tensors.items():
            self.register_parameter(self.names[name], torch.nn.Parameter(tensor.clone(), requires_grad=False))
        self.fail_after: list[int] = []

    def load_weights(self, weights) -> None:
        limit = self.fail_after.pop(0) if self.fail_after else None
        for count, (name, tensor) in enumerate(weights):
            if count == limit:
                raise RuntimeError("device lost")
            self.get_parameter(self.names[name]).data.copy_(tensor)

    def state(self) -> dict[str, torch.Tensor]:
        return {name: self.get_parameter(attribute).data.clone() for name, attribute in self.names.items()}


@pytest.fixture
def engine(tmp_path, monkeypatch) -> LandscapeEngine:
    from vllm.model_executor.model_loader import reload

    # The stub has no layers to reload layer by layer; vLLM's own path runs in test_server.py.
    monkeypatch.setattr(reload, "initialize_layerwise_reload", lambda model: None)
    monkeypatch.setattr(reload, "finalize_layerwise_reload", lambda model, config: None)
    monkeypatch.setenv(ROOTS_VARIABLE, os.pathsep.join([str(POLICY), str(tmp_path)]))
    monkeypatch.setattr(versions, "worker_config", lambda config: contextlib.nullcontext())
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(rank=0),
        model_config=SimpleNamespace(model=str(POLICY), dtype=torch.float32, enforce_eager=True),
    )
    model = Model(load_file(POLICY / "model.safetensors"))
    return LandscapeEngine(SimpleNamespace(backend="landscape"), config, torch.device("cpu"), model)  # type: ignore


def reported(do: Callable[[str], None], rank: int = 0) -> dict:
    """What a call of the engine wrote into its report directory."""
    with access.report_directory() as folder:
        do(str(folder))
        return json.loads((folder / f"rank{rank}.json").read_text())


def call(engine: LandscapeEngine, alpha: float, beta: float) -> dict:
    return reported(lambda folder: engine.receive_weights(MoveRequest(alpha, beta, folder)))


def load(engine: LandscapeEngine, snapshot: Path = POLICY) -> dict:
    return reported(lambda folder: engine.init_transfer_engine(LoadRequest(folder, str(snapshot), {"seed": 0})))


def test_an_adapter_is_its_base_with_the_change_merged(engine, tmp_path):
    path, name = make_toy_adapters(tmp_path, {3: 0.5})[3], "model.layers.0.self_attn.q_proj.weight"
    pairs, weights = load_file(path / "adapter_model.safetensors"), load_file(POLICY / "model.safetensors")
    a, b = (pairs[f"base_model.model.{name.removesuffix('.weight')}.lora_{half}.weight"].double() for half in "AB")
    expected = (weights[name].double() + 2 * b @ a).float()

    def load_with(base: str) -> dict:
        request = functools.partial(LoadRequest, snapshot=str(path), slice={"seed": 0}, base=base)
        return reported(lambda folder: engine.init_transfer_engine(request(folder)))

    assert load_with(str(POLICY))["snapshot_sha256"] == open_snapshot(path).sha256
    assert call(engine, 0.0, 0.0)["weights"] == "moved"
    state = engine.model.state()
    torch.testing.assert_close(state[name], expected, rtol=0, atol=1e-7)
    assert not torch.equal(state[name], weights[name])
    assert torch.equal(state["model.norm.weight"], weights["model.norm.weight"])
    assert call(engine, 0.1, 0.0)["weights"] == "moved"
    delta = scaled_direction(SliceSpec(0), "alpha", name, expected.numpy(), 1.0)
    torch.testing.assert_close(engine.model.state()[name], expected + 0.1 * torch.from_numpy(delta), rtol=0, atol=1e-6)
    assert "is an adapter: name the directory of its base model" in load_with("")["error"]
    assert "outside the server's" in load_with("/usr")["error"]


@pytest.mark.parametrize("mode", ["float32", "half", "regenerated"])
@pytest.mark.parametrize("kind", ["lora", "lora_complement"])
def test_directions_of_an_adapter_are_drawn_by_the_server_in_every_memory_mode(
    engine, tmp_path, monkeypatch, kind, mode
):
    monkeypatch.setenv(DIRECTIONS_MEMORY_VARIABLE, mode)
    path = make_toy_adapters(tmp_path, {3: 0.5})[3]
    snapshot, direction = open_snapshot(path), DirectionSpec(kind)
    spec = SliceSpec(0, alpha=direction, beta=direction)
    request = functools.partial(LoadRequest, snapshot=str(path), slice=spec.as_dict(), base=str(POLICY))
    facts = reported(lambda folder: engine.init_transfer_engine(request(folder)))
    assert ("regenerated" in facts["directions_memory"]) == (mode == "regenerated")
    assert call(engine, 0.2, -0.1)["weights"] == "moved"
    state, part = engine.model.state(), Subspace(snapshot).part
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        weight = snapshot.read(name)
        delta, eta = (scaled_direction(spec, axis, name, weight, 1.0, part) for axis in AXES)
        tolerance = 0.004 * np.abs(delta).max() if mode == "half" else 1e-6
        np.testing.assert_allclose(state[name].numpy(), weight + 0.2 * delta - 0.1 * eta, rtol=0, atol=tolerance)
        assert (np.abs(state[name].numpy() - weight).max() > 1e-4) == (kind != "lora" or "q_proj" in name)
    refused = functools.partial(LoadRequest, snapshot=str(POLICY), slice=spec.as_dict())
    assert (
        "cannot be drawn around this snapshot"
        in reported(lambda folder: engine.init_transfer_engine(refused(folder)))["error"]
    )


def begin_ahead(engine: LandscapeEngine, spec: SliceSpec, wait: bool = True) -> dict:
    """Draw a slice ahead; `wait` until all of it is there."""
    request = functools.partial(LoadRequest, slice=spec.as_dict(), ahead=True)
    answer = reported(lambda folder: engine.init_transfer_engine(request(folder)))
    if wait and engine._ahead is not None:
        futures.wait(engine._ahead._parts.values(), timeout=60)
    return answer


def load_slice(engine: LandscapeEngine, spec: SliceSpec, snapshot: Path = POLICY, base: str = "") -> dict:
    request = functools.partial(LoadRequest, snapshot=str(snapshot), slice=spec.as_dict(), base=base)
    return reported(lambda folder: engine.init_transfer_engine(request(folder)))


@pytest.mark.parametrize("mode", ["float32", "half"])
@pytest.mark.parametrize("kind", ["tensor", "global", "adapter"])
def test_a_slice_that_was_drawn_ahead_has_the_same_bits(engine, tmp_path, monkeypatch, kind, mode):
    monkeypatch.setenv(DIRECTIONS_MEMORY_VARIABLE, mode)
    monkeypatch.setenv(MOVE_PATH_VARIABLE, "loader")
    path, base, direction = POLICY, "", None
    if kind == "adapter":
        path, base, direction = make_toy_adapters(tmp_path, {3: 0.5})[3], str(POLICY), DirectionSpec("lora")
    normalization = "global" if kind == "global" else "tensor"
    first, second = (SliceSpec(seed, normalization, alpha=direction, beta=direction) for seed in (0, 1))
    load_slice(engine, second, path, base)
    assert call(engine, 0.2, -0.1)["weights"] == "moved"
    expected = engine.model.state()
    load_slice(engine, first, path, base)
    assert begin_ahead(engine, second) == {"begun": True, "reason": ""}
    assert call(engine, 0.2, -0.1)["weights"] == "moved", "the slice that is loaded stays in force"
    assert not same(engine.model.state(), expected)
    facts = load_slice(engine, second, path, base)
    assert facts["ahead"] == {"parts": facts["ahead"]["parts"], "ready": facts["ahead"]["parts"], "errors": []}
    assert facts["ahead"]["parts"] > 0
    assert call(engine, 0.2, -0.1)["weights"] == "moved"
    assert same(engine.model.state(), expected)


def test_a_draw_ahead_that_fails_is_named_and_made_again(engine, monkeypatch):
    monkeypatch.setenv(MOVE_PATH_VARIABLE, "loader")
    second, name = SliceSpec(1), "model.norm.weight"
    load_slice(engine, second)
    call(engine, 0.2, -0.1)
    expected = engine.model.state()
    load_slice(engine, SliceSpec(0))
    failures, draw = [1], scaled_direction

    def failing(spec, axis, tensor, *rest):
        if failures and (axis, tensor) == ("beta", name):
            failures.clear()
            raise MemoryError("no room")
        return draw(spec, axis, tensor, *rest)

    monkeypatch.setattr(slice_tensors, "scaled_direction", failing)
    begin_ahead(engine, second)
    facts = load_slice(engine, second)
    assert facts["ahead"]["errors"] == [f"tensor {name!r} along beta: MemoryError: no room"]
    assert facts["ahead"]["ready"] == facts["ahead"]["parts"] - 1
    call(engine, 0.2, -0.1)
    assert same(engine.model.state(), expected)


def test_only_one_slice_is_drawn_ahead_and_only_the_one_that_is_loaded_is_used(engine):
    load_slice(engine, SliceSpec(2))
    call(engine, 0.2, -0.1)
    expected = engine.model.state()
    assert "no snapshot is loaded" not in begin_ahead(engine, SliceSpec(1), wait=False)
    given_up = engine._ahead
    begin_ahead(engine, SliceSpec(3))
    assert not given_up._parts, "its memory is free"
    facts = load_slice(engine, SliceSpec(2))
    assert facts["ahead"] == {"parts": 0, "ready": 0, "errors": []}
    assert engine._ahead is None
    call(engine, 0.2, -0.1)
    assert same(engine.model.state(), expected)


def test_what_cannot_be_drawn_ahead_is_said(engine, monkeypatch):
    assert "no snapshot is loaded" in begin_ahead(engine, SliceSpec(1))["error"]
    load_slice(engine, SliceSpec(0))
    along = DirectionSpec("file", "none", sha256="0" * 64)
    assert begin_ahead(engine, SliceSpec(1, alpha=along))["reason"] == "its directions are read from files"
    monkeypatch.setattr(engine_module.memory, "free_on_host", lambda: 2.0**20)
    assert "GiB needed of 0.000977 GiB free on the host" in begin_ahead(engine, SliceSpec(1))["reason"]
    monkeypatch.undo()
    engine._state.held_as = None
    assert begin_ahead(engine, SliceSpec(1))["reason"] == "directions are drawn for each move"
    assert engine._ahead is None


def test_a_snapshot_that_changes_on_disk_is_read_again(engine, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(POLICY, copy)
    (copy / "manifest.json").unlink(missing_ok=True)
    first = load_slice(engine, SliceSpec(0), copy)
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] += 1.0
    (copy / "model.safetensors").unlink()
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    second = load_slice(engine, SliceSpec(0), copy)
    assert first["snapshot_sha256"] != second["snapshot_sha256"] == open_snapshot(copy).sha256
    assert call(engine, 0.0, 0.0)["weights"] == "moved"
    assert torch.equal(engine.model.state()["model.norm.weight"], weights["model.norm.weight"])


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_failed_move_goes_back(engine):
    load(engine)
    assert call(engine, 0.1, 0.0)["weights"] == "moved"
    before = engine.model.state()
    engine.model.fail_after = [5]
    outcome = call(engine, -0.1, 0.0)
    assert outcome["weights"] == "restored"
    assert "device lost" in outcome["error"]
    assert same(engine.model.state(), before)


def test_a_move_that_cannot_go_back_is_dirty_until_one_succeeds(engine):
    load(engine)
    origin = engine.model.state()
    call(engine, 0.1, 0.0)
    engine.model.fail_after = [5, 3]
    assert call(engine, -0.1, 0.0)["weights"] == "dirty"
    engine.model.fail_after = [2]
    assert call(engine, 0.1, 0.0)["weights"] == "dirty", "nothing whole to go back to"
    assert call(engine, 0.0, 0.0)["weights"] == "moved"
    assert same(engine.model.state(), origin)


def test_the_first_move_has_nothing_to_go_back_to(engine):
    load(engine)
    engine.model.fail_after = [1]
    assert call(engine, 0.1, 0.0)["weights"] == "dirty"


def test_moving_without_a_snapshot_is_an_error(engine):
    outcome = call(engine, 0.1, 0.0)
    assert outcome["weights"] == "unchanged"
    assert "no snapshot" in outcome["error"]


def test_a_refused_snapshot_leaves_the_old_slice_in_force(engine, tmp_path):
    load(engine)
    bad = tmp_path / "bad"
    shutil.copytree(POLICY, bad)
    (bad / "model.safetensors").write_bytes((POLICY / "model.safetensors").read_bytes()[:-8])
    assert "not a whole safetensors file" in load(engine, bad)["error"]
    assert call(engine, 0.1, 0.0)["weights"] == "moved"


def test_the_worker_itself_reads_below_the_roots_only(engine, tmp_path, monkeypatch):
    """Whoever calls the engine past the routes."""
    load(engine)
    assert call(engine, 0.1, 0.0)["weights"] == "moved"
    inside = tmp_path / "inside"
    shutil.copytree(POLICY, inside)
    (tmp_path / "outside.safetensors").write_bytes((POLICY / "model.safetensors").read_bytes())
    monkeypatch.setenv(ROOTS_VARIABLE, str(inside))
    assert "outside the server's" in load(engine, POLICY)["error"]
    (inside / "model.safetensors").unlink()
    (inside / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    assert "outside the server's" in load(engine, inside)["error"]
    along = SliceSpec(0, alpha=DirectionSpec("file", "none", sha256="0" * 64)).as_dict()
    (inside / "model.safetensors").unlink()
    shutil.copy(POLICY / "model.safetensors", inside)
    files = {"alpha": str(tmp_path / "outside.safetensors")}
    refused = reported(lambda folder: engine.init_transfer_engine(LoadRequest(folder, str(inside), along, files)))
    assert "direction alpha" in refused["error"]
    assert "outside the server's" in refused["error"]
    assert call(engine, 0.2, 0.0)["weights"] == "moved", "the slice before stays in force"


def test_the_worker_writes_no_report_elsewhere(engine, tmp_path):
    load(engine)
    state = engine.model.state()
    for request in (LoadRequest(str(tmp_path)), LoadRequest(str(tmp_path), str(POLICY), {"seed": 1})):
        with pytest.raises(access.AccessError, match="not a report directory"):
            engine.init_transfer_engine(request)
    with pytest.raises(access.AccessError, match="not a report directory"):
        engine.receive_weights(MoveRequest(0.5, 0.0, str(tmp_path)))
    assert same(engine.model.state(), state), "nothing moves whose outcome cannot be told"
    assert not list(tmp_path.iterdir())


def test_the_worker_is_not_built_in_development_mode(engine, monkeypatch):
    monkeypatch.setenv(access.DEVELOPMENT_VARIABLE, "1")
    with pytest.raises(access.AccessError, match="VLLM_SERVER_DEV_MODE"):
        LandscapeEngine(engine.config, engine.vllm_config, engine.device, engine.model)


def test_nothing_drifts_over_many_moves(engine):
    load(engine)
    origin = engine.model.state()
    call(engine, 0.07, -0.03)
    once = engine.model.state()
    for step in range(20):
        call(engine, 0.01 * step, -0.02 * step)
    call(engine, 0.07, -0.03)
    assert same(engine.model.state(), once)
    call(engine, 0.0, 0.0)
    assert same(engine.model.state(), origin)


def test_bfloat16_is_cast_once_and_the_realised_step_says_so():
    theta = {"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)}
    slice_ = Slice.build(theta, SliceSpec(0))
    delta, eta = slice_.draw("alpha", "w"), slice_.draw("beta", "w")
    for alpha, beta in ((1e-4, 0.0), (0.05, -0.05)):
        stats = MoveStats()
        ((_, moved),) = slice_.at(alpha, beta, torch.bfloat16, stats)
        exact = theta["w"].double() + alpha * delta.double() + beta * eta.double()
        expected = exact.to(torch.float32).to(torch.bfloat16)
        assert (moved != expected).float().mean() < 1e-3, "double rounding would move many more"
        realised = float((moved.double() - theta["w"].double()).norm() / theta["w"].double().norm())
        assert stats.realised_step == pytest.approx(realised, rel=1e-5)
    stats = MoveStats()
    list(slice_.at(1e-4, 0.0, torch.bfloat16, stats))
    assert abs(stats.realised_step / 1e-4 - 1) > 0.05, "near the origin bfloat16 does not take the nominal step"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_displacement_back_is_the_first_snapshot(tmp_path, dtype):
    noise = torch.Generator().manual_seed(0)
    first = {"w": torch.randn(64, 64, generator=noise).to(dtype), "b": torch.zeros(7, dtype=dtype)}
    theta = {name: (t + 0.03 * torch.randn(t.shape, generator=noise)).to(dtype) for name, t in first.items()}
    file = tmp_path / "direction.safetensors"
    change = {name: (theta[name].double() - first[name].double()).float().numpy() for name in sorted(theta)}
    write_safetensors(file, {name: values.shape for name, values in change.items()}, change.values())
    spec = SliceSpec(0, alpha=DirectionSpec("displacement", "none", sha256=file_sha256(file)))
    slice_ = Slice.build(theta, spec, {"alpha": str(file)})
    stats = MoveStats()
    for name, moved in slice_.at(-1.0, 0.0, dtype, stats):
        tolerance = 0.0 if dtype == torch.bfloat16 else torch.finfo(dtype).eps
        torch.testing.assert_close(moved, first[name], rtol=tolerance, atol=tolerance * 4)
    length = sum(float(np.square(values, dtype=float).sum()) for values in change.values()) ** 0.5
    size = sum(float(tensor.double().square().sum()) for tensor in theta.values()) ** 0.5
    assert stats.realised_step == pytest.approx(length / size, rel=1e-5)
    with pytest.raises(ValueError, match=r"slice\.alpha is not drawn from the seed, and no file came with it"):
        Slice.build(theta, spec)


def test_registering_twice_is_harmless():
    register()
    register()


@pytest.mark.parametrize("directions", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("stored", "served"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]
)
def test_blocks_and_threads_leave_the_bits_of_one_whole_tensor(stored, served, directions):
    noise = torch.Generator().manual_seed(0)
    sizes = {"a": 2**20 + 2**15 + 7, "b": 3}
    theta = {name: torch.randn(size, generator=noise).to(getattr(torch, stored)) for name, size in sizes.items()}
    slice_ = Slice.build(theta, SliceSpec(0), dtype=getattr(torch, directions))
    module = torch.nn.Module()
    for name, size in sizes.items():
        empty = torch.empty(size, dtype=getattr(torch, served))
        module.register_parameter(name, torch.nn.Parameter(empty, requires_grad=False))
    held = slice_.hold(torch.device("cpu")).held or {}
    parts = [Part(module, n, theta[n], *held[n], [(0, sizes[n], 1.0)]) for n in sizes]
    layout = Layout(parts, torch.device("cpu"))
    for alpha, beta in ((0.7, -1.2), (0.0, 1e-3), (0.0, 0.0)):
        stats = MoveStats()
        changed = layout.write(alpha, beta)
        for name, expected in slice_.at(alpha, beta, getattr(torch, served), stats):
            assert torch.equal(module.get_parameter(name), expected)
        assert changed == pytest.approx(stats.changed, rel=1e-5)


def test_a_failed_move_in_kernel_layout_goes_back(engine, monkeypatch):
    load(engine)
    slice_ = engine._state.how
    engine._state.how = Layout(
        [
            Part(
                *(engine.model, engine.model.names[name], theta.view(-1)),
                *(direction.view(-1) for direction in slice_.held[name]),
                shares=[(0, theta.numel(), 1.0)],
            )
            for name, theta in slice_.theta.items()
        ],
        torch.device("cpu"),
    )
    assert call(engine, 0.1, 0.0)["weights"] == "moved"
    before = engine.model.state()
    whole, failures = kernel_layout._move_chunks, [1]

    def half(chunks, alpha, beta):
        if failures:
            whole(itertools.islice(chunks, 3), alpha, beta)
            failures.clear()
            raise RuntimeError("device lost")
        return whole(chunks, alpha, beta)

    monkeypatch.setattr(kernel_layout, "_move_chunks", half)
    outcome = call(engine, -0.1, 0.0)
    assert (outcome["weights"], outcome["error"]) == ("restored", "RuntimeError: device lost")
    assert same(engine.model.state(), before)


POINTS = ((0.0, 0.0), (0.05, -0.1), (-0.3, 0.0), (0.0, 0.0))


def random_qwen2(folder: Path, dtype: str, tied: bool) -> Path:
    """One key-value head (held twice by two ranks), biases that are not zero, a vocabulary that vLLM pads."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    for file in POLICY.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def built(snapshot: Path, dtype: str, rank: int, ranks: int) -> Any:
    """vLLM's own model of a snapshot and its configuration, in this process."""
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    _set_torch_accelerator_to_noop()
    config = VllmConfig(
        model_config=ModelConfig(model=str(snapshot), dtype=getattr(torch, dtype), enforce_eager=True),
        cache_config=CacheConfig(block_size=16),
        device_config=DeviceConfig("cpu"),
        parallel_config=ParallelConfig(tensor_parallel_size=ranks, rank=rank, distributed_executor_backend="mp"),
    )
    with set_current_vllm_config(config):
        return get_model(vllm_config=config), config


@dataclass
class Trip:
    """Along POINTS by one of the paths; `change(model)` alters the model before anything is loaded."""

    snapshot: Path
    dtype: str
    path: str
    change: Callable[[Any], None] | None = None
    memory: str = "auto"
    earlier: bool = False
    """Whether another slice of the snapshot was loaded, and moved along, before."""
    ahead: bool = False
    """Whether the slice was drawn ahead meanwhile."""


def travel(trip: Trip, rank: int, ranks: int) -> dict[str, Any]:
    """What a rank reports and holds on the way."""
    from vllm.config import set_current_vllm_config

    os.environ[MOVE_PATH_VARIABLE] = trip.path
    os.environ[DIRECTIONS_MEMORY_VARIABLE] = trip.memory
    os.environ[ROOTS_VARIABLE] = str(trip.snapshot)
    model, config = built(trip.snapshot, trip.dtype, rank, ranks)
    if trip.change is not None:
        trip.change(model)
    fresh = checksums(model)
    engine = LandscapeEngine(SimpleNamespace(backend="landscape"), config, torch.device("cpu"), model)  # type: ignore
    with set_current_vllm_config(config):
        request = {"snapshot": str(trip.snapshot), "slice": {"seed": 0}}
        if trip.earlier:
            before = request | {"slice": {"seed": 9}}
            reported(lambda place: engine.init_transfer_engine(LoadRequest(place, **before)), rank)
            reported(lambda place: engine.receive_weights(MoveRequest(0.1, -0.3, place)), rank)
        if trip.ahead:
            begin_ahead(engine, SliceSpec(0))
        loaded = reported(lambda place: engine.init_transfer_engine(LoadRequest(place, **request)), rank)
        held, moves, products = [checksums(model)], [], []
        for alpha, beta in POINTS:
            move = functools.partial(MoveRequest, alpha, beta)
            moves.append(reported(lambda place, move=move: engine.receive_weights(move(place)), rank))
            held.append(checksums(model))
            products.append(wrong_products(model))
    return {"fresh": fresh, "loaded": loaded, "held": held, "moves": moves, "products": products}


def wrong_products(model: Any) -> list[str]:
    """Linear layers whose kernel does not multiply with the weight they hold, rows of activations being views."""
    wrong = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not hasattr(module, "cpu_linear") or weight is None:
            continue
        if not weight.numel():
            weight = unpacked(module, weight)
        for rows in (1, 3, 200):
            draw = torch.Generator().manual_seed(rows)
            x = torch.randn(rows, 2 * weight.shape[1], generator=draw).to(weight.dtype)[:, weight.shape[1] :]
            with torch.inference_mode():
                got = module.quant_method.apply(module, x, None).float()
            if not torch.allclose(got, x.float() @ weight.float().T, rtol=2e-2, atol=2e-2):
                wrong.append(f"{name}, {rows} rows")
    return wrong


def run_rank(rank: int, ranks: int, port: int, folder: Path, trips: dict[str, Trip]) -> None:
    """In a process of its own: `trips` one after the other, results as JSON."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    torch.set_num_threads(1)
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        initialize_model_parallel(ranks)
    results = {name: travel(trip, rank, ranks) for name, trip in trips.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"results{rank}.json").write_text(json.dumps(results))


def run_ranks(ranks: int, folder: Path, trips: dict[str, Trip]) -> list[dict[str, Any]]:
    """`run_rank` of each rank."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    processes = [context.Process(target=run_rank, args=(rank, ranks, port, folder, trips)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    return [json.loads((folder / f"results{rank}.json").read_text()) for rank in range(ranks)]


def bend(model: Any) -> None:
    """Make the loader other than linear in one small tensor, without changing a norm."""
    straight = model.load_weights
    name = "model.layers.1.input_layernorm.weight"
    model.load_weights = lambda weights: straight((n, t.abs() if n == name else t) for n, t in weights)


def realised_step(ranks: list[dict[str, Any]], move: int) -> float:
    return math.sqrt(sum(rank["moves"][move]["changed"] for rank in ranks) / ranks[0]["moves"][move]["theta"])


def agree(kernel: list[dict[str, Any]], loader: list[dict[str, Any]]) -> None:
    """Both paths held the same bits all the way, and say the same of their steps."""
    assert {rank["loaded"]["move_path"] for rank in kernel} == {"kernel"}
    assert {rank["loaded"]["move_path"] for rank in loader} == {"loader"}
    for ours, theirs in zip(kernel, loader, strict=True):
        assert ours["held"] == theirs["held"]
        assert ours["fresh"] == ours["held"][0] == ours["held"][1] == ours["held"][4], (
            "loading and (0, 0) change nothing"
        )
        assert ours["held"][1] != ours["held"][2] != ours["held"][3]
        assert not any(ours["products"] + theirs["products"])
    shares = sum(rank["loaded"]["theta_share"] for rank in kernel)
    assert shares == pytest.approx(kernel[0]["loaded"]["theta"], rel=1e-9)
    for move in range(len(POINTS)):
        assert realised_step(kernel, move) == pytest.approx(realised_step(loader, move), rel=1e-5)


def fused_moved(snapshot: Path, dtype: str, rounded: bool) -> dict[str, list[str]]:
    """SHA-256 at each of POINTS of what the kernels of layer 0 must hold, from the directions themselves."""
    theta = load_file(snapshot / "model.safetensors")
    layer = "model.layers.0."
    fused = {
        f"{layer}self_attn.qkv_proj.bias": [f"{layer}self_attn.{part}_proj.bias" for part in "qkv"],
        f"{layer}mlp.gate_up_proj.weight": [f"{layer}mlp.{part}_proj.weight" for part in ("gate", "up")],
        f"{layer}input_layernorm.weight": [f"{layer}input_layernorm.weight"],
    }

    def moved(name: str, alpha: float, beta: float) -> torch.Tensor:
        weight = theta[name].float()
        drawn = [scaled_direction(SliceSpec(0), axis, name, weight.numpy(), 1.0) for axis in AXES]
        delta, eta = ((nearest_bfloat16(values) if rounded else values) for values in drawn)
        total = torch.add(weight, torch.from_numpy(delta), alpha=alpha).add(torch.from_numpy(eta), alpha=beta)
        return total.to(getattr(torch, dtype))

    return {
        target: [_digest(torch.cat([moved(name, *point) for name in names])) for point in POINTS]
        for target, names in fused.items()
    }


def nearest_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to 8 significant bits, ties to even, by integer arithmetic."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).astype(np.uint32).view(np.float32)


def test_kernel_layout_and_loader_leave_the_same_bits(tmp_path):
    """Fused projections with biases, tied and untied heads, a padded vocabulary, bfloat16; and a crooked loader."""
    tied = random_qwen2(tmp_path / "tied", "bfloat16", True)
    untied = random_qwen2(tmp_path / "untied", "float32", False)
    cases = {"tied": (tied, "bfloat16"), "untied": (untied, "float32")}
    trips = {
        f"{name}-{memory}-{path}": Trip(*case, path, memory=memory)
        for name, case in cases.items()
        for memory in ("float32", "half")
        for path in ("kernel", "loader")
    }
    trips |= {f"{name}-regenerated": Trip(*case, "kernel", memory="regenerated") for name, case in cases.items()}
    trips |= {f"bent-{path}": Trip(untied, "float32", path, bend) for path in ("kernel", "loader")}
    trips |= {"later slice": Trip(untied, "float32", "kernel", earlier=True)}
    trips |= {
        f"ahead, {name}": Trip(*case, "kernel", memory="float32", earlier=True, ahead=True)
        for name, case in cases.items()
    }
    (results,) = run_ranks(1, tmp_path, trips)
    for name, (snapshot, dtype) in cases.items():
        for memory, held_as in (("float32", "float32"), ("half", "bfloat16")):
            kernel, loader = (results[f"{name}-{memory}-{path}"] for path in ("kernel", "loader"))
            agree([kernel], [loader])
            for facts in (kernel["loaded"], loader["loaded"]):
                assert facts["directions_memory"] == f"{held_as} on the host"
                assert facts["directions_dtype"] == held_as
                assert f"{DIRECTIONS_MEMORY_VARIABLE} asks for {memory}" in facts["directions_memory_reason"]
            for target, expected in fused_moved(snapshot, dtype, memory == "half").items():
                assert [held[target] for held in kernel["held"][1:]] == expected, f"{name}, {memory}: {target}"
        regenerated, resident = results[f"{name}-regenerated"], results[f"{name}-float32-loader"]
        assert regenerated["held"] == resident["held"] != results[f"{name}-half-loader"]["held"]
        assert [move["changed"] for move in regenerated["moves"]] == [move["changed"] for move in resident["moves"]]
        assert regenerated["loaded"]["directions_memory"] == "regenerated for each move"
        assert (regenerated["loaded"]["directions_dtype"], regenerated["loaded"]["move_path"]) == ("float32", "loader")
    bent, straight = results["bent-kernel"], results["bent-loader"]
    assert bent["loaded"]["move_path"] == "loader"
    assert "its weights differ from the loader's" in bent["loaded"]["move_path_reason"]
    assert bent["held"] == straight["held"], "fallen back, and the trial left no trace"
    assert not any(bent["products"])
    later, alone = results["later slice"], results["untied-float32-kernel"]
    assert later["held"][1:] == alone["held"][1:]
    assert [move["changed"] for move in later["moves"]] == [move["changed"] for move in alone["moves"]]
    assert "trial of an earlier slice" in later["loaded"]["move_path_reason"]
    assert "trial" not in later["loaded"]["seconds_of"]
    assert set(alone["loaded"]["seconds_of"]) == {"read", "draw", "trial"}
    for name in cases:
        ahead, alone = results[f"ahead, {name}"], results[f"{name}-float32-kernel"]
        assert ahead["held"][1:] == alone["held"][1:]
        assert ahead["loaded"]["ahead"]["ready"] == ahead["loaded"]["ahead"]["parts"] > 0


@pytest.mark.slow
def test_two_ranks_share_the_kernel_layout(tmp_path):
    """Shards, a key-value head that both ranks hold, biases and norms that are copies: steps count each weight once."""
    snapshot = random_qwen2(tmp_path / "untied", "float32", False)
    trips = {
        f"{memory}-{path}": Trip(snapshot, "bfloat16", path, memory=memory)
        for memory in ("float32", "half")
        for path in ("kernel", "loader")
    }
    results = run_ranks(
        2, tmp_path, trips | {"regenerated": Trip(snapshot, "bfloat16", "kernel", memory="regenerated")}
    )
    for memory in ("float32", "half"):
        agree([rank[f"{memory}-kernel"] for rank in results], [rank[f"{memory}-loader"] for rank in results])
    assert all(rank["regenerated"]["held"] == rank["float32-loader"]["held"] for rank in results)
