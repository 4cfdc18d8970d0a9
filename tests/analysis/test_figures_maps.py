"""Maps: the right number in the right place on grids that are neither square nor symmetric, and holes that show."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from rlvr_landscape_analysis import figures, synthetic
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.landscape import per_prompt, point_mean

ALPHAS = np.array([-0.1, 0.0, 0.05, 0.2])
BETAS = np.array([-0.3, -0.1, 0.0, 0.1, 0.15])
VALUES = ("reward", "kl", "surrogate", "entropy", "truncated", "pass_1", "pass_k")


def make_map(step=0, slice_seed=0, alphas=ALPHAS, betas=BETAS):
    """Values that differ at every point, above all between (i, j) and (j, i)."""
    i, j = np.meshgrid(np.arange(len(alphas)), np.arange(len(betas)), indexing="ij")
    a, b = np.meshgrid(alphas, betas, indexing="ij")
    place = 0.02 * (i + len(alphas) * j) + 0.001 * step + 0.1 * slice_seed
    values = {name: place + 0.01 * n for n, name in enumerate(VALUES)}
    values["kl"] = 40 * (a**2 + 0.5 * b**2)
    values |= {f"{name}_se": np.full(a.shape, 0.01) for name in VALUES}
    here = (a == 0) & (b == 0)
    values["difference"] = values["reward"] - (values["reward"][here][0] if here.any() else np.nan)
    values["difference_se"] = np.full(a.shape, 0.03)
    values["better"] = values["difference"] > 0.08
    values["radius"] = np.hypot(a, b)
    return xr.Dataset(
        {name: (("alpha", "beta"), value) for name, value in values.items()},
        {"alpha": alphas, "beta": betas, "step": step, "slice_seed": slice_seed},
        {"prompts": 64, "rollouts": 4},
    )


def run(steps=(0, 1, 10), slices=(0,), **options):
    return {(step, seed): make_map(step, seed, **options) for step in steps for seed in slices}


def colours(mesh):
    """The mesh's values by (α, β) of the cell that contains the point."""
    corners = mesh.get_coordinates()
    x, y = corners[0, :, 0], corners[:, 0, 1]
    array = np.ma.filled(mesh.get_array(), np.nan).reshape(len(y) - 1, len(x) - 1)

    def at(alpha, beta):
        return array[np.searchsorted(y, beta) - 1, np.searchsorted(x, alpha) - 1]

    return at


def assert_shows(mesh, values):
    at = colours(mesh)
    for alpha in values["alpha"].values:
        for beta in values["beta"].values:
            np.testing.assert_allclose(at(alpha, beta), values.sel(alpha=alpha, beta=beta).item(), rtol=1e-12)


@pytest.mark.parametrize("name", ["reward", "entropy", "pass_1", "pass_k", "truncated", "kl", "reward_se"])
def test_every_quantity_is_drawn_at_its_place(name):
    data = make_map()
    drawn = figures.quantity_map(data, name)
    assert_shows(drawn["mesh"], data[name])
    assert drawn["mesh"].get_rasterized()
    assert drawn["ax"].get_aspect() == 1.0
    assert (drawn["origin"].get_xdata()[0], drawn["origin"].get_ydata()[0]) == (0, 0)


def test_neither_the_order_of_dims_nor_that_of_coordinates_matters():
    data = make_map()
    shuffled = data.isel(alpha=[2, 0, 3, 1], beta=[4, 1, 0, 3, 2]).transpose("beta", "alpha")
    assert_shows(figures.reward_landscape(shuffled)["mesh"], data.reward)
    assert_shows(figures.difference_map(shuffled)["mesh"], data.difference)
    assert figures.panel_aspect(shuffled) == figures.panel_aspect(data)


def test_labels_carry_units():
    data = make_map()
    for name, label in {
        "kl": "KL from the checkpoint (nat)",
        "entropy": "token entropy (nat)",
        "reward": "mean reward",
        "pass_k": "pass@4",
        "surrogate": "surrogate J (per token)",
    }.items():
        assert figures.quantity_map(data, name)["colorbar"].ax.get_ylabel() == label
    other = data.assign(seconds=(("alpha", "beta"), data.reward.values, {"long_name": "wall time", "units": "s"}))
    assert figures.quantity_map(other, "seconds")["colorbar"].ax.get_ylabel() == "wall time (s)"


