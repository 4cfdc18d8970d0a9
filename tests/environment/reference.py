"""A second implementation of Alphabet-sort, written from its definition and sharing no code with the package."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Iterator
from typing import Any


def reward(responses: list[str], truths: list[list[str]], power: int, per_turn: bool) -> float:
    """What an episode is worth."""
    turns = []
    for number, truth in enumerate(truths):
        said = responses[number] if number < len(responses) else ""
        tag = ["alphabetical_sorted", "combined_alphabetical_sorted"][min(number, 1)]
        best_so_far, score = -1.0, 0.0
        for match in re.finditer(rf"<{tag}>((?:.|\n)*?)</{tag}>", said):
            lines = [line.strip().lower() for line in match[1].split("\n")]
            mine, wanted = "\n".join(filter(None, lines)), "\n".join(name.lower() for name in truth)
            ratio = difflib.SequenceMatcher(None, mine, wanted).ratio() if mine else 0.0
            value = ratio**power if per_turn else ratio
            if value <= best_so_far:
                score = 0.0
                break
            best_so_far = score = value
        turns.append(score)
    mean = sum(turns) / len(turns)
    return mean if per_turn else mean**power


def surname(name: str) -> str:
    """From the second capital on."""
    capitals = [i for i, letter in enumerate(name) if letter.isupper() and i > 0]
    return name[capitals[0] :] if capitals else ""


def given_name(name: str) -> str:
    """Up to the second capital."""
    return name[: len(name) - len(surname(name))]


def episodes(
    lists: list[list[str]], seed: int, turns: tuple[int, int], names: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    """The stream of conversations over `lists`, cycled forever; `turns` and `names`: inclusive ranges."""
    rng = random.Random(seed)
    while True:
        for raw in lists:
            pool = list(dict.fromkeys(name.replace(" ", "") for name in raw))
            sizes = [rng.randint(*names) for _ in range(rng.randint(*turns))]
            if sum(sizes) > len(pool):
                continue
            word, key = ("FIRST", given_name) if rng.choice([True, False]) else ("LAST", surname)
            groups = [pool[sum(sizes[:k]) : sum(sizes[: k + 1])] for k in range(len(sizes))]
            user, truths = [], []
            for k, group in enumerate(groups):
                seen = [name for earlier in groups[:k] for name in earlier]
                ranked = sorted(seen + group, key=key)
                truths.append([name if name in seen or k == 0 else f"{name} // new name!" for name in ranked])
                shuffled = list(group)
                rng.shuffle(shuffled)
                listed = ", ".join(shuffled)
                if k == 0:
                    example = "\n".join(f"Name{j + 1}" for j in range(rng.randint(*names)))
                    user.append(
                        f"Sort these names in alphabetical order by {word} name: {listed}\n\nUse exactly this format:\n"
                        f"<alphabetical_sorted>\n{example}\n</alphabetical_sorted>"
                    )
                    continue
                shown = rng.randint(names[0], len(seen) + len(group))
                old = rng.randint(0, shown - 1)
                text = (
                    f"Now sort ALL of these names alphabetically by {word} name: {listed}\n\n"
                    "These are in addition to the prior list. Mark any NEW names (that weren't in the prior list) with "
                    "`// new name!` at the end."
                )
                if k > 1:
                    user.append(text + " Follow the same format as before.")
                    continue
                example = "\n".join(f"Name{j + 1}" + " // new name!" * (j >= old) for j in range(shown))
                user.append(
                    f"{text}\n\nUse exactly this format:\n"
                    f"<combined_alphabetical_sorted>\n{example}\n</combined_alphabetical_sorted>"
                )
            yield {"user_turns": user, "ground_truths": truths, "num_turns": len(sizes)}
