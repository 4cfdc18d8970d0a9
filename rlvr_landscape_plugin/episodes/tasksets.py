"""Opening a taskset of verifiers, and refusing what an in-process agent cannot do.

Tools, containers, request hooks, images and rewards that need a runtime are refused when the taskset is opened, never
skipped: every task is checked, not only the first. verifiers is imported inside functions, so that `--help` does not
wait for it.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rlvr_landscape_plugin.errors import TasksetError

if TYPE_CHECKING:
    import verifiers.v1 as vf

CAPS = ("max_input_tokens", "max_output_tokens", "max_total_tokens")
"""Limits of a role that a sweep does not enforce."""


def open_environment(env_id: str, taskset: Mapping[str, object]) -> vf.Env:
    """The verifiers environment behind a taskset id, checked for what an in-process agent can honour.

    Raises `TasksetError` for an unknown id, refused options, and whatever needs more than one policy and a chat loop.
    """
    from pydantic import ValidationError
    from verifiers.v1.configs.agent import AgentConfig
    from verifiers.v1.env import Env, EnvConfig
    from verifiers.v1.utils.generic import concrete_type
    from verifiers.v1.utils.loaders import environment_class

    logging.getLogger("verifiers").setLevel(logging.ERROR)
    try:
        cls = environment_class(env_id)
        config_cls = concrete_type(cls, EnvConfig) or EnvConfig
        # A role is a field whose default is an AgentConfig; its name is the author's (`agent`, `player`, …).
        roles = [name for name, field in config_cls.model_fields.items() if isinstance(field.default, AgentConfig)]
        if len(roles) != 1:
            raise TasksetError(
                f"taskset {env_id!r} plays {len(roles)} agents ({', '.join(roles)}); a sweep measures one policy in "
                "one role"
            )
        (role,) = roles
        config = config_cls.model_validate(
            {"taskset": {"id": env_id, **taskset}, role: {"runtime": {"type": "subprocess"}}}
        )
        env = cls(config)
    except TasksetError:
        raise
    except ModuleNotFoundError as error:
        raise TasksetError(f"taskset {env_id!r} (env.id) is not installed: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise TasksetError(f"taskset {env_id!r} refuses its options (env.taskset): {problems}") from error
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        if _is_v0(env_id):
            raise TasksetError(
                f"{env_id!r} (env.id) is an environment of verifiers' first interface (load_environment); verifiers "
                "removed that interface in 0.3.2. Use a version of the environment that exports a v1 Taskset"
            ) from error
        raise TasksetError(f"taskset {env_id!r} (env.id) cannot be opened: {error}") from error
    if env.taskset.toolsets(env.taskset.config):
        raise TasksetError(f"taskset {env_id!r} serves tools; sweeps drive tool-less chat tasksets")
    if any(getattr(cls, hook) is not getattr(Env, hook) for hook in ("start", "stop")):
        raise TasksetError(
            f"taskset {env_id!r} starts services of its own (Env.start, Env.stop), which a sweep does not"
        )
    for cap in CAPS:
        if getattr(role_config(env), cap, None) is not None:
            raise TasksetError(f"taskset {env_id!r} sets {role}.{cap}, which sweeps do not enforce; unset it")
    return env


def _is_v0(env_id: str) -> bool:
    """Whether the package behind an id that could not be opened is one of verifiers' first interface."""
    from verifiers.v1.utils.loaders import import_taskset

    try:
        return callable(getattr(import_taskset(env_id), "load_environment", None))
    except (ImportError, AttributeError) as error:
        # Such a package asks for what verifiers no longer has: `from verifiers import …`, or `vf.MultiTurnEnv`.
        return "verifiers" in (getattr(error, "name", None), getattr(getattr(error, "obj", None), "__name__", None))


def role_config(env: vf.Env) -> vf.AgentConfig:
    """The configuration of the one role of an opened environment, whatever its author calls it."""
    from verifiers.v1.configs.agent import agent_config_fields

    (config,) = agent_config_fields(env.config).values()
    return config