@pytest.mark.parametrize("form", ["raw", "reduced"])
def test_a_landscape_dataset_is_reduced_to_a_map(form):
    raw = synthetic.landscape("mixed", points=(5, 7), prompts=16, rollouts=3)
    data = raw if form == "raw" else per_prompt(raw)
    mean = {name: point_mean(raw[name])["mean"] for name in ("reward", "entropy")}
    assert_shows(figures.reward_landscape(data)["mesh"], mean["reward"])
    both = figures.pass_and_entropy_maps(data)
    assert_shows(both["entropy"]["mesh"], mean["entropy"])
    assert both["pass_k"]["colorbar"].ax.get_ylabel() == "pass@3 (reward ≥ 0.99)"
    assert figures.surrogate_and_reward(data)["surrogate"]["mesh"] is not None
    assert figures.difference_map(data)["mesh"] is not None
    assert figures.kl_reward_scatter(data)["points"].get_offsets().shape == (35, 2)


def test_snapshots_of_figure_1_by_default_and_on_demand():
    maps = run((0, 1, 2, 10, 150))
    drawn = figures.landscape_panels(maps)
    assert list(drawn["panels"]) == [(0, 0), (1, 0), (150, 0)]
    for key, panel in drawn["panels"].items():
        assert_shows(panel["mesh"], maps[key].reward)
        assert panel["ax"].get_title() == f"step {key[0]}"
        assert panel["colorbar"] is not None
        assert panel["origin"] is not None
        assert np.all(panel["contours"].levels > 0)
    assert drawn["figure"].get_size_inches()[0] == figures.PAGE_INCHES
    assert "KL in nat" in drawn["figure"].get_supxlabel()
    assert list(figures.landscape_panels(maps, steps=[10, 2])["panels"]) == [(10, 0), (2, 0)]
    assert list(figures.landscape_panels(run((5, 20, 40)))["panels"]) == [(5, 0), (40, 0)]
    with pytest.raises(AnalysisError, match=r"no map of step \[3\].*0, 1, 2, 10, 150"):
        figures.landscape_panels(maps, steps=[3])
    with pytest.raises(AnalysisError, match="no map to draw"):
        figures.landscape_panels({})


def test_local_and_shared_colour_scales():
    maps = run((0, 10))
    local = figures.landscape_panels(maps)["panels"]
    for key, panel in local.items():
        assert panel["mesh"].get_clim() == (maps[key].reward.min(), maps[key].reward.max())
    shared = figures.landscape_panels(maps, shared=True)
    limits = {panel["mesh"].get_clim() for panel in shared["panels"].values()}
    assert limits == {(float(maps[0, 0].reward.min()), float(maps[10, 0].reward.max()))}
    assert all(panel["colorbar"] is None for panel in shared["panels"].values())
    assert shared["colorbar"].ax.get_ylabel() == "mean reward"
    levels = {tuple(panel["contours"].levels) for panel in shared["panels"].values()}
    assert len(levels) == 1


def test_slices_are_rows_and_a_missing_one_says_so():
    maps = run((0, 1, 10), (0, 4))
    del maps[1, 4]
    drawn = figures.landscape_panels(maps)
    assert drawn["axes"].shape == (2, 3)
    assert_shows(drawn["panels"][10, 4]["mesh"], maps[10, 4].reward)
    assert drawn["axes"][1, 2] is drawn["panels"][10, 4]["ax"]
    assert "not measured" in drawn["panels"][1, 4]["message"].get_text().replace("\n", " ")
    assert drawn["panels"][1, 4]["mesh"] is None


def test_many_snapshots_fill_rows_in_order():
    drawn = figures.landscape_panels(run((0, 1, 2, 3, 4)), steps=range(5))
    assert drawn["axes"].shape == (2, 3)
    assert [panel["ax"] for panel in drawn["panels"].values()] == [ax for ax in drawn["axes"].ravel() if ax is not None]


def test_maps_come_as_mapping_list_or_one_dataset_over_steps():
    maps = run((0, 1))
    stacked = xr.concat(
        [m.drop_vars("step") for m in maps.values()], dim=xr.DataArray([0, 1], dims="step", name="step")
    )
    for given in (list(maps.values()), {step: m for (step, _), m in maps.items()}, stacked):
        drawn = figures.landscape_panels(given)
        for key, panel in drawn["panels"].items():
            assert_shows(panel["mesh"], maps[key].reward)
    with pytest.raises(AnalysisError, match="two maps of step 0"):
        figures.landscape_panels([maps[0, 0], maps[0, 0]])
    with pytest.raises(AnalysisError, match="several along"):
        figures.reward_landscape(stacked)


