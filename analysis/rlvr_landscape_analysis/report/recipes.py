"""The figures of a report: which are drawn, under which name, with which title and caption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rlvr_landscape_analysis import figures as drawing
from rlvr_landscape_analysis.results import EARLY, RunAnalysis
from rlvr_landscape_analysis.schema import SOLVED, grid_name

MAX_SLICES = 3
"""Rows of a figure of panels."""

Key = tuple[int, int]
"""Step and slice of a landscape."""


@dataclass(frozen=True)
class Recipe:
    """A figure of the report."""

    name: str
    """Name of its files."""
    title: str
    caption: str
    draw: Callable[[], dict[str, Any]]
    """Draws it and returns its artists with `figure` or `ax`; raises `AnalysisError` when there is nothing to draw."""
    detail: bool = False
    """Whether it is of one snapshot, rather than of the run."""
    inline: bool = True
    """Whether the page shows it, rather than only naming its files."""


def recipes(analysis: RunAnalysis) -> list[Recipe]:
    """The figures of a report beside the single landscapes, in its order."""
    keys = sorted(analysis.maps)
    steps = {step for step, _ in keys}
    slices = sorted({seed for _, seed in keys})[:MAX_SLICES]
    shown = {key: analysis.maps[key] for key in keys if key[1] in slices}
    confidence = f"{analysis.bootstrap.level:.0%}"
    table = analysis.correlations
    found = []
    if len(keys) > 1:
        # A single landscape would only be the one that stands in the page already, once more.
        found += [
            Recipe(
                "panels",
                "Chosen snapshots side by side",
                "the landscapes above in one figure, each with a colour scale of its own.",
                lambda: drawing.landscape_panels(shown),
                inline=False,
            ),
            Recipe(
                "panels_shared",
                "Chosen snapshots on one colour scale",
                "Colour: mean reward; lines: KL in nat; cross: the checkpoint. Panels compare in both.",
                lambda: drawing.landscape_panels(shown, shared=True),
            ),
        ]
    if len(steps) > 1:
        bands = f"Bands: {confidence} intervals over prompts."
        early = Recipe(
            "correlation_early",
            f"The same over the first {EARLY} steps",
            bands,
            lambda: drawing.early_correlation(table, value="pearson"),
        )
        found += [
            Recipe(
                "correlation",
                "Correlation of KL and reward over training",
                f"Pearson over the points of the slice, as it is usually quoted: the radius is still in it. {bands}",
                lambda: drawing.correlation_over_training(table, value="pearson"),
            ),
            *([early] if min(steps) <= EARLY < max(steps) else []),
            Recipe(
                "controlled",
                "With the radius controlled for",
                "Corrected for sampling noise. Where the corrected line lies in the grey band, the radius explains it. "
                + bands,
                lambda: drawing.controlled_over_training(table),
            ),
            Recipe(
                "contribution",
                "What lies beyond the radius",
                "The part of the corrected correlation that differences within shells of equal radius contribute. The "
                f"axis ends where its values do. {bands}",
                lambda: drawing.correlation_over_training(table, control="shell", value="contribution"),
            ),
            Recipe(
                "training",
                "The checkpoints over training",
                f"Reward, pass@1, pass@{analysis.k} and token entropy of the checkpoints. {bands}",
                lambda: drawing.training_curves(analysis.training),
            ),
        ]
    for key in dict.fromkeys([keys[0], next(key for key in keys if key[0] == keys[-1][0])] if keys else []):
        found += _snapshot_recipes(analysis, key)
    return found


def _snapshot_recipes(analysis: RunAnalysis, key: Key) -> list[Recipe]:
    values = analysis.maps[key]
    at, tail = f"step {key[0]}, slice {key[1]}", grid_name(*key)
    found = [
        Recipe(
            f"scatter_{tail}",
            f"KL and reward, {at}",
            "Each point is a policy of the slice, coloured by its distance from the checkpoint.",
            lambda: drawing.kl_reward_scatter(values, analysis.correlations),
        ),
        Recipe(
            f"difference_{tail}",
            f"Difference from the checkpoint, {at}",
            "Reward minus the checkpoint's, paired by prompt. Hatched: within two standard errors. Rings: better, with "
            "the false discovery rate controlled.",
            lambda: drawing.difference_map(values),
        ),
        Recipe(
            f"surrogate_{tail}",
            f"Surrogate and reward, {at}",
            "How the training objective rates the neighbourhood, beside what it is worth; both as change from the "
            "checkpoint.",
            lambda: drawing.surrogate_and_reward(values),
        ),
        Recipe(
            f"pass_entropy_{tail}",
            f"pass@{analysis.k} and token entropy, {at}",
            f"Where the neighbourhood still solves what it tries, and how spread its answers are. A rollout passes "
            f"with a reward of at least {float(values.attrs.get('threshold', SOLVED)):g} (option --threshold).",
            lambda: drawing.pass_and_entropy_maps(values),
        ),
        Recipe(
            f"surface_{tail}",
            f"The landscape as a surface, {at}",
            "For a first impression; a flat map is read more exactly.",
            lambda: drawing.surface(values),
        ),
    ]
    if key in analysis.profiles:
        found.append(
            Recipe(
                f"profile_{tail}",
                f"Reward and KL against the distance, {at}",
                "Means over points of equal distance from the checkpoint, with bands of two standard errors.",
                lambda: drawing.radial_profile(analysis.profiles[key]),
            )
        )
    for name, words in (("truncated", "Share of truncated rollouts"), ("format_failure", "Share of format failures")):
        if name in values:
            found.append(
                Recipe(
                    f"{name}_{tail}",
                    f"{words}, {at}",
                    "Where it is high, reward measures more than the quality of an answer.",
                    lambda name=name: drawing.quantity_map(values, name),
                )
            )
    return [replace(recipe, detail=True) for recipe in found]
