"""Training on one machine: episodes become TRL's batch, metrics mean what they say, and a killed run continues."""

from __future__ import annotations

import copy
import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_rollouts import TWO_TURNS, Sampler, rollout, segment

from rlvr_landscape_plugin.config import TrainConfig, load_config, train_report
from rlvr_landscape_plugin.episodes import ERROR, OK, TRUNCATED, Rollout
from rlvr_landscape_plugin.errors import ConfigurationError, SnapshotError, StoreError, TasksetError
from rlvr_landscape_plugin.files import writing
from rlvr_landscape_plugin.snapshot import open_snapshot
from rlvr_landscape_plugin.trl.__main__ import main
from rlvr_landscape_plugin.trl.batch import batch_metrics, evaluation_metrics, pass_at_k, to_batch
from rlvr_landscape_plugin.trl.run_directory import Lines, RunDirectory, alone
from rlvr_landscape_plugin.trl.server import Practice
from rlvr_landscape_plugin.trl.states import check_state, complete, complete_states, keep_last, remove_incomplete

ROOT = Path(__file__).parents[2]
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed (extra train)")


def test_an_episode_becomes_a_prompt_and_one_completion_with_the_environment_masked():
    batch = to_batch([[rollout(0.5), rollout(1.0, TRUNCATED, segment((False, [7]), (True, [8, 9])))]], filler=0)
    assert batch.prompt_ids == [[1, 2, 3], [7]]
    assert batch.completion_ids == [[10, 11, 4, 5, 12], [8, 9]]
    assert batch.env_mask == [[1, 1, 0, 0, 1], [1, 1]]
    assert batch.logprobs == [[-0.25, -1.25, 0.0, 0.0, -2.25], [-0.25, -1.25]]
    assert batch.rewards.tolist() == [[0.5, 1.0]]


def test_groups_stay_side_by_side():
    batch = to_batch([[rollout(task + r / 10) for r in range(3)] for task in range(2)], filler=0)
    assert batch.rewards.tolist() == [[0.0, 0.1, 0.2], [1.0, 1.1, 1.2]]
    assert len(batch.prompt_ids) == len(batch.env_mask) == 6


def test_a_failed_episode_keeps_its_row_and_trains_nothing():
    silent = Rollout(float("nan"), ERROR, [], "no connection")
    batch = to_batch([[silent, rollout(float("nan"), ERROR)]], filler=99)
    assert (batch.prompt_ids[0], batch.completion_ids[0], batch.env_mask[0]) == ([99], [99], [0])
    assert batch.env_mask[1] == [0] * 5
    assert np.isnan(batch.rewards).all()


def test_branches_do_not_fit_one_completion():
    with pytest.raises(TasksetError, match="branched into 2 token sequences"):
        to_batch([[rollout(0.5, OK, TWO_TURNS, TWO_TURNS)]], filler=0)


def test_metrics_of_a_batch():
    cells = [
        [rollout(0.0), rollout(1.0)],
        [rollout(0.5), rollout(0.5, TRUNCATED)],
        [rollout(float("nan"), ERROR), rollout(0.5)],
    ]
    metrics = batch_metrics(cells)
    assert metrics["reward"] == pytest.approx(0.5)
    assert metrics["reward_std"] == pytest.approx(np.std([0, 1, 0.5, 0.5, 0.5]))
    assert metrics["signal"] == pytest.approx(1 / 3)
    assert metrics["response_tokens"] == 3
    assert metrics["truncated"] == metrics["failed"] == pytest.approx(1 / 6)
    with pytest.raises(TasksetError, match="every one of 2 episodes failed: it broke"):
        batch_metrics([[rollout(float("nan"), ERROR)] * 2])


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_mean_over_all_choices_of_k(row, data):
    from itertools import combinations

    k = data.draw(st.integers(1, len(row)))
    expected = np.mean([any(chosen) for chosen in combinations(row, k)])
    assert pass_at_k(np.array([row]), k) == pytest.approx([expected])


def test_pass_at_k_needs_k_rollouts():
    with pytest.raises(ValueError, match="pass@3 cannot be estimated from 2"):
        pass_at_k(np.ones((1, 2), bool), 3)


