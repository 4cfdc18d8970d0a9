"""A sweep that faults strike, what must hold of it after each, and the register of faults."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xarray as xr
from conftest import POLICY, QUIZ, start_sweep
from fault_servers import PATIENCE, Command, Disk, Forked, Host, Missed, Violation
from toy_engine import TOKEN

NAME = "step000000_slice0"
POINTS = 12
WENT_ON, REFUSED, STOPPED, REPAIRED = "went on", "refused, then continued", "stopped, then continued", "repaired"
FAILED, SKIPPED = "FAILED", "skipped"
OUTCOMES = (WENT_ON, REFUSED, STOPPED, REPAIRED, FAILED, SKIPPED)
TOY, REAL, TRAINING = "toy servers", "vLLM", "training"
MEASURED = ("reward", "kl_k1", "kl_k3", "surrogate", "entropy", "completion_tokens", "base_reward", "realised_step")
"""What a toy server must give again to the bit."""


class Subject(Protocol):
    """A sweep or a training run."""

    rng: random.Random
    output: Path
    done: bool

    def finish(self) -> None:
        """Without further faults, to the end."""

    def kill(self) -> None:
        """kill -9 of its command."""


Fault = Callable[[Any], tuple[str, str]]
KINDS: dict[tuple[str, str], tuple[int, Fault]] = {}
"""(what it strikes, name) → (weight in the schedule, the fault: returns a detail and the outcome)."""


def fault(name: str, **weights: int) -> Callable[[Fault], Fault]:
    """Register a kind of fault: `toy`, `real`, `training`: how often it strikes each."""
    benches = {"toy": TOY, "real": REAL, "training": TRAINING}

    def register(function: Fault) -> Fault:
        for bench, weight in weights.items():
            KINDS[benches[bench], name] = (weight, function)
        return function

    return register


def digest_of(path: Path) -> tuple[int, str]:
    """Modification time, ns, and SHA-256 of a file."""
    return path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()


def same_landscape(path: Path, reference: xr.Dataset, exact: bool) -> None:
    """Raise `Violation` unless `path` holds the reference's landscape: `exact`, or but for the rounding of a few
    tokens."""
    with xr.open_dataset(path) as found:
        data = found.load()

    def must(holds: Any, what: str) -> None:
        if not bool(holds):
            raise Violation(f"dataset: {what}")

    must(data.attrs["identity"] == reference.attrs["identity"], "another identity")
    must(set(data.data_vars) == set(reference.data_vars), "other variables")
    must(dict(data.sizes) == dict(reference.sizes), "other sizes")
    must(data.reward.notnull().all() and (data.status != 2).all(), "failed rollouts")
    origin = data.sel(alpha=0.0, beta=0.0)
    must((origin.kl_k1 == 0).all() and (origin.realised_step == 0).all(), "the origin is not exact")
    servers = json.loads(data.attrs["servers"])
    must(any(one["origin_checked_after"] for one in servers), "the weights at the origin were not verified")
    if exact:
        for name in MEASURED:
            must(data[name].identical(reference[name]), f"other values of {name}")
        return
    must(np.allclose(data.realised_step, reference.realised_step, rtol=1e-6), "other steps")
    # Another composition of batches may flip a token of one base completion; its scores are then another completion's.
    same = (data.base_tokens == reference.base_tokens) & (
        np.abs(data.base_sampled_logprob - reference.base_sampled_logprob) < 1e-2
    )
    must(int((~same).sum()) <= 1, f"{int((~same).sum())} of 18 base completions differ")
    must(float(np.abs(data.kl_k1 - reference.kl_k1).where(same, 0).max()) < 1e-2, "other KL")
    must(float((data.reward != reference.reward).mean()) < 0.02, "other rewards")
    must(float(data.recheck_max_difference.max()) < 1e-4, "the second look at the origin differs")


def run_sweep(arguments: list[str]) -> int:
    """The command `rlvr-landscape sweep`."""
    from rlvr_landscape_plugin.sweep.command import main

    return main(arguments)


VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "ranged": ("--grid.find.retention", "0.5"),
    "grown": (),
}
"""Sweeps on toy servers: the usual one; one that finds its range first; one that grew from fewer rollouts."""


class Commanded:
    """An output directory and the command that works in it: what is taken in when the command ends."""

    output: Path
    log: Path
    process: Command | None
    done: bool
    errors: str

    def title(self) -> str:
        """Of the present command, for the log."""
        return self.output.name

    def check(self) -> None:
        """Nothing finished has vanished or changed."""
        raise NotImplementedError

    def check_whole(self) -> None:
        """The result of a command that succeeded."""
        raise NotImplementedError

    def ended(self, *codes: int) -> str:
        """Take the end of the command in; `codes` are those that the fault itself explains."""
        assert self.process is not None
        _, self.errors = self.process.communicate()
        code, self.process = self.process.returncode, None
        with self.log.open("a") as sink:
            sink.write(f"--- {self.title()} ended with {code}\n{self.errors}\n")
        self.check()
        if "Traceback" in self.errors:
            raise Violation(f"a traceback:\n{self.errors}")
        if code == 0:
            self.done = True
            self.check_whole()
            return WENT_ON
        if code in codes:
            return STOPPED
        if code == 2 and sum(line.startswith("error: ") for line in self.errors.splitlines()) == 1:
            return REFUSED
        raise Violation(f"ended with {code}:\n{self.errors}")


@dataclass
class Sweep(Commanded):
    """One output directory from the first command to the dataset."""

    output: Path
    hosts: list[Host]
    references: dict[str, xr.Dataset]
    """Variant → the undisturbed dataset; those that are not there yet are not compared."""
    disk: Disk
    rng: random.Random
    log: Path
    bench: str = TOY
    variant: str = "plain"
    snapshot: Path = POLICY
    """What it measures, on toy servers."""
    process: Command | None = None
    mode: str = ""
    used: list[Host] = field(default_factory=list)
    kept: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Finished points as they were first seen."""
    spoiled: set[str] = field(default_factory=set)
    """Points that a fault of ours damaged."""
    done: bool = False
    errors: str = ""
    """What the last command that ended said."""
    began_with: int = 0
    """Points that were there before the last growth."""

    @property
    def folder(self) -> Path:
        return self.output / NAME

    @property
    def dataset(self) -> Path:
        return self.output / f"landscape_{NAME}.nc"

    @property
    def asked(self) -> int:
        """Files of points when it is finished."""
        return self.began_with + POINTS

    @property
    def reference(self) -> xr.Dataset | None:
        return self.references.get(self.variant)

    def points(self) -> list[Path]:
        return sorted((self.folder / "points").glob("a*.nc"))

    def prepare(self) -> None:
        """What came before the faults, undisturbed: of a sweep that grew, the smaller one."""
        if self.variant != "grown" or self.began_with:
            return
        self.process = self.launch(self.arguments("one", self.hosts[:1]), ["--env.rollouts", "2"])
        if self.process.wait(PATIENCE):
            raise Violation(f"the smaller sweep failed:\n{self.process.communicate()[1]}")
        self.process.communicate()
        self.process = None
        self.began_with = len(self.points())
        self.check()

    def check(self) -> None:
        """No finished point has vanished or changed, except those that we damaged."""
        present = {path.name: path for path in self.points()}
        for name, state in self.kept.items():
            if name in self.spoiled:
                continue
            if name not in present:
                raise Violation(f"point {name} vanished")
            if digest_of(present[name]) != state:
                raise Violation(f"point {name} was changed")
        aside = {path.name.split(".nc.")[0] + ".nc" for path in (self.folder / "points").glob("*.corrupt")}
        if aside - self.spoiled:
            raise Violation(f"healthy points were moved aside: {sorted(aside - self.spoiled)}")
        for name, path in present.items():
            if name not in self.kept and name not in self.spoiled:
                self.kept[name] = digest_of(path)

    def check_secrets(self) -> None:
        """No file that a sweep writes holds the token."""
        secret = TOKEN.encode()
        for path in self.output.rglob("*"):
            if path.is_file() and secret in path.read_bytes():
                raise Violation(f"{path.name} holds the server's token")

    def arguments(self, mode: str, hosts: list[Host]) -> list[str]:
        patience = "150" if mode == "wait" else "0"
        timeout = ["--server.request-timeout", "3"] if mode == "hasty" else []
        addresses = json.dumps([host.gate.url for host in hosts])
        return ["--server.urls", addresses, "--server.patience", patience, *timeout]

    def launch(
        self,
        arguments: list[str],
        more: Sequence[str] = (),
        output: Path | None = None,
        command: Callable[[list[str]], int] = run_sweep,
    ) -> Command:
        """Start a command. `arguments`: of `arguments`; `more`: what else the user types."""
        output = output or self.output
        if self.bench == REAL:
            return start_sweep(output, self.hosts[0].server, *arguments, *more)
        config = self.log.with_name("toy.toml")
        config.write_text(QUIZ)
        given = ["@", str(config), "--output", str(output), "--snapshots", json.dumps([str(self.snapshot)])]
        given += [*arguments, *VARIANTS[self.variant], *more]
        return Forked(command, given, RLVR_LANDSCAPE_TOKEN=TOKEN)

    def start(self, modes: tuple[str, ...] = ("one", "two", "wait", "hasty")) -> None:
        """Start the command unless one of these modes is running already."""
        if self.process is not None:
            if self.mode in modes:
                return
            self.kill()
        self.prepare()
        self.mode = self.rng.choice(modes)
        count = 2 if self.mode == "two" else 1
        if sum(host.ready() for host in self.hosts) < count:
            for host in self.hosts:
                host.wait()
        self.used = [host for host in self.hosts if host.ready()][:count]
        self.rng.shuffle(self.used)
        self.process = self.launch(self.arguments(self.mode, self.used))

    def host(self) -> Any:
        """A server that the command uses, alive."""
        for host in self.used:
            if host.ready():
                return host
        self.used[0].wait()
        return self.used[0]

    def kill(self) -> None:
        """kill -9 of the command."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def moment(self, at_least: int = 0) -> None:
        """Start the command if need be and wait for a random moment of it. Raises `Missed` if it finished first."""
        fresh = self.process is None
        self.start()
        early = fresh and not at_least and self.rng.random() < 0.3
        more = self.rng.randint(1, 2) if fresh else self.rng.randint(0, 1)
        target = 0 if early else max(at_least, min(self.asked, len(self.points()) + more))
        if self.until(lambda: len(self.points()) >= target):
            raise Missed
        long, short = (5.0, 0.7) if self.bench == REAL else (0.8, 0.15)
        if self._over(self.rng.uniform(0, long if early else short)):
            raise Missed

    def _over(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        return self.until(lambda: time.monotonic() >= end)

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for it; whether the command ended first."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process is not None
            if self.process.poll() is not None:
                if self.ended() != REFUSED:
                    return True
                if self.mode != "hasty":
                    raise Violation(f"the same command did not continue:\n{self.errors}")
                self.start(("one",))
            if time.monotonic() > deadline:
                raise Violation(f"nothing moved for {PATIENCE:.0f} s")
            time.sleep(0.01)
        return False

    def alive(self) -> Command:
        """The command, at work. Raises `Missed` if it has finished."""
        assert self.process is not None
        if self.process.poll() is not None:
            if self.ended() == REFUSED and self.mode != "hasty":
                raise Violation(f"the same command did not continue:\n{self.errors}")
            raise Missed
        return self.process

    def title(self) -> str:
        return f"{self.output.name} {self.variant} {self.mode}"

    def check_whole(self) -> None:
        """The undisturbed dataset, and no secret in any file."""
        if self.reference is not None:
            same_landscape(self.dataset, self.reference, self.bench == TOY)
        self.check_secrets()

    def settle(self, *codes: int) -> str:
        """After a fault: until the command ends or has finished two more points (one may have been in flight)."""
        before, deadline = len(self.points()), time.monotonic() + PATIENCE
        assert self.process is not None
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                return self.ended(*codes)
            if len(self.points()) > before + 1:
                self.check()
                return WENT_ON
            time.sleep(0.02)
        raise Violation(f"the command hung for {PATIENCE:.0f} s")

    def finish(self) -> None:
        """Without further faults, to the dataset."""
        if not self.done:
            self.start()
            self.until(lambda: False)
