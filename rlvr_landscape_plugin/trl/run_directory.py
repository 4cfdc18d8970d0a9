"""A run directory: identity, journals, snapshots, and what a killed run continues from.

    run.json            identity: run id, parent run, configuration, checksum of the starting policy
    metrics.jsonl       one line per step
    evaluations.jsonl   one line per evaluation on held-out tasks
    resets.jsonl        one line per reset of the KL reference, where [reference] asks for resets
    snapshots/          step_<N>/, what sweeps measure
    state/              checkpoint-<N>/, what a killed run continues from; the last two
    server.log          the vLLM server's

The same command continues a run that was killed; another configuration in the same directory is refused. Lines of steps
after the state that a run continues from are dropped: those steps are trained again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from rlvr_landscape_plugin.config import TrainConfig
from rlvr_landscape_plugin.errors import StoreError
from rlvr_landscape_plugin.files import JsonObject, digest, publish, replace_text, writing
from rlvr_landscape_plugin.schedule import parse_schedule
from rlvr_landscape_plugin.snapshot import MANIFEST, Manifest, Snapshot, open_snapshot, snapshot_name, write_snapshot
from rlvr_landscape_plugin.snapshot.adapter import CONFIG
from rlvr_landscape_plugin.trl.lora import keep_adapter
from rlvr_landscape_plugin.trl.states import STATES_ARE_SAFE, remove_incomplete

WEIGHT_FILES = {"model.safetensors.index.json", CONFIG, MANIFEST}
"""Files beside *.safetensors that belong to a policy's weights, not to its configuration and tokenizer."""
Save = Callable[[Path], object]
"""Writes a policy's weights into a directory."""


