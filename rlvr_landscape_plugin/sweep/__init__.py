"""`python -m rlvr_landscape_plugin.sweep @ configs/sweep/quickstart.toml`: measure landscapes."""

from rlvr_landscape_plugin.sweep.run import (
    main,
    run_sweep,
)

__all__ = [
    "main",
    "run_sweep",
]
