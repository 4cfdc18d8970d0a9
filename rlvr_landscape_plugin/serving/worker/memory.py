"""How a worker keeps the slice's two directions: resident, resident in 16 bits, or drawn again for each move.

Only speed depends on the choice between `float32` and `regenerated`, so it may follow from the free memory. `half`
changes what is measured, by the rounding of the directions, so only a person may choose it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch

from rlvr_landscape_plugin.serving.protocol import DIRECTIONS_MEMORY_VARIABLE

HALF = torch.bfloat16
"""float32's range, so that nothing overflows or vanishes: a trained update's elements (1e-8) are far below the smallest
float16 (6e-8). Each element is off by at most 0.4 % of itself, a random direction by 0.17 % of its length, its length
by about 1e-5; 16-bit weights are rounded by as much at every move."""
_DEVICE_MARGIN, _HOST_MARGIN = 0.9, 0.8
"""Share of the free memory that the slice may take."""
_UNLIMITED = 2**60
"""A control group without a limit reports one above this."""

Mode = Literal["float32", "half", "regenerated"]
Asked = Literal["auto", "float32", "half", "regenerated"]


@dataclass(frozen=True)
class Memory:
    """Where the directions are."""

    mode: Mode
    on_device: bool
    """Beside the weights, rather than on the host."""
    reason: str


def asked() -> Asked:
    """What the server's environment asks for; raises `ValueError` for anything that is no mode."""
    word = os.environ.get(DIRECTIONS_MEMORY_VARIABLE, "auto")
    if word not in ("auto", "float32", "half", "regenerated"):
        raise ValueError(
            f"{DIRECTIONS_MEMORY_VARIABLE} is {word!r} in the server's environment; it must be auto, float32, half or "
            "regenerated"
        )
    return cast(Asked, word)


def choose(wish: Asked, device: tuple[float, float] | None, host: tuple[float, float]) -> Memory:
    """The mode and the place; `device` (None: weights are on the host too) and `host` are bytes (needed, free)."""
    if wish == "regenerated":
        return Memory("regenerated", False, f"{DIRECTIONS_MEMORY_VARIABLE} asks for it")
    mode: Mode = "half" if wish == "half" else "float32"
    words = [] if wish == "auto" else [f"{DIRECTIONS_MEMORY_VARIABLE} asks for {wish}"]
    if device is not None:
        words.append(_words(device, "on the device"))
        if device[0] <= _DEVICE_MARGIN * device[1]:
            return Memory(mode, True, "; ".join(words))
    words.append(_words(host, "on the host"))
    if wish == "auto" and host[0] > _HOST_MARGIN * host[1]:
        return Memory("regenerated", False, "; ".join(words))
    return Memory(mode, False, "; ".join(words))


def too_little(needed: float, free: float) -> str:
    """Why so many more bytes are not taken on the host; empty if there is room."""
    return _words((needed, free), "on the host") if needed > _HOST_MARGIN * free else ""


def _words(memory: tuple[float, float], where: str) -> str:
    needed, free = (size / 2**30 for size in memory)
    return f"{needed:.3g} GiB needed of {free:.3g} GiB free {where}"


def free_on_host(root: Path = Path("/")) -> float:
    """Bytes that this process can still use without swapping; inf where the system does not report it.

    The machine's available memory, or what is left in the tightest memory control group of this process (v1 or v2),
    where the file cache that can be dropped counts as free.
    """
    free = math.inf
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = 1024.0 * int(line.split()[1])
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return free
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            free = min(free, *_left(root / "sys/fs/cgroup", group, "memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            free = min(free, *_left(root / "sys/fs/cgroup/memory", group, *names))
    return max(0.0, free)


def _left(mount: Path, group: str, limit: str, usage: str, cache: str) -> Iterator[float]:
    """What is left in a control group and in those that contain it, bytes; a container may see its own only, as the
    mount."""
    yield math.inf
    folder = mount / group.lstrip("/")
    for place in (folder, *folder.parents):
        if not place.is_relative_to(mount):
            return
        try:
            bound = int((place / limit).read_text())
            used = int((place / usage).read_text())
            stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            if bound < _UNLIMITED:
                yield bound - used + int(stat.get(cache, 0))
        except (OSError, ValueError):  # no such group here, or no limit ("max")
            continue
