"""Does throughput grow with servers, and does the client ever limit it?

    python benchmarks/scaling.py

First real servers: tiny-sorter, whole grid points of 128 episodes, one server against two, alternating. All processes
of a server, its front end included, are bound to one core; the client may run on both. So with one server the client
has the other core to itself, and with two it shares their cores. Then a simulated server that answers every turn and
every sequence after a fixed time and does no work worth mentioning: whatever rate comes out is the client's own limit,
with one process and with two (each with a simulated server). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table
from workload import MAX_TOKENS, TASKSET

from rlvr_landscape_plugin.config import EnvConfig, ServerConfig, SurrogateConfig
from rlvr_landscape_plugin.episodes import ChatFormat, EpisodeRunner, load_tasks, open_environment
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.serving.launch import local_server
from rlvr_landscape_plugin.serving.protocol import PROTOCOL, GenerateCall, ScoreCall, pack
from rlvr_landscape_plugin.snapshot import open_snapshot
from rlvr_landscape_plugin.sweep.point import PointMeter

REPLY = "<alphabetical_sorted>\nJohn Smith\nMary Jones\nPeter Young\n</alphabetical_sorted>"
GENERATION_SECONDS, SCORE_SECONDS = 0.5, 0.25
"""What the simulated server takes for a turn and for a sequence, whatever the load."""


@contextlib.contextmanager
def _core(core: int) -> Any:
    """Servers started inside compute on this core, and nothing of them runs elsewhere."""
    before, variable = os.sched_getaffinity(0), "VLLM_CPU_OMP_THREADS_BIND"
    given = os.environ.get(variable)
    os.sched_setaffinity(0, {core})
    os.environ[variable] = str(core)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        os.environ.pop(variable)
        if given is not None:
            os.environ[variable] = given


@contextlib.asynccontextmanager
async def _meter(url: str, token: str, prompts: int, rollouts: int, concurrent: int) -> AsyncIterator[PointMeter]:
    policy = open_snapshot("tiny-sorter").path
    env = open_environment(EnvConfig().id, TASKSET)
    async with LandscapeClient(url, token) as client:
        await client.load(str(policy), {"seed": 0})
        await client.move(0.0, 0.0)
        runner = EpisodeRunner(env, ChatFormat(policy), client, MAX_TOKENS, 1024, concurrent)
        yield PointMeter(client, runner, load_tasks(env, prompts), rollouts, 0, SurrogateConfig())


async def _points(meters: Sequence[PointMeter], points: int) -> float:
    """Seconds for `points` grid points, shared by the servers a point at a time, all of them warm."""
    base = await meters[0].base(_quiet)
    left = [(0.05, 0.01 * index) for index in range(points)]

    async def work(meter: PointMeter) -> None:
        while left:
            await meter.point(base, *left.pop(), _quiet)

    started = time.perf_counter()
    await asyncio.gather(*(work(meter) for meter in meters))
    return time.perf_counter() - started


def _quiet() -> None:
    pass


async def real(rounds: int) -> dict[str, float]:
    """Episodes per second with one and with two servers of one core each."""
    policy = open_snapshot("tiny-sorter").path
    cores = sorted(os.sched_getaffinity(0))
    prompts, rollouts, points = 32, 4, 24
    rates: dict[str, list[float]] = {"one": [], "two": []}
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        meters = []
        for core in cores[:2]:
            with _core(core):
                server = await stack.enter_async_context(
                    local_server(ServerConfig(), policy, [policy], folder / f"server{core}.log")
                )
            meters.append(await stack.enter_async_context(_meter(server.url, server.token, prompts, rollouts, 512)))
        await _points(meters, 2)
        for _ in range(rounds):
            for name, used in (("one", meters[:1]), ("two", meters)):
                rates[name].append(points * prompts * rollouts / await _points(used, points))
    return {name: statistics.median(values) for name, values in rates.items()}


def serve_simulated(port_out: Connection) -> None:
    """A landscape server that answers after a fixed time, in a process of its own."""
    from aiohttp import web

    reply = ChatFormat(open_snapshot("tiny-sorter").path).tokenizer.encode(REPLY + "<|im_end|>")
    body = {"tokens": pack(np.asarray(reply, np.int32)), "logprobs": pack(np.full(len(reply), -0.5, np.float32))}
    answer = msgspec.json.encode(body | {"finish": "stop"})[1:]

    @cache
    def scores(characters: int) -> bytes:
        tokens = characters * 3 // 4 // 4
        return msgspec.json.encode({"logprobs": pack(np.full(tokens - 1, -0.5, np.float32))})[1:]

    async def stream(request: web.Request, lines: list[bytes], seconds: float) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await asyncio.sleep(seconds)
        await response.write(b"".join(b'{"i":%d,' % index + line + b"\n" for index, line in enumerate(lines)))
        return response

    async def generate(request: web.Request) -> web.StreamResponse:
        call = msgspec.json.decode(await request.read(), type=GenerateCall)
        return await stream(request, [answer] * len(call.requests), GENERATION_SECONDS)

    async def score(request: web.Request) -> web.StreamResponse:
        call = msgspec.json.decode(await request.read(), type=ScoreCall)
        return await stream(request, [scores(len(text.rstrip("="))) for text in call.sequences], SCORE_SECONDS)

    async def move(_: web.Request) -> web.Response:
        return web.json_response({"version": "simulated", "realised_step": 0.0, "seconds": {}})

    async def facts(_: web.Request) -> web.Response:
        return web.json_response({"protocol": PROTOCOL, "load": "simulated"})

    async def serve() -> None:
        app = web.Application(client_max_size=2**28)
        app.add_routes(
            [
                *(web.post(f"/landscape/{name}", call) for name, call in (("generate", generate), ("score", score))),
                *(web.post(f"/landscape/{name}", call) for name, call in (("move", move), ("load", facts))),
            ]
        )
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port_out.send(site._server.sockets[0].getsockname()[1])  # pyright: ignore
        await asyncio.Event().wait()

    asyncio.run(serve())


def drive(url: str, episodes: int, start: Any, out: Connection) -> None:
    """One client process: whole points against a simulated server; sends (episodes, wall seconds, CPU seconds)."""

    async def run() -> None:
        async with _meter(url, "none", episodes // 16, 16, episodes) as meter:
            base = await meter.base(_quiet)
            start.wait()
            wall, cpu = time.perf_counter(), time.process_time()
            points = 3
            for index in range(points):
                await meter.point(base, 0.05, 0.01 * index, _quiet)
            out.send((points * episodes, time.perf_counter() - wall, time.process_time() - cpu))

    asyncio.run(run())


def simulated(processes: int, episodes: int) -> tuple[float, float]:
    """(episodes per second over all client processes, client CPU milliseconds per episode)."""
    context = multiprocessing.get_context("spawn")
    servers, clients, ends = [], [], []
    start = context.Barrier(processes)
    try:
        for _ in range(processes):
            here, there = context.Pipe()
            servers.append(context.Process(target=serve_simulated, args=(there,), daemon=True))
            servers[-1].start()
            url = f"http://127.0.0.1:{here.recv()}"
            end, far = context.Pipe()
            ends.append(end)
            clients.append(context.Process(target=drive, args=(url, episodes, start, far), daemon=True))
            clients[-1].start()
        results = [end.recv() for end in ends]
    finally:
        for process in [*clients, *servers]:
            process.terminate()
            process.join()
    rate = sum(count / wall for count, wall, _ in results)
    return rate, 1000 * sum(cpu for _, _, cpu in results) / sum(count for count, _, _ in results)


def main(rounds: int, episodes: int) -> None:
    """Both parts; table and JSON."""
    rates = asyncio.run(real(rounds))
    runs: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for _ in range(rounds):
        for count, results in runs.items():
            results.append(simulated(count, episodes))
    table = Table("", "episodes / s", "client CPU, ms per episode", title="two-turn episodes, tiny-sorter")
    for count, name in ((1, "one"), (2, "two")):
        table.add_row(f"{count} real server{'s' * (count > 1)}, one core each", f"{rates[name]:.0f}", "")
    medians = {count: np.median(results, axis=0).tolist() for count, results in runs.items()}
    for count, (rate, milliseconds) in medians.items():
        table.add_row(f"{count} client process{'es' * (count > 1)}, simulated", f"{rate:.0f}", f"{milliseconds:.2f}")
    Console().print(table)
    result = {
        "speedup_2_servers": round(rates["two"] / rates["one"], 2),
        "simulated_episodes_per_second": round(medians[1][0]),
        "simulated_episodes_per_second_2_processes": round(medians[2][0]),
        "client_cpu_ms_per_episode": round(medians[1][1], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="alternations of each pair")
    parser.add_argument("--episodes", type=int, default=4096, help="episodes in flight of each simulated point")
    given = parser.parse_args()
    main(given.rounds, given.episodes)
