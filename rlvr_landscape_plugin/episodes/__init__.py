"""Playing a task with the policy on a server: from a taskset of verifiers to a rollout."""

from rlvr_landscape_plugin.episodes.chat import ChatFormat, check_chat, check_same_chat
from rlvr_landscape_plugin.episodes.play import EpisodeRunner
from rlvr_landscape_plugin.episodes.rollouts import ERROR, OK, TRUNCATED, Failures, Rollout, Segment, sampling_seed
from rlvr_landscape_plugin.episodes.tasksets import (
    OpenedTaskset,
    load_tasks,
    open_environment,
    open_tasks,
    prompts_hash,
)
from rlvr_landscape_plugin.episodes.tool_calls import check_tool_parser

__all__ = [
    "ChatFormat",
    "ERROR",
    "EpisodeRunner",
    "Failures",
    "OK",
    "OpenedTaskset",
    "Rollout",
    "Segment",
    "TRUNCATED",
    "check_chat",
    "check_same_chat",
    "check_tool_parser",
    "load_tasks",
    "open_environment",
    "open_tasks",
    "prompts_hash",
    "sampling_seed",
]
