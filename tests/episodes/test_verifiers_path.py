"""Episodes by verifiers' own agents: chosen where the chat loop cannot, with its tokens, seeds and rewards."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from conftest import POLICY, TASKSET

from rlvr_landscape_plugin.config import EnvConfig
from rlvr_landscape_plugin.episodes import ERROR, OK, TRUNCATED, ChatFormat, EpisodeRunner, open_tasks
from rlvr_landscape_plugin.episodes.agent import Play
from rlvr_landscape_plugin.episodes.gateway import SESSION, Gateway
from rlvr_landscape_plugin.episodes.rollouts import segments_of, segments_of_calls
from rlvr_landscape_plugin.errors import ServerError, SnapshotError, TasksetError
from rlvr_landscape_plugin.serving.client import Completion


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(POLICY)


@pytest.fixture(autouse=True)
def tasksets(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers" / "tasksets"))


class Says:
    """A server that says `texts[seed % len(texts)]` and remembers what it was asked."""

    def __init__(self, chat: ChatFormat, *texts: str, finish: str = "stop") -> None:
        self.chat, self.texts, self.finish = chat, texts, finish
        self.asked: list[tuple[list[int], int, int]] = []

    async def generate(self, prompt, seed, max_tokens):
        self.asked.append((list(prompt), seed, max_tokens))
        text = self.texts[seed % len(self.texts)] + ("<|im_end|>" if self.finish == "stop" else "")
        ids = np.asarray(self.chat.tokenizer.encode(text, add_special_tokens=False), np.int32)
        return Completion(ids, -np.arange(1, len(ids) + 1, dtype=np.float32) / 8, self.finish)


def settings(env_id: str, path: str = "auto", count: int = 4, **given) -> EnvConfig:
    fields = {"id": env_id, "num_prompts": count, "runtime": "subprocess", "path": path, **given}
    return EnvConfig.model_validate(fields)


def runner(opened, chat, sampler, **options) -> EpisodeRunner:
    given = {"max_tokens": 96, "max_model_len": 1024, "path": opened.path, "runtime": True, "timeout": 60.0}
    return EpisodeRunner(opened.env, chat, sampler, keep_traces=True, **(given | options))


def flat(batch):
    return [rollout for row in batch for rollout in row]


def assert_same_segments(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.sampled.tolist() == other.sampled.tolist()
        assert one.logprobs.tolist() == other.logprobs.tolist()


# Which path


def test_the_chat_loop_is_taken_where_it_can_and_verifiers_agents_where_it_cannot():
    assert open_tasks(settings("tiny-quiz")).path == "chat"
    opened = open_tasks(settings("hook-quiz"))
    assert (opened.path, opened.harness) == ("verifiers", {"id": "rlvr-chat"})
    assert opened.reason.endswith("it intercepts model requests, it stops on requests or responses")
    bash = open_tasks(settings("tiny-quiz", harness={"id": "bash"}))
    assert bash.path == "verifiers"
    assert bash.reason.endswith("has the harness 'bash', which the chat loop of a sweep does not")
    assert bash.has_tools


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"env_id": "hook-quiz", "path": "chat"}, "task 0 of HookQuizTaskset needs more .* intercepts model requests"),
        ({"env_id": "hook-quiz", "runtime": None}, "env.runtime = 'subprocess' with env.path = 'auto'"),
        ({"env_id": "tiny-quiz", "path": "verifiers", "runtime": None}, "set env.runtime = 'subprocess' to allow that"),
        ({"env_id": "faulty-quiz", "taskset": {"fault": "image"}}, "cannot be measured: its prompt holds images"),
        ({"env_id": "two-players"}, r"plays 2 agents"),
        ({"env_id": "tiny-quiz", "options": {"agent": 3}}, "env.options.agent is not a table"),
        ({"env_id": "tiny-quiz", "options": {"colour": 3}}, "env.options.*colour"),
    ],
)
def test_what_no_path_can_play_is_refused_with_a_reason(given, message):
    with pytest.raises(TasksetError, match=message):
        open_tasks(settings(**given))


# The same as the chat loop


async def test_both_paths_give_the_same_tokens_rewards_and_metrics(chat):
    batches, asked = [], []
    for path in ("chat", "verifiers"):
        opened = open_tasks(settings("rlvr-alphabet-sort", path, taskset=TASKSET))
        truths = opened.tasks[0].data.info["ground_truths"]
        right = "<alphabetical_sorted>\n" + "\n".join(truths[0]) + "\n</alphabetical_sorted>"
        server = Says(chat, right, "some words", "", "naïve 7")
        play = runner(opened, chat, server)
        batches.append(flat(await play.batch(opened.tasks, 2, lambda p, r, t: 8 * p + 2 * r + t, lambda: None)))
        asked.append(sorted(server.asked))
    assert asked[0] == asked[1]
    assert len(asked[0]) == 4 * 2 * 2
    assert len({rollout.reward for rollout in batches[0]}) > 1
    for ours, theirs in zip(*batches, strict=True):
        assert (ours.reward, ours.status, ours.metrics) == (theirs.reward, theirs.status, theirs.metrics)
        assert_same_segments(ours.segments, theirs.segments)
        assert_same_segments(segments_of(theirs.trace), theirs.segments)


async def test_cut_replies_and_full_contexts_count_as_truncated(chat):
    opened = open_tasks(settings("rlvr-alphabet-sort", "verifiers", 1, taskset=TASKSET))
    first = len(chat.opening(json.dumps([{"role": "user", "content": opened.tasks[0].data.info["user_turns"][0]}])))
    for room, limit in ((1024, 96), (first + 5, 5), (first - 1, None)):
        server = Says(chat, "cut", finish="length" if room == 1024 else "stop")
        play = runner(opened, chat, server, max_model_len=room)
        (rollout,) = flat(await play.batch(opened.tasks, 1, lambda p, r, t: t, lambda: None))
        assert (rollout.status, rollout.error) == (TRUNCATED, None)
        assert [asked[2] for asked in server.asked][:1] == ([] if limit is None else [limit])


# Hooks


async def test_a_hook_sees_every_reply_and_what_was_sampled_is_kept(chat):
    opened = open_tasks(settings("hook-quiz"))
    server = Says(chat, "a 7", "eight")
    batch = flat(await runner(opened, chat, server).batch(opened.tasks, 2, lambda p, r, t: r, lambda: None))
    assert [rollout.reward for rollout in batch] == [1.0, 0.0] * 4
    assert [rollout.metrics["rewritten"] for rollout in batch] == [1.0, 0.0] * 4
    for rollout, text in zip(batch, ["a 7", "eight"] * 4, strict=True):
        (segment,) = rollout.segments
        assert chat.tokenizer.decode(segment.tokens[segment.sampled]) == text + "<|im_end|>"
        assert segment.logprobs[0] == -0.125
        said = rollout.trace.nodes[-1].message.content
        assert said == ("blocked" if "7" in text else "eight")


async def test_a_hook_may_stop_the_conversation(chat):
    opened = open_tasks(settings("hook-quiz", taskset={"hook": "stop"}))
    batch = flat(await runner(opened, chat, Says(chat, "7", "8")).batch(opened.tasks, 2, lambda p, r, t: r, print))
    assert [(rollout.reward, rollout.status) for rollout in batch] == [(1.0, OK), (0.0, OK)] * 4
    assert all(rollout.completion_tokens > 0 for rollout in batch)


# Failures


@pytest.mark.parametrize(
    ("hook", "options", "reason"),
    [
        ("raise", {}, "the guard has no rule for this"),
        ("hang", {"timeout": 1.0}, "TimeoutError: the episode took longer than env.timeout = 1 s"),
    ],
)
async def test_failures_and_time_outs_are_failed_episodes_with_their_reason(chat, hook, options, reason):
    opened = open_tasks(settings("hook-quiz", taskset={"hook": hook}, count=2))
    play = runner(opened, chat, Says(chat, "7"), **options)
    for rollout in flat(await play.batch(opened.tasks, 1, lambda p, r, t: 0, lambda: None)):
        assert rollout.status == ERROR
        assert np.isnan(rollout.reward)
        assert reason in rollout.error
        assert any(reason.removeprefix("TimeoutError: ") in error.message for error in rollout.trace.errors)


async def test_a_time_limit_of_the_role_is_a_failed_episode(chat):
    limit = {"agent": {"timeout": {"rollout": 0.5}}}
    opened = open_tasks(settings("hook-quiz", taskset={"hook": "hang"}, count=1, options=limit))
    (rollout,) = flat(await runner(opened, chat, Says(chat, "7")).batch(opened.tasks, 1, lambda p, r, t: 0, print))
    assert (rollout.status, rollout.error) == (
        ERROR,
        "TimeoutError: agent took longer than the time limit of its task or role",
    )


async def test_an_error_of_the_server_ends_the_batch(chat):
    class Gone(Says):
        async def generate(self, prompt, seed, max_tokens):
            if seed:
                raise ServerError("http://server: connection failed")
            return await super().generate(prompt, seed, max_tokens)

    opened = open_tasks(settings("hook-quiz"))
    with pytest.raises(ServerError, match="connection failed"):
        await runner(opened, chat, Gone(chat, "8")).batch(opened.tasks, 2, lambda p, r, t: p, lambda: None)


async def test_a_template_that_cannot_render_ends_the_sweep(tmp_path):
    policy = shutil.copytree(POLICY, tmp_path / "policy")
    (policy / "chat_template.jinja").write_text("{% if messages|length > 1 %}{{ raise_exception('one!') }}{% endif %}?")
    opened = open_tasks(settings("rlvr-alphabet-sort", "verifiers", 1, taskset=TASKSET))
    chat = ChatFormat(policy)
    with pytest.raises(SnapshotError, match="cannot render a conversation with the roles user, assistant, user"):
        await runner(opened, chat, Says(chat, "a")).batch(opened.tasks, 1, lambda p, r, t: 0, lambda: None)


# No episode outlives its weights


async def test_a_request_after_the_end_of_its_episode_is_refused(chat):
    server = Says(chat, "a")
    opened = open_tasks(settings("hook-quiz", count=1))
    play = Play(runner(opened, chat, server), opened.tasks[0], lambda turn: turn)
    body = {"token_ids": [5, 6], "sampling_params": {"max_tokens": 4}}
    async with aiohttp.ClientSession(headers={SESSION: "one"}) as session:
        async with Gateway(server, 96, 1024) as gateway:
            route = gateway.url.removesuffix("/v1") + "/inference/v1/generate"
            gateway.admit("one", play)
            async with session.post(route, json=body) as answer:
                assert answer.status == 200
                choice = (await answer.json())["choices"][0]
            gateway.dismiss("one")
            async with session.post(route, json=body) as answer:
                assert answer.status == 410
        with pytest.raises(aiohttp.ClientError):
            await session.post(route, json=body)
    assert len(server.asked) == len(play.calls) == 1
    assert [item["token"] for item in choice["logprobs"]["content"]] == [f"token_id:{t}" for t in choice["token_ids"]]
    assert [item["logprob"] for item in choice["logprobs"]["content"]] == play.calls[0][2].logprobs.tolist()


async def test_a_batch_that_is_given_up_asks_for_nothing_more(chat):
    class Slow(Says):
        async def generate(self, prompt, seed, max_tokens):
            answer = await super().generate(prompt, seed, max_tokens)
            await asyncio.sleep(0.2)
            return answer

    server = Slow(chat, "a")
    opened = open_tasks(settings("rlvr-alphabet-sort", "verifiers", taskset=TASKSET))
    play = runner(opened, chat, server)
    batch = asyncio.create_task(play.batch(opened.tasks, 40, lambda p, r, t: 0, lambda: None))
    while len(server.asked) < 5:
        await asyncio.sleep(0.05)
    batch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await batch
    asked = len(server.asked)
    assert asked < 4 * 40 * 2
    await asyncio.sleep(0.6)
    assert len(server.asked) == asked


# Turns as sequences


def test_turns_that_go_on_are_one_sequence_and_others_begin_one():
    def said(*tokens):
        return Completion(np.array(tokens, np.int32), np.full(len(tokens), -0.5, np.float32), "stop")

    calls = [([1, 2], said(3)), ([1, 2, 3, 4], said(5, 6)), ([1, 9], said(7)), ([1, 2, 3, 4, 5, 6, 8], said(2))]
    first, second = segments_of_calls(calls)
    assert first.tokens.tolist() == [1, 2, 3, 4, 5, 6, 8, 2]
    assert first.sampled.tolist() == [False, False, True, False, True, True, False, True]
    assert (second.tokens.tolist(), second.sampled.tolist()) == ([1, 9, 7], [False, False, True])
    assert (len(first.logprobs), len(second.logprobs)) == (4, 1)
