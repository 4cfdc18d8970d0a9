"""`--follow`: snapshots of a run that goes on are measured as they appear; what cannot be followed is refused."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from toy_run import make_run

from rlvr_landscape_plugin.config import SweepConfig
from rlvr_landscape_plugin.prime_rl.adapter import LossKwargs
from rlvr_landscape_plugin.snapshot import Manifest, open_snapshot, write_snapshot
from rlvr_landscape_plugin.sweep import follow

PRIME_RL = {"trainer": {"max_steps": 4, "loss": {"kwargs": {"snapshots": "0, 2, 4, 6"}}}}
SMALL = ["--grid.alpha.points", "2", "--grid.beta.points", "2", "--env.num_prompts", "2"]


@pytest.fixture
def steps(tmp_path: Path) -> Any:
    """`steps(run, step)` puts a whole snapshot of that step into a run's directory, as the trainer does."""
    made = make_run(tmp_path / "made", {0: 0.0, 2: 0.01, 4: 0.04})

    def publish(run: Path, step: int, configuration: Any = PRIME_RL) -> Path:
        def fill(folder: Path) -> None:
            for file in made[step].iterdir():
                if file.name != "manifest.json":
                    shutil.copy(file, folder / file.name)

        return write_snapshot(run / "snapshots", Manifest(step=step, run="r", configuration=configuration), fill)

    return publish


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "EVERY", 0.1)


def test_each_snapshot_is_measured_as_it_appears(sweep_here, fake_server, steps, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    seen: list[int] = []

    def train() -> None:
        for step in (0, 2, 4):
            time.sleep(0.3)
            steps(run, step)
            while not list(out.glob(f"*step{step:06d}*.nc")):  # it does not wait for the run to end
                time.sleep(0.05)
            seen.append(step)

    trainer = threading.Thread(target=train, daemon=True)
    trainer.start()
    code, said = sweep_here(fake_server, *SMALL, "--follow", str(run), "--follow-patience", "60")
    trainer.join(30)
    assert code == 0, said
    assert seen == [0, 2, 4]
    assert "following" in said
    assert "3 snapshots, steps 0, 2, 4" in said  # step 6 lies behind the run's last
    datasets = sorted(out.glob("*.nc"))
    assert len(datasets) == 3

    plain = tmp_path / "plain"
    every = json.dumps([str(run / "snapshots" / f"step_{step:06d}") for step in (0, 2, 4)])
    code, said = sweep_here(fake_server, *SMALL, "--snapshots", every, "--output", str(plain))
    assert code == 0, said
    for dataset in datasets:
        with xr.open_dataset(dataset) as followed, xr.open_dataset(plain / dataset.name) as joint:
            xr.testing.assert_equal(followed["reward"], joint["reward"])
            assert followed.attrs["snapshot_sha256"] == joint.attrs["snapshot_sha256"]


def test_following_is_no_part_of_what_determines_the_numbers(tmp_path):
    plain = SweepConfig().provenance()
    assert SweepConfig(follow=tmp_path, follow_patience=1).provenance() == plain


def test_the_same_command_continues_and_a_failed_step_is_not_waited_for(sweep_here, fake_server, steps, tmp_path):
    run = tmp_path / "run"
    steps(run, 0)
    steps(run, 2)
    code, said = sweep_here(fake_server, *SMALL, "--follow", str(run), "--follow-patience", "0.5")
    assert code == 2
    assert "had no new snapshot for 0.5 s (follow_patience); steps 4 are missing" in said
    loads = fake_server.asked["load"]
    (run / "snapshots" / "failures.jsonl").write_text('{"step": 4, "error": "full"}\n{"step": 4')
    code, said = sweep_here(fake_server, *SMALL, "--follow", str(run), "--follow-patience", "0.5")
    assert code == 0, said
    assert fake_server.asked["load"] == loads  # nothing was measured again
    assert "could not keep the snapshots of steps 4" in said


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--shard", "1/2"], "shards would each wait"),
        (["--design", "census"], "only 'grid' can be followed"),
        (["--slice.alpha.kind", "displacement"], "only random ones can be followed"),
        (["--dry-run"], "name one snapshot instead"),
    ],
)
def test_what_cannot_be_followed_is_refused(sweep_here, fake_server, tmp_path, given, reason):
    config = '[env]\nid = "tiny-quiz"\nnum_prompts = 2\nrollouts = 2\n'
    code, said = sweep_here(fake_server, *given, "--follow", str(tmp_path), config=config)
    assert code != 0
    assert reason in said
    assert "Traceback" not in said


def test_a_directory_without_snapshots_and_unfinished_ones_are_refused(sweep_here, fake_server, steps, tmp_path):
    code, said = sweep_here(fake_server, "--follow", str(tmp_path / "none"), "--follow-patience", "0.3")
    assert code == 2
    assert "is this the directory of a run?" in said
    unfinished = steps(tmp_path / "run", 0)
    (unfinished / "manifest.json").unlink()
    code, said = sweep_here(fake_server, "--follow", str(tmp_path / "run"))
    assert code == 2
    assert "nothing tells whether it is whole yet" in said


def test_schedules_of_both_trainers(steps, tmp_path):
    default = {"trainer": {"max_steps": 25, "loss": {"kwargs": {}}}}
    text = LossKwargs().snapshots
    assert text == follow._PRIME_RL_DEFAULT
    read = follow.scheduled_steps
    assert read(open_snapshot(steps(tmp_path / "a", 0, default))) == {*range(11), 20}
    assert read(open_snapshot(steps(tmp_path / "b", 0, {"snapshots": "0-4:2", "steps": 2}))) == {0, 2}
    with pytest.raises(Exception, match="does not tell the run's schedule"):
        read(open_snapshot(steps(tmp_path / "c", 0, {"snapshots": None})))
