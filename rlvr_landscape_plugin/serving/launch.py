"""Start and stop a local vLLM server with the landscape plugin; one code path for CPU and GPU.

    python -m rlvr_landscape_plugin.serving.launch --model tiny-sorter --server.port 8000

The server is a process group of its own, bound to loopback, with a fresh token unless one is given. It is ended by
process id when the context closes, also after an error or Ctrl-C; on Linux it ends with this process even when that is
killed (tether.py). Imports neither torch nor vllm.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from rlvr_landscape_plugin.config import LaunchConfig, ServerConfig, load_config
from rlvr_landscape_plugin.errors import ServerError, SnapshotError, run_cli, suggest
from rlvr_landscape_plugin.serving import access, versions
from rlvr_landscape_plugin.serving.protocol import (
    DIRECTIONS_MEMORY_VARIABLE,
    LOGPROBS_MODE,
    ROOTS_VARIABLE,
    TOKEN_VARIABLE,
)
from rlvr_landscape_plugin.snapshot import open_snapshot

HOST = "127.0.0.1"
API_KEY_VARIABLE = "VLLM_API_KEY"
"""vLLM's: the key that its own routes below /v1 and the like ask for."""


@dataclass(frozen=True)
class LocalServer:
    """A server that answers its health check."""

    url: str
    token: str
    pid: int
    log: Path


def free_port() -> int:
    """A TCP port that was free on loopback a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _port_in_use(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def resolve_device(config: ServerConfig) -> str:
    """`cpu` or `cuda`; `auto` means cuda where an NVIDIA driver answers."""
    if config.device != "auto":
        return config.device
    return "cuda" if shutil.which("nvidia-smi") and Path("/dev/nvidiactl").exists() else "cpu"


def command(config: ServerConfig, model: Path, port: int) -> list[str]:
    """The command line of the server; `model` is also what it serves first."""
    device = resolve_device(config)
    dtype = config.dtype
    if dtype == "auto" and device == "cpu":
        dtype = "float32"  # bfloat16 is several times slower on CPUs without AVX-512
    arguments = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", "policy", model.name.replace("_", "-")),
        *("--host", HOST, "--port", str(port)),
        *("--dtype", dtype, "--max-model-len", str(config.max_model_len)),
        *("--max-num-seqs", str(config.max_num_seqs)),
        *("--max-num-batched-tokens", str(config.max_num_batched_tokens)),
        *("--tensor-parallel-size", str(config.tensor_parallel_size)),
        *("--weight-transfer-config", json.dumps({"backend": "landscape"})),
        *("--logprobs-mode", LOGPROBS_MODE),
        "--enable-prefix-caching" if config.enable_prefix_caching else "--no-enable-prefix-caching",
        *("--uvicorn-log-level", "warning"),
    ]
    if device == "cpu":
        # A chunked prefill of a seeded request ends the engine on a CPU; a compiled graph keeps packed copies of the
        # linear weights that no reload reaches (docs/design.md, "Traps").
        arguments += ["--no-enable-chunked-prefill", "--enforce-eager"]
        # Only whole blocks of a prompt are shared between requests; vLLM's on a CPU, 128 tokens, are longer than many.
        arguments += ["--block-size", "32"]
    else:
        arguments += ["--gpu-memory-utilization", str(config.gpu_memory_utilization)]
    return [*arguments, *config.extra_args]


def environment(config: ServerConfig, token: str, roots: Sequence[Path]) -> dict[str, str]:
    """The server's environment: plugins, snapshot roots, no network, development mode off, and the token, which is
    also the key of vLLM's own routes unless the user has set one."""
    env = dict(os.environ)
    plugins = [name for name in env.get("VLLM_PLUGINS", "").split(",") if name]
    env["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*plugins, "rlvr_landscape"]))
    env[TOKEN_VARIABLE] = token
    env.setdefault(API_KEY_VARIABLE, token)
    # A snapshot may be a directory of links, as in the Hub's cache; whoever names it means what they lead to.
    readable = [*roots, *(file for root in roots for file in access.linked_files(root))]
    env[ROOTS_VARIABLE] = os.pathsep.join(str(path) for path in readable)
    env[DIRECTIONS_MEMORY_VARIABLE] = config.directions_memory
    env.pop(access.DEVELOPMENT_VARIABLE, None)
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    env.setdefault("HF_HUB_OFFLINE", "1")
    env.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "60")
    if resolve_device(config) == "cpu":
        env["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(config.kv_cache_gib)))
    return env


@contextlib.asynccontextmanager
async def local_server(
    config: ServerConfig, model: Path, roots: Sequence[Path], log: Path
) -> AsyncIterator[LocalServer]:
    """A running server for the policy in `model`, which may read snapshots below `roots`.

    Raises `ServerError` if vLLM is not installed or not one that the plugin works in (versions.py), the port is taken,
    the process ends early or does not answer within `config.start_timeout`; the message ends with the last lines of
    `log`.
    """
    versions.require()
    port = config.port if config.port is not None else free_port()
    if _port_in_use(port):
        raise ServerError(f"port {port} on {HOST} is in use; choose another with --server.port, or leave it out")
    token = config.token or os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(32)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "rlvr_landscape_plugin.serving.tether", str(os.getpid())),
            *command(config, model, port),
            env=environment(config, token, roots),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    server = LocalServer(f"http://{HOST}:{port}", token, process.pid, log)
    try:
        await _healthy(server, process, config.start_timeout)
        yield server
    finally:
        await _end(process)


