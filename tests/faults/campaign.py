"""Faults at random moments of real sweeps, and what must hold after each.

    python tests/faults/campaign.py --faults 100 --seed 0 --results outputs/faults.jsonl --minutes 10

Small sweeps (3 × 4 points, 6 tasks × 3 rollouts) run as commands of their own against real vLLM servers behind gates:
fixed addresses where connections can be cut, delayed or led elsewhere. The schedule is a function of the seed; with
`--results` a campaign continues where an earlier call stopped. A fault is *struck* only if the command was still at
work. After it the command either goes on, or ends with a clear message and the same command continues; every sweep
ends with the dataset of the undisturbed one. Linux; a full and a read-only disk need the right to mount.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import xarray as xr

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import POLICY, ServerThread, start_sweep

from rlvr_landscape_plugin.config import ServerConfig
from rlvr_landscape_plugin.directions import SliceSpec
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.serving.launch import LocalServer

NAME = "step000000_slice0"
POINTS = 12
TOKEN = "a-token-for-faults"
PATIENCE = 240.0
"""Seconds in which a command must end or finish another point."""
WENT_ON, REFUSED, STOPPED, REPAIRED = "went on", "refused, then continued", "stopped, then continued", "repaired"
FAILED, SKIPPED = "FAILED", "skipped"
OUTCOMES = (WENT_ON, REFUSED, STOPPED, REPAIRED, FAILED, SKIPPED)


class Missed(Exception):
    """The command was over before the fault could strike."""


class Skip(Exception):
    """This machine cannot produce the fault; says why."""


class Violation(AssertionError):
    """Something that must hold did not."""


class Gate:
    """A fixed address in front of a server on loopback."""

    def __init__(self, target: int) -> None:
        self.target, self.delay = target, 0.0
        self._mark: bytes | None = None
        self._closed_until = self._closing = 0.0
        self.was_cut = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        listener = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def cut_at(self, route: str, seconds: float) -> None:
        """At the next request of `route` every connection is cut, and new ones are for `seconds`."""
        self.was_cut.clear()
        self._closing, self._mark = seconds, f" /landscape/{route} ".encode()

    def lead_to(self, target: int) -> None:
        """Cut every connection; new ones go to the server at port `target`."""
        self.target = target
        self._loop.call_soon_threadsafe(self._cut)

    def calm(self) -> None:
        """As if nothing had been asked of it; the target stays."""
        self._mark, self.delay, self._closed_until = None, 0.0, 0.0

    def close(self) -> None:
        async def end() -> None:
            self._closed_until = float("inf")
            self._cut()
            if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(tasks, timeout=5)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if time.monotonic() < self._closed_until:
            writer.transport.abort()
            return
        try:
            back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, back_writer}
        self._writers |= pair
        await asyncio.gather(
            self._pump(reader, back_writer, True), self._pump(back_reader, writer, False), return_exceptions=True
        )
        self._writers -= pair
        for end in pair:
            end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, watch: bool) -> None:
        while data := await reader.read(2**16):
            if watch and self._mark is not None and self._mark in data:
                self._mark, self._closed_until = None, time.monotonic() + self._closing
                self.was_cut.set()
                self._cut()
                return
            if self.delay:
                await asyncio.sleep(self.delay)
            writer.write(data)
            await writer.drain()
        writer.close()


@dataclass
class Host:
    """One server behind its gate. `thread` is None for a server that belongs to somebody else and must live."""

    server: LocalServer
    gate: Gate
    roots: list[Path]
    thread: ServerThread | None = None
    _starting: threading.Thread | None = None

    @classmethod
    def of(cls, server: LocalServer, roots: list[Path]) -> Host:
        """A gate in front of a server that must live."""
        return cls(server, Gate(_port(server)), roots)

    @classmethod
    def start(cls, roots: list[Path], log: Path) -> Host:
        """A server of one's own."""
        thread = ServerThread(ServerConfig(token=TOKEN), POLICY, roots, log)
        return cls(thread.server, Gate(_port(thread.server)), roots, thread)

    def processes(self) -> dict[str, psutil.Process]:
        """`api`, `engine` and the like, by what they are."""
        (api,) = psutil.Process(self.server.pid).children()
        found = {"api": api}
        for child in api.children(recursive=True):
            name = " ".join(child.cmdline()[:1])
            if "EngineCore" in name or "Worker" in name:
                found["engine" if "EngineCore" in name else "worker"] = child
        return found

    def replace(self, dtype: str = "auto") -> None:
        """End what is left of the server and start another behind the same gate, in the background."""

        def work() -> None:
            assert self.thread is not None
            self.thread.close()
            config = ServerConfig(token=TOKEN, dtype=dtype)
            self.thread = ServerThread(config, POLICY, self.roots, self.server.log)
            self.server = self.thread.server
            self.gate.target = _port(self.server)

        self._starting = threading.Thread(target=work)
        self._starting.start()

    def ready(self) -> bool:
        """Whether no replacement is under way."""
        return self._starting is None or not self._starting.is_alive()

    def wait(self) -> None:
        """Until a replacement answers."""
        if self._starting is not None:
            self._starting.join()

    def close(self) -> None:
        self.wait()
        self.gate.close()
        if self.thread is not None:
            self.thread.close()


