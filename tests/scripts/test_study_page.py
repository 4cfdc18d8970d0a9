"""The study's page from synthetic stages: what it says, what it says is missing, and making it from its own data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from rlvr_landscape_analysis import synthetic, synthetic_designs
from rlvr_landscape_analysis.synthetic_designs import CensusTruth, PathTruth
from scipy import stats
from script_module import script

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
GAINS = {"grpo-0": 0.18, "grpo-1": 0.15, "random-0": 0.0, "grpo_n-0": 0.1}


@pytest.fixture(scope="module")
def page_command():
    """scripts/study_page.py as a module."""
    return script("study_page")


def save(data, path, **attributes):
    path.parent.mkdir(parents=True, exist_ok=True)
    data.assign_attrs(attributes).to_netcdf(path)


def write_training(folder, name, gain):
    folder.mkdir(parents=True)
    objective, seed = name.split("-")
    paid = {"task": {"reward_mode": "random"}} if objective == "random" else {}
    trained = {"name": "grpo_n" if objective == "grpo_n" else "grpo"}
    configuration = {"objective": trained, "env": {"taskset": paid}}
    (folder / "run.json").write_text(json.dumps({"id": name, "configuration": configuration}))
    rng = np.random.default_rng(int(seed))
    start = rng.uniform(0.2, 0.6, 32)
    looks = [
        {
            "step": step,
            "reward": 0.4,
            "entropy": 0.6 - step / 200 - 0.01 * int(seed),
            "task_rewards": list(start + gain * step / 40 + (rng.normal(0, 0.02, 32) if step else 0)),
        }
        for step in (0, 20, 40)
    ]
    lines = [{"step": s, "entropy": 0.6 - s / 200, "reward": 0.9 - 0.3 * np.exp(0.6 - s / 200)} for s in range(1, 41)]
    for file, rows in (("evaluations", looks), ("metrics", lines)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A study of which some stages are done."""
    root = tmp_path_factory.mktemp("study")
    census, boundary = synthetic_designs.census, synthetic_designs.boundary
    truth = CensusTruth(correlation=0.0, spread=0.06)
    start = census(truth, pairs=16, rollouts=4, unit="theta", radii=(0.004, 0.03), step=0)
    save(start, root / "start" / "census" / "census_step000000.nc")
    rates = np.repeat([0.3, 0.0], 32)
    for folder in ("boundary", "others"):
        save(boundary(rates, rollouts=64, step=0), root / "start" / folder / "boundary_step000000.nc")
    for number, (name, gain) in enumerate(GAINS.items()):
        write_training(root / name / "run", name, gain)
        paid = {"training_reward_mode": "random"} if name.startswith("random") else {}
        found = census(truth, pairs=16, rollouts=4, radii=(0.4, 3.0), step=40 + 100 * number).assign_coords(step=40)
        found = found.assign_coords(direction_seed=("direction", 1000 * number + np.arange(16)))
        save(found, root / name / "census" / "census_step000040.nc", **paid)
        for folder in ("boundary", "others"):
            later = rates + (gain if folder == "boundary" else 0.0)
            save(boundary(later, rollouts=64, step=40), root / name / folder / "boundary_step000040.nc", **paid)
    path = synthetic_designs.path({"displacement": PathTruth(kl=0.5)}, rollouts=4).assign_coords(step=40)
    save(path, root / "grpo-0" / "path_last" / "path_step000040.nc")
    for step in (5, 10, 20):
        target = root / "grpo-0" / "boundary" / f"boundary_step{step:06d}.nc"
        save(boundary(rates + 0.02, rollouts=64, step=step), target)
    entry = {"what": "measured", "done": True, "seconds": 90.0, "cores": 2, "commit": "abc"}
    entry |= {"rollouts": 1000, "seeds": [3]}
    write_training(root / "grpo-9" / "run", "grpo-9", 0.9)
    stages = {"start": entry, **{f"train-{name}": entry for name in GAINS}}
    stages |= {name: entry | {"done": False} for name in ("path-grpo-1", "train-grpo-9")}
    stages["grid-of-an-older-plan"] = entry | {"done": False, "seconds": 0.0}
    (root / "record.json").write_text(json.dumps({"stages": stages}))
    folder = root / "grpo-0" / "grid_wide"
    folder.mkdir()
    synthetic.landscape("mixed", points=9, prompts=16, seed=0).to_netcdf(folder / "landscape_step000000_slice0.nc")
    return root


