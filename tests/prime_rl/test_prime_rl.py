"""The prime-rl plugin: the loss against loops over floats, the snapshot hook against failing disks, and, where
PRIME_RL_DIR names a checkout, both inside prime-rl's own code on a CPU (see prime_rl_driver.py)."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import objectives_reference as reference
import pytest
from prime_rl_run import bfloat16, free_port

from rlvr_landscape_plugin.errors import ConfigurationError, SnapshotError
from rlvr_landscape_plugin.files import file_sha256
from rlvr_landscape_plugin.objectives import configure
from rlvr_landscape_plugin.prime_rl import snapshots, versions
from rlvr_landscape_plugin.prime_rl.adapter import (
    LossKwargs,
    ObjectiveTable,
    arguments_of,
    build_objective,
    sequence_loss,
)
from rlvr_landscape_plugin.prime_rl.lora import check_adapter
from rlvr_landscape_plugin.snapshot import SHIPPED, open_snapshot
from rlvr_landscape_plugin.snapshot import main as verify

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "train"
VARIANTS = ("grpo_n", "gspo_n", "clip_higher", "random_rewards")
POLICY = SHIPPED["tiny-sorter"]

torch: Any = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed (extra cpu, gpu or train)")

NEEDED = (
    "torch",
    "transformers",
    "verifiers",
    "renderers",
    "vllm",
    "jaxtyping",
    "beartype",
    "wandb",
    "torchdata",
    "orjson",
)


@pytest.fixture(scope="session")
def checkout() -> Path:
    """prime-rl's source; skips with what is missing."""
    given = os.environ.get("PRIME_RL_DIR")
    if not given:
        pytest.skip("PRIME_RL_DIR is not set: give it the path of a prime-rl checkout")
    path = Path(given).resolve()
    assert (path / "src" / "prime_rl").is_dir(), f"PRIME_RL_DIR = {given} is no prime-rl checkout"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing and python_of(path) == sys.executable:
        pytest.skip(f"prime-rl needs {', '.join(missing)}: run scripts/setup_prime_rl.sh {given}")
    return path


def python_of(checkout: Path) -> str:
    """The interpreter that has prime-rl's packages: that of scripts/setup_prime_rl.sh, else this one."""
    own = checkout / ".venv-cpu" / "bin" / "python"
    return str(own) if own.is_file() else sys.executable


def environment(checkout: Path, **more: str) -> dict[str, str]:
    """Of a process that has prime-rl on its path."""
    paths = [checkout / "src", checkout / "packages" / "prime-rl-configs" / "src", ROOT]
    path = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


# The loss


@dataclass
class Inputs:
    """prime-rl's LossInputs, field by field."""

    trainer_logprobs: Any
    inference_logprobs: Any
    ref_logprobs: Any
    advantages: Any
    loss_mask: Any
    loss_weights: Any = None


