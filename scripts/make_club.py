"""Make lists of names, all of the same 24 people, for the laptop's training runs.

    python scripts/make_club.py [FILE]             # configs/train/club.jsonl: the people of the training tasks
    python scripts/make_club.py --others [FILE]    # configs/study/other_club.jsonl: 24 others, with other names

Given names and surnames are the built-in ones of rlvr-alphabet-sort; the seeds are fixed, so the files are always the
same.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from rlvr_alphabet_sort.names import given_names, surnames

SEED, OTHERS_SEED, PEOPLE, LISTS, LENGTH = 20261121, 20261129, 24, 512, 12


def draw(rng: random.Random, without: tuple[set[str], set[str]]) -> tuple[list[str], list[str]]:
    """Given names and surnames of a club, none of them in `without`."""
    given, family = (
        [name for name in names if name not in taken]
        for names, taken in zip((given_names(), surnames()), without, strict=True)
    )
    return rng.sample(given, PEOPLE), rng.sample(family, PEOPLE)


def lines(others: bool) -> list[str]:
    """The file's lines."""
    rng = random.Random(SEED)
    given, family = draw(rng, (set(), set()))
    if others:
        rng = random.Random(OTHERS_SEED)
        given, family = draw(rng, (set(given), set(family)))
    people = [first + last for first, last in zip(given, family, strict=True)]
    return [json.dumps({"names": rng.sample(people, LENGTH)}) for _ in range(LISTS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--others", action="store_true", help="24 other people")
    given = parser.parse_args()
    target = given.file or Path("configs/study/other_club.jsonl" if given.others else "configs/train/club.jsonl")
    target.write_text("\n".join(lines(given.others)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
