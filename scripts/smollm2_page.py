"""The SmolLM2 study's page: tables and figures of the stages that are done.

    python scripts/smollm2_page.py outputs/smollm2 --page results/smollm2

Written into its directory: README.md (from smollm2_page.md.j2), what `rlvr_landscape_analysis.study` writes, the figure
of the training run, and `data` with every dataset and journal that was read, so that the same command makes the page
again from there (`python scripts/smollm2_page.py results/smollm2/data --page results/smollm2`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from rlvr_landscape_analysis.designs import open_design
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.evidence import analyse_evidence, open_evidence
from rlvr_landscape_analysis.report.files import write_whole
from rlvr_landscape_analysis.results import Claim
from rlvr_landscape_analysis.schema import EVALUATIONS_FILE, METRICS_FILE, RUN_FILE
from rlvr_landscape_analysis.statistics.boundary import boundary
from rlvr_landscape_analysis.statistics.census import census
from rlvr_landscape_analysis.statistics.resample import Bootstrap
from rlvr_landscape_analysis.statistics.wording import correlation, number, sampled, says_something
from rlvr_landscape_analysis.study import write_study
from rlvr_landscape_analysis.trainer_log import open_training, write

sys.path.insert(0, str(Path(__file__).parent))
from study_page import (
    Data,
    boundary_rows,
    carry_out,
    chosen_figures,
    command,
    copy_files,
    draw_grid,
    environment,
    expecting,
    frontier_rows,
    missing,
    sizes,
    stage_rows,
)

RUN = "grpo"
DESIGNS = ("census_start", "census", "path", "boundary")
"""Directories of the run that hold censuses, paths and boundaries."""
GRID, CHECK, WARM = "grid", "kl_check.json", "warm_start.json"
TINY = "tiny"
"""Directory of the small policy."""
POINT_SECONDS = ("seconds_move", "seconds_score", "seconds_sample")


def read(out: Path) -> Data:
    """Everything that is there. Raises `AnalysisError` where the output is none of a study."""
    record = _json(out / "record.json", "give the output directory of a study")
    try:
        data = Data(out, record["stages"], {}, {}, {})
    except (KeyError, TypeError) as error:
        raise AnalysisError(f"{out / 'record.json'} is damaged: {error!r}") from error
    folder = out / RUN
    if (folder / "run" / EVALUATIONS_FILE).is_file():
        data.training[RUN] = open_training(folder / "run")
    found = [folder / name for name in DESIGNS if any((folder / name).glob("*_step*.nc"))]
    if found:
        data.evidence[RUN] = open_evidence(*found, name=RUN)
    return data


def _json(file: Path, hint: str) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError as error:
        raise AnalysisError(f"{file} is missing; {hint}") from error
    except ValueError as error:
        raise AnalysisError(f"{file} is damaged: {error}") from error


def keep(out: Path, target: Path) -> None:
    """Copy what the page is made of to `target`, in the same places."""
    if target.resolve() == out.resolve():
        return
    files = [out / "record.json", out / "warm" / WARM, out / RUN / CHECK]
    files += [out / RUN / "run" / name for name in (RUN_FILE, METRICS_FILE, EVALUATIONS_FILE)]
    files.append(out / TINY / "warm" / WARM)
    for name in (*DESIGNS, GRID):
        files += [file for run in (RUN, TINY) for file in sorted((out / run / name).glob("*_step*.nc"))]
    copy_files(files, out, target)


def training_words(run: xr.Dataset, configuration: dict[str, Any]) -> dict[str, Any]:
    """The evaluations as rows, and in words what was trained."""
    rows = []
    for at, step in enumerate(run["look"].values.tolist()):
        bounds = tuple(float(value) for value in run["gain_interval"].values[at])
        gain = number(float(run["gain"][at]), bounds, digits=3) if step else "0"
        rows.append(
            (str(int(step)), f"{float(run['held_out'][at]):.3f}", gain, f"{float(run['held_out_entropy'][at]):.3f}")
        )
    env, held_out = configuration["env"], configuration["evaluation"]
    lora = configuration.get("lora")
    trained = "all weights" if lora is None else f"a LoRA adapter of rank {lora['rank']}"
    what = (
        f"{trained}, {env['tasks_per_batch']} tasks × {env['rollouts']} rollouts a step, "
        f"{configuration['optimizer']['name']} with rate {configuration['optimizer']['lr']:g}; held out: "
        f"{held_out['num_tasks']} tasks × {held_out['rollouts']} rollouts"
    )
    low = float(run["gain_interval"].values[-1][0])
    return {"rows": rows, "what": what, "beyond": bool(low > 0), "options": json.dumps(env["taskset"])}


def step_seconds(metrics: Path) -> list[tuple[str, str]]:
    """Where the time of a training step goes: mean seconds of its parts."""
    lines = [json.loads(text) for text in metrics.read_text().splitlines()]
    names = {
        "seconds": "a step",
        "seconds_push": "new weights to the server",
        "seconds_rollouts": "episodes",
        "seconds_forward": "forward pass of the update",
    }
    means = {
        words: sum(line[name] for line in lines) / len(lines)
        for name, words in names.items()
        if lines and all(name in line for line in lines)
    }
    if len(means) == len(names):
        whole, *parts = means.values()
        means["the rest: backward passes, optimizer, files"] = whole - sum(parts)
    return [(words, f"{seconds:.1f}") for words, seconds in means.items()]


def point_seconds(out: Path) -> list[tuple[str, ...]]:
    """Where the time of a measured policy goes, by dataset: medians over its policies, and minutes of all together."""
    rows = []
    for folder in (*DESIGNS, GRID):
        for file in sorted((out / RUN / folder).glob("*_step*.nc")):
            with xr.open_dataset(file) as data:
                if not set(POINT_SECONDS) <= set(data.data_vars):
                    continue
                parts = [data[name].values.ravel() for name in POINT_SECONDS]
                what = f"{folder.partition('_')[0]} of step {int(data['step'])}"
                sizes = f"{data.sizes['prompt']} × {data.sizes['rollout']}"
            medians = (f"{float(np.median(part)):.1f}" for part in parts)
            rows.append((what, str(len(parts[0])), sizes, *medians, f"{float(sum(map(np.sum, parts))) / 60:.1f}"))
    return rows


def small_policy(out: Path, page: Path) -> dict[str, Any] | None:
    """What was measured around the policy of tiny-sorter's size; None before slice, census and boundary are done."""
    folder = out / TINY
    grids = sorted((folder / GRID).glob("landscape_step*.nc"))
    files = {name: sorted((folder / name).glob("*_step*.nc")) for name in ("census_start", "boundary")}
    if not (grids and all(files.values())):
        return None
    around, solved = census(open_design(files["census_start"][0])), boundary(open_design(files["boundary"][0]))
    rows = []
    for at in range(around.sizes["radius"]):
        here = around.isel(radius=at)
        cells = [f"{float(here['relative']):.3g}", f"{float(here['kl']):.2g}"]
        cells.append(number(float(here["change"]), tuple(map(float, here["change_interval"].values)), digits=3))
        one = here.sel(pair="kl_reward")
        low, high = map(float, one["correlation_interval"].values)
        cells.append(correlation(float(one["correlation"]), (low, high)))
        shares = (float(here["density"]), *map(float, here["density_interval"].values))
        known = bool(says_something(here, "density", 1.0))
        cells.append("{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * share for share in shares)) if known else "unknown")
        rows.append(tuple(cells))
    pass_at = [
        # The interval of a mean knows no upper end of a share.
        (int(k), f"{float(value):.3f} [{max(float(low), 0.0):.3f}, {min(float(high), 1.0):.3f}]")
        for k, value, (low, high) in zip(
            solved["k"].values, solved["pass_at_k"].values, solved["pass_at_k_interval"].values, strict=True
        )
    ]
    with xr.open_dataset(grids[0]) as found:
        reach = float(abs(found["alpha"]).max())
    return {
        "warm": _json(folder / "warm" / WARM, ""),
        "prompts": solved.attrs["prompts"],
        "directions": around.attrs["directions"],
        "pass_at": pass_at,
        "reach": reach,
        "rows": rows,
        "grids": draw_grid(grids, page / TINY),
    }


def make_page(out: Path, page: Path, expected: Sequence[str] = ()) -> Path:
    """Write everything; returns the page. `expected`: names of all stages, to say which are missing."""
    data, settings = read(out), Bootstrap()
    page.mkdir(parents=True, exist_ok=True)
    training: dict[str, Any] | None = None
    seconds: list[tuple[str, str]] = []
    if data.training:
        write(data.training, page)
        root = out / RUN / "run"
        configuration = _json(root / RUN_FILE, "it belongs to the training run")["configuration"]
        training = training_words(data.training[RUN], configuration)
        seconds = step_seconds(root / METRICS_FILE)
    claims: list[Claim] = []
    figures: list[tuple[str, str]] = []
    frontier: list[tuple[str, ...]] = []
    if data.evidence:
        run = data.evidence[RUN]
        claims, _ = write_study([run], page / RUN, settings=settings)
        figures = [(f"{RUN}/figures/{file}", words) for file, words in chosen_figures(page / RUN, run.name)]
        frontier = frontier_rows([analyse_evidence(run, bootstrap=settings)])
    grids = draw_grid(sorted((out / RUN / GRID).glob("landscape_step*.nc")), page / GRID)
    keep(out, page / "data")
    text = (
        environment(page)
        .get_template("smollm2_page.md.j2")
        .render(
            **sizes(data.record),
            not_done=", ".join(missing(expected, data.record)),
            warm=_json(out / "warm" / WARM, "") if (out / "warm" / WARM).is_file() else None,
            training=training,
            seconds=seconds,
            claims=claims,
            sampled=sampled,
            figures=figures,
            grids=grids,
            frontier=frontier,
            # Which tasks they are is the same in every row.
            boundaries=[(row[0], *row[2:]) for row in boundary_rows(data)],
            check=_json(out / RUN / CHECK, "") if (out / RUN / CHECK).is_file() else None,
            tiny=small_policy(out, page),
            point_seconds=point_seconds(out),
            stages_table=stage_rows(data.record),
        )
    )
    return write_whole(page / "README.md", text.encode())


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    given = expecting(command(__doc__)).parse_args(argv)
    return carry_out(lambda: make_page(given.output, given.page, given.expected))


if __name__ == "__main__":
    sys.exit(main())
