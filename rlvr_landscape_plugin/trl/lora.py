"""Training of a LoRA adapter by PEFT: the adapter around the policy, and its files in a snapshot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rlvr_landscape_plugin.config import LoraConfig
from rlvr_landscape_plugin.errors import ConfigurationError
from rlvr_landscape_plugin.snapshot import SHIPPED
from rlvr_landscape_plugin.snapshot.adapter import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def add_adapter(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """`model` with a new adapter that alone is trained: A is drawn from `seed`, B is zero, so the policy is as before.

    Raises `ConfigurationError` for target modules that the model does not have.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigurationError("[lora] needs the package peft; install rlvr-landscape[train]") from error
    from transformers import set_seed

    set_seed(seed)
    try:
        return peft.get_peft_model(  # pyright: ignore[reportReturnType]
            model,
            peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=config.rank,
                lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - a float will do
                use_rslora=config.rslora,
                target_modules=config.target_modules,
                modules_to_save=config.modules_to_save or None,
            ),
        )
    except ValueError as error:
        raise ConfigurationError(f"lora.target_modules = {config.target_modules!r}: {error}") from error


def keep_adapter(folder: Path, model: str) -> None:
    """Leave an adapter's two files in `folder`, the same bytes for the same adapter.

    `model`: what training started from, as the configuration names it; a shipped name stays one, as its directory lies
    elsewhere on another machine.
    """
    for file in folder.iterdir():
        if file.name not in (CONFIG, WEIGHTS):
            file.unlink()
    config = json.loads((folder / CONFIG).read_text())
    if model in SHIPPED:
        config["base_model_name_or_path"] = model
    if isinstance(config["target_modules"], list):
        config["target_modules"] = sorted(config["target_modules"])
    (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
