"""Tables: the right number in the right cell, a reason for every hole, and text that stays text."""

from __future__ import annotations

import csv
import functools
import io
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from factory import FEW, NASTY, make_analysis
from rlvr_landscape_analysis.report import table as module
from rlvr_landscape_analysis.report.files import write_tables, write_whole
from rlvr_landscape_analysis.report.latex import PACKAGES, SIDEWAYS, UPRIGHT, escape_latex, to_latex
from rlvr_landscape_analysis.report.table import (
    Column,
    Table,
    Value,
    cell_text,
    escape_markdown,
    to_csv,
    to_markdown,
)
from rlvr_landscape_analysis.report.tables import all_tables
from rlvr_landscape_analysis.results import PAIRS
from rlvr_landscape_analysis.run import analyse_run
from rlvr_landscape_analysis.statistics.resample import Bootstrap
from rlvr_landscape_analysis.synthetic import write_run

NOT_A_NUMBER = re.compile(r"(?<![a-z])[-+−]?(nan|inf(inity)?)(?![a-z])", re.IGNORECASE)


@functools.cache
def made(defined: bool = True) -> list[Table]:
    return all_tables(make_analysis(defined=defined))


def table(name: str, *, defined: bool = True) -> Table:
    return next(t for t in made(defined) if t.name == name)


