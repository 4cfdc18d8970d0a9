"""A measured rate for `--dry-run --probe`: half a minute of the sweep's own work, of which nothing is kept.

The first snapshot and slice, on as many tasks as keep a server busy: the checkpoint's own batch, then points of the
design, each moved to, played and scored as in a sweep.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlvr_landscape_plugin.designs import DESIGNS, Surroundings, find_designer
from rlvr_landscape_plugin.directions import Trajectory
from rlvr_landscape_plugin.sweep.fleet import Fleet
from rlvr_landscape_plugin.sweep.jobs import Job
from rlvr_landscape_plugin.sweep.run import Sweep, with_path
from rlvr_landscape_plugin.sweep.snapshots import check_tensors

if TYPE_CHECKING:
    from rlvr_landscape_plugin.config import SweepConfig
    from rlvr_landscape_plugin.display import Display
    from rlvr_landscape_plugin.snapshot import Snapshot
    from rlvr_landscape_plugin.sweep.cost import Cost

SECONDS = 30.0
"""No further point is begun after so long."""


@dataclass(frozen=True)
class Probed:
    """What one server did, per point and per episode."""

    move: float
    """Seconds of a move."""
    per_episode: float
    """Seconds of an episode at a point, played and scored, many at once."""
    own: float
    """The same in the checkpoint's own batch."""
    sampled: float
    """Mean tokens sampled in an episode of the checkpoint."""
    conversation: float
    """Mean tokens of its whole conversation."""
    episodes: int
    """Episodes that this rests on."""
    took: float
    """Seconds."""

    def seconds(self, cost: Cost, config: SweepConfig) -> float:
        """Seconds that one server needs for everything."""
        env = config.env
        point = self.move + self.per_episode * env.num_prompts * env.rollouts
        return cost.datasets * (cost.points * point + self.own * env.num_prompts * env.own_rollouts)


async def probe(config: SweepConfig, snapshots: Sequence[Snapshot], display: Display) -> Probed:
    """Measure for about `SECONDS`, after the servers' start. Raises what a sweep would raise."""
    from rlvr_landscape_plugin.episodes import check_chat, open_tasks

    opened = open_tasks(config.env)
    tasks = opened.tasks
    check_chat([snapshots[0].model, *(snapshot.path for snapshot in snapshots)], tasks)
    config = with_path(config, opened, snapshots[0], display)
    check_tensors(snapshots)
    with tempfile.TemporaryDirectory(prefix="rlvr-landscape-probe-") as folder:
        own = config.model_copy(update={"output": Path(folder), "shard": None, "save_traces": False})
        async with Fleet(own, snapshots, display) as fleet:
            sweep = Sweep(own, snapshots, opened.env, tasks, fleet, display)
            server = (await fleet.pool(snapshots[0])).servers[0]
            around = Surroundings(Trajectory.around(snapshots[0], own.slice.run), Path(folder))
            design = find_designer(own.design, DESIGNS)(own, around)[0]
            await Job(design.slices[0], own.server.directions_memory, sweep.meter, display).load(server)
            meter = server.meter
            assert meter is not None
            busy = -(-own.server.max_num_seqs // own.env.rollouts)
            some = range(min(len(tasks), busy))
            began = time.monotonic()
            display.say(f"probing with {len(some)} tasks × {own.env.rollouts} rollouts for about {SECONDS:.0f} s")
            base = await meter.base(lambda: None, some)
            first = time.monotonic() - began
            points = [point for point in design.points if point.slice == 0 and (point.alpha, point.beta) != (0.0, 0.0)]
            moves, rates, measured = [0.0], [], 0
            for point in itertools.cycle(points):
                if time.monotonic() - began > SECONDS:
                    break
                data, _ = await meter.point(base, point.alpha, point.beta, lambda: None, some)
                moves.append(float(data["seconds_move"]))
                played = len(some) * own.env.rollouts
                rates.append((float(data["seconds_sample"]) + float(data["seconds_score"])) / played)
                measured += played
            completions = len(some) * own.env.own_rollouts
            kept = [cell for row in base.segments for cell in row if cell]
            return Probed(
                move=float(np.median(moves[1:] or moves)),
                per_episode=float(np.mean(rates)) if rates else first / completions,
                own=first / completions,
                sampled=float(np.mean([sum(int(s.sampled.sum()) for s in cell) for cell in kept])),
                conversation=float(np.mean([sum(len(s.tokens) for s in cell) for cell in kept])),
                episodes=measured + completions,
                took=time.monotonic() - began,
            )
