"""What vLLM's per-request seeds cost while decoding.

    python benchmarks/seeds.py

Common random numbers need a seed per request. The same random prompts are decoded to the same length with and without
seeds, in turn, on one vLLM engine: tiny-sorter, then a random model of its depth and width with a vocabulary of 151,936
tokens (that of Qwen2.5). Log-probabilities of the sampled tokens are asked for as a sweep asks for them. Then what one
step of the alternative would cost on one CPU core: a logits processor that picks the tokens of a whole batch by inverse
CDF, against drawing from a generator per request, as vLLM does on a CPU. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlvr_landscape_plugin.config import ServerConfig
from rlvr_landscape_plugin.serving.launch import resolve_device
from rlvr_landscape_plugin.snapshot import open_snapshot

PROMPT_TOKENS = 32
LARGE_VOCABULARY = 151_936


def engine(model: Path, largest: int, tokens: int, random: bool) -> Any:
    """A vLLM engine that decodes `largest` sequences together; `random` weights need only the configuration."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    on_cpu = resolve_device(ServerConfig()) == "cpu"
    return LLM(
        str(model),
        dtype="float32" if on_cpu else "auto",
        load_format="dummy" if random else "auto",
        skip_tokenizer_init=True,
        enforce_eager=on_cpu,
        enable_chunked_prefill=not on_cpu,
        enable_prefix_caching=False,
        max_model_len=PROMPT_TOKENS + tokens,
        max_num_seqs=largest,
        max_num_batched_tokens=PROMPT_TOKENS * largest,
    )


def measure(model: Path, batches: list[int], tokens: int, rounds: int, random: bool) -> dict[int, dict[str, float]]:
    """Decoded tokens per second (median over rounds) of each batch size, without and with seeds."""
    from vllm import SamplingParams

    llm = engine(model, max(batches), tokens, random)
    rng = np.random.default_rng(0)
    prompts: Any = [{"prompt_token_ids": row} for row in rng.integers(3, 2000, (max(batches), PROMPT_TOKENS)).tolist()]

    def seconds(batch: int, seeded: bool) -> float:
        common = {"max_tokens": tokens, "ignore_eos": True, "detokenize": False, "logprobs": 0, "flat_logprobs": True}
        params = [SamplingParams(seed=index if seeded else None, **common) for index in range(batch)]
        start = time.perf_counter()
        llm.generate(prompts[:batch], params, use_tqdm=False)
        return time.perf_counter() - start

    rates = {}
    for batch in batches:
        seconds(batch, True)
        times: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(rounds):
            for seeded in (False, True) if turn % 2 else (True, False):
                times[seeded].append(seconds(batch, seeded))
        rates[batch] = {
            name: batch * tokens / statistics.median(times[seeded])
            for name, seeded in (("without", False), ("with", True))
        }
    llm.llm_engine.engine_core.shutdown()
    return rates


def alternative(batch: int, vocabulary: int, rounds: int) -> tuple[float, float]:
    """Milliseconds of a step on one core: (drawing from a generator per request, choosing by inverse CDF)."""
    import torch

    torch.set_num_threads(1)
    logits, uniform = torch.randn(batch, vocabulary), torch.rand(batch, 1)
    generators = [torch.Generator().manual_seed(index) for index in range(batch)]
    seeds = torch.zeros(batch, dtype=torch.long)

    def per_request() -> None:
        for index, generator in enumerate(generators):
            seeds[index] = torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long).item()

    def processor() -> None:
        chosen = torch.searchsorted(logits.softmax(dim=-1).cumsum(dim=-1), uniform).clamp_(max=vocabulary - 1)
        torch.full_like(logits, -torch.inf).scatter_(1, chosen, 0.0)

    times: dict[Any, list[float]] = {per_request: [], processor: []}
    for _ in range(rounds + 1):
        for step, seconds in times.items():
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[per_request][1:]), 1000 * statistics.median(times[processor][1:])


def main(rounds: int) -> None:
    """Both models; table and JSON."""
    policy = open_snapshot("tiny-sorter").path
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((policy / "config.json").read_text()) | {"vocab_size": LARGE_VOCABULARY}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        results = {
            2048: measure(policy, [64, 256, 512], 128, rounds, random=False),
            LARGE_VOCABULARY: measure(Path(folder), [64], 16, rounds, random=True),
        }
    table = Table("vocabulary", "batch", "tokens / s without seeds", "with seeds", "cost", title="decoding")
    cost: dict[str, dict[str, float]] = {}
    for vocabulary, rates in results.items():
        for batch, rate in rates.items():
            share = rate["without"] / rate["with"] - 1
            cost.setdefault(str(vocabulary), {})[str(batch)] = round(share, 4)
            numbers = (f"{rate[name]:,.0f}" for name in ("without", "with"))
            table.add_row(f"{vocabulary:,}", str(batch), *numbers, f"{100 * share:.1f} %")
    steps = {f"{vocabulary}": alternative(256, vocabulary, rounds) for vocabulary in results}
    parts = Table("vocabulary", "generator per request, ms", "processor, ms", title="a step's choice, batch of 256")
    for vocabulary, milliseconds in steps.items():
        parts.add_row(f"{int(vocabulary):,}", *(f"{value:.2f}" for value in milliseconds))
    Console().print(table, parts)
    names = ("per_request_ms", "processor_ms")
    chosen = {key: dict(zip(names, np.round(value, 2).tolist(), strict=True)) for key, value in steps.items()}
    print(json.dumps({"seed_cost": cost, "step": chosen}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="alternations")
    main(parser.parse_args().rounds)
