"""Completions of a moved policy from those of the checkpoint, exactly, by coupled Gumbel noise. NumPy only, no server.

**The primitive.** A token is drawn from p by giving every alternative i a noise n_i ~ Exp(1) and taking the smallest
n_i / p_i. (With g_i = −log n_i, a Gumbel variable, this is the argmax of g_i + log p_i.) If it is known which
alternative y won, the noise can be drawn afterwards. The winning time min n_i / p_i is Exp(1) and independent of y, and
each other alternative comes later by an exponential time of rate p_i. So, with independent E_i ~ Exp(1),

    n_y = E_y p_y        n_i = E_y p_i + E_i    for i ≠ y

are, over the draw of y from p, independent Exp(1) variables (top-down sampling: Maddison et al. 2014, arXiv 1411.0030;
posterior Gumbels: Oberst and Sontag 2019, arXiv 1905.05824). The alternative with the smallest n_i / q_i is then a draw
from q, for any q, and it is y wherever q differs little from p.

**A large vocabulary.** To compare all tokens, both policies would have to send 50,000 numbers per position. An
alternative may be a group of tokens: the minimum over a group is again exponential, with the mass of the group. The
groups must follow from p alone. If y were added to p's K likeliest tokens where it is none of them, the groups would
depend on y, and the draws would not be from q (`tests/episodes/test_coupling.py` measures by how much). So there are up
to three choices at a position:

0. among p's K likeliest tokens and the *tail*, which is all other tokens;
1. if y is in the tail and the tail won under q too: among classes of the tail, by token id modulo their number;
2. if y's class won under q too: among the tokens of that class.

y stays if it, or its group, wins every choice. Otherwise the rollout leaves the checkpoint's completion here. Its token
is the alternative that won, or, if that is a group, a draw from q within the group (`allowed`, `draw`).

**Randomness.** Every E_i is a function of (seed, prompt, rollout, turn, position, level, alternative), by one block of
the generator Philox whose counter holds these numbers. The noise is therefore the same at all policies, and does not
depend on what else is computed or in which order.

**Rounding.** Probabilities that were computed in another way (decoding instead of scoring, other batches) differ by
rounding, and so do the draws. A tie is won by y.

Sweeps do not use this module; docs/benchmarks.md ("Completions near the checkpoint") says why.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

GENERATOR = "philox4x64-coupling-v1"
"""Name of the random stream; another one must have another name."""
TOP, CLASSES, MEMBERS = 0, 1, 2
"""Levels of a choice: the K likeliest and the tail, the classes of the tail, the tokens of a class."""
_DRAW = 3
_TAIL = 2**62
"""Number of the tail among the alternatives of the level TOP, beyond every token id."""
_CHUNK = 16384
"""Blocks computed at once, so that they stay in the processor's cache."""
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_STEPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B


def _product(a: np.ndarray, constant: int) -> tuple[np.ndarray, np.ndarray]:
    """High and low 64 bits of `a` × `constant`."""
    low, high = np.uint64(constant & 0xFFFFFFFF), np.uint64(constant >> 32)
    a_low, a_high = a & _LOW, a >> _HALF
    cross, other = a_low * high, a_high * low
    middle = ((a_low * low) >> _HALF) + (cross & _LOW) + (other & _LOW)
    return a_high * high + (cross >> _HALF) + (other >> _HALF) + (middle >> _HALF), a * np.uint64(constant)


def philox(key: tuple[int, int], counter: np.ndarray) -> np.ndarray:
    """Philox 4×64 with ten rounds (Salmon et al. 2011) at any counters: uint64 (4, …) → uint64 (4, …).

    NumPy's own generator gives the same blocks one after the other only.
    """
    first, second = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(first), low1, high0 ^ c3 ^ np.uint64(second), low0
        first, second = (first + _STEPS[0]) % 2**64, (second + _STEPS[1]) % 2**64
    return np.stack([c0, c1, c2, c3])


