"""The objectives of RLVR training, once: what a trainer differentiates is what the landscape draws.

Two definitions of one surrogate would become different with time, so there is one, written for the array namespace of
its inputs: torch tensors in training (autograd runs through it; torch is never imported here), NumPy arrays in the
landscape.

**Layout.** Padded: arrays are (sequence, token), one row per completion with all its turns, so a row's ends are the
sequence's boundaries. `mask` is True for sampled tokens; prompts, environment turns and padding are False and never
reach a value or a gradient, whatever they hold (NaN included). `pad` makes rows from ragged or packed sequences. A row
without sampled tokens is no sequence: it enters no sum and no count. A batch without any gives 0 with gradient 0.

**Sign, unit, dtype.** Every objective J is to be *maximised* (a loss is −J) and is dimensionless; log-probabilities and
entropies are in nat. J has the dtype of `logprobs`, float16 and bfloat16 being raised to float32 first. Only `logprobs`
carries a gradient: the sampling policy, the reference, advantages, entropies and every selection are constants.

**Three layers.** Pure terms per token (`clipped_term`, `kl_term`, `grpo_terms`, …); `aggregate`, which turns them into
a number; `OBJECTIVES`, which names the combinations with their defaults, sources and needs. `configure` changes
options, `check_feeds` refuses what a trainer cannot compute: nothing is approximated in silence. docs/objectives.md has
the formulas.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from array_api_compat import array_namespace, device, is_array_api_obj

from rlvr_landscape_plugin.errors import ConfigurationError

Array: TypeAlias = Any
"""A NumPy array or a torch tensor; all arrays of one call are of one kind and on one device."""

Options: TypeAlias = Mapping[str, Any]
"""Options of an objective by name; `_RANGES` says which values each may have."""

AGGREGATIONS = ("token_mean", "sequence_mean", "constant")
FEEDS = MappingProxyType(
    {
        "logprobs": "log π_θ of the sampled tokens, the policy that is differentiated or drawn",
        "old_logprobs": "log π_old of the same tokens, the policy that sampled them",
        "advantages": "one per sequence, or one per token",
        "mask": "which tokens were sampled",
        "entropies": "entropy of the full next-token distribution at every sampled token",
        "reference_logprobs": "log π_ref of the same tokens",
        "generator": "a seeded numpy.random.Generator, or uniforms drawn beforehand",
    }
)
"""Everything an objective may need, by the name of the argument that carries it."""

PRIME_RL_FEEDS = frozenset({"logprobs", "old_logprobs", "advantages", "mask"})
"""prime-rl's custom loss under its `grpo` algorithm: one sequence a call (`per_sequence=True` in `check_feeds`). Its
`ref_logprobs` are filled only by algorithms that score a reference; with such an algorithm, add
`reference_logprobs`."""
LANDSCAPE_FEEDS = frozenset({"logprobs", "old_logprobs", "advantages", "mask", "generator"})
"""The landscape: its server returns log-probabilities of the sampled tokens, not whole distributions, and holds one
snapshot, not a reference beside it."""


# Advantages


def group_advantages(rewards: Array, scale: str, eps: float) -> Array:
    """Group-relative advantages, float64, shape (prompt, rollout) as `rewards`; one row is one group.

    `std`: (r − mean) / (std + eps) with the population standard deviation of the group (GRPO, arXiv 2402.03300, leaves
    the correction open); `none`: r − mean (Dr. GRPO, arXiv 2503.20783). A failed rollout (NaN) stays out of the
    group's statistics and gets advantage 0. Statistics are those of the full group: objectives that drop samples by the
    sign of the advantage do so afterwards. A deviation below the rounding error of the mean is exactly 0, so that equal
    rewards have no sign. Groups of two with `std` get −1, 0 or 1 whatever the rewards are; a warning says so once per
    process. Raises ValueError for another `scale`.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale is {scale!r}, expected 'std' or 'none'")
    rewards = rewards if is_array_api_obj(rewards) else np.asarray(rewards)
    if scale == "std" and rewards.shape[1] == 2:
        _warn_of_pairs()
    xp = array_namespace(rewards)
    rewards = xp.astype(rewards, xp.float64)
    failed = xp.isnan(rewards)
    values = xp.where(failed, xp.zeros_like(rewards), rewards)
    count = xp.sum(xp.astype(~failed, xp.float64), axis=1, keepdims=True)
    count = xp.where(count > 0, count, xp.ones_like(count))
    centred = rewards - xp.sum(values, axis=1, keepdims=True) / count
    rounding = np.finfo(np.float64).eps * xp.sum(xp.abs(values), axis=1, keepdims=True)
    centred = xp.where(failed | (xp.abs(centred) <= rounding), xp.zeros_like(rewards), centred)
    if scale == "none":
        return centred
    return centred / (xp.sqrt(xp.sum(centred * centred, axis=1, keepdims=True) / count) + eps)


