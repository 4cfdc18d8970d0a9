"""The laptop study: training runs, censuses, paths, boundaries, grids and a page, in stages.

    make study                                     # every stage that is not done
    make study STAGES="train-grpo-* page"          # some of them, by name or pattern
    make study STUDY="--minutes 55"                # none that would not fit into the next 55 minutes
    python scripts/study.py --list                 # what there is, what is done, how long the rest takes
    python scripts/study.py --short --output outputs/study_short    # every kind of stage at toy size

A stage that was killed continues where it was; a stage whose outputs are whole is skipped. `record.json` in the output
says when each stage ran, how long, on what, with which seeds, and how many rollouts it made; the page reads it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import fnmatch
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlvr_landscape_analysis.schema import (
    EVALUATIONS_FILE,
    METRICS_FILE,
    RUN_FILE,
    SNAPSHOTS_FOLDER,
    design_file,
    landscape_file,
)

from rlvr_landscape_plugin.files import digest, replace_text
from rlvr_landscape_plugin.schedule import parse_schedule
from rlvr_landscape_plugin.snapshot import MANIFEST, snapshot_name

ROOT = Path(__file__).resolve().parents[1]
RECORD = "record.json"
START = "start"
"""Directory of what is measured around step 0, which all runs share."""
Run = Callable[[Sequence[str]], int]
"""Runs a command and returns its exit code."""


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


FULL = Size(
    seeds=(0, 1, 2),
    objectives=("grpo", "random", "grpo_n"),
    snapshots="0-2, 5, 10, 20, 40",
    middle=10,
    last=40,
    between=(5, 20),
    early=(1, 2, 5, 20),
)
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


@dataclass(frozen=True)
class Stage:
    """A part of the study that runs on its own."""

    name: str
    what: str
    """What it does, in words."""
    minutes: float
    """How long it takes on two cores, estimated."""
    commands: tuple[tuple[str, ...], ...]
    """Arguments of Python, one tuple per command."""
    outputs: tuple[Path, ...]
    """Files that exist, each of them whole, when it is done."""
    needs: tuple[str, ...] = ()
    """Stages that must be done before."""
    seeds: tuple[int, ...] = ()
    last_evaluation: int | None = None
    """Of training: the step whose evaluation ends it."""
    always: bool = False
    """Whether it runs again each time: what it makes depends on which other stages are done."""

    @property
    def settings(self) -> str:
        """Digest of what it runs, the files of its configuration among it."""
        words = [word for command in self.commands for word in command]
        contents = {word: (ROOT / word).read_text() for word in words if word.endswith(".toml")}
        return digest({"commands": self.commands, "contents": contents})

    def missing(self) -> list[str]:
        """What is not there yet."""
        absent = [str(path) for path in self.outputs if not path.is_file()]
        if self.last_evaluation is not None and not absent:
            lines = _json_lines(next(path for path in self.outputs if path.name == EVALUATIONS_FILE))
            if self.last_evaluation not in {line.get("step") for line in lines}:
                absent.append(f"the evaluation of step {self.last_evaluation}")
        return absent


def all_stages(size: Size, out: Path, page: Path) -> list[Stage]:
    """The stages in the order in which they run: what the claims need first."""
    measure = Measurements(size, out)
    what = "around step 0, which all runs share: census, pass@k, and pass@k with other people"
    start = [("census_start", "census", [0]), ("boundary", "boundary", [0]), ("others", "others", [0])]
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


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a journal."""
    lines = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def rollouts_of(stage: Stage) -> int:
    """Episodes that a finished stage played."""
    import xarray as xr

    total = 0
    for path in stage.outputs:
        if path.suffix == ".nc":
            with xr.open_dataset(path) as data:
                total += sum(data[name].size for name in ("reward", "base_reward") if name in data)
        elif path.name == RUN_FILE:
            configuration = json.loads(path.read_text())["configuration"]
            batch = configuration["env"]["tasks_per_batch"] * configuration["env"]["rollouts"]
            evaluated = configuration["evaluation"]["num_tasks"] * configuration["evaluation"]["rollouts"]
            total += batch * len(_json_lines(path.with_name(METRICS_FILE)))
            total += evaluated * len(_json_lines(path.with_name(EVALUATIONS_FILE)))
    return total


class StudyError(Exception):
    """What a user can get wrong, in words."""


