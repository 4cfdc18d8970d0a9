"""Whole sweeps through the command line, against a real server: numbers, resumption, refusals."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import reference
import xarray as xr
from conftest import POLICY, ROOT, TASKSET, start_sweep
from rlvr_alphabet_sort.rules import episode_reward

from rlvr_landscape_plugin.config import SweepConfig
from rlvr_landscape_plugin.designs.grid import grid_order
from rlvr_landscape_plugin.directions import SliceSpec, fingerprint
from rlvr_landscape_plugin.episodes import load_tasks, open_environment, prompts_hash
from rlvr_landscape_plugin.snapshot import open_snapshot
from rlvr_landscape_plugin.sweep.point import BaseBatch

matplotlib.use("Agg")
pytestmark = pytest.mark.server
NAME = "step000000_slice0"


def urls(*addresses: str) -> str:
    """The value of `--server.urls`."""
    return json.dumps(addresses)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, server) -> Path:
    """The output directory of one undisturbed small sweep, traces kept."""
    output = tmp_path_factory.mktemp("finished") / "out"
    process = start_sweep(output, server, "--save-traces")
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return output


@pytest.fixture
def data(finished) -> xr.Dataset:
    return xr.open_dataset(finished / f"landscape_{NAME}.nc")


@pytest.fixture
def base(finished) -> BaseBatch:
    with xr.open_dataset(finished / NAME / "base.nc") as file:
        return BaseBatch.from_dataset(file.load())


def test_the_dataset_is_plain_labelled_xarray(data):
    assert dict(data.sizes) == {"alpha": 3, "beta": 4, "prompt": 6, "rollout": 3}
    assert data.alpha.values.tolist() == pytest.approx([-0.1, 0.0, 0.15])
    assert data.beta.values.tolist() == pytest.approx([-0.05, 0.0, 0.05, 0.1])
    for name, variable in data.variables.items():
        assert variable.attrs.get("long_name"), name
        assert variable.attrs.get("units"), name
    data.reward.mean(["prompt", "rollout"]).plot()
    assert ((data.reward >= 0) & (data.reward <= 1)).all()
    assert (data.status != 2).all()
    stacked = xr.concat([data, data.assign_coords(step=1)], "step")
    assert stacked.sizes["step"] == 2


def test_the_origin_is_exact(data):
    origin = data.sel(alpha=0.0, beta=0.0)
    for name in ("kl_k1", "kl_k3", "clip_fraction", "realised_step"):
        assert (origin[name] == 0).all(), name
    weighted = float((data.base_advantage * data.base_tokens).sum() / data.base_tokens.sum())
    surrogate = float(origin.surrogate.astype(np.float64).sum() / data.base_tokens.sum())
    assert surrogate == pytest.approx(weighted, abs=1e-7)
    exact = (data.base_advantage * data.base_tokens).astype(np.float32)
    np.testing.assert_array_equal(origin.surrogate.values, exact.values)


def test_kl_and_surrogate_agree_with_transformers(data, base):
    """Three points, a corner included: transformers in float32 over weights perturbed from the definition."""
    checkpoint = reference.perturbed(POLICY, 0, 0.0, 0.0)

    def said(model, p: int, r: int) -> np.ndarray:
        (segment,) = base.segments[p][r]
        return reference.logprobs(model, segment.tokens)[segment.sampled[1:]]

    for alpha, beta in ((-0.1, -0.05), (0.0, 0.1), (0.15, 0.1)):
        point = data.sel(alpha=alpha, beta=beta, method="nearest")
        model = reference.perturbed(POLICY, 0, float(point.alpha), float(point.beta))
        for p, r in np.ndindex(6, 3):
            old, new = said(checkpoint, p, r), said(model, p, r)
            count, advantage = len(old), float(data.base_advantage[p, r])
            assert int(data.base_tokens[p, r]) == count
            ratio = np.exp(new - old)
            clipped = np.clip(ratio, 0.8, 1.2)
            expected = {
                "kl_k1": np.sum(old - new),
                "kl_k3": np.sum(ratio - 1 - (new - old)),
                "surrogate": np.sum(np.minimum(ratio * advantage, clipped * advantage)),
            }
            for name, value in expected.items():
                assert float(point[name][p, r]) / count == pytest.approx(value / count, abs=1e-3), name


def test_rewards_are_the_rules_on_the_saved_traces(finished, data):
    infos = [task.data.info for task in load_tasks(open_environment("rlvr-alphabet-sort", TASKSET), 6)]
    seen = 0
    for i, j in np.ndindex(3, 4):
        lines = (finished / NAME / "traces" / f"a{i:03d}_b{j:03d}.jsonl").read_text().splitlines()
        for cell, line in zip(np.ndindex(6, 3), lines, strict=True):
            trace = json.loads(line)
            replies = [n["message"]["content"] for n in trace["nodes"] if n["sampled"]]
            expected = episode_reward(replies, infos[cell[0]]["ground_truths"], 4, True)
            assert float(data.reward[i, j][cell]) == pytest.approx(expected, abs=1e-6)
            seen += 1
    assert seen == 3 * 4 * 6 * 3


def test_numerical_noise_is_recorded_and_small(data):
    tokens = float(data.base_tokens.sum())
    assert abs(float((data.base_sampled_logprob - data.base_logprob).sum())) / tokens < 1e-4
    assert float(data.recheck_max_difference.max()) < 1e-4
    assert float(np.abs(data.recheck_logprob - data.base_logprob).max()) < 1e-3


def test_points_differ_and_kl_grows_outward(data):
    kl = data.kl_k3.mean(["prompt", "rollout"])
    assert (
        float(kl.sel(alpha=0.15, beta=0.1, method="nearest")) > float(kl.sel(alpha=0, beta=0.05, method="nearest")) > 0
    )
    assert float(data.realised_step.sel(alpha=0.15, beta=0.0, method="nearest")) == pytest.approx(0.15, rel=1e-3)


def test_attributes_suffice_to_repeat_the_sweep(data):
    config = SweepConfig.from_provenance(json.loads(data.attrs["configuration"]))
    spec = SliceSpec(**json.loads(data.attrs["slice"]))
    assert spec.seed == int(data.slice_seed)
    assert fingerprint(spec, open_snapshot(POLICY).shapes) == data.attrs["directions_fingerprint"]
    tasks = load_tasks(open_environment(config.env.id, config.env.taskset), config.env.num_prompts)
    assert prompts_hash(tasks) == data.attrs["prompts_sha256"]
    assert open_snapshot(POLICY).sha256 == data.attrs["snapshot_sha256"]
    np.testing.assert_array_equal(config.grid.alpha.values(), data.alpha.values)
    np.testing.assert_array_equal(config.grid.beta.values(), data.beta.values)
    assert {"vllm", "dtype", "device"} <= set(json.loads(data.attrs["servers"])[0])
    assert "token" not in str(data.attrs).lower().replace("tokens", "").replace("max_token", "")


def test_a_second_server_session_measures_the_same(finished, data, sweep, tmp_path):
    """Sampling seeds, directions and prompts are functions of the configuration alone."""
    assert sweep().returncode == 0
    again = xr.open_dataset(tmp_path / "out" / f"landscape_{NAME}.nc")
    np.testing.assert_allclose(again.base_reward, data.base_reward)
    assert float((again.reward != data.reward).mean()) < 0.02, "float rounding may flip a rare token, no more"


def test_finished_sweeps_start_no_server_and_other_configurations_are_refused(finished):
    done = start_sweep(finished, None)
    _, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert "starting" not in err
    for option, value, said in (
        ("--sampling.max-tokens", "32", "configuration.sampling.max_tokens: 64 there, 32 asked for"),
        ("--grid.beta.points", "5", "beta = "),
    ):
        other = start_sweep(finished, None, option, value)
        _, err = other.communicate(timeout=120)
        assert other.returncode == 2
        assert said in err
        assert "Traceback" not in err


@pytest.mark.slow
def test_kill_9_at_five_moments_loses_nothing(server, tmp_path, data):
    output = tmp_path / "out"
    rng = random.Random(0)
    points = output / NAME / "points"
    written: dict[str, tuple[int, bytes]] = {}
    for attempt in range(5):
        process = start_sweep(output, server)
        target = len(written) + rng.randint(0, 3)
        deadline = time.monotonic() + 120
        while len(list(points.glob("a*.nc"))) < target and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.5) if attempt else 2.0)
        process.kill()
        process.communicate()
        for path in points.glob("a*.nc") if points.exists() else ():
            state = (path.stat().st_mtime_ns, path.read_bytes())
            assert written.setdefault(path.name, state) == state, "a finished point was touched"
            with xr.open_dataset(path) as point:
                assert point.reward.notnull().all()
    process = start_sweep(output, server)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    for name, state in written.items():
        assert ((points / name).stat().st_mtime_ns, (points / name).read_bytes()) == state
    assert len(list(points.glob("a*.nc"))) == 12
    assert not list(output.rglob("*.corrupt"))
    with xr.open_dataset(output / f"landscape_{NAME}.nc") as final:
        assert final.reward.notnull().all()
        np.testing.assert_allclose(final.base_reward, data.base_reward)
        assert float((final.reward != data.reward).mean()) < 0.02


def test_ctrl_c_stops_cleanly(server, tmp_path):
    process = start_sweep(tmp_path / "out", server)
    points = tmp_path / "out" / NAME / "points"
    while len(list(points.glob("a*.nc"))) < 2 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; finished points are kept" in err
    assert "Traceback" not in err
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env.id", "no-such-taskset"], "'no-such-taskset' (env.id) is not installed"),
        (["--env.taskset", '{"min_turns": 9}'], "min_turns = 9 exceeds max_turns = 2"),
        (["--snapshots", "/nowhere"], "is not a directory"),
        (["--snapshots", '["tiny-sorter", "tiny-sorter"]'], "both say step 0"),
        (["--server.urls", '["http://127.0.0.1:9"]'], "connection failed"),
        (["--output", "/proc/nothing"], "cannot write /proc/nothing"),
        (["--shard", "3/2"], "is not i/n with 1 ≤ i ≤ n"),
    ],
)
def test_mistakes_get_a_message_and_no_traceback(sweep, arguments, message):
    done = sweep(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_token_is_named(sweep):
    done = sweep(token="wrong")
    assert done.returncode == 2
    assert "wrong or missing bearer token" in done.stderr


def test_a_server_without_the_plugin_is_named(sweep):
    code = (
        "from http.server import *\n"
        "class H(BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_error(404)\n"
        "s = HTTPServer(('127.0.0.1', 0), H); print(s.server_port, flush=True); s.serve_forever()"
    )
    with subprocess.Popen(
        ["python3", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as stub:
        assert stub.stdout is not None
        done = sweep("--server.urls", f'["http://127.0.0.1:{stub.stdout.readline().strip()}"]')
        stub.kill()
    assert done.returncode == 2
    assert "VLLM_PLUGINS=rlvr_landscape" in done.stderr


def test_a_taken_port_is_named(tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        process = start_sweep(tmp_path / "out", None, "--server.port", str(holder.getsockname()[1]))
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "is in use; choose another with --server.port" in err


def test_unfit_checkpoints_are_named_before_a_server_starts(tmp_path):
    from safetensors.torch import load_file, save_file

    bad = tmp_path / "step_000001"
    shutil.copytree(POLICY, bad)
    tensors = load_file(bad / "model.safetensors")
    tensors.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    started = time.monotonic()
    process = start_sweep(tmp_path / "out", None, "--snapshots", str(bad))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "tensor 'model.layers.0.self_attn.q_proj.weight' is missing" in err
    assert "starting a vLLM server" not in err
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_a_launched_server_dies_with_a_killed_sweep_and_a_dead_server_is_reported(tmp_path):
    import psutil

    def servers() -> list[psutil.Process]:
        marker = str(tmp_path)
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "environ"]):
            environment = process.info["environ"] or {}
            if environment.get("RLVR_TEST_MARK") == marker and process.info["pid"] not in (os.getpid(),):
                found.append(process)
        return found

    os.environ["RLVR_TEST_MARK"] = str(tmp_path)
    try:
        process = start_sweep(tmp_path / "out", None)
        points = tmp_path / "out" / NAME / "points"

        def wait_for(count: int) -> None:
            deadline = time.monotonic() + 240
            while len(list(points.glob("a*.nc"))) < count and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            assert process.poll() is None, process.communicate()[1]

        wait_for(2)
        process.kill()
        process.communicate()
        deadline = time.monotonic() + 60
        while servers() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not servers(), "the server outlived a killed sweep"

        kept = len(list(points.glob("a*.nc")))
        process = start_sweep(tmp_path / "out", None)
        wait_for(kept + 1)
        for victim in servers():
            if victim.pid != process.pid and "tether" not in " ".join(victim.cmdline()):
                victim.kill()
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2
        assert "the same command continues" in err
        assert "Traceback (most recent call last):\n  File" not in err.split("--- last lines")[0]
        assert len(list(points.glob("a*.nc"))) >= kept + 1
    finally:
        del os.environ["RLVR_TEST_MARK"]


def test_points_are_ordered_from_the_origin_outward():
    alphas, betas = np.array([-0.1, 0.0, 0.15]), np.array([-0.05, 0.0, 0.1])
    order = grid_order(alphas, betas)
    assert order[0] == (1, 1)
    assert sorted(order) == [(i, j) for i in range(3) for j in range(3)]
    radii = [alphas[i] ** 2 + betas[j] ** 2 for i, j in order]
    assert radii == sorted(radii)


def test_dry_run_needs_nothing(tmp_path):
    process = start_sweep(tmp_path / "out", None, "--dry-run")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "3 × 4 = 12 points" in out
    assert not (tmp_path / "out").exists()
    assert (ROOT / "configs" / "sweep" / "quickstart.toml").is_file()


class CuttingProxy:
    """Forwards TCP to a server and, at the n-th request of one route, cuts every connection and listens no more."""

    def __init__(self, target: int, route: str, cut_at: int, port: int = 0) -> None:
        """`cut_at` 0: never."""
        self._target, self._mark, self._left = target, f"POST /landscape/{route} ".encode(), cut_at
        self.was_cut = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._writers: list[asyncio.StreamWriter] = []
        self._listener = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", port))
        self.port = self._listener.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, back_writer]
        await asyncio.gather(
            self._pump(reader, back_writer, watch=True), self._pump(back_reader, writer), return_exceptions=True
        )

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, watch: bool = False) -> None:
        while data := await reader.read(2**16):
            if watch and self._mark in data:
                self._left -= 1
                if self._left == 0:
                    self._listener.close()
                    for open_writer in self._writers:
                        open_writer.transport.abort()
                    self.was_cut.set()
                    return
            writer.write(data)
            await writer.drain()
        writer.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


@pytest.mark.parametrize(("stage", "cut_at"), [("load", 1), ("move", 4), ("generate", 9), ("score", 3)])
def test_a_connection_lost_at_any_stage_is_reported_and_the_sweep_continues(server, tmp_path, data, stage, cut_at):
    proxy = CuttingProxy(int(server.url.rsplit(":", 1)[1]), stage, cut_at)
    process = start_sweep(tmp_path / "out", server, "--server.urls", f'["http://127.0.0.1:{proxy.port}"]')
    _, err = process.communicate(timeout=120)
    proxy.close()
    assert process.returncode == 2, err
    assert "connection failed" in err or "closed the stream" in err
    assert "the same command continues" in err
    assert "Traceback" not in err
    points = tmp_path / "out" / NAME / "points"
    kept = {path.name: path.stat().st_mtime_ns for path in points.glob("a*.nc")}
    process = start_sweep(tmp_path / "out", server)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in points.glob("a*.nc")}.items()
    with xr.open_dataset(tmp_path / "out" / f"landscape_{NAME}.nc") as final:
        assert final.reward.notnull().all()
        assert float((final.reward != data.reward).mean()) < 0.02


def test_two_servers_share_one_queue(server, second_server, tmp_path, data):
    process = start_sweep(tmp_path / "out", server, "--server.urls", urls(server.url, second_server.url))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    with xr.open_dataset(tmp_path / "out" / f"landscape_{NAME}.nc") as both:
        facts = json.loads(both.attrs["servers"])
        assert [one["origin_checked_after"] for one in facts] == [True, True]
        assert sum(one["points"] for one in facts) == 12
        assert float((both.reward != data.reward).mean()) < 0.02
        np.testing.assert_allclose(both.kl_k1, data.kl_k1, atol=1e-2)


def test_a_server_lost_on_the_way_leaves_its_points_to_the_other(server, second_server, tmp_path, data):
    proxy = CuttingProxy(int(second_server.url.rsplit(":", 1)[1]), "generate", 7)
    process = start_sweep(tmp_path / "out", server, "--server.urls", urls(server.url, f"http://127.0.0.1:{proxy.port}"))
    _, err = process.communicate(timeout=300)
    proxy.close()
    assert process.returncode == 0, err
    assert "the others continue" in err
    with xr.open_dataset(tmp_path / "out" / f"landscape_{NAME}.nc") as final:
        assert final.reward.notnull().all()
        assert float((final.reward != data.reward).mean()) < 0.02
        np.testing.assert_allclose(final.kl_k1, data.kl_k1, atol=1e-2)


def test_a_server_that_was_away_is_waited_for_and_its_sweep_goes_on(server, tmp_path, data):
    """Every connection is cut in the middle of a point; the same address answers again half a second later."""
    target = int(server.url.rsplit(":", 1)[1])
    proxy = CuttingProxy(target, "generate", 7)
    arguments = ("--server.urls", urls(f"http://127.0.0.1:{proxy.port}"), "--server.patience", "60")
    process = start_sweep(tmp_path / "out", server, *arguments)
    assert proxy.was_cut.wait(120)
    back = CuttingProxy(target, "generate", 0, port=proxy.port)
    _, err = process.communicate(timeout=300)
    proxy.close()
    back.close()
    assert process.returncode == 0, err
    assert "no server left, trying again" in err
    with xr.open_dataset(tmp_path / "out" / f"landscape_{NAME}.nc") as final:
        assert float((final.reward != data.reward).mean()) < 0.02


def same_landscape(path: Path, data: xr.Dataset) -> None:
    """`path` has the points and the provenance of `data`; only who measured them differs."""
    with xr.open_dataset(path) as other:
        assert other.attrs["identity"] == data.attrs["identity"]
        assert set(other.attrs) == set(data.attrs)
        assert set(other.data_vars) == set(data.data_vars)
        np.testing.assert_array_equal(other.alpha, data.alpha)
        np.testing.assert_array_equal(other.beta, data.beta)
        np.testing.assert_allclose(other.base_reward, data.base_reward)
        np.testing.assert_allclose(other.realised_step, data.realised_step, rtol=1e-6)
        np.testing.assert_allclose(other.kl_k1, data.kl_k1, atol=1e-2)
        assert float((other.reward != data.reward).mean()) < 0.02
        facts = json.loads(other.attrs["servers"])
        assert sum(one["points"] for one in facts) == 12
        assert len(facts) == 2


def test_two_shards_in_two_processes_make_the_undivided_dataset(server, second_server, tmp_path, data):
    output = tmp_path / "out"
    first = start_sweep(output, server, "--shard", "1/2")
    _, err = first.communicate(timeout=300)
    assert first.returncode == 0, err
    assert "left to the shard that finishes last: 6 of 12 points are not measured yet" in err
    assert not list(output.glob("*.nc"))
    second = start_sweep(output, second_server, "--shard", "2/2")
    _, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    same_landscape(output / f"landscape_{NAME}.nc", data)
    again = start_sweep(output, None, "--shard", "1/2")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert "starting" not in err


def test_a_job_array_of_submitit_makes_the_undivided_dataset(server, second_server, tmp_path, data):
    """submitit's local executor runs both shards at once, as SLURM would on two nodes."""
    pytest.importorskip("submitit", reason="job arrays need the extra `cluster`")
    output = tmp_path / "out"
    arguments = ("--cluster.shards", "2", "--cluster.executor", "local")
    process = start_sweep(
        output, server, *arguments, "--server.urls", urls(server.url, second_server.url), module="cluster"
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert f"landscape_{NAME}.nc" in out
    same_landscape(output / f"landscape_{NAME}.nc", data)


WIDE = ("--grid.alpha.min", "-0.3", "--grid.alpha.max", "0.3", "--grid.beta.min", "-0.3", "--grid.beta.max", "0.3")
ROUNDS = (
    *(*WIDE, "--grid.alpha.points", "7", "--grid.beta.points", "7"),
    *("--env.num-prompts", "128", "--env.rollouts", "1"),
)


UNEVEN = ("--grid.beta.points", "2")
"""3 × 3 points, no two of them as far from the origin."""


@pytest.fixture(scope="module")
def progressive(tmp_path_factory, server) -> Path:
    """The output directory of a sweep that may measure 7 × 7 × 128 and stops long before."""
    output = tmp_path_factory.mktemp("progressive") / "out"
    process = start_sweep(output, server, *ROUNDS, "--until-ci-width", "0.5")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return output


def test_a_progressive_sweep_stops_at_the_width_asked_for(progressive):
    with xr.open_dataset(progressive / f"landscape_{NAME}.nc") as found:
        record = json.loads(found.attrs["progressive"])
        last = record["looks"][-1]
        assert record["outcome"].startswith("reached")
        assert last["high"] - last["low"] <= 0.5
        assert found.sizes["alpha"] * found.sizes["beta"] == last["points"] < 49
        assert found.sizes["prompt"] == last["prompts"] < 128
        assert found.reward.notnull().all()
        rows = [np.argmin(np.abs(np.linspace(-0.3, 0.3, 7) - a)) for a in found.alpha.values]
        assert {0, 3, 6} <= set(rows), "the range is that of the full grid"
        kl, reward = (found[name].mean(["prompt", "rollout"]).values.ravel() for name in ("kl_k1", "reward"))
        # Its own coarse points, not interpolated: near the estimate for the full grid, and inside its interval.
        assert last["low"] - 0.1 < np.corrcoef(kl, reward)[0, 1] < last["high"] + 0.1


def test_rollouts_of_a_progressive_sweep_are_those_of_a_plain_one(server, progressive, tmp_path):
    process = start_sweep(
        tmp_path / "out",
        server,
        *(*WIDE, "--grid.alpha.points", "3", "--grid.beta.points", "2", "--env.num-prompts", "32"),
        *("--env.rollouts", "1"),
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    with (
        xr.open_dataset(tmp_path / "out" / f"landscape_{NAME}.nc") as plain,
        xr.open_dataset(progressive / f"landscape_{NAME}.nc") as rounds,
    ):
        shared = rounds.sel(alpha=plain.alpha, beta=plain.beta).isel(prompt=slice(32))
        assert dict(shared.sizes) == {"alpha": 3, "beta": 3, "prompt": 32, "rollout": 1}
        assert float((shared.reward != plain.reward).mean()) < 0.03
        np.testing.assert_allclose(shared.kl_k1, plain.kl_k1, atol=2e-2)


def test_a_narrower_width_goes_on_from_what_was_measured(server, progressive, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(progressive, output)
    with xr.open_dataset(output / f"landscape_{NAME}.nc") as file:
        before = file.load()
    kept = {path.name: path.stat().st_mtime_ns for path in (output / NAME / "points").glob("*.nc")}
    again = start_sweep(output, None, *ROUNDS, "--until-ci-width", "0.5")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert "starting" not in err
    width = before.attrs["progressive"]
    asked = 0.8 * (json.loads(width)["looks"][-1]["high"] - json.loads(width)["looks"][-1]["low"])
    process = start_sweep(output, server, *ROUNDS, "--until-ci-width", str(asked))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    now = {path.name: path.stat().st_mtime_ns for path in (output / NAME / "points").glob("*.nc")}
    assert kept.items() < now.items()
    with xr.open_dataset(output / f"landscape_{NAME}.nc") as more:
        looks = [json.loads(data.attrs["progressive"])["looks"] for data in (before, more)]
        assert looks[1][: len(looks[0])] == looks[0]
        assert len(looks[1]) > len(looks[0])
        same = more.sel(alpha=before.alpha, beta=before.beta).isel(prompt=slice(before.sizes["prompt"]))
        xr.testing.assert_equal(same[["reward", "kl_k1"]], before[["reward", "kl_k1"]])
        assert more.reward.notnull().all()
        assert sum(one["points"] for one in json.loads(more.attrs["servers"])) == len(now)


def test_what_a_progressive_sweep_cannot_do_is_refused(tmp_path):
    for arguments, words in (
        (("--until-ci-width", "0.1", "--shard", "1/2"), "decides on all points after each round"),
        (("--until-ci-width", "0"), "--until-ci-width"),
        (("--until-ci-width", "0.1"), "env.num_prompts = 6 cannot give"),
        (
            ("--until-ci-width", "0.1", "--env.num-prompts", "9", "--until-ci-of", "beyond_radius", *UNEVEN),
            "points of equal radius",
        ),
    ):
        process = start_sweep(tmp_path / "out", None, *arguments)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2, err
        assert words in err
        assert "Traceback" not in err
    assert not list((tmp_path / "out").rglob("*.nc"))


def test_the_range_of_a_grid_is_found_by_probes(server, tmp_path):
    arguments = ("--grid.find.prompts", "8", "--grid.find.retention", "0.6", "--env.num-prompts", "8")
    process = start_sweep(tmp_path / "out", server, *arguments)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    with xr.open_dataset(tmp_path / "out" / f"landscape_{NAME}.nc") as found:
        record = json.loads(found.attrs["range_finding"])
        assert record["criterion"] == "reward"
        assert record["note"] == ""
        np.testing.assert_allclose(found.alpha, np.array([-0.1, 0.0, 0.15]) * record["factor"])
        np.testing.assert_allclose(found.beta, np.array([-0.05, 0.0, 0.05, 0.1]) * record["factor"], atol=1e-12)
        ends = [found.reward.sel(alpha=a, beta=0.0) for a in found.alpha.values[[0, -1]]]
        ends += [found.reward.sel(alpha=0.0, beta=b) for b in found.beta.values[[0, -1]]]
        # The probes were on the same tasks, with the same seeds, at almost the same places.
        left = float(sum(end.mean() for end in ends)) / 4 / float(found.reward.sel(alpha=0.0, beta=0.0).mean())
        assert left == pytest.approx(0.6, abs=0.2)
        origin = record["probes"][0]
        assert origin["reward"] == pytest.approx(float(found.reward.sel(alpha=0.0, beta=0.0).mean()), abs=0.02)
    again = start_sweep(tmp_path / "out", None, *arguments)
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert "starting" not in err
    assert f"the configured range × {record['factor']:g}" in err


def test_a_server_with_other_directions_than_asked_for_is_refused(server, tmp_path):
    process = start_sweep(tmp_path / "out", server, "--server.directions-memory", "half")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "holds the directions in float32, which is another slice than server.directions_memory = 'half'" in err
    assert not list((tmp_path / "out").rglob("*.nc"))


def test_another_client_moving_the_server_is_noticed(server, tmp_path):
    from rlvr_landscape_plugin.serving.client import LandscapeClient

    process = start_sweep(tmp_path / "out", server)
    points = tmp_path / "out" / NAME / "points"
    while len(list(points.glob("a*.nc"))) < 2 and process.poll() is None:
        time.sleep(0.02)

    async def meddle() -> None:
        async with LandscapeClient(server.url, server.token) as client:
            while process.poll() is None:
                await client.move(0.3, 0.3)
                await asyncio.sleep(0.05)

    asyncio.run(meddle())
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "weight" in err.split("--- last lines")[0]