@cache
def _warn_of_pairs() -> None:
    warnings.warn(
        "two rollouts per task with advantage_scale = 'std': every advantage is -1, 0 or 1, however far apart the two "
        "rewards are; take more rollouts, or advantage_scale = 'none'",
        stacklevel=3,
    )


# Terms per token


def clipped_term(log_ratio: Array, advantages: Array, clip_low: float, clip_high: float) -> tuple[Array, Array]:
    """min(ρA, clip(ρ, 1 − clip_low, 1 + clip_high) A) with ρ = exp(log_ratio), and where the clip binds (bool).

    The clipped term of GRPO (arXiv 2402.03300 eq. 3), DAPO (2503.14476 eq. 8) and, for sequence ratios, GSPO
    (2507.18071 eq. 5). `advantages` broadcasts against `log_ratio`. A bound token has gradient 0; exactly at a bound
    the clip does not bind and the gradient is ρA. A = 0 gives 0 even where ρ overflows; with A < 0 nothing limits ρ
    above.
    """
    xp = array_namespace(log_ratio)
    zeros = xp.zeros_like(log_ratio)
    with np.errstate(over="ignore", invalid="ignore"):
        ratio = xp.exp(_constant(log_ratio))
        clipped = zeros + xp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
        bound = clipped < ratio * advantages
        idle = bound | (zeros + advantages == 0)
        # An overflowing ratio must not enter the graph of a token it does not matter for: 0 · inf is NaN.
        free = xp.exp(xp.where(idle, zeros, log_ratio)) * advantages
    return xp.where(bound, clipped, xp.where(idle, zeros, free)), bound


def kl_term(logprobs: Array, reference_logprobs: Array, estimator: str = "k3") -> Array:
    """Per-token penalty towards a reference, nat, with r = π_ref / π_θ: `k3` = r − 1 − log r, `k2` = (log r)² / 2.

    k3 is GRPO's (arXiv 2402.03300 eq. 4): on samples of π_θ an unbiased, non-negative estimate of KL(π_θ ‖ π_ref), but
    differentiated as a loss only a first-order approximation of that KL's gradient. k2 is biased as an estimate and has
    the right gradient on samples of π_θ (arXiv 2510.01555). k1 = −log r is refused with ConfigurationError: as a loss
    its expected gradient is 0.
    """
    xp = array_namespace(logprobs)
    log_ratio = reference_logprobs - logprobs
    if estimator == "k3":
        with np.errstate(over="ignore"):
            return xp.expm1(log_ratio) - log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio * log_ratio
    _check_option("kl_estimator", estimator)
    raise AssertionError(estimator)


class Terms(NamedTuple):
    """An objective before aggregation; all arrays (sequence, token)."""

    value: Array
    """What each token contributes; 0 where it contributes nothing."""
    counted: Array
    """bool: the tokens of the normaliser."""
    bound: Array
    """bool: the tokens whose gradient the objective's clip removed."""


class Completions(NamedTuple):
    """An objective before it is averaged over completions: J = Σ value / Σ weight."""

    value: Array
    """(sequence,): its terms, added up as the aggregation says."""
    weight: Array
    """(sequence,): counted tokens for `token_mean`; otherwise 1, and 0 for a completion that counts nowhere."""
    bound: Array
    """(sequence, token), bool: the tokens whose gradient the objective's clip removed."""


