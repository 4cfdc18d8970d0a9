"""What a sweep costs, told before it starts: compared with the formula of docs/scaling.md and with real sweeps."""

from __future__ import annotations

import json
import shutil

import pytest
import xarray as xr
from conftest import ROOT

from rlvr_landscape_plugin.cli import main
from rlvr_landscape_plugin.config import SweepConfig, load_config
from rlvr_landscape_plugin.errors import ConfigurationError
from rlvr_landscape_plugin.snapshot import SHIPPED
from rlvr_landscape_plugin.sweep import probe
from rlvr_landscape_plugin.sweep.cost import cost_of, dry_run_report, points_of

POLICY = SHIPPED["tiny-sorter"]


def test_the_published_size_has_the_tokens_of_the_formula():
    config = load_config(["@", str(ROOT / "configs" / "sweep" / "paper.toml")], SweepConfig)
    cost = cost_of(config, snapshots=1)
    episodes = (441 + 1) * 1024 * 16
    sampled, conversation = 300, 600
    assert (cost.played, cost.scored) == (episodes, episodes)
    assert cost.tokens == episodes * (sampled + (conversation + conversation - sampled))
    assert f"{cost.tokens:.2e}" == "8.69e+09"


@pytest.mark.parametrize(
    ("options", "points"),
    [
        ({"grid": {"alpha": {"points": 3}, "beta": {"points": 5}}, "slice": {"seeds": [1, 2]}}, 15),
        ({"design": "census", "census": {"pairs": 3, "radii": [1, 2]}}, 12),
        ({"design": "path", "path": {"positions": [-1, 0, 1]}}, 3),
        ({"design": "boundary"}, 0),
    ],
    ids=["grid", "census", "path", "boundary"],
)
def test_every_episode_and_conversation_is_counted(options, points):
    config = SweepConfig.model_validate(options | {"env": {"num_prompts": 5, "rollouts": 2, "base_rollouts": 7}})
    played = scored = 0
    for _snapshot in range(3):
        for _slice in config.slice.seeds:
            own = [(task, completion) for task in range(5) for completion in range(7)]
            played += len(own)
            scored += len(own)
            for _point in range(points):
                played += 5 * 2
                scored += len(own)
    cost = cost_of(config, snapshots=3)
    assert (cost.points, cost.played, cost.scored) == (points, played, scored)
    assert cost.datasets == 3 * len(config.slice.seeds)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweep").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_has_a_cost(path):
    if path.stem == "slurm":
        pytest.skip("it only adds the cluster's table")
    config = load_config(["@", str(path)], SweepConfig)
    assert points_of(config)[0] in dry_run_report(config, [])


def test_a_dry_run_is_about_ten_lines(capsys):
    assert main(["sweep", "--server.token", "secret", "--rate", "64", "--dry-run"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) <= 10
    assert lines[0] == f"snapshot    step 0: {POLICY}"
    assert "7 × 7 = 49 points, 1 dataset (1 snapshot)" in said.out
    assert "episodes    6,400" in said.out
    assert f"1 min {6400 / 64 - 60:.0f} s at 64 episodes/s, as given" in said.out
    assert said.err == "next: the same command without --dry-run\n"
    assert main(["sweep", "--server.token", "secret", "--show-config", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert json.JSONDecoder().raw_decode(out)[0]["grid"]["alpha"]["points"] == 7
    assert "not known; give the rate" in out
    assert "secret" not in out


def test_everything_that_is_missing_is_named_and_ends_with_code_2(tmp_path, capsys):
    file, run = str(tmp_path / "gradient.safetensors"), str(tmp_path / "run")
    arguments = ["--snapshots", str(tmp_path / "a"), "tiny-sorter", str(tmp_path / "b"), "--slice.run", run]
    arguments += ["--slice.alpha.kind", "file", "--slice.alpha.file", file]
    assert main(["sweep", *arguments, "--dry-run"]) == 2
    said = capsys.readouterr()
    for name in (str(tmp_path / "a"), str(tmp_path / "b"), run, file):
        assert said.err.count(f"'{name}'") == 1
    assert str(POLICY) not in said.err
    assert f"snapshot    step 0: {POLICY}" in said.out
    assert "3 datasets (3 snapshots)" in said.out
    assert "Traceback" not in said.err


def test_many_snapshots_take_two_lines(tmp_path, capsys):
    for step in range(6):
        shutil.copytree(POLICY, tmp_path / f"step_{step:06d}")
    assert main(["sweep", "--snapshots", f"{tmp_path}/step_*", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "snapshots   6 found: steps 0, 1, 2, 3, 4, 5" in out
    assert len(out.splitlines()) <= 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "3"], "add --dry-run"),
        (["--probe"], "add --dry-run"),
        (["--show-config"], "add --dry-run"),
        (["--rate", "3", "--probe", "--dry-run"], "leave one of them out"),
        (["--rate", "0", "--dry-run"], "greater than 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_of_a_dry_run_need_one(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        load_config(arguments, SweepConfig)


def test_a_probe_measures_what_the_sweep_will_do_and_keeps_nothing(sweep_here, fake_server, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 0.5)
    code, said = sweep_here(fake_server, "--dry-run", "--probe")
    assert code == 0, said
    assert not (tmp_path / "out").exists()
    assert "as the probe measured" in said
    assert "with 1 server" in said
    code, _ = sweep_here(fake_server)
    assert code == 0
    journal = tmp_path / "out" / "step000000_slice0"
    with xr.open_dataset(journal / "base.nc") as base:
        episodes = base["base_reward"].size
        sampled, conversation = int(base["token_sampled"].sum()) / episodes, base.sizes["token"] / episodes
    assert f"{conversation:,.0f} tokens each, {sampled:,.0f} of them sampled" in said
    files = [*journal.glob("points/*.nc"), journal / "base.nc", tmp_path / "out" / f"landscape_{journal.name}.nc"]
    real = sum(path.stat().st_size for path in files)
    config = SweepConfig.model_validate(
        {"grid": {"alpha": {"points": 3}, "beta": {"points": 4}}, "env": {"num_prompts": 4, "rollouts": 3}}
    )
    assert cost_of(config, 1).points in (12, 15)
    assert 0.5 < cost_of(config, 1).bytes / real < 2
