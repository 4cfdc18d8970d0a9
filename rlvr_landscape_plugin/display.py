"""Progress on stderr, of a sweep and of training. Nothing here knows of servers or files.

On a terminal: a bar and one line below it, both within 80 columns, and messages above. Elsewhere every message is a
line of its own that begins with the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import ProgressColumn, TaskID

WAITING_LINES = 30.0
"""Seconds between two lines about the same wait where stderr is no terminal."""


def duration(seconds: float) -> str:
    """A time span as `4 s`, `3 min 20 s`, `2 h 05 min` or `3 d 04 h`."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def per_second(rate: float) -> str:
    """A rate as `0.042`, `4.2` or `1,490`."""
    return f"{rate:.2g}" if rate < 1 else f"{rate:.1f}" if rate < 10 else f"{rate:,.0f}"


def size(count: float) -> str:
    """A number of bytes as `1.2 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


class ProgressDisplay:
    """A bar on a terminal, and lines above it; lines only where stderr is no terminal. Use as a context manager."""

    def __init__(self, *columns: str) -> None:
        """`columns`: `bar`, `elapsed`, or a text with fields of the task, as `{task.completed:.0f}`."""
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        made: list[ProgressColumn] = []
        for column in columns:
            if column == "bar":
                made.append(BarColumn(bar_width=None))
            elif column == "elapsed":
                made.append(TimeElapsedColumn())
            else:
                made.append(TextColumn(column))
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(*made, console=self._console, expand=True)
        self._task: TaskID | None = None
        self._note = ""
        self._waits: dict[str, float] = {}
        """What is waited for → since when (monotonic seconds)."""
        self._live = Live(console=self._console, get_renderable=self._shown, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def _shown(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        now = time.monotonic()
        waits = [f"{what}: {duration(now - since)}" for what, since in self._waits.items()]
        below = "  ".join(waits) or self._note
        lines: list[RenderableType] = [] if self._task is None else [self._bar]
        return Group(*lines, *([Text(below, no_wrap=True, overflow="ellipsis")] if below else []))

    def say(self, text: str) -> None:
        """One line above the bar; it begins with the time where stderr is no terminal."""
        if not self._console.is_terminal:
            text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}"
        self._console.print(text, markup=False, soft_wrap=True)

    @contextlib.asynccontextmanager
    async def waiting(self, what: str) -> AsyncIterator[None]:
        """Show how long the block has taken so far; `what` it waits for."""
        self._waits[what] = time.monotonic()
        lines = None if self._console.is_terminal else asyncio.create_task(self._say_waiting(what))
        try:
            yield
        finally:
            if lines is not None:
                lines.cancel()
            del self._waits[what]

    async def _say_waiting(self, what: str) -> None:
        while True:
            await asyncio.sleep(WAITING_LINES)
            self.say(f"{what}: {duration(time.monotonic() - self._waits[what])} so far")

    def _update(self, completed: float | None = None, total: float | None = None, **fields: Any) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=completed, total=total, **fields)


class Rate:
    """Events per second over the last minutes."""

    WINDOW = 300.0
    """Seconds that count."""

    def __init__(self, clock: Callable[[], float] = lambda: time.monotonic()) -> None:
        self._clock, self._count = clock, 0
        self._samples: deque[tuple[float, int]] = deque([(clock(), 0)])

    def event(self) -> None:
        """One more event."""
        self._count += 1
        now = self._clock()
        if now - self._samples[-1][0] >= 1.0:
            self._samples.append((now, self._count))
        while len(self._samples) > 2 and now - self._samples[1][0] >= self.WINDOW:
            self._samples.popleft()

    @property
    def per_second(self) -> float:
        """0 before anything happened."""
        began, before = self._samples[0]
        return (self._count - before) / max(self._clock() - began, 1e-9)


@dataclass(frozen=True)
class State:
    """How far a sweep is, as far as this process knows."""

    label: str
    """The slice that is measured; empty before the first."""
    points: tuple[int, int]
    """Of that slice: finished, and all."""
    episodes: int
    """Played so far by this process."""
    rate: float
    """Episodes per second over the last minutes."""
    seconds_left: float | None
    """Until this process has measured everything; None before there is a rate."""
    failed: int
    """Episodes that failed at the points measured so far."""
    waiting: tuple[str, ...]
    """What is waited for."""


class Display(ProgressDisplay):
    """Progress of a sweep: one line per point where stderr is no terminal."""

    def __init__(self) -> None:
        texts = "{task.fields[points]} points", "{task.fields[rate]}"
        super().__init__("bar", *texts, "elapsed", "ETA {task.fields[eta]}")
        self._label, self._points = "", (0, 0)
        self._later = self._slice = 0
        self._per_point = 0
        self._all = (0, 0)
        self._at_least = False
        self._rate: Rate | None = None
        self._episodes = self._failed = 0
        self.messages: deque[tuple[float, str]] = deque(maxlen=20)
        """The last messages, each with its time (seconds since 1970)."""

    def say(self, text: str) -> None:
        """One line above the bar; it is kept for `messages`."""
        self.messages.append((time.time(), text))
        super().say(text)

    def begin(self, done: int, points: int, episodes_per_point: int, at_least: bool = False) -> None:
        """What this process measures in all: `done` of `points` points exist; `at_least`: more may follow."""
        self._all, self._later = (done, points), points - done
        self._per_point, self._at_least = episodes_per_point, at_least
        self._task = self._bar.add_task("", total=(points - done) * episodes_per_point, points="", rate="", eta="?")
        self._show()

    def open(self, label: str, done: int, total: int, episodes_per_point: int, extra: int) -> None:
        """A new slice: `done` of `total` points exist, and `extra` episodes of the base batch are played before
        them."""
        if self._task is None:
            self.begin(done, total, episodes_per_point, at_least=True)
        self._later = max(self._later - (total - done), 0)
        self._label, self._points = label, (done, total)
        self._slice = (total - done) * episodes_per_point + extra
        self._note = f"{label}  {done}/{total}"
        self._rate = self._rate or Rate()
        self._show()

    def episode(self) -> None:
        """One episode finished."""
        self._slice = max(self._slice - 1, 0)
        self._episodes += 1
        if self._rate is not None:
            self._rate.event()
        self._show()

    def point(self, alpha: float, beta: float, reward: float, kl: float, seconds: float) -> None:
        """One point finished: its mean reward and mean KL (k1, nat per completion)."""
        done, total = self._points[0] + 1, self._points[1]
        self._points = (done, total)
        self._all = self._all[0] + 1, max(self._all[1], self._all[0] + 1)
        values = f"reward {reward:.3f}  KL {kl:.3f} nat"
        self._note = f"{self._label}  {done}/{total}  {values}"
        self._show()
        if not self._console.is_terminal:
            at = f"({alpha:+.4g}, {beta:+.4g})"
            self.say_point(f"{self._label}  {done}/{total} points  {at}  {values}  {seconds:.1f} s  ETA {self._eta()}")

    def failed(self, episodes: int) -> None:
        """So many episodes of a point failed."""
        self._failed += episodes

    def say_point(self, text: str) -> None:
        """A line about a point, which is no message."""
        super().say(text)

    def state(self) -> State:
        """How far the sweep is."""
        rate = self._rate.per_second if self._rate is not None else 0.0
        left = None if not rate else (self._slice + self._later * self._per_point) / rate
        return State(self._label, self._points, self._episodes, rate, left, self._failed, tuple(self._waits))

    def _eta(self) -> str:
        left = self.state().seconds_left
        return "?" if left is None else f"{duration(left)}{' or more' if self._at_least else ''}"

    def _show(self) -> None:
        if not self._console.is_terminal or self._task is None:
            return
        state, (done, total) = self.state(), self._all
        left = self._slice + self._later * self._per_point
        played = self._episodes
        self._update(
            completed=played,
            total=played + left,
            points=f"{done}/{total}",
            rate=f"{per_second(state.rate)} episodes/s" if state.rate else "",
            eta=self._eta(),
        )


class TrainingDisplay(ProgressDisplay):
    """Progress of training: one line per step where stderr is no terminal."""

    def __init__(self, steps: int, batch: int) -> None:
        """`steps` of the run, and `batch` episodes of each batch."""
        super().__init__("step {task.completed:.0f}/{task.total:.0f}", "bar", "elapsed", "ETA {task.fields[eta]}")
        self._task = self._bar.add_task("", total=steps, eta="?")
        self._batch, self._episodes, self._values = batch, 0, ""
        self._steps, self._began = steps, (0, time.monotonic())

    def start(self, step: int) -> None:
        """The step from which the run continues."""
        self._began = step, time.monotonic()
        self._update(completed=step)

    def episode(self) -> None:
        """One episode finished."""
        self._episodes += 1
        self._note = f"{self._values}  {self._episodes}/{self._batch} episodes".strip()

    def step(self, step: int, record: Mapping[str, float]) -> None:
        """One step finished: its mean reward, entropy and KL divergence from the start (nat)."""
        self._episodes = 0
        self._values = self._note = (
            f"reward {record['reward']:.3f}  entropy {record['entropy']:.3f}  KL from base {record['kl_base']:.3f} nat"
        )
        first, since = self._began
        left = (self._steps - step) * (time.monotonic() - since) / (step - first) if step > first else None
        eta = "?" if left is None else duration(left)
        self._update(completed=step, eta=eta)
        if not self._console.is_terminal:
            self.say(f"step {step}  {self._note}  {record['seconds']:.1f} s  ETA {eta}")
