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
import json
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rlvr_landscape_plugin.episodes.chat import ChatFormat
from rlvr_landscape_plugin.episodes.rollouts import ERROR, OK, TRUNCATED, Rollout, segments_of
from rlvr_landscape_plugin.episodes.tasksets import role_config, runtime_needs, unfit, why_unfit
from rlvr_landscape_plugin.errors import LandscapeError, TasksetError

if TYPE_CHECKING:
    import verifiers.v1 as vf
    from verifiers.v1.graph import MessageNode

    from rlvr_landscape_plugin.serving.client import Completion


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

        async def one(prompt: int, rollout: int) -> Rollout:
            async with self._gate:
                result = await self.episode(tasks[prompt], lambda turn: seed(prompt, rollout, turn))
            progress()
            return result

        try:
            with _rare_collections():
                async with asyncio.TaskGroup() as group:
                    cells = [
                        [group.create_task(one(prompt, rollout)) for rollout in range(rollouts)]
                        for prompt in range(len(tasks))
                    ]
        except* LandscapeError as failures:
            raise _first(failures) from None
        return [[cell.result() for cell in row] for row in cells]

    async def episode(self, task: vf.Task, seed: Callable[[int], int]) -> Rollout:
        """Play and score one episode. Raises and returns as `batch`."""
        from verifiers.v1.agent import Agents

        play = _Play(self, task, seed)
        make: Any = lambda name, spec: _Agent(play)  # noqa: E731 - typed as what verifiers asks for
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
        return self._result(play, problem)

    def _result(self, play: _Play, problem: Exception | None) -> Rollout:
        trace = play.traces[0] if play.traces else None
        if trace is not None and problem is None and not math.isfinite(trace.reward):
            problem = ValueError(f"the taskset's reward is {trace.reward}")
        segments = segments_of(trace) if trace is not None else []
        if problem is not None:
            if trace is None and self.keep_traces:
                trace = play.new_trace(play.task)
            if trace is not None:
                trace.record_error(problem)
                trace.is_completed = True
            error = f"{type(problem).__name__}: {problem}"
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


class _Play:
    """One episode while it is played."""

    def __init__(self, runner: EpisodeRunner, task: vf.Task, seed: Callable[[int], int]) -> None:
        self.runner, self.task, self.seed = runner, task, seed
        self.traces: list[vf.Trace] = []
        self.cut = False
        """Whether a length limit cut a reply or the conversation."""
        self.stopped_by: LandscapeError | None = None
        """What must end the sweep rather than count as a failed episode."""

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Remember an error that must end the sweep, should the taskset's code catch it."""
        try:
            yield
        except LandscapeError as error:
            self.stopped_by = error
            raise

    def new_trace(self, task: vf.Task) -> vf.Trace:
        """The trace of a conversation about `task`, which may be another one than the episode's."""
        from verifiers.v1.state import state_cls
        from verifiers.v1.trace import AgentInfo, Trace

        trace = Trace(
            task=self.runner.known(task).record.model_copy(),
            agent=AgentInfo.model_construct(config=self.runner.agent_config),
            state=state_cls(type(task))(),
        )
        self.traces.append(trace)
        return trace


class _Agent:
    """Takes the place of verifiers' `Agent`: `run` and `interaction`, nothing that needs a process."""

    def __init__(self, play: _Play) -> None:
        self._play = play
        self.trainable = True
        self.config = play.runner.agent_config

    async def run(self, task: vf.Task, **unsupported: object) -> vf.Trace:
        """One uninterrupted reply to a task that brings its prompt."""
        if unsupported:
            with self._play.ending():
                raise TasksetError(f"agent.run({', '.join(unsupported)}=…) is not available in a sweep")
        async with self.interaction(task) as interaction:
            await interaction.turn()
        return interaction.trace

    @contextlib.asynccontextmanager
    async def interaction(self, task: vf.Task) -> AsyncIterator[_Interaction]:
        """The conversation, held open turn by turn; scored when the block ends."""
        with self._play.ending():
            interaction = _Interaction(self._play, task)
        async with interaction.runtime():
            yield interaction
            await interaction.close()


