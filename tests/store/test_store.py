"""The journal and its netCDF: nothing half-written, nothing mixed, nothing transposed."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import xarray as xr
from rlvr_landscape_analysis.schema import SCHEMA, Variable

from rlvr_landscape_plugin.designs.grid import grid_frame
from rlvr_landscape_plugin.errors import StoreError
from rlvr_landscape_plugin.store import (
    Annotations,
    Cells,
    Extent,
    Journal,
    Subset,
    consolidate,
    holds,
    keep_record,
    landscapes,
    read_record,
)
from rlvr_landscape_plugin.store.names import PointNames

matplotlib.use("Agg")
ALPHAS = np.array([-0.1, 0.0, 0.2])
BETAS = np.array([-0.3, -0.1, 0.0, 0.1])
PROMPTS, ROLLOUTS = 5, 2
CELL = ("prompt", "rollout")
EXTENT = Extent(PROMPTS, ROLLOUTS, ROLLOUTS)


def tasks(start, stop):
    """The cells of some tasks, as a sweep writes them that does not grow."""
    return Cells(range(start, stop), range(ROLLOUTS), ROLLOUTS)


def identity(**changes):
    return {
        "configuration": {"seed": 0, "env": {"id": "x", "rollouts": ROLLOUTS}},
        "step": 0,
        "slice": {"seed": 0},
    } | changes


def base_batch(seed=0):
    rng = np.random.default_rng(seed)
    shape = (PROMPTS, ROLLOUTS)
    data = {
        name: (CELL, rng.random(shape)) for name, v in SCHEMA.items() if v.family == "base" and "recheck" not in name
    }
    data["base_status"] = (CELL, np.zeros(shape, np.int8))
    data["base_tokens"] = (CELL, rng.integers(1, 9, shape).astype(np.int32))
    return xr.Dataset(data | {"token_id": ("token", np.arange(7, dtype=np.int32))})


def point(i, j, shape=(PROMPTS, ROLLOUTS)):
    """Every value says where it belongs: reward = 100 i + 10 j + prompt + rollout / 10."""
    p, r = np.indices(shape)
    data = {}
    for name, variable in SCHEMA.items():
        if variable.family in ("rollout", "completion") and variable.required:
            data[name] = (CELL, 100.0 * i + 10 * j + p + r / 10)
        elif variable.family == "point":
            data[name] = ((), 10.0 * i + j)
    for name in ("status", "truncated"):
        data[name] = (CELL, np.zeros(shape, np.int8))
    data["completion_tokens"] = (CELL, np.full(shape, 10 * i + j, np.int32))
    return xr.Dataset(data)


def recheck():
    zeros = np.zeros((PROMPTS, ROLLOUTS))
    return xr.Dataset({"recheck_logprob": (CELL, zeros), "recheck_max_difference": (CELL, zeros)})


def test_a_frame_names_its_axes_and_its_files():
    frame = grid_frame(ALPHAS, BETAS, described={"alpha": "along training"})
    assert frame.dimensions[0].long_name == "along training"
    names = PointNames(frame, [frame.axes], EXTENT)
    assert names.name((2, 3), EXTENT.cells) == "a002_b003.nc"
    assert names.name((2, 3), tasks(5, 10)) == "a002_b003_p00005-00010.nc"
    assert names.parse("a002_b003_p00005-00010.nc") == ((2, 3), tasks(5, 10))
    more = Cells(range(5), range(2, 4), 4)
    assert names.name((2, 3), more) == "a002_b003_p00000-00005_r00002-00004_c00004.nc"
    assert names.parse(names.name((2, 3), more)) == ((2, 3), more)
    for other in ("a003_b000.nc", "a002_b003.nc.corrupt", ".a000_b000.nc.1.tmp", "a002.nc"):
        assert names.parse(other) is None


def test_a_file_keeps_its_name_when_coordinates_are_added_between():
    old, new = grid_frame(ALPHAS, BETAS), grid_frame(np.array([-0.1, -0.05, 0.0, 0.1, 0.2]), BETAS)
    names = PointNames(new, [old.axes, new.axes], EXTENT)
    assert [names.name((i, 0), EXTENT.cells)[:4] for i in range(5)] == ["a000", "a003", "a001", "a004", "a002"]
    assert names.parse("a002_b003.nc") == ((4, 3), EXTENT.cells)


def journal_at(path, **changes):
    return Journal(path, grid_frame(ALPHAS, BETAS), identity(**changes), EXTENT)


def finished(path, **changes):
    journal = journal_at(path, **changes)
    journal.write_base(base_batch())
    for cell in np.ndindex(len(ALPHAS), len(BETAS)):
        journal.write_point(cell, point(*cell))
    journal.write_recheck(recheck())
    return journal


@pytest.fixture
def journal(tmp_path):
    return finished(tmp_path / "run")


@pytest.fixture
def landscape(journal, tmp_path):
    return consolidate(journal, tmp_path / "landscape_step000000_slice0.nc", {"title": "a test"})


def test_axes_keep_their_order_on_a_grid_that_is_neither_square_nor_symmetric(landscape):
    with xr.open_dataset(landscape) as data:
        assert dict(data.sizes) == {"alpha": 3, "beta": 4, "prompt": PROMPTS, "rollout": ROLLOUTS}
        assert data.reward.dims == ("alpha", "beta", "prompt", "rollout")
        for (i, alpha), (j, beta) in ((a, b) for a in enumerate(ALPHAS) for b in enumerate(BETAS)):
            here = data.sel(alpha=alpha, beta=beta)
            assert here.reward.sel(prompt=3, rollout=1).item() == pytest.approx(100 * i + 10 * j + 3.1)
            assert here.realised_step.item() == 10 * i + j
            assert (here.completion_tokens == 10 * i + j).all()


def test_the_dataset_describes_itself(landscape):
    with xr.open_dataset(landscape) as data:
        for name, variable in data.variables.items():
            assert variable.attrs.get("long_name"), name
            assert variable.attrs.get("units"), name
        assert {"alpha", "beta", "prompt", "rollout", "step", "slice_seed"} == set(data.coords)
        assert data.reward.dtype == np.float32
        assert data.reward.encoding["zlib"]
        assert data.status.attrs["flag_meanings"] == "ok truncated error"
        assert data.attrs["title"] == "a test"
        assert len(data.attrs["history"].splitlines()) == 1
        assert len(data.attrs["configuration_sha256"]) == 64
        data.reward.mean(["prompt", "rollout"]).plot()


def test_the_radius_in_displacements_is_derived_from_the_realised_step(journal, tmp_path):
    notes = Annotations(0.5, 20.0, "measured from here to there", {"reward": "a coin"})
    with xr.open_dataset(consolidate(journal, tmp_path / "out.nc", {}, notes)) as data:
        assert data.displacement_norm.item() == 0.5
        assert data.displacement_norm.attrs["comment"] == "measured from here to there"
        xr.testing.assert_allclose(
            data.displacement_radius.variable, (data.realised_step * 20.0 / 0.5).variable, check_dim_order=True
        )
        assert data.beta.attrs["long_name"] == "coordinate along direction η, in units of its norm"
        assert data.reward.attrs["long_name"] == "a coin"
        assert data.kl_k1.attrs["long_name"].startswith("KL divergence")


def test_without_a_displacement_the_radius_is_missing_and_says_so(landscape):
    with xr.open_dataset(landscape) as data:
        assert np.isnan(data.displacement_norm)
        assert data.displacement_radius.isnull().all()
        assert data.displacement_norm.attrs["comment"].startswith("not known")


def portion(i, j, start, stop):
    return point(i, j).isel(prompt=slice(start, stop))


def test_a_point_may_come_in_portions_of_prompts(tmp_path):
    journal = journal_at(tmp_path / "run")
    journal.write_base(base_batch())
    journal.write_point((1, 1), portion(1, 1, 0, 2), tasks(0, 2))
    journal.write_point((1, 2), portion(1, 2, 2, 5), tasks(2, 5))
    assert journal.found() == {(1, 1): [tasks(0, 2)], (1, 2): [tasks(2, 5)]}
    assert journal.done() == set()
    xr.testing.assert_equal(journal.read_point((1, 1), 2), portion(1, 1, 0, 2))
    with pytest.raises(StoreError, match="not measured yet"):
        journal.read_point((1, 1))
    journal.write_point((1, 1), portion(1, 1, 2, 5), tasks(2, 5))
    journal.write_point((1, 1), portion(1, 1, 0, 4), tasks(0, 4))
    assert (journal.done(), journal.status()) == ({(1, 1)}, (1, 12))
    again = journal.read_point((1, 1))
    xr.testing.assert_equal(again.reward, point(1, 1).reward)
    assert again.realised_step == point(1, 1).realised_step
    assert again.seconds_move == 2 * point(1, 1).seconds_move
    with pytest.raises(StoreError, match="2 prompts, not 3"):
        journal.write_point((0, 0), portion(0, 0, 0, 2), tasks(0, 3))


def test_a_portion_under_a_wrong_name_is_moved_aside(tmp_path):
    journal = journal_at(tmp_path / "run")
    journal.write_base(base_batch())
    data = portion(0, 0, 0, 2)
    path = journal.root / "points" / journal.names.name((0, 0), tasks(0, 3))
    journal._write(path, data.assign_attrs(base_sha256=journal.base_sha256))
    with pytest.warns(UserWarning, match="it has 2 prompts, not 3"):
        assert journal.found() == {}


def test_a_dataset_of_a_part_is_replaced_by_that_of_more(tmp_path):
    journal = journal_at(tmp_path / "run")
    journal.write_base(base_batch())
    journal.write_recheck(recheck())
    part, out = Subset(((0, 1, 2), (0, 2, 3)), 2), tmp_path / "out.nc"
    for cell in part.places:
        journal.write_point(cell, portion(*cell, 0, 2), tasks(0, 2))
    with pytest.raises(StoreError, match="lacks 12 of 12 points"):
        consolidate(journal, out, {})
    consolidate(journal, out, {"title": "a part"}, subset=part)
    assert holds(journal, out, part)
    assert not holds(journal, out)
    with xr.open_dataset(out) as small:
        small.load()
    assert dict(small.sizes) == {"alpha": 3, "beta": 3, "prompt": 2, "rollout": ROLLOUTS}
    np.testing.assert_array_equal(small.beta, BETAS[[0, 2, 3]])
    assert small.reward.sel(alpha=0.2, beta=-0.3, prompt=1, rollout=1).item() == pytest.approx(201.1)
    for cell in np.ndindex(3, 4):
        start = 2 if cell in journal.found() else 0
        whole = point(*cell).isel(prompt=slice(start, None))
        journal.write_point(cell, whole, tasks(start, PROMPTS))
    consolidate(journal, out, {"title": "everything"})
    with xr.open_dataset(out) as full:
        assert full.attrs["title"] == "everything"
        same = full.sel(alpha=small.alpha, beta=small.beta).isel(prompt=slice(2))
        xr.testing.assert_equal(same[["reward", "kl_k1", "base_reward"]], small[["reward", "kl_k1", "base_reward"]])
        assert full.reward.notnull().all()
    consolidate(journal, out, {"title": "a part"}, subset=part)
    with xr.open_dataset(out) as full:
        assert full.attrs["title"] == "everything", "what holds more stays"


def test_what_was_found_out_once_is_kept_and_checked(tmp_path):
    path = tmp_path / "deep" / "range.json"
    assert read_record(path, identity()) is None
    assert keep_record(path, identity(), {"factor": 0.5}) == {"factor": 0.5}
    assert keep_record(path, identity(), {"factor": 0.7}) == {"factor": 0.5}, "another process was first"
    with pytest.raises(StoreError, match="another configuration"):
        read_record(path, identity(step=1))
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.warns(UserWarning, match="not what its checksum says"):
        assert read_record(path, identity()) is None


def test_steps_concatenate_with_concat_and_open_mfdataset(tmp_path):
    paths = []
    for step in (0, 10, 2):
        run = finished(tmp_path / f"run{step}", step=step)
        paths.append(consolidate(run, tmp_path / f"landscape_step{step:06d}_slice0.nc", {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        joined = xr.concat([xr.load_dataset(path) for path in paths], dim="step")
        assert joined.step.values.tolist() == [0, 10, 2]
        assert joined.reward.sizes["step"] == 3
        assert joined.sel(step=10).reward.dims == ("alpha", "beta", "prompt", "rollout")
    assert list(landscapes(tmp_path)) == sorted(paths)
    with xr.open_mfdataset(paths, combine="nested", concat_dim="step") as many:
        assert many.step.values.tolist() == [0, 10, 2]


def test_points_and_the_base_batch_come_back_as_they_were_written(journal):
    xr.testing.assert_identical(journal.read_base().drop_attrs(), base_batch())
    xr.testing.assert_identical(journal.read_point((2, 1)).drop_attrs(), point(2, 1))


def test_an_optional_variable_is_missing_at_points_that_were_written_without_it(tmp_path):
    """So a variable can be added: a journal of an older version is continued with it."""
    journal = journal_at(tmp_path / "run")
    journal.write_base(base_batch())
    later = {(0, 1), (2, 3)}
    for cell in np.ndindex(len(ALPHAS), len(BETAS)):
        values = point(*cell)
        if cell in later:
            values["format_failure"] = (CELL, np.full((PROMPTS, ROLLOUTS), 0.25))
        journal.write_point(cell, values)
    journal.write_recheck(recheck())
    with xr.open_dataset(consolidate(journal, tmp_path / "landscape_step000000_slice0.nc", {})) as data:
        assert data.format_failure.attrs["long_name"] == SCHEMA["format_failure"].long_name
        for i, j in np.ndindex(len(ALPHAS), len(BETAS)):
            here = data.format_failure.isel(alpha=i, beta=j).values
            assert (here == 0.25).all() if (i, j) in later else np.isnan(here).all()


def test_an_optional_variable_can_say_that_it_is_missing():
    with pytest.raises(ValueError, match="longest turn: dtype 'i4' cannot say that it is missing; use a float"):
        Variable("rollout", "i4", "token", "longest turn", required=False)


def test_the_first_writer_wins(journal):
    journal.write_point((0, 0), point(2, 3))
    assert journal.read_point((0, 0)).reward[0, 0] == 0
    kept = journal.write_base(base_batch(seed=1))
    xr.testing.assert_identical(kept.drop_attrs(), base_batch(seed=0))


def test_status_and_done_agree(tmp_path):
    journal = journal_at(tmp_path)
    journal.write_base(base_batch())
    assert (journal.done(), journal.status()) == (set(), (0, 12))
    journal.write_point((0, 3), point(0, 3))
    assert (journal.done(), journal.status()) == ({(0, 3)}, (1, 12))
    with pytest.raises(StoreError, match=r"point \(1, 1\) .* is not measured yet"):
        journal.read_point((1, 1))


def test_another_configuration_is_refused_and_every_difference_named(journal):
    other = {"seed": 7, "env": {"id": "x", "rollouts": 9}}
    with pytest.raises(StoreError) as caught:
        journal_at(journal.root, configuration=other)
    assert "configuration.seed: 0 there, 7 asked for" in str(caught.value)
    assert "configuration.env.rollouts: 2 there, 9 asked for" in str(caught.value)
    assert "env.id" not in str(caught.value)
    with pytest.raises(StoreError, match=r"axes\.beta"):
        Journal(journal.root, grid_frame(ALPHAS, BETAS[:3]), identity(), EXTENT)


def test_another_landscape_is_not_overwritten(landscape, tmp_path):
    before = landscape.read_bytes()
    assert consolidate(finished(tmp_path / "run"), landscape, {}) == landscape
    assert landscape.read_bytes() == before
    with pytest.raises(StoreError, match="holds another landscape"):
        consolidate(finished(tmp_path / "other", step=3), landscape, {})


def test_an_unfinished_sweep_is_not_consolidated(tmp_path):
    journal = journal_at(tmp_path / "run")
    journal.write_base(base_batch())
    journal.write_point((1, 2), point(1, 2))
    with pytest.raises(StoreError, match="lacks 11 of 12 points"):
        consolidate(journal, tmp_path / "out.nc", {})
    assert not list(tmp_path.glob("*.nc"))


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign"])
def test_a_damaged_point_is_moved_aside_and_measured_again(journal, tmp_path, damage):
    path = journal.root / "points" / "a001_b002.nc"
    whole = path.read_bytes()
    if damage == "foreign":
        finished(tmp_path / "foreign", step=5)
        content = (tmp_path / "foreign" / "points" / "a001_b002.nc").read_bytes()
    else:
        content = {"empty": b"", "cut": whole[: len(whole) * 2 // 3]}[damage]
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"a001_b002\.nc was moved to .*\.corrupt and will be measured again"):
        assert (1, 2) not in journal.done()
    aside = list(path.parent.glob("*.corrupt"))
    assert [file.read_bytes() for file in aside] == [content]
    with pytest.raises(StoreError, match="lacks 1 of 12 points"):
        consolidate(journal, tmp_path / "out.nc", {})
    journal.write_point((1, 2), point(1, 2))
    assert consolidate(journal, tmp_path / "out.nc", {}).exists()


def test_a_flipped_bit_never_changes_a_value_unseen(journal):
    path = journal.root / "points" / "a001_b002.nc"
    whole, rng, refused = path.read_bytes(), random.Random(3), 0
    for at in rng.sample(range(len(whole)), 60):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if (1, 2) in journal.done():
                assert journal.read_point((1, 2)).equals(point(1, 2)), at
            else:
                refused += 1
    assert refused > 0


def test_points_of_another_base_batch_are_not_mixed_in(journal):
    (journal.root / "base.nc").unlink()
    again = journal_at(journal.root)
    again.write_base(base_batch(seed=1))
    with pytest.warns(UserWarning, match="another base batch"):
        again.write_point((0, 0), point(0, 0))
    with pytest.warns(UserWarning, match=r"recheck\.nc was moved .* another base batch"):
        assert again.read_recheck() is None
    with pytest.warns(UserWarning, match="another base batch"):
        assert again.done() == {(0, 0)}
    (journal.root / "base.nc").write_bytes(b"")
    with pytest.raises(StoreError, match=r"base\.nc is damaged"):
        journal_at(journal.root).read_base()


def test_a_damaged_base_batch_costs_no_point(journal):
    (journal.root / "base.nc").write_bytes(b"\0" * 100)
    again = journal_at(journal.root)
    with pytest.raises(StoreError, match=r"base\.nc is damaged"):
        again.done()
    assert again.status() == (12, 12)
    assert not list(journal.root.rglob("*.corrupt"))


def test_a_point_under_the_name_of_another_is_moved_aside(journal):
    points = journal.root / "points"
    shutil.copy(points / "a000_b001.nc", points / "a001_b002.nc")
    with pytest.warns(UserWarning, match=r"it is a000_b001\.nc under another name"):
        assert (1, 2) not in journal.done()


@pytest.mark.parametrize("content", ["", "{}", '{"servers": [{"points": 13}], "sha256": "0"}', "null"])
def test_a_damaged_recheck_or_list_of_servers_is_moved_aside(journal, content):
    journal.write_facts("server.json", [{"points": 12}])
    assert journal.read_facts("server.json") == [{"points": 12}]
    for name in ("server.json", "recheck.nc"):
        (journal.root / name).write_text(content)
    with pytest.warns(UserWarning, match="will be measured again"):
        assert journal.read_facts("server.json") is None
    with pytest.warns(UserWarning, match="will be measured again"):
        assert journal.read_recheck() is None
    assert len(list(journal.root.glob("*.corrupt"))) == 2


def test_a_read_only_disk_is_named_though_nothing_can_be_tidied_up(journal, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    (journal.root / "points" / "a000_b001.nc").unlink()
    monkeypatch.setattr(xr.Dataset, "to_netcdf", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(StoreError, match="Read-only file system; finished points are safe"):
        journal.write_point((0, 1), point(0, 1))


def test_an_unreadable_file_is_not_called_corrupt(journal, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StoreError, match="Too many open files; nothing was changed"):
        journal.done()
    assert not list(journal.root.rglob("*.corrupt"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.drop_vars("kl_k1"), "no variable 'kl_k1'"),
        (lambda d: d.assign(rewrad=d.reward), "does not know: rewrad"),
        (lambda d: d.transpose("rollout", "prompt"), "has dims"),
        (lambda d: d.assign(reward=d.reward.where(d.prompt > 0)), "missing without status 2"),
        (lambda d: d.isel(prompt=slice(0)), "needs the dimensions"),
    ],
)
def test_a_wrong_point_is_refused(tmp_path, change, message):
    journal = journal_at(tmp_path)
    whole = point(0, 0).assign_coords(prompt=np.arange(PROMPTS))
    with pytest.raises(StoreError, match=message):
        journal.write_point((0, 0), change(whole))
    with pytest.raises(StoreError, match="outside the 3 × 4 points"):
        journal.write_point((3, 0), whole)
    assert not list((tmp_path / "points").iterdir())


def test_a_failed_rollout_is_data(journal, tmp_path):
    path = journal.root / "points" / "a000_b001.nc"
    path.unlink()
    failed = point(0, 1)
    failed["reward"][2, 1], failed["status"][2, 1] = np.nan, 2
    journal.write_point((0, 1), failed)
    with xr.open_dataset(consolidate(journal, tmp_path / "out.nc", {})) as data:
        assert np.isnan(data.reward).sum() == 1
        assert data.status[0, 1, 2, 1] == 2


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from test_store import *
journal = journal_at(Path({root!r}))
journal.write_base(base_batch())
print("ready", flush=True)
while True:
    for cell in np.ndindex(len(ALPHAS), len(BETAS)):
        (journal.root / "points" / "a{{:03d}}_b{{:03d}}.nc".format(*cell)).unlink(missing_ok=True)
        journal.write_point(cell, point(*cell))
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_no_half_written_point(tmp_path):
    rng = random.Random(5)
    code = WRITER.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        journal = journal_at(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            done = journal.done()
        assert len(done) == journal.status()[0]
        for i, j in done:
            xr.testing.assert_identical(journal.read_point((i, j)).drop_attrs(), point(i, j))


def test_what_a_killed_writer_left_long_ago_is_removed(tmp_path):
    journal_at(tmp_path)
    old, new = tmp_path / "points" / ".a000_b000.nc.1.x.tmp", tmp_path / "points" / ".a000_b001.nc.1.x.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    journal_at(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def test_processes_may_share_a_directory(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from test_store import *\nfinished(Path({str(tmp_path / 'run')!r}))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    journal = journal_at(tmp_path / "run")
    assert len(journal.done()) == 12
    assert not list(journal.root.rglob(".*.tmp"))
    assert not list(journal.root.rglob("*.corrupt"))


def test_a_full_disk_is_named_and_leaves_no_scratch(journal, monkeypatch):
    (journal.root / "points" / "a000_b000.nc").unlink()

    def full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", full)
    with pytest.raises(StoreError, match=r"a000_b000\.nc: the disk is full .*finished points are safe"):
        journal.write_point((0, 0), point(0, 0))
    assert journal.status() == (11, 12)
    assert not list(journal.root.rglob(".*.tmp"))


FILL = """
import sys
sys.path.insert(0, {tests!r})
import test_store
from test_store import *
root = Path(sys.argv[1])
def leave(kib):
    import shutil
    (root / "ballast").write_bytes(bytes(shutil.disk_usage(root).free - kib * 1024))
