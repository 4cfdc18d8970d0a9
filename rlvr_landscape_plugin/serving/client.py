"""The async client of one landscape server.

Requests that become ready within a few milliseconds travel in one POST and come back as one stream, so that the HTTP
cost of a turn is a fraction of a millisecond on either side. Imports neither torch nor vllm.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
import msgspec
import numpy as np

from rlvr_landscape_plugin.errors import ServerError, ServerRefusalError, ServerUnreachableError
from rlvr_landscape_plugin.files import JsonObject
from rlvr_landscape_plugin.serving.protocol import (
    PROTOCOL,
    GenerateCall,
    GenerateItem,
    Sampling,
    ScoreCall,
    logprobs_problem,
    pack,
    unpack_ids,
    unpack_logprobs,
)

FLUSH_SECONDS = 0.01
"""How long a turn waits for others that become ready with it."""
MAX_BATCH = 256
"""Turns (or sequences) in one POST."""
REFUSALS = {401, 403, 404, 413, 422}
"""Status codes of an answer that the same request would get again."""


@dataclass(frozen=True)
class Completion:
    """What the server sampled for one turn."""

    tokens: np.ndarray
    """int32, with the stop token if there was one."""
    logprobs: np.ndarray
    """float32, nat, as the sampler saw them."""
    finish: str
    """`stop` or `length`."""


@dataclass(frozen=True)
class MoveResult:
    """Answer to a move."""

    version: str
    """Name of the weights now held; pass it on so that stale weights are refused."""
    realised_step: float
    """‖θ(α,β) − θ‖ / ‖θ‖ after rounding to the server's dtype, dimensionless."""
    seconds: dict[str, float]
    """pause, write, reset, resume."""


