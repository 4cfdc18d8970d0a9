"""Journals of training runs: read, compared, drawn."""

from __future__ import annotations

import json

import numpy as np
import pytest
import rlvr_landscape_analysis as rla
from rlvr_landscape_analysis.figures import compare_runs
from rlvr_landscape_analysis.trainer_log import main, open_training
from scipy import stats

from rlvr_landscape_plugin.config import TrainConfig
from rlvr_landscape_plugin.snapshot import open_snapshot
from rlvr_landscape_plugin.trl.run_directory import RunDirectory


def write_run(folder, rng, steps=(0, 10, 20), tasks=40, gain=0.02):
    folder.mkdir(parents=True)
    objective = {"name": "grpo"}
    (folder / "run.json").write_text(json.dumps({"id": "abc", "configuration": {"objective": objective}}))
    start = rng.uniform(0.2, 0.6, tasks)
    rewards = [start + gain * step / 10 + (rng.normal(0, 0.05, tasks) if step else 0) for step in steps]
    looks = [
        {
            "step": step,
            "reward": float(row.mean()),
            "entropy": 0.5 - step / 100,
            "pass_1": 0.1,
            "task_rewards": list(row),
        }
        for step, row in zip(steps, rewards, strict=True)
    ]
    lines = [{"step": step, "entropy": 0.5 - step / 100, "reward": 0.4, "seconds": 2.0} for step in range(1, 21)]
    for name, rows in (("evaluations", looks), ("metrics", lines)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return np.array(rewards)


def test_gains_are_paired_by_task(tmp_path):
    rewards = write_run(tmp_path / "a", np.random.default_rng(1))
    run = open_training(tmp_path / "a")
    assert run.attrs["objective"] == "grpo"
    assert run["entropy"].attrs["units"] == "nat"
    assert run["look"].values.tolist() == [0, 10, 20]
    expected = stats.ttest_rel(rewards[2], rewards[0])
    interval = expected.confidence_interval(0.95)
    assert float(run["gain"].sel(look=20)) == pytest.approx((rewards[2] - rewards[0]).mean(), abs=1e-12)
    assert run["gain_interval"].sel(look=20).values == pytest.approx([interval.low, interval.high], abs=1e-12)


def test_a_task_that_failed_once_counts_where_it_was_measured(tmp_path):
    rewards = write_run(tmp_path / "a", np.random.default_rng(2))
    file = tmp_path / "a" / "evaluations.jsonl"
    looks = [json.loads(line) for line in file.read_text().splitlines()]
    looks[2]["task_rewards"][7] = None
    file.write_text("".join(json.dumps(look) + "\n" for look in looks))
    kept = np.delete(np.arange(40), 7)
    interval = stats.ttest_rel(rewards[2, kept], rewards[0, kept]).confidence_interval(0.95)
    found = open_training(tmp_path / "a")["gain_interval"].sel(look=20).values
    assert found == pytest.approx([interval.low, interval.high], abs=1e-12)


def test_the_figure_shows_every_run_and_the_table_every_look(tmp_path, capsys):
    rng = np.random.default_rng(3)
    write_run(tmp_path / "grpo", rng)
    write_run(tmp_path / "grpo_n", rng, gain=0.0)
    assert main([str(tmp_path / "grpo"), str(tmp_path / "grpo_n"), "--out", str(tmp_path / "out")]) == 0
    written = capsys.readouterr().out.split()
    assert [path.rpartition(".")[2] for path in written] == ["pdf", "png", "csv", "md"]
    assert len((tmp_path / "out" / "training_runs.csv").read_text().splitlines()) == 7
    runs = {name: open_training(tmp_path / name) for name in ("grpo", "grpo_n")}
    drawn = compare_runs(runs)
    for name, run in runs.items():
        assert drawn[name]["reward"]["line"].get_ydata() == pytest.approx(run["held_out"].values)
        assert drawn[name]["entropy"].get_ydata() == pytest.approx(run["held_out_entropy"].values)
    assert [text.get_text() for text in drawn["legend"].get_texts()] == ["grpo", "grpo_n"]


def test_seeds_of_one_kind_share_a_style_and_many_runs_leave_the_panels_their_width(tmp_path):
    names = [f"{kind}-{seed}" for kind in ("grpo", "random", "grpo_n") for seed in range(3)]
    rng = np.random.default_rng(5)
    for name in names:
        write_run(tmp_path / name, rng)
    drawn = compare_runs({name: open_training(tmp_path / name) for name in names})
    assert [text.get_text() for text in drawn["legend"].get_texts()] == [
        f"{kind} (3 runs)" for kind in ("grpo", "random", "grpo_n")
    ]
    colours = [drawn[name]["entropy"].get_color() for name in names]
    assert [len(set(colours[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert len(set(colours)) == 3
    drawn["figure"].draw_without_rendering()
    assert all(ax.get_position().width > 0.35 for ax in drawn["axes"])


def test_a_line_cut_short_at_the_end_is_passed_over_elsewhere_it_is_named(tmp_path, capsys):
    write_run(tmp_path / "a", np.random.default_rng(4))
    file = tmp_path / "a" / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"step": 21, "ent')
    assert open_training(tmp_path / "a").sizes["step"] == 20
    file.write_text('{"step": 0, "ent\n' + whole)
    with pytest.raises(rla.AnalysisError, match=r"metrics\.jsonl, line 1 is damaged"):
        open_training(tmp_path / "a")
    assert main([str(tmp_path / "absent"), "--out", str(tmp_path)]) == 2
    assert "run.json is missing; give the output directory of a training run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("taskset", "expected"),
    [({}, "verifier"), ({"task": {"reward_mode": "random"}}, "random"), ({"task": {"seed": 3}}, "verifier")],
)
def test_what_paid_a_run_is_read_from_the_directory_that_the_trainer_writes(tmp_path, taskset, expected):
    config = TrainConfig.model_validate({"output": tmp_path / "run", "env": {"taskset": taskset}})
    run = RunDirectory(config, open_snapshot("tiny-sorter"))
    run.evaluations.append({"step": 0, "reward": 0.4, "entropy": 0.5, "pass_1": 0.1, "task_rewards": [0.3, 0.5]})
    run.metrics.append({"step": 1, "reward": 0.4, "entropy": 0.5})
    found = open_training(tmp_path / "run")
    assert found.attrs["reward_mode"] == expected
    label = compare_runs({"mine": found})["legend"].get_texts()[0].get_text()
    assert label == ("mine" if expected == "verifier" else f"mine ({expected} reward)")
    assert (found.attrs["run"], found.attrs["objective"]) == (run.identity["id"], config.objective.name)
