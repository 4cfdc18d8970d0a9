"""Environments with a `run` of their own: what they do is an option, so that one package serves several tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import verifiers.v1 as vf

__all__ = ["EnvQuizEnv", "EnvQuizTaskset"]


Run = Literal["derive", "derive_plain", "derive_setup", "catch", "before_agent", "twice", "unpaid", "paid"]


class EnvQuizConfig(vf.TasksetConfig):
    run: Run = "derive"


class EnvQuizTask(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    pass


class DerivedTask(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def matches(self, trace: vf.Trace) -> float:
        """1 where the trace's task is the one whose prompt was asked."""
        asked = trace.nodes[0].message.content
        return float(trace.task.data.prompt == asked == self.data.prompt)


class SetupTask(DerivedTask):
    async def setup(self, trace: vf.Trace, runtime: vf.Runtime) -> None:
        return None


class EnvQuizEnvConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig(max_turns=2)


class EnvQuizEnv(vf.Env[EnvQuizEnvConfig]):
    made = 0

    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        how = str(task.data.name)
        if how.startswith("derive"):
            EnvQuizEnv.made += 1
            kind = {"derive": DerivedTask, "derive_plain": EnvQuizTask, "derive_setup": SetupTask}[how]
            trace = await agents.player.run(kind(vf.TaskData(prompt=f"Variant {EnvQuizEnv.made}"), vf.TaskConfig()))
            if how == "derive_plain":
                trace.record_reward("same", float(trace.task.data.prompt == trace.nodes[0].message.content))
        elif how == "catch":
            async with agents.player.interaction(task) as interaction:
                try:
                    await interaction.turn()
                    await interaction.turn("And now?")
                except Exception:
                    pass
            interaction.trace.record_reward("kind", 0.5)
        elif how == "before_agent":
            raise RuntimeError("the game engine is not there")
        elif how == "twice":
            await agents.player.run(task)
            await agents.player.run(task)
        else:
            trace = await agents.player.run(task)
            if how == "paid":
                trace.record_reward("game", 0.25)


class EnvQuizTaskset(vf.Taskset[EnvQuizTask, EnvQuizConfig]):
    def load(self) -> Iterator[EnvQuizTask]:
        for idx in range(4):
            yield EnvQuizTask(vf.TaskData(idx=idx, name=self.config.run, prompt=f"Say {idx}"), vf.TaskConfig())
