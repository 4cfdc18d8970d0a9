"""What a sweep will measure and cost, told before anything starts: `--dry-run`.

Tokens follow the formula of docs/scaling.md: a conversation of c tokens, s of them sampled, is played once per episode
and scored once per completion of the checkpoint and point. Hours need a rate: given (`--rate`) or measured
(`--probe`, probe.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlvr_landscape_plugin.config import DirectionConfig, SweepConfig
from rlvr_landscape_plugin.display import duration, per_second, size
from rlvr_landscape_plugin.errors import ConfigurationError, SnapshotError, StoreError, suggest
from rlvr_landscape_plugin.snapshot import Snapshot, expand, open_snapshot
from rlvr_landscape_plugin.sweep.status import read_status

if TYPE_CHECKING:
    from rlvr_landscape_plugin.sweep.probe import Probed

SAMPLED, CONVERSATION = 300, 600
"""Tokens of an episode that docs/scaling.md assumes: sampled, and of the whole conversation (two turns of
Alphabet-sort)."""
FILE_BYTES, ROLLOUT_BYTES, TOKEN_BYTES = 42_000, 36, 9
"""Of a point's file without its values; of a rollout's values in one file; of a token of the checkpoint's batch."""
MOST_LISTED = 4
"""Snapshots that get a line each."""


@dataclass(frozen=True)
class Cost:
    """What a sweep comes to. All numbers are of the whole sweep, all snapshots and designs."""

    described: str
    """The points around one snapshot, in words."""
    datasets: int
    points: int
    """Of one dataset."""
    played: int
    """Episodes."""
    scored: int
    """Conversations."""
    sampled: float
    """Tokens that are sampled in an episode."""
    conversation: float
    """Tokens of an episode's whole conversation."""
    bytes: int

    @property
    def tokens(self) -> float:
        """Tokens that the servers decode or prefill; prefix caching saves some of them."""
        return self.conversation * (self.played + self.scored)


def cost_of(config: SweepConfig, snapshots: int, tokens: tuple[float, float] | None = None) -> Cost:
    """The cost of a sweep of so many snapshots. `tokens`: sampled and in all, of an episode; default: assumed."""
    described, points, datasets = points_of(config)
    env, count = config.env, snapshots * datasets
    conversation = min(CONVERSATION, config.server.max_model_len)
    sampled, conversation = tokens or (min(SAMPLED, conversation), conversation)
    rollouts = points * env.num_prompts * max(env.rollouts, env.own_rollouts)
    base = round(env.num_prompts * env.own_rollouts * conversation * TOKEN_BYTES)
    return Cost(
        described,
        count,
        points,
        count * env.num_prompts * (points * env.rollouts + env.own_rollouts),
        count * env.num_prompts * env.own_rollouts * (points + 1),
        sampled,
        conversation,
        # Once in points' files and once in the dataset.
        count * (points * FILE_BYTES + 2 * rollouts * ROLLOUT_BYTES + base),
    )


def points_of(config: SweepConfig) -> tuple[str, int, int]:
    """What the design measures around one snapshot: in words, points of one dataset, and datasets.

    A designer that is named by its import path is not asked: 0 points.
    """
    if config.design == "grid":
        alphas, betas = config.grid.alpha.values(), config.grid.beta.values()
        points = len(alphas) * len(betas)
        return f"{len(alphas)} × {len(betas)} = {points} points", points, len(config.slice.seeds)
    if config.design == "census":
        pairs, radii = config.census.pairs, len(config.census.values())
        return f"{pairs} pairs × 2 × {radii} radii = {2 * pairs * radii} points", 2 * pairs * radii, 1
    if config.design == "path":
        paths, positions = len(config.path.directions), len(config.path.positions)
        return f"{paths} paths × {positions} positions = {paths * positions} points", paths * positions, 1
    return "the checkpoint itself" if config.design == "boundary" else "as its designer says", 0, 1


def dry_run(config: SweepConfig, shards: int = 1) -> None:
    """Print what the sweep would measure and cost, and what is missing for it; starts a server only for a probe.

    `shards`: processes that share it, each with servers of its own. Raises an error that names what cannot be opened.
    """
    from rlvr_landscape_plugin.sweep.snapshots import named_snapshots

    if config.show_config:
        print(json.dumps(config.model_dump(mode="json", exclude={"server": {"token"}}), indent=2))
    found, absent = openable(config)
    if problems := absent + missing_directions(config):
        print(dry_run_report(config, found, missing=len(absent)))
        raise ConfigurationError("this sweep cannot start:\n       " + "\n       ".join(problems))
    snapshots = named_snapshots(config)
    print(dry_run_report(config, snapshots, _probe(config, snapshots) if config.probe else None, shards))
    suggest("the same command without --dry-run")


