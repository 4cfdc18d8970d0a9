"""The checksum at the end of a netCDF file: damage anywhere is found before the file is read, also after it was copied.

After the last byte of the netCDF-4 file stands one line of text with the SHA-256 of everything before it. HDF5 reads a
file up to the end that its header names, so every reader of netCDF ignores the line. The check comes before HDF5 sees
the file, because one flipped bit in a header can crash its library. A file that is edited or saved again has no line.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import BinaryIO

_LINE = "\nSHA-256 of all bytes before this line: {}\n"
_LENGTH = len(_LINE.format("0" * 64))
_PATTERN = re.compile(re.escape(_LINE).replace(r"\{\}", "([0-9a-f]{64})").encode())
_BLOCK = 2**20


def add_checksum(path: str | Path) -> None:
    """Append the line to a file that was just written."""
    with Path(path).open("r+b") as file:
        total = _sha256(file, file.seek(0, os.SEEK_END))
        file.seek(0, os.SEEK_END)
        file.write(_LINE.format(total).encode())


def find_checksum(path: str | Path) -> bool | None:
    """Whether a file is as its checksum says; None where it has none. Raises `OSError` where it cannot be read."""
    with Path(path).open("rb") as file:
        end = file.seek(0, os.SEEK_END) - _LENGTH
        if end < 0:
            return None
        file.seek(end)
        line = _PATTERN.fullmatch(file.read())
        return None if line is None else line[1].decode() == _sha256(file, end)


def _sha256(file: BinaryIO, end: int) -> str:
    """SHA-256, hex, of the first `end` bytes."""
    total = hashlib.sha256()
    file.seek(0)
    while end > 0 and (block := file.read(min(_BLOCK, end))):
        total.update(block)
        end -= len(block)
    return total.hexdigest()
