"""A whole sweep by its command: episodes that fail are shown, kept and counted; if all of them fail, it ends."""

from __future__ import annotations

import json

import numpy as np
import rlvr_landscape_analysis
import xarray as xr

FAULTY = ("--env.id", "faulty-quiz", "--env.taskset")


def test_a_sweep_in_which_every_episode_fails_ends_at_its_first_batch(sweep_here, fake_server, tmp_path):
    code, said = sweep_here(fake_server, *FAULTY, json.dumps({"fault": "raises", "from_task": 0}))
    assert code == 2
    assert "every one of 12 episodes of the checkpoint's own batch failed; the first one:" in said
    assert "no answer in this row" in said
    assert not list((tmp_path / "out").glob("*.nc"))
    assert not list((tmp_path / "out").rglob("points/*.nc"))


def test_some_failures_are_shown_and_kept_in_dataset_and_traces(sweep_here, fake_server, tmp_path):
    given = json.dumps({"fault": "raises", "from_task": 3})
    code, said = sweep_here(fake_server, "--save-traces", "true", *FAULTY, given)
    assert code == 0, said
    assert "the checkpoint's own batch: 3 of 12 episodes failed; the first one:" in said
    assert said.count("3 of 12 episodes failed") == 13
    (path,) = (tmp_path / "out").glob("landscape_*.nc")
    with xr.open_dataset(path) as data:
        data.load()
    assert (data["status"].values[..., 3, :] == 2).all()
    assert data["reward"].isel(prompt=3).isnull().all()
    assert data["reward"].isel(prompt=slice(3)).notnull().all()
    assert data["metric_words"].isel(prompt=3).isnull().all()
    assert data["metric_words"].isel(prompt=slice(3)).notnull().all()
    files = list((tmp_path / "out").rglob("traces/*.jsonl"))
    assert len(files) == 12
    traces = [json.loads(line) for line in files[0].read_text().splitlines()]
    failed = [trace for trace in traces if trace["errors"]]
    assert len(failed) == 3
    assert all("no answer in this row" in trace["errors"][0]["message"] for trace in failed)


def test_a_sweep_draws_another_objective_and_says_so(sweep_here, fake_server, tmp_path):
    code, said = sweep_here(fake_server, "--surrogate.objective", "gspo", "--surrogate.options", '{"clip_low": 0.1}')
    assert code == 0, said
    (path,) = (tmp_path / "out").glob("landscape_*.nc")
    with xr.open_dataset(path) as data:
        data.load()
    assert json.loads(data.attrs["configuration"])["surrogate"]["objective"] == "gspo"
    assert "gspo" in data["surrogate"].attrs["long_name"]
    assert "surrogate_weight" in data["surrogate"].attrs["comment"]
    np.testing.assert_array_equal(data["surrogate_weight"], 1.0)
    mean = rlvr_landscape_analysis.surrogate(data)["mean"]
    np.testing.assert_allclose(mean, data["surrogate"].astype("f8").mean(("prompt", "rollout")), rtol=1e-12, atol=1e-12)
