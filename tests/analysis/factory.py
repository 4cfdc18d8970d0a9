"""A `RunAnalysis` made by hand, with known values and holes: tables and report are tested without the statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from rlvr_landscape_analysis.results import BOUNDS, CONTROLS, PAIRS, Claim, RunAnalysis
from rlvr_landscape_analysis.statistics.resample import Bootstrap

ALPHAS = np.array([-0.1, 0.0, 0.05, 0.2])
BETAS = np.array([-0.3, -0.1, 0.0, 0.1, 0.15])
NASTY = "</script><b onmouseover=alert(1)>&amp; 50% of $x_1^2$ | \\end{table} `code` [link](http://evil.example) <!--"
"""What a dataset may carry in its attributes and reasons."""
FEW = "only 5 prompts: no interval and no correction below 8"
MEMBERS = ("first", "second")
QUANTITIES = ("kl", "reward", "surrogate")
K = 4


def make_map(step: int, slice_seed: int, *, defined: bool = True) -> xr.Dataset:
    """A map whose value at (i, j) is unlike that at any other point, above all unlike that at (j, i)."""
    i, j = np.meshgrid(np.arange(len(ALPHAS)), np.arange(len(BETAS)), indexing="ij")
    a, b = np.meshgrid(ALPHAS, BETAS, indexing="ij")
    index = 0.01 * (i + 10 * j) + 0.001 * step + 0.1 * slice_seed
    values = {
        "reward": 0.2 + index,
        "kl": 3.0 * (a**2 + 2 * b**2) + 0.001 * index,
        "kl_k3": 3.1 * (a**2 + 2 * b**2),
        "surrogate": 0.05 * a - 0.02 * b,
        "entropy": 0.3 + 0.1 * a,
        "truncated": 0.01 + 0 * a,
        "pass_1": 0.1 + 0.2 * index,
        "pass_k": 0.3 + 0.2 * index,
    }
    if not defined:
        for name in ("surrogate", "kl_k3", "entropy", "truncated"):
            del values[name]
        values["reward"][0, 0] = np.nan
    variables = dict(values)
    variables |= {f"{name}_se": 0.01 + 0.001 * i + 0.002 * j for name in values}
    if not defined:
        variables["reward_se"] = np.full(a.shape, np.nan)
    variables["radius"] = np.hypot(a, b)
    variables["difference"] = variables["reward"] - variables["reward"][1, 2]
    variables["difference_se"] = 0.02 + 0.001 * i
    variables["adjusted_p"] = np.where(variables["difference"] > 0.1, 0.01, 0.9)
    variables["better"] = variables["difference"] > 0.1
    attrs = {
        "configuration": '{"grid": {"alpha": 4}, "name": "run"}',
        "configuration_sha256": "c0ffee" * 8,
        "snapshot_sha256": f"{step:064x}",
        "snapshot_name": NASTY if not defined else f"step {step}",
        "prompts_sha256": "abcd" * 16,
        "servers": '[{"vllm": "0.32.0", "dtype": "float32"}]',
        "packages": '{"numpy": "2.1"}',
        "git_commit": "0123abcd" * 5,
        "prompts": 64,
        "rollouts": K,
        "spread": float("nan"),
    }
    return xr.Dataset(
        {name: (("alpha", "beta"), value) for name, value in variables.items()},
        {"alpha": ALPHAS, "beta": BETAS, "step": step, "slice_seed": slice_seed},
        attrs,
    )


class _Maker:
    """Numbers in a fixed order, each around what was asked for."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def around(self, centre: float, shape: tuple[int, ...], spread: float = 0.05) -> np.ndarray:
        return np.clip(centre + spread * self._rng.standard_normal(shape), -0.99, 0.99)

    def bounded(
        self, name: str, centre: float, dims: tuple[str, ...], shape: tuple[int, ...], half: float = 0.1
    ) -> dict:
        values = self.around(centre, shape)
        return {
            name: (dims, values),
            f"{name}_interval": ((*dims, "bound"), np.stack([values - half, values + half], -1)),
        }


