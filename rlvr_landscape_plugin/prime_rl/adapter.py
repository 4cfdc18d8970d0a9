"""The objectives in prime-rl's terms: one sequence a call, the sum over its tokens, divided later by the global count.

prime-rl adds the losses of all sequences up and divides by the number of loss tokens of the whole batch, over all
ranks. So an objective fits if its J is Σ over sequences / number of sampled tokens (`Objective.per_sequence_sum`) and
needs only what the trainer passes; everything else is refused by `build_objective`, with the reason, before the first
batch. Nothing is approximated.

π_old is the sampler: `inference_logprobs` are what vLLM reported for the sampled tokens, of the policy version that
sampled each of them. With prime-rl's asynchrony that is one or more updates before the policy that is differentiated,
and rounding differs between sampler and trainer, so ratios are near 1, not 1, even without an update in between.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from pydantic import field_validator

from rlvr_landscape_plugin.config import StrictConfig
from rlvr_landscape_plugin.objectives import PRIME_RL_FEEDS, Array, Objective, check_feeds, configure
from rlvr_landscape_plugin.schedule import parse_schedule

TRAINER = "prime-rl's custom loss"


class ObjectiveTable(StrictConfig):
    """`[trainer.loss.kwargs.objective]`; advantages are not set here, prime-rl's orchestrator computes them."""

    name: str = "grpo"
    """A name in `objectives.OBJECTIVES` that is a sum over sequences: `grpo`, `dapo`, `grpo_n`; with
    `aggregation = "token_mean"` also `gspo`, `gspo_n`."""
    options: dict[str, Any] = {}
    """Changes to the objective's own options, as for `objectives.configure`."""


class LossKwargs(StrictConfig):
    """`[trainer.loss.kwargs]`: all options of the plugin."""

    objective: ObjectiveTable = ObjectiveTable()
    """What is maximised."""
    snapshots: str | None = "0-10, 20-150:10"
    """Steps whose policy is kept, as in `schedule.parse_schedule`; "None" keeps none."""
    directory: Path | None = None
    """Where they go: `directory`/step_<N>/. Default: `snapshots` in the run's directory."""

    @field_validator("snapshots")
    @classmethod
    def _schedule(cls, text: str | None) -> str | None:
        if (
            text is None or text == "None"
        ):  # TOML has no null, and prime-rl resolves its stand-in in its own fields only
            return None
        parse_schedule(text)
        return text


def arguments_of(command: list[str]) -> list[str]:
    """A Python program's own arguments in the command that started it (`sys.orig_argv`), without the interpreter's.

    >>> arguments_of(["python", "-u", "-X", "utf8", "-m", "prime_rl.trainer.rl.train", "@", "trainer.json"])
    ['@', 'trainer.json']
    """
    words = iter(command[1:])
    for word in words:
        if word in ("-X", "-W"):
            next(words, None)
        elif word in ("-m", "-c"):
            next(words, None)
            break
        elif not word.startswith("-"):
            break
    return list(words)


class Sequence(Protocol):
    """prime-rl's `LossInputs`: torch tensors of shape (token,), float32 but for the mask.

    A token is any of the packed sample: prompt, environment and sampled ones; `loss_mask` (bool) has the sampled ones
    that the rl loss is for.
    """

    trainer_logprobs: Any
    inference_logprobs: Any
    ref_logprobs: Any
    advantages: Any
    loss_mask: Any
    loss_weights: Any


def build_objective(table: ObjectiveTable) -> Objective:
    """The configured objective; raises ConfigurationError where prime-rl's custom loss cannot compute it exactly."""
    objective = configure(table.name, **table.options)
    check_feeds(objective, PRIME_RL_FEEDS, TRAINER, per_sequence=True)
    return objective


def sequence_loss(objective: Objective, inputs: Sequence) -> tuple[Array, dict[str, Array]]:
    """The loss of one sequence, a scalar with gradient to be minimised, and metrics of its sampled tokens, (token,).

    The loss is −Σ over the sequence's share of J · (sampled tokens of the batch): summed over sequences and divided by
    that number it is −J. Metrics are per token, so prime-rl's mean over a step weighs each token the same:
    `clip_fraction` (1 where the clip took the gradient), `importance_ratio` ρ, and the estimators `kl_k1` = −log ρ and
    `kl_k3` = ρ − 1 − log ρ of KL(π_old ‖ π_θ), nat. Raises ValueError for NaN or ±inf at a sampled token.
    """
    feeds = {
        "logprobs": inputs.trainer_logprobs,
        "old_logprobs": inputs.inference_logprobs,
        "advantages": inputs.advantages,
        "mask": inputs.loss_mask,
    }
    loss = -objective.sequence_sum(weights=inputs.loss_weights, **feeds)
    mask = inputs.loss_mask
    rows = {name: values.detach()[None, :] for name, values in feeds.items()}
    bound = objective.token_terms(**rows).bound[0]
    log_ratio = (inputs.trainer_logprobs.detach() - inputs.inference_logprobs)[mask].float()
    ratio = log_ratio.exp()
    metrics = {
        "clip_fraction": bound[mask].float(),
        "importance_ratio": ratio,
        "kl_k1": -log_ratio,
        "kl_k3": ratio - 1 - log_ratio,
    }
    return loss, metrics
