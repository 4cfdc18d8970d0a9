"""The laptop study: training runs, censuses, paths, boundaries, grids and a page, in stages.

    make study                                     # every stage that is not done
    make study STAGES="train-grpo-* page"          # some of them, by name or pattern
    make study STUDY="--minutes 55"                # none that would not fit into the next 55 minutes
    python scripts/study.py --list                 # what there is, what is done, how long the rest takes
    python scripts/study.py --reduced              # one run each, fewer directions, about ten minutes: `make reproduce`
    python scripts/study.py --short                # every kind of stage at toy size, to see that all of it works

A stage that was killed continues where it was; a stage whose outputs are whole is skipped. `record.json` in the output
says when each stage ran, how long, on what, with which seeds, and how many rollouts it made; the page reads it.
"""

from __future__ import annotations

import fnmatch
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

START = "start"
"""Directory of what is measured around step 0, which all runs share."""


@dataclass(frozen=True)
class Size:
    """How much is trained and measured."""

    seeds: tuple[int, ...]
    objectives: tuple[str, ...]
    snapshots: str
    middle: int
    last: int
    between: tuple[int, ...]
    """Further steps of GRPO's runs, for boundaries and paths."""
    early: tuple[int, ...]
    """Further censuses, of the first GRPO run."""
    slowness: float = 1.0
    """Time that a stage takes, in parts of its estimate at full size."""
    options: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Part of a command (`train`, or a sweep's configuration) → what is changed for this size."""
    without: tuple[str, ...] = ()
    """Patterns of the stages that are left out; `others-*` also leaves other people out of step 0."""


FULL = Size(
    seeds=(0, 1, 2),
    objectives=("grpo", "random", "grpo_n"),
    snapshots="0-2, 5, 10, 20, 40",
    middle=10,
    last=40,
    between=(5, 20),
    early=(1, 2, 5, 20),
)
_SOME = ("--env.num_prompts", "32")
REDUCED = Size(
    seeds=(0,),
    objectives=("grpo", "random"),
    snapshots="0, 8, 16",
    middle=8,
    last=16,
    between=(),
    early=(),
    slowness=0.13,
    options={
        "train": (
            *("--steps", "16", "--snapshots", "0, 8, 16", "--monitor_rollouts", "32"),
            *("--env.tasks_per_batch", "32", "--env.rollouts", "8"),
            *("--evaluation.every", "8", "--evaluation.num_tasks", "64", "--evaluation.rollouts", "8"),
        ),
        "census": (*_SOME, "--census.pairs", "16", "--census.radii", "[2.0, 20.0]"),
        "census_start": (*_SOME, "--census.pairs", "16", "--census.radii", "[0.01, 0.2]"),
        "path": (*_SOME, "--path.positions", "[-1.0, -0.5, -0.25, 0.0, 0.25]"),
        "path_last": (*_SOME, "--path.positions", "[-1.0, -0.5, -0.25, 0.0, 0.25]"),
        "boundary": (*_SOME, "--env.base_rollouts", "64"),
    },
    without=("others-*", "early-*", "grids-*", "path-random-*", "boundary-random-*"),
)
"""What `make reproduce` runs: the same questions with one run each and fewer directions, tasks and steps, which decides
little."""
_FEW = ("--env.num_prompts", "8")
SHORT = Size(
    seeds=(0,),
    objectives=("grpo", "random"),
    snapshots="0-3",
    middle=2,
    last=3,
    between=(1,),
    early=(1,),
    slowness=0.1,
    options={
        "train": (
            *("--steps", "3", "--snapshots", "0-3", "--monitor_rollouts", "8"),
            *("--env.tasks_per_batch", "8", "--env.rollouts", "4"),
            *("--evaluation.every", "1", "--evaluation.num_tasks", "8", "--evaluation.rollouts", "2"),
        ),
        "census": (*_FEW, "--census.pairs", "4", "--census.radii", "[1.0, 10.0]"),
        "census_start": (*_FEW, "--census.pairs", "4", "--census.radii", "[0.005, 0.2]"),
        "path": (*_FEW, "--env.rollouts", "2", "--path.positions", "[-1.0, 0.0, 0.5]"),
        "path_last": (*_FEW, "--env.rollouts", "2", "--path.positions", "[-1.0, 0.0, 0.5]"),
        "boundary": (*_FEW, "--env.base_rollouts", "16"),
        "others": (*_FEW, "--env.base_rollouts", "4"),
        "grid_local": (*_FEW, "--grid.alpha.points", "3", "--grid.beta.points", "3"),
        "grid_wide": (*_FEW, "--grid.alpha.points", "3", "--grid.beta.points", "3"),
    },
)
"""Every kind of stage in minutes, to see that all of it works; its numbers mean nothing."""


def all_stages(size: Size, out: Path, page: Path) -> list[Stage]:
    """The stages in the order in which they run: what the claims need first."""
    measure = Measurements(size, out)
    what = "around step 0, which all runs share: census, pass@k, and pass@k with other people"
    start = [("census_start", "census", [0]), ("boundary", "boundary", [0]), ("others", "others", [0])]
    if "others-*" in size.without:
        start, what = start[:2], "around step 0, which all runs share: census and pass@k"
    found = [measure.stage("start", what, 17, START, start)]
    # GRPO-N answers other questions than the claims, so its runs come last.
    first = [name for name in size.objectives if name != "grpo_n"]
    runs = [(objective, seed) for seed in size.seeds for objective in first]
    runs += [("grpo_n", seed) for seed in size.seeds if "grpo_n" in size.objectives]
    for objective, seed in runs:
        found += [_training(size, out, objective, seed), *_around(size, measure, objective, seed)]
    main = f"grpo-{size.seeds[0]}"
    what = f"censuses of {main} at {_steps(size.early)}"
    found.append(measure.stage(f"early-{main}", what, 7 * len(size.early), main, [("census", "early", size.early)]))
    slices = [(name, name, (0, size.last)) for name in ("grid_local", "grid_wide")]
    found.append(measure.stage(f"grids-{main}", f"2-D slices of {main}, local and wide", 9, main, slices))
    found = [stage for stage in found if not any(fnmatch.fnmatchcase(stage.name, one) for one in size.without)]
    names = [stage.name for stage in found]
    command = ("scripts/study_page.py", str(out), "--page", str(page), "--expected", *names)
    what = f"verdicts, tables and figures of all that is done, into {page}"
    return [*found, Stage("page", what, 3 * size.slowness, (command,), (page / "README.md",), always=True)]


def _training(size: Size, out: Path, objective: str, seed: int) -> Stage:
    """The training of one run."""
    root = out / f"{objective}-{seed}" / "run"
    options, words = {
        "grpo": ((), "GRPO"),
        "grpo_n": (("--objective.name", "grpo_n"), "GRPO-N"),
        "random": (("--env.taskset.task.reward_mode", "random"), "GRPO on random rewards"),
    }[objective]
    command = (*("-m", "rlvr_landscape_plugin.trl", "@", "configs/study/train.toml", "--output", str(root)), *options)
    command += ("--seed", str(seed), *size.options.get("train", ()))
    steps = [step for step in parse_schedule(size.snapshots) if step <= size.last]
    outputs = [root / SNAPSHOTS_FOLDER / snapshot_name(step) / MANIFEST for step in steps]
    outputs += [root / file for file in (RUN_FILE, METRICS_FILE, EVALUATIONS_FILE)]
    return Stage(
        f"train-{objective}-{seed}",
        f"train by {words}, seed {seed}, to step {size.last}",
        11 * size.slowness,
        (command,),
        tuple(outputs),
        seeds=(seed,),
        last_evaluation=size.last,
    )


def _around(size: Size, measure: Measurements, objective: str, seed: int) -> list[Stage]:
    """The measurements around one run."""
    name = f"{objective}-{seed}"
    ends = (size.last,) if objective == "random" else (size.middle, size.last)
    on_the_way = sorted({*size.between, size.middle})
    many = [*on_the_way, size.last] if objective == "grpo" else [size.last]
    paths = [("path", "path", on_the_way), ("path_last", "path_last", [size.last])]
    own = measure.stage
    # Other directions around each run.
    drawn = size.objectives.index(objective) * len(size.seeds) + size.seeds.index(seed)
    return [
        own(
            f"census-{name}",
            f"censuses of {name} at {_steps(ends)}",
            7 * len(ends),
            name,
            [("census", "census", ends)],
            drawn,
        ),
        own(f"path-{name}", f"paths of {name} along its displacement and its next updates", 5, name, paths),
        own(
            f"boundary-{name}",
            f"pass@k of {name} at {_steps(many)}",
            3.5 * len(many),
            name,
            [("boundary", "boundary", many)],
        ),
        own(f"others-{name}", f"pass@k of {name} with other people", 2, name, [("others", "others", [size.last])]),
    ]


def _steps(steps: Sequence[int]) -> str:
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}"


