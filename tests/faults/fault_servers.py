"""What stands around a sweep that faults strike: gates, servers behind them, small disks, commands in processes.

Servers are real ones (`RealHost`) or toy servers: the real routes over an engine without weights (`ToyHost`). A toy
server is a process of its own too, so it can be stopped and killed. Commands on toy servers are forked from a process
that has imported everything, which saves the seconds that Python imports for; on real servers they are what users type.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from conftest import HELPERS, POLICY, ServerThread
from toy_engine import FAILURES, FOREIGN, TOKEN
from toy_engine import main as serve_toy

from rlvr_landscape_plugin.config import ServerConfig
from rlvr_landscape_plugin.serving.launch import LocalServer

PATIENCE = 240.0
"""Seconds in which a command must end or finish another point."""


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
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, back_writer, True))
                both.create_task(self._pump(back_reader, writer, False))
        except* OSError:
            pass  # one end was reset, which the other end shall see at once
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


class Host(ABC):
    """One server behind its gate."""

    def __init__(self, roots: list[Path], port: int) -> None:
        self.roots, self.gate = roots, Gate(port)
        """Directories that the server may read from; the last one may be written to."""
        self._starting: threading.Thread | None = None

    @property
    @abstractmethod
    def server(self) -> LocalServer:
        """The server that is behind the gate now."""

    @property
    @abstractmethod
    def mortal(self) -> bool:
        """Whether the server may be killed."""

    @abstractmethod
    def processes(self) -> dict[str, psutil.Process]:
        """`api`, and `engine` and the like where they are others, by what they are."""

    @abstractmethod
    def restart(self, dtype: str) -> None:
        """End what is left of the server and start another."""

    @property
    def port(self) -> int:
        return port_of(self.server)

    def replace(self, dtype: str = "auto") -> None:
        """End what is left of the server and start another behind the same gate, in the background."""

        def work() -> None:
            self.restart(dtype)
            self.gate.target = self.port

        self._starting = threading.Thread(target=work)
        self._starting.start()

    def ready(self) -> bool:
        """Whether no replacement is under way."""
        return self._starting is None or not self._starting.is_alive()

    def wait(self) -> None:
        """Until a replacement answers."""
        if self._starting is not None:
            self._starting.join()

    def mend(self) -> None:
        """As if nothing had been done to it."""
        self.gate.calm()

    def close(self) -> None:
        self.wait()
        self.gate.close()


def port_of(server: LocalServer) -> int:
    return int(server.url.rsplit(":", 1)[1])


class RealHost(Host):
    """A real vLLM server. `thread` is None for one that belongs to somebody else and must live."""

    def __init__(self, server: LocalServer, roots: list[Path], thread: ServerThread | None = None) -> None:
        super().__init__(roots, port_of(server))
        self._server, self._thread = server, thread

    @classmethod
    def start(cls, roots: list[Path], log: Path) -> RealHost:
        """A server of one's own."""
        thread = ServerThread(ServerConfig(token=TOKEN), POLICY, roots, log)
        return cls(thread.server, roots, thread)

    @property
    def server(self) -> LocalServer:
        return self._server

    @property
    def mortal(self) -> bool:
        return self._thread is not None

    def processes(self) -> dict[str, psutil.Process]:
        (api,) = psutil.Process(self.server.pid).children()
        found = {"api": api}
        for child in api.children(recursive=True):
            name = " ".join(child.cmdline()[:1])
            if "EngineCore" in name or "Worker" in name:
                found["engine" if "EngineCore" in name else "worker"] = child
        return found

    def restart(self, dtype: str) -> None:
        assert self._thread is not None
        self._thread.close()
        self._thread = ServerThread(ServerConfig(token=TOKEN, dtype=dtype), POLICY, self.roots, self._server.log)
        self._server = self._thread.server

    def close(self) -> None:
        super().close()
        if self._thread is not None:
            self._thread.close()


