"""A command of scripts/ or benchmarks/ as a module, for tests that call its functions."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def script(name: str, folder: str = "scripts") -> Any:
    """FOLDER/NAME.py, read anew; dataclasses need it among the loaded modules."""
    found = importlib.util.spec_from_file_location(f"{name}_command", ROOT / folder / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module
