"""The configuration: what it accepts, and what it says to a mistake."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlvr_landscape_plugin.config import AxisConfig, SweepConfig, digest, dry_run_report, load_config
from rlvr_landscape_plugin.errors import ConfigurationError

ROOT = Path(__file__).parents[1]


@given(
    st.floats(-10, -1e-6, allow_nan=False), st.floats(1e-6, 10, allow_nan=False), st.integers(2, 40)
)
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
        (["--grid.alpah.points", "3"], "unknown key 'alpah'; did you mean 'alpha'"),
        (["--grid.alpha.points", "1"], "greater than or equal to 2"),
        (["--grid.alpha.min", "0.2"], "swap them"),
        (["--grid.alpha.max", "inf"], "finite"),
        (["--grid.alpha.min", "0.01", "--grid.alpha.max", "0.2"], "must contain the origin"),
        (["--slice.seeds", "[0, 0]"], "distinct"),
        (["--slice.normalization", "rows"], "tensor"),
        (["--env.num-prompts", "0"], "greater than or equal to 1"),
        (["--sampling.temperature", "0"], "greater than 0"),
        (["@", "absent.toml"], "absent.toml"),
    ],
)
def test_mistakes_are_named(argv, message):
    with pytest.raises(ConfigurationError, match=message):
        load_config(argv)


def test_toml_with_an_unknown_key_names_it(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text("[sampling]\nmax_tokenz = 3\n")
    with pytest.raises(ConfigurationError, match=r"unknown key 'max_tokenz'; did you mean 'max_tokens'"):
        load_config(["@", str(path)])


@pytest.mark.parametrize("name", ["quickstart", "paper"])
def test_shipped_configurations_load(name):
    config = load_config(["@", str(ROOT / "configs" / "sweep" / f"{name}.toml")])
    assert config.output == Path("outputs") / name
    assert "points" in dry_run_report(config)


def test_the_paper_configuration_is_the_published_table():
    config = load_config(["@", str(ROOT / "configs" / "sweep" / "paper.toml")])
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
    assert "secret" not in dry_run_report(config)


@pytest.mark.parametrize(
    "change",
    [{"output": "x"}, {"save_traces": True}, {"server": {"port": 9}}, {"snapshots": ["x"]}, {"slice": {"seeds": [3]}}],
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
