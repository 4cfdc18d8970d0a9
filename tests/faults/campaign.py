"""Faults at random moments of real sweeps and training runs, and what must hold after each.

    python tests/faults/campaign.py --results outputs/faults.jsonl --minutes 10
    python tests/faults/campaign.py --results outputs/faults.jsonl --table docs/faults.md

Small sweeps run as commands of their own: against toy servers (the real routes over an engine without weights), where
every value must come again to the bit, and against real vLLM servers for what only they can do. Servers stand behind
gates: fixed addresses where connections can be cut, delayed or led elsewhere. The schedule is a function of the seed;
with `--results` a campaign continues where an earlier call stopped. A fault is *struck* only if the command was still
at work. After it the command either goes on, or ends with a clear message and the same command continues; every sweep
ends with the dataset of the undisturbed one. Linux; a full and a read-only disk need the right to mount.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), *(str(Path(__file__).parents[1] / name) for name in (".", "helpers"))]

import fault_attacks  # noqa: F401 - registers its kinds
import fault_files  # noqa: F401
import fault_kinds  # noqa: F401
import xarray as xr
from conftest import POLICY
from fault_servers import Disk, Host, Missed, RealHost, Skip, ToyHost, Violation, prepare_to_fork
from fault_sweeps import FAILED, KINDS, OUTCOMES, REAL, SKIPPED, TOY, TRAINING, VARIANTS, Subject, Sweep
from fault_training import Training

from rlvr_landscape_plugin.snapshot import Manifest, write_snapshot

BENCHES = (TOY, TRAINING, REAL)
Kind = tuple[str, str]
BEGIN, END = "<!-- table of the campaign: begin -->", "<!-- table of the campaign: end -->"


class Campaign:
    """Hosts, a disk, the undisturbed results, and the sweeps or training runs that faults strike."""

    def __init__(
        self,
        hosts: Sequence[Host],
        folder: Path,
        seed: int,
        bench: str = TOY,
        variants: Sequence[str] = tuple(VARIANTS),
    ) -> None:
        """`variants`: kinds of sweeps on toy servers."""
        self.variants = list(variants) if bench == TOY else ["plain"]
        self.hosts, self.folder, self.seed, self.bench = list(hosts), folder, seed, bench
        self.disk = Disk(folder / _disk(bench), "6m" if bench != TRAINING else "200m")
        self.log = folder / "commands.log"
        self.log.touch()
        self.snapshot = POLICY if bench == REAL else _snapshot(self.hosts[0].roots[-1])
        self.count = 0
        self.references: dict[str, Any] = {}
        try:
            for variant in self.variants:
                undisturbed = self._subject(random.Random(f"{seed} undisturbed {variant}"), variant)
                undisturbed.finish()
                if isinstance(undisturbed, Sweep):
                    self.references[variant] = xr.load_dataset(undisturbed.dataset)
                shutil.rmtree(undisturbed.output)
        except BaseException:
            self.close()
            raise

    def _subject(self, rng: random.Random, variant: str | None = None) -> Sweep | Training:
        self.count += 1
        output = self.disk.path / f"{'run' if self.bench == TRAINING else 'sweep'}{self.count:03d}"
        if self.bench == TRAINING:
            return Training(output, self.hosts, self.references, self.disk, rng, self.log)
        variant = variant or rng.choice([self.variants[0], *self.variants])
        shared = self.hosts, self.references, self.disk, rng, self.log
        return Sweep(output, *shared, self.bench, variant, self.snapshot)

    def run(self, kinds: dict[int, Kind], until: float = float("inf")) -> Iterator[dict[str, Any]]:
        """Strike one fault after another, index → kind; yields records when what they struck is verified."""
        subject: Sweep | Training | None = None
        records: list[dict[str, Any]] = []
        misses, waiting = 0, list(kinds)
        while waiting and time.monotonic() < until:
            index = waiting[0]
            rng = random.Random(f"{self.seed} {index} {misses}")
            subject = subject or self._subject(rng)
            subject.rng = rng
            bench, kind = kinds[index]
            variant = getattr(subject, "variant", "")
            record = {"index": index, "bench": bench, "kind": kind, "detail": "", "struck": subject.output.name}
            started = time.monotonic()
            over = False
            try:
                record["detail"], record["outcome"] = KINDS[kinds[index]][1](subject)
                record["detail"] = ", ".join(word for word in (variant, record["detail"]) if word and word != "plain")
            except Missed:
                over = True
            except Skip as reason:
                record |= {"outcome": SKIPPED, "detail": str(reason)}
            except Violation as problem:
                record |= {"outcome": FAILED, "detail": str(problem)}
            self._calm()
            if over:
                misses += 1
            else:
                record["seconds"] = round(time.monotonic() - started, 1)
                records.append(record)
                waiting.pop(0)
                misses = 0
            failed = record.get("outcome") == FAILED
            if over or failed or subject.done:
                yield from self._verified(subject, records, failed)
                subject, records = None, []
        if subject is not None:
            yield from self._verified(subject, records, False)

    def _verified(self, subject: Subject, records: list[dict[str, Any]], failed: bool) -> list[dict[str, Any]]:
        """The records of a sweep or a run, after it was finished and its result compared."""
        try:
            if not failed:
                subject.finish()
        except (Violation, Missed) as problem:
            records = [record | {"outcome": FAILED, "detail": str(problem)} for record in records]
        subject.kill()
        shutil.rmtree(subject.output, ignore_errors=True)
        return records

    def _calm(self) -> None:
        self.disk.mend()
        for host in self.hosts:
            host.mend()

    def close(self) -> None:
        self.disk.close()


def _disk(bench: str) -> str:
    """Name of the directory that takes what a bench writes; a toy server reads policies in training there."""
    return f"disk-{BENCHES.index(bench)}"


def _snapshot(root: Path) -> Path:
    """The shipped policy as a trainer leaves it: a copy with a manifest."""

    def fill(folder: Path) -> None:
        for file in POLICY.iterdir():
            if file.is_file() and file.suffix != ".md" and file.name != "manifest.json":
                shutil.copyfile(file, folder / file.name)

    return write_snapshot(root / "snapshots", Manifest(step=0), fill)


def schedule(count: int, seed: int, kinds: list[Kind]) -> list[Kind]:
    """`count` kinds: each as often as its weight asks, in an order drawn from the seed."""
    deck = [kind for kind in kinds for _ in range(KINDS[kind][0])]
    rng, drawn = random.Random(seed), []
    while len(drawn) < count:
        rng.shuffle(deck)
        drawn += deck
    return drawn[:count]


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table: one line per kind of fault, one column per outcome."""
    counts = Counter((record["kind"], record["outcome"]) for record in records)
    real = Counter(record["kind"] for record in records if record.get("bench") == REAL)
    columns = [outcome for outcome in OUTCOMES if any(key[1] == outcome for key in counts)]
    lines = [
        " | ".join(["| fault", "struck", "of these with vLLM", *columns]) + " |",
        "|---" * (len(columns) + 3) + "|",
    ]
    names = dict.fromkeys(kind for _, kind in KINDS)
    for kind in [*(kind for kind in names if any(key[0] == kind for key in counts)), "all"]:
        row = [sum(n for (k, o), n in counts.items() if kind in (k, "all") and o == column) for column in columns]
        with_vllm = sum(real.values()) if kind == "all" else real[kind]
        lines.append(" | ".join([f"| {kind}", str(sum(row)), *(str(n or "") for n in (with_vllm, *row))]) + " |")
    return "\n".join(lines)


