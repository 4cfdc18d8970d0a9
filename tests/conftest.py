"""What tests share: the shipped policy, a real server for the whole session, and sweeps as a user runs them."""

from __future__ import annotations

import contextlib

with contextlib.suppress(ImportError):
    # vLLM imports it late, and it refuses to load once a library has loaded parts of the standard library's distutils.
    import setuptools  # noqa: F401

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import TOKEN as FAKE_TOKEN
from fake_server import FakeServer
from hypothesis import settings

from rlvr_landscape_plugin.config import ServerConfig
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.serving.launch import LocalServer, local_server
from rlvr_landscape_plugin.snapshot import SHIPPED

ROOT = Path(__file__).parents[1]
POLICY = SHIPPED["tiny-sorter"]
# A busy machine is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
TASKSET = {"min_turns": 2, "max_turns": 2, "max_names_per_turn": 3, "seed": 12345}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run; server tests come last."""
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if "server" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed (extra cpu or gpu)"))
    items.sort(key=lambda item: "server" in item.keywords)


class ServerThread:
    """A local server held open by an event loop in a thread, so that plain tests can use it."""

    def __init__(self, config: ServerConfig, model: Path, roots: list[Path], log: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._context = local_server(config, model, roots, log)
        self.server: LocalServer = self._call(self._context.__aenter__())

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        """End the server and the loop."""
        self._call(self._context.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


@pytest.fixture(scope="session")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that the session's server may read snapshots from."""
    return tmp_path_factory.mktemp("snapshots")


@pytest.fixture(scope="session")
def server(playground: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """One real vLLM server with the shipped policy, float32 on a CPU, prefix caching on."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    held = ServerThread(ServerConfig(), POLICY, [POLICY, playground], log)
    yield held.server
    held.close()


@pytest.fixture(scope="session")
def second_server(server: LocalServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """Another server with the shipped policy and the same token, warm: a first load takes longer than a small sweep."""
    log = tmp_path_factory.mktemp("second") / "server.log"
    with pytest.MonkeyPatch.context() as patch:
        # vLLM binds every server of a machine to the same cores, where two of them starve each other.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", str(max(os.sched_getaffinity(0))))
        held = ServerThread(ServerConfig(token=server.token), POLICY, [POLICY], log)

    async def warm_up() -> None:
        async with LandscapeClient(held.server.url, held.server.token) as client:
            await client.load(str(POLICY), {"seed": 0})
            await client.move(0.0, 0.0)

    asyncio.run(warm_up())
    yield held.server
    held.close()


@pytest.fixture
def sweep(tmp_path: Path, server: LocalServer) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the sweep's command line against the session's server: `sweep("--seed", "1")`."""

    def run(*arguments: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
        process = start_sweep(tmp_path / "out", server, *arguments, token=token)
        out, err = process.communicate(timeout=400)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    """The routes without vLLM, with a toy policy: sweeps of seconds."""
    with FakeServer() as server:
        yield server


QUIZ = """
snapshots = ["tiny-sorter"]
[grid.alpha]
min = -0.1
max = 0.15
points = 2
[grid.beta]
min = -0.05
max = 0.1
points = 4
[env]
id = "tiny-quiz"
num_prompts = 4
rollouts = 3
[sampling]
max_tokens = 12
"""
"""A small sweep for the fake server: 3 × 4 points, tasks that answer with a length."""
HELPERS = Path(__file__).parent / "helpers"


@pytest.fixture
def sweep_command(tmp_path: Path) -> Callable[..., list[str]]:
    """`sweep_command(server, "--seed", "1")`: the arguments of a small sweep on fake servers."""

    def command(*given: FakeServer | str, config: str = QUIZ, output: Path | None = None) -> list[str]:
        file = tmp_path / "sweep.toml"
        file.write_text(config)
        servers = [item.url for item in given if isinstance(item, FakeServer)]
        arguments = ["@", str(file), "--output", str(output or tmp_path / "out"), "--server.token", FAKE_TOKEN]
        arguments += ["--server.urls", json.dumps(servers), "--server.patience", "0"]
        return arguments + [item for item in given if isinstance(item, str)]

    return command


@pytest.fixture
def sweep_here(
    sweep_command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run a small sweep on fake servers in this process: `sweep_here(server, "--seed", "1")` → (exit code, output)."""
    monkeypatch.syspath_prepend(str(HELPERS / "tasksets"))

    def run(*given: FakeServer | str, **options: Any) -> tuple[int, str]:
        from rlvr_landscape_plugin.sweep import main

        capsys.readouterr()
        code = main(sweep_command(*given, **options))
        return code, "".join(capsys.readouterr())

    return run


def start_fake_sweep(command: list[str], module: str = "sweep") -> subprocess.Popen[str]:
    """Start the command `sweep_command` in a process of its own, to be killed or interrupted."""
    paths = [str(HELPERS), str(HELPERS / "tasksets"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", f"rlvr_landscape_plugin.{module}", *command],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SMALL = """
snapshots = ["tiny-sorter"]
[grid.alpha]
min = -0.1
max = 0.15
points = 2
[grid.beta]
min = -0.05
max = 0.1
points = 4
[env]
num_prompts = 6
rollouts = 3
taskset = { min_turns = 2, max_turns = 2, max_names_per_turn = 3, seed = 12345 }
[sampling]
max_tokens = 64
"""
"""3 × 4 points: not square, not symmetric, and the first axis gains its origin."""


def start_sweep(
    output: Path, server: LocalServer | None, *arguments: str, token: str | None = None, module: str = "sweep"
) -> subprocess.Popen[str]:
    """Start the command a user types; `server` None lets the sweep launch its own. A lost server is not waited for."""
    output.parent.mkdir(parents=True, exist_ok=True)
    config = output.parent / "sweep.toml"
    config.write_text(SMALL)
    env = dict(os.environ)
    given: list[str] = []
    if server is not None:
        env["RLVR_LANDSCAPE_TOKEN"] = server.token if token is None else token
        given = ["--server.urls", f'["{server.url}"]', "--server.patience", "0"]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", f"rlvr_landscape_plugin.{module}", "@", str(config), "--output", str(output)),
            *given,
            *arguments,
        ],
        env=env,
        # As at a terminal: a background job of a shell would hand down an ignored Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
