"""Supervised warm start on word problems: shows a language model the form of a reply, before it learns from rewards.

A model that never writes `#### 42` is never paid, and a policy that is never paid cannot improve. A few minutes of
supervised training with TRL's SFTTrainer on worked solutions mend that; stop while there is room to learn. The problems
are those of rlvr-word-problems with a seed of their own, so neither training nor evaluation sees them again by design.

    python scripts/warm_start.py --model models/smollm2-135m-instruct --out models/smollm2-word-problems
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

RECORD = "warm_start.json"
"""File beside the weights: what they were trained on and how, the mean loss of the last ten steps, the seconds."""
SEED = 101
"""Task seed of the worked solutions. GRPO practises seed 7, evaluations take 2001 and landscapes 12345."""


def examples(count: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Prompts and worked solutions as conversations, `prompt` and `completion`."""
    from rlvr_word_problems.stories import make_problem
    from rlvr_word_problems.taskset import INSTRUCTION, WordProblemsConfig

    config = WordProblemsConfig(id="rlvr-word-problems", seed=SEED, **options)
    problems = [make_problem(config.settings, config.seed, number) for number in range(count)]
    return [
        {
            "prompt": [{"role": "user", "content": f"{problem.text}\n{INSTRUCTION}"}],
            "completion": [{"role": "assistant", "content": f"{problem.working}\n#### {problem.answer}"}],
        }
        for problem in problems
    ]


def train(
    model: Path, out: Path, steps: int, batch: int, lr: float, options: dict[str, Any], seed: int, threads: int
) -> float:
    """Write the trained policy to `out`; returns the mean loss of the last ten steps, nat per token of the replies."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    policy: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32, local_files_only=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            weight_decay=0.0,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=seed,
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=policy,
            args=settings,
            train_dataset=Dataset.from_list(examples(steps * batch, options)),
            processing_class=tokenizer,
        )
        trainer.train()
        losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    policy.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    # Everything but the weights stays byte for byte what it was.
    for file in model.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".md") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    return sum(losses[-10:]) / len(losses[-10:])


def main() -> None:
    """Train and save; the directory appears whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face checkpoint directory to start from")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="problems per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate of AdamW (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--taskset", type=json.loads, default={}, metavar="JSON", help="options of the taskset")
    args = parser.parse_args()
    if min(args.steps, args.batch, args.threads) < 1:
        parser.error("--steps, --batch and --threads must be at least 1")
    if "seed" in args.taskset:
        parser.error(f"--taskset: seed is {SEED} here, so that other seeds stay unseen; leave it out")
    from rlvr_landscape_plugin.errors import LandscapeError
    from rlvr_landscape_plugin.files import publish_directory
    from rlvr_landscape_plugin.snapshot import open_snapshot

    # Threads that spin while they wait for each other slow down whatever else runs; OpenMP reads this when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    started = time.monotonic()
    try:
        start = open_snapshot(args.model)
        examples(1, args.taskset)  # options that cannot work, before anything is loaded
        settings = {
            "start": start.sha256,
            "steps": args.steps,
            "batch": args.batch,
            "lr": args.lr,
            "seed": args.seed,
            "taskset": args.taskset,
        }
        if args.out.exists():
            if recorded(args.out) != settings:
                raise SystemExit(f"error: {args.out} exists, and no warm start with these options; give another --out")
            print(f"{args.out} is there already")
            return

        def fill(out: Path) -> None:
            loss = train(start.path, out, args.steps, args.batch, args.lr, args.taskset, args.seed, args.threads)
            found = {"settings": settings, "loss": loss, "seconds": round(time.monotonic() - started)}
            (out / RECORD).write_text(json.dumps(found, indent=1) + "\n")

        publish_directory(args.out, fill)
        made = open_snapshot(args.out)
    except (LandscapeError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    found = json.loads((args.out / RECORD).read_text())
    print(json.dumps({"out": str(args.out), **found, "sha256": made.sha256}))


def recorded(out: Path) -> object:
    """The settings that a directory was made with; None where it holds no warm start."""
    try:
        return json.loads((out / RECORD).read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


if __name__ == "__main__":
    main()
