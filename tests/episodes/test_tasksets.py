"""Tasksets with faults: refused when they are opened, or counted with their reason, never measured in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import POLICY

from rlvr_landscape_plugin.config import SurrogateConfig
from rlvr_landscape_plugin.episodes import (
    ERROR,
    OK,
    ChatFormat,
    EpisodeRunner,
    Failures,
    Rollout,
    check_chat,
    check_same_chat,
    load_tasks,
    open_environment,
)
from rlvr_landscape_plugin.episodes.chat import load_tokenizer
from rlvr_landscape_plugin.errors import ServerError, SnapshotError, TasksetError
from rlvr_landscape_plugin.serving.client import Completion, MoveResult
from rlvr_landscape_plugin.sweep.point import PointMeter, check_failures


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(POLICY)


@pytest.fixture(autouse=True)
def tasksets(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers" / "tasksets"))


class Says:
    """A server that always says the same, or another text for each seed, and gives every token the same score."""

    def __init__(self, chat: ChatFormat, *texts: str) -> None:
        self.chat, self.texts = chat, texts or ("a word",)
        self.version = "0"
        self.asked: list[str] = []

    async def generate(self, prompt, seed, max_tokens):
        self.asked.append(self.chat.tokenizer.decode(prompt))
        text = self.texts[seed % len(self.texts)] + "<|im_end|>"
        ids = np.asarray(self.chat.tokenizer.encode(text, add_special_tokens=False), np.int32)
        return Completion(ids, np.full(len(ids), -1.0, np.float32), "stop")

    async def move(self, alpha, beta):
        return MoveResult("1", 0.1, {})

    async def score(self, sequences, first=()):
        return [np.full(len(ids) - 1, -1.5, np.float32) for ids in sequences]


def runner(env, chat, sampler, **options) -> EpisodeRunner:
    return EpisodeRunner(env, chat, sampler, **({"max_tokens": 96, "max_model_len": 1024} | options))


def meter(chat, server, env_id: str, rollouts: int = 2, **options) -> PointMeter:
    env = open_environment(env_id, options)
    return PointMeter(server, runner(env, chat, server), load_tasks(env, 4), rollouts, 0, SurrogateConfig())


# Refused at opening


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("setup", r"task 2 of FaultyQuizTaskset .* it overrides setup\(\)"),
        ("runtime", r"task 2 of FaultyQuizTaskset .* files\(\) needs a runtime"),
        ("image", "task 2 .* its prompt holds images"),
        ("skills", "task 2 .* it installs skills"),
        ("unpaid", "task 2 of FaultyQuizTaskset has no reward"),
    ],
)
def test_a_task_that_is_unfit_is_found_wherever_it_stands(fault, message):
    env = open_environment("faulty-quiz", {"fault": fault, "from_task": 2})
    assert len(load_tasks(env, 2)) == 2
    with pytest.raises(TasksetError, match=message):
        load_tasks(env, 4)


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("two-players", r"plays 2 agents \(white, black\)"),
        ("serving-quiz", "starts services of its own"),
        ("first-interface-a", "removed that interface in 0.3.2"),
        ("first-interface-b", "removed that interface in 0.3.2"),
        ("first-interface-c", "removed that interface in 0.3.2"),
    ],
)
def test_an_environment_that_no_sweep_can_drive_is_refused(env_id, message):
    with pytest.raises(TasksetError, match=message):
        open_environment(env_id, {})


def test_a_list_as_text_is_refused_with_the_way_to_give_it():
    with pytest.raises(TasksetError, match=r"operations.*valid list.*--env\.taskset '\{"):
        open_environment("rlvr-word-problems", {"operations": '["add"]'})
    with pytest.raises(TasksetError) as caught:
        open_environment("rlvr-word-problems", {"largest": "many"})
    assert "on a command line" not in str(caught.value)


# The role has the name that its author gave it


async def test_the_role_may_have_any_name(chat):
    env = open_environment("env-quiz", {"run": "paid"})
    (task,) = load_tasks(env, 1)
    rollout = await runner(env, chat, Says(chat)).episode(task, lambda turn: 0)
    assert (rollout.status, rollout.reward) == (OK, 0.25)


# Failures


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("raises", "no answer in this row"), ("text", "could not convert"), ("infinite", "reward is inf")],
)
async def test_failures_are_counted_with_their_reason(chat, fault, reason):
    server = Says(chat)
    measure = meter(chat, server, "faulty-quiz", fault=fault, from_task=3)
    base = await measure.base(lambda: None)
    assert base.failures == Failures(2, 8, base.failures.reason if base.failures else "")
    data, batch = await measure.point(base, 0.1, 0.0, lambda: None)
    assert data["status"].values.tolist() == [[OK] * 2] * 3 + [[ERROR] * 2]
    assert np.isnan(data["reward"].values[3]).all()
    assert np.isfinite(data["reward"].values[:3]).all()
    assert data.attrs["failed_episodes"] == 2
    assert reason in data.attrs["first_failure"]
    assert data.attrs["first_failure"] == batch[3][0].error


@pytest.mark.parametrize("fault", ["raises", "text", "infinite"])
async def test_a_batch_in_which_every_episode_failed_ends_the_sweep(chat, fault):
    measure = meter(chat, Says(chat), "faulty-quiz", fault=fault, from_task=0)
    with pytest.raises(TasksetError, match="every one of 8 episodes of the checkpoint's own batch failed; the first"):
        await measure.base(lambda: None)


async def test_a_point_in_which_every_episode_failed_ends_the_sweep(chat):
    server = Says(chat, "good")
    measure = meter(chat, server, "faulty-quiz", fault="sometimes", from_task=0)
    base = await measure.base(lambda: None)
    server.texts = ("bad",)
    with pytest.raises(TasksetError, match=r"8 episodes at \(0.1, -0.2\) failed; the first one: .*no answer in this"):
        await measure.point(base, 0.1, -0.2, lambda: None)


async def test_a_point_without_failures_says_nothing_of_them(chat):
    measure = meter(chat, Says(chat), "faulty-quiz")
    data, _ = await measure.point(await measure.base(lambda: None), 0.1, 0.0, lambda: None)
    assert not {"failed_episodes", "first_failure"} & set(data.attrs)


def test_the_first_failure_is_that_of_the_lowest_task():
    fine, broken = Rollout(1.0, OK, []), [Rollout(float("nan"), ERROR, [], reason) for reason in ("one", "two")]
    found = Failures.of([[fine, broken[0]], [broken[1], fine]])
    assert str(found) == "2 of 4 episodes failed; the first one: one"
    assert check_failures([[fine, broken[0]]], "somewhere").failed == 1


@pytest.mark.parametrize("run", ["before_agent", "raises"])
async def test_the_traces_say_why_an_episode_failed(chat, run):
    if run == "raises":
        env = open_environment("faulty-quiz", {"fault": "raises", "from_task": 0})
    else:
        env = open_environment("env-quiz", {"run": run})
    (task,) = load_tasks(env, 1)
    rollout = await runner(env, chat, Says(chat), keep_traces=True).episode(task, lambda turn: 0)
    assert rollout.trace is not None
    record = json.loads(json.dumps(rollout.trace.to_record()))
    (error,) = record["errors"]
    assert rollout.error == f"{error['type']}: {error['message']}"
    assert not record["ok"]
    assert record["is_completed"]
    assert record["task"]["data"]["prompt"] == "Say 0"
    assert bool(record["nodes"]) == (run == "raises")


async def test_a_taskset_that_never_pays_is_no_landscape(chat):
    with pytest.raises(TasksetError, match="recorded no reward in any episode"):
        await meter(chat, Says(chat), "env-quiz", run="unpaid").base(lambda: None)
    assert (await meter(chat, Says(chat), "env-quiz", run="paid").base(lambda: None)).reward.tolist() == [
        [0.25] * 2
    ] * 4


async def test_an_agent_that_runs_twice_is_refused(chat):
    with pytest.raises(TasksetError, match="ran the agent 2 times"):
        await meter(chat, Says(chat), "env-quiz", run="twice").base(lambda: None)


# What the taskset's code must not swallow


async def test_errors_that_end_a_sweep_pass_through_a_taskset_that_catches_everything(chat):
    env = open_environment("env-quiz", {"run": "catch"})
    (task,) = load_tasks(env, 1)

    class Dead:
        async def generate(self, prompt, seed, max_tokens):
            raise ServerError("gone")

    with pytest.raises(ServerError, match="gone"):
        await runner(env, chat, Dead()).batch([task], 2, lambda p, r, t: 0, lambda: None)
    rollout = await runner(env, chat, Says(chat)).episode(task, lambda turn: 0)
    assert rollout.reward == 0.5


# Tasks that the environment makes


@pytest.mark.parametrize("run", ["derive", "derive_plain"])
async def test_the_trace_of_a_derived_task_is_that_of_this_task(chat, run):
    """Without hooks of its own (`derive_plain`) nothing else keeps such a task, and its address is soon another's."""
    env = open_environment("env-quiz", {"run": run})
    tasks = load_tasks(env, 4)
    play = runner(env, chat, Says(chat))
    rewards = []
    for _ in range(20):
        batch = await play.batch(tasks, 1, lambda p, r, t: 0, lambda: None)
        rewards += [rollout.reward for row in batch for rollout in row]
    assert rewards == [1.0] * 80
    assert len(play._known) == len(tasks)


