"""The agent of an episode: it stands where verifiers passes its own, and holds the conversation in this process.

One turn is one request to the server: no program is started, and what the policy sampled is never tokenized again. An
error that must end the sweep is remembered, because the taskset's code may catch it as if it were about the reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from rlvr_landscape_plugin.errors import LandscapeError, TasksetError

if TYPE_CHECKING:
    import verifiers.v1 as vf
    from verifiers.v1.graph import MessageNode

    from rlvr_landscape_plugin.episodes.play import EpisodeRunner
    from rlvr_landscape_plugin.serving.client import Completion


class Play:
    """One episode while it is played."""

    def __init__(self, runner: EpisodeRunner, task: vf.Task, seed: Callable[[int], int]) -> None:
        self.runner, self.task, self.seed = runner, task, seed
        self.traces: list[vf.Trace] = []
        self.cut = False
        """Whether a length limit cut a reply or the conversation."""
        self.stopped_by: LandscapeError | None = None
        """What must end the sweep rather than count as a failed episode."""
        self.calls: list[tuple[str, list[int], Completion]] = []
        """Turns that the gateway answered: id of the trace, prompt, what was sampled."""
        self._turns = 0

    def next_turn(self) -> int:
        """The number of a turn that begins now, from 0 in the order in which they begin."""
        self._turns += 1
        return self._turns - 1

    def sampled(self, trace: str, prompt: list[int], completion: Completion) -> None:
        """Remember a turn that the gateway answered."""
        self.calls.append((trace, prompt, completion))
        self.cut |= completion.finish == "length"

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


class ChatAgent:
    """Takes the place of verifiers' `Agent`: `run` and `interaction`, nothing that needs a process."""

    def __init__(self, play: Play) -> None:
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
    def __init__(self, play: Play, task: vf.Task) -> None:
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
