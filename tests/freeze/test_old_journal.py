"""Journals of commit 0ef8472 are continued by the present code, to the numbers that the old code measured itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from old_data import (
    CONFIGURATION,
    DATA,
    PROGRESSIVE,
    arguments_for,
    changed,
    continue_sweep,
    dataset_of,
    fingerprints,
    journal_of,
    unpack,
)

from rlvr_landscape_plugin.config import SweepConfig, TrainConfig, digest, load_config
from rlvr_landscape_plugin.designs.grid import grid_frame
from rlvr_landscape_plugin.store import Journal
from rlvr_landscape_plugin.sweep import main
from rlvr_landscape_plugin.sweep.growth import extent_of

SWEEPS = {"finished": (), "progressive": PROGRESSIVE}
KILLED_POINTS = {"a000_b001.nc", "a001_b000.nc", "a001_b001.nc", "a002_b001.nc"}
CIRCUMSTANCES = {"history", "git_commit", "packages", "python", "servers"}
"""Attributes about who wrote the file, when, and by which server."""
SAMPLED = {"reward", "completion_tokens", "truncated", "status", "format_failure"}
"""Variables of a point that follow from which tokens were sampled."""
SCORED = {"kl_k1", "kl_k3", "surrogate", "clip_fraction", "entropy", "realised_step"}
"""Variables of a point that are computed in floating point: another CPU rounds them otherwise."""
ORIGIN = {"recheck_logprob", "recheck_max_difference"}
"""Variables of the second look at the origin, floating point too."""
SIGN_OF_LIFE = {"process_1of1.json"}
"""What a sweep that needs servers writes for `rlvr-landscape status`."""
WALL_TIMES = {"seconds_move", "seconds_sample", "seconds_score"}


def opened(path: Path) -> xr.Dataset:
    """A dataset in memory, so that its file may be replaced."""
    with xr.open_dataset(path, engine="netcdf4") as data:
        return data.load()


def removed(path: Path) -> xr.Dataset:
    """A dataset in memory, whose file is gone."""
    data = opened(path)
    path.unlink()
    return data


def check_attributes(new: xr.Dataset, old: xr.Dataset) -> None:
    """All global attributes but the circumstances are the old ones."""
    assert set(new.attrs) >= set(old.attrs)
    for name in set(old.attrs) - CIRCUMSTANCES - {"progressive"}:
        assert new.attrs[name] == old.attrs[name], name
    if "progressive" in old.attrs:
        there, asked = json.loads(new.attrs["progressive"]), json.loads(old.attrs["progressive"])
        for look, before in zip(there.pop("looks"), asked.pop("looks"), strict=True):
            assert look == pytest.approx(before, abs=1e-6)
        assert there == asked


def check_continued(new: xr.Dataset, old: xr.Dataset) -> None:
    """What sampling determines is equal, what is rounded is close, and the base batch is the old one bit for bit."""
    check_attributes(new, old)
    known = SAMPLED | SCORED | ORIGIN | WALL_TIMES
    for name in set(old.variables) - known:
        np.testing.assert_array_equal(new[name], old[name], err_msg=str(name))
    for name in SAMPLED:
        np.testing.assert_array_equal(new[name], old[name], err_msg=name)
    for name in SCORED | ORIGIN:
        np.testing.assert_allclose(new[name], old[name], rtol=1e-4, atol=2e-5, err_msg=name)
    for name in WALL_TIMES:
        assert (new[name] > 0).all(), name


@pytest.fixture
def without_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Give the sweep's command where no server answers; it must end with `code`. Returns what it said."""
    monkeypatch.setenv("RLVR_LANDSCAPE_TOKEN", "nobody")

    def run(output: Path, *more: str, code: int, configuration: str = CONFIGURATION) -> str:
        found = main(arguments_for(output, *more, configuration=configuration))
        said = "".join(capsys.readouterr())
        assert found == code, said
        return said

    return run


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_complete_journal_becomes_its_dataset_again_without_a_server(
    sweep: str, without_server: Callable[..., str], tmp_path: Path
) -> None:
    output = unpack(sweep, tmp_path)
    old = removed(dataset_of(output))
    before = fingerprints(output)
    said = without_server(output, *SWEEPS[sweep], code=0)
    assert f"dataset {dataset_of(output)}" in said
    assert "starting" not in said
    assert not changed(before, fingerprints(output))
    new = opened(dataset_of(output))
    check_attributes(new, old)
    assert json.loads(new.attrs["servers"]) == json.loads(old.attrs["servers"])
    assert set(new.variables) >= set(old.variables)
    for name in old.variables:
        for variable in (new[name], old[name]):
            for sentence in ("long_name", "comment"):
                # Sentences for readers may be worded better; that they are there is part of the public surface.
                variable.attrs.pop(sentence, None)
        xr.testing.assert_identical(new[name].variable, old[name].variable)
        assert new[name].dtype == old[name].dtype, name


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_finished_sweep_is_left_as_it_is(sweep: str, without_server: Callable[..., str], tmp_path: Path) -> None:
    output = unpack(sweep, tmp_path)
    before = fingerprints(output)
    said = without_server(output, *SWEEPS[sweep], code=0)
    assert f"dataset {dataset_of(output)}" in said
    assert fingerprints(output) == before


