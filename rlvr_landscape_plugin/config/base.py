"""What every table of the configuration shares: unknown keys are refused, and how a command line is read.

TOML with comments (`@ file.toml`) and dotted overrides (`--grid.alpha.points 9`), typed, unknown keys refused. Parsing
imports neither torch nor vllm nor verifiers, so `--help` and mistakes answer at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import model_validator
from pydantic_config import BaseConfig, ConfigFileError, cli

from rlvr_landscape_plugin.errors import ConfigurationError


class StrictConfig(BaseConfig):
    """A table of the configuration; an unknown key is refused with the nearest known one."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if problems := _unknown_keys(cls, data):
            raise ValueError("; ".join(problems))
        return data


def _unknown_keys(table: type[StrictConfig], data: Any, prefix: str = "") -> list[str]:
    """One sentence per key of `data`, at any depth, that `table` does not declare."""
    problems = []
    for key, value in data.items() if isinstance(data, dict) else ():
        field = table.model_fields.get(key)
        if field is None:
            near = difflib.get_close_matches(str(key), table.model_fields, n=1, cutoff=0.5)
            known = ", ".join(prefix + name for name in table.model_fields)
            hint = f"did you mean {prefix + near[0]!r}?" if near else f"known keys: {known}"
            problems.append(f"unknown key {f'{prefix}{key}'!r}; {hint}")
        elif isinstance(field.annotation, type) and issubclass(field.annotation, StrictConfig):
            problems += _unknown_keys(field.annotation, value, f"{prefix}{key}.")
    return problems


_Config = TypeVar("_Config", bound=StrictConfig)


def load_config(argv: Sequence[str], kind: type[_Config]) -> _Config:
    """Parse a command line; raises `ConfigurationError` for whatever is wrong in it or in its files."""
    try:
        return cli(kind, args=list(argv), description=kind.__doc__)  # pyright: ignore[reportCallIssue]
    except (ConfigFileError, OSError, ValueError) as error:
        raise ConfigurationError(str(error)) from error
