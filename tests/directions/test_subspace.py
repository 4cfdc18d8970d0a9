"""Directions in the subspace of a LoRA adapter and outside of it, compared with a dense Jacobian in float64."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlvr_landscape_plugin.config import DirectionConfig, SliceConfig, SweepConfig
from rlvr_landscape_plugin.designs import Surroundings
from rlvr_landscape_plugin.designs.census import census_designs
from rlvr_landscape_plugin.directions import (
    SliceSpec,
    Subspace,
    Trajectory,
    global_scales,
    prepare_slice,
    scaled_direction,
)
from rlvr_landscape_plugin.directions.spec import DirectionSpec
from rlvr_landscape_plugin.errors import ConfigurationError, SnapshotError
from rlvr_landscape_plugin.snapshot import open_snapshot

RANK, SCALE = 2, 3.0
SHAPES = {"m.q.weight": (5, 7), "m.v.weight": (4, 6), "m.norm.weight": (6,), "m.head.weight": (3, 6)}
"""q and v are adapted, head is trained as a whole, norm is not trained."""


def make(path, b_scale: float = 1.0):
    """An adapter whose A is one draw and whose B is another times `b_scale`, and its base."""
    draw = np.random.default_rng(5)
    base = path / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    save_file(
        {name: draw.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}, base / "model.safetensors"
    )
    tensors = {}
    for name in ("m.q", "m.v"):
        rows, columns = SHAPES[f"{name}.weight"]
        tensors[f"base_model.model.{name}.lora_A.weight"] = draw.normal(size=(RANK, columns)).astype(np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b_scale * draw.normal(size=(rows, RANK)).astype(np.float32)
    tensors["base_model.model.m.head.weight"] = draw.normal(size=SHAPES["m.head.weight"]).astype(np.float32)
    adapter = path / "step_000004"
    adapter.mkdir()
    save_file(
        {name: value.astype(np.float32) for name, value in tensors.items()}, adapter / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "base_model_name_or_path": "../base", "r": RANK, "lora_alpha": RANK * SCALE}
    config |= {"target_modules": ["q", "v"], "modules_to_save": ["head"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return open_snapshot(adapter)


def jacobian(snapshot, module: str) -> np.ndarray:
    """All changes of scale · B A by one element of A or of B, as columns: dense, float64, one element at a time."""
    pairs = load_file(snapshot.path / "adapter_model.safetensors")
    a, b = (pairs[f"base_model.model.{module}.lora_{half}.weight"].astype(np.float64) for half in "AB")
    columns = []
    for factor in (a, b):
        for place in np.ndindex(factor.shape):
            unit = np.zeros_like(factor)
            unit[place] = 1.0
            change = b @ unit if factor is a else unit @ a
            columns.append(SCALE * change.ravel())
    return np.array(columns).T


def projected(matrix: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The nearest point to `values` among the combinations of the columns of `matrix`, by least squares."""
    solution = np.linalg.lstsq(matrix, values.ravel(), rcond=1e-6)[0]
    return (matrix @ solution).reshape(values.shape)


def noise(axis: str, name: str, seed: int = 3) -> np.ndarray:
    """The noise of docs/measurement.md, drawn here again."""
    text = "\x00".join(("numpy-philox-sha256-v1", str(seed), axis, name)).encode()
    key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(SHAPES[name], np.float32).astype(np.float64)


def expected(snapshot, kind: str, axis: str, name: str) -> np.ndarray:
    """The part of the noise in one tensor, before it is scaled."""
    values = noise(axis, name)
    if name == "m.norm.weight":
        inside = np.zeros_like(values)
    elif name == "m.head.weight":
        inside = values
    else:
        inside = projected(jacobian(snapshot, name.removesuffix(".weight")), values)
    return inside if kind == "lora" else values - inside


def spec_of(kind: str, normalization: str = "tensor") -> SliceSpec:
    direction = DirectionSpec(kind, normalization)
    return SliceSpec(3, alpha=direction, beta=direction)