def test_the_held_out_look_is_paired_with_step_0():
    start = evaluation_metrics([[rollout(0.0), rollout(0.2)], [rollout(0.5), rollout(0.7)]], 0.99, None)
    assert start["task_rewards"] == pytest.approx([0.1, 0.6])
    assert "gain" not in start
    later = evaluation_metrics(
        [[rollout(0.2), rollout(0.4)], [rollout(1.0), rollout(0.6)]], 0.99, start["task_rewards"]
    )
    assert later["reward"] == pytest.approx(0.55)
    assert later["gain"] == pytest.approx(0.2)
    assert later["gain_se"] == pytest.approx(0.0, abs=1e-12)
    assert later["reward_se"] == pytest.approx(np.std([0.3, 0.8], ddof=1) / np.sqrt(2))
    assert (later["pass_1"], later["pass_2"]) == (0.25, 0.5)
    assert later["entropy"] == pytest.approx(1.25)
    failed = evaluation_metrics([[rollout(float("nan"), ERROR)] * 2, [rollout(1.0)] * 2], 0.99, [0.1, 0.6])
    assert failed["task_rewards"] == [None, 1.0]
    assert failed["gain"] == pytest.approx(0.4)
    assert failed["failed"] == 0.5


def test_lines_survive_a_kill_and_can_be_taken_back(tmp_path):
    lines = Lines(tmp_path / "metrics.jsonl")
    assert lines.read() == []
    for step in (1, 2, 3):
        lines.append({"step": step, "reward": step / 10})
    with lines.path.open("a") as sink:
        sink.write('{"step": 4, "rew')
    assert [line["step"] for line in lines.read()] == [1, 2, 3]
    lines.keep_until(2)
    assert lines.path.read_text().count("\n") == 2
    assert lines.at(2) == {"step": 2, "reward": 0.2}
    assert lines.at(3) is None


def test_a_directory_belongs_to_one_configuration(tmp_path):
    base = open_snapshot("tiny-sorter")
    config = TrainConfig(output=tmp_path / "run")
    first = RunDirectory(config, base)
    assert RunDirectory(config, base).identity == first.identity
    assert RunDirectory(config.model_copy(update={"steps": 500, "threads": 1}), base).identity == first.identity
    decaying = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"decay": "linear"})})
    decaying = decaying.model_copy(update={"output": tmp_path / "decaying"})
    RunDirectory(decaying, base)
    with pytest.raises(StoreError, match="steps was 100, is 500"):
        RunDirectory(decaying.model_copy(update={"steps": 500}), base)
    with pytest.raises(StoreError, match="seed was 0, is 1"):
        RunDirectory(config.model_copy(update={"seed": 1}), base)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(StoreError, match="is not empty and no run"):
        RunDirectory(TrainConfig(output=tmp_path / "other"), base)
    file = tmp_path / "run" / "run.json"
    file.write_text(file.read_text().replace(first.identity["id"], "0" * 32))
    with pytest.raises(StoreError, match=r"run\.json is damaged \(its content is not what its checksum says\)"):
        RunDirectory(config, base)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(StoreError, match=r"run\.json is damaged"):
        RunDirectory(config, base)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuse(*args: object, **options: object) -> None:
    raise FULL


def test_a_full_disk_at_the_start_is_named_and_the_same_command_begins_when_there_is_room(tmp_path, monkeypatch):
    config, base = TrainConfig(output=tmp_path / "run"), open_snapshot("tiny-sorter")
    with monkeypatch.context() as patch:
        for function in ("link", "rename"):
            patch.setattr(os, function, refuse)
        with pytest.raises(StoreError, match=r"run\.json: the disk is full .*nothing was begun, .* when there is room"):
            RunDirectory(config, base)
    # What a kill during that write leaves, by this version and by earlier ones.
    for name in (".run.json.4711.tmp", ".run.json.4711.0a1b2c3d.tmp"):
        (tmp_path / "run" / name).write_text('{"id"')
    assert RunDirectory(config, base).identity["policy_sha256"] == base.sha256