def make_analysis(
    steps: tuple[int, ...] = (0, 1, 10), slices: tuple[int, ...] = (0, 1), *, defined: bool = True, path: str = "a-run"
) -> RunAnalysis:
    """An analysis of a run that never was.

    With `defined=False`, as a poor run leaves it: nothing defined at the first snapshot, intervals missing, no
    surrogate and no entropy, hostile text in attributes and reasons, claims that cannot be measured.
    """
    make = _Maker(len(steps) + 10 * len(slices))
    keys = [(step, seed) for step in steps for seed in slices]
    where = ("step", "slice_seed")
    shape = (len(steps), len(slices))
    coords = {"step": list(steps), "slice_seed": list(slices), "bound": list(BOUNDS)}
    maps = {key: make_map(*key, defined=defined) for key in keys}
    correlations = _correlations(make, coords, shape, defined)
    improvement = _improvement(make, coords, shape, defined)
    curvature = xr.Dataset(
        make.bounded("curvature", -0.5, (*where, "quantity", "eigen"), (*shape, 2, 2))
        | make.bounded("coefficient", 0.1, (*where, "quantity", "term"), (*shape, 2, 6))
        | {
            "standard_error": ((*where, "quantity", "term"), np.full((*shape, 2, 6), 0.05)),
            "r_squared": ((*where, "quantity"), np.full((*shape, 2), 0.9)),
            "points": ((*where, "quantity"), np.full((*shape, 2), 12)),
            "reason": ((*where, "quantity"), np.full((*shape, 2), "")),
        },
        coords
        | {"quantity": ["reward", "kl"], "eigen": ["low", "high"]}
        | {"term": ["constant", "gradient_alpha", "gradient_beta", "hessian_aa", "hessian_ab", "hessian_bb"]},
    )
    names = ("reward", "pass_1", "pass_k", "entropy") if defined else ("reward", "pass_1", "pass_k")
    training: dict = {}
    for centre, name in enumerate(names, start=2):
        training |= make.bounded(name, centre / 10, ("step",), (len(steps),))
    if not defined:
        _forget(curvature, "only 8 points, or a single row of them")
        training["reward_interval"][1][...] = np.nan
    return RunAnalysis(
        path=Path(path),
        bootstrap=Bootstrap(resamples=200, seed=3, level=0.9),
        k=K,
        maps=maps,
        correlations=correlations,
        improvement=improvement,
        curvature=curvature,
        profiles={key: _profile(values) for key, values in maps.items()},
        training=xr.Dataset(training, {"step": list(steps), "bound": list(BOUNDS)}, {"k": K}),
        over_training=_over_training(make, steps, defined),
        diagnostics=_diagnostics(make, steps, defined),
        slices=_slices(make, steps) if defined and len(slices) > 1 else None,
        claims=_claims(defined),
        notes=[]
        if defined
        else [f"Unfinished and left out: step 99, slice 0: {NASTY}.", "step 0: 3% of the rollouts failed."],
    )


def _correlations(make: _Maker, coords: dict, shape: tuple[int, ...], defined: bool) -> xr.Dataset:
    dims, size = ("step", "slice_seed", "pair", "control"), (*shape, len(PAIRS), len(CONTROLS))
    variables: dict = {}
    for name, centre in (("pearson", -0.8), ("spearman", -0.7), ("corrected", -0.85), ("contribution", -0.1)):
        variables |= make.bounded(name, centre, dims, size)
    variables["spearman_corrected"] = (dims, make.around(-0.75, size))
    variables |= make.bounded("radial_share", 0.8, ("step", "slice_seed", "quantity"), (*shape, 3))
    variables["reliability"] = ((*dims, "member"), np.abs(make.around(0.9, (*size, 2))))
    variables["prompts"], variables["points"] = (dims, np.full(size, 64)), (dims, np.full(size, 20))
    variables["reason"] = (dims, np.full(size, "", dtype="<U200"))
    extra = {"pair": list(PAIRS), "control": list(CONTROLS), "member": list(MEMBERS), "quantity": list(QUANTITIES)}
    data = xr.Dataset(variables, coords | extra)
    data["pearson"][dict(step=-1, slice_seed=0, pair=0, control=0)] = -0.81
    data["pearson_interval"][dict(step=-1, slice_seed=0, pair=0, control=0)] = [-0.87, -0.59]
    if not defined:
        _forget(data, NASTY, {"step": 0})
        # Known, but without an interval.
        last = {"step": -1, "pair": 0}
        for name in ("pearson_interval", "spearman_interval", "corrected_interval", "corrected"):
            data[name][last] = np.nan
        data["reason"][last] = FEW
    return data


