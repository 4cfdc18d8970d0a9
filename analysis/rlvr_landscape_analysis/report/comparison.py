"""A comparison as a table, a figure and one HTML page that needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes

from rlvr_landscape_analysis.comparison import QUANTITIES, Comparison, Difference
from rlvr_landscape_analysis.figures.style import PAGE_INCHES, SERIES, new_panels, save_figure, styled
from rlvr_landscape_analysis.report.files import WRITERS, write_tables, write_whole
from rlvr_landscape_analysis.report.page import content_policy, table_parts
from rlvr_landscape_analysis.report.table import NOT_DEFINED, Column, Table, Value, count, general, short
from rlvr_landscape_analysis.statistics.two_way import TwoWay

DRAWN = {"reward": "difference in reward", "kl": "difference in KL (nat)"}
"""Quantity → label of its panel of differences."""
MOST_DRAWN = 6
"""Landscapes that the figure shows."""


def comparison_table(found: Comparison) -> Table:
    """One row per quantity and radius: both sides and their difference."""
    first, second = found.names
    table = Table(
        "comparison",
        "Each quantity on both sides",
        f"Difference: {second} minus {first}. Intervals at {found.confidence:.0%}, each for its row alone. Paired: "
        "both sides have the same prompts, so what they owe to easy and hard prompts cancels in the difference. "
        "Radius: distance from the checkpoint, of a grid in the unit of its directions, of a census by the norm of the "
        "weights.",
        [
            Column("landscape", "landscape", shown=len({row.landscape for row in found.rows}) > 1),
            Column("radius", "radius", short),
            Column("quantity", "quantity", names=QUANTITIES),
        ],
        [
            Column("difference", "difference", general),
            Column("excludes_zero", "without 0"),
            Column("first", first, general),
            Column("second", second, general),
            Column("paired", "paired"),
            Column("prompts", "prompts", count),
        ],
    )
    for row in found.rows:
        table.rows.append(
            {
                "landscape": row.landscape,
                "radius": f"{row.radius:.4g}",
                "quantity": row.quantity,
                "first": value_of(row.first, row, found.confidence),
                "second": value_of(row.second, row, found.confidence),
                "difference": value_of(row.difference, row, found.confidence),
                "excludes_zero": excludes_zero(row, found.confidence),
                "paired": "yes" if row.paired else "no",
                "prompts": Value(min(row.prompts)),
            }
        )
    return table


def value_of(estimate: TwoWay, row: Difference, confidence: float) -> Value:
    """An estimate with its interval, or why it has none."""
    if row.reason:
        return Value(float(estimate.value), bounded=True, reason=row.reason)
    low, high = estimate.interval(confidence)
    return Value(float(estimate.value), float(low), float(high), bounded=True)


def excludes_zero(row: Difference, confidence: float) -> str:
    """`yes`, `no`, or `not known` where there is no interval."""
    value = value_of(row.difference, row, confidence)
    if value.low is None or value.high is None:
        return "not known"
    return "yes" if value.low > 0 or value.high < 0 else "no"


def plain_table(table: Table) -> str:
    """The table in aligned columns, for a terminal."""
    body, footnotes = table.layout()
    lines = [[column.title for column in table.shown]]
    lines += [[text + (f" [{mark}]" if mark else "") for text, mark in row] for row in body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.shown))]
    rows = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*rows, *(f"[{i}] {text}" for i, text in enumerate(footnotes, 1))])


def headline(found: Comparison) -> list[str]:
    """One sentence per landscape: what differs, and what does not."""
    sentences = []
    for landscape in dict.fromkeys(row.landscape for row in found.rows):
        rows = [row for row in found.rows if row.landscape == landscape]
        told = [row for row in rows if excludes_zero(row, found.confidence) == "yes"]
        start = next((row for row in rows if row.radius == 0), None)
        what = f"{len(told)} of {len(rows)} differences have an interval without 0"
        if start is not None:
            value = value_of(start.difference, start, found.confidence)
            bounds = "" if value.low is None else f" [{value.low:+.3f}, {value.high:+.3f}]"
            what += f"; the checkpoints' mean rewards differ by {float(start.difference.value):+.3f}{bounds}"
        sentences.append(f"{landscape}: {what}.")
    return sentences


@styled
def _figure(found: Comparison, folder: Path) -> tuple[list[Path], bytes]:
    """Reward on both sides, and the difference, by radius; one row of panels per landscape."""
    names = list(dict.fromkeys(row.landscape for row in found.rows))[:MOST_DRAWN]
    figure, axes = new_panels(len(names), 3, PAGE_INCHES, 2.0 * len(names) + 0.3)
    for line, name in zip(axes, names, strict=True):
        rows = [row for row in found.rows if row.landscape == name]
        _draw_sides(line[0], [row for row in rows if row.quantity == "reward"], found)
        line[0].set_title(name, loc="left")
        for ax, (quantity, what) in zip(line[1:], DRAWN.items(), strict=True):
            _draw_difference(ax, [row for row in rows if row.quantity == quantity], found, what)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    paths = save_figure(figure, folder / "comparison")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=160)
    return paths, drawn.getvalue()


def _draw_sides(ax: Axes, rows: Sequence[Difference], found: Comparison) -> None:
    for side, name, style in zip(("first", "second"), found.names, SERIES, strict=False):
        values = [value_of(getattr(row, side), row, found.confidence) for row in rows]
        _errorbar(ax, [row.radius for row in rows], values, **style, label=name)
    ax.set_ylabel(QUANTITIES["reward"])
    ax.set_xlabel("radius")


def _draw_difference(ax: Axes, rows: Sequence[Difference], found: Comparison, what: str) -> None:
    ax.axhline(0, color="0.6", linewidth=0.8)
    values = [value_of(row.difference, row, found.confidence) for row in rows]
    _errorbar(ax, [row.radius for row in rows], values, color="#000000", marker="o", linestyle="-")
    ax.set_ylabel(what)
    ax.set_xlabel("radius")
    if not rows:
        ax.text(0.5, 0.5, "not measured", ha="center", va="center", transform=ax.transAxes)


def _errorbar(ax: Axes, radii: Sequence[float], values: Sequence[Value], **style: object) -> None:
    estimates = np.array([np.nan if v.estimate is None else v.estimate for v in values])
    bounds = np.array(
        [[e if b is None else b for b in (v.low, v.high)] for e, v in zip(estimates, values, strict=True)]
    )
    spread = np.abs(bounds.reshape(-1, 2) - estimates[:, None]).T
    ax.errorbar(radii, estimates, yerr=spread, capsize=2, **style)  # pyright: ignore[reportArgumentType]


def write_comparison(found: Comparison, out: str | Path, now: datetime | None = None) -> list[Path]:
    """Write `out`/comparison.html, the figure and the tables; returns the paths, the page first."""
    folder = Path(out)
    table = comparison_table(found)
    drawn, png = _figure(found, folder)
    written = write_tables([table], folder)
    assets = files("rlvr_landscape_analysis") / "report" / "assets"
    css = (assets / "report.css").read_text(encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("rlvr_landscape_analysis", "report/assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "base64": lambda data: base64.b64encode(data).decode(),
        "kind": lambda path: Path(path).suffix[1:].upper(),
    }
    time = (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    html = environment.get_template("comparison.html").render(
        policy=content_policy(css, ""),
        css=Markup(css),
        names=found.names,
        headline=headline(found),
        notes=found.notes,
        png=png,
        figures=[path.name for path in drawn],
        part=table_parts(table),
        table_files=[f"comparison{suffix}" for suffix in WRITERS],
        not_defined=NOT_DEFINED,
        time=time,
    )
    return [write_whole(folder / "comparison.html", html.encode()), *drawn, *written]
