"""Series: bands are the intervals, steps stand where they belong, and what is not defined says so."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import xarray as xr
from rlvr_landscape_analysis import figures
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.results import BOUNDS, CONTROLS, PAIRS, statistic_name

LONG = [*range(11), *range(20, 151, 10)]


def make_table(steps=LONG, slices=(0,)):
    """Correlations that differ in every entry, with an interval that is not symmetric around them."""
    shape = (len(steps), len(slices), len(PAIRS), len(CONTROLS))
    pearson = np.linspace(-0.9, 0.6, int(np.prod(shape))).reshape(shape)
    dims = ("step", "slice_seed", "pair", "control")
    variables = {}
    for name, value in {"pearson": pearson, "corrected": pearson * 1.05, "spearman": pearson * 0.9}.items():
        variables[name] = (dims, value)
        variables[f"{name}_interval"] = ((*dims, "bound"), np.stack([value - 0.04, value + 0.07], axis=-1))
    variables["reason"] = (dims, np.full(shape, "", dtype="U80"))
    coords = {"step": steps, "slice_seed": list(slices), "pair": list(PAIRS), "control": list(CONTROLS)}
    return xr.Dataset(variables, coords | {"bound": list(BOUNDS)})


def make_training(steps=LONG):
    at = np.arange(len(steps), dtype=float)
    means = {
        "reward": 0.3 + 0.01 * at,
        "pass_1": 0.2 + 0.01 * at,
        "pass_k": 0.5 + 0.01 * at,
        "entropy": 0.4 - 0.01 * at,
    }
    variables = {}
    for name, mean in means.items():
        variables[name] = ("step", mean)
        variables[f"{name}_interval"] = (("step", "bound"), np.stack([mean - 0.02, mean + 0.03], axis=-1))
    return xr.Dataset(variables, {"step": steps, "bound": list(BOUNDS)}, {"k": 16})


def make_profile():
    radii = np.array([0.0, 0.01, 0.02, 0.05])
    values = {"reward": 0.5 - 4 * radii, "kl": 900 * radii**2, "reward_se": 0.01 + radii, "kl_se": 0.1 * radii}
    return xr.Dataset({name: ("radius", value) for name, value in values.items()}, {"radius": radii})


def corners(band):
    return {tuple(np.round(vertex, 9)) for path in band.get_paths() for vertex in path.vertices}


def assert_band(band, at, low, high):
    found = corners(band)
    for x, bottom, top in zip(at, low, high, strict=True):
        assert (round(float(x), 9), round(float(bottom), 9)) in found
        assert (round(float(x), 9), round(float(top), 9)) in found


@pytest.mark.parametrize("value", ["corrected", "pearson", "spearman"])
@pytest.mark.parametrize(("pair", "control"), [("kl_reward", "none"), ("surrogate_reward", "smooth")])
def test_line_and_band_are_the_tables(value, pair, control):
    table = make_table().transpose("bound", "control", "pair", "step", "slice_seed")
    drawn = figures.correlation_over_training(table, pair, control, value)
    series = drawn["series"][0]
    expected = table.sel(pair=pair, control=control, slice_seed=0)
    np.testing.assert_array_equal(series["line"].get_xdata(), LONG)
    np.testing.assert_array_equal(series["line"].get_ydata(), expected[value])
    interval = expected[f"{value}_interval"]
    assert_band(series["band"], LONG, interval.sel(bound="low"), interval.sel(bound="high"))
    assert series["gaps"] is None


def test_steps_come_in_order_whatever_the_tables():
    table = make_table([10, 0, 1])
    line = figures.correlation_over_training(table)["series"][0]["line"]
    assert line.get_xdata().tolist() == [0, 1, 10]
    value = table.corrected.sel(pair="kl_reward", control="none", slice_seed=0)
    assert line.get_ydata().tolist() == value.sel(step=[0, 1, 10]).values.tolist()


def test_long_training_is_readable_and_its_scale_is_named():
    ax = figures.correlation_over_training(make_table())["ax"]
    ax.figure.draw_without_rendering()
    assert "ln(1 + step)" in ax.get_xlabel()
    ticks = {float(t) for t in ax.get_xticks()}
    assert {0, 1, 10, 150} <= ticks
    assert [label.get_text() for label in ax.get_xticklabels()] == [f"{tick:g}" for tick in ax.get_xticks()]
    assert ticks | {float(t) for t in ax.get_xticks(minor=True)} == set(LONG)
    where = [float(ax.transData.transform((step, 0))[0]) for step in (0, 1, 10, 150)]
    width = where[-1] - where[0]
    assert (where[1] - where[0]) / width == pytest.approx(np.log(2) / np.log(151), rel=1e-6)
    boxes = sorted((label.get_window_extent() for label in ax.get_xticklabels()), key=lambda box: box.x0)
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_figure_3_is_the_first_ten_steps_on_a_linear_axis():
    drawn = figures.early_correlation(make_table(), value="pearson")
    assert drawn["series"][0]["line"].get_xdata().tolist() == list(range(11))
    assert drawn["ax"].get_xscale() == "linear"
    assert drawn["ax"].get_xlabel() == "training step"
    with pytest.raises(AnalysisError, match="none of the steps"):
        figures.early_correlation(make_table([20, 30]))


def test_every_slice_has_a_line_of_its_own():
    table = make_table([0, 1, 10], slices=(0, 3))
    drawn = figures.correlation_over_training(table)
    assert list(drawn["series"]) == [0, 3]
    for seed, series in drawn["series"].items():
        expected = table.corrected.sel(pair="kl_reward", control="none", slice_seed=seed)
        assert series["line"].get_ydata().tolist() == expected.values.tolist()
    lines = [series["line"] for series in drawn["series"].values()]
    assert len({line.get_marker() for line in lines}) == len({line.get_linestyle() for line in lines}) == 2
    assert [text.get_text() for text in drawn["legend"].get_texts()] == ["slice 0", "slice 3"]


def test_gaps_are_marked_and_known_bounds_stay():
    table = make_table([0, 1, 2, 10])
    table["corrected"][1:3, 0, 0, 0] = np.nan
    table["corrected_interval"][1, 0, 0, 0] = [-1, 1]
    table["corrected_interval"][2, 0, 0, 0] = np.nan
    drawn = figures.correlation_over_training(table)
    series = drawn["series"][0]
    assert series["gaps"].get_xdata().tolist() == [1, 2]
    bars = {segment[0, 0]: (segment[0, 1], segment[1, 1]) for segment in series["bars"].get_segments()}
    assert bars[1] == (-1, 1)
    assert sorted(bars) == [0, 1, 10]
    assert "not defined" in drawn["legend"].get_texts()[-1].get_text()


def test_a_series_without_values_says_so_with_the_reason():
    table = make_table([0, 1])
    for name in ("corrected", "corrected_interval"):
        table[name] = table[name] * np.nan
    table["reason"] = xr.full_like(table.reason, "the grid has too few points")
    for draw in (figures.correlation_over_training, figures.controlled_over_training):
        text = draw(table)["message"].get_text().replace("\n", " ")
        assert "not defined at any snapshot" in text
        assert "too few points" in text
    assert figures.correlation_over_training(make_table([0, 1]))["message"] is None


def test_one_snapshot_is_a_point_with_its_interval():
    drawn = figures.correlation_over_training(make_table([70]))
    drawn["ax"].figure.draw_without_rendering()
    segment = drawn["series"][0]["bars"].get_segments()[0]
    value = drawn["series"][0]["line"].get_ydata()[0]
    np.testing.assert_allclose(segment[:, 1], [value - 0.04, value + 0.07])
    lower, upper = drawn["ax"].get_xlim()
    assert lower < 70 < upper


def test_plain_controlled_and_null_are_told_apart():
    table = make_table([0, 1, 10])
    drawn = figures.controlled_over_training(table)
    for role, control in (("plain", "none"), ("controlled", "shell"), ("null", "radial")):
        expected = table.sel(pair="kl_reward", control=control, slice_seed=0)
        np.testing.assert_array_equal(drawn[role][0]["line"].get_ydata(), expected.corrected)
        interval = expected.corrected_interval
        assert_band(drawn[role][0]["band"], [0, 1, 10], interval.sel(bound="low"), interval.sel(bound="high"))
    lines = [drawn[role][0]["line"] for role in ("plain", "controlled", "null")]
    assert len({line.get_marker() for line in lines}) == len({line.get_color() for line in lines}) == 3
    words = [text.get_text() for text in drawn["legend"].get_texts()]
    assert words == ["radial null", "corrected", "within shells"], "the names that the tables use"
    holes = table.assign(corrected=table.corrected.where(table.control != "shell"))
    undefined = figures.controlled_over_training(holes)
    assert any("(not defined)" in text.get_text() for text in undefined["legend"].get_texts())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pair": "kl_entropy"}, "no pair 'kl_entropy'.*kl_reward"),
        ({"control": "radius"}, "no control 'radius'.*shell"),
        ({"value": "kendall"}, "no correlation 'kendall'.*corrected, pearson, spearman"),
        ({"steps": [7]}, "none of the steps"),
    ],
)
def test_mistakes_name_what_is_there(options, message):
    with pytest.raises(AnalysisError, match=message):
        figures.correlation_over_training(make_table([0, 1]), **options)


def test_the_scatter_prints_plain_and_controlled_correlation():
    table = make_table([0, 10], slices=(0, 1))
    at = {"step": 10, "slice_seed": 1, "pair": "kl_reward"}
    grid = xr.Dataset(
        {"reward": (("alpha", "beta"), np.eye(3)), "kl": (("alpha", "beta"), np.arange(9.0).reshape(3, 3))},
        {"alpha": [-1.0, 0, 1], "beta": [-1.0, 0, 1], "step": 10, "slice_seed": 1},
    )
    plain, shells = figures.kl_reward_scatter(grid, table)["text"]
    for line, control in ((plain, "none"), (shells, "shell")):
        numbers = [float(n.replace("−", "-")) for n in re.findall(r"−?\d+\.\d+", line)]
        r = table.corrected.sel(at | {"control": control}).item()
        np.testing.assert_allclose(numbers, [r, r - 0.04, r + 0.07], atol=0.0051)
    assert plain.startswith(f"{statistic_name('corrected', 'none')} r = ")
    assert shells.startswith(f"{statistic_name('corrected', 'shell')} r = ")
    assert figures.kl_reward_scatter(grid, table, value="pearson")["text"][0].startswith("Pearson r = ")
    table["corrected"][:] = np.nan
    assert figures.kl_reward_scatter(grid, table)["text"] == [
        "corrected r is not defined",
        "within shells r is not defined",
    ]
    with pytest.raises(AnalysisError, match="no step 3"):
        figures.kl_reward_scatter(grid.assign_coords(step=3), table)


def test_contributions_have_an_axis_of_their_own_range():
    table = make_table([0, 10, 50])
    small = {
        name: 0.02 * table[name.replace("contribution", "corrected")]
        for name in ("contribution", "contribution_interval")
    }
    table = table.assign(small)
    options = {"value": "contribution", "control": "shell"}
    low, high = figures.correlation_over_training(table, **options)["ax"].get_ylim()
    shown = table.sel(pair="kl_reward", control="shell")["contribution_interval"]
    assert low < float(shown.min()) < float(shown.max()) < high
    assert low < 0 < high
    assert high - low < 1.4 * (max(0.0, float(shown.max())) - float(shown.min()))
    assert figures.correlation_over_training(table)["ax"].get_ylim() == (-1.05, 1.05)


def test_training_curves_are_the_tables():
    training = make_training().transpose("bound", "step")
    drawn = figures.training_curves(training)
    for name in ("reward", "pass_1", "pass_k", "entropy"):
        np.testing.assert_array_equal(drawn[name]["line"].get_ydata(), training[name])
        interval = training[f"{name}_interval"]
        assert_band(drawn[name]["band"], LONG, interval.sel(bound="low"), interval.sel(bound="high"))
        assert drawn[name]["line"].get_marker() not in ("", "None")
    assert drawn["entropy"]["line"].axes is drawn["axes"][1] is not drawn["reward"]["line"].axes
    assert "nat" in drawn["axes"][1].get_ylabel()
    assert [text.get_text() for text in drawn["legend"].get_texts()] == ["mean reward", "pass@1", "pass@16"]
    for ax in drawn["axes"]:
        assert {*ax.get_xticks().tolist(), *ax.get_xticks(minor=True).tolist()} == set(LONG)


def test_what_was_not_measured_over_training_is_named():
    training = make_training([0, 1, 10])
    training["pass_k"] = training.pass_k * np.nan
    drawn = figures.training_curves(training.drop_vars(["entropy", "entropy_interval"]))
    assert drawn["pass_k"] is None
    assert "pass@16 (not measured)" in [text.get_text() for text in drawn["legend"].get_texts()]
    assert "token entropy not measured" in drawn["messages"][0].get_text().replace("\n", " ")
    with pytest.raises(AnalysisError, match="dimension step"):
        figures.training_curves(training.isel(step=0))


def test_radial_profile_has_bands_of_two_standard_errors():
    profile = make_profile().isel(radius=[2, 0, 3, 1])
    drawn = figures.radial_profile(profile)
    ordered = make_profile()
    for name in ("reward", "kl"):
        np.testing.assert_array_equal(drawn[name]["line"].get_xdata(), ordered.radius)
        np.testing.assert_array_equal(drawn[name]["line"].get_ydata(), ordered[name])
        half = 2 * ordered[f"{name}_se"]
        assert_band(drawn[name]["band"], ordered.radius, ordered[name] - half, ordered[name] + half)
    assert "nat" in drawn["kl"]["ax"].get_ylabel()
    empty = figures.radial_profile(profile.assign(kl=profile.kl * np.nan))
    assert "not measured" in empty["kl"]["message"].get_text().replace("\n", " ")
    assert empty["reward"]["message"] is None
    with pytest.raises(AnalysisError, match="dimension radius"):
        figures.radial_profile(profile.isel(radius=0))


SERIES = {
    "correlation": lambda: figures.correlation_over_training(make_table()),
    "controlled": lambda: figures.controlled_over_training(make_table(slices=(0, 1))),
    "training": lambda: figures.training_curves(make_training()),
    "profile": lambda: figures.radial_profile(make_profile()),
}


@pytest.mark.parametrize("name", SERIES)
def test_files_embed_their_fonts_and_nothing_leaves_the_page(name, tmp_path):
    drawn = SERIES[name]()
    figure = drawn.get("figure") or drawn["ax"].figure
    pdf, png = figures.save_figure(figure, tmp_path / name)
    assert b"/FontFile2" in pdf.read_bytes()
    assert b"/Type3" not in pdf.read_bytes()
    assert png.stat().st_size > 0
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= -0.01
    assert box.y0 >= -0.01
    assert box.x1 <= width + 0.01
    assert box.y1 <= height + 0.01
    sizes = [text.get_fontsize() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]
    assert min(sizes) >= 6
    assert round(float(width), 3) in (figures.COLUMN_INCHES, figures.PAGE_INCHES)


@pytest.mark.parametrize("name", SERIES)
def test_drawing_leaves_settings_and_tables_alone(name):
    settings = dict(matplotlib.rcParams)
    SERIES[name]()
    assert dict(matplotlib.rcParams) == settings


def test_tables_are_not_changed():
    for table, draw in (
        (make_table([10, 0, 1]), figures.correlation_over_training),
        (make_table([10, 0, 1]), figures.controlled_over_training),
        (make_training([10, 0, 1]), figures.training_curves),
        (make_profile(), figures.radial_profile),
    ):
        before = table.copy(deep=True)
        draw(table)
        xr.testing.assert_identical(table, before)


def test_neither_importing_nor_drawing_needs_pyplot_torch_or_vllm():
    code = """
import sys
import numpy as np, xarray as xr
from rlvr_landscape_analysis import figures
grid = xr.Dataset({n: (("alpha", "beta"), np.eye(3) + i) for i, n in enumerate(("reward", "kl"))},
                  {"alpha": [-1.0, 0, 1], "beta": [-1.0, 0, 1]})
figures.landscape_panels({0: grid, 1: grid}, shared=True)
figures.surface(grid)["ax"].figure.draw_without_rendering()
figures.kl_reward_scatter(grid)
print({"torch", "vllm", "matplotlib.pyplot"} & set(sys.modules))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"
