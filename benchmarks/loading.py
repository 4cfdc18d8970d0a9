"""The share of a census's time that goes into loading directions, and what loading spends its time on.

    python benchmarks/loading.py [--models tiny 135m] [--loads-only]

A small census is measured on a server of its own: six random directions, three slices. Timed are each load of a slice
(the whole of it as the sweep sees it: load, move to the origin, checksums) and each point. A census of the default size
has 16 points per slice (two directions, both senses, four radii), so

    share = later load / (later load + 16 × point)

With `--loads-only` nothing is measured: slices are loaded in turn, drawn when they are loaded and drawn ahead (after a
pause in which the server has nothing else to do), and the parts of each are printed.

The first load of a snapshot also tries the way in which weights move, and is given apart. `tiny` is the shipped policy;
`135m` a random Llama of 135 M parameters in float32, with the shipped tokenizer. The last line is one JSON object.
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

import numpy as np
import xarray as xr
from bench_server import serving
from rich.console import Console
from rich.table import Table

from rlvr_landscape_plugin.config import ServerConfig, SweepConfig
from rlvr_landscape_plugin.display import Display
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.snapshot import open_snapshot
from rlvr_landscape_plugin.sweep import jobs
from rlvr_landscape_plugin.sweep.run import run_sweep

POINTS_PER_SLICE = 16
TASKSET = {"min_turns": 2, "max_turns": 2, "min_names_per_turn": 2, "max_names_per_turn": 2, "seed": 12345}


def llama_135m(folder: Path) -> Path:
    """A random Llama of 135 M parameters: 38 layers of 576, the shipped policy's vocabulary and chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shipped = open_snapshot("tiny-sorter").path
    small = json.loads((shipped / "config.json").read_text())
    config = LlamaConfig(
        vocab_size=small["vocab_size"],
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=38,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=small["eos_token_id"],
        pad_token_id=small["pad_token_id"],
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    for file in shipped.iterdir():
        if "token" in file.name or file.suffix == ".jinja" or file.name == "generation_config.json":
            shutil.copy(file, folder)
    return folder


def measure(model: Path, prompts: int, folder: Path) -> dict[str, Any]:
    """Seconds of each load and of a point, and what the server says of its loads."""
    entered: list[float] = []
    parts: list[dict[str, float]] = []
    enter, load = jobs.SliceJob.enter, jobs.Job.load

    async def timed_load(self: jobs.Job, server: Any) -> None:
        started = time.perf_counter()
        await load(self, server)
        entered.append(time.perf_counter() - started)
        facts = (await server.client.info())["loaded"]
        parts.append({"server": facts["seconds"], **facts["seconds_of"]})

    async def timed_enter(self: jobs.SliceJob, server: Any) -> None:
        base, started = self._journal.read_base(), time.perf_counter()
        await enter(self, server)
        # The first slice also samples the checkpoint's own batch, which is no part of loading.
        if base is not None:
            entered[-1] = time.perf_counter() - started

    config = SweepConfig.model_validate(
        {
            "output": folder / "out",
            "snapshots": [str(model)],
            "design": "census",
            "census": {"pairs": 6, "radii": [0.01], "unit": "theta"},
            "env": {"num_prompts": prompts, "rollouts": 2, "taskset": TASKSET},
            "surrogate": {"advantage_scale": "none"},
            "sampling": {"max_tokens": 96},
        }
    )
    jobs.Job.load, jobs.SliceJob.enter = timed_load, timed_enter
    try:
        with Display() as display:
            (path,) = asyncio.run(run_sweep(config, display))
    finally:
        jobs.Job.load, jobs.SliceJob.enter = load, enter
    with xr.open_dataset(path) as data:
        spent = [data[f"seconds_{part}"].values for part in ("move", "sample", "score")]
        point = float(np.median(np.sum(spent, axis=0)))
        parameters = json.loads(data.attrs["servers"])[0]["parameters"]
    later = statistics.median(entered[1:])
    return {
        "parameters": parameters,
        "first_load_s": entered[0],
        "later_load_s": later,
        "point_s": point,
        "share": later / (later + POINTS_PER_SLICE * point),
        "first": parts[0],
        "later": parts[-1],
    }


async def loads(model: Path, repeats: int, folder: Path) -> dict[str, Any]:
    """Median seconds of a load without and with its draws made ahead, in turn on one server, and of their parts."""
    found: dict[str, list[dict[str, float]]] = {"first": [], "drawn at the load": [], "drawn ahead": []}
    async with (
        serving(ServerConfig(), model, folder / "server.log") as server,
        LandscapeClient(server.url, server.token) as client,
    ):
        for seed in range(2 * repeats + 1):
            kind = "first" if seed == 0 else ("drawn ahead", "drawn at the load")[seed % 2]
            if kind == "drawn ahead":
                before = found["drawn at the load"] or found["first"]
                await client.draw_ahead({"seed": seed})
                await asyncio.sleep(3 * before[-1]["load"])
            clock = [time.perf_counter()]
            facts = await client.load(str(model), {"seed": seed})
            clock.append(time.perf_counter())
            await client.move(0.0, 0.0)
            clock.append(time.perf_counter())
            await client.checksums()
            clock.append(time.perf_counter())
            parts = dict(zip(("load", "move", "checksums"), np.diff(clock).tolist(), strict=True))
            ready = {"ready": facts["ahead"]["ready"] / facts["ahead"]["parts"]} if kind == "drawn ahead" else {}
            found[kind].append(parts | ready | facts["seconds_of"])
    medians = {
        kind: {part: statistics.median(row[part] for row in rows) for part in rows[0]} for kind, rows in found.items()
    }
    return {"parameters": facts["parameters"], "move_path": facts["move_path"], **medians}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("tiny", "135m"), default=["tiny", "135m"])
    parser.add_argument("--prompts", type=int, default=64, help="tasks per point, 2 rollouts each (%(default)s)")
    parser.add_argument("--loads-only", action="store_true", help="measure no point")
    parser.add_argument("--repeats", type=int, default=3, help="loads of each kind with --loads-only (%(default)s)")
    arguments = parser.parse_args()
    table = Table("model", "first load, s", "later load, s", "point, s", "share of a census")
    if arguments.loads_only:
        table = Table("model", "load", "whole, s", "load, s", "move, s", "checksums, s")
    result: dict[str, dict[str, Any]] = {}
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            model = open_snapshot("tiny-sorter").path if name == "tiny" else llama_135m(folder / "step_000000")
            if arguments.loads_only:
                row = result[name] = asyncio.run(loads(model, arguments.repeats, folder))
                for kind in ("first", "drawn at the load", "drawn ahead"):
                    parts = [row[kind][part] for part in ("load", "move", "checksums")]
                    table.add_row(f"{name} ({row['parameters']:,})", kind, *(f"{s:.2f}" for s in (sum(parts), *parts)))
                continue
            row = result[name] = measure(model, arguments.prompts, folder)
        seconds = [f"{row[key]:.2f}" for key in ("first_load_s", "later_load_s", "point_s")]
        table.add_row(f"{name} ({row['parameters']:,})", *seconds, f"{row['share']:.1%}")
    Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
