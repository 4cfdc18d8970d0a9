"""`python -m rlvr_landscape_analysis RUN_DIR`: draw every landscape of a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Draw RUN_DIR's datasets into RUN_DIR/figures; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m rlvr_landscape_analysis", description=__doc__)
    parser.add_argument("run", type=Path, help="output directory of a sweep")
    arguments = parser.parse_args(argv)

    from rlvr_landscape_analysis.figures import new_figure, panel_aspect, reward_landscape, save_figure
    from rlvr_landscape_analysis.landscape import open_landscape

    datasets = sorted(arguments.run.glob("landscape_step*_slice*.nc"))
    if not datasets:
        print(f"error: {arguments.run} holds no landscape_step*_slice*.nc; has the sweep finished?", file=sys.stderr)
        return 2
    for path in datasets:
        try:
            data = open_landscape(path)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        with data:
            figure, ax = new_figure(aspect=panel_aspect(data))
            reward_landscape(data, ax)
        for target in save_figure(figure, arguments.run / "figures" / path.stem):
            print(f"figure {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
