"""Log-probabilities of sampled tokens, and KL divergences from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 64
"""Sequences in one pass through the model."""
RECOMPUTED_ROWS = 16
"""The same where the backward pass computes activations again: few at a time, since memory is scarce."""


def mean_kl(samplers: torch.Tensor, others: torch.Tensor, mask: torch.Tensor) -> float:
    """KL(sampler ‖ other) per completion, nat: mean over sequences of Σ (r − 1 − log r) with r = π_other / π_sampler.

    Estimator k3 on the sampler's own tokens: unbiased, never negative. Sequences without sampled tokens do not count.
    """
    log_ratio = torch.where(mask, others - samplers, 0.0).double()
    sums = (torch.expm1(log_ratio) - log_ratio).sum(dim=1)
    return float(sums[mask.any(dim=1)].mean())


def log_probability(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], *, recompute: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """log π and, without gradient, the full distribution's entropy of every sampled token, (sequence, token), nat.

    0 outside the mask. Three things make this fast on a CPU, where TRL's own pass over all completion tokens is made
    for large vocabularies: only sampled tokens pass the output head, rows pass the model a few at a time with the short
    ones together, and a prompt that several rows share passes once. `recompute`: the backward pass computes the
    activations of `RECOMPUTED_ROWS` rows again instead of keeping those of all rows.
    """
    from torch.utils.checkpoint import checkpoint

    if (inner := getattr(model, "get_base_model", None)) is not None:
        model = inner()  # PEFT's wrapper has another idea of what a base model is; the adapter is inside
    columns = [inputs[name] for name in ("input_ids", "attention_mask", "mask")]
    order = _order(*columns)
    parts = [[column[rows] for column in columns] for rows in order.split(RECOMPUTED_ROWS if recompute else ROWS)]
    if recompute:
        chunks = [checkpoint(_score, model, *part, use_reentrant=False) for part in parts]
    else:
        chunks = [_score(model, *part) for part in parts]
    back = torch.argsort(order)
    logprobs, entropies = (torch.cat(column)[back] for column in zip(*chunks, strict=True))
    return logprobs, entropies


def _order(ids: torch.Tensor, attention: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rows with the same prompt next to each other, prompts by their longest row."""
    lengths = attention.sum(dim=1)
    _, group = _prompts(ids, attention, ids.size(1) - mask.size(1))
    longest = torch.zeros(len(ids), dtype=lengths.dtype).scatter_reduce(0, group, lengths, "amax")
    return torch.argsort(longest[group] * len(ids) + group)


def _prompts(ids: torch.Tensor, attention: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of each distinct prompt, and which of them every row has."""
    both = torch.cat([ids[:, :width], attention[:, :width]], dim=1)
    distinct, group = torch.unique(both, dim=0, return_inverse=True)
    first = torch.full((len(distinct),), len(ids)).scatter_reduce(0, group, torch.arange(len(ids)), "amin")
    return first, group


def _score(
    model: PreTrainedModel, ids: torch.Tensor, attention: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`log_probability` of a few rows in one pass, without the columns that are padding in all of them."""
    prompt = ids.size(1) - mask.size(1)
    used = attention.any(dim=0).nonzero()
    first, last = int(used[0]), max(int(used[-1]) + 1, prompt + 1)
    ids, attention = ids[:, first:last], attention[:, first:last]
    seen = mask[:, : last - prompt]
    prompt -= first
    # The position before a token predicts it.
    before = _hidden(model, ids, attention, prompt)[seen]
    head = model.get_output_embeddings()
    assert head is not None, "a causal language model has an output head"
    log_policy = torch.log_softmax(head(before).float(), dim=-1)
    sampled = log_policy.gather(1, ids[:, prompt:][seen][:, None])[:, 0]
    constant = log_policy.detach()
    entropy = -(constant.exp() * constant).sum(dim=1)
    empty = torch.zeros(mask.shape, dtype=sampled.dtype)
    return empty.masked_scatter(mask, sampled), empty.masked_scatter(mask, entropy)


def _hidden(model: PreTrainedModel, ids: torch.Tensor, attention: torch.Tensor, prompt: int) -> torch.Tensor:
    """Last hidden states at the positions before each completion token, (sequence, completion token, feature).

    Where rows share prompts, each prompt passes once and its keys and values serve all its rows; gradients flow through
    them. Models whose cache is not a plain list of keys and values get whole rows.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    rows, group = _prompts(ids, attention, prompt)
    cache = DynamicCache(config=model.config)
    plain = all(type(layer) is DynamicLayer for layer in cache.layers)
    if len(rows) == len(ids) or ids.size(1) <= prompt + 1 or not plain:
        whole = model.base_model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        return whole[:, prompt - 1 : -1]
    asked = model.base_model(
        input_ids=ids[rows, :prompt], attention_mask=attention[rows, :prompt], past_key_values=cache, use_cache=True
    ).last_hidden_state
    cache.batch_select_indices(group)
    said = model.base_model(
        input_ids=ids[:, prompt:-1], attention_mask=attention[:, :-1], past_key_values=cache, use_cache=True
    ).last_hidden_state
    return torch.cat([asked[group, -1:], said], dim=1)
