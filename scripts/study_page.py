"""The study's page: verdicts, tables and figures of the stages that are done.

    python scripts/study_page.py outputs/study --page results/study

Written into its directory: README.md (from study_page.md.j2), what `rlvr_landscape_analysis.study` writes for each
objective, the figure of the training runs, and `data` with every dataset and journal that was read, so that the same
command makes the page again from there (`python scripts/study_page.py results/study/data --page results/study`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rlvr_landscape_analysis import open_landscape
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.evidence import EvidenceAnalysis, RunEvidence, analyse_evidence, open_evidence
from rlvr_landscape_analysis.figures import new_figure, panel_aspect, reward_landscape, save_figure
from rlvr_landscape_analysis.landscape import per_prompt
from rlvr_landscape_analysis.report.files import write_whole
from rlvr_landscape_analysis.results import NOT_MEASURABLE, NOT_SUPPORTED, SUPPORTED, UNDECIDED, Claim
from rlvr_landscape_analysis.schema import EVALUATIONS_FILE, METRICS_FILE, RUN_FILE
from rlvr_landscape_analysis.statistics.boundary import boundary_change
from rlvr_landscape_analysis.statistics.claims import claim_t3
from rlvr_landscape_analysis.statistics.diagnostics import entropy_law, two_stage
from rlvr_landscape_analysis.statistics.path import compared_position
from rlvr_landscape_analysis.statistics.ranges import plain_by_range
from rlvr_landscape_analysis.statistics.resample import Bootstrap
from rlvr_landscape_analysis.statistics.wording import number, sampled, signed, three_digits
from rlvr_landscape_analysis.study import write_study
from rlvr_landscape_analysis.trainer_log import open_training, write
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
DESIGNS = ("census", "early", "path", "path_last", "boundary")
"""Directories of a run that hold censuses, paths and boundaries of the training tasks."""
GRIDS = ("grid_local", "grid_wide")
OTHERS = "others"
"""The one with other people."""
START = "start"
TITLES = {"grpo": "GRPO", "grpo_n": "GRPO-N", "random": "GRPO on random rewards"}
TRAINED = ("grpo", "grpo_n")
OTHER_THRESHOLDS = (0.3, 0.7)
"""Rewards at which T3 is computed too; the verdict is that of the configuration's threshold."""
CLAIMED = (
    ("T1", "T1 supported, by little: −0.025 beyond the radius"),
    ("T2", "T2 not supported: the correlation is there at step 0 too"),
    ("T3", "T3 not supported: pass@2 rises with pass@1"),
)


@dataclass
class Data:
    """What a study's output holds."""

    out: Path
    record: dict[str, Any]
    training: dict[str, xr.Dataset]
    """Run → its journals."""
    evidence: dict[str, RunEvidence]
    """Run → what was measured around its snapshots, step 0 included; only runs with a later step."""
    others: dict[str, RunEvidence]
    """The same with other people."""

    def runs(self, objective: str) -> list[RunEvidence]:
        """Those of one objective."""
        return [run for name, run in self.evidence.items() if name.rpartition("-")[0] == objective]


def read(out: Path) -> Data:
    """Everything that is there. Raises `AnalysisError` where the output is none of a study."""
    file = out / "record.json"
    try:
        record = json.loads(file.read_text())["stages"]
    except FileNotFoundError as error:
        raise AnalysisError(f"{file} is missing; give the output directory of a study") from error
    except (ValueError, KeyError, TypeError) as error:
        raise AnalysisError(f"{file} is damaged: {error!r}") from error
    data = Data(out, record, {}, {}, {})
    for folder in trained_runs(out, record):
        data.training[folder.name] = open_training(folder / "run")
        own = _evidence([out / START / name for name in DESIGNS], [folder / name for name in DESIGNS], folder.name)
        if own is not None:
            data.evidence[folder.name] = own
        other = _evidence([out / START / OTHERS], [folder / OTHERS], folder.name)
        if other is not None:
            data.others[folder.name] = other
    return data


def trained_runs(out: Path, record: Mapping[str, Any]) -> list[Path]:
    """Folders of the runs whose training has finished: one that still trains would count with its present step."""
    return [
        path
        for path in sorted(out.iterdir())
        if path.name.rpartition("-")[0] in TITLES and record.get(f"train-{path.name}", {}).get("done")
    ]


def _evidence(start: Sequence[Path], own: Sequence[Path], name: str) -> RunEvidence | None:
    """None where nothing of the run itself is there."""
    found = [path for path in own if any(path.glob("*_step*.nc"))]
    shared = [path for path in start if any(path.glob("*_step*.nc"))]
    return open_evidence(*shared, *found, name=name) if found else None