def wall_seconds(records: list[dict[str, Any]]) -> Counter[str]:
    """Seconds that each of the benches took, all calls together."""
    seconds = Counter[str]()
    for record in records:
        seconds[record["bench"]] = max(seconds[record["bench"]], record["wall_seconds"])
    return seconds


def summary(records: list[dict[str, Any]], seed: int) -> str:
    """How many faults struck, how long it took, and how many violations there were; one line."""
    seconds, outcomes = wall_seconds(records), Counter(record["outcome"] for record in records)
    parts = [
        f"{sum(record['bench'] == bench for record in records)} on {bench} in {seconds[bench] / 60:.0f} minutes"
        for bench in BENCHES
        if seconds[bench]
    ]
    total = sum(seconds.values()) / 60
    return (
        f"`--seed {seed}`: {len(records)} faults ({', '.join(parts)}), {total:.0f} minutes in all, the start of the "
        f"servers included; {outcomes[FAILED]} violations, {outcomes[SKIPPED]} skipped."
    )


def write_table(page: Path, text: str) -> None:
    """Put the table between its two marks in a page."""
    before, found, rest = page.read_text().partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise SystemExit(f"{page} has no place for the table: {BEGIN} … {END}")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def toy_hosts(folder: Path) -> list[Host]:
    """Two toy servers that may read the shipped policy and `folder/roots`."""
    roots = [POLICY, *(folder / _disk(bench) for bench in BENCHES), folder / "roots"]
    roots[-1].mkdir(exist_ok=True)
    return [ToyHost(roots, folder / f"toy{number}") for number in range(2)]


