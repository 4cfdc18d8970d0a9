"""What a server may read, and where its workers may write: checked by the routes and again by every worker.

A worker's weight engine can be reached past the routes: by whoever calls vLLM's own methods in the same process, and in
vLLM's development mode by everybody who reaches the port. So the engine does not rely on what the routes checked, and a
landscape server does not start in development mode.

- Snapshots and directions are read below the directories of RLVR_LANDSCAPE_ROOTS only, wherever names in an index and
  symbolic links lead.
- Reports go to a directory that the routes made for them, in the system's directory for temporary files.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rlvr_landscape_plugin.serving.protocol import ROOTS_VARIABLE

DEVELOPMENT_VARIABLE = "VLLM_SERVER_DEV_MODE"
"""vLLM's: with it, anybody who reaches the port can call the workers' methods, without a token."""
_REPORTS = "rlvr-landscape-"
_INDEX = "model.safetensors.index.json"


class AccessError(ValueError):
    """Something that this server must not read or write."""

    def __init__(self, message: str, status: int = 403) -> None:
        super().__init__(message)
        self.status = status
        """The HTTP status that says the same."""


def refuse_development_mode() -> None:
    """Raise `AccessError` where vLLM's development mode is on."""
    if os.environ.get(DEVELOPMENT_VARIABLE, "0").strip() not in ("", "0"):
        raise AccessError(
            f"{DEVELOPMENT_VARIABLE} is set: vLLM would let anybody who reaches this port move the weights and name "
            "files to write, without a token; a landscape server does not start like that: unset it"
        )


def confined(given: str | Path, what: str) -> Path:
    """The path without symbolic links; raises `AccessError` unless it lies below one of the server's roots."""
    roots = [_resolved(root, "root") for root in os.environ.get(ROOTS_VARIABLE, "").split(os.pathsep) if root]
    if not roots:
        raise AccessError(f"set {ROOTS_VARIABLE} to the directories this server may read snapshots from", 503)
    path = _resolved(given, what)
    if not any(path.is_relative_to(root) for root in roots):
        leads = "is" if str(path) == str(given) else f"leads to {path}, which is"
        raise AccessError(f"{what} {given} {leads} outside the server's {ROOTS_VARIABLE}; add its directory there")
    return path


def confined_snapshot(given: str | Path, what: str = "snapshot") -> Path:
    """`confined` for a snapshot and all of its files, links and names in its index among them."""
    path = confined(given, what)
    if not path.is_dir():
        return path  # whoever reads it says what is wrong
    names = {entry.name for entry in path.iterdir()}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        if _INDEX in names:
            confined(path / _INDEX, f"file {_INDEX} at")
            names |= {str(name) for name in json.loads((path / _INDEX).read_text())["weight_map"].values()}
    for name in sorted(names):
        # vLLM takes paths out of what its server answers, but leaves names.
        confined(path / name, f"file {Path(name).name} at")
    return path


def _resolved(given: str | Path, what: str) -> Path:
    try:
        return Path(given).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a null character
        raise AccessError(f"{what} {str(given)!r} is no path that can be followed: {error}", 422) from error


@contextlib.contextmanager
def report_directory() -> Iterator[Path]:
    """A new directory for the reports of one call, gone afterwards; `check_report_directory` accepts no other."""
    with tempfile.TemporaryDirectory(prefix=_REPORTS) as folder:
        yield Path(folder)


def check_report_directory(given: str) -> Path:
    """Raise `AccessError` unless `report_directory` of this user made it."""
    path = Path(given)
    try:
        found = path.lstat()
    except (OSError, ValueError) as error:
        raise AccessError(f"report directory {given!r} cannot be used: {error}") from error
    made_here = path.parent == Path(tempfile.gettempdir()) and path.name.startswith(_REPORTS)
    private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077 and found.st_uid == os.geteuid()
    if not (made_here and private):
        raise AccessError(f"{given!r} is not a report directory that the server's routes made")
    return path


def linked_files(root: Path) -> list[Path]:
    """Where the symbolic links of a directory lead: what a server that may read the directory needs as roots too."""
    if not root.is_dir():
        return []
    with contextlib.suppress(OSError, RuntimeError):
        return sorted({entry.resolve() for entry in root.iterdir() if entry.is_symlink()})
    return []
