"""Run prime-rl's unmodified commands on a machine without a GPU.

    PYTHONPATH=tests/helpers/prime_rl_cpu PRIME_RL_ON_CPU=1 rl @ …

prime-rl's trainer asks for CUDA in its code, and imports packages that only GPUs need. `install` puts a finder at the
front of `sys.meta_path`; it stays idle until a process imports `prime_rl.trainer`. Then:

    packages     those in GPU_ONLY become stand-ins whose attributes are classes without content: MoE layers, kernels
                 and Muon name them at import, a dense model on a CPU calls none of them
    devices      "cuda" as an argument of a torch function means "cpu"; `Tensor.cuda` and `Tensor.pin_memory` return
                 their tensor; the trainer's bookkeeping calls in torch.cuda do nothing
    collectives  the process group is gloo; parallel_dims builds its meshes on "cpu"
    three functions of prime-rl are replaced after their module was executed (AFTER): the choice of the attention kernel
                 (sdpa), clipping of gradients (torch's own), and the peak FLOPS of an unknown device (1e12; MFU is
                 divided by it and means nothing here)

Everything else that runs is prime-rl's: launcher, orchestrator, environment servers, inference server, loss, FSDP,
optimiser, broadcast, checkpoints, metrics. What this cannot show: NCCL, NIXL, flash attention's packed sequences,
expert and context parallelism.

A fault for tests, in the trainer only: PRIME_RL_STALL is a regular expression. The first file with a matching path that
safetensors saves or shutil copies is written by half; then the file PRIME_RL_STALL_MARK is made, with the process id
and the path in it, and the process waits there to be killed. A slow disk does the same; this one can be waited for.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import re
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

GPU_ONLY = {"dion", "fla", "modelexpress", "nixl", "ring_flash_attn", "tilelang", "torchao", "torchtitan"}

TRIGGER = "prime_rl.trainer"


class _Hollow(type):
    """A class whose attributes and items are further hollow classes; called as a decorator it changes nothing."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _hollow(name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        decorates = len(args) == 1 and not kwargs and callable(args[0]) and not isinstance(args[0], _Hollow)
        return args[0] if decorates else cls

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__


def _hollow(name: str) -> Any:
    return _Hollow(name, (), {})


class _HollowModule(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _hollow(name)


def _asked_by_transformers() -> bool:
    """Whether the import comes from transformers, which looks which packages exist: these do not."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    while frame is not None and frame.f_code.co_filename.endswith(f"importlib{os.sep}util.py"):
        frame = frame.f_back
    return frame is not None and f"{os.sep}transformers{os.sep}" in frame.f_code.co_filename


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Waits for the trainer, prepares torch for it, and serves stand-ins from then on."""

    active = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name == TRIGGER and not self.active:
            import transformers.modeling_utils  # noqa: F401 - it looks for torchao while there is none

            self.active = True
            prepare_torch()
            if os.environ.get("PRIME_RL_STALL"):
                prepare_stall(os.environ["PRIME_RL_STALL"], Path(os.environ["PRIME_RL_STALL_MARK"]))
        if self.active and name.split(".")[0] in GPU_ONLY and not _asked_by_transformers():
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        if name in AFTER:
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
            assert spec is not None
            assert spec.loader is not None
            _then(spec.loader, AFTER[name])
            return spec
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _HollowModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _then(loader: Any, change: Callable[[Any], None]) -> None:
    """Let `change(module)` follow the loader's execution of the module."""
    execute = loader.exec_module

    def exec_module(module: Any) -> None:
        execute(module)
        change(module)

    loader.exec_module = exec_module


def install() -> None:
    """Put the finder in front. Costs nothing in processes that never import prime-rl's trainer."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


def _attention(module: Any) -> None:
    def resolve_auto_attn(config: Any) -> None:
        config.attn = "sdpa"

    module.resolve_auto_attn = resolve_auto_attn


def _clipping(module: Any) -> None:
    import torch

    def clip(parameters: Any, max_norm: float, ep_enabled: bool = False) -> Any:
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        whole = getattr(norm, "full_tensor", None)
        return whole() if whole is not None else norm

    module.torch_clip_grad_norm_ = clip


def _peak_flops(module: Any) -> None:
    original = module.PerfCounter.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.gpu_peak_flops = self.gpu_peak_flops or 1e12

    module.PerfCounter.__init__ = init


AFTER: dict[str, Callable[[Any], None]] = {
    "prime_rl.trainer.model": _attention,
    "prime_rl.trainer.utils": _clipping,
    "prime_rl.trainer.perf": _peak_flops,
}


def prepare_torch() -> None:
    """Let "cuda" mean "cpu" in this process, and gloo be the process group."""
    import torch
    import torch._utils
    import torch.distributed as dist
    from torch.overrides import TorchFunctionMode

    def cpu(value: Any) -> Any:
        if isinstance(value, str) and value.split(":")[0] == "cuda":
            return "cpu"
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device("cpu")
        return value

    unmoved = {torch.Tensor.cuda, torch.Tensor.pin_memory}

    class CudaIsCpu(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in unmoved:
                return args[0]
            return func(*map(cpu, args), **{key: cpu(value) for key, value in (kwargs or {}).items()})

    CudaIsCpu().__enter__()  # for the life of the process
    torch._utils._get_available_device_type = lambda: "cpu"
    cuda: Any = torch.cuda
    for name in ("empty_cache", "reset_peak_memory_stats", "set_device", "synchronize"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.current_device = lambda: 0
    cuda.max_memory_reserved = lambda *args, **kwargs: 0
    cuda.get_device_capability = lambda *args, **kwargs: (8, 0)
    start: Any = dist.init_process_group

    def init_process_group(backend: Any = None, timeout: Any = None, device_id: Any = None, **kwargs: Any) -> None:
        start("gloo", timeout=timeout, **kwargs)

    dist.init_process_group = init_process_group


def prepare_stall(pattern: str, mark: Path) -> None:
    """Stop for ever in the middle of the first file whose path matches; see the module's docstring."""
    import shutil

    import safetensors.torch

    def wait(file: Any) -> None:
        scratch = mark.with_suffix(".part")
        scratch.write_text(f"{os.getpid()} {file}")
        os.replace(scratch, mark)
        time.sleep(600)

    save, copy = safetensors.torch.save_file, shutil.copyfile

    def save_file(tensors: Any, file: Any, metadata: Any = None) -> None:
        save(tensors, file, metadata)
        if re.search(pattern, str(file)) and not mark.exists():
            os.truncate(file, Path(file).stat().st_size // 2)
            wait(file)

    def copyfile(source: Any, target: Any, **kwargs: Any) -> Any:
        copied = copy(source, target, **kwargs)
        if re.search(pattern, str(target)) and not mark.exists():
            os.truncate(target, Path(target).stat().st_size // 2)
            wait(target)
        return copied

    # prime-rl bound its own name of save_file or binds it after this; its files lie under other paths.
    safetensors.torch.save_file = save_file
    shutil.copyfile = copyfile
