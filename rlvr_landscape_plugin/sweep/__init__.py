"""Sweeps: measure landscapes. `command.py` is the command, `run.py` the sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlvr_landscape_plugin.sweep.command import main
    from rlvr_landscape_plugin.sweep.run import run_sweep

__all__ = [
    "main",
    "run_sweep",
]


def __getattr__(name: str) -> object:
    """Both are imported when asked for, so that the light modules of this folder do not load xarray."""
    if name == "main":
        from rlvr_landscape_plugin.sweep.command import main

        return main
    if name == "run_sweep":
        from rlvr_landscape_plugin.sweep.run import run_sweep

        return run_sweep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
