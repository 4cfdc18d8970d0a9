"""In-process episodes with a scripted policy: conversation, reward and tokens are the taskset's and the sampler's."""

from __future__ import annotations

import asyncio
import gc
import json
from pathlib import Path

import numpy as np
import pytest
import reference
from conftest import POLICY, TASKSET
from rlvr_alphabet_sort.rules import episode_reward, tag_of

from rlvr_landscape_plugin.episodes import (
    ERROR,
    OK,
    TRUNCATED,
    ChatFormat,
    EpisodeRunner,
    load_tasks,
    open_environment,
    prompts_hash,
)
from rlvr_landscape_plugin.errors import ServerError, TasksetError
from rlvr_landscape_plugin.serving.client import Completion


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(POLICY)


@pytest.fixture
def tasksets(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers" / "tasksets"))


class Scripted:
    """A sampler that says given texts, turn by turn, and remembers what it was asked."""

    def __init__(self, chat: ChatFormat, replies: list[str], finish: str = "stop") -> None:
        self.chat, self.replies, self.finish = chat, replies, finish
        self.prompts: list[list[int]] = []
        self.seeds: list[int] = []
        self.limits: list[int] = []

    async def generate(self, prompt, seed, max_tokens):
        self.prompts.append(list(prompt))
        self.seeds.append(seed)
        self.limits.append(max_tokens)
        text = self.replies[len(self.prompts) - 1] + ("<|im_end|>" if self.finish == "stop" else "")
        ids = np.asarray(self.chat.tokenizer.encode(text, add_special_tokens=False), np.int32)
        return Completion(ids, -np.arange(1, len(ids) + 1, dtype=np.float32), self.finish)


def runner(env, chat, sampler, **options) -> EpisodeRunner:
    return EpisodeRunner(env, chat, sampler, **({"max_tokens": 96, "max_model_len": 1024} | options))


def right(info: dict) -> list[str]:
    return [
        f"<{tag_of(t)}>\n" + "\n".join(names) + f"\n</{tag_of(t)}>" for t, names in enumerate(info["ground_truths"])
    ]


async def test_true_answers_earn_one_and_tokens_are_those_sampled(chat):
    env = open_environment("rlvr-alphabet-sort", TASKSET)
    for task in load_tasks(env, 5):
        replies = right(task.data.info)
        sampler = Scripted(chat, replies)
        rollout = await runner(env, chat, sampler).episode(task, lambda turn: 100 + turn)
        assert rollout.reward == 1.0
        assert rollout.status == OK
        assert rollout.format_failure == 0.0
        assert sampler.seeds == [100, 101]
        (segment,) = rollout.segments
        first, second = (chat.tokenizer.encode(r + "<|im_end|>", add_special_tokens=False) for r in replies)
        assert segment.tokens[segment.sampled].tolist() == first + second
        assert segment.tokens[: len(sampler.prompts[0])].tolist() == sampler.prompts[0]
        assert segment.tokens[: len(sampler.prompts[1])].tolist() == sampler.prompts[1]
        assert len(segment.logprobs) == segment.sampled.sum() == rollout.completion_tokens


async def test_prompts_are_the_chat_template_of_the_conversation(chat):
    env = open_environment("rlvr-alphabet-sort", TASKSET)
    task = load_tasks(env, 1)[0]
    replies, asked = ["first reply", "second"], task.data.info["user_turns"]
    sampler = Scripted(chat, replies)
    await runner(env, chat, sampler).episode(task, lambda turn: 0)
    conversation = [{"role": "user", "content": asked[0]}]
    assert chat.tokenizer.decode(sampler.prompts[0]) == reference.rendered(POLICY, conversation)
    conversation += [{"role": "assistant", "content": replies[0]}, {"role": "user", "content": asked[1]}]
    assert chat.tokenizer.decode(sampler.prompts[1]) == reference.rendered(POLICY, conversation)


async def test_a_cut_reply_is_closed_and_counted(chat):
    env = open_environment("rlvr-alphabet-sort", TASKSET)
    task = load_tasks(env, 1)[0]
    sampler = Scripted(chat, ["cut", "cut too"], finish="length")
    rollout = await runner(env, chat, sampler).episode(task, lambda turn: 0)
    assert rollout.status == TRUNCATED
    assert "cut<|im_end|>\n" in chat.tokenizer.decode(sampler.prompts[1])
    assert rollout.format_failure == 1.0


async def test_a_full_context_ends_the_episode(chat):
    env = open_environment("rlvr-alphabet-sort", TASKSET)
    task = load_tasks(env, 1)[0]
    sampler = Scripted(chat, ["a", "b"])
    first = len(chat.opening(json.dumps([{"role": "user", "content": task.data.info["user_turns"][0]}])))
    rollout = await runner(env, chat, sampler, max_model_len=first + 5).episode(task, lambda turn: 0)
    assert rollout.status == TRUNCATED
    assert sampler.limits == [5]


async def test_rewards_are_those_of_the_rules_on_what_was_said(chat):
    env = open_environment("rlvr-alphabet-sort", TASKSET)
    rng = np.random.default_rng(0)
    for task in load_tasks(env, 10):
        info = task.data.info
        replies = ["\n".join(rng.permutation(text.split("\n"))) for text in right(info)]
        rollout = await runner(env, chat, Scripted(chat, replies)).episode(task, lambda turn: 0)
        assert rollout.reward == episode_reward(replies, info["ground_truths"], 4, True)


async def test_other_chat_tasksets_run(chat, tasksets):
    env = open_environment("tiny-quiz", {"system": "Be brief."})
    task = load_tasks(env, 4)[3]
    sampler = Scripted(chat, ["four"])
    rollout = await runner(env, chat, sampler).episode(task, lambda turn: 0)
    assert rollout.reward == 2.0
    assert rollout.format_failure is None
    expected = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say 3"}]
    assert chat.tokenizer.decode(sampler.prompts[0]) == reference.rendered(POLICY, expected)


async def test_a_verifier_that_fails_is_data_and_a_server_that_fails_is_not(chat, tasksets):
    env = open_environment("tiny-quiz", {"broken": True})
    task = load_tasks(env, 1)[0]
    rollout = await runner(env, chat, Scripted(chat, ["x"])).episode(task, lambda turn: 0)
    assert rollout.status == ERROR
    assert np.isnan(rollout.reward)
    assert "this verifier is broken" in (rollout.error or "")
    assert rollout.completion_tokens > 0

    class Dead:
        async def generate(self, prompt, seed, max_tokens):
            raise ServerError("gone")

    with pytest.raises(ServerError, match="gone"):
        await runner(env, chat, Dead()).batch([task], 2, lambda p, r, t: 0, lambda: None)


@pytest.mark.parametrize(("env_id", "options"), [("rlvr-alphabet-sort", TASKSET), ("tiny-quiz", {})])
async def test_scores_are_what_verifiers_own_scoring_records(chat, tasksets, env_id, options):
    env = open_environment(env_id, options)
    for task in load_tasks(env, 3):
        sampler = Scripted(chat, ["Ann\nBob", "four", "five"])
        trace = (await runner(env, chat, sampler, keep_traces=True).episode(task, lambda turn: 0)).trace
        ours = trace.rewards, trace.metrics
        trace.rewards, trace.metrics = {}, {}
        await task.score(trace)
        assert ours[0]
        assert ours == (trace.rewards, trace.metrics)


async def test_batches_leave_the_garbage_collector_as_it_was(chat, tasksets):
    env = open_environment("tiny-quiz", {})
    tasks, before, during = load_tasks(env, 2), gc.get_threshold(), []

    class Slow(Scripted):
        async def generate(self, prompt, seed, max_tokens):
            await asyncio.sleep(0.01 * seed)
            during.append(gc.get_threshold())
            if seed == 3:
                raise ServerError("gone")
            self.prompts.clear()
            return await super().generate(prompt, seed, max_tokens)

    async def batch(seed: int) -> None:
        await runner(env, chat, Slow(chat, ["x"])).batch(tasks, 2, lambda p, r, t: seed, lambda: None)

    first, second, third = await asyncio.gather(*(batch(seed) for seed in (1, 2, 3)), return_exceptions=True)
    assert (first, second) == (None, None)
    assert isinstance(third, ServerError)
    assert len(set(during)) == 1
    assert before not in during
    assert gc.get_threshold() == before


@pytest.mark.parametrize(
    ("env_id", "options", "count", "message"),
    [
        ("no-such-taskset", {}, 1, "'no-such-taskset' .* is not installed"),
        ("tiny-quiz", {"count": 0}, 1, "is empty"),
        ("tiny-quiz", {}, 9, "has 4 tasks, 9 were asked for"),
        ("tiny-quiz", {"cuont": 1}, 1, "cuont"),
        ("needy-quiz", {}, 1, r"files\(\) needs a runtime"),
        ("rlvr-alphabet-sort", {"min_turns": 5}, 1, "min_turns = 5 exceeds"),
    ],
)
def test_unfit_tasksets_are_refused(tasksets, env_id, options, count, message):
    with pytest.raises(TasksetError, match=message):
        load_tasks(open_environment(env_id, options), count)


def test_prompt_sets_have_a_name(tasksets):
    def of(**options):
        return prompts_hash(load_tasks(open_environment("rlvr-alphabet-sort", TASKSET | options), 8))

    assert of() == of()
    assert len({of(), of(seed=0), of(max_names_per_turn=2)}) == 3


async def test_traces_are_verifiers_records(chat):
    from verifiers.v1.trace import WireTrace

    env = open_environment("rlvr-alphabet-sort", TASKSET)
    task = load_tasks(env, 1)[0]
    rollout = await runner(env, chat, Scripted(chat, right(task.data.info)), keep_traces=True).episode(
        task, lambda turn: 0
    )
    again = WireTrace.model_validate(json.loads(json.dumps(rollout.trace.to_record())))
    assert again.reward == 1.0
    assert [m.content for m in again.assistant_messages] == right(task.data.info)
    assert again.branches[0].token_ids == rollout.segments[0].tokens.tolist()