@pytest.mark.parametrize("b_scale", [1.0, 1e-4, 0.0], ids=["trained", "a little trained", "step 0"])
@pytest.mark.parametrize("normalization", ["tensor", "global"])
@pytest.mark.parametrize("kind", ["lora", "lora_complement"])
def test_directions_are_the_dense_projection_of_the_noise(tmp_path, kind, normalization, b_scale):
    snapshot = make(tmp_path, b_scale)
    spec, part = spec_of(kind, normalization), Subspace(snapshot).part
    scales = global_scales(spec, SHAPES, snapshot.read, part)
    for axis in ("alpha", "beta"):
        parts = {name: expected(snapshot, kind, axis, name) for name in SHAPES}
        theta = np.sqrt(sum(np.sum(snapshot.read(name).astype(float) ** 2) for name in SHAPES))
        total = np.sqrt(sum(np.sum(values**2) for values in parts.values()))
        for name, values in parts.items():
            found = scaled_direction(spec, axis, name, snapshot.read(name), scales[axis], part)
            norm = np.linalg.norm(values)
            own = np.linalg.norm(snapshot.read(name).astype(float)) / norm if norm > 1e-9 else 0.0
            factor = theta / total if normalization == "global" else own
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, factor * values, atol=2e-6)


def test_the_two_parts_are_orthogonal_add_up_to_the_noise_and_contain_the_displacement(tmp_path):
    snapshot = make(tmp_path)
    subspace = Subspace(snapshot)
    for name in SHAPES:
        values = noise("alpha", name)
        inside, outside = (subspace.part(kind, name, values) for kind in ("lora", "lora_complement"))
        np.testing.assert_allclose(inside + outside, values, atol=1e-14)
        assert abs(np.vdot(inside, outside)) < 1e-12
        np.testing.assert_allclose(subspace.part("lora", name, inside), inside, atol=1e-13)
        moved = snapshot.read(name).astype(float) - snapshot.base.read(name)
        np.testing.assert_allclose(subspace.part("lora", name, moved), moved, atol=1e-6)


@pytest.mark.parametrize("b_scale", [1.0, 0.0])
def test_dimensions_are_the_rank_of_the_jacobian(tmp_path, b_scale):
    snapshot = make(tmp_path, b_scale)
    subspace = Subspace(snapshot)
    for module in ("m.q", "m.v"):
        assert subspace.dimensions(f"{module}.weight") == np.linalg.matrix_rank(jacobian(snapshot, module), tol=1e-6)
    assert subspace.dimensions("m.norm.weight") == 0
    assert subspace.dimensions("m.head.weight") == 18


def test_a_subspace_that_is_everything_has_no_outside(tmp_path):
    """Rank 2 in a matrix of two rows: nothing is left, not rounding errors scaled up."""
    snapshot = make(tmp_path)
    pairs = dict(snapshot.adapter.pairs)
    subspace = Subspace(snapshot)
    full = {name: (np.eye(SHAPES[name][0]), np.eye(SHAPES[name][1])) for name in pairs}
    subspace.__dict__["_bases"] = full
    assert not subspace.moves("lora_complement", "m.q.weight")
    assert not subspace.part("lora_complement", "m.q.weight", noise("alpha", "m.q.weight")).any()


def prepared(snapshot, folder, **options):
    kind = options.pop("kind", "lora")
    config = SliceConfig(alpha=DirectionConfig(kind=kind), beta=DirectionConfig(kind=kind), **options)
    return prepare_slice(config, 3, Trajectory.around(snapshot, None), folder)


def test_a_server_draws_them_and_nothing_is_written(tmp_path):
    slice_ = prepared(make(tmp_path), tmp_path / "directions")
    assert not slice_.files
    assert not (tmp_path / "directions").exists()
    assert slice_.spec.direction("alpha") == DirectionSpec("lora", "tensor")
    p = 2 * 7 + 2 * 5 - 4 + 2 * 6 + 2 * 4 - 4 + 18
    assert slice_.description["beta"] == (
        f"random in the adapter's subspace ({p} of {35 + 24 + 6 + 18} dimensions), seed 3, scaled per tensor"
    )
    assert SliceSpec(**slice_.spec.as_dict()) == slice_.spec
    assert slice_.fingerprint != prepared(make(tmp_path / "other"), tmp_path, kind="lora_complement").fingerprint


