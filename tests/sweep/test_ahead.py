"""The next slice is drawn while the present one is measured: what is asked of servers, and that no number changes."""

from __future__ import annotations

import pytest
import xarray as xr
from fake_server import FakeServer

CENSUS = """
snapshots = ["tiny-sorter"]
design = "census"
[census]
pairs = 6
radii = [0.1]
unit = "theta"
[env]
id = "tiny-quiz"
num_prompts = 2
rollouts = 2
[sampling]
max_tokens = 8
"""
"""Three slices of four points."""
FILE = "census_step000000.nc"


@pytest.fixture
def measured(sweep_here, tmp_path):
    """Run the census on servers into a folder: the dataset without times and addresses, and what was said."""

    def run(folder, *servers):
        code, said = sweep_here(*servers, config=CENSUS, output=tmp_path / folder)
        assert code == 0, said
        with xr.open_dataset(tmp_path / folder / FILE) as data:
            timed = [name for name in data.data_vars if str(name).startswith("seconds_")]
            return data.drop_vars([*timed, "server"], errors="ignore").load(), said.replace(str(tmp_path), "")

    return run


def test_the_slice_that_comes_next_is_drawn_ahead_and_no_number_changes(measured, fake_server):
    ahead, said = measured("with", fake_server)
    assert len(set(fake_server.loads)) == 3
    assert fake_server.ahead == fake_server.loads[1:], "each slice but the first, one before it is loaded"
    assert "ahead" not in said
    with FakeServer(draws_ahead=False) as earlier_release:
        plain, said = measured("plain", earlier_release)
    assert earlier_release.asked["ahead"] == 0
    assert earlier_release.loads == fake_server.loads
    assert "ahead" not in said
    assert "reward" in plain
    xr.testing.assert_equal(ahead, plain)


def test_several_servers_each_draw_ahead(measured, fake_server):
    with FakeServer() as second:
        shared, _ = measured("shared", fake_server, second)
        for server in (fake_server, second):
            following = dict(zip(fake_server.loads, fake_server.loads[1:], strict=False))
            assert server.ahead == [following[seed] for seed in server.loads if seed in following]
    with FakeServer() as alone:
        xr.testing.assert_equal(shared, measured("alone", alone)[0])


def test_a_census_that_continues_draws_ahead_what_is_left(measured, fake_server, tmp_path):
    whole, _ = measured("whole", fake_server)
    points = tmp_path / "whole" / "step000000_census" / "points"
    (tmp_path / "whole" / FILE).unlink()
    # The second slice is whole; of the first and the third, one point is lost.
    for lost in ("d000_s000_r000", "d005_s001_r000"):
        (file,) = points.glob(f"{lost}*.nc")
        file.unlink()
    with FakeServer() as later:
        again, _ = measured("whole", later)
    assert later.loads == [fake_server.loads[0], fake_server.loads[2]]
    assert later.ahead == [fake_server.loads[2]]
    xr.testing.assert_equal(again, whole)


def test_draws_that_failed_are_named_and_change_no_number(measured, fake_server):
    expected, _ = measured("expected", fake_server)
    with FakeServer() as broken:
        broken.ahead_errors = ["tensor 'model.norm.weight' along beta: MemoryError: no room"]
        found, said = measured("found", broken)
    assert "could not draw slice" in said
    assert "tensor 'model.norm.weight' along beta: MemoryError: no room" in said
    xr.testing.assert_equal(found, expected)


def test_a_server_that_declines_or_fails_is_named_once(measured, fake_server):
    expected, _ = measured("expected", fake_server)
    with FakeServer() as small:
        small.no_room = "8 GiB needed of 2 GiB free on the host"
        found, said = measured("small", small)
    assert said.count("draws no directions ahead: 8 GiB needed of 2 GiB free on the host") == 1
    xr.testing.assert_equal(found, expected)

    async def refuse(word, count):
        if word == "ahead":
            raise RuntimeError("the worker is gone")

    with FakeServer(refuse) as failing:
        found, said = measured("failing", failing)
    assert said.count("/landscape/ahead: the worker is gone (HTTP 500)") == 1
    xr.testing.assert_equal(found, expected)
