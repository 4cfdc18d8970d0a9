"""Chat messages → token ids, by the policy's own tokenizer and chat template."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlvr_landscape_plugin.errors import SnapshotError

if TYPE_CHECKING:
    from rlvr_landscape_plugin.serving.client import Completion


_MARK = "RLVRLANDSCAPEMARK"


class ChatFormat:
    """Chat messages → token ids, by the policy's own tokenizer and chat template."""

    def __init__(self, policy: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(policy), local_files_only=True)
        except (OSError, ValueError) as error:
            raise SnapshotError(f"{policy} has no usable tokenizer: {error}") from error
        if not self.tokenizer.chat_template:
            raise SnapshotError(f"the tokenizer in {policy} has no chat template; the policy must be a chat model")
        self.opening = lru_cache(maxsize=65536)(self._opening)
        self.bridge = lru_cache(maxsize=65536)(self._bridge)

    def _opening(self, conversation: str) -> list[int]:
        """Token ids of a first prompt, generation prompt included. `conversation`: JSON of the chat messages."""
        text = self._render(json.loads(conversation))
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _bridge(self, messages: str) -> list[int]:
        """Token ids between a sampled reply and the next one: end of turn, `messages`, generation prompt."""
        text = self._render(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}, *json.loads(messages)]
        )
        _, found, rest = text.rpartition(_MARK)
        if not found:
            raise SnapshotError("the chat template drops assistant messages; multi-turn tasks need them")
        return self.tokenizer.encode(rest, add_special_tokens=False)

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def extend(self, prompt: list[int], completion: Completion, messages: str) -> list[int]:
        """The next prompt: what the model saw and said, token for token, then `messages`."""
        bridge = self.bridge(messages)
        sampled = completion.tokens.tolist()
        # The sampled end-of-turn token is the template's own; after a cut reply the template must close it.
        if completion.finish == "stop" and sampled and bridge and sampled[-1] == bridge[0]:
            bridge = bridge[1:]
        return [*prompt, *sampled, *bridge]

    def text(self, completion: Completion) -> str:
        """The reply as the environment reads it."""
        return self.tokenizer.decode(completion.tokens, skip_special_tokens=True)
