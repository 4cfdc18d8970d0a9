"""The command `rlvr-landscape`: what it lists, loads, refuses and says at its end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rlvr_landscape_plugin import __version__
from rlvr_landscape_plugin.cli import COMMANDS, main
from rlvr_landscape_plugin.errors import run_cli

HEAVY = ("torch", "vllm", "transformers", "verifiers", "trl", "matplotlib", "xarray", "numpy", "pydantic")


def loaded_by(*arguments: str) -> tuple[str, set[str]]:
    """What a command printed, and which heavy packages it had loaded at its end."""
    code = (
        "import sys; from rlvr_landscape_plugin.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        f"print('loaded', *sorted({{m.split('.')[0] for m in sys.modules}} & set({HEAVY!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    out, _, loaded = done.stdout.rpartition("loaded")
    return out, set(loaded.split())


def test_help_lists_every_command_and_loads_nothing():
    out, loaded = loaded_by("--help")
    assert all(f"\n  {name} " in out and command.summary in out for name, command in COMMANDS.items())
    assert loaded == set()


@pytest.mark.parametrize("name", ["sweep", "status", "snapshot", "train", "serve", "cluster"])
def test_help_of_a_command_names_it_and_loads_no_dataset_or_model_library(name):
    out, loaded = loaded_by(name, "--help")
    assert f"rlvr-landscape {name}" in out
    assert loaded <= {"numpy", "pydantic"}


@pytest.mark.parametrize("name", ["report", "compare"])
def test_help_of_the_analysis_waits_for_no_figure(name):
    out, loaded = loaded_by(name, "--help")
    assert f"rlvr-landscape {name}" in out
    assert "matplotlib" not in loaded


def test_version_and_the_module_are_the_same_command(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlvr-landscape {__version__}\n"
    done = subprocess.run(
        [sys.executable, "-m", "rlvr_landscape_plugin", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"rlvr-landscape {__version__}\n"


def test_without_a_command_the_usage_is_an_error(capsys):
    assert main([]) == 2
    assert "usage: rlvr-landscape COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reprot"], "there is no command 'reprot'; did you mean 'report'?"),
        (["x"], "there is no command 'x'; commands: sweep, census"),
        (["census", "--design", "path"], "measures the design 'census'; leave --design out"),
        (["path", "--design=grid"], "measures the design 'path'"),
        (["census", "--grid.alpha.points", "5"], "[grid] belongs to design = 'grid', not to 'census'"),
        (["sweep", "--sed", "1"], "sed"),
        (["report", "/nowhere"], "/nowhere"),
        (["snapshot", "ls", "/nowhere"], "/nowhere"),
        (["compare", "/nowhere", "/elsewhere"], "/nowhere does not exist"),
        (["status", "/nowhere"], "/nowhere does not exist"),
        (["train", "--objective.name", "nothing"], "nothing"),
        (["serve", "--model", "/nowhere"], "/nowhere"),
        (["cluster", "--shard", "1/2"], "cluster.shards"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_message_and_code_2(arguments, message, capsys):
    try:
        code = main(arguments)
    except SystemExit as stopped:  # argparse refuses by itself
        code = stopped.code
    assert code == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_design_s_command_measures_that_design(capsys):
    assert main(["census", "--census.pairs", "3", "--census.radii", "[1, 2]", "--dry-run"]) == 0
    assert "3 pairs × 2 × 2 radii = 12 points" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("package", "extra"), [("verifiers.v1", "sweep"), ("transformers", "sweep"), ("trl", "train"), ("torch", "train")]
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(package, extra, capsys):
    def start() -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    assert run_cli(start) == 2
    err = capsys.readouterr().err
    assert package.partition(".")[0] in err
    assert f"pip install 'rlvr-landscape[{extra}]'" in err


def test_a_module_that_no_extra_brings_is_a_defect():
    def start() -> None:
        raise ModuleNotFoundError("No module named 'rlvr_landscape_plugin.nothing'", name="rlvr_landscape_plugin.x")

    with pytest.raises(ModuleNotFoundError):
        run_cli(start)


def test_a_sweep_ends_by_naming_the_report(sweep_here, fake_server, tmp_path):
    code, said = sweep_here(fake_server)
    assert code == 0
    assert said.splitlines()[-1] == f"next: rlvr-landscape report {tmp_path / 'out'}"


def test_a_shard_that_is_not_the_last_names_the_status(sweep_here, fake_server, tmp_path):
    code, said = sweep_here(fake_server, "--shard", "1/2")
    assert code == 0
    assert said.splitlines()[-1] == f"next: rlvr-landscape status {tmp_path / 'out'}"
