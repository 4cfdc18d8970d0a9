"""How vLLM's processes on a CPU wait for each other, and what the launcher's servers do about it."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("vllm", reason="needs vLLM")
# Importing vLLM takes seconds.
pytestmark = pytest.mark.slow


@pytest.fixture
def broadcast(monkeypatch):
    """vLLM's module whose readers poll shared memory; it is as before afterwards."""
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms import current_platform

    monkeypatch.setattr(shm_broadcast, "sched_yield", shm_broadcast.sched_yield)
    if not current_platform.is_cpu():
        pytest.skip("a vLLM for the CPU is needed")
    return shm_broadcast


def test_readers_sleep_between_two_polls(broadcast, monkeypatch):
    from rlvr_landscape_plugin.serving.worker import waiting

    slept = []
    monkeypatch.setattr(waiting.time, "sleep", slept.append)
    waiting.sleep_while_waiting()
    waiting.sleep_while_waiting()
    broadcast.sched_yield()
    assert slept == [waiting.PAUSE]


def test_a_user_can_leave_vllms_own_way(broadcast, monkeypatch):
    from rlvr_landscape_plugin.serving.worker import waiting

    before = broadcast.sched_yield
    monkeypatch.setenv("RLVR_LANDSCAPE_SPIN", "1")
    waiting.sleep_while_waiting()
    assert broadcast.sched_yield is before


def test_a_vllm_that_waits_otherwise_is_left_alone_and_the_log_says_so(broadcast, monkeypatch, caplog):
    from rlvr_landscape_plugin.serving.worker import waiting

    monkeypatch.delattr(broadcast, "sched_yield")
    with caplog.at_level(logging.WARNING, logger="vllm.rlvr_landscape"):
        waiting.sleep_while_waiting()
    assert not hasattr(broadcast, "sched_yield")
    assert "may keep a core busy" in caplog.text
