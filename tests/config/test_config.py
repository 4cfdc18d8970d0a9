"""The configuration: what it accepts, and what it says to a mistake."""

from __future__ import annotations

import ast
import inspect
import pickle
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvr_landscape_plugin.config import (
    AxisConfig,
    StrictConfig,
    SweepConfig,
    TrainConfig,
    digest,
    load_config,
)
from rlvr_landscape_plugin.errors import (
    ConfigurationError,
    LandscapeError,
    ServerError,
    SnapshotError,
    StoreError,
    TasksetError,
    run_cli,
)

ROOT = Path(__file__).parents[2]


@given(st.floats(-10, -1e-6, allow_nan=False), st.floats(1e-6, 10, allow_nan=False), st.integers(2, 40))
def test_axis_holds_the_origin_once_and_the_asked_for_points(low, high, points):
    values = AxisConfig(min=low, max=high, points=points).values()
    assert np.count_nonzero(values == 0.0) == 1
    assert np.all(np.diff(values) > 0)
    assert len(values) in (points, points + 1)
    assert values[0] == low
    assert values[-1] == high


def test_even_axes_gain_the_origin():
    assert AxisConfig(points=6).values().tolist() == pytest.approx([-0.15, -0.09, -0.03, 0, 0.03, 0.09, 0.15])
    assert len(AxisConfig(points=7).values()) == 7


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--grid.alpah.points", "3"], r"unknown key 'grid\.alpah'; did you mean 'grid\.alpha'"),
        (["--grid.alpha.points", "1"], "greater than or equal to 2"),
        (["--grid.alpha.min", "0.2"], "swap them"),
        (["--grid.alpha.max", "inf"], "finite"),
        (["--grid.alpha.min", "0.01", "--grid.alpha.max", "0.2"], "must contain the origin"),
        (["--slice.seeds", "[0, 0]"], "distinct"),
        (["--slice.normalization", "rows"], "tensor"),
        (["--env.num-prompts", "0"], "greater than or equal to 1"),
        (["--sampling.temperature", "0"], "greater than 0"),
        (["@", "absent.toml"], "absent.toml"),
        (["--env.taskset", "{bad"], r"the value '\{bad' of --env\.taskset is not JSON: .* at character 2; write"),
        (["--seed", "3", "--server.urls", "[1"], r"of --server\.urls is not JSON"),
        (["--seed", "1" * 30], r"--seed\n.*less than or equal to 9223372036854775807"),
        (["--slice.seeds", "0", "1" * 30], r"--slice\.seeds\n.*between 0 and 9223372036854775807"),
        (["--grid.alpha.points", "1000000000"], r"--grid\.alpha\.points\n.*less than or equal to 1000000"),
        (["--grid.alpha.points", "1001", "--grid.beta.points", "1001"], r"1,002,001 points, at most 1,000,000"),
        (["--grid.alpha.max", "1e308"], r"max = 1e\+308: both must lie between 1e-30 and 1e\+06"),
        (["--grid.beta.min", "-1e-200"], "both must lie between"),
        (["--grid.beta.min", "-1e-6", "--grid.beta.max", "1e4"], "differ by less than a factor of 1e\\+09"),
        (["--grid.find.largest-factor", "1e7"], "could make an axis"),
        (["--grid.find.kl", "1e999"], "finite|number"),
        (["--env.num-prompts", "1000000", "--env.rollouts", "100"], r"100,000,000 episodes in one batch"),
        (["--env.num-prompts", "9" * 20], r"--env\.num-prompts\n.*less than or equal to 10000000"),
    ],
)
def test_mistakes_are_named(argv, message):
    with pytest.raises(ConfigurationError, match=message):
        load_config(argv, SweepConfig)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed", "4294967296"], r"--seed\n.*less than or equal to 4294967295"),
        (["--env.tasks-per-batch", "4096", "--env.rollouts", "4096"], "16,777,216 episodes in one batch"),
        (["--evaluation.num-tasks", "9999999"], "episodes in one evaluation"),
        (["--steps", "1000000001"], r"--steps\n.*less than or equal to 1000000"),
        (["--env.num-tasks", "9"], "is less than tasks_per_batch = 32; raise num_tasks"),
    ],
)
def test_mistakes_in_training_are_named(argv, message):
    with pytest.raises(ConfigurationError, match=message):
        load_config(argv, TrainConfig)


@pytest.mark.parametrize("token", ["two\nlines", "end\n", "über", "", " ", "a\tb", "a\x00b"])
def test_a_token_that_fits_no_header_is_refused_without_being_printed(token):
    with pytest.raises(ConfigurationError, match="token must be visible ASCII characters in one line") as caught:
        load_config(["--server.token", token], SweepConfig)
    assert not token.strip() or token not in str(caught.value)
    assert load_config(["--server.token", "s3cret-._~+/="], SweepConfig).server.token == "s3cret-._~+/="


