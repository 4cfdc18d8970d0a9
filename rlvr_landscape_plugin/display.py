"""Progress of a sweep on stderr. Nothing here knows of servers or files."""

from __future__ import annotations

from typing import Any


class Display:
    """Progress on stderr: a bar on a terminal, one line per point elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.fields[slice]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[points]} points"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: Any = None
        self._points = (0, 0)

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def open(self, label: str, done: int, total: int, episodes_per_point: int, extra: int) -> None:
        """A new slice: `done` of `total` points exist, `extra` episodes come on top (the base batch)."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._points = (done, total)
        self._task = self._bar.add_task(
            label,
            total=(total - done) * episodes_per_point + extra,
            slice=label,
            points=f"{done}/{total}",
            rate="",
            note="",
        )

    def episode(self) -> None:
        """One episode finished."""
        self._bar.advance(self._task)
        speed = self._bar.tasks[0].speed if self._bar.tasks else None
        if speed:
            self._bar.update(self._task, rate=f"{speed:.0f} episodes/s")

    def point(self, alpha: float, beta: float, reward: float, kl: float, seconds: float) -> None:
        """One point finished: its mean reward and mean KL (k1, nat per completion)."""
        done, total = self._points[0] + 1, self._points[1]
        self._points = (done, total)
        note = f"reward {reward:.3f}  KL {kl:.3f} nat"
        self._bar.update(self._task, points=f"{done}/{total}", note=note)
        if not self._console.is_terminal:
            self.say(f"{done}/{total} points  ({alpha:+.4g}, {beta:+.4g})  {note}  {seconds:.1f} s")
