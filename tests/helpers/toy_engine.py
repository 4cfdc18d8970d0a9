"""An engine that keeps vLLM's rules of a weight update, under the real routes: sessions, versions, failures.

`Engine` answers every request with the same tokens; `ToyEngine` samples and scores by the toy policy of
`fake_server.py`, so that whole sweeps run through `endpoint.py`. `main` serves it over HTTP in a process of its own,
which can be stopped, killed, and told to fail. It needs neither torch nor vllm.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from fake_server import TOKEN, ToyPolicy

from rlvr_landscape_plugin.directions import SliceSpec, fingerprint
from rlvr_landscape_plugin.serving import access
from rlvr_landscape_plugin.serving.protocol import ROOTS_VARIABLE, TOKEN_VARIABLE
from rlvr_landscape_plugin.snapshot import open_snapshot

TOKENS = np.array([5, 6, 7], dtype=np.int32)
NOTHING_AHEAD = {"parts": 0, "ready": 0, "errors": []}
"""What a load says of draws ahead where there were none."""
FAILURES = "failures.json"
"""In a server's control directory: what its next updates do (`Engine.outcomes`), then removed."""
BLOCK = 4
"""Tokens of a block of a toy engine's prefix cache."""
FOREIGN = "foreign_version.txt"
"""In a server's control directory: the version of an update that somebody else made, then removed."""


class Request:
    """vLLM's request classes: a dict under a name."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content


class Flat:
    """vLLM's flat log-probabilities: one per token, from the first token on that has any."""

    def __init__(self, tokens: list[int], logprobs: tuple[float, ...]) -> None:
        self.token_ids, self.logprobs = tokens, logprobs
        self.start_indices = tuple(range(len(tokens)))

    def __len__(self) -> int:
        return len(self.token_ids)


class Engine:
    """The front end of vLLM and its one worker, as far as weight updates go."""

    def __init__(
        self,
        backend: str = "landscape",
        logprobs_mode: str = "raw_logprobs",
        versions: bool = True,
        workers: int = 1,
        chunked: bool = False,
    ) -> None:
        self.active, self.version, self.paused = False, "default", False
        self.outcomes: list[str | Exception] = []
        """What the next updates do: the worker's word of the weights, or an error; empty: moved."""
        model = SimpleNamespace(
            model="m", served_model_name="m", dtype="torch.float32", logprobs_mode=logprobs_mode, max_model_len=64
        )
        model.get_vocab_size = lambda: 10
        self.vllm_config = SimpleNamespace(
            weight_transfer_config=SimpleNamespace(backend=backend),
            model_config=model,
            device_config=SimpleNamespace(device_type="cpu"),
            parallel_config=SimpleNamespace(tensor_parallel_size=workers, world_size=workers),
            cache_config=SimpleNamespace(enable_prefix_caching=True),
            scheduler_config=SimpleNamespace(enable_chunked_prefill=chunked),
        )
        self.engine_core = SimpleNamespace(pause_scheduler_async=self._pause)
        if versions:
            self.get_weight_version = self._version

    async def _pause(self, mode: str, clear_cache: bool) -> None:
        self.paused = True

    async def _version(self) -> str:
        await asyncio.sleep(0.01)  # outputs may be there first
        return self.version

    async def resume_generation(self) -> None:
        self.paused = False

    async def reset_prefix_cache(self) -> bool:
        return True

    async def init_weight_transfer_engine(self, request: Request) -> None:
        facts = {
            **{"snapshot_sha256": "a" * 64, "theta": 1.0, "theta_share": 1.0, "move_path": "kernel"},
            **{"move_path_reason": "", "directions_memory": "", "directions_memory_reason": "", "ahead": NOTHING_AHEAD},
        }
        _report(request, facts)

    async def start_weight_update(self) -> None:
        if self.active:
            raise RuntimeError("start_weight_update called while a weight update is already active")
        self.active = True

    async def update_weights(self, request: Request) -> None:
        outcome = self.outcomes.pop(0) if self.outcomes else "moved"
        if isinstance(outcome, Exception):
            self.active = False  # as vLLM's worker does
            raise outcome
        report: dict[str, Any] = {"weights": outcome, "changed": 0.0, "theta": 1.0}
        if outcome != "moved":
            report["error"] = "the direction's file cannot be read"
        _report(request, report)

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        if not self.active:
            raise RuntimeError("finish_weight_update called without a matching start_weight_update")
        self.active = False
        if weight_version is not None:
            self.version = weight_version

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        flat = Flat(TOKENS.tolist(), (-0.5, -1.0, -1.5))
        completion = SimpleNamespace(token_ids=TOKENS.tolist(), logprobs=flat, finish_reason="stop")
        yield SimpleNamespace(finished=True, outputs=[completion], prompt_logprobs=flat, num_cached_tokens=0)


