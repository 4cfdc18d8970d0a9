"""`python -m rlvr_landscape_analysis.study NAME=DIR[,DIR…] … --out DIR`: claims of several runs from their designs.

A run is a name and the output directories of its censuses, paths and boundaries. Runs that were trained on another
reward than the verifier's are controls. Written: `claims.md`, one CSV per kind of statistic, and the figures of every
run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.evidence import EvidenceAnalysis, RunEvidence, analyse_evidence, check_runs, open_evidence
from rlvr_landscape_analysis.results import Claim
from rlvr_landscape_analysis.schema import VERIFIER
from rlvr_landscape_analysis.statistics.claims import all_claims
from rlvr_landscape_analysis.statistics.resample import Bootstrap
from rlvr_landscape_analysis.statistics.wording import sampled

if TYPE_CHECKING:
    import pandas as pd


def write_study(
    runs: Sequence[RunEvidence], out: str | Path, *, settings: Bootstrap | None = None, threshold: float | None = None
) -> tuple[list[Claim], list[Path]]:
    """Analyse the runs, decide the claims over all of them, and write tables, figures and `claims.md` into `out`.

    Returns the claims and the files written. Raises `AnalysisError` where two runs have one name or a run has nothing.
    """
    chosen = settings or Bootstrap()
    check_runs(runs)
    empty = [run.name for run in runs if not run]
    if empty:
        raise AnalysisError(f"run {empty[0]!r} has no finished census, path or boundary")
    analyses = [analyse_evidence(run, bootstrap=chosen, threshold=threshold) for run in runs]
    trained = [one for one, run in zip(analyses, runs, strict=True) if not run.control]
    claims = all_claims(runs, settings=chosen, threshold=threshold, analyses=trained)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    written = [_claims_page(claims, runs, analyses, folder / "claims.md")]
    for kind in ("census", "path", "boundary", "change"):
        frame = table(analyses, kind)
        if len(frame):
            written.append(folder / f"{kind}.csv")
            frame.to_csv(written[-1], index=False, float_format="%.6g")
    for analysis in analyses:
        written += _draw(analysis, folder / "figures")
    return claims, written


def table(analyses: Iterable[EvidenceAnalysis], kind: str) -> pd.DataFrame:
    """One row per run, step and radius (`census`), position (`path`) or k (`boundary`, `change`); bounds as columns."""
    import pandas as pd

    frames = []
    for analysis in analyses:
        for step, data in getattr(analysis, kind).items():
            frame = _flat(data)
            frame.insert(0, "step", step)
            frame.insert(0, "run", analysis.name)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


_ROWS = {"radius": ("radius",), "position": ("path", "position"), "k": ("k",)}


def _flat(data: xr.Dataset) -> pd.DataFrame:
    import pandas as pd

    rows = next(dims for axis, dims in _ROWS.items() if axis in data.dims)
    columns: dict[str, np.ndarray] = {}
    index = pd.MultiIndex.from_product([data[dim].values for dim in rows], names=rows).to_frame(index=False)
    for name, values in (data.coords | data.data_vars).items():
        if not set(rows) <= set(values.dims) or name in rows:
            continue
        others = [str(dim) for dim in values.dims if dim not in rows]
        if set(others) - {"pair", "member", "bound"}:
            continue
        flat = values.transpose(*rows, *others).values.reshape(len(index), -1)
        labels = [""]
        for dim in others:
            labels = [f"{label}_{value}" for label in labels for value in data[dim].values]
        for label, column in zip(labels, flat.T, strict=True):
            columns[f"{str(name).removesuffix('_interval')}{label}"] = column
    return pd.concat([index, pd.DataFrame(columns)], axis=1)


def _claims_page(
    claims: Sequence[Claim], runs: Sequence[RunEvidence], analyses: Sequence[EvidenceAnalysis], target: Path
) -> Path:
    lines = ["# Claims", ""]
    names = [f"{run.name} ({_paid(run)})" if run.control else run.name for run in runs]
    lines += [f"Runs: {', '.join(names)}.", ""]
    for claim in claims:
        lines += [f"## {claim.name}. {claim.title}: {claim.verdict}", "", claim.sentence, ""]
        if text := sampled(claim):
            lines.append(f"- Sampled: {text}.")
        if claim.prompts_needed is not None:
            wanted = f"{claim.prompts_needed} prompts"
            if claim.directions_needed is not None:
                wanted = f"{claim.directions_needed} directions with {wanted} each"
            lines.append(f"- Would decide it: about {wanted}, if the estimate stays.")
        if claim.overturn:
            lines.append(f"- Would overturn it: {claim.overturn}.")
        lines += [f"- Rule: {claim.rule}", ""]
    notes = [note for analysis in analyses for note in analysis.notes]
    if notes:
        lines += ["## Notes", "", *(f"- {note}" for note in notes), ""]
    target.write_text("\n".join(lines), encoding="utf-8")
    return target


def _paid(run: RunEvidence) -> str:
    """What made a run a control."""
    trained = f"trained on {run.trained_on} rewards" if run.trained_on != VERIFIER else ""
    measured = f"measured by {run.reward_mode} rewards" if run.reward_mode != VERIFIER else ""
    return ", ".join(filter(None, (trained, measured)))


def _draw(analysis: EvidenceAnalysis, folder: Path) -> list[Path]:
    from rlvr_landscape_analysis import figures as drawing

    drawn = {}
    for step, census in analysis.census.items():
        drawn[f"frontier_step{step:06d}"] = drawing.frontier(census, analysis.path.get(step))
    if analysis.census:
        drawn["correlation_by_radius"] = drawing.correlation_by_radius(analysis.census)
        drawn["density_by_radius"] = drawing.density_by_radius(analysis.census)
        drawn["curvature"] = drawing.curvature_over_training(analysis.census, analysis.path)
    if analysis.boundary:
        drawn["boundary"] = drawing.pass_at_k_by_step(analysis.boundary, analysis.change)
    written = []
    for name, artists in drawn.items():
        figure = artists["figure"] if "figure" in artists else artists["ax"].figure
        written += drawing.save_figure(figure, folder / f"{analysis.name}_{name}")
    return written


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m rlvr_landscape_analysis.study", description=__doc__)
    made.add_argument(
        "runs", nargs="+", metavar="NAME=DIR[,DIR...]", help="a run and the output directories of its sweeps"
    )
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="where tables, figures and claims.md go")
    made.add_argument("--level", type=float, default=0.95, help="confidence of the intervals (%(default)s)")
    made.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the resampling (%(default)s)")
    made.add_argument(
        "--threshold", type=float, help="reward from which a rollout passes (default: as the sweep fixed it, else 0.99)"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Print the verdicts; what a user can get wrong is one line on standard error and exit code 2."""
    arguments = parser().parse_args(argv)
    try:
        runs = []
        for text in arguments.runs:
            name, equals, folders = text.partition("=")
            if not equals or not name or not folders:
                raise AnalysisError(f"{text!r} is not NAME=DIR[,DIR...]; for example grpo=outputs/census,outputs/path")
            runs.append(open_evidence(*folders.split(","), name=name))
        settings = Bootstrap(seed=arguments.seed, level=arguments.level)
        claims, written = write_study(runs, arguments.out, settings=settings, threshold=arguments.threshold)
    except (AnalysisError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for claim in claims:
        print(f"{claim.name} {claim.verdict}: {claim.sentence}")
    print(f"claims {written[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