@dataclass(frozen=True)
class Batch:
    """Checked inputs of one batch; `Batch.of` makes it. Arrays are (sequence, token), constants detached."""

    logprobs: Array
    log_ratio: Array
    """log π_θ − log π_old, 0 outside the mask."""
    advantages: Array
    mask: Array
    entropies: Array | None = None
    reference_logprobs: Array | None = None
    generator: np.random.Generator | Array = None

    @classmethod
    def of(
        cls,
        *,
        logprobs: Array,
        old_logprobs: Array,
        advantages: Array,
        mask: Array,
        entropies: Array | None = None,
        reference_logprobs: Array | None = None,
        generator: np.random.Generator | Array = None,
    ) -> Batch:
        """Check shapes and values; neutral values (0) replace whatever lies outside the mask.

        Shapes: (sequence, token) for all, `advantages` also (sequence,). dtypes: floating for log-probabilities, bool
        or integer for `mask`. Raises ValueError for another shape or dtype and for NaN or ±inf at a masked-in token,
        TypeError for NumPy and torch mixed.
        """
        xp = array_namespace(*(a for a in (logprobs, old_logprobs, mask) if a is not None))
        if logprobs.ndim != 2:
            raise ValueError(f"logprobs has shape {tuple(logprobs.shape)}, expected (sequence, token); see pad()")
        if not xp.isdtype(logprobs.dtype, "real floating"):
            raise ValueError(f"logprobs has dtype {logprobs.dtype}, expected a floating one")
        if not (xp.isdtype(mask.dtype, "bool") or xp.isdtype(mask.dtype, "integral")):
            raise ValueError(f"mask has dtype {mask.dtype}, expected bool, or integers 0 and 1")
        _same_shape("mask", mask, logprobs)
        mask = _constant(mask) != 0
        dtype = xp.float64 if logprobs.dtype == xp.float64 else xp.float32

        def column(name: str, values: Array, constant: bool = True) -> Array:
            _same_shape(name, values, logprobs)
            values = xp.astype(_constant(values) if constant else values, dtype)
            wrong = mask & ~xp.isfinite(_constant(values))
            if bool(xp.any(wrong)):
                row, token = (int(index[0]) for index in xp.nonzero(wrong))
                raise ValueError(
                    f"{name} is {float(_constant(values)[row, token])} at sampled token {token} of sequence {row} "
                    f"({int(xp.sum(xp.astype(wrong, xp.int64)))} such tokens); "
                    "mask the token out or find out what produced it"
                )
            return xp.where(mask, values, xp.zeros_like(values))

        current = column("logprobs", logprobs, constant=False)
        if advantages.ndim == 1 and advantages.shape[0] == logprobs.shape[0]:
            advantages = xp.broadcast_to(advantages[:, None], tuple(logprobs.shape))
        return cls(
            logprobs=current,
            log_ratio=current - column("old_logprobs", old_logprobs),
            advantages=column("advantages", advantages),
            mask=mask,
            entropies=None if entropies is None else column("entropies", entropies),
            reference_logprobs=None if reference_logprobs is None else column("reference_logprobs", reference_logprobs),
            generator=generator,
        )


def grpo_terms(batch: Batch, *, clip_low: float, clip_high: float) -> Terms:
    """The clipped term of every sampled token: GRPO (arXiv 2402.03300 eq. 3), Dr. GRPO, and DAPO (2503.14476 eq. 8)."""
    value, bound = clipped_term(batch.log_ratio, batch.advantages, clip_low, clip_high)
    return Terms(value, batch.mask, bound)


def gspo_terms(batch: Batch, *, clip_low: float, clip_high: float) -> Terms:
    """GSPO (arXiv 2507.18071 eqs. 5 and 7): the ratio is s = exp(mean over the sequence's tokens of log ρ).

    Every token of a sequence carries the sequence's term, so `sequence_mean` is eq. 5. Raises ValueError where a
    sequence's advantages differ between tokens: that is GSPO-token, another objective.
    """
    xp = array_namespace(batch.mask)
    if 0 in batch.mask.shape:
        return Terms(batch.log_ratio, batch.mask, batch.mask)
    length = _count(batch.mask, batch.log_ratio, axis=1)
    mean_log_ratio = xp.sum(batch.log_ratio, axis=1) / length
    # Advantages are 0 outside the mask, where they must not take part.
    infinite = xp.full_like(batch.advantages, math.inf)
    highest = xp.max(xp.where(batch.mask, batch.advantages, -infinite), axis=1)
    lowest = xp.min(xp.where(batch.mask, batch.advantages, infinite), axis=1)
    if bool(xp.any(highest > lowest)):
        raise ValueError("advantages differ within a sequence; a sequence ratio needs one advantage per sequence")
    advantages = xp.where(xp.any(batch.mask, axis=1), highest, xp.zeros_like(highest))
    value, bound = clipped_term(mean_log_ratio, advantages, clip_low, clip_high)
    zeros = xp.zeros_like(batch.log_ratio)
    return Terms(xp.where(batch.mask, zeros + value[:, None], zeros), batch.mask, batch.mask & bound[:, None])


def grpo_n_terms(batch: Batch, *, clip_low: float, clip_high: float, normaliser: str) -> Terms:
    """GRPO-N (after arXiv 2510.04028 §4; our reading): GRPO's terms where A < 0, nothing elsewhere.

    `normaliser`: `original` counts every sampled token as GRPO does, `kept` only those with A < 0. The advantages must
    come from full groups (`group_advantages` before any selection).
    """
    return _negative(batch, grpo_terms(batch, clip_low=clip_low, clip_high=clip_high), normaliser)


def gspo_n_terms(batch: Batch, *, clip_low: float, clip_high: float, normaliser: str) -> Terms:
    """GSPO-N (after arXiv 2510.04028 §4; our reading): GSPO's terms where A < 0; `normaliser` as in `grpo_n_terms`."""
    return _negative(batch, gspo_terms(batch, clip_low=clip_low, clip_high=clip_high), normaliser)


