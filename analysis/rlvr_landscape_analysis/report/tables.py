"""The tables of a `RunAnalysis`: which of its numbers stand where. Nothing is computed here."""

from __future__ import annotations

from rlvr_landscape_analysis.report.diagnostics import STEP, diagnostics_table, pass_at_k_table
from rlvr_landscape_analysis.report.reading import snapshots_of, steps_of, value_of
from rlvr_landscape_analysis.report.table import (
    Cell,
    Column,
    Table,
    Value,
    count,
    general,
    percent,
    plain,
    short,
    signed,
    signed3,
)
from rlvr_landscape_analysis.results import (
    CONTROL_NAMES,
    NOT_MEASURABLE,
    PAIR_NAMES,
    STATISTIC_NAMES,
    UNDECIDED,
    RunAnalysis,
    statistic_name,
)


def all_tables(analysis: RunAnalysis) -> list[Table]:
    """Every table that the analysis has something for, in the order of a report."""
    builders = (
        claims_table,
        correlations_table,
        improvement_table,
        training_table,
        trend_table,
        curvature_table,
        diagnostics_table,
        pass_at_k_table,
        slices_table,
    )
    return [table for table in (build(analysis) for build in builders) if table is not None and table.rows]


SLICE = Column("slice_seed", "slice", count)


def claims_table(analysis: RunAnalysis) -> Table:
    """One row per claim: verdict, estimate, prompts."""
    table = Table(
        "claims",
        "Claims and verdicts",
        f"Intervals at {analysis.bootstrap.level:.0%}. T1: correlation of KL and reward over random directions; "
        "T2: its early change; T3: Δpass@k minus 0.4 of Δpass@1.",
        [Column("claim", "claim"), Column("title", "what it says", wide=True), Column("verdict", "verdict")],
        [
            Column("estimate", "estimate", signed3),
            Column("runs", "runs", count),
            Column("directions", "directions", count),
            Column("prompts", "prompts", count),
            Column("directions_needed", "directions needed", count),
            Column("prompts_needed", "prompts needed", count),
            Column("sentence", "in words", wide=True),
            Column("rule", "rule", shown=False),
        ],
    )
    for claim in analysis.claims:
        needed: Cell = "already decided"
        if claim.verdict in (UNDECIDED, NOT_MEASURABLE):
            needed = "not known" if claim.verdict == UNDECIDED else "not a question of prompts"
        if claim.prompts_needed is not None:
            needed = Value(claim.prompts_needed)
        table.rows.append(
            {
                "claim": claim.name,
                "title": claim.title,
                "verdict": claim.verdict,
                "estimate": Value(claim.estimate, *claim.interval, bounded=True, reason=claim.sentence),
                "runs": Value(claim.runs),
                "directions": Value(claim.directions),
                "prompts": Value(claim.prompts),
                "directions_needed": needed if claim.directions_needed is None else Value(claim.directions_needed),
                "prompts_needed": needed,
                "sentence": claim.sentence,
                "rule": claim.rule,
            }
        )
    return table