@pytest.mark.parametrize("what", ["metrics", "snapshot", "state", "lock", "rewind"])
def test_a_full_disk_during_training_says_what_is_kept(tmp_path, monkeypatch, what):
    base = open_snapshot("tiny-sorter")
    run = RunDirectory(TrainConfig(output=tmp_path / "run"), base)
    run.metrics.append({"step": 1, "reward": 0.5})
    state = run.states / "checkpoint-1"
    state.mkdir(parents=True)
    (state / "model.safetensors").write_bytes(b"x")

    def copy_weights(folder: Path) -> None:
        shutil.copyfile(base.path / "model.safetensors", folder / "model.safetensors")

    actions = {
        "metrics": lambda: run.metrics.append({"step": 2, "reward": 0.6}),
        "snapshot": lambda: run.snapshot(copy_weights, 0),
        "state": lambda: complete(state),
        "lock": lambda: alone(run.root).__enter__(),
        "rewind": lambda: run.rewind(0),
    }
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        if what == "lock":
            patch.setattr(Path, "open", refuse)
        with pytest.raises(
            StoreError, match=r"cannot write .*the disk is full .*run the same command again when there"
        ):
            actions[what]()
    assert complete_states(run.states) == []
    assert not (run.root / "snapshots" / "step_000000").exists()
    assert not list(run.root.glob("**/.*.tmp"))
    run.rewind(0)
    assert not state.exists()
    assert run.metrics.read() == []
    assert run.snapshot(copy_weights, 0) == run.root / "snapshots" / "step_000000"


@needs_trl
def test_a_full_disk_under_the_trainers_own_files_is_named_too(tmp_path, monkeypatch):
    import torch

    from rlvr_landscape_plugin.trl.states import STATES_ARE_SAFE

    for error in (
        RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file data/0"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        FULL,
    ):
        with pytest.raises(StoreError, match=f"checkpoint-3: .*; {STATES_ARE_SAFE}, run the same command again"):
            with writing(tmp_path / "checkpoint-3", STATES_ARE_SAFE):
                raise error
    with pytest.raises(torch.OutOfMemoryError), writing(tmp_path / "checkpoint-3", STATES_ARE_SAFE):
        raise torch.OutOfMemoryError("no memory")


def test_an_output_that_is_a_file_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    base = open_snapshot("tiny-sorter")
    with pytest.raises(StoreError, match=r"file is a file; output must be a directory"):
        RunDirectory(TrainConfig(output=tmp_path / "file"), base)
    with pytest.raises(StoreError, match=r"cannot write .*file/run/run\.json: .*Not a directory"):
        RunDirectory(TrainConfig(output=tmp_path / "file" / "run"), base)


def test_states_are_whole_with_their_marker_and_the_last_two_stay(tmp_path):
    for step in (5, 10, 15, 20):
        (tmp_path / f"checkpoint-{step}" / "sub").mkdir(parents=True)
        (tmp_path / f"checkpoint-{step}" / "sub" / "weights").write_bytes(b"x")
        if step < 20:
            complete(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    assert [step for step, _ in complete_states(tmp_path)] == [5, 10, 15]
    keep_last(tmp_path)
    assert [step for step, _ in complete_states(tmp_path)] == [10, 15]
    remove_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-15"]


def test_a_damaged_state_is_named_before_anything_is_trained_on_it(tmp_path):
    state = tmp_path / "checkpoint-5"
    (state / "sub").mkdir(parents=True)
    weights = state / "sub" / "weights"
    weights.write_bytes(b"weights")
    complete(state)
    check_state(state)
    weights.write_bytes(b"weighty")
    with pytest.raises(StoreError, match=r"sub/weights is damaged: its checksum .* COMPLETE; .*remove .*checkpoint-5"):
        check_state(state)
    weights.unlink()
    with pytest.raises(StoreError, match=r"COMPLETE is damaged, or a file that it names: .*sub/weights"):
        check_state(state)
    for content in ("no JSON", "[1]", '{"a": 1}'):
        (state / "COMPLETE").write_text(content)
        with pytest.raises(StoreError, match="COMPLETE is damaged"):
            check_state(state)
    (state / "COMPLETE").write_text("")  # of a version that kept no checksums
    check_state(state)


@needs_trl
def test_a_policy_that_is_not_whole_is_refused_instead_of_drawn_at_random(tmp_path):
    from safetensors.numpy import load_file, save_file

    from rlvr_landscape_plugin.trl.train import load_policy

    shutil.copytree(open_snapshot("tiny-sorter").path, tmp_path / "policy")
    tensors = load_file(tmp_path / "policy" / "model.safetensors")
    lost = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "policy" / "model.safetensors")
    with pytest.raises(SnapshotError, match=r"tensor 'model\.norm\.weight' is missing"):
        load_policy(open_snapshot(tmp_path / "policy"))
    save_file(tensors | {"model.norm.weight": lost * float("nan")}, tmp_path / "policy" / "model.safetensors")
    with pytest.raises(SnapshotError, match=r"NaN or infinity in tensor 'model\.norm\.weight'"):
        load_policy(open_snapshot(tmp_path / "policy"))
    save_file(tensors | {"model.norm.weight": lost}, tmp_path / "policy" / "model.safetensors")
    assert load_policy(open_snapshot(tmp_path / "policy")).dtype.itemsize == 4
    (tmp_path / "policy" / "config.json").write_text("{}")
    with pytest.raises(SnapshotError, match=r"transformers cannot make a model from .*config\.json: "):
        load_policy(open_snapshot(tmp_path / "policy"))


