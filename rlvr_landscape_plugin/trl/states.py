"""Training states on disk, what a killed run continues from: whole only with their marker."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rlvr_landscape_plugin.errors import StoreError
from rlvr_landscape_plugin.files import file_sha256, replace_text, sync, writing

COMPLETE = "COMPLETE"
"""Marker of a training state that is whole: the last file to be written. It holds the SHA-256 of the others as JSON;
that of older versions is empty."""
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
        files = {str(path.relative_to(state)): file_sha256(path) for path in sorted(state.rglob("*")) if path.is_file()}
        replace_text(state / COMPLETE, [json.dumps(files, indent=1)], safe=STATES_ARE_SAFE)


def check_state(state: Path) -> None:
    """Raise `StoreError` where a file of a whole training state is not what its marker says."""
    text = (state / COMPLETE).read_text(errors="replace")
    if not text:
        return
    advice = f"restore it from a copy, or remove {state}: the same command continues from the state before, if any"
    try:
        files = json.loads(text)
        problem = next((name for name, sha256 in files.items() if file_sha256(state / name) != sha256), None)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise StoreError(f"{state / COMPLETE} is damaged, or a file that it names: {error}; {advice}") from error
    if problem is not None:
        raise StoreError(f"{state / problem} is damaged: its checksum is not that in {COMPLETE}; {advice}")


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
