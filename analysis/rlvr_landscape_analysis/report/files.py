"""Files of a report: each appears whole under its name or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from rlvr_landscape_analysis.report.latex import to_latex
from rlvr_landscape_analysis.report.table import Table, to_csv, to_markdown

WRITERS: dict[str, Callable[[Table], str]] = {".csv": to_csv, ".md": to_markdown, ".tex": to_latex}


def write_tables(tables: Sequence[Table], folder: Path) -> list[Path]:
    """Write each table as .csv, .md and .tex into `folder`; returns the paths."""
    return [
        write_whole(folder / f"{table.name}{suffix}", write(table).encode())
        for table in tables
        for suffix, write in WRITERS.items()
    ]


def write_whole(path: Path, content: bytes) -> Path:
    """Write under a temporary name in the same directory, then rename; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
