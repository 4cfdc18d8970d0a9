"""The objectives a second time, from their equations, in loops over Python floats. Slow and plain on purpose.

A batch is a list of sequences; a sequence is a dict of equally long lists (`logprob`, `old`, `advantage`, and where
needed `entropy`, `reference`, `uniform`) that hold sampled tokens only; only `sequences` knows of padding and masks.
The functions of single objectives return each token's contribution and whether the normaliser counts it.
"""

from __future__ import annotations

import math

import numpy as np


def sequences(feeds: dict, generator_uniforms: np.ndarray | None = None) -> list[dict[str, list[float]]]:
    """Sampled tokens of every row of padded NumPy arrays."""
    batch = []
    for i in range(feeds["mask"].shape[0]):
        sequence: dict[str, list[float]] = {
            name: [] for name in ("logprob", "old", "advantage", "entropy", "reference", "uniform")
        }
        for t in range(feeds["mask"].shape[1]):
            if not feeds["mask"][i, t]:
                continue
            advantages = feeds["advantages"]
            sequence["logprob"].append(float(feeds["logprobs"][i, t]))
            sequence["old"].append(float(feeds["old_logprobs"][i, t]))
            sequence["advantage"].append(float(advantages[i] if advantages.ndim == 1 else advantages[i, t]))
            if "entropies" in feeds:
                sequence["entropy"].append(float(feeds["entropies"][i, t]))
            if "reference_logprobs" in feeds:
                sequence["reference"].append(float(feeds["reference_logprobs"][i, t]))
            if generator_uniforms is not None:
                sequence["uniform"].append(float(generator_uniforms[i, t]))
        if sequence["logprob"]:
            batch.append(sequence)
    return batch


def clip(ratio: float, low: float, high: float) -> float:
    if ratio < 1 - low:
        return 1 - low
    return 1 + high if ratio > 1 + high else ratio


def surrogate(ratio: float, advantage: float, low: float, high: float) -> float:
    return min(ratio * advantage, clip(ratio, low, high) * advantage)


def k3(log_r: float) -> float:
    return math.exp(log_r) - log_r - 1


def advantages(group: list[float], scale: str, eps: float) -> list[float]:
    """(r − mean) / (population std + eps) of one group, failed (NaN) members left out."""
    valid = [r for r in group if not math.isnan(r)]
    if not valid:
        return [0.0 for _ in group]
    mean = sum(valid) / len(valid)
    std = math.sqrt(sum((r - mean) ** 2 for r in valid) / len(valid))
    return [0.0 if math.isnan(r) else (r - mean) / (1.0 if scale == "none" else std + eps) for r in group]


def grpo(batch, o):
    return [
        [
            surrogate(math.exp(new - old), a, o["clip_low"], o["clip_high"])
            for new, old, a in zip(s["logprob"], s["old"], s["advantage"], strict=True)
        ]
        for s in batch
    ], [[True] * len(s["logprob"]) for s in batch]


def gspo(batch, o):
    rows = []
    for s in batch:
        length = len(s["logprob"])
        ratio = math.exp(sum(new - old for new, old in zip(s["logprob"], s["old"], strict=True)) / length)
        rows.append([surrogate(ratio, s["advantage"][0], o["clip_low"], o["clip_high"])] * length)
    return rows, [[True] * len(s["logprob"]) for s in batch]


def negative(rows, batch, o):
    values, counted = [], []
    for row, s in zip(rows, batch, strict=True):
        values.append([v if a < 0 else 0.0 for v, a in zip(row, s["advantage"], strict=True)])
        counted.append([a < 0 or o["normaliser"] == "original" for a in s["advantage"]])
    return values, counted


def grpo_n(batch, o):
    return negative(grpo(batch, o)[0], batch, o)


def gspo_n(batch, o):
    return negative(gspo(batch, o)[0], batch, o)


def forking_tokens(batch, o):
    rows, _ = grpo(batch, o)
    everything = sorted((h for s in batch for h in s["entropy"]), reverse=True)
    # ⌈rho · N⌉ in exact arithmetic: the smallest number of tokens that is at least that share.
    number = next(n for n in range(len(everything) + 1) if n >= o["rho"] * len(everything) - 1e-9)
    threshold = everything[number - 1] if everything else 0.0
    counted = [[h >= threshold for h in s["entropy"]] for s in batch]
    return [
        [v if c else 0.0 for v, c in zip(row, kept, strict=True)] for row, kept in zip(rows, counted, strict=True)
    ], counted


def covariance_table(batch):
    """(covariance, sequence, token) of all tokens, in reading order."""
    logprobs = [x for s in batch for x in s["logprob"]]
    values = [x for s in batch for x in s["advantage"]]
    if not logprobs:
        return []
    mean_logprob, mean_advantage = sum(logprobs) / len(logprobs), sum(values) / len(values)
    return [
        ((s["logprob"][t] - mean_logprob) * (s["advantage"][t] - mean_advantage), i, t)
        for i, s in enumerate(batch)
        for t in range(len(s["logprob"]))
    ]


