"""Damage in every kind of file that a sweep writes or reads: seen, and mended or refused by name."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import xarray as xr
from fault_servers import PATIENCE, Skip, Violation
from fault_sweeps import NAME, REFUSED, REPAIRED, TOY, WENT_ON, Sweep, fault, same_landscape

HOW = ("flipped", "truncated", "emptied", "garbage")
MOVED_AWAY = 0.5
"""How often a file that was refused is moved away, where that mends it, in the place of being restored."""


def damaged(content: bytes, how: str, rng: random.Random) -> bytes:
    """What a fault makes of a file."""
    if how == "flipped":
        at = rng.randrange(len(content))
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    if how == "truncated":
        return content[: rng.randrange(1, len(content))]
    return b"" if how == "emptied" else rng.randbytes(rng.randint(1, 2 * len(content)))


def _damage(sweep: Sweep, path: Path, how: str) -> tuple[str, str]:
    """Damage a file while no command runs, start the command, and see it repaired or refused by name."""
    backup = path.read_bytes()
    point = path.parent.name == "points"
    if point:
        sweep.spoiled.add(path.name)
        sweep.kept.pop(path.name, None)
    path.write_bytes(damaged(backup, how, sweep.rng))
    left = path.read_bytes()
    detail = f"{path.name if not point else 'point'} {how}"

    def aside() -> bool:
        return any(path.parent.glob(f"{path.name}.*.corrupt"))

    earlier = set(path.parent.glob("*.corrupt"))
    before = len(sweep.points())
    sweep.start(("one", "two", "wait"))
    outcome = WENT_ON
    try:
        if sweep.until(lambda: aside() or len(sweep.points()) > before):
            outcome = WENT_ON if sweep.done else REFUSED
    except Violation:
        if "error: " not in sweep.errors:
            raise
        outcome = REFUSED
    if outcome == REFUSED:
        if path.name not in sweep.errors:
            raise Violation(f"refused without naming {path.name}:\n{sweep.errors}")
        if set(path.parent.glob("*.corrupt")) != earlier:
            raise Violation("files were moved aside beside a refusal")
        if path.name.startswith("base") and sweep.rng.random() < MOVED_AWAY:
            path.rename(path.with_name(f"{path.name}.moved"))
            sweep.spoiled |= {one.name for one in sweep.points()}
            return f"{detail}, moved away", outcome
        if path.name.startswith("journal") and sweep.rng.random() < MOVED_AWAY:
            path.unlink()
            return f"{detail}, moved away", outcome
        path.write_bytes(backup)
        return f"{detail}, put back", outcome
    if aside():
        return detail, REPAIRED
    if point and path.exists() and path.read_bytes() == left:
        # The values are untouched: the dataset says so in the end.
        sweep.spoiled.discard(path.name)
    return f"{detail}, without effect", outcome


def _files(sweep: Sweep, *names: str) -> list[Path]:
    """Files of the sweep of these kinds that are there."""
    folders = {"range": sweep.output, "process": sweep.output}
    return [path for name in names for path in sorted(folders.get(name, sweep.folder).glob(f"{name}*")) if _whole(path)]


def _whole(path: Path) -> bool:
    return path.is_file() and path.suffix in (".json", ".nc") and path.stat().st_size > 1


def _strike(sweep: Sweep, paths: list[Path]) -> tuple[str, str]:
    path = sweep.rng.choice([*paths, *[sweep.rng.choice(sweep.points())] * max(1, len(paths) // 3)])
    return _damage(sweep, path, sweep.rng.choice(HOW))


@fault("file: damaged midway", toy=26, real=1)
def damage_midway(sweep: Sweep) -> tuple[str, str]:
    sweep.moment(at_least=sweep.began_with + 1)
    sweep.kill()
    sweep.check()
    return _strike(sweep, _files(sweep, "base", "journal", "server", "range", "process"))


@fault("file: damaged after the last point", toy=24, real=1)
def damage_finished(sweep: Sweep) -> tuple[str, str]:
    sweep.finish()
    sweep.dataset.unlink()
    sweep.done = False
    return _strike(sweep, _files(sweep, "base", "journal", "recheck", "server", "range", "process"))


@fault("file: the dataset damaged", toy=12)
def damage_dataset(sweep: Sweep) -> tuple[str, str]:
    """R3: never kept, never a crash; the analysis names it, the sweep writes it again without a server."""
    from rlvr_landscape_analysis import AnalysisError, open_landscape

    sweep.finish()
    how = sweep.rng.choice(HOW)
    whole = sweep.dataset.read_bytes()
    sweep.dataset.write_bytes(damaged(whole, how, sweep.rng))
    left = sweep.dataset.read_bytes()
    try:
        open_landscape(sweep.dataset)
        read = True
    except AnalysisError as error:
        read = False
        if sweep.dataset.name not in str(error):
            raise Violation(f"the analysis does not name the file: {error}") from None
    except Exception as error:
        raise Violation(f"the analysis: {type(error).__name__}: {error}") from None
    sweep.done, sweep.process = False, sweep.launch(sweep.arguments("one", sweep.hosts[:1]))
    sweep.process.wait(PATIENCE)
    outcome = sweep.ended()
    aside = list(sweep.output.glob(f"{sweep.dataset.name}.*.corrupt"))
    if outcome != WENT_ON:
        raise Violation(f"not written again:\n{sweep.errors}")
    if not aside:
        if not read or sweep.dataset.read_bytes() != left:
            raise Violation("a damaged dataset was kept, or overwritten without a copy")
        return f"{how}, in a byte that no value depends on", outcome
    for path in aside:
        path.unlink()
    return how, REPAIRED


@fault("file: a snapshot's damaged", toy=14)
def damage_snapshot(sweep: Sweep) -> tuple[str, str]:
    """Weights, configuration, tokenizer and manifest of what is measured: refused, or no value depends on it."""
    if sweep.bench != TOY:
        raise Skip("the shipped policy is not damaged")
    sweep.moment()
    sweep.kill()
    names = ["manifest.json", "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
    path = sweep.snapshot / sweep.rng.choice(names)
    whole, how = path.read_bytes(), sweep.rng.choice(HOW)
    path.write_bytes(damaged(whole, how, sweep.rng))
    detail = f"{path.name} {how}"
    try:
        sweep.mode, sweep.process = "one", sweep.launch(sweep.arguments("one", sweep.hosts[:1]))
        sweep.process.wait(PATIENCE)
        outcome = sweep.ended()
    finally:
        path.write_bytes(whole)
    if outcome == REFUSED:
        if path.name not in sweep.errors and sweep.snapshot.name not in sweep.errors:
            raise Violation(f"refused without naming {path.name}:\n{sweep.errors}")
        return f"{detail}, put back", outcome
    return f"{detail}, without effect", outcome


@fault("file: the dataset of another sweep", toy=4)
def foreign_dataset(sweep: Sweep) -> tuple[str, str]:
    """A whole dataset of other settings, under the name of ours."""
    sweep.finish()
    with xr.open_dataset(sweep.dataset) as ours:
        identity = ours.attrs["identity"]
    others = [data for data in sweep.references.values() if data.attrs["identity"] != identity]
    whole = sweep.dataset.read_bytes()
    if others:
        others[0].to_netcdf(sweep.dataset)
    else:
        shutil.copyfile(sweep.folder / "base.nc", sweep.dataset)
    sweep.done, sweep.process = False, sweep.launch(sweep.arguments("one", sweep.hosts[:1]))
    sweep.process.wait(PATIENCE)
    outcome = sweep.ended()
    if outcome == REFUSED:
        if sweep.dataset.name not in sweep.errors:
            raise Violation(f"refused without naming {sweep.dataset.name}:\n{sweep.errors}")
        sweep.dataset.write_bytes(whole)
        return "put back", outcome
    if not list(sweep.output.glob(f"{sweep.dataset.name}.*.corrupt")):
        raise Violation("a foreign dataset was overwritten")
    if sweep.reference is not None:
        same_landscape(sweep.output / f"landscape_{NAME}.nc", sweep.reference, True)
    return "moved aside", REPAIRED
