"""What every table of the configuration shares: unknown keys and unbounded numbers are refused, and every message names
its file or key.

A command line is TOML with comments (`@ file.toml`) and dotted overrides (`--grid.alpha.points 9`). Parsing imports
neither torch nor vllm nor verifiers, so `--help` and mistakes answer at once.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ConfigDict, model_validator
from pydantic_config import BaseConfig, ConfigFileError, cli

from rlvr_landscape_plugin.errors import ConfigurationError

MOST_EPISODES = 10_000_000
"""Episodes (tasks × rollouts) of one batch; more is a typing mistake, and each of them is held in memory."""

LogService = Literal["wandb", "trackio"]
"""A service that shows the progress of sweeps and of training runs."""

LARGEST_SEED = 2**63 - 1
"""Datasets keep seeds as 64-bit integers."""


class StrictConfig(BaseConfig):
    """A table of the configuration; NaN and infinity are refused, and an unknown key with the nearest known one."""

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: object) -> object:
        if problems := _unknown_keys(cls, data):
            raise ValueError("; ".join(problems))
        return data


def _unknown_keys(table: type[StrictConfig], data: object, prefix: str = "") -> list[str]:
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


def load_config(argv: Sequence[str], kind: type[_Config], prog: str | None = None) -> _Config:
    """Parse a command line; raises `ConfigurationError` naming the option or file that is wrong.

    `prog`: what the user typed to get here, for the usage line; default: found from how Python was started.
    """
    try:
        prog = prog or _program()
        with _quick_help() if {"-h", "--help"} & set(argv) else contextlib.nullcontext():
            return cli(kind, args=list(argv), prog=prog, description=kind.__doc__)  # pyright: ignore[reportCallIssue]
    except json.JSONDecodeError as error:
        raise ConfigurationError(_json_problem(argv, error)) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(_encoding_problem(argv, error)) from error
    except (ConfigFileError, OSError, ValueError) as error:
        raise ConfigurationError(str(error)) from error


@contextlib.contextmanager
def _quick_help() -> Iterator[None]:
    """While `--help` is written: pydantic_config parses the source of pydantic's own classes, which describe no key,
    once for each table; that takes longer than everything else."""
    real = inspect.getsource

    def of_ours(item: object) -> str:
        if getattr(item, "__module__", "").partition(".")[0] in ("pydantic", "pydantic_config"):
            raise OSError("it describes no key")
        return real(item)  # pyright: ignore[reportArgumentType]

    inspect.getsource = of_ours
    try:
        yield
    finally:
        inspect.getsource = real


def _program() -> str | None:
    """The command as the user typed it; a package started by `python -m` has a nameless file."""
    main = sys.modules.get("__main__")
    package = getattr(main, "__package__", "") or ""
    file = Path(getattr(main, "__file__", None) or "")
    return f"python -m {package}" if package and file.name == "__main__.py" else None


def _json_problem(argv: Sequence[str], error: json.JSONDecodeError) -> str:
    """Which option's value is no JSON."""
    places = [place for place, value in enumerate(argv) if value == error.doc]
    option = argv[places[0] - 1] if places and places[0] else "an option"
    return (
        f"the value {error.doc!r} of {option} is not JSON: {error.msg} at character {error.pos + 1}; "
        f"""write a table like {option} '{{"key": 1}}' and a list like '[1, 2]'"""
    )


def _encoding_problem(argv: Sequence[str], error: UnicodeDecodeError) -> str:
    """Which file is not UTF-8, and where."""
    for file in (Path(value.removeprefix("@")) for value in argv):
        if file.is_file():
            try:
                file.read_bytes().decode()
            except UnicodeDecodeError as found:
                line = found.object[: found.start].count(b"\n") + 1
                return f"{file}: byte 0x{found.object[found.start]:02x} in line {line} is not UTF-8; save it as UTF-8"
    return str(error)