def test_the_largest_grid_is_made_and_finite():
    axis = AxisConfig(min=-1e6, max=1e6, points=1_000_000)
    values = axis.values()
    assert np.isfinite(values).all()
    assert np.all(np.diff(values) > 0)


def test_a_file_in_another_encoding_is_named_with_its_line(tmp_path):
    path = tmp_path / "latin.toml"
    path.write_bytes("seed = 3\n# d\xe9j\xe0 vu\n".encode("latin-1"))
    for argv in (["@", str(path)], ["--seed", "1", "--grid", f"@{path}"]):
        with pytest.raises(ConfigurationError, match=r"latin\.toml: byte 0xe9 in line 2 is not UTF-8; save it"):
            load_config(argv, SweepConfig)


def test_all_unknown_keys_are_named_at_once():
    with pytest.raises(ConfigurationError) as caught:
        load_config(["--grid.beta.pionts", "3", "--zzz", "1"], SweepConfig)
    assert "unknown key 'grid.beta.pionts'; did you mean 'grid.beta.points'?" in str(caught.value)
    assert "unknown key 'zzz'; known keys: output, snapshots" in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "read"),
    [
        (["--server.urls", '["http://a", "http://b"]'], lambda c: c.server.urls == ["http://a", "http://b"]),
        (["--slice.seeds", "0", "3"], lambda c: c.slice.seeds == [0, 3]),
        (["--env.taskset.min-turns", "2"], lambda c: c.env.taskset == {"min_turns": 2}),
        (["--no-server.enable-prefix-caching"], lambda c: c.server.enable_prefix_caching is False),
        (["--server.token", "None"], lambda c: c.server.token is None),
        (["--seed", "0", "--dry-run"], lambda c: c.seed == 0 and c.dry_run),
    ],
)
def test_the_command_line_reads_lists_tables_switches_and_none(argv, read):
    assert read(load_config(argv, SweepConfig))


def test_a_dotted_override_wins_over_the_file(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text("seed = 3\n[grid.alpha]\nmin = -0.2\npoints = 5\n")
    config = load_config(["@", str(path), "--grid.alpha.points", "9"], SweepConfig)
    assert (config.seed, config.grid.alpha.min, config.grid.alpha.points) == (3, -0.2, 9)


def tables(table=SweepConfig):
    yield table
    for field in table.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, StrictConfig):
            yield from tables(field.annotation)


@pytest.mark.parametrize("table", list(tables()), ids=lambda table: table.__name__)
def test_every_field_is_documented_where_it_is_declared(table):
    (body,) = ast.parse(inspect.getsource(table)).body
    assert isinstance(body, ast.ClassDef)
    assert ast.get_docstring(body)
    documented = {
        field.target.id
        for field, text in pairwise(body.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
    }
    assert documented == set(table.model_fields)


@pytest.mark.parametrize("kind", [ConfigurationError, SnapshotError, TasksetError, ServerError, StoreError])
def test_errors_pickle_and_show_one_message(kind, capsys):
    error = pickle.loads(pickle.dumps(kind("what was wrong")))
    assert isinstance(error, LandscapeError)
    assert str(error) == "what was wrong"

    def fail(problem):
        raise problem

    assert run_cli(lambda: fail(error)) == 2
    assert capsys.readouterr().err == "error: what was wrong\n"
    assert run_cli(lambda: fail(KeyboardInterrupt())) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert run_cli(lambda: SweepConfig.model_validate({"sed": 1}) and None) == 2
    assert "did you mean 'seed'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a defect"):
        run_cli(lambda: fail(ValueError("a defect")))


def test_toml_with_an_unknown_key_names_it(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text("[sampling]\nmax_tokenz = 3\n")
    with pytest.raises(
        ConfigurationError, match=r"unknown key 'sampling\.max_tokenz'; did you mean 'sampling\.max_tokens'"
    ):
        load_config(["@", str(path)], SweepConfig)


@pytest.mark.parametrize("name", ["quickstart", "paper", "training_slice"])
def test_shipped_configurations_load(name):
    config = load_config(["@", str(ROOT / "configs" / "sweep" / f"{name}.toml")], SweepConfig)
    assert config.output == Path("outputs") / name


def test_the_paper_configuration_is_the_published_table():
    config = load_config(["@", str(ROOT / "configs" / "sweep" / "paper.toml")], SweepConfig)
    for axis in (config.grid.alpha, config.grid.beta):
        assert (axis.min, axis.max, len(axis.values())) == (-0.05, 0.05, 21)
    assert (config.env.num_prompts, config.env.rollouts, config.sampling.max_tokens) == (1024, 16, 512)
    assert (config.sampling.temperature, config.surrogate.clip_low, config.surrogate.clip_high) == (1.0, 0.2, 0.2)
    assert config.env.taskset | {"source": None} == {"min_turns": 2, "max_turns": 2, "seed": 12345, "source": None}


def test_provenance_rebuilds_the_configuration_and_hides_the_token():
    config = SweepConfig.model_validate({"server": {"token": "secret", "port": 1}, "grid": {"alpha": {"points": 5}}})
    data = config.provenance()
    assert "secret" not in str(data)
    again = SweepConfig.from_provenance(data)
    assert again.provenance() == data
    assert digest(again.provenance()) == digest(data)


@pytest.mark.parametrize(
    "change",
    [
        {"dry_run": True, "show_config": True, "rate": 3.0},
        {"output": "x"},
        {"save_traces": True},
        {"server": {"port": 9}},
        {"snapshots": ["x"]},
        {"slice": {"seeds": [3]}},
    ],
)
def test_what_does_not_change_numbers_is_not_provenance(change):
    assert SweepConfig.model_validate(change).provenance() == SweepConfig().provenance()


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"sampling": {"max_tokens": 1}}, {"env": {"rollouts": 2}}, {"server": {"dtype": "bfloat16"}}],
)
def test_what_changes_numbers_is_provenance(change):
    assert SweepConfig.model_validate(change).provenance() != SweepConfig().provenance()


