"""An environment that starts services of its own."""

from __future__ import annotations

import verifiers.v1 as vf

__all__ = ["ServingEnv", "ServingTaskset"]


class ServingEnv(vf.SingleAgentEnv):
    async def start(self) -> None:
        return None


class ServingTaskset(vf.Taskset[vf.Task, vf.TasksetConfig]):
    def load(self) -> list[vf.Task]:
        return [vf.Task(vf.TaskData(idx=0, prompt="?"), vf.TaskConfig())]
