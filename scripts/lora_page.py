"""The LoRA study's page: one figure, the two censuses side by side, and what training gained.

    python scripts/lora_page.py outputs/lora_study --page results/lora

Written into its directory: README.md (from lora_page.md.j2), the figure, and `data` with every dataset and journal that
was read, so that the same command makes the page again from there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rlvr_landscape_analysis import figures
from rlvr_landscape_analysis.comparison import compare
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.evidence import open_evidence
from rlvr_landscape_analysis.report.files import write_whole
from rlvr_landscape_analysis.schema import EVALUATIONS_FILE, METRICS_FILE, RUN_FILE
from rlvr_landscape_analysis.statistics.census import census
from rlvr_landscape_analysis.statistics.wording import number
from rlvr_landscape_analysis.trainer_log import open_training

sys.path.insert(0, str(Path(__file__).parent))
from study_page import carry_out, command, copy_files, environment, sizes, stage_rows

SPACES = ("inside", "outside")
FIGURE = "inside_and_outside"


def keep(out: Path, target: Path) -> None:
    """Copy what the page is made of to `target`, in the same places."""
    if target.resolve() == out.resolve():
        return
    files = [out / "record.json", *(out / "run" / name for name in (RUN_FILE, METRICS_FILE, EVALUATIONS_FILE))]
    for space in SPACES:
        files += sorted((out / space).glob("census_step*.nc"))
    copy_files(files, out, target)


def rows_of(out: Path) -> list[tuple[str, ...]]:
    """A row per distance and quantity: inside, outside, and outside minus inside, each with its interval."""
    found = compare(out / "inside", out / "outside")
    rows = []
    for row in found.rows:
        if row.quantity == "reward" or row.radius == 0:
            continue
        cells = [f"{row.radius:.2g}", {"change": "reward change", "kl": "KL, nat"}[row.quantity]]
        for side in (row.first, row.second, row.difference):
            low, high = (float(bound) for bound in side.interval(found.confidence))
            interval = (float("nan"), float("nan")) if row.reason else (low, high)
            cells.append(number(float(side.value), interval, digits=4))
        rows.append(tuple(cells))
    return rows


def make_page(out: Path, page: Path) -> Path:
    """Write everything; returns the page."""
    record = json.loads((out / "record.json").read_text())["stages"]
    page.mkdir(parents=True, exist_ok=True)
    found = {}
    for space in SPACES:
        censuses = open_evidence(out / space).censuses
        if len(censuses) != 1:
            raise AnalysisError(f"{out / space} holds censuses of {len(censuses)} snapshots; one is needed")
        found[space] = census(next(iter(censuses.values())))
    drawn = figures.compare_censuses(found)
    figures.save_figure(drawn["axes"]["change"].figure, page / FIGURE)
    configuration = json.loads((out / "run" / RUN_FILE).read_text())["configuration"]
    run = open_training(out / "run")
    training = [
        (
            str(int(step)),
            f"{float(run['held_out'][at]):.3f}",
            number(float(run["gain"][at]), tuple(float(v) for v in run["gain_interval"].values[at]), digits=3)
            if step
            else "0",
        )
        for at, step in enumerate(run["look"].values.tolist())
    ]
    keep(out, page / "data")
    text = (
        environment(page)
        .get_template("lora_page.md.j2")
        .render(
            **sizes(record),
            figure=f"{FIGURE}.png",
            lora=configuration["lora"],
            env=configuration["env"],
            rate=configuration["optimizer"]["lr"],
            training=training,
            rows=rows_of(out),
            inside=found["inside"],
            step=int(found["inside"]["step"]),
            stages_table=stage_rows(record),
        )
    )
    return write_whole(page / "README.md", text.encode())


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    given = command(__doc__).parse_args(argv)
    return carry_out(lambda: make_page(given.output, given.page))


if __name__ == "__main__":
    sys.exit(main())
