"""A landscape server with the routes that benchmarks need beside its own. Not a benchmark.

- `POST /benchmark/reload {"weights_path"}`: vLLM's own reload from disk, which vLLM offers over HTTP in its development
  mode only, in which a landscape server does not start.
- `POST /benchmark/worker {"method", "kwargs"}`: one method of `Probe` in every worker (`--worker-extension-cls`, vLLM's
  own way to add methods to a worker); the answers, one per worker.

Both want the bearer token, as the server's other routes do.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import runpy
import secrets
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

from rlvr_landscape_plugin.config import ServerConfig
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.serving.launch import LocalServer, command, environment, free_port, tail
from rlvr_landscape_plugin.serving.protocol import DIRECTIONS_MEMORY_VARIABLE

METHODS = ("probe_directions", "probe_memory", "probe_copy", "probe_write")
_COPIED_AT_ONCE = 2**30


class Address(Protocol):
    """Where a server is."""

    @property
    def url(self) -> str: ...
    @property
    def token(self) -> str: ...


class Probe:
    """Methods that vLLM adds to its workers."""

    device: Any
    weight_transfer_engine: Any

    def probe_directions(self, mode: str) -> str:
        """From the next load on, keep the directions so: `auto`, `float32`, `half` or `regenerated`.

        Drops the slice that is loaded, so that its memory is free; load before the next move.
        """
        self.weight_transfer_engine.shutdown()
        gc.collect()
        os.environ[DIRECTIONS_MEMORY_VARIABLE] = mode
        return mode

    def probe_memory(self, reset: bool) -> dict[str, int]:
        """Bytes in use now, and their peak since the last reset: torch's on a GPU, the process's on a CPU."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            found = {
                "now": torch.cuda.memory_allocated(self.device),
                "peak": torch.cuda.max_memory_allocated(self.device),
            }
            if reset:
                torch.cuda.reset_peak_memory_stats(self.device)
            return found
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        if reset:
            # Linux: 5 resets the peak (VmHWM).
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        return {"now": 1024 * int(lines["VmRSS"].split()[0]), "peak": 1024 * int(lines["VmHWM"].split()[0])}

    def probe_copy(self, touched: int, repeats: int) -> float:
        """Seconds of a copy within the device that reads and writes `touched` bytes in all; the median."""
        import torch

        size = min(touched // 2, _COPIED_AT_ONCE)
        source = torch.zeros(size, dtype=torch.uint8, device=self.device)
        sink = torch.ones_like(source)
        times = []
        for _ in range(repeats + 1):
            self._wait()
            started = time.perf_counter()
            left = touched // 2
            while left > 0:
                part = min(left, size)
                sink[:part].copy_(source[:part])
                left -= part
            self._wait()
            times.append(time.perf_counter() - started)
        return sorted(times[1:])[repeats // 2]

    def probe_write(self, alpha: float, beta: float) -> float:
        """Seconds of one write of θ + α δ + β η, without what surrounds it; the weights are then at (α, β)."""
        engine = self.weight_transfer_engine
        state = engine._state
        self._wait()
        started = time.perf_counter()
        engine._write(state.how, alpha, beta)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def serve() -> None:
    """vLLM's API server with the plugin and the routes above; `sys.argv` has its arguments."""
    from rlvr_landscape_plugin.serving import versions
    from rlvr_landscape_plugin.serving.endpoint import LandscapeEndpoint

    attach = LandscapeEndpoint.attach_router

    def attach_more(self: LandscapeEndpoint, app: FastAPI) -> None:
        async def reload_weights(request: Request) -> JSONResponse:
            await versions.pause(self._engine, readers=False)
            await self._engine.collective_rpc("reload_weights", kwargs=await request.json())
            await self._engine.reset_prefix_cache()
            await self._engine.resume_generation()
            return JSONResponse({})

        async def worker(request: Request) -> JSONResponse:
            body = await request.json()
            if body["method"] not in METHODS:
                raise HTTPException(404, f"no such method: {body['method']}")
            return JSONResponse({"workers": await self._engine.collective_rpc(body["method"], kwargs=body["kwargs"])})

        attach(self, app)
        for path, handler in (("reload", reload_weights), ("worker", worker)):
            app.add_api_route(f"/benchmark/{path}", self._guarded(handler), methods=["POST"])

    LandscapeEndpoint.attach_router = attach_more
    sys.argv.remove("--serve")
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


@contextlib.asynccontextmanager
async def serving(config: ServerConfig, model: Path, log: Path) -> AsyncIterator[LocalServer]:
    """A server for the policy in `model`, with the routes above; it may read `model` only."""
    port, token = free_port(), secrets.token_urlsafe(32)
    env = environment(config, token, [model])
    here = str(Path(__file__).parent)
    env["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [env.get("PYTHONPATH")])])
    interpreter, _, _, *arguments = command(config, model, port)
    with log.open("ab") as sink:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "rlvr_landscape_plugin.serving.tether", str(os.getpid())),
            *(interpreter, __file__, "--serve", *arguments, "--worker-extension-cls", "bench_server.Probe"),
            env=env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            # The tether ends its whole process group.
            start_new_session=True,
        )
    server = LocalServer(f"http://127.0.0.1:{port}", token, process.pid, log)
    try:
        await _healthy(server, process)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def _healthy(server: LocalServer, process: asyncio.subprocess.Process) -> None:
    """Wait until the server answers."""
    async with aiohttp.ClientSession() as session:
        while True:
            if process.returncode is not None:
                raise SystemExit(f"the server ended with code {process.returncode}\n{tail(server.log)}")
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with session.get(f"{server.url}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.25)


async def reload(server: Address, path: Path) -> None:
    """vLLM's own reload from disk, paused as a move is, and an empty prefix cache."""
    await _post(server, "reload", {"weights_path": str(path)})


async def in_workers(server: Address, method: str, **kwargs: Any) -> list[Any]:
    """What a method of `Probe` answers in each worker."""
    return (await _post(server, "worker", {"method": method, "kwargs": kwargs}))["workers"]


async def _post(server: Address, route: str, body: dict[str, Any]) -> Any:
    url, headers = f"{server.url}/benchmark/{route}", {"Authorization": f"Bearer {server.token}"}
    # A session of its own, so that nothing is kept open while the server pauses.
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), headers=headers) as session:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                raise SystemExit(f"{url}: {response.status} {await response.text()}")
            return await response.json()


@dataclass
class Timed:
    """Moves on one server."""

    moves: list[float]
    """Seconds of each, as the client sees it."""
    writes: list[float]
    """Of which the server wrote weights."""
    steps: list[float]
    """‖θ(α,β) − θ‖ / ‖θ‖ of each."""


def point(repeat: int) -> tuple[float, float]:
    """Where a repetition goes."""
    return 0.01 * (repeat + 1), -0.01 * repeat


async def timed_moves(client: LandscapeClient, repeats: int) -> Timed:
    """`repeats` moves after one that warms up and does not count."""
    timed = Timed([], [], [])
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        result = await client.move(*point(repeat))
        timed.moves.append(time.perf_counter() - started)
        timed.writes.append(result.seconds["write"])
        timed.steps.append(result.realised_step)
    return Timed(timed.moves[1:], timed.writes[1:], timed.steps[1:])


if __name__ == "__main__" and "--serve" in sys.argv:
    serve()