def _negative(batch: Batch, terms: Terms, normaliser: str) -> Terms:
    xp = array_namespace(batch.mask)
    _check_option("normaliser", normaliser)
    kept = batch.mask & (batch.advantages < 0)
    value = xp.where(kept, terms.value, xp.zeros_like(terms.value))
    return Terms(value, kept if normaliser == "kept" else batch.mask, terms.bound & kept)


def forking_terms(batch: Batch, *, clip_low: float, clip_high: float, rho: float) -> Terms:
    """DAPO's terms on the batch's highest-entropy tokens only (arXiv 2506.01939 eq. 6).

    The threshold is the ⌈rho · N⌉-th largest entropy of all N sampled tokens of the batch, not of a response; tokens at
    the threshold are kept, and only kept tokens are counted.
    """
    xp = array_namespace(batch.mask)
    terms = grpo_terms(batch, clip_low=clip_low, clip_high=clip_high)
    number = int(_total(batch.mask))
    if number == 0:
        return terms
    entropies = xp.where(batch.mask, batch.entropies, xp.full_like(batch.entropies, -math.inf))
    threshold = xp.sort(-xp.reshape(entropies, (-1,)))[math.ceil(_unrounded(rho * number)) - 1]
    kept = batch.mask & (entropies >= -threshold)
    return Terms(xp.where(kept, terms.value, xp.zeros_like(terms.value)), kept, terms.bound & kept)


def covariances(batch: Batch) -> Array:
    """(log π_θ − mean log π_θ)(A − mean A) of every sampled token, means over the batch's tokens (2505.22617 eq. 10).

    (sequence, token), a constant; 0 outside the mask.
    """
    xp = array_namespace(batch.mask)
    logprobs = _constant(batch.logprobs)
    count = _count(batch.mask, logprobs)
    product = (logprobs - xp.sum(logprobs) / count) * (batch.advantages - xp.sum(batch.advantages) / count)
    return xp.where(batch.mask, product, xp.zeros_like(product))


def kl_cov_terms(batch: Batch, *, share: float, coefficient: float, penalty: str, at_least: int) -> Terms:
    """KL-Cov (arXiv 2505.22617 eqs. 13 and 14): unclipped ρA, minus `coefficient` · penalty on the top covariances.

    The max(⌊share · N⌋, at_least) of N sampled tokens with the largest covariance are penalised (ties: the earlier
    token). `penalty`: `absolute` is |log π_θ − log π_old|, what the authors' code does; `k3` is ρ − 1 − log ρ, on
    samples of π_old an estimate of the equation's KL(π_old ‖ π_θ).
    """
    xp = array_namespace(batch.mask)
    _check_option("penalty", penalty)
    value, bound = clipped_term(batch.log_ratio, batch.advantages, 1.0, math.inf)
    total = int(_total(batch.mask))
    number = max(math.floor(_unrounded(share * total)), at_least)
    selected = _lowest(-covariances(batch), batch.mask, number)
    log_ratio = xp.where(selected, batch.log_ratio, xp.zeros_like(batch.log_ratio))
    with np.errstate(over="ignore"):
        distance = xp.abs(log_ratio) if penalty == "absolute" else xp.expm1(log_ratio) - log_ratio
    return Terms(value - coefficient * distance, batch.mask, bound)


def clip_cov_terms(
    batch: Batch, *, clip_low: float, clip_high: float, share: float, low: float, high: float, at_least: int
) -> Terms:
    """Clip-Cov (arXiv 2505.22617 eqs. 11 and 12): GRPO's terms with a few high-covariance tokens removed at random.

    Candidates are sampled tokens with `low` ≤ covariance ≤ `high` where the clip does not bind; max(⌊share · N⌋,
    at_least) of them, N all sampled tokens, are drawn uniformly and contribute nothing, but stay counted. The draw: the
    candidates with the smallest uniforms, so equal uniforms give equal draws in NumPy and torch, on any device.
    """
    xp = array_namespace(batch.mask)
    terms = grpo_terms(batch, clip_low=clip_low, clip_high=clip_high)
    statistic = covariances(batch)
    candidates = batch.mask & ~terms.bound & (statistic >= low) & (statistic <= high)
    number = max(math.floor(_unrounded(share * int(_total(batch.mask)))), at_least)
    dropped = _lowest(_uniforms(batch), candidates, number)
    return Terms(xp.where(dropped, xp.zeros_like(terms.value), terms.value), batch.mask, terms.bound | dropped)


def _uniforms(batch: Batch) -> Array:
    """The batch's random numbers in [0, 1), (sequence, token)."""
    xp, shape = array_namespace(batch.mask), tuple(batch.mask.shape)
    if isinstance(batch.generator, np.random.Generator):
        return xp.asarray(batch.generator.random(shape), device=device(batch.mask))
    if not is_array_api_obj(batch.generator):
        raise ValueError(
            f"generator is a {type(batch.generator).__name__}, expected a numpy.random.Generator or uniforms"
        )
    _same_shape("generator (uniforms)", batch.generator, batch.mask)
    return batch.generator


