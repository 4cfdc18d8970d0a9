"""The tables of the companion diagnostics: pass@k of the checkpoints, and one row for every other number."""

from __future__ import annotations

from dataclasses import replace

from rlvr_landscape_analysis.report.reading import steps_of, text_of, value_of
from rlvr_landscape_analysis.report.table import Cell, Column, Table, count, general, plain
from rlvr_landscape_analysis.results import RunAnalysis

STEP = Column("step", "step", count)
SHOWN_K = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def pass_at_k_table(analysis: RunAnalysis) -> Table | None:
    """One row per snapshot: pass@k for a few k (all of them in the CSV)."""
    data = analysis.diagnostics.get("pass_at_k")
    if data is None or "pass_at_k" not in data:
        return None
    ks = [int(k) for k in data["k"].values]
    shown = {k for k in ks if k in SHOWN_K} | {ks[-1]}
    why = "no prompt has that many valid rollouts"
    return Table(
        "pass_at_k",
        "pass@k of the checkpoints",
        f"Unbiased estimates with Student intervals over prompts at {analysis.bootstrap.level:.0%}.",
        [STEP],
        [Column(f"pass_at_{k}", f"pass@{k}", plain, shown=k in shown) for k in ks],
        [
            {"step": str(step)} | {f"pass_at_{k}": value_of(data, "pass_at_k", {"step": step, "k": k}, why) for k in ks}
            for step in steps_of(data)
        ],
    )


def diagnostics_table(analysis: RunAnalysis) -> Table:
    """One row per number: entropy law, exploitation index, two stages, crossing, token surprisal."""
    found = analysis.diagnostics
    table = Table(
        "diagnostics",
        "Companion diagnostics",
        "Entropy law: R = −a exp(H) + b. Exploitation index: 1 − Δpass@k / Δpass@1 between the first and the last "
        "snapshot.",
        [Column("diagnostic", "diagnostic"), Column("of", "of"), Column("number", "number")],
        [Column("value", "value", general)],
    )

    def add(diagnostic: str, of: str, number: str, cell: Cell) -> None:
        table.rows.append({"diagnostic": diagnostic, "of": of, "number": number, "value": cell})

    law = {"a": "a", "b": "b", "ceiling": "reward at zero entropy, b − a", "r_squared": "R²"}
    if "entropy_law_training" in found:
        for name, title in law.items():
            add("entropy law", "training", title, value_of(found["entropy_law_training"], name))
    if "entropy_law_slice" in found:
        data = found["entropy_law_slice"]
        for step in steps_of(data):
            for name, title in law.items():
                add("entropy law", f"slice at step {step}", title, value_of(data, name, {"step": step}))
    series = analysis.over_training
    reason = text_of(series, "exploitation_reason")
    of = "training"
    if "exploitation_first_step" in series:
        of = f"step {int(series['exploitation_first_step'])} to {int(series['exploitation_last_step'])}"
    for name, title in {
        "gain": "Δpass@1",
        "coverage": f"Δpass@{analysis.k}",
        "contrast": f"Δpass@{analysis.k} − ½ Δpass@1",
        "index": "exploitation index",
    }.items():
        if f"exploitation_{name}" in series:
            add(
                "exploitation",
                of,
                title,
                value_of(series.drop_vars("reason", errors="ignore"), f"exploitation_{name}", None, reason),
            )
    if "two_stage" in found:
        data = found["two_stage"]
        for name, title in {
            "before": "slope before the bend",
            "after": "slope after the bend",
            "bend": "step of the bend",
            "explained": "squared error the bend takes away",
        }.items():
            cell = value_of(data, name)
            add("two stages", f"pass@{analysis.k}", title, replace(cell, format=count) if name == "bend" else cell)
        if "stage" in data:
            add("two stages", f"pass@{analysis.k}", "reading", text_of(data, "stage"))
    if "crossing" in found:
        data = found["crossing"]
        steps = [data.attrs.get(name) for name in ("first_step", "last_step")]
        of = f"step {steps[1]} minus {steps[0]}" if None not in steps else "last minus first snapshot"
        ks = [int(k) for k in data["k"].values]
        for k in sorted({ks[0], ks[-1]}):
            why = "no prompt has that many valid rollouts"
            add("crossing", of, f"Δpass@{k}", value_of(data.drop_vars("reason"), "difference", {"k": k}, why))
        add(
            "crossing",
            of,
            "first k at which the earlier snapshot wins",
            replace(value_of(data, "crossing_k"), format=count),
        )
    if "token_surprisal" in found:
        data = found["token_surprisal"]
        for step in steps_of(data):
            for name, title in {
                "mean": "mean, nat per token",
                "top_share": "carried by the top 20 % of tokens",
            }.items():
                add("token surprisal", f"step {step}", title, value_of(data, name, {"step": step}))
    return table
