"""Training states on disk: whole only with their marker."""

from __future__ import annotations

from pathlib import Path

COMPLETE = "COMPLETE"
"""Marker of a training state that is whole: the last file to be written."""


def complete_states(folder: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every whole training state in `folder`, by step."""
    found = [(int(path.name.rpartition("-")[2]), path) for path in folder.glob("checkpoint-*") if path.is_dir()]
    return sorted((step, path) for step, path in found if (path / COMPLETE).is_file())