def _lowest(keys: Array, among: Array, number: int) -> Array:
    """bool, as `keys`: the `number` entries of `among` with the smallest keys, ties to the earlier entry."""
    xp = array_namespace(keys)
    flat = xp.reshape(xp.where(among, keys, xp.full_like(keys, math.inf)), (-1,))
    rank = xp.argsort(xp.argsort(flat, stable=True), stable=True)
    return among & (xp.reshape(rank, tuple(keys.shape)) < number)


# Aggregation


def aggregate(value: Array, counted: Array, aggregation: str, constant: float | None = None) -> Array:
    """One number from terms (sequence, token); `value` is 0 where nothing is to be added.

    `token_mean`: Σ / number of counted tokens of the batch (DAPO eq. 12; this project's default). `sequence_mean`: mean
    over sequences of each sequence's mean over its counted tokens (GRPO eq. 3). `constant`: mean over sequences of the
    sequence's sum / `constant` (Dr. GRPO, arXiv 2503.20783, whose code takes the generation budget). Sequences without
    a counted token are no sequences; nothing counted gives 0. Raises ConfigurationError for a missing `constant`.
    """
    xp = array_namespace(value)
    _check_option("aggregation", aggregation)
    if aggregation == "token_mean":
        return xp.sum(value) / _count(counted, value)
    sequences = _count(xp.any(counted, axis=1), value)
    if aggregation == "sequence_mean":
        return xp.sum(xp.sum(value, axis=1) / _count(counted, value, axis=1)) / sequences
    _check_constant("the objective", aggregation, constant)
    return xp.sum(value) / (sequences * constant)


# The registry


@dataclass(frozen=True)
class Objective:
    """A named objective with all its options; call it with the feeds as keywords to get J."""

    name: str
    source: str
    """Where it is defined: arXiv id and equation."""
    terms: Callable[..., Terms] = field(repr=False)
    options: Options = field(hash=False)
    """Aggregation, regularisation and the terms' own options; `configure` changes them."""
    advantage_scale: str = "std"
    """The `scale` of `group_advantages` in the source."""
    extra: frozenset[str] = frozenset()
    """Feeds beyond log-probabilities, advantages and mask."""
    of_batch: bool = False
    """Whether a token's term depends on the other sequences of the batch."""

    @property
    def needs(self) -> frozenset[str]:
        """Names in `FEEDS` that a call must bring."""
        reference = {"reference_logprobs"} if self.options["kl_coefficient"] else set()
        return frozenset({"logprobs", "old_logprobs", "advantages", "mask"} | self.extra | reference)

    @property
    def per_sequence_sum(self) -> frozenset[str]:
        """Aggregations with which this is (Σ over sequences of a number per sequence) / number of sampled tokens.

        That is all a loss can be that sees one sequence a call and whose results the trainer adds up and divides by the
        global token count, as prime-rl's. `sequence_mean` and `constant` would need the batch's ratio of tokens to
        sequences, `normaliser = "kept"` the number of kept tokens, batch statistics the batch.
        """
        whole = self.of_batch or self.options.get("normaliser") == "kept"
        return frozenset() if whole else frozenset({"token_mean"})

    def __call__(self, **feeds: Array) -> Array:
        """J of a batch, a scalar array to be maximised, differentiable in `logprobs`.

        Takes the feeds as `Batch.of` does; those not needed are ignored. Raises ConfigurationError for a missing feed
        or constant and ValueError as `Batch.of`.
        """
        batch = self._batch(feeds)
        options = self.options
        _check_constant(self.name, options["aggregation"], options["constant"])
        terms = self.terms(batch, **_own(options))
        value = aggregate(terms.value, terms.counted, options["aggregation"], options["constant"])
        if not options["kl_coefficient"]:
            return value
        penalty = kl_term(batch.logprobs, batch.reference_logprobs, options["kl_estimator"])
        # Every sampled token is held to the reference, whichever the objective keeps.
        return value - options["kl_coefficient"] * aggregate(
            penalty, batch.mask, options["aggregation"], options["constant"]
        )

    def token_terms(self, **feeds: Array) -> Terms:
        """The terms before aggregation and without the KL penalty: what to log (clip fractions) and to plot."""
        return self.terms(self._batch(feeds), **_own(self.options))

    def per_completion(self, **feeds: Array) -> Completions:
        """What each completion contributes: J = Σ `value` / Σ `weight` over the batch, exactly.

        Takes the feeds as a call does. Raises ConfigurationError for a KL penalty, which counts other tokens than the
        objective may, otherwise as a call.
        """
        options = self.options
        if options["kl_coefficient"]:
            raise ConfigurationError(
                f"{self.name} with kl_coefficient = {options['kl_coefficient']} has no value per completion; leave the "
                "penalty out"
            )
        _check_constant(self.name, options["aggregation"], options["constant"])
        terms = self.token_terms(**feeds)
        xp = array_namespace(terms.value)
        total = xp.sum(terms.value, axis=1)
        if options["aggregation"] == "token_mean":
            return Completions(total, xp.astype(_total(terms.counted, axis=1), total.dtype), terms.bound)
        length = _count(terms.counted, total, axis=1)
        weight = xp.astype(xp.any(terms.counted, axis=1), total.dtype)
        return Completions(
            total / (length if options["aggregation"] == "sequence_mean" else options["constant"]), weight, terms.bound
        )

    def sequence_sum(self, *, weights: Array | None = None, **feeds: Array) -> Array:
        """One sequence's share of J · (sampled tokens of all sequences), a scalar array; all arrays are (token,).

        For trainers that divide the sum over sequences by the global token count; the loss is the negative. `weights`
        (token,) multiplies each token's term, the KL penalty's too (prime-rl's `loss_weights`; None is 1). `advantages`
        is (token,). Raises ConfigurationError where J is no such sum (`per_sequence_sum`), otherwise as a call.
        """
        feeds = {name: values for name, values in feeds.items() if values is not None}
        check_feeds(self, feeds, "a loss that sees one sequence at a time", per_sequence=True)
        rows = {name: values[None, :] for name, values in feeds.items() if name in self.needs}
        batch = self._batch(rows)
        value = self.terms(batch, **_own(self.options)).value
        if self.options["kl_coefficient"]:
            penalty = kl_term(batch.logprobs, batch.reference_logprobs, self.options["kl_estimator"])
            value = value - self.options["kl_coefficient"] * penalty
        xp = array_namespace(value)
        if weights is not None:
            _same_shape("weights", weights[None, :], value)
            # Like every other feed, a weight outside the mask may hold anything.
            kept = xp.where(batch.mask, _constant(weights)[None, :], xp.zeros_like(weights)[None, :])
            value = value * xp.astype(kept, value.dtype)
        return xp.sum(value)

    def _batch(self, feeds: Mapping[str, Array]) -> Batch:
        if unknown := sorted(set(feeds) - set(FEEDS)):
            raise TypeError(f"unknown feeds {', '.join(unknown)}; known: {', '.join(FEEDS)}")
        check_feeds(self, (name for name, value in feeds.items() if value is not None), "this call")
        return Batch.of(**{name: value for name, value in feeds.items() if name in self.needs})


