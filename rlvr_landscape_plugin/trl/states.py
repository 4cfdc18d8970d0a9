"""Training states on disk, what a killed run continues from: whole only with their marker."""

from __future__ import annotations

import shutil
from pathlib import Path

from rlvr_landscape_plugin.files import sync, writing

COMPLETE = "COMPLETE"
"""Marker of a training state that is whole: the last file to be written."""
STATES_ARE_SAFE = "complete training states are kept"
"""What training says is safe when a disk refuses."""


def complete_states(folder: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every whole training state in `folder`, by step."""
    found = []
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal() and (path / COMPLETE).is_file():
            found.append((int(step), path))
    return sorted(found)


def complete(state: Path) -> None:
    """Mark a training state as whole, once every file of it is on disk. Raises `StoreError` for a disk that refuses."""
    with writing(state, STATES_ARE_SAFE):
        for item in (*state.rglob("*"), state):
            sync(item)
        (state / COMPLETE).touch()
        sync(state)


def keep_last(folder: Path, count: int = 2) -> None:
    """Remove all whole states but the last `count`."""
    for _, old in complete_states(folder)[:-count]:
        # The marker is removed first: a removal that is cut short must not leave half a state that looks complete.
        (old / COMPLETE).unlink()
        shutil.rmtree(old)


def remove_incomplete(folder: Path) -> None:
    """Remove states that a killed process left without their marker."""
    whole = {path for _, path in complete_states(folder)}
    for leftover in folder.glob("checkpoint-*"):
        if leftover not in whole and leftover.is_dir():
            shutil.rmtree(leftover)
