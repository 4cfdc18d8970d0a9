"""Progress on stderr, of a sweep and of training. Nothing here knows of servers or files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import ProgressColumn, TaskID


class ProgressDisplay:
    """A bar on a terminal, and lines above it; lines only where stderr is no terminal. Use as a context manager."""

    def __init__(self, *columns: str) -> None:
        """`columns`: `bar`, `elapsed`, `remaining`, or a text with fields of the task, as `{task.completed:.0f}`."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        made: list[ProgressColumn] = []
        for column in columns:
            if column == "bar":
                made.append(BarColumn(bar_width=None))
            elif column == "elapsed":
                made.append(TimeElapsedColumn())
            elif column == "remaining":
                made += [TextColumn("ETA"), TimeRemainingColumn()]
            else:
                made.append(TextColumn(column))
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(*made, console=self._console, disable=not self._console.is_terminal)
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def _update(self, completed: float | None = None, **fields: Any) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=completed, **fields)


class Display(ProgressDisplay):
    """Progress of a sweep: one line per point where stderr is no terminal."""

    def __init__(self) -> None:
        texts = "{task.fields[points]} points", "{task.fields[rate]}"
        super().__init__("{task.fields[slice]}", "bar", *texts, "elapsed", "remaining", "{task.fields[note]}")
        self._points = (0, 0)

    def open(self, label: str, done: int, total: int, episodes_per_point: int, extra: int) -> None:
        """A new slice: `done` of `total` points exist, and `extra` episodes of the base batch are played before
        them."""
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
        if self._task is not None:
            self._bar.advance(self._task)
        speed = self._bar.tasks[0].speed if self._bar.tasks else None
        if speed:
            self._update(rate=f"{speed:.0f} episodes/s")

    def point(self, alpha: float, beta: float, reward: float, kl: float, seconds: float) -> None:
        """One point finished: its mean reward and mean KL (k1, nat per completion)."""
        done, total = self._points[0] + 1, self._points[1]
        self._points = (done, total)
        note = f"reward {reward:.3f}  KL {kl:.3f} nat"
        self._update(points=f"{done}/{total}", note=note)
        if not self._console.is_terminal:
            self.say(f"{done}/{total} points  ({alpha:+.4g}, {beta:+.4g})  {note}  {seconds:.1f} s")


class TrainingDisplay(ProgressDisplay):
    """Progress of training: one line per step where stderr is no terminal."""

    def __init__(self, steps: int, batch: int) -> None:
        """`steps` of the run, and `batch` episodes of each batch."""
        count = "step {task.completed:.0f}/{task.total:.0f}"
        super().__init__(count, "bar", "{task.fields[note]}", "elapsed", "remaining")
        self._task = self._bar.add_task("", total=steps, note="")
        self._batch, self._episodes, self._note = batch, 0, ""

    def start(self, step: int) -> None:
        """The step from which the run continues."""
        self._update(completed=step)

    def episode(self) -> None:
        """One episode finished."""
        self._episodes += 1
        self._update(note=f"{self._note}  {self._episodes}/{self._batch} episodes")

    def step(self, step: int, record: Mapping[str, float]) -> None:
        """One step finished: its mean reward, entropy and KL divergence from the start (nat)."""
        self._episodes = 0
        self._note = (
            f"reward {record['reward']:.3f}  entropy {record['entropy']:.3f} nat  "
            f"KL from base {record['kl_base']:.3f} nat"
        )
        self._update(completed=step, note=self._note)
        if not self._console.is_terminal:
            self.say(f"step {step}  {self._note}  {record['seconds']:.1f} s")
