"""`rlvr-landscape compare`: differences against closed forms, coverage of their intervals, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from rlvr_landscape_analysis import synthetic_designs
from rlvr_landscape_analysis.compare import main
from rlvr_landscape_analysis.comparison import compare
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.report.comparison import comparison_table, plain_table, write_comparison
from rlvr_landscape_analysis.synthetic_designs import PathTruth
from scipy import stats

DATA = Path(__file__).parent / "data"
STEP_0, STEP_10 = (DATA / "laptop" / f"landscape_step0000{step}_slice0.nc" for step in ("00", "10"))


def changed(folder: Path, source: Path, configuration: dict | None = None, **attributes: str) -> Path:
    """A copy of a dataset in a directory of its own, with other attributes."""
    folder.mkdir()
    with xr.open_dataset(source) as data:
        copy = data.load()
    settings = json.loads(copy.attrs["configuration"])
    for table, options in (configuration or {}).items():
        settings[table] |= options
    copy.attrs |= {"configuration": json.dumps(settings)} | attributes
    copy.to_netcdf(folder / source.name)
    return folder


def per_prompt(file: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Means per prompt, (alpha, beta, prompt), and the radius of each point."""
    with xr.open_dataset(file) as data:
        values = data[name].astype(float).mean("rollout").transpose("alpha", "beta", "prompt").values
        return values, np.hypot(*np.meshgrid(data["alpha"], data["beta"], indexing="ij"))


def test_a_paired_difference_is_student_s_t_over_prompts():
    found = compare(STEP_0, STEP_10)
    assert found.rows
    assert all(row.paired for row in found.rows)
    for row in found.rows:
        name = "kl_k1" if row.quantity == "kl" else "reward"
        sides = []
        for file in (STEP_0, STEP_10):
            values, radius = per_prompt(file, name)
            inside = np.isclose(radius, row.radius)
            own = values[inside].mean(0)
            sides.append(own - values[np.isclose(radius, 0)][0] if row.quantity == "change" else own)
        difference = sides[1] - sides[0]
        expected = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
        assert float(row.difference.value) == pytest.approx(difference.mean(), abs=1e-12)
        assert row.difference.interval(0.95) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_other_prompts_are_not_paired(tmp_path):
    other = changed(tmp_path / "other", STEP_0, prompts_sha256="0" * 64)
    found = compare(STEP_0, other / STEP_0.name)
    row = found.rows[0]
    assert not row.paired
    assert float(row.difference.value) == 0
    values, radius = per_prompt(STEP_0, "reward")
    own = values[np.isclose(radius, 0)][0]
    low, high = row.difference.interval(0.95)
    assert (high - low) / 2 == pytest.approx(
        stats.t.ppf(0.975, 2 * (len(own) - 1)) * np.sqrt(2 * own.var(ddof=1) / len(own)), rel=1e-6
    )
    assert any("not paired" in note for note in found.notes)


def test_the_same_prompts_and_policies_differ_by_nothing(tmp_path):
    copy = changed(tmp_path / "copy", STEP_0)
    for row in compare(STEP_0, copy / STEP_0.name).rows:
        assert float(row.difference.value) == 0
        assert row.difference.interval(0.95) == (0, 0)


def test_two_censuses_are_compared_at_the_same_lengths(tmp_path):
    source = DATA / "census" / "census_step000000.nc"
    folder = tmp_path / "better"
    folder.mkdir()
    with xr.open_dataset(source) as data:
        better = data.load()
    better["reward"] = better["reward"] + 0.25
    better.to_netcdf(folder / source.name)
    found = compare(DATA / "census", folder)
    lengths = {row.radius for row in found.rows} - {0.0}
    assert len(lengths) >= 1
    for row in found.rows:
        if row.radius:
            assert row.directions[0] >= 1
            gain = {"reward": 0.25, "change": 0.25, "kl": 0.0}[row.quantity]
            assert float(row.difference.value) == pytest.approx(gain, abs=1e-6)