def random_batch(seed: int, lengths: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    """Float64 feeds of each sequence; what lies outside the mask is junk, as prime-rl's padding may be."""
    rng = np.random.default_rng(seed)
    batch = []
    for length in lengths:
        mask = rng.random(length) < 0.6
        logprobs = -rng.uniform(0.05, 3, length)
        feeds = {
            "logprobs": np.where(mask, logprobs, np.nan),
            "old_logprobs": np.where(mask, logprobs - 0.3 * rng.standard_normal(length), np.inf),
            "advantages": np.full(length, rng.standard_normal()),
            "mask": mask,
        }
        batch.append(feeds)
    batch[1]["advantages"] = np.zeros(lengths[1])
    batch[2]["mask"] = np.zeros(lengths[2], dtype=bool)
    return batch


def inputs_of(feeds: dict[str, np.ndarray], dtype: Any = None, weights: np.ndarray | None = None) -> Inputs:
    tensors = {name: torch.from_numpy(values.copy()) for name, values in feeds.items()}
    dtype = dtype or torch.float64
    return Inputs(
        trainer_logprobs=tensors["logprobs"].to(dtype).requires_grad_(),
        inference_logprobs=tensors["old_logprobs"].to(dtype),
        ref_logprobs=None,
        advantages=tensors["advantages"].to(dtype),
        loss_mask=tensors["mask"],
        loss_weights=None if weights is None else torch.from_numpy(weights).to(dtype),
    )


def padded(batch: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    longest = max(len(feeds["mask"]) for feeds in batch)
    return {
        name: np.stack([np.pad(feeds[name], (0, longest - len(feeds[name]))) for feeds in batch]) for name in batch[0]
    }


TABLES = {
    "grpo": ObjectiveTable(),
    "clip_higher": ObjectiveTable(name="grpo", options={"clip_high": 0.28}),
    "dapo": ObjectiveTable(name="dapo"),
    "grpo_n": ObjectiveTable(name="grpo_n"),
    "gspo": ObjectiveTable(name="gspo", options={"aggregation": "token_mean", "clip_low": 0.05, "clip_high": 0.07}),
    "gspo_n": ObjectiveTable(name="gspo_n", options={"aggregation": "token_mean", "clip_low": 0.05, "clip_high": 0.07}),
}


@needs_torch
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("seed", range(5))
def test_losses_of_sequences_over_the_token_count_are_minus_the_objective(table, seed):
    batch = random_batch(seed, (7, 5, 3, 12, 1, 9))
    objective = build_objective(table)
    inputs = [inputs_of(feeds) for feeds in batch]
    tokens = sum(int(feeds["mask"].sum()) for feeds in batch)
    loss: Any = sum(sequence_loss(objective, item)[0] for item in inputs) / tokens
    loss.backward()
    feeds = padded(batch)
    expected = reference.objective(table.name, dict(objective.options), feeds)
    assert loss.item() == pytest.approx(-expected, rel=1e-12, abs=1e-14)
    slopes, smooth = reference.gradient(table.name, dict(objective.options), feeds)
    for row, item in enumerate(inputs):
        found = item.trainer_logprobs.grad.numpy()
        assert np.isfinite(found).all()
        kept = smooth[row, : len(found)]
        np.testing.assert_allclose(found[kept], -slopes[row, : len(found)][kept], rtol=1e-5, atol=1e-8)


@needs_torch
def test_metrics_are_those_of_the_sampled_tokens():
    feeds = random_batch(3, (40, 5, 3))[0]
    objective = configure("grpo", clip_low=0.1, clip_high=0.1)
    _, metrics = sequence_loss(objective, inputs_of(feeds, torch.float32))
    mask = feeds["mask"]
    log_ratio = (feeds["logprobs"] - feeds["old_logprobs"])[mask]
    ratio, advantage = np.exp(log_ratio), feeds["advantages"][0]
    expected = {
        "clip_fraction": (ratio > 1.1) if advantage > 0 else (ratio < 0.9),
        "importance_ratio": ratio,
        "kl_k1": -log_ratio,
        "kl_k3": ratio - 1 - log_ratio,
    }
    assert metrics.keys() == expected.keys()
    assert 0 < expected["clip_fraction"].mean() < 1
    for name, values in expected.items():
        assert metrics[name].shape == (mask.sum(),)
        assert not metrics[name].requires_grad
        np.testing.assert_allclose(metrics[name].numpy(), values, rtol=2e-5, atol=2e-6)


@needs_torch
def test_loss_weights_scale_token_terms():
    feeds = random_batch(4, (20, 5, 3))[0]
    weights = np.random.default_rng(0).uniform(0, 2, 20)
    objective = configure("grpo")
    weighted = inputs_of(feeds, weights=weights)
    loss, _ = sequence_loss(objective, weighted)
    batch = reference.sequences({name: values[None] for name, values in feeds.items()})
    terms = reference.grpo(batch, dict(objective.options))[0][0]
    assert loss.item() == pytest.approx(-float(np.dot(terms, weights[feeds["mask"]])), rel=1e-12)


@needs_torch
def test_a_sequence_without_sampled_tokens_gives_zero_and_a_gradient():
    feeds = random_batch(0, (4, 5, 3))[2]
    item = inputs_of(feeds, torch.float32)
    loss, metrics = sequence_loss(configure("grpo"), item)
    loss.backward()
    assert loss.item() == 0
    assert not item.trainer_logprobs.grad.any()
    assert all(values.numel() == 0 for values in metrics.values())


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"name": "dr_grpo", "options": {"constant": 128}}, "aggregation = 'constant' needs the number of sequences"),
        ({"name": "gspo"}, "aggregation = 'sequence_mean' needs the number of sequences"),
        ({"name": "grpo_n", "options": {"normaliser": "kept"}}, "normaliser = 'kept'"),
        ({"name": "forking_tokens"}, "entropies are not available to prime-rl's custom loss"),
        ({"name": "kl_cov"}, "statistics of the whole batch"),
        ({"name": "clip_cov"}, "generator is not available to prime-rl's custom loss"),
        ({"name": "grpo", "options": {"kl_coefficient": 0.04}}, "reference_logprobs are not available"),
        ({"name": "grpoo"}, "did you mean 'grpo'"),
        ({"name": "grpo", "options": {"clip_hi": 0.28}}, "did you mean 'clip_high'"),
    ],
)
def test_what_cannot_be_computed_exactly_is_refused(table, reason):
    with pytest.raises(ConfigurationError, match=reason):
        build_objective(ObjectiveTable(**table))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"snapshot": "0-10"}, "did you mean 'snapshots'"),
        ({"objective": {"advantage_scale": "std"}}, "unknown key"),
        ({"snapshots": "10-0"}, "runs backwards"),
    ],
)
def test_kwargs_are_checked(given, reason):
    with pytest.raises(ValueError, match=reason):
        LossKwargs(**given)


def test_none_keeps_no_snapshots():
    assert LossKwargs(snapshots="None").snapshots is None


@pytest.mark.parametrize("program", [["-m", "prime_rl.trainer.rl.train"], ["-X", "utf8", "train.py"], ["/bin/trainer"]])
def test_the_trainers_arguments_are_found_in_its_command(program):
    """prime-rl's W&B monitor puts the launcher's command line into `sys.argv`."""
    given = ["@", "configs/trainer.json", "--max-steps", "3"]
    assert arguments_of(["python", "-u", *program, *given]) == given


def test_the_interpreter_keeps_the_command_that_started_it():
    code = "import sys; from rlvr_landscape_plugin.prime_rl.adapter import arguments_of as a; print(a(sys.orig_argv))"
    done = subprocess.run([sys.executable, "-u", "-c", code, "@", "trainer.json"], capture_output=True, text=True)
    assert done.stdout.strip() == "['@', 'trainer.json']", done.stderr


# The hook, around a broadcast class of this file


class Broadcast:
    def __init__(self) -> None:
        self.sent: list[int] = []

    def broadcast_weights(self, model: Any, step: int) -> str:
        if step == 13:
            raise RuntimeError("the network is gone")
        self.sent.append(step)
        return "sent"


class Log:
    def __init__(self) -> None:
        self.errors: list[str] = []

    def info(self, text: str) -> None:
        pass

    def error(self, text: str) -> None:
        self.errors.append(text)