@pytest.fixture(scope="module")
def page(page_command, out, tmp_path_factory):
    target = tmp_path_factory.mktemp("page") / "study"
    expected = ("start", "train-grpo-0", "path-grpo-1", "train-grpo-9", "census-grpo-9", "grids-grpo-0")
    assert page_command.main([str(out), "--page", str(target), "--expected", *expected]) == 0
    return target


def test_the_page_names_what_is_missing(page):
    text = (page / "README.md").read_text()
    assert "**Not measured yet:** the runs grpo-9 and what lies around them; path-grpo-1; grids-grpo-0." in text
    done = 1 + len(GAINS)
    assert f"{done} stages, {done},000 rollouts, {(done + 2) * 90 / 3600:.1f} hours on 2 cores, commit abc." in text
    assert "| path-grpo-1 | measured | 1.5 (not finished) |" in text
    assert "grid-of-an-older-plan" not in text


def test_slices_are_drawn_and_their_plain_correlation_is_given_by_range(page, out):
    text = (page / "README.md").read_text()
    with xr.open_dataset(out / "grpo-0" / "grid_wide" / "landscape_step000000_slice0.nc") as data:
        kl, reward = (data[name].values.astype(float).mean((2, 3)).ravel() for name in ("kl_k1", "reward"))
        reach = float(data["alpha"].max())
    words = f"{np.corrcoef(kl, reward)[0, 1]:+.2f} within ±{reach:.3g}".replace("-", "−")
    (row,) = [line for line in text.splitlines() if line.startswith("| grpo-0 | 0 | ") and "within" in line]
    assert row.endswith(f"; {words} |")
    assert (page / "grid_wide_grpo-0" / "landscape_step000000_slice0.png").is_file()


def test_a_run_that_still_trains_is_left_out(page, page_command, out):
    assert "grpo-9" not in page_command.read(out).training
    assert "GRPO, seed 9" not in (page / "README.md").read_text()
    assert not (page / "data" / "grpo-9").exists()


def test_verdicts_are_those_of_the_claims(page):
    text = (page / "README.md").read_text()
    for objective in ("grpo", "grpo_n"):
        own = (page / objective / "claims.md").read_text()
        for line in own.splitlines():
            if line.startswith("## T"):
                name, verdict = line[3:5], line.rpartition(": ")[2]
                (row,) = [row for row in text.splitlines() if row.startswith(f"| {name}.")]
                assert row.split("|")[2 if objective == "grpo" else 3].strip() == verdict
    assert "random-0 (trained on random rewards)" in (page / "grpo" / "claims.md").read_text()


def test_gains_have_intervals_over_runs(page, out, page_command):
    training = page_command.read(out).training
    gains = [float(training[name]["gain"][-1]) for name in ("grpo-0", "grpo-1")]
    low, high = stats.t.interval(0.95, 1, np.mean(gains), stats.sem(gains))
    text = (page / "README.md").read_text().replace("−", "-")
    assert f"GRPO: gain {np.mean(gains):+.3f} [{low:+.3f}, {high:+.3f}] over 2 runs" in text
    assert "GRPO-N: gain +0." in text
    assert "(one run: no interval over runs)" in text
    assert "Spurious rewards raise the reward: undecided" in text
    assert "GRPO-N keeps the entropy higher than GRPO: undecided" in text


def test_spurious_rewards_and_entropy_are_judged_by_their_intervals(page_command):
    judged = page_command.judged
    assert judged((0.01, 0.02)) == "supported"
    assert judged((-0.02, -0.01)) == "not supported"
    assert judged((-0.02, 0.01)) == judged((np.nan, np.nan)) == "undecided at this sample size"
    value, interval = page_command.between([0.1, 0.2, 0.3], [0.5, 0.6, 0.9])
    expected = stats.ttest_ind([0.5, 0.6, 0.9], [0.1, 0.2, 0.3], equal_var=False).confidence_interval()
    assert value == pytest.approx(np.mean([0.5, 0.6, 0.9]) - 0.2)
    assert interval == pytest.approx((expected.low, expected.high))