@pytest.fixture
def quiz(monkeypatch) -> None:
    """A taskset without options that make other tasks (`tiny_quiz`), importable."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "helpers" / "tasksets"))


def test_a_taskset_without_other_streams_is_evaluated_on_later_tasks(quiz):
    config = TrainConfig.model_validate(
        {
            "env": {"id": "tiny-quiz", "taskset": {"count": 10}, "num_tasks": 6, "tasks_per_batch": 2},
            "evaluation": {"taskset": {}, "num_tasks": 4},
        }
    )
    prompts = [[task.data.prompt for task in make(config).tasks] for make in (Practice.practised, Practice.held_out)]
    assert prompts == [[f"Say {i}" for i in range(6)], [f"Say {i}" for i in range(6, 10)]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taskset": {}, "num_tasks": 5}, r"has 10 tasks, 11 .* lower evaluation\.num_tasks, or env\.num_tasks = 6"),
        ({"num_tasks": 4}, r"evaluation\.taskset = \{'seed': 2001\}.*seed.*evaluation\.taskset = \{\} evaluates on"),
    ],
)
def test_held_out_tasks_that_do_not_exist_are_named(quiz, changes, message):
    env = {"id": "tiny-quiz", "taskset": {"count": 10}, "num_tasks": 6, "tasks_per_batch": 2}
    config = TrainConfig.model_validate({"env": env, "evaluation": changes})
    with pytest.raises(TasksetError, match=message):
        Practice.held_out(config)


def test_tasks_that_need_a_runtime_are_practised_where_it_is_allowed(quiz):
    env = {"id": "runtime-quiz", "num_tasks": 1, "tasks_per_batch": 1}
    evaluation = {"taskset": {}, "num_tasks": 2}
    refused = TrainConfig.model_validate({"env": env, "evaluation": evaluation})
    with pytest.raises(TasksetError, match=r"correct\(\) needs a runtime, .* env.runtime = 'subprocess' runs that"):
        Practice.practised(refused)
    config = TrainConfig.model_validate({"env": env | {"runtime": "subprocess"}, "evaluation": evaluation})
    for make, count in ((Practice.practised, 1), (Practice.held_out, 2)):
        practice = make(config)
        assert (len(practice.tasks), practice.runtime) == (count, True)
    assert "runtime" not in refused.provenance()["env"]
    assert config.provenance()["env"]["runtime"] == "subprocess"


def test_too_few_tasks_to_practise_name_their_option(quiz):
    env = {"id": "tiny-quiz", "taskset": {"count": 10}, "num_tasks": 60}
    config = TrainConfig.model_validate({"env": env, "evaluation": {"taskset": {"count": 4}}})
    with pytest.raises(TasksetError, match=r"has 10 tasks, 60 were asked for; lower env\.num_tasks"):
        Practice.practised(config)


def test_one_process_trains_in_a_directory(tmp_path):
    with alone(tmp_path), pytest.raises(StoreError, match="another process is training"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--snapshots", "5-1"], "runs backwards"),
        (["--snapshots", "1-10"], "leaves out step 0"),
        (["--sampling.temperature", "0.7"], "must be 1 in training"),
        (["--server.urls", '["http://127.0.0.1:1"]'], "server of its own"),
        (["--optimizer.updates-per-batch", "3"], "not divisible"),
        (["--optimizer.updates-per-batch", "2"], "1 does not"),
        (["--env.num-tasks", "8"], "raise num_tasks"),
        (["--objective.name", "gppo"], "did you mean"),
        (["--objective.options", '{"clip_hihg": 0.3}'], "clip_high"),
        (["--evaluation.taskset", "{}", "--evaluation.first-task", "9"], "tasks would be the practised ones"),
        (["--optimiser.lr", "1"], "unknown key 'optimiser'; did you mean 'optimizer'"),
    ],
)
def test_mistakes_in_the_configuration_are_named(argv, message, capsys):
    with pytest.raises(ConfigurationError, match=message):
        load_config(argv, TrainConfig)
    assert main(argv) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_shipped_configuration_parses_before_anything_heavy_loads():
    config = load_config(["@", str(ROOT / "configs/train/laptop.toml")], TrainConfig)
    assert "snapshots" in train_report(config)
    code = (
        "import sys\nfrom rlvr_landscape_plugin.trl.__main__ import main\n"
        "assert main(['@', sys.argv[1], '--dry-run']) == 0\n"
        "print({'torch', 'trl', 'transformers', 'vllm', 'verifiers'} & set(sys.modules))"
    )
    path = str(ROOT / "configs/train/laptop.toml")
    out = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "set()"


@needs_trl
@pytest.mark.parametrize("recompute", [False, True])
def test_log_probabilities_equal_a_plain_forward_pass(recompute, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM

    from rlvr_landscape_plugin.trl import logprobs as scoring

    model = AutoModelForCausalLM.from_pretrained(str(open_snapshot("tiny-sorter").path), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    rows, prompt, width = scoring.ROWS + 3, 5, 7
    ids = torch.randint(0, 2000, (rows, prompt + width), generator=generator)
    columns = torch.arange(prompt + width)
    left, right = (torch.randint(0, most, (rows, 1), generator=generator) for most in (prompt, width))
    # One row is longer than all others, so that the others are scored without its columns.
    left[1:], right[0], right[1:] = left[1:].clamp(min=2), 0, right[1:].clamp(min=1)
    attention = ((columns >= left) & (columns < prompt + width - right)).long()
    mask = (torch.rand((rows, width), generator=generator) < 0.5) & attention[:, prompt:].bool()
    mask[1] = False
    inputs = {"input_ids": ids, "attention_mask": attention, "mask": mask}
    passes, score = [], scoring._score
    monkeypatch.setattr(scoring, "_score", lambda *given: passes.append(len(given[1])) or score(*given))
    logprobs, entropies = scoring.log_probability(model, inputs, recompute=recompute)
    parts = [scoring.RECOMPUTED_ROWS] * 4 + [3] if recompute else [scoring.ROWS, 3]
    assert passes == parts
    whole = torch.log_softmax(model(input_ids=ids, attention_mask=attention).logits[:, prompt - 1 : -1], dim=-1)
    expected = whole.gather(2, ids[:, prompt:, None])[..., 0]
    torch.testing.assert_close(logprobs, torch.where(mask, expected, 0.0))
    torch.testing.assert_close(entropies, torch.where(mask, -(whole.exp() * whole).sum(-1), 0.0))
    torch.where(mask, logprobs, 0.0).sum().backward()
    assert sorted(passes) == sorted(parts * (2 if recompute else 1))
    gradient = model.get_output_embeddings().weight.grad.clone()
    model.zero_grad()
    (torch.where(mask, expected, 0.0)).sum().backward()
    torch.testing.assert_close(gradient, model.get_output_embeddings().weight.grad, rtol=1e-4, atol=1e-5)
    assert not entropies.requires_grad


@needs_trl
@pytest.mark.parametrize("family", ["qwen2", "llama", "mamba"])
def test_rows_that_share_a_prompt_get_the_values_and_gradients_of_rows_alone(family):
    """In float64, against a forward pass of every row by itself without padding."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlvr_landscape_plugin.trl.logprobs import log_probability

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, **({"state_size": 4} if family == "mamba" else heads))
    model = AutoModelForCausalLM.from_config(config).double().train()
    generator = torch.Generator().manual_seed(1)

    def draw(length):
        return torch.randint(0, 50, (length,), generator=generator).tolist()

    # Mamba's state is no cache of keys and values, and knows no padding on the left.
    prompts = [draw(n) for n in ((4, 4, 4) if family == "mamba" else (4, 7, 1))]
    rows = [
        (prompts[which], draw(length)) for which, length in [(0, 3), (1, 5), (0, 1), (2, 4), (1, 2), (0, 6), (1, 3)]
    ]
    before, after = max(len(asked) for asked, _ in rows), max(len(said) for _, said in rows)
    ids = torch.tensor([[9] * (before - len(p)) + p + c + [9] * (after - len(c)) for p, c in rows])
    attention = torch.tensor(
        [[0] * (before - len(p)) + [1] * (len(p) + len(c)) + [0] * (after - len(c)) for p, c in rows]
    )
    mask = attention[:, before:].bool() & (torch.rand((len(rows), after), generator=generator) < 0.8)

    logprobs, _ = log_probability(model, {"input_ids": ids, "attention_mask": attention, "mask": mask})
    weight = torch.rand(logprobs.shape, generator=generator).double()
    (logprobs * weight).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = torch.zeros_like(logprobs)
    for row, (asked, said) in enumerate(rows):
        whole = torch.log_softmax(model(torch.tensor([asked + said])).logits[0, len(asked) - 1 : -1], dim=-1)
        alone[row, : len(said)] = whole[torch.arange(len(said)), said]
    alone = torch.where(mask, alone, 0.0)
    (alone * weight).sum().backward()
    torch.testing.assert_close(logprobs, alone, rtol=0, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-6)


