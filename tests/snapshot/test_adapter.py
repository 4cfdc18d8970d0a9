"""LoRA adapters as snapshots, compared with PEFT's own forward pass and with dense NumPy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlvr_landscape_plugin.errors import SnapshotError
from rlvr_landscape_plugin.snapshot import SHIPPED, Manifest, open_snapshot, write_snapshot
from rlvr_landscape_plugin.snapshot.__main__ import main

POLICY = SHIPPED["tiny-sorter"]


def logits_of_peft_and_ours(base: Path, adapter: Path, options: dict) -> tuple:
    """Logits of `base` with a random adapter, float32: as PEFT computes them, and from the tensors of the snapshot that
    PEFT saved in `adapter`."""
    pytest.importorskip("peft", reason="PEFT is not installed (extra train)")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)

    def load():
        return AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()

    peft = get_peft_model(load(), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    peft.save_pretrained(str(adapter))
    snapshot, ours = open_snapshot(adapter), load()
    state = {name: torch.from_numpy(snapshot.read(name)) for name in snapshot.tensors}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}, "tied"
    ours.tie_weights()
    ids = torch.arange(20, 84).reshape(2, 32)
    with torch.no_grad():
        return peft(ids).logits.numpy(), ours(ids).logits.numpy(), load()(ids).logits.numpy()


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "target_modules": r".*\.[01]\.mlp\.(up|down)_proj"},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "o_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"o_proj": 32},
        },
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "modules_to_save": ["norm", "down_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
    ids=["two modules", "all, rsLoRA", "regular expression", "patterns", "modules_to_save", "some layers"],
)
def test_logits_are_those_of_peft(tmp_path, options):
    peft, ours, base = logits_of_peft_and_ours(POLICY, tmp_path / "checkpoint-7", options)
    assert np.abs(peft - ours).max() < 1e-5
    assert np.abs(peft - base).max() > 1e-2, "the adapter does something"
    assert open_snapshot(tmp_path / "checkpoint-7").step == 7


def test_logits_of_weights_that_are_stored_transposed_are_those_of_peft(tmp_path):
    """GPT-2's layers keep (in, out): `fan_in_fan_out`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=100, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    options = {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    peft, ours, base = logits_of_peft_and_ours(tmp_path / "base", tmp_path / "adapter", options)
    assert np.abs(peft - ours).max() < 1e-5
    assert np.abs(peft - base).max() > 1e-2


RANK, ALPHA = 2, 6.0
TARGETS = {"m.q": (4, 6), "m.v": (3, 6)}
"""Module → (out, in)."""


