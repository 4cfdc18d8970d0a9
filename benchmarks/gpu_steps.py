"""The steps of gpu_check.py: what each does, measures and compares. Each runs in a process of its own. Not a benchmark.

A step gets a `Context` and returns an `Outcome`: numbers, comparisons that must hold on every machine (`correct`), and
comparisons of speed and memory that are meant for a GPU (`fast`).
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlvr_landscape_plugin.config import EnvConfig, ServerConfig, SurrogateConfig
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.serving.protocol import TOKEN_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
SLICE = {"seed": 0}
TOUR = 20
"""Moves away from the snapshot before the weights must be the snapshot's again."""
KL_LIMIT = {"float32": 1e-3, "bfloat16": 1e-2}
"""Largest difference from the reference, nat per token."""
MOVE_SECONDS, COPY_SHARE = 0.010, 0.6
"""A move of 0.5 B parameters takes at most so long; its bytes per second are at least this share of a copy's."""
PEAK, SAMPLING_SHARE, CLIENT_SHARE = 1.1, 0.85, 0.15
"""Peak memory over snapshot and directions; tokens per second over offline vLLM's; client's CPU time over wall time."""


@dataclass(frozen=True)
class Context:
    """What a step is told."""

    url: str
    """The server's address; empty where the step needs none."""
    model: Path
    folder: Path
    """What earlier steps on this server left; the step may write here."""
    rehearse: bool
    config: ServerConfig
    options: dict[str, Any]

    @property
    def token(self) -> str:
        """The server's."""
        return os.environ[TOKEN_VARIABLE]

    def client(self) -> LandscapeClient:
        """A client of the server."""
        return LandscapeClient(self.url, self.token)

    def read(self, name: str) -> Any:
        """What an earlier step left."""
        return json.loads((self.folder / name).read_text())

    def write(self, name: str, value: object) -> None:
        """Leave something for a later step."""
        (self.folder / name).write_text(json.dumps(value))


@dataclass
class Outcome:
    """What a step found."""

    facts: dict[str, Any] = field(default_factory=dict)
    correct: dict[str, bool] = field(default_factory=dict)
    fast: dict[str, bool] = field(default_factory=dict)
    skipped: str | None = None
    """Why nothing could be measured; None if something was."""


def versions(context: Context) -> Outcome:
    """Import everything and say what it is; load vLLM's compiled parts."""
    facts: dict[str, Any] = {"python": sys.version.split()[0], "executable": sys.executable}
    broken: dict[str, str] = {}
    for name in (
        "numpy",
        "torch",
        "transformers",
        "verifiers",
        "vllm",
        "rlvr_alphabet_sort",
        "rlvr_landscape_analysis",
    ):
        try:
            facts[name] = str(getattr(importlib.import_module(name), "__version__", "imported"))
        except Exception as error:  # whatever an import raises is the finding
            broken[name] = f"{type(error).__name__}: {error}"
    from rlvr_landscape_plugin.serving.versions import require

    try:
        require()
    except Exception as error:
        broken["the plugin in this vLLM"] = str(error)
    correct = {"all imports": not broken}
    if not context.rehearse and "torch" not in broken:
        import torch

        correct["CUDA is available"] = torch.cuda.is_available()
        if torch.cuda.is_available():
            capability = torch.cuda.get_device_capability()
            facts |= {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name(), "capability": capability}
        for name in ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn"):
            try:
                importlib.import_module(name)
            except Exception as error:
                broken[name] = f"{type(error).__name__}: {error}"
        correct["all imports"] = not broken
    return Outcome(facts | ({"broken": broken} if broken else {}), correct)


def write_model(context: Context) -> Outcome:
    """Write a random Qwen2 in bfloat16."""
    import torch
    from models import parameters, random_qwen2

    size = context.options["size"]
    started = time.perf_counter()
    random_qwen2(context.model, size, torch.bfloat16, "cpu" if context.rehearse else "cuda")
    seconds = time.perf_counter() - started
    return Outcome({"size": size, "parameters": parameters(size), "write_s": round(seconds, 2)}, {"written": True})


