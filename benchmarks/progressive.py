"""What progressive sweeps cost, and how often their intervals cover: on synthetic landscapes and real datasets.

    python benchmarks/progressive.py [--datasets 300] [--shapes mixed kl] [--replay-only] [--orders 40] [PATH ...]

**Coverage**: a sweep is replayed on synthetic datasets, and the interval at which it stopped is compared with the
landscape's truth on the full grid. A cell is the share of datasets covered and, in brackets, the share of the full
grid's rollouts that were used; `full` is the interval of everything, without any stopping. **Replay**: the same on real
finished datasets (PATH: files or directories; default: those of this repository), against the value that the full grid
gave; with `--orders`, with their prompts in so many random orders as well. A replay is exact, for every rollout has the
same seed in a full sweep. Rollouts count the checkpoint's own batch, which is sampled in full at the start. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import xarray as xr
from rlvr_landscape_analysis import Bootstrap, open_landscape, per_prompt, synthetic
from rlvr_landscape_analysis.statistics.progressive import Design, Look, first_design, grid_levels, look, next_design
from rlvr_landscape_analysis.statistics.resample import cells

from coverage import true_values  # isort: skip

ROOT = Path(__file__).resolve().parent.parent
DATA = tuple(ROOT / "tests/analysis/data" / name for name in ("laptop", "club", "long"))
NEEDED = ["reward", "kl_k1"]
WIDTHS = (0.4, 0.2, 0.1, 0.05)
REPLAYED = {"correlation": (0.2, 0.1, 0.05, 0.03), "beyond_radius": (0.1, 0.05, 0.03)}
SIZES = ((9, 256, 4, 0.3), (7, 128, 2, 0.6))
"""Points per axis, prompts, rollouts, heterogeneity of prompts."""
RESAMPLES = 300


class Replay:
    """Looks at parts of a finished dataset; a look that several widths ask for is taken once."""

    def __init__(self, data: xr.Dataset, statistic: str, settings: Bootstrap) -> None:
        """`data`: reduced by `per_prompt`."""
        self.data, self.statistic, self.settings = data, statistic, settings
        self.axes = data["alpha"].values, data["beta"].values
        self.levels = grid_levels(*self.axes)
        self.prompts = data.sizes["prompt"]
        self._looks: dict[Design, Look] = {}

    def look(self, design: Design) -> Look:
        if design not in self._looks:
            rows, columns = self.levels[design.level]
            part = self.data.isel(alpha=rows, beta=columns, prompt=slice(design.prompts))
            self._looks[design] = look(part, *self.axes, design, statistic=self.statistic, bootstrap=self.settings)
        return self._looks[design]

    @property
    def full(self) -> Look:
        """Everything at once."""
        return self.look(Design(len(self.levels) - 1, self.prompts))

    def sweep(self, asked: float) -> Look:
        """The look at which a sweep that asks for this width stops."""
        design: Design | None = first_design(*self.axes, self.prompts)
        while design is not None:
            found = self.look(design)
            design = next_design(found, asked, *self.axes, self.prompts)
        return found

    def share(self, found: Look) -> float:
        """Rollouts used, of those of the full grid; the checkpoint's own batch counts in both."""
        own = self.prompts
        return (found.points * found.design.prompts + own) / (self.full.points * self.prompts + own)


def covers(found: Look, value: float) -> bool:
    """A missing interval covers nothing."""
    return bool(found.low <= value <= found.high)


