"""The `/landscape/*` routes of a vLLM server, as a `vllm.endpoint_plugins` entry point.

| route | body | what it does |
|---|---|---|
| GET /landscape/info | | what this server is, and the coordinates of its weights |
| GET /landscape/checksums | | SHA-256 of every parameter in kernel layout, one dict per worker |
| POST /landscape/load | snapshot, slice, directions | load a snapshot and a slice |
| POST /landscape/ahead | slice, load | begin to draw the slice that is loaded next |
| POST /landscape/move | alpha, beta, load | pause, write, empty the caches, resume |
| POST /landscape/generate | requests, sampling, version | sample; one JSON line per finished request |
| POST /landscape/score | sequences, first, version | log π of given tokens; one JSON line per sequence |

Weights are in one of four states: `unknown` (whatever the server was started with), `clean` (at the coordinates that
`version` names), `moving`, and `dirty` (a move failed half-way and could not be undone). Sampling and scoring are
refused unless the state is `clean` and, where the caller names a version, unless it is the version held. A dirty server
stays paused, so that vLLM's own routes do not answer from a mixture either; a successful move cleans it.

Every route needs the bearer token of the environment variable RLVR_LANDSCAPE_TOKEN; without that variable all are
refused. Snapshots and directions are read only below the directories named in RLVR_LANDSCAPE_ROOTS (access.py). vLLM's
own version of the weights, where it keeps one, is compared with `version`: if somebody else updated the weights, the
state is `unknown` again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import math
import os
import time
import uuid
from argparse import Namespace
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from rlvr_landscape_plugin.files import JsonObject
from rlvr_landscape_plugin.serving import access, versions
from rlvr_landscape_plugin.serving.protocol import (
    MAX_BODY_BYTES,
    MAX_REQUESTS,
    MOVE_PATH_VARIABLE,
    PROTOCOL,
    TOKEN_VARIABLE,
    AheadCall,
    GenerateCall,
    LoadCall,
    MoveCall,
    Sampling,
    ScoreCall,
    logprobs_problem,
    pack,
    unpack_ids,
)
from rlvr_landscape_plugin.serving.shared import Scored, completed

logger = logging.getLogger("vllm.rlvr_landscape")

_LARGEST = float(np.finfo(np.float32).max)


class LandscapeEndpoint:
    """What vLLM instantiates; one per API server process."""

    name = "rlvr_landscape"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine: Any = None
        self._facts: JsonObject = {}
        self._state = "unknown"
        self._loaded: JsonObject | None = None
        self._at: tuple[float, float] | None = None
        self._version = "unknown"
        self._reading = 0
        """Requests of our own routes whose output is awaited."""
        self._lock = asyncio.Lock()
        self._stop_ids: list[int] = []
        self._workers = 1

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; vLLM calls this once."""
        for path, method, handler in (
            ("/landscape/info", "GET", self._info),
            ("/landscape/checksums", "GET", self._checksums),
            ("/landscape/load", "POST", self._load),
            ("/landscape/ahead", "POST", self._ahead),
            ("/landscape/move", "POST", self._move),
            ("/landscape/generate", "POST", self._generate),
            ("/landscape/score", "POST", self._score),
        ):
            app.add_api_route(path, self._guarded(handler), methods=[method], include_in_schema=False)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Remember the engine and the facts that datasets record.

        Raises for a landscape server in vLLM's development mode, which ends its start.
        """
        if engine_client is None:
            return
        import torch
        import vllm

        self._engine = engine_client
        config = engine_client.vllm_config
        transfer = config.weight_transfer_config
        model = config.model_config
        self._workers = int(config.parallel_config.world_size)
        if getattr(transfer, "backend", None) == "landscape":
            access.refuse_development_mode()
        self._facts = {
            "protocol": PROTOCOL,
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "model": str(model.model),
            "served_model_name": str(model.served_model_name),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(config.device_config.device_type),
            "logprobs_mode": str(model.logprobs_mode),
            "max_model_len": int(model.max_model_len),
            "vocab_size": int(model.get_vocab_size()),
            "tensor_parallel_size": int(config.parallel_config.tensor_parallel_size),
            "prefix_caching": bool(config.cache_config.enable_prefix_caching),
            # A prompt in chunks may be put off and begun again, with another length from the cache than it answers.
            "scores_share_prefixes": bool(config.cache_config.enable_prefix_caching)
            and not config.scheduler_config.enable_chunked_prefill,
            "backend": getattr(transfer, "backend", None),
            "draws_ahead": True,
        }

    def _guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def route(request: Request) -> Response:
            token = os.environ.get(TOKEN_VARIABLE, "")
            if not token:
                raise HTTPException(503, f"set {TOKEN_VARIABLE} in the server's environment to use /landscape routes")
            given = request.headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {token}".encode()):
                raise HTTPException(401, f"wrong or missing bearer token; it must equal the server's {TOKEN_VARIABLE}")
            if self._engine is None:
                raise HTTPException(503, "this server has no engine")
            if self._facts["backend"] != "landscape":
                raise HTTPException(
                    503,
                    'the server was started without --weight-transfer-config \'{"backend":"landscape"}\' '
                    f"(its backend is {self._facts['backend']!r})",
                )
            try:
                return await handler(request)
            except HTTPException:
                raise
            except Exception as error:  # a full disk, a dead engine: whoever asked shall read the reason
                logger.exception("%s failed", request.url.path)
                raise HTTPException(500, f"{type(error).__name__}: {error}") from error

        return route

    async def _info(self, request: Request) -> JSONResponse:
        await self._compare_versions()
        return JSONResponse({**self._facts, **self._standing()})

    async def _checksums(self, request: Request) -> JSONResponse:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        async with self._lock:
            workers = await self._with_reports(
                lambda folder: self._engine.init_weight_transfer_engine(WeightTransferInitRequest({"report": folder}))
            )
            return JSONResponse({"version": self._version, "workers": workers})

    async def _compare_versions(self) -> None:
        """Weights that somebody else updated, past our routes, are no longer those of any point."""
        if self._state != "clean" or self._lock.locked():
            return  # nothing to compare, or we are writing ourselves
        ours = self._version
        theirs = await versions.weight_version(self._engine)
        if theirs is not None and theirs != ours and (self._state, self._version) == ("clean", ours):
            logger.error("vLLM holds weights of version %s, landscape moved to %s: somebody else wrote", theirs, ours)
            self._state, self._at, self._version = "unknown", None, "unknown"

    def _standing(self) -> JsonObject:
        return {"state": self._state, "version": self._version, "at": self._at, "loaded": self._loaded}

    async def _load(self, request: Request) -> JSONResponse:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        call = await _body(request, LoadCall)
        try:
            path = access.confined_snapshot(call.snapshot)
            base = str(access.confined_snapshot(call.base, "base model")) if call.base else ""
            files = {axis: str(access.confined(file, f"direction {axis}")) for axis, file in call.directions.items()}
        except access.AccessError as error:
            raise HTTPException(error.status, str(error)) from error
        async with self._lock:
            asked = {"snapshot": str(path), "base": base, "slice": call.slice, "directions": files}
            try:
                reports = await self._with_reports(
                    lambda folder: self._engine.init_weight_transfer_engine(
                        WeightTransferInitRequest({**asked, "report": folder})
                    )
                )
            except Exception:  # which slice the workers hold is not known
                self._state, self._at, self._version, self._loaded = "unknown", None, "unknown", None
                raise
            if error := _first_error(reports):
                if any(report.get("weights") == "dirty" for report in reports):
                    self._state, self._at, self._version, self._loaded = "dirty", None, "dirty", None
                    raise HTTPException(500, f"the weights are dirty, load and move again: {error}")
                raise HTTPException(422, error)
            before, self._loaded = self._loaded, None
            name = uuid.uuid4().hex[:12]
            self._loaded = {"load": name, "snapshot": str(path), "slice": call.slice, **_joined(reports)}
            if before is None or before["snapshot_sha256"] != self._loaded["snapshot_sha256"] or self._at != (0.0, 0.0):
                if self._state == "clean":
                    self._state = "unknown"
                self._at = None
            return JSONResponse({**self._loaded, **self._standing()})

    async def _ahead(self, request: Request) -> JSONResponse:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        call = await _body(request, AheadCall)
        async with self._lock:
            self._require_load(call.load)
            reports = await self._with_reports(
                lambda folder: self._engine.init_weight_transfer_engine(
                    WeightTransferInitRequest({"ahead": True, "slice": call.slice, "report": folder})
                )
            )
        if error := _first_error(reports):
            raise HTTPException(422, error)
        return JSONResponse(next((report for report in reports if not report["begun"]), reports[0]))

    def _require_load(self, name: str | None) -> JsonObject:
        """What is loaded, if it is what the caller means; `name` None: whatever it is."""
        loaded = self._loaded
        if loaded is None:
            raise HTTPException(409, "no snapshot is loaded; POST /landscape/load first")
        if name not in (None, loaded["load"]):
            raise HTTPException(
                409,
                f"another client loaded {Path(loaded['snapshot']).name} since load {name}; exactly one sweep may use a "
                "server at a time",
            )
        return loaded

    async def _move(self, request: Request) -> JSONResponse:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        call = await _body(request, MoveCall)
        if not (math.isfinite(call.alpha) and math.isfinite(call.beta)):
            raise HTTPException(422, f"alpha and beta must be finite, got {call.alpha} and {call.beta}")
        if max(abs(call.alpha), abs(call.beta)) > _LARGEST:
            raise HTTPException(422, f"alpha and beta must fit float32, got {call.alpha} and {call.beta}")
        async with self._lock:
            loaded = self._require_load(call.load)
            clock = [time.perf_counter()]
            before = (self._state, self._at)
            self._state = "moving"
            try:
                if before[0] not in ("clean", "unknown"):
                    await self._close_update()
                await versions.pause(self._engine, readers=self._reading > 0)
                clock.append(time.perf_counter())
                await self._engine.start_weight_update()
                reports = await self._with_reports(
                    lambda folder: self._engine.update_weights(
                        WeightTransferUpdateRequest({"alpha": call.alpha, "beta": call.beta, "report": folder})
                    )
                )
                clock.append(time.perf_counter())
                # Any failure below leaves "moving" behind, which the except turns into "dirty".
                outcomes = {report["weights"] for report in reports}
                failed = _first_error(reports)
                if failed and outcomes - {"restored", "unchanged"}:
                    raise RuntimeError(failed)
                at = before[1] if failed else (call.alpha, call.beta)
                version = f"{loaded['snapshot_sha256'][:12]}/{loaded['slice'].get('seed')}/{at}/{uuid.uuid4().hex[:8]}"
                await versions.finish_update(self._engine, version)
                if not await self._engine.reset_prefix_cache():
                    raise RuntimeError("vLLM did not empty its prefix cache (requests still hold blocks)")
                clock.append(time.perf_counter())
                await self._engine.resume_generation()
            except Exception as error:  # after any failure, weights or caches may be a mixture of two policies
                self._state, self._at, self._version = "dirty", None, "dirty"
                logger.exception("landscape move to (%s, %s) failed", call.alpha, call.beta)
                await self._close_update()
                raise HTTPException(
                    500,
                    f"the move to ({call.alpha}, {call.beta}) failed and the weights are dirty: {error}; the server "
                    "stays paused until a move succeeds, else restart it",
                ) from error
            self._version, self._at = version, at
            self._state = before[0] if failed and before[1] is None else "clean"
            if failed:
                raise HTTPException(500, f"the move failed, the weights are those of before: {failed}")
            clock.append(time.perf_counter())
            seconds = dict(zip(("pause", "write", "reset", "resume"), np.diff(clock).tolist(), strict=True))
            return JSONResponse({**self._standing(), "realised_step": _realised_step(reports), "seconds": seconds})

    async def _close_update(self) -> None:
        """End vLLM's update session if one is open: the next move opens its own, which fails while another is."""
        try:
            await versions.finish_update(self._engine, "dirty")
        except Exception as error:  # none was open on some worker, or the engine is gone, which the next call will say
            logger.info("no update of the weights was open: %s", error)

    async def _with_reports(self, call: Callable[[str], Awaitable[object]]) -> list[JsonObject]:
        with access.report_directory() as folder:
            await call(str(folder))
            reports = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
        # A checksum or a length of some of the workers would be taken for that of all.
        if len(reports) != self._workers:
            raise RuntimeError(
                f"{len(reports)} of {self._workers} workers left a report; workers on other machines need a TMPDIR "
                "that all machines share"
            )
        return reports

    def _require(self, version: str | None) -> None:
        if self._state != "clean":
            raise HTTPException(
                409, f"the server's weights are {self._state}: POST /landscape/load, then /landscape/move"
            )
        if version is not None and version != self._version:
            raise HTTPException(409, f"stale weight version: asked for {version}, the server holds {self._version}")

    async def _generate(self, request: Request) -> StreamingResponse:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        call = await _body(request, GenerateCall)
        _bounded(len(call.requests))
        self._require(call.version)
        version = self._version
        if problem := logprobs_problem(self._facts["logprobs_mode"], call.sampling):
            raise HTTPException(422, problem)
        compared = asyncio.ensure_future(self._compare_versions())

        async def one(index: int) -> JsonObject:
            item = call.requests[index]
            params = SamplingParams(
                temperature=call.sampling.temperature,
                top_p=call.sampling.top_p,
                max_tokens=item.max_tokens,
                seed=item.seed,
                stop_token_ids=call.sampling.stop_token_ids or None,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            output = await self._last(unpack_ids(item.prompt).tolist(), params)
            await compared
            completion = output.outputs[0]
            tokens = np.asarray(completion.token_ids, dtype=np.int32)
            spans = versions.sampled_versions(completion)
            if any(other != version for other in spans) or version != self._version:
                raise RuntimeError("the weights changed while this completion was sampled")
            logprobs = _flat(completion.logprobs, tokens)
            return {"tokens": pack(tokens), "logprobs": pack(logprobs), "finish": completion.finish_reason}

        return self._stream(len(call.requests), one)

    async def _score(self, request: Request) -> StreamingResponse:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        call = await _body(request, ScoreCall)
        _bounded(len(call.sequences))
        self._require(call.version)
        version = self._version
        if problem := logprobs_problem(self._facts["logprobs_mode"], Sampling()):
            raise HTTPException(422, problem)
        sequences = [unpack_ids(text) for text in call.sequences]
        firsts = call.first or [1] * len(sequences)
        if len(firsts) != len(sequences) or min(firsts, default=1) < 1:
            raise HTTPException(422, "first must be empty, or have a number of at least 1 for each sequence")
        compared = asyncio.ensure_future(self._compare_versions())
        share = self._facts["scores_share_prefixes"]

        async def once(index: int, read_cache: bool) -> Scored:
            tokens = sequences[index]
            # vLLM reads no cache for a request that asks for log-probabilities of its prompt, unless told to.
            params = SamplingParams(
                temperature=0.0,
                max_tokens=1,
                prompt_logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                skip_reading_prefix_cache=not read_cache,
            )
            output = await self._last(tokens.tolist(), params)
            await compared
            if version != self._version:
                raise RuntimeError("the weights changed while this sequence was scored")
            cached = int(output.num_cached_tokens or 0) if read_cache else 0
            logprobs = np.full(len(tokens) - 1, np.nan, np.float32)
            logprobs[cached:] = _flat(output.prompt_logprobs, tokens, first=cached + 1)
            return Scored(tokens, firsts[index], cached, logprobs)

        # Answers of one call can fill each other's gaps, so the first requests of all come before any second one.
        found: dict[bytes, list[Scored]] = defaultdict(list)
        left, all_tried = len(sequences), asyncio.Event()

        async def one(index: int) -> JsonObject:
            nonlocal left
            try:
                scored = await once(index, share and firsts[index] > 1)
                found[scored.beginning].append(scored)
            finally:
                left -= 1
                if not left:
                    all_tried.set()
            if scored.missing:
                await all_tried.wait()
                scored = completed(scored, found[scored.beginning])
                if scored.missing:
                    scored = await once(index, False)
            return {"logprobs": pack(scored.answer())}

        return self._stream(len(sequences), one)

    async def _last(self, prompt: list[int], params: Any) -> Any:
        output = None
        stream = self._engine.generate({"prompt_token_ids": prompt}, params, f"landscape-{uuid.uuid4().hex}")
        self._reading += 1
        try:
            async for output in stream:  # noqa: B007 - the last one is the whole one
                pass
        finally:
            self._reading -= 1
        if output is None or not output.finished:
            raise RuntimeError("the engine ended a request without finishing it")
        return output

    def _stream(self, count: int, one: Callable[[int], Awaitable[JsonObject]]) -> StreamingResponse:
        encoder = msgspec.json.Encoder()

        async def line(index: int) -> bytes:
            try:
                result = await one(index)
            except Exception as error:  # one bad request must not end the others
                result = {"error": f"{type(error).__name__}: {error}"}
            return encoder.encode({"i": index, **result}) + b"\n"

        async def lines() -> AsyncIterator[bytes]:
            ready: asyncio.Queue[bytes] = asyncio.Queue()

            async def run(index: int) -> None:
                ready.put_nowait(await line(index))

            tasks = [asyncio.ensure_future(run(index)) for index in range(count)]
            try:
                left = count
                while left:
                    chunk = [await ready.get()]
                    while not ready.empty():
                        chunk.append(ready.get_nowait())
                    left -= len(chunk)
                    yield b"".join(chunk)
            finally:
                for task in tasks:
                    task.cancel()

        return StreamingResponse(lines(), media_type="application/x-ndjson")


async def _body(request: Request, kind: type[Any]) -> Any:
    with contextlib.suppress(ValueError):
        if int(request.headers.get("content-length", "0")) > MAX_BODY_BYTES:
            raise HTTPException(413, f"a request body may have at most {MAX_BODY_BYTES} bytes")
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise HTTPException(413, f"a request body may have at most {MAX_BODY_BYTES} bytes")
        chunks.append(chunk)
    try:
        return msgspec.json.decode(b"".join(chunks), type=kind)
    except msgspec.MsgspecError as error:
        raise HTTPException(422, f"bad request body: {error}") from error


def _bounded(count: int) -> None:
    if count > MAX_REQUESTS:
        raise HTTPException(413, f"one call may have at most {MAX_REQUESTS} requests, got {count}; send several calls")


def _first_error(reports: list[JsonObject]) -> str | None:
    return next((report["error"] for report in reports if "error" in report), None)


def _joined(reports: list[JsonObject]) -> JsonObject:
    """One answer for all workers: rank 0's facts, and the kernel path only if every worker takes it."""
    shared, theta = sum(report["theta_share"] for report in reports), reports[0]["theta"]
    if abs(shared - theta) > 1e-6 * theta:
        raise HTTPException(
            422,
            f"the workers' shares of the checkpoint's squared norm add up to {shared:.9g}, expected {theta:.9g}, so "
            f"steps would be measured wrongly; start the server with {MOVE_PATH_VARIABLE}=loader",
        )
    slowest = next((report for report in reports if report["move_path"] != "kernel"), reports[0])
    path = {key: value for key, value in slowest.items() if key.startswith(("move_path", "directions_memory"))}
    path["ahead"] = next((report["ahead"] for report in reports if report["ahead"]["errors"]), reports[0]["ahead"])
    return {key: value for key, value in (reports[0] | path).items() if key not in ("theta", "theta_share")}


def _realised_step(reports: list[JsonObject]) -> float:
    """‖θ(α,β) − θ‖ / ‖θ‖ as the workers hold it, dimensionless."""
    theta = reports[0]["theta"]
    return math.sqrt(sum(report["changed"] for report in reports) / theta) if theta else 0.0


def _flat(logprobs: Any, tokens: np.ndarray, first: int = 0) -> np.ndarray:
    """log π of `tokens[first:]` out of vLLM's flat logprobs, float32, shape (len(tokens) - first,)."""
    if logprobs is None or len(logprobs) != len(tokens):
        raise RuntimeError(
            f"vLLM returned {0 if logprobs is None else len(logprobs)} logprobs for {len(tokens)} tokens"
        )
    starts = np.asarray(logprobs.start_indices[first:], dtype=np.int64)
    if not np.array_equal(np.asarray(logprobs.token_ids, dtype=np.int64)[starts], tokens[first:]):
        raise RuntimeError("vLLM returned logprobs of other tokens than those asked for")
    return np.asarray(logprobs.logprobs, dtype=np.float32)[starts]
