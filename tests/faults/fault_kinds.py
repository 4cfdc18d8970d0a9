"""Faults of clients, servers, connections, disks, and of weights that another client moves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
from conftest import POLICY
from fault_servers import PATIENCE, Command, Host, Missed, Skip, Violation
from fault_sweeps import NAME, REAL, REFUSED, STOPPED, TOY, WENT_ON, Sweep, fault, same_landscape

from rlvr_landscape_plugin.directions import SliceSpec
from rlvr_landscape_plugin.serving.client import LandscapeClient


@fault("client: kill -9", toy=20, real=2)
def kill_client(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    sweep.alive().send_signal(signal.SIGKILL)
    return "", sweep.settle(-signal.SIGKILL)


@fault("client: kill -9 while the dataset is written", toy=8)
def kill_writer(sweep: Sweep) -> tuple[str, str]:
    """R8: what such a kill leaves is removed by a later command, once it is surely nobody's."""
    sweep.start()
    process = sweep.alive()

    def left() -> list[Path]:
        return list(sweep.output.glob(f".landscape_{NAME}.nc.*.tmp"))

    while not left() and process.poll() is None:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    outcome = sweep.ended(-signal.SIGKILL)
    if outcome != STOPPED:
        raise Missed
    for path in (leftovers := left()):
        old = time.time() - 7200
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, (old, old))
    sweep.finish()
    if left():
        raise Violation(f"{left()[0].name} stays for ever")
    return f"{len(leftovers)} temporary files left", outcome


@fault("client: Ctrl-C", toy=14, real=2)
def interrupt_client(sweep: Sweep) -> tuple[str, str]:
    sweep.moment(at_least=len(sweep.points()) + 1)
    sweep.alive().send_signal(signal.SIGINT)
    return "", sweep.settle(130)


def scale(sweep: Sweep) -> float:
    """How much shorter everything takes on toy servers."""
    return 1.0 if sweep.bench == REAL else 0.25


def _suspend(sweep: Sweep, process: psutil.Process) -> tuple[str, str]:
    seconds = sweep.rng.uniform(0.5, 4.0) * scale(sweep)
    try:
        process.suspend()
        time.sleep(seconds)
        process.resume()
    except psutil.NoSuchProcess:
        raise Missed from None
    return f"{sweep.mode}, {seconds:.1f} s", sweep.settle()


