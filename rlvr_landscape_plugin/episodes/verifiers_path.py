"""Episodes played by verifiers' own agents: the environment's harness, runtime, tools and hooks.

Everything of verifiers runs as in `vf-eval` or in training: its servers record the trace, its training client renders
prompts to token ids. Only the endpoint is ours (`gateway.py`), and the renderer is the snapshot's own chat template
(`renderer.py`). All servers and programs of a batch are started for it and have ended when it ends, so that no episode
outlives the weights that it began with.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from rlvr_landscape_plugin.episodes.agent import Play
from rlvr_landscape_plugin.episodes.gateway import MODEL, Gateway
from rlvr_landscape_plugin.episodes.rollouts import Rollout, segments_of_calls
from rlvr_landscape_plugin.episodes.tasksets import starts_services
from rlvr_landscape_plugin.errors import TasksetError

if TYPE_CHECKING:
    import verifiers.v1 as vf
    from verifiers.v1.clients import ModelContext

    from rlvr_landscape_plugin.episodes.play import EpisodeRunner, PlayEpisode

PROGRAMS_PER_CORE = 8
"""Episodes in flight for each core: a harness may be a program of its own in each of them."""
EPISODES_PER_TOKENIZER = 256
_ONE_AT_A_TIME: WeakKeyDictionary[vf.Env, asyncio.Lock] = WeakKeyDictionary()
"""For environments that start services: the batches that share one."""
_NO_KEY = "RLVR_LANDSCAPE_GATEWAY_HAS_NO_KEY"


@contextlib.asynccontextmanager
async def verifiers_stage(runner: EpisodeRunner) -> AsyncIterator[PlayEpisode]:
    """What plays the episodes of one batch. Raises `TasksetError` where services of the environment do not start."""
    logging.getLogger("verifiers").setLevel(logging.CRITICAL)  # every failure is kept, counted and shown by the sweep
    # An environment holds the servers of one batch at a time, and several batches may be in flight.
    env = type(runner.env)(runner.env.config)
    async with contextlib.AsyncExitStack() as stack:
        if starts_services(env):
            # Where a service listens is written into the configuration, which the tasks of all batches share.
            await stack.enter_async_context(_ONE_AT_A_TIME.setdefault(runner.env, asyncio.Lock()))
        gateway = await stack.enter_async_context(Gateway(runner.sampler, runner.max_tokens, runner.max_model_len))
        try:
            await stack.enter_async_context(env.serving())
        except Exception as error:  # tool servers and services are the taskset's own code
            raise TasksetError(
                f"the services of {type(env).__name__} do not start: {type(error).__name__}: {error}"
            ) from error
        yield _Stage(runner, env, gateway).episode


class _Stage:
    def __init__(self, runner: EpisodeRunner, env: vf.Env, gateway: Gateway) -> None:
        self._runner, self._env, self._gateway = runner, env, gateway
        self._context = _context(runner, gateway)
        self._gate = asyncio.Semaphore(PROGRAMS_PER_CORE * len(os.sched_getaffinity(0)))

    async def episode(self, task: vf.Task, seed: Callable[[int], int]) -> Rollout:
        """Play and score one episode."""
        play = Play(self._runner, task, seed)

        def minted(trace: vf.Trace) -> None:
            play.traces.append(trace)
            self._gateway.admit(trace.id, play)

        def discarded(trace: vf.Trace) -> None:
            self._gateway.dismiss(trace.id)
            play.traces.remove(trace)
            play.calls = [call for call in play.calls if call[0] != trace.id]

        episode: vf.Episode | None = None
        late: TimeoutError | None = None
        async with self._gate:
            try:
                async with asyncio.timeout(self._runner.timeout):
                    episode = await self._env.run_episode(task, self._context, on_trace=minted, on_discard=discarded)
            except TimeoutError:
                late = TimeoutError(f"the episode took longer than env.timeout = {self._runner.timeout:g} s")
            finally:
                for trace in play.traces:
                    self._gateway.dismiss(trace.id)
        return self._result(play, episode, late)

    def _result(self, play: Play, episode: vf.Episode | None, late: TimeoutError | None) -> Rollout:
        from rlvr_landscape_plugin.episodes.renderer import SnapshotRenderer

        if play.stopped_by is not None:
            raise play.stopped_by
        if (problem := SnapshotRenderer.problems.pop(str(self._runner.chat.policy), None)) is not None:
            raise problem
        trace = play.traces[-1] if play.traces else None
        segments = segments_of_calls([(prompt, completion) for _, prompt, completion in play.calls])
        if late is not None or episode is None:
            return self._runner.result(play, trace, segments, late)
        failed = [error for trace in episode.traces if not trace.ok for error in trace.errors] + episode.errors
        if failed:
            if trace is not None:
                trace.errors += episode.errors
            reason = f"{failed[0].type}: {failed[0].message}"
            return self._runner.result(play, trace, segments, None, reason)
        if len(episode.traces) != 1:
            raise TasksetError(
                f"{type(self._env).__name__}.run() ran the agent {len(episode.traces)} times, expected once"
            )
        (trace,) = episode.traces
        if trace.is_timeout:
            stage = (trace.stop_condition or "a stage").removesuffix("_timeout")
            limit = TimeoutError(f"{stage} took longer than the time limit of its task or role")
            return self._runner.result(play, trace, segments, limit)
        # The training client refuses such a prompt itself, before the gateway sees it.
        play.cut |= any(call.error and "maximum context length" in call.error.message for call in trace.calls)
        return self._runner.result(play, trace, segments, None)


def _context(runner: EpisodeRunner, gateway: Gateway) -> ModelContext:
    """The policy as verifiers' agents see it."""
    from verifiers.v1.clients import ModelContext, TrainClientConfig
    from verifiers.v1.types import Sampling

    from rlvr_landscape_plugin.episodes.renderer import renderer_config

    client = TrainClientConfig(
        base_url=gateway.url,
        api_key_var=_NO_KEY,
        renderer=renderer_config(runner.chat.policy, runner.tool_parser),
        renderer_model_name=str(runner.chat.policy),
        multiplex=EPISODES_PER_TOKENIZER,
    )
    return ModelContext(model=MODEL, client=client, sampling=Sampling(max_tokens=runner.max_tokens))