def correlations_table(analysis: RunAnalysis) -> Table | None:
    """One row per snapshot, slice and pair. The CSV has every statistic of every control."""
    data = analysis.correlations
    if "pair" not in data.dims:
        return None
    statistics = ("pearson", "spearman", "corrected", "spearman_corrected", "contribution")
    controls = [str(c) for c in data["control"].values]
    titles = dict(STATISTIC_NAMES)
    for statistic in statistics:
        for control in controls:
            if statistic in data:
                titles.setdefault((statistic, control), statistic_name(statistic, control))
    columns = [
        Column(f"{statistic}_{control}", title, signed, shown=(statistic, control) in STATISTIC_NAMES)
        for (statistic, control), title in titles.items()
    ]
    members = ("first", "second")
    if "reliability" in data:
        columns += [Column(f"reliability_{m}", f"reliability, {m}", plain) for m in members]
    quantities = [str(q) for q in data["quantity"].values] if "radial_share" in data else []
    columns += [Column(f"radial_share_{q}", f"share of {q} by radius", percent, shown=False) for q in quantities]
    columns += [Column(name, name, count, shown=False) for name in ("points", "prompts")]
    table = Table(
        "correlations",
        "Correlations over the slice",
        f"Pearson and Spearman: of the points' means. All others: sampling noise taken out; within shells, linear "
        "partial and smooth also take the radius out, the radial null keeps nothing else. Beyond the radius: what "
        "differences within shells add to the corrected correlation. Intervals over prompts at "
        f"{analysis.bootstrap.level:.0%}. Reliability: share of the variance over points that is not noise, of the "
        "first and the second quantity of the pair.",
        [STEP, SLICE, Column("pair", "pair", names=PAIR_NAMES)],
        columns,
    )
    for labels, here in snapshots_of(data):
        for pair in map(str, data["pair"].values):
            row: dict[str, Cell] = {**labels, "pair": pair}
            chosen = here.sel(pair=pair)
            for statistic, control in titles:
                where = {"control": control} if control in controls else None
                row[f"{statistic}_{control}"] = value_of(
                    chosen, statistic, where, f"control {control!r} was not computed"
                )
            plain_part = {"control": "none"} if "none" in controls else {"control": controls[0]}
            if "reliability" in data:
                for member in members:
                    row[f"reliability_{member}"] = value_of(chosen, "reliability", {**plain_part, "member": member})
            for quantity in quantities:
                row[f"radial_share_{quantity}"] = value_of(
                    chosen.drop_vars("reason"),
                    "radial_share",
                    {"quantity": quantity},
                    "too few prompts, no such quantity, or no variation beyond sampling noise",
                )
            for name in ("points", "prompts"):
                row[name] = value_of(chosen, name, plain_part)
            table.rows.append(row)
    return table


def improvement_table(analysis: RunAnalysis) -> Table:
    """One row per snapshot and slice: better points, the best point, its gain, overlap of regions."""
    data = analysis.improvement
    fdr, region = data.attrs.get("level"), data.attrs.get("region")
    columns = {
        "better_share": ("better share", percent),
        "better_count": ("better points", count),
        "best_alpha": ("best α", short),
        "best_beta": ("best β", short),
        "best_radius": ("best radius", short),
        "best_kl": ("best KL, nat", general),
        "naive_gain": ("naive gain", signed3),
        "gain": ("corrected gain", signed3),
        "chosen_share": ("same choice", percent),
        "overlap": ("overlap", percent),
        "chance": ("by chance", percent),
        "radial_chance": ("by radius alone", percent),
        "radial_high": ("by radius, 95th percentile", percent),
        "tested": ("points tested", count),
    }
    return Table(
        "improvement",
        "Better policies next to the checkpoint",
        "Better: significantly better than the origin"
        + (f" at a false discovery rate of {fdr:.0%}" if fdr is not None else "")
        + ". Naive gain: of the best point, chosen and valued by the same rollouts, hence too high. Corrected gain: "
        "chosen by half of the prompts and valued on the other half. Overlap: share of the lowest-KL"
        + (f" {region:.0%}" if region is not None else "")
        + " of the points that are also among the highest-reward ones.",
        [STEP, SLICE],
        [
            Column(name, title, style, shown=name not in ("radial_high", "tested"))
            for name, (title, style) in columns.items()
        ],
        [{**labels, **{name: value_of(here, name) for name in columns}} for labels, here in snapshots_of(data)],
    )


