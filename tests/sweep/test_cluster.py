"""Job arrays: what a command line may say, what job files hold, and how a shard fails."""

from __future__ import annotations

import os
import stat

import pytest
from conftest import FAKE_TOKEN, start_fake_sweep

from rlvr_landscape_plugin.config import load_config
from rlvr_landscape_plugin.errors import ConfigurationError, LandscapeError
from rlvr_landscape_plugin.sweep import cluster
from rlvr_landscape_plugin.sweep.cluster import ClusterSweepConfig


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("timeout_min", "10", 10),
        ("slurm_account", "physics", "physics"),
        ("slurm_additional_parameters", '{"reservation": "night", "nice": 100}', {"reservation": "night", "nice": 100}),
        ("slurm_setup", '["module load cuda/12.8"]', ["module load cuda/12.8"]),
    ],
)
def test_parameters_of_submitit_on_the_command_line(option, text, value):
    config = load_config([f"--cluster.parameters.{option}", text], ClusterSweepConfig)
    assert config.cluster.parameters == {option: value}


def test_a_parameter_that_is_no_json_is_named():
    with pytest.raises(ConfigurationError, match=r"cluster\.parameters\.slurm_setup = '\[module load' is not JSON"):
        load_config(["--cluster.parameters.slurm_setup", "[module load"], ClusterSweepConfig)


def test_a_parameter_that_submitit_does_not_know_is_refused(tmp_path):
    pytest.importorskip("submitit", reason="job arrays need the extra `cluster`")
    arguments = ["--output", str(tmp_path), "--cluster.executor", "local", "--cluster.parameters.slurm_qoss", "x"]
    with pytest.raises(ConfigurationError, match=r"submitit refuses these jobs .*qoss"):
        cluster.submit(load_config(arguments, ClusterSweepConfig))


def test_a_defect_keeps_its_traceback_and_a_user_s_error_is_one_message(capsys):
    for error in (LandscapeError("no server at A;\nstart one"), RuntimeError("a defect")):
        try:
            raise error
        except Exception as caught:
            cluster._show_error(type(caught), caught, caught.__traceback__)
    said = capsys.readouterr().err
    assert said.startswith("error: no server at A;\nstart one\nTraceback")
    assert said.endswith("RuntimeError: a defect\n")


@pytest.mark.slow
def test_a_shard_that_fails_says_so_in_one_line_and_no_job_file_holds_the_token(fake_server, sweep_command, tmp_path):
    pytest.importorskip("submitit", reason="job arrays need the extra `cluster`")
    command = sweep_command(fake_server, "--cluster.executor", "local")
    fake_server.token = "another"
    process = start_fake_sweep(command, module="cluster")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.startswith("error: 1 of 1 shards failed;")
    assert "wrong or missing bearer token" in err
    assert "Traceback" not in err
    jobs = tmp_path / "out" / "jobs"
    assert stat.S_IMODE(jobs.stat().st_mode) == 0o700
    (log,) = jobs.glob("*_0_log.err")
    assert str(log) in out
    errors = [line for line in log.read_text().splitlines() if not line.startswith("submitit")]
    assert "Traceback" not in errors
    assert len([line for line in errors if line.startswith("error: ")]) == 1
    files = [file for file in jobs.rglob("*") if file.is_file()]
    assert any(file.suffix == ".pkl" for file in files)
    assert not [file for file in files if FAKE_TOKEN.encode() in file.read_bytes()]
    assert FAKE_TOKEN not in os.environ.values()
