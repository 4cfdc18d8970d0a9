"""The snapshot hook: HF weights of the policy at scheduled steps, however prime-rl broadcasts or shards them.

Where prime-rl has the callback that docs/upstream/prime-rl-snapshot-hook.md proposes, the hook registers itself. In 0.8
there is no extension point. There, every run calls `WeightBroadcast.broadcast_weights(model, step)`: with the
incoming policy before the first batch (step 0, or the step it resumes from) and after every update. `install` wraps it,
and `CheckpointManager.save(step, model, …)`, because a broadcast in memory (NCCL, NIXL) leaves out the last step,
whose policy nothing samples from. The wrapped call comes first, so inference does not wait for a snapshot.

At a scheduled step all ranks gather together, each writes the share that prime-rl's own helper leaves it, all exchange
whether that worked, and the master makes the files a snapshot. Every rank reaches that exchange, so one that fails (a
full disk, say) neither hangs the others nor ends training: the failure is logged, a line goes to `failures.jsonl`
beside the snapshots, no half snapshot stays, and the next scheduled step is tried. A rank that fails *within* the
collective gathering, out of GPU memory for instance, leaves the others waiting, as in the broadcast itself.

Weights are in bfloat16, as inference gets them. Of a LoRA run the adapter is kept, see lora.py.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlvr_landscape_plugin.errors import ConfigurationError, LandscapeError, SnapshotError
from rlvr_landscape_plugin.objectives import Objective
from rlvr_landscape_plugin.prime_rl.adapter import LossKwargs
from rlvr_landscape_plugin.prime_rl.lora import adapter_tensors, check_adapter, check_lora, write_adapter
from rlvr_landscape_plugin.prime_rl.versions import check, installed, policy_callback
from rlvr_landscape_plugin.schedule import parse_schedule
from rlvr_landscape_plugin.snapshot import MANIFEST, Manifest, find_snapshots, snapshot_name, write_snapshot

FAILURES = "failures.jsonl"
ADAPTERS = "adapters"
"""Where the snapshots of a LoRA run go, in the run's directory: no sweep takes them for whole policies."""

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".md"}
_UNFINISHED = {".shards", ".tmp"}
"""Ends of the names that a snapshot has before it is one: here, and in `snapshot.write_snapshot`."""
_PRIVATE = {"env_vars", "headers"}
"""Keys of prime-rl's configuration that may hold credentials."""


def install(config: Any, kwargs: LossKwargs, objective: Objective) -> SnapshotHook:
    """Let this process keep snapshots; `config` is prime-rl's TrainerConfig.

    By prime-rl's policy callback where it has one, else by wrapping its broadcast classes and its checkpoint manager.
    Raises ConfigurationError for a prime-rl that the hook does not fit, for a schedule whose last step would never be
    seen, for LoRA that an adapter's files cannot hold, and for a base model whose files are not on this machine.
    """
    classes = _broadcast_classes()
    warning = check(config, [vars(cls)["broadcast_weights"] for cls in classes])
    from prime_rl.trainer.world import get_world

    register = policy_callback()
    steps = frozenset(parse_schedule(kwargs.snapshots or ""))
    if register is None:
        _check_reachable(config, steps)
    if config.model.lora is not None:
        check_lora(config.model.lora)
    place = "snapshots" if config.model.lora is None else ADAPTERS
    master = get_world().is_master
    hook = SnapshotHook(
        steps=steps,
        root=kwargs.directory or Path(config.output_dir) / place,
        config=config,
        objective={"name": objective.name, "options": dict(objective.options)},
        base=base_directory(config.model.name) if master else None,
    )
    if master:
        clear_leftovers(hook.root)
        if warning is not None:
            _logger().warning(warning)
    if register is not None:
        register(hook)
        return hook
    from prime_rl.trainer.ckpt import CheckpointManager

    for cls in classes:
        wrap(cls, "broadcast_weights", hook)
    wrap(CheckpointManager, "save", hook)
    return hook


def _broadcast_classes() -> list[type]:
    """prime-rl's ways to broadcast; none where it has no such classes, which `check` then tells."""
    try:
        from prime_rl.transports.weights import WeightBroadcast
    except ImportError:
        return []
    return [cls for cls in WeightBroadcast.__subclasses__() if "broadcast_weights" in vars(cls)]


def clear_leftovers(root: Path) -> None:
    """Remove what a trainer that was killed in the middle of a snapshot left; whole snapshots have other names."""
    for folder in root.glob(".step_*"):
        if folder.is_dir() and folder.suffix in _UNFINISHED:
            shutil.rmtree(folder, ignore_errors=True)