def _port(server: LocalServer) -> int:
    return int(server.url.rsplit(":", 1)[1])


class Disk:
    """A directory on a small disk of its own, if this machine lets us mount one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.problem = self._run("mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(path))

    def _run(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr.strip()

    def fill(self, left: int) -> None:
        """Leave `left` bytes free."""
        self._must()
        with contextlib.suppress(OSError), (self.path / "ballast").open("wb", buffering=0) as sink:
            sink.write(bytes(max(0, shutil.disk_usage(self.path).free - left)))

    def read_only(self) -> None:
        """Refuse writes; waits for files that are just being written."""
        self._must()
        deadline = time.monotonic() + 5
        while problem := self._run("mount", "-o", "remount,ro", str(self.path)):
            if time.monotonic() > deadline:
                raise Missed(problem)

    def _must(self) -> None:
        if self.problem:
            raise Skip(f"cannot mount a small disk: {self.problem}")

    def mend(self) -> None:
        """Writable, with room."""
        if not self.problem:
            self._run("mount", "-o", "remount,rw", str(self.path))
        (self.path / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        if not self.problem:
            self._run("umount", "--lazy", str(self.path))


def digest_of(path: Path) -> tuple[int, str]:
    """Modification time, ns, and SHA-256 of a file."""
    return path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()


def same_landscape(path: Path, reference: xr.Dataset) -> None:
    """Raise `Violation` unless `path` holds the reference's landscape up to the rounding of a few tokens."""
    with xr.open_dataset(path) as found:
        data = found.load()

    def must(holds: Any, what: str) -> None:
        if not bool(holds):
            raise Violation(f"dataset: {what}")

    must(data.attrs["identity"] == reference.attrs["identity"], "another identity")
    must(set(data.data_vars) == set(reference.data_vars), "other variables")
    must(dict(data.sizes) == dict(reference.sizes), "other sizes")
    must(data.reward.notnull().all() and (data.status != 2).all(), "failed rollouts")
    origin = data.sel(alpha=0.0, beta=0.0)
    must((origin.kl_k1 == 0).all() and (origin.realised_step == 0).all(), "the origin is not exact")
    must(np.allclose(data.realised_step, reference.realised_step, rtol=1e-6), "other steps")
    # Another composition of batches may flip a token of one base completion; its scores are then another completion's.
    same = (data.base_tokens == reference.base_tokens) & (
        np.abs(data.base_sampled_logprob - reference.base_sampled_logprob) < 1e-2
    )
    must(int((~same).sum()) <= 1, f"{int((~same).sum())} of 18 base completions differ")
    must(float(np.abs(data.kl_k1 - reference.kl_k1).where(same, 0).max()) < 1e-2, "other KL")
    must(float((data.reward != reference.reward).mean()) < 0.02, "other rewards")
    must(float(data.recheck_max_difference.max()) < 1e-4, "the second look at the origin differs")
    servers = json.loads(data.attrs["servers"])
    must(any(one["origin_checked_after"] for one in servers), "the weights at the origin were not verified")