def test_surrogate_and_reward_diverge_at_the_origins_value():
    data = make_map()
    drawn = figures.surrogate_and_reward(data)
    for name in ("surrogate", "reward"):
        mesh, origin = drawn[name]["mesh"], float(data[name].sel(alpha=0, beta=0))
        assert_shows(mesh, data[name])
        assert isinstance(mesh.norm, TwoSlopeNorm)
        assert mesh.norm.vcenter == pytest.approx(origin)
        assert mesh.norm.vmax - origin == pytest.approx(origin - mesh.norm.vmin)
        assert mesh.norm.vmin <= data[name].min() <= data[name].max() <= mesh.norm.vmax
    assert drawn["surrogate"]["ax"].get_xlim() == drawn["reward"]["ax"].get_xlim()
    assert drawn["surrogate"]["ax"].get_ylim() == drawn["reward"]["ax"].get_ylim()


def test_without_an_origin_nothing_diverges():
    data = make_map(alphas=np.array([0.1, 0.2]))
    drawn = figures.surrogate_and_reward(data)
    assert not isinstance(drawn["reward"]["mesh"].norm, TwoSlopeNorm)
    assert "no centre" in drawn["figure"].get_supxlabel()
    assert drawn["reward"]["origin"] is None


def test_hatching_and_rings_of_the_difference_map():
    data = make_map()
    drawn = figures.difference_map(data)
    assert_shows(drawn["mesh"], data.difference)
    assert drawn["mesh"].norm.vcenter == 0
    unsure = (np.abs(data.difference) < 2 * data.difference_se) & ~((data.alpha == 0) & (data.beta == 0))
    centres = {tuple(np.round(path.get_extents().get_points(), 9).ravel()) for path in drawn["hatched"].get_paths()}
    assert len(centres) == int(unsure.sum()) > 0
    hatched = {
        (float(a), float(b))
        for a in ALPHAS
        for b in BETAS
        if any(x0 < a < x1 and y0 < b < y1 for x0, y0, x1, y1 in centres)
    }
    assert hatched == {(float(a), float(b)) for a in ALPHAS for b in BETAS if unsure.sel(alpha=a, beta=b)}
    rings = set(zip(*(v.tolist() for v in drawn["rings"].get_data()), strict=True))
    assert rings == {(float(a), float(b)) for a in ALPHAS for b in BETAS if data.better.sel(alpha=a, beta=b)}
    assert rings
    title = drawn["ax"].get_title()
    assert "hatched: within 2 SE" in title
    assert "rings: better" in title


def test_a_missing_standard_error_is_said():
    data = make_map()
    data["difference_se"] = data.difference_se * np.nan
    drawn = figures.difference_map(data)
    assert drawn["hatched"] is None
    assert "no standard error" in drawn["ax"].get_title()


def test_holes_are_crossed_grey_and_never_filled():
    data = make_map()
    data["reward"][3, 0] = np.nan
    data["difference"][3, 0] = np.nan
    data["better"][3, 0] = True
    drawn = figures.reward_landscape(data)
    assert np.isnan(colours(drawn["mesh"])(0.2, -0.3))
    assert np.isfinite(colours(drawn["mesh"])(-0.1, 0.15))
    box = drawn["missing"].get_paths()[0].get_extents()
    assert len(drawn["missing"].get_paths()) == 1
    assert box.contains(0.2, -0.3)
    assert drawn["missing"].get_hatch()
    assert "not measured" in drawn["ax"].get_title()
    rings = figures.difference_map(data)["rings"].get_data()
    assert (0.2, -0.3) not in set(zip(*rings, strict=True))


@pytest.mark.parametrize("draw", [figures.reward_landscape, figures.difference_map, figures.surface])
def test_a_map_without_any_value_says_so(draw):
    data = make_map()
    empty = data.copy(deep=True)
    for name in ("reward", "difference"):
        empty[name] = empty[name] * np.nan
    drawn = draw(empty)
    assert "has no value at any point" in drawn["message"].get_text().replace("\n", " ")
    assert drawn.get("mesh") is None
    assert drawn["origin"] is None
    assert draw(data)["message"] is None


