"""How much of the checkpoint's completions a moved policy keeps under the Gumbel coupling (episodes/coupling.py).

    python benchmarks/coupling_shares.py --out shares/tiny.json
    python benchmarks/coupling_shares.py --policy models/smollm2-135m-instruct --label SmolLM2-135M-Instruct \\
        --taskset rlvr-word-problems --options '{"max_steps": 2, "seed": 12345}' --tasks 8 --rollouts 2 \\
        --max-tokens 48 --out shares/smollm2.json
    python benchmarks/coupling_shares.py --figure docs/images/coupling_shares.png \\
        --results shares/tiny.json shares/smollm2.json

No server: transformers holds the policy, in float32. The checkpoint's episodes are sampled once. Then the weights move
by relative steps along random directions, and every completion is scored in one pass, as a sweep does. A token is kept
if the coupled draw from the moved policy is the checkpoint's token, and all tokens before it are kept, those of earlier
turns included. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from workload import MAX_TOKENS, TASKSET

from rlvr_landscape_plugin.directions import SliceSpec, scaled_direction
from rlvr_landscape_plugin.episodes import (
    ChatFormat,
    EpisodeRunner,
    Segment,
    coupling,
    load_tasks,
    open_environment,
    sampling_seed,
)
from rlvr_landscape_plugin.serving.client import Completion
from rlvr_landscape_plugin.snapshot import Snapshot, open_snapshot, read_tensor

RADII = (0.0006, 0.002, 0.006, 0.02, 0.06)
"""Relative to the norm of the weights. Training moved tiny-sorter by 0.002 in 5 steps and by 0.02 in 40, so these are
0.3 to 30 displacements of the first, and 0.03 to 3 of the second."""
LENGTH = 1024
"""Longest conversation, in tokens."""


class Sampler:
    """Turns of the policy in transformers: those that wait together are decoded together."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._stops = np.atleast_1d(np.asarray(model.generation_config.eos_token_id))
        self._waiting: list[tuple[list[int], int, int, asyncio.Future[Completion]]] = []

    async def generate(self, prompt: Sequence[int] | np.ndarray, seed: int, max_tokens: int) -> Completion:
        """One turn at temperature 1; see `episodes.play.TurnSampler`."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(([int(token) for token in prompt], seed, max_tokens, future))
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_later(0.5, self._decode, 1)
        return await future

    def _decode(self, seen: int) -> None:
        """Decode once no further turn has come for half a second."""
        if len(self._waiting) > seen:
            asyncio.get_running_loop().call_later(0.5, self._decode, len(self._waiting))
        else:
            self._decode_all()

    @torch.no_grad()
    def _decode_all(self) -> None:
        batch, self._waiting = self._waiting, []
        width = max(len(prompt) for prompt, *_ in batch)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, *_ in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, *_ in batch])
        limits = np.array([limit for _, _, limit, _ in batch])
        uniforms = [np.random.default_rng(seed).random(limit) for _, seed, limit, _ in batch]
        tokens: list[list[int]] = [[] for _ in batch]
        logprobs: list[list[float]] = [[] for _ in batch]
        done = np.zeros(len(batch), bool)
        cache = None
        for step in range(limits.max()):
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            answer = self._model(
                input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, logits_to_keep=1
            )
            cache, on = answer.past_key_values, np.flatnonzero(~done)
            scores = torch.log_softmax(answer.logits[torch.from_numpy(on), -1].float(), -1).numpy()
            chosen = np.zeros(len(batch), np.int64)
            drawn = np.array([uniforms[row][step] for row in on])
            chosen[on] = coupling.draw(scores, np.ones(scores.shape, bool), drawn)
            for row, values in zip(on, scores, strict=True):
                tokens[row].append(int(chosen[row]))
                logprobs[row].append(float(values[chosen[row]]))
            done |= np.isin(chosen, self._stops) | (step + 1 >= limits)
            if done.all():
                break
            ids = torch.from_numpy(chosen)[:, None]
            mask = torch.cat([mask, torch.ones(len(batch), 1, dtype=mask.dtype)], 1)
        for (*_, future), ids_, values in zip(batch, tokens, logprobs, strict=True):
            finish = "stop" if ids_[-1] in self._stops else "length"
            future.set_result(Completion(np.array(ids_, np.int32), np.array(values, np.float32), finish))


@dataclass
class Turn:
    """One turn of the checkpoint, with what a choice needs of its policy."""

    noise: coupling.Noise
    start: int
    """Place of its first token in the sequence."""
    tokens: np.ndarray
    candidates: np.ndarray
    masses: coupling.Masses
    logprobs: np.ndarray
    """log π of the checkpoint of its tokens, nat."""


@dataclass
class Episode:
    """One episode of the checkpoint, in one sequence."""

    sequence: np.ndarray
    turns: list[Turn]


def turns_of(segment: Segment) -> list[slice]:
    """Where the sampled tokens of each turn stand in a sequence."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], segment.sampled.astype(int), [0]])))
    return [slice(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


@torch.no_grad()
def distributions(model: Any, sequence: np.ndarray, first: int) -> np.ndarray:
    """log π of every token at the places of a sequence from `first` on: float32 (places, vocabulary)."""
    ids = torch.from_numpy(sequence[:-1].astype(np.int64))[None]
    logits = model(input_ids=ids, logits_to_keep=len(sequence) - first).logits[0]
    return torch.log_softmax(logits.float(), -1).numpy()


def move(model: Any, snapshot: Snapshot, seed: int, step: float) -> None:
    """θ + step · δ, δ drawn from `seed` and as long as θ in each tensor; tensor by tensor, to save memory."""
    spec, parameters = SliceSpec(seed=seed), dict(model.named_parameters())
    for name in snapshot.tensors:
        weights = read_tensor(snapshot.tensors, name).astype(np.float32)
        if step:
            weights = weights + np.float32(step) * scaled_direction(spec, "alpha", name, weights, 1.0)
        with torch.no_grad():
            parameters[name].copy_(torch.from_numpy(weights))


async def checkpoint_episodes(given: argparse.Namespace, snapshot: Snapshot, model: Any) -> list[Episode]:
    """Sample the checkpoint's episodes and keep what a choice needs of its policy."""
    env = open_environment(given.taskset, given.options)
    tasks, chat = load_tasks(env, given.tasks), ChatFormat(snapshot.model)
    runner = EpisodeRunner(env, chat, Sampler(model), given.max_tokens, LENGTH)

    def seed(prompt: int, rollout: int, turn: int) -> int:
        return sampling_seed(0, "base", prompt, rollout, turn)

    batch = await runner.batch(tasks, given.rollouts, seed, lambda: None)
    episodes = []
    for prompt, row in enumerate(batch):
        for rollout, cell in enumerate(row):
            if len(cell.segments) != 1:
                raise SystemExit(f"episode {rollout} of task {prompt} has {len(cell.segments)} sequences, expected one")
            segment, turns = cell.segments[0], []
            places = turns_of(segment)
            first = places[0].start
            whole = distributions(model, segment.tokens, first)
            for number, place in enumerate(places):
                log_p = whole[place.start - first : place.stop - first]
                tokens = segment.tokens[place].astype(np.int64)
                candidates = np.array(coupling.likeliest(log_p, given.k))
                masses = coupling.Masses.of(log_p, candidates, tokens)
                own = log_p[np.arange(len(tokens)), tokens].astype(np.float64)
                noise = coupling.Noise(0, prompt, rollout, number)
                turns.append(Turn(noise, place.start, tokens, candidates, masses, own))
            episodes.append(Episode(segment.tokens, turns))
    return episodes


def shares(model: Any, episodes: list[Episode]) -> dict[str, float]:
    """What the moved policy keeps of the episodes, and how far it is in KL.

    `most_tokens`: what no coupling of the two policies can exceed, the mean of min(1, Q / P), where P and Q are the
    probabilities of everything up to a token.
    """
    whole = kept = total = 0
    k1 = k3 = most = 0.0
    for episode in episodes:
        left, first, so_far = False, episode.turns[0].start, 0.0
        scored = distributions(model, episode.sequence, first)
        for turn in episode.turns:
            log_q = scored[turn.start - first : turn.start - first + len(turn.tokens)]
            ratio = log_q[np.arange(len(turn.tokens)), turn.tokens] - turn.logprobs
            k1, k3 = k1 - ratio.sum(), k3 + (np.exp(ratio) - 1 - ratio).sum()
            log_weight = so_far + ratio.cumsum()
            most, so_far = most + np.exp(np.minimum(0, log_weight)).sum(), log_weight[-1]
            total += len(turn.tokens)
            if left:
                continue
            moved = coupling.Masses.of(log_q, turn.candidates, turn.tokens)
            leaves = coupling.choose(turn.noise, turn.candidates, turn.tokens, turn.masses, moved).first
            kept += len(turn.tokens) if leaves is None else leaves
            left = leaves is not None
        whole += not left
    count = len(episodes)
    return {
        "rollouts": whole / count,
        "tokens": kept / total,
        "most_tokens": most / total,
        "kl_k1": k1 / count,
        "kl_k3": k3 / count,
    }


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Every radius along every direction; prints a table."""
    from transformers import AutoModelForCausalLM

    snapshot = open_snapshot(given.policy)
    model: Any = AutoModelForCausalLM.from_pretrained(str(snapshot.model), dtype=torch.float32)
    model.eval()
    move(model, snapshot, 0, 0.0)  # of an adapter, transformers loaded the base model
    started = time.perf_counter()
    episodes = asyncio.run(checkpoint_episodes(given, snapshot, model))
    turns = [turn for episode in episodes for turn in episode.turns]
    tokens = sum(len(turn.tokens) for turn in turns)
    tail = sum(len(turn.masses.members) for turn in turns)
    wide = turns[0].masses
    # Per token of a completion, in float32: candidates and tail, and where the token is in the tail its class too.
    numbers = given.k + 1 + tail / tokens * (wide.of_classes.shape[1] + wide.members.shape[1])
    print(f"{len(episodes)} episodes, {tokens} tokens in {time.perf_counter() - started:.0f} s", flush=True)
    origin = shares(model, episodes)
    if origin["tokens"] != 1:
        raise SystemExit(f"the checkpoint keeps {origin['tokens']:.3f} of its own tokens, expected all")
    points = []
    for seed in given.directions:
        for radius in given.radii:
            move(model, snapshot, seed, radius)
            points.append({"seed": seed, "radius": radius, **shares(model, episodes)})
            print(json.dumps(points[-1]), flush=True)
    return {
        "policy": given.label or snapshot.path.name,
        "episodes": len(episodes),
        "turns": len(turns),
        "tokens": tokens,
        "scored_tokens": sum(len(episode.sequence) for episode in episodes),
        "k": given.k,
        "in_tail": round(tail / tokens, 4),
        "bytes_per_token": round(4 * numbers, 1),
        "points": points,
    }


def mean(result: dict[str, Any], radius: float, what: str) -> float:
    """Over the directions."""
    return float(np.mean([point[what] for point in result["points"] if point["radius"] == radius]))


def table(result: dict[str, Any]) -> Table:
    """One row per radius, means over the directions."""
    columns = ("radius", "KL per rollout, nat (k3)", "tokens kept", "by any coupling at most", "rollouts kept")
    found = Table(*columns, title=result["policy"])
    for radius in sorted({point["radius"] for point in result["points"]}):
        kl, *parts = (mean(result, radius, what) for what in ("kl_k3", "tokens", "most_tokens", "rollouts"))
        found.add_row(f"{radius:g}", f"{kl:.3g}", *(f"{part:.1%}" for part in parts))
    return found


def figure(results: list[dict[str, Any]], path: Path) -> None:
    """Shares against the radius and against KL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True, layout="constrained")
    lines = (("tokens", "o-", "tokens"), ("most_tokens", ":", "tokens, at most"), ("rollouts", "s--", "rollouts"))
    for color, result in zip(("tab:blue", "tab:orange", "tab:green"), results, strict=False):
        radii = sorted({point["radius"] for point in result["points"]})
        kl = [mean(result, radius, "kl_k3") for radius in radii]
        for what, style, words in lines:
            values = [mean(result, radius, what) for radius in radii]
            for ax, x in zip(axes, (radii, kl), strict=True):
                ax.plot(x, values, style, color=color, markersize=4, label=f"{result['policy']}: {words}")
    axes[0].set(xscale="log", xlabel="‖θ(α,β) − θ‖ / ‖θ‖", ylabel="share kept", ylim=(0, 1.02))
    axes[1].set(xscale="log", xlabel="KL from the checkpoint, nat per rollout (k3)")
    for ax in axes:
        ax.axhline(0.5, color="0.6", linewidth=0.8)
        ax.grid(alpha=0.3)
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=len(results))
    fig.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="tiny-sorter", help="a snapshot directory, or an adapter's")
    parser.add_argument("--label", help="its name in tables; default: that of the directory")
    parser.add_argument("--taskset", default="rlvr-alphabet-sort")
    parser.add_argument("--options", type=json.loads, default=TASKSET, help="of the taskset, JSON")
    parser.add_argument("--tasks", type=int, default=32)
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="per turn")
    parser.add_argument("--k", type=int, default=16, help="candidates per position")
    parser.add_argument("--radii", type=float, nargs="+", default=RADII)
    parser.add_argument("--directions", type=int, nargs="+", default=[0, 1], help="their seeds")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--figure", type=Path, help="draw --results instead of measuring")
    parser.add_argument("--results", type=Path, nargs="+", default=[])
    given = parser.parse_args()
    if given.figure and not given.results:
        parser.error("--figure draws --results; name the files that --out wrote")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
    if given.figure:
        figure([json.loads(path.read_text()) for path in given.results], given.figure)
    else:
        found = measure(given)
        Console().print(table(found))
        if given.out:
            given.out.write_text(json.dumps(found) + "\n")
        print(json.dumps(found))
