"""Where the name lists come from: the built-in names, a Hugging Face dataset, or a JSONL file.

A source is asked for one pass after another; a pass is a list of name lists.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

HF_DATASET = "kalomaze/alphabetic-arxiv-authors-it1"
LISTS_PER_PASS = 1024
NAMES_PER_LIST = 32

Pass = Callable[[int], Sequence[Sequence[str]]]
"""Number of the pass → its name lists."""


@cache
def _builtin(part: str) -> tuple[str, ...]:
    text = files("rlvr_alphabet_sort").joinpath("data", part).read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


def given_names() -> tuple[str, ...]:
    """The built-in given names: capitalised ASCII words."""
    return _builtin("given_names.txt")


def surnames() -> tuple[str, ...]:
    """The built-in surnames: capitalised ASCII words."""
    return _builtin("surnames.txt")


def builtin_source(seed: int) -> Pass:
    """Full names drawn from the built-in lists; each pass and each seed has its own."""

    def lists(number: int) -> list[list[str]]:
        rng = random.Random(f"rlvr-alphabet-sort/{seed}/{number}")
        given, family = given_names(), surnames()
        return [
            [rng.choice(given) + rng.choice(family) for _ in range(NAMES_PER_LIST)] for _ in range(LISTS_PER_PASS)
        ]

    return lists


def jsonl_source(path: Path) -> Pass:
    """A file with one `{"names": [...]}` per line, the same on every pass.

    Raises ValueError naming file and line for anything else.
    """
    if not path.is_file():
        raise ValueError(
            f"source {str(path)!r} is not a file; give 'builtin', 'hf', or the path of a JSONL file of "
            '{"names": [...]} objects'
        )
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            names = json.loads(line)["names"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path}, line {number}: expected an object {{"names": [...]}}: {error!r}') from error
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"{path}, line {number}: 'names' must be a list of non-empty strings")
        found.append(names)
    if not found:
        raise ValueError(f"{path} holds no name lists")
    return lambda number: found


def hf_source() -> Pass:
    """The published environment's dataset; needs the extra `hf` and a way to the hub."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ValueError("source 'hf' needs the package datasets: pip install rlvr-alphabet-sort[hf]") from error
    lists = [entry["names"] for entry in load_dataset(HF_DATASET, split="train")]
    return lambda number: lists


def open_source(source: str, seed: int) -> Pass:
    """The source that the option `source` names."""
    if source == "builtin":
        return builtin_source(seed)
    if source == "hf":
        return hf_source()
    return jsonl_source(Path(source).expanduser())
