"""Run a command that ends when the process that started it ends, in whatever way that process ends.

    python -m rlvr_landscape_plugin.serving.tether PARENT_PID COMMAND …

A sweep killed with SIGKILL cannot end the server it started, and a server may ignore SIGTERM while it waits for an
engine that has already ended. So this process stays between the two: when the parent has ended, it sends the whole
process group SIGTERM and, after PATIENCE seconds, SIGKILL. It must lead its process group.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys

PATIENCE = 15.0
"""Seconds between SIGTERM and SIGKILL; shorter than the launcher's own patience (launch.py)."""

_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """In the child: SIGKILL when the tether itself is killed. Linux only; elsewhere the launcher ends the group."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code, or 1 if the parent ended first."""
    parent, command = int(argv[0]), argv[1:]
    if os.getppid() != parent:
        return 1
    stop = False

    def on_term(number: int, frame: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, on_term)
    child = subprocess.Popen(command, preexec_fn=_die_with_parent)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(0.2)
        if stop or os.getppid() != parent:
            break
    os.killpg(0, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(PATIENCE)
    os.killpg(0, signal.SIGKILL)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
