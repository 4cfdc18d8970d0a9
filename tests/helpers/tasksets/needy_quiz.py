"""A taskset that a sweep must refuse: its reward wants a runtime."""

from __future__ import annotations

from collections.abc import Iterator

import verifiers.v1 as vf

__all__ = ["NeedyTaskset"]


class NeedyTask(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=1.0)
    async def files(self, trace: vf.Trace, runtime: vf.Runtime) -> float:
        return 1.0


class NeedyTaskset(vf.Taskset[NeedyTask, vf.TasksetConfig]):
    def load(self) -> Iterator[NeedyTask]:
        yield NeedyTask(vf.TaskData(idx=0, prompt="?"), vf.TaskConfig())
