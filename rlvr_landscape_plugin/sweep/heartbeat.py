"""A sign of life: what a process of a sweep is doing, written every few seconds for `rlvr-landscape status`.

`OUTPUT/process_<i>of<n>.json` is replaced as a whole each time, from the first time that servers are needed: a sweep
that is finished already, or refused, leaves its directory as it is. It is no part of what is measured: nothing reads it
but `status.py`, and a sweep without it continues as usual.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rlvr_landscape_plugin.errors import LandscapeError, StoreError
from rlvr_landscape_plugin.files import JsonObject, replace_text

if TYPE_CHECKING:
    from rlvr_landscape_plugin.config import SweepConfig
    from rlvr_landscape_plugin.display import Display
    from rlvr_landscape_plugin.sweep.fleet import Fleet

EVERY = 5.0
"""Seconds between two signs of life."""
FIRST = 0.2
"""Seconds between two looks whether there is anything to report yet."""
MEASURING, FINISHED, FAILED, INTERRUPTED = "measuring", "finished", "failed", "interrupted"
"""States that a process can report."""


def process_file(share: tuple[int, int]) -> str:
    """File name of the i-th of n shards."""
    return "process_{}of{}.json".format(*share)


class Heartbeat:
    """Writes the file as long as it is open; an async context manager."""

    def __init__(self, config: SweepConfig, display: Display) -> None:
        self._path = Path(config.output) / process_file(config.share)
        self._display = display
        self.fleet: Fleet | None = None
        """The servers in use."""
        self.steps: list[int] = []
        """Steps of the snapshots that this process was asked to measure."""
        self._facts: JsonObject = {
            "shard": "{}/{}".format(*config.share),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.time(),
            "every": EVERY,
            "follows": None if config.follow is None else str(config.follow),
            "at_most": config.until_ci_width is not None,
        }
        self._refused = False
        self._end = threading.Event()
        # A thread, because reading finished points or preparing directions may keep the event loop busy for minutes.
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._end.set()
        self._thread.join()
        if not self._begun:
            return
        if error is None:
            self._write(FINISHED)
        elif isinstance(error, (asyncio.CancelledError, KeyboardInterrupt)):
            self._write(INTERRUPTED)
        else:
            self._write(FAILED, str(error) if isinstance(error, LandscapeError) else f"{type(error).__name__}: {error}")

    @property
    def _begun(self) -> bool:
        return self.fleet is None or self.fleet.needed

    def _beat(self) -> None:
        while not self._end.is_set():
            if self._begun:
                self._write(MEASURING)
            self._end.wait(EVERY if self._begun else FIRST)

    def _write(self, state: str, error: str = "") -> None:
        seen = self._display.state()
        content = self._facts | {
            "state": state,
            "error": error.partition("\n")[0],
            "written": time.time(),
            "steps": self.steps,
            "slice": seen.label,
            "points": seen.points,
            "episodes": seen.episodes,
            "failed_episodes": seen.failed,
            "rate": seen.rate,
            "seconds_left": seen.seconds_left,
            "waiting": seen.waiting,
            "servers": [] if self.fleet is None else self.fleet.report(),
            "server_failures": 0 if self.fleet is None else self.fleet.failures,
            "messages": list(self._display.messages),
        }
        try:
            replace_text(self._path, [json.dumps(content, indent=1, sort_keys=True)])
        except StoreError as refused:
            # A disk that is full stops the points, which say so themselves.
            if not self._refused:
                with contextlib.suppress(OSError):
                    self._display.say(f"`rlvr-landscape status` will not see this process: {refused}")
            self._refused = True