def test_help_answers_without_heavy_imports():
    code = (
        "import sys; from rlvr_landscape_plugin.sweep import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'vllm', 'transformers', 'verifiers'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "--grid.alpha.points" in out
    assert out.strip().endswith("[]")


def test_mistakes_end_with_code_2_and_no_traceback():
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "rlvr_landscape_plugin.sweep", "--grid.alpha.min", "3"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 30


def train_config(task: dict | None, evaluation: dict) -> TrainConfig:
    """A training configuration with these options of the taskset's `task` table and of the evaluation's taskset."""
    taskset = {"seed": 7, "max_turns": 2} | ({"task": task} if task is not None else {})
    return TrainConfig.model_validate({"env": {"taskset": taskset}, "evaluation": {"taskset": evaluation}})


@pytest.mark.parametrize(
    ("task", "evaluation", "expected"),
    [
        (None, {"seed": 1}, None),
        ({"similarity_power": 2}, {"seed": 1}, {"similarity_power": 2}),
        ({"reward_mode": "random"}, {"seed": 1}, {"reward_mode": "verifier"}),
        (
            {"reward_mode": "inverted", "similarity_power": 2},
            {"seed": 1},
            {"reward_mode": "verifier", "similarity_power": 2},
        ),
        (
            {"reward_mode": "random", "similarity_power": 2},
            {"seed": 1, "task": {"reward_mode": "random"}},
            {"reward_mode": "random", "similarity_power": 2},
        ),
    ],
)
def test_held_out_tasks_are_paid_by_the_verifier_unless_asked(task, evaluation, expected):
    config = train_config(task, evaluation)
    held_out = config.held_out_taskset
    assert held_out.get("task") == expected
    assert (held_out["seed"], held_out["max_turns"]) == (1, 2)
    assert config.provenance()["env"]["taskset"].get("task") == task, "snapshots' manifests name the control"


@pytest.mark.parametrize("evaluation", [{"seed": 7}, {}, {"task": {"reward_mode": "verifier"}}])
def test_from_one_stream_later_tasks_are_held_out(evaluation):
    """Other rewards alone do not make other tasks."""
    config = train_config({"reward_mode": "random"}, evaluation)
    assert config.first_held_out == config.env.num_tasks == 4096
    data = config.model_dump()
    data["evaluation"]["first_task"] = 4095
    with pytest.raises(ValueError, match=r"first_task = 4095 .*held-out tasks would be the practised ones; .* 4096 or"):
        TrainConfig.model_validate(data)
    data["evaluation"]["first_task"] = 5000
    assert TrainConfig.model_validate(data).first_held_out == 5000


def test_another_stream_is_held_out_from_its_first_task():
    config = train_config(None, {"seed": 8})
    assert config.first_held_out == 0
    assert "first_task" not in config.provenance()["evaluation"], "runs of earlier versions continue"
    data = config.model_dump()
    data["evaluation"]["first_task"] = 10
    moved = TrainConfig.model_validate(data)
    assert moved.first_held_out == 10
    assert moved.provenance()["evaluation"]["first_task"] == 10


def test_the_reward_that_passes_is_that_of_the_analysis():
    from rlvr_landscape_analysis.schema import SOLVED

    assert SweepConfig().env.pass_threshold == SOLVED


def test_help_describes_keys_without_reading_the_source_of_pydantic(capsys, monkeypatch):
    asked = []
    real = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda item: asked.append(item.__module__) or real(item))
    with pytest.raises(SystemExit):
        load_config(["--help"], SweepConfig)
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Coordinates along δ." in out
    assert "Smallest coordinate; must be below 0." in out
    assert {name.partition(".")[0] for name in asked} == {"rlvr_landscape_plugin"}
