"""What `[trainer.loss] import_path` names. Importing it reads the run's configuration, refuses what cannot be computed,
and installs the snapshot hook; prime-rl imports it once in every trainer rank, before the first weight broadcast.

prime-rl passes `[trainer.loss.kwargs]` with each call only, and step 0 is broadcast before the first call. So the
configuration is read here as the trainer reads it: by its own class, from its own command line. That is taken from
`sys.orig_argv`, because prime-rl's W&B monitor replaces `sys.argv` by the launcher's.
"""

from __future__ import annotations

import sys
from typing import Any

from prime_rl.configs.trainer import CustomLossConfig, TrainerConfig
from prime_rl.trainer.rl.loss import LossInputs, LossOutputs
from prime_rl.utils.config import cli
from pydantic import ValidationError
from pydantic_config import ConfigFileError

from rlvr_landscape_plugin.errors import ConfigurationError
from rlvr_landscape_plugin.prime_rl.adapter import LossKwargs, arguments_of, build_objective, sequence_loss
from rlvr_landscape_plugin.prime_rl.snapshots import install

IMPORT_PATH = f"{__name__}.policy_loss"


def _configuration() -> TrainerConfig:
    try:
        config = cli(TrainerConfig, args=arguments_of(sys.orig_argv))
    except (SystemExit, ConfigFileError) as error:
        raise ConfigurationError(
            f"{__name__} belongs into prime-rl's trainer, whose configuration it reads from the command line; "
            f"{' '.join(sys.orig_argv)!r} has none. Elsewhere use rlvr_landscape_plugin.prime_rl.adapter"
        ) from error
    if not isinstance(config.loss, CustomLossConfig) or config.loss.import_path != IMPORT_PATH:
        raise ConfigurationError(
            f'{__name__} was imported, but trainer.loss is {config.loss!r}; set type = "custom" and '
            f'import_path = "{IMPORT_PATH}"'
        )
    return config


def _kwargs(config: TrainerConfig) -> LossKwargs:
    assert isinstance(config.loss, CustomLossConfig)
    try:
        return LossKwargs(**config.loss.kwargs)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, ('trainer.loss.kwargs', *item['loc'])))}: {item['msg']}" for item in error.errors()
        )
        raise ConfigurationError(problems) from error


_CONFIG = _configuration()
_KWARGS = _kwargs(_CONFIG)
_OBJECTIVE = build_objective(_KWARGS.objective)
if _KWARGS.snapshots is not None:
    install(_CONFIG, _KWARGS, _OBJECTIVE)


def policy_loss(inputs: LossInputs, **_: Any) -> LossOutputs:
    """prime-rl's loss of one sequence by the objective of `[trainer.loss.kwargs.objective]`; see `sequence_loss`."""
    loss, metrics = sequence_loss(_OBJECTIVE, inputs)
    return LossOutputs(loss=loss, metrics=metrics)
