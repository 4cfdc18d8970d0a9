"""Publishing files and directories: whole or not at all, the first writer wins, a full disk is a clear message."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlvr_landscape_plugin import files
from rlvr_landscape_plugin.errors import SnapshotError, StoreError
from rlvr_landscape_plugin.files import (
    digest,
    file_sha256,
    move_aside,
    publish,
    publish_directory,
    read_checked_json,
    remove_stale,
    replace_text,
)

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def text(content: str):
    return lambda scratch: scratch.write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def raising(error: BaseException):
    def raise_it(*args, **kwargs):
        raise error

    return raise_it


def test_the_digest_is_that_of_sorted_compact_json():
    expected = hashlib.sha256(b'{"a":[1,null,"\\u03b1"],"b":0.5}').hexdigest()
    assert digest({"b": 0.5, "a": [1, None, "α"]}) == expected


def test_the_checksum_of_a_file(tmp_path):
    content = os.urandom(3_000_001)
    (tmp_path / "f").write_bytes(content)
    assert file_sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_a_file_is_published_once_and_kept(tmp_path):
    path = tmp_path / "new" / "folder" / "f"
    publish(path, text("one"))
    publish(path, text("two"))
    assert (path.read_text(), names(path.parent)) == ("one", ["f"])
    publish(path, text("two"), replace=True)
    assert (path.read_text(), names(path.parent)) == ("two", ["f"])


def test_without_hard_links_a_file_is_renamed_and_one_that_exists_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", raising(OSError(errno.EPERM, "Operation not permitted")))
    publish(tmp_path / "f", text("one"))
    assert (tmp_path / "f").read_text() == "one"
    publish(tmp_path / "f", text("two"))
    assert ((tmp_path / "f").read_text(), names(tmp_path)) == ("one", ["f"])


def test_every_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    order = []
    for name in ("link", "replace", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real: (order.append("named"), real(*args)))
    real_sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name), real_sync(handle))
    )
    publish(tmp_path / "f", text("x"))
    assert [item.startswith(".f.") for item in order] == [True, False, False]
    assert order[1:] == ["named", tmp_path.name]
    order.clear()

    def fill(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "inner").write_text("x")

    publish_directory(tmp_path / "d", fill)
    assert order[:2] == ["sub", "inner"]
    assert order[2].startswith(".d.")
    assert order[3:] == ["named", tmp_path.name]


@pytest.mark.parametrize("function", ["link", "fsync", "mkdir", "rename", "replace"])
def test_a_full_disk_at_any_step_is_named_and_leaves_nothing(tmp_path, monkeypatch, function):
    (tmp_path / "there").write_text("kept")

    def fill(folder: Path) -> None:
        (folder / "inner").write_text("x")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, raising(FULL))
        if function in ("link", "rename"):  # otherwise a rename takes the place of the link
            patch.setattr(os, "link", raising(FULL))
            patch.setattr(os, "rename", raising(FULL))
        message = "cannot write .*{}: the disk is full .*No space left.*; finished points are safe, .* there is room"
        if function in ("link", "rename", "fsync"):
            with pytest.raises(StoreError, match=message.format("new")):
                publish(tmp_path / "new", text("x"))
        if function != "replace":
            with pytest.raises(StoreError, match=message.format("folder")):
                publish_directory(tmp_path / "folder", fill)
        if function in ("replace", "fsync"):
            with pytest.raises(StoreError, match=message.format("there")):
                replace_text(tmp_path / "there", ["x"])
    assert names(tmp_path) == ["there"]
    assert (tmp_path / "there").read_text() == "kept"
    publish(tmp_path / "new", text("room again"))
    assert publish_directory(tmp_path / "folder", fill)
    assert names(tmp_path) == ["folder", "new", "there"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("NetCDF: HDF error"), "NetCDF: HDF error; training states are kept"),
        (
            OSError(errno.EROFS, "Read-only file system"),
            r"\[Errno 30\] Read-only file system; training states are kept, run the same command again$",
        ),
        (Exception("I/O error: No space left on device (os error 28)"), "the disk is full .*; training states are"),
    ],
)
def test_what_libraries_say_about_a_disk(tmp_path, error, reason):
    with pytest.raises(StoreError, match=f"cannot write .*/f: {reason}"):
        publish(tmp_path / "f", raising(error), safe="training states are kept")
    with pytest.raises(StoreError, match=f"cannot write .*/d: {reason}"):
        publish_directory(tmp_path / "d", raising(error), safe="training states are kept")
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError("a defect"), RuntimeError("a defect"), SnapshotError("no weights")])
def test_errors_that_do_not_come_from_the_disk_pass(tmp_path, error):
    for function in (publish, publish_directory):
        with pytest.raises(type(error)) as caught:
            function(tmp_path / "f", raising(error))
        assert caught.value is error
    assert names(tmp_path) == []


CRASH = """
import os, sys
from pathlib import Path
from rlvr_landscape_plugin.files import publish, publish_directory
def die(*args): os._exit(9)
os.link = os.rename = die
path = Path(sys.argv[1])
if sys.argv[2] == "file":
    publish(path, lambda scratch: scratch.write_text("x"))