def keep(data: Data, target: Path) -> None:
    """Copy what was read to `target`, in the same places."""
    if target.resolve() == data.out.resolve():
        return
    files = [data.out / "record.json"]
    for folder in (data.out / START, *trained_runs(data.out, data.record)):
        files += [folder / "run" / name for name in (RUN_FILE, METRICS_FILE, EVALUATIONS_FILE)]
        for name in (*DESIGNS, *GRIDS, OTHERS):
            files += sorted((folder / name).glob("*_step*.nc"))
    copy_files(files, data.out, target)


def copy_files(files: Sequence[Path], out: Path, target: Path) -> None:
    """Copy those that are there to the same places below `target`; datasets may be packed closer.

    Where the outputs lay on the machine that made them is left out of records: it says OUTPUT there.
    """
    for file in files:
        if file.is_file():
            copy = target / file.relative_to(out)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".nc":
                _pack(file, copy)
            else:
                copy.write_bytes(file.read_bytes().replace(os.fsencode(out.resolve()), b"OUTPUT"))


def _pack(file: Path, copy: Path) -> None:
    """Copy a dataset, with one chunk for each variable if that is shorter: the chunks of a census are a point each."""
    data = xr.load_dataset(file)
    if copy.is_file() and xr.load_dataset(copy).identical(data):
        return
    encoding = {}
    for name, variable in data.variables.items():
        if variable.dtype.kind in "fiu" and variable.size > 64:
            variable.encoding = {}
            encoding[name] = {"zlib": True, "shuffle": True, "complevel": 9, "chunksizes": variable.shape}
    scratch = copy.with_name(f".{copy.name}")
    data.to_netcdf(scratch, engine="netcdf4", encoding=encoding)
    if scratch.stat().st_size > 0.9 * file.stat().st_size:
        shutil.copyfile(file, scratch)
    scratch.replace(copy)


