"""What commit 0ef8472 left behind (`data/README.md`), unpacked for a test, and the command that made it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

from rlvr_landscape_plugin.serving.launch import LocalServer

DATA = Path(__file__).parent / "data"
NOBODY = "http://127.0.0.1:1"
"""An address where no server listens."""
PROGRESSIVE = ("--env.num-prompts", "66", "--until-ci-width", "0.01", "--grid.find.prompts", "8")
"""What the sweep `progressive` was asked for besides `CONFIGURATION`."""
CONFIGURATION = """
snapshots = ["tiny-sorter"]
[grid.alpha]
min = -0.1
max = 0.1
points = 3
[grid.beta]
min = -0.05
max = 0.15
points = 2
[env]
num_prompts = 5
rollouts = 2
taskset = { min_turns = 2, max_turns = 2, max_names_per_turn = 3, seed = 12345 }
[sampling]
max_tokens = 32
"""
"""3 × 3 points: the second axis gains its origin."""


def unpack(name: str, folder: Path) -> Path:
    """The output directory `name` of an old sweep, unpacked below `folder`."""
    with tarfile.open(DATA / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


def dataset_of(output: Path) -> Path:
    """The file of the one landscape in `output`; it need not be there."""
    return output / "landscape_step000000_slice0.nc"


def journal_of(output: Path) -> Path:
    """The directory of the one journal in `output`."""
    return output / "step000000_slice0"


def arguments_for(output: Path, *more: str, url: str = NOBODY, configuration: str = CONFIGURATION) -> list[str]:
    """The command line that began the sweep in `output`, sent to the server at `url`."""
    config = output.parent / f"{output.name}.toml"
    config.write_text(configuration)
    return ["@", str(config), "--output", str(output), "--server.urls", url, "--server.patience", "0", *more]


def continue_sweep(output: Path, *more: str, server: LocalServer) -> subprocess.CompletedProcess[str]:
    """Give the sweep's command again, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "rlvr_landscape_plugin.sweep", *arguments_for(output, *more, url=server.url)],
        env=os.environ | {"RLVR_LANDSCAPE_TOKEN": server.token},
        capture_output=True,
        text=True,
        timeout=400,
    )


def fingerprints(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder` by its relative path, temporary files of a killed writer left out."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".tmp")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Files of `before` that are not there with the same bytes in `after`."""
    return [name for name, content in before.items() if after.get(name) != content]
