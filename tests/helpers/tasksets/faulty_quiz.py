"""Tasks with one fault, which the first task does not have: each test names the fault it is about."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import verifiers.v1 as vf

__all__ = ["FaultyQuizTaskset"]

Fault = Literal["none", "setup", "runtime", "image", "skills", "raises", "text", "infinite", "sometimes", "unpaid"]


class FaultyConfig(vf.TasksetConfig):
    fault: Fault = "none"
    from_task: int = 1
    """The first task that has the fault."""


class FaultyTask(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def length(self, trace: vf.Trace) -> float:
        replies = {"raises": None, "text": "ten", "infinite": float("inf")}
        fault = self.data.name or "none"
        if fault == "raises" or (fault == "sometimes" and trace.last_reply == "bad"):
            raise KeyError("no answer in this row")
        return replies.get(fault, float(len(trace.last_reply)))  # pyright: ignore[reportReturnType]

    @vf.metric
    async def words(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply.split()))

    @vf.metric
    async def counts(self, trace: vf.Trace) -> dict[str, float]:
        return {"vowels of a reply": float(sum(letter in "aeiou" for letter in trace.last_reply))}


class UnpaidTask(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    pass


class SetupTask(FaultyTask):
    async def setup(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        trace.info["ready"] = True


class RuntimeTask(FaultyTask):
    @vf.reward
    async def files(self, runtime: vf.Runtime) -> float:
        return float(len((await runtime.run(["ls"], {})).stdout))


class FaultyQuizTaskset(vf.Taskset[FaultyTask, FaultyConfig]):
    def load(self) -> Iterator[FaultyTask]:
        for idx in range(4):
            fault = self.config.fault if idx >= self.config.from_task else "none"
            prompt: object = f"Say {idx}"
            if fault == "image":
                image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
                prompt = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}]
            data = vf.TaskData(idx=idx, name=fault, prompt=prompt)  # pyright: ignore[reportArgumentType]
            if fault == "skills":
                data = data.model_copy(update={"skills": ["somewhere"]})
            kind = {"setup": SetupTask, "runtime": RuntimeTask, "unpaid": UnpaidTask}.get(fault, FaultyTask)
            yield kind(data, vf.TaskConfig())  # pyright: ignore[reportReturnType]
