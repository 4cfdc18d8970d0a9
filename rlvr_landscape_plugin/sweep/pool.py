"""The servers of a sweep and the queue of points they share.

A point is held by one server. What a server held when it failed goes back to the queue, and the server keeps trying to
come back, so that servers may leave and join. A point that takes far longer than others is measured by an idle server
too; the first result counts. Nothing here depends on weights, files or progress bars.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, Protocol, TypeVar

from rlvr_landscape_plugin.errors import ServerError, ServerRefusalError

Portion = TypeVar("Portion", bound=Hashable)
"""What one server measures at a time: a point and a range of tasks, or a probe. The pool does not read it."""
ATTEMPTS = 3
"""Failures of one point, on whichever servers, that end the sweep."""
OVERDUE, OVERDUE_SECONDS = 4.0, 5.0
"""A point is overdue after this many times the median time of a point, and this many seconds at least."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
"""Seconds between two attempts to reach a server that is away: at first, doubling, and at most."""


class PointQueue(Generic[Portion]):
    """The points of one slice that are not measured yet, and which server measures which."""

    def __init__(self, portions: Iterable[Portion]) -> None:
        self._waiting = deque(portions)
        self._left = set(self._waiting)
        self._held: dict[Portion, dict[int, float]] = {}
        self._failures: Counter[Portion] = Counter()
        self._seconds: list[float] = []

    @property
    def done(self) -> bool:
        """Whether every point is finished."""
        return not self._left

    def wanted(self, portion: Portion) -> bool:
        """Whether this point is not finished yet."""
        return portion in self._left

    async def take(self, holder: int) -> Portion | None:
        """The next point; when none waits, a copy of an overdue one; None when all are finished."""
        while self._left:
            portion = self._waiting.popleft() if self._waiting else self._overdue()
            if portion is not None:
                self._held.setdefault(portion, {})[holder] = time.monotonic()
                return portion
            await asyncio.sleep(0.05)
        return None

    def _overdue(self) -> Portion | None:
        if not self._seconds:
            return None
        limit = time.monotonic() - max(OVERDUE * statistics.median(self._seconds), OVERDUE_SECONDS)
        alone = {portion: next(iter(held.values())) for portion, held in self._held.items() if len(held) == 1}
        late = [portion for portion, since in alone.items() if since < limit]
        return min(late, key=alone.__getitem__, default=None)

    def finish(self, portion: Portion, holder: int) -> None:
        """`holder` has measured `portion`, and the point is kept."""
        self._seconds.append(time.monotonic() - self._held[portion][holder])
        self._left.discard(portion)
        del self._held[portion]

    def give_back(self, portion: Portion, holder: int, error: ServerError) -> None:
        """`holder` failed to measure `portion`; raises `error` at the third failure of one point."""
        held = self._held.get(portion, {})
        held.pop(holder, None)
        self._failures[portion] += 1
        if self._failures[portion] >= ATTEMPTS:
            raise error
        if portion in self._left and not held:
            self._held.pop(portion, None)
            self._waiting.appendleft(portion)


class Member(Protocol):
    """One server as a pool sees it."""

    present: bool
    """Whether it has loaded the present slice and is ready for points."""


Server = TypeVar("Server", bound=Member)
ServerOfJob = TypeVar("ServerOfJob", bound=Member, contravariant=True)
PortionOfJob = TypeVar("PortionOfJob", bound=Hashable, contravariant=True)


class Job(Protocol[ServerOfJob, PortionOfJob]):
    """What a pool does with a slice. Both raise `ServerError` when the server fails."""

    async def enter(self, server: ServerOfJob) -> None:
        """Let a server, a new one or one that has returned, load the slice."""
        ...

    async def measure(self, server: ServerOfJob, portion: PortionOfJob, wanted: Callable[[], bool]) -> None:
        """Measure a point; keep it if it is still `wanted` at the end."""
        ...


class Pool(Generic[Server]):
    """Servers that work through queues of points together."""

    def __init__(self, servers: list[Server], patience: float, say: Callable[[str], None]) -> None:
        """`patience`: seconds without any server until the last one's error ends the work."""
        self.servers = servers
        self._patience, self._say = patience, say
        self.failures = 0
        """How often a server failed."""
        self._away: set[int] = set()
        self._alive = time.monotonic()

    def is_away(self, server: Server) -> bool:
        """Whether the server failed and has not come back yet."""
        return id(server) in self._away

    async def work(self, queue: PointQueue[Portion], job: Job[Server, Portion], new_slice: bool = True) -> None:
        """Work until every point is finished. Servers that still measure a copy of a point are then interrupted, and no
        longer present.

        `new_slice`: this is another slice than before, which every server has to enter.

        Raises the `ServerError` of the last server when none has answered for `patience` seconds, or of a point that
        failed three times. A server that refuses the slice or a point is not asked again in this slice.
        """
        if new_slice:
            for server in self.servers:
                server.present = False
            self._away.clear()
        self._alive = time.monotonic()
        workers = {asyncio.create_task(self._serve(server, queue, job)) for server in self.servers}
        try:
            refusal: ServerRefusalError | None = None
            while workers and not queue.done:
                ended, workers = await asyncio.wait(workers, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
                for worker in ended:
                    refusal = worker.result() or refusal
            if refusal is not None and not queue.done:
                raise refusal
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _serve(
        self, server: Server, queue: PointQueue[Portion], job: Job[Server, Portion]
    ) -> ServerRefusalError | None:
        """Measure points until there are none, or until the server refuses; returns its refusal."""
        pause = FIRST_PAUSE
        while not queue.done:
            portion: Portion | None = None
            try:
                if not server.present:
                    await job.enter(server)
                    server.present = True
                    self._away.discard(id(server))
                portion = await queue.take(id(server))
                if portion is None:
                    return None
                await self._measure(server, portion, queue, job)
                self._alive, pause = time.monotonic(), FIRST_PAUSE
            except ServerError as error:
                self.failures += 1
                server.present = False
                if portion is not None:
                    queue.give_back(portion, id(server), error)
                self._away.add(id(server))
                if isinstance(error, ServerRefusalError):
                    self._say(f"{error}; it is not asked again")
                    return error
                alone = len(self._away) == len(self.servers)
                if alone and time.monotonic() - self._alive >= self._patience:
                    raise
                self._say(
                    f"{error}; {'no server left' if alone else 'the others continue'}, trying again in {pause:.0f} s"
                )
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        return None

    async def _measure(
        self, server: Server, portion: Portion, queue: PointQueue[Portion], job: Job[Server, Portion]
    ) -> None:
        # An interrupted server may hold any weights: it has to load the slice again.
        server.present = False
        await job.measure(server, portion, lambda: queue.wanted(portion))
        server.present = True
        if queue.wanted(portion):
            queue.finish(portion, id(server))
