"""What one vLLM does with the shipped policy: load, 25 moves, scores of given sequences, checksums of the weights.

    python benchmarks/same_bits.py --sequences sequences.json --output same_bits.json [--dtype float32]

Run by `benchmarks/vllm_matrix.py` in the environment of each release; the numbers of two releases are then compared.
Starts a server of this environment's vLLM. If `--sequences` does not exist, it is written: prompts with completions
that this server sampled at the origin.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from rlvr_landscape_plugin.config import ServerConfig
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.serving.launch import local_server
from rlvr_landscape_plugin.snapshot import open_snapshot

AXIS = (-0.3, -0.15, 0.0, 0.15, 0.3)
"""Coordinates along either direction; the point (0, 0) is one of the 25."""
SLICE = {"seed": 7}
PROMPTS, ROLLOUTS, MAX_TOKENS = 16, 2, 48
NAMES = ("BobSmith", "AnnLee", "ZoeKing", "MaxFord", "EvaStone", "TimRice")


def prompts(policy: Path) -> list[list[int]]:
    """Token ids of the prompts, the same in every environment."""
    from rlvr_landscape_plugin.episodes import ChatFormat

    chat = ChatFormat(policy)
    text = "Sort these names in alphabetical order by FIRST name: {}, {}"
    pairs = list(itertools.permutations(NAMES, 2))[:PROMPTS]
    return [chat.opening(json.dumps([{"role": "user", "content": text.format(*pair)}])) for pair in pairs]


async def sampled(client: LandscapeClient, policy: Path) -> list[list[list[int]]]:
    """[prompt, completion] of each rollout at the origin; sampling seeds count up from 0."""
    asked = [prompt for prompt in prompts(policy) for _ in range(ROLLOUTS)]
    done = await asyncio.gather(*(client.generate(ids, seed, MAX_TOKENS) for seed, ids in enumerate(asked)))
    return [[list(ids), completion.tokens.tolist()] for ids, completion in zip(asked, done, strict=True)]


async def measure(dtype: str, given: list[list[list[int]]] | None) -> tuple[dict[str, Any], list[list[list[int]]]]:
    """The facts and numbers, and the sequences that were scored."""
    policy = open_snapshot("tiny-sorter").path
    with tempfile.TemporaryDirectory() as folder:
        async with local_server(
            ServerConfig(device="cpu", dtype=dtype), policy, [policy], Path(folder) / "log"
        ) as server:
            async with LandscapeClient(server.url, server.token) as client:
                info = await client.info()
                loaded = await client.load(str(policy), SLICE)
                await client.move(0.0, 0.0)
                origin = await client.checksums()
                own = await sampled(client, policy)
                sequences = own if given is None else given
                whole = [np.asarray(prompt + completion, dtype=np.int32) for prompt, completion in sequences]
                points = {}
                for alpha, beta in itertools.product(AXIS, AXIS):
                    step = await client.move(alpha, beta)
                    scores = await client.score(whole)
                    kept = [part[len(prompt) - 1 :] for part, (prompt, _) in zip(scores, sequences, strict=True)]
                    points[f"{alpha},{beta}"] = {
                        "weights": await client.checksums(),
                        "step": step.realised_step,
                        "logprobs": np.concatenate(kept).astype(float).tolist(),
                    }
                await client.move(0.0, 0.0)
                back = await client.checksums()
    facts = {
        **{key: info.get(key) for key in ("vllm", "torch", "dtype", "logprobs_mode")},
        **{key: loaded[key] for key in ("move_path", "move_path_reason", "directions_fingerprint", "parameters")},
        "back_at_origin": back == origin,
        "same_tokens_as_given": sum(a == b for a, b in zip(own, sequences, strict=True)),
        "sequences": len(sequences),
        "points": points,
    }
    return facts, sequences


def main() -> None:
    """Measure once and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    given = json.loads(arguments.sequences.read_text()) if arguments.sequences.exists() else None
    facts, sequences = asyncio.run(measure(arguments.dtype, given))
    if given is None:
        arguments.sequences.write_text(json.dumps(sequences))
    arguments.output.write_text(json.dumps(facts))
    print(json.dumps({key: value for key, value in facts.items() if key != "points"}))


if __name__ == "__main__":
    main()
