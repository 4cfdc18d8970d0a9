"""Alphabet-sort: sort some names, then keep the list sorted while more names arrive.

One task is a whole conversation. The first turn asks for a list in `<alphabetical_sorted>` tags; each later turn adds
names and asks for the combined list in `<combined_alphabetical_sorted>` tags with the new names marked. The user's
turns are written when the task is made and replayed by `AlphabetSortEnv`, so a task has no prompt of its own.

Tasks and rewards are those of the published environment (verifiers, `environments/alphabet_sort`): the order in which
the generator is drawn from and every character of the prompts are part of that contract.
"""

# verifiers' generic classes are invariant in their configuration, which its own tasksets narrow the same way.
# pyright: reportInvalidTypeArguments=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Literal

import verifiers.v1 as vf
from pydantic import Field, field_validator, model_validator

from rlvr_alphabet_sort.names import check_source, open_source
from rlvr_alphabet_sort.rules import FIRST_TAG, LATER_TAG, NEW_MARK, episode_reward, format_failures, random_reward

SEED = 1337420
"""The published environment's seed."""


class AlphabetSortTaskConfig(vf.TaskConfig):
    """How answers are scored."""

    similarity_power: int = Field(default=4, ge=1)
    """Exponent on the sequence similarity; higher punishes small errors harder."""
    power_per_turn: bool = True
    """Raise each turn's similarity, then average (True); or average first, then raise the mean (False)."""
    reward_mode: Literal["verifier", "random", "inverted"] = "verifier"
    """What is paid: the verifier's score; or, as a control, a coin's (`random_reward`) or one minus it
    (`inverted_reward`). A control keeps the verifier's score as the metric `verifier_reward`."""


class AlphabetSortConfig(vf.TasksetConfig):
    """How conversations are made."""

    min_turns: int = Field(default=1, ge=1)
    """Fewest turns of a conversation."""
    max_turns: int = 3
    """Most turns of a conversation, at least `min_turns`."""
    min_names_per_turn: int = Field(default=1, ge=1)
    """Fewest names that a turn brings."""
    max_names_per_turn: int = 5
    """Most names that a turn brings, at least `min_names_per_turn`."""
    seed: int = SEED
    """Seed of the task stream; the default gives the published tasks on the published names. 0 is a seed too."""
    source: str = "builtin"
    """`builtin` (names shipped with the package), `hf` (the published dataset), or a JSONL file of {"names": [...]}."""
    task: AlphabetSortTaskConfig = AlphabetSortTaskConfig()

    @property
    def name(self) -> str:
        """The id and, where it is not the verifier's, the reward: what verifiers' results are labelled with."""
        mode = self.task.reward_mode
        return self.id if mode == "verifier" else f"{self.id}-{mode}-reward"

    @field_validator("source")
    @classmethod
    def _source_opens(cls, source: str) -> str:
        check_source(source)
        return source

    @model_validator(mode="after")
    def _ranges(self) -> AlphabetSortConfig:
        for low, high in (("min_turns", "max_turns"), ("min_names_per_turn", "max_names_per_turn")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{low} = {getattr(self, low)} exceeds {high} = {getattr(self, high)}; lower {low} or raise {high}"
                )
        return self


class AlphabetSortData(vf.TaskData):
    """One conversation."""

    info: dict[str, Any]
    """`user_turns`: the user's messages; `ground_truths`: the true list of each turn; `num_turns`."""


class AlphabetSortTask(vf.Task[AlphabetSortData, vf.State, AlphabetSortTaskConfig]):
    """One conversation with its reward."""

    @vf.reward(weight=1.0)
    async def alphabet_sort(self, trace: vf.Trace) -> float | dict[str, float]:
        """The verifier's reward, see `rules.episode_reward`; a control's under the control's own name."""
        if self.config.reward_mode == "random":
            return {"random_reward": random_reward(self.data.info["user_turns"], _responses(trace))}
        if self.config.reward_mode == "inverted":
            return {"inverted_reward": 1.0 - self._verified(trace)}
        return self._verified(trace)

    @vf.metric
    async def verifier_reward(self, trace: vf.Trace) -> dict[str, float]:
        """What the verifier says where something else is paid; nothing where it is the reward itself."""
        return {} if self.config.reward_mode == "verifier" else {"verifier_reward": self._verified(trace)}

    @vf.metric
    async def format_failure(self, trace: vf.Trace) -> float:
        """Share of turns without a tagged list."""
        return format_failures(_responses(trace), self.data.info["num_turns"])

    def _verified(self, trace: vf.Trace) -> float:
        return episode_reward(
            _responses(trace),
            self.data.info["ground_truths"],
            self.config.similarity_power,
            self.config.power_per_turn,
        )


