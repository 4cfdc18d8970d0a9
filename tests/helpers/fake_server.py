"""A landscape server without vLLM: the real routes, a deterministic toy policy, and faults on demand.

The policy knows twelve tokens (eleven digits and signs, and the end of a turn). Its logits after a prefix are
`b + 20 (α u + β v)`, where b, u and v are drawn from hashes of the prefix, the snapshot and the slice. So moves change
what is sampled, equal seeds give equal tokens, probabilities add up to one, and the origin is the same for all slices.
It imports neither torch nor vllm, so sweeps can be tested in seconds.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
from aiohttp import web

from rlvr_landscape_plugin.directions import SliceSpec, fingerprint
from rlvr_landscape_plugin.serving.protocol import (
    PROTOCOL,
    AheadCall,
    GenerateCall,
    LoadCall,
    MoveCall,
    ScoreCall,
    pack,
    unpack_ids,
)
from rlvr_landscape_plugin.snapshot import open_snapshot

END = 2
"""The token that ends a turn of tiny-sorter's chat template."""
TOKENS = np.array([END, *range(18, 29)], np.int32)
"""What the policy can say."""
TOKEN = "a-token-of-the-fake-server"

Before = Callable[[str, int], Awaitable[None]]
"""Called with a route's last word and how often it was asked, before it answers; may sleep or raise."""


class Cut(Exception):
    """Raised by a `Before` to cut the connection without an answer."""


