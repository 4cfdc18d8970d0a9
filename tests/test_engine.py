"""The weight engine without a server: what a failed move leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (extra cpu or gpu)")

import numpy as np
import torch
from conftest import POLICY
from safetensors.torch import load_file

from rlvr_landscape_plugin.directions import DirectionSpec, SliceSpec
from rlvr_landscape_plugin.serving.engine import LandscapeEngine, LoadRequest, MoveRequest, MoveStats, Slice, register
from rlvr_landscape_plugin.snapshot import file_sha256, write_safetensors

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
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(rank=0),
        model_config=SimpleNamespace(model=str(POLICY), dtype=torch.float32, enforce_eager=True),
    )
    model = Model(load_file(POLICY / "model.safetensors"))
    return LandscapeEngine(SimpleNamespace(backend="landscape"), config, torch.device("cpu"), model)  # type: ignore


def call(engine: LandscapeEngine, folder: Path, alpha: float, beta: float) -> dict:
    engine.receive_weights(MoveRequest(alpha, beta, str(folder)))
    return json.loads((folder / "rank0.json").read_text())


def load(engine: LandscapeEngine, folder: Path, snapshot: Path = POLICY) -> dict:
    engine.init_transfer_engine(LoadRequest(str(folder), str(snapshot), {"seed": 0}))
    return json.loads((folder / "rank0.json").read_text())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_failed_move_goes_back(engine, tmp_path):
    load(engine, tmp_path)
    assert call(engine, tmp_path, 0.1, 0.0)["weights"] == "moved"
    before = engine.model.state()
    engine.model.fail_after = [5]
    outcome = call(engine, tmp_path, -0.1, 0.0)
    assert outcome["weights"] == "restored"
    assert "device lost" in outcome["error"]
    assert same(engine.model.state(), before)


def test_a_move_that_cannot_go_back_is_dirty_until_one_succeeds(engine, tmp_path):
    load(engine, tmp_path)
    origin = engine.model.state()
    call(engine, tmp_path, 0.1, 0.0)
    engine.model.fail_after = [5, 3]
    assert call(engine, tmp_path, -0.1, 0.0)["weights"] == "dirty"
    engine.model.fail_after = [2]
    assert call(engine, tmp_path, 0.1, 0.0)["weights"] == "dirty", "nothing whole to go back to"
    assert call(engine, tmp_path, 0.0, 0.0)["weights"] == "moved"
    assert same(engine.model.state(), origin)


def test_the_first_move_has_nothing_to_go_back_to(engine, tmp_path):
    load(engine, tmp_path)
    engine.model.fail_after = [1]
    assert call(engine, tmp_path, 0.1, 0.0)["weights"] == "dirty"


def test_moving_without_a_snapshot_is_an_error(engine, tmp_path):
    outcome = call(engine, tmp_path, 0.1, 0.0)
    assert outcome["weights"] == "unchanged"
    assert "no snapshot" in outcome["error"]


def test_a_refused_snapshot_leaves_the_old_slice_in_force(engine, tmp_path):
    load(engine, tmp_path)
    bad = tmp_path / "bad"
    shutil.copytree(POLICY, bad)
    (bad / "model.safetensors").write_bytes((POLICY / "model.safetensors").read_bytes()[:-8])
    assert "not a whole safetensors file" in load(engine, tmp_path, bad)["error"]
    assert call(engine, tmp_path, 0.1, 0.0)["weights"] == "moved"


def test_nothing_drifts_over_many_moves(engine, tmp_path):
    load(engine, tmp_path)
    origin = engine.model.state()
    call(engine, tmp_path, 0.07, -0.03)
    once = engine.model.state()
    for step in range(20):
        call(engine, tmp_path, 0.01 * step, -0.02 * step)
    call(engine, tmp_path, 0.07, -0.03)
    assert same(engine.model.state(), once)
    call(engine, tmp_path, 0.0, 0.0)
    assert same(engine.model.state(), origin)


def test_bfloat16_is_cast_once_and_the_realised_step_says_so():
    theta = {"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)}
    slice_ = Slice.build(theta, SliceSpec(0), torch.device("cpu"))
    delta, eta = slice_.directions["w"]
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
    slice_ = Slice.build(theta, spec, torch.device("cpu"), {"alpha": str(file)})
    stats = MoveStats()
    for name, moved in slice_.at(-1.0, 0.0, dtype, stats):
        tolerance = 0.0 if dtype == torch.bfloat16 else torch.finfo(dtype).eps
        torch.testing.assert_close(moved, first[name], rtol=tolerance, atol=tolerance * 4)
    length = sum(float(np.square(values, dtype=float).sum()) for values in change.values()) ** 0.5
    size = sum(float(tensor.double().square().sum()) for tensor in theta.values()) ** 0.5
    assert stats.realised_step == pytest.approx(length / size, rel=1e-5)
    with pytest.raises(ValueError, match=r"slice\.alpha is not drawn from the seed, and no file came with it"):
        Slice.build(theta, spec, torch.device("cpu"))


def test_registering_twice_is_harmless():
    register()
    register()
