"""Where a snapshot comes from and which files it consists of: `manifest.json` in its directory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from rlvr_landscape_plugin.errors import SnapshotError

MANIFEST = "manifest.json"
FORMAT = 1
"""Version of the file's layout."""
_HEX = re.compile(r"[0-9a-f]{64}")


class FileEntry(TypedDict):
    """What a manifest says about one file."""

    sha256: str
    """Hex."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Manifest:
    """Where a snapshot comes from and what it consists of; `manifest.json` in its directory."""

    step: int
    """Optimizer updates behind it; 0 is the policy that training started from."""
    trainer: Mapping[str, str] = field(default_factory=dict)
    """`name` and `version` of the trainer."""
    run: str = ""
    """Id of the run that wrote it."""
    parent_run: str | None = None
    """Id of the run whose snapshot this run started from; None where it started from another model."""
    configuration: Mapping[str, object] = field(default_factory=dict)
    """The run's configuration, JSON-able."""
    objective: Mapping[str, object] = field(default_factory=dict)
    """`name` and `options` of the training objective."""
    metrics: Mapping[str, object] = field(default_factory=dict)
    """The trainer's metrics of this step; empty where there are none, as at step 0."""
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    """Relative path → `sha256` (hex) and `size` (bytes) of every file but the manifest itself. Empty: unknown."""

    @classmethod
    def read(cls, file: Path) -> Manifest:
        """The manifest in `file`.

        Keys of other tools are ignored, and so are keys of ours with values of another type. Raises `SnapshotError`
        naming the file where it cannot be read, has no step, or lists files in another form.
        """
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            step = data["step"]
            if type(step) is not int or step < 0:
                raise ValueError(f"step is {step!r}")
        except OSError as error:
            raise SnapshotError(f"{file} cannot be read: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise SnapshotError(f"{file} has no integer 'step' ≥ 0: {error!r}; correct or remove the file") from error
        files = data.get("files") or {}
        if not isinstance(files, dict):
            raise SnapshotError(
                f"{file}: 'files' is a {type(files).__name__}, expected a table of file name → sha256 and size; "
                "correct or remove the file"
            )
        for name, entry in files.items():
            whole = isinstance(entry, dict) and type(entry.get("size")) is int
            if not (whole and _HEX.fullmatch(str(entry.get("sha256")))) or outside(name):
                raise SnapshotError(f"{file}: the entry of {name!r} in 'files' is damaged: {entry!r}")
        known = {name: data[name] for name, kind in _KINDS.items() if isinstance(data.get(name), kind)}
        return cls(step=step, files=files, **known)


_KINDS = {"trainer": dict, "run": str, "parent_run": str, "configuration": dict, "objective": dict, "metrics": dict}
"""What a manifest of ours holds under each key besides `step` and `files`."""


def outside(name: str) -> bool:
    path = Path(name)
    return not name or path.is_absolute() or ".." in path.parts
