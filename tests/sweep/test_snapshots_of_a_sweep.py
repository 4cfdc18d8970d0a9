"""Which snapshots a sweep takes: runs, patterns, adapters; and which of them it refuses before a server starts."""

from __future__ import annotations

import json
import shutil

import pytest
import xarray as xr
from conftest import POLICY
from safetensors.numpy import load_file
from toy_run import make_run, make_toy_adapters

from rlvr_landscape_plugin.snapshot import Manifest, open_snapshot, write_snapshot


def steps_measured(output) -> list[int]:
    found = []
    for file in sorted(output.glob("landscape_*.nc")):
        with xr.open_dataset(file) as data:
            found.append(int(data.attrs["step"]))
    return found


def test_a_run_and_a_pattern_are_all_of_their_snapshots(sweep_here, fake_server, tmp_path):
    make_run(tmp_path / "run" / "snapshots", {0: 0.0, 2: 0.1})
    run, policy = tmp_path / "run", shutil.copytree(POLICY, tmp_path / "final")
    assert sweep_here(fake_server, "--snapshots", str(run))[0] == 0
    assert steps_measured(tmp_path / "out") == [0, 2]
    code, said = sweep_here(fake_server, "--snapshots", str(run / "snapshots" / "step_*"), "--dry-run")
    assert code == 0
    assert f"snapshot    step 2: {run}/snapshots/step_000002" in said
    assert "2 datasets (2 snapshots)" in said
    code, said = sweep_here(fake_server, "--snapshots", str(policy), "--output", str(tmp_path / "other"))
    assert code == 0
    assert steps_measured(tmp_path / "other") == [0]