def records(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize(
    ("format", "number", "text"),
    [
        (module.signed, -0.8149, "−0.81"),
        (module.signed, 0.1, "+0.10"),
        (module.signed, -0.004, "0.00"),
        (module.signed, 0.0, "0.00"),
        (module.signed3, 0.0116, "+0.012"),
        (module.plain, -0.4814, "−0.481"),
        (module.general, -41.27, "−41.3"),
        (module.general, 0.95, "0.950"),
        (module.general, 123.4, "123"),
        (module.general, 1664.2, "1660"),
        (module.general, 2.5e7, "2.50e+07"),
        (module.general, 1e-9, "1.00e−09"),
        (module.short, 0.05, "0.05"),
        (module.short, 0.0, "0"),
        (module.count, 64.0, "64"),
        (module.percent, 0.93, "93%"),
        (module.percent, 0.012, "1.2%"),
        (module.percent, 0.0, "0%"),
    ],
)
def test_numbers(format, number, text):
    assert format(number) == text


@pytest.mark.parametrize(
    ("value", "text", "why"),
    [
        (Value(-0.81, -0.87, -0.59, bounded=True), "−0.81 [−0.87, −0.59]", ""),
        (Value(-0.81), "−0.81", ""),
        (Value(float("nan"), reason=FEW), "not defined", FEW),
        (Value(float("nan"), -1, 1, bounded=True, reason=FEW), "not defined", FEW),
        (Value(-0.81, float("nan"), float("nan"), bounded=True, reason=FEW), "−0.81 [not defined]", FEW),
        (Value(-0.81, -0.9, float("inf"), bounded=True, reason=FEW), "−0.81 [not defined]", FEW),
        (Value(None), "not defined", module.NO_REASON),
        (Value(0.5, format=module.percent), "50%", ""),
        ("words", "words", ""),
        ("", "none", ""),
    ],
)
def test_cells(value, text, why):
    assert cell_text(value, Column("x", "x")) == (text, why)


def test_the_known_number_is_in_its_cell_in_every_format():
    found = table("correlations")
    (row,) = [r for r in found.rows if (r["step"], r["slice_seed"], r["pair"]) == ("10", "0", PAIRS[0])]
    assert cell_text(row["pearson_none"], Column("x", "x"))[0] == "−0.81 [−0.87, −0.59]"
    (record,) = [
        r
        for r in records(to_csv(found))
        if (r["step"], r["slice_seed"], r["pair"], r["quantity"]) == ("10", "0", "kl_reward", "pearson_none")
    ]
    assert [record[name] for name in module.CSV_COLUMNS[1:]] == ["-0.81", "-0.87", "-0.59", "none"]
    markdown = next(line for line in to_markdown(found).splitlines() if line.startswith("| 10 | 0 | KL and reward |"))
    assert markdown.split(" | ")[3] == r"−0.81 \[−0.87, −0.59\]"
    latex = next(line for line in to_latex(found).splitlines() if line.startswith("10 & 0 & KL and reward &"))
    assert latex.split(" & ")[3] == "$-$0.81 {[}$-$0.87, $-$0.59{]}"


def test_every_number_of_the_analysis_arrives():
    """All correlations with every control, by name, against the dataset."""
    analysis = make_analysis()
    rows = {(r["step"], r["slice_seed"], r["pair"], r["quantity"]): r for r in records(to_csv(table("correlations")))}
    data = analysis.correlations
    for statistic in ("pearson", "spearman", "corrected", "contribution", "spearman_corrected"):
        for step in data["step"].values:
            for seed in data["slice_seed"].values:
                for pair in data["pair"].values:
                    for control in data["control"].values:
                        where = {"step": step, "slice_seed": seed, "pair": pair, "control": control}
                        row = rows[str(step), str(seed), pair, f"{statistic}_{control}"]
                        assert float(row["estimate"]) == float(data[statistic].sel(where))
                        if statistic == "spearman_corrected":
                            assert row["low"] == row["high"] == "not applicable"
                        else:
                            interval = data[f"{statistic}_interval"].sel(where)
                            assert [float(row["low"]), float(row["high"])] == interval.values.tolist()
    gain = [r for r in records(to_csv(table("improvement"))) if r["quantity"] == "gain"]
    np.testing.assert_array_equal([float(r["estimate"]) for r in gain], analysis.improvement["gain"].values.ravel())


def test_one_row_per_snapshot_slice_and_pair():
    assert len(table("correlations").rows) == 3 * 2 * 3
    assert len(table("improvement").rows) == 3 * 2
    assert len(table("training").rows) == 3
    assert len(table("slices").rows) == 3 * 3 * 6
    assert [r["claim"] for r in table("claims").rows] == ["T1", "T2", "T3"]


def test_slices_are_compared_only_when_there_are_several():
    names = {t.name for t in all_tables(make_analysis(slices=(0,)))}
    assert "slices" not in names
    assert {"claims", "correlations", "improvement", "training", "curvature", "diagnostics"} <= names


@pytest.mark.parametrize("defined", [True, False])
def test_no_hole_goes_unexplained(defined):
    for found in made(defined):
        text = to_csv(found)
        rows = records(text)
        assert rows, found.name
        header = text.splitlines()[0].split(",")
        assert len(set(header)) == len(header)
        for row in rows:
            assert all(row.values()), row
            assert None not in row
            missing = "not defined" in (row["estimate"], row["low"], row["high"])
            assert missing == (row["reason"] != "none"), row
        for written in (text, to_markdown(found), to_latex(found)):
            assert not NOT_A_NUMBER.search(written), found.name


def test_reasons_are_footnotes():
    found = table("correlations", defined=False)
    body, footnotes = found.layout()
    assert NASTY in footnotes
    assert FEW in footnotes
    texts = {(text, mark) for line in body for text, mark in line if mark}
    assert {mark for _, mark in texts} == set(range(1, len(footnotes) + 1))
    assert any(text.endswith("[not defined]") for text, _ in texts)
    markdown = to_markdown(found)
    for i in range(1, len(footnotes) + 1):
        assert markdown.count(f"[^correlations-{i}]:") == 1
        assert markdown.count(f"[^correlations-{i}]") >= 2


def test_claims_say_how_many_prompts_are_needed():
    cells = [row["prompts_needed"] for row in table("claims").rows]
    assert cells == ["already decided", Value(12345), "already decided"]
    holes = [row["prompts_needed"] for row in table("claims", defined=False).rows]
    assert holes == ["not known", "not a question of prompts"]


@pytest.mark.parametrize("defined", [True, False])
def test_markdown_rows_have_as_many_cells_as_the_heading(defined):
    for found in made(defined):
        lines = [line for line in to_markdown(found).splitlines() if line.startswith("|")]
        assert len(lines) == len(found.rows) + 2
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert cells == {len(found.shown) + 1}, found.name


@pytest.mark.parametrize("defined", [True, False])
def test_latex_is_well_formed(defined):
    for found in made(defined):
        text = to_latex(found)
        plain = re.sub(r"\\[{}$&#%_\\]", "", text)
        depth = 0
        for character in plain:
            depth += (character == "{") - (character == "}")
            assert depth >= 0
        assert depth == 0
        assert plain.count("$") % 2 == 0
        bare = re.sub(r"\\%|^% needs.*$", "", text, flags=re.MULTILINE)
        assert "%" not in bare
        outside = re.sub(r"\$[^$]*\$", "", plain)
        assert not re.search(r"[_^#~]", re.sub(r"\\label\{[^}]*\}", "", outside))
        assert not re.search(r"resizebox|scalebox|scriptsize|tiny", text), "8 pt is the smallest type"


def parts(text: str) -> list[tuple[list[str], list[list[str]]]]:
    """Headings and rows of every part, without LaTeX's commands for footnotes and stacks."""
    found = []
    for part in text.split("\\toprule\n")[1:]:
        heading, body = part.split("\\bottomrule")[0].split("\\midrule\n")
        rows = [line.removesuffix(" \\\\").split(" & ") for line in body.splitlines()]
        heading = re.sub(r"\\shortstack\[.\]\{(.*?)\}(?= &| \\\\\n)", r"\1", heading).replace(r" \\ ", " ")
        found.append(([title.strip() for title in heading.removesuffix(" \\\\\n").split(" & ")], rows))
    return found


@pytest.mark.parametrize("defined", [True, False])
def test_every_cell_stands_in_a_part_beside_its_labels(defined):
    for found in made(defined):
        body, _ = found.layout()
        text = to_latex(found)
        kinds = re.findall(r"\\begin\{(table|sidewaystable)\}", text)
        assert text.count("\\begin{tabular}") == len(kinds) == len(parts(text))
        assert len(set(kinds)) == 1
        shown: dict[str, list[str]] = {}
        for titles, rows in parts(text):
            for place, title in enumerate(titles):
                shown.setdefault(title, []).extend(row[place].split("\\textsuperscript")[0] for row in rows)
            assert all(len(row) == len(titles) for row in rows)
        for place, column in enumerate(found.shown):
            expected = [escape_latex(row[place][0]) for row in body]
            cells = shown[escape_latex(column.title)]
            assert cells[: len(expected)] == expected, (found.name, column.key)
            assert cells == expected * (len(cells) // len(expected)), "repeated labels are the same"


def test_latex_compiles_and_fits_its_pages(tmp_path):
    """Every table of two analyses, in the class that has the narrowest text: nothing overfull, no float too large."""
    engine = shutil.which("pdflatex")
    missing = [name for name in PACKAGES if engine is None or not tex_file(f"{name}.sty")]
    if missing:
        pytest.skip(f"no LaTeX with the packages {', '.join(missing)}")
    tables = [*made(True), *made(False)]
    lines = [r"\documentclass[10pt]{article}", rf"\usepackage{{{','.join(PACKAGES)}}}", r"\begin{document}"]
    for found in tables:
        lines += [to_latex(found), r"\clearpage"]
    (tmp_path / "all.tex").write_text("\n".join([*lines, r"\end{document}", ""]))
    command = [engine, "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-3000:]
    log = (tmp_path / "all.log").read_text(errors="replace")
    overfull = [float(width) for width in re.findall(r"Overfull \\hbox \(([\d.]+)pt", log)]
    assert max(overfull, default=0) < 1, re.findall(r"Overfull.*", log)
    assert "Float too large" not in log, re.findall(r".*Float too large.*", log)


def tex_file(name: str) -> bool:
    return subprocess.run(["kpsewhich", name], capture_output=True).returncode == 0


def test_a_wide_table_stands_sideways_and_a_long_one_in_parts():
    labels, few, many = [Column("who", "who")], [Column("a", "a")], [Column(f"v{i}", f"v{i}") for i in range(12)]
    narrow, wide = (Table("t", "T", "", labels, columns) for columns in (few, many))
    for found in (narrow, wide):
        for i in range(100):
            row = {column.key: Value(-0.5, -0.6, -0.4, bounded=True) for column in found.columns}
            found.rows.append({"who": f"row {i}", **row})
    upright, sideways = to_latex(narrow), to_latex(wide)
    assert "sideways" not in upright
    assert upright.count("\\begin{table}") == -(-100 // UPRIGHT.lines)
    assert sideways.count("\\begin{sidewaystable}") == 3 * -(-100 // SIDEWAYS.lines)
    assert f"(part 1 of {-(-100 // UPRIGHT.lines)})" in upright
    assert re.findall(r"\\label\{(.*?)\}", upright) == ["tab:t", "tab:t-2", "tab:t-3"]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("50% of $x_1$ & #2", r"50\% of \$x\_1\$ \& \#2"),
        ("a\\b{c}", r"a\textbackslash{}b\{c\}"),
        ("~^<>|", r"\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}\textbar{}"),
        ("[1]", "{[}1{]}"),
        ("−0.5 ± 2, α ≤ ½", r"$-$0.5 $\pm$ 2, $\alpha$ $\leq$ $\frac{1}{2}$"),
        ("--steps", "-{}-steps"),
        ("KL–reward", r"KL\textendash{}reward"),
        ('a "b" `c`', r"a ''b'' \textasciigrave{}c\textasciigrave{}"),
        ("two\nlines", "two lines"),
    ],
)
def test_latex_specials(text, escaped):
    assert escape_latex(text) == escaped


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", r"a\|b"),
        ("*x* _y_ `z`", r"\*x\* \_y\_ \`z\`"),
        ("<b>&lt;", r"\<b\>&amp;lt;"),
        ("[x](y)", r"\[x\](y)"),
        ("one\n  two", "one two"),
        ("\\", "\\\\"),
    ],
)
def test_markdown_specials(text, escaped):
    assert escape_markdown(text) == escaped


def test_csv_survives_commas_quotes_and_line_breaks():
    found = Table("t", "T", "", [Column("who", "who")], [Column("v", "v")])
    found.rows.append({"who": 'a, "b"\nc', "v": Value(None, reason="x, y")})
    assert records(to_csv(found)) == [
        {
            "who": 'a, "b"\nc',
            "quantity": "v",
            "estimate": "not defined",
            "low": "not applicable",
            "high": "not applicable",
            "reason": "x, y",
        }
    ]


def test_absent_variables_are_tolerated():
    analysis = make_analysis()
    analysis.correlations = analysis.correlations.drop_vars(
        ["spearman", "spearman_interval", "contribution", "reliability", "radial_share", "reason"]
    )
    analysis.improvement = analysis.improvement.drop_vars(["gain", "overlap", "reason"])
    analysis.curvature = analysis.curvature.drop_vars(["r_squared", "reason"])
    analysis.over_training = analysis.over_training.drop_vars(["slope", "reason"])
    analysis.training = analysis.training[[]]
    analysis.diagnostics, analysis.slices, analysis.claims = {}, None, []
    for found in all_tables(analysis):
        for row in records(to_csv(found)):
            assert all(row.values())
    gain = next(t for t in all_tables(analysis) if t.name == "improvement").rows[0]["gain"]
    assert gain == Value(None, bounded=True, reason="not part of this analysis")


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    written = write_tables([table("training"), table("claims")], tmp_path / "tables")
    names = ["training.csv", "training.md", "training.tex", "claims.csv", "claims.md", "claims.tex"]
    assert [path.name for path in written] == names
    assert sorted(os.listdir(tmp_path / "tables")) == sorted(names)
    target = tmp_path / "kept.txt"
    target.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(target, b"new")
    assert target.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["kept.txt", "tables"]


def test_the_factory_looks_like_a_real_analysis(tmp_path):
    """Else these tests would test a fiction."""
    write_run(tmp_path, steps=(0, 1), slices=(0, 1), points=5, prompts=16, rollouts=4)
    real = analyse_run(tmp_path, bootstrap=Bootstrap(resamples=100))
    by_hand = make_analysis(steps=(0, 1))
    for name in ("correlations", "improvement", "curvature", "training", "over_training", "slices"):
        ours, theirs = getattr(by_hand, name), getattr(real, name)
        assert set(ours.data_vars) == set(theirs.data_vars), name
        for variable in ours.data_vars:
            assert set(ours[variable].dims) == set(theirs[variable].dims), (name, variable)
    assert set(by_hand.diagnostics) == set(real.diagnostics)
    for name, data in by_hand.diagnostics.items():
        assert set(data.data_vars) == set(real.diagnostics[name].data_vars), name
    assert set(by_hand.maps[0, 0].data_vars) == set(real.maps[0, 0].data_vars)
    assert [t.name for t in all_tables(by_hand)] == [t.name for t in all_tables(real)]
    for found in all_tables(real):
        assert not NOT_A_NUMBER.search(to_csv(found))
