"""Does the project work, and how fast, on this GPU? At most ten minutes; a rehearsal runs all of it on a CPU.

    bash scripts/gpu_check.sh [--minutes 10] [--only SECTION …] [--smollm2 DIRECTORY] [--output outputs/gpu_check]
    bash scripts/gpu_check.sh --rehearse

Sections, each with a server of its own: `eager` and `graphs` (a random Qwen2 of 0.5 B parameters in bfloat16, without
and with CUDA graphs), `offline` (vLLM's `LLM.generate` on the tokens of `graphs`), `float32` and `bfloat16`
(tiny-sorter, compared with transformers; a landscape), `smollm2` (if its weights are given), `big` (a random Qwen2 of
the size of 7 B), `two-gpus`. Every step runs in a process of its own, writes one JSON line with a verdict, and is
stopped when its time is over; then the next one runs:

- `ok`: all comparisons hold. `failed`: one does not, or the step raised an error or ran out of its time.
- `rehearsed`: the step ran on a CPU, and all comparisons that mean something there hold.
- `skipped`: this machine cannot run it, with the reason. `not run`: the time of the whole check was over.

The last line is one JSON object of all of them. Exit code 0 if nothing failed and everything
ran that this machine can run, 1 otherwise. Logs of the servers and
the lines stay in a new directory below `--output`. `benchmarks/gpu_steps.py` says what each step compares.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_steps import MOVE_SECONDS, Context, Outcome, run

from rlvr_landscape_plugin.config import ServerConfig
from rlvr_landscape_plugin.serving.protocol import TOKEN_VARIABLE
from rlvr_landscape_plugin.snapshot import open_snapshot

LEAST = 5.0
"""Seconds that must be left for a step to begin."""
NOT_RUN = "not run"
MINUTES = {"gpu": 10.0, "rehearsal": 30.0}
"""Time of all steps together; a rehearsal takes as long as the machine's CPU needs."""


@dataclass(frozen=True)
class Step:
    """One process."""

    function: str
    seconds: float
    """The most it may take."""
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """How its line is called."""
        return self.name or self.function


@dataclass(frozen=True)
class Section:
    """Steps that share a model, and a server unless `config` is for an engine of the step's own."""

    name: str
    steps: tuple[Step, ...]
    model: Path | None = None
    """None: steps need none."""
    write: Step | None = None
    """Writes the model first, if it is not there."""
    config: ServerConfig = field(default_factory=ServerConfig)
    start_seconds: float = 0.0
    """The most that the start of the server may take; 0: it needs no server."""
    skipped: str | None = None
    """Why this section cannot run."""


@dataclass(frozen=True)
class Machine:
    """What this machine has."""

    gpus: tuple[str, ...]
    memory_gib: float
    """Of the first GPU."""


