"""The command `rlvr-landscape`: one name for everything that can be run. Each subcommand is a door to a module.

Only the module of the chosen subcommand is imported.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rlvr_landscape_plugin import __version__

PROGRAM = "rlvr-landscape"


def _sweep(arguments: Sequence[str], prog: str) -> int:
    from rlvr_landscape_plugin.sweep.command import main

    return main(arguments, prog)


def _design(arguments: Sequence[str], prog: str) -> int:
    """A sweep of the design that the subcommand names."""
    name = prog.rpartition(" ")[2]
    if any(word.partition("=")[0] == "--design" for word in arguments):
        return _refuse(f"`{prog}` measures the design {name!r}; leave --design out, or use `{PROGRAM} sweep`")
    return _sweep([*arguments, "--design", name], prog)


def _report(arguments: Sequence[str], prog: str) -> int:
    from rlvr_landscape_analysis.__main__ import main

    return main(arguments, prog)


def _compare(arguments: Sequence[str], prog: str) -> int:
    from rlvr_landscape_analysis.compare import main

    return main(arguments, prog)


def _status(arguments: Sequence[str], prog: str) -> int:
    from rlvr_landscape_plugin.sweep.status_command import main

    return main(arguments, prog)


def _snapshot(arguments: Sequence[str], prog: str) -> int:
    from rlvr_landscape_plugin.snapshot.__main__ import main

    return main(arguments, prog)


def _train(arguments: Sequence[str], prog: str) -> int:
    from rlvr_landscape_plugin.trl.__main__ import main

    return main(arguments, prog)


def _serve(arguments: Sequence[str], prog: str) -> int:
    from rlvr_landscape_plugin.serving.launch import main

    return main(arguments, prog)


def _cluster(arguments: Sequence[str], prog: str) -> int:
    from rlvr_landscape_plugin.sweep.cluster import main

    return main(arguments, prog)


class Command(NamedTuple):
    """A subcommand."""

    run: Callable[[Sequence[str], str], int]
    """Called with its arguments and with what the user typed before them; returns the exit code."""
    takes: str
    """Its arguments, in short."""
    summary: str


_CONFIGURED = "[@ FILE …] [--KEY VALUE …]"
COMMANDS = {
    "sweep": Command(_sweep, _CONFIGURED, "measure the landscapes around snapshots"),
    "census": Command(_design, _CONFIGURED, "the same with design = 'census': many random directions"),
    "path": Command(_design, _CONFIGURED, "the same with design = 'path': policies along training"),
    "boundary": Command(_design, _CONFIGURED, "the same with design = 'boundary': many rollouts of the checkpoint"),
    "report": Command(_report, "DIR", "figures, tables and one HTML page from the datasets of a sweep"),
    "compare": Command(_compare, "A B", "two runs or two datasets side by side: differences with intervals, one page"),
    "status": Command(_status, "DIR", "how far a sweep is: points, rate, time left, servers, shards, disk"),
    "snapshot": Command(_snapshot, "ls|verify DIR", "list or check the snapshots of a training run"),
    "train": Command(_train, _CONFIGURED, "train on this machine with TRL, and keep snapshots"),
    "serve": Command(_serve, _CONFIGURED, "start a vLLM server that sweeps can use"),
    "cluster": Command(_cluster, _CONFIGURED, "run a sweep as a job array (SLURM)"),
}
"""Subcommand → what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(usage(), file=sys.stderr)
        return 2
    name, *rest = arguments
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-V", "--version"):
        print(f"{PROGRAM} {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(COMMANDS)}"
        return _refuse(f"there is no command {name!r}; {hint}")
    try:
        return COMMANDS[name].run(rest, f"{PROGRAM} {name}")
    except BrokenPipeError:
        # `… | head` has read enough. Python would complain once more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def usage() -> str:
    """What `--help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [ARGUMENTS]",
            "",
            "Measure the neighbourhood of training checkpoints: reward, KL divergence and training objective.",
            "",
            *lines,
            "",
            f"`{PROGRAM} COMMAND --help` lists the arguments of a command; `{PROGRAM} --version` prints the version.",
        ]
    )


def _refuse(problem: str) -> int:
    print(f"error: {problem}", file=sys.stderr)
    return 2
