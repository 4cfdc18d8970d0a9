"""The recipe in docs/measurement.md is enough to draw a slice: other code, written from the page alone, gives the same.

SHA-256 is written out here (FIPS 180-4), the bits of Philox too (Salmon et al. 2011, as Random123's philox4x64-10), so
that the page's words "key", "little-endian" and "counter 0" are tested and not only NumPy against NumPy.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from safetensors.numpy import load_file

from rlvr_landscape_plugin.directions import SliceSpec, global_scales, scaled_direction
from rlvr_landscape_plugin.snapshot import SHIPPED, open_snapshot

ROOT = Path(__file__).parents[2]
NAME = "model.layers.0.mlp.up_proj.weight"
WEIGHT = np.array([[1, 2, 2], [0, 3, 4]], np.float32)


def sha256(message: bytes) -> bytes:
    """SHA-256 by its definition: constants from the fractional parts of roots of primes."""
    primes = [n for n in range(2, 312) if all(n % d for d in range(2, n))][:64]

    def root(n: int, power: int) -> int:
        """First 32 bits of the fractional part of n^(1/power), by integers."""
        low, high = 0, n << 33
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if middle**power <= n << (32 * power) else (low, middle)
        return low & 0xFFFFFFFF

    def turn(x: int, by: int) -> int:
        return (x >> by | x << (32 - by)) & 0xFFFFFFFF

    state = [root(p, 2) for p in primes[:8]]
    constants = [root(p, 3) for p in primes]
    padded = message + b"\x80" + bytes(-(len(message) + 9) % 64) + (8 * len(message)).to_bytes(8, "big")
    for start in range(0, len(padded), 64):
        w = [int.from_bytes(padded[start + 4 * i : start + 4 * i + 4], "big") for i in range(16)]
        for i in range(16, 64):
            s0 = turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3
            s1 = turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10
            w.append((w[i - 16] + s0 + w[i - 7] + s1) & 0xFFFFFFFF)
        a, b, c, d, e, f, g, h = state
        for i in range(64):
            s1 = turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)
            one = h + s1 + ((e & f) ^ (~e & g)) + constants[i] + w[i]
            s0 = turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)
            two = s0 + ((a & b) ^ (a & c) ^ (b & c))
            a, b, c, d, e, f, g, h = (one + two) & 0xFFFFFFFF, a, b, c, (d + one) & 0xFFFFFFFF, e, f, g
        state = [(x + y) & 0xFFFFFFFF for x, y in zip(state, (a, b, c, d, e, f, g, h), strict=True)]
    return b"".join(x.to_bytes(4, "big") for x in state)


def philox(key: int, blocks: int) -> list[int]:
    """64-bit words of Philox 4×64 with 10 rounds; NumPy counts the block number up before each block."""
    mask, words = 2**64 - 1, []
    for block in range(1, blocks + 1):
        c0, c1, c2, c3 = block, 0, 0, 0
        k0, k1 = key & mask, key >> 64
        for _ in range(10):
            one, two = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
            c0, c1, c2, c3 = (two >> 64) ^ c1 ^ k0, two & mask, (one >> 64) ^ c3 ^ k1, one & mask
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
        words += [c0, c1, c2, c3]
    return words


def key_of(seed: int, axis: str, name: str) -> int:
    text = b"\x00".join(part.encode() for part in ("numpy-philox-sha256-v1", str(seed), axis, name))
    return int.from_bytes(sha256(text)[:16], "little")


def noise_of(seed: int, axis: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=key_of(seed, axis, name)))
    return generator.standard_normal(shape, dtype=np.float32)


def recipe(seed: int, axis: str, weights: dict[str, np.ndarray], normalization: str) -> dict[str, np.ndarray]:
    """Steps 1 to 5 of the page."""
    noise = {name: noise_of(seed, axis, name, w.shape) for name, w in weights.items()}

    def norm(values: np.ndarray) -> float:
        return float(np.sqrt(np.sum(values.astype(np.float64) ** 2)))

    result = {}
    for name, w in weights.items():
        draw = noise[name]
        if normalization == "tensor":
            result[name] = draw * np.float32(norm(w) / norm(draw))
        elif normalization == "filter":
            rows = [0.0] * len(w) if w.ndim < 2 else [norm(a) / norm(b) for a, b in zip(w, draw, strict=True)]
            factors = np.array(rows, np.float32).reshape(-1, *[1] * (w.ndim - 1))
            result[name] = draw * factors
        else:
            total = np.sqrt(sum(norm(v) ** 2 for v in weights.values()) / sum(norm(v) ** 2 for v in noise.values()))
            result[name] = draw * np.float32(total)
    return result


def table() -> dict[str, str]:
    """The test vector as the page prints it."""
    page = (ROOT / "docs" / "measurement.md").read_text(encoding="utf-8")
    section = page.split("### Drawing the directions again")[1].split("\n### ")[0]
    assert f"`{NAME}`" in section
    return dict(re.findall(r"^\| ([^|]+?) \| `([^`]+)` \|$", section, re.M))


def test_the_pages_test_vector_is_what_the_recipe_gives():
    expected = table()
    text = f"numpy-philox-sha256-v1\x000\x00alpha\x00{NAME}".encode()
    assert sha256(text) == hashlib.sha256(text).digest(), "the hash written out above"
    assert sha256(text)[:16].hex() == expected["first 16 bytes of the SHA-256"]
    assert str(key_of(0, "alpha", NAME)) == expected["Philox key"]
    values = {
        "noise": noise_of(0, "alpha", NAME, WEIGHT.shape),
        "δ, `tensor`": recipe(0, "alpha", {NAME: WEIGHT}, "tensor")[NAME],
        "δ, `filter`": recipe(0, "alpha", {NAME: WEIGHT}, "filter")[NAME],
    }
    for quantity, found in values.items():
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found.ravel(), np.array(expected[quantity].split(), np.float32), quantity)
    assert len(expected) == 5


def test_numpys_philox_has_the_key_and_counter_that_the_page_says():
    key = key_of(7, "beta", "w")
    assert np.random.Philox(key=key).random_raw(12).tolist() == philox(key, 3)


@pytest.mark.parametrize("normalization", ["tensor", "filter", "global"])
@pytest.mark.parametrize("axis", ["alpha", "beta"])
def test_the_recipe_draws_the_slices_of_this_package(normalization, axis):
    weights = load_file(SHIPPED["tiny-sorter"] / "model.safetensors")
    expected = recipe(3, axis, weights, normalization)
    spec, snapshot = SliceSpec(3, normalization), open_snapshot("tiny-sorter")
    scale = global_scales(spec, snapshot.tensors, snapshot.read)[axis]
    for name in weights:
        found = scaled_direction(spec, axis, name, snapshot.read(name), scale)
        # The order of a float64 sum may move the factor by one unit in the last place of float32.
        np.testing.assert_allclose(found, expected[name], rtol=2e-7, atol=0, err_msg=name)


def test_a_datasets_attributes_name_what_the_recipe_needs():
    path = ROOT / "tests" / "analysis" / "data" / "laptop" / "landscape_step000000_slice0.nc"
    with xr.open_dataset(path) as data:
        slice_ = json.loads(data.attrs["slice"])
        assert set(slice_) == {"seed", "normalization", "include", "exclude"}
        assert re.fullmatch("[0-9a-f]{64}", data.attrs["snapshot_sha256"])
