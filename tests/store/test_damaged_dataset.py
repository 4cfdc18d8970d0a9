"""A damaged dataset: found wherever the damage is, moved aside, and written again from its points."""

from __future__ import annotations

import hashlib
import os
import random

import netCDF4
import pytest
import xarray as xr
from rlvr_landscape_analysis import AnalysisError
from rlvr_landscape_analysis.checksums import find_checksum
from rlvr_landscape_analysis.datasets import check_checksum
from test_store import finished

from rlvr_landscape_plugin.errors import StoreError
from rlvr_landscape_plugin.store import consolidate, holds

NAME = "landscape_step000000_slice0.nc"
LINE = 100
"""Bytes of the line with the checksum, at most."""


@pytest.fixture
def journal(tmp_path):
    return finished(tmp_path / "run")


@pytest.fixture
def dataset(journal, tmp_path):
    return consolidate(journal, tmp_path / NAME, {"title": "a test"})


def everything(path):
    with xr.open_dataset(path) as data:
        return data.load()


def without_checksum(content):
    return content[: content.rindex(b"\nSHA-256")]


def test_the_last_line_is_the_checksum_of_what_stands_before_it(dataset):
    content = dataset.read_bytes()
    data = without_checksum(content)
    assert content[len(data) :].split() == [*b"SHA-256 of all bytes before this line:".split(), hashed(data)]
    assert find_checksum(dataset) is True


def hashed(data):
    return hashlib.sha256(data).hexdigest().encode()


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "foreign"])
@pytest.mark.parametrize("marked", [True, False], ids=["with a checksum", "of an older version"])
def test_a_damaged_dataset_is_moved_aside_and_written_again(journal, dataset, damage, marked):
    before, whole = everything(dataset), dataset.read_bytes()
    if not marked:
        whole = without_checksum(whole)
    if damage == "foreign":
        xr.Dataset(attrs=before.attrs).to_netcdf(dataset)
    else:
        dataset.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"not netCDF"}[damage])
    content = dataset.read_bytes()
    with pytest.warns(UserWarning, match=rf"{NAME} was moved to .*\.corrupt and is written again from its points"):
        assert consolidate(journal, dataset, {"title": "a test"}) == dataset
    assert [file.read_bytes() for file in dataset.parent.glob("*.corrupt")] == [content]
    xr.testing.assert_equal(everything(dataset), before)


@pytest.mark.filterwarnings("ignore:.*written again from its points")
def test_a_flipped_bit_is_always_seen_before_the_file_is_read(journal, dataset, monkeypatch):
    whole, places = dataset.read_bytes(), random.Random(0)
    monkeypatch.setattr(xr, "open_dataset", lambda *_, **__: pytest.fail("a damaged file was read"))
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[places.randrange(len(whole) - LINE)] ^= 1 << places.randrange(8)
        dataset.write_bytes(flipped)
        with pytest.raises(AnalysisError, match=rf"{NAME} is damaged: .*run the sweep's command again"):
            check_checksum(dataset)
        assert not holds(journal, dataset)


def test_a_flipped_bit_in_a_point_is_seen_before_the_file_is_read(journal, monkeypatch):
    path, places = journal.root / "points" / "a001_b002.nc", random.Random(1)
    whole = path.read_bytes()
    monkeypatch.setattr(netCDF4, "Dataset", lambda *_, **__: pytest.fail("a damaged file was read"))
    for _ in range(50):
        flipped = bytearray(whole)
        flipped[places.randrange(len(whole) - LINE)] ^= 1 << places.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(StoreError, match=r"a001_b002.nc is damaged: its content is not what its checksum says"):
            journal.read_point((1, 2))


def test_a_file_without_a_checksum_stays_and_is_read(journal, dataset):
    dataset.write_bytes(without_checksum(dataset.read_bytes()))
    before = dataset.read_bytes()
    assert find_checksum(dataset) is None
    check_checksum(dataset)
    assert consolidate(journal, dataset, {}) == dataset
    assert dataset.read_bytes() == before


def test_a_file_that_a_user_edits_or_saves_is_not_called_damaged(dataset, tmp_path):
    everything(dataset).isel(alpha=[0]).to_netcdf(tmp_path / "part.nc")
    assert find_checksum(tmp_path / "part.nc") is None
    with netCDF4.Dataset(dataset, "a") as file:
        file.setncattr("comment", "looked at, and found good")
    check_checksum(dataset)
    assert everything(dataset).attrs["comment"] == "looked at, and found good"


def test_a_dataset_that_the_system_does_not_let_be_read_is_not_called_damaged(journal, dataset, monkeypatch):
    def refuse(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("rlvr_landscape_plugin.store.dataset.find_checksum", refuse)
    with pytest.raises(StoreError, match=r"cannot be read: .*Too many open files; nothing was changed"):
        holds(journal, dataset)
    assert dataset.exists()


def test_what_a_killed_consolidation_left_is_removed_when_it_is_old(journal, dataset):
    old, new = (dataset.with_name(f".{NAME}.{number}.tmp") for number in ("1.a", "2.b"))
    for path in (old, new):
        path.write_bytes(b"half a dataset")
    os.utime(old, (0, 0))
    consolidate(journal, dataset, {})
    assert (old.exists(), new.exists()) == (False, True), "the writer of the new one may be at work"
