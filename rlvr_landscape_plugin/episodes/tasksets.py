"""Opening a taskset of verifiers, choosing the path of its episodes, and refusing what that path cannot do.

The chat loop of this process is fast and has neither tools nor hooks nor a harness; verifiers' own agents have all of
them. What the chosen path lacks is refused when the taskset is opened, never skipped: every task is checked, not only
the first. verifiers is imported inside functions, so that `--help` does not wait for it.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlvr_landscape_plugin.errors import TasksetError

if TYPE_CHECKING:
    import verifiers.v1 as vf

    from rlvr_landscape_plugin.config import EnvConfig

CHAT, VERIFIERS, AUTO = "chat", "verifiers", "auto"
"""How episodes are played: in the chat loop of this process, by verifiers' own agents, or the first that can."""
CAPS = ("max_input_tokens", "max_output_tokens", "max_total_tokens")
"""Limits of a role that the chat loop does not enforce."""
TOOLLESS = ("null", "rlvr-chat")
"""Harnesses that hold the conversation which the chat loop holds."""


class NeedsVerifiersError(TasksetError):
    """A taskset that the chat loop cannot play, and that verifiers' own agents might."""

    @property
    def lack(self) -> str:
        """What the chat loop lacks, without the advice."""
        return str(self).partition("; env.runtime")[0]


@dataclass(frozen=True)
class OpenedTaskset:
    """A taskset that can be measured, and how."""

    env: vf.Env
    tasks: list[vf.Task]
    path: str
    """`chat` or `verifiers`."""
    harness: Mapping[str, object] | None = None
    """Options of the harness on the path `verifiers`."""
    reason: str = ""
    """Why it is `verifiers`, if that was chosen here."""

    @property
    def has_tools(self) -> bool:
        """Whether the policy may call tools: those of the taskset, or those that a harness brings."""
        harness = (self.harness or {}).get("id")
        return _serves_tools(self.env, self.tasks) or (harness is not None and harness not in TOOLLESS)


def open_tasks(settings: EnvConfig) -> OpenedTaskset:
    """Open a taskset, load its tasks and choose their path. Raises `TasksetError` where none can play them."""
    runtime = settings.runtime is not None
    given = (settings.id, settings.taskset, settings.options)
    reason = ""
    if settings.path != VERIFIERS:
        try:
            env = open_environment(*given, harness=settings.harness)
            return OpenedTaskset(env, load_tasks(env, settings.num_prompts, runtime), CHAT)
        except NeedsVerifiersError as error:
            if settings.path == CHAT or not runtime:
                raise
            reason = error.lack
    if not runtime:
        raise TasksetError(
            "env.path = 'verifiers' runs the environment's harness on this machine, as you and without isolation; "
            "set env.runtime = 'subprocess' to allow that"
        )
    env = open_environment(*given, harness=settings.harness, path=VERIFIERS)
    tasks = load_tasks(env, settings.num_prompts, runtime, path=VERIFIERS)
    env = with_harness(env, tasks)
    harness = role_config(env).harness
    assert harness is not None
    chosen = {"id": harness.id} | harness.model_dump(mode="json", exclude_defaults=True)
    return OpenedTaskset(env, tasks, VERIFIERS, chosen, reason)


def open_environment(
    env_id: str,
    taskset: Mapping[str, object],
    options: Mapping[str, object] | None = None,
    *,
    harness: Mapping[str, object] | None = None,
    path: str = CHAT,
) -> vf.Env:
    """The verifiers environment behind a taskset id, checked for what `path` can honour.

    `options`: of the environment beside its taskset's. `harness`: of its one role, instead of its own. Raises
    `TasksetError` for an unknown id, refused options, and more than one role; `NeedsVerifiersError` for what the chat
    loop lacks.
    """
    from pydantic import ValidationError
    from verifiers.v1.configs.agent import AgentConfig
    from verifiers.v1.env import EnvConfig
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
        given = dict(options or {})
        seat = given.pop(role, {})
        if not isinstance(seat, Mapping):
            raise TypeError(f"env.options.{role} is not a table")
        seat = {**seat, "runtime": {"type": "subprocess"}, **({"harness": dict(harness)} if harness else {})}
        env = cls(config_cls.model_validate({**given, "taskset": {"id": env_id, **taskset}, role: seat}))
    except TasksetError:
        raise
    except ModuleNotFoundError as error:
        raise TasksetError(f"taskset {env_id!r} (env.id) is not installed: {error}") from error
    except ValidationError as error:
        found = error.errors()
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in found)
        if any(isinstance(item["input"], str) and item["input"].startswith(("[", "{")) for item in found):
            problems += """; on a command line a list or a table is given so: --env.taskset '{"key": ["a", "b"]}'"""
        raise TasksetError(f"taskset {env_id!r} refuses its options (env.taskset, env.options): {problems}") from error
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        if _is_v0(env_id):
            raise TasksetError(
                f"{env_id!r} (env.id) is an environment of verifiers' first interface (load_environment); verifiers "
                "removed that interface in 0.3.2. Use a version of the environment that exports a v1 Taskset"
            ) from error
        raise TasksetError(f"taskset {env_id!r} (env.id) cannot be opened: {error}") from error
    if path == CHAT and (lack := _beyond_chat(env, role)):
        raise NeedsVerifiersError(
            f"taskset {env_id!r} {lack}, which the chat loop of a sweep does not; env.runtime = 'subprocess' lets "
            "verifiers' own agents play it on this machine, as you and without isolation (docs/tasksets.md)"
        )
    return env


