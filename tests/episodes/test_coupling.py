"""Coupled draws are draws from the moved policy: a policy of twelve tokens, chi-square tests and edge cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rlvr_landscape_plugin.episodes import coupling
from rlvr_landscape_plugin.episodes.coupling import Masses, Noise, choose, draw, draw_uniforms, likeliest

VOCABULARY = 12


def log(probabilities: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(probabilities)


def coupled(
    p: np.ndarray, q: np.ndarray, tokens: np.ndarray, k: int, rollout: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The moved policy's token for each of `tokens`, and whether the coupling says that it stays."""
    n = len(tokens)
    log_p, log_q = (np.broadcast_to(log(values), (n, len(values))) for values in (p, q))
    candidates, noise = np.array(likeliest(log_p, k)), Noise(0, 3, rollout, 1)
    of_p, of_q = (Masses.of(values, candidates, tokens) for values in (log_p, log_q))
    choices = choose(noise, candidates, tokens, of_p, of_q)
    among = coupling.allowed(choices, candidates, tokens, len(p))
    return draw(log_q, among, draw_uniforms(noise, np.arange(n))), choices.stays


def chi_square(found: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value of draws against their probabilities; rare tokens count as one."""
    expected = probabilities * len(found)
    counts = np.bincount(found, minlength=len(probabilities)).astype(float)
    rare = expected < 20
    counts, expected = (np.append(v[~rare], v[rare].sum()) for v in (counts, expected))
    kept = expected > 0
    assert (counts[~kept] == 0).all()
    return float(stats.chisquare(counts[kept], expected[kept] * counts.sum() / expected[kept].sum()).pvalue)


def marginals(draws: int) -> list[float]:
    """p-values of twenty random pairs of policies."""
    random, values = np.random.default_rng(7), []
    for pair in range(20):
        p, q = random.dirichlet(np.ones(VOCABULARY), size=2)
        tokens = random.choice(VOCABULARY, size=draws, p=p)
        found, _ = coupled(p, q, tokens, k=int(random.integers(1, 8)), rollout=pair + 77000)
        values.append(chi_square(found, q))
    return values


def test_the_generator_is_that_of_numpy():
    key = 123456789, 2**63 + 5
    counters = np.random.default_rng(0).integers(0, 2**64, size=(4, 20), dtype=np.uint64)
    found = coupling.philox(key, counters)
    for column in range(20):
        counter = sum(int(word) << (64 * place) for place, word in enumerate(counters[:, column]))
        # NumPy counts up before it makes a block.
        reference = np.random.Philox(key=key[0] + (key[1] << 64), counter=(counter - 1) % 2**256).random_raw(4)
        assert (found[:, column] == reference).all()


def test_every_number_of_a_place_gives_other_noise():
    places = [Noise(*at) for at in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))]
    values = [noise.uniforms(np.arange(3)[:, None], level, np.arange(4)) for noise in places for level in (0, 1)]
    assert len({float(value) for grid in values for value in grid.ravel()}) == 5 * 2 * 3 * 4
    # The same place has the same noise, whatever is computed with it.
    assert places[0].uniforms(np.array(2), 1, np.array(3)) == values[1][2, 3]
    assert stats.kstest(Noise(0, 0, 0, 0).exponentials(np.arange(20000), 0, np.array(5)), "expon").pvalue > 0.01


def test_coupled_draws_are_draws_from_the_moved_policy():
    assert stats.kstest(marginals(20_000), "uniform").pvalue > 0.05


@pytest.mark.nightly
def test_a_million_coupled_draws_are_draws_from_the_moved_policy():
    values = marginals(1_000_000)
    print("p-values", np.round(sorted(values), 3), "KS", stats.kstest(values, "uniform").pvalue)
    assert stats.kstest(values, "uniform").pvalue > 0.05


def test_pairs_of_tokens_within_the_tail_are_drawn_from_the_moved_policy_too():
    # Nearly all of p is in the tail, so that all three choices decide.
    p = np.array([0.1] + [0.9 / 11] * 11)
    q = np.random.default_rng(5).dirichlet(np.ones(12))
    tokens = np.random.default_rng(6).choice(12, size=100_000, p=p)
    found, _ = coupled(p, q, tokens, k=1)
    assert chi_square(found, q) > 0.01
    # For each token of the checkpoint, the moved policy keeps it at most as often as any coupling can.
    kept = np.bincount(tokens[found == tokens], minlength=12) / len(tokens)
    assert (kept <= np.minimum(p, q) + 0.01).all()


def test_adding_the_drawn_token_to_the_candidates_would_give_another_distribution():
    """The construction that the module's docstring rejects; it also shows what the chi-square test can see."""
    p, q, n = np.array([0.4, 0.2, 0.2, 0.2]), np.array([0.4, 0.6, 0.0, 0.0]), 100_000
    tokens = np.random.default_rng(7).choice(4, size=n, p=p)
    rows, own = np.arange(n), np.where(tokens == 0, 0, 1)
    alternatives = []
    for policy in (p, q):
        mass = np.column_stack([np.full(n, policy[0]), np.where(tokens == 0, 0.0, policy[tokens]), np.zeros(n)])
        mass[:, 2] = 1 - mass[:, :2].sum(axis=1)
        alternatives.append(log(np.maximum(mass, 0)))
    noise = coupling.posterior(alternatives[0], own, np.random.default_rng(8).exponential(size=(n, 3)))
    won = coupling.winner(noise, alternatives[1], own)
    among = np.ones((n, 4), bool)
    among[:, 0] = False
    among[rows[tokens > 0], tokens[tokens > 0]] = False
    found = np.where(won == 0, 0, tokens)
    away = won == 2
    found[away] = draw(np.broadcast_to(log(q), (n, 4))[away], among[away], np.random.default_rng(9).random(away.sum()))
    assert chi_square(found, q) < 1e-6
    right, _ = coupled(p, q, tokens, k=1)
    assert chi_square(right, q) > 0.01


def test_a_token_is_kept_as_often_as_with_common_noise():
    """Closed form: with one noise for both policies, both choose i with probability 1 / Σ_j max(p_j/p_i, q_j/q_i)."""
    p, q = np.random.default_rng(12).dirichlet(np.ones(VOCABULARY), size=2)
    expected = 1 / np.maximum(p[None, :] / p[:, None], q[None, :] / q[:, None]).sum(axis=1)
    tokens = np.random.default_rng(13).choice(VOCABULARY, size=100_000, p=p)
    _, stays = coupled(p, q, tokens, k=VOCABULARY)
    found = np.bincount(tokens[stays], minlength=VOCABULARY) / len(tokens)
    assert np.abs(found - expected).max() < 4 * np.sqrt(expected.max() / len(tokens))


def test_near_policies_keep_nearly_as_many_tokens_as_any_coupling():
    random = np.random.default_rng(2)
    p = random.dirichlet(np.full(400, 0.3))
    q = p * np.exp(0.1 * random.standard_normal(400))
    q /= q.sum()
    tokens = random.choice(400, size=5_000, p=p)
    _, stays = coupled(p, q, tokens, k=16)
    distance = 0.5 * np.abs(p - q).sum()
    assert 0.8 * distance < 1 - stays.mean() < 2.5 * distance, (distance, 1 - stays.mean())


probabilities = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=2, max_size=9).map(np.array)


