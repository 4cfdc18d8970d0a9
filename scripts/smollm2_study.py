"""The SmolLM2 study: a real language model learns word problems, and what lies around its snapshots, in stages.

    make smollm2-study                                      # every stage that is not done
    make smollm2-study STAGES="train-* page"                # some of them, by name or pattern
    make smollm2-study STUDY="--minutes 55"                 # none that would not fit into the next 55 minutes
    python scripts/smollm2_study.py --list                  # what there is, what is done, how long the rest takes
    python scripts/smollm2_study.py --short                 # every kind of stage at toy size, with tiny-sorter

A snapshot that `make smollm2` made may be copied to OUTPUT/smollm2 before; it is then checked instead of downloaded.

SmolLM2-135M-Instruct gets a supervised warm start on worked solutions, then GRPO trains a LoRA adapter. Beside it, a
policy of tiny-sorter's size learns easy problems of the same taskset. A stage that was killed continues where it was; a
stage whose outputs are whole is skipped. `record.json` in the output says when each stage ran and how long; the page
reads it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlvr_landscape_analysis.schema import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    RUN_FILE,
    SNAPSHOTS_FOLDER,
    design_file,
    landscape_file,
)

from rlvr_landscape_plugin.schedule import parse_schedule
from rlvr_landscape_plugin.snapshot import MANIFEST, snapshot_name

sys.path.insert(0, str(Path(__file__).parent))
from stages import ROOT, Run, Stage, carry_out, parser, run_here

RUN = "grpo"
"""Directory of the training run, and its name on the page."""
TINY = "tiny"
"""Directory of what a policy of tiny-sorter's size has learned, and of what lies around it."""
EASY = {"min_steps": 1, "max_steps": 1, "operations": ["add", "subtract"], "largest": 9}
"""Options of the problems that it learns."""