@fault("client: stopped for a while", toy=6)
def stop_client(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    return _suspend(sweep, psutil.Process(sweep.alive().pid))


@fault("server: API process stopped for a while", toy=8, real=2)
def stop_api(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    sweep.alive()
    return _suspend(sweep, sweep.host().processes()["api"])


@fault("server: engine stopped for a while", real=3)
def stop_engine(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    sweep.alive()
    found = sweep.host().processes()
    return _suspend(sweep, found[sweep.rng.choice([name for name in found if name != "api"])])


def _kill_server(sweep: Sweep, part: str, dtype: str = "auto", at_least: int = 0) -> str:
    if not all(host.mortal for host in sweep.hosts):
        raise Skip("the server belongs to somebody else")
    for host in sweep.hosts:
        host.wait()
    sweep.moment(at_least)
    sweep.alive()
    host = sweep.used[0]
    found = host.processes()
    name = "api" if part == "api" else sweep.rng.choice([name for name in found if name != "api"])
    found[name].kill()
    host.replace(dtype)
    return f"{sweep.mode}, {name}"


@fault("server: kill -9 of the API process", toy=8, real=2)
def kill_api(sweep: Sweep) -> tuple[str, str]:
    return _kill_server(sweep, "api"), sweep.settle()


@fault("server: kill -9 of the engine", real=2)
def kill_engine(sweep: Sweep) -> tuple[str, str]:
    return _kill_server(sweep, "engine"), sweep.settle()


@fault("server: restarted at its address in another dtype", toy=4, real=1)
def restart_other(sweep: Sweep) -> tuple[str, str]:
    sweep.start(("one",))
    detail = _kill_server(sweep, "api", "bfloat16", at_least=len(sweep.points()) + 1)
    host = sweep.used[0]
    try:
        outcome = sweep.settle()
        host.wait()
        if outcome == REFUSED:
            sweep.mode, sweep.process = "one", sweep.launch(sweep.arguments("one", [host]))
            if sweep.settle() != REFUSED or "bfloat16" not in sweep.errors:
                raise Violation(f"another dtype was not refused by name:\n{sweep.errors}")
    finally:
        host.wait()
        host.replace()
    return detail, outcome


@fault("server: another with other weights at its address", toy=6, real=2)
def restart_elsewhere(sweep: Sweep) -> tuple[str, str]:
    for host in sweep.hosts:
        host.wait()
    if len(sweep.hosts) < 2:
        raise Skip("needs two servers")
    sweep.start(("one", "wait"))
    sweep.moment()
    sweep.alive()
    other = next(host for host in sweep.hosts if host is not sweep.used[0])
    _meddle(other, load="snapshot", move=True)
    sweep.used[0].gate.lead_to(other.port)
    try:
        return sweep.mode, sweep.settle()
    finally:
        sweep.kill()
        sweep.used[0].gate.lead_to(sweep.used[0].port)


@fault("connection: cut", toy=24, real=4)
def cut(sweep: Sweep) -> tuple[str, str]:
    route = sweep.rng.choice(["info", "load", "move", "checksums", "generate", "score"])
    closed = sweep.rng.choice([0.0, 1.0])
    if route in ("load", "checksums") and sweep.rng.random() < 0.7:
        sweep.kill()
    sweep.start()
    gate = sweep.host().gate
    gate.cut_at(route, closed)
    try:
        if sweep.until(gate.was_cut.is_set) and not gate.was_cut.is_set():
            raise Missed
    except Violation:
        if not gate.was_cut.is_set():
            raise
        return f"{sweep.mode}, {route}", REFUSED
    if sweep.process is None:
        return f"{sweep.mode}, {route}", WENT_ON
    return f"{sweep.mode}, {route}, closed for {closed:.0f} s", sweep.settle()


@fault("connection: delayed", toy=8, real=1)
def delay(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    sweep.alive()
    each = sweep.rng.choice([0.05, 0.3, 1.0, 3.5])
    gate = sweep.host().gate
    gate.delay = each
    end = time.monotonic() + 4
    process = sweep.alive()
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    gate.delay = 0.0
    return f"{sweep.mode}, {each} s a packet", sweep.settle()


@fault("disk: full", toy=10, real=1)
def full_disk(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    process = sweep.alive()
    left = sweep.rng.choice([0, 4096, 40_000])
    sweep.disk.fill(left)
    return f"{left} bytes left", _until_mended(sweep, process)


@fault("disk: read-only for a while", toy=8, real=1)
def read_only(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    process = sweep.alive()
    sweep.disk.read_only()
    return "", _until_mended(sweep, process)


def _until_mended(sweep: Sweep, process: Command) -> str:
    end = time.monotonic() + sweep.rng.uniform(1.0, 6.0) * scale(sweep)
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    sweep.disk.mend()
    return sweep.settle()


@fault("client: no file handles left", toy=8)
def file_handles(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    process = sweep.alive()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = psutil.Process(process.pid).num_fds()
        spare = sweep.rng.randint(0, 3)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (used + spare, hard))
        end = time.monotonic() + 3 * scale(sweep)
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is None:
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (hard, hard))
    except (psutil.NoSuchProcess, ProcessLookupError):
        raise Missed from None
    return f"{used} in use, {spare} to spare", sweep.settle()


@fault("two clients: one output, two servers", toy=6)
def shared_output(sweep: Sweep) -> tuple[str, str]:
    sweep.kill()
    if len(sweep.hosts) < 2:
        raise Skip("needs two servers")
    for host in sweep.hosts:
        host.wait()
    sweep.prepare()
    first, second = sweep.hosts[:2]
    sweep.mode, sweep.used = "one", [first]
    other = sweep.launch(sweep.arguments("one", [second]))
    time.sleep(sweep.rng.uniform(0, 2) * scale(sweep))
    sweep.process = sweep.launch(sweep.arguments("one", [first]))
    _, errors = other.communicate(timeout=PATIENCE)
    if other.returncode or "Traceback" in errors:
        raise Violation(f"the other client ended with {other.returncode}:\n{errors}")
    return "", sweep.settle()


@fault("two clients: one server", toy=6)
def shared_server(sweep: Sweep) -> tuple[str, str]:
    sweep.kill()
    sweep.start(("one", "wait"))
    slice_seed = sweep.rng.choice([0, 1])
    beside = sweep.output.with_name(f"{sweep.output.name}-beside")
    host = sweep.used[0]
    more = ["--slice.seeds", json.dumps([slice_seed])]
    other = sweep.launch(sweep.arguments("wait", [host]), more, beside)
    try:
        outcome = sweep.settle()
        while outcome == WENT_ON and not sweep.done and other.poll() is None:
            outcome = sweep.settle()
        if other.poll() is None and not sweep.done and sweep.process is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                other.wait(timeout=40)
    finally:
        other.kill()
        _, errors = other.communicate()
    if "Traceback" in errors:
        raise Violation(f"the other client:\n{errors}")
    noticed = "weight" in sweep.errors + errors or "another client" in sweep.errors + errors
    finished = beside / f"landscape_{NAME}.nc"
    if slice_seed == 0 and finished.exists() and sweep.reference is not None and sweep.variant != "grown":
        same_landscape(finished, sweep.reference, sweep.bench == TOY)
    shutil.rmtree(beside, ignore_errors=True)
    if not noticed and other.returncode == 0 and sweep.done:
        return "they never met", outcome
    if not noticed and outcome == REFUSED:
        raise Violation(f"refused for another reason:\n{sweep.errors}")
    return f"{sweep.mode}, slice {slice_seed}, {'noticed' if noticed else 'not met'}", outcome


def _meddle(host: Host, load: str = "", move: bool = False) -> None:
    """What another client might do: load another slice or snapshot, move."""

    async def work() -> None:
        async with LandscapeClient(host.server.url, host.server.token) as client:
            if load:
                spec = SliceSpec(seed=7).as_dict()
                await client.load(str(altered(host) if load == "snapshot" else POLICY), spec)
            elif (await client.info())["loaded"] is None:
                return
            if move:
                await client.move(0.11, -0.07)

    asyncio.run(work())


def altered(host: Host) -> Path:
    """A snapshot with the shipped policy's shapes and other weights, below a root of the server."""
    path = host.roots[-1] / "altered" / "step_000003"
    if not path.exists():
        from safetensors.numpy import load_file, save_file

        shutil.copytree(POLICY, path)
        tensors = {name: tensor * 1.5 for name, tensor in load_file(path / "model.safetensors").items()}
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        (path / "manifest.json").unlink(missing_ok=True)
    return path


def _meddled(sweep: Sweep, load: str, chance: float) -> tuple[str, str]:
    """Strike a running command with `_meddle`; another client's load comes with a move at this chance."""
    sweep.moment()
    sweep.alive()
    move = sweep.rng.random() < chance
    _meddle(sweep.host(), load, move)
    return f"{sweep.mode}{', moved' if move else ''}", sweep.settle()


@fault("weights: moved behind the client's back", toy=6, real=1)
def meddle_move(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    sweep.alive()
    _meddle(sweep.host(), move=True)
    return sweep.mode, sweep.settle()


@fault("weights: another slice loaded behind the client's back", toy=6, real=2)
def meddle_slice(sweep: Sweep) -> tuple[str, str]:
    return _meddled(sweep, "slice", 0.3)


@fault("weights: another snapshot loaded behind the client's back", toy=6, real=2)
def meddle_snapshot(sweep: Sweep) -> tuple[str, str]:
    return _meddled(sweep, "snapshot", 0.5)
