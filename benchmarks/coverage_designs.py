"""How often the intervals of a census, a path and a boundary cover the truth, on synthetic ones whose truth is known.

Called as `python benchmarks/coverage.py --design census|path|boundary|cover|claims`. Every dataset has its own
directions *and* its own prompts, so an interval that forgets either fails here. Settings are the shipped ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache

import numpy as np
from rlvr_landscape_analysis import synthetic_designs
from rlvr_landscape_analysis.designs import census_points
from rlvr_landscape_analysis.evidence import RunEvidence
from rlvr_landscape_analysis.results import NOT_SUPPORTED, SUPPORTED
from rlvr_landscape_analysis.statistics.boundary import boundary, boundary_change, wilson
from rlvr_landscape_analysis.statistics.census import census, expected_largest, pair_moments, pooled_correlation
from rlvr_landscape_analysis.statistics.claims import claim_t1, claim_t2
from rlvr_landscape_analysis.statistics.path import path
from rlvr_landscape_analysis.statistics.resample import Bootstrap
from rlvr_landscape_analysis.synthetic_designs import CensusTruth, PathTruth
from scipy import stats

STUDY = {"pairs": 32, "radii": (1.25, 2.5, 5.0, 10.0), "prompts": 64, "rollouts": 2}
QUICKSTART = {"pairs": 8, "radii": (2.5, 5.0, 10.0), "prompts": 32, "rollouts": 2}
SETTINGS = {"32 pairs, 64 × 2": STUDY, "8 pairs, 32 × 2": QUICKSTART}
CENSUS_TRUTHS = {
    "no correlation": CensusTruth(correlation=0.0),
    "weak correlation": CensusTruth(correlation=-0.3, spread=0.06),
    "strong correlation, KL of 6 dimensions": CensusTruth(correlation=-0.7, drift=-0.03, spread=0.06, dimensions=6),
    "one direction for all radii": CensusTruth(correlation=-0.4, spread=0.06, common=True),
}
CENSUS_COLUMNS = ("correlation", "KL", "ΔR", "density", "best", "curvature", "variation of KL")
PATH_TRUTHS = {
    "path as random": (CensusTruth(kl=8.0), PathTruth(kl=1.0, slope=-0.01, bend=0.0)),
    "path better, 13 × the KL per length²": (CensusTruth(kl=8.0), PathTruth(kl=1.0)),
    "path worse, wide spread": (CensusTruth(kl=8.0, spread=0.08), PathTruth(kl=0.5, slope=-0.1, bend=0.0)),
}
POSITIONS = (-1.0, 0.5, 1.0)
PATH_COLUMNS = ("KL", "ΔR", "advantage", "Fisher ratio")
BOUNDARY_SETTINGS = {"64 × 256": (64, 256), "32 × 64": (32, 64)}
BOUNDARY_COLUMNS = ("pass@1", "pass@16", "pass@n", "Δpass@1", "Δpass@16", "D at 16", "D at n")
COVER_COLUMNS = ("Cover@0.1", "Cover@0.5", "least at any share", "most at any share")


def covers(interval: Sequence[float] | np.ndarray, truth: float) -> float:
    """1 or 0; a missing interval is not counted."""
    return np.nan if not np.isfinite(truth) or np.isnan(interval).any() else float(interval[0] <= truth <= interval[1])


def one_census(setting: str, truth_name: str, seed: int) -> list[list[float]]:
    """Rows are radii, then all radii pooled; columns CENSUS_COLUMNS, then the reliability of the reward."""
    options, truth = SETTINGS[setting], CENSUS_TRUTHS[truth_name]
    points = census_points([synthetic_designs.census(truth, seed=seed, **options)])[0]
    found = census(points)
    u = np.array(options["radii"]) / max(options["radii"])
    known = {
        "correlation": np.full(len(u), truth.correlation),
        "kl": truth.kl * u**2,
        "change": truth.drift * u,
        # Exact where ΔR is normal over directions, so where it has nothing of the skewed KL.
        "density": np.full(len(u), stats.norm.cdf(truth.drift / truth.spread) if not truth.correlation else np.nan),
        "best": u * (truth.drift + truth.spread * expected_largest(2 * options["pairs"]))
        if not truth.correlation
        else np.full(len(u), np.nan),
        "curvature": np.full(len(u), 2 * truth.kl / (0.01 * max(options["radii"])) ** 2),
        "curvature_variation": np.full(len(u), np.sqrt(2 / truth.dimensions)),
    }
    rows = []
    for r in range(len(u)):
        row = []
        for name, true in known.items():
            interval = found[f"{name}_interval"].isel(radius=r)
            row.append(covers((interval.sel(pair="kl_reward") if name == "correlation" else interval).values, true[r]))
        rows.append([*row, float(found["reliability"].sel(pair="kl_reward", member="second")[r])])
    pooled = pooled_correlation([pair_moments(points, "kl_reward")], [np.ones(len(u))])
    rows.append([covers(pooled.interval, truth.correlation), *[np.nan] * len(CENSUS_COLUMNS)])
    return rows


@lru_cache
def true_random_change(truth: CensusTruth, kl: float) -> float:
    """Mean over directions of ΔR where their KL is `kl`."""
    g = np.random.default_rng(0).gamma(truth.dimensions / 2, 2 / truth.dimensions, 2_000_000)
    known = (g - 1) / np.sqrt(2 / truth.dimensions)
    return float(np.mean(np.sqrt(kl / (truth.kl * g)) * (truth.drift + truth.spread * truth.correlation * known)))


def one_path(setting: str, truth_name: str, seed: int) -> list[list[float]]:
    """Rows are positions."""
    options, (ground, along) = SETTINGS[setting], PATH_TRUTHS[truth_name]
    points = census_points([synthetic_designs.census(ground, seed=seed, **options)])[0]
    data = synthetic_designs.path(
        {"p": along}, seed=seed, positions=POSITIONS, prompts=options["prompts"], rollouts=options["rollouts"]
    )
    found = path(data, points).sel(path="p")
    rows = []
    for x in POSITIONS:
        kl, change = along.kl * x**2, along.slope * x - along.bend * x**2
        ratio = (2 * along.kl / along.length**2) / (2 * ground.kl / 0.1**2)
        known = (kl, change, change - true_random_change(ground, kl), ratio)
        names = ("kl", "change", "advantage", "fisher_ratio")
        rows.append(
            [
                covers(found[f"{name}_interval"].sel(position=x).values, true)
                for name, true in zip(names, known, strict=True)
            ]
        )
    return rows


@lru_cache
def _true_boundary(prompts_rollouts: int, discovery: float) -> list[float]:
    n = prompts_rollouts
    rates = synthetic_designs.rates_over_training((0, 40), prompts=1_000_000, discovery=discovery, seed=999)
    passed = {step: {k: float(np.mean(1 - (1 - p) ** k)) for k in (1, 16, n)} for step, p in rates.items()}
    delta = {k: passed[40][k] - passed[0][k] for k in (1, 16, n)}
    contrasts = [delta[16] - delta[1] / 2, delta[n] - delta[1] / 2]
    return [*(passed[0][k] for k in (1, 16, n)), delta[1], delta[16], *contrasts]


def one_boundary(setting: str, truth_name: str, seed: int) -> list[list[float]]:
    """One row."""
    prompts, rollouts = BOUNDARY_SETTINGS[setting]
    discovery = {"sharpening": 0.0, "discovery": 0.5}[truth_name]
    rates = synthetic_designs.rates_over_training((0, 40), prompts=prompts, discovery=discovery, seed=seed)
    first, last = (synthetic_designs.boundary(rates[step], rollouts=rollouts, seed=seed, step=step) for step in (0, 40))
    own = boundary(first)
    change = boundary_change(first, last, bootstrap=Bootstrap(resamples=100))
    ks = (1, 16, rollouts)
    intervals = [own["pass_at_k_interval"].sel(k=k).values for k in ks]
    intervals += [change["difference_interval"].sel(k=k).values for k in (1, 16)]
    intervals += [change["contrast_interval"].sel(k=k).values for k in (16, rollouts)]
    return [[covers(i, t) for i, t in zip(intervals, _true_boundary(rollouts, discovery), strict=True)]]


@lru_cache
def _true_cover(rollouts: int) -> list[float]:
    rates = synthetic_designs.rates_over_training((0,), prompts=1_000_000, seed=999)[0]
    return [float(stats.binom.sf(np.ceil(tau * rollouts - 1e-9) - 1, rollouts, rates).mean()) for tau in (0.1, 0.5)]


@lru_cache
def _exact_cover(prompts: int) -> tuple[float, float]:
    """Least and most coverage at true shares from 0.02 to 0.98: sums over all outcomes, without simulation."""
    counts = np.arange(prompts + 1)
    low, high = np.array([wilson(int(count), prompts, 0.95) for count in counts]).T
    shares = np.linspace(0.02, 0.98, 961)[:, None]
    covered = (stats.binom.pmf(counts, prompts, shares) * ((low <= shares) & (shares <= high))).sum(1)
    return float(covered.min()), float(covered.max())


def one_cover(setting: str, truth_name: str, seed: int) -> list[list[float]]:
    """One row, of a boundary of step 0."""
    prompts, rollouts = BOUNDARY_SETTINGS[setting]
    rates = synthetic_designs.rates_over_training((0,), prompts=prompts, seed=seed)[0]
    own = boundary(synthetic_designs.boundary(rates, rollouts=rollouts, seed=seed), taus=(0.1, 0.5))
    found = [covers(i, t) for i, t in zip(own["cover_interval"].values, _true_cover(rollouts), strict=True)]
    return [[*found, *_exact_cover(prompts)]]


CLAIM_TRUTHS = {
    # (correlation at step 0, later; spread of ΔR over directions). 0.08 is 6 × the variance that prompts leave.
    "no correlation, directions as seven real slices": (0.0, 0.0, 0.08),
    "no correlation, hardly any spread": (0.0, 0.0, 0.01),
    "untrained policy with a correlation": (-0.5, -0.5, 0.08),
    "training makes a correlation of −0.6": (0.0, -0.6, 0.08),
}
CLAIM_COLUMNS = ("T1 supported", "T1 not supported", "T2 supported", "T2 not supported")
RELATIVE = 0.01
"""Displacement of the synthetic run by ‖θ‖: the radii of step 0 are those of the later steps."""


def one_claim(setting: str, truth_name: str, seed: int) -> list[list[float]]:
    """One row: whether T1 and T2 were supported or not, of a run with steps 0, 10 and 40, radii 0.4 to 3."""
    start, later, spread = CLAIM_TRUTHS[truth_name]
    options = {name: value for name, value in SETTINGS[setting].items() if name != "radii"}
    radii = (0.4, 0.8, 1.6, 3.0) if len(SETTINGS[setting]["radii"]) == 4 else (0.75, 1.5, 3.0)
    run = RunEvidence("run")
    for step, correlation in ((0, start), (10, later), (40, later)):
        truth = CensusTruth(correlation=correlation, spread=spread)
        unit, own = ("theta", tuple(RELATIVE * r for r in radii)) if step == 0 else ("displacement", radii)
        run.censuses[step] = synthetic_designs.census(truth, radii=own, unit=unit, step=step, seed=seed, **options)
    row = []
    for claim in (claim_t1([run], [], Bootstrap()), claim_t2([run], Bootstrap())):
        row += [float(claim.verdict == SUPPORTED), float(claim.verdict == NOT_SUPPORTED)]
    return [row]


DESIGNS: dict[str, tuple[Callable, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "census": (one_census, tuple(SETTINGS), tuple(CENSUS_TRUTHS), (*CENSUS_COLUMNS, "reliability of ΔR")),
    "path": (one_path, tuple(SETTINGS), tuple(PATH_TRUTHS), PATH_COLUMNS),
    "boundary": (one_boundary, tuple(BOUNDARY_SETTINGS), ("sharpening", "discovery"), BOUNDARY_COLUMNS),
    "cover": (one_cover, tuple(BOUNDARY_SETTINGS), ("rates of step 0",), COVER_COLUMNS),
    "claims": (one_claim, tuple(SETTINGS), tuple(CLAIM_TRUTHS), CLAIM_COLUMNS),
}


def _one(job: tuple) -> list[list[float]]:
    design, setting, truth, seed = job
    return DESIGNS[design][0](setting, truth, seed)


def row_names(design: str, setting: str) -> list[str]:
    """What the rows of one setting are."""
    if design == "census":
        radii = SETTINGS[setting]["radii"]
        return [*(f"{radius / max(radii):g}" for radius in radii), "pooled"]
    return [f"{x:g}" for x in POSITIONS] if design == "path" else [""]


def table(design: str, datasets: int, pool: ProcessPoolExecutor | None = None) -> dict:
    """Print the table of one design; returns its numbers for the JSON line."""
    _, settings, truths, columns = DESIGNS[design]
    place = {"census": "radius", "path": "position", "boundary": "", "cover": "", "claims": ""}[design]
    print(f"| truth | settings | {place} | " + " | ".join(columns) + " |")
    print("|" + "---|" * (3 + len(columns)), flush=True)
    lows: dict[str, list[float]] = {column: [] for column in columns}
    for setting in settings:
        for truth in truths:
            jobs = [(design, setting, truth, seed) for seed in range(datasets)]
            rows = np.array(list(pool.map(_one, jobs, chunksize=20) if pool else map(_one, jobs)))
            with np.errstate(invalid="ignore"):
                counted = np.isfinite(rows).mean(0) >= 0.9
                share = np.where(counted, np.nanmean(np.where(counted, rows, 0.0), 0), np.nan)
            for name, row in zip(row_names(design, setting), share, strict=True):
                cells = []
                for column, value in zip(columns, row, strict=True):
                    if np.isnan(value):
                        cells.append("–")
                        continue
                    lows[column].append(float(value))
                    cells.append(f"{value:.2f}" if column.startswith("reliability") else f"{100 * value:.1f} %")
                print(f"| {truth} | {setting} | {name} | " + " | ".join(cells) + " |", flush=True)
    found = {column: [min(values), max(values)] for column, values in lows.items() if values}
    print(json.dumps({"design": design, "datasets": datasets, "range": found}), flush=True)
    return found