@settings(max_examples=60)
@given(data=st.data(), k=st.integers(1, 9))
def test_edge_cases(data, k):
    """Ties, zeros of either policy, K = 1, K beyond the vocabulary: tokens that q can say, and y where p = q."""
    p = data.draw(probabilities.filter(lambda values: values.sum() > 0))
    q = data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=len(p), max_size=len(p)).map(np.array))
    p, q = p / p.sum(), q / q.sum() if q.sum() else p
    tokens = np.random.default_rng(k).choice(len(p), size=50, p=p)
    found, stays = coupled(p, q, tokens, k)
    assert (q[found] > 0).all()
    assert np.array_equal(found == tokens, stays)
    again, same = coupled(p, p, tokens, k)
    assert same.all()
    assert np.array_equal(again, tokens)


def test_a_policy_with_all_mass_elsewhere_leaves_everywhere():
    p, q = np.array([0.5, 0.5, 0.0, 0.0]), np.array([0.0, 0.0, 0.25, 0.75])
    tokens = np.random.default_rng(1).choice(2, size=4000, p=p[:2])
    found, stays = coupled(p, q, tokens, k=2)
    assert not stays.any()
    assert chi_square(found, q) > 0.01


def test_the_first_departure():
    stays = np.array([True, True, False, True, False])
    assert coupling.Choices(stays, np.zeros(5, np.int8), np.zeros(5, int)).first == 2
    assert coupling.Choices(stays[:2], np.zeros(2, np.int8), np.zeros(2, int)).first is None


def test_ties_are_won_by_the_drawn_alternative():
    assert coupling.winner(np.ones((1, 3)), np.zeros((1, 3)), np.array([2])) == 2
    assert coupling.winner(np.ones((1, 3)), np.array([[0.0, 0.1, 0.0]]), np.array([2])) == 1


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="drawn whose probability under the checkpoint is 0"):
        coupled(np.array([1.0, 0.0]), np.array([0.5, 0.5]), np.array([1]), k=1)
    with pytest.raises(ValueError, match="not numbers"):
        coupled(np.array([0.5, 0.5]), np.array([np.nan, 0.5]), np.array([1]), k=1)
    with pytest.raises(ValueError, match="to draw from have probability 0"):
        draw(log(np.array([[1.0, 0.0]])), np.array([[False, True]]), np.array([0.5]))
