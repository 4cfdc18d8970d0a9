"""The client without a server of vLLM: what closing it leaves behind."""

from __future__ import annotations

import asyncio

import pytest
from conftest import POLICY
from fake_server import FakeServer

from rlvr_landscape_plugin.serving.client import LandscapeClient


async def test_closing_ends_what_waits_and_nothing_is_sent_afterwards(fake_server: FakeServer):
    """As Ctrl-C does it: turns that wait for the next call, and turns that are asked for while the client closes."""
    defects = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: defects.append(context))
    async with LandscapeClient(fake_server.url, fake_server.token) as client:
        await client.load(str(POLICY), {"seed": 0})
        await client.move(0.0, 0.0)
        waiting = asyncio.create_task(client.generate([1, 2, 3], seed=0, max_tokens=4))
        await asyncio.sleep(0)
    assert isinstance((await asyncio.gather(waiting, return_exceptions=True))[0], asyncio.CancelledError)
    with pytest.raises(RuntimeError, match="outside `async with`"):
        await client.generate([1, 2, 3], seed=0, max_tokens=4)
    await asyncio.sleep(0.2)
    assert fake_server.asked["generate"] == 0
    assert defects == []