def test_an_absent_quantity_is_not_measured_and_a_wrong_name_is_an_error():
    data = make_map().drop_vars("entropy")
    drawn = figures.pass_and_entropy_maps(data)
    assert "was not measured" in drawn["entropy"]["message"].get_text().replace("\n", " ")
    assert drawn["pass_k"]["mesh"] is not None
    assert "was not measured" in figures.quantity_map(data, "format_failure")["message"].get_text().replace("\n", " ")
    for draw in (figures.quantity_map, figures.surface):
        with pytest.raises(AnalysisError, match="no quantity 'entropie'"):
            draw(data, "entropie")


@pytest.mark.parametrize(
    ("alphas", "betas"),
    [(ALPHAS, np.zeros(1)), (np.zeros(1), BETAS), (np.zeros(1), np.zeros(1)), (np.array([0.1]), np.array([0.2, 0.3]))],
)
def test_strips_and_single_points_are_drawn(alphas, betas):
    maps = run((0, 1), alphas=alphas, betas=betas)
    data = maps[1, 0]
    drawn = figures.reward_landscape(data)
    assert_shows(drawn["mesh"], data.reward)
    corners = drawn["mesh"].get_coordinates()
    assert np.ptp(corners[..., 0]) > 0
    assert np.ptp(corners[..., 1]) > 0
    for other in (
        figures.landscape_panels(maps),
        figures.difference_map(data),
        figures.surrogate_and_reward(data),
        figures.pass_and_entropy_maps(data),
        figures.kl_reward_scatter(data),
        figures.surface(data),
    ):
        figure = other.get("figure") or other["ax"].figure
        with warnings.catch_warnings(action="error"):
            figure.draw_without_rendering()


def test_the_surface_has_the_maps_heights():
    data = make_map()
    drawn = figures.surface(data)
    assert drawn["ax"].get_zlabel() == "mean reward"
    assert drawn["contours"] is not None
    assert "nat" in drawn["ax"].get_title()
    heights = data.reward.transpose("beta", "alpha").values
    faces = (heights[1:, 1:] + heights[1:, :-1] + heights[:-1, 1:] + heights[:-1, :-1]) / 4
    np.testing.assert_allclose(drawn["surface"].get_array(), faces.ravel())
    stem = drawn["origin"].get_data_3d()
    assert stem[2][1] == pytest.approx(data.reward.sel(alpha=0, beta=0).item())
    data["reward"][0, 0] = np.nan
    holed = figures.surface(data)
    assert [v[0] for v in holed["missing"].get_data_3d()][:2] == [-0.1, -0.3]
    with pytest.raises(AnalysisError, match="projection='3d'"):
        figures.surface(data, ax=figures.new_figure()[1])


def test_where_no_rollout_passes_the_figure_says_so():
    raw = synthetic.landscape("mixed", points=3, prompts=16, rollouts=3)
    raw["reward"] = 0 * raw["reward"]
    drawn = figures.pass_and_entropy_maps(raw)
    note = drawn["figure"].texts[0].get_text() if drawn["figure"].texts else drawn["figure"]._supxlabel.get_text()
    assert "no rollout passes: pass@3 (reward ≥ 0.99) is 0 at every point" in note.replace("\n", " ")


def test_the_scatter_has_every_point_coloured_by_its_radius():
    data = make_map()
    drawn = figures.kl_reward_scatter(data)
    found = {
        (round(kl, 9), round(reward, 9)): radius
        for (kl, reward), radius in zip(
            drawn["points"].get_offsets().tolist(), drawn["points"].get_array().tolist(), strict=True
        )
    }
    assert len(found) == data.reward.size
    for alpha in ALPHAS:
        for beta in BETAS:
            point = data.sel(alpha=alpha, beta=beta)
            assert found[round(point.kl.item(), 9), round(point.reward.item(), 9)] == pytest.approx(
                np.hypot(alpha, beta)
            )
    origin = data.sel(alpha=0, beta=0)
    assert np.ravel(drawn["origin"].get_data()).tolist() == [origin.kl.item(), origin.reward.item()]
    assert "(nat)" in drawn["ax"].get_xlabel()
    segments = drawn["bars"][2][1].get_segments()
    np.testing.assert_allclose([s[1, 1] - s[0, 1] for s in segments], 4 * 0.01)
    assert figures.kl_reward_scatter(data, errors=False)["bars"] is None
    data["kl"][0, 0] = np.nan
    holed = figures.kl_reward_scatter(data)
    assert len(holed["points"].get_offsets()) == data.reward.size - 1
    assert "1 points not measured" in holed["ax"].get_title()