test_store.PROMPTS = 400
test_store.EXTENT = Extent(400, 2, 2)
journal = journal_at(root / "run")
rng = np.random.default_rng(0)
def noisy(i, j):
    data = point(i, j, (400, 2))
    for name in ("reward", "kl_k1", "kl_k3", "surrogate", "entropy", "clip_fraction"):
        data[name] = (CELL, rng.random((400, 2)))
    return data
base = base_batch()
journal.write_base(base)
try:
    if sys.argv[2] == "points":
        leave(250)
    for cell in np.ndindex(3, 4):
        journal.write_point(cell, noisy(*cell))
    zeros = np.zeros((400, 2))
    journal.write_recheck(xr.Dataset({{"recheck_logprob": (CELL, zeros), "recheck_max_difference": (CELL, zeros)}}))
    leave(60)
    consolidate(journal, root / "out.nc", {{}})
except StoreError as error:
    print(error)
done = journal.done()
print("whole", len(done), journal.status()[0], len(list(root.rglob(".*.tmp"))), (root / "out.nc").exists())
"""


@pytest.mark.parametrize("during", ["points", "dataset"])
def test_a_really_full_disk(tmp_path, during):
    """On a small file system, mounted in a namespace of its own."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("mounting a small file system needs root and unshare")
    code = FILL.format(tests=str(Path(__file__).parent))
    script = 'mount -t tmpfs -o size=8m tmpfs "$0" && exec "$1" -c "$2" "$0" "$3"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, str(tmp_path), sys.executable, code, during],
        capture_output=True,
        text=True,
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no mount here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "the disk is full" in done.stdout, done.stdout
    assert "finished points are safe" in done.stdout
    whole, named, scratch, dataset = done.stdout.split("whole ")[1].split()
    assert whole == named
    assert (int(whole) == 12) == (during == "dataset")
    assert (scratch, dataset) == ("0", "False")
