"""The public surface, read from the code: what users type, write into configurations, import, and find in datasets.

    python tests/freeze/public_surface.py    writes public_surface.txt again, after a change on purpose

Each section is a function that returns lines. Only names that documents promise are named here; modules may move.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import os
import re
import runpy
import subprocess
import sys
import tempfile
import tomllib
import types
import typing
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from old_data import PROGRESSIVE, arguments_for, dataset_of, unpack
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("public_surface.txt")
PACKAGES = ("rlvr_landscape_plugin", "rlvr_chat", "rlvr_landscape_analysis", "rlvr_alphabet_sort", "rlvr_word_problems")
COMMANDS = {
    "rlvr_landscape_plugin.sweep": "SweepConfig",
    "rlvr_landscape_plugin.cluster": "ClusterSweepConfig",
    "rlvr_landscape_plugin.trl": "TrainConfig",
    "rlvr_landscape_plugin.serving.launch": "LaunchConfig",
}
"""Modules to run → the configuration whose keys are their options."""
PLAIN_COMMANDS = (
    "rlvr_landscape_plugin.snapshot",
    "rlvr_landscape_analysis",
    "rlvr_landscape_analysis.trainer_log",
)
"""Modules to run that take no configuration."""
SUBCOMMANDS = {
    "status": "rlvr_landscape_plugin.sweep.status_command",
    "compare": "rlvr_landscape_analysis.compare",
}
"""Subcommands of `rlvr-landscape` whose arguments are written nowhere else → the module to run."""
HEAD = """\
# The public surface of this project: what users type, write into configurations, import, and find in datasets.
# A test compares it with the code. After a change on purpose, write it again with
#     python tests/freeze/public_surface.py
# and list the change in CHANGELOG.md under "Deliberate changes of the public surface".
"""


def commands() -> list[str]:
    """What can be run, with every argument."""
    lines = []
    for module, name in COMMANDS.items():
        keys = {_option(line) for line in _keys(_configuration(name)) if _option(line)}
        shown = _options_in_help(module)
        lines.append(f"python -m {module} [@ FILE ...] [--KEY VALUE ...]   KEY: those of {name}")
        lines += [f"    --{option} is a key but no option" for option in sorted(keys - shown)]
        lines += [f"    --{option} is an option but no key" for option in sorted(shown - keys)]
    for module in PLAIN_COMMANDS:
        lines.append(f"python -m {module}")
        lines += [f"    {line}" for line in _arguments(module)]
    from rlvr_landscape_plugin.cli import COMMANDS as subcommands

    for name, command in subcommands.items():
        lines.append(f"rlvr-landscape {name} {command.takes}")
        lines += [f"    {line}" for line in _arguments(SUBCOMMANDS[name])] if name in SUBCOMMANDS else []
    lines += ["rlvr-landscape --version"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for script, target in sorted(project["scripts"].items()):
        module, _, function = target.partition(":")
        main = getattr(importlib.import_module(module), function)
        same = [name for name in COMMANDS if main is getattr(importlib.import_module(name), "main", None)]
        lines.append(f"{script}   as python -m {same[0] if same else module.removesuffix('.cli')}")
    return lines


def _option(line: str) -> str:
    """`grid.find: table, absent` is no option, `grid.find.kl: float …` is --grid.find.kl."""
    key, _, rest = line.partition(": ")
    return "" if rest.startswith("table") else key.replace("_", "-")


def _options_in_help(module: str) -> set[str]:
    environment = os.environ | {"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
    shown = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True, env=environment
    )
    return set(re.findall(r"^\W*--([a-z][a-z0-9.-]*[a-z0-9])", shown.stdout, re.MULTILINE)) - {"help"}


class _FoundParser(Exception):
    """Carries a command's parser out of the command."""


def _arguments(module: str) -> list[str]:
    """The arguments of a command that uses argparse, which is stopped when it parses them."""

    def stop(self: argparse.ArgumentParser, *_: Any) -> None:
        raise _FoundParser(self)

    parse, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, stop  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # it is imported already
            runpy.run_module(module, run_name="__main__")
    except _FoundParser as found:
        parser: argparse.ArgumentParser = found.args[0]
    else:
        raise AssertionError(f"{module} does not parse its arguments with argparse")
    finally:
        argparse.ArgumentParser.parse_args = parse
    lines = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        name = "/".join(action.option_strings) or str(action.metavar or action.dest)
        kind = "flag" if action.nargs == 0 else getattr(action.type, "__name__", "str")
        facts = [kind, *(["one or more"] if action.nargs == "+" else [])]
        facts += [f"one of {', '.join(map(str, action.choices))}"] if action.choices else []
        facts += ["required"] if action.required and action.option_strings else []
        facts += [f"default {action.default}"] if action.option_strings and action.nargs != 0 else []
        lines.append(f"{name}: {', '.join(facts)}")
    return lines


