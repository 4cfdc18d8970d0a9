"""Sweeps and training that report to W&B or trackio: what is sent, and that a failing service ends nothing."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sqlite3
import sys
import time
from types import SimpleNamespace

import pytest
import xarray as xr
from conftest import start_fake_sweep

from rlvr_landscape_plugin.config import SweepConfig, TrainConfig, digest
from rlvr_landscape_plugin.errors import ConfigurationError
from rlvr_landscape_plugin.tracking import Guard, project_of, require

SERVICE = """
import json
from pathlib import Path

FAILS = {fails!r}
SEEN = Path(__file__).with_name("seen.jsonl")

def note(kind, values):
    with SEEN.open("a") as file:
        file.write(json.dumps([kind, values], default=str) + "\\n")
    if FAILS == kind or FAILS == "third" and kind == "log" and SEEN.read_text().count('"log"') == 3:
        raise SystemExit("no network") if kind == "init" else RuntimeError("no network")

class Run:
    def log(self, values):
        note("log", values)
    def finish(self):
        note("finish", {{}})

def init(**options):
    note("init", options)
    return Run()
"""
"""A package with the interface that W&B and trackio share."""


@pytest.fixture
def service(tmp_path, monkeypatch):
    """`seen = service("wandb", fails="init")`: a package of that name; `seen()` is what it was called with."""

    def install(name, fails=None):
        (tmp_path / "site").mkdir(exist_ok=True)
        (tmp_path / "site" / f"{name}.py").write_text(SERVICE.format(fails=fails))
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        seen = tmp_path / "site" / "seen.jsonl"
        return lambda: [json.loads(line) for line in seen.read_text().splitlines()]

    yield install
    for name in ("wandb", "trackio"):
        if getattr(sys.modules.get(name), "SEEN", None):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_each_point_is_sent_under_the_name_of_its_slice(sweep_here, fake_server, service, tmp_path, name):
    seen = service(name)
    code, said = sweep_here(fake_server, "--log", name, "--log-project", "mine")
    assert code == 0, said
    (_, options), *sent, (last, _) = seen()
    assert (options["project"], options["name"], options["group"]) == ("mine", "out", "out")
    assert options["config"]["grid"]["alpha"]["points"] == 2
    assert last == "finish"
    assert [kind for kind, _ in sent] == ["log"] * 12
    with xr.open_dataset(tmp_path / "out" / "landscape_step000000_slice0.nc") as data:
        for _, values in sent:
            at = {axis: values[f"step000000_slice0/{axis}"] for axis in ("alpha", "beta")}
            there = data.sel(at, method="nearest", tolerance=1e-9)
            assert values["step000000_slice0/reward"] == pytest.approx(float(there.reward.mean()), rel=1e-5)
            assert values["step000000_slice0/kl_nat"] == pytest.approx(float(there.kl_k1.mean()), rel=1e-5)
            assert values["step000000_slice0/distance"] == pytest.approx(math.hypot(at["alpha"], at["beta"]))
    assert [values["step000000_slice0/points_done"] for _, values in sent] == list(range(1, 13))


@pytest.mark.parametrize("fails", ["init", "third", "finish"])
def test_a_service_that_fails_is_named_once_and_ends_nothing(sweep_here, fake_server, service, tmp_path, fails):
    seen = service("trackio", fails)
    code, said = sweep_here(fake_server, "--log", "trackio")
    assert code == 0, said
    assert said.count("logging to trackio failed and stops; everything else goes on: no network") == 1
    assert (tmp_path / "out" / "landscape_step000000_slice0.nc").exists()
    assert len(seen()) == {"init": 1, "third": 4, "finish": 14}[fails]


def test_a_service_that_is_not_installed_is_refused_before_anything_is_measured(sweep_here, fake_server, monkeypatch):
    find = importlib.util.find_spec
    absent = ("wandb", "trackio")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    code, said = sweep_here(fake_server, "--log", "wandb")
    assert code == 2
    assert "log = 'wandb' needs the package wandb: pip install 'rlvr-landscape[wandb]'" in said
    assert not fake_server.asked
    with pytest.raises(ConfigurationError, match="trackio"):
        require("trackio")
    require(None)


def test_where_a_run_is_shown_is_no_part_of_its_identity():
    for kind in (SweepConfig, TrainConfig):
        plain, watched = kind(), kind(log="wandb", log_project="mine")
        assert digest(plain.provenance()) == digest(watched.provenance())


def test_the_project_is_the_given_one_or_the_service_s_own(monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert project_of("wandb", None) == "rlvr-landscape"
    monkeypatch.setenv("WANDB_PROJECT", "lab")
    assert project_of("wandb", None) == "lab"
    assert project_of("wandb", "mine") == "mine"
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    assert project_of("trackio", None) == "rlvr-landscape"


def test_a_guard_calls_nothing_after_the_first_failure():
    said, calls = [], []
    guard = Guard("wandb", said.append)
    assert guard(len, "abc") == 3
    assert guard(lambda: 1 / 0) is None
    assert guard(calls.append, 1) is None
    assert (calls, len(said)) == ([], 1)


def needs(name):
    return pytest.importorskip(name, reason=f"the extra `{name}` is not installed")


@pytest.mark.slow
def test_wandb_offline(sweep_here, fake_server, tmp_path, monkeypatch):
    needs("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    code, said = sweep_here(fake_server, "--log", "wandb")
    assert code == 0, said
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    # W&B's own process writes the file; on a busy machine it is late.
    deadline = time.monotonic() + 60
    while (content := run.read_bytes()).count(b"step000000_slice0/kl_nat") < 12 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert content.count(b"step000000_slice0/kl_nat") >= 12, said
    assert b"rlvr-landscape" in content


@pytest.mark.slow
def test_trackio_on_this_machine(sweep_command, fake_server, tmp_path, monkeypatch):
    needs("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read once, when trackio is imported
    process = start_fake_sweep(sweep_command(fake_server, "--log", "trackio"))
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, out + err
    sent = trackio_values(tmp_path)
    assert len(sent) == 12
    assert {round(values["step000000_slice0/alpha"], 6) for values in sent} == {-0.1, 0.0, 0.15}


def trackio_values(folder):
    (file,) = folder.rglob("rlvr-landscape.db")
    with sqlite3.connect(file) as database:
        return [json.loads(text) for (text,) in database.execute("select metrics from metrics order by id")]


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_training_reports_as_trl_does_and_goes_on_when_the_service_fails(tmp_path, monkeypatch, fails):
    trackio = needs("trackio")
    pytest.importorskip("trl", reason="training needs the extra `train`")
    import torch
    from toy_rollouts import Sampler
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlvr_landscape_plugin.snapshot import open_snapshot
    from rlvr_landscape_plugin.trl.trainer import make_trainer

    sent, said, lines = [], [], []

    def log(values, *_, **__):
        if fails:
            raise RuntimeError("no network")
        sent.append(values)

    monkeypatch.setattr(trackio, "log", log)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "")
    config = TrainConfig.model_validate(
        {
            "output": tmp_path / "mine",
            "log": "trackio",
            "steps": 2,
            "snapshots": "0",
            "env": {"num_tasks": 6, "tasks_per_batch": 2, "rollouts": 4},
            "optimizer": {"name": "adamw", "lr": 1e-5},
            "monitor_rollouts": 3,
        }
    )
    path = str(open_snapshot("tiny-sorter").path)
    model, base = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for _ in range(2))
    hooks = SimpleNamespace(
        metrics=lambda step, record: lines.append(record),
        evaluate=lambda step: 0.25 if step == 2 else None,
        say=said.append,
        saved=lambda step, folder: None,
        episode=lambda: None,
        wants_state=lambda step: False,
    )
    practice = SimpleNamespace(tasks=range(6))
    tokenizer = AutoTokenizer.from_pretrained(path)
    make_trainer(config, model, base, tokenizer, Sampler(), practice, tmp_path / "state", hooks).train()
    assert len(lines) == 2
    if fails:
        assert [text for text in said if "logging to trackio failed" in text] == said
        assert len(said) == 1
        return
    steps = [values for values in sent if "train/kl_base" in values]
    assert [values["train/kl_previous"] for values in steps] == [record["kl_previous"] for record in lines]
    assert steps[0]["train/grad_norm"] == lines[0]["grad_norm"]
    assert [values["eval/reward"] for values in sent if "eval/reward" in values] == [0.25]
