"""The command `rlvr-landscape sweep`, also `python -m rlvr_landscape_plugin.sweep`.

The configuration is read before anything else is imported, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rlvr_landscape_plugin.config import SweepConfig, load_config
from rlvr_landscape_plugin.errors import StoreError, run_cli, suggest

REFUSALS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
"""Error numbers of an operating system when the machine lacks a resource."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit code. `prog`: what the user typed, for the usage line."""
    return run_cli(lambda: start(load_config(sys.argv[1:] if argv is None else argv, SweepConfig, prog)))


def start(config: SweepConfig) -> None:
    """Measure what `config` asks for, or say what it would cost; the last line names the next command."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    if config.dry_run and config.follow is None:
        from rlvr_landscape_plugin.sweep.cost import dry_run

        dry_run(config)
        return

    written = run_to_end(config)
    suggest(f"rlvr-landscape {'report' if written else 'status'} {config.output}")


def run_to_end(config: SweepConfig) -> list[Path]:
    """Run a sweep in an event loop and with a display of its own; returns the datasets' paths.

    A lack of files, memory or disk space becomes a `StoreError`.
    """
    from rlvr_landscape_plugin.sweep.follow import follow_run
    from rlvr_landscape_plugin.sweep.run import run_sweep
    from rlvr_landscape_plugin.tracking import sweep_display

    try:
        with sweep_display(config) as display:
            return asyncio.run((run_sweep if config.follow is None else follow_run)(config, display))
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise StoreError(
            f"the operating system refused: {error}; finished points are kept, the same command continues"
        ) from error