class Model:
    """Weights that a step changes."""

    all_tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self) -> None:
        self.gathered = 0
        self.weights: dict[str, Any] = {
            "model.embed_tokens.weight": torch.arange(12.0).reshape(4, 3),
            "model.norm.weight": torch.ones(3),
        }

    def gather(self, model: Any) -> dict[str, Any]:
        self.gathered += 1
        copies = {name: value.to(torch.bfloat16) for name, value in self.weights.items()}
        return copies | {"lm_head.weight": copies["model.embed_tokens.weight"].clone()}


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.SimpleNamespace:
    """A hooked broadcast in a process of one rank, with inert modules in prime-rl's place."""
    if torch is None:
        pytest.skip("torch is not installed (extra cpu, gpu or train)")
    import torch.distributed as dist

    log, model = Log(), Model()
    world = types.SimpleNamespace(rank=0, world_size=1, is_master=True)
    modules: dict[str, dict[str, Any]] = {
        "prime_rl": {},
        "prime_rl.trainer": {},
        "prime_rl.trainer.world": {"get_world": lambda: world},
        "prime_rl.utils": {},
        "prime_rl.utils.logger": {"get_logger": lambda: log},
        "prime_rl.utils.weights": {
            "gather_weights_parallel": model.gather,
            "convert_state_dict_to_hf": lambda model, state: state,
        },
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(dist, "all_gather_object", lambda into, item: into.__setitem__(0, item))
    monkeypatch.setenv("PRL_RUN_ID", "run-2")

    class Configuration(types.SimpleNamespace):
        def model_dump(self, mode: str) -> dict[str, Any]:
            return {"max_steps": 3, "env_vars": {"HF_TOKEN": "secret"}, "nested": [{"headers": {"key": "secret"}}]}

    def hooked() -> tuple[Any, snapshots.SnapshotHook]:
        """A new process: fresh class, fresh hook, same directory."""
        cls: Any = type("Hooked", (Broadcast,), {"broadcast_weights": Broadcast.broadcast_weights})
        hook = snapshots.SnapshotHook(
            steps=frozenset({0, 1, 3, 13}),
            root=tmp_path / "snapshots",
            config=Configuration(
                model=types.SimpleNamespace(name=str(POLICY), lora=None),
                tokenizer=types.SimpleNamespace(name=str(POLICY), chat_template=None),
                output_dir=tmp_path,
                resume=None,
            ),
            objective={"name": "grpo", "options": {"clip_low": 0.2}},
            base=POLICY,
        )
        snapshots.wrap(cls, "broadcast_weights", hook)
        return cls(), hook

    broadcast, hook = hooked()
    return types.SimpleNamespace(
        broadcast=broadcast, hook=hook, again=hooked, model=model, log=log, root=tmp_path / "snapshots", run=tmp_path
    )


def names(root: Path) -> list[str]:
    """All that is there, hidden things too."""
    return sorted(path.name for path in root.iterdir())


def test_scheduled_steps_are_kept_and_others_cost_nothing(trainer):
    for step in range(4):
        assert trainer.broadcast.broadcast_weights(trainer.model, step=step) == "sent"
        trainer.model.weights["model.norm.weight"] += 1
    assert trainer.broadcast.sent == [0, 1, 2, 3]
    assert trainer.model.gathered == 3
    assert names(trainer.root) == ["step_000000", "step_000001", "step_000003"]
    snapshot = open_snapshot(trainer.root / "step_000003")
    snapshot.verify()
    assert snapshot.step == 3
    assert snapshot.shapes == {"model.embed_tokens.weight": (4, 3), "model.norm.weight": (3,)}  # the tied copy is not
    assert {info.dtype for info in snapshot.tensors.values()} == {"BF16"}
    from safetensors.torch import load_file

    assert load_file(snapshot.files[0])["model.norm.weight"].tolist() == [4.0, 4.0, 4.0]
    for file in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (snapshot.path / file).read_bytes() == (POLICY / file).read_bytes()


def test_the_manifest_tells_the_run_and_no_secret(trainer):
    (trainer.run / "configs").mkdir()
    written = {"algo": {"type": "grpo"}, "env_vars": {"WANDB_API_KEY": "secret"}}
    (trainer.run / "configs" / "orchestrator.json").write_text(json.dumps(written))
    trainer.broadcast.broadcast_weights(trainer.model, 0)
    manifest = open_snapshot(trainer.root / "step_000000").manifest
    assert manifest is not None
    assert manifest.trainer["name"] == "prime-rl"
    assert manifest.run == "run-2"
    assert manifest.objective == {"name": "grpo", "options": {"clip_low": 0.2}}
    assert manifest.configuration == {
        "trainer": {"max_steps": 3, "nested": [{}]},
        "orchestrator": {"algo": {"type": "grpo"}},
    }
    assert manifest.metrics == {}
    assert "secret" not in (trainer.root / "step_000000" / "manifest.json").read_text()


def test_a_failed_broadcast_is_the_trainers_business(trainer):
    with pytest.raises(RuntimeError, match="the network is gone"):
        trainer.broadcast.broadcast_weights(trainer.model, 13)
    assert trainer.model.gathered == 0


@pytest.mark.parametrize("place", ["shard", "publishing"])
def test_a_full_disk_leaves_training_and_the_next_snapshot_alone(trainer, monkeypatch, place):
    import safetensors.torch

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half(weights: Any, file: Any, metadata: Any = None) -> None:
        Path(file).write_bytes(b"half a shard")
        raise full

    def refuse(source: Any, target: Any) -> None:
        Path(target).write_bytes(b"half")
        raise full

    with monkeypatch.context() as patch:
        if place == "shard":
            patch.setattr(safetensors.torch, "save_file", half)
        else:
            patch.setattr(snapshots.shutil, "copyfile", refuse)
        assert trainer.broadcast.broadcast_weights(trainer.model, 0) == "sent"
    assert names(trainer.root) == ["failures.jsonl"]
    (line,) = [json.loads(text) for text in (trainer.root / "failures.jsonl").read_text().splitlines()]
    assert line["step"] == 0
    assert "No space left on device" in line["error"]
    assert "No snapshot of step 0; training continues" in trainer.log.errors[0]
    trainer.broadcast.broadcast_weights(trainer.model, 1)
    assert names(trainer.root) == ["failures.jsonl", "step_000001"]
    open_snapshot(trainer.root / "step_000001").verify()


def test_a_directory_that_cannot_be_made_is_reported(trainer):
    trainer.root.write_text("a file where the directory should be")
    assert trainer.broadcast.broadcast_weights(trainer.model, 0) == "sent"
    assert trainer.model.gathered == 1  # a master that fails takes part all the same
    assert "No snapshot of step 0" in trainer.log.errors[0]
    assert "could not be written either" in trainer.log.errors[1]


def test_a_resumed_run_keeps_an_equal_snapshot_and_overwrites_none(trainer):
    trainer.broadcast.broadcast_weights(trainer.model, 0)
    before = (trainer.root / "step_000000" / "manifest.json").read_bytes()
    broadcast, _ = trainer.again()
    broadcast.broadcast_weights(trainer.model, 0)
    assert trainer.log.errors == []
    broadcast, _ = trainer.again()
    trainer.model.weights["model.norm.weight"] += 1
    broadcast.broadcast_weights(trainer.model, 0)
    assert "exists with another model.safetensors" in trainer.log.errors[0]
    assert (trainer.root / "step_000000" / "manifest.json").read_bytes() == before
    open_snapshot(trainer.root / "step_000000").verify()


def test_a_step_seen_twice_is_kept_once(trainer):
    trainer.broadcast.broadcast_weights(trainer.model, 0)
    trainer.hook(trainer.model, 0)
    assert trainer.model.gathered == 1


def test_the_parent_is_the_run_that_is_resumed(trainer, monkeypatch):
    trainer.broadcast.broadcast_weights(trainer.model, 0)
    monkeypatch.setenv("PRL_RUN_ID", "run-3")
    broadcast, hook = trainer.again()
    hook.config.resume = types.SimpleNamespace(step=0)
    broadcast.broadcast_weights(trainer.model, 1)
    manifest = open_snapshot(trainer.root / "step_000001").manifest
    assert manifest is not None
    assert (manifest.run, manifest.parent_run) == ("run-3", "run-2")


@pytest.fixture
def prime_rl(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Modules in prime-rl's place with all that the hook uses, which a test changes before it checks."""

    class WeightBroadcast:
        def broadcast_weights(self, model: Any, step: int) -> None: ...

    class CheckpointManager:
        def save(self, step: int, model: Any, optimizers: Any, scheduler: Any, progress: Any) -> None: ...

    class LoRAState:
        def adapter_state_dict(self) -> None: ...

    content: dict[str, dict[str, Any]] = {
        "prime_rl": {},
        "prime_rl.trainer": {},
        "prime_rl.trainer.ckpt": {"CheckpointManager": CheckpointManager},
        "prime_rl.trainer.lora": {"LoRAState": LoRAState, "get_lora_state": lambda: None},
        "prime_rl.trainer.world": {"get_world": lambda: None},
        "prime_rl.transports": {},
        "prime_rl.transports.weights": {"WeightBroadcast": WeightBroadcast},
        "prime_rl.utils": {},
        "prime_rl.utils.logger": {"get_logger": lambda: None},
        "prime_rl.utils.weights": {
            "gather_weights_parallel": lambda model, dtype=None: None,
            "convert_state_dict_to_hf": lambda model, state_dict: None,
        },
    }
    for name, attributes in content.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        if name in {"prime_rl", "prime_rl.trainer", "prime_rl.transports", "prime_rl.utils"}:
            module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        content[name] = vars(module)
    return content


def trainer_config(**more: Any) -> Any:
    """A TrainerConfig as far as the hook reads it."""
    space = types.SimpleNamespace
    keys = {"output_dir": ".", "max_steps": 2, "ckpt": None, "resume": None, **more}
    parts = {"model": space(name="m", lora=None), "weight_broadcast": space(type="nccl")}
    return space(**parts, tokenizer=space(name=None, chat_template=None), **keys)


def test_a_prime_rl_that_has_everything_is_taken(prime_rl, monkeypatch):
    for found, warns in (("0.8.0", False), ("0.8.1.dev67", False), (None, False), ("0.9.0", True), ("1.0.0", True)):
        monkeypatch.setattr(versions, "installed", lambda found=found: found)
        warning = versions.check(trainer_config())
        assert (warning is not None) == warns, found
        assert not warns or f"prime-rl {found} is newer than 0.8" in str(warning)


def test_an_older_prime_rl_is_refused(prime_rl, monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda: "0.7.3")
    with pytest.raises(ConfigurationError, match=r"prime-rl is 0\.7\.3.*kwargs\.snapshots = \"None\""):
        versions.check(trainer_config())


def test_a_prime_rl_that_changed_is_refused_with_what_differs(prime_rl, monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda: "0.9.0")
    weights = prime_rl["prime_rl.utils.weights"]
    changes: list[tuple[dict[str, Any], str, Any, str]] = [
        (weights, "gather_weights_parallel", lambda model, group: None, "requires group, which the snapshot hook does"),
        (
            weights,
            "gather_weights_parallel",
            lambda module: None,
            r"takes \(module\), .* hook expects \(model",
        ),
        (weights, "convert_state_dict_to_hf", None, "convert_state_dict_to_hf"),
        (prime_rl["prime_rl.trainer.ckpt"], "CheckpointManager", object, "CheckpointManager.save is missing"),
    ]
    for place, name, value, reason in changes:
        with monkeypatch.context() as patch:
            if value is None:
                patch.delitem(place, name)
            else:
                patch.setitem(place, name, value)
            with pytest.raises(ConfigurationError, match=reason) as caught:
                versions.check(trainer_config())
            assert "prime-rl 0.9.0 differs from 0.8" in str(caught.value)
            assert "Use prime-rl 0.8, or set" in str(caught.value)
    config = trainer_config()
    del config.tokenizer.chat_template
    with pytest.raises(ConfigurationError, match=r"no trainer\.tokenizer\.chat_template"):
        versions.check(config)
    with pytest.raises(ConfigurationError, match=r"takes \(self, step, model\)"):
        versions.check(trainer_config(), [lambda self, step, model: None])


def test_the_callback_is_used_where_prime_rl_has_it(prime_rl, monkeypatch, tmp_path):
    registered: list[Any] = []
    monkeypatch.setitem(prime_rl["prime_rl.trainer"], "__path__", [])
    for name, attributes in {
        "prime_rl.trainer.rl": {"__path__": []},
        "prime_rl.trainer.rl.callbacks": {"register_policy_callback": registered.append},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    world = types.SimpleNamespace(is_master=True)
    monkeypatch.setitem(prime_rl["prime_rl.trainer.world"], "get_world", lambda: world)
    monkeypatch.delitem(prime_rl["prime_rl.trainer.ckpt"], "CheckpointManager")  # nothing is wrapped, nor missed
    config = trainer_config(output_dir=tmp_path)
    config.model.name = str(POLICY)
    # The last step of an NCCL run without checkpoints, which wrapping would never see.
    hook = snapshots.install(config, LossKwargs(snapshots="0-2"), configure("grpo"))
    assert registered == [hook]


def test_a_base_model_that_is_not_here_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigurationError, match="hf download nobody/nothing"):
        snapshots.base_directory("nobody/nothing")
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        snapshots.base_directory(str(tmp_path))
    assert snapshots.base_directory(str(POLICY)) == POLICY


# The shipped configurations


def composed(variant: str | None) -> dict[str, Any]:
    """`[trainer.loss.kwargs]` as prime-rl merges the files: tables merge, everything else is replaced."""

    def merge(below: Any, above: Any) -> Any:
        if isinstance(below, dict) and isinstance(above, dict):
            return below | {key: merge(below.get(key), value) for key, value in above.items()}
        return above

    data = tomllib.loads((CONFIGS / "alphabet_sort.toml").read_text())
    if variant is not None:
        data = merge(data, tomllib.loads((CONFIGS / "prime_rl" / f"{variant}.toml").read_text()))
    return data


@pytest.mark.parametrize(
    ("variant", "name", "changed"),
    [
        (None, "grpo", {"clip_low": 0.2, "clip_high": 0.2}),
        ("grpo_n", "grpo_n", {"clip_low": 0.2, "clip_high": 0.2, "normaliser": "original"}),
        ("gspo_n", "gspo_n", {"clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "token_mean"}),
        ("clip_higher", "grpo", {"clip_low": 0.2, "clip_high": 0.28}),
        ("random_rewards", "grpo", {"clip_low": 0.2, "clip_high": 0.2}),
    ],
)
def test_shipped_losses_are_what_their_names_say(variant, name, changed):
    kwargs = LossKwargs(**composed(variant)["trainer"]["loss"]["kwargs"])
    objective = build_objective(kwargs.objective)
    assert objective.name == name
    assert {key: objective.options[key] for key in changed} == changed
    assert objective.options["kl_coefficient"] == 0
    assert snapshots.parse_schedule(kwargs.snapshots or "") == (*range(11), *range(20, 151, 10))


# prime-rl itself

RESOLVE = """
import json, sys
from prime_rl.configs.inference import InferenceConfig
from prime_rl.configs.rl import RLConfig
from prime_rl.utils.config import cli, dump_resolved_config
configs = {}
for name, files in json.loads(sys.argv[1]).items():
    kind = InferenceConfig if name == "inference" else RLConfig
    configs[name] = dump_resolved_config(cli(kind, args=[part for file in files for part in ("@", file)]))
    if name == "inference":
        configs["namespace"] = vars(cli(kind, args=["@", *files]).to_namespace())
print(json.dumps(configs))
"""


@pytest.fixture(scope="session")
def resolved(checkout: Path) -> dict[str, Any]:
    """Every shipped configuration through prime-rl's own classes, by name."""
    pytest.importorskip("rlvr_alphabet_sort")
    base = str(CONFIGS / "alphabet_sort.toml")
    files = {name: [base, str(CONFIGS / "prime_rl" / f"{name}.toml")] for name in VARIANTS}
    files |= {"base": [base], "inference": [str(CONFIGS / "prime_rl" / "inference.toml")]}
    command = [python_of(checkout), "-c", RESOLVE, json.dumps(files)]
    done = subprocess.run(command, env=environment(checkout), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.prime_rl
def test_prime_rl_reads_the_published_setting(resolved):
    config = resolved["base"]
    trainer, orchestrator = config["trainer"], config["orchestrator"]
    (train,), (evaluation,) = orchestrator["train"]["source"], orchestrator["eval"]["source"]
    assert trainer["model"]["name"] == orchestrator["model"]["name"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert config["inference"]["vllm"]["model"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert (trainer["optim"]["type"], trainer["optim"]["lr"]) == ("adamw", 6e-6)
    assert (trainer["scheduler"]["type"], trainer["max_steps"]) == ("constant", 150)
    assert (trainer["model"]["seq_len"], orchestrator["seq_len"]) == (4096, 4096)
    assert (orchestrator["batch_size"], orchestrator["group_size"], train["group_size"]) == (512, 16, 16)
    assert (train["algo"]["type"], train["algo"]["length_penalty"]) == ("grpo", None)
    assert orchestrator["train"]["filter_zero_advantages"] is False
    assert (train["sampling"]["temperature"], train["sampling"]["max_completion_tokens"]) == (1.0, 128)
    for source, seed in ((train, 1337420), (evaluation, 2001)):
        taskset = source["env"]["taskset"]
        assert taskset["id"] == "rlvr-alphabet-sort"
        assert (taskset["min_turns"], taskset["max_turns"], taskset["seed"]) == (2, 2, seed)
        assert taskset["task"]["reward_mode"] == "verifier"
    assert (evaluation["interval"], evaluation["num_examples"], evaluation["group_size"]) == (10, 128, 1)
    assert (evaluation["sampling"]["temperature"], evaluation["sampling"]["max_completion_tokens"]) == (0.7, 128)
    assert trainer["output_dir"] == "outputs/alphabet-sort"
    assert trainer["ckpt"] is not None  # a broadcast in memory leaves the last step to the checkpoint
    assert trainer["model"]["lora"] is None


@pytest.mark.prime_rl
def test_prime_rl_composes_the_variants(resolved):
    base = resolved["base"]
    for name in VARIANTS:
        config = resolved[name]
        assert config["run"]["name"] == f"alphabet-sort-{name.replace('_', '-')}"
        kwargs = composed(name)["trainer"]["loss"]["kwargs"]
        assert config["trainer"]["loss"]["kwargs"] == kwargs
        differing = {key for key in base["orchestrator"] if config["orchestrator"][key] != base["orchestrator"][key]}
        assert differing - {"output_dir", "monitors"} == ({"train"} if name == "random_rewards" else set())
    orchestrator = resolved["random_rewards"]["orchestrator"]
    assert orchestrator["train"]["source"][0]["env"]["taskset"]["task"]["reward_mode"] == "random"
    assert orchestrator["eval"]["source"][0]["env"]["taskset"]["task"]["reward_mode"] == "verifier"
    same = json.loads(json.dumps(orchestrator["train"]))
    same["source"][0]["env"]["taskset"]["task"]["reward_mode"] = "verifier"
    assert same == base["orchestrator"]["train"]


@pytest.mark.prime_rl
def test_prime_rls_inference_starts_a_landscape_server(resolved):
    assert resolved["inference"]["router"] is None
    assert resolved["inference"]["env_vars"] == {"VLLM_PLUGINS": "prime_rl,rlvr_landscape"}
    assert resolved["namespace"]["weight_transfer_config"] == {"backend": "landscape"}
    assert (resolved["namespace"]["host"], resolved["namespace"]["port"]) == ("127.0.0.1", 8000)


@dataclass
class Run:
    """What a driven trainer left."""

    root: Path
    codes: list[int]
    output: list[str]

    def truth(self, step: int) -> dict[str, Any]:
        return torch.load(self.root / "truth" / f"{step}.pt", weights_only=True)

    @property
    def records(self) -> Any:
        return np.load(self.root / "records.npz")


def drive(checkout: Path, root: Path, ranks: int = 1, plan: dict[str, Any] | None = None, **config: Any) -> Run:
    """Run prime_rl_driver.py on `ranks` processes for two steps."""
    (root / "truth").mkdir(parents=True, exist_ok=True)
    (root / "rendezvous").unlink(missing_ok=True)
    loss = {
        "type": "custom",
        "import_path": "rlvr_landscape_plugin.prime_rl.loss.policy_loss",
        "kwargs": {"snapshots": "0-2", **config.pop("kwargs", {})},
    }
    written = {"model": {"name": str(POLICY)}, "output_dir": str(root / "run"), "max_steps": 2, "loss": loss, **config}
    (root / "trainer.json").write_text(json.dumps(written))
    orders = {"rendezvous": str(root / "rendezvous"), "truth": str(root / "truth"), "steps": 2}
    orders |= {"records": str(root / "records.npz")} | (plan or {})
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        env = environment(
            checkout, DRIVER=json.dumps(orders), PRL_RUN_ID="run-1", **{k: str(v) for k, v in place.items()}
        )
        command = [
            python_of(checkout),
            str(ROOT / "tests" / "helpers" / "prime_rl_driver.py"),
            "@",
            str(root / "trainer.json"),
        ]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        output = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return Run(root, [process.returncode for process in processes], output)


def check_snapshots(run: Run, steps: tuple[int, ...]) -> None:
    """The snapshots are exactly those of `steps`, whole, and the model's weights in transformers' eyes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = run.root / "run" / "snapshots"
    assert [name for name in names(root) if name != "failures.jsonl"] == [f"step_{step:06d}" for step in steps]
    for step in steps:
        snapshot = open_snapshot(root / f"step_{step:06d}")
        snapshot.verify()
        assert "lm_head.weight" not in snapshot.tensors
        model, report = AutoModelForCausalLM.from_pretrained(snapshot.path, dtype="auto", output_loading_info=True)
        assert not any(report.values()), report
        truth = run.truth(step)
        state = model.state_dict()
        assert state.keys() == truth.keys()
        for name, value in truth.items():
            assert torch.equal(state[name].to(torch.bfloat16), value), (step, name)
        assert AutoTokenizer.from_pretrained(snapshot.path).chat_template is not None
    assert not torch.equal(run.truth(0)["model.norm.weight"], run.truth(2)["model.norm.weight"])


def check_losses(run: Run, name: str, options: dict[str, Any]) -> None:
    """prime-rl's scaled loss is −J of the batch, by loops over floats."""
    records = run.records
    lengths = records["lengths"]
    for step in (1, 2):
        splits = {
            key: np.split(records[f"{step}/{source}"], np.cumsum(lengths)[:-1])
            for key, source in (
                ("logprobs", "logprobs"),
                ("old_logprobs", "old"),
                ("advantages", "advantages"),
                ("mask", "mask"),
            )
        }
        batch = padded([{key: parts[i] for key, parts in splits.items()} for i in range(len(lengths))])
        objective = configure(name, **options)
        expected = reference.objective(name, dict(objective.options), batch)
        assert float(records[f"{step}/loss"]) == pytest.approx(-expected, rel=2e-5)
        assert records[f"{step}/metric/clip_fraction"].shape == (batch["mask"].sum(),)
        ratio = np.exp((batch["logprobs"] - batch["old_logprobs"])[batch["mask"]])
        np.testing.assert_allclose(records[f"{step}/metric/importance_ratio"], ratio, rtol=1e-4)


@pytest.mark.prime_rl
@pytest.mark.parametrize("ranks", [1, 2])
def test_filesystem_broadcast(checkout, tmp_path, ranks):
    run = drive(checkout, tmp_path, ranks)
    assert run.codes == [0] * ranks, "\n".join(run.output)
    check_snapshots(run, (0, 1, 2))
    check_losses(run, "grpo", {})
    snapshot = open_snapshot(tmp_path / "run" / "snapshots" / "step_000001")
    assert len(snapshot.files) == ranks
    assert snapshot.manifest is not None
    assert snapshot.manifest.run == "run-1"
    assert snapshot.manifest.configuration["trainer"]["loss"]["kwargs"] == {"snapshots": "0-2"}
    assert snapshot.manifest.objective["name"] == "grpo"


@pytest.mark.prime_rl
def test_nccl_broadcast_and_the_last_step_by_the_checkpoint(checkout, tmp_path):
    options = {"aggregation": "token_mean"}
    kwargs = {"objective": {"name": "gspo_n", "options": options}}
    run = drive(checkout, tmp_path, weight_broadcast={"type": "nccl"}, ckpt={}, kwargs=kwargs)
    assert run.codes == [0], run.output[0]
    assert int(run.records["sent"]) == 2 * (4 + 1)  # two broadcasts of four layers and the rest, none of the last step
    check_snapshots(run, (0, 1, 2))
    check_losses(run, "gspo_n", options)
    assert (tmp_path / "run" / "checkpoints" / "step_2" / "trainer").is_dir()


@pytest.mark.prime_rl
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_one_rank_hangs_and_ends_nobody(checkout, tmp_path, rank):
    run = drive(checkout, tmp_path, 2, {"full_disk": {"rank": rank, "step": 1}})
    assert run.codes == [0, 0], "\n".join(run.output)
    check_snapshots(run, (0, 2))
    (line,) = (tmp_path / "run" / "snapshots" / "failures.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1
    assert f"rank {rank}: OSError: [Errno 28]" in json.loads(line)["error"]


@pytest.mark.prime_rl
def test_a_second_run_in_the_directory_keeps_what_is_equal(checkout, tmp_path):
    first = drive(checkout, tmp_path)
    second = drive(checkout, tmp_path)
    assert first.codes == second.codes == [0], second.output[0]
    check_snapshots(second, (0, 1, 2))
    assert not (tmp_path / "run" / "snapshots" / "failures.jsonl").exists()


@pytest.mark.prime_rl
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"kwargs": {"objective": {"name": "forking_tokens"}}},
            "entropies are not available to prime-rl's custom loss",
        ),
        ({"kwargs": {"snapshotss": "0"}}, "trainer.loss.kwargs: Value error, unknown key 'snapshotss'"),
        ({"weight_broadcast": {"type": "nccl"}}, "max_steps = 2, which a nccl broadcast leaves out; add [ckpt]"),
        (
            {"model": {"name": str(POLICY), "lora": {"modules_to_save": ["embed_tokens"]}}},
            "trains whole modules beside the adapter",
        ),
    ],
)
def test_mistakes_end_the_trainer_before_its_first_broadcast(checkout, tmp_path, config, reason):
    run = drive(checkout, tmp_path, **config)
    assert run.codes == [1]
    assert reason in run.output[0]
    assert not (tmp_path / "run").exists()


PEFT = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
record = torch.load(out, weights_only=True)
with torch.no_grad():
    bare = model(input_ids=record["ids"]).logits
    model = PeftModel.from_pretrained(model, adapter).eval()
    found = model(input_ids=record["ids"]).logits
    merged = model.merge_and_unload()(input_ids=record["ids"]).logits
difference = lambda logits: (logits - record["logits"]).abs().max().item()
print(json.dumps({"bare": difference(bare), "adapter": difference(found), "merged": difference(merged)}))
"""


def logits_of(snapshot, records) -> np.ndarray:
    """Logits from a snapshot's tensors minus those in `records`, which the trainer left."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(snapshot.model), dtype=torch.float32)
    model.load_state_dict({name: torch.from_numpy(snapshot.read(name)) for name in snapshot.tensors}, strict=False)
    model.tie_weights()
    recorded = torch.load(records)
    with torch.no_grad():
        return (model(recorded["ids"]).logits - recorded["logits"]).numpy()


@pytest.mark.prime_rl
@pytest.mark.parametrize(("ranks", "alpha"), [(1, 8.0), (2, 7.0)])
def test_adapter_snapshots_load_in_peft_and_give_the_trainers_logits(checkout, tmp_path, ranks, alpha):
    """prime-rl's LoRA layers, state and broadcast, after an update; 7 / 6 is no bfloat16 number."""
    if python_of(checkout) == sys.executable:
        pytest.skip("PEFT and prime-rl's LoRA layers are in the environment of scripts/setup_prime_rl.sh")
    rank = 4 if alpha == 8.0 else 6
    lora = {"rank": rank, "alpha": alpha, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    loss = {
        "type": "custom",
        "import_path": "rlvr_landscape_plugin.prime_rl.loss.policy_loss",
        "kwargs": {"snapshots": "0-1"},
    }
    config = {"model": {"name": str(POLICY), "lora": lora}, "output_dir": str(tmp_path / "run"), "max_steps": 1}
    (tmp_path / "trainer.json").write_text(json.dumps(config | {"loss": loss}))
    records = tmp_path / "logits.pt"
    command = [python_of(checkout), "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-port", str(free_port()), str(ROOT / "tests" / "helpers" / "prime_rl_lora_driver.py")]
    env = environment(checkout, PRIME_RL_ON_CPU="1", RECORDS=str(records), PRL_RUN_ID="run-1")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "helpers" / "prime_rl_cpu"), env["PYTHONPATH"]])
    command += ["@", str(tmp_path / "trainer.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    adapters = tmp_path / "run" / "adapters"
    assert names(adapters) == ["step_000000", "step_000001"], done.stdout
    adapter = adapters / "step_000001"
    assert names(adapter) == ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    check_adapter(adapter)
    manifest = json.loads((adapter / "manifest.json").read_text())
    assert (manifest["step"], manifest["run"], manifest["objective"]["name"]) == (1, "run-1", "grpo")
    for file, facts in manifest["files"].items():
        assert file_sha256(adapter / file) == facts["sha256"]
    loaded = subprocess.run(
        [python_of(checkout), "-c", PEFT, str(POLICY), str(adapter), str(records)],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
    )
    assert loaded.returncode == 0, loaded.stderr
    differences = json.loads(loaded.stdout.splitlines()[-1])
    print(differences)
    assert differences["bare"] > 0.05  # the adapter does something
    assert differences["adapter"] < 1e-4
    assert differences["merged"] < 1e-4
    assert verify(["verify", str(tmp_path / "run")]) == 0
    snapshot = open_snapshot(adapter)
    assert snapshot.step == 1
    assert np.abs(logits_of(snapshot, records)).max() < 1e-4
    with pytest.raises(SnapshotError, match=r"does not begin with 'base_model\.model\.', as PEFT's"):
        open_snapshot(tmp_path / "run" / "broadcasts" / "step_1", POLICY)


PROPOSAL = ROOT / "docs" / "upstream" / "prime-rl-snapshot-hook.md"


@pytest.mark.prime_rl
def test_the_proposed_patch_applies_and_the_hook_uses_it(checkout, tmp_path):
    """prime-rl's real trainer loop with the patch of the proposal, on its own fake batches, without a broadcast."""
    if python_of(checkout) == sys.executable:
        pytest.skip("prime-rl's trainer runs in the environment of scripts/setup_prime_rl.sh")
    patched = tmp_path / "prime-rl"
    shutil.copytree(checkout / "src", patched / "src", ignore=shutil.ignore_patterns("__pycache__"))
    diff = PROPOSAL.read_text().split("```diff\n")[1].split("```")[0]
    applied = subprocess.run(["git", "apply", "-"], input=diff, cwd=patched, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr
    loss = {
        "type": "custom",
        "import_path": "rlvr_landscape_plugin.prime_rl.loss.policy_loss",
        "kwargs": {"snapshots": "0-2"},
    }
    config = {
        "model": {"name": str(POLICY), "seq_len": 128, "compile": None, "ac": None, "ac_offloading": None},
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "data": {"fake": {"batch_size": 2}},
        "optim": {"lr": 1e-3},
        "loss": loss,
    }
    (tmp_path / "trainer.json").write_text(json.dumps(config))
    env = environment(checkout, PRIME_RL_ON_CPU="1")
    shims = str(ROOT / "tests" / "helpers" / "prime_rl_cpu")
    env["PYTHONPATH"] = os.pathsep.join([shims, str(patched / "src"), env["PYTHONPATH"]])
    command = [python_of(checkout), "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    command += ["--master-port", str(free_port()), "-m", "prime_rl.trainer.rl.train"]
    command += ["@", str(tmp_path / "trainer.json")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    root = tmp_path / "run" / "snapshots"
    assert names(root) == ["step_000000", "step_000001", "step_000002"], done.stdout
    found = [open_snapshot(root / name) for name in names(root)]
    for snapshot in found:
        snapshot.verify()
    norms = [snapshot.read("model.norm.weight") for snapshot in found]
    assert (norms[0] == bfloat16(open_snapshot(POLICY).read("model.norm.weight"))).all()
    assert not (norms[1] == norms[2]).all()
