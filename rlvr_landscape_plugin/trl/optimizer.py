"""Muon for the matrices of the layers and AdamW for everything else, behind the interface of one optimizer.

Trainers expect one optimizer. This one holds two optimizers of torch and shares their parameter groups, so that
schedulers and gradient clipping apply to both; its state is the pair of their states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from rlvr_landscape_plugin.config import OptimizerConfig


def make_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` describes for the weights of `model` that have a gradient."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    matrices = [weight for name, weight in named if weight.ndim == 2 and not _is_table(name)]
    if config.name == "adamw":
        return torch.optim.AdamW(
            [weight for _, weight in named], lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
    others = [weight for name, weight in named if weight.ndim != 2 or _is_table(name)]
    return Pair(
        torch.optim.Muon(
            matrices,
            lr=config.muon_lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            adjust_lr_fn="original",
        ),
        torch.optim.AdamW(others, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay),
    )


def _is_table(name: str) -> bool:
    """Whether rows of this matrix stand for tokens rather than for outputs of a linear map."""
    return "embed" in name or "lm_head" in name


class Pair(torch.optim.Optimizer):
    """Two optimizers that step together."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self.parts = (first, second)
        super().__init__(
            [weight for part in self.parts for group in part.param_groups for weight in group["params"]], {}
        )
        self._share()

    def _share(self) -> None:
        # The very same dicts: a scheduler that sets group["lr"] here sets it in the part.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step both; `closure`, if given, is evaluated once before."""
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share()


def forget(optimizer: object) -> None:
    """Drop all moments; learning rates and schedules stay."""
    # accelerate wraps the optimizer of a trainer.
    inner = cast(torch.optim.Optimizer, getattr(optimizer, "optimizer", optimizer))
    for part in inner.parts if isinstance(inner, Pair) else (inner,):
        part.state.clear()
