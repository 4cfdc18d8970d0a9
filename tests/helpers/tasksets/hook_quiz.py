"""Tasks with hooks on requests and responses: what they do is an option, so that one package serves several tests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Literal

import verifiers.v1 as vf

__all__ = ["HookQuizTaskset"]

Hook = Literal["rewrite", "stop", "raise", "hang", "swallow"]


class HookConfig(vf.TasksetConfig):
    hook: Hook = "rewrite"


class HookTask(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @vf.intercept
    async def guard(self, response: vf.Response) -> vf.Response | None:
        if self.data.name == "raise":
            raise KeyError("the guard has no rule for this")
        if self.data.name == "hang":
            await asyncio.Event().wait()
        if self.data.name == "rewrite" and "7" in (response.message.content or ""):
            return response.model_copy(update={"message": vf.AssistantMessage(content="blocked")})
        return None

    @vf.stop
    def forbidden(self, response: vf.Response) -> bool:
        return self.data.name == "stop" and "7" in (response.message.content or "")

    @vf.reward
    async def blocked(self, trace: vf.Trace) -> float:
        return float(bool(trace.response_rewrites) or trace.stop_condition == "forbidden")

    @vf.metric
    async def rewritten(self, trace: vf.Trace) -> float:
        return float(len(trace.response_rewrites))


class HookQuizTaskset(vf.Taskset[HookTask, HookConfig]):
    def load(self) -> Iterator[HookTask]:
        for idx in range(4):
            yield HookTask(vf.TaskData(idx=idx, name=self.config.hook, prompt=f"Say {idx}"), vf.TaskConfig())
