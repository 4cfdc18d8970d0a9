"""Job arrays on a real SLURM: one node on this machine, two shards, scancel and the same command, and a requeue.

Needs root on Debian or Ubuntu, where the packages slurm-wlm and munge are installed if they are missing.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import xarray as xr
from conftest import FAKE_TOKEN, start_fake_sweep
from fake_server import FakeServer

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "squeue", "scontrol")
CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ctld}
SlurmdPort={slurmd}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
SchedulerParameters=sched_interval=2,requeue_delay=1
NodeName=localhost CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def install():
    """SLURM's programs, or a skip with the reason."""
    if os.geteuid() != 0:
        pytest.skip("starting SLURM needs root")
    if all(shutil.which(tool) for tool in TOOLS):
        return
    if shutil.which("apt-get") is None:
        pytest.skip("SLURM is not installed, and this is neither Debian nor Ubuntu")
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "--yes", "--no-install-recommends", "slurm-wlm", "munge"]
    done = subprocess.run(command, env=quiet, capture_output=True, text=True)
    if done.returncode or not all(shutil.which(tool) for tool in TOOLS):
        pytest.skip(f"slurm-wlm and munge could not be installed: {done.stderr.strip().splitlines()[-1:]}")


def until(condition, what, seconds=120):
    """Wait until a condition holds; its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, what() if callable(what) else what
        time.sleep(0.5)
    return value


def ask(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A SLURM of one node; its commands find it by SLURM_CONF."""
    install()
    pytest.importorskip("submitit", reason="job arrays need the extra `cluster`")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, ctld=free_port(), slurmd=free_port(), cpus=os.cpu_count()))
    files = [
        f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file", "seed-file")
    ]
    daemons = (
        ["munged", "--foreground", "--force", f"--log-file={folder}/munged.log", *files],
        ["slurmctld", "-D", "-f", str(conf)],
        ["slurmd", "-D", "-N", "localhost", "-f", str(conf)],
    )
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(conf))
        for daemon in daemons:
            log = stack.enter_context((folder / f"{daemon[0]}.out").open("wb"))
            process = subprocess.Popen(daemon, stdout=log, stderr=log, start_new_session=True)
            stack.callback(process.wait, 30)
            stack.callback(process.send_signal, signal.SIGTERM)
            time.sleep(1)
            assert process.poll() is None, (folder / f"{daemon[0]}.out").read_text()
        until(lambda: "idle" in subprocess.run(["sinfo", "-h"], capture_output=True, text=True).stdout, "no idle node")
        yield folder
        subprocess.run(["scancel", "--user", "root"], check=False)


@pytest.fixture
def slow_server():
    """A fake server that takes its time over a point until `quick` is set."""

    class Slow(FakeServer):
        quick = False

    async def wait(route, count):
        await asyncio.sleep(3 if route == "generate" and not server.quick else 0)

    with Slow(wait) as server:
        yield server


PARAMETERS = (
    *("--cluster.parameters.slurm_partition", "main", "--cluster.parameters.timeout_min", "30"),
    *("--cluster.parameters.cpus_per_task", "1"),
    *("--cluster.parameters.slurm_additional_parameters", '{"nice": 10}'),
)


def submit(command):
    process = start_fake_sweep(command, module="cluster")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert FAKE_TOKEN not in out + err
    return {line.split()[1] for line in out.splitlines() if line.startswith("job ")}


def points(folder: Path):
    return {path: path.read_bytes() for path in folder.glob("out/step*/points/*.nc")}


def running():
    return ask("squeue", "-h", "-o", "%i %T")


def dataset(folder: Path):
    with xr.open_dataset(folder / "out" / "landscape_step000000_slice0.nc") as data:
        return data[["reward", "kl_k1", "kl_k3", "surrogate"]].load()


def logs(folder: Path):
    return "\n".join(path.read_text() for path in sorted(folder.glob("out/jobs/*_log.*")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The dataset of a sweep without SLURM."""
    from conftest import QUIZ

    folder = tmp_path_factory.mktemp("whole")
    (folder / "sweep.toml").write_text(QUIZ)
    with FakeServer() as server:
        given = ["--output", str(folder / "out"), "--server.token", FAKE_TOKEN, "--server.urls", server.url]
        process = start_fake_sweep(["@", str(folder / "sweep.toml"), *given])
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return dataset(folder)


def test_two_shards_are_cancelled_and_the_same_command_makes_the_undivided_dataset(
    slurm, whole, slow_server, fake_server, sweep_command, tmp_path
):
    command = sweep_command(slow_server, fake_server, "--cluster.shards", "2", *PARAMETERS)
    assert len(submit(command)) == 2
    before = until(lambda: points(tmp_path) if len(points(tmp_path)) >= 7 else None, "no points", 300)
    ask("scancel", "--user", "root")
    until(lambda: not running(), "the jobs do not end")
    assert not (tmp_path / "out" / "landscape_step000000_slice0.nc").exists()
    slow_server.quick = True
    submit(command)
    until(lambda: not running() and list(tmp_path.glob("out/landscape*.nc")), logs(tmp_path), 300)
    xr.testing.assert_equal(dataset(tmp_path), whole)
    after = points(tmp_path)
    assert all(after[path] == content for path, content in before.items())


def test_a_job_that_slurm_takes_away_is_queued_again_and_goes_on(slurm, whole, slow_server, sweep_command, tmp_path):
    (job,) = submit(sweep_command(slow_server, *PARAMETERS))
    before = until(lambda: points(tmp_path) if len(points(tmp_path)) >= 3 else None, "no points", 300)
    ask("scancel", "--signal", "USR2", job)  # to the steps, as SLURM does before the time limit
    until(lambda: "Restarts=1" in ask("scontrol", "show", "job", job), f"not queued again: {logs(tmp_path)}", 300)
    slow_server.quick = True
    shown = lambda: ask("scontrol", "show", "job", job) + logs(tmp_path)  # noqa: E731
    until(lambda: list(tmp_path.glob("out/landscape*.nc")), shown, 400)
    xr.testing.assert_equal(dataset(tmp_path), whole)
    after = points(tmp_path)
    assert all(after[path] == content for path, content in before.items())


def test_a_shard_that_fails_is_a_failed_job_whose_log_ends_with_one_line(slurm, slow_server, sweep_command, tmp_path):
    slow_server.token = "another"
    (job,) = submit(sweep_command(slow_server, *PARAMETERS))
    until(lambda: "JobState=FAILED" in ask("scontrol", "show", "job", job), logs(tmp_path), 300)
    said = logs(tmp_path)
    assert "Traceback" not in said
    assert sum(line.startswith("error: ") for line in said.splitlines()) >= 1
    assert "wrong or missing bearer token" in said
