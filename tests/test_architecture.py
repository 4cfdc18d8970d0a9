"""Which folder may know of which: read from the sources, so that nothing has to be imported."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "rlvr_landscape_plugin"
ANALYSIS = ROOT / "analysis" / "rlvr_landscape_analysis"
HEAVY = ("torch", "vllm", "transformers", "trl", "verifiers", "matplotlib")
MAY_IMPORT_HEAVY = ("serving/worker/", "serving/endpoint.py", "trl/", "prime_rl/")
"""Parts that only run where those packages are."""


def imports(file: Path, at_top: bool = False) -> set[str]:
    """Modules that a file imports; `at_top`: when it is itself imported."""
    tree = ast.parse(file.read_text())
    found = set()
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inner = {id(node) for function in functions for node in ast.walk(function)}
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in guarded or (at_top and id(node) in inner):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files(*folders: str) -> list[Path]:
    """Sources of some of the plugin's folders."""
    return [file for folder in folders for file in sorted((PLUGIN / folder).rglob("*.py"))]


def offenders(sources: list[Path], *forbidden: str) -> list[str]:
    """`file imports module` for every import of something below a forbidden module."""
    return [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in sources
        for module in sorted(imports(file))
        if any(module == name or module.startswith(name + ".") for name in forbidden)
    ]


@pytest.mark.parametrize(
    ("folders", "forbidden"),
    [
        (("serving/worker",), ("sweep", "designs", "store", "episodes", "trl", "prime_rl")),
        (("serving",), ("sweep", "designs", "store", "episodes", "trl", "prime_rl")),
        (("designs",), ("serving", "sweep", "episodes", "trl", "prime_rl")),
        (("store",), ("serving", "sweep", "designs", "episodes", "trl", "prime_rl", "directions")),
        (("directions", "snapshot", "config"), ("serving", "sweep", "designs", "store", "episodes", "trl", "prime_rl")),
        (("episodes",), ("sweep", "designs", "store", "trl", "prime_rl")),
        (("sweep",), ("trl", "prime_rl", "serving.worker")),
    ],
    ids=lambda value: "+".join(value) if len(value) < 4 else "",
)
def test_imports_run_one_way(folders, forbidden):
    assert not offenders(files(*folders), *(f"rlvr_landscape_plugin.{name}" for name in forbidden))


def test_the_analysis_knows_nothing_of_the_plugin():
    assert not offenders(sorted(ANALYSIS.rglob("*.py")), "rlvr_landscape_plugin", "torch", "vllm", "verifiers")


def test_heavy_packages_are_imported_inside_functions():
    found = [
        f"{file.relative_to(PLUGIN)} imports {module}"
        for file in sorted(PLUGIN.rglob("*.py"))
        for module in sorted(imports(file, at_top=True))
        if module.split(".")[0] in HEAVY and not file.relative_to(PLUGIN).as_posix().startswith(MAY_IMPORT_HEAVY)
    ]
    assert not found


def test_few_modules_lie_outside_folders():
    assert len(list(PLUGIN.glob("*.py"))) <= 9


@pytest.mark.parametrize(("folder", "most"), [(PLUGIN, 4), (ANALYSIS, 2)], ids=["plugin", "analysis"])
def test_few_files_are_long(folder, most):
    long = [file.relative_to(folder) for file in folder.rglob("*.py") if file.read_text().count("\n") > 400]
    assert len(long) <= most, long


def test_any_is_rare():
    """`Any` per 1,000 lines of the plugin, imports of it left out."""
    lines = [line for file in PLUGIN.rglob("*.py") for line in file.read_text().splitlines()]
    uses = sum(
        isinstance(node, ast.Name) and node.id == "Any"
        for file in PLUGIN.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
    )
    assert 1000 * uses / len(lines) < 10
