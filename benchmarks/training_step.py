"""Where the time of a GRPO update goes on a CPU, and what shortens it, measured side by side on one batch.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/training_step.py [--model DIRECTORY] [--tasks 8] [--rollouts 8]

A batch as word problems give it (prompts of about 100 tokens, replies of 8 to 40). Each variant computes the
log-probabilities of the sampled tokens, a loss, its gradient and an update. `whole rows`: every row with its prompt,
padded to the longest, its completion through the output head, as TRL does it. `shared prompts`: what training does here
(`trl/logprobs.py`). `bfloat16`: the same, matrix products in bfloat16 (torch.autocast). `LoRA`: only an
adapter of rank 16 is trained. Without --model a random model of 135 M parameters. Seconds are those of
the process on all its threads (`wall`: of the clock), so that a busy machine does not matter much. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlvr_landscape_plugin.config import LoraConfig, OptimizerConfig
from rlvr_landscape_plugin.trl.logprobs import log_probability
from rlvr_landscape_plugin.trl.lora import add_adapter
from rlvr_landscape_plugin.trl.optimizer import make_optimizer

ADAM = OptimizerConfig(name="adamw", lr=1e-9)


def batch(tasks: int, rollouts: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tokens in the layout of TRL: prompts padded on the left, completions on the right."""
    rng = np.random.default_rng(0)
    asked = rng.integers(80, 121, tasks).repeat(rollouts)
    said = rng.integers(8, 41, tasks * rollouts)
    prompt, completion = int(asked.max()), int(said.max())
    before = np.arange(prompt)[None] >= prompt - asked[:, None]
    after = np.arange(completion)[None] < said[:, None]
    questions = rng.integers(3, vocabulary, (tasks, prompt)).repeat(rollouts, axis=0)
    ids = np.concatenate([questions, rng.integers(3, vocabulary, after.shape)], axis=1)
    attention = np.concatenate([before, after], axis=1)
    return {
        "input_ids": torch.from_numpy(np.where(attention, ids, 2)),
        "attention_mask": torch.from_numpy(attention.astype(np.int64)),
        "mask": torch.from_numpy(after),
    }


def whole_rows(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """log π of the sampled tokens, all rows in one pass, every completion position through the output head."""
    width = inputs["mask"].size(1)
    logits = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        use_cache=False,
        logits_to_keep=width + 1,
    ).logits[:, :-1]
    chosen = torch.log_softmax(logits.float(), -1).gather(2, inputs["input_ids"][:, -width:, None])[..., 0]
    return chosen[inputs["mask"]]


def ours(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same by the project's own function."""
    return log_probability(model, inputs)[0][inputs["mask"]]


def measure(model: Any, inputs: dict[str, torch.Tensor], way: Any, bfloat16: bool, repeats: int) -> dict[str, float]:
    """Median CPU seconds of the parts of an update, wall seconds of all, and the log-probabilities' mean."""
    optimizer = make_optimizer(model, ADAM)
    rows = []
    for _ in range(repeats + 1):
        started, clock = time.perf_counter(), [time.process_time()]
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logprobs = way(model, inputs)
        clock.append(time.process_time())
        (-logprobs.mean()).backward()
        clock.append(time.process_time())
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.append(time.process_time())
        rows.append([*np.diff(clock), time.perf_counter() - started])
    forward, backward, update, wall = np.median(rows[1:], axis=0)
    return {
        "forward": round(float(forward), 2),
        "backward": round(float(backward), 2),
        "optimizer": round(float(update), 2),
        "all": round(float(forward + backward + update), 2),
        "wall": round(float(wall), 2),
        "mean_logprob": round(float(logprobs.detach().mean()), 5),
    }


def main() -> None:
    """Measure every variant and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face directory (default: a random model)")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="names as they are printed (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        path = args.model
        if path is None:
            from models import random_qwen2

            path = random_qwen2(Path(scratch) / "model", "135m", torch.float32)
        model: Any = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32, local_files_only=True)
        inputs = batch(args.tasks, args.rollouts, model.config.vocab_size)
        found = {}
        for adapted in (False, True):
            if adapted:
                model = add_adapter(model, LoraConfig(rank=16), seed=0)
            for name, way, low in (
                ("whole rows", whole_rows, False),
                ("shared prompts", ours, False),
                ("shared prompts, bfloat16", ours, True),
            ):
                label = name + (", LoRA" if adapted else "")
                if args.only is not None and label not in args.only:
                    continue
                found[label] = measure(model, inputs, way, low, args.repeats)
                gc.collect()
                print(f"{label:34} {found[label]}", flush=True)
    sizes = {"episodes": args.tasks * args.rollouts, "sampled_tokens": int(inputs["mask"].sum())}
    print(json.dumps(sizes | found))


if __name__ == "__main__":
    main()
