"""`rlvr-landscape report RUN_DIR`: draw and analyse every landscape of a run, and write its report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlvr_landscape_analysis.results import RunAnalysis


def parser(prog: str = "python -m rlvr_landscape_analysis") -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog=prog, description=__doc__)
    made.add_argument("run", type=Path, metavar="RUN_DIR", help="output directory of a sweep")
    made.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: RUN_DIR/report)")
    made.add_argument("--resamples", type=int, default=2000, metavar="N", help="resamples of the prompts (%(default)s)")
    made.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the resampling (%(default)s)")
    made.add_argument("--level", type=float, default=0.95, help="confidence of the intervals (%(default)s)")
    made.add_argument(
        "--threshold", type=float, help="reward from which a rollout passes (default: as the sweep fixed it, else 0.99)"
    )
    made.add_argument("--steps", type=int, nargs="+", metavar="STEP", help="snapshots to use (default: all)")
    made.add_argument(
        "--no-animation", action="store_true", help="leave out the animation over training, which is slow"
    )
    return made


def main(argv: Sequence[str] | None = None, prog: str = "python -m rlvr_landscape_analysis") -> int:
    """Draw RUN_DIR's datasets into RUN_DIR/figures and write the report; returns the exit code.

    Prints the figures' paths, the verdicts and where the report is. A user's mistake is one line on standard error and
    exit code 2.
    """
    arguments = parser(prog).parse_args(argv)

    # Late, so that --help and a mistyped option answer at once.
    from rlvr_landscape_analysis.errors import AnalysisError

    try:
        _run(arguments)
    except (AnalysisError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(arguments: argparse.Namespace) -> None:
    from rlvr_landscape_analysis.report.page import write_report
    from rlvr_landscape_analysis.run import analyse_run
    from rlvr_landscape_analysis.statistics.resample import Bootstrap

    settings = Bootstrap(resamples=arguments.resamples, seed=arguments.seed, level=arguments.level)
    analysis = analyse_run(arguments.run, bootstrap=settings, steps=arguments.steps, threshold=arguments.threshold)
    for target in _draw(analysis):
        print(f"figure {target}")
    written = write_report(analysis, arguments.out or arguments.run / "report", animation=not arguments.no_animation)
    print()
    for claim in analysis.claims:
        print(f"{claim.name} {claim.verdict}: {claim.sentence}")
        if claim.prompts_needed is not None:
            wanted = f"{claim.prompts_needed} prompts"
            if claim.directions_needed is not None:
                wanted = f"{claim.directions_needed} directions with {wanted} each"
            print(f"   About {wanted} would decide it, if the estimate stays.")
    print(f"report {written[0]}")
    print(
        f"next: open {written[0]} in a browser; its figures and tables are files in {written[0].parent}",
        file=sys.stderr,
    )


def _draw(analysis: RunAnalysis) -> list[Path]:
    """RUN_DIR/figures/<dataset>.pdf and .png of every landscape."""
    from rlvr_landscape_analysis.figures import new_figure, panel_aspect, reward_landscape, save_figure
    from rlvr_landscape_analysis.report.pictures import landscape_name

    drawn = []
    for key, map_ in sorted(analysis.maps.items()):
        figure, ax = new_figure(aspect=panel_aspect(map_))
        reward_landscape(map_, ax)
        drawn += save_figure(figure, analysis.path / "figures" / landscape_name(key))
    return drawn


if __name__ == "__main__":
    sys.exit(main())