async def _healthy(server: LocalServer, process: asyncio.subprocess.Process, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        while True:
            if process.returncode is not None:
                raise ServerError(
                    f"the vLLM server ended with code {process.returncode} while starting:\n{tail(server.log)}"
                )
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with session.get(server.url + "/health") as response:
                    if response.status == 200:
                        return
            if time.monotonic() > deadline:
                raise ServerError(f"the vLLM server did not answer within {timeout:g} s:\n{tail(server.log)}")
            await asyncio.sleep(0.25)


async def _end(process: asyncio.subprocess.Process) -> None:
    for number, patience in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), patience)
            break
    # Workers that outlived the front end share its process group.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


async def serve(config: LaunchConfig) -> None:
    """Run a server until this task is cancelled; says where it is."""
    snapshot = open_snapshot(config.model)
    if snapshot.base is not None:
        raise SnapshotError(
            f"model = {config.model!r} is an adapter; serve its base model ({snapshot.base.path}), and let a sweep "
            "name the adapter"
        )
    roots = [root.resolve() for root in config.roots] or [snapshot.path.parent]
    log = config.server.log or Path("outputs") / "server.log"
    print(f"starting a server for {snapshot.path} (log: {log})", flush=True)
    async with local_server(config.server, snapshot.path, roots, log) as server:
        print(f"{server.url}/v1 serves {snapshot.path.name.replace('_', '-')}; end it with Ctrl-C", flush=True)
        if not (config.server.token or os.environ.get(TOKEN_VARIABLE)):
            print(f"for sweeps, and as the key of /v1: export {TOKEN_VARIABLE}={server.token}", flush=True)
        suggest(f"rlvr-landscape sweep --server.urls {server.url} --snapshots {config.model}", "in another terminal")
        await asyncio.Event().wait()


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line; returns the exit code. `prog`: what the user typed, for the usage line."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_cli(lambda: asyncio.run(serve(load_config(arguments, LaunchConfig, prog))))


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a server log, for error messages."""
    try:
        text = log.read_text(errors="replace").splitlines()
    except OSError:
        return f"(no log at {log})"
    return "\n".join([f"--- last lines of {log}", *text[-lines:]])


if __name__ == "__main__":
    sys.exit(main())
