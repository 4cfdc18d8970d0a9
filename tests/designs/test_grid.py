"""The design `grid`: order, shares and names of its points. No server."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvr_landscape_plugin.designs import DESIGNS, Design, Point, find_designer
from rlvr_landscape_plugin.designs.grid import grid_designs, grid_frame, grid_order
from rlvr_landscape_plugin.errors import ConfigurationError
from rlvr_landscape_plugin.snapshot import open_snapshot


def design(frame, points, slices=()):
    snapshot = open_snapshot("tiny-sorter")
    return Design("toy", snapshot, frame, slices, tuple(points), {}, "a toy")


def grid(rows, columns):
    alphas, betas = np.linspace(-1, 1, rows), np.linspace(-1, 1, columns)
    points = [Point(place, 0, alphas[place[0]], betas[place[1]]) for place in grid_order(alphas, betas)]
    return design(grid_frame(alphas, betas), points)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 9))
def test_shares_are_a_partition_of_the_grid(rows, columns, count):
    whole = grid(rows, columns)
    shares = [whole.share(index + 1, count) for index in range(count)]
    assert sorted(point.place for share in shares for point in share) == sorted(whole.by_place)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shares_of_many_slices_are_whole_slices():
    frame = grid_frame(np.arange(6.0), np.arange(2.0))
    whole = design(frame, [Point((i, j), i, 0.0, 0.0) for i in range(6) for j in range(2)], slices=(None,) * 6)
    shares = [whole.share(index + 1, 4) for index in range(4)]
    assert [sorted({point.slice for point in share}) for share in shares] == [[0, 4], [1, 5], [2], [3]]
    assert sorted(point.place for share in shares for point in share) == sorted(whole.by_place)


def test_the_origin_comes_first_and_then_outward():
    order = grid_order(np.array([-2.0, 0.0, 1.0]), np.array([-1.0, 0.0]))
    assert order == [(1, 1), (1, 0), (2, 1), (2, 0), (0, 1), (0, 0)]


def test_a_design_whose_points_are_not_those_of_its_dimensions_is_refused():
    whole = grid(3, 2)
    with pytest.raises(ValueError, match="not those of its dimensions"):
        replace(whole, points=whole.points[:-1])
    with pytest.raises(ValueError, match="not those of its dimensions"):
        replace(whole, points=(*whole.points[:-1], Point((3, 0), 0, 0.0, 0.0)))


def test_a_designer_is_found_by_name_or_import_path():
    assert find_designer("grid", DESIGNS) is grid_designs
    assert find_designer("rlvr_landscape_plugin.designs.grid.grid_designs", DESIGNS) is grid_designs
    for wrong in ("gird", "nowhere.at_all", "rlvr_landscape_plugin.designs.grid.nothing"):
        with pytest.raises(ConfigurationError, match=f"design = '{wrong}' is neither one of grid"):
            find_designer(wrong, DESIGNS)
