"""What is sent, and the guard that keeps a failing service from ending what it reports on.

Both services have the same interface (`init`, `run.log`, `run.finish`); each reads its own environment variables, such
as WANDB_MODE, WANDB_ENTITY and TRACKIO_DIR.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
from collections.abc import Callable
from typing import Any, Self

from rlvr_landscape_plugin.config import SweepConfig
from rlvr_landscape_plugin.display import Display
from rlvr_landscape_plugin.errors import ConfigurationError

PROJECT = "rlvr-landscape"
"""The project, where neither the configuration nor the service's own variable names one."""
FINISH_SECONDS = 60
"""Longest wait for W&B to send its last values."""


def require(service: str | None) -> None:
    """Raise `ConfigurationError` unless the package of the service is installed."""
    if service is not None and importlib.util.find_spec(service) is None:
        raise ConfigurationError(
            f"log = {service!r} needs the package {service}: pip install 'rlvr-landscape[{service}]', or leave log out"
        )


def project_of(service: str, given: str | None) -> str:
    """The project: as given, else WANDB_PROJECT or TRACKIO_PROJECT, else `PROJECT`."""
    return given or os.environ.get(f"{service.upper()}_PROJECT") or PROJECT


class Guard:
    """Calls a service until it fails for the first time, which is said once."""

    def __init__(self, service: str, say: Callable[[str], None]) -> None:
        self._service, self._say = service, say
        self.off = False
        """Whether it has failed."""

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What `function` returns; None where it fails, or the service failed before."""
        if self.off:
            return None
        try:
            return function(*arguments, **options)
        except (Exception, SystemExit) as error:  # whatever it is, the measurement goes on
            self.off = True
            self._say(f"logging to {self._service} failed and stops; everything else goes on: {error or type(error)}")
            return None


class Tracker:
    """One run of a service."""

    def __init__(self, service: str, say: Callable[[str], None], **options: Any) -> None:
        """Start a run; `options` are those of `init`."""
        self._guard = Guard(service, say)
        self._run = self._guard(_start, service, options)

    def log(self, values: dict[str, float]) -> None:
        """Send finite numbers under their names."""
        if self._run is not None:
            self._guard(self._run.log, {name: value for name, value in values.items() if math.isfinite(value)})

    def finish(self) -> None:
        """Send what is left."""
        if self._run is not None:
            self._guard(self._run.finish)


def _start(service: str, options: dict[str, Any]) -> Any:
    set_defaults()
    return importlib.import_module(service).init(**options)


def set_defaults() -> None:
    """What W&B shall do where the user's environment does not say otherwise: leave the terminal, and end."""
    for name, value in (("CONSOLE", "off"), ("FINISH_TIMEOUT", str(FINISH_SECONDS)), ("FINISH_TIMEOUT_RAISES", "0")):
        os.environ.setdefault(f"WANDB_{name}", value)


class TrackedDisplay(Display):
    """The display of a sweep, which also sends each point."""

    def __init__(self, service: str, **options: Any) -> None:
        """`options` are those of the service's `init`."""
        super().__init__()
        self._service, self._options = service, options
        self._section, self._sent = "", 0

    def __enter__(self) -> Self:
        super().__enter__()
        self._tracker = Tracker(self._service, self.say, **self._options)
        return self

    def __exit__(self, *exc: object) -> None:
        self._tracker.finish()
        super().__exit__(*exc)

    def open(self, label: str, *arguments: Any) -> None:
        """A new slice; see `Display.open`."""
        super().open(label, *arguments)
        self._section = re.sub(r"\W+", "_", label)

    def point(self, alpha: float, beta: float, reward: float, kl: float, seconds: float) -> None:
        """One point finished; see `Display.point`."""
        super().point(alpha, beta, reward, kl, seconds)
        self._sent += 1
        values = {
            "reward": reward,
            "kl_nat": kl,
            "alpha": alpha,
            "beta": beta,
            "distance": math.hypot(alpha, beta),
            "seconds": seconds,
            "points_done": self._points[0],
            "points_asked": self._points[1],
        }
        named = {f"{self._section}/{name}": value for name, value in values.items()}
        self._tracker.log({**named, "sweep/points_of_this_command": self._sent})


def sweep_display(config: SweepConfig) -> Display:
    """The display of a sweep, with a run of `config.log` if that names a service."""
    if config.log is None:
        return Display()
    require(config.log)
    output = config.output.resolve()
    shard = f" shard {config.shard}" if config.shard else ""
    return TrackedDisplay(
        config.log,
        project=project_of(config.log, config.log_project),
        name=f"{output.name}{shard}",
        group=output.name,
        config=config.provenance() | {"output": str(output), "snapshots": list(config.snapshots)},
    )
