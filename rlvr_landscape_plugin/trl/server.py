"""The sampler of a training run: a vLLM server that always holds the policy of the present step.

TRL's loop is synchronous and episodes are asynchronous: an event loop in a thread of its own owns the server and the
client, and the methods here wait for it. New weights travel as a small snapshot directory below the server's roots,
which the landscape engine loads and moves to the origin. This is the path that sweeps use, with the same checks
(tensors, checksum, weight version on every sampling call).
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rlvr_landscape_plugin.config import TrainConfig
from rlvr_landscape_plugin.directions import SliceSpec
from rlvr_landscape_plugin.episodes import (
    ChatFormat,
    EpisodeRunner,
    Rollout,
    load_tasks,
    open_environment,
    sampling_seed,
)
from rlvr_landscape_plugin.errors import ServerError, TasksetError
from rlvr_landscape_plugin.files import writing
from rlvr_landscape_plugin.serving.client import LandscapeClient
from rlvr_landscape_plugin.serving.launch import local_server, tail
from rlvr_landscape_plugin.snapshot import Snapshot, open_snapshot
from rlvr_landscape_plugin.trl.run_directory import Save
from rlvr_landscape_plugin.trl.states import STATES_ARE_SAFE

if TYPE_CHECKING:
    import verifiers.v1 as vf
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")
_NOTHING_MOVES = SliceSpec(seed=0, exclude=("*",))
"""A slice in which nothing moves: only the weights are wanted, no directions."""


class Practice:
    """Some tasks of a taskset, to be played by the server's policy. Raises `TasksetError` with the option that caused
    it."""

    def __init__(
        self, env_id: str, taskset: Mapping[str, object], tasks: slice, option: str, runtime: bool = False
    ) -> None:
        """`tasks`: which of the taskset's stream; `option`: where their number comes from, for messages; `runtime`:
        whether episodes get a subprocess runtime where a task needs one."""
        self.env = open_environment(env_id, taskset)
        self.runtime = runtime
        self.tasks: list[vf.Task] = load_tasks(self.env, tasks.stop, runtime, option)[tasks]

    @classmethod
    def practised(cls, config: TrainConfig) -> Practice:
        """The tasks that the policy learns from."""
        return cls(config.env.id, config.env.taskset, slice(0, config.env.num_tasks), "env.num_tasks", _runtime(config))

    @classmethod
    def held_out(cls, config: TrainConfig) -> Practice:
        """The tasks of evaluations."""
        first = config.first_held_out
        tasks = slice(first, first + config.evaluation.num_tasks)
        option = "evaluation.num_tasks" + (f", or env.num_tasks = {first} before them" if first else "")
        try:
            return cls(config.env.id, config.held_out_taskset, tasks, option, _runtime(config))
        except TasksetError as error:
            raise TasksetError(
                f"held-out tasks (env.taskset changed by evaluation.taskset = {config.evaluation.taskset}): {error}; "
                "evaluation.taskset = {} evaluates on later tasks of the stream that is practised"
            ) from error


def _runtime(config: TrainConfig) -> bool:
    return config.env.runtime is not None


class PolicyServer:
    """A local server and the episodes against it; use as a context manager."""

    def __init__(self, config: TrainConfig, base: Snapshot, scratch: Path, log: Path) -> None:
        self._config, self._base, self._scratch, self._log = config, base, scratch, log
        self._chat = ChatFormat(base.path)
        self._runners: dict[int, EpisodeRunner] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="policy-server", daemon=True)
        self._stack = contextlib.AsyncExitStack()
        self._client: LandscapeClient
        self._max_model_len = 0
        self.held: int | None = None
        """The step whose weights the server holds."""

    def __enter__(self) -> PolicyServer:
        self._thread.start()
        try:
            self._wait(self._start())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._wait(self._stack.aclose())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's own tokenizer."""
        return self._chat.tokenizer

    def _wait(self, coroutine: Coroutine[object, None, _T]) -> _T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except ServerError as error:
            raise ServerError(
                f"{error}; complete states are kept, the same command continues\n{tail(self._log)}"
            ) from error
        except BaseException:
            future.cancel()
            raise

    async def _start(self) -> None:
        with writing(self._scratch, STATES_ARE_SAFE):
            self._scratch.mkdir(parents=True, exist_ok=True)
        config = self._config.server
        roots = [self._base.path, self._scratch.resolve()]
        local = await self._stack.enter_async_context(local_server(config, self._base.path, roots, self._log))
        client = LandscapeClient(local.url, local.token, timeout=config.request_timeout)
        self._client = await self._stack.enter_async_context(client)
        self._max_model_len = int((await self._client.info())["max_model_len"])

    def push(self, save: Save, step: int) -> None:
        """Give the server the weights that `save` writes, unless it holds those of `step` already.

        The server must report the checksum of the files just written; every later sampling call names the weight
        version of this move, so rollouts of older weights cannot happen unnoticed.
        """
        if self.held == step:
            return
        self.held = None
        folder = self._scratch / "policy"
        with writing(folder, STATES_ARE_SAFE):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            save(folder)
        snapshot = open_snapshot(folder, self._base)
        self._wait(self._take(snapshot))
        self.held = step

    async def _take(self, snapshot: Snapshot) -> None:
        base = "" if snapshot.base is None else str(snapshot.base.path)
        facts = await self._client.load(str(snapshot.path), _NOTHING_MOVES.as_dict(), base=base)
        if facts["snapshot_sha256"] != snapshot.sha256:
            raise ServerError(f"{self._client.url} read other weights from {snapshot.path} than were written there")
        await self._client.move(0.0, 0.0)

    def roll(
        self,
        practice: Practice,
        indices: Sequence[int],
        rollouts: int,
        stream: str,
        progress: Callable[[], None] = lambda: None,
    ) -> list[list[Rollout]]:
        """`rollouts` episodes of each task `practice.tasks[i]`: [task][rollout].

        Sampling seeds are a function of the run's seed, `stream`, the task's index, the rollout and the turn.
        """
        runner = self._runners.get(id(practice))
        if runner is None:
            config = self._config
            runner = self._runners[id(practice)] = EpisodeRunner(
                practice.env,
                self._chat,
                self._client,
                config.sampling.max_tokens,
                self._max_model_len,
                config.env.max_concurrent,
                runtime=practice.runtime,
            )

        def seed(place: int, rollout: int, turn: int) -> int:
            return sampling_seed(self._config.seed, stream, indices[place], rollout, turn)

        tasks = [practice.tasks[index] for index in indices]
        return self._wait(runner.batch(tasks, rollouts, seed, progress))
