"""A control reward and a training direction are named in every picture, and never mixed with what they are not."""

from __future__ import annotations

import numpy as np
import pytest
from factory import make_analysis, make_map
from rlvr_landscape_analysis import analyse_run
from rlvr_landscape_analysis import figures as drawing
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.report.page import write_report
from rlvr_landscape_analysis.report.pictures import figure_of
from rlvr_landscape_analysis.synthetic import write_run

CONTROL = {"reward_mode": "random"}


def words(ax) -> str:
    """Every text of a figure."""
    import matplotlib.text

    return "\n".join(found.get_text() for found in figure_of(ax).findobj(matplotlib.text.Text))


def test_figures_of_a_control_say_so():
    plain, control = make_map(1, 0), make_map(1, 0)
    control.attrs.update(CONTROL)
    for draw in (drawing.reward_landscape, drawing.kl_reward_scatter):
        assert "random" not in words(draw(plain)["ax"])
        assert "mean random reward (a control)" in words(draw(control)["ax"])
    panels = drawing.landscape_panels({(1, 0): control}, shared=True)
    assert "mean random reward (a control)" in words(panels["panels"][1, 0]["ax"])


def test_axes_along_training_say_so():
    along = make_map(1, 0)
    along.attrs["direction_alpha"] = "displacement, step 10 - step 0; norm 0.99"
    along.attrs["direction_beta"] = "random, seed 0, scaled per tensor"
    text = words(drawing.reward_landscape(along)["ax"])
    assert "displacement, step 10 - step 0: α" in text
    assert "step along η, β" in text


@pytest.mark.slow
def test_a_report_on_a_control_warns_first(tmp_path):
    analysis = make_analysis()
    for values in analysis.maps.values():
        values.attrs.update(CONTROL)
    write_report(analysis, tmp_path, animation=False)
    page = (tmp_path / "report.html").read_text()
    assert "<b>Control.</b> Every reward here is random" in page
    assert page.index("<b>Control.</b>") < page.index('id="claim-')
    write_report(make_analysis(), tmp_path / "plain", animation=False)
    assert "<b>Control.</b>" not in (tmp_path / "plain" / "report.html").read_text()


def relabel(path, **attributes) -> None:
    import netCDF4

    with netCDF4.Dataset(path, "a") as file:
        file.setncatts(attributes)


def test_runs_say_what_was_paid_and_along_what(tmp_path):
    paths = write_run(tmp_path, steps=(0, 1))
    for path in paths:
        relabel(path, reward_mode="inverted", direction_alpha="update, step 1 - step 0; norm 0.1")
    found = analyse_run(tmp_path)
    assert any("Every reward is a control: inverted" in note for note in found.notes)
    assert any("alpha is no random direction (update, step 1 - step 0" in note for note in found.notes)
    assert found.training.attrs["reward_mode"] == "inverted"
    relabel(paths[0], reward_mode="random")
    with pytest.raises(AnalysisError, match=r"paid by different rewards \((random and inverted|inverted and random)\)"):
        analyse_run(tmp_path)


def test_the_distance_in_units_of_training_reaches_the_maps(tmp_path):
    (path,) = write_run(tmp_path, steps=(1,))
    import netCDF4

    with netCDF4.Dataset(path, "a") as file:
        size = (len(file.dimensions["alpha"]), len(file.dimensions["beta"]))
        file.createVariable("displacement_radius", "f8", ("alpha", "beta"))[:] = np.full(size, 3.0)
    (values,) = analyse_run(tmp_path).maps.values()
    assert (values["displacement_radius"] == 3.0).all()