class Study:
    """The stages of one output directory, and the record of what has run."""

    def __init__(self, stages: Sequence[Stage], out: Path, run: Run) -> None:
        """`run` runs a command of a stage and returns its exit code."""
        self.stages, self.out, self._run = list(stages), out, run
        self._file = out / RECORD
        self.record: dict[str, Any] = {"stages": {}}
        if self._file.is_file():
            try:
                self.record = json.loads(self._file.read_text())
                self.record["stages"].items()
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise StudyError(
                    f"{self._file} is damaged ({error}); move it away, finished stages are kept"
                ) from error

    def done(self, stage: Stage) -> bool:
        """Whether a stage has finished with these settings and its outputs are whole.

        Raises `StudyError` where it has finished with other ones.
        """
        entry = self.record["stages"].get(stage.name)
        if stage.always or entry is None or not entry["done"] or stage.missing():
            return False
        if entry["settings"] != stage.settings:
            raise StudyError(
                f"stage {stage.name} in {self.out} was run with other settings (its command or a file in "
                "configs/study has changed); give --output another directory"
            )
        return True

    def choose(self, patterns: Sequence[str]) -> list[Stage]:
        """The stages that any of the patterns names, in order. Raises `StudyError` for a pattern that names none."""
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(stage.name, pattern) for stage in self.stages):
                names = ", ".join(stage.name for stage in self.stages)
                raise StudyError(f"no stage is called {pattern!r}; there are {names}")
        wanted = patterns or ["*"]
        return [stage for stage in self.stages if any(fnmatch.fnmatchcase(stage.name, one) for one in wanted)]

    def overview(self, chosen: Sequence[Stage]) -> str:
        """A line per stage, and how long the rest takes."""
        lines, left = [], 0.0
        for stage in chosen:
            done = self.done(stage)
            left += 0 if done else stage.minutes
            seconds = self.record["stages"].get(stage.name, {}).get("seconds", 0)
            state = f"done, {seconds / 60:.0f} min" if done else f"about {stage.minutes:.0f} min"
            lines.append(f"{stage.name:<20} {state:<15} {stage.what}")
        return "\n".join([*lines, f"{len(chosen)} stages; the rest takes about {left / 60:.1f} h on two cores"])

    def run(self, chosen: Sequence[Stage], minutes: float | None, say: Callable[[str], None]) -> int:
        """Run what is not done; 0 if nothing failed. A stage that fails leaves those that do not need it.

        `minutes`: no stage is begun whose estimate goes beyond so many minutes from now (the page is always made).
        """
        started, failed, later = time.monotonic(), [], []
        by_name = {stage.name: stage for stage in self.stages}
        for number, stage in enumerate(chosen, 1):
            at = f"[{number}/{len(chosen)}] {stage.name}"
            if self.done(stage):
                say(f"{at}: is done")
                continue
            waits = [name for name in stage.needs if not self.done(by_name[name])]
            if waits:
                say(f"{at}: needs {', '.join(waits)} first")
                (later if set(waits) <= set(later) else failed).append(stage.name)
                continue
            spent = (time.monotonic() - started) / 60
            if minutes is not None and not stage.always and spent + stage.minutes > minutes:
                say(f"{at}: about {stage.minutes:.0f} min, more than is left of {minutes:g}; left for another time")
                later.append(stage.name)
                continue
            say(f"{at}: {stage.what}; about {stage.minutes:.0f} min")
            if not self._attempt(stage, say, at):
                failed.append(stage.name)
        if failed:
            say(f"not done: {', '.join(failed)}; the same command tries again")
        return 1 if failed else 0

    def _attempt(self, stage: Stage, say: Callable[[str], None], at: str) -> bool:
        entry = {"what": stage.what, "settings": stage.settings, "done": False, "seconds": 0.0, "attempts": 0}
        before = self.record["stages"].get(stage.name)
        if before is not None and before["settings"] == stage.settings and not before["done"]:
            entry |= {key: before[key] for key in ("seconds", "attempts")}
        begun = time.monotonic()
        entry |= {
            "attempts": entry["attempts"] + 1,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "commands": [" ".join(("python", *command)) for command in stage.commands],
            "seeds": list(stage.seeds),
            "cores": len(os.sched_getaffinity(0)),
            "commit": _commit(),
        }
        spent = entry["seconds"]
        # A kill leaves no time to say that it was begun.
        self._keep(stage.name, entry)
        try:
            code = next((code for command in stage.commands if (code := self._run(command))), 0)
        finally:
            entry["seconds"] = round(spent + time.monotonic() - begun, 1)
            self._keep(stage.name, entry)
        absent = stage.missing()
        if code or absent:
            why = f"exit code {code}" if code else f"{absent[0]} is missing"
            say(f"{at}: failed after {entry['seconds']:.0f} s ({why})")
            return False
        self._keep(stage.name, entry | {"done": True, "rollouts": rollouts_of(stage)})
        say(f"{at}: done in {entry['seconds']:.0f} s")
        return True

    def _keep(self, name: str, entry: dict[str, Any]) -> None:
        self.record["stages"][name] = entry
        replace_text(self._file, [json.dumps(self.record, indent=1) + "\n"])


def _commit() -> str:
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Lock the output; raises `StudyError` where another study runs in it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StudyError(f"another study runs in {out}; wait for it, or give --output another one") from error
        yield


def run_here(command: Sequence[str]) -> int:
    """Run Python in the repository's root with these arguments."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("stages", nargs="*", metavar="STAGE", help="names or patterns (default: all)")
    made.add_argument("--output", type=Path, metavar="DIR", help="default: outputs/study, --short: outputs/study_short")
    made.add_argument("--page", type=Path, metavar="DIR", help="where the page goes (default: OUTPUT/page)")
    made.add_argument("--minutes", type=float, metavar="M", help="begin no stage that goes beyond M minutes from now")
    made.add_argument("--short", action="store_true", help="toy size, minutes instead of hours")
    made.add_argument("--list", action="store_true", help="only say what there is and what is done")
    return made


def main(argv: Sequence[str] | None = None, run: Run = run_here) -> int:
    """The command; returns the exit code."""
    given = parser().parse_args(argv)
    out = given.output or Path("outputs/study_short" if given.short else "outputs/study")
    os.chdir(ROOT)
    try:
        study = Study(all_stages(SHORT if given.short else FULL, out, given.page or out / "page"), out, run)
        chosen = study.choose(given.stages)
        print(study.overview(chosen), flush=True)
        if given.list:
            return 0
        with alone(out):
            return study.run(chosen, given.minutes, lambda text: print(text, flush=True))
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
