"""A taskset's metrics: every one a variable, missing where a point or a rollout had none, read by the analysis."""

from __future__ import annotations

import numpy as np
import pytest
import rlvr_landscape_analysis
import xarray as xr
from rlvr_landscape_analysis.schema import SCHEMA, metric_name, variable_of
from store.test_store import ALPHAS, BETAS, CELL, PROMPTS, ROLLOUTS, base_batch, journal_at, point, recheck, tasks

from rlvr_landscape_plugin.episodes import ERROR, OK, Rollout
from rlvr_landscape_plugin.errors import StoreError, TasksetError
from rlvr_landscape_plugin.store import consolidate
from rlvr_landscape_plugin.sweep.point import _metrics


def test_a_metric_has_a_name_that_netcdf_takes():
    assert metric_name("format_failure") == "format_failure"
    assert metric_name("pass/at 1 (strict)") == "metric_pass_at_1_strict_"
    assert variable_of("reward") is SCHEMA["reward"]
    assert variable_of("no_such_variable") is None
    found = variable_of("metric_words")
    assert found is not None
    assert found.dims(("alpha", "beta")) == ("alpha", "beta", "prompt", "rollout")


def test_rollouts_without_a_metric_are_missing():
    one, other = Rollout(1.0, OK, [], metrics={"words": 3.0}), Rollout(1.0, OK, [], metrics={"a b": 2.0, "words": 1.0})
    failed = Rollout(float("nan"), ERROR, [], "broken")
    found = _metrics([[one, other], [failed, other]])
    assert sorted(found) == ["metric_a_b", "metric_words"]
    np.testing.assert_array_equal(found["metric_words"][1], [[3, 1], [np.nan, 1]])
    np.testing.assert_array_equal(found["metric_a_b"][1], [[np.nan, 2], [np.nan, 2]])


def test_a_failed_rollout_takes_no_metric_away_from_the_others():
    kept = Rollout(1.0, OK, [], metrics={"format_failure": 0.5})
    found = _metrics([[kept, Rollout(float("nan"), ERROR, [], "broken")]])
    np.testing.assert_array_equal(found["format_failure"][1], [[0.5, np.nan]])


def test_two_metrics_of_one_name_are_an_error():
    with pytest.raises(TasksetError, match="'a b' and 'a_b' would both be the variable 'metric_a_b'"):
        _metrics([[Rollout(1.0, OK, [], metrics={"a b": 1.0, "a_b": 2.0})]])


def test_a_journal_keeps_metrics_that_only_some_points_and_portions_have(tmp_path):
    journal = journal_at(tmp_path / "run")
    journal.write_base(base_batch())
    values = np.arange(PROMPTS * ROLLOUTS, dtype=float).reshape(PROMPTS, ROLLOUTS)
    for place in np.ndindex(len(ALPHAS), len(BETAS)):
        data = point(*place)
        if place == (1, 2):
            # Two portions, of which only the second has the metric.
            journal.write_point(place, data.isel(prompt=slice(0, 2)), tasks(0, 2))
            rest = data.assign(metric_late=(CELL, values)).isel(prompt=slice(2, PROMPTS))
            journal.write_point(place, rest, tasks(2, PROMPTS))
            continue
        journal.write_point(place, data.assign(metric_words=(CELL, values + 100 * place[0])))
    journal.write_recheck(recheck())
    out = consolidate(journal, tmp_path / "landscape_step000000_slice0.nc", {})
    with xr.open_dataset(out) as data:
        data.load()
    assert data["metric_words"].dims == ("alpha", "beta", "prompt", "rollout")
    assert data["metric_words"].attrs["long_name"] == "metric 'words' of a fresh rollout"
    np.testing.assert_array_equal(data["metric_words"].values[2, 1], values + 200)
    assert data["metric_words"].isel(alpha=1, beta=2).isnull().all()
    late = data["metric_late"].isel(alpha=1, beta=2).values
    assert np.isnan(late[:2]).all()
    np.testing.assert_array_equal(late[2:], values[2:])
    assert int(data["metric_late"].notnull().sum()) == (PROMPTS - 2) * ROLLOUTS
    reduced = rlvr_landscape_analysis.per_prompt(data)
    np.testing.assert_allclose(reduced["metric_words"].values[0, 0], values.mean(axis=1))


def test_a_metric_of_another_shape_is_refused(tmp_path):
    journal = journal_at(tmp_path / "run")
    journal.write_base(base_batch())
    with pytest.raises(StoreError, match=r"'metric_words' has dims \('prompt',\)"):
        journal.write_point((0, 0), point(0, 0).assign(metric_words=("prompt", np.zeros(PROMPTS))))
    with pytest.raises(StoreError, match="the schema does not know: words"):
        journal.write_point((0, 0), point(0, 0).assign(words=(CELL, np.zeros((PROMPTS, ROLLOUTS)))))
