"""A tethered command ends with whoever asked for it, even one that ignores SIGTERM."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

STUBBORN = (
    "import os, signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: open(sys.argv[1] + '.term', 'w').close())\n"
    "child = os.fork()\n"
    "open(f'{sys.argv[1]}.{os.getpid()}.pid', 'w').close()\n"
    "while True: time.sleep(0.05)\n"
)
PARENT = (
    "import os, subprocess, sys\n"
    "subprocess.Popen([sys.executable, '-c',"
    " 'import sys; from rlvr_landscape_plugin.serving import tether; tether.PATIENCE = 1.0;"
    " sys.exit(tether.main(sys.argv[1:]))', str(os.getpid()), *sys.argv[1:]], start_new_session=True).wait()\n"
)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def test_a_stubborn_group_is_killed_when_the_parent_is(tmp_path):
    mark = tmp_path / "server"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, sys.executable, "-c", STUBBORN, str(mark)])
    assert until(lambda: len(list(tmp_path.glob("*.pid"))) == 2, 20)
    pids = [int(path.name.split(".")[1]) for path in tmp_path.glob("*.pid")]
    assert all(alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    assert until(lambda: not any(alive(pid) for pid in pids), 20)
    assert (tmp_path / "server.term").exists(), "it was asked before it was killed"


def tether(parent: int, *command: str) -> subprocess.CompletedProcess:
    module = "rlvr_landscape_plugin.serving.tether"
    return subprocess.run([sys.executable, "-m", module, str(parent), *command], timeout=60, start_new_session=True)


def test_the_exit_code_of_the_command_is_passed_on():
    assert tether(os.getpid(), sys.executable, "-c", "raise SystemExit(7)").returncode == 7


def test_nothing_starts_for_a_parent_that_is_gone(tmp_path):
    mark = tmp_path / "ran"
    assert tether(1 if os.getpid() != 1 else 2, sys.executable, "-c", f"open({str(mark)!r}, 'w')").returncode == 1
    assert not mark.exists()
