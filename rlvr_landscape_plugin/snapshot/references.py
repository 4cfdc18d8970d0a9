"""What a user writes to name snapshots: a directory, a run's directory, a pattern, a Hub id, or a shipped name."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from rlvr_landscape_plugin.errors import SnapshotError
from rlvr_landscape_plugin.snapshot.layouts import (
    find_snapshots,
    is_snapshot,
    snapshot_within,
    step_of_name,
    step_of_path,
)

SHIPPED = {"tiny-sorter": Path(__file__).parents[1] / "policies" / "tiny_sorter"}
"""Policies that come with the package, by the name a configuration uses."""
_HUB = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)@(?P<revision>[^@\s]+)")
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""Files of a repository that a snapshot may need; pickled weights are not among them."""


def expand(reference: str) -> list[str]:
    """References to single snapshots: a pattern stands for all that it matches, a run's directory for its snapshots.

    In the order of their steps. Raises `SnapshotError` for a pattern that matches nothing and a directory without
    snapshots.
    """
    if reference in SHIPPED or _hub_id(reference):
        return [reference]
    if Path(reference).expanduser().exists():
        return _snapshots_of(Path(reference).expanduser())
    if not glob.has_magic(reference):
        return [reference]
    matched = [Path(found) for found in glob.glob(str(Path(reference).expanduser()))]
    found = [name for path in matched if path.is_dir() for name in _snapshots_of(path)]
    if not found:
        raise SnapshotError(f"snapshots: no directory matches {reference!r}")
    return sorted(found, key=lambda name: (step_of_path(Path(name)) or 0, name))


def _snapshots_of(path: Path) -> list[str]:
    """The snapshot in a directory, or those of the run in it; the directory itself where there is none of either, so
    that opening it tells what is missing."""
    if is_snapshot(path) or not path.is_dir():
        return [str(path)]
    if (within := snapshot_within(path)) is not None:
        return [str(within)]
    try:
        return [str(found) for found in find_snapshots(path)]
    except SnapshotError as error:
        if "both say step" in str(error):
            raise
        return [str(path)]


def locate(reference: str | Path) -> tuple[Path, int | None]:
    """The directory of one snapshot, resolved, and the step that its name tells, if any.

    Raises `SnapshotError` where there is no such directory, and where the Hub and its cache do not have it.
    """
    if (given := SHIPPED.get(str(reference))) is not None:
        return given.resolve(), 0
    hub = None if Path(reference).is_dir() else _hub_id(str(reference))
    if hub is not None:
        return hub_directory(hub["repository"], hub["revision"]), step_of_name(hub["revision"])
    try:
        path = Path(reference).expanduser().resolve()
        found = path.is_dir()
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory, or a link that leads to itself
        raise SnapshotError(f"snapshot {str(reference)!r} cannot be opened: {error}") from error
    if not found:
        hint = f", a Hub id with its revision ({reference}@main)" if _looks_like_hub(str(reference)) else ""
        raise SnapshotError(
            f"snapshot {str(reference)!r} is not a directory ({path}); give a Hugging Face checkpoint directory{hint} "
            f"or one of {', '.join(sorted(SHIPPED))}"
        )
    return path, step_of_path(path)


def _hub_id(reference: str) -> re.Match[str] | None:
    return _HUB.fullmatch(reference)


def _looks_like_hub(reference: str) -> bool:
    return _hub_id(f"{reference}@main") is not None


def hub_directory(repository: str, revision: str) -> Path:
    """The files of a Hub repository at a revision (branch, tag or commit), in the Hub's own cache on this machine.

    Downloads what is missing, unless HF_HUB_OFFLINE is set. Raises `SnapshotError` where neither the Hub nor the cache
    has it.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise SnapshotError(
            f"{repository}@{revision} is a Hub id, which needs the package huggingface_hub; install rlvr-landscape[cpu]"
        ) from error
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(_WANTED))).resolve()
    except Exception as error:  # the Hub's client raises errors of its own, of HTTP and of the operating system
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SnapshotError(
            f"{repository}@{revision} could not be had from the Hub or from its cache on this machine: {said}"
        ) from error
