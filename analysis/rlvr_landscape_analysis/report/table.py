"""A table, and how CSV and Markdown write it (LaTeX: latex.py).

A table is rows of labels (snapshot, pair, …) and of values with an interval. A value that is missing is written as "not
defined" with its reason, in every format: the reason is a column of the CSV and a footnote elsewhere, so that no reader
takes a hole for a zero.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

NOT_DEFINED = "not defined"
NO_REASON = "the analysis gives no reason"
CSV_COLUMNS = ("quantity", "estimate", "low", "high", "reason")
"""What follows a row's labels in a CSV: one line per value."""


@dataclass(frozen=True)
class Value:
    """A number with its interval, or why there is none. `None` stands for missing; NaN is turned into it."""

    estimate: float | None
    low: float | None = None
    high: float | None = None
    bounded: bool = False
    """Whether an interval belongs to this number at all."""
    reason: str = ""
    """Why the estimate, or its interval, is missing."""
    format: Callable[[float], str] | None = None
    """Overrides the column's format."""

    def __post_init__(self) -> None:
        for name in ("estimate", "low", "high"):
            number = getattr(self, name)
            if number is not None:
                object.__setattr__(self, name, float(number) if np.isfinite(number) else None)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return self.estimate is not None and not (self.bounded and None in (self.low, self.high))

    @property
    def why(self) -> str:
        """Reason of what is missing, never empty then; empty when nothing is."""
        return "" if self.complete else self.reason or NO_REASON


Cell = Value | str
Format = Callable[[float], str]


def signed(number: float) -> str:
    """`−0.81`, `+0.10`."""
    return _tidy(f"{number:+.2f}")


def signed3(number: float) -> str:
    """`+0.012`."""
    return _tidy(f"{number:+.3f}")


def plain(number: float) -> str:
    """`0.481`."""
    return _tidy(f"{number:.3f}")


def general(number: float) -> str:
    """Three significant digits: `−41.3`, `0.950`, `1660`, `1.23e+06`."""
    if 1000 <= abs(number) < 1e6:
        return _tidy(f"{float(f'{number:.3g}'):.0f}")
    return _tidy(f"{number:#.3g}".removesuffix("."))


def short(number: float) -> str:
    """Up to three significant digits, as a coordinate is written: `0.05`, `0.0167`."""
    return _tidy(f"{number:.3g}")


def count(number: float) -> str:
    """A whole number."""
    return _tidy(f"{number:.0f}")


def percent(number: float) -> str:
    """`12%`, one decimal below ten."""
    return _tidy(f"{number:.1%}" if 0 < abs(number) < 0.1 else f"{number:.0%}")


def _tidy(text: str) -> str:
    """With a minus sign for a hyphen, and no sign on what was rounded to zero."""
    if not text.strip("+-0.%"):
        return text.lstrip("+-")
    return text.replace("-", "−")


@dataclass(frozen=True)
class Column:
    """A column of values, or of text where its cells are strings."""

    key: str
    """Name in the CSV."""
    title: str
    """Heading elsewhere."""
    format: Format = signed
    shown: bool = True
    """Whether it appears outside the CSV."""
    wide: bool = False
    """Whether it holds running text, which has to wrap."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What the reader sees for a text; the CSV keeps the text itself."""


@dataclass
class Table:
    """Rows of labels and values; `labels` and `columns` are keyed alike in every row."""

    name: str
    title: str
    note: str
    labels: list[Column]
    columns: list[Column]
    rows: list[dict[str, Cell]] = field(default_factory=list)

    @property
    def shown(self) -> list[Column]:
        """Columns of the formats for reading."""
        return [column for column in (*self.labels, *self.columns) if column.shown]

    def layout(self) -> tuple[list[list[tuple[str, int]]], list[str]]:
        """Rows of (text, number of its footnote or 0) for `shown`, and the footnotes in order."""
        footnotes: list[str] = []
        body = []
        for row in self.rows:
            line = []
            for column in self.shown:
                text, why = cell_text(row[column.key], column)
                if why and why not in footnotes:
                    footnotes.append(why)
                line.append((text, footnotes.index(why) + 1 if why else 0))
            body.append(line)
        return body, footnotes


def cell_text(cell: Cell, column: Column) -> tuple[str, str]:
    """What a cell says to a reader, and the reason of what is missing in it (or "")."""
    if isinstance(cell, str):
        return column.names.get(cell, cell) or "none", ""
    if cell.estimate is None:
        return NOT_DEFINED, cell.why
    write = cell.format or column.format
    text = write(cell.estimate)
    if not cell.bounded:
        return text, ""
    if cell.low is None or cell.high is None:
        return f"{text} [{NOT_DEFINED}]", cell.why
    return f"{text} [{write(cell.low)}, {write(cell.high)}]", ""


def to_csv(table: Table) -> str:
    """One line per value: the row's labels, then `CSV_COLUMNS`. Numbers in full precision, no cell is empty.

    A missing number is `not defined` and has its reason in `reason`, which is `none` otherwise; bounds of a number that
    has no interval by its nature are `not applicable`.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*(label.key for label in table.labels), *CSV_COLUMNS])
    for row in table.rows:
        labels = [str(row[label.key]) or "none" for label in table.labels]
        for column in table.columns:
            cell = row[column.key]
            if isinstance(cell, str):
                writer.writerow([*labels, column.key, cell or "none", "not applicable", "not applicable", "none"])
                continue
            bounds = [_full(bound) if cell.bounded else "not applicable" for bound in (cell.low, cell.high)]
            writer.writerow([*labels, column.key, _full(cell.estimate), *bounds, cell.why or "none"])
    return out.getvalue()


def _full(number: float | None) -> str:
    if number is None:
        return NOT_DEFINED
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)


def to_markdown(table: Table) -> str:
    """A pipe table under its title, with the note and numbered footnotes below."""
    body, footnotes = table.layout()
    lines = [f"## {escape_markdown(table.title)}", ""]
    lines += ["| " + " | ".join(escape_markdown(column.title) for column in table.shown) + " |"]
    keys = {label.key for label in table.labels}
    lines += ["|" + "|".join("---" if column.key in keys or column.wide else "---:" for column in table.shown) + "|"]
    for row in body:
        cells = [escape_markdown(text) + (f"[^{table.name}-{mark}]" if mark else "") for text, mark in row]
        lines.append("| " + " | ".join(cells) + " |")
    if table.note:
        lines += ["", escape_markdown(table.note)]
    if footnotes:
        lines.append("")
        lines += [f"[^{table.name}-{i}]: {escape_markdown(text)}" for i, text in enumerate(footnotes, 1)]
    return "\n".join(lines) + "\n"


def escape_markdown(text: str) -> str:
    """`text` so that Markdown prints it as it is within one table cell."""
    escaped = re.sub(r"([\\`*_{}<>|~#\[\]])", r"\\\1", text)
    return re.sub(r"\s*\n\s*", " ", escaped.replace("&", "&amp;"))