@dataclass(frozen=True)
class Measurements:
    """Makes stages of sweeps."""

    size: Size
    out: Path

    def stage(
        self,
        name: str,
        what: str,
        minutes: float,
        run: str,
        sweeps: Sequence[tuple[str, str, Sequence[int]]],
        drawn: int = 0,
    ) -> Stage:
        """A stage of sweeps around snapshots of a run: configuration, directory of the output and steps of each.

        `drawn`: seed of the random directions.
        """
        commands, outputs = [], []
        for configuration, folder, steps in sweeps:
            target = self.out / run / folder
            shots = [str(self.out / run / "run" / SNAPSHOTS_FOLDER / snapshot_name(step)) for step in steps]
            files = ("@", "configs/study/tasks.toml", "@", f"configs/study/{configuration}.toml")
            command = ("-m", "rlvr_landscape_plugin.sweep", *files, "--output", str(target), "--snapshots")
            command += (json.dumps(["tiny-sorter"] if run == START else shots),)
            if drawn:
                command += ("--slice.seeds", f"[{drawn}]")
            commands.append((*command, *self.size.options.get(configuration, ())))
            design = "boundary" if configuration == "others" else configuration.partition("_")[0]
            for step in steps:
                outputs.append(target / (landscape_file(step, 0) if design == "grid" else design_file(step, design)))
        needs = () if run == START else (f"train-{run}",)
        return Stage(name, what, minutes * self.size.slowness, tuple(commands), tuple(outputs), needs, (drawn,))


def main(argv: Sequence[str] | None = None, run: Run = run_here) -> int:
    """The command; returns the exit code."""
    made = parser(__doc__, "outputs/study")
    made.add_argument("--reduced", action="store_true", help="one run each, fewer directions; about ten minutes")
    given = made.parse_args(argv)
    if given.short and given.reduced:
        made.error("--short and --reduced are two sizes; give one")
    size, folder = (SHORT, "study_short") if given.short else (REDUCED, "study_reduced")
    if not given.short and not given.reduced:
        size, folder = FULL, "study"
    out = given.output or Path("outputs") / folder
    os.chdir(ROOT)
    stages = all_stages(size, out, given.page or out / "page")
    return carry_out(stages, out, given, run)


if __name__ == "__main__":
    sys.exit(main())