@needs_trl
def test_kl_is_zero_for_the_same_policy_and_counts_sequences_with_tokens_only():
    import torch

    from rlvr_landscape_plugin.trl.logprobs import mean_kl

    mask = torch.tensor([[True, True], [False, False], [True, False]])
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]])
    assert mean_kl(logps, logps, mask) == 0.0
    others = logps + 0.5
    assert mean_kl(logps, others, mask) == pytest.approx((np.exp(0.5) - 1.5) * 3 / 2)


@needs_trl
def test_the_pair_of_optimizers_is_one_to_a_scheduler_and_to_a_checkpoint():
    import torch

    from rlvr_landscape_plugin.config import OptimizerConfig
    from rlvr_landscape_plugin.trl.optimizer import make_optimizer

    def start():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        optimizer = make_optimizer(model, OptimizerConfig(warmup_steps=2))
        return model, optimizer

    def step(model, optimizer):
        model(torch.ones(3, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = start()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 0.0 if done else 1.0)
    step(model, optimizer)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    other_model, other = start()
    other_model.load_state_dict(saved)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in ((model, optimizer), (other_model, other)):
        step(*pair)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, other_model.state_dict()[name], rtol=0, atol=0)
        assert not torch.equal(value, saved[name])
    scheduler.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@needs_trl
