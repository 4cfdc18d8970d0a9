"""Where the name lists come from: the built-in names, a Hugging Face dataset, or a JSONL file.

A source is asked for one pass after another; a pass is a list of name lists. Files give the same lists on every pass
(the published environment cycles its dataset); the built-in names give new lists on every pass, without end.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

HF_DATASET = "kalomaze/alphabetic-arxiv-authors-it1"
LISTS_PER_PASS = 1024
NAMES_PER_LIST = 32
"""Length of a built-in list, unless a conversation can need more."""

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


def builtin_source(seed: int, longest: int = 0) -> Pass:
    """Full names drawn from the built-in lists; each pass and each seed has its own.

    `longest`: names that the longest conversation can ask for. Its list holds spare names, because one that is drawn
    twice counts once.
    """
    length = max(NAMES_PER_LIST, longest + longest // 8 + 8)

    def lists(number: int) -> list[list[str]]:
        rng = random.Random(f"rlvr-alphabet-sort/{seed}/{number}")
        given, family = given_names(), surnames()
        return [[rng.choice(given) + rng.choice(family) for _ in range(length)] for _ in range(LISTS_PER_PASS)]

    return lists


def check_source(source: str) -> None:
    """Raise ValueError, saying what to do, for a source that cannot be opened here. Reads nothing."""
    if source == "builtin":
        return
    if source == "hf":
        if find_spec("datasets") is None:
            raise ValueError("source = 'hf' needs the package datasets: pip install 'rlvr-alphabet-sort[hf]'")
        return
    if not Path(source).expanduser().is_file():
        raise ValueError(
            f"source = {source!r} is no file; set source to 'builtin', 'hf', or the path of a JSONL file with one "
            'object {"names": [...]} per line'
        )


def jsonl_source(path: Path) -> Pass:
    """A file with one `{"names": [...]}` per line, the same on every pass.

    Raises ValueError naming file and line for anything else.
    """
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
    from datasets import load_dataset

    lists = [entry["names"] for entry in load_dataset(HF_DATASET, split="train")]  # pyright: ignore[reportCallIssue,reportArgumentType]
    return lambda number: lists


def open_source(source: str, seed: int, longest: int = 0) -> Pass:
    """The source that the option `source` names; `longest` as in `builtin_source`."""
    check_source(source)
    if source == "builtin":
        return builtin_source(seed, longest)
    if source == "hf":
        return hf_source()
    return jsonl_source(Path(source).expanduser())