def coverage(shape: str, size: tuple, statistic: str, datasets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per width, then for the full grid: share covered, mean share of rollouts, share that reached the width."""
    points, prompts, rollouts, heterogeneity = size
    inside, used, reached = (np.zeros((datasets, len(WIDTHS) + 1)) for _ in range(3))
    for seed in range(datasets):
        sampled = synthetic.landscape(
            shape, points=points, prompts=prompts, rollouts=rollouts, heterogeneity=heterogeneity, seed=seed
        )
        data = per_prompt(sampled[NEEDED])
        truth = true_values(shape, cells(data, {"reward": "reward"}))
        value = truth["none" if statistic == "correlation" else "contribution"]
        replay = Replay(data, statistic, Bootstrap(resamples=RESAMPLES))
        stopped = [replay.sweep(width) for width in WIDTHS]
        for k, found in enumerate([*stopped, replay.full]):
            inside[seed, k], used[seed, k] = covers(found, value), replay.share(found)
            reached[seed, k] = k == len(WIDTHS) or found.width <= WIDTHS[k]
    return inside.mean(0), used.mean(0), reached.mean(0)


def replay_real(paths: list[Path]) -> list[dict]:
    """One row per dataset, statistic and width; prints them."""
    print("\n| dataset | statistic | full grid | asked | stopped at | rollouts | interval | covers |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for path in paths:
        with open_landscape(path) as opened:
            data = per_prompt(opened[NEEDED]).load()
        sizes = f"{data.sizes['alpha']} × {data.sizes['beta']} × {data.sizes['prompt']}, step {int(data['step'])}"
        for statistic, widths in REPLAYED.items():
            replay = Replay(data, statistic, Bootstrap())
            full = replay.full
            for asked in widths:
                found = replay.sweep(asked)
                rows.append(
                    {
                        "dataset": path.name,
                        "statistic": statistic,
                        "asked": asked,
                        "share": replay.share(found),
                        "reached": found.width <= asked,
                        "covers": covers(found, full.estimate),
                    }
                )
                where = f"{found.points} points × {found.design.prompts} prompts"
                print(
                    f"| {sizes} | {statistic} | {full.estimate:+.3f} [{full.low:+.3f}, {full.high:+.3f}] | {asked:g} "
                    f"| {where}{'' if found.width <= asked else ' (not reached)'} | {rows[-1]['share']:.0%} "
                    f"| {found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}] "
                    f"| {'yes' if rows[-1]['covers'] else 'no'} |",
                    flush=True,
                )
    return rows


def replay_shuffled(paths: list[Path], orders: int) -> dict[str, float]:
    """Replays with the prompts in random orders, over all datasets: a table by statistic and width, and the lowest
    share covered."""
    print("\n| statistic | asked | covers the full grid's value | rollouts, mean | rollouts, most |")
    print("|---|---|---|---|---|")
    reduced = []
    for path in paths:
        with open_landscape(path) as opened:
            reduced.append(per_prompt(opened[NEEDED]).load())
    lowest = 1.0
    for statistic, widths in REPLAYED.items():
        rows = []
        for data in reduced:
            for order in range(orders):
                shuffled = np.random.default_rng(order).permutation(data.sizes["prompt"])
                replay = Replay(data.isel(prompt=shuffled), statistic, Bootstrap(resamples=RESAMPLES))
                stopped = [replay.sweep(width) for width in widths]
                rows.append([(covers(found, replay.full.estimate), replay.share(found)) for found in stopped])
        for asked, (inside, used) in zip(widths, np.array(rows).transpose(1, 2, 0), strict=True):
            print(
                f"| {statistic} | {asked:g} | {inside.mean():.1%} | {used.mean():.0%} | {used.max():.0%} |", flush=True
            )
            lowest = min(lowest, float(inside.mean()))
    return {"orders": orders, "lowest_share_covered": lowest}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path, help="datasets to replay, or directories of them")
    parser.add_argument("--datasets", type=int, default=300)
    parser.add_argument("--shapes", nargs="*", default=[name for name in synthetic.SHAPES if name != "flat"])
    parser.add_argument("--replay-only", action="store_true")
    parser.add_argument("--orders", type=int, default=0, help="random orders of the prompts to replay as well")
    arguments = parser.parse_args()
    summary: dict[str, object] = {"datasets": arguments.datasets}
    if not arguments.replay_only:
        head = [f"width {width:g}" for width in WIDTHS]
        print("| shape | grid | prompts × rollouts | statistic | " + " | ".join([*head, "full"]) + " |")
        print("|---|---|---|---|" + "---|" * (len(head) + 1), flush=True)
        table = []
        for shape in arguments.shapes:
            for size in SIZES:
                for statistic in REPLAYED:
                    found = coverage(shape, size, statistic, arguments.datasets)
                    table.append(found[0][:-1])
                    texts = [
                        f"{100 * inside:.1f} % ({100 * used:.0f} %)" if reached > 0.5 else f"{100 * inside:.1f} % (–)"
                        for inside, used, reached in zip(*(row[:-1] for row in found), strict=True)
                    ]
                    label = f"| {shape} | {size[0]} × {size[0]} | {size[1]} × {size[2]} | {statistic}"
                    print(f"{label} | {' | '.join(texts)} | {100 * found[0][-1]:.1f} % |", flush=True)
        summary["coverage_range"] = [float(np.min(table)), float(np.max(table))]
    given = arguments.paths or list(DATA)
    files = [file for path in given for file in (sorted(path.glob("*.nc")) if path.is_dir() else [path])]
    rows = replay_real(files)
    if arguments.orders:
        summary["shuffled"] = replay_shuffled(files, arguments.orders)
    summary |= {
        "replays": len(rows),
        "covered": sum(row["covers"] for row in rows),
        "at_most_half": sum(row["share"] <= 0.5 for row in rows),
        "mean_share_of_rollouts": float(np.mean([row["share"] for row in rows])),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