def real_hosts(folder: Path) -> list[Host]:
    """Two vLLM servers of one's own."""
    roots, hosts = [POLICY, folder / "roots"], list[Host]()
    roots[1].mkdir(exist_ok=True)

    def start(number: int) -> None:
        hosts.append(RealHost.start(roots, folder / f"server{number}.log"))

    starters = [threading.Thread(target=start, args=(number,)) for number in range(2)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    return hosts


MAKE: dict[str, Callable[[Path], list[Host]]] = {TOY: toy_hosts, TRAINING: toy_hosts, REAL: real_hosts}


def _strike(bench: str, kinds: dict[int, Kind], options: argparse.Namespace, until: float, spent: float) -> None:
    """The servers of a bench, and the faults that are still to come; each record is appended to the results at once."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rlvr-faults-") as name:
        folder = Path(name)
        hosts = MAKE[bench](folder)
        campaign = None
        try:
            campaign = Campaign(hosts, folder, options.seed, bench)
            for record in campaign.run(kinds, until):
                record["wall_seconds"] = round(spent + time.monotonic() - started, 1)
                with options.results.open("a") as sink:
                    sink.write(json.dumps(record) + "\n")
                print(
                    f"{record['index']:4d}  {record['kind']}: {record['outcome']} ({record['detail']}), "
                    f"{record['seconds']} s",
                    flush=True,
                )
        finally:
            if campaign is not None:
                with options.results.with_suffix(".log").open("ab") as sink:
                    sink.write(campaign.log.read_bytes())
                campaign.close()
            for host in hosts:
                host.close()


def read(results: Path) -> list[dict[str, Any]]:
    """The records so far, in the order of their faults."""
    lines = results.read_text().splitlines() if results.exists() else []
    return sorted((json.loads(line) for line in lines), key=lambda record: record["index"])


def main() -> int:
    """Command line; returns 1 if anything that must hold did not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = sum(weight for weight, _ in KINDS.values())
    parser.add_argument("--faults", type=int, default=whole, help=f"default: {whole}, every kind by its weight")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=None, help="parts of names; default: all")
    parser.add_argument("--on", nargs="*", choices=BENCHES, default=BENCHES, help="what to strike; default: all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no fault after so many minutes")
    parser.add_argument("--results", type=Path, default=Path("outputs/faults.jsonl"), help="records; continued")
    parser.add_argument("--table", type=Path, default=None, help="page into which the table is written")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if options.kinds is None or any(part in kind[1] for part in options.kinds)]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    drawn = dict(enumerate(schedule(options.faults, options.seed, kinds)))
    until = time.monotonic() + 60 * options.minutes
    prepare_to_fork(training=TRAINING in options.on)
    for bench in options.on:
        before = read(options.results)
        done = {record["index"] for record in before}
        spent = max((record["wall_seconds"] for record in before if record["bench"] == bench), default=0.0)
        waiting = {index: kind for index, kind in drawn.items() if kind[0] == bench and index not in done}
        if waiting and time.monotonic() < until:
            _strike(bench, waiting, options, until, spent)
    records = read(options.results)
    text = f"{summary(records, options.seed)}\n\n{table(records)}"
    print(text)
    if options.table is not None:
        write_table(options.table, text)
    outcomes = Counter(record["outcome"] for record in records)
    print(json.dumps({"faults": len(records), "outcomes": outcomes, "seed": options.seed}))
    return 1 if outcomes[FAILED] else 0


if __name__ == "__main__":
    sys.exit(main())
