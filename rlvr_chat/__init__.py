"""verifiers' tool-less chat, without its process per turn: the harness `rlvr-chat`.

The stock `null` harness starts a Python program for every turn of a conversation; here the same requests are made from
the process that plays the rollout. All else stays verifiers': its interception server samples, applies limits and
stops and records the trace, its clients tokenise, and its default resume replays the conversation when the user speaks
again. So the traces are those of `null`.

    vf-eval TASKSET --env.agent.harness.id rlvr-chat --env.agent.runtime.type subprocess …

This is a package of its own because verifiers resolves a harness id to the top-level package of that name.
"""

from __future__ import annotations

import json
import ssl
from functools import cache
from typing import Any, Self

import certifi
import httpx
from openai import APIConnectionError, APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient
from pydantic import model_validator
from verifiers.v1.clients import ModelContext
from verifiers.v1.configs.harness import HarnessConfig
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.errors import InterceptionError
from verifiers.v1.harness import Harness
from verifiers.v1.runtimes import ProgramResult, Runtime
from verifiers.v1.task import TaskData
from verifiers.v1.trace import Trace

try:
    from verifiers.v1.harnesses.utils.compaction import is_context_overflow
except ModuleNotFoundError:  # prime-rl 0.8's verifiers, which ends such a rollout itself

    def is_context_overflow(error: APIStatusError) -> bool:
        return False


__all__ = ["ChatHarness", "ChatHarnessConfig"]


class ChatHarnessConfig(HarnessConfig):
    """The options of every harness; those that only a program could honour are refused."""

    @model_validator(mode="after")
    def _starts_no_program(self) -> Self:
        if self.env or self.forward_env:
            raise ValueError(
                f"harness {self.id!r} starts no program that could take variables; unset harness.env and "
                "harness.forward_env, or use harness.id = 'null'"
            )
        return self


class ChatHarness(Harness[ChatHarnessConfig]):
    """A text-only reply to each turn. verifiers itself refuses tools and skills for it, from what it supports."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def setup(self, runtime: Runtime) -> None:
        """Nothing to install. Raises ValueError for a container, whose network this process is not in."""
        if runtime.type != "subprocess":
            raise ValueError(
                f"harness {self.config.id!r} runs in verifiers' own process, this agent in a {runtime.type!r} runtime; "
                "set the agent's runtime.type = 'subprocess', or use harness.id = 'null'"
            )

    async def launch(
        self,
        ctx: ModelContext,
        trace: Trace,
        runtime: Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: TaskData,
    ) -> ProgramResult:
        """Ask for replies until one calls no tool. Transport failures raise `InterceptionError`; a status error
        is the failure that verifiers has recorded behind it."""
        system, prompt = self.resolve_prompt(data)
        messages: list[Any] = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages += [{"role": "user", "content": prompt}] if prompt else []
        else:
            messages += [message_to_wire(message) for message in prompt or []]
        async with AsyncOpenAI(
            base_url=endpoint,
            api_key=secret,
            timeout=httpx.Timeout(None, connect=5.0),
            http_client=DefaultAsyncHttpxClient(verify=_tls()),
        ) as client:
            try:
                while True:
                    completion = await client.chat.completions.create(model=ctx.model, messages=messages)
                    reply = completion.choices[0].message
                    if not reply.tool_calls:
                        break
                    messages.append(reply.model_dump(exclude_none=True))
                    messages += [_unanswerable(call) for call in reply.tool_calls]
            except APIConnectionError as error:
                raise InterceptionError(f"harness {self.config.id!r} lost the interception server: {error}") from error
            except APIStatusError as error:
                # As with `null`, a full context ends the conversation; the turns before it are scored.
                if not is_context_overflow(error):
                    raise
        return ProgramResult(exit_code=0, stdout="", stderr="")


def _unanswerable(call: Any) -> dict[str, str]:
    """What `null` answers, word for word, to a model that calls a tool though it has none."""
    name = call.function.name
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except json.JSONDecodeError as error:
        content = f"error: invalid JSON in tool arguments ({error}); resend the call with valid JSON"
    else:
        content = f"error: unknown tool {name!r}"
        if not isinstance(arguments, dict):
            kind = type(arguments).__name__
            content = f"error: tool arguments must be a JSON object, got {kind}; resend as an object"
    return {"role": "tool", "tool_call_id": call.id, "name": name, "content": content}


@cache
def _tls() -> ssl.SSLContext:
    # Loading the certificates takes longer than a turn's other work, and most endpoints are plain http.
    return ssl.create_default_context(cafile=certifi.where())
