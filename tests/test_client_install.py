"""What an installation without torch can do: the client with the extra `sweep`, and the bare wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import xarray as xr
from conftest import FAKE_TOKEN

ROOT = Path(__file__).parents[1]
SWEEP = (
    *("--grid.alpha.points", "2", "--grid.beta.points", "2", "--env.num-prompts", "2", "--env.rollouts", "4"),
    *("--sampling.max-tokens", "16", "--output", "out"),
)
"""3 × 3 points of the shipped policy on the default taskset."""
WITHOUT = """
import importlib.machinery, json, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {absent} else super().find_spec(name, path, target)

sys.meta_path = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
from rlvr_landscape_plugin.sweep import main
sys.exit(main(sys.argv[1:]))
"""
"""A sweep in an interpreter that does not find some packages."""
BESIDE_SWEEP = ["torch", "vllm", "trl", "accelerate", "datasets", "submitit", "wandb", "trackio"]
OF_SWEEP = ["verifiers", "transformers", "safetensors"]


def run_in(folder, *command, **environment):
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=kept | environment, capture_output=True, text=True, timeout=1800
    )
    return done.returncode, done.stdout + done.stderr


def sweep_without(folder, absent, *arguments):
    return run_in(
        *(folder, sys.executable, "-c", WITHOUT.replace("{absent}", json.dumps(absent)), *SWEEP, *arguments),
        RLVR_LANDSCAPE_TOKEN=FAKE_TOKEN,
        PYTHONPATH=os.pathsep.join(map(str, (ROOT, ROOT / "analysis", ROOT / "environments" / "rlvr_alphabet_sort"))),
    )


def assert_measured(folder):
    with xr.open_dataset(folder / "out" / "landscape_step000000_slice0.nc") as data:
        assert dict(data.sizes) == {"alpha": 3, "beta": 3, "prompt": 2, "rollout": 4}
        assert (data.kl_k1.sel(alpha=0, beta=0) == 0).all()
        assert data.kl_k3.mean(["prompt", "rollout"])[0, 0] > 0


def test_a_sweep_on_a_running_server_needs_only_the_extra_sweep(fake_server, tmp_path):
    code, said = sweep_without(tmp_path, BESIDE_SWEEP, "--server.urls", fake_server.url)
    assert code == 0, said
    assert "torch is not installed here" in said
    assert_measured(tmp_path)


def test_the_bare_wheel_says_which_extra_a_sweep_needs(fake_server, tmp_path):
    code, said = sweep_without(tmp_path, BESIDE_SWEEP + OF_SWEEP, "--server.urls", fake_server.url)
    assert code == 2
    assert "pip install 'rlvr-landscape[sweep]'" in said
    assert "Traceback" not in said


def test_a_sweep_that_shall_start_a_server_says_which_extras_have_one(tmp_path):
    code, said = sweep_without(tmp_path, BESIDE_SWEEP)
    assert code == 2
    assert "rlvr-landscape[cpu]" in said
    assert "[gpu]" in said
    assert "Traceback" not in said


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_fresh_environment_with_the_extra_sweep_measures(fake_server, tmp_path):
    """From the package index, as docs/servers.md says: first the bare wheel, then the extra `sweep`."""
    venv = tmp_path / "venv"
    python = venv / "bin" / "python"
    assert run_in(tmp_path, sys.executable, "-m", "venv", venv)[0] == 0

    def install(what):
        network = {name: value for name, value in os.environ.items() if name.lower().startswith(("pip_", "http"))}
        code, said = run_in(tmp_path, python, "-m", "pip", "install", "--quiet", what, **network)
        if code and any(word in said for word in ("Could not fetch", "Connection", "No matching distribution")):
            pytest.skip(f"the package index does not answer: {said.splitlines()[-1]}")
        assert code == 0, said

    def sweep():
        arguments = (*SWEEP, "--server.urls", fake_server.url)
        return run_in(tmp_path, venv / "bin" / "rlvr-landscape", "sweep", *arguments, RLVR_LANDSCAPE_TOKEN=FAKE_TOKEN)

    install(ROOT)
    code, said = sweep()
    assert code == 2
    assert "pip install 'rlvr-landscape[sweep]'" in said
    assert "Traceback" not in said
    install(f"{ROOT}[sweep]")
    code, said = sweep()
    assert code == 0, said
    assert_measured(tmp_path)
    assert run_in(tmp_path, python, "-c", "import torch")[0] == 1
    code, said = run_in(tmp_path, venv / "bin" / "rlvr-landscape", "report", "out")
    assert code == 0, said
    assert (tmp_path / "out" / "report" / "report.html").is_file()
