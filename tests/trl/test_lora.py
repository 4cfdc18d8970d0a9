"""Training of a LoRA adapter on the laptop: what is trained, what is kept, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import POLICY
from toy_rollouts import rollout, segment

from rlvr_landscape_plugin.config import LoraConfig, TrainConfig
from rlvr_landscape_plugin.episodes import OK
from rlvr_landscape_plugin.errors import ConfigurationError, SnapshotError
from rlvr_landscape_plugin.snapshot import open_snapshot

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None or importlib.util.find_spec("peft") is None,
    reason="TRL or PEFT is not installed (extra train)",
)


def plain():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(POLICY), dtype=torch.float32)


def config_of(tmp_path, **lora) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "output": tmp_path / "run",
            "steps": 2,
            "snapshots": "0-2",
            "state_every": 2,
            "lora": {"rank": 4, "alpha": 8, **lora},
            "env": {"num_tasks": 6, "tasks_per_batch": 2, "rollouts": 4},
            "optimizer": {"name": "adamw", "lr": 1e-2},
            "monitor_rollouts": 3,
        }
    )


@needs_peft
def test_log_probabilities_of_an_adapted_policy_are_those_of_the_snapshot_that_it_saves(tmp_path):
    import torch

    from rlvr_landscape_plugin.trl.logprobs import log_probability
    from rlvr_landscape_plugin.trl.lora import add_adapter

    model = add_adapter(plain(), LoraConfig(rank=4), seed=3)
    ids = torch.arange(40, 104).reshape(4, 16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mask": torch.ones(4, 10, dtype=torch.bool)}
    before, _ = log_probability(plain(), inputs)
    torch.testing.assert_close(log_probability(model, inputs)[0], before, rtol=0, atol=1e-5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                assert "lora_" in name
                weight.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    snapshot, merged = open_snapshot(tmp_path / "a", POLICY), plain()
    merged.load_state_dict({name: torch.from_numpy(snapshot.read(name)) for name in snapshot.tensors}, strict=False)
    merged.tie_weights()
    adapted, _ = log_probability(model, inputs)
    torch.testing.assert_close(adapted, log_probability(merged, inputs)[0], rtol=0, atol=1e-4)
    assert (adapted - before).abs().max() > 0.01
    adapted.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


class Sampler:
    """Stands where the server does: what it was given, and random episodes."""

    def __init__(self) -> None:
        self.held: list = []

    def push(self, save, step: int) -> None:
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))
            self.held.append(open_snapshot(folder, POLICY).read("model.layers.0.self_attn.q_proj.weight"))

    def roll(self, practice, indices, rollouts, stream, progress):
        rng = np.random.default_rng(len(self.held))

        def one():
            ids = [rng.integers(3, 2000, size=rng.integers(1, 6)).tolist() for _ in range(4)]
            return rollout(float(rng.random()), OK, segment(*zip((False, True) * 2, ids, strict=True), first=-7.0))

        return [[one() for _ in range(rollouts)] for _ in indices]


@needs_peft
def test_only_the_adapter_is_trained_and_its_snapshots_are_adapters(tmp_path):
    import torch
    from transformers import AutoTokenizer

    from rlvr_landscape_plugin.trl.run_directory import RunDirectory
    from rlvr_landscape_plugin.trl.trainer import make_trainer

    config = config_of(tmp_path)
    run = RunDirectory(config, open_snapshot("tiny-sorter"))
    hooks = SimpleNamespace(
        metrics=lambda step, record: run.metrics.append({"step": step, **record}),
        evaluate=lambda step: None,
        saved=lambda step, state: run.snapshot(trainer.save_policy, step),
        episode=lambda: None,
        wants_state=lambda step: True,
    )
    model, base, sampler = plain(), plain(), Sampler()
    arguments = (AutoTokenizer.from_pretrained(str(POLICY)), sampler, SimpleNamespace(tasks=range(6)))
    trainer = make_trainer(config, model, base, *arguments, run.states, hooks)
    run.snapshot(trainer.save_policy, 0)
    trainer.train()
    assert sum(group["lr"] > 0 for group in trainer.optimizer.param_groups)

    snapshots = [open_snapshot(run.snapshots / f"step_{step:06d}") for step in range(3)]
    q = "model.layers.0.self_attn.q_proj.weight"
    for snapshot in snapshots:
        snapshot.verify()
        assert snapshot.model == POLICY.resolve()
        assert (
            sum(file.stat().st_size for file in snapshot.path.iterdir())
            < 0.2 * (POLICY / "model.safetensors").stat().st_size
        )
        np.testing.assert_array_equal(
            snapshot.read("model.norm.weight"), open_snapshot(POLICY).read("model.norm.weight")
        )
    np.testing.assert_array_equal(snapshots[0].read(q), open_snapshot(POLICY).read(q))
    assert len({snapshot.sha256 for snapshot in snapshots}) == 3
    np.testing.assert_array_equal(sampler.held[1], snapshots[1].read(q))
    written = json.loads((snapshots[1].path / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["r"], written["lora_alpha"]) == ("tiny-sorter", 4, 8)

    again = make_trainer(config, plain(), base, *arguments, tmp_path / "other", hooks)
    first = next(weight for name, weight in again.model.named_parameters() if "0.self_attn.q_proj.lora_A" in name)
    start = snapshots[0].adapter.pairs[q].a.read()
    torch.testing.assert_close(first.detach(), torch.from_numpy(start), rtol=0, atol=0)


def test_a_run_without_an_adapter_has_the_identity_that_it_had():
    assert "lora" not in TrainConfig().provenance()
    assert TrainConfig(lora=LoraConfig()).provenance()["lora"]["rank"] == 16


@needs_peft
def test_what_cannot_be_trained_is_refused_by_name(tmp_path):
    from toy_run import make_toy_adapters

    from rlvr_landscape_plugin.trl.lora import add_adapter
    from rlvr_landscape_plugin.trl.train import load_policy

    with pytest.raises(ConfigurationError, match=r"lora\.target_modules = \['absent'\]"):
        add_adapter(plain(), LoraConfig(target_modules=["absent"]), 0)
    with pytest.raises(ValueError, match=r"\[reference\] .* cannot be used with \[lora\]"):
        TrainConfig.model_validate(
            {"lora": {}, "reference": {"every": 2}, "objective": {"options": {"kl_coefficient": 0.1}}}
        )
    with pytest.raises(SnapshotError, match="is an adapter; training starts from a whole model"):
        load_policy(open_snapshot(make_toy_adapters(tmp_path, {1: 1.0})[1]))
