"""Playing a task with the policy on a server: from a taskset of verifiers to a rollout."""

from rlvr_landscape_plugin.episodes.play import (
    ERROR,
    OK,
    TRUNCATED,
    ChatFormat,
    EpisodeRunner,
    Rollout,
    Segment,
    load_tasks,
    open_environment,
    prompts_hash,
    sampling_seed,
)

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
