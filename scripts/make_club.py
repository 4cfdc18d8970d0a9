"""Make configs/train/club.jsonl: lists of names, all of the same 24 people, for the laptop's training run.

    python scripts/make_club.py [FILE]

Given names and surnames are the built-in ones of rlvr-alphabet-sort; the seed is fixed, so the file is always the same.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from rlvr_alphabet_sort.names import given_names, surnames

SEED, PEOPLE, LISTS, LENGTH = 20261121, 24, 512, 12


def main() -> None:
    rng = random.Random(SEED)
    given, family = rng.sample(given_names(), PEOPLE), rng.sample(surnames(), PEOPLE)
    people = [first + last for first, last in zip(given, family, strict=True)]
    lines = [json.dumps({"names": rng.sample(people, LENGTH)}) for _ in range(LISTS)]
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "configs/train/club.jsonl")
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
