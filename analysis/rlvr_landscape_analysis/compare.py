"""The command `rlvr-landscape compare A B`, also `python -m rlvr_landscape_analysis.compare`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def parser(prog: str = "python -m rlvr_landscape_analysis.compare") -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog=prog, description="Compare two runs, or two datasets, side by side.")
    for name in ("first", "second"):
        made.add_argument(
            name, type=Path, metavar="A" if name == "first" else "B", help="output of a sweep, or a dataset"
        )
    made.add_argument("--out", type=Path, metavar="DIR", help="where the page goes (default: outputs/compare_A_B)")
    made.add_argument("--level", type=float, default=0.95, help="confidence of the intervals (%(default)s)")
    return made


def main(argv: Sequence[str] | None = None, prog: str = "python -m rlvr_landscape_analysis.compare") -> int:
    """Print the table and write the page; returns the exit code: 0, or 2 for what cannot be compared."""
    given = parser(prog).parse_args(argv)

    # Late, so that --help and a mistyped option answer at once.
    from rlvr_landscape_analysis.comparison import compare
    from rlvr_landscape_analysis.errors import AnalysisError
    from rlvr_landscape_analysis.report.comparison import comparison_table, headline, plain_table, write_comparison

    try:
        found = compare(given.first, given.second, given.level)
        out = given.out or Path("outputs") / "compare_{}_{}".format(*(Path(name).stem for name in found.names))
        written = write_comparison(found, out)
    except (AnalysisError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(plain_table(comparison_table(found)))
    print()
    for sentence in (*headline(found), *found.notes):
        print(sentence)
    print(f"comparison {written[0]}")
    print(f"next: open {written[0]} in a browser", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