def test_the_film_has_one_frame_per_snapshot_on_one_scale(tmp_path):
    maps = run((0, 1, 10, 20), (0, 1), alphas=ALPHAS[:3], betas=BETAS[1:4])
    drawn = figures.animate(maps, tmp_path / "new" / "film", dpi=50)
    assert drawn["path"] == tmp_path / "new" / "film.gif"
    with Image.open(drawn["path"]) as film:
        assert film.n_frames == 4
        assert film.format == "GIF"
    values = [float(v) for key, m in maps.items() if key[1] == 0 for v in (m.reward.min(), m.reward.max())]
    assert drawn["limits"] == (min(values), max(values))
    assert drawn["steps"] == [0, 1, 10, 20]
    assert drawn["figure"].axes[0].get_title().startswith("step 20")


def test_a_film_that_cannot_be_made_says_what_to_do(tmp_path, monkeypatch):
    maps = run((0, 1))
    monkeypatch.setattr("matplotlib.animation.FFMpegWriter.isAvailable", classmethod(lambda cls: False))
    with pytest.raises(AnalysisError, match="install ffmpeg"):
        figures.animate(maps, tmp_path / "film.mp4", "mp4")
    with pytest.raises(AnalysisError, match="'gif' or 'mp4'"):
        figures.animate(maps, tmp_path / "film", "webm")
    with pytest.raises(AnalysisError, match="no map of slice 7"):
        figures.animate(maps, tmp_path / "film", slice_seed=7)
    empty = {key: m.assign(reward=m.reward * np.nan) for key, m in maps.items()}
    with pytest.raises(AnalysisError, match="not measured at any"):
        figures.animate(empty, tmp_path / "film")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "draw",
    [
        figures.reward_landscape,
        figures.difference_map,
        figures.surrogate_and_reward,
        figures.pass_and_entropy_maps,
        figures.surface,
        figures.kl_reward_scatter,
        figures.landscape_panels,
        lambda data: figures.quantity_map(data, "entropy", contours=True),
    ],
)
def test_inputs_are_left_as_they_were(draw):
    data = make_map()
    data["reward"][0, 0] = np.nan
    before = data.copy(deep=True)
    draw(data)
    xr.testing.assert_identical(data, before)


def test_a_given_axes_is_used():
    for draw in (figures.difference_map, figures.kl_reward_scatter):
        ax = Figure().add_subplot()
        assert draw(make_map(), ax=ax)["ax"] is ax
    ax = Figure().add_subplot(projection="3d")
    assert figures.surface(make_map(), ax=ax)["ax"] is ax
    ax = Figure().add_subplot()
    assert figures.quantity_map(make_map(), "entropy", ax, vmin=0.0, vmax=2.0)["mesh"].get_clim() == (0.0, 2.0)
    assert ax.collections


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.reward_landscape(make_map()),
        lambda: figures.difference_map(make_map()),
        lambda: figures.quantity_map(make_map(betas=np.zeros(1)), "truncated"),
        lambda: figures.landscape_panels(run((0, 1, 10), (0, 1))),
        lambda: figures.landscape_panels(run((0, 1, 10)), shared=True),
        lambda: figures.surrogate_and_reward(make_map()),
        lambda: figures.pass_and_entropy_maps(make_map()),
        lambda: figures.kl_reward_scatter(make_map()),
        lambda: figures.surface(make_map()),
    ],
)
def test_pages_hold_all_their_text_and_embed_its_fonts(draw, tmp_path):
    drawn = draw()
    figure = drawn.get("figure") or drawn["ax"].figure
    # After a single layout, as a plain savefig would leave it.
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert -0.01 <= box.x0 < box.x1 <= width + 0.01
    assert -0.01 <= box.y0 < box.y1 <= height + 0.01
    assert round(float(width), 3) in (figures.COLUMN_INCHES, figures.PAGE_INCHES)
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 6
    pdf, png = figures.save_figure(figure, tmp_path / "figure")
    assert b"/FontFile2" in pdf.read_bytes()
    assert b"/Type3" not in pdf.read_bytes()
    with Image.open(png) as image:
        np.testing.assert_allclose(image.size, [300 * width, 300 * height], atol=1.5)
