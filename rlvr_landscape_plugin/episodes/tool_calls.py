"""Tool calls in what a policy said: which format its chat template teaches, and reading a call out of the tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlvr_landscape_plugin.errors import ConfigurationError, SnapshotError

if TYPE_CHECKING:
    from rlvr_landscape_plugin.episodes.chat import ChatFormat

HERMES = "hermes"
"""JSON between <tool_call> and </tool_call>, as Hermes, Qwen2.5 and Qwen3 write it; read from the text."""
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


@dataclass(frozen=True)
class SaidCall:
    """One call as the policy wrote it."""

    name: str
    arguments: str
    """JSON of an object."""


def check_tool_parser(chat: ChatFormat, name: str | None) -> str:
    """The format in which this policy writes tool calls: `name`, or what its chat template shows.

    Raises `SnapshotError` for a template that shows no tools or no known format, `ConfigurationError` for an unknown
    name.
    """
    from renderers.parsers import TOOL_PARSERS

    known = (HERMES, *sorted(TOOL_PARSERS))
    if name is not None and name not in known:
        raise ConfigurationError(f"env.tool_parser = {name!r} is not known; choose one of {', '.join(known)}")
    if not chat.shows_tools():
        raise SnapshotError(
            f"the chat template in {chat.policy} does not show the policy its tools, so it could never call one; give "
            "the snapshot a template that renders `tools`, or measure a taskset without tools"
        )
    if name is not None:
        return name
    template = str(chat.tokenizer.chat_template)
    if "<function=" in template:
        return "qwen3.5"
    if "<tool_call>" in template:
        return HERMES
    raise SnapshotError(
        f"the chat template in {chat.policy} does not say in a known format how a tool is called; set env.tool_parser "
        f"to one of {', '.join(known)}"
    )


def split_tool_calls(chat: ChatFormat, parser: str, tokens: Sequence[int]) -> tuple[str, list[SaidCall]]:
    """The text before the first call, and the calls; a reply with a call that cannot be read is text only.

    `tokens`: what the policy sampled in one turn. As vLLM's parsers do, which `vf-eval` reads replies by.
    """
    whole = str(chat.tokenizer.decode(list(tokens), skip_special_tokens=True))
    if parser == HERMES:
        # Where <tool_call> is a special token, it is in this text only.
        text = str(chat.tokenizer.decode(_without_end(chat, tokens), skip_special_tokens=False))
        found = _CALL.findall(text)
        try:
            calls = [_said(json.loads(block)) for block in found]
        except (ValueError, TypeError, KeyError):
            return whole, []
        return (text[: text.find("<tool_call>")] if calls else whole), calls
    from renderers.base import ToolCallParseStatus
    from renderers.parsers import get_tool_parser

    rest, parsed = get_tool_parser(parser, chat.tokenizer).extract(_without_end(chat, tokens))
    if not parsed or any(call.status != ToolCallParseStatus.OK or not call.name for call in parsed):
        return whole, []
    return str(chat.tokenizer.decode(rest, skip_special_tokens=True)), [
        _said({"name": call.name, "arguments": call.arguments or {}}) for call in parsed
    ]


def _without_end(chat: ChatFormat, tokens: Sequence[int]) -> list[int]:
    ids = list(tokens)
    return ids[:-1] if ids and ids[-1] == chat.tokenizer.eos_token_id else ids


def _said(call: dict[str, object]) -> SaidCall:
    arguments = call["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return SaidCall(str(call["name"]), text)
