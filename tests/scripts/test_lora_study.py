"""`make lora-study`: its stages without training or measuring anything, and its page from synthetic censuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rlvr_landscape_analysis import synthetic_designs
from rlvr_landscape_analysis.synthetic_designs import CensusTruth
from script_module import script

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("size", ["FULL", "SHORT"])
def test_both_censuses_move_the_same_weights_by_the_same_noise_on_the_same_tasks(size, tmp_path):
    from rlvr_landscape_plugin.config import SweepConfig, TrainConfig, load_config

    study = script("lora_study")
    stages = {s.name: s for s in study.all_stages(getattr(study, size), tmp_path, tmp_path / "page")}
    assert list(stages) == ["train", "inside", "outside", "page"]
    inside, outside = (
        load_config(stages[name].commands[0][2:], SweepConfig).provenance() for name in ("inside", "outside")
    )
    for data, kind in ((inside, "lora"), (outside, "lora_complement")):
        for axis in ("alpha", "beta"):
            assert data["slice"][axis].pop("kind") == kind
    assert inside == outside
    train = load_config(stages["train"].commands[0][2:], TrainConfig)
    assert train.lora is not None
    measured = study.all_stages(getattr(study, size), tmp_path, tmp_path)[1].commands[0]
    assert f"step_{train.steps:06d}" in measured[measured.index("--snapshots") + 1]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A study whose random policies lose up to 0.05 more reward inside than outside."""
    root = tmp_path_factory.mktemp("lora")
    for space, drift in (("inside", -0.10), ("outside", -0.05)):
        truth = CensusTruth(drift=drift, correlation=0.0, spread=0.01)
        data = synthetic_designs.census(truth, pairs=16, rollouts=4, radii=(0.4, 3.0), step=40)
        (root / space).mkdir()
        data.to_netcdf(root / space / "census_step000040.nc")
    run = root / "run"
    run.mkdir()
    configuration = {
        "lora": {"rank": 4, "alpha": 8.0},
        "env": {"tasks_per_batch": 32, "rollouts": 8, "taskset": {}},
        "optimizer": {"lr": 3e-3},
        "objective": {"name": "grpo"},
    }
    (run / "run.json").write_text(json.dumps({"id": "x", "configuration": configuration}))
    rng = np.random.default_rng(0)
    start = rng.uniform(0.1, 0.5, 64)
    looks = [
        {"step": s, "reward": 0.3, "entropy": 0.5, "task_rewards": list(start + 0.1 * s / 40 + rng.normal(0, 0.01, 64))}
        for s in (0, 40)
    ]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in looks))
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "reward": 0.3}) + "\n" for s in range(1, 41)))
    entry = {
        "what": "measured",
        "done": True,
        "seconds": 90.0,
        "cores": 2,
        "commit": "abc",
        "rollouts": 9,
        "seeds": [0],
    }
    (root / "record.json").write_text(json.dumps({"stages": {"train": entry}}))
    return root


@pytest.mark.slow
def test_the_page_has_both_sides_with_intervals_and_can_be_made_from_its_own_data(out, tmp_path):
    command = script("lora_page")
    assert command.main([str(out), "--page", str(tmp_path / "page")]) == 0
    text = (tmp_path / "page" / "README.md").read_text().replace("−", "-")
    rows = [row.split("|")[1:-1] for row in text.splitlines() if "| reward change |" in row]
    assert len(rows) == 2, "one per distance"
    for row, share in zip(rows, (0.4 / 3, 1.0), strict=True):
        inside, outside, difference = (float(cell.split()[0]) for cell in row[2:])
        low, high = (float(v) for v in row[4].split("[")[1].rstrip("] ").split(","))
        assert difference == pytest.approx(outside - inside, abs=2e-4)
        assert low < 0.05 * share < high
    assert low > 0, "shown at the largest distance"
    assert (tmp_path / "page" / "inside_and_outside.png").is_file()
    assert command.main([str(tmp_path / "page" / "data"), "--page", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "README.md").read_text().split("## Training")[1] == (
        tmp_path / "page" / "README.md"
    ).read_text().split("## Training")[1]


def test_a_study_without_one_census_is_refused_by_name(out, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(out, tmp_path / "copy")
    (copy / "outside" / "census_step000040.nc").unlink()
    assert script("lora_page").main([str(copy), "--page", str(tmp_path / "page")]) == 2
    assert "outside holds censuses of 0 snapshots" in capsys.readouterr().err