@dataclass(frozen=True)
class Size:
    """How much is trained and measured."""

    model: str | None
    """A shipped policy to start from; None: SmolLM2, by scripts/get_smollm2.py."""
    warm: tuple[str, ...]
    """Options of the warm start."""
    snapshots: str
    chunks: tuple[int, ...]
    """Steps at which a stage of training ends."""
    around: tuple[int, ...]
    """Steps with a census, a path and a boundary, beside step 0, which has no path."""
    tiny: tuple[str, ...]
    """Options of the small policy's warm start."""
    slowness: float = 1.0
    """Time that a stage takes, in parts of its estimate at full size."""
    options: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Part of a command (`train`, or a sweep's configuration) → what is changed for this size."""

    @property
    def last(self) -> int:
        """The last step."""
        return self.chunks[-1]


FULL = Size(
    model=None,
    warm=("--steps", "20", "--taskset", '{"min_steps": 2, "max_steps": 2}'),
    snapshots="0-2, 5, 10, 20",
    chunks=(5, 10, 20),
    around=(10, 20),
    tiny=("--steps", "100", "--batch", "64", "--lr", "2e-3"),  # later, little is left to learn
)
_FEW = ("--env.num_prompts", "8")
SHORT = Size(
    model="tiny-sorter",
    warm=("--steps", "4", "--batch", "4", "--taskset", '{"max_steps": 1}'),
    snapshots="0-2",
    chunks=(1, 2),
    around=(2,),
    tiny=("--steps", "4", "--batch", "4"),
    slowness=0.05,
    options={
        "train": (
            *("--snapshots", "0-2", "--monitor_rollouts", "4", "--lora.rank", "2"),
            *("--env.tasks_per_batch", "4", "--env.rollouts", "2"),
            *("--env.taskset.min_steps", "1", "--env.taskset.max_steps", "1"),
            # A coin pays it: so small a policy is never right after so short a warm start, and nothing would move.
            *("--env.taskset.task.reward_mode", "random"),
            *("--evaluation.every", "1", "--evaluation.num_tasks", "4", "--evaluation.rollouts", "2"),
        ),
        "census": (*_FEW, "--census.pairs", "2", "--census.radii", "[1.0, 10.0]"),
        "census_start": (*_FEW, "--census.pairs", "2", "--census.radii", "[0.01, 0.1]"),
        "path": (*_FEW, "--env.rollouts", "2", "--path.positions", "[-1.0, 0.0, 0.5]"),
        "boundary": (*_FEW, "--env.base_rollouts", "4"),
        "grid": (
            *_FEW,
            *("--grid.alpha.points", "3", "--grid.beta.points", "3"),
            *("--grid.find.prompts", "8", "--grid.find.largest_factor", "2"),
        ),
    },
)
"""Every kind of stage in minutes, to see that all of it works; its numbers mean nothing."""


def all_stages(size: Size, out: Path, page: Path) -> list[Stage]:
    """The stages in the order in which they run."""
    made = _Stages(size, out)
    found = [*made.models()]
    for begin, end in zip((0, *size.chunks), size.chunks, strict=False):
        found.append(made.training(begin, end))
    found.append(made.measured("start", 0, ("census_start", "boundary"), 50))
    for step in reversed(size.around):
        found.append(made.measured(f"census-{step}", step, ("census",), 45))
        found.append(made.measured(f"path-{step}", step, ("path", "boundary"), 16))
    found.append(made.measured("grid", size.last, ("grid",), 17))
    found.append(made.check(size.last))
    found += made.small_policy()
    command = ("scripts/smollm2_page.py", str(out), "--page", str(page), "--expected", *(one.name for one in found))
    what = f"tables and figures of all that is done, into {page}"
    return [*found, Stage("page", what, 3 * size.slowness, (command,), (page / "README.md",), always=True)]


@dataclass(frozen=True)
class _Stages:
    """Makes stages of one size and output."""

    size: Size
    out: Path

    @property
    def run(self) -> Path:
        return self.out / RUN / "run"

    def models(self) -> list[Stage]:
        """The model itself, and its warm start."""
        downloaded, warm = self.out / "smollm2", self.out / "warm"
        stages, model, needs = [], str(downloaded), ("snapshot",)
        if self.size.model is None:
            command = ("scripts/get_smollm2.py", "--out", str(downloaded))
            what = "download SmolLM2-135M-Instruct and make a snapshot of it"
            stages.append(Stage("snapshot", what, 3, (command,), (downloaded / "model.safetensors",)))
        else:
            model, needs = self.size.model, ()
        command = ("scripts/warm_start.py", "--model", model, "--out", str(warm), *self.size.warm)
        what = "supervised warm start on worked solutions"
        minutes = 8 * self.size.slowness
        stages.append(Stage("warm", what, minutes, (command,), (warm / "warm_start.json",), needs, seeds=(0,)))
        return stages

    def training(self, begin: int, end: int) -> Stage:
        """Training until step `end`; it continues the run, whose step `begin` an earlier stage has reached."""
        command = ("-m", "rlvr_landscape_plugin.trl", "@", "configs/smollm2/train.toml")
        command += ("--model", str(self.out / "warm"), "--output", str(self.run), "--steps", str(end))
        steps = [step for step in parse_schedule(self.size.snapshots) if begin <= step <= end]
        outputs = [self.run / SNAPSHOTS_FOLDER / snapshot_name(step) / MANIFEST for step in steps]
        outputs += [self.run / file for file in (RUN_FILE, METRICS_FILE, EVALUATIONS_FILE)]
        return Stage(
            f"train-{end}",
            f"train by GRPO to step {end}",
            (1.4 * (end - begin) + 4) * self.size.slowness,
            ((*command, *self.size.options.get("train", ())),),
            tuple(outputs),
            needs=(f"train-{begin}",) if begin else ("warm",),
            seeds=(0,),
            last_evaluation=end,
            after=begin or None,
        )

    def measured(self, name: str, step: int, sweeps: Sequence[str], minutes: float) -> Stage:
        """Sweeps around the snapshot of one step."""
        commands, outputs = [], []
        snapshot = self.run / SNAPSHOTS_FOLDER / snapshot_name(step)
        for configuration in sweeps:
            target = self.out / RUN / configuration
            files = ("@", "configs/smollm2/tasks.toml", "@", f"configs/smollm2/{configuration}.toml")
            command = ("-m", "rlvr_landscape_plugin.sweep", *files, "--output", str(target))
            command += ("--snapshots", json.dumps([str(snapshot)]))
            commands.append((*command, *self.size.options.get(configuration, ())))
            design = configuration.partition("_")[0]
            outputs.append(target / (landscape_file(step, 0) if design == "grid" else design_file(step, design)))
        reached = next(chunk for chunk in self.size.chunks if chunk >= step)
        what = f"{' and '.join(one.partition('_')[0] for one in sweeps)} of step {step}"
        return Stage(
            name, what, minutes * self.size.slowness, tuple(commands), tuple(outputs), (f"train-{reached}",), (0,)
        )

    def small_policy(self) -> list[Stage]:
        """A policy of tiny-sorter's size: its warm start on easy problems, and a slice, a census and a boundary."""
        warm, taskset = self.out / TINY / "warm", json.dumps(EASY)
        command = ("scripts/warm_start.py", "--model", "tiny-sorter", "--out", str(warm), "--taskset", taskset)
        what = "supervised warm start of a policy of tiny-sorter's size on easy problems"
        minutes, outputs = 3 * self.size.slowness, (warm / "warm_start.json",)
        stages = [Stage("tiny-warm", what, minutes, ((*command, *self.size.tiny),), outputs, seeds=(0,))]
        commands, found = [], []
        for configuration in ("grid", "census_start", "boundary"):
            target = self.out / TINY / configuration
            files = ("@", "configs/smollm2/tasks.toml", "@", f"configs/smollm2/{configuration}.toml")
            command = ("-m", "rlvr_landscape_plugin.sweep", *files, "--output", str(target))
            command += ("--snapshots", json.dumps([str(warm)]))
            command += ("--env.taskset", taskset)
            commands.append((*command, *self.size.options.get(configuration, ())))
            design = configuration.partition("_")[0]
            found.append(target / (landscape_file(0, 0) if design == "grid" else design_file(0, design)))
        what = "a slice whose range is found, a census and a boundary of the small policy"
        stages.append(
            Stage("tiny-around", what, 8 * self.size.slowness, tuple(commands), tuple(found), ("tiny-warm",), (0,))
        )
        return stages

    def check(self, step: int) -> Stage:
        """The KL of two points of the census once more, by transformers alone."""
        target = self.out / RUN / "kl_check.json"
        census = self.out / RUN / "census" / design_file(step, "census")
        snapshot = self.run / SNAPSHOTS_FOLDER / snapshot_name(step)
        command = ("scripts/check_kl.py", str(census), "--snapshot", str(snapshot), "--write", str(target))
        what = f"KL of two points of the census of step {step} by a forward pass of transformers"
        return Stage("check", what, 4 * self.size.slowness, (command,), (target,), (f"census-{step}",))


def main(argv: Sequence[str] | None = None, run: Run = run_here) -> int:
    """The command; returns the exit code."""
    given = parser(__doc__, "outputs/smollm2").parse_args(argv)
    out = given.output or Path("outputs/smollm2_short" if given.short else "outputs/smollm2")
    os.chdir(ROOT)
    return carry_out(all_stages(SHORT if given.short else FULL, out, given.page or out / "page"), out, given, run)


if __name__ == "__main__":
    sys.exit(main())