class LandscapeClient:
    """The client of one server; use it as an async context manager.

    Every method raises `ServerError` with the address and the server's own message.
    """

    def __init__(self, url: str, token: str, *, timeout: float = 600.0, sampling: Sampling | None = None) -> None:
        self.url = url.rstrip("/")
        self.version: str | None = None
        """Weight version of the last move; sampling and scoring are refused for any other."""
        self.answered: float | None = None
        """When the server last answered with 200, in seconds since 1970."""
        self._load: str | None = None
        """Name of the last load; moves are refused for any other."""
        self._headers = {"Authorization": f"Bearer {token}"}
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=timeout)
        self._sampling = sampling or Sampling()
        self._session: aiohttp.ClientSession | None = None
        self._queue: list[tuple[GenerateItem, asyncio.Future[Completion]]] = []
        self._flush: asyncio.TimerHandle | None = None
        self._posts: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=self._timeout,
            # Shorter than any server's own: a reused connection must not be one that is about to close.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
            read_bufsize=2**20,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        session, self._session = self._session, None
        if self._flush is not None:
            self._flush.cancel()
        for _, waiting in self._queue:
            waiting.cancel()
        for task in list(self._posts):
            task.cancel()
        await asyncio.gather(*self._posts, return_exceptions=True)
        if session is not None:
            await session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("LandscapeClient is used outside `async with`")
        return self._session

    @contextlib.asynccontextmanager
    async def _request(
        self, method: str, route: str, body: bytes | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._opened().request(
                method, self.url + route, data=body, headers={"Content-Type": "application/json"}
            ) as response:
                if response.status != 200:
                    kind = ServerRefusalError if response.status in REFUSALS else ServerError
                    raise kind(f"{self.url}{route}: {await _words(response)}")
                self.answered = time.time()
                yield response
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            kind = "no answer in time" if isinstance(error, TimeoutError) else (str(error) or type(error).__name__)
            raise ServerUnreachableError(
                f"{self.url}{route}: connection failed: {kind}; is the server still running?"
            ) from error

    async def _json(self, method: str, route: str, body: Any = None) -> JsonObject:
        encoded = None if body is None else json.dumps(body).encode()
        async with self._request(method, route, encoded) as response:
            return msgspec.json.decode(await response.read())

    async def info(self) -> JsonObject:
        """Facts about the server; raises an error unless its plugin and protocol are those of this client.

        Raises too if the log-probabilities of this client's sampling would not be the policy's (`logprobs_problem`).
        """
        facts = await self._json("GET", "/landscape/info")
        if facts.get("protocol") != PROTOCOL:
            raise ServerError(
                f"{self.url} speaks landscape protocol {facts.get('protocol')}, this client {PROTOCOL}; "
                "install the same rlvr-landscape on both sides"
            )
        if problem := logprobs_problem(facts.get("logprobs_mode"), self._sampling):
            raise ServerError(f"{self.url}: {problem}")
        return facts

    async def checksums(self) -> list[dict[str, str]]:
        """SHA-256 per parameter in kernel layout, one dict per worker."""
        return (await self._json("GET", "/landscape/checksums"))["workers"]

    async def load(
        self, snapshot: str, slice_: JsonObject, directions: Mapping[str, str] | None = None, base: str = ""
    ) -> JsonObject:
        """Let the server load a snapshot directory and a slice; move before sampling.

        `directions`: the file of each axis whose direction is not drawn. `base`: the directory of the model that an
        adapter belongs to. All paths are on the server's file system.
        """
        self.version = None
        body = {"snapshot": snapshot, "slice": slice_, "directions": dict(directions or {})}
        body |= {"base": base} if base else {}
        facts = await self._json("POST", "/landscape/load", body)
        self._load = facts["load"]
        return facts

    @property
    def loaded(self) -> str | None:
        """Name of this client's last load; None before the first."""
        return self._load

    async def draw_ahead(self, slice_: JsonObject) -> JsonObject:
        """Let the server draw the slice that is loaded next while it measures; of the snapshot that is loaded.

        The answer has `begun`, and if it is false a `reason`. Only for a server whose `info` says `draws_ahead`.
        """
        return await self._json("POST", "/landscape/ahead", {"slice": slice_, "load": self._load})

    async def move(self, alpha: float, beta: float) -> MoveResult:
        """Set the weights to θ + α δ + β η and empty every cache. Atomic: see endpoint.py for what a failure leaves.

        The slice is that of this client's last load; refused if another client has loaded one since.
        """
        self.version = None
        answer = await self._json("POST", "/landscape/move", {"alpha": alpha, "beta": beta, "load": self._load})
        self.version = answer["version"]
        return MoveResult(answer["version"], answer["realised_step"], answer["seconds"])

    async def generate(self, prompt: Sequence[int] | np.ndarray, seed: int, max_tokens: int) -> Completion:
        """Sample one turn after the token ids `prompt`."""
        self._opened()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Completion] = loop.create_future()
        item = GenerateItem(pack(np.asarray(prompt, dtype="<i4")), seed, max_tokens)
        self._queue.append((item, future))
        if len(self._queue) >= MAX_BATCH:
            self._send_queue()
        elif self._flush is None:
            self._flush = loop.call_later(FLUSH_SECONDS, self._send_queue)
        return await future

    def _send_queue(self) -> None:
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        batch, self._queue = self._queue, []
        if batch:
            task = asyncio.get_running_loop().create_task(self._post_batch(batch))
            self._posts.add(task)
            task.add_done_callback(self._posts.discard)

    async def _post_batch(self, batch: list[tuple[GenerateItem, asyncio.Future[Completion]]]) -> None:
        call = GenerateCall([item for item, _ in batch], self._sampling, self.version)
        try:
            async for index, answer in self._lines("/landscape/generate", call):
                future = batch[index][1]
                if future.done():
                    continue
                if "error" in answer:
                    future.set_exception(ServerError(f"{self.url}: {answer['error']}"))
                else:
                    future.set_result(
                        Completion(unpack_ids(answer["tokens"]), unpack_logprobs(answer["logprobs"]), answer["finish"])
                    )
        except ServerError as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        finally:
            for _, future in batch:
                if not future.done():
                    future.set_exception(ServerError(f"{self.url} closed the stream before every turn was answered"))

    async def score(self, sequences: Sequence[np.ndarray], first: Sequence[int] = ()) -> list[np.ndarray]:
        """log π(token t | tokens before) for t = 1 … of each sequence: float32, length len(sequence) − 1, in nat.

        One teacher-forced pass at temperature 1 through the weights of the last move. `first`: the first token of each
        sequence whose log π is needed. What comes before is NaN, and is computed once for sequences that share it.
        """
        results: list[np.ndarray | None] = [None] * len(sequences)

        async def post(start: int) -> None:
            part = sequences[start : start + MAX_BATCH]
            needed = list(first[start : start + MAX_BATCH])
            call = ScoreCall([pack(np.asarray(ids, dtype="<i4")) for ids in part], needed, self.version)
            async for index, answer in self._lines("/landscape/score", call):
                if "error" in answer:
                    raise ServerError(f"{self.url}: {answer['error']}")
                results[start + index] = unpack_logprobs(answer["logprobs"])

        try:
            async with asyncio.TaskGroup() as group:
                for start in range(0, len(sequences), MAX_BATCH):
                    group.create_task(post(start))
        except* ServerError as failures:
            raise first_error(failures) from None
        whole = [result for result in results if result is not None]
        if len(whole) != len(sequences):
            raise ServerError(f"{self.url} closed the stream before every sequence was scored")
        return whole

    async def _lines(self, route: str, call: msgspec.Struct) -> AsyncIterator[tuple[int, JsonObject]]:
        decode = msgspec.json.Decoder().decode
        async with self._request("POST", route, msgspec.json.encode(call)) as response:
            async for line in response.content:
                answer = decode(line)
                yield answer["i"], answer


def first_error(group: BaseExceptionGroup[ServerError]) -> ServerError:
    """The first of the errors that concurrent requests ended with."""
    for error in group.exceptions:
        return first_error(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an exception group is never empty")


async def _words(response: aiohttp.ClientResponse) -> str:
    text = (await response.read()).decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        answer = json.loads(text)
        # FastAPI's own form, or the one in which vLLM's server wraps every refusal.
        text = str(answer["detail"] if "detail" in answer else answer["error"]["message"])
    if response.status == 404:
        return (
            "no such route (404); start the server with the plugin: VLLM_PLUGINS=rlvr_landscape "
            'and --weight-transfer-config \'{"backend":"landscape"}\''
        )
    return f"{text} (HTTP {response.status})"
