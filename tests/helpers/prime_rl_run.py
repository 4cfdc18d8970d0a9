"""Real runs of prime-rl's `rl` and `inference` on CPUs, for tests/prime_rl/test_end_to_end.py.

Needs PRIME_RL_DIR, a checkout with the environment that scripts/setup_prime_rl.sh makes. The commands are started as a
user starts them, in a directory where `landscape` is a link to configs/train; helpers/prime_rl_cpu/ has what a CPU
forces on prime-rl.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from rlvr_landscape_plugin.snapshot import SHIPPED, open_snapshot, read_tensor, safetensors_header

ROOT = Path(__file__).parents[2]
CPU = Path(__file__).parent / "prime_rl_cpu"
POLICY = SHIPPED["tiny-sorter"]
LIMIT = 600.0
"""Seconds that one run may take; a quiet machine of two cores needs about 70."""


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Workplace:
    """A directory from which prime-rl's commands are started, as docs/prime-rl.md makes it."""

    checkout: Path
    root: Path
    environment_dir: str = ".venv-cpu"
    runs: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        link = self.root / "landscape"
        if not link.exists():
            link.symlink_to(ROOT / "configs" / "train")

    @property
    def bin(self) -> Path:
        return self.checkout / self.environment_dir / "bin"

    def environment(self, **more: str) -> dict[str, str]:
        """Variables of a process that runs prime-rl on the CPU with this project's plugin."""
        path = os.pathsep.join(map(str, (CPU, ROOT)))
        own = {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": path,
            "PRIME_RL_ON_CPU": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "0,1,2",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "WANDB_MODE": "offline",
        }
        return os.environ | own | more

    def overlay(self, name: str, **changes: Any) -> tuple[Path, Path]:
        """helpers/prime_rl_cpu/`name`.toml with its places filled in, and a file with `changes` (tables as dicts)."""
        text = (CPU / f"{name}.toml").read_text()
        places = {"OUTPUTS": str(self.root / "outputs"), "POLICY": str(POLICY), "PORT": str(free_port())}
        for place, value in places.items():
            text = text.replace(f"@{place}@", value)
        written = self.root / f"cpu_{name}.toml"
        written.write_text(text)
        extra = self.root / f"changes_{name}.json"
        extra.write_text(json.dumps(changes))
        return written, extra

    def rl(
        self, *arguments: str, variant: str | Path | None = None, env: Mapping[str, str] | None = None, **changes: Any
    ) -> Run:
        """Start `rl @ landscape/alphabet_sort.toml [@ landscape/prime_rl/VARIANT.toml] @ overlays`."""
        overlay, extra = self.overlay("train", **changes)
        files = ["landscape/alphabet_sort.toml", str(overlay)]
        if variant is not None:
            files.append(f"landscape/prime_rl/{variant}.toml" if isinstance(variant, str) else str(variant))
        files.append(str(extra))
        command = [str(self.bin / "rl"), *(part for file in files for part in ("@", file)), *arguments]
        name = "alphabet-sort"
        if variant is not None:
            stem = variant if isinstance(variant, str) else variant.stem
            name = f"alphabet-sort-{stem.replace('_', '-')}"
        log = self.root / f"rl_{len(self.runs)}.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=self.environment(**(env or {})),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
            )
        run = Run(process, log, self.root / "outputs" / name)
        self.runs.append(run)
        return run


@dataclass
class Run:
    """One start of `rl`."""

    process: subprocess.Popen[bytes]
    log: Path
    directory: Path

    def wait(self) -> int:
        """The launcher's exit code; ends all it started if it takes longer than LIMIT."""
        try:
            return self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"rl took more than {LIMIT:g} s\n{self.tail()}") from None

    def end(self) -> None:
        """End what is left of the launcher and what it started."""
        end_tree(self.process)

    def wait_for(self, mark: Path) -> str:
        """The text of a file that the run will make."""
        deadline = time.monotonic() + LIMIT
        while not mark.exists():
            assert self.process.poll() is None, f"rl ended before {mark.name} was there\n{self.tail()}"
            assert time.monotonic() < deadline, f"no {mark.name} within {LIMIT:g} s\n{self.tail()}"
            time.sleep(0.05)
        return mark.read_text()

    def tail(self) -> str:
        """The ends of all logs, without colours."""
        logs = [self.log, *sorted((self.directory / "logs" / "latest").glob("*.log"))]
        return "\n".join(f"--- {log.name}\n{plain(log)[-3000:]}" for log in logs if log.is_file())

    @property
    def trainer_log(self) -> str:
        return plain(self.directory / "logs" / "latest" / "trainer.log")

    def metrics(self) -> dict[int, dict[str, float]]:
        """What metrics.jsonl says, by step; later lines of a step add to earlier ones."""
        found: dict[int, dict[str, float]] = {}
        for line in (self.directory / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["step"], {}).update(row)
        return found


def plain(log: Path) -> str:
    """A log without the codes for colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that descends from it, gently and then not."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=15)
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(30)


def weights(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of the *.safetensors files in a directory, as their bits."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = safetensors_header(file)
        found |= {name: read_tensor(tensors, name) for name in tensors}
    return found


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to bfloat16, to the nearest and ties to even, as float32."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def snapshots_equal_broadcasts(run: Run, steps: tuple[int, ...]) -> None:
    """Check that the snapshots are exactly those of `steps`, whole, with the weights that inference got."""
    root = run.directory / "snapshots"
    there = sorted(path.name for path in root.iterdir() if path.name != "failures.jsonl")
    assert there == [f"step_{step:06d}" for step in steps]
    for step in steps:
        snapshot = open_snapshot(root / f"step_{step:06d}")
        snapshot.verify()
        assert snapshot.step == step
        mine, sent = weights(snapshot.path), weights(run.directory / "broadcasts" / f"step_{step}")
        tied = set(sent) - set(mine)
        assert tied <= {"lm_head.weight"}, tied
        if tied:
            np.testing.assert_array_equal(sent["lm_head.weight"], mine["model.embed_tokens.weight"])
        for name, values in mine.items():
            np.testing.assert_array_equal(values, sent[name], err_msg=f"step {step}, {name}")


@contextlib.contextmanager
def inference(workplace: Workplace, model: Path, token: str, roots: Path) -> Iterator[str]:
    """prime-rl's own `inference` with the landscape plugin; yields its address."""
    overlay, _ = workplace.overlay("inference")
    port = free_port()
    log = workplace.root / "inference.log"
    command = [str(workplace.bin / "inference"), "@", "landscape/prime_rl/inference.toml", "@", str(overlay)]
    command += ["--vllm.model", str(model), "--server.port", str(port)]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            cwd=workplace.root,
            env=workplace.environment(RLVR_LANDSCAPE_TOKEN=token, RLVR_LANDSCAPE_ROOTS=str(roots)),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
        )
    try:
        deadline = time.monotonic() + LIMIT
        while not _healthy(port):
            assert process.poll() is None, plain(log)[-4000:]
            assert time.monotonic() < deadline, plain(log)[-4000:]
            time.sleep(0.25)
        yield f"http://127.0.0.1:{port}"
    finally:
        end_tree(process)


def _healthy(port: int) -> bool:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def project(workplace: Workplace, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A command of this project's own environment, in the workplace's directory."""
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, cwd=workplace.root, env=os.environ | env, capture_output=True, text=True, timeout=LIMIT
    )
