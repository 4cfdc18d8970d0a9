"""Stages of a study: commands that run once, in order, are recorded, and continue after a kill.

A study is a list of stages. A stage is done when its commands have succeeded and the files that it promises are there;
`record.json` in the output says when each ran, how long, on what, with which seeds, and how many rollouts it made.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import fnmatch
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlvr_landscape_analysis.schema import EVALUATIONS_FILE, METRICS_FILE, RUN_FILE

from rlvr_landscape_plugin.files import digest, replace_text

ROOT = Path(__file__).resolve().parents[1]
RECORD = "record.json"
LOGS = "logs"
BEAT = 60.0
"""Seconds after which the record is told again how long a stage has run."""


@dataclass(frozen=True)
class Share:
    """What a stage has of the machine while others run beside it."""

    cores: tuple[int, ...]
    log: Path
    """Takes what its commands print."""


Run = Callable[[Sequence[str], Share | None], int]
"""Runs a command, which has the whole machine without a share, and returns its exit code."""


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
    after: int | None = None
    """Of training that continues a run: the step until which an earlier stage has trained."""
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
            lines = json_lines(next(path for path in self.outputs if path.name == EVALUATIONS_FILE))
            if self.last_evaluation not in {line.get("step") for line in lines}:
                absent.append(f"the evaluation of step {self.last_evaluation}")
        return absent


def json_lines(path: Path) -> list[dict[str, Any]]:
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
            total += batch * _count(path.with_name(METRICS_FILE), stage.after)
            total += evaluated * _count(path.with_name(EVALUATIONS_FILE), stage.after)
    return total


def _count(journal: Path, after: int | None) -> int:
    """Lines of a journal, of the steps after `after` only."""
    return sum(after is None or line["step"] > after for line in json_lines(journal))


class StudyError(Exception):
    """What a user can get wrong, in words."""


class Study:
    """The stages of one output directory, and the record of what has run."""

    def __init__(self, stages: Sequence[Stage], out: Path, run: Run) -> None:
        """`run` runs a command of a stage and returns its exit code."""
        self.stages, self.out, self._run = list(stages), out, run
        self._file, self._writing = out / RECORD, threading.Lock()
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
                f"stage {stage.name} in {self.out} was run with other settings (its command or a file of its "
                "configuration has changed); give --output another directory"
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

    def run(self, chosen: Sequence[Stage], minutes: float | None, say: Callable[[str], None], jobs: int = 1) -> int:
        """Run what is not done; 0 if nothing failed. A stage that fails leaves those that do not need it.

        `minutes`: no stage is begun whose estimate goes beyond so many minutes from now (the page is always made).
        `jobs`: stages at the same time, each with its part of the cores. Raises `StudyError` for more than cores.
        """
        free, failed, later = self._shares(jobs), [], []
        started = time.monotonic()
        by_name = {stage.name: stage for stage in self.stages}
        at = {stage.name: f"[{i}/{len(chosen)}] {stage.name}" for i, stage in enumerate(chosen, 1)}
        waiting = list(chosen)
        running: dict[Future[bool], tuple[Stage, tuple[int, ...]]] = {}

        def begin(stage: Stage, pool: ThreadPoolExecutor) -> bool:
            """Begin a stage, or tell why not; False where it has to wait for others."""
            if self.done(stage):
                say(f"{at[stage.name]}: is done")
                return True
            ahead = {one.name for one in waiting} | {one.name for one, _ in running.values()}
            waits = [name for name in stage.needs if not self.done(by_name[name])]
            if ahead & set(waits) or (stage.always and (running or waiting[0] is not stage)):
                return False
            if waits:
                say(f"{at[stage.name]}: needs {', '.join(waits)} first")
                (later if set(waits) <= set(later) else failed).append(stage.name)
                return True
            spent = (time.monotonic() - started) / 60
            if minutes is not None and not stage.always and spent + stage.minutes > minutes:
                words = f"about {stage.minutes:.0f} min, more than is left of {minutes:g}; left for another time"
                say(f"{at[stage.name]}: {words}")
                later.append(stage.name)
                return True
            if not free:
                return False
            cores = free.pop(0)
            share = None if jobs == 1 else Share(cores, self.out / LOGS / f"{stage.name}.log")
            where = f"; log: {share.log}" if share else ""
            say(f"{at[stage.name]}: {stage.what}; about {stage.minutes:.0f} min{where}")
            running[pool.submit(self._attempt, stage, say, at[stage.name], share)] = (stage, cores)
            return True

        with ThreadPoolExecutor(jobs, "stage") as pool:
            try:
                while waiting or running:
                    for stage in list(waiting):
                        if begin(stage, pool):
                            waiting.remove(stage)
                    if running:
                        for ended in wait(running, return_when=FIRST_COMPLETED).done:
                            stage, cores = running.pop(ended)
                            free.append(cores)
                            if not ended.result():
                                failed.append(stage.name)
            except BaseException:
                _interrupt_commands()
                raise
        if failed:
            say(f"not done: {', '.join(failed)}; the same command tries again")
        return 1 if failed else 0

    @staticmethod
    def _shares(jobs: int) -> list[tuple[int, ...]]:
        """The cores of each of `jobs` stages."""
        cores = sorted(os.sched_getaffinity(0))
        if not 1 <= jobs <= len(cores):
            raise StudyError(f"--jobs {jobs}: at most one stage per core, and there are {len(cores)} cores here")
        return [tuple(cores[i * len(cores) // jobs : (i + 1) * len(cores) // jobs]) for i in range(jobs)]

    def _attempt(self, stage: Stage, say: Callable[[str], None], at: str, share: Share | None) -> bool:
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
            "beside_others": share is not None,
            "commit": _commit(),
        }
        spent = entry["seconds"]

        def keep_time() -> None:
            entry["seconds"] = round(spent + time.monotonic() - begun, 1)
            self._keep(stage.name, entry)

        # A kill leaves no time to say that it was begun, and how long it ran.
        with _every(BEAT, keep_time):
            code = next((code for command in stage.commands if (code := self._run(command, share))), 0)
        absent = stage.missing()
        if code or absent:
            why = f"exit code {code}" if code else f"{absent[0]} is missing"
            say(f"{at}: failed after {entry['seconds']:.0f} s ({why})")
            return False
        with self._writing:  # netCDF4 reads one file at a time
            rollouts = rollouts_of(stage)
        self._keep(stage.name, entry | {"done": True, "rollouts": rollouts})
        say(f"{at}: done in {entry['seconds']:.0f} s")
        return True

    def _keep(self, name: str, entry: dict[str, Any]) -> None:
        with self._writing:
            self.record["stages"][name] = entry
            replace_text(self._file, [json.dumps(self.record, indent=1) + "\n"])


@contextlib.contextmanager
def _every(seconds: float, do: Callable[[], None]) -> Iterator[None]:
    """Call `do` at the beginning, then every so many seconds from a thread, and once more at the end."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(seconds):
            do()

    do()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        do()


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


