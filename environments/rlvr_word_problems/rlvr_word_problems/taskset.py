"""Word problems as a taskset of verifiers: one question, one reply, one number that is right or wrong.

The reward is 0 or 1, as in GSM8K, and needs no program: it is a pure function of the reply.
"""

# verifiers' generic classes are invariant in their configuration, which its own tasksets narrow the same way.
# pyright: reportInvalidTypeArguments=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportIncompatibleVariableOverride=false

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Literal

import verifiers.v1 as vf
from pydantic import Field, field_validator, model_validator

from rlvr_word_problems.rules import final_answer, is_correct, random_reward
from rlvr_word_problems.stories import OPERATIONS, Operation, Settings, make_problem

INSTRUCTION = "End your reply with the answer on a line of its own, like this: #### 42"


class WordProblemsTaskConfig(vf.TaskConfig):
    """How replies are scored."""

    reward_mode: Literal["verifier", "random", "inverted"] = "verifier"
    """What is paid: the verifier's 0 or 1; or, as a control, a coin's (`random_reward`) or one minus it
    (`inverted_reward`). A control keeps the verifier's score as the metric `verifier_reward`."""


class WordProblemsConfig(vf.TasksetConfig):
    """How problems are made."""

    min_steps: int = Field(default=1, ge=1, le=20)
    """Fewest things that happen in a story."""
    max_steps: int = Field(default=3, le=20)
    """Most things that happen in a story, at least `min_steps`."""
    largest: int = Field(default=20, ge=3, le=1_000_000)
    """Largest amount in a story; intermediate results stay within it too."""
    operations: list[Operation] = list(OPERATIONS)
    """What may happen: any of add, subtract, boxes (several of the same size), double, share (always last)."""
    seed: int = 1
    """Seed of the task stream."""
    task: WordProblemsTaskConfig = WordProblemsTaskConfig()

    @property
    def name(self) -> str:
        """The id and, where it is not the verifier's, the reward: what verifiers' results are labelled with."""
        mode = self.task.reward_mode
        return self.id if mode == "verifier" else f"{self.id}-{mode}-reward"

    @property
    def settings(self) -> Settings:
        """What `stories.make_problem` takes."""
        return Settings(self.min_steps, self.max_steps, self.largest, tuple(self.operations))

    @field_validator("operations")
    @classmethod
    def _some_story(cls, operations: list[Operation]) -> list[Operation]:
        if len(set(operations)) < len(operations):
            raise ValueError(f"operations = {operations} names one twice; name each once")
        if not set(operations) - {"share"}:
            raise ValueError(f"operations = {operations} can tell no story; add one of add, subtract, boxes, double")
        return operations

    @model_validator(mode="after")
    def _steps(self) -> WordProblemsConfig:
        if self.min_steps > self.max_steps:
            raise ValueError(
                f"min_steps = {self.min_steps} exceeds max_steps = {self.max_steps}; lower min_steps or raise max_steps"
            )
        return self


class WordProblemsData(vf.TaskData):
    """One problem."""

    answer: int
    """The right number."""


class WordProblemsTask(vf.Task[WordProblemsData, vf.State, WordProblemsTaskConfig]):
    """One problem with its reward."""

    @vf.stop
    async def single_turn(self, trace: vf.Trace) -> bool:
        """One reply only."""
        return trace.num_turns >= 1

    @vf.reward(weight=1.0)
    async def correct(self, trace: vf.Trace) -> float | dict[str, float]:
        """1 for the right number, else 0, see `rules.final_answer`; a control's under the control's own name."""
        if self.config.reward_mode == "random":
            return {"random_reward": random_reward(str(self.data.prompt), trace.last_reply or "")}
        if self.config.reward_mode == "inverted":
            return {"inverted_reward": 1.0 - self._verified(trace)}
        return self._verified(trace)

    @vf.metric
    async def verifier_reward(self, trace: vf.Trace) -> dict[str, float]:
        """What the verifier says where something else is paid; nothing where it is the reward itself."""
        return {} if self.config.reward_mode == "verifier" else {"verifier_reward": self._verified(trace)}

    @vf.metric
    async def format_failure(self, trace: vf.Trace) -> float:
        """1 where the reply gives no number that can be read, else 0."""
        return float(final_answer(trace.last_reply or "") is None)

    def _verified(self, trace: vf.Trace) -> float:
        return float(is_correct(trace.last_reply or "", self.data.answer))


class WordProblemsEnvConfig(vf.SingleAgentEnvConfig):
    """A plain chat, which runs anywhere."""

    agent: vf.AgentConfig = vf.AgentConfig(harness={"id": "null"}, runtime=vf.SubprocessConfig())
    """The policy. No tools and no code to run, so the tool-less harness in a local process is enough."""


class WordProblemsEnv(vf.SingleAgentEnv, vf.Env[WordProblemsEnvConfig]):
    """One question, one reply."""


class WordProblemsTaskset(vf.Taskset[WordProblemsTask, WordProblemsConfig]):
    """An endless stream of problems."""

    INFINITE = True

    def load(self) -> Iterator[WordProblemsTask]:
        """Yield tasks forever. A task depends on the options and its number only."""
        config = self.config
        for idx in count():
            problem = make_problem(config.settings, config.seed, idx)
            prompt = f"{problem.text}\n{INSTRUCTION}"
            yield WordProblemsTask(WordProblemsData(idx=idx, prompt=prompt, answer=problem.answer), config.task)
