"""Tables in LaTeX, as a paper can print them: no type below 8 pt, and nothing wider or longer than a page.

A table that is too wide for the text stands sideways, and one that is too wide or too long for a page comes in parts
that repeat its labels. What fits is estimated from the widths of Computer Modern at 8 pt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from rlvr_landscape_analysis.report.table import Column, Table

PACKAGES = ("array", "booktabs", "rotating")
"""What the files need in the preamble; a UTF-8 engine, or inputenc, for letters beyond ASCII."""
SEPARATION = 4.0
"""Points on both sides of a column."""
LINE = 9.5
"""Points from one line to the next in \\footnotesize, which is 8 pt in a document of 10 pt."""
PARAGRAPH = 110.0
"""Points from which a text wraps; a long one gets twice as many."""


@dataclass(frozen=True)
class Page:
    """Where a part of a table stands."""

    environment: str
    width: float
    """Points of a line: `article` in 10 pt has 345 by 550."""
    lines: int
    """Lines of the body that leave room for caption, heading and notes."""


UPRIGHT, SIDEWAYS = Page("table", 345.0, 38), Page("sidewaystable", 545.0, 19)

_LATEX = {
    "\\": "\\textbackslash{}",
    "{": "\\{",
    "}": "\\}",
    "$": "\\$",
    "&": "\\&",
    "#": "\\#",
    "%": "\\%",
    "_": "\\_",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    '"': "''",
    "`": "\\textasciigrave{}",
    "[": "{[}",
    "]": "{]}",
    "−": "$-$",
    "×": "$\\times$",
    "±": "$\\pm$",
    "≤": "$\\leq$",
    "≥": "$\\geq$",
    "½": "$\\frac{1}{2}$",
    "²": "$^2$",
    "√": "$\\surd$",
    "∂": "$\\partial$",
    "Δ": "$\\Delta$",
    "α": "$\\alpha$",
    "β": "$\\beta$",
    "δ": "$\\delta$",
    "ε": "$\\varepsilon$",
    "η": "$\\eta$",
    "θ": "$\\theta$",
    "π": "$\\pi$",
    "ρ": "$\\rho$",
    "τ": "$\\tau$",
    "…": "\\ldots{}",
    "–": "\\textendash{}",
    "—": "\\textemdash{}",
    "\n": " ",
    "\t": " ",
}


def escape_latex(text: str) -> str:
    """`text` so that LaTeX prints it as it is. Brackets are wrapped: a line break would take them for its argument."""
    escaped = "".join(_LATEX.get(character, character) for character in text)
    return re.sub("-(?=-)", "-{}", escaped)


def to_latex(table: Table) -> str:
    """One `table` or `sidewaystable` environment for every part, with booktabs rules; notes and footnotes below it."""
    body, footnotes = table.layout()
    columns = _columns(table, body)
    options = [(page, parts) for page in (UPRIGHT, SIDEWAYS) if (parts := _split(columns, page.width))]
    # Sideways is harder to read, so only where it saves parts.
    page, parts = min(options, key=lambda option: len(option[1])) if options else (SIDEWAYS, [columns])
    blocks = [(part, rows) for part in parts for rows in _pages(part, len(body), page.lines)]
    lines = [f"% needs \\usepackage{{{','.join(PACKAGES)}}}"]
    for number, (part, rows) in enumerate(blocks, 1):
        lines += _environment(table, page, part, rows, footnotes, number, len(blocks))
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Laid:
    """A column as it will be set."""

    column: Column
    label: bool
    texts: list[str]
    marks: list[int]
    """Number of a cell's footnote; 0 without."""
    heading: list[str]
    """Lines of the heading."""
    width: float
    paragraph: bool

    def lines(self, row: int) -> int:
        """Lines that a cell takes."""
        return max(1, math.ceil(1.1 * _width(self.texts[row]) / self.width)) if self.paragraph else 1


