"""The command `rlvr-landscape status`: what `status.py` reads, in words, as one line of a log, or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rlvr_landscape_plugin.display import duration, per_second, size
from rlvr_landscape_plugin.errors import run_cli, suggest
from rlvr_landscape_plugin.sweep.heartbeat import FAILED, FINISHED, MEASURING
from rlvr_landscape_plugin.sweep.status import DEAD, Process, Status, read_status


def text(status: Status) -> str:
    """The status in words and numbers, for a terminal of 80 columns or a log."""
    now = status.time
    most = "at most " if status.at_most else ""
    begun = len({found.step for found in status.landscapes})
    prepared = "" if begun == status.steps_asked else f", {begun} of them begun"
    lines = [
        f"{status.output}: {status.state}",
        f"points     {status.points} of {most}{status.points_asked}{_share(status.points, status.points_asked)}",
        f"episodes   {status.episodes:,} of {most}{status.episodes_asked:,}",
        f"snapshots  {status.steps_asked}{prepared}; {len(status.landscapes)} landscapes, "
        f"{sum(found.finished for found in status.landscapes)} with a dataset",
    ]
    if status.state == MEASURING:
        left = status.seconds_left
        per_point = status.episodes_asked / status.points_asked if status.points_asked else 0
        points = f", {per_second(60 * status.rate / per_point)} points/min" if status.rate and per_point else ""
        lines += [
            f"rate       {f'{per_second(status.rate)} episodes/s{points}' if status.rate else 'not known yet'}",
            "left       "
            + ("not known yet" if left is None else f"{most}{duration(left)}, until about {_clock(now + left, now)}"),
        ]
    lines += ["", "landscapes"]
    width = max((len(found.name) for found in status.landscapes), default=0)
    for found in status.landscapes:
        done = f"{found.points}/{found.points_asked}" if found.points_asked else ("1/1" if found.base else "0/1")
        state = f"dataset {found.dataset}" if found.dataset else ("" if found.base else "not begun")
        last = "" if found.finished or found.last is None else f"last point {_ago(found.last, now)}"
        lines.append(f"  {found.name:<{width}}  {done:>9}  {state or last}".rstrip())
    if not status.landscapes:
        lines += [f"  {name}" for name in status.datasets] or ["  none begun"]
    lines += ["", "processes"]
    for process in status.processes:
        lines += _process_lines(process, now)
    if status.shards_absent:
        lines.append(f"  never started: shard {', '.join(status.shards_absent)}")
    if not status.processes:
        lines.append("  none has reported here (a sweep of an older version, or a copy of its datasets)")
    lines += ["", f"failures   {_failures(status)}"]
    more = "" if not status.bytes_more else f", about {size(status.bytes_more)} more to come"
    lines.append(f"disk       {size(status.bytes_used)} used{more}, {size(status.bytes_free)} free")
    return "\n".join(lines)


def _process_lines(process: Process, now: float) -> list[str]:
    what = "; ".join(process.waiting) or (
        f"{process.slice} {process.points[0]}/{process.points[1]}" if process.slice else "preparing"
    )
    doing = f", {what}" if process.at_work else ""
    lines = [
        f"  shard {process.shard}  {process.state}{doing}; sign of life {_ago(process.written, now)} "
        f"({process.host}, process {process.pid})"
    ]
    if process.error:
        lines.append(f"    {process.error}")
    for server in process.servers if process.at_work else ():
        state = "away" if server["away"] else "at work"
        answered = "never" if server["answered"] is None else _ago(server["answered"], now)
        lines.append(f"    {server['url']}  {state}, {server['points']} points, last answer {answered}")
    return lines


def _failures(status: Status) -> str:
    aside = sum(found.moved_aside for found in status.landscapes)
    servers = sum(process.server_failures for process in status.processes)
    episodes = sum(process.failed_episodes for process in status.processes)
    dead = sum(process.state in (DEAD, FAILED) for process in status.processes)
    found = [
        f"{dead} process{'es' * (dead > 1)}" if dead else "",
        f"{servers} of servers" if servers else "",
        f"{episodes} episode{'s' * (episodes > 1)}" if episodes else "",
        f"{aside} file{'s' * (aside > 1)} moved aside (*.corrupt)" if aside else "",
    ]
    return ", ".join(filter(None, found)) or "none"


def _share(part: int, whole: int) -> str:
    return f" ({part / whole:.0%})" if whole else ""


def _ago(then: float, now: float) -> str:
    return f"{duration(max(now - then, 0))} ago"


def _clock(then: float, now: float) -> str:
    day = "" if time.localtime(then)[:3] == time.localtime(now)[:3] else "%Y-%m-%d "
    return time.strftime(f"{day}%H:%M", time.localtime(then))


def line(status: Status) -> str:
    """The status in one line, for a log."""
    left = "" if status.seconds_left is None else f", {duration(status.seconds_left)} left"
    at_work = sum(process.at_work for process in status.processes)
    rate = f", {per_second(status.rate)} episodes/s" if status.rate else ""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.time))
    return (
        f"{stamp}  {status.state}, {status.points}/{status.points_asked} points"
        f"{_share(status.points, status.points_asked)}{rate}{left}, {at_work} of {status.shards_asked} shards at work"
    )


def _suggest(status: Status) -> None:
    if status.state == FINISHED:
        suggest(f"rlvr-landscape report {status.output}")
    elif status.state == MEASURING:
        suggest(f"rlvr-landscape status {status.output} --watch")
    else:
        gone = [process.shard for process in status.processes if process.state not in (FINISHED, MEASURING)]
        gone += status.shards_absent
        of = f" for --shard {', '.join(gone)}" if gone and status.shards_asked > 1 else ""
        suggest(f"the command of this sweep once more{of}; it continues where it stopped")


def parser(prog: str = "rlvr-landscape status") -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog=prog, description="How far a sweep is, from its files alone.")
    made.add_argument("output", type=Path, metavar="DIR", help="output directory of a sweep")
    made.add_argument(
        "--watch",
        action="store_true",
        help="look again every few seconds until nobody measures any more; one line each where this is no terminal. "
        "The exit code is then 0 if the sweep is finished, and 1 if it stopped before",
    )
    made.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between two looks (%(default)g)")
    made.add_argument("--json", action="store_true", help="the same as one JSON object (with --watch: one a line)")
    return made


def main(argv: Sequence[str] | None = None, prog: str = "rlvr-landscape status") -> int:
    """Command line; returns the exit code."""
    given = parser(prog).parse_args(argv)
    if given.every <= 0:
        print(f"error: --every {given.every:g} must be above 0", file=sys.stderr)
        return 2
    code = 0

    def run() -> None:
        nonlocal code
        while True:
            status = read_status(given.output)
            over = not given.watch or status.state != MEASURING
            _print(status, given.watch and not over, given.json, given.watch)
            if over:
                break
            time.sleep(given.every)
        if given.watch and status.state != FINISHED:
            code = 1
        if not given.json:
            _suggest(status)

    return run_cli(run, interrupted="") or code


def _print(status: Status, again: bool, as_json: bool, watching: bool) -> None:
    if as_json:
        print(json.dumps(asdict(status), sort_keys=True, indent=None if watching else 1), flush=True)
    elif watching and sys.stdout.isatty():
        print("\x1b[H\x1b[2J" + text(status) + ("\n\nCtrl-C ends this; the sweep goes on" if again else ""), flush=True)
    elif watching and again:
        print(line(status), flush=True)
    else:
        print(text(status), flush=True)


if __name__ == "__main__":
    sys.exit(main())
