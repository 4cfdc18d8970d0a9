"""The directions of the next slice, drawn by a thread of the worker while the present slice is measured.

A draw is a pure function of slice, axis and tensor, so the numbers do not depend on when it was made. Only one slice at
a time is drawn ahead: it takes the memory of two directions until it is loaded. Nothing here changes a weight.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch

from rlvr_landscape_plugin.directions import AXES, Axis
from rlvr_landscape_plugin.serving.worker.slice_tensors import Slice
from rlvr_landscape_plugin.serving.worker.threads import usable_cores

_NICENESS = 10
"""Of the thread that draws: measuring comes first where cores are scarce."""


class DrawnAhead:
    """The draws of one slice, begun; `take` gives the slice, `cancel` gives it up."""

    def __init__(self, key: str, names: Iterable[str], build: Callable[[], Slice]) -> None:
        """`key`: what the directions depend on. `names`: tensors that move, in the order in which they are needed.

        `build` makes the slice, in the thread.
        """
        self.key = key
        self.errors: list[str] = []
        """What could not be drawn ahead, and why; it was drawn when it was needed."""
        self.used = 0
        """Parts of directions (one axis of one tensor) that were ready, or nearly, when they were needed."""
        self._pool = ThreadPoolExecutor(1, "landscape-ahead", _begin)
        self._slice = self._pool.submit(build)
        self._parts = {(axis, name): self._pool.submit(self._draw, axis, name) for axis in AXES for name in names}
        self.count = len(self._parts)
        self._pool.shutdown(wait=False)

    def _draw(self, axis: Axis, name: str) -> torch.Tensor:
        return self._slice.result().draw(axis, name)

    def take(self) -> Slice | None:
        """The slice, whose `draw` takes each part that is ready once; None if it is not there, see `errors`."""
        if self._slice.cancel():
            return None
        try:
            built = self._slice.result()
        except Exception as error:  # whatever it was, the slice can be built again
            self.errors.append(f"{type(error).__name__}: {error}")
            return None
        return replace(built, draw=partial(self._part, built.draw))

    def _part(self, draw: Callable[[Axis, str], torch.Tensor], axis: Axis, name: str) -> torch.Tensor:
        begun: Future[torch.Tensor] | None = self._parts.pop((axis, name), None)
        if begun is not None and not begun.cancel():
            try:
                values = begun.result()
            except Exception as error:  # likewise
                self.errors.append(f"tensor {name!r} along {axis}: {type(error).__name__}: {error}")
            else:
                self.used += 1
                return values
        return draw(axis, name)

    @property
    def nbytes(self) -> int:
        """Bytes of the host's memory that the finished draws take up."""
        parts = [part for part in self._parts.values() if part.done() and not part.cancelled()]
        return sum(part.result().nbytes for part in parts if part.exception() is None)

    def cancel(self) -> None:
        """Begin nothing more, and free what was drawn."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._parts.clear()


def _begin() -> None:
    torch.set_num_threads(1)
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setaffinity(0, usable_cores())
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