def _responses(trace: vf.Trace) -> list[str]:
    return [message.content or "" for message in trace.assistant_messages]


class AlphabetSortEnvConfig(vf.SingleAgentEnvConfig):
    """A plain chat, which runs anywhere."""

    agent: vf.AgentConfig = vf.AgentConfig(harness={"id": "null"}, runtime=vf.SubprocessConfig())
    """The policy. No tools and no code to run, so the tool-less harness in a local process is enough."""


class AlphabetSortEnv(vf.SingleAgentEnv, vf.Env[AlphabetSortEnvConfig]):
    """Plays the user: sends the task's turns one by one."""

    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        """Replay the conversation until it ends or the agent is stopped."""
        async with agents.agent.interaction(task) as interaction:
            for message in task.data.info["user_turns"]:
                if (await interaction.turn(message)).terminated:
                    break


class AlphabetSortTaskset(vf.Taskset[AlphabetSortTask, AlphabetSortConfig]):
    """An endless stream of conversations."""

    INFINITE = True

    def load(self) -> Iterator[AlphabetSortTask]:
        """Yield tasks forever; raises ValueError when a whole pass over the names yields none."""
        config = self.config
        source = open_source(config.source, config.seed, config.max_turns * config.max_names_per_turn)
        rng = random.Random(config.seed)
        idx = number = 0
        while True:
            before = idx
            for names in source(number):
                info = _conversation(names, config, rng)
                if info is not None:
                    yield AlphabetSortTask(AlphabetSortData(idx=idx, prompt=None, info=info), config.task)
                    idx += 1
            if idx == before:
                raise ValueError(
                    f"no name list of source = {config.source!r} is long enough for {config.min_turns} to "
                    f"{config.max_turns} turns of {config.min_names_per_turn} to {config.max_names_per_turn} names; "
                    "lower min_turns/max_turns or min_names_per_turn/max_names_per_turn"
                )
            number += 1


def _part(name: str, by_first: bool) -> str:
    """The given name, or what follows it: a name is cut before its first capital after the initial one."""
    cut = next((i for i in range(1, len(name)) if name[i].isupper()), len(name))
    return name[:cut] if by_first else name[cut:]


def _example(count: int, marked_from: int) -> str:
    return "\n".join(f"Name{j}" + (NEW_MARK if j >= marked_from else "") for j in range(1, count + 1))


def _conversation(raw_names: Any, config: AlphabetSortConfig, rng: random.Random) -> dict[str, Any] | None:
    """Draw one conversation from a name list; None if the list is too short. The order of draws is the contract."""
    names = list(dict.fromkeys(name.replace(" ", "") for name in raw_names))
    fewest, most = config.min_names_per_turn, config.max_names_per_turn
    turns = rng.randint(config.min_turns, config.max_turns)
    counts = [rng.randint(fewest, most) for _ in range(turns)]
    if len(names) < sum(counts):
        return None
    by_first = rng.choice([True, False])
    label = "FIRST" if by_first else "LAST"

    groups, start = [], 0
    for count in counts:
        groups.append(names[start : start + count])
        start += count

    truths: list[list[str]] = []
    for turn, group in enumerate(groups):
        known = sorted((name for part in groups[: turn + 1] for name in part), key=lambda name: _part(name, by_first))
        truths.append(known if turn == 0 else [name + NEW_MARK if name in group else name for name in known])

    messages = []
    for turn, group in enumerate(groups):
        listed = group[:]
        rng.shuffle(listed)
        if turn == 0:
            example = _example(rng.randint(fewest, most), most + 1)
            messages.append(
                f"Sort these names in alphabetical order by {label} name: {', '.join(listed)}\n\n"
                f"Use exactly this format:\n<{FIRST_TAG}>\n{example}\n</{FIRST_TAG}>"
            )
            continue
        shown = rng.randint(fewest, sum(len(part) for part in groups[: turn + 1]))
        threshold = rng.randint(0, shown - 1)
        message = (
            f"Now sort ALL of these names alphabetically by {label} name: {', '.join(listed)}\n\n"
            "These are in addition to the prior list. Mark any NEW names (that weren't in the prior list) "
            f"with `{NEW_MARK.strip()}` at the end."
        )
        if turn == 1:
            example = _example(shown, threshold + 1)
            message += f"\n\nUse exactly this format:\n<{LATER_TAG}>\n{example}\n</{LATER_TAG}>"
        else:
            message += " Follow the same format as before."
        messages.append(message)
    return {"user_turns": messages, "ground_truths": truths, "num_turns": turns}