def _beyond_chat(env: vf.Env, role: str) -> str | None:
    """What an environment does and the chat loop does not; None if nothing."""
    if env.taskset.toolsets(env.taskset.config):
        return "serves tools"
    if starts_services(env):
        return "starts services of its own (Env.start, Env.stop)"
    for cap in CAPS:
        if getattr(role_config(env), cap, None) is not None:
            return f"sets {role}.{cap}"
    own = _own_harness(env)
    return None if own is None or own in TOOLLESS else f"has the harness {own!r}"


def starts_services(env: vf.Env) -> bool:
    """Whether an environment starts programs of its own beside its episodes (`Env.start`, `Env.stop`)."""
    from verifiers.v1.env import Env

    return any(getattr(type(env), hook) is not getattr(Env, hook) for hook in ("start", "stop"))


def _own_harness(env: vf.Env) -> str | None:
    """The id of the harness that the taskset, its role or the user names; None if none of them does."""
    from verifiers.v1.utils.loaders import default_harness_id

    pinned = role_config(env).harness
    if pinned is not None:
        return pinned.id
    # `bash` is what verifiers says for "none", unless the taskset is called that.
    found = default_harness_id(env.config.taskset.id)
    return None if found == "bash" else found


def with_harness(env: vf.Env, tasks: Sequence[vf.Task]) -> vf.Env:
    """The environment with its harness named: its own, else `null`, or `rlvr-chat`, its equal without tools.

    Raises `TasksetError` where verifiers says that harness and tasks do not fit.
    """
    from verifiers.v1.configs.harness import HarnessConfig
    from verifiers.v1.runtimes import SubprocessConfig
    from verifiers.v1.utils.compile import resolve_runtime_config, validate_pairing
    from verifiers.v1.utils.loaders import harness_config_type, load_harness

    seat = role_config(env)
    own = _own_harness(env)
    if seat.harness is None:
        name = own or ("null" if _serves_tools(env, tasks) else "rlvr-chat")
        config: HarnessConfig = harness_config_type(name).model_validate({"id": name})
        (role,) = (field for field, value in env.config if value is seat)
        env = type(env)(env.config.model_copy(update={role: seat.model_copy(update={"harness": config})}))
    chosen = role_config(env).harness
    assert chosen is not None
    try:
        harness = load_harness(chosen)
        for task in tasks:
            resolve_runtime_config(SubprocessConfig(), task)
            tools = [*env.taskset.toolsets(env.taskset.config), *task.toolsets(task.config)]
            validate_pairing(harness, type(task), SubprocessConfig(), tools=tools)
    except (ValueError, TypeError, ImportError) as error:
        raise TasksetError(f"{type(env.taskset).__name__} with the harness {chosen.id!r}: {error}") from error
    return env


def _serves_tools(env: vf.Env, tasks: Sequence[vf.Task]) -> bool:
    return bool(env.taskset.toolsets(env.taskset.config)) or any(task.toolsets(task.config) for task in tasks)


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


def load_tasks(
    env: vf.Env, count: int, runtime: bool = False, option: str = "env.num_prompts", path: str = CHAT
) -> list[vf.Task]:
    """The first `count` tasks, each checked. Raises `TasksetError` when there are fewer, none, or one is unfit.

    `runtime`: whether episodes get a subprocess runtime where a task needs one. `option`: where `count` comes from, for
    the message. `path`: how they will be played; `NeedsVerifiersError` is raised for what only the chat loop lacks.
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
        if problems := beyond_reach(task):
            raise TasksetError(f"task {index} of {name} cannot be measured: {', '.join(problems)} (docs/tasksets.md)")
        if path == CHAT and (problems := unfit(task, runtime)):
            raise NeedsVerifiersError(f"task {index} of {name} needs more than {why_unfit(task, problems)}")
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


def beyond_reach(task: vf.Task) -> list[str]:
    """What a task needs and a sweep has on no path; empty if nothing."""
    problems = []
    if task.NEEDS_CONTAINER or task.data.image is not None:
        problems.append("it needs a container")
    if task.data.artifacts:
        problems.append("it collects files of its runtime")
    if not isinstance(task.data.prompt, str | None) and any(
        not isinstance(message.content, str | None) for message in task.data.prompt
    ):
        problems.append("its prompt holds images or other parts that are not text")
    return problems


def unfit(task: vf.Task, runtime: bool = False) -> list[str]:
    """What a task needs that an in-process chat loop does not have; empty if nothing.

    `runtime`: whether there is a subprocess runtime beside that loop.
    """
    from verifiers.v1.session import hook_boundary
    from verifiers.v1.trace import Trace
    from verifiers.v1.utils.decorators import discover_decorated

    problems = [*beyond_reach(task), *([] if runtime else runtime_needs(task))]
    if task.toolsets(task.config):
        problems.append("it serves tools")
    if task.data.skills:
        problems.append("it installs skills")
    if discover_decorated(task, "intercept"):
        problems.append("it intercepts model requests")
    if any(hook_boundary(fn, allow_trace=True) is not Trace for fn in task.hooks("stop")):
        problems.append("it stops on requests or responses")
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
    if runtime_needs(task) and not unfit(task, runtime=True):
        said += "; env.runtime = 'subprocess' runs that on this machine, as you and without isolation"
    elif not beyond_reach(task):
        said += (
            "; env.runtime = 'subprocess' with env.path = 'auto' or 'verifiers' lets verifiers' own agents do that, on "
            "this machine, as you and without isolation"
        )
    return f"{said} (docs/tasksets.md)"


def _wants_runtime(function: Callable[..., object]) -> bool:
    parameter = inspect.signature(function).parameters.get("runtime")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def prompts_hash(tasks: Sequence[vf.Task]) -> str:
    """SHA-256 over the content hashes of the tasks, in order."""
    return hashlib.sha256("\n".join(task.hash for task in tasks).encode()).hexdigest()