_COMMON = {"aggregation": "token_mean", "constant": None, "kl_coefficient": 0.0, "kl_estimator": "k3"}


def _own(options: Options) -> Options:
    return {name: value for name, value in options.items() if name not in _COMMON}


def _objective(name: str, source: str, terms: Callable[..., Terms], **rest: Any) -> Objective:
    fields = {key: rest.pop(key) for key in ("advantage_scale", "extra", "of_batch") if key in rest}
    return Objective(name, source, terms, _COMMON | rest, **fields)


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        objective.name: objective
        for objective in (
            _objective("grpo", "arXiv 2402.03300v3 eq. 3", grpo_terms, clip_low=0.2, clip_high=0.2),
            _objective(
                "dr_grpo",
                "arXiv 2503.20783v2",
                grpo_terms,
                advantage_scale="none",
                aggregation="constant",
                clip_low=0.2,
                clip_high=0.2,
            ),
            _objective("dapo", "arXiv 2503.14476v2 eqs. 8 and 12", grpo_terms, clip_low=0.2, clip_high=0.28),
            _objective(
                "gspo",
                "arXiv 2507.18071v2 eqs. 5 and 7",
                gspo_terms,
                aggregation="sequence_mean",
                clip_low=3e-4,
                clip_high=4e-4,
            ),
            _objective(
                "grpo_n",
                "after arXiv 2510.04028 §4, our reading",
                grpo_n_terms,
                clip_low=0.2,
                clip_high=0.2,
                normaliser="original",
            ),
            _objective(
                "gspo_n",
                "after arXiv 2510.04028 §4, our reading",
                gspo_n_terms,
                aggregation="sequence_mean",
                clip_low=3e-4,
                clip_high=4e-4,
                normaliser="original",
            ),
            _objective(
                "forking_tokens",
                "arXiv 2506.01939 eq. 6",
                forking_terms,
                extra=frozenset({"entropies"}),
                of_batch=True,
                clip_low=0.2,
                clip_high=0.28,
                rho=0.2,
            ),
            _objective(
                "kl_cov",
                "arXiv 2505.22617v1 eqs. 10, 13 and 14",
                kl_cov_terms,
                of_batch=True,
                share=2e-3,
                coefficient=1.0,
                penalty="absolute",
                at_least=1,
            ),
            _objective(
                "clip_cov",
                "arXiv 2505.22617v1 eqs. 10 to 12",
                clip_cov_terms,
                extra=frozenset({"generator"}),
                of_batch=True,
                clip_low=1.0,
                clip_high=1.0,
                share=2e-4,
                low=1.0,
                high=5.0,
                at_least=1,
            ),
        )
    }
)
"""Name → objective with the defaults of its source. `dr_grpo` still needs its `constant`."""


