"""Directions against their definition in float64, and the traps of seeded noise."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlvr_landscape_plugin.directions import (
    GENERATOR,
    SliceSpec,
    fingerprint,
    global_scales,
    raw_direction,
    scaled_direction,
)

WEIGHTS = {
    "embed.weight": np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32),
    "layers.0.q.weight": np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32),
    "layers.1.q.weight": np.random.default_rng(2).normal(size=(8, 8)).astype(np.float32),
    "norm.weight": np.ones(8, np.float32),
    "q.bias": np.zeros(8, np.float32),
}


def directions(spec: SliceSpec, axis: str = "alpha") -> dict[str, np.ndarray]:
    scale = global_scales(spec, WEIGHTS, WEIGHTS.__getitem__)[axis]
    return {name: scaled_direction(spec, axis, name, weight, scale) for name, weight in WEIGHTS.items()}


def norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))


def test_draw_is_the_documented_stream():
    key = hashlib.sha256(f"{GENERATOR}\x005\x00beta\x00w".encode()).digest()[:16]
    expected = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).standard_normal(
        (3, 4), dtype=np.float32
    )
    np.testing.assert_array_equal(raw_direction(5, "beta", "w", (3, 4)), expected)


def test_same_shape_means_different_noise_for_names_axes_and_seeds():
    draws = [
        raw_direction(seed, axis, name, (64,)) for seed in (0, 1) for axis in ("alpha", "beta") for name in ("a", "b")
    ]
    for i in range(len(draws)):
        for j in range(i):
            assert abs(np.corrcoef(draws[i], draws[j])[0, 1]) < 0.5


def test_noise_is_standard_normal():
    draw = raw_direction(0, "alpha", "w", (200_000,))
    assert stats.kstest(draw, "norm").pvalue > 1e-3


def test_another_process_draws_the_same():
    code = (
        "from rlvr_landscape_plugin.directions import raw_direction\n"
        "print(raw_direction(0, 'alpha', 'w', (5,)).tobytes().hex())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert raw_direction(0, "alpha", "w", (5,)).tobytes().hex() == other


def test_tensor_normalisation_gives_each_tensor_its_own_norm():
    for axis in ("alpha", "beta"):
        for name, direction in directions(SliceSpec(0), axis).items():
            assert norm(direction) == pytest.approx(norm(WEIGHTS[name]), rel=1e-6)


def test_filter_normalisation_is_by_row_and_leaves_vectors_alone():
    for name, direction in directions(SliceSpec(0, "filter")).items():
        if direction.ndim == 1:
            assert not direction.any()
        else:
            for row, weight in zip(direction, WEIGHTS[name], strict=True):
                assert norm(row) == pytest.approx(norm(weight), rel=1e-6)


def test_global_normalisation_keeps_one_factor():
    moved = directions(SliceSpec(0, "global"))
    total = np.sqrt(sum(norm(w) ** 2 for w in WEIGHTS.values()))
    assert np.sqrt(sum(norm(d) ** 2 for d in moved.values())) == pytest.approx(total, rel=1e-6)
    factors = [float((moved[n] / raw_direction(0, "alpha", n, moved[n].shape)).mean()) for n in WEIGHTS]
    assert max(factors) == pytest.approx(min(factors), rel=1e-5)


def test_globs_choose_what_moves():
    spec = SliceSpec(0, include=("layers.*",), exclude=("layers.1.*",))
    assert [name for name, d in directions(spec).items() if d.any()] == ["layers.0.q.weight"]


@given(st.integers(0, 2**40), st.sampled_from(["tensor", "filter", "global"]))
def test_spec_survives_json(seed, normalization):
    spec = SliceSpec(seed, normalization, ("a*",), ("*b",))
    assert SliceSpec(**spec.as_dict()) == spec


def test_fingerprint_tells_slices_apart():
    shapes = {name: weight.shape for name, weight in WEIGHTS.items()}
    prints = [fingerprint(SliceSpec(seed, exclude=ex), shapes) for seed in (0, 1) for ex in ((), ("norm*",))]
    assert len(set(prints)) == 4
    assert prints[0] == fingerprint(SliceSpec(0), dict(reversed(shapes.items())))


def test_bad_specs_are_refused():
    with pytest.raises(ValueError, match="non-negative"):
        SliceSpec(-1)
    with pytest.raises(ValueError, match="normalization"):
        SliceSpec(0, "rows")  # type: ignore[arg-type]