@dataclass(frozen=True)
class Noise:
    """The random numbers of one turn of one rollout."""

    seed: int
    prompt: int
    rollout: int
    turn: int

    def uniforms(self, positions: np.ndarray, level: int, alternatives: np.ndarray) -> np.ndarray:
        """Uniform in (0, 1), float64, in the shape to which `positions` and `alternatives` (non-negative) broadcast."""
        text = "\x00".join((GENERATOR, str(self.seed), str(self.prompt), str(self.rollout))).encode()
        digest = hashlib.sha256(text).digest()
        key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
        at, which = np.broadcast_arrays(positions, alternatives)
        flat = at.astype(np.uint64).ravel(), which.astype(np.uint64).ravel()
        found = np.empty(at.size, np.uint64)
        for start in range(0, at.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            counter = np.zeros((4, len(found[part])), np.uint64)
            counter[0], counter[1], counter[2], counter[3] = flat[1][part], flat[0][part], self.turn, level
            found[part] = philox(key, counter)[0]
        return (((found >> np.uint64(11)) + 0.5) * 2.0**-53).reshape(at.shape)

    def exponentials(self, positions: np.ndarray, level: int, alternatives: np.ndarray) -> np.ndarray:
        """Exp(1), float64, positive; arguments as of `uniforms`."""
        return -np.log1p(-self.uniforms(positions, level, alternatives))


def posterior(log_p: np.ndarray, drawn: np.ndarray, exponentials: np.ndarray) -> np.ndarray:
    """Noise of every alternative, given that `drawn` won under p: float64 (n, alternatives).

    `log_p`: (n, alternatives), nat; each row need only be proportional to probabilities. `drawn`: int (n,).
    `exponentials`: independent Exp(1), (n, alternatives). Raises `ValueError` where p of a drawn alternative is 0.
    """
    with np.errstate(invalid="ignore"):
        p = np.exp(log_p.astype(np.float64) - log_p.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    rows = np.arange(len(drawn))
    if not (p[rows, drawn] > 0).all():
        raise ValueError("an alternative was drawn whose probability under the checkpoint is 0")
    time = exponentials[rows, drawn]
    noise = time[:, None] * p + exponentials
    noise[rows, drawn] = time * p[rows, drawn]
    return noise


def winner(noise: np.ndarray, log_q: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The alternative that wins under q: int64 (n,). `drawn` wins ties.

    `log_q`: (n, alternatives), nat, up to a constant per row; −inf never wins unless all are. Raises `ValueError` where
    one is not a number.
    """
    if np.isnan(log_q).any():
        raise ValueError("the moved policy's log-probabilities are not numbers")
    with np.errstate(divide="ignore"):
        time = np.log(noise) - log_q.astype(np.float64)
    best, rows = time.argmin(axis=1), np.arange(len(drawn))
    return np.where(time[rows, drawn] <= time[rows, best], drawn, best)


def classes(vocabulary: int) -> int:
    """Into how many classes the tail of a vocabulary is divided: as many as a class has tokens."""
    return int(np.ceil(np.sqrt(vocabulary)))


def _logsumexp(values: np.ndarray, axis: int) -> np.ndarray:
    most = values.max(axis=axis, keepdims=True)
    most = np.where(np.isfinite(most), most, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values - most).sum(axis=axis)) + np.squeeze(most, axis)


def likeliest(log_p: np.ndarray, k: int) -> np.ndarray:
    """The K likeliest tokens at each position, in ascending order of their ids: int64 (n, K), from (n, vocabulary)."""
    if k >= log_p.shape[1]:
        return np.broadcast_to(np.arange(log_p.shape[1]), log_p.shape)
    return np.sort(np.argpartition(-log_p, k - 1, axis=1)[:, :k], axis=1)


@dataclass(frozen=True)
class Masses:
    """What a choice needs of one policy at the positions of a turn: log-probabilities of alternatives, nat, float64."""

    top: np.ndarray
    """(n, K + 1): the candidates', and last the tail's."""
    of_classes: np.ndarray
    """(m, classes): at the m positions whose token is in the tail."""
    members: np.ndarray
    """(m, members): there, the tokens of its class; −inf for candidates, and beyond the vocabulary."""

    @classmethod
    def of(cls, logprobs: np.ndarray, candidates: np.ndarray, tokens: np.ndarray) -> Masses:
        """From whole distributions, (n, vocabulary); `candidates` int (n, K), `tokens` int (n,): the completion's."""
        vocabulary = logprobs.shape[1]
        tail = logprobs.astype(np.float64)
        top = np.take_along_axis(tail, candidates, axis=1)
        np.put_along_axis(tail, candidates, -np.inf, axis=1)
        inside = np.flatnonzero((candidates != tokens[:, None]).all(axis=1))
        number = classes(vocabulary)
        rows = -(-vocabulary // number)
        padded = np.full((len(inside), rows * number), -np.inf)
        padded[:, :vocabulary] = tail[inside]
        grid = padded.reshape(len(inside), rows, number)
        members = grid[np.arange(len(inside)), :, tokens[inside] % number]
        return cls(np.column_stack([top, _logsumexp(tail, 1)]), _logsumexp(grid, 1), members)


@dataclass(frozen=True)
class Choices:
    """What a moved policy chose at each position of a turn."""

    stays: np.ndarray
    """bool (n,): the token is the completion's."""
    level: np.ndarray
    """int8 (n,): the last choice that was made."""
    alternative: np.ndarray
    """int64 (n,): what won it: a column of `Masses.top`, a class, or a place in a class."""

    @property
    def first(self) -> int | None:
        """The first position that the rollout leaves at; None if it keeps the whole turn."""
        left = np.flatnonzero(~self.stays)
        return int(left[0]) if len(left) else None


def choose(noise: Noise, candidates: np.ndarray, tokens: np.ndarray, p: Masses, q: Masses) -> Choices:
    """Couple a turn of the checkpoint with a moved policy.

    `candidates`: int (n, K), p's likeliest tokens (`likeliest`). `tokens`: int (n,), drawn from p. `p`, `q`: of both
    policies at the same positions. Only the positions up to `Choices.first` have the prefix that q was computed for;
    what is said of later ones has no meaning. Raises `ValueError` where a token has probability 0 under p.
    """
    n, k = candidates.shape
    positions = np.arange(n)
    equal = candidates == tokens[:, None]
    drawn = np.where(equal.any(axis=1), equal.argmax(axis=1), k)
    numbers = np.column_stack([candidates, np.full(n, _TAIL)])
    won = _coupled(noise, TOP, positions, numbers, p.top, q.top, drawn)
    stays, level = won == drawn, np.full(n, TOP, np.int8)
    inside = np.flatnonzero(drawn == k)
    for which, log_p, log_q, own, ids in _finer(tokens[inside], p, q):
        still = np.flatnonzero(stays[inside])
        at = inside[still]
        if len(at):
            won[at] = _coupled(noise, which, at, ids[still], log_p[still], log_q[still], own[still])
            stays[at], level[at] = won[at] == own[still], which
    return Choices(stays, level, won)


def _finer(
    tokens: np.ndarray, p: Masses, q: Masses
) -> list[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """The two choices in the tail: level, log p, log q, what was drawn, and the numbers of the alternatives."""
    number, members = p.of_classes.shape[1], p.members.shape[1]
    own = tokens % number
    every = np.broadcast_to(np.arange(number), p.of_classes.shape)
    ids = own[:, None] + number * np.arange(members)
    return [(CLASSES, p.of_classes, q.of_classes, own, every), (MEMBERS, p.members, q.members, tokens // number, ids)]


def _coupled(
    noise: Noise,
    level: int,
    positions: np.ndarray,
    numbers: np.ndarray,
    log_p: np.ndarray,
    log_q: np.ndarray,
    drawn: np.ndarray,
) -> np.ndarray:
    exponentials = noise.exponentials(positions[:, None], level, numbers)
    return winner(posterior(log_p, drawn, exponentials), log_q, drawn)


def allowed(choices: Choices, candidates: np.ndarray, tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    """Among which tokens a choice leaves its token to q: bool (n, vocabulary); one token where the choice names it."""
    n, k = candidates.shape
    ids, number, rows = np.arange(vocabulary), classes(vocabulary), np.arange(n)
    tail = np.ones((n, vocabulary), bool)
    np.put_along_axis(tail, candidates, False, axis=1)
    named = np.where(choices.level == MEMBERS, tokens % number + number * choices.alternative, tokens)
    top = (choices.level == TOP) & (choices.alternative < k)
    named[top] = candidates[rows[top], choices.alternative[top]]
    in_class = tail & (ids % number == choices.alternative[:, None])
    group = np.where((choices.level == CLASSES)[:, None], in_class, tail)
    by_name = top | (choices.level == MEMBERS) | choices.stays
    return np.where(by_name[:, None], ids == named[:, None], group)


def draw(logprobs: np.ndarray, among: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """A draw from each distribution within a set of tokens, by its inverse cumulative distribution: int64 (n,).

    `logprobs`: (n, vocabulary), nat. `among`: bool, the same shape. `uniforms`: (n,) in (0, 1). Raises `ValueError`
    where the set has probability 0.
    """
    kept = np.where(among, logprobs.astype(np.float64), -np.inf)
    most = kept.max(axis=1, keepdims=True)
    if not np.isfinite(most).all():
        raise ValueError("the tokens to draw from have probability 0")
    cumulative = np.exp(kept - most).cumsum(axis=1)
    # Rounding must not lead to a token of probability 0 behind the last one.
    threshold = np.minimum(uniforms * cumulative[:, -1], np.nextafter(cumulative[:, -1], 0))
    return (cumulative <= threshold[:, None]).sum(axis=1)


def draw_uniforms(noise: Noise, positions: np.ndarray) -> np.ndarray:
    """What `draw` uses at these positions, float64 in (0, 1), the same at all policies."""
    return noise.uniforms(positions, _DRAW, np.zeros_like(positions))
