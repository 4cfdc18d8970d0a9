"""The policy from which the KL term of an objective is measured, and its resets."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from rlvr_landscape_plugin.config import ReferenceConfig
from rlvr_landscape_plugin.errors import StoreError
from rlvr_landscape_plugin.objectives import ReferenceSchedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDER = "reference"
"""Directory within a training state that holds the KL reference, if it can be reset at all."""


class KLReference:
    """The policy at the start, until a schedule replaces it by the present one (`config.ReferenceConfig`)."""

    def __init__(self, base: PreTrainedModel, config: ReferenceConfig | None) -> None:
        self.schedule = ReferenceSchedule(**config.model_dump()) if config is not None else None
        self.model = copy.deepcopy(base) if self.schedule is not None else base
        """The reference; without a schedule `base` itself, which nothing changes."""

    def reset_due(self, step: int, held_out: float | None) -> str | None:
        """Why the reference must be reset after `step`; None if not. A reason counts as acted upon."""
        return self.schedule.reset_due(step, held_out) if self.schedule is not None else None

    def reset(self, policy: torch.nn.Module) -> None:
        """Make the weights of `policy` the reference's."""
        self.model.load_state_dict(policy.state_dict())

    def save(self, state: Path) -> None:
        """Keep the reference, and what leads to its next reset, in a training state."""
        if self.schedule is not None:
            self.model.save_pretrained(state / FOLDER)
            (state / FOLDER / "schedule.json").write_text(json.dumps(asdict(self.schedule)))

    def restore(self, state: Path) -> None:
        """Continue with what `save` kept. Raises `StoreError` for a damaged state."""
        if self.schedule is None:
            return
        saved = state / FOLDER
        try:
            self.schedule = ReferenceSchedule(**json.loads((saved / "schedule.json").read_text()))
            self.model.load_state_dict(load_file(saved / "model.safetensors"), strict=False)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise StoreError(
                f"{saved} is damaged ({error}); remove {state} to continue from an earlier state"
            ) from error
        self.model.tie_weights()