def curvature_table(analysis: RunAnalysis) -> Table | None:
    """One row per snapshot, slice and quantity: the quadratic around the origin."""
    data = analysis.curvature
    if "curvature" not in data:
        return None
    quantities = [str(q) for q in data["quantity"].values] if "quantity" in data.dims else [""]
    terms = {
        "gradient_alpha": "∂/∂α",
        "gradient_beta": "∂/∂β",
        "constant": "value at the origin",
        "hessian_aa": "∂²/∂α²",
        "hessian_ab": "∂²/∂α∂β",
        "hessian_bb": "∂²/∂β²",
    }
    columns = [Column(f"curvature_{end}", f"{end}est curvature", general) for end in ("low", "high")]
    columns += [Column(term, title, general, shown=term.startswith("gradient")) for term, title in terms.items()]
    columns += [Column("r_squared", "R²", plain), Column("points", "points", count)]
    table = Table(
        "curvature",
        "Gradient and curvature at the checkpoint",
        "A quadratic fitted near the origin; curvatures are the eigenvalues of its Hessian in the slice, per unit step "
        f"squared. Intervals over prompts at {analysis.bootstrap.level:.0%}.",
        [STEP, SLICE, Column("of", "of", names={"kl": "KL"})],
        columns,
    )
    for labels, here in snapshots_of(data):
        for quantity in quantities:
            part = here.sel(quantity=quantity) if quantity else here
            row: dict[str, Cell] = {**labels, "of": quantity or "reward"}
            row |= {f"curvature_{end}": value_of(part, "curvature", {"eigen": end}) for end in ("low", "high")}
            row |= {term: value_of(part, "coefficient", {"term": term}) for term in terms}
            table.rows.append(row | {name: value_of(part, name) for name in ("r_squared", "points")})
    return table


def training_table(analysis: RunAnalysis) -> Table:
    """One row per snapshot: the checkpoint itself."""
    data = analysis.training
    titles = {
        "reward": "reward",
        "pass_1": "pass@1",
        "pass_k": f"pass@{analysis.k}",
        "entropy": "entropy, nat per token",
        "kl_scale": "KL scale, nat",
    }
    present = [name for name in titles if name in data and (name != "pass_k" or analysis.k > 1)]
    return Table(
        "training",
        "The checkpoints over training",
        f"Means over prompts with Student intervals at {analysis.bootstrap.level:.0%}.",
        [STEP],
        [Column(name, titles[name], plain) for name in present],
        [
            {"step": str(step), **{name: value_of(data, name, {"step": step}, "not measured") for name in present}}
            for step in steps_of(data)
        ],
    )


def trend_table(analysis: RunAnalysis) -> Table | None:
    """One row per control: trend and change point of the KL–reward correlation over training."""
    data = analysis.over_training
    if "control" not in data.dims:
        return None
    columns = [
        Column("slope", "slope against ln(1 + step)", signed3),
        Column("tau", "Kendall's τ", signed),
        Column("change_step", "changes at step", count),
        Column("change", "change", signed3),
        Column("explained", "variance explained", percent),
    ]
    table = Table(
        "trend",
        "KL–reward correlation over training",
        "In Fisher's z of the contribution that the control leaves. One change of level is fitted; the interval of its "
        f"step and all others over prompts at {analysis.bootstrap.level:.0%}.",
        [Column("control", "control", names=CONTROL_NAMES)],
        columns,
    )
    for control in map(str, data["control"].values):
        row: dict[str, Cell] = {"control": control}
        intervals = {"change_step": "change_interval", "change": "change_size_interval"}
        for column in columns:
            row[column.key] = value_of(data, column.key, {"control": control}, interval=intervals.get(column.key))
        table.rows.append(row)
    return table


def slices_table(analysis: RunAnalysis) -> Table | None:
    """One row per snapshot, pair and control: what holds for another random slice; None without several slices."""
    data = analysis.slices
    if data is None:
        return None
    table = Table(
        "slices",
        "Agreement between slices of one snapshot",
        "Contribution to the corrected correlation, mean over slices, with Student's interval over slices at "
        f"{analysis.bootstrap.level:.0%}; spread: standard deviation of Fisher's z.",
        [STEP, Column("pair", "pair", names=PAIR_NAMES), Column("control", "control", names=CONTROL_NAMES)],
        [Column("mean", "mean"), Column("spread", "spread", plain), Column("slices", "slices", count)],
    )
    for step in steps_of(data):
        for pair in map(str, data["pair"].values):
            for control in map(str, data["control"].values):
                where = {"step": step, "pair": pair, "control": control}
                why = "fewer than two slices define it"
                table.rows.append(
                    {
                        "step": str(step),
                        "pair": pair,
                        "control": control,
                        **{name: value_of(data, name, where, why) for name in ("mean", "spread", "slices")},
                    }
                )
    return table


COLUMN_TERMS = {
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
"""Key of a column → term of the glossary in assets/glossary.html, to which the report links its heading."""