def over_runs(values: Sequence[float], level: float = 0.95) -> tuple[float, tuple[float, float]]:
    """Mean over runs with Student's interval; one run has none."""
    array = np.asarray(values, float)
    if len(array) < 2:
        return float(array.mean()), (np.nan, np.nan)
    half = stats.t.ppf(0.5 + level / 2, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    return float(array.mean()), (float(array.mean() - half), float(array.mean() + half))


def between(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> tuple[float, tuple[float, float]]:
    """Mean of `second` minus that of `first` with Welch's interval over runs; NaN where one has a single run."""
    value = float(np.mean(second) - np.mean(first))
    if min(len(first), len(second)) < 2:
        return value, (np.nan, np.nan)
    bounds = stats.ttest_ind(second, first, equal_var=False).confidence_interval(level)
    return value, (float(bounds.low), float(bounds.high))


def judged(interval: tuple[float, float]) -> str:
    """What an interval says about "above 0"."""
    low, high = interval
    if not np.isfinite([low, high]).all():
        return UNDECIDED
    return SUPPORTED if low > 0 else NOT_SUPPORTED if high < 0 else UNDECIDED


def _runs_word(count: int) -> str:
    return "one run" if count == 1 else f"{count} runs"


def training_part(training: Mapping[str, xr.Dataset]) -> dict[str, list[Any]]:
    """Rows of the table, and what the runs say together."""
    rows, gains, entropies = [], {}, {}
    for name, run in training.items():
        objective = name.rpartition("-")[0]
        entropy = run["held_out_entropy"].values
        bounds = tuple(float(value) for value in run["gain_interval"].values[-1])
        rows.append(
            (
                f"{TITLES[objective]}, seed {name.rpartition('-')[2]}",
                str(int(run["look"][-1])),
                f"{float(run['held_out'][0]):.3f}",
                number(float(run["gain"][-1]), bounds, digits=3),
                f"{entropy[0]:.3f}",
                f"{entropy[-1]:.3f}",
            )
        )
        gains.setdefault(objective, []).append(float(run["gain"][-1]))
        entropies.setdefault(objective, []).append(float(entropy[-1]))
    sentences = []
    for objective, values in gains.items():
        mean, interval = over_runs(values)
        sentences.append(f"{TITLES[objective]}: gain {_over(mean, interval, len(values))}.")
    if "random" in gains:
        mean, interval = over_runs(gains["random"])
        says = {
            SUPPORTED: "supported",
            NOT_SUPPORTED: "not supported: the reward fell",
            UNDECIDED: "undecided",
        }[judged(interval)]
        sentences.append(
            f"Spurious rewards raise the reward: {says} (gain {_over(mean, interval, len(gains['random']))})."
        )
    if {"grpo", "grpo_n"} <= set(gains):
        value, interval = between(entropies["grpo"], entropies["grpo_n"])
        count = min(len(entropies["grpo"]), len(entropies["grpo_n"]))
        sentences.append(
            f"GRPO-N keeps the entropy higher than GRPO: {judged(interval)} (GRPO-N minus GRPO at the end, in nat: "
            f"{_over(value, interval, count)})."
        )
        value, interval = between(gains["grpo"], gains["grpo_n"])
        sentences.append(f"Gain of GRPO-N minus that of GRPO: {_over(value, interval, count)}.")
    laws = {name: entropy_law(run["entropy"].values, run["reward"].values) for name, run in training.items()}
    known = {name: law for name, law in laws.items() if np.isfinite(law["r_squared"])}
    if known:
        words = "; ".join(
            f"{name} a = {float(law['a']):.3g}, b = {float(law['b']):.3g}, R² = {float(law['r_squared']):.2f}"
            for name, law in known.items()
        )
        sentences.append(f"Entropy law R = −a exp(H) + b over the training batches: {words}.")
    return {"rows": rows, "sentences": sentences}


def _over(value: float, interval: tuple[float, float], runs: int) -> str:
    """A number with its interval over runs, or the words that there is none."""
    if not np.isfinite(interval).all():
        return f"{signed(value, 3)} ({_runs_word(runs)}: no interval over runs)"
    return f"{number(value, interval, digits=3)} over {_runs_word(runs)}"


def frontier_rows(analyses: Sequence[EvidenceAnalysis]) -> list[tuple[str, ...]]:
    """Training's own ways of every run and step, as far as random directions reach their KL.

    Back to step 0 along the displacement, and on along the next update.
    """
    rows = []
    for analysis in analyses:
        for step, path, target in (
            (step, str(path), -1.0 if path == "displacement" else 1.0)
            for step, data in sorted(analysis.path.items())
            for path in data["path"].values
        ):
            along = analysis.path[step].sel(path=path)
            at = compared_position(along, target)
            if at is None:
                continue
            here = along.isel(position=at)
            advantage, ratio = float(here["advantage"]), float(here["fisher_ratio"])
            bounds = [
                tuple(float(v) for v in here[f"{name}_interval"].values) for name in ("advantage", "fisher_ratio")
            ]
            rows.append(
                (
                    analysis.name,
                    str(step),
                    f"{path}, {signed(float(here['position']))}",
                    f"{float(here['kl']):.2g}",
                    number(advantage, bounds[0], digits=3),
                    f"{three_digits(ratio)} [{three_digits(bounds[1][0])}, {three_digits(bounds[1][1])}]"
                    if np.isfinite(ratio)
                    else "not defined",
                )
            )
    return rows


def boundary_rows(data: Data) -> list[tuple[str, ...]]:
    """The change of pass@k from the first to the last step, for the people of training and for others."""
    rows = []
    for people, group in (("those of training", data.evidence), ("others", data.others)):
        for name, run in group.items():
            if len(run.boundaries) < 2:
                continue
            first, last = min(run.boundaries), max(run.boundaries)
            change = boundary_change(run.boundaries[first], run.boundaries[last])
            ends = [change.isel(k=at) for at in (0, -1)]
            deltas = [
                number(float(end["difference"]), tuple(end["difference_interval"].values.tolist()), digits=3)
                for end in ends
            ]
            rows.append(
                (
                    *(name, people, f"{first} to {last}", *deltas, str(int(change["k"][-1]))),
                    f"{int(change['gained'].sum())} / {int(change['lost'].sum())}",
                    f"{int(change['entered'])} ({float(change['entered_by_chance']):.1f})",
                )
            )
    return rows


def two_stages(data: Data, settings: Bootstrap) -> str:
    """What pass@k over training says about two stages, per run; empty where no run has five steps."""
    from rlvr_landscape_analysis.designs import successes
    from rlvr_landscape_analysis.schema import pass_threshold
    from rlvr_landscape_analysis.statistics.boundary import pass_at_k_values

    words = []
    for name, run in data.evidence.items():
        if len(run.boundaries) < 5:
            continue
        steps = sorted(run.boundaries)
        counts = [successes(run.boundaries[step], pass_threshold(run.boundaries[step].attrs)) for step in steps]
        k = 1 << (min(int(valid.min()) for _, valid in counts).bit_length() - 1)
        cells = [pass_at_k_values(solved, valid, np.array([k]))[0] for solved, valid in counts]
        words.append(f"{name}: {two_stage(steps, cells, settings)['stage'].item()!s} (pass@{k}, steps {steps})")
    return "; ".join(words)


def thresholds_words(runs: Sequence[RunEvidence], settings: Bootstrap) -> str:
    """T3's verdict at other rewards that pass."""
    found = [(limit, claim_t3(runs, settings, limit)) for limit in OTHER_THRESHOLDS]
    measured = [(limit, claim) for limit, claim in found if claim.verdict != NOT_MEASURABLE]
    return ", ".join(f"{limit:g} {claim.verdict}" for limit, claim in measured)


_FIGURES = (
    ("frontier_step", "Reward against KL: random directions (grey) and training's own way"),
    ("correlation_by_radius", "Correlation of KL and reward over random directions against the radius"),
    ("density_by_radius", "Share of random directions that improve the reward"),
    ("curvature", "KL per squared length over training: random directions, and training's way by theirs"),
    ("boundary", "pass@k to the number of rollouts"),
)


def chosen_figures(folder: Path, name: str) -> list[tuple[str, str]]:
    """Files of the first run's figures that the page shows, with their captions; of the frontiers the last."""
    found = []
    for stem, words in _FIGURES:
        files = sorted((folder / "figures").glob(f"{name}_{stem}*.png"))
        if files:
            found.append((files[-1].name, f"{words} ({name})"))
    return found


def stage_rows(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What was run, in the order in which it was; not what was only begun, of which no time is known."""
    rows = []
    for name, entry in record.items():
        if name == "page" or not (entry["done"] or entry["seconds"]):
            continue
        state = f"{entry['seconds'] / 60:.1f}" + ("" if entry["done"] else " (not finished)")
        rollouts = f"{entry['rollouts']:,}" if "rollouts" in entry else ""
        rows.append((name, entry["what"], state, rollouts, ", ".join(map(str, entry["seeds"]))))
    return rows


def draw_grid(files: Sequence[Path], folder: Path) -> list[tuple[str, str]]:
    """Maps of the 2-D slices: file and caption."""
    drawn = []
    for file in files:
        map_ = per_prompt(open_landscape(file))
        figure, ax = new_figure(aspect=panel_aspect(map_))
        reward_landscape(map_, ax)
        save_figure(figure, folder / file.stem)
        drawn.append((f"{folder.name}/{file.stem}.png", f"Reward and KL around step {int(map_['step'])}"))
    return drawn


def slices(data: Data, page: Path, settings: Bootstrap) -> tuple[list[tuple[str, str]], list[tuple[str, ...]]]:
    """Maps of the last step of each slice, and rows: the plain correlation of KL and reward by the slice's range."""
    drawn, rows = [], []
    for folder in trained_runs(data.out, data.record):
        for name in GRIDS:
            files = sorted((folder / name).glob("landscape_step*.nc"))
            drawn += [
                (file, f"{words} ({folder.name})")
                for file, words in draw_grid(files[-1:], page / f"{name}_{folder.name}")
            ]
            for file in files:
                map_ = per_prompt(open_landscape(file))
                found = plain_by_range(map_, bootstrap=settings)
                cells = [
                    f"{signed(float(found['plain'][i]))} within ±{float(found['half_width'][i]):.3g}"
                    for i in range(found.sizes["share"])
                    if np.isfinite(found["plain"][i])
                ]
                rows.append((folder.name, str(int(map_["step"])), "; ".join(cells)))
    return drawn, rows


def make_page(out: Path, page: Path, expected: Sequence[str] = ()) -> list[Path]:
    """Write everything; returns the files that are new. `expected`: names of all stages, to say which are missing."""
    data, settings = read(out), Bootstrap()
    page.mkdir(parents=True, exist_ok=True)
    written = []
    if data.training:
        written += write(data.training, page)
    claims: dict[str, list[Claim]] = {}
    thresholds, figures, analyses = {}, {}, []
    controls = data.runs("random")
    for objective in TRAINED:
        runs = data.runs(objective)
        if not runs:
            continue
        claims[objective], files = write_study([*runs, *controls], page / objective, settings=settings)
        written += files
        thresholds[objective] = thresholds_words(runs, settings)
        if not figures:
            figures[objective] = chosen_figures(page / objective, runs[0].name)
        analyses += [analyse_evidence(run, bootstrap=settings) for run in runs]
    if controls:
        analyses += [analyse_evidence(run, bootstrap=settings) for run in controls]
    keep(data, page / "data")
    drawn, ranges = slices(data, page, settings)
    text = (
        environment(page)
        .get_template("study_page.md.j2")
        .render(
            **sizes(data.record),
            not_done=missing_words(expected, data.record),
            verdicts=_verdict_rows(claims),
            claims=claims,
            titles=TITLES,
            thresholds=thresholds,
            sampled=sampled,
            training=training_part(data.training),
            figures=figures,
            slices=drawn,
            ranges=ranges,
            frontier=frontier_rows(analyses),
            boundaries=boundary_rows(data),
            stages=two_stages(data, settings),
            revised=[(said, _now(claims.get("grpo", []), name)) for name, said in CLAIMED],
            stages_table=stage_rows(data.record),
        )
    )
    return [write_whole(page / "README.md", text.encode()), *written]


def missing(expected: Sequence[str], record: Mapping[str, Any]) -> list[str]:
    """The stages that are not done."""
    return [name for name in expected if name != "page" and not record.get(name, {}).get("done")]


def missing_words(expected: Sequence[str], record: Mapping[str, Any]) -> str:
    """The stages that are not done, a run of which nothing is done by its name alone; empty where all are."""
    left = missing(expected, record)
    runs = [name.removeprefix("train-") for name in left if name.startswith("train-")]
    words = [f"the runs {', '.join(runs)} and what lies around them"] if runs else []
    words += [name for name in left if not any(name.endswith(f"-{run}") for run in runs)]
    return "; ".join(words)


def environment(page: Path) -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters["link"] = lambda name: f"[{name}]({Path(os.path.relpath(ROOT / name, page.resolve())).as_posix()})"
    return made


def sizes(record: Mapping[str, Any]) -> dict[str, str]:
    """The run in numbers."""
    done = [entry for name, entry in record.items() if entry["done"] and name != "page"]
    hours = sum(entry["seconds"] for entry in record.values()) / 3600
    rollouts = sum(entry.get("rollouts", 0) for entry in done)
    cores = ", ".join(map(str, sorted({entry["cores"] for entry in record.values()})))
    commits = ", ".join(sorted({entry["commit"] for entry in record.values()}))
    text = f"{len(done)} stages, {rollouts:,} rollouts, {hours:.1f} hours on {cores} cores, commit {commits}."
    if beside := sum(entry.get("beside_others", False) for entry in record.values()):
        text += f" {beside} of the stages ran while others ran on the same cores, so their hours overlap."
    return {"sizes": text}


def _verdict_rows(claims: Mapping[str, Sequence[Claim]]) -> list[tuple[str, ...]]:
    names = next(([(claim.name, claim.title) for claim in found] for found in claims.values()), [])
    rows = []
    for place, (name, title) in enumerate(names):
        cells = [claims[objective][place].verdict if objective in claims else "not measured" for objective in TRAINED]
        rows.append((f"{name}. {title}", *cells))
    return rows


def _now(claims: Sequence[Claim], name: str) -> str:
    """What the study says about a claim of the earlier page."""
    reasons = {
        "T1": "A slice decides nothing: the correlation over it follows its range, and two directions are too few.",
        "T2": "The slice's nearest neighbour was 5 to 43 displacements away, so it said nothing about training.",
        "T3": "At k = 2 the contrast is above 0 for nearly any gain, so it said nothing about exploration.",
    }[name]
    verdict = next((claim.verdict for claim in claims if claim.name == name), "")
    return f"{reasons} With {'a boundary' if name == 'T3' else 'censuses'}: {verdict or 'not measured yet'}."


def command(description: str | None) -> argparse.ArgumentParser:
    """The command line of a page."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("output", type=Path, help="output directory of the study")
    made.add_argument("--page", type=Path, required=True, metavar="DIR", help="where the page goes")
    return made


def expecting(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The same for a page that says which stages are missing."""
    made.add_argument("--expected", nargs="*", default=[], metavar="STAGE", help="all stages, to say what is missing")
    return made


def carry_out(make: Callable[[], Path]) -> int:
    """Make a page and name it; returns the exit code, and says a user's mistake in one line."""
    try:
        written = make()
    except (AnalysisError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"page {written}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    given = expecting(command(__doc__)).parse_args(argv)
    return carry_out(lambda: make_page(given.output, given.page, given.expected)[0])


if __name__ == "__main__":
    sys.exit(main())