class ToyPolicy:
    """The toy policy at one point of one slice."""

    def __init__(self, snapshot: str, slice_: str, alpha: float, beta: float) -> None:
        self._keys = f"{snapshot} base", f"{slice_} alpha", f"{slice_} beta"
        self._weights = 1.5, 20.0 * alpha, 20.0 * beta

    def logprobs(self, prefix: bytes) -> np.ndarray:
        """log π(token | prefix) for each of `TOKENS`, float64."""
        logits = np.zeros(len(TOKENS))
        for key, weight in zip(self._keys, self._weights, strict=True):
            if weight:
                seed = hashlib.blake2b(key.encode() + prefix, digest_size=8).digest()
                logits += weight * np.random.default_rng(int.from_bytes(seed, "little")).standard_normal(len(TOKENS))
        return logits - np.logaddexp.reduce(logits)

    def sample(self, prompt: np.ndarray, seed: int, limit: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Tokens, their log-probabilities and the reason of the end: the same for the same seed."""
        prefix, tokens, logprobs = hashlib.blake2b(prompt.astype("<i4").tobytes()).digest(), [], []
        for gumbel in np.random.default_rng(seed).gumbel(size=(limit, len(TOKENS))):
            log_p = self.logprobs(prefix)
            index = int(np.argmax(log_p + gumbel))
            tokens.append(int(TOKENS[index]))
            logprobs.append(log_p[index])
            if tokens[-1] == END:
                break
            prefix = hashlib.blake2b(prefix + TOKENS[index].tobytes()).digest()
        finish = "stop" if tokens[-1] == END else "length"
        return np.array(tokens, np.int32), np.array(logprobs, np.float32), finish

    def score(self, sequence: np.ndarray) -> np.ndarray:
        """log π of `sequence[1:]`, float32; −30 for a token that the policy never says."""
        places = {int(token): index for index, token in enumerate(TOKENS)}
        found = np.full(len(sequence) - 1, -30.0, np.float32)
        # A turn may begin anywhere, and what came before it is hashed as one prompt.
        starts = [at for at in range(1, len(sequence)) if int(sequence[at]) in places]
        for start in starts:
            if start > 1 and int(sequence[start - 1]) in places and int(sequence[start - 1]) != END:
                continue
            prefix = hashlib.blake2b(sequence[:start].astype("<i4").tobytes()).digest()
            for at in range(start, len(sequence)):
                token = int(sequence[at])
                if token not in places:
                    break
                found[at - 1] = self.logprobs(prefix)[places[token]]
                if token == END:
                    break
                prefix = hashlib.blake2b(prefix + np.int32(token).tobytes()).digest()
        return found


class FakeServer:
    """The server in a thread of this process; use as a context manager."""

    def __init__(self, before: Before | None = None, **facts: Any) -> None:
        """`facts`: what `/landscape/info` shall say otherwise than usual, such as `dtype`."""
        self.before = before
        self.asked: Counter[str] = Counter()
        """Route → how often it was asked."""
        self._facts = {
            "protocol": PROTOCOL,
            "vllm": "none (a fake server)",
            "torch": "none",
            "model": "tiny_sorter",
            "served_model_name": "policy",
            "dtype": "float32",
            "device": "cpu",
            "max_model_len": 1024,
            "vocab_size": 2048,
            "tensor_parallel_size": 1,
            "prefix_caching": True,
            "backend": "landscape",
            "logprobs_mode": "processed_logprobs",
            "draws_ahead": True,
        } | facts
        self._directions_dtype = self._facts.pop("directions_dtype", "float32")
        self.ahead: list[int] = []
        """Seeds of the slices that were asked for ahead, in order."""
        self.loads: list[int] = []
        """Seeds of the slices that were loaded, in order."""
        self.ahead_errors: list[str] = []
        """What the next loads shall say went wrong with the draws ahead."""
        self.no_room = ""
        """Why draws ahead are declined."""
        self._loaded: dict[str, Any] | None = None
        self._at: list[float] | None = None
        self._version, self._state = "unknown", "unknown"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.url, self.token = "", TOKEN

    def __enter__(self) -> FakeServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**28)
        for word, method in (("info", "GET"), ("checksums", "GET"), ("load", "POST"), ("move", "POST")):
            app.router.add_route(method, f"/landscape/{word}", self._guarded(word, getattr(self, f"_{word}")))
        if self._facts["draws_ahead"]:
            app.router.add_post("/landscape/ahead", self._guarded("ahead", self._ahead))
        for word in ("generate", "score"):
            app.router.add_post(f"/landscape/{word}", self._guarded(word, getattr(self, f"_{word}")))
        self._runner = web.AppRunner(app, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    def _guarded(self, word: str, handler: Callable[[bytes], Awaitable[Any]]) -> Any:
        async def route(request: web.Request) -> web.StreamResponse:
            if request.headers.get("Authorization") != f"Bearer {self.token}":
                return web.json_response({"detail": "wrong or missing bearer token"}, status=401)
            self.asked[word] += 1
            try:
                if self.before is not None:
                    await self.before(word, self.asked[word])
                answer = await handler(await request.read())
            except Cut:
                if request.transport is not None:
                    request.transport.close()
                raise
            except RuntimeError as error:
                return web.json_response({"detail": str(error)}, status=int(error.args[1]) if error.args[1:] else 500)
            if isinstance(answer, list):
                encode = msgspec.json.encode
                lines = b"".join(encode({"i": index, **line}) + b"\n" for index, line in enumerate(answer))
                return web.Response(body=lines, content_type="application/x-ndjson")
            return web.json_response(answer)

        return route

    def _standing(self) -> dict[str, Any]:
        return {"state": self._state, "version": self._version, "at": self._at, "loaded": self._loaded}

    async def _info(self, body: bytes) -> dict[str, Any]:
        return self._facts | self._standing()

    async def _checksums(self, body: bytes) -> dict[str, Any]:
        where = str(self._at if self._at != [0.0, 0.0] else "origin")
        return {"version": self._version, "workers": [{"weights": hashlib.sha256(where.encode()).hexdigest()}]}

    async def _load(self, body: bytes) -> dict[str, Any]:
        call = msgspec.json.decode(body, type=LoadCall)
        snapshot, spec = open_snapshot(call.snapshot, call.base or None), SliceSpec(**call.slice)
        self._loaded = {
            "load": uuid.uuid4().hex[:12],
            "snapshot": call.snapshot,
            "slice": call.slice,
            "snapshot_sha256": snapshot.sha256,
            "directions_fingerprint": fingerprint(spec, snapshot.shapes),
            "parameters": 12,
            "moving_parameters": 12,
            "seconds": 0.0,
            "move_path": "kernel",
            "move_path_reason": "",
            "directions_memory": "float32 on the host",
            "directions_memory_reason": "",
            "directions_dtype": self._directions_dtype,
            "ahead": {"parts": 0, "ready": 0, "errors": self.ahead_errors},
        }
        self.loads.append(spec.seed)
        self._state, self._at = "unknown", None
        return self._loaded | self._standing()

    async def _ahead(self, body: bytes) -> dict[str, Any]:
        call = msgspec.json.decode(body, type=AheadCall)
        if self._loaded is None or call.load != self._loaded["load"]:
            raise RuntimeError("another client loaded tiny_sorter since", 409)
        self.ahead.append(SliceSpec(**call.slice).seed)
        return {"begun": not self.no_room, "reason": self.no_room}

    async def _move(self, body: bytes) -> dict[str, Any]:
        call = msgspec.json.decode(body, type=MoveCall)
        if self._loaded is None or call.load not in (None, self._loaded["load"]):
            raise RuntimeError("another client loaded tiny_sorter since", 409)
        self._at, self._state = [call.alpha, call.beta], "clean"
        self._version = f"fake/{call.alpha}/{call.beta}/{uuid.uuid4().hex[:8]}"
        self._policy = ToyPolicy(
            self._loaded["snapshot_sha256"], self._loaded["directions_fingerprint"], call.alpha, call.beta
        )
        # As of two random directions that are each as long as the weights.
        step = float(np.hypot(call.alpha, call.beta))
        seconds = dict.fromkeys(("pause", "write", "reset", "resume"), 0.0)
        return self._standing() | {"realised_step": step, "seconds": seconds}

    def _require(self, version: str | None) -> ToyPolicy:
        if self._state != "clean" or version not in (None, self._version):
            raise RuntimeError(f"stale weight version: asked for {version}, the server holds {self._version}", 409)
        return self._policy

    async def _generate(self, body: bytes) -> list[dict[str, Any]]:
        call = msgspec.json.decode(body, type=GenerateCall)
        policy, answers = self._require(call.version), []
        for item in call.requests:
            tokens, logprobs, finish = policy.sample(unpack_ids(item.prompt), item.seed, item.max_tokens)
            answers.append({"tokens": pack(tokens), "logprobs": pack(logprobs), "finish": finish})
        return answers

    async def _score(self, body: bytes) -> list[dict[str, Any]]:
        call = msgspec.json.decode(body, type=ScoreCall)
        policy = self._require(call.version)
        return [{"logprobs": pack(policy.score(unpack_ids(text)))} for text in call.sequences]
