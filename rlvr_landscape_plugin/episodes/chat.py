"""Chat messages → token ids, by the policy's own tokenizer and chat template.

An incomplete tokenizer, or a template that cannot render a conversation, is an error of the snapshot: it is raised at
once and never counted as a failed episode.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from rlvr_landscape_plugin.errors import SnapshotError
from rlvr_landscape_plugin.files import JsonObject

if TYPE_CHECKING:
    import verifiers.v1 as vf
    from transformers import PreTrainedTokenizerBase

    from rlvr_landscape_plugin.serving.client import Completion

_MARK = "RLVRLANDSCAPEMARK"
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "vocab.bpe", "merges.txt", "bpe.codes", "tokenizer.model", "spiece.model", "tekken.json"),
    *("sentencepiece.bpe.model", "tiktoken.model", "qwen.tiktoken", "chat_template.jinja", "chat_template.json"),
)
"""Files from which transformers builds a tokenizer and its chat template."""
_SAMPLE = "Sort <b>3 naïve names</b>:\n\n\tÅsa, 李, O'Neil 🙂 — 12,345.67"
"""A text with letters, digits, spaces, tags and characters that many tokenizers split into bytes."""


class ChatFormat:
    """Chat messages → token ids, by the policy's own tokenizer and chat template."""

    def __init__(self, policy: Path) -> None:
        """`policy`: a snapshot directory. Raises `SnapshotError` without a whole tokenizer and a chat template."""
        self.policy = policy
        """The snapshot directory."""
        self.tokenizer = load_tokenizer(policy)
        if not self.tokenizer.chat_template:
            raise SnapshotError(f"the tokenizer in {policy} has no chat template; the policy must be a chat model")
        self._vocabulary = _vocabulary_size(policy)
        self.opening = lru_cache(maxsize=65536)(self._opening)
        self.bridge = lru_cache(maxsize=65536)(self._bridge)

    def _opening(self, conversation: str, tools: str = "") -> list[int]:
        """Token ids of a first prompt, generation prompt included.

        `conversation`: JSON of the chat messages. `tools`: JSON of the tools that the prompt shall describe, if any.
        """
        return self._encode(self._render(json.loads(conversation), json.loads(tools) if tools else None))

    def _bridge(self, messages: str) -> list[int]:
        """Token ids between a sampled reply and the next one: end of turn, `messages`, generation prompt."""
        text = self._render(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}, *json.loads(messages)]
        )
        _, found, rest = text.rpartition(_MARK)
        if not found:
            raise SnapshotError(
                f"the chat template in {self.policy} drops assistant messages, which tasks of several turns need; "
                "give the snapshot a template that keeps them, or measure a taskset of one turn"
            )
        return self._encode(rest)

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if not ids:
            raise SnapshotError(
                f"the tokenizer in {self.policy} makes no token of a prompt of {len(text)} characters; "
                "its files or its chat template are not those of this policy"
            )
        if self._vocabulary is not None and max(ids) >= self._vocabulary:
            raise SnapshotError(
                f"the tokenizer in {self.policy} gives token id {max(ids)}, the policy's vocab_size in config.json is "
                f"{self._vocabulary}; the tokenizer is another policy's"
            )
        return ids

    def shows_tools(self) -> bool:
        """Whether the chat template tells the policy which tools it has."""
        asked = [{"role": "user", "content": "?"}]
        return _MARK in self._render(asked, [_tool(_MARK)])

    def _render(self, messages: list[JsonObject], tools: Sequence[JsonObject] | None = None) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=None if tools is None else [dict(tool) for tool in tools],
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # a template is a program of the snapshot's author, and Jinja's errors are many
            roles = ", ".join(message["role"] for message in messages)
            raise SnapshotError(
                f"the chat template in {self.policy} cannot render a conversation with the roles {roles}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return str(text)

    def extend(self, prompt: list[int], completion: Completion, messages: str) -> list[int]:
        """The next prompt: the tokens that the model saw and sampled, then `messages`."""
        return self.joined(prompt, completion.tokens.tolist(), self.bridge(messages), completion.finish == "stop")

    @staticmethod
    def joined(prompt: Sequence[int], sampled: Sequence[int], bridge: Sequence[int], stopped: bool) -> list[int]:
        """A prompt, what was sampled after it, and what the template puts next. `stopped`: the reply was not cut."""
        # The sampled end-of-turn token is the template's own; after a cut reply the template must close it.
        if stopped and sampled and bridge and sampled[-1] == bridge[0]:
            bridge = bridge[1:]
        return [*prompt, *sampled, *bridge]

    def text(self, completion: Completion) -> str:
        """The reply as the environment reads it."""
        return str(self.tokenizer.decode(completion.tokens, skip_special_tokens=True))


def _tool(name: str) -> JsonObject:
    """A tool without parameters, as chat templates take it."""
    parameters = {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


def load_tokenizer(policy: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a snapshot directory. Raises `SnapshotError` where its files are missing or not whole."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(policy), local_files_only=True)
    except Exception as error:  # the tokenizers library raises a bare Exception for a damaged file
        raise SnapshotError(f"{policy} has no usable tokenizer, or a broken config.json: {error}") from error
    # Where the vocabulary is missing, transformers builds an empty tokenizer of the model's type without a message.
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()):
        raise SnapshotError(
            f"{policy} has no tokenizer with a vocabulary (such as tokenizer.json); copy the tokenizer files of the "
            "policy it was trained from into it"
        )
    return tokenizer


def _tokenizer_files(policy: Path) -> dict[str, Path]:
    return {name: policy / name for name in _FILES if (policy / name).is_file()}


def _vocabulary_size(policy: Path) -> int | None:
    """`vocab_size` of config.json; None where it does not say."""
    try:
        config = json.loads((policy / "config.json").read_text())
    except (OSError, ValueError):
        return None  # a snapshot is checked elsewhere
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return size if isinstance(size, int) else None


def check_chat(policies: Sequence[Path], tasks: Sequence[vf.Task]) -> None:
    """Raise `SnapshotError` for what would end a sweep later: before a server is started.

    The first policy has a whole tokenizer and a chat template that renders the prompt of every task, and the others
    tokenize and render alike.
    """
    chat = ChatFormat(policies[0])
    for conversation in map(first_messages, tasks):
        if conversation is not None:
            chat.opening(conversation)
    check_same_chat(policies)


def first_messages(task: vf.Task) -> str | None:
    """The conversation that a task brings, as `ChatFormat.opening` takes it; None where the environment opens it."""
    if task.data.prompt is None:
        return None
    system = [] if task.data.system_prompt is None else [{"role": "system", "content": task.data.system_prompt}]
    prompt = task.data.prompt
    said = [("user", prompt)] if isinstance(prompt, str) else [(message.role, message.content) for message in prompt]
    return json.dumps([*system, *({"role": role, "content": content} for role, content in said)])


def check_same_chat(policies: Sequence[Path]) -> None:
    """Raise `SnapshotError` where a snapshot would tokenize or render a conversation differently from the first.

    All snapshots of a sweep get their prompts by the first one's tokenizer and template, so that only the weights
    differ. A later snapshot without tokenizer files has nothing that could differ.
    """
    first, *others = policies
    contents = {name: path.read_bytes() for name, path in _tokenizer_files(first).items()}
    facts: Mapping[str, object] | None = None
    for policy in others:
        files = _tokenizer_files(policy)
        if not files or {name: path.read_bytes() for name, path in files.items()} == contents:
            continue
        facts = facts or _chat_facts(first)
        differing = [name for name, value in _chat_facts(policy).items() if value != facts[name]]
        if differing:
            raise SnapshotError(
                f"{policy} differs from the first snapshot, {first}, in its {' and '.join(differing)}; a sweep asks "
                "all snapshots with one tokenizer and chat template. Give them the same files, or sweep them apart"
            )


def _chat_facts(policy: Path) -> dict[str, object]:
    """What decides about the tokens of a conversation, comparable between snapshots."""
    tokenizer = load_tokenizer(policy)
    facts: dict[str, object] = {
        "vocabulary": tokenizer.get_vocab(),
        "special tokens": {**tokenizer.special_tokens_map, "ids": tokenizer.all_special_ids},
        "chat template": tokenizer.chat_template,
        "tokenization": tokenizer.encode(_SAMPLE, add_special_tokens=False),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # How a caller pads or truncates does not belong to the policy.
        rules = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
        rules["model"].pop("vocab", None)  # compared above
        facts["tokenization"] = rules
    return facts
