"""A snapshot as a worker reads it: once, for all slices around it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from rlvr_landscape_plugin.directions import SliceSpec, subspace_of
from rlvr_landscape_plugin.serving import access
from rlvr_landscape_plugin.serving.worker.slice_tensors import Slice, load_tensors, squared
from rlvr_landscape_plugin.snapshot import Snapshot, compare_tensors, open_snapshot


@dataclass
class Source:
    """A snapshot that was read and checked."""

    key: object
    """Its files, their sizes and times of change."""
    snapshot: Snapshot
    theta: dict[str, torch.Tensor] | None
    """Mapped from its files; None for an adapter that is loaded, because merged tensors take memory."""
    theta_squared: float

    @classmethod
    def opened(cls, path: str, base: str, served: str, before: Source | None) -> Source:
        """The snapshot at `path`, read and checked; `before` itself, if that is it and none of its files has changed.

        `served`: the model of the server, whose tensors it must have. Raises `ValueError` or `OSError` for a snapshot
        that cannot be measured.
        """
        folders = _confined(path, base)
        key = (folders, _files_of(*folders))
        if before is not None and before.key == key:
            return before
        snapshot, model = open_snapshot(*folders), open_snapshot(served)
        compare_tensors(model.shapes, snapshot, f"the model this server runs ({model.path.name})")
        _ = snapshot.sha256
        theta = load_tensors(snapshot)
        return cls(key, snapshot, theta, squared(theta))

    def slice(self, spec: SliceSpec, files: dict[str, str], dtype: torch.dtype) -> Slice:
        """A slice around it; raises as `Slice.build`."""
        theta = load_tensors(self.snapshot) if self.theta is None else self.theta
        return Slice.build(theta, spec, files, dtype, subspace_of(self.snapshot), self.theta_squared)


def slice_key(snapshot: Snapshot, spec: SliceSpec, dtype: torch.dtype) -> str:
    """What the directions of a slice depend on, and what they are rounded to."""
    return json.dumps([snapshot.sha256, spec.as_dict(), str(dtype)], sort_keys=True)


def _confined(path: str, base: str) -> tuple[Path, Path | None]:
    """The directories of a snapshot and its base; raises `ValueError` for an adapter without `base`, whose
    configuration could name any directory."""
    found = access.confined_snapshot(path)
    if not base and (found / "adapter_config.json").is_file():
        raise ValueError(f"{found.name} is an adapter: name the directory of its base model too (base)")
    return found, access.confined_snapshot(base, "base model") if base else None


def _files_of(*folders: Path | None) -> object:
    """Names, sizes and times of change of all files below: the same as long as nobody has written to one."""
    files = [file for folder in folders if folder is not None for file in sorted(folder.rglob("*")) if file.is_file()]
    found = [(file, file.stat()) for file in files]
    return [(str(file), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file, s in found]
