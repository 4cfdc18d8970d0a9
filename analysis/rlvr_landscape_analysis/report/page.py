"""The report of a run: figures and tables as files, and one HTML page that needs nothing but itself.

The page may be mailed, archived or opened years later: images, style and script are inline, and its own content
security policy forbids every request. Whatever comes from a dataset is escaped, since datasets come from elsewhere.
Nothing is computed here. What the analysis lacks is left out or said in words.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlvr_landscape_analysis import figures as drawing
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.report.recipes import Key, Recipe, recipes
from rlvr_landscape_analysis.report.table import NOT_DEFINED, WRITERS, Column, Table, write_tables, write_whole
from rlvr_landscape_analysis.report.tables import all_tables
from rlvr_landscape_analysis.results import UNDECIDED, VERDICTS, Claim, RunAnalysis
from rlvr_landscape_analysis.schema import PROMPTS_SHA256, SYNTHETIC, VERIFIER, landscape_file, paid_by
from rlvr_landscape_analysis.statistics.claims import sampled

INLINE_DPI = 150
MAX_LANDSCAPES = 12
"""Landscapes shown in the page, each with the values under the pointer; more would be slow to open."""
MAX_INLINE_BYTES = 18_000_000
"""Images inline before base64 adds a third; what goes beyond stays a file."""

Progress = Callable[[str], None]


def write_report(
    analysis: RunAnalysis,
    out: str | Path,
    *,
    animation: bool = True,
    now: datetime | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write `out`/report.html, `out`/figures and `out`/tables; returns the paths written, the page first.

    Files of an earlier report are replaced one by one, each whole or not at all; others in `out` stay. Equal analyses
    give equal files, but for one time stamp in the page: `now`, by default the present. `progress` is told each figure.
    Raises `AnalysisError` when `out` cannot be a directory.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AnalysisError(f"{folder} cannot hold the report: {error}; choose another --out") from error
    page = _Page(analysis, folder, progress or (lambda _: None))
    tables = all_tables(analysis)
    written = write_tables(tables, folder / "tables")
    page.draw_landscapes()
    page.draw_recipes(recipes(analysis))
    if animation:
        page.animate()
    html = page.html(tables, now or datetime.now(UTC))
    return [write_whole(folder / "report.html", html.encode()), *page.written, *written]


# Figures


def landscape_name(key: Key) -> str:
    """Name of a landscape's files, as a sweep names its dataset."""
    return landscape_file(*key).removesuffix(".nc")


def shown_landscapes(keys: Sequence[Key], most: int = MAX_LANDSCAPES) -> list[Key]:
    """Which landscapes the page shows: all of them if they fit, else one slice per snapshot, spread over training."""
    ordered = sorted(keys)
    if len(ordered) <= most:
        return ordered
    first: dict[int, Key] = {}
    for key in ordered:
        first.setdefault(key[0], key)
    candidates = list(first.values())
    if len(candidates) <= most:
        return candidates
    chosen = np.unique(np.round(np.linspace(0, len(candidates) - 1, most)).astype(int))
    return [candidates[i] for i in chosen]


def figure_of(ax: Axes) -> Figure:
    """The figure that an axes is part of."""
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("the axes belong to no figure")
    return figure


@dataclass
class _Image:
    """A drawn figure: its files relative to the report, its size in CSS pixels, and its PNG when shown inline."""

    files: list[str]
    size: tuple[int, int]
    png: bytes | None