def _configuration(name: str) -> type[BaseModel]:
    module = "rlvr_landscape_plugin.cluster" if name == "ClusterSweepConfig" else "rlvr_landscape_plugin.config"
    return getattr(importlib.import_module(module), name)


def _keys(table: type[BaseModel], prefix: str = "") -> list[str]:
    """One line per key of this project below `table`: dotted name, type, bounds, default."""
    lines = []
    own = {name for base in table.__mro__ if base.__module__.startswith(PACKAGES) for name in base.__annotations__}
    for name, field in table.model_fields.items():
        if name not in own:
            continue
        key = prefix + name
        below = _table_in(field.annotation)
        if below is None:
            lines.append(f"{key}: {', '.join([_type(field.annotation), *_bounds(field)])} = {_default(field)}")
            continue
        if field.get_default(call_default_factory=True) is None:
            lines.append(f"{key}: table, absent by default")
        lines += _keys(below, f"{key}.")
    return lines


def _table_in(annotation: Any) -> type[BaseModel] | None:
    """The table that a key holds, if it holds one; a list of tables is one key."""
    if typing.get_origin(annotation) is list:
        return None
    for option in (annotation, *typing.get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _type(annotation: Any) -> str:
    if annotation is None or annotation is types.NoneType:
        return "None"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(repr(value) for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " | ".join(_type(option) for option in arguments)
    if origin is not None:
        return f"{origin.__name__}[{', '.join('...' if one is ... else _type(one) for one in arguments)}]"
    return getattr(annotation, "__name__", str(annotation))


def _bounds(field: FieldInfo) -> list[str]:
    words = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥", "max_length": "length ≤"}
    return [
        f"{words[name]} {getattr(bound, name)}"
        for bound in field.metadata
        for name in words
        if getattr(bound, name, None) is not None
    ]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(must be given)"
    value = field.get_default(call_default_factory=True)
    return repr(str(value) if isinstance(value, Path) else value)


def sweep_keys() -> list[str]:
    """`SweepConfig`: TOML keys and, with `-` for `_`, options of the sweep."""
    return _keys(_configuration("SweepConfig"))


def _besides_the_sweep(name: str) -> list[str]:
    """Keys of another command; a table that is the sweep's, key for key, is one line."""
    known, lines = sweep_keys(), _keys(_configuration(name))
    if set(known) <= set(lines):
        return ["all keys of SweepConfig, and", *(line for line in lines if line not in known)]

    def of(table: str, among: list[str]) -> list[str]:
        return [line for line in among if line.startswith(f"{table}.")]

    shorter: list[str] = []
    for line in lines:
        table = line.partition(".")[0] if "." in line.partition(":")[0] else ""
        shared = bool(table) and of(table, lines) == of(table, known)
        line = f"{table}: the table of SweepConfig" if shared else line
        if line not in shorter:
            shorter.append(line)
    return shorter


def cluster_keys() -> list[str]:
    """`ClusterSweepConfig`."""
    return _besides_the_sweep("ClusterSweepConfig")


def train_keys() -> list[str]:
    """`TrainConfig`."""
    return _besides_the_sweep("TrainConfig")


def launch_keys() -> list[str]:
    """`LaunchConfig`."""
    return _besides_the_sweep("LaunchConfig")


def prime_rl_keys() -> list[str]:
    """`[trainer.loss.kwargs]` of prime-rl."""
    from rlvr_landscape_plugin.prime_rl.adapter import LossKwargs

    return _keys(LossKwargs)


def taskset_keys() -> list[str]:
    """`[env.taskset]` of rlvr-alphabet-sort."""
    from rlvr_alphabet_sort.taskset import AlphabetSortConfig

    return _keys(AlphabetSortConfig)


def word_problems_keys() -> list[str]:
    """`[env.taskset]` of rlvr-word-problems."""
    from rlvr_word_problems.taskset import WordProblemsConfig

    return _keys(WordProblemsConfig)


def objectives() -> list[str]:
    """Names and options of objectives, for `objective.name` and `objective.options`."""
    from rlvr_landscape_plugin.objectives import OBJECTIVES

    return [
        f"{name}: advantage_scale = {one.advantage_scale!r}; "
        + ", ".join(f"{option} = {value!r}" for option, value in sorted(one.options.items()))
        for name, one in OBJECTIVES.items()
    ]


def routes() -> list[str]:
    """Routes of the server, and the fields of their bodies."""
    import msgspec

    from rlvr_landscape_plugin.serving import protocol
    from rlvr_landscape_plugin.serving.endpoint import LandscapeEndpoint

    found = []

    class Router:
        def add_api_route(self, path: str, endpoint: Any, *, methods: list[str], **_: Any) -> None:
            found.append(f"{', '.join(methods)} {path}")

    LandscapeEndpoint().attach_router(Router())  # type: ignore[arg-type]
    bodies = []
    for name in ("LoadCall", "MoveCall", "GenerateCall", "GenerateItem", "Sampling", "ScoreCall"):
        for field in msgspec.structs.fields(getattr(protocol, name)):
            default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
            given = "" if default is msgspec.NODEFAULT else f" = {_bare(default)}"
            bodies.append(f"{name}.{field.name}: {_type(field.type)}{given}")
    return [*sorted(found), f"protocol {protocol.PROTOCOL}", *bodies]


def _bare(value: Any) -> str:
    return f"{type(value).__name__}()" if hasattr(value, "__struct_fields__") else repr(value)


def environment_variables() -> list[str]:
    """Every RLVR_LANDSCAPE_… that the packages name."""
    found = set()
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"^RLVR_LANDSCAPE_[A-Z_]+$", node.value))
    return sorted(found)