def test_a_killed_journal_opens_under_its_old_identity(tmp_path: Path) -> None:
    root = journal_of(unpack("killed", tmp_path))
    before = fingerprints(root)
    stored = json.loads((root / "journal.json").read_text())
    axes = stored.pop("axes")
    extent = extent_of(SweepConfig.from_provenance(stored["configuration"]))
    journal = Journal(root, grid_frame(np.array(axes["alpha"]), np.array(axes["beta"])), stored, extent)
    assert {f"a{i:03d}_b{j:03d}.nc" for i, j in journal.done()} == KILLED_POINTS
    assert journal.base_shapes == [(5, 2)]
    assert journal.read_base() is not None
    assert fingerprints(root) == before


def test_a_killed_journal_is_recognised_by_the_command_that_began_it(
    without_server: Callable[..., str], tmp_path: Path
) -> None:
    """No server answers, so nothing is measured; but what is missing has been counted by then."""
    output = unpack("killed", tmp_path)
    before = fingerprints(output)
    said = without_server(output, code=2)
    assert "starting: 5 points in 1 slices to measure" in said
    assert not changed(before, fingerprints(output))
    assert set(fingerprints(output)) == set(before) | SIGN_OF_LIFE


def test_another_configuration_is_refused_by_its_key(without_server: Callable[..., str], tmp_path: Path) -> None:
    output = unpack("killed", tmp_path)
    before = fingerprints(output)
    said = without_server(output, code=2, configuration=CONFIGURATION.replace("max_tokens = 32", "max_tokens = 33"))
    assert "configuration.sampling.max_tokens: 32 there, 33 asked for" in said
    assert fingerprints(output) == before


@pytest.mark.server
def test_a_killed_journal_is_continued_to_the_old_numbers(server, tmp_path: Path) -> None:
    output = unpack("killed", tmp_path)
    assert {path.name for path in (journal_of(output) / "points").glob("*.nc")} == KILLED_POINTS
    before = fingerprints(output)
    done = continue_sweep(output, server=server)
    assert done.returncode == 0, done.stderr
    assert "starting: 5 points in 1 slices to measure" in done.stderr
    assert not changed(before, fingerprints(output))
    finished = unpack("finished", tmp_path)
    assert set(fingerprints(output)) == set(fingerprints(finished)) | SIGN_OF_LIFE
    new, old = opened(dataset_of(output)), opened(dataset_of(finished))
    # The two old sweeps decoded the checkpoint's batch in other groups; the killed one's is the one that is kept.
    sampled = "base_sampled_logprob"
    np.testing.assert_allclose(new[sampled], old[sampled], rtol=0, atol=1e-4)
    check_continued(new.drop_vars(sampled), old.drop_vars(sampled))


@pytest.mark.server
def test_a_progressive_journal_is_continued_to_the_old_numbers(server, tmp_path: Path) -> None:
    output = unpack("progressive", tmp_path)
    names = set(fingerprints(output))
    old = removed(dataset_of(output))
    journal = journal_of(output)
    for lost in ("a000_b002_p00064-00066", "a001_b001_p00064-00066", "a002_b001_p00000-00064"):
        os.unlink(journal / "points" / f"{lost}.nc")
    for lost in ("recheck.nc", "server.json"):
        os.unlink(journal / lost)
    before = fingerprints(output)
    done = continue_sweep(output, *PROGRESSIVE, server=server)
    assert done.returncode == 0, done.stderr
    assert not changed(before, fingerprints(output))
    assert set(fingerprints(output)) == names | SIGN_OF_LIFE
    check_continued(opened(dataset_of(output)), old)


@pytest.mark.parametrize("entry", json.loads((DATA / "identities.json").read_text()), ids=lambda e: e["sha256"][:8])
def test_a_configuration_keeps_its_identity(entry: dict) -> None:
    kind = {"SweepConfig": SweepConfig, "TrainConfig": TrainConfig}[entry["configuration"]]
    config = load_config(entry["arguments"], kind)
    found = json.loads(json.dumps(config.provenance()))
    assert found == entry["provenance"], f"journals of {entry['configuration']} {entry['arguments']} would be refused"
    assert digest(config.provenance()) == entry["sha256"]
    if kind is SweepConfig:
        assert SweepConfig.from_provenance(entry["provenance"]).provenance() == entry["provenance"]