def _forget(data: xr.Dataset, reason: str, where: dict | None = None) -> None:
    """Make every number (at `where`) missing for `reason`."""
    data["reason"] = data["reason"].astype("<U200")
    for variable in data.data_vars.values():
        here = {dim: at for dim, at in (where or {}).items() if dim in variable.dims}
        if variable.dtype.kind == "f":
            variable[here] = np.nan
    data["reason"][where or {}] = reason


def _improvement(make: _Maker, coords: dict, shape: tuple[int, ...], defined: bool) -> xr.Dataset:
    where = ("step", "slice_seed")
    plain = {"better_share": 0.1, "best_alpha": 0.05, "best_beta": -0.1, "best_radius": 0.11, "best_kl": 0.2}
    plain |= {"naive_gain": 0.06, "chosen_share": 0.5, "chance": 0.2, "radial_chance": 0.6, "radial_high": 0.7}
    variables: dict = {name: (where, np.full(shape, value)) for name, value in plain.items()}
    variables |= {name: (where, np.full(shape, value)) for name, value in {"better_count": 2, "tested": 19}.items()}
    variables |= make.bounded("gain", 0.02, where, shape) | make.bounded("overlap", 0.6, where, shape)
    variables["reason"] = (where, np.full(shape, "", dtype="<U200"))
    data = xr.Dataset(variables, coords, {"level": 0.05, "region": 0.2})
    if not defined:
        data["gain"][0] = data["gain_interval"][0] = data["chosen_share"][0] = np.nan
        data["reason"][0] = "only 5 prompts: no split-half gain below 8"
    return data


def _profile(values: xr.Dataset) -> xr.Dataset:
    radii = np.unique(np.round(values["radius"].values, 9))
    size = len(radii)
    names = {"reward": 0.5 - radii, "reward_se": np.full(size, 0.01), "kl": 3 * radii**2, "kl_se": np.full(size, 0.1)}
    variables: dict = {name: ("radius", value) for name, value in names.items()}
    return xr.Dataset(variables | {"points": ("radius", np.ones(size, int))}, {"radius": radii})


def _over_training(make: _Maker, steps: tuple[int, ...], defined: bool) -> xr.Dataset:
    controls = ("none", "shell", "smooth")
    known = defined and len(steps) > 3
    variables: dict = {}
    for name in ("slope", "tau", "change_step", "change", "explained"):
        values = make.around(0.3, (3,)) if known else np.full(3, np.nan)
        variables[name] = ("control", np.full(3, float(max(steps))) if known and name == "change_step" else values)
    for name in ("slope_interval", "change_interval", "change_size_interval"):
        variables[name] = (("control", "bound"), np.tile([0.1, 0.4], (3, 1)) if known else np.full((3, 2), np.nan))
    words = "" if known else f"a trend needs three snapshots with a defined value, there are {len(steps)}"
    variables["reason"] = ("control", np.full(3, words, dtype="<U200"))
    if defined and len(steps) > 1:
        for name in ("gain", "coverage", "contrast"):
            variables |= make.bounded(f"exploitation_{name}", 0.1, (), ())
        variables["exploitation_index"] = ((), np.nan)
        variables["exploitation_index_interval"] = ("bound", np.full(2, np.nan))
        for name, value in {"prompts": 64, "first_step": steps[0], "last_step": steps[-1], "k": K}.items():
            variables[f"exploitation_{name}"] = ((), value)
        variables["exploitation_reason"] = (
            (),
            "pass@1 did not rise beyond its uncertainty, so the ratio is not defined",
        )
    return xr.Dataset(variables, {"control": list(controls), "bound": list(BOUNDS)})