else:
    publish_directory(path, lambda scratch: (scratch / "inner").write_text("x"))
"""


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_crash_between_writing_and_naming_leaves_a_temporary_name_that_goes_when_it_is_old(tmp_path, kind):
    path = tmp_path / "it"
    assert subprocess.run([sys.executable, "-c", CRASH, str(path), kind], check=False).returncode == 9
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".it.")
    assert leftover.name.endswith(".tmp")
    remove_stale(tmp_path)
    assert leftover.exists(), "its writer may still be at work"
    old = leftover.stat().st_mtime - files.STALE_SECONDS - 1
    os.utime(leftover, (old, old))
    (tmp_path / ".hidden").write_text("somebody's own")
    os.utime(tmp_path / ".hidden", (old, old))
    remove_stale(tmp_path)
    assert names(tmp_path) == [".hidden"]


def test_of_many_writers_one_wins_and_the_file_is_whole(tmp_path):
    path, folder = tmp_path / "f", tmp_path / "d"
    wins = []
    barrier = threading.Barrier(8)

    def write(number: int) -> None:
        content = str(number) * 200_000
        barrier.wait()
        publish(path, text(content))
        wins.append(publish_directory(folder, lambda scratch: (scratch / "inner").write_text(content)))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for file in (path, folder / "inner"):
        content = file.read_text()
        assert content == content[0] * 200_000
    assert sorted(wins) == [False] * 7 + [True]
    assert names(tmp_path) == ["d", "f"]


def test_a_published_directory_can_be_read_by_others(tmp_path):
    publish_directory(tmp_path / "d", text_in("inner"))
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o755
    (tmp_path / "e").mkdir()
    assert not publish_directory(tmp_path / "e", text_in("inner"))
    assert names(tmp_path / "e") == [], "an empty directory stays too"


def text_in(name: str):
    return lambda folder: (folder / name).write_text("x")


def test_a_file_moved_aside_keeps_its_content(tmp_path):
    (tmp_path / "f").write_text("odd")
    with pytest.warns(UserWarning, match=r"f was moved to f\..*\.corrupt and will be measured again: it is odd"):
        move_aside(tmp_path / "f", "it is odd")
    (aside,) = tmp_path.iterdir()
    assert aside.read_text() == "odd"
    move_aside(tmp_path / "f", "another process was faster")
    assert names(tmp_path) == [aside.name]


def test_json_with_a_checksum(tmp_path):
    path = tmp_path / "record.json"
    assert read_checked_json(path, "record") is None
    content = {"record": {"a": 1.5}, "sha256": digest({"a": 1.5}), "more": 1}
    path.write_text(json.dumps(content))
    assert read_checked_json(path, "record") == content
    changed = json.dumps(content | {"record": {"a": 1.6}})
    path.write_text("[1, 2]")
    assert read_checked_json(path, "record") == {"record": [1, 2]}, "older versions wrote lists without a checksum"
    for damaged in (changed, "{", '{"sha256": ""}', "3", "\xff"):
        path.write_bytes(damaged.encode("latin-1"))
        with pytest.warns(UserWarning, match="will be measured again"):
            assert read_checked_json(path, "record") is None
        assert not path.exists()
    assert len(names(tmp_path)) == 5