async def trial(context: Context) -> Outcome:
    """Load a slice: its trial move by both paths must leave the same bits, and the weights must be as before."""
    async with context.client() as client:
        info = await client.info()
        before = await client.checksums()
        context.write("pristine.json", before)
        loaded = await client.load(str(context.model), SLICE)
        after = await client.checksums()
    facts = {key: info[key] for key in ("vllm", "torch", "dtype", "device")}
    facts |= {key: loaded[key] for key in ("parameters", "move_path", "move_path_reason", "directions_memory")}
    facts["load_s"] = round(loaded["seconds"], 3)
    correct = {
        "kernel layout and loader leave the same bits": loaded["move_path"] == "kernel",
        "the trial leaves the weights as they were": after == before,
    }
    return Outcome(facts, correct)


async def tour(context: Context) -> Outcome:
    """Twenty moves to random points and back: the bits must be those that vLLM itself loaded."""
    draw = random.Random(0)
    points = [(draw.uniform(-0.2, 0.2), draw.uniform(-0.2, 0.2)) for _ in range(TOUR)]
    async with context.client() as client:
        loaded = await client.load(str(context.model), SLICE)
        steps = [(await client.move(*point)).realised_step for point in points]
        away = await client.checksums()
        home = await client.move(0.0, 0.0)
        back = await client.checksums()
    pristine = context.read("pristine.json")
    # Each direction has the norm of the weights, and two random ones are nearly orthogonal.
    asked = [float(np.hypot(*point)) for point in points]
    off = max(abs(step / expected - 1) for step, expected in zip(steps, asked, strict=True))
    facts = {"moves": TOUR, "move_path": loaded["move_path"], "worst_step_error": round(off, 4)}
    correct = {
        "the weights were elsewhere": away != pristine,
        "steps are as long as asked, within 5 %": off < 0.05,
        "back at the snapshot's bits": back == pristine and home.realised_step == 0,
    }
    return Outcome(facts, correct)


async def moves(context: Context) -> Outcome:
    """Time of a move and bytes per second against a copy on the device, with the directions kept in one way.

    Memory is what the load and the moves take at their peak, above what the server has without a slice. The bits at one
    point are left for the step that draws the directions again.
    """
    from bench_server import in_workers, point, timed_moves

    mode, repeats = context.options["mode"], context.options["repeats"]
    async with context.client() as client:
        await in_workers(context, "probe_directions", mode=mode)
        before = await in_workers(context, "probe_memory", reset=True)
        loaded = await client.load(str(context.model), SLICE)
        where = loaded["directions_memory"]
        if mode == "auto" and where.startswith("regenerated"):
            return Outcome(skipped=f"resident directions do not fit: {loaded['directions_memory_reason']}")
        timed = await timed_moves(client, repeats)
        after = await in_workers(context, "probe_memory", reset=False)
        if repeats != 1:
            await client.move(*point(1))
        sums = await client.checksums()
        written = []
        if mode != "regenerated":
            for repeat in range(repeats + 1):
                alpha, beta = point(repeat)
                written.append(max(await in_workers(context, "probe_write", alpha=alpha, beta=beta)))
        weights = {"float32": 4, "bfloat16": 2}[loaded["dtype"]]
        held = 4 if loaded["directions_dtype"] == "float32" else 2
        # θ as it is stored (bfloat16), δ and η are read, the weights are written.
        size = loaded["parameters"]
        touched = size * (2 + 2 * held + weights)
        facts: dict[str, Any] = {
            "parameters": size,
            "directions": where,
            "move_path": loaded["move_path"],
            "load_s": round(loaded["seconds"], 3),
            "move_s": round(statistics.median(timed.moves), 5),
            "write_s": round(statistics.median(timed.writes), 5),
        }
        correct: dict[str, bool] = {}
        fast: dict[str, bool] = {}
        if mode == "auto":
            context.write("resident.json", sums)
        if mode == "regenerated":
            correct["the same bits as with resident directions"] = sums == context.read("resident.json")
            return Outcome(facts, correct)
        correct["kernel path"] = loaded["move_path"] == "kernel"
        copy = max(await in_workers(context, "probe_copy", touched=touched, repeats=3))
        seconds = statistics.median(written[1:])
        share = copy / seconds
        facts |= {
            "write_in_worker_s": round(seconds, 5),
            "bytes_touched": touched,
            "gb_per_s": round(touched / seconds / 1e9, 1),
            "copy_gb_per_s": round(touched / copy / 1e9, 1),
            "share_of_copy": round(share, 3),
        }
        more = max(one["peak"] - other["now"] for one, other in zip(after, before, strict=True))
        held_bytes = size * (2 + 2 * held)
        facts |= {"peak_over_start_bytes": more, "snapshot_and_directions_bytes": held_bytes}
        # Directions that are kept on the host are as fast as the bus.
        if " on cuda" in where or context.rehearse:
            fast[f"peak memory at most {PEAK} × snapshot and directions"] = more <= PEAK * held_bytes
            fast[f"at least {COPY_SHARE} of a copy's bytes per second"] = share >= COPY_SHARE
        if limit := context.options.get("limit_s"):
            fast[f"a move takes at most {limit} s"] = facts["move_s"] <= limit
    return Outcome(facts, correct, fast)


