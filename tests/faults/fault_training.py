"""Training runs that faults strike: TRL's loop with a toy server for sampling."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_files import HOW, damaged
from fault_servers import PATIENCE, Command, Disk, Forked, Host, Missed, Violation
from fault_sweeps import REFUSED, WENT_ON, Commanded, digest_of, fault
from toy_engine import TOKEN

from rlvr_landscape_plugin.serving.launch import LocalServer
from rlvr_landscape_plugin.snapshot import open_snapshot

STEPS = 4
CONFIG = f"""
steps = {STEPS}
snapshots = "0-{STEPS}"
threads = 1
[env]
num_tasks = 8
tasks_per_batch = 2
rollouts = 4
taskset = {{ min_turns = 2, max_turns = 2, max_names_per_turn = 3, seed = 7 }}
[evaluation]
every = 2
num_tasks = 3
rollouts = 2
taskset = {{ seed = 2001 }}
[sampling]
max_tokens = 24
"""


def run_training(arguments: list[str], server: LocalServer) -> int:
    """The command `rlvr-landscape train` on a server that is there already."""
    from rlvr_landscape_plugin.trl import __main__ as command
    from rlvr_landscape_plugin.trl import server as sampler

    @contextlib.asynccontextmanager
    async def toy(*_: Any) -> AsyncIterator[LocalServer]:
        yield server

    sampler.local_server = toy  # type: ignore[assignment]
    return command.main(arguments)


@dataclass
class Training(Commanded):
    """One run directory from the first command to the last step."""

    output: Path
    hosts: list[Host]
    references: dict[str, Any]
    """`training`: SHA-256 of the weights of each snapshot of the undisturbed run."""
    disk: Disk
    rng: random.Random
    log: Path
    process: Command | None = None
    kept: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Files of finished snapshots as they were first seen."""
    done: bool = False
    errors: str = ""

    def files(self) -> list[Path]:
        """Files of finished snapshots."""
        return [path for path in sorted(self.output.glob("snapshots/step_*/*")) if path.is_file()]

    def snapshots(self) -> int:
        return len(list(self.output.glob("snapshots/step_*")))

    def start(self) -> None:
        """Start the command unless it is running."""
        if self.process is not None:
            return
        host = self.hosts[0]
        host.wait()
        config = self.log.with_name("train.toml")
        config.write_text(CONFIG)
        given = ["@", str(config), "--output", str(self.output)]
        host.roots[-1].mkdir(exist_ok=True)
        server = LocalServer(host.gate.url, TOKEN, host.server.pid, host.server.log)
        host.server.log.touch()
        self.process = Forked(run_training, given, server, RLVR_LANDSCAPE_TOKEN=TOKEN)

    def alive(self) -> Command:
        """The command, at work. Raises `Missed` if it has finished."""
        assert self.process is not None
        if self.process.poll() is not None:
            if self.ended() == REFUSED:
                raise Violation(f"the same command did not continue:\n{self.errors}")
            raise Missed
        return self.process

    def moment(self) -> None:
        """Wait for a random moment. Raises `Missed` if the command ended first."""
        self.start()
        target = min(STEPS + 1, self.snapshots() + self.rng.randint(0, 2))
        self._until(lambda: self.snapshots() >= target)
        end = time.monotonic() + self.rng.uniform(0.0, 2.0)
        self._until(lambda: time.monotonic() >= end)

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            self.alive()
            if time.monotonic() > deadline:
                raise Violation(f"nothing moved for {PATIENCE:.0f} s")
            time.sleep(0.01)

    def check(self) -> None:
        """No finished snapshot has vanished or changed."""
        for path in self.files():
            self.kept.setdefault(str(path), digest_of(path))
        for name, state in self.kept.items():
            if not Path(name).exists() or digest_of(Path(name)) != state:
                raise Violation(f"{name} vanished or was changed")

    def check_whole(self) -> None:
        """Every step once, every snapshot whole, and the weights of the undisturbed run."""
        lines = [json.loads(text) for text in (self.output / "metrics.jsonl").read_text().splitlines()]
        if (steps := [line["step"] for line in lines]) != list(range(1, STEPS + 1)):
            raise Violation(f"metrics of steps {steps}")
        found = {}
        for step in range(STEPS + 1):
            snapshot = open_snapshot(self.output / "snapshots" / f"step_{step:06d}")
            snapshot.verify()
            found[step] = snapshot.sha256
        if left := [path.name for path in self.output.rglob(".*.tmp")]:
            raise Violation(f"left behind: {left}")
        if (expected := self.references.setdefault("training", found)) != found:
            differing = [step for step in found if found[step] != expected[step]]
            raise Violation(f"other weights than those of the undisturbed run at steps {differing}")

    def settle(self, *codes: int) -> str:
        """After a fault: until the command ends or keeps another snapshot."""
        before, deadline = self.snapshots(), time.monotonic() + PATIENCE
        assert self.process is not None
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                return self.ended(*codes)
            if self.snapshots() > before:
                self.check()
                return WENT_ON
            time.sleep(0.02)
        raise Violation(f"the command hung for {PATIENCE:.0f} s")

    def kill(self) -> None:
        """kill -9 of the command."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def finish(self) -> None:
        """Without further faults, to the last step."""
        if self.done:
            return
        self.start()
        assert self.process is not None
        self.process.wait(PATIENCE)
        if self.ended() != WENT_ON:
            raise Violation(f"the same command did not continue:\n{self.errors}")


@fault("training: kill -9", training=7)
def kill_training(run: Training) -> tuple[str, str]:
    run.moment()
    run.alive().send_signal(signal.SIGKILL)
    return f"{run.snapshots()} snapshots", run.settle(-signal.SIGKILL)


@fault("training: Ctrl-C", training=4)
def interrupt_training(run: Training) -> tuple[str, str]:
    run.start()
    run._until(lambda: run.snapshots() >= 1)
    run.moment()
    run.alive().send_signal(signal.SIGINT)
    return f"{run.snapshots()} snapshots", run.settle(130)


@fault("training: disk full", training=6)
def full_disk(run: Training) -> tuple[str, str]:
    """R4: at the start or later; with room again the same command begins or continues."""
    left = run.rng.choice([0, 0, 4096, 1_000_000, 4_000_000])
    if run.rng.random() < 0.4:
        run.kill()
        run.disk.fill(left)
        run.start()
    else:
        run.moment()
        run.alive()
        run.disk.fill(left)
    assert run.process is not None
    end = time.monotonic() + run.rng.uniform(1.0, 4.0)
    while time.monotonic() < end and run.process.poll() is None:
        time.sleep(0.02)
    run.disk.mend()
    return f"{left:,} bytes left", run.settle()


@fault("training: the server's connections cut", training=3)
def cut_training(run: Training) -> tuple[str, str]:
    run.moment()
    route = run.rng.choice(["load", "move", "generate"])
    gate = run.hosts[0].gate
    gate.cut_at(route, run.rng.choice([0.0, 1.0]))
    run._until(gate.was_cut.is_set)
    return route, run.settle()


@fault("training: run.json damaged", training=3)
def damaged_identity(run: Training) -> tuple[str, str]:
    """Refused by name; restored from a copy, the run continues."""
    run.moment()
    run.kill()
    return _damage(run, run.output / "run.json")


@fault("training: a journal cut short", training=3)
def cut_journal(run: Training) -> tuple[str, str]:
    """As a kill in the middle of a line leaves it: that step is trained or evaluated again."""
    run.start()
    names = ["metrics.jsonl", "evaluations.jsonl"]
    run._until(lambda: all((run.output / name).exists() for name in names))
    run.kill()
    path = run.output / run.rng.choice(names)
    content = path.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(content[: run.rng.randrange(last, len(content))])
    run.start()
    return path.name, run.settle()


@fault("training: a state damaged", training=4)
def damaged_state(run: Training) -> tuple[str, str]:
    """What a run continues from: a damaged file is never trained on."""
    run.start()
    run._until(lambda: any(run.output.glob("state/checkpoint-*/COMPLETE")))
    run.kill()
    states = sorted(run.output.glob("state/checkpoint-*/COMPLETE"), key=lambda path: int(path.parent.name[11:]))
    path = run.rng.choice([path for path in states[-1].parent.rglob("*") if path.is_file() and path.stat().st_size])
    return _damage(run, path)


def _damage(run: Training, path: Path) -> tuple[str, str]:
    how, whole = run.rng.choice(HOW), path.read_bytes()
    path.write_bytes(damaged(whole, how, run.rng))
    run.start()
    outcome = run.settle()
    if outcome == REFUSED:
        if path.name not in run.errors:
            raise Violation(f"refused without naming {path.name}:\n{run.errors}")
        path.write_bytes(whole)
        return f"{path.name} {how}, put back", outcome
    return f"{path.name} {how}", outcome
