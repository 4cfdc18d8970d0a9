"""What the snapshot hook uses of prime-rl, and the check that a prime-rl has it.

Not the version decides but the functions themselves: `check` looks at each signature and each key of the configuration
that the hook relies on, when the trainer starts. A prime-rl in which one of them is missing or takes other arguments is
refused, with what differs; one that is newer than the newest that was run, and has them all, is named in a warning; one
older than the oldest is refused.

`policy_callback` finds the extension point that docs/upstream/prime-rl-snapshot-hook.md proposes to prime-rl. Where it
is there the hook registers itself and wraps nothing.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rlvr_landscape_plugin.errors import ConfigurationError

OLDEST, NEWEST = (0, 8), (0, 8)
"""The first and the last series that was run, the last at commit 559b447; docs/prime-rl.md says what was run."""
RANGE = "0.8"
"""The same in words."""
WAY_OUT = (
    f'Use prime-rl {RANGE}, or set trainer.loss.kwargs.snapshots = "None" to train without snapshots; '
    "prime-rl's own filesystem broadcast keeps those at multiples of ckpt.interval"
)
CALLBACKS = ("prime_rl.trainer.rl.callbacks", "register_policy_callback")
"""Module and function of the proposed extension point."""


@dataclass(frozen=True)
class Use:
    """A function of prime-rl and the arguments that the hook gives, or, for one that it wraps, reads."""

    module: str
    name: str
    """`function`, or `Class.method`."""
    first: tuple[str, ...]
    """Names of its first parameters, with `self`."""
    wrapped: bool = False
    """It is wrapped, not called: further parameters are the caller's business."""

    def problem(self) -> str | None:
        """What differs; None if nothing does."""
        try:
            function: Any = importlib.import_module(self.module)
            for part in self.name.split("."):
                function = getattr(function, part)
        except (ImportError, AttributeError) as error:
            return f"{self.module}.{self.name} is missing ({error})"
        return signature_problem(function, self.first, self.wrapped)


WRAPPED = (
    Use("prime_rl.transports.weights", "WeightBroadcast.broadcast_weights", ("self", "model", "step"), wrapped=True),
    Use("prime_rl.trainer.ckpt", "CheckpointManager.save", ("self", "step", "model"), wrapped=True),
)
CALLED = (
    Use("prime_rl.trainer.world", "get_world", ()),
    Use("prime_rl.utils.logger", "get_logger", ()),
    Use("prime_rl.utils.weights", "gather_weights_parallel", ("model",)),
    Use("prime_rl.utils.weights", "convert_state_dict_to_hf", ("model", "state_dict")),
)
CALLED_FOR_LORA = (
    Use("prime_rl.trainer.lora", "get_lora_state", ()),
    Use("prime_rl.trainer.lora", "LoRAState.adapter_state_dict", ("self",)),
)
KEYS = (
    *("model.name", "model.lora", "output_dir", "max_steps", "ckpt", "resume", "weight_broadcast.type"),
    *("tokenizer.name", "tokenizer.chat_template"),
)
"""Keys of prime-rl's TrainerConfig that the hook reads."""
LORA_KEYS = ("model.lora.rank", "model.lora.alpha", "model.lora.dropout", "model.lora.modules_to_save")


def signature_problem(function: Callable[..., Any], first: tuple[str, ...], wrapped: bool = False) -> str | None:
    """Why a function cannot be used with the parameters named in `first`; None if it can."""
    parameters = inspect.signature(function).parameters
    found, place = tuple(parameters), f"{function.__module__}.{function.__qualname__}"
    if found[: len(first)] != first:
        return f"{place} takes ({', '.join(found)}), the snapshot hook expects ({', '.join(first)}, …)"
    further = [parameters[name] for name in found[len(first) :]]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [item.name for item in further if item.default is inspect.Parameter.empty and item.kind not in variadic]
    if required and not wrapped:
        return f"{place} requires {', '.join(required)}, which the snapshot hook does not give"
    return None


def check(config: Any, methods: Sequence[Callable[..., Any]] = ()) -> str | None:
    """Refuse a prime-rl that the hook does not fit; returns a warning where it is newer than was run, or None.

    `config`: its TrainerConfig. `methods`: further `broadcast_weights`, of its subclasses.
    """
    found = installed()
    number = series(found)
    if number is not None and number < OLDEST:
        raise ConfigurationError(f"prime-rl is {found}; the snapshot hook was run with {RANGE}. {WAY_OUT}")
    lora = getattr(getattr(config, "model", None), "lora", None) is not None
    callback = policy_callback() is not None
    uses = (*(() if callback else WRAPPED), *CALLED, *(CALLED_FOR_LORA if lora else ()))
    problems = [problem for use in uses if (problem := use.problem()) is not None]
    if not callback:
        first = WRAPPED[0].first
        problems += [problem for method in methods if (problem := signature_problem(method, first, wrapped=True))]
    for key in (*KEYS, *(LORA_KEYS if lora else ())):
        if not _has(config, key):
            problems.append(f"its configuration has no trainer.{key}")
    if problems:
        raise ConfigurationError(
            f"prime-rl {found or 'of an unknown version'} differs from {RANGE}, which the snapshot hook was run with: "
            f"{'; '.join(problems)}. {WAY_OUT}"
        )
    if number is not None and number > NEWEST:
        return (
            f"prime-rl {found} is newer than {RANGE}, which the snapshot hook was run with; all it uses looks as before"
        )
    return None


def _has(config: Any, key: str) -> bool:
    for part in key.split("."):
        if not hasattr(config, part):
            return False
        config = getattr(config, part)
    return True


def installed() -> str | None:
    """The version of prime-rl's distribution; None for a checkout without metadata."""
    try:
        return version("prime-rl")
    except PackageNotFoundError:
        return None


def series(text: str | None) -> tuple[int, ...] | None:
    """(0, 8) of "0.8.1.dev67"; None where there is no such number."""
    parts = (text or "").split(".")[:2]
    return tuple(map(int, parts)) if len(parts) == 2 and all(part.isdigit() for part in parts) else None


def policy_callback() -> Callable[[Callable[[Any, int], None]], None] | None:
    """prime-rl's function that registers a callback after each broadcast; None where it has none."""
    module, name = CALLBACKS
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None
