"""Containerfile: clean to a linter, honest about what was not tried, and made of the steps of scripts/setup.sh."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = ROOT / "Containerfile"


def instructions():
    """(instruction, arguments) of each line, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", FILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def test_the_linter_finds_nothing():
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:
        pytest.skip("hadolint is not installed (it is part of the extra `dev`)")
    done = subprocess.run([hadolint, "--failure-threshold", "style", str(FILE)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_its_first_line_says_that_it_was_not_built():
    assert FILE.read_text().startswith("# Not built yet")


def test_each_target_is_one_call_of_the_set_up_that_everybody_runs():
    stages, stage = {}, ""
    for name, rest in instructions():
        if name == "FROM":
            stage = rest.split(" AS ")[1]
            stages[stage] = []
        stages[stage].append((name, rest))
    assert list(stages) == ["base", "cpu", "gpu"]
    for device in ("cpu", "gpu"):
        assert [rest for name, rest in stages[device] if name == "RUN"] == [f"bash scripts/setup.sh .venv {device}"]
        assert ("ENTRYPOINT", '["rlvr-landscape"]') in stages[device]
    assert "pip install" not in FILE.read_text()


def test_what_it_copies_exists_and_is_all_that_the_set_up_reads():
    copied = [rest.split()[1:-1] for name, rest in instructions() if name == "COPY"]
    sources = [source for sources in copied for source in sources if source != "."]
    assert not [source for source in sources if not (ROOT / source).exists()]
    for needed in ("pyproject.toml", "scripts/setup.sh", "environments", "rlvr_chat", "analysis", "docs/package.md"):
        assert needed in sources


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_set_up_has_an_extra_for_each_target(device):
    done = subprocess.run(
        [sys.executable, "-c", "from importlib.metadata import metadata; print(metadata('rlvr-landscape').get_all("
         "'Provides-Extra'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"'{device}'" in done.stdout
    assert ".[cluster,$device,dev,train]" in (ROOT / "scripts" / "setup.sh").read_text()


def test_another_device_is_refused(tmp_path):
    command = ["bash", str(ROOT / "scripts" / "setup.sh"), str(tmp_path / "venv"), "tpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: tpu is neither cpu nor gpu\n")
    assert not (tmp_path / "venv").exists()