def configure(name: str, **options: object) -> Objective:
    """The objective `name` with some options changed.

    Raises ConfigurationError for an unknown name or option, a value out of range, and options that contradict each
    other.
    """
    if name not in OBJECTIVES:
        raise ConfigurationError(_unknown("objective", name, OBJECTIVES))
    base = OBJECTIVES[name]
    for key, value in options.items():
        if key not in base.options:
            raise ConfigurationError(_unknown(f"option of {name}", key, base.options))
        _check_option(key, value)
    merged = {**base.options, **options}
    _check_constant(name, merged["aggregation"], merged["constant"])
    if merged.get("low", 0) > merged.get("high", 0):
        raise ConfigurationError(f"low = {merged['low']} is above high = {merged['high']}; swap them")
    return replace(base, options=merged)


def check_feeds(
    objective: Objective | str, available: Iterable[str], trainer: str, *, per_sequence: bool = False
) -> None:
    """Refuse an objective that `trainer` cannot compute exactly.

    `available`: names in `FEEDS` (`PRIME_RL_FEEDS`, `LANDSCAPE_FEEDS`). `trainer`: how to call it in the
    message. `per_sequence`: it sees one sequence at a time and divides the sum by the global token count. Raises
    ConfigurationError that names the objective, the trainer and what is missing.
    """
    objective = configure(objective) if isinstance(objective, str) else objective
    lacking = objective.needs - set(available)
    if missing := [name for name in FEEDS if name in lacking]:
        verb = "is" if missing in (["generator"], ["mask"]) else "are"
        raise ConfigurationError(
            f"objective {objective.name!r} ({objective.source}): {' and '.join(missing)} {verb} not available to "
            f"{trainer}; it needs {'; '.join(f'{name}: {FEEDS[name]}' for name in missing)}"
        )
    if not per_sequence or objective.options["aggregation"] in objective.per_sequence_sum:
        return
    if objective.of_batch:
        reason = "its terms depend on statistics of the whole batch; use a trainer that shows the loss whole batches"
    elif not objective.per_sequence_sum:
        reason = "normaliser = 'kept' divides by the batch's kept tokens; use normaliser = 'original'"
    else:
        reason = (
            f"aggregation = {objective.options['aggregation']!r} needs the number of sequences; use 'token_mean', or a "
            "trainer that shows the loss whole batches"
        )
    raise ConfigurationError(
        f"objective {objective.name!r} is not available to {trainer}, which sees one sequence at a time and divides by "
        f"the global token count: {reason}"
    )


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "aggregation": (lambda x: x in AGGREGATIONS, f"one of {', '.join(AGGREGATIONS)}"),
    "constant": (lambda x: x is None or 0 < x < math.inf, "a positive number, such as the generation budget in tokens"),
    "kl_coefficient": (lambda x: 0 <= x < math.inf, "a number ≥ 0"),
    "kl_estimator": (
        lambda x: x in ("k3", "k2"),
        "'k3' or 'k2' (k1 is no penalty: as a loss its expected gradient is 0)",
    ),
    "clip_low": (lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "clip_high": (lambda x: x >= 0, "a number ≥ 0"),
    "normaliser": (lambda x: x in ("original", "kept"), "'original' or 'kept'"),
    "rho": (lambda x: 0 < x <= 1, "a share above 0, at most 1"),
    "share": (lambda x: 0 <= x <= 1, "a share from 0 to 1 (not percent)"),
    "coefficient": (lambda x: 0 <= x < math.inf, "a number ≥ 0"),
    "penalty": (lambda x: x in ("absolute", "k3"), "'absolute' or 'k3'"),
    "at_least": (lambda x: isinstance(x, int) and x >= 0, "an integer ≥ 0"),
    "low": (lambda x: not math.isnan(x), "a number"),
    "high": (lambda x: not math.isnan(x), "a number"),
}


def _check_option(name: str, value: object) -> None:
    fits, expected = _RANGES[name]
    try:
        good = fits(value)
    except TypeError:
        good = False
    if not good:
        raise ConfigurationError(f"{name} is {value!r}, expected {expected}")


def _check_constant(name: str, aggregation: str, constant: float | None) -> None:
    if aggregation == "constant" and constant is None:
        raise ConfigurationError(
            f"{name} with aggregation = 'constant' divides by a stated constant: give `constant`, usually the "
            "generation budget in tokens"
        )
    if aggregation != "constant" and constant is not None:
        raise ConfigurationError(
            f"{name} has constant = {constant} and aggregation = {aggregation!r}, which ignores it; "
            "set aggregation = 'constant' or leave constant out"
        )


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"unknown {what}: {name!r}; {hint}"


