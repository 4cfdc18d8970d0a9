"""Analyse a whole run: every dataset is read once, reduced and closed, so memory does not grow with the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import xarray as xr

from rlvr_landscape_analysis.datasets import (
    RunFile,
    base_batch_of,
    check_same_design,
    check_values,
    list_grids,
    list_run,
    open_landscape,
    reading,
)
from rlvr_landscape_analysis.errors import AnalysisError
from rlvr_landscape_analysis.evidence import RunEvidence, analyse_evidence, open_evidence
from rlvr_landscape_analysis.grids import Grid, common_grids, grid_size
from rlvr_landscape_analysis.landscape import (
    pass_at_k,
    per_prompt,
    point_mean,
    radial_profile,
    radius,
    surrogate,
)
from rlvr_landscape_analysis.results import RunAnalysis
from rlvr_landscape_analysis.schema import (
    BASE_ROLLOUT,
    DIRECTION_ATTRIBUTE,
    GRID,
    PROGRESSIVE,
    PROMPT,
    PROMPTS_SHA256,
    REWARD_MODE,
    VERIFIER,
    grid_name,
    paid_by,
)
from rlvr_landscape_analysis.statistics.claims import all_claims
from rlvr_landscape_analysis.statistics.correlation import correlations
from rlvr_landscape_analysis.statistics.curvature import quadratic_fit
from rlvr_landscape_analysis.statistics.diagnostics import (
    crossing,
    entropy_law,
    pass_at_k_curves,
    token_surprisal,
    two_stage,
)
from rlvr_landscape_analysis.statistics.improvement import better_than_origin, improvement
from rlvr_landscape_analysis.statistics.progressive import interpolated
from rlvr_landscape_analysis.statistics.ranges import plain_by_range
from rlvr_landscape_analysis.statistics.resample import Bootstrap
from rlvr_landscape_analysis.statistics.training import (
    checkpoint_cells,
    checkpoint_curves,
    exploitation_index,
    over_training,
    slice_agreement,
)


def analyse_run(
    path: str | Path,
    *,
    bootstrap: Bootstrap | None = None,
    steps: Iterable[int] | None = None,
    threshold: float | None = None,
    level: float = 0.05,
    progress: Callable[[str], None] | None = None,
) -> RunAnalysis:
    """All statistics of the finished datasets in a run directory.

    `steps` restricts the snapshots; `threshold` is the reward that passes (default: as the sweep fixed it); `level`
    the false discovery rate of "better than the origin"; `progress` gets the name of each dataset before it is read.
    Raises `AnalysisError` when there is nothing to analyse or the datasets do not belong together (other prompts, other
    variables). Grids may differ between snapshots, and numbers of prompts between those of a progressive sweep; notes
    say so and what was done.
    """
    settings = bootstrap or Bootstrap()
    files, unfinished = list_grids(path)
    if not files:
        return _without_grid(Path(path), settings, steps, threshold, level, unfinished)
    if steps is not None:
        wanted = set(steps)
        absent = sorted(wanted - {file.step for file in files})
        if absent:
            known = ", ".join(str(step) for step in sorted({file.step for file in files}))
            raise AnalysisError(f"{path} holds no finished dataset of step {absent[0]}; finished: {known}")
        files = [file for file in files if file.step in wanted]
    notes = [f"Unfinished and left out: {line}." for line in unfinished]
    designs = [_design(file) for file in files]
    check_same_design(designs, [str(file.path) for file in files])
    prompts = [design.sizes[PROMPT] for design in designs]
    if len(set(prompts)) > 1:
        settings = replace(settings, largest=max(prompts))
        notes.append(
            f"Progressive sweeps stopped at {min(prompts)} to {max(prompts)} prompts, always the first ones. Snapshots "
            f"are compared prompt by prompt (exploitation index, crossing, two stages) on the first {min(prompts)}."
        )
    beside = open_evidence(path, steps=None if steps is None else set(steps))
    parts: list[_Part] = []
    for file, grid in zip(files, common_grids(files, designs, notes), strict=True):
        if progress:
            progress(f"step {file.step}, slice {file.slice_seed}")
        parts.append(_analyse(file, grid, settings, threshold, level, notes))
    return _combine(Path(path), parts, beside, settings, threshold, level, notes)


def _without_grid(
    path: Path,
    settings: Bootstrap,
    steps: Iterable[int] | None,
    threshold: float | None,
    fdr: float,
    unfinished: Sequence[str],
) -> RunAnalysis:
    """What censuses, paths and boundaries say where no grid is finished; raises `AnalysisError` where nothing is."""
    wanted = None if steps is None else set(steps)
    beside = open_evidence(path, steps=wanted)
    if not beside and not unfinished:
        if wanted is None:
            list_run(path)  # says what is missing
        raise AnalysisError(f"{path} holds nothing finished of step {', '.join(map(str, sorted(wanted or ())))}")
    notes = [f"Unfinished and left out: {line}." for line in unfinished]
    evidence = analyse_evidence(beside, bootstrap=settings, threshold=threshold, fdr=fdr)
    empty = xr.Dataset()
    return RunAnalysis(
        path=path,
        bootstrap=settings,
        k=1,
        maps={},
        correlations=empty,
        improvement=empty,
        curvature=empty,
        profiles={},
        training=empty,
        over_training=empty,
        diagnostics={},
        slices=None,
        claims=all_claims([beside], settings=settings, threshold=threshold, analyses=[evidence]),
        evidence=evidence,
        sources=beside.sources,
        notes=[*notes, *evidence.notes],
    )


def _design(file: RunFile) -> xr.Dataset:
    """Names of the variables, coordinates of points and prompts, and the attributes that must agree."""
    with open_landscape(file.path) as data, reading(file.path):
        for name, value in (("step", file.step), ("slice_seed", file.slice_seed)):
            if name not in data.coords or int(data[name]) != value:
                raise AnalysisError(f"{file.path}: its coordinate {name!r} does not agree with its name")
        kept = (PROMPTS_SHA256, REWARD_MODE, PROGRESSIVE)
        return xr.Dataset(
            {name: ((), 0) for name in data.data_vars},
            {name: data[name].values for name in (*GRID, PROMPT)},
            {name: data.attrs[name] for name in kept if name in data.attrs},
        )


class _Part:
    """What is kept of one dataset."""

    file: RunFile
    prompts: int
    rollouts: int
    map: xr.Dataset
    correlations: xr.Dataset
    improvement: xr.Dataset
    curvature: xr.Dataset
    profile: xr.Dataset
    checkpoint: dict[str, np.ndarray]
    origin: xr.Dataset
    surprisal: xr.Dataset | None
    ranges: xr.Dataset


def _analyse(
    file: RunFile, grid: Grid, settings: Bootstrap, threshold: float | None, fdr: float, notes: list[str]
) -> _Part:
    part = _Part()
    part.file = file
    where = f"step {file.step}, slice {file.slice_seed}"
    with open_landscape(file.path) as data, reading(file.path):
        check_values(data, str(file.path))
        part.prompts, part.rollouts = data.sizes["prompt"], data.sizes["rollout"]
        completions = data.sizes.get(BASE_ROLLOUT, part.rollouts)
        reduced = per_prompt(data, threshold=threshold).load()
    for axis in GRID:
        words = str(data.attrs.get(DIRECTION_ATTRIBUTE.format(axis=axis), "random"))
        if not words.startswith("random"):
            notes.append(
                f"{where}: {axis} is no random direction ({words}), so each axis has a unit of its own, and the "
                "radius that correlations control for, sqrt(alpha^2 + beta^2), is not the distance between weights."
            )
    failed = 1 - float(reduced["rollouts"].mean()) / part.rollouts
    if failed > 0:
        notes.append(f"{where}: {failed:.2%} of the rollouts failed and are left out of their prompt's mean.")
    try:
        part.correlations = _correlations(reduced, grid, settings, where, notes)
        part.ranges = plain_by_range(reduced, bootstrap=settings)
        part.improvement = improvement(reduced, bootstrap=settings, level=fdr)
        fits = [quadratic_fit(reduced, variable=name, bootstrap=settings) for name in ("reward", "kl_k1")]
        part.checkpoint = checkpoint_cells(reduced, part.rollouts)
    except AnalysisError as error:
        raise AnalysisError(f"{file.path}: {error}") from error
    used_points = int(part.correlations["points"].sel(control="none").max())
    used_prompts = int(part.correlations["prompts"].max())
    if used_points < min(grid_size(grid), reduced["reward"][..., 0].size):
        lost = reduced["reward"][..., 0].size - used_points
        notes.append(f"{where}: {lost} points have too few values and are left out.")
    if used_prompts < part.prompts:
        notes.append(f"{where}: {part.prompts - used_prompts} prompts are missing at some point and are left out.")
    part.curvature = xr.concat(fits, dim=xr.DataArray(["reward", "kl"], dims="quantity", name="quantity"))
    part.map = _map(reduced, part.rollouts, fdr).assign_attrs(
        reduced.attrs | {"prompts": part.prompts, "rollouts": part.rollouts}
    )
    part.profile = _profile(reduced)
    part.origin = reduced[["reward", "kl_k1", "rollouts", "successes"]].sel(alpha=[0.0], beta=[0.0])
    folder = file.path.parent / grid_name(file.step, file.slice_seed)
    base = base_batch_of(folder, part.prompts, completions)
    part.surprisal = None if base is None else token_surprisal(base)
    return part


def _correlations(reduced: xr.Dataset, grid: Grid, settings: Bootstrap, where: str, notes: list[str]) -> xr.Dataset:
    """On `grid`, or on the measured points where one of them has too few values to interpolate between."""
    if grid_size(grid) > reduced.sizes["alpha"] * reduced.sizes["beta"]:
        try:
            return correlations(interpolated(reduced, *grid), bootstrap=settings, replicates=True)
        except AnalysisError as error:
            notes.append(f"{where}: its points cannot be interpolated ({error}), so its correlations are theirs alone.")
    return correlations(reduced, bootstrap=settings, replicates=True)


def _map(reduced: xr.Dataset, k: int, fdr: float) -> xr.Dataset:
    values = {"reward": point_mean(reduced["reward"]), "kl": point_mean(reduced["kl_k1"])}
    for name in ("kl_k3", "entropy", "truncated", "format_failure"):
        if name in reduced:
            values[name] = point_mean(reduced[name])
    if {"surrogate", "tokens"} <= set(map(str, reduced.data_vars)):
        values["surrogate"] = surrogate(reduced)
    values["pass_1"], values["pass_k"] = pass_at_k(reduced, 1), pass_at_k(reduced, k)
    variables: dict[str, xr.DataArray] = {}
    for name, value in values.items():
        variables[name] = value["mean"]
        variables[f"{name}_se"] = value["standard_error"]
    variables["radius"] = radius(reduced)
    tests = better_than_origin(reduced, level=fdr)
    variables |= {
        "difference": tests["difference"],
        "difference_se": tests["standard_error"],
        "adjusted_p": tests["adjusted_p"],
        "better": tests["better"],
    }
    for name in ("realised_step", "displacement_radius"):
        if name in reduced and bool(reduced[name].notnull().any()):
            variables[name] = reduced[name]
    return xr.Dataset(variables).drop_vars("prompt", errors="ignore")


def _profile(reduced: xr.Dataset) -> xr.Dataset:
    found = {name: radial_profile(reduced[source]) for name, source in (("reward", "reward"), ("kl", "kl_k1"))}
    variables = {name: profile["mean"] for name, profile in found.items()}
    variables |= {f"{name}_se": profile["standard_error"] for name, profile in found.items()}
    paid = {name: value for name, value in reduced.attrs.items() if name == REWARD_MODE}
    return xr.Dataset(variables | {"points": found["reward"]["points"]}, attrs=paid)


def _combine(
    path: Path,
    parts: list[_Part],
    beside: RunEvidence,
    settings: Bootstrap,
    threshold: float | None,
    fdr: float,
    notes: list[str],
) -> RunAnalysis:
    keys = [(part.file.step, part.file.slice_seed) for part in parts]
    tables = _stack({key: part.correlations for key, part in zip(keys, parts, strict=True)})
    gains = _stack({key: part.improvement for key, part in zip(keys, parts, strict=True)})
    fits = _stack({key: part.curvature for key, part in zip(keys, parts, strict=True)})
    first_slice: dict[int, _Part] = {}
    for part in parts:
        first_slice.setdefault(part.file.step, part)
    steps = sorted(first_slice)
    k = min(part.rollouts for part in parts)
    curves = checkpoint_curves({step: first_slice[step].checkpoint for step in steps}, k, settings.level)
    prompts = int(tables["prompts"].max())
    exploitation = None
    if len(steps) > 1:
        found = exploitation_index(first_slice[steps[0]].checkpoint, first_slice[steps[-1]].checkpoint, settings)
        exploitation = found | {"first_step": steps[0], "last_step": steps[-1], "k": k}
    series = over_training(tables, settings, prompts)
    if exploitation is not None:
        for name, value in exploitation.items():
            dims = ("bound",) if name.endswith("_interval") else ()
            series[f"exploitation_{name}"] = (dims, np.asarray(value))
    mode = paid_by(parts[0].map.attrs)
    if mode != VERIFIER:
        curves.attrs[REWARD_MODE] = mode
        notes.append(f"Every reward is a control: {mode}, not the verifier's (reward_mode of the taskset).")
    ranges = {key: part.ranges for key, part in zip(keys, parts, strict=True)}
    evidence = analyse_evidence(beside, bootstrap=settings, threshold=threshold, fdr=fdr) if beside else None
    if evidence is not None:
        notes += evidence.notes
    found_in = [evidence] if evidence is not None else []
    claims = all_claims([beside], settings=settings, threshold=threshold, ranges=ranges, analyses=found_in)
    return RunAnalysis(
        path=path,
        bootstrap=settings,
        k=k,
        maps={key: part.map for key, part in zip(keys, parts, strict=True)},
        correlations=tables.drop_dims("resample").drop_vars("z"),
        improvement=gains,
        curvature=fits,
        profiles={key: part.profile for key, part in zip(keys, parts, strict=True)},
        training=curves,
        over_training=series,
        diagnostics=_diagnostics(first_slice, steps, curves, settings, k),
        slices=slice_agreement(tables, settings.level),
        claims=claims,
        ranges=ranges,
        evidence=evidence,
        sources=beside.sources,
        notes=notes,
    )


def _diagnostics(
    first_slice: dict[int, _Part], steps: list[int], curves: xr.Dataset, settings: Bootstrap, k: int
) -> dict[str, xr.Dataset]:
    found: dict[str, xr.Dataset] = {}
    if "entropy" in curves:
        found["entropy_law_training"] = (
            entropy_law(curves["entropy"].values, curves["reward"].values, level=settings.level)
            .rename(observation="step")
            .assign_coords(step=steps)
        )
        laws: list[xr.Dataset] = []
        for step in steps:
            map_ = first_slice[step].map
            law = entropy_law(map_["entropy"].values, map_["reward"].values, level=settings.level)
            laws.append(law.drop_vars("residual"))
        axis = xr.DataArray(steps, dims="step", name="step")
        found |= {"entropy_law_slice": xr.concat(laws, dim=axis)}
    found["two_stage"] = two_stage(steps, [first_slice[step].checkpoint["pass_k"] for step in steps], settings)
    found["pass_at_k"] = pass_at_k_curves({step: first_slice[step].origin for step in steps}, level=settings.level)
    if len(steps) > 1:
        found["crossing"] = crossing(
            first_slice[steps[0]].origin, first_slice[steps[-1]].origin, level=settings.level
        ).assign_attrs(first_step=steps[0], last_step=steps[-1])
    surprisals = {step: part.surprisal for step, part in first_slice.items() if part.surprisal is not None}
    if surprisals:
        axis = xr.DataArray(sorted(surprisals), dims="step", name="step")
        found["token_surprisal"] = xr.concat([surprisals[step] for step in sorted(surprisals)], dim=axis)
    return found


def _stack(tables: dict[tuple[int, int], xr.Dataset]) -> xr.Dataset:
    """(step, slice_seed) → one dataset over both; combinations that were not measured are missing with a reason."""
    steps = sorted({step for step, _ in tables})
    slices = sorted({seed for _, seed in tables})
    sample = next(iter(tables.values()))
    rows: list[xr.Dataset] = []
    for step in steps:
        row = [
            tables.get((step, seed), _missing(sample)).drop_vars(["step", "slice_seed"], errors="ignore")
            for seed in slices
        ]
        rows.append(xr.concat(row, dim=xr.DataArray(slices, dims="slice_seed", name="slice_seed")))
    return xr.concat(rows, dim=xr.DataArray(steps, dims="step", name="step"))


def _missing(sample: xr.Dataset) -> xr.Dataset:
    empty: xr.Dataset = sample.copy()
    for key in sample.data_vars:
        name, values = str(key), sample[key]
        if values.dtype.kind in "US":
            fill: object = np.full(values.shape, "not measured")
        elif values.dtype.kind in "iub":
            fill = np.zeros(values.shape, values.dtype)
        else:
            fill = np.full(values.shape, np.nan)
        empty[name] = (values.dims, fill, values.attrs)
    return empty
