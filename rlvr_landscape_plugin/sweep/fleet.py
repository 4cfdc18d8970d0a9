"""The servers of a sweep: started here or reached by their addresses, when they are first needed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlvr_landscape_analysis.schema import DIRECTIONS_FOLDER

from rlvr_landscape_plugin.errors import ServerError, ServerRefusalError, ServerUnreachableError
from rlvr_landscape_plugin.files import JsonObject
from rlvr_landscape_plugin.sweep.pool import Pool

if TYPE_CHECKING:
    from rlvr_landscape_plugin.config import ServerConfig, SweepConfig
    from rlvr_landscape_plugin.display import Display
    from rlvr_landscape_plugin.serving.client import LandscapeClient
    from rlvr_landscape_plugin.serving.launch import LocalServer
    from rlvr_landscape_plugin.snapshot import Snapshot
    from rlvr_landscape_plugin.sweep.point import PointMeter


@dataclass
class Server:
    """A server in use: its client, and what it reported about itself."""

    client: LandscapeClient
    facts: JsonObject = field(default_factory=dict)
    """Empty until it first answered."""
    log: Path | None = None
    present: bool = False
    """Whether it has loaded the present slice and is ready for points (`pool.Member`)."""
    draws_ahead: bool = False
    """Whether it can draw the next slice while it measures; an earlier release cannot."""
    said: str = ""
    """Why it does not draw ahead, as the user was told."""
    meter: PointMeter | None = None
    origin: list[dict[str, str]] | None = None
    """Checksums of its weights at the origin, the snapshot itself."""
    points: int = 0
    """Points of the present plan that it measured."""
    measured: int = 0
    """Points, or portions of one, that it measured in all."""


def facts_to_keep(facts: JsonObject) -> JsonObject:
    """The facts about a server that a dataset keeps: not the present coordinates of its weights, nor the paths of its
    files."""
    kept = {
        key: value for key, value in facts.items() if key not in ("at", "draws_ahead", "loaded", "state", "version")
    }
    return kept | {"model": Path(str(facts["model"])).name}


def check_server(config: ServerConfig, url: str, facts: JsonObject) -> None:
    """Raise `ServerRefusalError` where a server of `urls` is another one than the configuration asks for by name."""
    if not config.urls:
        return
    asked = {key: getattr(config, key) for key in ("dtype", "max_model_len") if key in config.model_fields_set}
    asked["dtype"] = {"auto": None, "half": "float16", "float": "float32"}.get(config.dtype, config.dtype)
    for key, value in asked.items():
        if value is not None and facts[key] != value:
            raise ServerRefusalError(
                f"{url} has {key} {facts[key]}, not server.{key} = {getattr(config, key)}, which cannot change a "
                f"server that already runs; give server.{key} = {facts[key]}, or start the server with the other"
            )


class Fleet:
    """All servers of a sweep, as an async context manager, which ends the servers that it started."""

    def __init__(self, config: SweepConfig, snapshots: Sequence[Snapshot], display: Display) -> None:
        self._config, self._snapshots, self._display = config, snapshots, display
        self._stack = contextlib.AsyncExitStack()
        self._pool: Pool[Server] | None = None
        self.needed = False
        """Whether anything was to be measured."""

    async def __aenter__(self) -> Fleet:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def pool(self, first: Snapshot) -> Pool[Server]:
        """The servers; one that is started here starts with the snapshot `first`."""
        if self._pool is None:
            config, say = self._config, self._display.say
            servers = await self._stack.enter_async_context(self._servers(first))
            self._pool = Pool(servers, config.server.patience if config.server.urls else 0.0, say)
        return self._pool

    @property
    def failures(self) -> int:
        """How often a server failed."""
        return 0 if self._pool is None else self._pool.failures

    def report(self) -> list[JsonObject]:
        """What a sign of life says of each server."""
        if self._pool is None:
            return []
        return [
            {
                "url": server.client.url,
                "away": self._pool.is_away(server),
                "points": server.measured,
                "answered": server.client.answered,
            }
            for server in self._pool.servers
        ]

    @contextlib.asynccontextmanager
    async def _servers(self, first: Snapshot) -> AsyncIterator[list[Server]]:
        from rlvr_landscape_plugin.serving.client import LandscapeClient
        from rlvr_landscape_plugin.serving.protocol import TOKEN_VARIABLE, Sampling

        config, say = self._config, self._display.say
        sampling = Sampling(temperature=config.sampling.temperature, top_p=config.sampling.top_p)
        async with contextlib.AsyncExitStack() as stack:
            urls, log = list(config.server.urls), None
            token = config.server.token or os.environ.get(TOKEN_VARIABLE, "")
            if not urls:
                name = "server.log" if config.shard is None else "server_{}of{}.log".format(*config.share)
                log = Path(config.server.log or Path(config.output) / name)
                say(f"starting a vLLM server for {first.path.name} (log: {log})")
                roots = {path for snapshot in self._snapshots for path in (snapshot.path, snapshot.model)}
                folders = [*sorted(roots), Path(config.output).resolve() / DIRECTIONS_FOLDER]
                started = own_server(config.server, first.model, folders, log, self._display)
                local = await stack.enter_async_context(started)
                urls, token = [local.url], local.token
            elif not token:
                raise ServerError(f"server.urls needs the servers' token: set server.token or {TOKEN_VARIABLE}")
            servers, absent = [], []
            for url in urls:
                client = LandscapeClient(url, token, timeout=config.server.request_timeout, sampling=sampling)
                await stack.enter_async_context(client)
                servers.append(Server(client, log=log))
                try:
                    servers[-1].facts = facts_to_keep(await client.info())
                except ServerUnreachableError as error:
                    absent.append(error)
            if len(absent) == len(servers):
                raise absent[0]
            for error in absent:
                say(f"{error}; starting without it, it may join later")
            if warning := mixed_versions(servers):
                say(warning)
            yield servers


@contextlib.asynccontextmanager
async def own_server(
    config: ServerConfig, model: Path, roots: Sequence[Path], log: Path, display: Display
) -> AsyncIterator[LocalServer]:
    """`serving.launch.local_server`, which shows how long its start and its end take."""
    from rlvr_landscape_plugin.serving.launch import local_server

    context = local_server(config, model, roots, log)
    async with display.waiting("starting the vLLM server"):
        server = await context.__aenter__()
    try:
        yield server
    finally:
        display.say("ending the vLLM server; finished points are kept")
        async with display.waiting("ending the vLLM server"):
            await context.__aexit__(None, None, None)


def mixed_versions(servers: Sequence[Server], earlier: Sequence[JsonObject] = ()) -> str | None:
    """A warning if the servers, or those that measured earlier by their facts, run different vLLM releases."""
    found = sorted({str(facts["vllm"]) for facts in (*(s.facts for s in servers), *earlier) if "vllm" in facts})
    if len(found) < 2:
        return None
    what = "the servers run" if not earlier else "the servers and those that measured here before run"
    return (
        f"{what} different releases of vLLM ({', '.join(found)}): a seed gives other tokens there, so points "
        "of different servers do not share their sampling noise; start all with the same release"
    )


@contextlib.contextmanager
def with_server_logs(servers: Sequence[Server]) -> Iterator[None]:
    """Add the end of the server's log to an error of a server that this sweep started."""
    from rlvr_landscape_plugin.serving.launch import tail

    try:
        yield
    except ServerError as error:
        logs = [server.log for server in servers if server.log is not None]
        hint = "finished points are kept; the same command continues"
        raise ServerError("\n".join([f"{error}; {hint}", *(tail(log) for log in logs)])) from error