def test_boundaries_tell_the_people_apart(page):
    rows = [row.split("|") for row in (page / "README.md").read_text().splitlines() if "0 to 40" in row]
    gain = {(row[1].strip(), row[2].strip()): float(row[4].split()[0].replace("−", "-")) for row in rows}
    assert gain["grpo-0", "those of training"] == pytest.approx(0.18, abs=0.03)
    assert abs(gain["grpo-0", "others"]) < 0.03


def test_two_stages_need_five_steps(page):
    text = (page / "README.md").read_text()
    assert "grpo-0: " in text.split("Two stages")[1].split("\n")[0]
    assert "grpo-1: " not in text.split("Two stages")[1].split("\n")[0]


def test_pictures_and_links_exist(page):
    import re

    text = (page / "README.md").read_text()
    found = re.findall(r"\]\(([^)]+)\)", text)
    assert any(name.endswith("frontier_step000040.png") for name in found)
    for name in found:
        if not name.startswith("../"):
            assert (page / name).exists(), name


def test_the_page_can_be_made_from_the_data_beside_it(page_command, page, tmp_path):
    assert page_command.main([str(page / "data"), "--page", str(tmp_path / "again")]) == 0
    first, second = ((folder / "README.md").read_text() for folder in (page, tmp_path / "again"))
    assert second.split("## Training")[1] == first.split("## Training")[1]


def test_kept_datasets_are_shorter_and_equal(page_command, out, tmp_path):
    file = Path("grpo-0", "census", "census_step000040.nc")
    whole = xr.load_dataset(out / file).round(1)
    small = {name: {"zlib": True, "chunksizes": (1,) * 5} for name, v in whole.items() if v.ndim == 5}
    (tmp_path / "out" / file).parent.mkdir(parents=True)
    for variable in whole.variables.values():
        variable.encoding = {}
    whole.to_netcdf(tmp_path / "out" / file, encoding=small)
    page_command.copy_files([tmp_path / "out" / file], tmp_path / "out", tmp_path / "kept")
    kept = tmp_path / "kept" / file
    assert kept.stat().st_size < 0.9 * (tmp_path / "out" / file).stat().st_size
    assert xr.load_dataset(kept).identical(xr.load_dataset(tmp_path / "out" / file))
    before = kept.stat().st_mtime_ns
    page_command.copy_files([tmp_path / "out" / file], tmp_path / "out", tmp_path / "kept")
    assert kept.stat().st_mtime_ns == before
    page_command.copy_files([kept], tmp_path / "kept", tmp_path / "again")
    assert (tmp_path / "again" / file).read_bytes() == kept.read_bytes()
    assert sorted(path.name for path in kept.parent.iterdir()) == [kept.name]


def test_an_empty_study_has_a_page_that_says_so(page_command, tmp_path, capsys):
    assert page_command.main([str(tmp_path), "--page", str(tmp_path / "page")]) == 2
    assert "record.json is missing" in capsys.readouterr().err
    (tmp_path / "record.json").write_text('{"stages": {}}')
    assert page_command.main([str(tmp_path), "--page", str(tmp_path / "page"), "--expected", "start"]) == 0
    text = (tmp_path / "page" / "README.md").read_text()
    assert "No run has been trained yet" in text
    assert "**Not measured yet:** start." in text


def test_an_unreadable_dataset_is_named(page_command, out, tmp_path, capsys):
    import shutil

    shutil.copytree(out, tmp_path / "copy")
    (tmp_path / "copy" / "grpo-0" / "census" / "census_step000040.nc").write_bytes(b"no netCDF")
    assert page_command.main([str(tmp_path / "copy"), "--page", str(tmp_path / "page")]) == 2
    assert "census_step000040.nc cannot be read" in capsys.readouterr().err


def test_rows_of_other_thresholds_come_from_the_same_data(page_command, out):
    data = page_command.read(out)
    words = page_command.thresholds_words(data.runs("grpo"), page_command.Bootstrap())
    assert words.startswith("0.3 ")
    assert "0.7 " in words


def test_what_the_page_reads_is_kept_value_for_value(page, out):
    kept = list((page / "data").rglob("*.nc"))
    assert len(kept) > 10
    for file in kept:
        assert xr.load_dataset(file).identical(xr.load_dataset(out / file.relative_to(page / "data")))
    with xr.open_dataset(page / "data" / "random-0" / "census" / "census_step000040.nc") as data:
        assert data.attrs["training_reward_mode"] == "random"
