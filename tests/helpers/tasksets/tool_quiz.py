"""A taskset with a tool of its own: the module is also the program that serves the tool."""

from __future__ import annotations

from collections.abc import Iterator

import verifiers.v1 as vf

__all__ = ["ToolQuizTaskset"]


class ToolQuizToolset(vf.Toolset[vf.ToolsetConfig]):
    TOOL_PREFIX = "shelf"

    @vf.tool
    def weigh(self, thing: str) -> str:
        """Say how heavy a thing is."""
        return f"{len(thing)} kg"


class ToolQuizTask(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @classmethod
    def toolsets(cls, config: vf.TaskConfig) -> list[vf.Toolset]:
        return [ToolQuizToolset(vf.ToolsetConfig())]

    @vf.reward
    async def weighed(self, trace: vf.Trace) -> float:
        return float("5 kg" in (trace.last_reply or ""))


class ToolQuizTaskset(vf.Taskset[ToolQuizTask, vf.TasksetConfig]):
    def load(self) -> Iterator[ToolQuizTask]:
        for idx in range(2):
            yield ToolQuizTask(vf.TaskData(idx=idx, prompt=f"How heavy is apple {idx}?"), vf.TaskConfig())


if __name__ == "__main__":
    ToolQuizToolset.run()
