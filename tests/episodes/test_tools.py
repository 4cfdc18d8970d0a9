"""Tool calls: how they are read from what a policy said, and whole episodes with tools beside verifiers' own."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from conftest import HELPERS, POLICY, ROOT

from rlvr_landscape_plugin.config import EnvConfig
from rlvr_landscape_plugin.episodes import OK, ChatFormat, EpisodeRunner, check_tool_parser, open_tasks
from rlvr_landscape_plugin.episodes.rollouts import segments_of
from rlvr_landscape_plugin.episodes.tool_calls import split_tool_calls
from rlvr_landscape_plugin.errors import ConfigurationError, SnapshotError
from rlvr_landscape_plugin.serving.client import Completion

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
needs_uv = pytest.mark.skipif(shutil.which("uv", path=PATH) is None, reason="the stock harness needs uv on the PATH")
CALL = '<tool_call>\n{"name": "shelf_weigh", "arguments": {"thing": "apple"}}\n</tool_call>'


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """tiny-sorter's tokenizer with tokens for tool calls, and a template that shows tools."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("policy") / "caller"
    shutil.copytree(POLICY, folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    tokenizer.save_pretrained(str(folder))
    template = (ROOT / "scripts" / "tool_chat_template.jinja").read_text().rstrip("\n")
    (folder / "chat_template.jinja").write_text(template)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2050}))
    return folder


@pytest.fixture(scope="module")
def chat(policy) -> ChatFormat:
    return ChatFormat(policy)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, "", [("shelf_weigh", '{"thing": "apple"}')]),
        ("Let me see. " + CALL + "\n" + CALL, "Let me see. ", [("shelf_weigh", '{"thing": "apple"}')] * 2),
        ('<tool_call>{"name": "a", "arguments": {}}', "", [("a", "{}")]),
        ('<tool_call>{"name": "a", "arguments": {}', None, []),
        ('<tool_call>{"arguments": {}}</tool_call>', None, []),
        ("<tool_call>[1]</tool_call>", None, []),
        ("no call", "no call", []),
    ],
)
def test_a_call_is_read_or_the_reply_is_text(chat, text, content, calls):
    tokens = chat.tokenizer.encode(text + "<|im_end|>", add_special_tokens=False)
    found, said = split_tool_calls(chat, "hermes", tokens)
    assert [(call.name, call.arguments) for call in said] == calls
    whole = chat.tokenizer.decode(tokens, skip_special_tokens=True)
    assert found == (whole if content is None else content)


def test_the_format_of_calls_is_that_of_the_template_or_named(chat, tmp_path):
    assert check_tool_parser(chat, None) == "hermes"
    assert check_tool_parser(chat, "glm") == "glm"
    with pytest.raises(ConfigurationError, match=r"env.tool_parser = 'morse' is not known; choose one of hermes"):
        check_tool_parser(chat, "morse")
    with pytest.raises(SnapshotError, match="does not show the policy its tools"):
        check_tool_parser(ChatFormat(POLICY), None)
    plain = shutil.copytree(POLICY, tmp_path / "plain")
    (plain / "chat_template.jinja").write_text("{{ tools }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(SnapshotError, match="does not say in a known format how a tool is called"):
        check_tool_parser(ChatFormat(plain), None)


class Script:
    """The same replies for both sides: a call, then an answer that depends on what the tool said."""

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat

    def tokens(self, prompt: list[int]) -> list[int]:
        text = str(self._chat.tokenizer.decode(prompt))
        said = CALL if "<|im_start|>tool" not in text else "It weighs " + ("5 kg." if "\n5 kg<" in text else "much.")
        return self._chat.tokenizer.encode(said + "<|im_end|>", add_special_tokens=False)

    async def generate(self, prompt, seed, max_tokens):
        ids = np.asarray(self.tokens(list(prompt)), np.int32)
        return Completion(ids, -ids.astype(np.float32) / 8, "stop")

    async def route(self, request: web.Request) -> web.Response:
        """vLLM's token-in, token-out route."""
        tokens = self.tokens((await request.json())["token_ids"])
        scored = [{"token": f"token_id:{token}", "logprob": -token / 8} for token in tokens]
        choice = {"index": 0, "token_ids": tokens, "finish_reason": "stop", "logprobs": {"content": scored}}
        return web.json_response({"request_id": "1", "choices": [choice]})


@needs_uv
@pytest.mark.slow
async def test_an_episode_with_tools_is_verifiers_own_token_by_token(policy, chat, monkeypatch):
    """Beside verifiers' training client with its default renderer, which renders the whole conversation each turn."""
    from renderers import DefaultRendererConfig
    from verifiers.v1.clients import ModelContext, TrainClientConfig
    from verifiers.v1.types import Sampling

    monkeypatch.syspath_prepend(str(HELPERS / "tasksets"))
    monkeypatch.setenv("PYTHONPATH", f"{HELPERS / 'tasksets'}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("PATH", PATH)
    opened = open_tasks(EnvConfig(id="tool-quiz", num_prompts=1, runtime="subprocess"))
    assert (opened.path, opened.harness, opened.has_tools) == ("verifiers", {"id": "null"}, True)
    script = Script(chat)
    options = {"path": "verifiers", "tool_parser": "hermes", "timeout": 200.0}
    runner = EpisodeRunner(opened.env, chat, script, 96, 1024, keep_traces=True, runtime=True, **options)
    ((ours,),) = await runner.batch(opened.tasks, 1, lambda p, r, t: t, lambda: None)
    assert (ours.status, ours.error, ours.reward) == (OK, None, 1.0)

    app = web.Application()
    app.router.add_post("/inference/v1/generate", script.route)
    serving = web.AppRunner(app)
    await serving.setup()
    await web.TCPSite(serving, "127.0.0.1", 0).start()
    client = TrainClientConfig(
        base_url=f"http://127.0.0.1:{serving.addresses[0][1]}/v1",
        api_key_var="NO_KEY",
        renderer=DefaultRendererConfig(tool_parser="qwen3"),
        renderer_model_name=str(policy),
        multiplex=1,
    )
    context = ModelContext(model="policy", client=client, sampling=Sampling(max_tokens=96))
    async with opened.env.serving():
        episode = await opened.env.run_episode(opened.tasks[0], context)
    await serving.cleanup()
    (theirs,) = episode.traces
    assert theirs.reward == 1.0
    for found in (ours.segments, segments_of(ours.trace)):
        for one, other in zip(found, segments_of(theirs), strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.sampled.tolist() == other.sampled.tolist()
            assert one.logprobs.tolist() == other.logprobs.tolist()
    assert [node.message.role for node in theirs.nodes] == ["user", "assistant", "tool", "assistant"]
    assert [node.message.content for node in ours.trace.nodes] == [node.message.content for node in theirs.nodes]
