"""The command `python -m rlvr_landscape_plugin.trl`; mistakes in the configuration answer before torch loads."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rlvr_landscape_plugin.config import TrainConfig, load_config, train_report
from rlvr_landscape_plugin.errors import run_cli, suggest
from rlvr_landscape_plugin.trl.states import STATES_ARE_SAFE


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit code. `prog`: what the user typed, for the usage line."""

    def run() -> None:
        config = load_config(sys.argv[1:] if argv is None else argv, TrainConfig, prog)
        if config.dry_run:
            print(train_report(config))
            return
        # Threads that spin while they wait for each other cost several times the work itself on a shared machine.
        # OpenMP reads this once, when torch loads; the server shall have its own defaults.
        given = os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch  # noqa: F401

        if given == "PASSIVE":
            os.environ.pop("OMP_WAIT_POLICY")
        from rlvr_landscape_plugin.trl.train import train

        train(config)
        suggest(
            f"rlvr-landscape sweep --snapshots {config.output} --output {config.output}/landscape",
            "with the [env] of this training",
        )

    return run_cli(run, f"interrupted; {STATES_ARE_SAFE}, the same command continues")


if __name__ == "__main__":
    sys.exit(main())