async def decode(context: Context) -> Outcome:
    """Tokens sampled after a move have the log-probabilities that a forward pass of the moved weights gives them.

    Decoding uses captured graphs where the server has them, scoring does not; a graph with old weights would show.
    """
    from same_bits import prompts

    asked, length = prompts(context.model), 32
    async with context.client() as client:
        await client.load(str(context.model), SLICE)
        await client.move(0.0, 0.0)
        await asyncio.gather(*(client.generate(ids, seed, length) for seed, ids in enumerate(asked)))
        await client.move(0.1, -0.05)
        done = await asyncio.gather(*(client.generate(ids, seed, length) for seed, ids in enumerate(asked)))
        whole = [np.concatenate([ids, one.tokens]).astype(np.int32) for ids, one in zip(asked, done, strict=True)]

        async def difference() -> float:
            scores = await client.score(whole)
            parts = [
                np.abs(score[len(ids) - 1 :].astype(float) - one.logprobs)
                for score, ids, one in zip(scores, asked, done, strict=True)
            ]
            return float(np.concatenate(parts).mean())

        here = await difference()
        await client.move(0.0, 0.0)
        there = await difference()
    limit = KL_LIMIT[context.config.dtype]
    facts = {"mean_difference_nat": here, "the_same_at_the_origin_nat": there, "limit": limit}
    correct = {
        "sampled and scored log-probabilities agree at the moved point": here <= limit,
        "the origin's differ from them": there > max(limit, 3 * here),
    }
    return Outcome(facts, correct)


async def rollouts(context: Context) -> Outcome:
    """Episodes per second through the sweep's code, and the client's share of grid points."""
    from rollouts import ours

    prompts, per_prompt = context.options["prompts"], context.options["rollouts"]
    async with context.client() as client:
        found = await ours(client, context.model, context.options["repeats"], prompts, per_prompt, max_concurrent=2048)
    seconds, tokens = sum(found.batches), sum(found.tokens)
    share = statistics.median(cpu / wall for cpu, wall in zip(found.cpus, found.walls, strict=True))
    turns = []
    for p, row in enumerate(found.last):
        for r, cell in enumerate(row):
            for segment in cell.segments:
                turns += [
                    [p, r, turn, *part] for turn, part in enumerate(sampled_turns(segment.tokens, segment.sampled))
                ]
    context.write("turns.json", turns)
    facts = {
        "episodes": prompts * per_prompt,
        "episodes_per_s": round(prompts * per_prompt * len(found.batches) / seconds, 1),
        "tokens_per_s": round(tokens / seconds),
        "point_s": round(statistics.median(found.walls), 3),
        "client_share": round(share, 4),
    }
    context.write("rollouts.json", facts)
    return Outcome(facts, {}, {f"client's share at most {CLIENT_SHARE}": share <= CLIENT_SHARE})


