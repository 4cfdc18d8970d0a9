"""The errors a user can cause or repair, and how a command line shows them: one message, no traceback.

Each names what was wrong, where, and what to do. All of them pickle.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


class LandscapeError(Exception):
    """Base of all errors below."""


class ConfigurationError(LandscapeError, ValueError):
    """A configuration that cannot be run."""


class SnapshotError(LandscapeError, ValueError):
    """A policy on disk that is not whole, or not the one expected."""


class TasksetError(LandscapeError, ValueError):
    """A taskset that cannot be opened or that a sweep cannot drive."""


class ServerError(LandscapeError, RuntimeError):
    """A server that is missing, refuses, answers wrongly or died."""


class ServerUnreachableError(ServerError):
    """A server that does not answer, or stopped answering."""


class ServerRefusalError(ServerError):
    """A server that refuses what it is asked, and would refuse it again."""


class StoreError(LandscapeError, RuntimeError):
    """A result directory that cannot be written, or that belongs to something else."""


EXTRAS = {
    "verifiers": "sweep",
    "transformers": "sweep",
    "safetensors": "sweep",
    "trl": "train",
    "accelerate": "train",
    "torch": "train",
    "submitit": "cluster",
    "wandb": "wandb",
    "trackio": "trackio",
}
"""Package that may be absent → the extra of this distribution that brings it."""


def suggest(command: str, note: str = "") -> None:
    """Say on standard error what comes next: a command, and a note beside it."""
    print(f"next: {command}{f'   ({note})' if note else ''}", file=sys.stderr)


def user_message(error: BaseException) -> str | None:
    """What is shown of an error that a user can mend; None for a defect, which keeps its traceback."""
    of_pydantic = type(error).__name__ == "ValidationError" and type(error).__module__.startswith("pydantic")
    # The second: a configuration built in code, not by `load_config`.
    if isinstance(error, LandscapeError) or (isinstance(error, ValueError) and of_pydantic):
        return f"error: {error}"
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").partition(".")[0]
        if missing in EXTRAS:
            return (
                f"error: this command needs the package {missing}; install it with\n"
                f"       pip install 'rlvr-landscape[{EXTRAS[missing]}]'"
            )
    return None


def run_cli(
    function: Callable[[], None],
    interrupted: str = "interrupted; finished points are kept, the same command continues",
) -> int:
    """Call `function`; returns the exit code: 0, 2 for a user's error, 130 for Ctrl-C, which `interrupted` explains."""
    try:
        function()
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if interrupted:
            print(interrupted, file=sys.stderr)
        return 130
    return 0
