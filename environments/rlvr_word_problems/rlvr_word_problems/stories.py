"""Makes the problems: a person, some things, and what happens to them, one sentence a step.

A problem depends on its settings, the seed and its number only. The order of the draws, the words and the sentences are
a contract: change nothing here without raising the package's major version.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Operation = Literal["add", "subtract", "boxes", "double", "share"]
OPERATIONS: tuple[Operation, ...] = ("add", "subtract", "boxes", "double", "share")

PEOPLE = (
    *("Ada", "Ben", "Clara", "Dana", "Elif", "Femi", "Grace", "Hugo", "Ines", "Jonas", "Kenji", "Lina"),
    *("Mira", "Noah", "Olga", "Pablo", "Quinn", "Rosa", "Samir", "Tala", "Uma", "Victor", "Wen", "Zoe"),
)
THINGS = (
    *("apples", "beads", "books", "buttons", "candles", "cards", "coins", "cups", "eggs", "flowers", "keys", "lemons"),
    *("marbles", "nails", "pears", "pencils", "plates", "rings", "seeds", "shells", "stamps", "stickers", "stones"),
    "tickets",
)
"""Each loses its last letter in the singular."""
MOST_BOXES, MOST_BAGS = 5, 6
TRIES = 1000
"""Stories told before a problem is given up."""


@dataclass(frozen=True)
class Problem:
    """One problem."""

    text: str
    """The story and the question."""
    answer: int
    """A whole number of at least 0."""
    working: str
    """A solution, one line of arithmetic a step, such as `14 - 11 = 3`. For supervised training only."""


@dataclass(frozen=True)
class Settings:
    """What may occur in a problem; `taskset.WordProblemsConfig` says what each means."""

    min_steps: int
    max_steps: int
    largest: int
    operations: tuple[Operation, ...]


@dataclass
class _Story:
    """A story while it is told."""

    rng: random.Random
    largest: int
    person: str
    friend: str
    things: str
    total: int
    working: list[str]

    def number(self, least: int, most: int) -> int:
        return self.rng.randint(least, most)

    def some(self, amount: int, *, more: bool = False) -> str:
        things = self.things[:-1] if amount == 1 else self.things
        return f"{amount} more {things}" if more else f"{amount} {things}"

    def change(self, arithmetic: str, total: int) -> None:
        self.working.append(f"{self.total} {arithmetic} = {total}")
        self.total = total


def make_problem(settings: Settings, seed: int, number: int) -> Problem:
    """The problem with this number (from 0) in the stream of this seed.

    No amount in it, and no intermediate result, exceeds `settings.largest` or falls below 0. A story that gets stuck
    before `settings.min_steps` (20 things of at most 20 can grow no more) is told anew. Raises ValueError where that
    happens `TRIES` times.
    """
    rng = random.Random(f"rlvr-word-problems/{seed}/{number}")
    for _ in range(TRIES):
        problem = _tell(settings, rng)
        if problem is not None:
            return problem
    raise ValueError(
        f"no story of {settings.min_steps} steps was found with largest = {settings.largest} and operations = "
        f"{list(settings.operations)}; lower min_steps, raise largest, or allow subtract"
    )


def _tell(settings: Settings, rng: random.Random) -> Problem | None:
    steps = rng.randint(settings.min_steps, settings.max_steps)
    person, friend = rng.sample(PEOPLE, 2)
    story = _Story(rng, settings.largest, person, friend, rng.choice(THINGS), rng.randint(1, settings.largest), [])
    sentences = [f"{person} has {story.some(story.total)}."]
    question = f"How many {story.things} does {person} have now?"
    for told in range(steps):
        fitting: list[Operation] = [name for name in settings.operations if _FITS[name](story, steps - told)]
        if not fitting:
            if told < settings.min_steps:
                return None
            break
        operation = rng.choice(fitting)
        if operation == "share":
            question = _share(story)
        else:
            sentences.append(_TELL[operation](story))
    return Problem(" ".join([*sentences, question]), story.total, "\n".join(story.working))


def _add(story: _Story) -> str:
    amount = story.number(1, story.largest - story.total)
    story.change(f"+ {amount}", story.total + amount)
    return story.rng.choice(
        (
            f"{story.friend} gives {story.person} {story.some(amount, more=True)}.",
            f"Then {story.person} buys {story.some(amount, more=True)}.",
            f"Later {story.person} finds {story.some(amount, more=True)}.",
        )
    )


def _subtract(story: _Story) -> str:
    amount = story.number(1, story.total)
    story.change(f"- {amount}", story.total - amount)
    return story.rng.choice(
        (
            f"{story.person} gives {story.some(amount)} to {story.friend}.",
            f"Then {story.person} loses {story.some(amount)}.",
            f"Later {story.person} sells {story.some(amount)}.",
        )
    )


def _boxes(story: _Story) -> str:
    room = story.largest - story.total
    boxes = story.number(2, min(MOST_BOXES, room))
    each = story.number(1, room // boxes)
    story.change(f"+ {boxes} * {each}", story.total + boxes * each)
    return f"{story.person} gets {boxes} boxes with {story.some(each)} in each box."


def _double(story: _Story) -> str:
    story.change("* 2", story.total * 2)
    return f"After a year {story.person} has twice as many {story.things}."


def _share(story: _Story) -> str:
    bags = story.rng.choice(_divisors(story.total))
    story.change(f"/ {bags}", story.total // bags)
    return (
        f"{story.person} puts all the {story.things} into {bags} bags, the same number in each bag. "
        f"How many {story.things} are in each bag?"
    )


def _divisors(total: int) -> Sequence[int]:
    return [bags for bags in range(2, MOST_BAGS + 1) if total % bags == 0]


_FITS: dict[Operation, Callable[[_Story, int], bool]] = {
    "add": lambda story, left: story.total < story.largest,
    "subtract": lambda story, left: story.total > 0,
    "boxes": lambda story, left: story.largest - story.total >= 2,
    "double": lambda story, left: 0 < 2 * story.total <= story.largest,
    # Sharing asks the question, so it can only be the last step.
    "share": lambda story, left: left == 1 and story.total > 0 and bool(_divisors(story.total)),
}
"""Operation → whether it fits a story with so many steps left."""
_TELL: dict[Operation, Callable[[_Story], str]] = {
    "add": _add,
    "subtract": _subtract,
    "boxes": _boxes,
    "double": _double,
}
"""Operation → changes the story and returns its sentence."""
