"""The design `boundary`: the checkpoint itself, with many rollouts per task (`env.base_rollouts`).

What a policy can solve at all shows only in many attempts: pass@k up to the number of rollouts. There are no points,
only the checkpoint's own batch. Dims (prompt, base_rollout).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlvr_landscape_plugin.designs.design import Design, Surroundings
from rlvr_landscape_plugin.store.frame import Frame

if TYPE_CHECKING:
    from rlvr_landscape_plugin.config import SweepConfig


def boundary_designs(config: SweepConfig, around: Surroundings) -> list[Design]:
    """The checkpoint's own batch; a server needs a slice to stand at the origin of, which leaves no trace."""
    slice_ = around.prepare(config, config.slice.seeds[0])
    return [
        Design(
            kind="boundary",
            snapshot=around.snapshot,
            frame=Frame(()),
            slices=(slice_,),
            points=(),
            identity={},
            label=f"step {around.snapshot.step}, boundary",
        )
    ]
