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
    """Replace the `sched_yield` between two polls of shared memory by a sleep; safe to call several times."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or os.environ.get(SPIN_VARIABLE) == "1":
        return
    from vllm.distributed.device_communicators import shm_broadcast

    if "sched_yield" not in vars(shm_broadcast):
        logger.warning(
            "this vLLM has no sched_yield in distributed/device_communicators/shm_broadcast.py any more: its processes "
            "wait in their own way, which may keep a core busy"
        )
        return
    shm_broadcast.sched_yield = functools.partial(time.sleep, PAUSE)  # pyright: ignore[reportPrivateImportUsage]
