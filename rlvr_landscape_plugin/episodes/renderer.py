"""The renderer that verifiers' training client uses here: the snapshot's own chat template, as in the chat loop.

verifiers finds it by its import path (`renderers.CustomRendererConfig`). The prompt of a later turn is the tokens that
the policy sampled, followed by what the template puts between them; nothing sampled is tokenized again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from renderers import BaseRendererConfig, CustomRendererConfig
from renderers.base import ParsedResponse, ParsedToolCall, RenderedTokens

from rlvr_landscape_plugin.episodes.chat import ChatFormat
from rlvr_landscape_plugin.episodes.tool_calls import split_tool_calls
from rlvr_landscape_plugin.errors import SnapshotError, TasksetError
from rlvr_landscape_plugin.files import JsonObject


class SnapshotRendererConfig(BaseRendererConfig):
    """Whose template it is, and how its policy writes tool calls."""

    name: Literal["snapshot"] = "snapshot"
    policy: str
    """Directory of the snapshot."""
    tool_parser: str | None = None
    """Format of tool calls (`tool_calls.check_tool_parser`); None for episodes without tools."""

    _internal_fields = frozenset({"policy", "tool_parser"})


def renderer_config(policy: Path, tool_parser: str | None) -> CustomRendererConfig:
    """What a `TrainClientConfig` takes, to make it use the renderer below."""
    path = f"{__name__}.{SnapshotRenderer.__name__}"
    given = {"import_path": path, "policy": str(policy), "tool_parser": tool_parser}
    return CustomRendererConfig.model_validate(given)


class SnapshotRenderer:
    """Chat messages → token ids and sampled tokens → a message, by one snapshot's tokenizer and template."""

    config_class = SnapshotRendererConfig
    supports_tools = True
    is_prefix_stable = False
    problems: ClassVar[dict[str, SnapshotError | TasksetError]] = {}
    """Policy → the first error that must end a sweep; verifiers would count it as a failed episode."""

    def __init__(self, tokenizer: object, config: SnapshotRendererConfig) -> None:
        self.config = config

    @cached_property
    def _chat(self) -> ChatFormat:
        return ChatFormat(Path(self.config.policy))

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self._chat.tokenizer.all_special_ids)

    @contextlib.contextmanager
    def _remembered(self) -> Iterator[None]:
        try:
            yield
        except (SnapshotError, TasksetError) as error:
            self.problems.setdefault(self.config.policy, error)
            raise

    def render_ids(
        self,
        messages: Sequence[JsonObject],
        *,
        tools: Sequence[JsonObject] | None = None,
        add_generation_prompt: bool = False,
    ) -> list[int]:
        """Token ids of a whole conversation, generation prompt included."""
        if not add_generation_prompt:
            raise NotImplementedError("a prompt without its generation prompt is for training on given replies")
        with self._remembered():
            if tools and self.config.tool_parser is None:
                raise TasksetError(
                    "the environment shows the policy tools where none were expected; set env.tool_parser to the "
                    "format in which this policy calls tools"
                )
            conversation = json.dumps([_plain(message) for message in messages])
            return list(self._chat.opening(conversation, json.dumps(list(tools)) if tools else ""))

    def render(
        self,
        messages: Sequence[JsonObject],
        *,
        tools: Sequence[JsonObject] | None = None,
        add_generation_prompt: bool = False,
    ) -> RenderedTokens:
        """As `render_ids`; the template does not say which token belongs to which message."""
        ids = self.render_ids(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        return RenderedTokens(token_ids=ids, message_indices=[-1] * len(ids), message_roles=_roles(messages))

    def bridge_to_next_turn(
        self,
        previous_prompt_ids: list[int],
        previous_completion_ids: list[int],
        new_messages: Sequence[JsonObject],
        *,
        tools: Sequence[JsonObject] | None = None,
    ) -> RenderedTokens:
        """The tokens that the policy saw and sampled, then `new_messages` and the generation prompt."""
        with self._remembered():
            added = self._chat.bridge(json.dumps([_plain(message) for message in new_messages]))
        # A cut reply ends in a special token only by chance of its last one, which is then its end as well.
        stopped = bool(previous_completion_ids) and previous_completion_ids[-1] in self._special
        ids = self._chat.joined(previous_prompt_ids, previous_completion_ids, added, stopped)
        return RenderedTokens(token_ids=ids, message_indices=[-1] * len(ids), message_roles=_roles(new_messages))

    def parse_response(
        self,
        token_ids: list[int],
        *,
        tools: Sequence[JsonObject] | None = None,
        prompt_ids: list[int] | None = None,
    ) -> ParsedResponse:
        """The reply as the environment reads it; tool calls are looked for where the policy was shown tools."""
        if not tools or self.config.tool_parser is None:
            return ParsedResponse(content=str(self._chat.tokenizer.decode(token_ids, skip_special_tokens=True)))
        content, calls = split_tool_calls(self._chat, self.config.tool_parser, token_ids)
        parsed = [ParsedToolCall(raw=call.arguments, name=call.name, arguments=call.arguments) for call in calls]
        return ParsedResponse(content=content, tool_calls=parsed)

    def get_stop_token_ids(self) -> list[int]:
        """None of its own: the server ends a turn where the policy's configuration says."""
        return []


def _roles(messages: Sequence[JsonObject]) -> list[str]:
    return [str(message.get("role") or "") for message in messages]


def _plain(message: JsonObject) -> JsonObject:
    """A message as chat templates take it: text, and the arguments of tool calls as objects."""
    content = message.get("content")
    if not isinstance(content, str | None):
        parts = [part for part in content if isinstance(part, dict)]
        if any(part.get("type") != "text" for part in parts):
            raise TasksetError(
                f"a {message.get('role')} message has parts that are not text; sweeps drive text-only tasksets"
            )
        content = "".join(str(part.get("text") or "") for part in parts)
    plain = message | {"content": content or ""}
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [call | {"function": _readable(call["function"])} for call in calls]
    return plain


def _readable(function: JsonObject) -> JsonObject:
    try:
        return function | {"arguments": json.loads(function.get("arguments") or "{}")}
    except ValueError:
        return function
