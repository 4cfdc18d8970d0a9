"""One rank of prime-rl's trainer on a CPU, for tests/test_prime_rl.py: its own loss, broadcast and checkpoint code.

    python prime_rl_driver.py @ trainer.json        (RANK, WORLD_SIZE and DRIVER set, prime-rl on the path)

It does in order what `prime_rl.trainer.rl.train` does: parse the configuration from the command line, set up the loss,
broadcast the incoming policy, and then per step compute the loss, update, broadcast, checkpoint. The model is sharded
with `fully_shard` over a gloo group. Packages that only run on GPUs are inert stand-ins: MoE layers, kernels and
Muon use them, nothing here does. The NCCL broadcast is prime-rl's down to the communicator, which records.
"""

from __future__ import annotations

import errno
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

GPU_ONLY = {"dion", "tilelang", "fla", "ring_flash_attn", "torchao", "torchtitan", "modelexpress", "pynvml"}


class _Inert(type):
    """A class that is its own attributes, items and results, and as a decorator leaves alone what it decorates."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Inert(name, (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        decorates = len(args) == 1 and not kwargs and callable(args[0]) and not isinstance(args[0], _Inert)
        return args[0] if decorates else cls

    def __getitem__(cls, key: Any) -> Any:
        return cls


class _InertModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Inert(name, (), {})


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in GPU_ONLY else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _InertModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def record_nccl(config: Any, plan: dict[str, Any]) -> list[tuple[str, ...]]:
    """Replace what needs GPUs in prime-rl's NCCL broadcast by a record of the names it would send."""
    from prime_rl.transports.weights import nccl
    from prime_rl.utils.utils import get_broadcast_dir, get_step_path

    sent: list[tuple[str, ...]] = []
    replaced: Any = nccl
    replaced.StatelessProcessGroup = _Inert("StatelessProcessGroup", (), {})
    replaced.PyNcclCommunicator = _Inert("PyNcclCommunicator", (), {})
    replaced.disable_nccl_p2p_if_unavailable = lambda: None
    replaced.broadcast_integer = lambda integer, communicator: None
    replaced.broadcast_state_dict = lambda state, communicator: sent.append(tuple(state))
    for step in range(plan["steps"] + 1):  # what the inference pool would say
        folder = get_step_path(get_broadcast_dir(config.output_dir), step)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / nccl.NCCL_READY_MARKER).touch()
    return sent


def main() -> None:
    import transformers.modeling_utils  # noqa: F401 - it looks which packages are there, before the stand-ins are

    sys.meta_path.insert(0, _StandIns())
    plan = json.loads(os.environ["DRIVER"])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    import numpy as np
    import torch
    import torch.distributed as dist
    from prime_rl.configs.trainer import TrainerConfig
    from prime_rl.trainer.ckpt import Progress, setup_ckpt_manager
    from prime_rl.trainer.rl.loss import compute_loss, setup_rl_loss_fn
    from prime_rl.transports.weights import FileSystemWeightBroadcast, NCCLWeightBroadcast
    from prime_rl.utils.config import cli
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    config = cli(TrainerConfig)
    dist.init_process_group("gloo", init_method=f"file://{plan['rendezvous']}", rank=rank, world_size=world)
    loss_fn = setup_rl_loss_fn(config.loss)

    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    mesh = dist.init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)

    sent: list[tuple[str, ...]] = []
    if config.weight_broadcast.type == "nccl":
        sent = record_nccl(config, plan)
        broadcast: Any = NCCLWeightBroadcast(config.output_dir, config.weight_broadcast, "cpu")
    else:
        broadcast = FileSystemWeightBroadcast(config.output_dir, config.weight_broadcast, None)
    ckpt = setup_ckpt_manager(config.output_dir, config.ckpt)

    def keep_truth(step: int) -> None:
        """The weights by torch's own means, to compare snapshots with."""
        whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
        if rank == 0:
            torch.save({name: value.to(torch.bfloat16) for name, value in whole.items()}, plan["truth"] + f"/{step}.pt")

    def full_disk(at: int) -> None:
        import safetensors.torch

        original = safetensors.torch.save_file

        def refuse(tensors: Any, file: Any, metadata: Any = None) -> None:
            if current == at:
                Path(file).write_bytes(b"the beginning of a shard")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            original(tensors, file, metadata)

        # prime-rl bound its own name at import: only the hook, which imports when called, sees this one.
        safetensors.torch.save_file = refuse

    current = 0
    if plan.get("full_disk", {}).get("rank") == rank:
        full_disk(plan["full_disk"]["step"])

    keep_truth(0)
    broadcast.broadcast_weights(model, step=0)
    rng = np.random.default_rng(7)
    lengths = [9, 1, 14]
    records: dict[str, Any] = {}
    for step in range(1, plan["steps"] + 1):
        current = step
        ids = torch.from_numpy(rng.integers(0, 2048, (1, sum(lengths))))
        logits = model(input_ids=ids).logits[0]
        logprobs = logits.log_softmax(-1).gather(-1, ids.roll(-1, 1)[0][:, None])[:, 0]
        old = logprobs.detach() + torch.from_numpy(0.3 * rng.standard_normal(sum(lengths))).float()
        advantages = torch.from_numpy(np.repeat([0.7, -1.1, -0.4], lengths)).float()
        mask = torch.from_numpy(rng.random(sum(lengths)) < 0.6)
        mask[9] = False  # a sequence without a sampled token
        loss, metrics = compute_loss(
            trainer_logprobs=list(logprobs.split(lengths)),
            inference_logprobs=list(old.split(lengths)),
            ref_logprobs=None,
            advantages=list(advantages.split(lengths)),
            loss_mask=list(mask.split(lengths)),
            rl_weights=None,
            ce_weights=None,
            ref_kl_weights=None,
            rl_loss_fn=loss_fn,
            rl_scale=int(mask.sum()),
            ce_scale=1,
            ref_kl_scale=1,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        records |= {
            f"{step}/logprobs": logprobs.detach().double().numpy(),
            f"{step}/old": old.double().numpy(),
            f"{step}/advantages": advantages.double().numpy(),
            f"{step}/mask": mask.numpy(),
            f"{step}/loss": loss.detach().double().numpy(),
            **{f"{step}/metric/{name}": value.double().numpy() for name, value in metrics.items()},
        }
        keep_truth(step)
        # As in train.py: nobody samples from the last policy, so a broadcast in memory leaves it out.
        if config.weight_broadcast.type == "filesystem" or step < plan["steps"]:
            broadcast.broadcast_weights(model, step=step)
    if config.ckpt is not None:
        ckpt.save(plan["steps"], model, [optimizer], scheduler, Progress(step=plan["steps"]))
    if rank == 0:
        np.savez(plan["records"], lengths=lengths, sent=len(sent), **records)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
