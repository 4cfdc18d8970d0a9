"""When to keep a snapshot: `"0-10, 20-150:10"` is 0, 1, …, 10, then 20, 30, …, 150.

Items are separated by commas: a step, a range `first-last` with both ends, or a range with a stride,
`first-last:stride`, whose last step must be hit exactly: a schedule never means less than it seems to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from rlvr_landscape_plugin.errors import ConfigurationError

LIMIT = 1_000_000
"""Steps in one schedule; more is a typing mistake."""

_ITEM = re.compile(r"(\d+)(?:\s*-\s*(\d+)(?:\s*:\s*(\d+))?)?", re.ASCII)
_EXAMPLE = "write it like '0-10, 20-150:10'"


def parse_schedule(text: str) -> tuple[int, ...]:
    """The steps that `text` names, ascending, each once.

    Raises `ConfigurationError` that quotes the item: no number, a range that runs backwards, a stride of 0 or one that
    misses the end of its range, more than `LIMIT` steps.
    """
    steps: set[int] = set()
    for item in (part.strip() for part in text.split(",")):
        steps.update(_range(item, text))
        if len(steps) > LIMIT:
            raise ConfigurationError(f"schedule {text!r} names more than {LIMIT:,} steps; give a larger stride")
    return tuple(sorted(steps))


def _range(item: str, text: str) -> range:
    match = _ITEM.fullmatch(item)
    if match is None:
        what = "is empty" if not item else "is neither a step nor a range of steps"
        raise ConfigurationError(f"schedule {text!r}: item {item!r} {what}; {_EXAMPLE}")
    first, last, stride = (None if group is None else int(group) for group in match.groups())
    assert first is not None
    if last is None:
        return range(first, first + 1)
    if last < first:
        raise ConfigurationError(f"schedule {text!r}: {item!r} runs backwards; write {last}-{first}")
    if stride == 0:
        raise ConfigurationError(f"schedule {text!r}: the stride of {item!r} is 0, expected 1 or more")
    stride = stride or 1
    if (last - first) % stride:
        nearest = last - (last - first) % stride
        raise ConfigurationError(
            f"schedule {text!r}: steps of {stride} from {first} miss {last}; "
            f"end the range at {nearest} or {nearest + stride}"
        )
    if (last - first) // stride >= LIMIT:
        raise ConfigurationError(f"schedule {text!r} names more than {LIMIT:,} steps; give a larger stride")
    return range(first, last + 1, stride)


def format_schedule(steps: Iterable[int]) -> str:
    """A schedule that `parse_schedule` turns back into exactly these steps; runs of three and more become ranges.

    Raises `ConfigurationError` for none at all or a negative step.
    """
    rest = sorted(set(steps))
    if not rest or rest[0] < 0:
        raise ConfigurationError(f"a schedule needs steps ≥ 0, got {rest[:5]}")
    items = []
    while rest:
        stride = rest[1] - rest[0] if len(rest) > 1 else 1
        length = next((i for i in range(1, len(rest)) if rest[i] - rest[i - 1] != stride), len(rest))
        if length < 3:
            items.append(str(rest[0]))
            rest = rest[1:]
            continue
        items.append(f"{rest[0]}-{rest[length - 1]}" + (f":{stride}" if stride > 1 else ""))
        rest = rest[length:]
    return ", ".join(items)