def _sources() -> Iterable[Path]:
    for package in PACKAGES:
        for folder in _specification(package).submodule_search_locations or ():
            yield from Path(folder).rglob("*.py")


def _specification(module: str) -> Any:
    found = importlib.util.find_spec(module)
    assert found is not None, f"there is no module {module}"
    return found


def imports() -> list[str]:
    """What documents and configurations of others name in Python."""
    from rlvr_landscape_plugin import config, directions, objectives, sweep

    lines = [f"rlvr_landscape_plugin.prime_rl.loss.policy_loss{_unimported('policy_loss')}"]
    for module, names in (
        (sweep, ("main",)),
        (config, ("SweepConfig", "TrainConfig", "LaunchConfig", "load_config")),
        (directions, ("SliceSpec",)),
        (objectives, ("check_feeds", "configure", "group_advantages", "pad", "Objective", "ReferenceSchedule")),
    ):
        for name in names:
            path, value = f"{module.__name__}.{name}", getattr(module, name)
            lines.append(path if isinstance(value, type) and issubclass(value, BaseModel) else _called(path, value))
    lines.append(
        _called("rlvr_landscape_plugin.config.SweepConfig.from_provenance", config.SweepConfig.from_provenance)
    )
    lines.append(_called("rlvr_landscape_plugin.config.SweepConfig.provenance", config.SweepConfig.provenance))
    lines += _members("rlvr_landscape_plugin.objectives.Objective", objectives.Objective)
    lines += _members("rlvr_landscape_plugin.objectives.ReferenceSchedule", objectives.ReferenceSchedule)
    lines.append(f"rlvr_landscape_plugin.objectives.FEEDS: {', '.join(objectives.FEEDS)}")
    lines.append(f"rlvr_landscape_plugin.objectives.PRIME_RL_FEEDS: {', '.join(sorted(objectives.PRIME_RL_FEEDS))}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group, points in sorted(project["entry-points"].items()):
        for name, target in points.items():
            module, _, _ = target.partition(":")
            _specification(module)
            lines.append(f"entry point of {group}: {name}")
    rlvr_chat = importlib.import_module("rlvr_chat")
    lines += [f"rlvr_chat.{name}" for name in rlvr_chat.__all__]
    return lines


def _unimported(function: str) -> str:
    """The parameters of a function in prime_rl/loss.py, which only prime-rl can import."""
    source = Path(_specification("rlvr_landscape_plugin.prime_rl.loss").origin).read_text()
    (found,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == function)
    star = [f"**{found.args.kwarg.arg}"] if found.args.kwarg else []
    return f"({', '.join([argument.arg for argument in found.args.args] + star)})"


def _called(path: str, function: Callable[..., Any]) -> str:
    """How something is called: parameters and defaults, without types."""
    parts: list[str] = []
    named = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not named:
            parts.append("*")
        named = named or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={_plain(parameter.default)}"
        parts.append(f"{star}{parameter.name}{default}")
    return f"{path}({', '.join(parts)})"


def _plain(value: Any) -> str:
    """A default without addresses of memory, and short where it is an object."""
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(repr, value)))}}}" if value else "frozenset()"
    text = repr(value)
    return "..." if text.startswith("<") or " at 0x" in text else text


