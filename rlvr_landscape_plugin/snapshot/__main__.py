"""`python -m rlvr_landscape_plugin.snapshot ls|verify RUN_DIR`: list or check the snapshots of a training run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlvr_landscape_plugin.errors import SnapshotError, run_cli, suggest
from rlvr_landscape_plugin.snapshot import Manifest, find_snapshots, open_snapshot, step_of_path


def _print_table(path: Path, verify: bool, base: str | None) -> None:
    """One row per snapshot; `base`: the model of adapters that do not name it.

    Raises `SnapshotError` with every problem found, after the table.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(path))
    for heading in ("step", "state", "trainer", "run", "objective", "reward", "MB"):
        table.add_column(heading, justify="right" if heading in ("step", "reward", "MB") else "left")
    problems, folders = [], find_snapshots(path)
    for folder in folders:
        try:
            snapshot = open_snapshot(folder, base)
            if verify:
                snapshot.verify()
        except SnapshotError as error:
            problems.append(str(error))
            table.add_row(str(step_of_path(folder) or 0), "[red]refused[/red]")
            continue
        manifest = snapshot.manifest or Manifest(snapshot.step)
        state = "verified" if verify else ("complete" if manifest.files else "no checksums")
        reward = manifest.metrics.get("reward")
        size = sum(file.stat().st_size for file in snapshot.files) / 1e6
        table.add_row(
            str(snapshot.step),
            state,
            " ".join(str(manifest.trainer[key]) for key in ("name", "version") if key in manifest.trainer),
            manifest.run[:12],
            str(manifest.objective.get("name", "")),
            f"{reward:.3f}" if isinstance(reward, int | float) else "",
            f"{size:.1f}",
        )
    Console().print(table)
    if problems:
        raise SnapshotError("\n       ".join(problems))
    measured = folders[0] if len(folders) == 1 else path
    suggest(f"rlvr-landscape sweep --snapshots {measured} --output outputs/NAME --dry-run")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit code. `prog`: what the user typed, for the usage line."""
    parser = argparse.ArgumentParser(
        prog=prog or "python -m rlvr_landscape_plugin.snapshot", description="Look at the snapshots of a training run."
    )
    parser.add_argument("command", choices=("ls", "verify"), help="ls: list them; verify: read and compare every byte")
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="a run's directory, its snapshots/, or one snapshot"
    )
    parser.add_argument(
        "--base-model", metavar="DIR", help="the model that adapters belong to; default: the one that they name"
    )
    given = parser.parse_args(argv)
    return run_cli(lambda: _print_table(given.run_dir, given.command == "verify", given.base_model))


if __name__ == "__main__":
    sys.exit(main())