def sampled_turns(tokens: np.ndarray, sampled: np.ndarray) -> list[tuple[list[int], int]]:
    """(prompt, number of sampled tokens) of every turn of a conversation."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sampled.astype(np.int8), [0]])))
    return [(tokens[:start].tolist(), int(stop - start)) for start, stop in edges.reshape(-1, 2)]


def offline(context: Context) -> Outcome:
    """The same tokens by vLLM's offline `LLM.generate`, one call per turn, in the same configuration."""
    from rollouts import seeds

    from rlvr_landscape_plugin.serving.launch import command, environment

    turns, through = context.read("turns.json"), context.read("rollouts.json")
    for key, value in environment(context.config, "unused", [context.model]).items():
        os.environ[key] = value
    # Stock vLLM, without the plugin.
    os.environ["VLLM_PLUGINS"] = ""
    from vllm import LLM, EngineArgs, SamplingParams
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = command(context.config, context.model, 1)[3:]
    at = arguments.index("--weight-transfer-config")
    del arguments[at : at + 2]
    # The command has the front end's options too.
    parsed, _ = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_known_args(arguments)
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(parsed))
    seed = seeds(0)

    def generate(part: list[list[Any]]) -> None:
        params = [
            SamplingParams(
                temperature=1.0,
                max_tokens=count,
                ignore_eos=True,
                seed=seed(p, r, turn),
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
            )
            for p, r, turn, _, count in part
        ]
        asked: Any = [{"prompt_token_ids": prompt} for _, _, _, prompt, _ in part]
        outputs = llm.generate(asked, params, use_tqdm=False)
        made = [len(output.outputs[0].token_ids) for output in outputs]
        if made != [count for *_, count in part]:
            raise RuntimeError("vLLM made other numbers of tokens than those asked for")

    by_turn = {turn: [one for one in turns if one[2] == turn] for turn in sorted({one[2] for one in turns})}
    generate(turns[:8])
    times = []
    for _ in range(context.options["repeats"]):
        llm.reset_prefix_cache()
        started = time.perf_counter()
        for part in by_turn.values():
            generate(part)
        times.append(time.perf_counter() - started)
    rate = sum(one[4] for one in turns) / statistics.median(times)
    ratio = through["tokens_per_s"] / rate
    facts = {
        "tokens_per_s": round(rate),
        "tokens_per_s_through_the_sweep": through["tokens_per_s"],
        "ratio": round(ratio, 3),
    }
    return Outcome(facts, {}, {f"the sweep samples at least {SAMPLING_SHARE} as fast": ratio >= SAMPLING_SHARE})