def _diagnostics(make: _Maker, steps: tuple[int, ...], defined: bool) -> dict[str, xr.Dataset]:
    bound = {"bound": list(BOUNDS)}
    axis = {"step": list(steps)}
    ks = np.arange(1, K + 1)
    found = {
        "pass_at_k": xr.Dataset(
            make.bounded("pass_at_k", 0.4, ("step", "k"), (len(steps), K)), axis | bound | {"k": ks}
        ),
        "two_stage": xr.Dataset(
            {name: ((), np.nan) for name in ("before", "after", "bend", "explained", "flat_p")}
            | {f"{name}_interval": ("bound", np.full(2, np.nan)) for name in ("before", "after")}
            | {"stage": ((), "undecided"), "reason": ((), f"five snapshots are needed, there are {len(steps)}")}
            | {"prompts": ((), 64)},
            bound,
        ),
    }
    if len(steps) > 1:
        found["crossing"] = xr.Dataset(
            make.bounded("difference", 0.05, ("k",), (K,))
            | {
                "crossing_k": ((), np.nan),
                "significant": ((), False),
                "reason": ((), f"no crossing up to k = {K}, the number of rollouts"),
            },
            bound | {"k": ks},
            {"first_step": steps[0], "last_step": steps[-1]},
        )
    if not defined:
        return found
    law = {"ceiling": 0.9, "r_squared": 0.5, "a_standard_error": 0.1, "b_standard_error": 0.1}
    found["entropy_law_training"] = xr.Dataset(
        make.bounded("a", 0.6, (), ())
        | make.bounded("b", 0.9, (), ())
        | {name: ((), value) for name, value in law.items()}
        | {"residual": ("step", np.zeros(len(steps))), "observations": ((), len(steps)), "reason": ((), "")},
        axis | bound,
    )
    found["entropy_law_slice"] = xr.Dataset(
        make.bounded("a", 0.6, ("step",), (len(steps),))
        | make.bounded("b", 0.9, ("step",), (len(steps),))
        | {name: ("step", np.full(len(steps), value)) for name, value in law.items()}
        | {"observations": ("step", np.full(len(steps), 20)), "reason": ("step", np.full(len(steps), ""))},
        axis | bound,
    )
    return found


def _slices(make: _Maker, steps: tuple[int, ...]) -> xr.Dataset:
    dims, shape = ("step", "pair", "control"), (len(steps), len(PAIRS), len(CONTROLS))
    variables = make.bounded("mean", -0.6, dims, shape)
    variables |= {"spread": (dims, np.full(shape, 0.1)), "slices": (dims, np.full(shape, 2))}
    return xr.Dataset(
        variables, {"step": list(steps), "pair": list(PAIRS), "control": list(CONTROLS), "bound": list(BOUNDS)}
    )


def _claims(defined: bool) -> list[Claim]:
    if not defined:
        hole = (np.nan, np.nan)
        why = f"This run cannot answer it: {NASTY}."
        verdict = "not measurable"
        undecided = "undecided at this sample size"
        return [
            Claim("T1", "A title", undecided, "Nothing can be said yet: only 5 prompts.", "A rule.", np.nan, hole, 5),
            Claim("T2", NASTY, verdict, why, "A rule.", np.nan, hole, 0),
        ]
    return [
        Claim("T1", "Near in KL", "supported", "It is −0.30 [−0.40, −0.20].", "Below 0.", -0.3, (-0.4, -0.2), 64),
        Claim("T2", "Early", "undecided at this sample size", "It is open.", "Below 0.", -0.1, (-0.3, 0.1), 64, 12345),
        Claim("T3", "Local", "not supported", "It is +0.20.", "Below 0.", 0.2, (0.1, 0.3), 64),
    ]
