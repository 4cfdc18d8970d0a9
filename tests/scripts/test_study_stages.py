"""The stages of `make study`: what runs, what is skipped, what is said, without training or measuring anything."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from script_module import script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study():
    """scripts/study.py as a module."""
    return script("study")


class Machine:
    """Stands in for the commands: leaves the files that a stage promises, and can break."""

    def __init__(self, study, out):
        self.stages = {stage.name: stage for stage in study.all_stages(study.SHORT, out, out / "page")}
        self.ran, self.breaks, self.leaves_out = [], set(), set()

    def __call__(self, command, share=None):
        (stage,) = [stage for stage in self.stages.values() if tuple(command) in stage.commands]
        self.ran.append(stage.name)
        if stage.name in self.breaks:
            return 2
        for path in stage.outputs:
            if path.name not in self.leaves_out:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.write(path)
        return 0

    def write(self, path):
        if path.suffix == ".nc":
            values = np.zeros((8, 3), np.float32)
            xr.Dataset({"base_reward": (("prompt", "rollout"), values)}).to_netcdf(path)
        elif path.name == "run.json":
            sizes = {"env": {"tasks_per_batch": 8, "rollouts": 4}, "evaluation": {"num_tasks": 8, "rollouts": 2}}
            path.write_text(json.dumps({"configuration": sizes}))
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
        else:
            path.write_text("{}")


@pytest.fixture
def machine(study, tmp_path):
    return Machine(study, tmp_path / "out")


@pytest.fixture
def run(study, machine, tmp_path, capsys):
    def call(*given):
        code = study.main([*given, "--short", "--output", str(tmp_path / "out")], run=machine)
        return code, "".join(capsys.readouterr())

    return call


def recorded(tmp_path):
    return json.loads((tmp_path / "out" / "record.json").read_text())["stages"]


def test_all_stages_run_once_in_an_order_that_works_and_are_then_skipped(run, machine, tmp_path):
    code, said = run()
    assert code == 0, said
    order = list(dict.fromkeys(machine.ran))
    assert order == list(machine.stages)
    for name in order:
        assert all(order.index(needed) < order.index(name) for needed in machine.stages[name].needs)
    machine.ran.clear()
    code, said = run()
    assert code == 0
    assert machine.ran == ["page"], "only the page is made again"
    assert "train-grpo-0: is done" in said


def test_the_record_says_seeds_times_and_rollouts(run, tmp_path):
    assert run()[0] == 0
    stages = recorded(tmp_path)
    train = stages["train-random-0"]
    assert train["done"]
    assert train["seeds"] == [0]
    assert train["seconds"] >= 0
    assert train["rollouts"] == 3 * 8 * 4 + 3 * 8 * 2
    assert "--env.taskset.task.reward_mode random" in train["commands"][0]
    assert stages["start"]["rollouts"] == 3 * 24


def test_a_stage_with_a_missing_output_runs_again(run, machine, tmp_path):
    assert run()[0] == 0
    (tmp_path / "out" / "grpo-0" / "census" / "census_step000003.nc").unlink()
    machine.ran.clear()
    assert run()[0] == 0
    assert machine.ran == ["census-grpo-0", "page"]


def test_training_is_done_with_its_last_evaluation_only(run, machine, tmp_path):
    assert run("train-grpo-0")[0] == 0
    journal = tmp_path / "out" / "grpo-0" / "run" / "evaluations.jsonl"
    journal.write_text(json.dumps({"step": 2}) + "\n" + '{"step": 3')
    machine.ran.clear()
    assert run("train-grpo-0")[0] == 0
    assert machine.ran == ["train-grpo-0"]


def test_a_stage_that_leaves_too_little_has_failed(run, machine, tmp_path):
    machine.leaves_out.add("path_step000003.nc")
    code, said = run()
    assert code == 1
    assert "path_step000003.nc is missing" in said
    assert not recorded(tmp_path)["path-grpo-0"]["done"]


def test_a_stage_that_fails_leaves_those_that_do_not_need_it(run, machine):
    machine.breaks.add("train-grpo-0")
    code, said = run()
    assert code == 1
    assert "train-grpo-0: failed" in said
    assert "census-grpo-0: needs train-grpo-0 first" in said
    assert "census-random-0" in machine.ran
    assert machine.ran[-1] == "page"
    machine.breaks.clear()
    assert run()[0] == 0


def test_stages_are_chosen_by_pattern_and_a_wrong_one_is_named(run, machine):
    assert run("start", "train-*")[0] == 0
    assert set(machine.ran) == {"start", "train-grpo-0", "train-random-0"}
    code, said = run("trains")
    assert code == 2
    assert "no stage is called 'trains'" in said


def test_no_stage_is_begun_that_does_not_fit_into_the_time(run, machine):
    code, said = run("--minutes", "1.0")
    assert code == 0
    assert "start: about 2 min, more than is left of 1; left for another time" in said
    assert "train-grpo-0: about 1 min" in said
    assert "census-grpo-0: needs train-grpo-0 first" in said
    assert machine.ran == ["page"]


def test_other_settings_are_refused(study, run, machine, tmp_path):
    assert run("start")[0] == 0
    file = tmp_path / "out" / "record.json"
    record = json.loads(file.read_text())
    record["stages"]["start"]["settings"] = "another"
    file.write_text(json.dumps(record))
    code, said = run("start")
    assert code == 2
    assert "stage start" in said
    assert "other settings" in said


def test_a_damaged_record_is_named(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "record.json").write_text('{"stages": ')
    code, said = run()
    assert code == 2
    assert "record.json is damaged" in said


def test_two_studies_do_not_share_an_output(study, run, tmp_path):
    with sys.modules["stages"].alone(tmp_path / "out"):
        code, said = run("start")
    assert code == 2
    assert "another study runs in" in said


def test_a_stage_that_is_killed_has_left_its_time(study, machine, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["stages"], "BEAT", 0.01)
    seen = []

    def command(arguments, share=None):
        deadline = time.monotonic() + 20
        while not seen and time.monotonic() < deadline:
            seen.extend(entry["seconds"] for entry in recorded(tmp_path).values() if entry["seconds"] > 0)
        return machine(arguments, share)

    assert study.main(["start", "--short", "--output", str(tmp_path / "out")], run=command) == 0
    assert seen, "the record is told while a stage runs, not only at its end"


def test_seconds_of_interrupted_attempts_add_up(study, run, machine, tmp_path, monkeypatch):
    clock = iter(np.arange(0.0, 1000.0, 5.0))
    monkeypatch.setattr(sys.modules["stages"].time, "monotonic", lambda: float(next(clock)))
    machine.breaks.add("start")
    assert run("start")[0] == 1
    first = recorded(tmp_path)["start"]
    machine.breaks.clear()
    assert run("start")[0] == 0
    second = recorded(tmp_path)["start"]
    assert (first["attempts"], second["attempts"]) == (1, 2)
    assert second["seconds"] > first["seconds"] > 0


class TwoAtATime:
    """Stands in for the commands: none ends before a second one has begun, until only one is left to run."""

    def __init__(self, machine):
        self.machine = machine
        self.lock, self.together, self.at_once, self.shares = threading.Lock(), 0, 0, {}

    def __call__(self, command, share):
        (stage,) = [stage for stage in self.machine.stages.values() if tuple(command) in stage.commands]
        with self.lock:
            self.together += 1
            self.at_once = max(self.at_once, self.together)
            self.shares[stage.name] = share
        deadline = time.monotonic() + 0.2
        while self.together < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        with self.lock:
            code = self.machine(command)
            self.together -= 1
        return code


def test_stages_run_side_by_side_each_on_its_cores(study, machine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["stages"].os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    beside = TwoAtATime(machine)
    assert study.main(["--short", "--output", str(tmp_path / "out"), "--jobs", "2"], run=beside) == 0
    assert beside.at_once == 2
    order = list(dict.fromkeys(machine.ran))
    assert sorted(order) == sorted(machine.stages)
    for name in order:
        assert all(order.index(needed) < order.index(name) for needed in machine.stages[name].needs)
    assert order[-1] == "page", "what it shows depends on all others"
    assert {share.cores for share in beside.shares.values()} == {(0, 1), (2, 3)}
    assert beside.shares["start"].log == tmp_path / "out" / "logs" / "start.log"
    assert all(entry["beside_others"] for entry in recorded(tmp_path).values())
    assert "start.log" in capsys.readouterr().out


def test_a_stage_that_fails_beside_others_leaves_them(study, machine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["stages"].os, "sched_getaffinity", lambda _: {0, 1})
    machine.breaks.add("train-grpo-0")
    assert study.main(["--short", "--output", str(tmp_path / "out"), "--jobs", "2"], run=TwoAtATime(machine)) == 1
    assert "census-grpo-0: needs train-grpo-0 first" in capsys.readouterr().out
    assert {"census-random-0", "page"} <= set(machine.ran)


@pytest.mark.parametrize("jobs", ["0", "3"])
def test_more_stages_at_a_time_than_cores_are_refused(run, monkeypatch, jobs):
    monkeypatch.setattr(sys.modules["stages"].os, "sched_getaffinity", lambda _: {0, 1})
    code, said = run("--jobs", jobs)
    assert code == 2
    assert "at most one stage per core, and there are 2 cores here" in said


def test_a_command_with_a_share_prints_into_its_log_and_binds_its_servers(study, tmp_path):
    stages = sys.modules["stages"]
    share = stages.Share((2, 3), tmp_path / "logs" / "start.log")
    asks = "import os; print(os.environ['VLLM_CPU_OMP_THREADS_BIND'])"
    assert stages.run_here(["-c", asks], share) == 0
    assert stages.run_here(["-c", "raise SystemExit(3)"], share) == 3
    assert share.log.read_text() == "2,3\n"


def test_an_interruption_reaches_the_commands_that_run(study):
    stages = sys.modules["stages"]
    codes = []
    thread = threading.Thread(target=lambda: codes.append(stages.run_here(["-c", "import time; time.sleep(60)"])))
    thread.start()
    while not stages._COMMANDS:
        time.sleep(0.01)
    time.sleep(0.5)  # until Python can be interrupted
    stages._interrupt_commands(patience=0.1)
    thread.join(timeout=30)
    (code,) = codes
    assert code != 0
    assert not stages._COMMANDS


def test_the_full_study_fits_its_plan(study, tmp_path):
    stages = study.all_stages(study.FULL, tmp_path, tmp_path / "page")
    assert len({stage.name for stage in stages}) == len(stages)
    assert max(stage.minutes for stage in stages) <= 60
    assert 5 * 60 <= sum(stage.minutes for stage in stages) <= 7 * 60
    outputs = [path for stage in stages for path in stage.outputs]
    assert len(set(outputs)) == len(outputs), "no file is made by two stages"


def test_the_reduced_study_can_answer_each_claim_in_ten_minutes(study, tmp_path):
    stages = study.all_stages(study.REDUCED, tmp_path, tmp_path / "page")
    assert 5 <= sum(stage.minutes for stage in stages) <= 10
    made = {path.relative_to(tmp_path).as_posix() for stage in stages for path in stage.outputs}
    # T1 and T2: step 0, an early and a later step, and a run on random rewards; T3: step 0 and the last one.
    assert {"start/census/census_step000000.nc", "random-0/census/census_step000016.nc"} <= made
    assert {"grpo-0/census/census_step000008.nc", "grpo-0/census/census_step000016.nc"} <= made
    assert {"start/boundary/boundary_step000000.nc", "grpo-0/boundary/boundary_step000016.nc"} <= made
    assert "grpo-0/path_last/path_step000016.nc" in made
    assert study.REDUCED.middle <= 10 < study.REDUCED.last
    assert not any("others" in path for path in made)


@pytest.mark.parametrize("size", ["FULL", "REDUCED", "SHORT"])
def test_every_command_is_a_configuration_that_is_taken(study, tmp_path, size):
    from rlvr_landscape_plugin.config import SweepConfig, TrainConfig, load_config

    chosen = getattr(study, size)
    for stage in study.all_stages(chosen, tmp_path, tmp_path / "page")[:-1]:
        for _, module, *words in stage.commands:
            config = load_config(words, TrainConfig if module.endswith("trl") else SweepConfig)
            if stage.name.startswith("train"):
                assert config.steps == chosen.last
                assert chosen.last % config.evaluation.every == 0, "the last step is evaluated"
            elif config.design == "boundary":
                assert config.env.base_rollouts >= 16 or size == "SHORT"


def test_two_sizes_at_once_are_refused(study, tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.main(["--short", "--reduced", "--list", "--output", str(tmp_path)])
    assert "give one" in capsys.readouterr().err


def test_the_other_people_share_no_name_with_the_club():
    def people(file):
        return {name for line in (ROOT / file).read_text().splitlines() for name in json.loads(line)["names"]}

    from rlvr_alphabet_sort.names import given_names, surnames

    def parts(names):
        found = {(g, s) for g in given_names() for s in surnames() if g + s in names}
        return {g for g, _ in found}, {s for _, s in found}

    club, others = people("configs/train/club.jsonl"), people("configs/study/other_club.jsonl")
    assert len(club) == len(others) == 24
    for ours, theirs in zip(parts(club), parts(others), strict=True):
        assert len(ours) >= 24
        assert not ours & theirs
