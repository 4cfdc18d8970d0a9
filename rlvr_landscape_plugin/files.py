"""How this package puts files and directories on disk: whole under their final name, or not at all.

Everything is written under a temporary name (`.NAME.….tmp`) in the same directory, synced, and then linked or renamed
to its final name. So a killed process leaves at most a temporary file, several processes may write the same name (the
first one wins), and a reader never sees half a file. `remove_stale` removes temporary files whose writer was killed.

A disk that is full, read-only or broken becomes a `StoreError` that says which file could not be written and what is
safe. Nothing here deletes a result: a file that cannot be used is renamed with `move_aside`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rlvr_landscape_plugin.errors import LandscapeError, StoreError

JsonObject = dict[str, Any]
"""A JSON object: what it holds is known where it is read."""

STALE_SECONDS = 3600.0
"""Age at which a temporary file has certainly lost its writer."""

POINTS_ARE_SAFE = "finished points are safe"
"""What a sweep says is safe when a disk refuses."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_LEAST_FREE = 2**16
"""Bytes free below which a failed write is called a full disk: netCDF and torch report one without its error number."""
_LIBRARY_REFUSAL = re.compile(r"NetCDF|HDF|os error \d|No space left|Read-only file|quota|PytorchStreamWriter", re.I)
"""How libraries that raise no OSError report that a file could not be written."""


def digest(data: object) -> str:
    """SHA-256, hex, of the canonical JSON of `data`."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """SHA-256, hex, of a file's bytes."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def writing(path: Path, safe: str = POINTS_ARE_SAFE, advice: str = "") -> Iterator[None]:
    """Turn a disk that refuses, within the block, into a `StoreError`: `path`, the reason, what is safe, what to do.

    `advice`: what to do where the disk is not full, in the place of running the same command again.
    Errors of this package pass unchanged, and so does every error that does not come from the disk.
    """
    try:
        yield
    except Exception as error:
        if (reason := _refusal(path, error)) is None:
            raise
        again = "run the same command again"
        todo = f"{again} when there is room" if reason.startswith("the disk is full") else advice or again
        raise StoreError(f"cannot write {path}: {reason}; {safe}, {todo}") from error


def _refusal(path: Path, error: Exception) -> str | None:
    """Why the disk refused; None if `error` is about something else."""
    if isinstance(error, LandscapeError):
        return None
    number = error.errno if isinstance(error, OSError) else None
    library = not isinstance(error, OSError)
    if library and not _LIBRARY_REFUSAL.search(str(error)):
        return None
    folder = next((place for place in (path, *path.parents) if place.is_dir()), Path())
    disk = shutil.disk_usage(folder)
    crowded = disk.total > 0 and disk.free < _LEAST_FREE  # /proc and the like have no size at all
    if number in _FULL or crowded or "No space left" in str(error):
        return f"the disk is full ({disk.free:,} bytes free): {error}"
    return str(error)


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync a directory; their names are on disk when rename returns.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)


def publish(path: Path, write: Callable[[Path], object], *, replace: bool = False, safe: str = POINTS_ARE_SAFE) -> None:
    """Let `write` write a temporary file and give it the name `path` when it is whole and on disk.

    A file that has the name already stays, unless `replace`. Missing parent directories are made. Raises `StoreError`
    ending in `safe` for a disk that refuses; other errors of `write` pass. Nothing temporary is left in either case.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with writing(path, safe):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(scratch)
            sync(scratch)
            if replace:
                os.replace(scratch, path)
            else:
                _name(scratch, path)
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # a read-only disk would hide the first error
            scratch.unlink(missing_ok=True)


def _name(scratch: Path, path: Path) -> None:
    """Give a whole file its name, unless the name is taken."""
    try:
        os.link(scratch, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            os.rename(scratch, path)


def publish_directory(path: Path, fill: Callable[[Path], object], *, safe: str = POINTS_ARE_SAFE) -> bool:
    """Let `fill` fill an empty temporary directory and give it the name `path` when all its files are on disk.

    Returns True, or False where `path` exists: it stays as it is, and what `fill` wrote is dropped. Missing parent
    directories are made, and temporary directories beside `path` whose writer was killed are removed. Raises
    `StoreError` ending in `safe` for a disk that refuses; other errors of `fill` pass. Nothing temporary is left.
    """
    with writing(path, safe, "choose another output directory"):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with writing(path, safe):
            fill(scratch)
            for item in (*scratch.rglob("*"), scratch):
                sync(item)
            scratch.chmod(0o755)  # mkdtemp's are for the owner only; a server may run as somebody else
            if path.exists():
                return False
            try:
                os.rename(scratch, path)
            except OSError:
                if not path.is_dir():
                    raise
                return False
            sync(path.parent)
            return True
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace_text(path: Path, parts: Iterable[str], *, safe: str = POINTS_ARE_SAFE) -> None:
    """Write the file `path` from the texts `parts`, in place of one that exists. Raises `StoreError` as `publish`."""

    def write(scratch: Path) -> None:
        with scratch.open("w", encoding="utf-8") as sink:
            sink.writelines(parts)

    publish(path, write, replace=True, safe=safe)


def remove_stale(folder: Path) -> None:
    """Remove temporary files and directories in `folder` that a killed writer left more than an hour ago."""
    for scratch in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - scratch.stat().st_mtime <= STALE_SECONDS:
                continue
            if scratch.is_dir():
                shutil.rmtree(scratch)
            else:
                scratch.unlink(missing_ok=True)


def move_aside(path: Path, reason: str, consequence: str = "will be measured again") -> None:
    """Rename a file that cannot be used to `NAME.….corrupt`, with a warning that gives the reason.

    A file that is not there any more is no error: another process was faster. Raises `StoreError` where renaming fails.
    """
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.corrupt")
    try:
        os.replace(path, aside)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"{path} cannot be used ({reason}) and cannot be moved aside: {error}") from error
    warnings.warn(f"{path} was moved to {aside.name} and {consequence}: {reason}", stacklevel=4)


def read_checked_json(path: Path, key: str) -> JsonObject | None:
    """The content of a JSON file whose `sha256` is `digest` of what stands under `key`, or None where there is no file.

    A list, which older versions wrote without a checksum, is returned under `key`. A damaged file is moved aside with a
    warning, and None is returned. Raises `StoreError` where the system does not let the file be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, list):
            return {key: content}
        if digest(content[key]) == content["sha256"]:
            return content
        reason = "its content is not what its checksum says"
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}; nothing was changed") from error
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    move_aside(path, reason)
    return None
