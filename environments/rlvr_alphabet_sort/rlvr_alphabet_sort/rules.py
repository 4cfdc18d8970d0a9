"""The verifier: what an answer is worth. Pure functions on text, the same for every source of names.

Change nothing here without raising the package's major version: published numbers depend on each line.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from itertools import pairwise

FIRST_TAG = "alphabetical_sorted"
LATER_TAG = "combined_alphabetical_sorted"
NEW_MARK = " // new name!"


def tag_of(turn: int) -> str:
    """The tag that the answer of a turn (0-based) stands in."""
    return FIRST_TAG if turn == 0 else LATER_TAG


def attempts(response: str, turn: int) -> list[str]:
    """The text of every tagged list in a response, in order."""
    tag = tag_of(turn)
    return re.findall(f"<{tag}>(.*?)</{tag}>", response, re.DOTALL)


def similarity(attempt: str, truth: Sequence[str]) -> float:
    """difflib's ratio between an attempted list and the true one, in [0, 1]; case and outer space do not count."""
    given = "\n".join(line.strip().lower() for line in attempt.split("\n") if line.strip())
    expected = "\n".join(line.strip().lower() for line in truth)
    if not given or not expected:
        return 0.0
    return difflib.SequenceMatcher(None, given, expected).ratio()


def turn_score(response: str, turn: int, truth: Sequence[str], power: int) -> float:
    """similarity**power of a turn's answer. Several attempts count only if each improves on the one before."""
    scores = [similarity(attempt, truth) ** power for attempt in attempts(response, turn)]
    if not scores or any(later <= earlier for earlier, later in pairwise(scores)):
        return 0.0
    return scores[-1]


def episode_reward(
    responses: Sequence[str], ground_truths: Sequence[Sequence[str]], similarity_power: int, power_per_turn: bool
) -> float:
    """Mean score over the turns, in [0, 1]; a turn without a response scores 0.

    `power_per_turn`: raise each turn's similarity to `similarity_power` and average; otherwise average the plain
    similarities and raise their mean.
    """
    if not ground_truths:
        return 0.0
    power = similarity_power if power_per_turn else 1
    total = sum(
        turn_score(responses[turn] if turn < len(responses) else "", turn, truth, power)
        for turn, truth in enumerate(ground_truths)
    )
    mean = total / len(ground_truths)
    return mean if power_per_turn else mean**similarity_power


def format_failures(responses: Sequence[str], turns: int) -> float:
    """Share of the turns whose response holds no tagged list, in [0, 1]."""
    if turns == 0:
        return 0.0
    found = sum(1 for turn in range(turns) if turn < len(responses) and attempts(responses[turn], turn))
    return 1.0 - found / turns


def random_reward(user_turns: Sequence[str], responses: Sequence[str]) -> float:
    """0 or 1 with equal chance, whatever the answers are worth (Shao et al. 2025, arXiv 2506.10947, γ = 0.5).

    A pure function of the conversation, one bit of its SHA-256: the same replies to the same task are paid the same in
    every process, and replies that differ in one character are paid independently.
    """
    text = json.dumps(["rlvr-alphabet-sort random reward", list(user_turns), list(responses)])
    return float(hashlib.sha256(text.encode()).digest()[0] & 1)