@pytest.mark.parametrize(
    ("updates", "objective"),
    [
        (1, {"name": "grpo"}),
        (2, {"name": "grpo_n"}),
        (2, {"name": "clip_cov", "options": {"kl_coefficient": 0.1}}),
        (1, {"name": "forking_tokens"}),
    ],
)
def test_steps_take_their_share_of_each_batch_whatever_the_objective(tmp_path, updates, objective):
    from types import SimpleNamespace

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlvr_landscape_plugin.trl.trainer import make_trainer

    config = TrainConfig.model_validate(
        {
            "steps": 4,
            "snapshots": "0",
            "state_every": 2,
            "env": {"num_tasks": 6, "tasks_per_batch": 2, "rollouts": 4},
            "objective": objective,
            "optimizer": {
                "updates_per_batch": updates,
                "name": "adamw",
                "lr": 1e-5,
                "decay": "linear",
            },
            "monitor_rollouts": 3,
        }
    )
    path = str(open_snapshot("tiny-sorter").path)
    model, base = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
    sampler, lines, episodes, saved = Sampler(), [], [], []
    hooks = SimpleNamespace(
        metrics=lambda step, record: lines.append((step, record)),
        evaluate=lambda step: None,
        reset=lambda step, reason: pytest.fail("nothing asks for a reset"),
        saved=lambda step, folder: saved.append(step),
        episode=lambda: episodes.append(1),
        wants_state=lambda step: step % 2 == 0,
    )
    practice = SimpleNamespace(tasks=range(6))
    tokenizer = AutoTokenizer.from_pretrained(path)
    trainer = make_trainer(config, model, base, tokenizer, sampler, practice, tmp_path / "state", hooks)
    trainer.train()
    batches = 4 // updates
    assert [stream for stream, _ in sampler.asked] == [f"train/{step}" for step in range(0, 4, updates)]
    assert [tasks for _, tasks in sampler.asked] == [[0, 1], [2, 3], [4, 5], [0, 1]][:batches]
    assert sampler.pushed == list(range(0, 4, updates))
    assert len(episodes) == 8 * batches
    assert [step for step, _ in lines] == [1, 2, 3, 4]
    assert [record["learning_rate"] for _, record in lines] == pytest.approx([1e-5, 7.5e-6, 5e-6, 2.5e-6])
    for _, record in lines:
        assert all(np.isfinite(value) for value in record.values())
        assert record["kl_previous"] > 0
    assert lines[0][1]["kl_base"] == 0
    assert lines[0][1]["failed"] == 1 / 8
    assert saved == [2, 4]
    assert [step for step, _ in complete_states(tmp_path / "state")] == [2, 4]
    start = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    assert all(torch.equal(weight, start[name]) for name, weight in base.state_dict().items())
    assert not any(torch.equal(weight, start[name]) for name, weight in model.state_dict().items())


