"""Two agents play: a sweep measures one policy."""

from __future__ import annotations

import verifiers.v1 as vf

__all__ = ["TwoPlayersEnv", "TwoPlayersTaskset"]


class TwoPlayersConfig(vf.EnvConfig):
    white: vf.AgentConfig = vf.AgentConfig()
    black: vf.AgentConfig = vf.AgentConfig()


class TwoPlayersEnv(vf.Env[TwoPlayersConfig]):
    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        await agents.white.run(task)


class TwoPlayersTaskset(vf.Taskset[vf.Task, vf.TasksetConfig]):
    def load(self) -> list[vf.Task]:
        return [vf.Task(vf.TaskData(idx=0, prompt="?"), vf.TaskConfig())]
