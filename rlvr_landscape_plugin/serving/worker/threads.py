"""Threads of a worker for work on whole tensors, one core each."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

_MOST_THREADS = 16

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


@functools.cache
def usable_cores() -> set[int]:
    """The cores that this process may use, and those of the front end, which waits during a move.

    Where the user bound the server's threads, only the cores named.
    """
    cores = os.sched_getaffinity(0)
    if os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto") == "auto":
        cores |= os.sched_getaffinity(os.getppid())
    return cores


@functools.cache
def workers() -> tuple[ThreadPoolExecutor, int]:
    """A thread for each of `usable_cores`."""
    cores = usable_cores()
    count = min(len(cores), _MOST_THREADS)

    def begin() -> None:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(1)

    return ThreadPoolExecutor(count, "landscape-move", begin), count


def in_threads(make: Callable[[_Given], _Made], items: Iterable[_Given]) -> Iterator[_Made]:
    """`make(item)` for each of `items`, in their order, computed by threads a few ahead of what is taken."""
    pool, threads = workers()
    begun: deque[Future[_Made]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(make, item))
            if len(begun) > threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()