def _columns(table: Table, body: list[list[tuple[str, int]]]) -> list[_Laid]:
    keys = {label.key for label in table.labels}
    made = []
    for place, column in enumerate(table.shown):
        texts, marks = [row[place][0] for row in body], [row[place][1] for row in body]
        widest = max((_width(text) + 5 * bool(mark) for text, mark in zip(texts, marks, strict=True)), default=0.0)
        text = all(isinstance(row[column.key], str) for row in table.rows)
        paragraph = text and widest > PARAGRAPH
        width = (PARAGRAPH if widest < 4 * PARAGRAPH else 2 * PARAGRAPH) if paragraph else widest
        heading = _wrapped(column.title, width)
        width = max([width, *map(_width, heading)])
        made.append(_Laid(column, column.key in keys, texts, marks, heading, width, paragraph))
    return made


def _wrapped(title: str, width: float) -> list[str]:
    lines: list[str] = []
    for word in title.split():
        if lines and _width(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _split(columns: list[_Laid], width: float) -> list[list[_Laid]]:
    """Parts that fit `width`: labels, then values; wrapped labels stand in the first part only. Empty: none fits."""
    parts: list[list[_Laid]] = []
    labels = [column for column in columns if column.label]
    part, free = list(labels), width - _total(labels)
    for column in (column for column in columns if not column.label):
        needed = column.width + 2 * SEPARATION
        if needed > free and len(part) > len(labels):
            parts.append(part)
            labels = [label for label in labels if not label.paragraph] or labels[:1]
            part, free = list(labels), width - _total(labels)
        if needed > free:
            return []
        part.append(column)
        free -= needed
    return [*parts, part] if free >= 0 else []


def _total(columns: list[_Laid]) -> float:
    return sum(column.width + 2 * SEPARATION for column in columns)


def _pages(part: list[_Laid], rows: int, lines: int) -> Iterator[range]:
    """The rows of a part, page by page."""
    start = used = 0
    for row in range(rows):
        needed = max(column.lines(row) for column in part)
        if used and used + needed > lines:
            yield range(start, row)
            start, used = row, 0
        used += needed
    yield range(start, rows)


def _environment(
    table: Table, page: Page, part: list[_Laid], rows: range, footnotes: list[str], number: int, many: int
) -> list[str]:
    of = f" (part {number} of {many})" if many > 1 else ""
    label = table.name.replace("_", "-") + (f"-{number}" if number > 1 else "")
    lines = [f"\\begin{{{page.environment}}}", "\\centering\\footnotesize"]
    lines += [f"\\setlength{{\\tabcolsep}}{{{SEPARATION:g}pt}}"]
    lines += [f"\\caption{{{escape_latex(table.title)}{of}}}", f"\\label{{tab:{label}}}"]
    lines += [f"\\begin{{tabular}}{{{''.join(map(_specification, part))}}}", "\\toprule"]
    lines += [" & ".join(map(_heading, part)) + " \\\\", "\\midrule"]
    for row in rows:
        cells = [escape_latex(column.texts[row]) + _mark(column.marks[row]) for column in part]
        lines.append(" & ".join(cells) + " \\\\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    below = [escape_latex(table.note)] if table.note and number == 1 else []
    cited = sorted({column.marks[row] for column in part for row in rows} - {0})
    below += [f"{_mark(mark)} {escape_latex(footnotes[mark - 1])}" for mark in cited]
    lines += [f"\\par\\smallskip\\parbox{{\\linewidth}}{{{text}}}" for text in below]
    return [*lines, f"\\end{{{page.environment}}}"]


def _specification(column: _Laid) -> str:
    if column.paragraph:
        return f">{{\\raggedright\\arraybackslash}}p{{{column.width:.0f}pt}}"
    return "l" if column.label else "r"


def _heading(column: _Laid) -> str:
    if len(column.heading) == 1:
        return escape_latex(column.heading[0])
    side = "l" if column.label or column.paragraph else "r"
    stacked = " \\\\ ".join(map(escape_latex, column.heading))
    return f"\\shortstack[{side}]{{{stacked}}}"


def _mark(mark: int) -> str:
    return f"\\textsuperscript{{{mark}}}" if mark else ""


def _width(text: str) -> float:
    """Points of a line of text in Computer Modern at 8 pt, a little more rather than less."""
    return sum(_character(character) for character in text)


def _character(character: str) -> float:
    if character in "ijl.,;:[]|!' ":
        return 2.9
    if character in "frstIc()-":
        return 3.7
    if character in "mwMW−+±×≤≥…—":
        return 7.4
    return 6.8 if character.isupper() else 4.7
