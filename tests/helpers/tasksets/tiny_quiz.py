"""A verifiers taskset of another kind, for the tests: finite, one turn, the task brings its prompt."""

from __future__ import annotations

from collections.abc import Iterator

import verifiers.v1 as vf

__all__ = ["TinyQuizTaskset"]


class QuizConfig(vf.TasksetConfig):
    count: int = 4
    system: str | None = None
    broken: bool = False


class QuizTask(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=0.5)
    async def length(self, trace: vf.Trace) -> float:
        if self.data.name == "broken":
            raise RuntimeError("this verifier is broken")
        return float(len(trace.last_reply))

    @vf.stop
    async def never(self, trace: vf.Trace) -> bool:
        return False


class TinyQuizTaskset(vf.Taskset[QuizTask, QuizConfig]):
    def load(self) -> Iterator[QuizTask]:
        for idx in range(self.config.count):
            name = "broken" if self.config.broken else "fine"
            yield QuizTask(
                vf.TaskData(idx=idx, name=name, prompt=f"Say {idx}", system_prompt=self.config.system), vf.TaskConfig()
            )
