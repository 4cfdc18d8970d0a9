"""Directions that training gives, against NumPy in float64 on whole vectors; what cannot be one is named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from safetensors.numpy import load_file, save_file

from rlvr_landscape_plugin.config import SliceConfig, SweepConfig
from rlvr_landscape_plugin.directions import (
    SliceSpec,
    Trajectory,
    fingerprint,
    global_scales,
    open_direction,
    prepare_slice,
    principal_terms,
    scaled_direction,
)
from rlvr_landscape_plugin.errors import ConfigurationError, LandscapeError, SnapshotError, StoreError
from rlvr_landscape_plugin.snapshot import file_sha256, open_snapshot

SHAPES = {"embed.weight": (30, 8), "layers.0.q.weight": (8, 8), "norm.weight": (8,), "q.bias": (8,)}
STEPS = (0, 1, 2, 5, 10)


def weights(step: int) -> dict[str, np.ndarray]:
    """A random walk with a drift, float32; the bias starts at zero and the norm never moves."""
    total = {name: np.random.default_rng([1, i]).normal(size=shape) for i, (name, shape) in enumerate(SHAPES.items())}
    total["q.bias"] = np.zeros(8)
    for at in range(1, step + 1):
        for i, (name, shape) in enumerate(SHAPES.items()):
            if name != "norm.weight":
                drift = np.random.default_rng([2, i]).normal(size=shape)
                total[name] = total[name] + 0.01 * drift + 0.02 * np.random.default_rng([3, i, at]).normal(size=shape)
    return {name: values.astype(np.float32) for name, values in total.items()}


def write(path: Path, tensors: dict[str, np.ndarray], **manifest: Any) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    save_file(tensors, path / "model.safetensors")
    if manifest:
        (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.fixture
def run(tmp_path) -> Path:
    for step in STEPS:
        write(tmp_path / "run" / f"step_{step:06d}", weights(step))
    return tmp_path / "run"


def around(run: Path, step: int, elsewhere: Path | None = None) -> Trajectory:
    return Trajectory.around(open_snapshot(run / f"step_{step:06d}"), elsewhere)


def prepare(run: Path, step: int, seed: int = 0, elsewhere: Path | None = None, **options: Any):
    folder = run.parent / "out" / "directions"
    prepared = prepare_slice(SliceConfig(**options), seed, around(run, step, elsewhere), folder)
    assert prepared.snapshot == open_snapshot(run / f"step_{step:06d}")
    return prepared.spec, prepared.files, prepared.description


def flat(tensors: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([tensors[name].astype(np.float64).ravel() for name in sorted(tensors)])


def difference(one: int, other: int) -> dict[str, np.ndarray]:
    a, b = weights(one), weights(other)
    return {name: a[name].astype(np.float64) - b[name].astype(np.float64) for name in a}


def test_displacement_and_update_are_the_rounded_differences(run):
    _, files, words = prepare(run, 2, alpha={"kind": "displacement"}, beta={"kind": "update"})
    for axis, expected in (("alpha", difference(2, 0)), ("beta", difference(5, 2))):
        found = load_file(files[axis])
        assert set(found) == set(SHAPES)
        for name, values in expected.items():
            assert found[name].dtype == np.float32
            np.testing.assert_array_equal(found[name], values.astype(np.float32))
    assert words["alpha"].startswith("displacement, step 2 - step 0; norm ")
    assert words["beta"].startswith("update, step 5 - step 2; norm ")
    assert float(words["beta"].rsplit(" ", 1)[1]) == pytest.approx(np.linalg.norm(flat(difference(5, 2))), rel=1e-5)


@pytest.mark.parametrize("component", [1, 2, 4])
def test_principal_components_are_those_of_numpy(run, component):
    spec, files, words = prepare(run, 2, alpha={"kind": "pca", "component": component})
    matrix = np.stack([flat(difference(step, STEPS[-1])) for step in STEPS[:-1]])
    _, singular, rows = np.linalg.svd(matrix, full_matrices=False)
    went = flat(difference(STEPS[-1], 0))
    expected = rows[component - 1] * np.sign(rows[component - 1] @ went) * np.linalg.norm(went)
    found = flat(load_file(files["alpha"]))
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.linalg.norm(went))
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(went), rel=1e-6)
    share = singular[component - 1] ** 2 / np.sum(singular**2)
    assert f"{share:.1%} of the squared distances" in words["alpha"]
    assert set(spec.direction("alpha").sources) == {f"step {step}" for step in STEPS}


def test_two_components_span_the_plane_and_are_orthogonal(run):
    _, files, _ = prepare(run, 10, alpha={"kind": "pca"}, beta={"kind": "pca", "component": 2})
    one, two = (flat(load_file(files[axis])) for axis in ("alpha", "beta"))
    assert abs(one @ two) < 1e-6 * np.linalg.norm(one) * np.linalg.norm(two)
    other = prepare(run, 1, alpha={"kind": "pca"})[1]["alpha"]
    np.testing.assert_array_equal(flat(load_file(other)), one, "the plane is the run's, not the snapshot's")


def test_components_only_see_what_moves(run):
    _, files, _ = prepare(run, 10, alpha={"kind": "pca"}, include=["layers.*", "q.*"])
    names = ["layers.0.q.weight", "q.bias"]
    matrix = np.stack([flat({n: v for n, v in difference(s, STEPS[-1]).items() if n in names}) for s in STEPS[:-1]])
    row = np.linalg.svd(matrix, full_matrices=False)[2][0]
    found = flat(load_file(files["alpha"]))
    assert abs(found @ row) == pytest.approx(np.linalg.norm(found), rel=1e-6)
    assert sorted(load_file(files["alpha"])) == names


def test_blocks_do_not_change_the_components(run, monkeypatch):
    snapshots = around(run, 10).all()
    whole, share = principal_terms(snapshots, SHAPES, 1)
    monkeypatch.setattr("rlvr_landscape_plugin.directions.kinds._BLOCK", 7)
    pieces, _ = principal_terms(snapshots, SHAPES, 1)
    np.testing.assert_allclose([c for c, _ in pieces], [c for c, _ in whole], rtol=1e-9)
    assert 0 < share < 1
    assert sum(c for c, _ in whole) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("other", "kind"),
    [("random", "random"), ("random", "pca"), ("displacement", "random"), ("displacement", "pca"), ("pca", "update")],
)
def test_gram_schmidt_takes_out_the_part_along_alpha(run, kind, other):
    plain_spec, plain, _ = prepare(run, 5, 3, alpha={"kind": other}, beta={"kind": kind})
    spec, files, words = prepare(run, 5, 3, alpha={"kind": other}, beta={"kind": kind}, orthogonalize=True)
    here = weights(5)

    def drawn(axis: str) -> dict[str, np.ndarray]:
        scale = global_scales(plain_spec, here, here.__getitem__)[axis]  # type: ignore[index]
        return {n: scaled_direction(plain_spec, axis, n, w, scale) for n, w in here.items()}  # type: ignore[arg-type]

    a = flat(load_file(files["alpha"]) if "alpha" in files else drawn("alpha"))
    b = flat(load_file(plain["beta"]) if "beta" in plain else drawn("beta"))
    expected = b - (a @ b) / (a @ a) * a
    found = flat(load_file(files["beta"]))
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(b).max())
    assert abs(a @ found) < 1e-6 * np.linalg.norm(a) * np.linalg.norm(found)
    assert "orthogonalised against alpha" in words["beta"]
    assert spec.direction("beta").orthogonal
    assert ("alpha" in files) == (other != "random")


@pytest.mark.parametrize("scale", ["tensor", "filter", "global"])
def test_training_directions_can_be_scaled_to_the_weights(run, scale):
    _, files, _ = prepare(run, 5, alpha={"kind": "displacement", "normalization": scale})
    found, change, here = load_file(files["alpha"]), difference(5, 0), weights(5)
    norm = np.linalg.norm
    for name, values in change.items():
        if scale == "tensor" and values.any():
            assert norm(found[name].astype(float)) == pytest.approx(norm(here[name].astype(float)), rel=1e-6)
        elif scale == "filter":
            rows = [norm(row) for row in here[name].astype(float)] if values.ndim > 1 else np.zeros(len(values))
            np.testing.assert_allclose([norm(np.atleast_1d(r)) for r in found[name].astype(float)], rows, rtol=1e-6)
        if not values.any():
            assert not found[name].any()
    if scale == "global":
        assert norm(flat(found)) == pytest.approx(norm(flat(here)), rel=1e-6)
        np.testing.assert_allclose(flat(found) / norm(flat(found)), flat(change) / norm(flat(change)), atol=1e-7)


def test_bfloat16_snapshots_give_exact_differences(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save

    paths = []
    for step in (0, 1):
        paths.append(write(tmp_path / "run" / f"step_{step:06d}", weights(step)))
        narrow = {name: torch.from_numpy(values).to(torch.bfloat16) for name, values in weights(5 * step).items()}
        save(narrow, paths[-1] / "model.safetensors")
    _, files, _ = prepare(tmp_path / "run", 1, alpha={"kind": "displacement"})
    found = load_file(files["alpha"])
    for name in SHAPES:
        now, then = (torch.from_numpy(weights(step)[name]).to(torch.bfloat16).double().numpy() for step in (5, 0))
        np.testing.assert_array_equal(found[name], (now - then).astype(np.float32))
        back = torch.from_numpy(now.astype(np.float32) - found[name]).to(torch.bfloat16).double().numpy()
        np.testing.assert_array_equal(back, then)


def test_a_file_is_taken_as_it_is(run, tmp_path):
    gradient = {name: np.random.default_rng(9).normal(size=shape) for name, shape in SHAPES.items()}
    save_file(gradient, tmp_path / "gradient.safetensors")
    spec, files, words = prepare(run, 1, alpha={"kind": "file", "file": tmp_path / "gradient.safetensors"})
    for name, values in load_file(files["alpha"]).items():
        np.testing.assert_array_equal(values, gradient[name].astype(np.float32))
    assert list(spec.direction("alpha").sources) == ["gradient.safetensors"]
    assert words["alpha"].startswith("file gradient.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("q.bias"), "has no tensor 'q.bias'"),
        (lambda t: t.update({"q.bias": np.zeros(9)}), r"tensor 'q.bias' has shape \[9\], expected \[8\]"),
        (lambda t: t.update({"extra": np.zeros(9)}), "tensor 'extra' is not part of the checkpoint"),
        (lambda t: t["q.bias"].__setitem__(3, np.nan), "tensor 'q.bias': .*gradient.safetensors holds NaN"),
        (lambda t: t.update({"q.bias": np.zeros(8, np.int32)}), "holds I32 tensors"),
        (lambda t: t["q.bias"].__setitem__(3, 1e200), "tensor 'q.bias' of the direction overflows float32"),
        (lambda t: [v.fill(0) for v in t.values()], "is zero in every tensor that moves"),
    ],
)
def test_a_file_that_does_not_fit_is_named(run, tmp_path, change, message):
    gradient = {name: np.ones(shape) for name, shape in SHAPES.items()}
    change(gradient)
    save_file(gradient, tmp_path / "gradient.safetensors")
    with pytest.raises(LandscapeError, match=rf"slice.beta \(kind = 'file'\): .*{message}"):
        prepare(run, 1, beta={"kind": "file", "file": tmp_path / "gradient.safetensors"})
    assert not list((tmp_path / "out" / "directions").glob("*")), "nothing half-made is left"


def test_a_tensor_that_stands_still_may_lack_in_a_file(run, tmp_path):
    save_file({"q.bias": np.ones(8)}, tmp_path / "g.safetensors")
    _, files, _ = prepare(run, 1, alpha={"kind": "file", "file": tmp_path / "g.safetensors"}, include=["q.*"])
    assert list(load_file(files["alpha"])) == ["q.bias"]


def remove(run: Path, *steps: int) -> None:
    for step in steps:
        (run / f"step_{step:06d}" / "config.json").unlink()
        (run / f"step_{step:06d}").rename(run / f"gone_{step}")


@pytest.mark.parametrize(
    ("step", "options", "gone", "message"),
    [
        (0, {"kind": "displacement"}, [], "is step 0 itself"),
        (5, {"kind": "displacement"}, [0], "no snapshot of step 0; name the run's directory with slice.run"),
        (10, {"kind": "update"}, [], "no snapshot after step 10"),
        (10, {"kind": "pca", "component": 5}, [], r"component = 5 is beyond the rank 4 of the run's 5 snapshots"),
        (10, {"kind": "pca"}, [0, 1, 2, 5], "principal components need at least 2"),
    ],
)
def test_what_the_run_lacks_is_named(run, step, options, gone, message):
    remove(run, *gone)
    with pytest.raises(LandscapeError, match=rf"slice.alpha \(kind = '{options['kind']}'\): .*{message}"):
        prepare(run, step, alpha=options)


def test_equal_snapshots_have_no_direction(tmp_path):
    for step in (0, 1, 2):
        write(tmp_path / "run" / f"step_{step:06d}", weights(0))
    with pytest.raises(ConfigurationError, match="zero in every tensor"):
        prepare(tmp_path / "run", 1, alpha={"kind": "displacement"})
    with pytest.raises(ConfigurationError, match="beyond the rank 0"):
        prepare(tmp_path / "run", 1, alpha={"kind": "pca"})


def test_a_direction_orthogonal_to_itself_is_refused(run):
    with pytest.raises(ConfigurationError, match="parallel to alpha"):
        prepare(run, 5, alpha={"kind": "displacement"}, beta={"kind": "displacement"}, orthogonalize=True)


def test_snapshots_of_another_model_run_or_step_are_refused(tmp_path):
    run = tmp_path / "run"
    write(run / "step_000000", weights(0), step=0, run="a" * 32)
    write(run / "step_000001", weights(1), step=1, run="b" * 32)
    with pytest.raises(SnapshotError, match="of run aaaaaaaaaaaa"):
        prepare(run, 1, alpha={"kind": "displacement"})
    write(run / "step_000002", weights(2), step=7, run="b" * 32)
    with pytest.raises(SnapshotError, match="says step 7"):
        prepare(run, 1, alpha={"kind": "update"})
    write(tmp_path / "other" / "step_000000", {"w": np.ones(3, np.float32)})
    with pytest.raises(SnapshotError, match="is missing"):
        prepare(run, 1, alpha={"kind": "displacement"}, elsewhere=tmp_path / "other")
    with pytest.raises(SnapshotError, match=r"slice.run: .*is not a directory"):
        prepare(run, 1, elsewhere=tmp_path / "nowhere")


def test_a_flipped_byte_in_a_source_is_named(tmp_path):
    from rlvr_landscape_plugin.snapshot import Manifest, write_snapshot

    for step in (0, 1):

        def fill(folder: Path, step: int = step) -> None:
            (folder / "config.json").write_text("{}")
            save_file(weights(step), folder / "model.safetensors")

        write_snapshot(tmp_path / "run", Manifest(step), fill)
    file = tmp_path / "run" / "step_000000" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(SnapshotError, match=r"step_000000/model\.safetensors is not the file that manifest"):
        prepare(tmp_path / "run", 1, alpha={"kind": "displacement"})
    yardstick = around(tmp_path / "run", 1).displacement
    assert np.isnan(yardstick.norm)
    assert "step_000000/model.safetensors is not the file" in yardstick.comment


def test_displacement_is_the_norm_over_everything(run):
    found = around(run, 5).displacement
    assert found.norm == pytest.approx(np.linalg.norm(flat(difference(5, 0))), rel=1e-12)
    assert found.theta == pytest.approx(np.linalg.norm(flat(weights(5))), rel=1e-12)
    assert open_snapshot(run / "step_000000").sha256 in found.comment
    start = around(run, 0).displacement
    assert np.isnan(start.norm)
    assert "is step 0 itself" in start.comment
    remove(run, 0)
    assert "no snapshot of step 0" in around(run, 5).displacement.comment


def test_a_snapshot_that_equals_step_0_has_no_radius(tmp_path):
    """As after a first step with learning rate 0 (`optimizer.warmup_steps`)."""
    for step in (0, 1):
        write(tmp_path / "run" / f"step_{step:06d}", weights(0))
    found = around(tmp_path / "run", 1).displacement
    assert found.norm == 0
    assert "the snapshot equals step 0, so displacement_radius is missing" in found.comment
    assert found.theta == pytest.approx(np.linalg.norm(flat(weights(0))), rel=1e-12)


def test_a_file_is_made_once_and_checked_each_time(run):
    options: dict[str, Any] = {"alpha": {"kind": "displacement"}, "beta": {"kind": "random"}, "orthogonalize": True}
    spec, files, words = prepare(run, 5, **options)
    before = {axis: (path.stat().st_mtime_ns, path.read_bytes()) for axis, path in files.items()}
    assert prepare(run, 5, **options) == (spec, files, words)
    assert {axis: (path.stat().st_mtime_ns, path.read_bytes()) for axis, path in files.items()} == before
    another = prepare(run, 5, 1, **options)[1]
    assert another["alpha"] == files["alpha"], "the displacement does not depend on the seed"
    assert another["beta"] != files["beta"]
    content = bytearray(files["alpha"].read_bytes())
    content[-1] ^= 1
    files["alpha"].write_bytes(content)
    with pytest.raises(StoreError, match=r"direction\.safetensors is not the file .* remove .* and run again"):
        prepare(run, 5, **options)
    assert os.stat(files["alpha"].parent).st_mode & 0o055, "a server may run as somebody else"


def test_of_two_writers_the_first_wins(run, monkeypatch):
    """Job-array tasks share an output directory: what another process finished in between is used."""
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    spec, files, _ = prepare(run, 5, alpha={"kind": "displacement"})
    assert file_sha256(files["alpha"]) == spec.direction("alpha").sha256
    assert [path.name for path in files["alpha"].parent.parent.iterdir()] == [files["alpha"].parent.name]


def test_an_output_that_cannot_be_written_is_named(run):
    with pytest.raises(StoreError, match=r"cannot write /proc/nothing/.*choose another output directory"):
        prepare_slice(SliceConfig(alpha={"kind": "update"}), 0, around(run, 5), Path("/proc/nothing"))  # type: ignore[arg-type]


def test_a_filter_scaled_alpha_without_matrices_leaves_beta_as_it_is(run):
    """Vectors stand still under `filter`: there is nothing to be orthogonal to."""
    options = {"include": ["norm.*", "q.*"], "normalization": "filter", "beta": {"kind": "displacement"}}
    plain, other = prepare(run, 5, **options)[1], prepare(run, 5, **options, orthogonalize=True)[1]
    np.testing.assert_array_equal(flat(load_file(plain["beta"])), flat(load_file(other["beta"])))


def test_datasets_of_earlier_versions_name_the_same_slice():
    path = Path(__file__).parents[1] / "analysis" / "data" / "laptop" / "landscape_step000000_slice0.nc"
    with xr.open_dataset(path) as data:
        spec = SliceSpec(**json.loads(data.attrs["slice"]))
        shapes = open_snapshot("tiny-sorter").shapes
        assert fingerprint(spec, shapes) == data.attrs["directions_fingerprint"]
        configuration = json.loads(data.attrs["configuration"])
        assert SweepConfig.from_provenance(configuration).provenance() == configuration


def test_a_deleted_file_is_made_again_byte_for_byte(run):
    spec, files, _ = prepare(run, 5, alpha={"kind": "pca"}, beta={"kind": "random"}, orthogonalize=True)
    shutil.rmtree(files["alpha"].parent)
    shutil.rmtree(files["beta"].parent)
    assert prepare(run, 5, alpha={"kind": "pca"}, beta={"kind": "random"}, orthogonalize=True)[0] == spec


def test_the_server_takes_only_the_named_file(run):
    spec, files, _ = prepare(run, 5, alpha={"kind": "displacement"}, exclude=["norm.*"])
    shapes = {name: values.shape for name, values in weights(5).items()}
    found = open_direction(spec, "alpha", files["alpha"], shapes)
    np.testing.assert_array_equal(found["q.bias"].read(), load_file(files["alpha"])["q.bias"])
    assert "norm.weight" not in found
    other = prepare(run, 2, alpha={"kind": "displacement"}, exclude=["norm.*"])[1]["alpha"]
    with pytest.raises(SnapshotError, match=r"is not the direction that slice\.alpha names"):
        open_direction(spec, "alpha", other, shapes)


def test_specs_survive_json_and_tell_slices_apart(run):
    shapes = {name: values.shape for name, values in weights(5).items()}
    seen = set()
    for options in (
        {},
        {"alpha": {"kind": "displacement"}},
        {"alpha": {"kind": "displacement", "normalization": "tensor"}},
        {"beta": {"kind": "random", "normalization": "filter"}},
        {"orthogonalize": True},
    ):
        spec, _, _ = prepare(run, 5, **options)
        again = SliceSpec(**json.loads(json.dumps(spec.as_dict(), sort_keys=True)))
        assert again == spec
        assert fingerprint(again, shapes) == fingerprint(spec, shapes)
        seen.add(fingerprint(spec, shapes))
    assert len(seen) == 5


def test_a_plain_random_slice_is_what_it_was(run):
    spec, files, words = prepare(run, 5, 3, normalization="filter", exclude=["norm*"])
    assert spec == SliceSpec(3, "filter", ("*",), ("norm*",))
    assert set(spec.as_dict()) == {"seed", "normalization", "include", "exclude"}
    assert not files
    assert words == dict.fromkeys(("alpha", "beta"), "random, seed 3, scaled per filter")
    assert not (run.parent / "out").exists()
    assert set(SweepConfig().provenance()["slice"]) == {"normalization", "include", "exclude"}
    spelled = SweepConfig(slice={"alpha": {"kind": "random"}, "run": str(run)})  # type: ignore[arg-type]
    assert spelled.provenance() == SweepConfig().provenance()


def test_the_configuration_round_trips():
    config = SweepConfig(
        slice={"alpha": {"kind": "pca", "component": 2}, "beta": {"kind": "file", "file": "g.safetensors"}}  # type: ignore[arg-type]
    )
    assert SweepConfig.from_provenance(config.provenance()).slice == config.slice


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": {"kind": "file"}}, "set file with kind = 'file'"),
        ({"alpha": {"kind": "update", "file": "g"}}, "set file with kind = 'file'"),
        ({"alpha": {"kind": "update", "component": 2}}, "component = 2 needs kind = 'pca'"),
        ({"alpha": {"kind": "random", "normalization": "none"}}, "leaves a random direction without a unit"),
        ({"alpha": {"kind": "pca"}, "beta": {"kind": "update"}, "seeds": [0, 1]}, "no axis is random"),
        ({"alpha": {"kinds": "pca"}}, "unknown key 'alpha.kinds'; did you mean 'alpha.kind'"),
    ],
)
def test_combinations_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SliceConfig(**options)