class Lines:
    """A journal of JSON lines keyed by step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[JsonObject]:
        """Every complete line; a line that a kill cut short is ignored."""
        if not self.path.is_file():
            return []
        lines = []
        for text in self.path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
        return lines

    def at(self, step: int) -> JsonObject | None:
        """The line of a step."""
        return next((line for line in self.read() if line["step"] == step), None)

    def append(self, line: JsonObject) -> None:
        """Add a line and sync it. Raises `StoreError` for a disk that refuses."""
        with writing(self.path, STATES_ARE_SAFE), self.path.open("a") as sink:
            sink.write(json.dumps(line) + "\n")
            sink.flush()
            os.fsync(sink.fileno())

    def keep_until(self, step: int) -> None:
        """Drop the lines of later steps, and the rest of a line that was cut short."""
        if not self.path.is_file():
            return
        text = "".join(json.dumps(line) + "\n" for line in self.read() if line["step"] <= step)
        if text != self.path.read_text():
            replace_text(self.path, [text], safe=STATES_ARE_SAFE)


class RunDirectory:
    """The directory of one run. Raises `StoreError` where it cannot be made or holds something else."""

    def __init__(self, config: TrainConfig, base: Snapshot) -> None:
        self.config, self.base = config, base
        self.root = config.output
        self.metrics = Lines(self.root / "metrics.jsonl")
        self.evaluations = Lines(self.root / "evaluations.jsonl")
        self.resets = Lines(self.root / "resets.jsonl")
        self.states = self.root / "state"
        self.snapshots = self.root / "snapshots"
        self.scratch = self.root / "scratch"
        self.log = config.server.log or self.root / "server.log"
        self.schedule = set(parse_schedule(config.snapshots))
        self.identity = self._open()

    def _open(self) -> JsonObject:
        """The identity that `run.json` holds, written first if there is none."""
        wanted = {
            "configuration": self.config.provenance(),
            "policy_sha256": self.base.sha256,
        }
        file = self.root / "run.json"
        if not file.is_file():
            self._check_empty()
            parent = self.base.manifest.run if self.base.manifest is not None else ""
            identity = {"id": uuid.uuid4().hex, "parent_run": parent or None, **wanted}
            text = json.dumps(identity | {"sha256": digest(identity)}, indent=1) + "\n"
            publish(file, lambda scratch: scratch.write_text(text), safe="nothing was begun")
        try:
            stored = json.loads(file.read_text())
            known = {key: stored[key] for key in ("id", "parent_run", *wanted)}
            if stored.get("sha256") not in (None, digest(known)):  # none: of an older version
                raise ValueError("its content is not what its checksum says")
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise StoreError(f"{file} is damaged ({error}); restore it, or give output another directory") from error
        differing = _differences(known["configuration"], wanted["configuration"])
        if known["policy_sha256"] != wanted["policy_sha256"]:
            differing.append(f"the starting policy ({self.config.model}) has other bytes than before")
        if differing:
            raise StoreError(
                f"{self.root} holds a run of another configuration: {'; '.join(differing)}; "
                "give output another directory"
            )
        return known

    def _check_empty(self) -> None:
        """Raise `StoreError` if it is no directory, or holds files of anything but a run that has just begun."""
        if self.root.exists() and not self.root.is_dir():
            raise StoreError(f"{self.root} is a file; output must be a directory")
        try:
            foreign = [item.name for item in self.root.iterdir()] if self.root.is_dir() else []
        except OSError as error:
            raise StoreError(f"{self.root} cannot be read: {error}; give output another directory") from error
        # A kill or a full disk leaves a temporary file of run.json.
        foreign = [name for name in foreign if not (name.startswith(".run.json.") and name.endswith(".tmp"))]
        if foreign:
            raise StoreError(
                f"{self.root} is not empty and no run (it holds {foreign[0]}); give output another directory"
            )

    def rewind(self, step: int) -> None:
        """Go back to the state of `step`: drop later lines, half-written states and snapshots, and old weights."""
        for journal in (self.metrics, self.evaluations, self.resets):
            journal.keep_until(step)
        remove_incomplete(self.states)
        for leftover in (*self.snapshots.glob(".step_*.tmp"), *self.root.glob(".*.jsonl.*.tmp"), self.scratch):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)

    def fill(self, save: Save, folder: Path) -> None:
        """Put a policy into `folder`: weights from `save`, everything else byte for byte from the starting policy.

        Of a LoRA run only the adapter: everything else is the starting policy's.
        """
        save(folder)
        if self.config.lora is not None:
            keep_adapter(folder, self.config.model)
            return
        for file in folder.iterdir():
            if file.suffix != ".safetensors" and file.name not in WEIGHT_FILES:
                file.unlink()
        for file in self.base.path.iterdir():
            if file.is_file() and file.suffix not in (".safetensors", ".md") and file.name not in WEIGHT_FILES:
                shutil.copyfile(file, folder / file.name)

    def snapshot(self, save: Save, step: int) -> Path | None:
        """Write the snapshot of `step` if the schedule names it and it is not there yet."""
        target = self.snapshots / snapshot_name(step)
        if step not in self.schedule or target.exists():
            return None
        line = dict(self.metrics.at(step) or {})
        evaluation = dict(self.evaluations.at(step) or {})
        evaluation.pop("task_rewards", None)
        manifest = Manifest(
            step=step,
            trainer={"name": "trl", "version": version("trl")},
            run=self.identity["id"],
            parent_run=self.identity["parent_run"],
            configuration=self.config.provenance(),
            objective=self.config.objective.model_dump(mode="json"),
            metrics=line | ({"evaluation": evaluation} if evaluation else {}),
        )
        return write_snapshot(
            self.snapshots,
            manifest,
            lambda folder: self.fill(save, folder),
            lambda folder: open_snapshot(folder, self.base),
        )


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Lock the run's directory; raises `StoreError` where another process trains in it. The lock of a killed process is
    free."""
    with contextlib.ExitStack() as stack:
        with writing(root / ".lock", STATES_ARE_SAFE):
            handle = stack.enter_context((root / ".lock").open("w"))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(
                f"another process is training in {root}; wait for it, or give output another one"
            ) from error
        yield


def _differences(stored: object, wanted: object, path: str = "") -> list[str]:
    """One text per key, at any depth, whose value differs."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        return [
            text
            for key in sorted({*stored, *wanted})
            for text in _differences(stored.get(key), wanted.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if stored == wanted else [f"{path} was {stored!r}, is {wanted!r}"]