class _Interaction:
    def __init__(self, play: _Play, task: vf.Task) -> None:
        self._play, self._runner, self._task = play, play.runner, task
        self._known = play.runner.known(task)
        self.trace = play.new_trace(task)
        self._committed = 0
        self._prompt: list[int] = []
        self._last: Completion | None = None
        self._turns = 0
        self._over = self._closed = False
        self._runtime: vf.Runtime | None = None

    @contextlib.asynccontextmanager
    async def runtime(self) -> AsyncIterator[None]:
        """Hold a prepared runtime for the conversation and its scoring, where the task needs one."""
        if not (self._runner.runtime and self._known.needs_runtime):
            yield
            return
        from verifiers.v1.agent import resolve_rollout_timeouts
        from verifiers.v1.runtimes import SubprocessConfig, make_runtime
        from verifiers.v1.utils.decorators import invoke

        self._timeouts = resolve_rollout_timeouts(self._runner.agent_config.timeout, self._task)
        runtime = make_runtime(SubprocessConfig(), name=self.trace.id)
        runtime.env = dict(self._task.runtime_env())
        if self.trace.agent is not None:
            self.trace.agent.runtime = runtime.info  # pyright: ignore[reportAttributeAccessIssue] - one of its kinds
        try:
            async with self._runner.runtime_gate:
                await runtime.start()
                await runtime.prepare_setup()
                async with _deadline(self._timeouts.setup, "setup()"):
                    await invoke(self._task.setup, {"trace": self.trace, "runtime": runtime})
            self._runtime = runtime
            yield
        finally:
            await runtime.stop()

    async def turn(self, message: str | Sequence[vf.Message] | None = None) -> vf.Segment:
        """Send user message(s), get the reply as a verifiers `Segment`; bare for a task that brings its prompt."""
        with self._play.ending():
            return await self._turn(message)

    async def _turn(self, message: str | Sequence[vf.Message] | None) -> vf.Segment:
        from verifiers.v1.agent import Segment as Reply

        if self._closed:
            raise RuntimeError("this interaction is closed")
        if self._over:
            raise RuntimeError("the exchange is over; read interaction.trace")
        opening = self._task.data.prompt is not None and self._last is None
        if (message is None) != opening:
            raise ValueError(
                "a task with a prompt takes its first reply with a bare turn(); every other turn needs a message"
            )
        new = self._opening() if self._last is None else []
        new += [] if message is None else _typed(message)
        if await self._stopped():
            self._over = True
            return Reply(messages=[], terminated=True)
        wire = json.dumps([_wire(m) for m in new])
        chat = self._runner.chat
        prompt = list(chat.opening(wire)) if self._last is None else chat.extend(self._prompt, self._last, wire)
        room = min(self._runner.max_tokens, self._runner.max_model_len - len(prompt))
        if room < 1:
            self.trace.stop("context_length")
            self._play.cut = self._over = True
            return Reply(messages=[], terminated=True)
        completion = await self._runner.sampler.generate(prompt, self._play.seed(self._turns), room)
        self._turns += 1
        self._play.cut |= completion.finish == "length"
        self._prompt, self._last = prompt, completion
        return Reply(messages=[self._commit(new, prompt, completion)])

    def _opening(self) -> list[vf.Message]:
        from verifiers.v1.types import SystemMessage

        data = self._task.data
        system = [SystemMessage(content=data.system_prompt)] if data.system_prompt is not None else []
        return system + ([] if data.prompt is None else _typed(data.prompt))

    def _commit(self, new: list[vf.Message], prompt: list[int], completion: Completion) -> vf.AssistantMessage:
        """Add the user's messages and the reply to the trace: a chain of nodes, the tokens on the replies."""
        from verifiers.v1.trace import ModelCall
        from verifiers.v1.types import AssistantMessage, Usage

        tokens = completion.tokens.tolist()
        reply = AssistantMessage(content=self._runner.chat.text(completion))
        added = prompt[self._committed :]
        for message in new:
            self._append(message=message)
        self._append(
            message=reply,
            sampled=True,
            token_ids=[*added, *tokens],
            mask=[False] * len(added) + [True] * len(tokens),
            logprobs=completion.logprobs.tolist(),
        )
        self._committed = len(prompt) + len(tokens)
        usage = Usage.model_construct(prompt_tokens=len(prompt), completion_tokens=len(tokens))
        finish: Any = completion.finish if completion.finish in ("stop", "length") else None
        node = len(self.trace.nodes) - 1
        self.trace.calls.append(ModelCall.model_construct(node=node, model="policy", finish_reason=finish, usage=usage))
        return reply

    def _append(self, **fields: object) -> None:
        # A copy of an empty node costs a tenth of constructing one, whose defaults are looked up each time.
        parent = len(self.trace.nodes) - 1 if self.trace.nodes else None
        blank = {"token_ids": [], "mask": [], "is_content": [], "logprobs": [], "timestamp": time.time()}
        self.trace.nodes.append(_empty_node().model_copy(update={"parent": parent, **blank, **fields}))

    async def _stopped(self) -> bool:
        if self.trace.stop_condition is not None:
            return True
        limit = self._runner.agent_config.max_turns
        if limit is not None and self._turns >= limit:
            self.trace.stop("max_turns")
            return True
        for stop in self._known.stops:
            result = stop(self.trace)
            if await result if inspect.isawaitable(result) else result:
                self.trace.stop(stop.__name__)
                return True
        return False

    async def close(self) -> None:
        """End the exchange and score it with the task's own rewards."""
        if self._closed:
            return
        self._closed = True
        self.trace.stop("user_closed")
        if self._runtime is None:
            await self._known.scorer.score(self.trace)
        else:
            from verifiers.v1.utils.decorators import invoke

            async with self._runner.runtime_gate:
                async with _deadline(self._timeouts.finalize, "finalize()"):
                    await invoke(self._task.finalize, {"trace": self.trace, "runtime": self._runtime})
                async with _deadline(self._timeouts.scoring, "scoring"):
                    await self._known.scorer.score(self.trace, self._runtime)
        self.trace.is_completed = self.trace.ok = True


@contextlib.asynccontextmanager
async def _deadline(seconds: float | None, what: str) -> AsyncIterator[None]:
    """A time limit of the task or the role; its error says what took too long."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise TimeoutError(f"{what} of the task took longer than its limit of {seconds:g} s") from error


@cache
def _empty_node() -> MessageNode:
    from verifiers.v1.graph import MessageNode
    from verifiers.v1.types import UserMessage

    return MessageNode(message=UserMessage(content=""))


def _typed(message: str | Sequence[vf.Message]) -> list[vf.Message]:
    from verifiers.v1.dialects import parse_message
    from verifiers.v1.types import UserMessage

    if isinstance(message, str):
        return [UserMessage(content=message)]
    return [parse_message(item) if isinstance(item, dict) else item for item in message]


def _wire(message: vf.Message) -> dict[str, str]:
    if not isinstance(message.content, str):
        raise TasksetError(f"a {message.role} message has non-text content; sweeps drive text-only tasksets")
    return {"role": message.role, "content": message.content}
