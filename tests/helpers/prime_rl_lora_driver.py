"""Train a LoRA adapter for one update with prime-rl's own layers, state, broadcast and loss; for test_prime_rl.py.

    torchrun … prime_rl_lora_driver.py @ trainer.json      (PRIME_RL_ON_CPU=1, RECORDS: a file for the logits)

As in prime-rl's trainer: LoRA is applied before the model is sharded, the loss is set up (which installs the hook), the
incoming policy is broadcast, and again after the update. The model computes in float32, where the trainer's mixed
precision would hide differences below 1e-2.
"""

from __future__ import annotations

import os
from typing import Any


def main() -> None:
    import prime_rl.trainer  # noqa: F401 - from here on "cuda" means "cpu"
    import torch
    import torch.distributed as dist
    from prime_rl.configs.trainer import TrainerConfig
    from prime_rl.trainer.lora import apply_lora_to_model, get_lora_state
    from prime_rl.trainer.models.layers.lora import set_lora_num_tokens
    from prime_rl.trainer.rl.loss import setup_rl_loss_fn
    from prime_rl.transports.weights import FileSystemWeightBroadcast
    from prime_rl.utils.config import cli
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    config = cli(TrainerConfig)
    dist.init_process_group("gloo")
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    apply_lora_to_model(model, config.model.lora)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    setup_rl_loss_fn(config.loss)
    broadcast: Any = FileSystemWeightBroadcast(config.output_dir, config.weight_broadcast, config.model.lora)
    broadcast.broadcast_weights(model, step=0)

    ids = torch.arange(40, 104).reshape(2, 32)
    set_lora_num_tokens(torch.tensor([ids.numel()], dtype=torch.int32))
    trained = [parameter for _, parameter in get_lora_state().named_adapter_parameters()]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    for _ in range(2):  # B is zero at first, so A moves from the second on
        model(input_ids=ids).logits.log_softmax(-1)[..., 7].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    broadcast.broadcast_weights(model, step=1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    if dist.get_rank() == 0:
        torch.save({"ids": ids, "logits": logits}, os.environ["RECORDS"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
