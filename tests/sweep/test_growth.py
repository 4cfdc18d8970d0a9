"""Sweeps that grow: what was measured stays bit for bit, and the result is that of one that asked for all at once."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from conftest import FAKE_TOKEN, HELPERS, start_fake_sweep
from fake_server import Cut, FakeServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_run import make_run

NAME = "step000000_slice0"
QUIZ = """
snapshots = ["tiny-sorter"]
[grid.alpha]
min = -0.1
max = 0.1
[grid.beta]
min = -0.1
max = 0.1
[env]
id = "tiny-quiz"
taskset = { count = 64 }
[sampling]
max_tokens = 6
"""
CIRCUMSTANCES = {"seconds_move", "seconds_sample", "seconds_score"}
GROUP = {
    "surrogate",
    "clip_fraction",
    "base_advantage",
    "surrogate_weight",
    "recheck_logprob",
    "recheck_max_difference",
}
"""Variables that more rollouts of a task change, and those of the last look at the origin."""


def amounts(points: int, prompts: int, rollouts: int, **more: Any) -> list[str]:
    """Arguments of a sweep of points × points policies."""
    given = {
        "grid.alpha.points": points,
        "grid.beta.points": points,
        "env.num-prompts": prompts,
        "env.rollouts": rollouts,
    }
    return [text for key, value in (given | more).items() for text in (f"--{key}", str(value))]


def opened(output: Path, name: str = f"landscape_{NAME}.nc") -> xr.Dataset:
    with xr.open_dataset(output / name, engine="netcdf4") as data:
        return data.load()


def measured(folder: Path) -> dict[Path, bytes]:
    """Every file of a sweep with its content, but the signs of life of its processes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if not path.name.startswith("process_")}


def assert_equal(data: xr.Dataset, other: xr.Dataset, without: set[str] = CIRCUMSTANCES) -> None:
    """Every variable and coordinate is the same, bit for bit."""
    assert set(data.variables) == set(other.variables)
    for name in set(data.variables) - without:
        assert data[name].dims == other[name].dims, name
        assert data[name].dtype == other[name].dtype, name
        assert data[name].values.tobytes() == other[name].values.tobytes(), name


def assert_contains(data: xr.Dataset, old: xr.Dataset) -> None:
    """What the old dataset holds is part of the new one, bit for bit."""
    counts = {dim: range(old.sizes[dim]) for dim in ("prompt", "rollout", "base_rollout") if dim in old.dims}
    frame = [dim for dim in old.dims if dim not in counts]
    part = data.sel({dim: old[dim] for dim in frame}).isel(counts)
    same = data.sizes.get("base_rollout", data.sizes.get("rollout")) == old.sizes.get(
        "base_rollout", old.sizes.get("rollout")
    )
    assert_equal(part, old, CIRCUMSTANCES | (set() if same else GROUP))


@pytest.fixture
def grow(sweep_here, tmp_path):
    """`grow(server, *arguments)` runs the sweep, which must succeed, and returns its dataset."""

    def run(server: FakeServer, *given: Any, config: str = QUIZ, output: Path | None = None) -> xr.Dataset:
        code, said = sweep_here(server, *given, config=config, output=output)
        assert code == 0, said
        return opened(output or tmp_path / "out")

    return run


