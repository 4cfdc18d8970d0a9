"""The policy that ships with the package: small, whole, and token-exact over turns."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rlvr_alphabet_sort.rules import tag_of
from rlvr_alphabet_sort.taskset import AlphabetSortConfig, AlphabetSortTaskset

import rlvr_landscape_plugin

POLICY = Path(rlvr_landscape_plugin.__file__).parent / "policies" / "tiny_sorter"
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_tiny_sorter.py"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """As every loader opens it."""
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(POLICY, local_files_only=True)


@pytest.fixture(scope="module")
def conversations() -> list[dict[str, Any]]:
    """Two-turn tasks."""
    config = AlphabetSortConfig(id="rlvr-alphabet-sort", min_turns=2, max_turns=2, seed=2001)
    return [task.data.info for task in itertools.islice(AlphabetSortTaskset(config), 200)]


def test_weights_are_small_float32_and_tied() -> None:
    path = POLICY / "model.safetensors"
    assert path.stat().st_size <= 8_000_000
    assert path.stat().st_mode & 0o044 == 0o044
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert {entry["dtype"] for entry in tensors.values()} == {"F32"}
    assert "lm_head.weight" not in tensors
    config = json.loads((POLICY / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] >= 1024


def test_a_conversation_extends_the_tokens_of_its_prompt(tokenizer: Any, conversations: list[dict[str, Any]]) -> None:
    for info in conversations:
        truth = info["ground_truths"][0]
        reply = f"<{tag_of(0)}>\n" + "\n".join(truth) + f"\n</{tag_of(0)}>"
        opening = [{"role": "user", "content": info["user_turns"][0]}]
        later = [
            *opening,
            {"role": "assistant", "content": reply},
            {"role": "user", "content": info["user_turns"][1]},
        ]
        first = tokenizer.apply_chat_template(opening, add_generation_prompt=True)["input_ids"]
        second = tokenizer.apply_chat_template(later, add_generation_prompt=True)["input_ids"]
        said = tokenizer.encode(f"{reply}<|im_end|>")
        between = tokenizer.encode(f"\n<|im_start|>user\n{info['user_turns'][1]}<|im_end|>\n<|im_start|>assistant\n")
        assert second == first + said + between
        assert tokenizer.decode(said) == f"{reply}<|im_end|>"


def test_tokens_do_not_depend_on_the_loader(tokenizer: Any, conversations: list[dict[str, Any]]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    file = tokenizers.Tokenizer.from_file(str(POLICY / "tokenizer.json"))
    for info in conversations:
        for text in info["user_turns"]:
            assert tokenizer.encode(text) == file.encode(text).ids
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_reply_ends_with_the_end_of_turn(tokenizer: Any) -> None:
    generation = json.loads((POLICY / "generation_config.json").read_text())
    assert tokenizer.convert_ids_to_tokens(generation["eos_token_id"]) == "<|im_end|>"
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_card_states_reward_error_and_command() -> None:
    card = (POLICY / "README.md").read_text()
    assert "vf-eval rlvr-alphabet-sort" in card
    assert "±" in card
    assert "license: apache-2.0" in card


def test_the_script_shows_its_usage_at_once() -> None:
    started = time.monotonic()
    shown = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True).stdout
    assert time.monotonic() - started < 2
    assert all(option in shown for option in ("--steps", "--out", "--seed"))
