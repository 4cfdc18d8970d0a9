"""verifiers episodes in process: the taskset's conversation and reward, our tokens.

`Env.run` of the taskset drives the conversation and `Task.score` gives the reward, exactly as `vf-eval` would call
them; only the agent is ours. It runs its chat loop in this process and sends token ids straight to the landscape
server, so that a turn costs no process and no re-tokenisation: the prompt of a later turn is the tokens of the earlier
ones as sampled, followed by what the chat template puts between them.

What such an agent cannot do is refused when the taskset is opened (`tasksets.py`). verifiers is imported inside
functions, so that `--help` does not wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import gc
import inspect
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rlvr_landscape_plugin.episodes.agent import ChatAgent, Play
from rlvr_landscape_plugin.episodes.chat import ChatFormat
from rlvr_landscape_plugin.episodes.rollouts import ERROR, OK, TRUNCATED, Rollout, Segment, segments_of
from rlvr_landscape_plugin.episodes.tasksets import CHAT, role_config, runtime_needs, unfit, why_unfit
from rlvr_landscape_plugin.errors import LandscapeError, TasksetError

if TYPE_CHECKING:
    import verifiers.v1 as vf

    from rlvr_landscape_plugin.serving.client import Completion


PlayEpisode = Callable[["vf.Task", Callable[[int], int]], Awaitable[Rollout]]
"""Plays one episode of a task; the second argument gives the sampler's seed of a turn."""


class TurnSampler(Protocol):
    """What an episode needs of a server: `LandscapeClient.generate`."""

    async def generate(self, prompt: Sequence[int] | np.ndarray, seed: int, max_tokens: int) -> Completion:
        """Sample one turn."""
        ...