def wrap(cls: type, method: str, hook: Callable[[Any, int], None]) -> None:
    """After each `cls.method(…, model, …, step, …)` that returns, call `hook(model, step)`."""
    original = vars(cls)[method]
    signature = inspect.signature(original)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        hook(given["model"], given["step"])
        return result

    setattr(cls, method, wrapped)


def _check_reachable(config: Any, steps: frozenset[int]) -> None:
    broadcast = config.weight_broadcast.type
    if broadcast != "filesystem" and config.ckpt is None and config.max_steps in steps:
        raise ConfigurationError(
            f"snapshots name the last step, max_steps = {config.max_steps}, which a {broadcast} broadcast leaves out; "
            "add [ckpt] (its final checkpoint is seen), or end the schedule earlier"
        )


def base_directory(model: str) -> Path:
    """Where the files of the model that training starts from lie: `model` itself, or its place in the hub's cache."""
    path = Path(model).expanduser()
    if not path.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            path = Path(snapshot_download(model, local_files_only=True))
        except (LocalEntryNotFoundError, ValueError) as error:
            raise ConfigurationError(
                f"trainer.model.name is {model!r}, which is neither a directory nor in this machine's Hugging Face "
                f"cache; snapshots need its config and tokenizer: hf download {model}"
            ) from error
    if not (path / "config.json").is_file():
        raise ConfigurationError(f"trainer.model.name = {model!r}: {path} has no config.json")
    return path


@dataclass
class SnapshotHook:
    """Called with (model, step) after every broadcast and checkpoint, on every rank."""

    steps: frozenset[int]
    """The schedule."""
    root: Path
    """Where step_<N>/ and failures.jsonl go; all ranks must see it."""
    config: Any
    """prime-rl's TrainerConfig."""
    objective: Mapping[str, Any]
    """`name` and `options`, for the manifest."""
    base: Path | None
    """The model training started from, for config and tokenizer; None on ranks that do not publish."""
    tried: set[int] = field(default_factory=set)
    """Steps that were due already: a step may be seen by the broadcast and by the checkpoint."""

    def __call__(self, model: Any, step: int) -> None:
        """Keep the policy if `step` is scheduled; never raises an `Exception`."""
        if step not in self.steps or step in self.tried:
            return
        self.tried.add(step)
        start = time.perf_counter()
        try:
            published = self._keep(model, step)
        except Exception as error:
            self._report(step, error)
        else:
            if published is not None:
                _logger().info(f"Snapshot of step {step} in {published} ({time.perf_counter() - start:.1f} s)")

    def _keep(self, model: Any, step: int) -> Path | None:
        if self.config.model.lora is not None:
            return self._keep_adapter(step)
        return self._keep_policy(model, step)

    def _keep_adapter(self, step: int) -> Path | None:
        import torch.distributed as dist
        from prime_rl.trainer.world import get_world

        world = get_world()
        tensors = _attempt(adapter_tensors)
        reports: list[Any] = [None] * world.world_size
        dist.all_gather_object(reports, tensors if isinstance(tensors, Failure) else None)
        if not world.is_master:
            return None
        _check_reports(reports)
        assert not isinstance(tensors, Failure)
        lora, base = self.config.model.lora, self.config.model.name

        def fill(folder: Path) -> None:
            write_adapter(folder, lora, tensors, base)

        return write_snapshot(self.root, self._manifest(step), fill, read_back=check_adapter)

    def _keep_policy(self, model: Any, step: int) -> Path | None:
        import torch.distributed as dist
        from prime_rl.trainer.world import get_world
        from prime_rl.utils.weights import gather_weights_parallel

        world = get_world()
        shards = self.root / f".{snapshot_name(step)}.shards"
        problem = _attempt(lambda: _fresh(shards)) if world.is_master else None
        try:
            # The gathering is collective and ends with a barrier: the directory is there when the first rank writes.
            written = _attempt(
                lambda: _write_shard(model, gather_weights_parallel(model), shards / f"{world.rank}.safetensors")
            )
            reports: list[Any] = [None] * world.world_size
            dist.all_gather_object(reports, problem if isinstance(problem, Failure) else written)
            if not world.is_master:
                return None
            _check_reports(reports)
            return self._publish(step, shards, reports)
        finally:
            if world.is_master:
                shutil.rmtree(shards, ignore_errors=True)

    def _publish(self, step: int, shards: Path, reports: list[dict[str, int]]) -> Path:
        base = self.base
        assert base is not None

        def fill(folder: Path) -> None:
            parts = [(rank, sizes) for rank, sizes in enumerate(reports) if sizes]
            weight_map: dict[str, str] = {}
            for number, (rank, sizes) in enumerate(parts, start=1):
                part = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
                source = shards / f"{rank}.safetensors"
                if not source.is_file():
                    raise SnapshotError(
                        f"{source}, written by rank {rank}, is not visible to the master; put the snapshots on a file "
                        "system that all trainer nodes share (trainer.loss.kwargs.directory)"
                    )
                os.rename(source, folder / part)
                weight_map |= dict.fromkeys(sizes, part)
            if len(parts) > 1:
                total = sum(sum(sizes.values()) for _, sizes in parts)
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
                (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
            self._copy_base(base, folder)

        return write_snapshot(self.root, self._manifest(step), fill)

    def _copy_base(self, base: Path, folder: Path) -> None:
        """Everything but weights, byte for byte from the starting model; the tokenizer that the run sets instead."""
        for file in base.iterdir():
            weights = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json") or file.name == MANIFEST
            if file.is_file() and not weights and not file.name.startswith("."):
                shutil.copyfile(file, folder / file.name)
        tokenizer = self.config.tokenizer
        if tokenizer.chat_template is not None or tokenizer.name not in (None, self.config.model.name):
            from prime_rl.trainer.model import setup_tokenizer

            setup_tokenizer(tokenizer).save_pretrained(folder)

    def _manifest(self, step: int) -> Manifest:
        return Manifest(
            step=step,
            trainer={"name": "prime-rl", "version": installed() or "unknown"},
            run=os.environ.get("PRL_RUN_ID", ""),
            parent_run=self._parent_run(step),
            configuration=self._configuration(),
            objective=self.objective,
        )

    def _parent_run(self, step: int) -> str | None:
        """The other run that wrote the base model or, where this one resumes, the last snapshot before it."""
        run = os.environ.get("PRL_RUN_ID", "")
        candidates = [self.base] if self.base is not None else []
        if self.config.resume is not None:
            with contextlib.suppress(SnapshotError):
                candidates += [path for path in find_snapshots(self.root) if path.name < snapshot_name(step)]
        for path in reversed(candidates):
            with contextlib.suppress(SnapshotError, OSError):
                found = Manifest.read(path / MANIFEST).run
                if found and found != run:
                    return found
        return None

    def _configuration(self) -> dict[str, Any]:
        """`trainer`, and `orchestrator` where the launcher left its resolved configuration in the run's directory."""
        parts = {"trainer": self.config.model_dump(mode="json")}
        written = Path(self.config.output_dir) / "configs" / "orchestrator.json"
        if written.is_file():
            parts["orchestrator"] = json.loads(written.read_text())
        return _public(parts)

    def _report(self, step: int, error: Exception) -> None:
        """Log an error; no failure here affects training."""
        text = str(error) if isinstance(error, LandscapeError) else f"{type(error).__name__}: {error}"
        _logger().error(f"No snapshot of step {step}; training continues. {text}")
        line = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "error": text}
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with (self.root / FAILURES).open("a") as sink:
                sink.write(json.dumps(line) + "\n")
        except OSError as second:
            _logger().error(f"{self.root / FAILURES} could not be written either: {second}")


