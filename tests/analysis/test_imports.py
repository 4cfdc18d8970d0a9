"""Imports run one way: the analysis reads files, so it needs nothing of what wrote them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import rlvr_landscape_analysis

PACKAGE = Path(rlvr_landscape_analysis.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
FOREIGN = {
    *("rlvr_landscape_plugin", "rlvr_chat", "rlvr_alphabet_sort", "rlvr_word_problems"),
    *("torch", "vllm", "transformers", "verifiers", "trl", "prime_rl", "pydantic", "rich"),
}


def imported(source: str) -> set[str]:
    """Top-level names of everything that a source text imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found |= {str(arg.value).split(".")[0] for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def test_imports_are_found_wherever_they_stand():
    text = (
        "import a.b\nfrom c.d import e\nfrom . import g\n"
        "def f():\n    import h\n    importlib.import_module('i.j')\n"
        "if TYPE_CHECKING:\n    from k import l\n"
    )
    assert imported(text) == {"a", "c", "h", "i", "k"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_analysis_imports_nothing_of_the_plugin_or_its_engines(path):
    assert not imported(path.read_text()) & FOREIGN


@pytest.mark.parametrize(
    ("folder", "above"),
    [("statistics", {"figures", "report", "run", "accessor"}), ("figures", {"report", "run", "accessor"})],
)
def test_statistics_draw_nothing_and_figures_report_nothing(folder, above):
    forbidden = tuple(f"rlvr_landscape_analysis.{name}" for name in above)
    for path in sorted((PACKAGE / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert not (module or "").startswith(forbidden), path


def test_everything_loads_without_them():
    modules = [
        "rlvr_landscape_analysis." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in SOURCES
        if path.name not in ("__init__.py", "__main__.py")
    ]
    code = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(FOREIGN)!r}:
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import importlib
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