def _report(request: Request, content: dict[str, Any]) -> None:
    Path(request.content["report"], "rank0.json").write_text(json.dumps(content))


class ToyEngine(Engine):
    """An engine whose policy is the toy policy. `control`: directory from which it takes failures; `slow`: seconds that
    a completion takes. Its prefix cache works as vLLM's: in whole blocks, and with no log π at what it holds."""

    def __init__(self, control: Path, dtype: str = "float32", slow: float = 0.0, chunked: bool = False) -> None:
        super().__init__(chunked=chunked)
        self._cache: set[bytes] = set()
        self.computed = 0
        """Tokens that went through the policy, but for those that it sampled."""
        model = self.vllm_config.model_config
        model.dtype, model.max_model_len = f"torch.{dtype}", 1024
        model.get_vocab_size = lambda: 2048
        self.control, self.slow = control, slow
        self._slice = "", ""
        self._at = 0.0, 0.0
        self.policy = ToyPolicy("whatever it was started with", "", 0.0, 0.0)

    async def init_weight_transfer_engine(self, request: Request) -> None:
        asked = request.content
        access.check_report_directory(asked["report"])
        if asked.get("ahead"):
            _report(request, {"begun": False, "reason": "a toy engine draws nothing"})
            return
        if "snapshot" not in asked:
            _report(request, {"weights": f"{self._slice[0]} at {self._at if any(self._at) else 'the origin'}"})
            return
        try:
            snapshot = open_snapshot(access.confined_snapshot(asked["snapshot"]), asked["base"] or None)
            spec = SliceSpec(**asked["slice"])
        except Exception as error:  # as the worker: whatever is wrong goes into the report
            _report(request, {"error": str(error)})
            return
        self._slice = snapshot.sha256, fingerprint(spec, snapshot.shapes)
        facts = {
            **{"snapshot_sha256": snapshot.sha256, "directions_fingerprint": self._slice[1], "seconds": 0.0},
            **{"parameters": 12, "moving_parameters": 12, "theta": 1.0, "theta_share": 1.0},
            **{"move_path": "kernel", "move_path_reason": "", "directions_dtype": "float32"},
            **{"directions_memory": "float32 on the host", "directions_memory_reason": "", "ahead": NOTHING_AHEAD},
        }
        _report(request, facts)

    async def update_weights(self, request: Request) -> None:
        asked, failures = request.content, self.control / FAILURES
        access.check_report_directory(asked["report"])
        if failures.exists():
            word, *later = json.loads(failures.read_text())
            failures.unlink()
            if later:
                failures.write_text(json.dumps(later))
            self.outcomes = [RuntimeError("a worker died") if word == "raise" else word]
        outcome = self.outcomes[0] if self.outcomes else "moved"
        if outcome == "moved":
            self._at = asked["alpha"], asked["beta"]
            self.policy = ToyPolicy(*self._slice, *self._at)
            self.outcomes = self.outcomes[1:]
            # As of two random directions that are each as long as the weights.
            _report(request, {"weights": "moved", "changed": float(np.hypot(*self._at)) ** 2, "theta": 1.0})
            return
        if outcome == "dirty" or isinstance(outcome, Exception):
            self.policy = ToyPolicy("a mixture of two policies", "", 0.0, 0.0)
        await super().update_weights(request)

    async def _version(self) -> str:
        foreign = self.control / FOREIGN
        if foreign.exists():
            self.version = foreign.read_text()
            foreign.unlink()
        return self.version

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        while self.paused:
            await asyncio.sleep(0.005)
        await asyncio.sleep(self.slow)
        given, policy = np.array(prompt["prompt_token_ids"], np.int32), self.policy
        scored = getattr(params, "prompt_logprobs", None) is not None
        cached = 0 if getattr(params, "skip_reading_prefix_cache", scored) else self._cached(given)
        self.computed += len(given) - cached
        if scored:
            self._keep(given)
            tokens, logprobs = given.copy(), np.concatenate([[0.0], policy.score(given)])
            tokens[1 : cached + 1], logprobs[1 : cached + 1] = -7, 99.0
            scores = Flat(tokens.tolist(), tuple(logprobs.tolist()))
            completion = SimpleNamespace(token_ids=[], logprobs=None, finish_reason="length")
            yield SimpleNamespace(finished=True, outputs=[completion], prompt_logprobs=scores, num_cached_tokens=cached)
            return
        tokens, logprobs, finish = policy.sample(given, params.seed, params.max_tokens)
        self._keep(np.concatenate([given, tokens]))
        flat = Flat(tokens.tolist(), tuple(logprobs.tolist()))
        completion = SimpleNamespace(token_ids=tokens.tolist(), logprobs=flat, finish_reason=finish)
        yield SimpleNamespace(finished=True, outputs=[completion])

    def _keep(self, tokens: np.ndarray) -> None:
        self._cache |= {tokens[:end].tobytes() for end in range(BLOCK, len(tokens) + 1, BLOCK)}

    def _cached(self, tokens: np.ndarray) -> int:
        """Tokens at the beginning that the cache holds; the last token is always computed."""
        ends = range(BLOCK, len(tokens), BLOCK)
        return max((end for end in ends if tokens[:end].tobytes() in self._cache), default=0)

    async def reset_prefix_cache(self) -> bool:
        self._cache.clear()
        return True


