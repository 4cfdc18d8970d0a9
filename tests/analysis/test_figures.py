"""Figures: the right number in the right place, nothing hidden, nothing shown."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import xarray as xr
from rlvr_landscape_analysis import (
    difference_from_origin,
    new_figure,
    open_landscape,
    point_mean,
    reward_landscape,
    save_figure,
)
from rlvr_landscape_analysis.__main__ import main
from rlvr_landscape_analysis.figures.image import kl_levels

FULL = ("alpha", "beta", "prompt", "rollout")
ALPHAS = np.array([-0.1, 0.0, 0.05, 0.2])
BETAS = np.array([-0.3, 0.0, 0.1])


def synthetic(alphas=ALPHAS, betas=BETAS, prompts=24, rollouts=4, noise=0.02, seed=0):
    """A peak at the origin that falls faster along β than along α, with a KL that grows to match."""
    rng = np.random.default_rng(seed)
    a, b = np.meshgrid(alphas, betas, indexing="ij")
    distance = (a / 0.2) ** 2 + (b / 0.1) ** 2
    shape = (len(alphas), len(betas), prompts, rollouts)
    reward = 0.5 * np.exp(-distance)[..., None, None] + rng.normal(0, 0.1, (1, 1, prompts, 1))
    reward = reward + rng.normal(0, noise, shape)
    kl = 6 * distance[..., None, None] + rng.normal(0, noise, shape)
    kl[(a == 0) & (b == 0)] = 0
    units = {"reward": "1", "kl_k1": "nat"}
    data = {"reward": reward, "kl_k1": kl}
    return xr.Dataset(
        {k: (FULL, v.astype("f4"), {"units": units[k], "long_name": k}) for k, v in data.items()},
        coords={"alpha": alphas, "beta": betas, "step": 10, "slice_seed": 3},
    )


def test_alpha_is_horizontal_on_a_grid_that_is_neither_square_nor_symmetric():
    data = synthetic()
    drawn = reward_landscape(data)
    mesh, ax = drawn["mesh"], drawn["ax"]
    colours = np.asarray(mesh.get_array()).reshape(len(BETAS), len(ALPHAS))
    expected = data.reward.mean(["prompt", "rollout"])
    for i, alpha in enumerate(ALPHAS):
        for j, beta in enumerate(BETAS):
            assert colours[j, i] == pytest.approx(expected.sel(alpha=alpha, beta=beta).item(), abs=1e-6)
    assert ax.get_xlim()[0] <= ALPHAS[0] < ALPHAS[-1] <= ax.get_xlim()[1]
    assert ax.get_ylim()[0] <= BETAS[0] < BETAS[-1] <= ax.get_ylim()[1]
    assert "α" in ax.get_xlabel()
    assert "β" in ax.get_ylabel()
    assert ax.get_aspect() == 1.0


def test_the_order_of_dimensions_does_not_matter():
    data = synthetic()
    colours = [
        reward_landscape(d)["mesh"].get_array() for d in (data, data.transpose("rollout", "beta", "prompt", ...))
    ]
    np.testing.assert_allclose(colours[0], colours[1], rtol=1e-5)


def test_what_is_drawn_is_labelled():
    drawn = reward_landscape(synthetic())
    assert drawn["colorbar"].ax.get_ylabel() == "mean reward"
    title = drawn["ax"].get_title()
    assert "step 10, slice 3, 24 prompts × 4 rollouts" in title
    assert "lines: KL in nat" in title
    assert drawn["mesh"].get_rasterized()
    assert drawn["mesh"].get_cmap().name == "viridis"
    np.testing.assert_array_equal(np.ravel(drawn["origin"].get_data()), [0, 0])


def test_contours_are_kl_levels_above_zero():
    drawn = reward_landscape(synthetic())
    levels = drawn["contours"].levels
    assert len(levels) >= 3
    assert np.all(levels > 0)


def test_levels_are_1_2_5_down_to_the_nearest_measured_kl():
    kl = np.array([[90.0, 40, 2.4], [30, 0, 2.6], [-0.1, 60, np.nan]])
    assert kl_levels(kl) == [2, 5, 10, 20, 50]
    assert kl_levels(kl, 3) == [10, 20, 50]
    assert kl_levels(kl / 100) == [0.02, 0.05, 0.1, 0.2, 0.5]
    assert kl_levels(np.array([0.0, -1.0, np.nan])) == []
    drawn = reward_landscape(synthetic())
    assert drawn["contours"].levels[0] < 0.1 * drawn["contours"].levels[-1]


@pytest.mark.parametrize("kl", [0.0, -0.01, np.nan])
def test_a_flat_or_noisy_kl_has_no_contours(kl):
    data = synthetic()
    data["kl_k1"] = xr.full_like(data.kl_k1, kl)
    drawn = reward_landscape(data)
    assert drawn["contours"] is None
    assert "KL" not in drawn["ax"].get_title()


def without_effect(seed):
    """Every point has the origin's expected reward."""
    data = synthetic(noise=0.0)
    data["reward"] = data.reward.isel(alpha=1, beta=1, drop=True).broadcast_like(data.reward).transpose(*FULL)
    return data.assign(reward=data.reward + np.random.default_rng(seed).normal(0, 0.05, data.reward.shape))


