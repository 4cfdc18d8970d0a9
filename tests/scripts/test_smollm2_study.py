"""`make smollm2-study`: its stages without training or measuring anything, its page from synthetic data, its check."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from rlvr_landscape_analysis import synthetic, synthetic_designs
from rlvr_landscape_analysis.synthetic_designs import CensusTruth, PathTruth
from script_module import script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study():
    return script("smollm2_study")


@pytest.fixture(scope="module")
def page_command():
    return script("smollm2_page")


class Machine:
    """Stands in for the commands of the short study: leaves the files that a stage promises."""

    def __init__(self, study, out):
        self.stages = {stage.name: stage for stage in study.all_stages(study.SHORT, out, out / "page")}
        self.ran = []

    def __call__(self, command, share=None):
        (stage,) = [stage for stage in self.stages.values() if tuple(command) in stage.commands]
        self.ran.append(stage.name)
        for path in stage.outputs:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".nc":
                xr.Dataset({"base_reward": (("prompt", "rollout"), np.zeros((8, 2)))}).to_netcdf(path)
            elif path.name == "run.json":
                sizes = {"env": {"tasks_per_batch": 4, "rollouts": 2}, "evaluation": {"num_tasks": 4, "rollouts": 2}}
                path.write_text(json.dumps({"configuration": sizes}))
            elif path.suffix == ".jsonl":
                first = 0 if path.name == "evaluations.jsonl" else 1
                steps = range(first, stage.last_evaluation + 1)
                path.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
            else:
                path.write_text("{}")
        return 0


def test_all_stages_run_in_an_order_that_works_and_are_then_skipped(study, tmp_path, capsys):
    machine = Machine(study, tmp_path)
    assert study.main(["--short", "--output", str(tmp_path)], run=machine) == 0, capsys.readouterr()
    order = list(dict.fromkeys(machine.ran))
    assert order == list(machine.stages)
    for name in order:
        assert all(order.index(needed) < order.index(name) for needed in machine.stages[name].needs)
    machine.ran.clear()
    assert study.main(["--short", "--output", str(tmp_path)], run=machine) == 0
    assert machine.ran == ["page"]


def test_rollouts_of_a_continued_run_are_counted_once(study, tmp_path):
    assert study.main(["--short", "--output", str(tmp_path)], run=Machine(study, tmp_path)) == 0
    stages = json.loads((tmp_path / "record.json").read_text())["stages"]
    batch, evaluation = 4 * 2, 4 * 2
    assert stages["train-1"]["rollouts"] == 1 * batch + 2 * evaluation
    assert stages["train-2"]["rollouts"] == 1 * batch + 1 * evaluation


@pytest.mark.parametrize("size", ["FULL", "SHORT"])
def test_configurations_are_valid_and_stages_take_an_hour_at_most(study, size, tmp_path):
    from rlvr_word_problems.taskset import WordProblemsConfig

    from rlvr_landscape_plugin.config import SweepConfig, TrainConfig, load_config

    kinds = {"rlvr_landscape_plugin.trl": TrainConfig, "rlvr_landscape_plugin.sweep": SweepConfig}
    stages = study.all_stages(getattr(study, size), tmp_path, tmp_path / "page")
    assert max(stage.minutes for stage in stages) <= 60
    seen = set()
    for command in (command for stage in stages for command in stage.commands):
        if command[0] == "-m":
            config = load_config(command[2:], kinds[command[1]])
            seen.add(type(config))
            assert config.env.id == "rlvr-word-problems"
            WordProblemsConfig(id=config.env.id, **config.env.taskset)
    assert seen == {TrainConfig, SweepConfig}


def test_problems_of_the_warm_start_of_training_and_of_measurements_differ(study):
    import tomllib

    train, tasks = (tomllib.loads((ROOT / f"configs/smollm2/{name}.toml").read_text()) for name in ("train", "tasks"))
    seeds = [train["env"]["taskset"]["seed"], train["evaluation"]["taskset"]["seed"], tasks["env"]["taskset"]["seed"]]
    assert len({*seeds, script("warm_start").SEED}) == 4
    warm = json.loads(study.FULL.warm[study.FULL.warm.index("--taskset") + 1])
    for key in ("min_steps", "max_steps"):
        assert warm[key] == train["env"]["taskset"][key] == tasks["env"]["taskset"][key]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A study of which all but the 2-D slice is done; its held-out reward rises by 0.2."""
    root = tmp_path_factory.mktemp("smollm2")
    run = root / "grpo" / "run"
    run.mkdir(parents=True)
    configuration = json.loads(json.dumps({"env": {"tasks_per_batch": 8, "rollouts": 8, "taskset": {"max_steps": 2}}}))
    configuration |= {"evaluation": {"num_tasks": 64, "rollouts": 8}, "objective": {"name": "grpo"}}
    configuration |= {"optimizer": {"name": "adamw", "lr": 2e-4}, "lora": {"rank": 16}}
    (run / "run.json").write_text(json.dumps({"id": "x", "configuration": configuration}))
    rng = np.random.default_rng(0)
    start = rng.uniform(0.1, 0.5, 64)
    looks = [
        {"step": s, "reward": 0.3, "entropy": 0.5, "task_rewards": list(start + 0.2 * s / 40 + rng.normal(0, 0.01, 64))}
        for s in (0, 20, 40)
    ]
    seconds = {"seconds": 30.0, "seconds_push": 3.0, "seconds_rollouts": 6.0, "seconds_forward": 5.0}
    lines = [{"step": s, "entropy": 0.5, "reward": 0.3, **seconds} for s in range(1, 41)]
    for file, rows in (("evaluations", looks), ("metrics", lines)):
        (run / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    truth = CensusTruth(correlation=0.0, spread=0.06)
    made = {
        "census_start/census_step000000.nc": synthetic_designs.census(
            truth, pairs=8, rollouts=2, unit="theta", radii=(0.004, 0.03), step=0
        ),
        "census/census_step000040.nc": synthetic_designs.census(truth, pairs=8, rollouts=2, radii=(0.4, 3.0), step=40),
        "path/path_step000040.nc": synthetic_designs.path(
            {"displacement": PathTruth(kl=0.5)}, rollouts=2
        ).assign_coords(step=40),
        "boundary/boundary_step000000.nc": synthetic_designs.boundary(np.full(64, 0.3), rollouts=32, step=0),
        "boundary/boundary_step000040.nc": synthetic_designs.boundary(np.full(64, 0.5), rollouts=32, step=40),
    }
    for name, seconds in (("move", 0.5), ("score", 2.0), ("sample", 3.5)):
        around = made["census/census_step000040.nc"]
        around[f"seconds_{name}"] = xr.full_like(around["reward"].isel(prompt=0, rollout=0, drop=True), seconds)
    for name, data in made.items():
        (root / "grpo" / name).parent.mkdir(exist_ok=True)
        data.to_netcdf(root / "grpo" / name)
    warm = {"settings": {"steps": 60, "batch": 16}, "loss": 0.25, "seconds": 300}
    small = {"settings": {"steps": 500, "batch": 64, "taskset": {"max_steps": 1}}, "loss": 0.1, "seconds": 240}
    for folder, found in ((root / "warm", warm), (root / "tiny" / "warm", small)):
        folder.mkdir(parents=True)
        (folder / "warm_start.json").write_text(json.dumps(found))
    tiny = {
        "grid/landscape_step000000_slice0.nc": synthetic.landscape("mixed", points=5, prompts=32, seed=0),
        "census_start/census_step000000.nc": made["census_start/census_step000000.nc"],
        "boundary/boundary_step000000.nc": synthetic_designs.boundary(np.full(64, 0.25), rollouts=32, step=0),
    }
    for name, data in tiny.items():
        (root / "tiny" / name).parent.mkdir(exist_ok=True)
        data.to_netcdf(root / "tiny" / name)
    point = {"relative_radius": 0.01, "completions": 16, "tokens": 300, "difference": 2e-6}
    checked = {"tolerance": 1e-3, "points": [point | {"sweep": 0.5, "transformers": 0.500002}]}
    (root / "grpo" / "kl_check.json").write_text(json.dumps(checked))
    entry = {
        "what": "measured",
        "done": True,
        "seconds": 90.0,
        "cores": 2,
        "commit": "abc",
        "rollouts": 9,
        "seeds": [0],
        "commands": [f"python scripts/warm_start.py --out {root}/warm"],
    }
    (root / "record.json").write_text(json.dumps({"stages": {"warm": entry, "train-40": entry}}))
    return root


@pytest.mark.slow
def test_the_page_says_what_was_measured_and_can_be_made_from_its_own_data(page_command, out, tmp_path):
    page = tmp_path / "page"
    assert page_command.main([str(out), "--page", str(page), "--expected", "warm", "train-40", "grid"]) == 0
    text = (page / "README.md").read_text()
    assert "**Not measured yet:** grid." in text
    assert "60 steps of 16 worked solutions each, in 5.0 minutes; loss at its end 0.250" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| 40 | ")]
    gain, rest = row.split("|")[3].strip().split(" ", 1)
    low, high = (float(v) for v in rest.strip("[] ").split(","))
    assert low < 0.2 < high
    assert float(gain) == pytest.approx(0.2, abs=0.01)
    assert "The last interval lies above 0." in text
    assert "| 0.01 | 16 | 0.500000 | 0.500002 | 2.0e-06 |" in text
    assert (page / "grpo" / "figures" / "grpo_frontier_step000040.png").is_file()
    (way,) = [line for line in text.splitlines() if line.startswith("| grpo | 40 | displacement, ")]
    (names,) = [line for line in text.splitlines() if line.startswith("| run | from step ")]
    assert way.count("|") == names.count("|")
    assert "No 2-D slice has been measured yet." in text
    assert "500 steps of 64 worked solutions of easy problems" in text
    assert "| the rest: backward passes, optimizer, files | 16.0 |" in text
    shares = text.split("| k | pass@k, 64 tasks |")[1].split("\n\n")[0].splitlines()[2:]
    assert all(float(row.rstrip("]| ").rsplit(" ", 1)[1]) <= 1 for row in shares)
    assert f"| census of step 40 | {8 * 2 * 2} | 64 × 2 | 0.5 | 2.0 | 3.5 | {32 * 6 / 60:.1f} |" in text
    boundary = xr.load_dataset(out / "tiny" / "boundary" / "boundary_step000000.nc")
    assert f"| 1 | {float((boundary['base_reward'] >= 0.99).mean()):.3f} [" in text
    assert (page / "tiny" / "landscape_step000000_slice0.png").is_file()
    kept = (page / "data" / "record.json").read_text()
    assert "--out OUTPUT/warm" in kept
    assert str(out) not in kept
    assert page_command.main([str(page / "data"), "--page", str(tmp_path / "again")]) == 0
    again = (tmp_path / "again" / "README.md").read_text()
    assert again.split("## Training")[1] == text.split("## Training")[1]


@pytest.mark.slow
def test_an_empty_study_has_a_page_that_says_so(page_command, tmp_path, capsys):
    assert page_command.main([str(tmp_path), "--page", str(tmp_path / "page")]) == 2
    assert "record.json is missing" in capsys.readouterr().err
    (tmp_path / "record.json").write_text('{"stages": {}}')
    assert page_command.main([str(tmp_path), "--page", str(tmp_path / "page"), "--expected", "warm"]) == 0
    text = (tmp_path / "page" / "README.md").read_text()
    for words in (
        "**Not measured yet:** warm.",
        "There is no warm start yet.",
        "No step of GRPO",
        "Not compared yet.",
        "Not measured yet.",
    ):
        assert words in text
