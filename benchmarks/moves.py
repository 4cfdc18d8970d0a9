"""How fast weights move: a landscape move, plain arithmetic on as many bytes, and write-and-reload.

    python benchmarks/moves.py [--models tiny 135m] [--modes half regenerated]

All three run in turn, the first and the last on the same live server, which uses the GPU if there is one. A move is one
POST /landscape/move: pause, θ + α δ + β η, empty the caches, resume. Plain arithmetic is
`p.copy_(base + a * d + b * e)` on float32 tensors of the checkpoint's shapes, on the server's kind of device, in this
process. Write-and-reload is what the published experiment did: perturb in a client process (the directions ready in
memory), write the whole checkpoint, pause, have vLLM reload it from disk, empty the caches, resume. Nothing forces the
file to the disk, so on one machine it travels through the page cache. The server has a route of its own for the reload
(bench_server.py).

The last line is one JSON object. `ratio_vs_axpy`: move over plain arithmetic (smaller is better). `ratio_vs_reload`:
write-and-reload over move (larger is better). `gb_per_s`: bytes that a move must touch (θ, δ and η in float32 read, the
weights written) over the time the workers took to write. `--modes` adds `<mode>_seconds`, a move on another server that
keeps the directions in that way (regenerated: to the same bits), and `<mode>_load_seconds`, taking the slice in.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_server import point, reload, serving, timed_moves
from models import random_qwen2
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from rlvr_landscape_plugin.config import ServerConfig
from rlvr_landscape_plugin.directions import SliceSpec
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.serving.launch import LocalServer, resolve_device
from rlvr_landscape_plugin.serving.worker.engine import MoveStats, Slice
from rlvr_landscape_plugin.snapshot import open_snapshot


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


async def measure(model: Path, repeats: int, folder: Path) -> dict[str, Any]:
    """Median seconds of each way, and the checksums at the last point."""
    async with serving(ServerConfig(), model, folder / "server.log") as server, client_of(server) as client:
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
            await reload(server, perturbed)
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
    config = ServerConfig(directions_memory=mode)
    async with serving(config, model, folder / "server.log") as server, client_of(server) as client:
        loaded = await client.load(str(model), {"seed": 0})
        timed = await timed_moves(client, repeats)
        if mode == "regenerated":
            compare(resident, await client.checksums())
    return {f"{mode}_seconds": statistics.median(timed.moves), f"{mode}_load_seconds": loaded["seconds"]}


def client_of(server: LocalServer) -> LandscapeClient:
    """A client of a server that was started here."""
    return LandscapeClient(server.url, server.token)


def compare(ours: list[dict[str, str]], theirs: list[dict[str, str]]) -> None:
    """Both ways must have written the same bits, else they did not do the same work."""
    if ours != theirs:
        raise SystemExit("the two ways left different weights; the comparison is void")


async def run(models: list[str], repeats: int, modes: list[str]) -> None:
    """Measure and print."""
    headings = ("model", "path", "move, s", "of it writing, s", "arithmetic, s", "write and reload, s")
    table = Table(*headings, *(f"{mode}, s" for mode in modes))
    result: dict[str, dict[str, Any]] = {}
    for name in models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            model = (
                open_snapshot("tiny-sorter").path
                if name == "tiny"
                else random_qwen2(folder / "model", "135m", torch.float32)
            )
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("tiny", "135m"), default=["tiny", "135m"])
    parser.add_argument("--modes", nargs="*", choices=("half", "regenerated"), default=[])
    parser.add_argument("--repeats", type=int, default=5, help="alternations per model, after one to warm up")
    arguments = parser.parse_args()
    if torch.get_num_threads() > 1:
        # Beside a CPU server, a thread on every core was slower than one thread fewer.
        torch.set_num_threads(torch.get_num_threads() - 1)
    asyncio.run(run(arguments.models, arguments.repeats, arguments.modes))