def whole_tokens(share, total, at_least):
    number = 0
    while number + 1 <= share * total + 1e-9:
        number += 1
    return max(number, at_least)


def kl_cov(batch, o):
    table = covariance_table(batch)
    number = whole_tokens(o["share"], len(table), o["at_least"])
    top = {(i, t) for _, i, t in sorted(table, key=lambda entry: -entry[0])[:number]}
    rows = []
    for i, s in enumerate(batch):
        row = []
        for t, (new, old, a) in enumerate(zip(s["logprob"], s["old"], s["advantage"], strict=True)):
            value = math.exp(new - old) * a
            if (i, t) in top:
                value -= o["coefficient"] * (abs(new - old) if o["penalty"] == "absolute" else k3(new - old))
            row.append(value)
        rows.append(row)
    return rows, [[True] * len(s["logprob"]) for s in batch]


def clip_cov(batch, o):
    rows, counted = grpo(batch, o)
    table = covariance_table(batch)
    candidates = []
    for cov, i, t in table:
        s = batch[i]
        ratio, a = math.exp(s["logprob"][t] - s["old"][t]), s["advantage"][t]
        already = clip(ratio, o["clip_low"], o["clip_high"]) * a < ratio * a
        if o["low"] <= cov <= o["high"] and not already:
            candidates.append((s["uniform"][t], i, t))
    for _, i, t in sorted(candidates, key=lambda c: c[0])[: whole_tokens(o["share"], len(table), o["at_least"])]:
        rows[i][t] = 0.0
    return rows, counted


def reduce(rows, counted, aggregation, constant):
    pairs = [(row, kept) for row, kept in zip(rows, counted, strict=True) if any(kept)]
    if not pairs:
        return 0.0
    if aggregation == "token_mean":
        return sum(v for row, _ in pairs for v in row) / sum(sum(kept) for _, kept in pairs)
    if aggregation == "sequence_mean":
        return sum(sum(row) / sum(kept) for row, kept in pairs) / len(pairs)
    return sum(sum(row) / constant for row, _ in pairs) / len(pairs)


TERMS = {
    "grpo": grpo,
    "dr_grpo": grpo,
    "dapo": grpo,
    "gspo": gspo,
    "grpo_n": grpo_n,
    "gspo_n": gspo_n,
    "forking_tokens": forking_tokens,
    "kl_cov": kl_cov,
    "clip_cov": clip_cov,
}


def objective(name: str, options: dict, feeds: dict, uniforms: np.ndarray | None = None) -> float:
    """J of padded NumPy arrays."""
    batch = sequences(feeds, uniforms)
    rows, counted = TERMS[name](batch, options)
    value = reduce(rows, counted, options["aggregation"], options["constant"])
    if not options["kl_coefficient"]:
        return value
    penalty = []
    for s in batch:
        log_r = [reference - new for reference, new in zip(s["reference"], s["logprob"], strict=True)]
        penalty.append([k3(x) if options["kl_estimator"] == "k3" else x * x / 2 for x in log_r])
    everything = [[True] * len(row) for row in penalty]
    return value - options["kl_coefficient"] * reduce(penalty, everything, options["aggregation"], options["constant"])


def gradient(name: str, options: dict, feeds: dict, uniforms: np.ndarray | None = None, step: float = 1e-6):
    """∂J / ∂logprobs by central differences, and where one-sided slopes agree, so that J has a derivative there."""
    slopes = np.zeros(feeds["mask"].shape)
    smooth = np.ones(feeds["mask"].shape, dtype=bool)
    centre = objective(name, options, feeds, uniforms)
    for place in np.ndindex(slopes.shape):
        if not feeds["mask"][place]:
            continue
        values = []
        for sign in (1, -1):
            moved = feeds["logprobs"].copy()
            moved[place] += sign * step
            values.append(objective(name, options, {**feeds, "logprobs": moved}, uniforms))
        ahead, behind = (values[0] - centre) / step, (centre - values[1]) / step
        slopes[place] = (ahead + behind) / 2
        smooth[place] = abs(ahead - behind) <= 1e-4 * (1 + abs(slopes[place]))
    return slopes, smooth


def clear_selection(name: str, options: dict, feeds: dict, margin: float = 1e-7) -> bool:
    """Whether no covariance is so close to a cut that rounding decides which side it falls on."""
    covs = sorted((c for c, _, _ in covariance_table(sequences(feeds))), reverse=True)
    if name == "kl_cov":
        number = whole_tokens(options["share"], len(covs), options["at_least"])
        return not 0 < number < len(covs) or covs[number - 1] - covs[number] > margin
    if name == "clip_cov":
        return all(abs(c - edge) > margin for c in covs for edge in (options["low"], options["high"]))
    return True