def machine() -> Machine:
    """As nvidia-smi says; no GPUs where it is not there."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return Machine((), 0.0)
    rows = [line.rsplit(",", 1) for line in text.splitlines() if line.strip()]
    return Machine(tuple(name.strip() for name, _ in rows), float(rows[0][1]) / 1024 if rows else 0.0)


def plan(here: Machine, scratch: Path, rehearse: bool, smollm2: Path | None) -> list[Section]:
    """All sections; what cannot run on this machine is there with the reason."""
    tiny = open_snapshot("tiny-sorter").path
    small, big = scratch / "small", scratch / "big"
    total = here.memory_gib or 1.0

    def server(dtype: str, weights_gib: float = 1.0, seqs: int = 512, **more: Any) -> ServerConfig:
        # The rest of the GPU is for the slice.
        share = min(0.9, (weights_gib + 8.0) / total) if here.gpus else 0.7
        return ServerConfig(
            device="cpu" if rehearse else "cuda",
            dtype=dtype,
            max_num_seqs=32 if rehearse else seqs,
            max_num_batched_tokens=2048 if rehearse else 8192,
            gpu_memory_utilization=round(share, 3),
            **more,
        )

    def seconds(gpu: float) -> float:
        # On a CPU the limit only ends what hangs.
        return 300.0 if rehearse else gpu

    def moves(limit: float | None, gpu: float) -> tuple[Step, ...]:
        few = {"repeats": 3 if rehearse else 5}
        return (
            Step("moves", seconds(gpu), "moves, resident", few | {"mode": "auto", "limit_s": limit}),
            Step("moves", seconds(gpu), "moves, half", few | {"mode": "half"}),
            Step("moves", seconds(gpu), "moves, regenerated", {"mode": "regenerated", "repeats": 1}),
        )

    eager = [] if rehearse else ["--enforce-eager"]
    bits = (Step("trial", seconds(45)), Step("tour", seconds(45)))
    batch = {"prompts": 4, "rollouts": 4, "repeats": 2} if rehearse else {"prompts": 64, "rollouts": 16, "repeats": 2}
    write_small = Step("write_model", seconds(60), options={"size": "5m" if rehearse else "0.5b"})
    compared = {"prompts": 8, "rollouts": 4}
    graphs = server("bfloat16")
    too_big = None
    if not rehearse and total < 70:
        too_big = f"a model of 7 B parameters and its directions need 70 GiB, the GPU has {total:.0f}"
    elif not rehearse and shutil.disk_usage(scratch).free < 20 * 2**30:
        too_big = f"less than 20 GiB are free in {scratch} for a model of 7 B parameters"
    no_weights = "no weights of SmolLM2 were given (--smollm2 DIRECTORY)" if smollm2 is None else None
    one_gpu = None if len(here.gpus) > 1 and not rehearse else f"this machine has {len(here.gpus)} GPUs"
    return [
        Section("machine", (Step("versions", seconds(90)),)),
        Section(
            "eager",
            (*bits, *moves(MOVE_SECONDS, 45)),
            model=small,
            write=write_small,
            config=server("bfloat16", extra_args=eager),
            start_seconds=seconds(120),
        ),
        Section(
            "graphs",
            (*bits, Step("decode", seconds(30)), Step("rollouts", seconds(90), options=batch)),
            model=small,
            write=write_small,
            config=graphs,
            start_seconds=seconds(150),
        ),
        Section("offline", (Step("offline", seconds(150), options={"repeats": 2}),), model=small, config=graphs),
        Section(
            "float32",
            (Step("reference", seconds(60), options=compared),),
            model=tiny,
            config=server("float32", extra_args=eager),
            start_seconds=seconds(90),
        ),
        Section(
            "bfloat16",
            (
                Step("reference", seconds(60), options=compared),
                Step(
                    "landscape",
                    seconds(120),
                    "landscape of tiny-sorter",
                    {"prompts": 8, "rollouts": 2} if rehearse else {"prompts": 64, "rollouts": 4},
                ),
            ),
            model=tiny,
            config=server("bfloat16"),
            start_seconds=seconds(120),
        ),
        Section(
            "smollm2",
            (
                Step(
                    "landscape",
                    seconds(150),
                    "landscape of SmolLM2",
                    {"prompts": 1, "rollouts": 2} if rehearse else {"prompts": 32, "rollouts": 4},
                ),
            ),
            model=smollm2,
            config=server("bfloat16"),
            start_seconds=seconds(120),
            skipped=no_weights,
        ),
        Section(
            "big",
            (Step("trial", seconds(180)), *moves(None, 180)),
            model=big,
            write=Step("write_model", seconds(90), options={"size": "20m" if rehearse else "7b"}),
            config=server("bfloat16", 15.0, seqs=64, extra_args=eager),
            start_seconds=seconds(150),
            skipped=too_big,
        ),
        Section(
            "two-gpus",
            bits,
            model=small,
            write=write_small,
            config=server("bfloat16", extra_args=eager, tensor_parallel_size=2),
            start_seconds=seconds(150),
            skipped=one_gpu,
        ),
    ]


def verdict(outcome: Outcome, rehearse: bool) -> str:
    """In one word."""
    if outcome.skipped is not None:
        return "skipped"
    if not all(outcome.correct.values()) or (not rehearse and not all(outcome.fast.values())):
        return "failed"
    return "rehearsed" if rehearse and outcome.fast else "ok"


class Check:
    """Runs sections, prints a line per step, and remembers the verdicts."""

    def __init__(self, minutes: float, output: Path, scratch: Path, rehearse: bool) -> None:
        self.verdicts: dict[str, str] = {}
        self.rehearse = rehearse
        self.begun = time.monotonic()
        self._end = self.begun + 60 * minutes
        self._output = output
        self._scratch = scratch

    def say(self, section: Section, label: str, word: str, seconds: float, **more: Any) -> None:
        """Print and keep one line."""
        name = f"{section.name}: {label}"
        self.verdicts[name] = word
        line = json.dumps({"step": name, "verdict": word, "seconds": round(seconds, 1), **more})
        print(line, flush=True)
        with (self._output / "steps.jsonl").open("a") as sink:
            sink.write(line + "\n")

    def left(self, most: float) -> float:
        """Seconds that something may take which may take `most` at most."""
        return min(most, self._end - time.monotonic())

    async def section(self, section: Section) -> None:
        """The model, the server, the steps; what cannot run for want of another is skipped with the reason."""
        labels = ["server start"] * bool(section.start_seconds) + [step.label for step in section.steps]
        if section.skipped is not None:
            return self._skip(section, labels, section.skipped)
        folder = self._folder(section)
        if section.write is not None and not await self._written(section, section.write, folder):
            return self._skip(section, labels, "its model could not be written")
        if not section.start_seconds:
            for step in section.steps:
                await self.step(section, step, folder, None)
            return None
        if self.left(section.start_seconds) < LEAST:
            for label in labels:
                self.say(section, label, NOT_RUN, 0.0, reason=f"no time is left; try --only {section.name}")
            return None
        started = time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            try:
                server = await stack.enter_async_context(self._server(section))
            except (Exception, SystemExit) as error:  # whatever a start raises is the finding
                self._failed(section, "server start", started, error)
                return self._skip(section, labels[1:], "the server did not start")
            self.say(section, "server start", "ok", time.monotonic() - started)
            for step in section.steps:
                await self.step(section, step, folder, server)
        return None

    async def _written(self, section: Section, step: Step, folder: Path) -> bool:
        """Write the section's model, unless an earlier section did."""
        there = section.model is not None and (section.model / "config.json").exists()
        return there or await self.step(section, step, folder, None)

    def _folder(self, section: Section) -> Path:
        """Where steps leave things for later ones; `offline` reads what `graphs` left."""
        folder = self._scratch / ("graphs" if section.name == "offline" else section.name) / "left"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _skip(self, section: Section, labels: Sequence[str], reason: str) -> None:
        for label in labels:
            self.say(section, label, "skipped", 0.0, reason=reason)

    def _failed(self, section: Section, label: str, started: float, error: BaseException) -> None:
        text = "took too long and was stopped" if isinstance(error, TimeoutError) else f"{error}"
        self.say(section, label, "failed", time.monotonic() - started, error=text[-3000:] or type(error).__name__)

    @contextlib.asynccontextmanager
    async def _server(self, section: Section) -> AsyncIterator[Any]:
        """A server within its time; the time of the steps is not counted."""
        from bench_server import serving

        assert section.model is not None
        log = self._output / f"server-{section.name}.log"
        limit = self.left(section.start_seconds)
        context = serving(section.config, section.model, log)
        server = await asyncio.wait_for(context.__aenter__(), limit)
        try:
            yield server
        finally:
            await context.__aexit__(None, None, None)

    async def step(self, section: Section, step: Step, folder: Path, server: Any) -> bool:
        """One step in a process of its own; returns whether it may count on."""
        started = time.monotonic()
        limit = self.left(step.seconds)
        if limit < LEAST:
            self.say(section, step.label, NOT_RUN, 0.0, reason=f"no time is left; try --only {section.name}")
            return False
        given = {
            "name": step.function,
            "url": "" if server is None else server.url,
            "model": str(section.model or ""),
            "folder": str(folder),
            "rehearse": self.rehearse,
            "config": section.config.model_dump(mode="json"),
            "options": step.options,
        }
        env = os.environ | ({} if server is None else {TOKEN_VARIABLE: server.token})
        result = folder / "outcome.json"
        result.unlink(missing_ok=True)
        log = self._output / f"{section.name}-{step.label}.log".replace(", ", "-").replace(" ", "-")
        with log.open("wb") as sink:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, __file__, "--step", json.dumps(given), "--result", str(result)),
                env=env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
            try:
                code = await asyncio.wait_for(process.wait(), limit)
            except TimeoutError as error:
                self._failed(section, step.label, started, error)
                return False
            finally:
                # Whatever the step started shares its group.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        seconds = time.monotonic() - started
        if code or not result.exists():
            text = log.read_text(errors="replace").strip()[-1500:]
            self.say(section, step.label, "failed", seconds, error=f"ended with code {code}: {text}")
            return False
        outcome = Outcome(**json.loads(result.read_text()))
        word = verdict(outcome, self.rehearse)
        more = {key: value for key, value in asdict(outcome).items() if value and key != "skipped"}
        if self.rehearse and outcome.fast:
            # What a CPU's speed says about a GPU's limits is nothing.
            more["not_judged_on_a_cpu"] = list(more.pop("fast"))
        self.say(section, step.label, word, seconds, **more, **({"reason": outcome.skipped} if outcome.skipped else {}))
        return word != "failed"