async def reference(context: Context) -> Outcome:
    """KL, surrogate and the origin's log-probabilities, compared with transformers in float32."""
    from rollouts import MAX_TOKENS, quiet
    from workload import TASKSET

    from rlvr_landscape_plugin.episodes import ChatFormat, EpisodeRunner, load_tasks, open_environment
    from rlvr_landscape_plugin.sweep.point import PointMeter

    sys.path.append(str(ROOT / "tests" / "helpers"))
    import reference as independent

    points = [(0.05, -0.02), (-0.1, 0.1)]
    env = open_environment(EnvConfig().id, TASKSET)
    tasks, chat = load_tasks(env, context.options["prompts"]), ChatFormat(context.model)
    async with context.client() as client:
        await client.load(str(context.model), SLICE)
        await client.move(0.0, 0.0)
        runner = EpisodeRunner(env, chat, client, MAX_TOKENS, 1024)
        meter = PointMeter(client, runner, tasks, context.options["rollouts"], 0, SurrogateConfig())
        base = await meter.base(quiet)
        measured = [(await meter.point(base, alpha, beta, quiet))[0] for alpha, beta in points]
    cells = [cell for cell in np.ndindex(base.reward.shape) if len(base.logprobs[cell[0]][cell[1]])]

    def scored(alpha: float, beta: float) -> list[np.ndarray]:
        model = independent.perturbed(context.model, SLICE["seed"], alpha, beta)
        return [
            np.concatenate([independent.logprobs(model, s.tokens)[s.sampled[1:]] for s in base.segments[p][r]])
            for p, r in cells
        ]

    origin = scored(0.0, 0.0)
    counts = np.array([len(part) for part in origin])
    mean, spread = base.reward.mean(axis=1, keepdims=True), base.reward.std(axis=1, keepdims=True)
    advantage = (base.reward - mean) / (spread + 1e-8)

    def worst(ours: list[float], theirs: list[float]) -> float:
        """Mean over completions of |difference| per token."""
        return float(np.mean(np.abs(np.array(ours) - np.array(theirs)) / counts))

    drawn = [np.concatenate([s.logprobs for s in base.segments[p][r]]).astype(float) for p, r in cells]
    found = {
        "origin": worst([float(base.logprobs[p][r].sum(dtype=float)) for p, r in cells], [x.sum() for x in origin]),
        "sampled": worst([float(part.sum()) for part in drawn], [x.sum() for x in origin]),
    }
    kl_per_token = 0.0
    for (alpha, beta), data in zip(points, measured, strict=True):
        k1, surrogate = [], []
        for cell, moved, before in zip(cells, scored(alpha, beta), origin, strict=True):
            ratio, a = np.exp(moved - before), advantage[cell]
            k1.append(float(-(moved - before).sum()))
            surrogate.append(float(np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a).sum()))
        for name, theirs in (("kl_k1", k1), ("surrogate", surrogate)):
            ours = [float(data[name].values[cell]) for cell in cells]
            found[name] = max(found.get(name, 0.0), worst(ours, theirs))
        kl_per_token = max(kl_per_token, sum(k1) / int(counts.sum()))
    limit = KL_LIMIT[context.config.dtype]
    facts = {"tokens": int(counts.sum()), "largest_kl_nat_per_token": round(kl_per_token, 4), "limit": limit}
    facts |= {f"{name}_difference_per_token": value for name, value in found.items()}
    return Outcome(facts, {f"{name} within {limit} per token": value <= limit for name, value in found.items()})


def landscape(context: Context) -> Outcome:
    """A 9 × 9 landscape by the command of a user, on this server."""
    import xarray as xr

    output = context.folder / "sweep"
    command = [
        *(sys.executable, "-m", "rlvr_landscape_plugin.sweep", "@", ROOT / "configs" / "sweep" / "quickstart.toml"),
        *("--snapshots", context.model, "--output", output, "--server.urls", context.url),
        *("--env.num-prompts", context.options["prompts"], "--env.rollouts", context.options["rollouts"]),
    ]
    started = time.perf_counter()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"the sweep ended with code {done.returncode}: {done.stderr[-2000:]}")
    (path,) = output.glob("*.nc")
    with xr.open_dataset(path) as data:
        mean = data.reward.mean(["prompt", "rollout"])
        kl = data.kl_k1.mean(["prompt", "rollout"])
        here = mean.sel(alpha=0.0, beta=0.0)
        whole = bool(np.isfinite(mean.values).all() and np.isfinite(kl.values).all())
        facts = {
            "points": int(mean.size),
            "seconds": round(seconds, 1),
            "seconds_per_point": round(seconds / mean.size, 3),
            "reward_at_the_origin": round(float(here), 4),
            "reward_at_the_corners": round(float(mean.values[[0, 0, -1, -1], [0, -1, 0, -1]].mean()), 4),
            "kl_at_the_corners_nat": round(float(kl.values[[0, 0, -1, -1], [0, -1, 0, -1]].mean()), 3),
        }
        correct = {
            "81 whole points": mean.size == 81 and whole,
            "KL is 0 at the origin": float(kl.sel(alpha=0.0, beta=0.0)) == 0,
            "KL is above 0 at the corners": facts["kl_at_the_corners_nat"] > 0,
        }
    return Outcome(facts, correct)


STEPS: dict[str, Callable[[Context], Outcome | Coroutine[Any, Any, Outcome]]] = {
    step.__name__: step
    for step in (versions, write_model, trial, tour, moves, decode, rollouts, offline, reference, landscape)
}


def run(name: str, context: Context) -> Outcome:
    """One step; whatever it raises is for the caller."""
    result = STEPS[name](context)
    return result if isinstance(result, Outcome) else asyncio.run(result)