async def test_a_derived_task_is_checked_too(chat):
    env = open_environment("env-quiz", {"run": "derive_setup"})
    with pytest.raises(TasksetError, match=r"made a SetupTask that needs more .* it overrides setup\(\)"):
        await runner(env, chat, Says(chat)).batch(load_tasks(env, 2), 1, lambda p, r, t: 0, lambda: None)


# Chat templates and tokenizers


def policy_with(folder: Path, **changes: str | None) -> Path:
    """The shipped policy's tokenizer with other files: name (dots as `_dot_`) → text, None takes the file away."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(POLICY / name, folder / name)
    for name, text in changes.items():
        path = folder / name.replace("_dot_", ".")
        path.unlink() if text is None else path.write_text(text)
    return folder


TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}",
            "the chat template in .* drops assistant messages",
        ),
        ("{% if x %}", "cannot render a conversation with the roles user: TemplateSyntaxError"),
        (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            "{{ m.content }}{% endfor %}",
            "cannot render a conversation with the roles system, user: TemplateError: no system role",
        ),
        (
            "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
            "cannot render a conversation with the roles user: SecurityError: access to attribute '__class__'",
        ),
        ("", "no chat template"),
        ("{{ '' }}", "makes no token of a prompt"),
    ],
)
async def test_a_template_that_does_not_fit_ends_the_sweep(tmp_path, template, message):
    policy = policy_with(tmp_path / "policy", chat_template_dot_jinja=template)
    env_id, options = ("tiny-quiz", {"system": "Be brief."}) if "system" in template else ("env-quiz", {"run": "catch"})

    async def play() -> None:
        chat = ChatFormat(policy)
        env = open_environment(env_id, options)
        server = Says(chat)
        await runner(env, chat, server).batch(load_tasks(env, 2), 2, lambda p, r, t: 0, lambda: None)

    with pytest.raises(SnapshotError, match=message):
        await play()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_dot_json": None}, "no tokenizer with a vocabulary"),
        ({"tokenizer_dot_json": None, "tokenizer_config_dot_json": None}, "no tokenizer with a vocabulary"),
        ({"tokenizer_dot_json": "{"}, "no usable tokenizer"),
    ],
)
def test_a_tokenizer_that_is_not_whole_is_an_error_of_the_snapshot(tmp_path, changes, message):
    with pytest.raises(SnapshotError, match=message):
        ChatFormat(policy_with(tmp_path / "policy", **changes))


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(tmp_path):
    config = json.loads((POLICY / "config.json").read_text()) | {"vocab_size": 100}
    chat = ChatFormat(policy_with(tmp_path / "policy", config_dot_json=json.dumps(config)))
    with pytest.raises(SnapshotError, match=r"the policy's vocab_size in config.json is 100"):
        chat.opening(json.dumps([{"role": "user", "content": "Sort these names"}]))


def test_snapshots_must_share_their_chat(tmp_path):
    first = policy_with(tmp_path / "step_0")
    same = policy_with(tmp_path / "step_1")
    padded = json.loads((POLICY / "tokenizer_config.json").read_text()) | {"padding_side": "left", "note": "mine"}
    formatted = policy_with(tmp_path / "step_2", tokenizer_config_dot_json=json.dumps(padded))
    bare = policy_with(
        tmp_path / "step_3",
        tokenizer_dot_json=None,
        tokenizer_config_dot_json=None,
        chat_template_dot_jinja=None,
    )
    check_same_chat([first])
    check_same_chat([first, same, formatted, bare])
    other = policy_with(tmp_path / "step_4", chat_template_dot_jinja=TURNS)
    with pytest.raises(SnapshotError, match=r"step_4 differs from the first snapshot, .*step_0, in its chat template;"):
        check_same_chat([first, same, other])
    rules = json.loads((POLICY / "tokenizer.json").read_text())
    words = rules["model"]["vocab"]
    a, b = list(words)[-2:]
    words[a], words[b] = words[b], words[a]
    swapped = policy_with(tmp_path / "step_5", tokenizer_dot_json=json.dumps(rules))
    with pytest.raises(SnapshotError, match=r"step_5 differs .* in its vocabulary"):
        check_same_chat([first, swapped])
    rules = json.loads((POLICY / "tokenizer.json").read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:-1]
    unmerged = policy_with(tmp_path / "step_6", tokenizer_dot_json=json.dumps(rules))
    assert load_tokenizer(unmerged).get_vocab() == load_tokenizer(first).get_vocab()
    with pytest.raises(SnapshotError, match=r"step_6 differs .* in its tokenization;"):
        check_same_chat([first, unmerged])


# Metrics


async def test_every_metric_of_a_rollout_is_kept(chat):
    env = open_environment("faulty-quiz", {})
    (task,) = load_tasks(env, 1)
    rollout = await runner(env, chat, Says(chat, "two words")).episode(task, lambda turn: 0)
    assert rollout.metrics == {"words": 2.0, "vowels of a reply": 2.0}
    assert rollout.format_failure is None


# Tasks that need a runtime


def test_a_task_that_a_runtime_would_serve_is_refused_with_the_key_that_gives_one():
    env = open_environment("runtime-quiz", {})
    with pytest.raises(TasksetError, match=r"correct\(\) needs a runtime, .* env.runtime = 'subprocess' runs that"):
        load_tasks(env, 3)
    assert len(load_tasks(env, 3, runtime=True)) == 3
    image = open_environment("faulty-quiz", {"fault": "image"})
    with pytest.raises(TasksetError, match=r"not text \(docs/tasksets.md\)"):
        load_tasks(image, 4, runtime=True)


async def test_setup_finalize_and_rewards_run_in_a_runtime_of_their_own(chat):
    from verifiers.v1.utils.paths import CACHE_DIR

    env = open_environment("runtime-quiz", {})
    tasks = load_tasks(env, 3, runtime=True)
    play = runner(env, chat, Says(chat, "four", "five"), runtime=True, keep_traces=True)
    batch = await play.batch(tasks, 2, lambda p, r, t: r, lambda: None)
    assert [[rollout.reward for rollout in row] for row in batch] == [[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]
    assert [dict(rollout.metrics) for rollout in batch[1]] == [{"letters said": 4.0, "quiz": 1.0}] * 2
    assert all(rollout.trace.info["prepared"] for row in batch for rollout in row)
    left = [path.name for path in (CACHE_DIR / "runtimes" / "subprocess").iterdir()]
    assert not {rollout.trace.id for row in batch for rollout in row} & set(left)


async def test_a_setup_that_takes_too_long_is_a_failed_episode(chat):
    env = open_environment("runtime-quiz", {"slow": True})
    (task,) = load_tasks(env, 1, runtime=True)
    rollout = await runner(env, chat, Says(chat), runtime=True).episode(task, lambda turn: 0)
    assert rollout.error == "TimeoutError: setup() of the task took longer than its limit of 0.2 s"


async def test_a_task_without_needs_starts_no_runtime(chat, monkeypatch):
    monkeypatch.setattr("verifiers.v1.runtimes.make_runtime", lambda *a, **k: pytest.fail("a runtime was made"))
    env = open_environment("faulty-quiz", {})
    (task,) = load_tasks(env, 1, runtime=True)
    assert (await runner(env, chat, Says(chat), runtime=True).episode(task, lambda turn: 0)).status == OK


def test_what_a_template_cannot_render_is_found_before_any_server(tmp_path):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    policy = policy_with(tmp_path / "policy", chat_template_dot_jinja=template)
    check_chat([policy], load_tasks(open_environment("tiny-quiz", {}), 4))
    with pytest.raises(SnapshotError, match="the roles system, user: TemplateError: no system role"):
        check_chat([policy], load_tasks(open_environment("tiny-quiz", {"system": "Be brief."}), 4))
    with pytest.raises(SnapshotError, match="no tokenizer with a vocabulary"):
        check_chat([policy_with(tmp_path / "bare", tokenizer_dot_json=None)], [])


async def test_the_prompt_that_is_checked_is_the_one_that_is_asked(chat):
    from rlvr_landscape_plugin.episodes.chat import first_messages

    for env_id, options in (("tiny-quiz", {"system": "Be brief."}), ("faulty-quiz", {})):
        env = open_environment(env_id, options)
        (task,) = load_tasks(env, 1)
        server = Says(chat)
        await runner(env, chat, server).episode(task, lambda turn: 0)
        assert server.asked == [chat.tokenizer.decode(chat.opening(first_messages(task)))]
