"""Tensors in safetensors files, read and written one at a time, without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlvr_landscape_plugin.errors import SnapshotError

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""Dtypes that a direction can move: safetensors' name → NumPy's, bfloat16 as its bits."""
_EXPONENTS = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "F16": ("<u2", 0x1F << 10),
    "BF16": ("<u2", 0xFF << 7),
}
"""Dtype → its bits as integers, and those of the exponent, which are all set in NaN and infinity only."""
_CHUNK = 1 << 24
"""Elements that are looked at together."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it is, from the safetensors header."""

    file: Path
    dtype: str
    """Name in safetensors' spelling: F32, BF16, F16 …"""
    shape: tuple[int, ...]
    start: int = 0
    """Position of its first byte in the file."""

    def read(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """The values exactly (bfloat16 as float32): of `shape`, or `count` of them, flat, from element `first` on.

        Raises `SnapshotError` for NaN, infinity and dtypes that are not F64, F32, F16 or BF16.
        """
        if self.dtype not in DTYPES:
            raise SnapshotError(f"{self.file} holds {self.dtype} tensors; directions need {', '.join(DTYPES)}")
        dtype = np.dtype(DTYPES[self.dtype])
        size = math.prod(self.shape) if count is None else count
        values = np.fromfile(self.file, dtype, size, offset=self.start + first * dtype.itemsize)
        if self.dtype == "BF16":
            values = (values.astype("<u4") << 16).view("<f4")
        if not np.isfinite(values).all():
            raise SnapshotError(f"{self.file} holds NaN or infinity; no direction can be made of it")
        return values.reshape(self.shape) if count is None else values


def read_tensor(tensors: Mapping[str, TensorInfo], name: str) -> np.ndarray:
    """One of `tensors` as stored (bfloat16 as float32); raises `SnapshotError` naming file and tensor."""
    try:
        return tensors[name].read()
    except SnapshotError as error:
        raise SnapshotError(f"tensor {name!r}: {error}") from error


def check_finite(tensors: Mapping[str, TensorInfo]) -> None:
    """Read every value; raises `SnapshotError` naming file and tensor where one is NaN or infinite."""
    for name, info in tensors.items():
        kind, exponent = _EXPONENTS[info.dtype]
        dtype, size = np.dtype(kind), math.prod(info.shape)
        for first in range(0, size, _CHUNK):
            count = min(_CHUNK, size - first)
            bits = np.fromfile(info.file, dtype, count, offset=info.start + first * dtype.itemsize)
            if ((bits & dtype.type(exponent)) == exponent).any():
                raise SnapshotError(
                    f"{info.file} holds NaN or infinity in tensor {name!r}: training has diverged there, or the file "
                    "is damaged; leave this snapshot out"
                )


def write_safetensors(file: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[np.ndarray]) -> None:
    """Write float32 tensors one after the other, in the order of `shapes`, so that one at a time is in memory."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as sink:
        sink.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), values in zip(shapes.items(), tensors, strict=True):
            if values.shape != tuple(shape):
                raise ValueError(f"tensor {name!r} has shape {values.shape}, announced as {tuple(shape)}")
            sink.write(np.ascontiguousarray(values, "<f4").tobytes())


def safetensors_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file; raises `SnapshotError` naming the file unless it is whole."""
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            size = file.stat().st_size
            if not 0 < length <= min(size - 8, 100_000_000):
                raise ValueError(f"header length {length} does not fit a file of {size} bytes")
            header = json.loads(handle.read(length))
        infos, end = {}, 0
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            infos[name] = TensorInfo(file, entry["dtype"], tuple(entry["shape"]), 8 + length + first)
            if (kind := DTYPES.get(entry["dtype"])) is not None:
                expected = math.prod(entry["shape"]) * np.dtype(kind).itemsize
                if last - first != expected:
                    raise ValueError(f"tensor {name!r} has {last - first} bytes, {expected} expected")
            end = max(end, last)
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes on disk, {8 + length + end} expected (truncated or overgrown)")
    except OSError as error:
        raise SnapshotError(f"{file} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SnapshotError(f"{file} is not a whole safetensors file: {error}; copy the snapshot again") from error
    return infos
