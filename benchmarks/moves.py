"""How fast weights move: a landscape move, plain arithmetic on as many bytes, and write-and-reload.

    python benchmarks/moves.py [--models tiny 135m] [--modes half regenerated]

All three run in turn, the first and the last on the same live server, which uses the GPU if there is one. A move is one
POST /landscape/move: pause, θ + α δ + β η, empty the caches, resume. Plain arithmetic is
`p.copy_(base + a * d + b * e)` on float32 tensors of the checkpoint's shapes, on the server's kind of device, in this
process. Write-and-reload is what the published experiment did: perturb in a client process (the directions ready in
memory), write the whole checkpoint, pause, have vLLM reload it from disk, empty the caches, resume. Nothing forces the
file to the disk, so on one machine it travels through the page cache. vLLM offers the reload over HTTP in its
development mode only, in which a landscape server does not start; the benchmark's server has a route of its own for it.

The last line is one JSON object. `ratio_vs_axpy`: move over plain arithmetic (smaller is better). `ratio_vs_reload`:
write-and-reload over move (larger is better). `gb_per_s`: bytes that a move must touch (θ, δ and η in float32 read, the
weights written) over the time the workers took to write. `--modes` adds `<mode>_seconds`, a move on another server that
keeps the directions in that way (regenerated: to the same bits), and `<mode>_load_seconds`, taking the slice in.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import runpy
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import torch
from fastapi import FastAPI, Request
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from rlvr_landscape_plugin.config import ServerConfig
from rlvr_landscape_plugin.directions import SliceSpec
from rlvr_landscape_plugin.serving import versions
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.serving.endpoint import LandscapeEndpoint
from rlvr_landscape_plugin.serving.launch import command, environment, free_port, resolve_device
from rlvr_landscape_plugin.serving.worker.engine import MoveStats, Slice
from rlvr_landscape_plugin.snapshot import open_snapshot

TOKEN = "benchmark-on-loopback"


def model_135m(folder: Path) -> Path:
    """A random Qwen2 of about 135 M parameters (30 layers of 576, tied vocabulary of 49,152), float32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    for file in open_snapshot("tiny-sorter").path.glob("*token*"):
        shutil.copy(file, folder)
    return folder