@dataclass
class EpisodeRunner:
    """Plays episodes of one environment with one policy server."""

    env: vf.Env
    chat: ChatFormat
    sampler: TurnSampler
    max_tokens: int
    max_model_len: int
    max_concurrent: int = 512
    keep_traces: bool = False
    runtime: bool = False
    """Give an episode a subprocess runtime where its task needs one: programs of the taskset, and what they do with
    the policy's replies, then run on this machine as this user."""
    path: str = CHAT
    """`chat`: the loop of this process. `verifiers`: verifiers' own agents, with the environment's harness, tools and
    hooks (`verifiers_path.py`)."""
    tool_parser: str | None = None
    """How the policy writes tool calls (`tool_calls.py`); None where no task has tools. For the path `verifiers`."""
    timeout: float | None = None
    """Seconds until an episode counts as failed, on the path `verifiers`."""
    agent_config: vf.AgentConfig = field(init=False)
    """That of the environment's one role, as it is recorded in traces."""

    def __post_init__(self) -> None:
        from verifiers.v1.types import Sampling

        self.agent_config = role_config(self.env).model_copy(
            update={"model": "policy", "sampling": Sampling(max_tokens=self.max_tokens)}
        )
        self._gate = asyncio.Semaphore(self.max_concurrent)
        self._known: dict[int, _KnownTask] = {}
        # Each runtime starts processes; the conversations themselves only wait for the server.
        self.runtime_gate = asyncio.Semaphore(len(os.sched_getaffinity(0)))

    async def batch(
        self,
        tasks: Sequence[vf.Task],
        rollouts: int,
        seed: Callable[[int, int, int], int],
        progress: Callable[[], None],
    ) -> list[list[Rollout]]:
        """`rollouts` episodes of every task, concurrently: result[prompt][rollout].

        `seed(prompt, rollout, turn)` names the sampler's seed; `progress` is called after every episode. A failure of
        the server, of the snapshot's chat template or of the taskset's fitness raises; a failure of the taskset's code
        is a rollout with status ERROR.
        """
        for task in tasks:
            if id(task) not in self._known:
                self._known[id(task)] = _KnownTask(task)

        try:
            with _rare_collections():
                async with self._stage() as play, asyncio.TaskGroup() as group:

                    async def one(prompt: int, rollout: int) -> Rollout:
                        async with self._gate:
                            result = await play(tasks[prompt], lambda turn: seed(prompt, rollout, turn))
                        progress()
                        return result

                    cells = [
                        [group.create_task(one(prompt, rollout)) for rollout in range(rollouts)]
                        for prompt in range(len(tasks))
                    ]
        except* LandscapeError as failures:
            raise _first(failures) from None
        return [[cell.result() for cell in row] for row in cells]

    @asynccontextmanager
    async def _stage(self) -> AsyncIterator[PlayEpisode]:
        """What plays the episodes of one batch, and nothing of it after the batch."""
        if self.path == CHAT:
            yield self.episode
            return
        from rlvr_landscape_plugin.episodes.verifiers_path import verifiers_stage

        async with verifiers_stage(self) as play:
            yield play

    async def episode(self, task: vf.Task, seed: Callable[[int], int]) -> Rollout:
        """Play and score one episode in the chat loop. Raises and returns as `batch`."""
        from verifiers.v1.agent import Agents

        play = Play(self, task, seed)
        make: Any = lambda name, spec: ChatAgent(play)  # noqa: E731 - typed as what verifiers asks for
        agents = Agents(self.env.config, make)
        problem: Exception | None = None
        try:
            await self.env.setup(agents)
            await self.env.run(task, agents)
            if len(play.traces) != 1:
                raise TasksetError(
                    f"{type(self.env).__name__}.run() ran the agent {len(play.traces)} times, expected once"
                )
            await self._finalize(task, play.traces[0])
        except LandscapeError:
            raise
        except Exception as raised:  # the taskset's own code failed: that is data
            problem = raised
        if play.stopped_by is not None:
            # The taskset's code may have caught it and taken it for an error of the reply.
            raise play.stopped_by
        trace = play.traces[0] if play.traces else None
        segments = segments_of(trace) if trace is not None else []
        return self.result(play, trace, segments, problem)

    def result(
        self,
        play: Play,
        trace: vf.Trace | None,
        segments: list[Segment],
        problem: Exception | None,
        reason: str | None = None,
    ) -> Rollout:
        """What a finished episode counts as.

        `problem`: why it failed, to be recorded in its trace. `reason`: the same where the trace has it already.
        """
        if trace is not None and problem is None and reason is None and not math.isfinite(trace.reward):
            problem = ValueError(f"the taskset's reward is {trace.reward}")
        if problem is not None or reason is not None:
            if trace is None and self.keep_traces:
                trace = play.new_trace(play.task)
            if trace is not None:
                if problem is not None:
                    trace.record_error(problem)
                trace.is_completed = True
            error = reason or f"{type(problem).__name__}: {problem}"
            return Rollout(float("nan"), ERROR, segments, error, trace=trace if self.keep_traces else None)
        assert trace is not None
        status = TRUNCATED if play.cut else OK
        # A name without a value is a hook that verifiers announced and that returned others.
        metrics = {name: value for name, value in trace.metrics.items() if value is not None}
        paid = any(reward is not None for reward in trace.rewards.values())
        kept = trace if self.keep_traces else None
        return Rollout(float(trace.reward), status, segments, None, metrics, paid, kept)

    async def _finalize(self, task: vf.Task, trace: vf.Trace) -> None:
        from verifiers.v1.env import Env

        if type(self.env).finalize is Env.finalize:
            return
        from verifiers.v1.episode import Episode

        await self.env.finalize(task, Episode(task=trace.task, traces=[trace], ok=True))

    def known(self, task: vf.Task) -> _KnownTask:
        """What is looked up once per task instead of once per turn.

        The result for a task of a batch is kept. A task that the environment makes during an episode is examined each
        time, because only its address would identify it, and Python gives the address to the next task.
        """
        found = self._known.get(id(task))
        if found is not None and found.task is task:
            return found
        if problems := unfit(task, self.runtime):
            raise TasksetError(
                f"{type(self.env).__name__}.run() made a {type(task).__name__} that needs more than "
                f"{why_unfit(task, problems)}"
            )
        return _KnownTask(task)


def _first(group: BaseExceptionGroup[LandscapeError]) -> LandscapeError:
    """The first of the errors that concurrent episodes ended with."""
    for error in group.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an exception group is never empty")


class _KnownTask:
    def __init__(self, task: vf.Task) -> None:
        from verifiers.v1.trace import TraceTask

        self.task = task
        """Kept alive, so that no other task gets its address."""
        self.record = TraceTask.model_construct(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
        self.stops = task.hooks("stop")
        self.needs_runtime = bool(runtime_needs(task))
        self.scorer = copy.copy(task)
        # score() looks its hooks up by scanning classes and reads each signature three times: half of what it costs.
        hooks = {"stop": self.stops} | {kind: [_signed(fn) for fn in task.hooks(kind)] for kind in ("metric", "reward")}
        vars(self.scorer)["hooks"] = hooks.__getitem__


def _signed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with its signature at hand."""

    @functools.wraps(function)
    def call(**given: Any) -> Any:
        return function(**given)

    vars(call)["__signature__"] = inspect.signature(function)
    return call


_batches: list[tuple[int, int, int]] = []
"""The garbage collector's own thresholds, once for every batch in flight."""


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Let Python search for reference cycles rarely while a batch is in flight.

    It would search the traces of all episodes again and again, for half of the client's time, and they have almost no
    cycles.
    """
    _batches.append(_batches[0] if _batches else gc.get_threshold())
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        own = _batches.pop()
        if not _batches:
            gc.set_threshold(*own)
