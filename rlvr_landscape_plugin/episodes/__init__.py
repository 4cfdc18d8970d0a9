"""Playing a task with the policy on a server: from a taskset of verifiers to a rollout."""

from rlvr_landscape_plugin.episodes.chat import ChatFormat
from rlvr_landscape_plugin.episodes.play import EpisodeRunner
from rlvr_landscape_plugin.episodes.rollouts import ERROR, OK, TRUNCATED, Rollout, Segment, sampling_seed
from rlvr_landscape_plugin.episodes.tasksets import load_tasks, open_environment, prompts_hash

__all__ = [
    "ChatFormat",
    "ERROR",
    "EpisodeRunner",
    "OK",
    "Rollout",
    "Segment",
    "TRUNCATED",
    "load_tasks",
    "open_environment",
    "prompts_hash",
    "sampling_seed",
]