def run_here(command: Sequence[str], share: Share | None = None) -> int:
    """Run Python in the repository's root with these arguments; with a share, on its cores and into its log.

    Only vLLM's servers are bound to the cores: more or fewer threads in training would change the last bits of sums.
    """
    with contextlib.ExitStack() as stack:
        env, sink = None, None
        if share is not None:
            env = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, share.cores))}
            share.log.parent.mkdir(parents=True, exist_ok=True)
            sink = stack.enter_context(share.log.open("a"))
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=sink, stderr=sink)
        _COMMANDS.add(process)
        try:
            return process.wait()
        finally:
            _COMMANDS.discard(process)


_COMMANDS: set[subprocess.Popen[bytes]] = set()
"""Those that run."""


def _interrupt_commands(patience: float = 20.0) -> None:
    """End the commands that run. Ctrl-C in a terminal has reached them too, so they get time to end by themselves.

    A shell that starts a study in the background lets it ignore SIGINT, and so do its commands; hence SIGTERM.
    """
    running = list(_COMMANDS)
    for number in (signal.SIGINT, signal.SIGTERM):
        deadline = time.monotonic() + patience
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(number)


def parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """The command line of a study whose outputs go to the directory `output`, at toy size to `output`_short."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("stages", nargs="*", metavar="STAGE", help="names or patterns (default: all)")
    made.add_argument("--output", type=Path, metavar="DIR", help=f"default: {output}, --short: {output}_short")
    made.add_argument("--page", type=Path, metavar="DIR", help="where the page goes (default: OUTPUT/page)")
    made.add_argument("--minutes", type=float, metavar="M", help="begin no stage that goes beyond M minutes from now")
    made.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="N stages at a time, each with its part of the cores"
    )
    made.add_argument("--short", action="store_true", help="toy size, minutes instead of hours")
    made.add_argument("--list", action="store_true", help="only say what there is and what is done")
    return made


def carry_out(stages: Sequence[Stage], out: Path, given: argparse.Namespace, run: Run) -> int:
    """Run the stages that the command line asks for, or list them; returns the exit code."""
    try:
        study = Study(stages, out, run)
        chosen = study.choose(given.stages)
        print(study.overview(chosen), flush=True)
        if given.list:
            return 0
        with alone(out):
            return study.run(chosen, given.minutes, lambda text: print(text, flush=True), given.jobs)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