def test_orthogonalised_they_are_files(tmp_path):
    snapshot = make(tmp_path)
    slice_ = prepared(snapshot, tmp_path / "directions", orthogonalize=True)
    eta = load_file(slice_.files["beta"])
    delta = {
        name: scaled_direction(slice_.spec, "alpha", name, snapshot.read(name), 1.0, Subspace(snapshot).part)
        for name in SHAPES
    }
    assert abs(sum(np.vdot(eta[name].astype(float), delta[name]) for name in SHAPES)) < 1e-4
    again = prepare_slice(
        SliceConfig(alpha=DirectionConfig(kind="lora"), beta=DirectionConfig(kind="lora"), orthogonalize=True),
        4,
        Trajectory.around(snapshot, None),
        tmp_path / "directions",
    )
    assert again.files["beta"] != slice_.files["beta"], "another seed is another direction"


def test_what_has_no_subspace_is_refused_by_name(tmp_path):
    snapshot = make(tmp_path)
    with pytest.raises(
        SnapshotError, match=r"slice\.alpha \(kind = 'lora'\): .* is a whole model; only a LoRA adapter"
    ):
        prepared(snapshot.base, tmp_path)
    with pytest.raises(SnapshotError, match="none of the tensors that move has a part in the adapter's subspace"):
        prepared(snapshot, tmp_path, include=["*norm*"])
    with pytest.raises(SnapshotError, match="none of the tensors that move has a part outside"):
        prepared(snapshot, tmp_path, include=["*head*"], kind="lora_complement")
    for options in ({"normalization": "filter"}, {"alpha": {"kind": "lora", "normalization": "filter"}}):
        with pytest.raises(ValueError, match="'filter' scales rows, which leads out of kind = 'lora'"):
            SliceConfig.model_validate({"alpha": {"kind": "lora"}, **options})
    with pytest.raises(ConfigurationError, match="needs a snapshot that is a LoRA adapter"):
        scaled_direction(spec_of("lora"), "alpha", "m.q.weight", np.ones((5, 7), np.float32), 1.0)
    with pytest.raises(ConfigurationError, match="kind = 'update' is not drawn from a seed"):
        scaled_direction(spec_of("update"), "alpha", "m.q.weight", np.ones((5, 7), np.float32), 1.0)


@pytest.mark.parametrize("normalization", ["tensor", "global"])
@pytest.mark.parametrize("kind", ["lora", "lora_complement"])
def test_the_radii_of_a_census_are_true_distances(tmp_path, kind, normalization):
    """Though the direction moves some of the tensors only."""
    snapshot = make(tmp_path)
    direction = {"kind": kind}
    config = SweepConfig(
        design="census",
        census={"pairs": 2, "radii": [0.5, 2.0]},
        slice={"alpha": direction, "beta": direction, "normalization": normalization},
    )
    (design,) = census_designs(config, Surroundings(Trajectory.around(snapshot, None), tmp_path / "directions"))
    assert design.attributes["direction_kind"] == kind
    moved = sum(
        np.sum((snapshot.read(name).astype(float) - snapshot.base.read(name).astype(float)) ** 2) for name in SHAPES
    )
    spec, part = design.slices[0].spec, Subspace(snapshot).part
    scales = global_scales(spec, SHAPES, snapshot.read, part)
    for point in design.points:
        axis, coordinate = ("alpha", point.alpha) if point.alpha else ("beta", point.beta)
        squares = [
            np.sum(scaled_direction(spec, axis, name, snapshot.read(name), scales[axis], part).astype(float) ** 2)
            for name in SHAPES
        ]
        radius = abs(coordinate) * np.sqrt(sum(squares)) / np.sqrt(moved)
        assert radius == pytest.approx([0.5, 2.0][point.place[2]], rel=1e-5)
    other = config.model_copy(update={"slice": SliceConfig(alpha=DirectionConfig(kind=kind))})
    with pytest.raises(ConfigurationError, match="draws all its directions alike"):
        census_designs(other, Surroundings(Trajectory.around(snapshot, None), tmp_path / "directions"))