def _members(path: str, kind: type) -> list[str]:
    """Public methods and properties of a class, and its call."""
    lines = []
    for name, member in sorted(vars(kind).items()):
        if isinstance(member, property):
            lines.append(f"{path}.{name}")
        elif inspect.isfunction(member) and (name == "__call__" or not name.startswith("_")):
            lines.append(_called(f"{path}.{name}", member))
    return lines


def analysis() -> list[str]:
    """`rlvr_landscape_analysis.__all__`."""
    import rlvr_landscape_analysis as rla

    lines = []
    for name in sorted(rla.__all__):
        value = getattr(rla, name)
        path = f"rlvr_landscape_analysis.{name}"
        exception = isinstance(value, type) and issubclass(value, Exception)
        lines.append(path if exception else _called(path, value))
        if dataclasses.is_dataclass(value):
            lines += [line for line in _members(path, typing.cast(type, value))]
    return lines


def accessor() -> list[str]:
    """Methods of `ds.landscape`."""
    from rlvr_landscape_analysis import LandscapeAccessor

    return _members("ds.landscape", LandscapeAccessor)


def manifest() -> list[str]:
    """Keys of a snapshot's manifest.json."""
    from rlvr_landscape_plugin.snapshot import Manifest

    return [f"{field.name}: {str(field.type).partition('[')[0]}" for field in dataclasses.fields(Manifest)]


def dataset() -> list[str]:
    """Dimensions, variables and attributes of a dataset that the present code writes from an old journal."""
    import xarray as xr

    with tempfile.TemporaryDirectory() as folder:
        output = unpack("progressive", Path(folder))
        path = dataset_of(output)
        path.unlink()
        _consolidate(output)
        with xr.open_dataset(path, engine="netcdf4", decode_cf=False) as data:
            lines = [f"file {path.name}", f"dimensions ({', '.join(map(str, data.sizes))})"]
            for name, variable in sorted(data.variables.items()):
                facts = [variable.dtype.name, f"({', '.join(map(str, variable.dims))})"]
                facts += [f"units {variable.attrs['units']}"] if "units" in variable.attrs else []
                if "flag_values" in variable.attrs:
                    values = " ".join(map(str, variable.attrs["flag_values"]))
                    facts.append(f"flags {values}: {variable.attrs['flag_meanings']}")
                others = sorted(set(variable.attrs) - {"units", "flag_values", "flag_meanings"})
                lines.append(f"{name}: {', '.join(facts)}; {' '.join(others)}")
            lines += [f"attribute {name}: {_type(type(value))}" for name, value in sorted(data.attrs.items())]
    return lines


def _consolidate(output: Path) -> None:
    from rlvr_landscape_plugin.sweep import main

    given = os.environ.get("RLVR_LANDSCAPE_TOKEN")
    os.environ["RLVR_LANDSCAPE_TOKEN"] = "nobody"
    try:
        with contextlib.redirect_stderr(sys.stdout):
            assert main(arguments_for(output, *PROGRESSIVE)) == 0, "the old journal did not become a dataset"
    finally:
        os.environ.pop("RLVR_LANDSCAPE_TOKEN")
        if given is not None:
            os.environ["RLVR_LANDSCAPE_TOKEN"] = given


SECTIONS: dict[str, Callable[[], list[str]]] = {
    "Commands": commands,
    "Keys of SweepConfig": sweep_keys,
    "Keys of ClusterSweepConfig": cluster_keys,
    "Keys of LaunchConfig": launch_keys,
    "Keys of TrainConfig": train_keys,
    "Keys of [trainer.loss.kwargs] in prime-rl": prime_rl_keys,
    "Keys of [env.taskset] for rlvr-alphabet-sort": taskset_keys,
    "Keys of [env.taskset] for rlvr-word-problems": word_problems_keys,
    "Objectives and their options": objectives,
    "Routes and bodies of the server": routes,
    "Environment variables": environment_variables,
    "Python: the plugin": imports,
    "Python: rlvr_landscape_analysis": analysis,
    "Python: ds.landscape": accessor,
    "Keys of a snapshot's manifest.json": manifest,
    "The dataset": dataset,
}


def section(title: str) -> str:
    """One section as the code has it."""
    return "\n".join([f"## {title}", *SECTIONS[title]()]) + "\n"


def stored() -> dict[str, str]:
    """The sections that public_surface.txt has."""
    _, *parts = re.split(r"^(?=## )", FILE.read_text(), flags=re.MULTILINE)
    return {part.partition("\n")[0].removeprefix("## "): part.rstrip("\n") + "\n" for part in parts}


if __name__ == "__main__":
    FILE.write_text("\n".join([HEAD, *map(section, SECTIONS)]))
