"""A loopback server with vLLM's token-in, token-out route, for verifiers' training client: the sweep's own client
answers.

Programs and hooks of an environment reach the policy through verifiers' servers and then through this one, never past
it. So every turn has the seed of its (task, rollout, turn), names the weights that it wants, and is recorded; a request
of an episode that is over is refused; and a failure of the server ends the sweep instead of counting as a failed
episode. The landscape server itself needs no route beyond `/landscape/*`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
from aiohttp import web

from rlvr_landscape_plugin.errors import LandscapeError, TasksetError
from rlvr_landscape_plugin.files import JsonObject

if TYPE_CHECKING:
    from rlvr_landscape_plugin.episodes.agent import Play
    from rlvr_landscape_plugin.episodes.play import TurnSampler

SESSION = "X-Session-ID"
"""Header in which verifiers' client names the trace that a request belongs to."""
MODEL = "policy"
_LARGEST_BODY = 2**28


class Gateway:
    """Answers the turns of the episodes in flight; an async context manager."""

    def __init__(self, sampler: TurnSampler, max_tokens: int, max_model_len: int) -> None:
        self._sampler, self._max_tokens, self._max_model_len = sampler, max_tokens, max_model_len
        self._plays: dict[str, Play] = {}
        self._url = ""

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=_LARGEST_BODY)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self._url = f"http://{host}:{port}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._plays.clear()
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        """Its address, as an OpenAI client takes it."""
        return self._url

    def admit(self, trace: str, play: Play) -> None:
        """Answer the turns of a trace from now on."""
        self._plays[trace] = play

    def dismiss(self, trace: str) -> None:
        """Answer no further turn of a trace: its episode is over."""
        self._plays.pop(trace, None)

    async def _models(self, request: web.Request) -> web.Response:
        card = {"id": MODEL, "object": "model", "max_model_len": self._max_model_len}
        return web.json_response({"object": "list", "data": [card]})

    async def _generate(self, request: web.Request) -> web.Response:
        trace = request.headers.get(SESSION, "")
        play = self._plays.get(trace)
        if play is None:
            return _refusal("this episode is over, or it is not one of this sweep", 410)
        call: JsonObject = await request.json()
        prompt: list[int] = call["token_ids"]
        if call.get("features") or call.get("content_parts"):
            play.stopped_by = TasksetError("a prompt has parts that are not text; sweeps drive text-only tasksets")
            return _refusal(str(play.stopped_by))
        wanted = call["sampling_params"].get("max_tokens") or self._max_tokens
        room = min(wanted, self._max_tokens, self._max_model_len - len(prompt))
        if room < 1:
            play.cut = True
            return _refusal(
                f"This model's maximum context length is {self._max_model_len} tokens, the prompt has {len(prompt)}"
            )
        turn = play.next_turn()
        try:
            completion = await self._sampler.generate(prompt, play.seed(turn), room)
        except LandscapeError as error:
            play.stopped_by = error
            return _refusal(f"{type(error).__name__}: {error}")
        if self._plays.get(trace) is not play:
            return _refusal("this episode ended while the policy was asked", 410)
        play.sampled(trace, prompt, completion)
        tokens = completion.tokens.tolist()
        scored = [
            {"token": f"token_id:{token}", "logprob": float(logprob)}
            for token, logprob in zip(tokens, completion.logprobs.astype(np.float64), strict=True)
        ]
        choice = {
            "index": 0,
            "token_ids": tokens,
            "finish_reason": completion.finish,
            "logprobs": {"content": scored},
        }
        return web.json_response({"request_id": f"{trace}-{turn}", "choices": [choice]})


def _refusal(message: str, status: int = 400) -> web.Response:
    """An error that no client tries again."""
    return web.json_response({"error": {"message": message, "type": "BadRequestError", "code": status}}, status=status)
