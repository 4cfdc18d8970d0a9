"""How fast weights move: one landscape move against writing a perturbed checkpoint and having the server reload it.

    python benchmarks/moves.py [--models tiny 135m]

Both sides act on the same live server in alternation. A move is one POST /landscape/move: pause, θ + α δ + β η, empty
the caches, resume. The other side is what the published experiment did: perturb in a client process (the directions
ready in memory), write the whole checkpoint, pause, have vLLM reload it from disk, empty the caches, resume. Nothing
forces the file to the disk, so on one machine it travels through the page cache. vLLM offers the reload over HTTP in
its development mode only; the benchmark turns that on for its own loopback server. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from rlvr_landscape_plugin.config import ServerConfig
from rlvr_landscape_plugin.directions import SliceSpec
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.serving.engine import MoveStats, Slice
from rlvr_landscape_plugin.serving.launch import command, environment, free_port
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


async def measure(model: Path, repeats: int, folder: Path) -> dict[str, float]:
    """Median seconds of both ways on one server."""
    port = free_port()
    env = environment(ServerConfig(), TOKEN, [model]) | {"VLLM_SERVER_DEV_MODE": "1"}
    with (folder / "server.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "rlvr_landscape_plugin.serving.tether", str(os.getpid())),
            *command(ServerConfig(), model, port),
            env=env,
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession() as session, LandscapeClient(url, TOKEN) as client:
            await healthy(session, url, process)
            loaded = await client.load(str(model), {"seed": 0})
            slice_ = Slice.build(load_file(model / "model.safetensors"), SliceSpec(0), torch.device("cpu"))
            perturbed = folder / "perturbed"
            shutil.copytree(model, perturbed, dirs_exist_ok=True)
            moves, reloads, writes = [], [], []
            for repeat in range(repeats + 1):
                alpha, beta = 0.01 * (repeat + 1), -0.01 * repeat
                started = time.perf_counter()
                result = await client.move(alpha, beta)
                moves.append(time.perf_counter() - started)
                writes.append(result.seconds["write"])
                here = await client.checksums()
                started = time.perf_counter()
                tensors = dict(slice_.at(alpha, beta, torch.float32, MoveStats()))
                (perturbed / "model.safetensors").unlink()
                save_file(tensors, perturbed / "model.safetensors", {"format": "pt"})
                await reload(session, url, perturbed)
                reloads.append(time.perf_counter() - started)
                compare(here, await client.checksums())
    finally:
        process.terminate()
        await process.wait()
    # The first of each warms caches up.
    return {
        "parameters": loaded["parameters"],
        "move": statistics.median(moves[1:]),
        "write": statistics.median(writes[1:]),
        "reload": statistics.median(reloads[1:]),
    }


def compare(ours: list[dict[str, str]], theirs: list[dict[str, str]]) -> None:
    """Both ways must have written the same bits, else they did not do the same work."""
    if ours != theirs:
        raise SystemExit("the two ways left different weights; the comparison is void")


async def reload(session: aiohttp.ClientSession, url: str, path: Path) -> None:
    """vLLM's own reload from disk, paused as a move is, and an empty prefix cache."""
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
    for route, content in (
        ("pause?mode=wait&clear_cache=false", None),
        ("collective_rpc", body),
        ("reset_prefix_cache", None),
        ("resume", None),
    ):
        async with session.post(f"{url}/{route}", json=content) as response:
            if response.status != 200:
                raise SystemExit(f"{route}: {response.status} {await response.text()}")


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


async def run(models: list[str], repeats: int) -> None:
    """Measure and print."""
    table = Table("model", "parameters", "move, s", "of it writing, s", "write and reload, s", "ratio")
    result: dict[str, dict[str, float]] = {}
    for name in models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            model = open_snapshot("tiny-sorter").path if name == "tiny" else model_135m(folder / "model")
            row = await measure(model, repeats, folder)
        ratio = row["reload"] / row["move"]
        result[name] = {
            "ratio_vs_reload": round(ratio, 2),
            "move_s": round(row["move"], 4),
            "reload_s": round(row["reload"], 4),
        }
        table.add_row(
            name,
            f"{row['parameters']:,}",
            f"{row['move']:.3f}",
            f"{row['write']:.3f}",
            f"{row['reload']:.3f}",
            f"{ratio:.1f}",
        )
    Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("tiny", "135m"), default=["tiny", "135m"])
    parser.add_argument("--repeats", type=int, default=5, help="alternations per model, after one to warm up")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.models, arguments.repeats))