@dataclass
class _Page:
    analysis: RunAnalysis
    folder: Path
    progress: Progress
    written: list[Path] = field(default_factory=list)
    landscapes: list[tuple[Key, _Image]] = field(default_factory=list)
    pictures: list[tuple[Recipe, _Image]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    movies: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    inline_bytes: int = 0

    def draw_landscapes(self) -> None:
        shown = set(shown_landscapes(list(self.analysis.maps)))
        for key, values in sorted(self.analysis.maps.items()):
            self.progress(f"landscape of step {key[0]}, slice {key[1]}")
            ax = drawing.reward_landscape(values)["ax"]
            name = landscape_name(key)
            image = self._save(figure_of(ax), name, inline=key in shown)
            if image.png is not None:
                self.data[name] = hover_data(values, ax)
            self.landscapes.append((key, image))

    def draw_recipes(self, chosen: Sequence[Recipe]) -> None:
        for recipe in chosen:
            self.progress(recipe.title)
            try:
                drawn = recipe.draw()
            except AnalysisError as error:
                self.missing.append((recipe.title, str(error)))
                continue
            figure = drawn["figure"] if "figure" in drawn else figure_of(drawn["ax"])
            self.pictures.append((recipe, self._save(figure, recipe.name)))

    def animate(self) -> None:
        """A film over training, as a file only: inline, it would be large and could not be stopped."""
        if len({step for step, _ in self.analysis.maps}) < 2:
            return
        self.progress("animation")
        target = self.folder / "figures" / "landscape.gif"
        partial = target.with_name(".landscape.partial.gif")
        try:
            drawing.animate(self.analysis.maps, partial, "gif")
            os.replace(partial, target)
        except AnalysisError as error:
            self.missing.append(("Animation over training", str(error)))
            return
        finally:
            partial.unlink(missing_ok=True)
        self.movies.append(f"figures/{target.name}")
        self.written.append(target)

    def html(self, tables: Sequence[Table], now: datetime) -> str:
        """The page."""
        assets = files("rlvr_landscape_analysis") / "report" / "assets"
        template, css, script = (
            (assets / name).read_text(encoding="utf-8") for name in ("template.html", "report.css", "report.js")
        )
        analysis = self.analysis
        return Template(template).substitute(
            policy=content_policy(css, script),
            css=css,
            script=script,
            title=escape(f"Reward landscapes of {analysis.path.resolve().name}"),
            summary=escape(summary(analysis)),
            warnings="\n".join(_warnings(analysis)),
            claims_intro=escape(
                "Every verdict compares an interval with bounds that were stated beforehand. The plain correlation "
                "over a slice never decides: it follows the slice's range."
            ),
            claims="\n".join(claim_html(claim, analysis) for claim in analysis.claims) or "<p>No claim was tested.</p>",
            claims_files=_table_links("claims"),
            figures="\n".join(self._figures()),
            tables="\n".join(table_html(table) for table in tables if table.name != "claims"),
            level=f"{analysis.bootstrap.level:.0%}",
            provenance="\n".join(provenance_html(analysis)),
            time=now.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            data=json_block(self.data),
        )

    def _figures(self) -> Iterator[str]:
        yield from self._charts("Over training", detail=False)
        inline = [(key, image) for key, image in self.landscapes if image.png is not None]
        others = [(key, image) for key, image in self.landscapes if image.png is None]
        if inline:
            yield "<h3>Landscapes</h3>"
            yield (
                '<p class="prose">Colour: mean reward, one scale per panel. Lines: KL in nat. Cross: the checkpoint. '
                "Dots: points whose reward does not differ from the checkpoint's by two standard errors. Point at a "
                "landscape, or select it and use the arrow keys, to read its values; until then they are those of the "
                "checkpoint.</p>"
            )
            yield '<div class="gallery">'
            for key, image in inline:
                yield self._landscape(key, image)
            yield "</div>"
        if others:
            names = ", ".join(f"step {key[0]}, slice {key[1]} {_links(image.files)}" for key, image in others)
            yield (
                f'<p class="note">{len(inline)} of {len(self.landscapes)} landscapes are shown here, to keep the page '
                f"small. The others are files: {names}.</p>"
            )
        if self.movies:
            yield f'<p class="note">Animation over training {_links(self.movies)}.</p>'
        yield from self._charts("First and last snapshot in detail", detail=True)
        if self.missing:
            yield "<h3>Not drawn</h3><ul>"
            for title, why in self.missing:
                yield f"<li>{escape(title)}: {escape(why)}.</li>"
            yield "</ul>"

    def _charts(self, title: str, *, detail: bool) -> Iterator[str]:
        chosen = [(recipe, image) for recipe, image in self.pictures if recipe.detail == detail]
        if chosen:
            yield f'<h3>{title}</h3><div class="gallery charts">'
            for recipe, image in chosen:
                yield self._picture(recipe, image)
            yield "</div>"

    def _landscape(self, key: Key, image: _Image) -> str:
        name, label = landscape_name(key), f"step {key[0]}, slice {key[1]}"
        return (
            f'<figure class="map" id="{name}"><div class="canvas">{_img(image, f"Reward landscape, {label}")}'
            f'<div class="probe" data-map="{name}" tabindex="0" role="application" '
            f'aria-label="Values of the landscape, {label}; the arrow keys move"></div>'
            '<span class="pin" hidden></span></div>'
            '<dl class="readout" aria-live="polite"></dl>'
            f"<figcaption><b>{label[0].upper()}{label[1:]}</b> {_links(image.files)}</figcaption></figure>"
        )

    def _picture(self, recipe: Recipe, image: _Image) -> str:
        shown = (
            f'<div class="canvas">{_img(image, recipe.title)}</div>'
            if image.png is not None
            else '<p class="note">Too large for this page; see the file.</p>'
        )
        wide = ' class="wide"' if image.size[0] > 1.5 * drawing.COLUMN_INCHES * INLINE_DPI else ""
        return (
            f'<figure id="figure-{recipe.name}"{wide}>{shown}<figcaption><b>{escape(recipe.title)}.</b> '
            f"{escape(recipe.caption)} {_links(image.files)}</figcaption></figure>"
        )

    def _save(self, figure: Figure, name: str, inline: bool = True) -> _Image:
        paths = [
            write_whole(self.folder / "figures" / f"{name}.{kind}", render(figure, kind)) for kind in ("pdf", "png")
        ]
        self.written += paths
        # Rendered last: a layout depends on the resolution, and the positions of the axes are asked for afterwards.
        png = render(figure, "png", INLINE_DPI) if inline else None
        if png is not None and self.inline_bytes + len(png) > MAX_INLINE_BYTES:
            png = None
        self.inline_bytes += len(png or b"")
        width, height = figure.get_size_inches()
        size = (round(width * INLINE_DPI), round(height * INLINE_DPI))
        return _Image([f"figures/{path.name}" for path in paths], size, png)


def render(figure: Figure, kind: str, dpi: int | None = None) -> bytes:
    """A figure as the bytes of a `pdf` or `png`, without a date; uncropped, so that positions in it stay true."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(drawing.STYLE):
        options: dict[str, Any] = {"metadata": {"CreationDate": None}} if kind == "pdf" else {}
        figure.savefig(buffer, format=kind, dpi=dpi or drawing.STYLE["savefig.dpi"], **options)
    return buffer.getvalue()


_ROWS = (
    ("radius", "radius", None),
    ("displacement_radius", "distance / training's own", None),
    ("reward", "reward", "reward_se"),
    ("difference", "difference from the origin", "difference_se"),
    ("kl", "KL, nat", "kl_se"),
    ("surrogate", "surrogate", "surrogate_se"),
)


def hover_data(values: xr.Dataset, ax: Axes) -> dict[str, Any]:
    """What the page needs to show a landscape's values under the pointer.

    `axes`: left, bottom, width and height of the axes as fractions of the image that was drawn last; `xlim`, `ylim`;
    `alpha`, `beta`, ascending; `rows`: for every quantity its name, values and standard errors (or null), indexed
    [alpha][beta], null where missing.
    """
    box, whole = ax.get_window_extent(), figure_of(ax).bbox
    ordered = values.sortby(["alpha", "beta"])

    def matrix(name: str) -> list[list[float | None]]:
        found = ordered[name].transpose("alpha", "beta").values
        return [[_number(value) for value in row] for row in found]

    return {
        "axes": [
            float(fraction)
            for fraction in (
                box.x0 / whole.width,
                box.y0 / whole.height,
                box.width / whole.width,
                box.height / whole.height,
            )
        ],
        "xlim": [float(limit) for limit in ax.get_xlim()],
        "ylim": [float(limit) for limit in ax.get_ylim()],
        "alpha": [float(a) for a in ordered["alpha"].values],
        "beta": [float(b) for b in ordered["beta"].values],
        "rows": [
            {
                "name": title,
                "values": matrix(name),
                "errors": matrix(error) if error is not None and error in ordered else None,
            }
            for name, title, error in _ROWS
            if name in ordered
        ],
    }


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


# Parts of the page


def content_policy(css: str, script: str) -> str:
    """A policy that allows this style, this script and inline images, and no request."""

    def digest(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; img-src data:; style-src {digest(css)}; script-src {digest(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def json_block(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=True)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def summary(analysis: RunAnalysis) -> str:
    """The run in one line."""
    keys = sorted(analysis.maps)
    if not keys:
        return "The analysis holds no landscape."
    steps, slices = {step for step, _ in keys}, {seed for _, seed in keys}
    grids = sorted({f"{m.sizes['alpha']} × {m.sizes['beta']}" for m in analysis.maps.values()})
    parts = [
        f"{len(steps)} snapshot{'s' * (len(steps) != 1)} (step {min(steps)}"
        + (f" to {max(steps)})" if len(steps) > 1 else ")"),
        f"{len(slices)} slice{'s' * (len(slices) != 1)} each" if len(keys) == len(steps) * len(slices) else "",
        f"{' or '.join(grids)} points",
    ]
    attrs = analysis.maps[keys[0]].attrs
    if "prompts" in attrs and "rollouts" in attrs:
        parts.append(f"{attrs['prompts']} prompts × {attrs['rollouts']} rollouts at every point")
    return ", ".join(filter(None, parts)) + "."


def _warnings(analysis: RunAnalysis) -> Iterator[str]:
    made = sorted({str(m.attrs[SYNTHETIC]) for m in analysis.maps.values() if SYNTHETIC in m.attrs})
    if made:
        yield (
            '<p class="warning"><b>Synthetic data.</b> These landscapes were computed, not measured on a model '
            f"({escape(', '.join(made))}).</p>"
        )
    paid = sorted({paid_by(m.attrs) for m in analysis.maps.values()} - {VERIFIER})
    if paid:
        yield (
            f'<p class="warning"><b>Control.</b> Every reward here is {escape(", ".join(paid))}, '
            "not the verifier's.</p>"
        )
    if analysis.notes:
        many = len(analysis.notes) > 1
        yield (
            f'<p class="warning"><a href="#notes">{len(analysis.notes)} note{"s" * many}</a> '
            "on what was left out or is not defined.</p>"
        )


BADGES: dict[str, str] = dict(zip(VERDICTS, ("supported", "not-supported", "undecided", "not-measurable"), strict=True))
"""Verdict → class of its badge in the style sheet."""


def claim_html(claim: Claim, analysis: RunAnalysis) -> str:
    """One claim: verdict, sentence, rule, prompts."""
    kind = BADGES[claim.verdict]
    facts = [("Rule", claim.rule)]
    if claim.prompts:
        facts.append(("Sampled", sampled(claim)))
    if claim.prompts_needed is not None:
        wanted = f"about {_rounded(claim.prompts_needed)} prompts"
        if claim.directions_needed is not None:
            wanted = f"about {_rounded(claim.directions_needed)} directions with {wanted.removeprefix('about ')} each"
        facts.append(("Would decide it", f"{wanted}, if the estimate stays"))
    elif claim.verdict == UNDECIDED:
        facts.append(("Would decide it", "not known: no number follows from this estimate"))
    if claim.overturn:
        facts.append(("Would overturn it", claim.overturn))
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return (
        f'<article class="claim" id="claim-{escape(claim.name)}">'
        f"<h3><span>{escape(claim.name)}. {escape(claim.title)}</span>"
        f'<span class="badge {escape(kind)}">{escape(claim.verdict)}</span></h3>'
        f'<p class="sentence">{escape(claim.sentence)}</p><dl>{rows}</dl></article>'
    )


def _rounded(number: int) -> str:
    """Two significant digits: more would pretend."""
    digits = max(len(str(number)) - 2, 0)
    return f"{round(number, -digits):,}".replace(",", "\u202f")


def table_html(table: Table) -> str:
    """A table with links from its headings to the glossary, footnotes for what is not defined, and its files."""
    body, footnotes = table.layout()
    keys = {label.key for label in table.labels}
    head = "".join(f'<th scope="col"{_class(c, keys)}>{_heading(c)}</th>' for c in table.shown)
    lines = []
    for row in body:
        cells = []
        for (text, mark), column in zip(row, table.shown, strict=True):
            content = escape(text)
            if mark:
                if text == NOT_DEFINED:
                    content = f'<span class="undefined">{content}</span>'
                content += f'<sup><a href="#{table.name}-{mark}">{mark}</a></sup>'
            tag = 'th scope="row"' if column.key in keys and not column.wide else "td"
            cells.append(f"<{tag}{_class(column, keys)}>{content}</{tag.split()[0]}>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    notes = "".join(f'<li id="{table.name}-{i}">{escape(text)}</li>' for i, text in enumerate(footnotes, 1))
    return (
        f'<h3 id="table-{table.name}">{escape(table.title)}</h3>'
        + (f'<p class="note">{escape(table.note)}</p>' if table.note else "")
        + f'<div class="scroll" tabindex="0" role="region" aria-labelledby="table-{table.name}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
        + (f'<ol class="footnotes">{notes}</ol>' if notes else "")
        + f"<p>{_table_links(table.name)}</p>"
    )


def _class(column: Column, keys: set[str]) -> str:
    if column.wide:
        return ' class="text"'
    return "" if column.key in keys else ' class="value"'


def _heading(column: Column) -> str:
    term = COLUMN_TERMS.get(column.key)
    return f'<a href="#term-{term}">{escape(column.title)}</a>' if term else escape(column.title)


def _img(image: _Image, alt: str) -> str:
    encoded = base64.b64encode(image.png or b"").decode()
    width, height = image.size
    return f'<img src="data:image/png;base64,{encoded}" width="{width}" height="{height}" alt="{escape(alt)}">'


def _links(paths: Sequence[str]) -> str:
    named = [f'<a href="{escape(path)}">{escape(Path(path).suffix[1:].upper())}</a>' for path in paths]
    return f'<span class="files">({", ".join(named)})</span>'


def _table_links(name: str) -> str:
    return _links([f"tables/{name}{suffix}" for suffix in WRITERS])


_FIRST = (
    "snapshot_name",
    "snapshot_sha256",
    "configuration_sha256",
    PROMPTS_SHA256,
    "taskset",
    "prompts",
    "rollouts",
    "git_commit",
)
_JSON = ("configuration", "servers", "slice", "packages")


def provenance_html(analysis: RunAnalysis) -> Iterator[str]:
    """Settings of the bootstrap, notes, and the attributes of every dataset."""
    settings = analysis.bootstrap
    yield "<h3>Statistics</h3>"
    yield _facts(
        {
            "run": str(analysis.path),
            "bootstrap": f"{settings.resamples} resamples of the prompts, seed {settings.seed}, intervals at "
            f"{settings.level:.0%}",
            "k of pass@k": str(analysis.k),
        }
    )
    if analysis.notes:
        yield '<h3 id="notes">Notes</h3><ul class="prose">'
        yield "".join(f"<li>{escape(note)}</li>" for note in analysis.notes) + "</ul>"
    attributes = {key: values.attrs for key, values in sorted(analysis.maps.items())}
    if not attributes:
        return
    texts = {key: {name: _attribute(value) for name, value in attrs.items()} for key, attrs in attributes.items()}
    names = sorted({name for attrs in texts.values() for name in attrs}, key=_attribute_order)
    common = {
        name: next(iter(texts.values()))[name]
        for name in names
        if len({attrs.get(name) for attrs in texts.values()}) == 1
    }
    many = len(texts) > 1
    yield "<h3>Datasets</h3>"
    if many and common:
        yield f"<details open><summary>The same in all {len(texts)} datasets</summary>{_facts(common)}</details>"
    for key, attrs in texts.items():
        own = {name: attrs[name] for name in names if name in attrs and not (many and name in common)}
        if own:
            title = f"Step {key[0]}, slice {key[1]}"
            yield f"<details><summary>{title} <code>{landscape_name(key)}.nc</code></summary>{_facts(own)}</details>"


def _attribute_order(name: str) -> tuple[int, str]:
    return (_FIRST.index(name) if name in _FIRST else len(_FIRST) + (name in _JSON), name)


def _attribute(value: Any) -> str:
    """An attribute as text; JSON is laid out, a missing number is said to be missing."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else "not defined"
    if isinstance(value, np.ndarray):
        return ", ".join(_attribute(item) for item in value.tolist())
    text = str(value)
    if text[:1] in "{[" and text:
        try:
            return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
        except ValueError:
            return text
    return text or "(empty)"


def _facts(facts: dict[str, str]) -> str:
    rows = []
    for name, text in facts.items():
        laid_out = f"<pre>{escape(text)}</pre>" if "\n" in text else escape(text)
        if name.endswith("sha256") or name in ("git_commit", "run"):
            laid_out = f"<code>{laid_out}</code>"
        rows.append(f"<dt>{escape(name)}</dt><dd>{laid_out}</dd>")
    return f'<dl class="facts">{"".join(rows)}</dl>'


COLUMN_TERMS = {
    # key of a column → term of the glossary in report/assets/template.html
    "pearson_none": "pearson",
    "spearman_none": "spearman",
    "corrected_none": "corrected",
    "corrected_linear": "partial",
    "corrected_smooth": "partial",
    "corrected_shell": "shell",
    "corrected_radial": "radial",
    "contribution_shell": "contribution",
    "reliability_first": "reliability",
    "reliability_second": "reliability",
    "better_share": "better",
    "better_count": "better",
    "best_kl": "kl",
    "naive_gain": "gain",
    "gain": "gain",
    "overlap": "overlap",
    "chance": "overlap",
    "radial_chance": "overlap",
    "slope": "trend",
    "tau": "trend",
    "change_step": "trend",
    "change": "trend",
    "curvature_low": "curvature",
    "curvature_high": "curvature",
    "pass_1": "pass",
    "pass_k": "pass",
    "mean": "slices",
    "spread": "slices",
}
