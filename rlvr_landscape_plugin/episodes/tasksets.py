"""Opening a taskset of verifiers, and refusing what an in-process agent cannot honour.

Tools, containers, request hooks and rewards that need a runtime are refused when the taskset is opened, never skipped.
verifiers is imported inside functions: `--help` must not wait for it.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rlvr_landscape_plugin.errors import TasksetError

if TYPE_CHECKING:
    import verifiers.v1 as vf


def open_environment(env_id: str, taskset: dict[str, Any]) -> vf.Env:
    """The verifiers environment behind a taskset id, checked for what an in-process agent can honour.

    Raises `TasksetError` for an unknown id, refused options, and whatever needs more than a chat loop.
    """
    from pydantic import ValidationError
    from verifiers.v1.env import EnvConfig
    from verifiers.v1.utils.generic import concrete_type
    from verifiers.v1.utils.loaders import environment_class

    logging.getLogger("verifiers").setLevel(logging.ERROR)
    try:
        cls = environment_class(env_id)
        config_cls = concrete_type(cls, EnvConfig) or EnvConfig
        config = config_cls.model_validate(
            {"taskset": {"id": env_id, **taskset}, "agent": {"runtime": {"type": "subprocess"}}}
        )
        env = cls(config)
    except ModuleNotFoundError as error:
        raise TasksetError(f"taskset {env_id!r} (env.id) is not installed: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise TasksetError(f"taskset {env_id!r} refuses its options (env.taskset): {problems}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise TasksetError(f"taskset {env_id!r} (env.id) cannot be opened: {error}") from error
    names = [name for name, value in env.config if type(value).__name__.endswith("AgentConfig")]
    if names != ["agent"]:
        raise TasksetError(f"taskset {env_id!r} plays agents {names}; a sweep measures one policy, a single `agent`")
    if env.taskset.toolsets(env.taskset.config):
        raise TasksetError(f"taskset {env_id!r} serves tools; sweeps drive tool-less chat tasksets")
    caps = ("max_input_tokens", "max_output_tokens", "max_total_tokens")
    for cap in caps:
        if getattr(env.config.agent, cap, None) is not None:
            raise TasksetError(f"taskset {env_id!r} sets agent.{cap}, which sweeps do not enforce; unset it")
    return env


def load_tasks(env: vf.Env, count: int) -> list[vf.Task]:
    """The first `count` tasks, each checked. Raises `TasksetError` when there are fewer, none, or one is unfit."""
    name = type(env.taskset).__name__
    try:
        tasks = list(itertools.islice(iter(env.taskset), count))
    except (ValueError, TypeError, OSError, KeyError) as error:
        raise TasksetError(f"{name} failed to load its tasks: {error}") from error
    if not tasks:
        raise TasksetError(f"{name} is empty: it yields no task with these options")
    if len(tasks) < count:
        raise TasksetError(f"{name} has {len(tasks)} tasks, {count} were asked for; lower env.num_prompts")
    _check_task(tasks[0], name)
    return tasks


def _check_task(task: vf.Task, name: str) -> None:
    from verifiers.v1.session import hook_boundary
    from verifiers.v1.task import Task
    from verifiers.v1.trace import Trace
    from verifiers.v1.utils.decorators import discover_decorated

    def wants_runtime(function: Callable[..., Any]) -> bool:
        parameter = inspect.signature(function).parameters.get("runtime")
        return parameter is not None and parameter.default is inspect.Parameter.empty

    scorers = [*task.hooks("reward"), *task.hooks("metric"), *(judge.score for judge in task.plugged_judges())]
    problems = [f"{fn.__name__}() needs a runtime" for fn in scorers if wants_runtime(fn)]
    problems += [
        f"it overrides {hook}()"
        for hook in ("setup", "finalize")
        if getattr(type(task), hook) is not getattr(Task, hook)
    ]
    if task.NEEDS_CONTAINER or task.data.image is not None:
        problems.append("it needs a container")
    if task.toolsets(task.config):
        problems.append("it serves tools")
    if discover_decorated(task, "intercept"):
        problems.append("it intercepts model requests")
    if any(hook_boundary(fn, allow_trace=True) is not Trace for fn in task.hooks("stop")):
        problems.append("it stops on requests or responses")
    if problems:
        raise TasksetError(f"tasks of {name} need more than an in-process chat loop: {', '.join(problems)}")


def prompts_hash(tasks: Sequence[vf.Task]) -> str:
    """SHA-256 over the content hashes of the tasks, in order."""
    return hashlib.sha256("\n".join(task.hash for task in tasks).encode()).hexdigest()
