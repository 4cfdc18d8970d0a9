"""What the documents name exists: links, headings, commands, files, options, keys and environment variables.

Options and keys are compared with `tests/freeze/public_surface.txt`, which a test of its own compares with the code.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from rlvr_landscape_plugin.cli import COMMANDS

ROOT = Path(__file__).parents[1]
SURFACE = (ROOT / "tests" / "freeze" / "public_surface.txt").read_text()


def tracked(*patterns):
    """Files that git has or would have, as paths relative to the repository."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    return subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


DOCUMENTS = [path for path in tracked("*.md") if not path.startswith("tests/") and (ROOT / path).is_file()]
FILES = [path for path in tracked() if (ROOT / path).exists()]
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
KEYS = set(re.findall(r"^([a-z_]+(?:\.[a-z_]+)*):", SURFACE[SURFACE.index("## Keys of SweepConfig") :], re.MULTILINE))
TABLES = {key.split(".")[0] for key in KEYS if "." in key}
FREE_TABLES = ("env.taskset", "evaluation.taskset", "objective.options", "cluster.parameters")
"""Tables whose keys belong to somebody else: a taskset, an objective, submitit."""
OTHERS_OPTIONS = ("env.agent.", "client.", "env.id", "monitors.", "resume.", "run.name")
"""Options of vf-eval, which the documents show beside ours."""


def text_of(document):
    return (ROOT / document).read_text()


def code_of(document):
    """Everything set as code, joined where a line ends in a backslash: fenced and indented blocks, and inline code."""
    text = text_of(document).replace("\\\n", " ")
    fenced = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    outside = re.sub(r"^```[a-z]*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(.+)$", outside, re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", outside)
    return [line for block in fenced for line in block.splitlines()] + indented + inline


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(document), re.MULTILINE | re.DOTALL)


def anchors(path):
    """The anchors that GitHub gives to the headings of a Markdown file."""
    found, fenced = set(), False
    for line in path.read_text().splitlines():
        fenced ^= line.startswith("```")
        if not fenced and (heading := re.match(r"#+ (.+)", line)):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
            found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


def known(option):
    """Whether a dotted option or key is one of ours."""
    key = option.replace("-", "_")
    return (
        key in KEYS
        or any(name.startswith(key + ".") for name in KEYS)
        or any(key == table or key.startswith(table + ".") for table in FREE_TABLES)
    )


def test_there_are_documents_and_keys_to_check():
    assert {"README.md", "docs/design.md", "docs/statistics.md"} <= set(DOCUMENTS)
    assert {"grid.alpha.points", "server.urls", "objective.name", "cluster.shards"} <= KEYS
    assert {"landscape", "test", "lint"} <= TARGETS


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_and_their_headings_exist(document):
    here = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (here / path).resolve() if path else ROOT / document
        assert file.exists(), f"{document} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{document} links to {target}; headings: {sorted(anchors(file))}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist(document):
    for line in code_of(document):
        for target in re.findall(r"\bmake ([a-z][\w-]*)", line):
            assert target in TARGETS, f"{document}: make {target}"
        for module in re.findall(r"\bpython -m ([\w.]+)", line):
            if not module.startswith("rlvr_"):
                continue
            spec = importlib.util.find_spec(module)
            assert spec is not None, f"{document}: python -m {module}"
            if spec.submodule_search_locations is not None:
                assert importlib.util.find_spec(f"{module}.__main__") is not None, f"{document}: python -m {module}"
        for command in re.findall(r"\brlvr-landscape (?!@)([a-z][\w-]*)", line):
            assert command in COMMANDS, f"{document}: rlvr-landscape {command}"
        for script in re.findall(r"\b(?:python|bash) ([\w/]+\.(?:py|sh))\b", line):
            assert (ROOT / script).is_file(), f"{document}: {script}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_exist(document):
    """Paths below the repository's own folders, and the names of Python files wherever they lie."""
    if document.startswith("docs/upstream/"):
        pytest.skip("it names files of another project")
    folders = {path.split("/")[0] for path in FILES if "/" in path}
    for line in code_of(document):
        for word in re.split(r"[\s'\",;()=\[\]{}]+", line):
            path = word.strip(".:").removeprefix("./").removeprefix("$LANDSCAPE/")
            if path.split("/")[0] in folders and "/" in path and not re.search(r"[<>…$]", path):
                if path.startswith("environments/"):
                    path = path.split("[")[0]
                matched = any(ROOT.glob(path.rstrip("/"))) or (Path(ROOT / document).parent / path).exists()
                assert matched, f"{document} names {path}"
            elif re.fullmatch(r"[\w/]+\.py", path):
                ours = any(file == path or file.endswith("/" + path) for file in FILES)
                assert ours, f"{document} names {path}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_and_keys_exist(document):
    for line in code_of(document):
        for option in re.findall(r"--([a-z][\w-]*(?:\.[\w-]+)+)", line):
            assert known(option) or option.startswith(OTHERS_OPTIONS), f"{document}: --{option}"
        bare = re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)+)(?: = .*)?", line)
        if bare and bare[1].split(".")[0] in TABLES and not bare[1].endswith((".py", ".md", ".toml", ".log", ".json")):
            assert known(bare[1]), f"{document}: {bare[1]}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_environment_variables_exist(document):
    sources = "".join((ROOT / path).read_text() for path in FILES if path.endswith((".py", ".sh")))
    for name in set(re.findall(r"\bRLVR_LANDSCAPE_[A-Z_]+", text_of(document))):
        assert name in sources, f"{document}: {name}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_examples_parse(document):
    for block in blocks(document, "toml"):
        tomllib.loads(block)
    for block in blocks(document, "python"):
        compile(block, document, "exec")
    for block in blocks(document, "bash"):
        shlex.split(block, comments=True)


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if "published experiment" in text_of(path) and path != "CHANGELOG.md"]
)
def test_the_published_experiment_is_linked_at_its_first_mention(document):
    text = text_of(document)
    link = "[RLVR reward landscape](https://israel-adewuyi.github.io/blog/2026/rlvr-reward-landscape/)"
    first = text.index("published experiment")
    assert link in text[max(0, first - 200) : first + 300].replace("\n", " "), f"{document}: name and link it there"


def test_every_variable_of_a_dataset_is_described():
    from rlvr_landscape_analysis.schema import SCHEMA

    described = set(re.findall(r"`([a-z_0-9]+)`", text_of("docs/dataset.md")))
    assert set(SCHEMA) - described == set()


YAML_FILES = tracked("*.yaml", "*.yml", "*.cff")


@pytest.mark.parametrize("path", YAML_FILES)
def test_yaml_files_parse(path):
    assert isinstance(yaml.safe_load((ROOT / path).read_text()), dict)


def test_the_workflow_runs_the_script_that_every_other_machine_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yaml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]


def test_the_hooks_run_tools_of_the_project_s_environment_or_of_the_package_index():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    for hook in hooks[0]["hooks"]:
        assert hook["entry"].startswith(".venv/bin/") == (hook["language"] == "system")
        assert hook["language"] == "system" or hook["additional_dependencies"]
    assert {"ruff-check", "ruff-format", "pyright"} <= {hook["id"] for hook in hooks[0]["hooks"]}


@pytest.mark.parametrize("name", ["bug.yaml", "question.yaml"])
def test_issue_forms_have_what_a_form_needs(name):
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE" / name).read_text())
    assert form["name"]
    assert form["description"]
    ids = [item["id"] for item in form["body"]]
    assert len(ids) == len(set(ids)) >= 2
    assert all(item["type"] in {"textarea", "input"} and item["attributes"]["label"] for item in form["body"])
