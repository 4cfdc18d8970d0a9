"""The LoRA study: tiny-sorter learns with an adapter; is the landscape in its subspace another one? In stages.

    make lora-study                                   # every stage that is not done, about half an hour
    python scripts/lora_study.py --list               # what there is, what is done, how long the rest takes
    python scripts/lora_study.py --short              # every kind of stage at toy size

One training run of configs/train/lora.toml with smaller batches, then a census inside and one outside of the subspace
in which its adapter can move (configs/sweep/lora_*.toml), with the same random numbers and the same tasks.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlvr_landscape_analysis.schema import EVALUATIONS_FILE, METRICS_FILE, RUN_FILE, SNAPSHOTS_FOLDER, design_file

from rlvr_landscape_plugin.snapshot import MANIFEST, snapshot_name

sys.path.insert(0, str(Path(__file__).parent))
from stages import ROOT, Run, Stage, carry_out, parser, run_here

SPACES = ("inside", "outside")


@dataclass(frozen=True)
class Size:
    """How much is trained and measured."""

    last: int
    """The last step, around which censuses are measured."""
    train: tuple[str, ...]
    """Changes to the configuration of the training."""
    census: tuple[str, ...]
    """Changes to those of the censuses."""
    slowness: float = 1.0
    """Time that a stage takes, in parts of its estimate at full size."""


FULL = Size(
    last=40,
    train=(
        *("--env.tasks_per_batch", "32", "--env.rollouts", "8"),
        *("--evaluation.num_tasks", "128", "--evaluation.rollouts", "8", "--evaluation.every", "10"),
    ),
    census=("--census.pairs", "16"),
)
SHORT = Size(
    last=2,
    train=(
        *("--steps", "2", "--snapshots", "0-2", "--monitor_rollouts", "8", "--optimizer.warmup_steps", "0"),
        *("--env.tasks_per_batch", "8", "--env.rollouts", "4"),
        *("--evaluation.every", "1", "--evaluation.num_tasks", "8", "--evaluation.rollouts", "2"),
    ),
    census=("--env.num_prompts", "8", "--census.pairs", "8", "--census.radii", "[1.0, 10.0]"),
    slowness=0.2,
)
"""Every kind of stage in minutes, to see that all of it works; its numbers mean nothing."""


def all_stages(size: Size, out: Path, page: Path) -> list[Stage]:
    """Training, the two censuses, the page."""
    root = out / "run"
    files = [root / file for file in (RUN_FILE, METRICS_FILE, EVALUATIONS_FILE)]
    command = ("-m", "rlvr_landscape_plugin.trl", "@", "configs/train/lora.toml", "--output", str(root), *size.train)
    found = [
        Stage(
            "train",
            f"train an adapter by GRPO to step {size.last}",
            9 * size.slowness,
            (command,),
            (*(root / SNAPSHOTS_FOLDER / snapshot_name(step) / MANIFEST for step in (0, size.last)), *files),
            seeds=(0,),
            last_evaluation=size.last,
        )
    ]
    for space in SPACES:
        target = out / space
        shot = root / SNAPSHOTS_FOLDER / snapshot_name(size.last)
        command = ("-m", "rlvr_landscape_plugin.sweep", "@", f"configs/sweep/lora_{space}.toml")
        command += ("--output", str(target), "--snapshots", json.dumps([str(shot)]), *size.census)
        what = f"census of step {size.last} {space} the adapter's subspace"
        outputs = (target / design_file(size.last, "census"),)
        found.append(Stage(space, what, 8 * size.slowness, (command,), outputs, ("train",), (0,)))
    command = ("scripts/lora_page.py", str(out), "--page", str(page))
    what = f"figure and tables into {page}"
    return [*found, Stage("page", what, 1, (command,), (page / "README.md",), SPACES, always=True)]


def main(argv: Sequence[str] | None = None, run: Run = run_here) -> int:
    """The command; returns the exit code."""
    given = parser(__doc__, "outputs/lora_study").parse_args(argv)
    out = given.output or Path("outputs/lora_study_short" if given.short else "outputs/lora_study")
    os.chdir(ROOT)
    return carry_out(all_stages(SHORT if given.short else FULL, out, given.page or out / "page"), out, given, run)


if __name__ == "__main__":
    sys.exit(main())