def make_base(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    draw = np.random.default_rng(0)
    tensors = {f"{module}.weight": draw.normal(size=shape).astype(np.float32) for module, shape in TARGETS.items()}
    save_file(tensors | {"m.norm.weight": np.ones(6, np.float32)}, path / "model.safetensors")
    return path


def make_adapter(path: Path, base: str = "base", seed: int = 1, tensors: dict | None = None, **config) -> Path:
    path.mkdir(parents=True)
    draw, pairs = np.random.default_rng(seed), {}
    for module, (rows, columns) in TARGETS.items():
        pairs[f"base_model.model.{module}.lora_A.weight"] = draw.normal(size=(RANK, columns)).astype(np.float32)
        pairs[f"base_model.model.{module}.lora_B.weight"] = draw.normal(size=(rows, RANK)).astype(np.float32)
    save_file(pairs if tensors is None else tensors, path / "adapter_model.safetensors")
    usual = {"peft_type": "LORA", "base_model_name_or_path": base, "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(usual | {"target_modules": ["q", "v"]} | config))
    return path


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_base(tmp_path / "base")


def test_a_tensor_is_the_base_with_the_scaled_product_also_when_read_in_parts(base, tmp_path):
    snapshot = open_snapshot(make_adapter(tmp_path / "checkpoint-3"))
    weights, pairs = (
        load_file(base / "model.safetensors"),
        load_file(tmp_path / "checkpoint-3/adapter_model.safetensors"),
    )
    a, b = (pairs[f"base_model.model.m.q.lora_{half}.weight"].astype(np.float64) for half in "AB")
    expected = (weights["m.q.weight"].astype(np.float64) + ALPHA / RANK * b @ a).astype(np.float32)
    assert snapshot.read("m.q.weight").dtype == np.float32
    np.testing.assert_array_equal(snapshot.read("m.q.weight"), expected)
    np.testing.assert_array_equal(snapshot.read("m.norm.weight"), weights["m.norm.weight"])
    for first, count in ((0, 24), (5, 1), (4, 9), (11, 13), (0, 0)):
        part = snapshot.tensors["m.q.weight"].read(first, count)
        np.testing.assert_allclose(part, expected.reshape(-1)[first : first + count], rtol=1e-6)
    assert snapshot.model == base
    assert snapshot.shapes == open_snapshot(base).shapes


def test_the_hash_is_that_of_what_is_measured(base, tmp_path):
    def sha(path: Path) -> str:
        return open_snapshot(path).sha256

    first = sha(make_adapter(tmp_path / "a"))
    assert sha(make_adapter(tmp_path / "b")) == first
    assert sha(make_adapter(tmp_path / "c", lora_dropout=0.1, peft_version="0.99")) == first, "nothing else is measured"
    assert sha(make_adapter(tmp_path / "d", seed=2)) != first
    assert sha(make_adapter(tmp_path / "e", lora_alpha=5.0)) != first
    assert sha(make_adapter(tmp_path / "f", use_rslora=True)) != first
    weights = load_file(base / "model.safetensors")
    save_file(weights | {"m.norm.weight": np.zeros(6, np.float32)}, base / "model.safetensors")
    assert sha(tmp_path / "a") != first
    assert first != sha(base) != sha(tmp_path / "a")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora = true makes it more than W"),
        ({"bias": "lora_only"}, 'bias = "lora_only" makes it more'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights = "pissa" makes it more'),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"an_option_of_tomorrow": 2}, "an_option_of_tomorrow = 2 makes it more"),
        ({"peft_type": "VERA"}, "peft_type is 'VERA'; only 'LORA'"),
        ({"lora_alpha": 0}, "lora_alpha is 0, expected a number above 0"),
        ({"r": 3}, r"A of m\.q is \[2, 6\] and B is \[4, 2\], but adapter_config.json says rank 3"),
        ({"fan_in_fan_out": True}, r"'m.q.weight' has shape \[6, 4\], the base model's tensor \[4, 6\]"),
        ({"base_model_name_or_path": ""}, "names no base model; give it with --base-model"),
        ({"base_model_name_or_path": "/gone/model"}, "base model '/gone/model' of .* is not a directory"),
        ({"target_modules": ["q", "v", "norm"]}, None),
    ],
)
def test_what_a_merge_would_miss_is_refused_by_name(base, tmp_path, config, message):
    path = make_adapter(tmp_path / "a", **config)
    if message is None:
        assert open_snapshot(path).base is not None, "a vector has no pair"
        return
    with pytest.raises(SnapshotError, match=message):
        open_snapshot(path)


def test_tensors_that_do_not_belong_are_refused_by_name(base, tmp_path):
    whole = load_file(make_adapter(tmp_path / "whole") / "adapter_model.safetensors")
    names = {half: f"base_model.model.m.q.lora_{half}.weight" for half in "AB"}
    prefix = "base_model.model."
    for number, (change, message) in enumerate(
        [
            ({names["A"]: None}, "has lora_B.weight of m.q, but not its other half"),
            ({names["A"]: None, names["B"]: None}, "names m.q among its target_modules, but adapter_model.safetensors"),
            ({prefix + "m.q.lora_magnitude_vector": np.ones(4)}, "lora_magnitude_vector' is not one of a LoRA pair"),
            ({prefix + "m.norm.weight": np.ones(6)}, "m.norm.weight' is not one of a LoRA pair"),
            ({prefix + "m.e.lora_embedding_A": np.ones((2, 3))}, "lora_embedding_A' is not one of a LoRA pair"),
            ({"m.q.lora_A.weight": np.ones((2, 6))}, "does not begin with 'base_model.model.'"),
            (
                {prefix + f"m.x.lora_{half}.weight": np.ones(shape) for half, shape in (("A", (2, 3)), ("B", (3, 2)))},
                "adapts 'm.x.weight', which its base model does not have",
            ),
            ({names["A"]: np.ones((2, 6), np.int32)}, "is I32"),
        ]
    ):
        tensors = {name: value for name, value in (whole | change).items() if value is not None}
        float32 = {name: value.astype(np.float32) if value.dtype == float else value for name, value in tensors.items()}
        with pytest.raises(SnapshotError, match=message):
            open_snapshot(make_adapter(tmp_path / str(number), tensors=float32))


TINKER = {"auto_mapping": None, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True}
TINKER |= {
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "task_type": "CAUSAL_LM",
}
PRIME_RL = {"task_type": "CAUSAL_LM", "lora_dropout": 0.0, "target_modules": ["m.q", "m.v"], "modules_to_save": None}
VERL = {"task_type": "CAUSAL_LM", "target_modules": ["q", "v"], "peft_version": "0.17.1", "qalora_group_size": 16}


@pytest.mark.parametrize("config", [TINKER, PRIME_RL, VERL], ids=["Tinker", "prime-rl", "verl"])
@pytest.mark.parametrize("name", ["step_000100", "global_step_100/actor/lora_adapter"])
def test_configurations_as_trainers_write_them_are_read(base, tmp_path, config, name):
    snapshot = open_snapshot(make_adapter(tmp_path / name, **config), base)
    assert snapshot.step == 100
    assert set(snapshot.adapter.pairs) == {"m.q.weight", "m.v.weight"}


def test_a_directory_with_a_model_and_an_adapter_is_refused(base, tmp_path):
    path = make_adapter(tmp_path / "both")
    (path / "config.json").write_text("{}")
    save_file({"w": np.ones(2, np.float32)}, path / "model.safetensors")
    with pytest.raises(SnapshotError, match=r"an adapter .* and model\.safetensors: which of them is the policy"):
        open_snapshot(path)


def test_pickled_adapters_are_refused(base, tmp_path):
    path = make_adapter(tmp_path / "a")
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(
        SnapshotError, match=r"no adapter_model\.safetensors \(pickled adapter_model\.bin is not read\)"
    ):
        open_snapshot(path)


def test_the_base_model_is_a_directory_beside_a_shipped_name_or_the_one_that_is_given(base, tmp_path):
    (tmp_path / "run").mkdir()
    make_base(tmp_path / "elsewhere")
    assert open_snapshot(make_adapter(tmp_path / "a", str(base))).model == base
    assert open_snapshot(make_adapter(tmp_path / "run" / "b", "../../base")).model == base
    assert open_snapshot(make_adapter(tmp_path / "c", "/gone"), tmp_path / "elsewhere").model == tmp_path / "elsewhere"
    with pytest.raises(SnapshotError, match="is an adapter itself"):
        open_snapshot(tmp_path / "a", tmp_path / "run" / "b")


def test_the_base_model_may_be_in_the_cache_of_the_hub(base, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "hub" / "models--lab--base", "ab" * 20
    (repository / "snapshots").mkdir(parents=True)
    make_base(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    snapshot = open_snapshot(make_adapter(tmp_path / "a", "lab/base", revision="v1"))
    assert snapshot.model == repository / "snapshots" / commit
    with pytest.raises(SnapshotError, match=r"lab/base@main could not be had .* give its directory with --base-model"):
        open_snapshot(make_adapter(tmp_path / "b", "lab/base"))


def test_verify_reads_every_byte_of_an_adapter(base, tmp_path, capsys):
    def fill(folder: Path) -> None:
        make_adapter(folder / "x")
        for file in list((folder / "x").iterdir()):
            file.rename(folder / file.name)
        (folder / "x").rmdir()

    path = write_snapshot(tmp_path / "adapters", Manifest(step=4, trainer={"name": "prime-rl"}), fill)
    assert main(["verify", str(tmp_path)]) == 0
    assert "verified" in capsys.readouterr().out
    data = bytearray((path / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "adapter_model.safetensors").write_bytes(data)
    assert main(["verify", str(tmp_path)]) == 2
    assert "adapter_model.safetensors is not the file that manifest.json names" in capsys.readouterr().err
    base.rename(tmp_path / "moved")
    assert main(["ls", str(tmp_path)]) == 2
    assert "--base-model" in capsys.readouterr().err
    assert main(["ls", str(tmp_path), "--base-model", str(tmp_path / "moved")]) == 0
