"""The journals of a training run: `metrics.jsonl` and `evaluations.jsonl`, read only, as one labelled dataset.

    python -m rlvr_landscape_analysis.trainer_log RUN_DIR [RUN_DIR ...] --out DIR

draws the runs into DIR/training_runs.{pdf,png} and writes a table of their held-out evaluations to
DIR/training_runs.{csv,md}.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.schema import (
    EVALUATIONS_FILE,
    METRIC_UNITS,
    METRICS_FILE,
    REWARD_MODE,
    RUN_FILE,
    TASK_REWARDS,
    reward_mode,
)


def open_training(path: str | Path, level: float = 0.95) -> xr.Dataset:
    """The journals of a training run.

    Dims: `step` (optimizer updates done; every number of `metrics.jsonl` as a float64 variable), `look` (step of a
    held-out evaluation), `task`, `bound` (low, high). Variables of the evaluations: `task_reward` (look, task), mean
    reward per held-out task; `held_out` its mean; `gain` over the first evaluation, paired by task, with
    `gain_interval`, Student's t at `level`; `held_out_entropy`, nat per token; `pass_<k>`. Attributes: `run`,
    `objective`, `reward_mode` of the tasks trained on (see `schema.reward_mode`), `level`, `tasks`.

    Raises `AnalysisError` where a file is missing, damaged, or lacks step 0.
    """
    root = Path(path)
    identity = _json(root / RUN_FILE)
    configuration = identity.get("configuration", {})
    looks = _lines(root / EVALUATIONS_FILE)
    lines = _lines(root / METRICS_FILE)
    if not looks or looks[0].get("step") != 0:
        raise AnalysisError(f"{root / 'evaluations.jsonl'} has no evaluation of step 0, to which gains are compared")
    try:
        rewards = np.array([look[TASK_REWARDS] for look in looks], dtype=np.float64)
        steps = [int(line["step"]) for line in lines]
        at = [int(look["step"]) for look in looks]
    except (KeyError, TypeError, ValueError) as error:
        raise AnalysisError(f"{root} has journals without {error}; they are not those of this project") from error
    gains = rewards - rewards[0]
    tasks = np.isfinite(gains).sum(axis=1)
    error = np.nanstd(gains, axis=1, ddof=1) / np.sqrt(tasks)
    half = stats.t.ppf(0.5 + level / 2, tasks - 1) * error
    gain = np.nanmean(gains, axis=1)
    numbers = sorted({key for line in lines for key, value in line.items() if _is_number(value)} - {"step"})
    found = xr.Dataset(
        {key: ("step", np.array([_number(line.get(key)) for line in lines])) for key in numbers},
        coords={"step": np.array(steps, int), "look": np.array(at, int), "bound": ["low", "high"]},
        attrs={
            "run": str(identity.get("id", "")),
            "objective": str(configuration.get("objective", {}).get("name", "")),
            REWARD_MODE: reward_mode(configuration.get("env", {}).get("taskset", {})),
            "level": level,
            "tasks": int(rewards.shape[1]),
        },
    )
    found["task_reward"] = (("look", "task"), rewards)
    found["held_out"] = ("look", np.nanmean(rewards, axis=1))
    found["gain"] = ("look", gain)
    found["gain_interval"] = (("look", "bound"), np.stack([gain - half, gain + half], axis=1))
    found["held_out_entropy"] = ("look", np.array([_number(look.get("entropy")) for look in looks]))
    for key in looks[0]:
        if key.startswith("pass_"):
            found[key] = ("look", np.array([_number(look.get(key)) for look in looks]))
    for key, unit in METRIC_UNITS.items():
        if key in found:
            found[key].attrs["units"] = unit
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else np.nan


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError as error:
        raise AnalysisError(f"{file} is missing; give the output directory of a training run") from error
    except ValueError as error:
        raise AnalysisError(f"{file} is damaged: {error}") from error


def _lines(file: Path) -> list[dict[str, Any]]:
    """Whole lines by step; the last may have been cut short by a kill."""
    try:
        texts = file.read_text().splitlines()
    except FileNotFoundError as error:
        raise AnalysisError(f"{file} is missing; give the output directory of a training run") from error
    lines = []
    for number, text in enumerate(texts):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            if number < len(texts) - 1:
                raise AnalysisError(f"{file}, line {number + 1} is damaged: {error}") from error
    return lines


HEADER = ("run", "step", "held-out reward", "gain", "gain low", "gain high", "entropy (nat)")


def table(runs: Mapping[str, xr.Dataset]) -> list[tuple[str, ...]]:
    """One row per held-out evaluation of every run, below `HEADER`; numbers as text with four decimals."""
    rows = []
    for label, run in runs.items():
        for i, step in enumerate(run["look"].values):
            bounds = run["gain_interval"].values[i]
            values = (run["held_out"].values[i], run["gain"].values[i], *bounds, run["held_out_entropy"].values[i])
            rows.append((label, str(step), *(f"{value:.4f}" for value in values)))
    return rows


def write(runs: Mapping[str, xr.Dataset], folder: Path) -> list[Path]:
    """Figure and tables of `runs` in `folder`; returns the paths."""
    from rlvr_landscape_analysis.figures import compare_runs, save_figure

    paths = save_figure(compare_runs(runs)["figure"], folder / "training_runs")
    rows = table(runs)
    with (folder / "training_runs.csv").open("w", newline="") as sink:
        csv.writer(sink).writerows([HEADER, *rows])
    lines = [HEADER, tuple("---" for _ in HEADER), *rows]
    (folder / "training_runs.md").write_text("".join(f"| {' | '.join(row)} |\n" for row in lines))
    return [*paths, folder / "training_runs.csv", folder / "training_runs.md"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    made = argparse.ArgumentParser(
        prog="python -m rlvr_landscape_analysis.trainer_log", description="Draw and tabulate training runs."
    )
    made.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="output directory of a training run")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="where figure and tables go")
    arguments = made.parse_args(argv)
    try:
        runs = {path.resolve().name: open_training(path) for path in arguments.runs}
        for path in write(runs, arguments.out):
            print(path)
    except (AnalysisError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