def load_tasks(env: vf.Env, count: int, runtime: bool = False, option: str = "env.num_prompts") -> list[vf.Task]:
    """The first `count` tasks, each checked. Raises `TasksetError` when there are fewer, none, or one is unfit.

    `runtime`: whether episodes get a subprocess runtime where a task needs one. `option`: where `count` comes from, for
    the message.
    """
    name = type(env.taskset).__name__
    try:
        tasks = list(itertools.islice(iter(env.taskset), count))
    except Exception as error:  # the taskset's own code, which may raise whatever it likes
        raise TasksetError(f"{name} failed to load its tasks: {type(error).__name__}: {error}") from error
    if not tasks:
        raise TasksetError(f"{name} is empty: it yields no task with these options")
    if len(tasks) < count:
        raise TasksetError(f"{name} has {len(tasks)} tasks, {count} were asked for; lower {option}")
    pays = _may_pay(env)
    for index, task in enumerate(tasks):
        if problems := unfit(task, runtime):
            raise TasksetError(f"task {index} of {name} needs more than {why_unfit(task, problems)}")
        if not (pays or task.hooks("reward") or task.plugged_judges()):
            raise TasksetError(
                f"task {index} of {name} has no reward: its task has no @vf.reward and no judge, and neither run() nor "
                "finalize() of its environment is its own; a landscape would be 0 everywhere"
            )
    return tasks


def _may_pay(env: vf.Env) -> bool:
    """Whether a hook of the environment itself could give a reward."""
    from verifiers.v1.env import Env
    from verifiers.v1.envs.single_agent import SingleAgentEnv

    return type(env).run is not SingleAgentEnv.run or type(env).finalize is not Env.finalize


def unfit(task: vf.Task, runtime: bool = False) -> list[str]:
    """What a task needs that an in-process chat loop does not have; empty if nothing.

    `runtime`: whether there is a subprocess runtime beside that loop.
    """
    from verifiers.v1.session import hook_boundary
    from verifiers.v1.trace import Trace
    from verifiers.v1.utils.decorators import discover_decorated

    problems = [] if runtime else runtime_needs(task)
    if task.NEEDS_CONTAINER or task.data.image is not None:
        problems.append("it needs a container")
    if task.toolsets(task.config):
        problems.append("it serves tools")
    if task.data.skills:
        problems.append("it installs skills")
    if task.data.artifacts:
        problems.append("it collects files of its runtime")
    if discover_decorated(task, "intercept"):
        problems.append("it intercepts model requests")
    if any(hook_boundary(fn, allow_trace=True) is not Trace for fn in task.hooks("stop")):
        problems.append("it stops on requests or responses")
    if not isinstance(task.data.prompt, str | None) and any(
        not isinstance(message.content, str | None) for message in task.data.prompt
    ):
        problems.append("its prompt holds images or other parts that are not text")
    return problems


def runtime_needs(task: vf.Task) -> list[str]:
    """What of a task runs beside the conversation, in a runtime; empty if nothing does."""
    from verifiers.v1.task import Task

    scorers = [*task.hooks("reward"), *task.hooks("metric"), *(judge.score for judge in task.plugged_judges())]
    needs = [f"{fn.__name__}() needs a runtime" for fn in scorers if _wants_runtime(fn)]
    hooks = [hook for hook in ("setup", "finalize") if getattr(type(task), hook) is not getattr(Task, hook)]
    return needs + [f"it overrides {hook}()" for hook in hooks]


def why_unfit(task: vf.Task, problems: Sequence[str]) -> str:
    """The end of a sentence about a task that needs more than is there: what it needs, and what may help."""
    said = f"an in-process chat loop: {', '.join(problems)}"
    if not unfit(task, runtime=True):
        said += "; env.runtime = 'subprocess' runs that on this machine, as you and without isolation"
    return f"{said} (docs/tasksets.md)"


def _wants_runtime(function: Callable[..., object]) -> bool:
    parameter = inspect.signature(function).parameters.get("runtime")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def prompts_hash(tasks: Sequence[vf.Task]) -> str:
    """SHA-256 over the content hashes of the tasks, in order."""
    return hashlib.sha256("\n".join(task.hash for task in tasks).encode()).hexdigest()