@dataclass(frozen=True)
class Failure:
    """The error of one rank."""

    text: str


def _check_reports(reports: list[Any]) -> None:
    """Raise `SnapshotError` with what went wrong on each rank where something did."""
    failed = {rank: report for rank, report in enumerate(reports) if isinstance(report, Failure)}
    if failed:
        raise SnapshotError("; ".join(f"rank {rank}: {failure.text}" for rank, failure in failed.items()))


def _attempt(action: Callable[[], Any]) -> Any:
    """The action's result, or its `Failure`."""
    try:
        return action()
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}")


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_shard(model: Any, weights: dict[str, Any], file: Path) -> dict[str, int]:
    """Save one rank's share under HF names; tensor name → bytes."""
    import torch
    from prime_rl.utils.weights import convert_state_dict_to_hf
    from safetensors.torch import save_file

    # HF checkpoints hold a tied tensor once, and a landscape must move it once.
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name in weights and source in weights and torch.equal(weights[name], weights[source]):
            del weights[name]
    weights = {name: tensor.contiguous() for name, tensor in convert_state_dict_to_hf(model, weights).items()}
    if weights:
        save_file(weights, file, metadata={"format": "pt"})
    return {name: tensor.nbytes for name, tensor in weights.items()}


def _public(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _public(value) for key, value in data.items() if key not in _PRIVATE}
    return [_public(item) for item in data] if isinstance(data, list) else data


def _logger() -> Any:
    from prime_rl.utils.logger import get_logger

    return get_logger()
