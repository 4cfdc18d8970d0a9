"""The verifier: what a reply is worth. Pure functions on text.

Change nothing here without raising the package's major version: published numbers depend on each line.
"""

from __future__ import annotations

import hashlib
import json
import re

ANSWER = re.compile(r"^[ \t]*####[ \t]*(.*?)[ \t]*$", re.MULTILINE)
"""A line that gives an answer, in the form that GSM8K made common."""
NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)")
"""An integer, with or without commas between the thousands."""
LONGEST = 32
"""Characters of the longest number that is read; no answer has so many."""


def final_answer(reply: str) -> int | None:
    """The integer of the reply's last line that begins with `####`; None if there is no such line or no such integer.

    Only the last line counts, so that listing guesses pays nothing. White space around the number, commas between its
    thousands and one full stop behind it are allowed; a unit or a fraction is not.
    """
    lines = ANSWER.findall(reply)
    if not lines:
        return None
    text = lines[-1].removesuffix(".").rstrip()
    if len(text) > LONGEST or not NUMBER.fullmatch(text):
        return None
    return int(text.replace(",", ""))


def is_correct(reply: str, answer: int) -> bool:
    """Whether the reply's final answer is exactly the right one."""
    return final_answer(reply) == answer


def random_reward(prompt: str, reply: str) -> float:
    """0 or 1 with equal chance, whatever the answer is worth (Shao et al. 2025, arXiv 2506.10947, γ = 0.5).

    One bit of the SHA-256 of prompt and reply: equal replies to a task are paid the same in every process, and replies
    that differ in one character are paid independently.
    """
    text = json.dumps(["rlvr-word-problems random reward", prompt, reply])
    return float(hashlib.sha256(text.encode()).digest()[0] & 1)
