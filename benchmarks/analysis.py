"""The report of a paper-size run, and the bootstrap against a plain xarray and SciPy loop on the same data.

    python benchmarks/analysis.py [--snapshots 25] [--points 21] [--prompts 1024] [--rollouts 16] [--keep DIR]

Two parts. First, for one snapshot, 2,000 resamples of Pearson and Spearman of all three pairs (KL, reward, surrogate):
the loop draws prompts with `isel`, averages over prompts and rollouts, and calls SciPy; it is timed over a few
resamples, alternating with ours, and scaled to 2,000. A second, kinder loop starts from means per prompt. All give the
same numbers on the same draws; ours does the corrections and their intervals besides. Second, the whole report of the
run from files, in a process of its own, with its peak memory. Writing the synthetic run takes minutes and is not timed.
The last line is one JSON object; `speedup` is against the first loop, `speedup_from_means` against the kinder one.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xarray as xr
from rlvr_landscape_analysis import synthetic
from rlvr_landscape_analysis.landscape import per_prompt
from rlvr_landscape_analysis.statistics.correlation import correlations
from rlvr_landscape_analysis.statistics.resample import Bootstrap
from scipy import stats

LOOP = 4
"""Resamples of a plain loop per round."""
ROUNDS = 3
SHAPES = ("tilt", "mixed", "kl")
PAIRS = (("kl_k1", "reward"), ("kl_k1", "surrogate"), ("surrogate", "reward"))


def plain_loop(data: xr.Dataset, weights: np.ndarray, draws: range) -> np.ndarray:
    """Pearson and Spearman of all pairs over resampled prompts, the way one writes it first: (draws, pairs, 2)."""
    found = []
    over = [dim for dim in ("prompt", "rollout") if dim in data["reward"].dims]
    for draw in draws:
        picks = np.repeat(np.arange(len(weights)), weights[:, draw].astype(int))
        means = data[["kl_k1", "reward", "surrogate"]].isel(prompt=picks).mean(over)
        rows = []
        for first, second in PAIRS:
            x, y = means[first].values.ravel(), means[second].values.ravel()
            rows.append((stats.pearsonr(x, y)[0], stats.spearmanr(x, y)[0]))
        found.append(rows)
    return np.array(found)


def compare(data: xr.Dataset, settings: Bootstrap) -> tuple[float, float, float]:
    """Median seconds of 2,000 resamples: loop, loop from means, ours. Raises when the numbers differ."""
    data = data[["kl_k1", "reward", "surrogate", "base_tokens"]].astype(np.float64)
    reduced = per_prompt(data).load()
    weights = settings.weights(reduced.sizes["prompt"])
    seconds: dict[str, list[float]] = {"loop": [], "means": [], "ours": []}
    for turn in range(ROUNDS):
        draws = range(turn * LOOP, (turn + 1) * LOOP)
        expected = None
        for name, source in (("loop", data), ("means", reduced)):
            start = time.perf_counter()
            expected = plain_loop(source, weights, draws)
            seconds[name].append((time.perf_counter() - start) / LOOP * settings.resamples)
        start = time.perf_counter()
        table = correlations(reduced, bootstrap=settings, controls=("none",), replicates=True)
        seconds["ours"].append(time.perf_counter() - start)
        assert expected is not None
        for p, measure in enumerate(("pearson", "spearman")):
            found = table[f"{measure}_resampled"].sel(control="none").values[:, list(draws)]
            np.testing.assert_allclose(found.T, expected[:, :, p], atol=1e-9)
    loop, means, ours = (statistics.median(values) for values in seconds.values())
    return loop, means, ours


def write(root: Path, snapshots: int, points: int, prompts: int, rollouts: int) -> int:
    """Write the run in the chunks and compression of a real one; returns its size in bytes."""
    steps = [0, *range(1, 11), *range(20, 10 * snapshots, 10)][:snapshots]
    for i, step in enumerate(steps):
        data = synthetic.landscape(
            SHAPES[min(i, 2)], points=points, prompts=prompts, rollouts=rollouts, step=step, seed=1
        )
        encoding = {
            str(name): {"zlib": True, "complevel": 1, "shuffle": True, "chunksizes": (1, 1, prompts, rollouts)}
            for name in data.data_vars
            if data[name].ndim == 4
        }
        data.to_netcdf(root / f"landscape_step{step:06d}_slice0.nc", engine="netcdf4", encoding=encoding)
        print(f"wrote step {step} ({i + 1} of {len(steps)})", flush=True)
    return sum(path.stat().st_size for path in root.glob("*.nc"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--snapshots", type=int, default=25)
    parser.add_argument("--points", type=int, default=21)
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--keep", type=Path, default=None, help="directory for the synthetic run, kept and reused")
    arguments = parser.parse_args()
    size = (arguments.points, arguments.prompts, arguments.rollouts)
    settings = Bootstrap()
    points, prompts, rollouts = size
    loop, means, ours = compare(synthetic.landscape("kl", points=points, prompts=prompts, rollouts=rollouts), settings)
    with tempfile.TemporaryDirectory() as scratch:
        root = arguments.keep or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        if not any(root.glob("*.nc")):
            write(root, arguments.snapshots, *size)
        volume = sum(path.stat().st_size for path in root.glob("*.nc"))
        command = [sys.executable, "-m", "rlvr_landscape_analysis", str(root), "--no-animation"]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    grid = f"{points} × {points} × {prompts} × {rollouts}"
    print(f"\n| {settings.resamples} resamples of one snapshot, {grid} | seconds |\n|---|---|")
    print(f"| plain loop (xarray and SciPy) | {loop:.1f} |\n| the same loop from means per prompt | {means:.1f} |")
    print(f"| ours, corrections and intervals included | {ours:.2f} |")
    print(f"\n| report of {arguments.snapshots} snapshots, {volume / 2**30:.1f} GiB of files | |\n|---|---|")
    print(f"| wall time | {seconds:.0f} s |\n| peak memory | {peak:.2f} GiB |\n")
    print(
        json.dumps(
            {"speedup": loop / ours, "speedup_from_means": means / ours, "report_seconds": seconds, "peak_gib": peak}
        )
    )


if __name__ == "__main__":
    main()