class Arithmetic:
    """`p.copy_(base + a * d + b * e)` for each tensor of a checkpoint, float32."""

    def __init__(self, theta: dict[str, torch.Tensor], device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        self.device = device
        self.tensors = []
        for values in theta.values():
            base, d, e = values.float(), *(torch.randn(values.shape, generator=draw) for _ in "de")
            self.tensors.append(tuple(tensor.to(device) for tensor in (base.clone(), base, d, e)))

    def seconds(self, a: float, b: float) -> float:
        """Time of one pass over all tensors."""
        self._wait()
        started = time.perf_counter()
        for p, base, d, e in self.tensors:
            p.copy_(base + a * d + b * e)
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.asynccontextmanager
async def serving(
    model: Path, folder: Path, config: ServerConfig
) -> AsyncIterator[tuple[aiohttp.ClientSession, LandscapeClient, str]]:
    """A server with a route for vLLM's own reload, and its address."""
    port = free_port()
    env = environment(config, TOKEN, [model])
    interpreter, _, _, *arguments = command(config, model, port)
    with (folder / "server.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "rlvr_landscape_plugin.serving.tether", str(os.getpid())),
            *(interpreter, __file__, "--serve", *arguments),
            env=env,
            stdout=log,
            stderr=log,
            # The tether ends its whole process group.
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession() as session, LandscapeClient(url, TOKEN) as client:
            await healthy(session, url, process)
            yield session, client, url
    finally:
        process.terminate()
        await process.wait()


def point(repeat: int) -> tuple[float, float]:
    """Where a repetition goes."""
    return 0.01 * (repeat + 1), -0.01 * repeat


async def measure(model: Path, repeats: int, folder: Path) -> dict[str, Any]:
    """Median seconds of each way, and the checksums at the last point."""
    async with serving(model, folder, ServerConfig()) as (session, client, url):
        loaded = await client.load(str(model), {"seed": 0})
        theta = load_file(model / "model.safetensors")
        slice_ = Slice.build(theta, SliceSpec(0)).hold(torch.device("cpu"))
        arithmetic = Arithmetic(theta, torch.device(resolve_device(ServerConfig())))
        perturbed = folder / "perturbed"
        shutil.copytree(model, perturbed, dirs_exist_ok=True)
        moves, reloads, writes, plain = [], [], [], []
        for repeat in range(repeats + 1):
            alpha, beta = point(repeat)
            started = time.perf_counter()
            result = await client.move(alpha, beta)
            moves.append(time.perf_counter() - started)
            writes.append(result.seconds["write"])
            plain.append(arithmetic.seconds(alpha, beta))
            here = await client.checksums()
            started = time.perf_counter()
            tensors = dict(slice_.at(alpha, beta, torch.float32, MoveStats()))
            (perturbed / "model.safetensors").unlink()
            save_file(tensors, perturbed / "model.safetensors", {"format": "pt"})
            await reload(session, url, perturbed)
            reloads.append(time.perf_counter() - started)
            compare(here, await client.checksums())
    # The first of each warms caches up.
    return {
        "parameters": loaded["parameters"],
        "path": loaded["move_path"],
        "bytes": loaded["parameters"] * (12 + getattr(torch, loaded["dtype"]).itemsize),
        "move": statistics.median(moves[1:]),
        "write": statistics.median(writes[1:]),
        "reload": statistics.median(reloads[1:]),
        "arithmetic": statistics.median(plain[1:]),
        "load": loaded["seconds"],
        "checksums": here,
    }


async def measure_mode(
    model: Path, repeats: int, folder: Path, mode: Any, resident: list[dict[str, str]]
) -> dict[str, float]:
    """Median seconds of a move with the directions kept in another way; `resident`: checksums at the last point."""
    moves = []
    async with serving(model, folder, ServerConfig(directions_memory=mode)) as (_, client, _):
        loaded = await client.load(str(model), {"seed": 0})
        for repeat in range(repeats + 1):
            started = time.perf_counter()
            await client.move(*point(repeat))
            moves.append(time.perf_counter() - started)
        if mode == "regenerated":
            compare(resident, await client.checksums())
    return {f"{mode}_seconds": statistics.median(moves[1:]), f"{mode}_load_seconds": loaded["seconds"]}


def compare(ours: list[dict[str, str]], theirs: list[dict[str, str]]) -> None:
    """Both ways must have written the same bits, else they did not do the same work."""
    if ours != theirs:
        raise SystemExit("the two ways left different weights; the comparison is void")


async def reload(session: aiohttp.ClientSession, url: str, path: Path) -> None:
    """vLLM's own reload from disk, paused as a move is, and an empty prefix cache."""
    async with session.post(f"{url}/benchmark/reload", json={"weights_path": str(path)}) as response:
        if response.status != 200:
            raise SystemExit(f"reload: {response.status} {await response.text()}")


def serve() -> None:
    """vLLM's API server with the plugin and one route more, `/benchmark/reload`; `sys.argv` has its arguments."""
    attach = LandscapeEndpoint.attach_router

    def attach_more(self: LandscapeEndpoint, app: FastAPI) -> None:
        async def reload_weights(request: Request) -> None:
            await versions.pause(self._engine, readers=False)
            await self._engine.collective_rpc("reload_weights", kwargs=await request.json())
            await self._engine.reset_prefix_cache()
            await self._engine.resume_generation()

        attach(self, app)
        app.add_api_route("/benchmark/reload", reload_weights, methods=["POST"])

    LandscapeEndpoint.attach_router = attach_more
    sys.argv.remove("--serve")
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


async def healthy(session: aiohttp.ClientSession, url: str, process: asyncio.subprocess.Process) -> None:
    """Wait for the server."""
    for _ in range(1200):
        if process.returncode is not None:
            raise SystemExit(f"the server ended with code {process.returncode}")
        try:
            async with session.get(f"{url}/health") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.5)
    raise SystemExit("the server did not start")


async def run(models: list[str], repeats: int, modes: list[str]) -> None:
    """Measure and print."""
    headings = ("model", "path", "move, s", "of it writing, s", "arithmetic, s", "write and reload, s")
    table = Table(*headings, *(f"{mode}, s" for mode in modes))
    result: dict[str, dict[str, Any]] = {}
    for name in models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            model = open_snapshot("tiny-sorter").path if name == "tiny" else model_135m(folder / "model")
            row = await measure(model, repeats, folder)
            others = {}
            for mode in modes:
                others |= await measure_mode(model, repeats, folder, mode, row["checksums"])
        result[name] = {
            "ratio_vs_axpy": round(row["move"] / row["arithmetic"], 2),
            "ratio_vs_reload": round(row["reload"] / row["move"], 2),
            "gb_per_s": round(row["bytes"] / row["write"] / 1e9, 2),
            "move_path": row["path"],
            **{f"{key}_s": round(row[key], 4) for key in ("move", "write", "arithmetic", "reload", "load")},
            **{key: round(seconds, 4) for key, seconds in others.items()},
        }
        seconds = [f"{row[key]:.4f}" for key in ("move", "write", "arithmetic", "reload")]
        seconds += [f"{others[f'{mode}_seconds']:.4f}" for mode in modes]
        table.add_row(f"{name} ({row['parameters']:,})", row["path"], *seconds)
    Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__" and "--serve" in sys.argv:
    serve()
elif __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("tiny", "135m"), default=["tiny", "135m"])
    parser.add_argument("--modes", nargs="*", choices=("half", "regenerated"), default=[])
    parser.add_argument("--repeats", type=int, default=5, help="alternations per model, after one to warm up")
    arguments = parser.parse_args()
    if torch.get_num_threads() > 1:
        # Beside a CPU server, a thread on every core was slower than one thread fewer.
        torch.set_num_threads(torch.get_num_threads() - 1)
    asyncio.run(run(arguments.models, arguments.repeats, arguments.modes))
