"""The queue of points and the servers that share it, with servers that fail on cue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from rlvr_landscape_plugin.errors import ServerError, ServerRefusalError
from rlvr_landscape_plugin.sweep import pool as module
from rlvr_landscape_plugin.sweep.pool import PointQueue, Pool

POINTS = [(0, j) for j in range(8)]


@dataclass
class FakeServer:
    """Answers after `seconds`; `failing` says which of its calls (0, 1, …) raise."""

    seconds: float = 0.01
    failing: Callable[[int], bool] = lambda call: False
    error: type[ServerError] = ServerError
    present: bool = False
    calls: int = 0
    entered: int = 0

    async def answer(self) -> None:
        call, self.calls = self.calls, self.calls + 1
        await asyncio.sleep(self.seconds)
        if self.failing(call):
            raise self.error("connection failed")


@dataclass
class FakeJob:
    kept: list[tuple[tuple[int, int], int]] = field(default_factory=list)

    async def enter(self, server: FakeServer) -> None:
        await server.answer()
        server.entered += 1

    async def measure(self, server: FakeServer, point: tuple[int, int], wanted: Callable[[], bool]) -> None:
        await server.answer()
        if wanted():
            self.kept.append((point, id(server)))


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(module, "OVERDUE_SECONDS", 0.1)


def run(
    servers: list[FakeServer], patience: float = 0.0, points: list[tuple[int, int]] = POINTS
) -> tuple[FakeJob, list[str]]:
    job, said = FakeJob(), []
    asyncio.run(asyncio.wait_for(Pool(servers, patience, said.append).work(PointQueue(points), job), 20))
    assert sorted(point for point, _ in job.kept) == sorted(points), "every point once"
    return job, said


def test_servers_share_the_points():
    servers = [FakeServer(), FakeServer()]
    job, said = run(servers)
    assert {who for _, who in job.kept} == {id(server) for server in servers}
    assert all(server.present for server in servers)
    assert said == []


def test_points_of_a_server_that_dies_go_to_the_others():
    dead = FakeServer(failing=lambda call: call >= 2)
    job, said = run([dead, FakeServer()])
    assert sum(who == id(dead) for _, who in job.kept) == 1
    assert not dead.present
    assert "connection failed; the others continue" in said[0]


def test_a_server_that_comes_back_enters_the_slice_again():
    flaky = FakeServer(failing=lambda call: call in (2, 3))
    run([flaky], patience=20.0)
    assert flaky.entered == 2
    assert flaky.present


def test_a_server_that_was_absent_at_first_joins():
    late = FakeServer(failing=lambda call: call < 3)
    job, _ = run([FakeServer(seconds=0.1), late])
    assert any(who == id(late) for _, who in job.kept)


def test_the_last_error_ends_the_work_when_nobody_is_left():
    with pytest.raises(ServerError, match="connection failed"):
        run([FakeServer(failing=lambda call: call >= 2), FakeServer(failing=lambda call: True)])


def test_a_server_that_refuses_is_not_asked_again_and_ends_the_work_where_it_is_alone():
    refusing = FakeServer(failing=lambda call: True, error=ServerRefusalError)
    with pytest.raises(ServerRefusalError):
        run([refusing], patience=3600.0)
    assert refusing.calls == 1
    _, said = run([refusing, FakeServer()], patience=3600.0)
    assert refusing.calls == 2
    assert said == ["connection failed; it is not asked again"]


def test_a_point_that_fails_on_every_server_ends_the_work():
    with pytest.raises(ServerError, match="connection failed"):
        # Each server enters, then fails to measure, for ever.
        run([FakeServer(failing=lambda call: call % 2 == 1) for _ in range(2)], patience=60.0, points=[(0, 0)])


def test_a_stuck_point_is_measured_by_an_idle_server_and_counts_once():
    @dataclass
    class Sleeper(FakeServer):
        async def answer(self) -> None:
            self.calls += 1
            await asyncio.sleep(0.01 if self.calls < 3 else 3600.0)

    stuck = Sleeper()
    job, _ = run([stuck, FakeServer(seconds=0.02)])
    assert not stuck.present, "it was cut off in the middle of something"
    assert sum(who == id(stuck) for _, who in job.kept) == 1