# Layout


def pad(sequences: Sequence[Array]) -> tuple[Array, Array]:
    """Rows (sequence, token) and their mask from 1-D arrays of different lengths; short rows end in zeros.

    The dtype is the sequences' own; gradients pass. The mask is True for every element of a sequence: combine it with
    one that leaves out the tokens that were not sampled. Raises ValueError without any sequence.
    """
    if not len(sequences):
        raise ValueError("pad needs at least one sequence")
    xp = array_namespace(*sequences)
    longest = max(int(sequence.shape[0]) for sequence in sequences)

    def row(sequence: Array) -> Array:
        missing = longest - int(sequence.shape[0])
        return xp.concat([sequence, xp.zeros((missing,), dtype=sequence.dtype, device=device(sequence))])

    masks = [row(xp.ones_like(sequence, dtype=xp.bool)) for sequence in sequences]
    return xp.stack([row(sequence) for sequence in sequences]), xp.stack(masks)


# The reference policy


@dataclass
class ReferenceSchedule:
    """When training replaces its KL reference by the current policy (the reference reset of ProRL, arXiv 2505.24864).

    A reset is two acts of the trainer, both required: copy the policy's weights into the reference, **and reinitialise
    the optimizer's state** (its moments belong to the old regularised objective). The paper resets when a validation
    metric falls off or stops improving and gives no numbers, so none are defaults here. The fields are the whole state:
    `dataclasses.asdict` saves it, `ReferenceSchedule(**saved)` continues.
    """

    every: int | None = None
    """Reset this many optimizer steps after the last reset; None never does."""
    patience: int | None = None
    """Reset after this many validations in a row without improvement; None never does."""
    min_improvement: float = 0.0
    """A validation improves if it exceeds the best since the last reset by more than this."""
    max_drop: float | None = None
    """Reset when a validation lies more than this below the best since the last reset; None never does."""
    last_reset: int = 0
    """State: the step of the last reset."""
    best: float | None = None
    """State: the best validation since then."""
    stale: int = 0
    """State: validations in a row without improvement."""

    def __post_init__(self) -> None:
        if self.every is None and self.patience is None and self.max_drop is None:
            raise ConfigurationError("a ReferenceSchedule needs every, patience or max_drop")
        for name in ("every", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigurationError(f"{name} is {value!r}, expected an integer ≥ 1 or None")
        for name in ("min_improvement", "max_drop"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigurationError(f"{name} is {value!r}, expected a number ≥ 0")

    def reset_due(self, step: int, validation: float | None = None) -> str | None:
        """Why the reference and the optimizer's state must be reset now: `interval`, `drop`, `plateau`; None if not.

        Call it once after every optimizer step, with a validation metric (higher is better) whenever there is a new
        one. A reason that is returned counts as acted upon. Raises ValueError for a metric that is NaN.
        """
        if validation is not None and math.isnan(validation):
            raise ValueError(f"the validation metric at step {step} is NaN; a plateau cannot be told from a failure")
        reason = None
        if validation is not None:
            if self.best is None or validation > self.best + self.min_improvement:
                self.best, self.stale = validation, 0
            else:
                self.stale += 1
                if self.max_drop is not None and validation < self.best - self.max_drop:
                    reason = "drop"
                elif self.patience is not None and self.stale >= self.patience:
                    reason = "plateau"
        if self.every is not None and step - self.last_reset >= self.every:
            reason = "interval"
        if reason is not None:
            self.last_reset, self.best, self.stale = step, validation, 0
        return reason


# Helpers


def _constant(values: Array) -> Array:
    """Without its gradient; arrays that have none stay as they are."""
    return values.detach() if hasattr(values, "detach") else values


def _same_shape(name: str, values: Array, like: Array) -> None:
    if tuple(values.shape) != tuple(like.shape):
        also = " or (sequence,)" if name == "advantages" else ""
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, expected (sequence, token){also} as the other arrays: "
            f"{tuple(like.shape)}"
        )


def _total(mask: Array, axis: int | None = None) -> Array:
    xp = array_namespace(mask)
    return xp.sum(xp.astype(mask, xp.int64), axis=axis)


def _count(mask: Array, like: Array, axis: int | None = None) -> Array:
    """How many are True, in the dtype of `like`; 1 instead of 0, for dividing by it."""
    xp = array_namespace(mask)
    total = _total(mask, axis)
    return xp.astype(xp.where(total > 0, total, xp.ones_like(total)), like.dtype)


def _unrounded(product: float) -> float:
    """share · number without the last digits' rounding: ⌈0.07 · 100⌉ is 7, not 8."""
    return round(product, 9)
