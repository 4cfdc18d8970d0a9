"""The report of a run: figures and tables as files, and one HTML page that needs nothing but itself.

The page may be mailed, archived or opened years later: images, style and script are inline, and its own content
security policy forbids every request. Datasets come from elsewhere, so the templates in `assets/` escape every text
that they are given. Nothing is computed here. What the analysis lacks is left out or said in words.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.report.evidence import evidence_recipes
from rlvr_landscape_analysis.report.files import WRITERS, write_tables, write_whole
from rlvr_landscape_analysis.report.pictures import Pictures, landscape_name
from rlvr_landscape_analysis.report.recipes import recipes
from rlvr_landscape_analysis.report.table import NOT_DEFINED, Table
from rlvr_landscape_analysis.report.tables import COLUMN_TERMS, all_tables
from rlvr_landscape_analysis.results import NOT_MEASURABLE, UNDECIDED, VERDICTS, Claim, RunAnalysis
from rlvr_landscape_analysis.schema import PROMPTS_SHA256, SYNTHETIC, VERIFIER, landscape_file, paid_by
from rlvr_landscape_analysis.statistics.wording import sampled

BADGES: dict[str, str] = dict(zip(VERDICTS, ("supported", "not-supported", "undecided", "not-measurable"), strict=True))
"""Verdict → class of its badge in the style sheet."""


def write_report(
    analysis: RunAnalysis,
    out: str | Path,
    *,
    animation: bool = True,
    now: datetime | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write `out`/report.html, `out`/figures and `out`/tables; returns the paths written, the page first.

    Files of an earlier report are replaced one by one, each whole or not at all; others in `out` stay. Equal analyses
    give equal files, but for one time stamp in the page: `now`, by default the present. `progress` gets the title of
    each figure before it is drawn. Raises `AnalysisError` when `out` cannot be a directory.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AnalysisError(f"{folder} cannot hold the report: {error}; choose another --out") from error
    drawn = Pictures(analysis, folder, progress or (lambda _: None))
    tables = all_tables(analysis)
    written = write_tables(tables, folder / "tables")
    drawn.draw_landscapes()
    drawn.draw_leading()
    drawn.draw_recipes([*evidence_recipes(analysis), *recipes(analysis)])
    if animation:
        drawn.animate()
    html = page(analysis, drawn, tables, now or datetime.now(UTC))
    return [write_whole(folder / "report.html", html.encode()), *drawn.written, *written]


def page(analysis: RunAnalysis, drawn: Pictures, tables: Sequence[Table], now: datetime) -> str:
    """The HTML of `report.html`."""
    assets = files("rlvr_landscape_analysis") / "report" / "assets"
    css, script = ((assets / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    environment = Environment(
        loader=PackageLoader("rlvr_landscape_analysis", "report/assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"base64": lambda png: base64.b64encode(png).decode(), "kind": _kind}
    return environment.get_template("template.html").render(
        policy=content_policy(css, script),
        css=Markup(css),  # ours, and named by its digest in the policy
        script=Markup(script),
        data=Markup(json_block(drawn.data)),
        title=f"Reward landscapes of {analysis.path.resolve().name}",
        summary=summary(analysis),
        synthetic=sorted({str(m.attrs[SYNTHETIC]) for m in analysis.maps.values() if SYNTHETIC in m.attrs}),
        controls=sorted({paid_by(m.attrs) for m in analysis.maps.values()} - {VERIFIER}),
        notes=analysis.notes,
        claims=[
            {
                "claim": claim,
                "badge": BADGES[claim.verdict],
                "facts": claim_facts(claim),
                "first": first_sentence(claim.sentence),
                "measured": claim.verdict != NOT_MEASURABLE,
            }
            for claim in analysis.claims
        ],
        drawn=drawn,
        landscape_name=landscape_name,
        tables=[table_parts(table) for table in tables],
        table_files=lambda name: [f"tables/{name}{suffix}" for suffix in WRITERS],
        terms=COLUMN_TERMS,
        not_defined=NOT_DEFINED,
        confidence=f"{analysis.bootstrap.level:.0%}",
        settings=_settings(analysis),
        provenance=provenance(analysis),
        time=now.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    )


def _kind(path: str) -> str:
    return Path(path).suffix[1:].upper()


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
    beside = _beside(analysis)
    if not keys:
        return beside or "Nothing is finished yet."
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
    return ", ".join(filter(None, parts)) + f". {beside}".rstrip()


def _beside(analysis: RunAnalysis) -> str:
    """The censuses, paths and boundaries in one sentence."""
    found = analysis.evidence
    groups = {"census": found.census, "paths": found.path, "boundary": found.boundary} if found is not None else {}
    words = [
        f"{name} of step{'s' * (len(group) > 1)} {', '.join(map(str, sorted(group)))}"
        for name, group in groups.items()
        if group
    ]
    return (words[0][0].upper() + "; ".join(words)[1:] + ".") if words else ""


def first_sentence(text: str) -> str:
    """The first sentence of a claim: a full stop before a capital ends it."""
    return re.split(r"(?<=\.)\s+(?=[A-Z(])", text, maxsplit=1)[0]


def claim_facts(claim: Claim) -> list[tuple[str, str]]:
    """What stands below a claim: its rule, what was sampled, what would decide it and what would overturn it."""
    facts = [("Rule", claim.rule)]
    if claim.prompts:
        facts.append(("Sampled", sampled(claim)))
    if claim.prompts_needed is not None:
        wanted = f"{_rounded(claim.prompts_needed)} prompts"
        if claim.directions_needed is not None:
            wanted = f"{_rounded(claim.directions_needed)} directions with {wanted} each"
        facts.append(("Would decide it", f"about {wanted}, if the estimate stays"))
    elif claim.verdict == UNDECIDED:
        facts.append(("Would decide it", "not known: no number follows from this estimate"))
    if claim.overturn:
        facts.append(("Would overturn it", claim.overturn))
    return facts


def _rounded(number: int) -> str:
    """Two significant digits: more would pretend."""
    digits = max(len(str(number)) - 2, 0)
    return f"{round(number, -digits):,}".replace(",", "\u202f")


def table_parts(table: Table) -> dict[str, Any]:
    """What the template needs of a table: `table`, `label_keys`, `body` and `footnotes` (`Table.layout`)."""
    body, footnotes = table.layout()
    return {"table": table, "label_keys": {label.key for label in table.labels}, "body": body, "footnotes": footnotes}


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


def _settings(analysis: RunAnalysis) -> dict[str, str]:
    settings = analysis.bootstrap
    return {
        "run": str(analysis.path),
        "bootstrap": f"{settings.resamples} resamples of the prompts, seed {settings.seed}, intervals at "
        f"{settings.level:.0%}",
        **({"k of pass@k": str(analysis.k)} if analysis.maps else {}),
    }


def provenance(analysis: RunAnalysis) -> list[tuple[str, str, dict[str, str]]]:
    """Title, file and attributes of every dataset, as text; first, without a file, what is the same in all of them."""
    sources = {
        (f"Step {key[0]}, slice {key[1]}", landscape_file(*key)): values.attrs
        for key, values in sorted(analysis.maps.items())
    }
    sources |= {("", file): attrs for file, attrs in sorted(analysis.sources.items())}
    texts = {key: {name: _attribute(value) for name, value in attrs.items()} for key, attrs in sources.items()}
    names = sorted({name for attrs in texts.values() for name in attrs}, key=_attribute_order)
    every = list(texts.values())
    common = {name: every[0][name] for name in names if len({attrs.get(name) for attrs in every}) == 1}
    if len(texts) < 2:
        common = {}
    parts = [(f"The same in all {len(texts)} datasets", "", common)] if common else []
    for key, attrs in texts.items():
        own = {name: attrs[name] for name in names if name in attrs and name not in common}
        if own:
            parts.append((*key, own))
    return parts


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