@dataclass
class Sweep:
    """One output directory from the first command to the dataset."""

    output: Path
    hosts: list[Host]
    reference: xr.Dataset | None
    disk: Disk
    rng: random.Random
    log: Path
    process: subprocess.Popen[str] | None = None
    mode: str = ""
    used: list[Host] = field(default_factory=list)
    kept: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Finished points as they were first seen."""
    spoiled: set[str] = field(default_factory=set)
    """Points that a fault of ours damaged."""
    done: bool = False
    errors: str = ""
    """What the last command that ended said."""

    @property
    def folder(self) -> Path:
        return self.output / NAME

    @property
    def dataset(self) -> Path:
        return self.output / f"landscape_{NAME}.nc"

    def points(self) -> list[Path]:
        return sorted((self.folder / "points").glob("a*.nc"))

    def check_points(self) -> None:
        """No finished point has vanished or changed, except those that we damaged."""
        present = {path.name: path for path in self.points()}
        for name, state in self.kept.items():
            if name in self.spoiled:
                continue
            if name not in present:
                raise Violation(f"point {name} vanished")
            if digest_of(present[name]) != state:
                raise Violation(f"point {name} was changed")
        aside = {path.name.split(".nc.")[0] + ".nc" for path in (self.folder / "points").glob("*.corrupt")}
        if aside - self.spoiled:
            raise Violation(f"healthy points were moved aside: {sorted(aside - self.spoiled)}")
        for name, path in present.items():
            if name not in self.kept and name not in self.spoiled:
                self.kept[name] = digest_of(path)

    def arguments(self, mode: str, hosts: list[Host]) -> list[str]:
        patience = "150" if mode == "wait" else "0"
        timeout = ["--server.request-timeout", "3"] if mode == "hasty" else []
        addresses = json.dumps([host.gate.url for host in hosts])
        return ["--server.urls", addresses, "--server.patience", patience, *timeout]

    def start(self, modes: tuple[str, ...] = ("one", "two", "wait", "hasty")) -> None:
        """Start the command unless one of these modes is running already."""
        if self.process is not None:
            if self.mode in modes:
                return
            self.kill()
        self.mode = self.rng.choice(modes)
        count = 2 if self.mode == "two" else 1
        if sum(host.ready() for host in self.hosts) < count:
            for host in self.hosts:
                host.wait()
        self.used = [host for host in self.hosts if host.ready()][:count]
        self.rng.shuffle(self.used)
        self.process = start_sweep(self.output, self.used[0].server, *self.arguments(self.mode, self.used))

    def host(self) -> Host:
        """A server that the command uses, alive."""
        for host in self.used:
            if host.ready():
                return host
        self.used[0].wait()
        return self.used[0]

    def kill(self) -> None:
        """kill -9 of the command."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def moment(self, at_least: int = 0) -> None:
        """Start the command if need be and wait for a random moment of it. Raises `Missed` if it finished first."""
        fresh = self.process is None
        self.start()
        early = fresh and not at_least and self.rng.random() < 0.3
        more = self.rng.randint(1, 2) if fresh else self.rng.randint(0, 1)
        target = 0 if early else max(at_least, min(POINTS, len(self.points()) + more))
        if self._until(lambda: len(self.points()) >= target):
            raise Missed
        if self._over(self.rng.uniform(0, 5.0 if early else 0.7)):
            raise Missed

    def _over(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        return self._until(lambda: time.monotonic() >= end)

    def _until(self, condition: Callable[[], bool]) -> bool:
        """Wait for it; whether the command ended first."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process is not None
            if self.process.poll() is not None:
                if self.ended() != REFUSED:
                    return True
                if self.mode != "hasty":
                    raise Violation(f"the same command did not continue:\n{self.errors}")
                self.start(("one",))
            if time.monotonic() > deadline:
                raise Violation(f"nothing moved for {PATIENCE:.0f} s")
            time.sleep(0.01)
        return False

    def ended(self, *codes: int) -> str:
        """Take the end of the command in; `codes` are those that the fault itself explains."""
        assert self.process is not None
        _, self.errors = self.process.communicate()
        code, self.process = self.process.returncode, None
        with self.log.open("a") as sink:
            sink.write(f"--- {self.output.name} {self.mode} ended with {code}\n{self.errors}\n")
        self.check_points()
        if "Traceback" in self.errors:
            raise Violation(f"a traceback:\n{self.errors}")
        if code == 0:
            self.done = True
            if self.reference is not None:
                same_landscape(self.dataset, self.reference)
            return WENT_ON
        if code in codes:
            return STOPPED
        if code == 2 and sum(line.startswith("error: ") for line in self.errors.splitlines()) == 1:
            return REFUSED
        raise Violation(f"ended with {code}:\n{self.errors}")

    def settle(self, *codes: int) -> str:
        """After a fault: until the command ends or has finished two more points (one may have been in flight)."""
        before, deadline = len(self.points()), time.monotonic() + PATIENCE
        assert self.process is not None
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                return self.ended(*codes)
            if len(self.points()) > before + 1:
                self.check_points()
                return WENT_ON
            time.sleep(0.02)
        raise Violation(f"the command hung for {PATIENCE:.0f} s")

    def finish(self) -> None:
        """Without further faults, to the dataset."""
        if not self.done:
            self.start()
            self._until(lambda: False)


Fault = Callable[[Sweep], tuple[str, str]]
KINDS: dict[str, tuple[int, Fault]] = {}
"""Name → (weight in the schedule, the fault: strikes a sweep, returns a detail and the outcome)."""


def fault(name: str, weight: int) -> Callable[[Fault], Fault]:
    """Register a kind of fault."""

    def register(function: Fault) -> Fault:
        KINDS[name] = (weight, function)
        return function

    return register


def _alive(sweep: Sweep) -> subprocess.Popen[str]:
    assert sweep.process is not None
    if sweep.process.poll() is not None:
        if sweep.ended() == REFUSED and sweep.mode != "hasty":
            raise Violation(f"the same command did not continue:\n{sweep.errors}")
        raise Missed
    return sweep.process


@fault("client: kill -9", 6)
def kill_client(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    _alive(sweep).send_signal(signal.SIGKILL)
    return "", sweep.settle(-signal.SIGKILL)


@fault("client: Ctrl-C", 6)
def interrupt_client(sweep: Sweep) -> tuple[str, str]:
    sweep.moment(at_least=len(sweep.points()) + 1)
    _alive(sweep).send_signal(signal.SIGINT)
    return "", sweep.settle(130)


def _suspend(sweep: Sweep, process: psutil.Process) -> tuple[str, str]:
    seconds = sweep.rng.uniform(0.5, 4.0)
    try:
        process.suspend()
        time.sleep(seconds)
        process.resume()
    except psutil.NoSuchProcess:
        raise Missed from None
    return f"{sweep.mode}, {seconds:.1f} s", sweep.settle()


@fault("client: stopped for a while", 4)
def stop_client(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    return _suspend(sweep, psutil.Process(_alive(sweep).pid))


@fault("server: API process stopped for a while", 4)
def stop_api(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    _alive(sweep)
    return _suspend(sweep, sweep.host().processes()["api"])


@fault("server: engine stopped for a while", 4)
def stop_engine(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    _alive(sweep)
    found = sweep.host().processes()
    return _suspend(sweep, found[sweep.rng.choice([name for name in found if name != "api"])])


def _kill_server(sweep: Sweep, part: str, dtype: str = "auto", at_least: int = 0) -> str:
    if any(host.thread is None for host in sweep.hosts):
        raise Skip("the server belongs to somebody else")
    for host in sweep.hosts:
        host.wait()
    sweep.moment(at_least)
    _alive(sweep)
    host = sweep.used[0]
    found = host.processes()
    name = "api" if part == "api" else sweep.rng.choice([name for name in found if name != "api"])
    found[name].kill()
    host.replace(dtype)
    return f"{sweep.mode}, {name}"


@fault("server: kill -9 of the API process", 3)
def kill_api(sweep: Sweep) -> tuple[str, str]:
    return _kill_server(sweep, "api"), sweep.settle()


@fault("server: kill -9 of the engine", 3)
def kill_engine(sweep: Sweep) -> tuple[str, str]:
    return _kill_server(sweep, "engine"), sweep.settle()


@fault("server: restarted at its address in another dtype", 1)
def restart_other(sweep: Sweep) -> tuple[str, str]:
    sweep.start(("one",))
    detail = _kill_server(sweep, "api", "bfloat16", at_least=len(sweep.points()) + 1)
    host = sweep.used[0]
    try:
        outcome = sweep.settle()
        host.wait()
        if outcome == REFUSED:
            sweep.mode, sweep.process = "one", start_sweep(sweep.output, host.server, *sweep.arguments("one", [host]))
            if sweep.settle() != REFUSED or "bfloat16" not in sweep.errors:
                raise Violation(f"another dtype was not refused by name:\n{sweep.errors}")
    finally:
        host.wait()
        host.replace()
    return detail, outcome


@fault("server: another with other weights at its address", 3)
def restart_elsewhere(sweep: Sweep) -> tuple[str, str]:
    for host in sweep.hosts:
        host.wait()
    if len(sweep.hosts) < 2:
        raise Skip("needs two servers")
    sweep.start(("one", "wait"))
    sweep.moment()
    _alive(sweep)
    other = next(host for host in sweep.hosts if host is not sweep.used[0])
    _meddle(sweep, other, load="snapshot", move=True)
    sweep.used[0].gate.lead_to(_port(other.server))
    try:
        return sweep.mode, sweep.settle()
    finally:
        sweep.kill()
        sweep.used[0].gate.lead_to(_port(sweep.used[0].server))


@fault("connection: cut", 12)
def cut(sweep: Sweep) -> tuple[str, str]:
    route = sweep.rng.choice(["info", "load", "move", "checksums", "generate", "score"])
    closed = sweep.rng.choice([0.0, 1.0])
    if route in ("load", "checksums") and sweep.rng.random() < 0.7:
        sweep.kill()
    sweep.start()
    gate = sweep.host().gate
    gate.cut_at(route, closed)
    try:
        if sweep._until(gate.was_cut.is_set) and not gate.was_cut.is_set():
            raise Missed
    except Violation:
        if not gate.was_cut.is_set():
            raise
        return f"{sweep.mode}, {route}", REFUSED
    if sweep.process is None:
        return f"{sweep.mode}, {route}", WENT_ON
    return f"{sweep.mode}, {route}, closed for {closed:.0f} s", sweep.settle()


@fault("connection: delayed", 5)
def delay(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    _alive(sweep)
    each = sweep.rng.choice([0.05, 0.3, 1.0, 3.5])
    gate = sweep.host().gate
    gate.delay = each
    end = time.monotonic() + 4
    process = _alive(sweep)
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    gate.delay = 0.0
    return f"{sweep.mode}, {each} s a packet", sweep.settle()


@fault("disk: full", 5)
def full_disk(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    process = _alive(sweep)
    left = sweep.rng.choice([0, 4096, 40_000])
    sweep.disk.fill(left)
    return f"{left} bytes left", _until_mended(sweep, process)


@fault("disk: read-only for a while", 5)
def read_only(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    process = _alive(sweep)
    sweep.disk.read_only()
    return "", _until_mended(sweep, process)


def _until_mended(sweep: Sweep, process: subprocess.Popen[str]) -> str:
    end = time.monotonic() + sweep.rng.uniform(1.0, 6.0)
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    sweep.disk.mend()
    return sweep.settle()


@fault("client: no file handles left", 5)
def file_handles(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    process = _alive(sweep)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = psutil.Process(process.pid).num_fds()
        spare = sweep.rng.randint(0, 3)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (used + spare, hard))
        end = time.monotonic() + 3
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is None:
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (hard, hard))
    except (psutil.NoSuchProcess, ProcessLookupError):
        raise Missed from None
    return f"{used} in use, {spare} to spare", sweep.settle()


def damaged(content: bytes, how: str, rng: random.Random) -> bytes:
    """What a fault makes of a file."""
    if how == "flipped":
        at = rng.randrange(len(content))
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    if how == "truncated":
        return content[: rng.randrange(1, len(content))]
    return b"" if how == "emptied" else rng.randbytes(rng.randint(1, 2 * len(content)))


def _damage(sweep: Sweep, path: Path, how: str) -> tuple[str, str]:
    """Damage a file while no command runs, start the command, and see it repaired or refused by name."""
    backup = path.read_bytes()
    point = path.parent.name == "points"
    if point:
        sweep.spoiled.add(path.name)
        sweep.kept.pop(path.name, None)
    path.write_bytes(damaged(backup, how, sweep.rng))
    left = path.read_bytes()
    detail = f"{path.name if not point else 'point'} {how}"

    def aside() -> bool:
        return any(path.parent.glob(f"{path.name}.*.corrupt"))

    earlier = set(path.parent.glob("*.corrupt"))
    before = len(sweep.points())
    sweep.start(("one", "two", "wait"))
    assert sweep.process is not None
    deadline = time.monotonic() + PATIENCE
    while sweep.process.poll() is None and not aside() and len(sweep.points()) <= before:
        if time.monotonic() > deadline:
            raise Violation("the command hung over a damaged file")
        time.sleep(0.02)
    outcome = sweep.ended() if sweep.process.poll() is not None else WENT_ON
    if outcome == REFUSED:
        if path.name not in sweep.errors:
            raise Violation(f"refused without naming {path.name}:\n{sweep.errors}")
        if set(path.parent.glob("*.corrupt")) != earlier:
            raise Violation("files were moved aside beside a refusal")
        if path.name == "base.nc" and sweep.rng.random() < 0.4:
            path.rename(path.with_name("base.nc.moved"))
            sweep.spoiled |= {one.name for one in sweep.points()}
            return f"{detail}, moved away", outcome
        if path.name == "journal.json" and sweep.rng.random() < 0.5:
            path.unlink()
            return f"{detail}, moved away", outcome
        path.write_bytes(backup)
        return f"{detail}, put back", outcome
    if aside():
        return detail, REPAIRED
    if point and path.exists() and path.read_bytes() == left:
        # The values are untouched: the dataset says so in the end.
        sweep.spoiled.discard(path.name)
    return f"{detail}, without effect", outcome


HOW = ("flipped", "truncated", "emptied", "garbage")


@fault("file: damaged midway", 8)
def damage_midway(sweep: Sweep) -> tuple[str, str]:
    sweep.moment(at_least=1)
    sweep.kill()
    sweep.check_points()
    choice = sweep.rng.choice(["point", "point", "base.nc", "journal.json"])
    path = sweep.rng.choice(sweep.points()) if choice == "point" else sweep.folder / choice
    return _damage(sweep, path, sweep.rng.choice(HOW))


@fault("file: damaged after the last point", 8)
def damage_finished(sweep: Sweep) -> tuple[str, str]:
    sweep.finish()
    sweep.dataset.unlink()
    sweep.done = False
    choice = sweep.rng.choice(["point", "base.nc", "journal.json", "recheck.nc", "recheck.nc", "server.json"])
    path = sweep.rng.choice(sweep.points()) if choice == "point" else sweep.folder / choice
    return _damage(sweep, path, sweep.rng.choice(HOW))


@fault("two clients: one output, two servers", 3)
def shared_output(sweep: Sweep) -> tuple[str, str]:
    sweep.kill()
    if len(sweep.hosts) < 2:
        raise Skip("needs two servers")
    for host in sweep.hosts:
        host.wait()
    first, second = sweep.hosts[:2]
    sweep.mode, sweep.used = "one", [first]
    other = start_sweep(sweep.output, second.server, *sweep.arguments("one", [second]))
    time.sleep(sweep.rng.uniform(0, 2))
    sweep.process = start_sweep(sweep.output, first.server, *sweep.arguments("one", [first]))
    _, errors = other.communicate(timeout=PATIENCE)
    if other.returncode or "Traceback" in errors:
        raise Violation(f"the other client ended with {other.returncode}:\n{errors}")
    return "", sweep.settle()


@fault("two clients: one server", 3)
def shared_server(sweep: Sweep) -> tuple[str, str]:
    sweep.kill()
    sweep.start(("one", "wait"))
    slice_seed = sweep.rng.choice([0, 1])
    beside = sweep.output.with_name(f"{sweep.output.name}-beside")
    host = sweep.used[0]
    other = start_sweep(
        beside, host.server, *sweep.arguments("wait", [host]), "--slice.seeds", json.dumps([slice_seed])
    )
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
    noticed = "weight" in sweep.errors + errors
    finished = beside / f"landscape_{NAME}.nc"
    if slice_seed == 0 and finished.exists() and sweep.reference is not None:
        same_landscape(finished, sweep.reference)
    shutil.rmtree(beside, ignore_errors=True)
    if not noticed and other.returncode == 0 and sweep.done:
        return "they never met", outcome
    if not noticed and outcome == REFUSED:
        raise Violation(f"refused for another reason:\n{sweep.errors}")
    return f"{sweep.mode}, slice {slice_seed}, {'noticed' if noticed else 'not met'}", outcome


def _meddle(sweep: Sweep, host: Host, load: str = "", move: bool = False) -> None:
    """What another client might do: load another slice or snapshot, move."""

    async def work() -> None:
        async with LandscapeClient(host.server.url, host.server.token) as client:
            if load:
                spec = SliceSpec(seed=7).as_dict()
                await client.load(str(_altered(host) if load == "snapshot" else POLICY), spec)
            elif (await client.info())["loaded"] is None:
                return
            if move:
                await client.move(0.11, -0.07)

    asyncio.run(work())


def _altered(host: Host) -> Path:
    """A snapshot with the shipped policy's shapes and other weights, below a root of the server."""
    path = host.roots[-1] / "altered" / "step_000003"
    if not path.exists():
        from safetensors.torch import load_file, save_file

        shutil.copytree(POLICY, path)
        tensors = {name: tensor * 1.5 for name, tensor in load_file(path / "model.safetensors").items()}
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        (path / "manifest.json").unlink(missing_ok=True)
    return path


def _meddled(sweep: Sweep, load: str, chance: float) -> tuple[str, str]:
    """Strike a running command with `_meddle`; another client's load comes with a move at this chance."""
    sweep.moment()
    _alive(sweep)
    move = sweep.rng.random() < chance
    _meddle(sweep, sweep.host(), load, move)
    return f"{sweep.mode}{', moved' if move else ''}", sweep.settle()


@fault("weights: moved behind the client's back", 4)
def meddle_move(sweep: Sweep) -> tuple[str, str]:
    sweep.moment()
    _alive(sweep)
    _meddle(sweep, sweep.host(), move=True)
    return sweep.mode, sweep.settle()


@fault("weights: another slice loaded behind the client's back", 4)
def meddle_slice(sweep: Sweep) -> tuple[str, str]:
    return _meddled(sweep, "slice", 0.3)


@fault("weights: another snapshot loaded behind the client's back", 4)
def meddle_snapshot(sweep: Sweep) -> tuple[str, str]:
    return _meddled(sweep, "snapshot", 0.5)


class Campaign:
    """Hosts, a disk, the undisturbed dataset, and the sweeps that faults strike."""

    def __init__(self, hosts: list[Host], folder: Path, seed: int) -> None:
        self.hosts, self.folder, self.seed = hosts, folder, seed
        self.disk = Disk(folder / "disk")
        self.log = folder / "commands.log"
        self.sweeps = 0
        undisturbed = self._sweep(None, random.Random(f"{seed} undisturbed"))
        undisturbed.finish()
        self.reference = xr.load_dataset(undisturbed.dataset)
        shutil.rmtree(undisturbed.output)

    def _sweep(self, reference: xr.Dataset | None, rng: random.Random) -> Sweep:
        self.sweeps += 1
        output = self.disk.path / f"sweep{self.sweeps:03d}"
        return Sweep(output, self.hosts, reference, self.disk, rng, self.log)

    def run(self, kinds: dict[int, str], until: float = float("inf")) -> Iterator[dict[str, Any]]:
        """Strike one fault after another, index → kind; yields records when the sweep that they struck is verified."""
        sweep: Sweep | None = None
        records: list[dict[str, Any]] = []
        misses, waiting = 0, list(kinds)
        while waiting and time.monotonic() < until:
            index = waiting[0]
            rng = random.Random(f"{self.seed} {index} {misses}")
            sweep = sweep or self._sweep(self.reference, rng)
            sweep.rng = rng
            record = {"index": index, "kind": kinds[index], "detail": "", "sweep": sweep.output.name}
            started = time.monotonic()
            over = False
            try:
                record["detail"], record["outcome"] = KINDS[kinds[index]][1](sweep)
            except Missed:
                over = True
            except Skip as reason:
                record |= {"outcome": SKIPPED, "detail": str(reason)}
            except Violation as problem:
                record |= {"outcome": FAILED, "detail": str(problem)}
            self._calm()
            if over:
                misses += 1
            else:
                record["seconds"] = round(time.monotonic() - started, 1)
                records.append(record)
                waiting.pop(0)
                misses = 0
            failed = record.get("outcome") == FAILED
            if over or failed or sweep.done:
                yield from self._verified(sweep, records, failed)
                sweep, records = None, []
        if sweep is not None:
            yield from self._verified(sweep, records, False)

    def _verified(self, sweep: Sweep, records: list[dict[str, Any]], failed: bool) -> list[dict[str, Any]]:
        """The records of a sweep, after it was finished and its dataset compared."""
        try:
            if not failed:
                sweep.finish()
        except Violation as problem:
            records = [record | {"outcome": FAILED, "detail": str(problem)} for record in records]
        sweep.kill()
        shutil.rmtree(sweep.output, ignore_errors=True)
        return records

    def _calm(self) -> None:
        self.disk.mend()
        for host in self.hosts:
            host.gate.calm()

    def close(self) -> None:
        self.disk.close()


def schedule(count: int, seed: int, kinds: list[str]) -> list[str]:
    """`count` kinds: each as often as its weight asks, in an order drawn from the seed."""
    deck = [kind for kind in kinds for _ in range(KINDS[kind][0])]
    rng, drawn = random.Random(seed), []
    while len(drawn) < count:
        rng.shuffle(deck)
        drawn += deck
    return drawn[:count]


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table: one line per kind of fault, one column per outcome."""
    counts = Counter((record["kind"], record["outcome"]) for record in records)
    columns = [outcome for outcome in OUTCOMES if any(key[1] == outcome for key in counts)]
    lines = [" | ".join(["| fault", "struck", *columns]) + " |", "|---" * (len(columns) + 2) + "|"]
    for kind in [*(kind for kind in KINDS if any(key[0] == kind for key in counts)), "all"]:
        row = [sum(n for (k, o), n in counts.items() if kind in (k, "all") and o == column) for column in columns]
        lines.append(" | ".join([f"| {kind}", str(sum(row)), *(str(n or "") for n in row)]) + " |")
    return "\n".join(lines)


def _strike(options: argparse.Namespace, kinds: dict[int, str], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two servers, and the faults that are still to come; each record is appended to the results at once."""
    records: list[dict[str, Any]] = []
    started = time.monotonic()
    until = started + 60 * options.minutes
    spent = before[-1]["wall_seconds"] if before else 0.0
    with tempfile.TemporaryDirectory(prefix="rlvr-faults-") as name:
        folder = Path(name)
        roots = [POLICY, folder / "roots"]
        roots[1].mkdir()
        hosts: list[Host] = []
        starters = [
            threading.Thread(target=lambda n=n: hosts.append(Host.start(roots, folder / f"server{n}.log")))
            for n in range(2)
        ]
        for starter in starters:
            starter.start()
        for starter in starters:
            starter.join()
        campaign = Campaign(hosts, folder, options.seed)
        try:
            for record in campaign.run(kinds, until):
                record["wall_seconds"] = round(spent + time.monotonic() - started, 1)
                records.append(record)
                with options.results.open("a") as sink:
                    sink.write(json.dumps(record) + "\n")
                print(f"{record['index']:4d}  {record['kind']}: {record['outcome']} ({record['detail']})", flush=True)
        finally:
            shutil.copy(campaign.log, options.results.with_suffix(".log"))
            for host in hosts:
                host.close()
            campaign.close()
    return records


def main() -> int:
    """Command line; returns 1 if anything that must hold did not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=None, help="parts of names; default: all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no fault after so many minutes")
    parser.add_argument("--results", type=Path, default=Path("outputs/faults.jsonl"), help="records; continued")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if options.kinds is None or any(part in kind for part in options.kinds)]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    records = [json.loads(line) for line in lines]
    if len(records) < options.faults:
        done = {record["index"] for record in records}
        drawn = enumerate(schedule(options.faults, options.seed, kinds))
        records += _strike(options, {index: kind for index, kind in drawn if index not in done}, records)
    print(table(records))
    outcomes = Counter(record["outcome"] for record in records)
    seconds = records[-1]["wall_seconds"] if records else 0.0
    print(json.dumps({"faults": len(records), "seconds": seconds, "outcomes": outcomes, "seed": options.seed}))
    return 1 if outcomes[FAILED] else 0


if __name__ == "__main__":
    sys.exit(main())
