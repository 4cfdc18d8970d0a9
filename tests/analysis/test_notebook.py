"""docs/tutorial.ipynb: its cells run, and what they print is what the datasets hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import xarray as xr

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
DATA = ROOT / "tests" / "analysis" / "data" / "laptop"


def printed(notebook):
    """All text that the cells gave, streams and results."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.fixture(scope="module")
def notebooks():
    """The notebook as it is kept, and as it is after its cells ran."""
    nbformat = pytest.importorskip("nbformat", reason="the notebook needs nbclient and ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="the notebook needs nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="the notebook needs nbclient and ipykernel")
    kept, run = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(run, timeout=300, kernel_name="python3", resources=place).execute()
    return kept, run


@pytest.mark.slow
def test_the_notebook_runs_and_prints_what_it_is_kept_with(notebooks):
    kept, run = map(printed, notebooks)
    numbers = [[float(text) for text in re.findall(r"[-+]?\d+\.\d+", text)] for text in (kept, run)]
    assert len(numbers[0]) > 20
    assert numbers[1] == pytest.approx(numbers[0], abs=2e-3)


@pytest.mark.slow
def test_its_numbers_are_those_of_the_datasets(notebooks):
    text = printed(notebooks[1])
    with xr.open_dataset(DATA / "landscape_step000010_slice0.nc") as data:
        rewards = data.reward.mean("rollout").sel(alpha=0, beta=0)
        error = float(rewards.std("prompt", ddof=1)) / rewards.sizes["prompt"] ** 0.5
        assert f"reward of the snapshot: {float(rewards.mean()):.3f} ± {error:.3f}" in text
        means = data.reward.mean(["prompt", "rollout"])
        gain = float(means.max() - means.sel(alpha=0, beta=0))
        assert f"gain as measured {gain:+.3f}" in text
        values = xr.corr(data.kl_k1.mean(["prompt", "rollout"]), means)
        assert f"plain correlation {float(values):+.3f}" in text
    assert all(f"{claim}: " in text for claim in ("T1", "T2", "T3"))


@pytest.mark.slow
def test_its_map_is_a_picture(notebooks):
    pictures = [output.data for cell in notebooks[1].cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("image/png" in data for data in pictures) == 1
