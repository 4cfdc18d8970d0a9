"""How often 95 % intervals cover the truth, on synthetic landscapes whose truth is known.

    python benchmarks/coverage.py [--datasets 500] [--processes 2] [--design grid|census|path|boundary|cover|claims]

One row per landscape: shape, prompts × rollouts, heterogeneity of prompts; columns are the share of datasets whose
interval covers the truth: correlation without a control, its linear partial, within shells, the contribution beyond
the radius, and the split-half gain of the best neighbour (truth: the true gain of the points that the halves chose).
`FDR` is the share of datasets with any point called better than the origin, for the flat landscape where none is. The
last line is one JSON object. The other designs have tables of their own (`coverage_designs.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from rlvr_landscape_analysis import synthetic
from rlvr_landscape_analysis.landscape import per_prompt
from rlvr_landscape_analysis.statistics.correlation import correlations, project
from rlvr_landscape_analysis.statistics.improvement import better_than_origin, split_half_gain
from rlvr_landscape_analysis.statistics.resample import Bootstrap, Cells, cells

CONTROLS = ("none", "linear", "shell")
COLUMNS = ("correlation", "partial (linear)", "within shells", "beyond radius", "best-point gain", "FDR")
RESAMPLES = 500
SCENARIOS = [
    (shape, points, prompts, rollouts, heterogeneity)
    for shape in ("radial", "kl", "mixed", "tilt", "flat")
    for points, prompts, rollouts, heterogeneity in (
        (9, 32, 4, 0.3),
        (9, 128, 4, 0.6),
        (7, 256, 4, 0.3),
        (7, 512, 1, 0.5),
    )
]


def true_cells(shape: str, like: Cells) -> Cells:
    """The truth in the form of measured cells with one prompt."""
    alphas, betas = np.unique(like.alpha), np.unique(like.beta)
    expected = synthetic.truth(shape, alphas, betas)
    values = {name: expected[name].values.reshape(-1, 1) for name in ("kl", "reward")}
    return Cells(like.alpha, like.beta, like.shell, values, np.arange(1), len(like.alpha), 1)


def true_values(shape: str, like: Cells) -> dict[str, float]:
    """True correlations by control and the true contribution beyond the radius; NaN where they do not exist."""
    truth = true_cells(shape, like)
    found = {}
    whole = [project(truth, "none").values[name][:, 0] for name in ("kl", "reward")]
    if whole[1] @ whole[1] < 1e-20:
        return dict.fromkeys((*CONTROLS, "contribution"), np.nan)
    for control in CONTROLS:
        x, y = (project(truth, control).values[name][:, 0] for name in ("kl", "reward"))
        exists = min((x @ x) / (whole[0] @ whole[0]), (y @ y) / (whole[1] @ whole[1])) > 1e-12
        found[control] = x @ y / np.sqrt((x @ x) * (y @ y)) if exists else np.nan
        if control == "shell":
            found["contribution"] = x @ y / np.sqrt((whole[0] @ whole[0]) * (whole[1] @ whole[1]))
    return found


def one(scenario: tuple, seed: int) -> list[float]:
    """1 where the interval covers, 0 where not, NaN where there is no truth to cover; in the order of COLUMNS."""
    shape, points, prompts, rollouts, heterogeneity = scenario
    data = per_prompt(
        synthetic.landscape(
            shape, points=points, prompts=prompts, rollouts=rollouts, heterogeneity=heterogeneity, seed=seed
        )
    )
    settings = Bootstrap(resamples=RESAMPLES, seed=seed)
    table = correlations(data, bootstrap=settings, controls=CONTROLS).sel(pair="kl_reward")
    matrices = cells(data, {"reward": "reward"})
    truth = true_values(shape, matrices)
    inside = []
    for control in CONTROLS:
        low, high = table["corrected_interval"].sel(control=control).values
        inside.append(covers(low, truth[control], high))
    low, high = table["contribution_interval"].sel(control="shell").values
    inside.append(covers(low, truth["contribution"], high))
    origin = matrices.origin
    others = np.arange(len(matrices.alpha)) != origin
    differences = (matrices.values["reward"] - matrices.values["reward"][origin])[others]
    _, (low, high), _, chosen = split_half_gain(differences, settings)
    reward = true_cells(shape, matrices).values["reward"][:, 0]
    inside.append(covers(low, float(chosen @ (reward - reward[origin])[others]), high))
    inside.append(float(better_than_origin(data)["better"].any()) if shape == "flat" else np.nan)
    return inside


def covers(low: float, truth: float, high: float) -> float:
    """1 or 0; a missing interval does not cover."""
    return float(low <= truth <= high) if np.isfinite(truth) else np.nan


def _one(job: tuple) -> list[float]:
    return one(*job)


@contextlib.contextmanager
def workers(count: int | None) -> Iterator[ProcessPoolExecutor]:
    """Processes whose matrix products use one thread each: two with two threads each take several times as long."""
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(dict.fromkeys(variables, "1"))
    try:
        with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def coverage(scenario: tuple, datasets: int, pool: ProcessPoolExecutor | None = None) -> np.ndarray:
    """Share of covering intervals per column."""
    jobs = [(scenario, seed) for seed in range(datasets)]
    rows = np.array(list(pool.map(_one, jobs, chunksize=25) if pool else map(_one, jobs)))
    return np.array([column.mean() if np.isfinite(column).all() else np.nan for column in rows.T])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--datasets", type=int, default=500)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--design", choices=("grid", "census", "path", "boundary", "cover", "claims"), default="grid")
    parser.add_argument("--shapes", nargs="*", default=None)
    arguments = parser.parse_args()
    if arguments.design != "grid":
        from coverage_designs import table as table_of_design

        with workers(arguments.processes) as pool:
            table_of_design(arguments.design, arguments.datasets, pool)
        return
    print("| shape | grid | prompts × rollouts | heterogeneity | " + " | ".join(COLUMNS) + " |")
    print("|---|---|---|---|" + "---|" * len(COLUMNS), flush=True)
    rows = []
    with workers(arguments.processes) as pool:
        for scenario in SCENARIOS:
            if arguments.shapes and scenario[0] not in arguments.shapes:
                continue
            shape, points, prompts, rollouts, heterogeneity = scenario
            found = coverage(scenario, arguments.datasets, pool)
            rows.append(found)
            cells_ = " | ".join("–" if np.isnan(value) else f"{100 * value:.1f} %" for value in found)
            head = f"| {shape} | {points} × {points} | {prompts} × {rollouts} | {heterogeneity:g} |"
            print(f"{head} {cells_} |", flush=True)
    table = np.array(rows)
    summary = {
        column: [float(np.nanmin(values)), float(np.nanmax(values))]
        for column, values in zip(COLUMNS, table.T, strict=True)
        if np.isfinite(values).any()
    }
    print(json.dumps({"datasets": arguments.datasets, "range": summary}))


if __name__ == "__main__":
    main()