def openable(config: SweepConfig) -> tuple[list[Snapshot], list[str]]:
    """The snapshots that can be opened, and one sentence for each other one."""
    found: list[Snapshot] = []
    problems: list[str] = []
    for reference in config.snapshots:
        try:
            names = expand(reference)
        except SnapshotError as error:
            problems.append(str(error))
            continue
        for name in names:
            try:
                found.append(open_snapshot(name, config.base_model))
            except SnapshotError as error:
                problems.append(str(error))
    return found, problems


def missing_directions(config: SweepConfig) -> list[str]:
    """One sentence for every direction's file and run that is not there."""
    problems = []
    directions: Sequence[tuple[str, DirectionConfig]] = [
        ("slice.alpha", config.slice.alpha),
        ("slice.beta", config.slice.beta),
        *((f"path.directions[{i}]", direction) for i, direction in enumerate(config.path.directions)),
    ]
    for key, direction in directions:
        if direction.file is not None and not direction.file.is_file():
            problems.append(f"{key}.file = {str(direction.file)!r} does not exist")
    if config.slice.run is not None and not Path(config.slice.run).is_dir():
        problems.append(f"slice.run = {str(config.slice.run)!r} is not a directory")
    return problems


def _probe(config: SweepConfig, snapshots: Sequence[Snapshot]) -> Probed:
    from rlvr_landscape_plugin.display import Display
    from rlvr_landscape_plugin.sweep.probe import probe

    with Display() as display:
        return asyncio.run(probe(config, snapshots, display))


def dry_run_report(
    config: SweepConfig,
    snapshots: Sequence[Snapshot],
    probed: Probed | None = None,
    shards: int = 1,
    missing: int = 0,
) -> str:
    """About ten lines: what exists, and points, episodes, tokens, hours and disk space of the whole sweep.

    `missing`: snapshots that it asks for and that are not there; they cost as much as the others.
    """
    count = len(snapshots) + missing
    cost = cost_of(config, count, None if probed is None else (probed.sampled, probed.conversation))
    env = config.env
    most = "at most " if config.until_ci_width is not None else ""
    ranges = "" if config.grid.find is None else ", ranges to be found by probes"
    seeds = cost.datasets // max(count, 1)
    of = _many(count, "snapshot") + (f" × {seeds} seeds" if seeds > 1 else "")
    own = "" if env.base_rollouts is None else f", {env.base_rollouts} of the checkpoint's own"
    source = "assumed as in docs/scaling.md, --probe measures" if probed is None else "as the probe measured"
    lines = [
        *_snapshot_lines(snapshots),
        f"{config.design:<11} {most}{cost.described}, {_many(cost.datasets, 'dataset')} ({of}){ranges}",
        f"episodes    {most}{cost.played:,} ({env.num_prompts} prompts × {env.rollouts} rollouts per point{own})",
        f"tokens      {most}{_large(cost.tokens)}: {cost.played:,} conversations played and {cost.scored:,} scored, "
        f"{cost.conversation:,.0f} tokens each, {cost.sampled:,.0f} of them sampled ({source})",
        f"time        {most}{_time(config, cost, probed, shards)}",
        f"disk        {most}about {size(cost.bytes)}",
        f"output      {config.output}{_present(config)}",
    ]
    return "\n".join(lines)


def _snapshot_lines(snapshots: Sequence[Snapshot]) -> list[str]:
    if len(snapshots) <= MOST_LISTED:
        return [f"snapshot    step {found.step}: {found.path}" for found in snapshots]
    steps = ", ".join(str(found.step) for found in snapshots)
    return [f"snapshots   {len(snapshots)} found: steps {steps}", f"            in {snapshots[0].path.parent}"]


def _time(config: SweepConfig, cost: Cost, probed: Probed | None, shards: int) -> str:
    if probed is not None:
        servers = max(len(config.server.urls), shards)
        seconds = probed.seconds(cost, config) / servers
        of = "1 server" if servers == 1 else f"{servers} servers as fast as the first"
        return (
            f"{duration(seconds)} with {of} ({per_second(cost.played / seconds)} episodes/s; probe of "
            f"{probed.episodes} episodes in {duration(probed.took)})"
        )
    if config.rate is not None:
        return f"{duration(cost.played / config.rate)} at {per_second(config.rate)} episodes/s, as given"
    return "not known; give the rate of all servers together, --rate EPISODES_PER_SECOND, or measure it, --probe"


def _present(config: SweepConfig) -> str:
    """What the output holds already."""
    with contextlib.suppress(StoreError, OSError):
        status = read_status(config.output)
        return f" (holds {status.points} of {status.points_asked} points of a sweep, {status.state})"
    return ""


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _large(number: float) -> str:
    for unit in ("", " k", " M", " G"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"
