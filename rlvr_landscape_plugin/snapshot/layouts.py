"""How trainers name and arrange what they save: which directory is of which step, and where a run's snapshots lie.

    snapshots/step_000100  adapters/step_000100    this project, with TRL and with prime-rl
    weights/step_100                               prime-rl
    checkpoint-100                                 TRL, transformers
    global_step100_hf                              OpenRLHF
    global_step_100/actor/huggingface              verl; of LoRA runs global_step_100/actor/lora_adapter

A Hub revision with such a name tells its step too.
"""

from __future__ import annotations

import re
from pathlib import Path

from rlvr_landscape_plugin.errors import SnapshotError

_STEP = re.compile(r"(?:step_|global_step_?|checkpoint-)(\d+)(?:_hf)?$")
_WITHIN = ("actor/lora_adapter", "lora_adapter", "lora_adapters", "actor/huggingface", "huggingface")
"""Where below the directory of a step its snapshot may lie. An adapter comes first: what verl and older prime-rl save
beside the adapter of a LoRA run is the base model."""
_INNER = {part for place in _WITHIN for part in place.split("/")}
_FOLDERS = ("snapshots", "adapters", "weights", ".")
"""Where in a run's directory the steps may lie, in the order in which they are searched."""


def step_of_name(name: str) -> int | None:
    """The step that the name of a directory or of a Hub revision tells; None if it tells none."""
    match = _STEP.search(name)
    return int(match.group(1)) if match else None


def step_directory(path: Path) -> Path:
    """The directory whose name may tell the step: `path`, or the one around verl's `actor/huggingface`."""
    while path.name in _INNER and step_of_name(path.name) is None and path.parent != path:
        path = path.parent
    return path


def step_of_path(path: Path) -> int | None:
    """The step that a snapshot's directory tells by its name, or by the one around it; None if neither does."""
    return step_of_name(step_directory(path).name)


def run_directory(path: Path) -> Path:
    """The directory that holds the other snapshots of the same run."""
    return step_directory(path).parent


def is_snapshot(path: Path) -> bool:
    """Whether a directory looks like a snapshot: a whole model or an adapter."""
    return (path / "config.json").is_file() or (path / "adapter_config.json").is_file()


def snapshot_within(path: Path) -> Path | None:
    """Where the snapshot of a step's directory lies: below it, as verl's, or there itself; None if there is none."""
    places = [path / within for within in _WITHIN]
    return next((place for place in (*places, path) if is_snapshot(place)), None)


def find_snapshots(path: Path) -> list[Path]:
    """Snapshot directories of a run, by step: those in its `snapshots/`, `adapters/` or `weights/`, else in `path`
    itself; else `path`, if it is one.

    Directories with the name of a step are listed also where they hold no snapshot, so that opening them tells why.
    Raises `SnapshotError` where there are none, and where two snapshots say the same step.
    """
    if not path.is_dir():
        raise SnapshotError(f"{path} is not a directory; give a run's directory, or one that holds step_<N>/")
    for folder in _FOLDERS:
        if found := _steps(path / folder):
            return [found[step] for step in sorted(found)]
    if is_snapshot(path):
        return [path]
    raise SnapshotError(
        f"{path} holds no snapshots (step_<N>/, checkpoint-<N>/, global_step<N>_hf/ or global_step_<N>/ there, or in "
        "its snapshots/, adapters/ or weights/)"
    )


def _steps(folder: Path) -> dict[int, Path]:
    """Step → directory of its snapshot."""
    named: dict[int, list[Path]] = {}
    for item in sorted(folder.glob("*")) if folder.is_dir() else []:
        match = _STEP.fullmatch(item.name)
        if match and item.is_dir():
            named.setdefault(int(match.group(1)), []).append(item)
    found: dict[int, Path] = {}
    for step, items in named.items():
        inner = [place for item in items if (place := snapshot_within(item)) is not None]
        if len(inner) > 1:
            raise SnapshotError(f"{inner[0]} and {inner[1]} both say step {step}; name the one that is meant")
        found[step] = (inner or items)[0]
    return found