class ToyHost(Host):
    """A toy server in a process of its own, with a small disk of its own for its temporary files."""

    SLOW = 0.03
    """Seconds that a completion takes, so that there are moments to strike at."""

    def __init__(self, roots: list[Path], folder: Path) -> None:
        self.control = folder
        folder.mkdir(parents=True)
        self.temporary = Disk(folder / "tmp", "256k")
        self._roots = roots
        self._start("float32")
        super().__init__(roots, port_of(self.server))

    @property
    def server(self) -> LocalServer:
        return self._server

    @property
    def mortal(self) -> bool:
        return True

    def processes(self) -> dict[str, psutil.Process]:
        return {"api": psutil.Process(self.server.pid)}

    def _start(self, dtype: str) -> None:
        address = self.control / "url.txt"
        address.unlink(missing_ok=True)
        self._process = CONTEXT.Process(target=_serve, args=(self.control, self._roots, dtype, self.SLOW))
        self._process.start()
        deadline = time.monotonic() + 120
        while not address.exists():
            if not self._process.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the toy server did not start")
            time.sleep(0.01)
        assert self._process.pid is not None
        self._server = LocalServer(address.read_text(), TOKEN, self._process.pid, self.control / "server.log")

    def restart(self, dtype: str) -> None:
        self._process.kill()
        self._process.join()
        self._start("float32" if dtype == "auto" else dtype)

    def fail(self, *outcomes: str) -> None:
        """What its next moves do: `dirty`, `restored`, `unchanged`, `raise`."""
        write_at_once(self.control / FAILURES, json.dumps(outcomes))

    def update_behind(self, version: str) -> None:
        """Somebody else updates the weights, past the routes."""
        write_at_once(self.control / FOREIGN, version)

    def mend(self) -> None:
        super().mend()
        self.temporary.mend()
        for name in (FAILURES, FOREIGN):
            (self.control / name).unlink(missing_ok=True)

    def close(self) -> None:
        super().close()
        self._process.kill()
        self._process.join()
        self.temporary.close()


def _serve(control: Path, *arguments: Any) -> None:
    """In a process of its own: a toy server, whose words go to a log."""
    with (control / "server.log").open("ab") as sink:
        for number in (1, 2):
            os.dup2(sink.fileno(), number)
    serve_toy(control, *arguments)


def write_at_once(path: Path, text: str) -> None:
    """Write a file that another process may read at any moment."""
    scratch = path.with_name(f"{path.name}.new")
    scratch.write_text(text)
    os.replace(scratch, path)


class Disk:
    """A directory on a small disk of its own, if this machine lets us mount one."""

    def __init__(self, path: Path, size: str = "6m") -> None:
        self.path = path
        path.mkdir()
        self.problem = self._run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))

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


CONTEXT = multiprocessing.get_context("forkserver")
SWEEPING = (
    *(
        "netCDF4",
        "xarray",
        "xarray.computation.nanops",
        "dask.array",
        "verifiers.v1",
        "uvicorn",
        "fastapi",
        "toy_engine",
    ),
    *(
        f"rlvr_landscape_plugin.{name}"
        for name in ("episodes", "tracking", "store", "designs.grid", "serving.endpoint")
    ),
    *(f"rlvr_landscape_plugin.sweep.{name}" for name in ("command", "run", "follow", "point", "range_search")),
)
TRAINING = (
    *("torch", "transformers", "trl", "accelerate"),
    *(f"rlvr_landscape_plugin.trl.{name}" for name in ("train", "trainer", "server")),
)


def prepare_to_fork(training: bool = False) -> None:
    """Say what commands import, before the first one is forked."""
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    places = [str(HELPERS), str(HELPERS / "tasksets"), str(Path(__file__).parent), str(HELPERS.parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])
    sys.path[:0] = places
    CONTEXT.set_forkserver_preload([*SWEEPING, *(TRAINING if training else ()), "fault_servers", "fault_warm_up"])


def _run(function: Callable[..., int], arguments: tuple[Any, ...], out: str, environment: dict[str, str]) -> None:
    """In the forked process: call a command's main function as the shell would."""
    with open(out, "wb") as sink:
        for number in (1, 2):
            os.dup2(sink.fileno(), number)
    os.environ |= environment
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = function(*arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


class Forked:
    """A command in a forked process, as far as `subprocess.Popen` goes. What it says is read from a file."""

    def __init__(self, function: Callable[..., int], *arguments: Any, **environment: str) -> None:
        handle, self._out = tempfile.mkstemp(prefix="rlvr-faults-", suffix=".txt")
        os.close(handle)
        self._process = CONTEXT.Process(target=_run, args=(function, arguments, self._out, environment))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("the forked command", timeout or 0.0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to both streams, as the second text."""
        self.wait(timeout)
        said = Path(self._out)
        text = said.read_text() if said.exists() else ""
        said.unlink(missing_ok=True)
        return "", text

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Command = subprocess.Popen[str] | Forked
