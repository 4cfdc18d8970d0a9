"""On a CPU, vLLM's processes wait for each other with short sleeps, which leaves the cores to those that compute.

vLLM's engine and its worker poll shared memory and only yield the processor in between. Where cores are few, each takes
a core that another server, a training process or the sweep's client could use. How they wait changes no result.
"""

from __future__ import annotations

import functools
import logging
import os
import time

from rlvr_landscape_plugin.serving.protocol import SPIN_VARIABLE

logger = logging.getLogger("vllm.rlvr_landscape")

PAUSE = 5e-5
"""Seconds. Linux adds about as much; a step of a small model takes 100 times that."""


def sleep_while_waiting() -> None:
    """Replace the `sched_yield` between two polls of shared memory by a sleep; safe to call several times.

    A vLLM that waits in another way is left as it is: nothing but speed depends on it, so versions.py does not refuse.
    """
    if os.environ.get(SPIN_VARIABLE) == "1":
        return
    try:
        from vllm.distributed.device_communicators import shm_broadcast
        from vllm.platforms import current_platform

        on_cpu, _ = current_platform.is_cpu(), shm_broadcast.sched_yield  # pyright: ignore[reportPrivateImportUsage]
    except (ImportError, AttributeError) as error:
        logger.warning("vLLM's processes wait in their own way, which may keep a core busy: %s", error)
        return
    if on_cpu:
        shm_broadcast.sched_yield = functools.partial(time.sleep, PAUSE)  # pyright: ignore[reportPrivateImportUsage]