def test_two_paths_are_compared_at_the_same_positions(tmp_path):
    truths = {"displacement": PathTruth(), "update": PathTruth(slope=0.0)}
    one = synthetic_designs.path(truths).assign_attrs(configuration="{}")
    other = one.isel(path=[0], position=[0, 2, 3, 5]).copy(deep=True)
    other["reward"] = other["reward"] + 0.125
    for folder, data in (("a", one), ("b", other)):
        (tmp_path / folder).mkdir()
        data.to_netcdf(tmp_path / folder / "path_step000010.nc")
    found = compare(tmp_path / "a", tmp_path / "b")
    assert {row.landscape for row in found.rows} == {"path, step 10, displacement"}
    assert sorted({row.radius for row in found.rows}) == [-1.0, 0.0, 0.5, 1.5]
    assert all("update" in note for note in found.notes)
    for row in found.rows:
        assert row.paired
        assert float(row.difference.value) == pytest.approx(0.0 if row.quantity == "kl" else 0.125, abs=1e-6)
    here = one["reward"].sel(path="displacement", position=0.5).mean("rollout").values
    row = next(row for row in found.rows if (row.radius, row.quantity) == (0.5, "reward"))
    assert float(row.first.value) == pytest.approx(here.mean(), rel=1e-6)
    comparison_table(found)


def test_runs_are_matched_by_step_and_slice(tmp_path):
    shutil.copytree(DATA / "laptop", tmp_path / "laptop")
    (tmp_path / "laptop" / "landscape_step000001_slice0.nc").unlink()
    found = compare(DATA / "laptop", tmp_path / "laptop")
    assert {row.landscape for row in found.rows} == {"grid, step 0, slice 0", "grid, step 10, slice 0"}
    assert found.notes == [f"Only in {found.names[0]}, left out: grid, step 1, slice 0."]


@pytest.mark.parametrize(
    ("configuration", "attributes", "message"),
    [
        ({"sampling": {"temperature": 0.5}}, {}, r"sampling\.temperature: 1\.0 and 0\.5"),
        ({"env": {"taskset": {"max_turns": 9}}}, {}, r"env\.taskset\.max_turns"),
        ({}, {"taskset": "other"}, "taskset: 'rlvr-alphabet-sort' and 'other'"),
        ({}, {"reward_mode": "random"}, "reward: 'verifier' and 'random'"),
    ],
    ids=["sampler", "tasks", "taskset", "reward"],
)
def test_what_measured_something_else_is_refused_by_name(tmp_path, configuration, attributes, message):
    other = changed(tmp_path / "other", STEP_0, configuration, **attributes)
    with pytest.raises(AnalysisError, match=message):
        compare(STEP_0, other / STEP_0.name)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (DATA / "laptop", DATA / "laptop", "are the same"),
        (DATA / "laptop", DATA / "census", "nothing to compare"),
        (DATA / "laptop", Path("/nowhere"), "does not exist"),
        (DATA / "laptop", DATA, "holds no finished dataset"),
        (DATA / "laptop", Path(__file__), "no name that a sweep gives"),
    ],
    ids=["same", "designs", "absent", "empty", "file"],
)
def test_mistakes_are_one_message(first, second, message, capsys, tmp_path):
    assert main([str(first), str(second), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_page_the_table_and_the_terminal_say_the_same(tmp_path, capsys):
    assert main([str(STEP_0), str(STEP_10), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    page = (tmp_path / "out" / "comparison.html").read_text()
    table = comparison_table(compare(STEP_0, STEP_10))
    for row, _ in zip(table.layout()[0], range(5), strict=False):
        for text, _mark in row:
            assert text.replace("'", "&#39;") in page
            assert text in said.out
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")
    assert said.err == f"next: open {tmp_path / 'out' / 'comparison.html'} in a browser\n"
    assert {"comparison.csv", "comparison.md", "comparison.tex", "comparison.pdf", "comparison.png"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_few_prompts_have_no_interval_and_say_why(tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        with xr.open_dataset(STEP_0) as data:
            data.isel(prompt=slice(5)).load().to_netcdf(folder / STEP_0.name)
    found = compare(tmp_path / "a", tmp_path / "b")
    text = plain_table(comparison_table(found))
    assert "an interval needs 8 prompts, there are 5" in text
    assert "not known" in text
    assert write_comparison(found, tmp_path / "out")[0].is_file()