STEPS = {
    "finer grid": pytest.param((amounts(5, 2, 2), amounts(9, 2, 2)), marks=pytest.mark.slow),
    "more prompts": (amounts(2, 32, 2), amounts(2, 64, 2)),
    "more rollouts": (amounts(3, 4, 2), amounts(3, 4, 4)),
    "all of it": (amounts(3, 4, 2), amounts(5, 8, 4)),
    "twice": (amounts(3, 4, 2), amounts(5, 6, 2), amounts(5, 8, 3)),
    "own rollouts": (amounts(3, 3, 2, **{"env.base-rollouts": 3}), amounts(3, 4, 2, **{"env.base-rollouts": 5})),
    "other rollouts": (amounts(3, 3, 2, **{"env.base-rollouts": 3}), amounts(3, 3, 4, **{"env.base-rollouts": 3})),
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_a_grown_sweep_is_the_sweep_that_asked_for_everything(grow, fake_server, tmp_path, steps):
    old = None
    for arguments in steps:
        data = grow(fake_server, *arguments)
        if old is not None:
            assert_contains(data, old)
        old = data
    assert_equal(data, grow(fake_server, *steps[-1], output=tmp_path / "at once"))
    assert len(data.attrs["history"].splitlines()) == len(steps)


@pytest.mark.parametrize(
    "objective",
    [
        ["--surrogate.objective", "dapo"],
        ["--surrogate.objective", "grpo_n", "--surrogate.options", '{"normaliser": "kept"}'],
        ["--surrogate.objective", "kl_cov", "--surrogate.options", '{"share": 0.1}'],
        ["--surrogate.objective", "clip_cov", "--surrogate.options", '{"share": 0.2, "low": 0.0}'],
    ],
    ids=lambda given: given[1],
)
def test_objectives_that_depend_on_more_than_a_completion_are_computed_again(grow, fake_server, tmp_path, objective):
    grow(fake_server, *amounts(3, 3, 2), *objective)
    middle = grow(fake_server, *amounts(3, 5, 2), *objective)
    data = grow(fake_server, *amounts(3, 5, 3), *objective)
    assert_contains(data, middle)
    at_once = grow(fake_server, *amounts(3, 5, 3), *objective, output=tmp_path / "at once")
    # Rows of another length are padded otherwise, which rounds sums over tokens otherwise.
    loose = {"surrogate", "clip_fraction", "surrogate_weight"}
    assert_equal(data, at_once, CIRCUMSTANCES | loose)
    for name in loose:
        np.testing.assert_allclose(data[name], at_once[name], rtol=1e-6, atol=1e-7)


def count_episodes(server: FakeServer) -> list[int]:
    """Counts the turns that a server is asked for."""
    turns = [0]
    generate = server._generate

    async def counted(body: bytes) -> Any:
        answers = await generate(body)
        turns[0] += len(answers)
        return answers

    server._generate = counted
    return turns


def test_nothing_is_sampled_twice(sweep_here, tmp_path):
    server = FakeServer()
    turns = count_episodes(server)
    with server:
        assert sweep_here(server, *amounts(3, 4, 2), config=QUIZ)[0] == 0
        assert turns[0] == 4 * 2 * (9 + 1)
        assert sweep_here(server, *amounts(5, 6, 3), config=QUIZ)[0] == 0
        assert turns[0] == 6 * 3 * (25 + 1)


def test_more_snapshots_leave_the_others_untouched(grow, fake_server, tmp_path):
    paths = list(make_run(tmp_path / "run", {0: 0.0, 1: 0.01, 2: 0.02}).values())
    config = QUIZ.replace('["tiny-sorter"]', json.dumps([str(paths[0])]))
    grow(fake_server, *amounts(3, 3, 2), config=config)
    before = measured(tmp_path / "out")
    config = QUIZ.replace('["tiny-sorter"]', json.dumps([str(path) for path in paths]))
    grow(fake_server, *amounts(3, 3, 2), config=config)
    assert all(path.read_bytes() == content for path, content in before.items())
    grow(fake_server, *amounts(3, 3, 2), config=config, output=tmp_path / "at once")
    for step in range(3):
        name = f"landscape_step{step:06d}_slice0.nc"
        assert_equal(opened(tmp_path / "out", name), opened(tmp_path / "at once", name))


def test_growth_may_be_shared_by_shards(grow, sweep_here, fake_server, tmp_path):
    old = grow(fake_server, *amounts(3, 4, 2))
    code, said = sweep_here(fake_server, *amounts(5, 6, 3), "--shard", "2/2", config=QUIZ)
    assert code == 0
    assert "left to the shard that finishes last" in said
    xr.testing.assert_identical(opened(tmp_path / "out"), old)
    data = grow(fake_server, *amounts(5, 6, 3), "--shard", "1/2")
    assert_contains(data, old)
    assert_equal(data, grow(fake_server, *amounts(5, 6, 3), output=tmp_path / "at once"))


def test_conversations_are_kept_for_every_rollout_once(grow, fake_server, tmp_path):
    grow(fake_server, *amounts(3, 3, 2), "--save-traces")
    before = {path: path.read_bytes() for path in (tmp_path / "out" / NAME / "traces").iterdir()}
    data = grow(fake_server, *amounts(3, 4, 3), "--save-traces")
    traces = [path for path in (tmp_path / "out" / NAME / "traces").iterdir()]
    assert all(path.read_bytes() == content for path, content in before.items())
    lines = [json.loads(line) for path in traces if path.name.startswith("a000_b000") for line in path.open()]
    assert len(lines) == 4 * 3
    rewards = [line["rewards"]["length"]["score"] * line["rewards"]["length"]["weight"] for line in lines]
    assert sorted(rewards) == pytest.approx(sorted(data.reward[0, 0].values.ravel().tolist()), abs=1e-6)


REFUSED = {
    "seed": (["--seed", "1"], "configuration.seed: 0 there, 1 asked for"),
    "temperature": (["--sampling.temperature", "0.5"], "configuration.sampling.temperature: 1.0 there, 0.5 asked for"),
    "tasks": (["--env.taskset.system", "Be short."], "configuration.env.taskset"),
    "range": (["--grid.alpha.max", "0.2"], "alpha = "),
    "another grid": (["--grid.alpha.points", "7"], "alpha = -0.05"),
    "rounding": (
        ["--grid.alpha.points", "13", "--grid.alpha.min", "-0.3", "--grid.alpha.max", "0.3"],
        "is asked for; rounding makes this difference, but not if intervals are halved",
    ),
    "base rollouts": (["--env.base-rollouts", "8"], "configuration.env.base_rollouts: None there, 8 asked for"),
    "fewer prompts and finer": (["--env.num-prompts", "3"], "env.num_prompts: 4 there, 3 asked for"),
    "fewer rollouts and finer": (["--env.rollouts", "1"], "env.rollouts: 2 there, 1 asked for"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The output of a sweep of 5 × 5 points, 4 tasks and 2 rollouts."""
    from rlvr_landscape_plugin.sweep import main

    folder = tmp_path_factory.mktemp("finished")
    (folder / "sweep.toml").write_text(QUIZ)
    with pytest.MonkeyPatch.context() as patch, FakeServer() as server:
        patch.syspath_prepend(str(HELPERS / "tasksets"))
        arguments = ["@", str(folder / "sweep.toml"), "--output", str(folder / "out"), "--server.token", FAKE_TOKEN]
        assert main([*arguments, "--server.urls", json.dumps([server.url]), *amounts(5, 4, 2)]) == 0
    return folder / "out"


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_mix_measurements_is_refused_by_name(finished, sweep_here, fake_server, change, message):
    before = measured(finished)
    code, said = sweep_here(fake_server, *amounts(9, 8, 4), *change, config=QUIZ, output=finished)
    assert code == 2
    assert message in said
    assert "another output directory" in said
    assert measured(finished) == before
    assert not fake_server.asked, "it is refused before a server is asked"


def test_asking_for_less_leaves_the_larger_dataset_and_says_so(finished, sweep_here, fake_server):
    before = measured(finished)
    code, said = sweep_here(fake_server, *amounts(3, 4, 1), config=QUIZ, output=finished)
    assert code == 0
    assert "holds more than is asked for and stays as it is" in said
    assert not fake_server.asked
    assert measured(finished) == before


def test_an_unfinished_sweep_cannot_shrink_but_grow(grow, sweep_here, fake_server, tmp_path):
    async def cut(route, count):
        if route == "move" and count > 4:
            raise Cut

    fake_server.before = cut
    assert sweep_here(fake_server, *amounts(5, 4, 2), config=QUIZ)[0] == 2
    fake_server.before = None
    code, said = sweep_here(fake_server, *amounts(3, 4, 2), config=QUIZ)
    assert code == 2
    assert "alpha = -0.05, 0.05 (2 of 5 values)" in said
    data = grow(fake_server, *amounts(9, 5, 3))
    assert_equal(data, grow(fake_server, *amounts(9, 5, 3), output=tmp_path / "at once"))


def test_a_growth_that_was_given_up_binds_nobody(grow, sweep_here, fake_server, tmp_path):
    """What it measured counts where it fits another growth; the mistyped number does not stay."""
    old = grow(fake_server, *amounts(3, 4, 2))

    async def cut(route, count):
        if route == "move" and count > 16:
            raise Cut

    fake_server.before = cut
    assert sweep_here(fake_server, *amounts(3, 4, 20), config=QUIZ)[0] == 2
    fake_server.before = None
    assert (tmp_path / "out" / NAME / "base_2.nc").exists()
    xr.testing.assert_identical(grow(fake_server, *amounts(3, 4, 2)), old)
    data = grow(fake_server, *amounts(5, 6, 3))
    assert_contains(data, old)
    assert_equal(data, grow(fake_server, *amounts(5, 6, 3), output=tmp_path / "at once"))


def test_a_progressive_sweep_keeps_what_a_grown_dataset_holds(grow, fake_server, tmp_path):
    config = QUIZ.replace("count = 64", "count = 66")
    old = grow(fake_server, *amounts(3, 4, 2), config=config)
    data = grow(fake_server, *amounts(5, 66, 2), "--until-ci-width", "1.5", config=config)
    assert_contains(data, old)
    assert data.sizes["prompt"] >= 64
    whole = grow(fake_server, *amounts(5, 66, 2), config=config)
    assert_contains(whole, data)
    assert_equal(whole, grow(fake_server, *amounts(5, 66, 2), config=config, output=tmp_path / "at once"))


def test_a_found_range_is_found_again_by_a_sweep_that_grows(grow, fake_server, tmp_path):
    given = ("--grid.find.prompts", "8", "--grid.find.kl", "0.2")
    old = grow(fake_server, *amounts(3, 8, 2), *given)
    record = (tmp_path / "out" / "range_step000000.json").read_bytes()
    data = grow(fake_server, *amounts(5, 9, 3), *given)
    assert_contains(data, old)
    assert (tmp_path / "out" / "range_step000000.json").read_bytes() == record


ENV = """
[env]
id = "tiny-quiz"
taskset = {{ count = 64 }}
num_prompts = {prompts}
rollouts = {rollouts}
{more}
[sampling]
max_tokens = 6
"""


def config_of(snapshot: Path, design: str, table: str, prompts: int = 3, rollouts: int = 2, more: str = "") -> str:
    return f'snapshots = ["{snapshot}"]\ndesign = "{design}"\n{table}' + ENV.format(
        prompts=prompts, rollouts=rollouts, more=more
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict[int, Path]:
    """A training run of four snapshots."""
    return make_run(tmp_path_factory.mktemp("run"), {0: 0.0, 1: 0.01, 2: 0.03, 4: 0.04})


def designs_grow(sweep_here, server, tmp_path: Path, name: str, *configs: str) -> None:
    """Each configuration grows the one before, in one directory; the last one is also measured at once."""
    old = None
    for output, chain in (("out", configs), ("at once", configs[-1:])):
        for config in chain:
            code, said = sweep_here(server, config=config, output=tmp_path / output)
            assert code == 0, said
            data = opened(tmp_path / output, name)
            if old is not None and output == "out":
                assert_contains(data, old)
            old = data
    assert_equal(opened(tmp_path / "out", name), opened(tmp_path / "at once", name))


def test_a_census_grows_in_directions_and_radii(run, sweep_here, fake_server, tmp_path):
    tables = ["pairs = 2\nradii = [0.5, 2.0]", "pairs = 3\nradii = [0.5, 2.0]", "pairs = 5\nradii = [0.5, 1.0, 2.0]"]
    configs = [config_of(run[4], "census", f"[census]\n{table}\n") for table in tables]
    designs_grow(sweep_here, fake_server, tmp_path, "census_step000004.nc", *configs)


def path_table(kinds: list[str], positions: list[float]) -> str:
    directions = ", ".join(f'{{ kind = "{kind}" }}' for kind in kinds)
    return f"[path]\ndirections = [{directions}]\npositions = {positions}\n"


def test_paths_grow_in_positions_and_in_directions_that_come_later(run, sweep_here, fake_server, tmp_path):
    few, many = [-0.5, 0.0], [-1.0, -0.5, 0.0, 0.25]
    tables = [(["displacement"], few), (["displacement", "random"], few), (["displacement", "random", "update"], many)]
    configs = [config_of(run[1], "path", path_table(*table)) for table in tables]
    designs_grow(sweep_here, fake_server, tmp_path, "path_step000001.nc", *configs)


def test_a_random_path_that_would_become_another_one_is_refused(run, sweep_here, fake_server, tmp_path):
    """Its noise depends on its place in the list, and its name does not say so."""
    assert sweep_here(fake_server, config=config_of(run[1], "path", path_table(["random"], [0.0, 0.5])))[0] == 0
    more = config_of(run[1], "path", path_table(["displacement", "random"], [0.0, 0.5]))
    code, said = sweep_here(fake_server, config=more)
    assert code == 2
    assert "holds other policies under the same coordinates (path = random, position = 0.5)" in said


def test_a_boundary_grows_in_tasks_and_rollouts(run, sweep_here, fake_server, tmp_path):
    sizes = [(3, 4), (5, 4), (5, 9)]
    configs = [config_of(run[4], "boundary", "", prompts=p, more=f"base_rollouts = {own}") for p, own in sizes]
    designs_grow(sweep_here, fake_server, tmp_path, "boundary_step000004.nc", *configs)


def test_a_lost_first_request_is_written_again_from_a_later_one(grow, fake_server, tmp_path):
    grow(fake_server, *amounts(3, 3, 2))
    data = grow(fake_server, *amounts(5, 3, 3))
    request = tmp_path / "out" / NAME / "journal.json"
    before = json.loads(request.read_text())
    request.unlink()
    (tmp_path / "out" / f"landscape_{NAME}.nc").unlink()
    asked = sum(fake_server.asked.values())
    assert_equal(grow(fake_server, *amounts(5, 3, 3)), data, set())
    assert sum(fake_server.asked.values()) == asked
    assert json.loads(request.read_text()) == before


def test_the_analysis_reads_the_base_batch_that_belongs_to_the_dataset(grow, fake_server, tmp_path):
    from rlvr_landscape_analysis.datasets import base_batch_of

    grow(fake_server, *amounts(3, 3, 2))
    journal = tmp_path / "out" / NAME
    assert base_batch_of(journal, 3, 2) == journal / "base.nc"
    grow(fake_server, *amounts(3, 4, 3))
    assert base_batch_of(journal, 4, 3) == journal / "base_2.nc"


def test_another_release_of_the_server_is_reported(grow, sweep_here, fake_server):
    grow(fake_server, *amounts(3, 3, 2))
    with FakeServer(vllm="another release") as other:
        code, said = sweep_here(other, *amounts(3, 3, 3), config=QUIZ)
    assert code == 0
    assert "those that measured here before run different releases of vLLM (another release, none" in said


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 2, 5, 12])
def test_a_sweep_that_is_killed_while_it_grows_goes_on(grow, sweep_command, fake_server, tmp_path, files):
    """Killed after so many new files; the old dataset stays readable until the new one is whole."""
    old = grow(fake_server, *amounts(3, 4, 2))

    async def slow(route, count):
        await asyncio.sleep(0.1 if route in ("generate", "move") else 0)

    fake_server.before = slow
    journal = tmp_path / "out" / NAME
    before = {path: path.read_bytes() for path in journal.rglob("*") if path.is_file()}
    process = start_fake_sweep(sweep_command(fake_server, *amounts(3, 6, 3), config=QUIZ))
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if len([path for path in journal.rglob("*.*") if path not in before and path.suffix != ".tmp"]) >= files:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    xr.testing.assert_identical(opened(tmp_path / "out"), old)
    kept = {path: path.read_bytes() for path in journal.rglob("*.*") if path.is_file() and path.suffix != ".tmp"}
    fake_server.before = None
    data = grow(fake_server, *amounts(3, 6, 3))
    assert all(path.read_bytes() == content for path, content in (before | kept).items())
    assert_contains(data, old)
    assert_equal(data, grow(fake_server, *amounts(3, 6, 3), output=tmp_path / "at once"))


GROWTHS = st.lists(
    st.tuples(st.sampled_from([2, 3]), st.integers(2, 4), st.integers(2, 4), st.booleans()), min_size=2, max_size=4
)


@pytest.mark.slow
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=GROWTHS)
def test_any_sequence_of_growths_ends_where_one_sweep_would(steps, tmp_path_factory, monkeypatch):
    """Each step asks for at least what the one before had; some of them are cut in the middle."""
    from rlvr_landscape_plugin.sweep import main

    monkeypatch.syspath_prepend(str(HELPERS / "tasksets"))
    folder = tmp_path_factory.mktemp("growth")
    (folder / "sweep.toml").write_text(QUIZ)
    points = prompts = rollouts = 2
    with FakeServer() as server:

        def sweep(output: str, *arguments: str) -> int:
            return main(
                [
                    *("@", str(folder / "sweep.toml"), "--output", str(folder / output), "--server.token", FAKE_TOKEN),
                    *("--server.urls", json.dumps([server.url]), "--server.patience", "0", *arguments),
                ]
            )

        old = None
        for step_points, step_prompts, step_rollouts, is_cut in steps:
            points, prompts = max(points, step_points), max(prompts, step_prompts)
            rollouts = max(rollouts, step_rollouts)
            asked = amounts(points, prompts, rollouts)
            if is_cut:
                limit = server.asked["move"] + 4

                async def cut(route, count, limit=limit):
                    if route == "move" and count > limit:
                        raise Cut

                server.before = cut
                sweep("out", *asked)
                server.before = None
                continue
            assert sweep("out", *asked) == 0
            data = opened(folder / "out")
            if old is not None:
                assert_contains(data, old)
            old = data
        assert sweep("out", *asked) == 0
        assert sweep("at once", *asked) == 0
    assert_equal(opened(folder / "out"), opened(folder / "at once"))