def one_step(given: dict[str, Any], result: Path) -> None:
    """In the process of a step."""
    context = Context(
        given["url"],
        Path(given["model"]),
        Path(given["folder"]),
        given["rehearse"],
        ServerConfig(**given["config"]),
        given["options"],
    )
    result.write_text(json.dumps(asdict(run(given["name"], context))))


async def check(arguments: argparse.Namespace, output: Path, scratch: Path) -> int:
    """All sections; returns the exit code."""
    here = machine()
    if not (here.gpus or arguments.rehearse):
        raise SystemExit("error: no NVIDIA GPU answers here (nvidia-smi); --rehearse runs the check on a CPU")
    sections = plan(here, scratch, arguments.rehearse, arguments.smollm2)
    if unknown := sorted(set(arguments.only) - {section.name for section in sections}):
        names = ", ".join(section.name for section in sections)
        raise SystemExit(f"error: --only {' '.join(unknown)}: no such section; there are {names}")
    minutes = arguments.minutes or MINUTES["rehearsal" if arguments.rehearse else "gpu"]
    checking = Check(minutes, output, scratch, arguments.rehearse)
    for section in sections:
        if not arguments.only or section.name in arguments.only:
            await checking.section(section)
    words = list(checking.verdicts.values())
    counts = {word: words.count(word) for word in ("ok", "rehearsed", "skipped", NOT_RUN, "failed")}
    whole = not (counts["failed"] or counts[NOT_RUN])
    result = {
        "verdict": "failed"
        if counts["failed"]
        else NOT_RUN
        if not whole
        else "rehearsed"
        if arguments.rehearse
        else "ok",
        "gpus": list(here.gpus),
        "seconds": round(time.monotonic() - checking.begun, 1),
        **counts,
        "output": str(output),
        "steps": checking.verdicts,
    }
    line = json.dumps(result)
    (output / "result.json").write_text(line + "\n")
    print(line)
    return 0 if whole else 1


@contextlib.contextmanager
def directories(output: Path) -> Iterator[tuple[Path, Path]]:
    """A new directory for what stays, and one for models, which are removed."""
    folder = output / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".models-") as scratch:
        yield folder.resolve(), Path(scratch).resolve()


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="run all of it on a CPU, with small models")
    parser.add_argument("--minutes", type=float, help="time of all steps together (default: 10, or 30 in a rehearsal)")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="only these sections")
    parser.add_argument("--smollm2", type=Path, help="a Hugging Face directory of SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu_check"))
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        one_step(json.loads(arguments.step), arguments.result)
        return 0
    if arguments.smollm2 is not None and not (arguments.smollm2 / "config.json").exists():
        raise SystemExit(f"error: --smollm2 {arguments.smollm2}: no config.json there")
    with directories(arguments.output) as (output, scratch):
        try:
            return asyncio.run(check(arguments, output, scratch))
        except KeyboardInterrupt:
            print(f"stopped; what was measured is in {output}", file=sys.stderr)
            return 130


if __name__ == "__main__":
    sys.exit(main())