def test_two_standard_errors_hold_what_they_promise():
    outside = []
    for seed in range(60):
        difference = difference_from_origin(without_effect(seed).reward)
        outside.append(np.abs(difference["mean"]) >= 2 * difference.standard_error)
    rate = np.mean([flags.values[flags.alpha != 0] for flags in outside])
    assert 0.02 < rate < 0.12  # 5.7 % for Student's t with 23 degrees of freedom


def test_dots_mark_the_points_that_cannot_be_told_from_the_origin():
    data = without_effect(seed=1)
    data["reward"][3, 2] += 0.5
    difference = difference_from_origin(data.reward)
    drawn = reward_landscape(data)
    dots = {(float(a), float(b)) for a, b in zip(*drawn["dots"].get_data(), strict=True)}
    expected = {
        (alpha, beta)
        for alpha in ALPHAS
        for beta in BETAS
        if (alpha, beta) != (0.0, 0.0)
        and abs(difference["mean"].sel(alpha=alpha, beta=beta))
        < 2 * difference.standard_error.sel(alpha=alpha, beta=beta)
    }
    assert dots == expected
    assert (0.2, 0.1) not in dots
    assert len(dots) >= 3
    assert "dots: within 2 SE" in drawn["ax"].get_title()


def test_the_difference_from_the_origin_is_paired_over_prompts():
    data = synthetic(noise=0.0)
    paired = difference_from_origin(data.reward)
    alone = point_mean(data.reward)
    assert float(paired.standard_error.max()) < 1e-6 < float(alone.standard_error.min())
    assert float(paired["mean"].sel(alpha=0, beta=0)) == 0
    assert paired["mean"].attrs["units"] == "1"


def test_failed_rollouts_are_left_out():
    data = synthetic()
    data["reward"][0, 0, 0, 0] = np.nan
    assert np.isfinite(point_mean(data.reward)["mean"]).all()
    assert np.isfinite(np.asarray(reward_landscape(data)["mesh"].get_array())).all()


def test_a_given_axes_and_colour_scale_are_used():
    _, ax = new_figure()
    drawn = reward_landscape(synthetic(), ax, vmin=0.0, vmax=1.0)
    assert drawn["ax"] is ax
    assert drawn["mesh"].get_clim() == (0.0, 1.0)


def test_drawing_leaves_global_settings_alone():
    before = dict(matplotlib.rcParams)
    reward_landscape(synthetic())
    assert dict(matplotlib.rcParams) == before


def test_figures_are_saved_for_print(tmp_path):
    data = synthetic()
    figure, ax = new_figure()
    reward_landscape(data, ax)
    pdf, png = save_figure(figure, tmp_path / "new" / "panel.v2")
    assert [path.name for path in (pdf, png)] == ["panel.v2.pdf", "panel.v2.png"]
    assert pdf.read_bytes().startswith(b"%PDF")
    assert b"/Type3" not in pdf.read_bytes()
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_command_draws_every_landscape_of_a_run(tmp_path, capsys):
    for step in (0, 10):
        synthetic().assign_coords(step=step).to_netcdf(tmp_path / f"landscape_step{step:06d}_slice3.nc")
    assert main([str(tmp_path), "--resamples", "100", "--no-animation"]) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = [line.removeprefix("figure ") for line in lines if line.startswith("figure ")]
    assert sorted(printed) == sorted(str(path) for path in (tmp_path / "figures").iterdir())
    assert len(printed) == 4


def test_mistakes_are_named_without_a_traceback(tmp_path, capsys):
    assert main([str(tmp_path / "absent")]) == 2
    assert "absent is not a directory; give the output directory of a sweep" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "holds no finished landscape_step*_slice*.nc" in capsys.readouterr().err
    synthetic().drop_vars("kl_k1").to_netcdf(tmp_path / "landscape_step000000_slice0.nc")
    assert main([str(tmp_path)]) == 2
    assert "it has no kl_k1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is not a landscape dataset"):
        open_landscape(tmp_path / "landscape_step000000_slice0.nc")