@pytest.mark.nightly
@needs_trl
def test_bfloat16_is_for_the_update_only(tmp_path):
    from types import SimpleNamespace

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlvr_landscape_plugin.trl.trainer import make_trainer

    path = str(open_snapshot("tiny-sorter").path)
    found = {}
    for precision in ("float32", "bfloat16"):
        sizes = {"num_tasks": 6, "tasks_per_batch": 2, "rollouts": 4}
        given = {"steps": 1, "snapshots": "0", "env": sizes, "monitor_rollouts": 3, "precision": precision}
        config = TrainConfig.model_validate(given | {"optimizer": {"name": "adamw", "lr": 1e-5}})
        model, base = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
        lines = []
        hooks = SimpleNamespace(
            metrics=lambda step, record, lines=lines: lines.append(record),
            evaluate=lambda step: None,
            episode=lambda: None,
            wants_state=lambda step: False,
        )
        practice, tokenizer = SimpleNamespace(tasks=range(6)), AutoTokenizer.from_pretrained(path)
        trainer = make_trainer(config, model, base, tokenizer, Sampler(), practice, tmp_path / precision, hooks)
        trainer.train()
        (found[precision],) = lines
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    exact, rounded = found["float32"], found["bfloat16"]
    assert 0 < abs(exact["entropy"] - rounded["entropy"]) < 0.02 * exact["entropy"]
    assert 0 < abs(exact["grad_norm"] - rounded["grad_norm"]) < 0.05 * exact["grad_norm"]
    assert exact["kl_base"] == rounded["kl_base"] == 0
    assert exact["sampler_difference"] == rounded["sampler_difference"]


