"""A saved policy: a Hugging Face directory of safetensors, and what makes it that policy and no other.

Reading headers and hashing needs neither torch nor transformers. Nothing here writes into a snapshot.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rlvr_landscape_plugin.errors import SnapshotError

SHIPPED = {"tiny-sorter": Path(__file__).parent / "policies" / "tiny_sorter"}
"""Policies that come with the package, by the name a configuration uses."""

_STEP = re.compile(r"step_(\d+)$")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it is, from the safetensors header."""

    file: Path
    dtype: str
    """Name in safetensors' spelling: F32, BF16, F16 …"""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Snapshot:
    """One policy on disk. Build it with `open_snapshot`, which checks the directory."""

    path: Path
    step: int
    """Optimizer updates behind it; 0 is the base model."""
    tensors: Mapping[str, TensorInfo]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint name → shape."""
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    @cached_property
    def sha256(self) -> str:
        """Hash over config.json and every weight file (names and bytes)."""
        digest = hashlib.sha256()
        for file in [self.path / "config.json", *self.files]:
            digest.update(file.name.encode() + b"\x00")
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        return digest.hexdigest()


def _header(file: Path) -> dict[str, TensorInfo]:
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            size = file.stat().st_size
            if not 0 < length <= min(size - 8, 100_000_000):
                raise ValueError(f"header length {length} does not fit a file of {size} bytes")
            header = json.loads(handle.read(length))
        infos = {
            name: TensorInfo(file, entry["dtype"], tuple(entry["shape"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
        end = max((entry["data_offsets"][1] for n, entry in header.items() if n != "__metadata__"), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes on disk, {8 + length + end} expected (truncated or overgrown)")
    except (ValueError, KeyError, TypeError) as error:
        raise SnapshotError(f"{file} is not a whole safetensors file: {error}; copy the snapshot again") from error
    return infos


def _step(path: Path) -> int:
    manifest = path / "manifest.json"
    if manifest.is_file():
        try:
            return int(json.loads(manifest.read_text())["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise SnapshotError(f"{manifest} has no integer 'step': {error!r}; correct or remove the file") from error
    match = _STEP.search(path.name)
    return int(match.group(1)) if match else 0


def open_snapshot(reference: str | Path) -> Snapshot:
    """The snapshot behind a directory path or a shipped name.

    The step comes from `manifest.json`, else from a directory name like `step_000010`, else it is 0. Raises
    `SnapshotError` naming the file for: no such directory, no config, no safetensors, a shard or tensor that the index
    promises and the files lack, a truncated file.
    """
    path = SHIPPED.get(str(reference), Path(reference)).expanduser().resolve()
    if not path.is_dir():
        raise SnapshotError(
            f"snapshot {str(reference)!r} is not a directory ({path}); give a Hugging Face checkpoint directory "
            f"or one of {', '.join(sorted(SHIPPED))}"
        )
    if not (path / "config.json").is_file():
        raise SnapshotError(f"{path} has no config.json; a snapshot is a whole Hugging Face checkpoint directory")
    promised: dict[str, str] | None = None
    if (path / _INDEX).is_file():
        try:
            promised = dict(json.loads((path / _INDEX).read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise SnapshotError(f"{path / _INDEX} is not a safetensors index: {error!r}") from error
        files = sorted({path / name for name in promised.values()})
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise SnapshotError(
            f"{path} holds no *.safetensors; save it with save_pretrained(..., safe_serialization=True) "
            "(pickled .bin weights are not read)"
        )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        if not file.is_file():
            raise SnapshotError(f"{path / _INDEX} names {file.name}, which is missing; copy the snapshot again")
        tensors |= _header(file)
    if missing := sorted(set(promised or ()) - set(tensors)):
        raise SnapshotError(f"{path} lacks tensor {missing[0]!r} (and {len(missing) - 1} more) named by {_INDEX}")
    return Snapshot(path, _step(path), tensors)


def compare_tensors(expected: Mapping[str, tuple[int, ...]], snapshot: Snapshot, model: str) -> None:
    """Raise `SnapshotError` unless `snapshot` has exactly the tensors `expected` (name → shape) of `model`."""
    shapes = snapshot.shapes
    problems = [
        *(f"tensor {name!r} is missing" for name in sorted(set(expected) - set(shapes))),
        *(f"tensor {name!r} is not part of the model" for name in sorted(set(shapes) - set(expected))),
        *(
            f"tensor {name!r} has shape {list(shapes[name])}, expected {list(shape)}"
            for name, shape in sorted(expected.items())
            if name in shapes and shapes[name] != tuple(shape)
        ),
    ]
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise SnapshotError(f"snapshot {snapshot.path} does not fit {model}: {problems[0]}{more}")