def stand_ins() -> dict[str, ModuleType]:
    """Modules that the routes import from vLLM, by name, for `sys.modules`."""
    transfer: Any = ModuleType("vllm.distributed.weight_transfer.base")
    transfer.WeightTransferInitRequest = transfer.WeightTransferUpdateRequest = Request
    sampling: Any = ModuleType("vllm.sampling_params")
    sampling.SamplingParams, sampling.RequestOutputKind = SimpleNamespace, SimpleNamespace(FINAL_ONLY=2)
    modules = {transfer.__name__: transfer, sampling.__name__: sampling}
    for name in ("vllm", "torch", "vllm.distributed", "vllm.distributed.weight_transfer"):
        module: Any = ModuleType(name)
        module.__version__ = "0"
        modules[name] = module
    return modules


async def routes_of(engine: Engine) -> tuple[Any, Any]:
    """The real routes in front of an engine, and the application that has them; vLLM's modules are `stand_ins`."""
    from fastapi import FastAPI

    from rlvr_landscape_plugin.serving.endpoint import LandscapeEndpoint

    routes, app = LandscapeEndpoint(), FastAPI()
    routes.attach_router(app)
    await routes.init_state(engine, None, SimpleNamespace())  # type: ignore[arg-type]
    return routes, app


def client_of(app: Any) -> Any:
    """A client that calls the routes of `app` without a network."""
    import httpx

    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app),
        base_url="http://server/landscape",
        headers={"Authorization": "Bearer token"},
    )


def main(control: Path, roots: list[Path], dtype: str, slow: float, development: str = "") -> None:
    """Serve a `ToyEngine` on a free port of loopback until the process ends.

    `control/url.txt` appears when it answers, `control/tmp` is its TMPDIR. `development`: the value of vLLM's
    development mode in its environment.
    """
    import uvicorn

    sys.modules.update(stand_ins())
    os.environ |= {TOKEN_VARIABLE: TOKEN, ROOTS_VARIABLE: os.pathsep.join(map(str, roots))}
    os.environ[access.DEVELOPMENT_VARIABLE] = development
    tempfile.tempdir = str(control / "tmp")

    async def serve() -> None:
        _, app = await routes_of(ToyEngine(control, dtype, slow))
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        scratch = control / f"url.{time.time_ns()}"
        scratch.write_text(f"http://127.0.0.1:{port}")
        scratch.rename(control / "url.txt")
        await task

    asyncio.run(serve())