@needs_trl
def test_a_reset_makes_the_policy_its_own_reference_and_forgets_the_moments(tmp_path):
    from types import SimpleNamespace

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlvr_landscape_plugin.trl.trainer import make_trainer

    config = TrainConfig.model_validate(
        {
            "steps": 5,
            "snapshots": "0",
            "env": {"num_tasks": 6, "tasks_per_batch": 2, "rollouts": 4},
            "objective": {"name": "grpo", "options": {"kl_coefficient": 0.1}},
            "optimizer": {"name": "adamw", "lr": 1e-4},
            "reference": {"every": 4, "max_drop": 0.1},
            "monitor_rollouts": 3,
        }
    )
    path = str(open_snapshot("tiny-sorter").path)
    weights, moments, resets = {}, {}, []
    rewards = {1: 0.5, 2: 0.3}  # a drop at step 2, then the interval from there on never passes

    def make():
        model, base = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))

        def reset(step: int, reason: str) -> None:
            resets.append((step, reason))
            weights.update({name: value.clone() for name, value in model.state_dict().items()})
            moments[step] = len(getattr(trainer.optimizer, "optimizer", trainer.optimizer).state)

        hooks = SimpleNamespace(
            metrics=lambda step, record: None,
            evaluate=rewards.get,
            reset=reset,
            saved=lambda step, folder: None,
            episode=lambda: None,
            wants_state=lambda step: step == 3,
        )
        arguments = (AutoTokenizer.from_pretrained(path), Sampler(), SimpleNamespace(tasks=range(6)))
        trainer = make_trainer(config, model, base, *arguments, tmp_path / "state", hooks)
        return trainer, model, base

    def same(one, other) -> bool:
        return all(torch.equal(value, other[name]) for name, value in one.items())

    trainer, model, base = make()
    trainer.train()
    assert resets == [(2, "drop")]
    assert moments == {2: 0}
    assert same(trainer.reference.model.state_dict(), weights)
    assert not same(model.state_dict(), weights)
    assert same(base.state_dict(), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict())
    again, *_ = make()
    assert not same(again.reference.model.state_dict(), weights)
    again.reference.restore(tmp_path / "state" / "checkpoint-3")
    assert same(again.reference.model.state_dict(), weights)
    assert again.reference.schedule == trainer.reference.schedule


@pytest.mark.parametrize(
    ("reference", "options", "message"),
    [({}, {"kl_coefficient": 0.1}, "never resets"), ({"every": 3}, {}, "resets what the objective does not use")],
)
def test_resets_that_would_do_nothing_are_refused(reference, options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate({"objective": {"options": options}, "reference": reference})


SMALL = """
steps = 2
snapshots = "0-2"
[env]
num_tasks = 8
tasks_per_batch = 2
rollouts = 4
taskset = { min_turns = 2, max_turns = 2, max_names_per_turn = 3, seed = 7 }
[evaluation]
every = 2
num_tasks = 3
rollouts = 2
taskset = { seed = 2001 }
[sampling]
max_tokens = 48
"""


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    (tmp_path / "train.toml").write_text(SMALL)
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "rlvr_landscape_plugin.trl", "@", str(tmp_path / "train.toml")),
            *("--output", str(tmp_path / "run"), *arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


@needs_trl
@pytest.mark.server
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_is_killed_and_continues_with_its_snapshots_untouched(tmp_path):
    root = tmp_path / "run"
    process = start(tmp_path, "--steps", "50")
    try:
        deadline = time.monotonic() + 300
        while not (root / "snapshots" / "step_000001").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    files = [file for file in sorted((root / "snapshots").rglob("*")) if file.is_file() and "step_" in file.parts[-2]]
    kept = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files if not file.parts[-2].startswith(".")}
    assert len([file for file in kept if file.name == "manifest.json"]) >= 2

    process = start(tmp_path)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert "continuing from step" in err or "steps already" in err
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in kept} == kept
    process = start(tmp_path, "--steps", "4")
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err

    lines = [json.loads(text) for text in (root / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert all(np.isfinite(value) for value in line.values())
        assert 0 <= line["reward"] <= 1
        assert line["kl_previous"] > 0
        assert line["sampler_difference"] < 1e-3  # the server sampled with the weights that are trained
    assert lines[0]["kl_base"] == 0
    assert lines[-1]["kl_base"] > 0
    looks = [json.loads(text) for text in (root / "evaluations.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [0, 2, 4]
    snapshots = [open_snapshot(root / "snapshots" / f"step_{step:06d}") for step in range(3)]
    assert len({snapshot.sha256 for snapshot in snapshots}) == 3
    for step, snapshot in enumerate(snapshots):
        snapshot.verify()
        assert snapshot.manifest is not None
        assert snapshot.step == snapshot.manifest.step == step
        assert snapshot.manifest.run == json.loads((root / "run.json").read_text())["id"]
        assert snapshot.manifest.metrics.get("reward", lines[0]["reward"]) == lines[max(step - 1, 0)]["reward"]
    base = open_snapshot("tiny-sorter")
    assert snapshots[0].shapes == base.shapes
    assert (snapshots[2].path / "config.json").read_bytes() == (base.path / "config.json").read_bytes()
    assert not (root / "scratch").exists()

    process = start(tmp_path, "--seed", "5")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "seed was 0, is 5" in err
    assert "Traceback" not in err
