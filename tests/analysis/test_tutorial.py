"""The tutorial's choice of a run: a script's argument, but not a notebook's, whose command line is its kernel's."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from rlvr_landscape_analysis import synthetic

TUTORIAL = Path(__file__).parents[2] / "analysis" / "examples" / "tutorial.py"


@pytest.mark.parametrize(
    ("notebook", "arguments", "expected"),
    [(False, ["outputs/mine"], "mine"), (False, [], "synthetic"), (True, ["-f", "/run/user/kernel.json"], "synthetic")],
)
def test_a_notebook_s_arguments_are_no_run(monkeypatch, notebook, arguments, expected):
    monkeypatch.setattr(sys, "argv", ["tutorial.py", *arguments])
    monkeypatch.setattr(synthetic, "write_run", lambda *_, **__: None)
    # Another test may have run a notebook in this process.
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    opening, following = TUTORIAL.read_text().split("# 1. ")
    assert "argv" not in following
    names: dict = {}
    exec(compile(opening, str(TUTORIAL), "exec"), names)
    assert names["run"].name == expected