@pytest.mark.parametrize("reference", ["absent/step_000001", "absent/*", "absent", "lab/policy@main"])
def test_a_dry_run_refuses_what_does_not_exist(sweep_here, fake_server, tmp_path, monkeypatch, reference):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    code, said = sweep_here(fake_server, "--snapshots", reference, "--dry-run")
    assert code == 2
    assert reference in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("<f4", 0x7FC00000), ("<f4", 0xFF800000), ("<f2", 0x7E00), ("<f8", 0x7FF0 << 48), ("bf16", 0x7F80)],
)
def test_weights_that_are_not_finite_are_refused_before_any_server_is_asked(
    sweep_here, fake_server, tmp_path, dtype, bits
):
    policy = tmp_path / "policy"
    shutil.copytree(POLICY, policy)
    kind = "<u2" if dtype == "bf16" else dtype
    values = load_file(policy / "model.safetensors")
    header, data, end = {}, b"", 0
    for name, tensor in values.items():
        stored = (tensor.view("<u4") >> 16).astype("<u2") if dtype == "bf16" else tensor.astype(kind)
        if name == "model.norm.weight":
            stored.view(f"<u{stored.itemsize}")[3] = bits
        data += stored.tobytes()
        code = {"<f4": "F32", "<f2": "F16", "<f8": "F64", "bf16": "BF16"}[dtype]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [end, len(data)]}
        end = len(data)
    text = json.dumps(header).encode()
    (policy / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    code, said = sweep_here(fake_server, "--snapshots", str(policy))
    assert code == 2
    assert "model.safetensors holds NaN or infinity in tensor 'model.norm.weight'" in said
    assert not fake_server.asked


def test_an_adapter_that_is_not_finite_is_refused_before_any_server_is_asked(sweep_here, fake_server, tmp_path):
    make_toy_adapters(tmp_path / "run" / "snapshots", {1: 0.1, 2: float("nan")})
    code, said = sweep_here(fake_server, "--snapshots", str(tmp_path / "run"))
    assert code == 2
    assert "step_000002/adapter_model.safetensors holds NaN or infinity" in said
    assert not fake_server.asked


def copies(folder, *steps: int, learning_rate: float | None = None) -> list[str]:
    """The same policy at several steps; `learning_rate`: what the manifests say of each."""

    def fill(scratch) -> None:
        shutil.copytree(POLICY, scratch, dirs_exist_ok=True)

    metrics = {} if learning_rate is None else {"learning_rate": learning_rate}
    return [str(write_snapshot(folder, Manifest(step=step, metrics=metrics), fill)) for step in steps]


def test_equal_weights_at_two_steps_are_refused_unless_they_are_meant(sweep_here, fake_server, tmp_path):
    """As prime-rl's weights/ of a LoRA run, which hold the base model at every step."""
    given = ["--snapshots", *copies(tmp_path / "weights", 0, 10)]
    code, said = sweep_here(fake_server, *given)
    assert code == 2
    assert "step_000000 (step 0) and" in said
    assert "(step 10) have the same weights" in said
    assert "issue 1707" in said
    assert not fake_server.asked
    assert sweep_here(fake_server, *given, "--allow-equal-snapshots")[0] == 0
    assert steps_measured(tmp_path / "out") == [0, 10]


def test_a_step_whose_learning_rate_was_0_may_equal_the_step_before(sweep_here, fake_server, tmp_path):
    """The first step of a warm-up."""
    assert sweep_here(fake_server, "--snapshots", *copies(tmp_path / "a", 0, 1, learning_rate=0.0))[0] == 0
    for folder, steps, rate in (("b", (0, 1), 1e-5), ("c", (0, 2), 0.0)):
        given = copies(tmp_path / folder, *steps, learning_rate=rate)
        code, said = sweep_here(fake_server, "--snapshots", *given, "--output", str(tmp_path / f"out_{folder}"))
        assert code == 2
        assert "have the same weights" in said


def test_adapters_are_measured_around_base_and_adapter_together(sweep_here, fake_server, tmp_path):
    make_toy_adapters(tmp_path / "run" / "adapters", {0: 0.0, 4: 1.0})
    given = ["--snapshots", str(tmp_path / "run"), "--grid.alpha.points", "3", "--grid.beta.points", "3"]
    code, said = sweep_here(fake_server, *given)
    assert code == 0, said
    assert steps_measured(tmp_path / "out") == [0, 4]
    with xr.open_dataset(tmp_path / "out" / "landscape_step000004_slice0.nc") as data:
        snapshot = open_snapshot(tmp_path / "run" / "adapters" / "step_000004")
        assert data.attrs["snapshot_sha256"] == snapshot.sha256
        change = sum(
            ((snapshot.read(name) - open_snapshot("tiny-sorter").read(name)).astype(float) ** 2).sum()
            for name in snapshot.tensors
        )
        assert float(data.displacement_norm) == pytest.approx(change**0.5, rel=1e-5)


def test_an_adapter_whose_run_kept_no_step_0_started_from_its_base(sweep_here, fake_server, tmp_path):
    path = make_toy_adapters(tmp_path / "run", {4: 1.0})[4]
    code, said = sweep_here(fake_server, "--snapshots", str(path), "--slice.alpha.kind", "displacement")
    assert code == 0, said
    with xr.open_dataset(tmp_path / "out" / "landscape_step000004_slice0.nc") as data:
        assert float(data.displacement_norm) > 0
        sources = json.loads(data.attrs["slice"])["alpha"]["sources"]
    assert sources == {"step 0": open_snapshot("tiny-sorter").sha256, "step 4": open_snapshot(path).sha256}


def test_the_base_of_an_adapter_from_another_machine_can_be_given(sweep_here, fake_server, tmp_path):
    path = make_toy_adapters(tmp_path / "run", {4: 1.0})[4]
    (path / "manifest.json").unlink()
    config = json.loads((path / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/elsewhere/model"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    code, said = sweep_here(fake_server, "--snapshots", str(path))
    assert code == 2
    assert "'/elsewhere/model'" in said
    assert "--base-model" in said
    assert sweep_here(fake_server, "--snapshots", str(path), "--base-model", str(POLICY))[0] == 0
