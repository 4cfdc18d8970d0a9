"""The report's figures of censuses, paths and boundaries beside the frontier; none where a run has no such dataset."""

from __future__ import annotations

from rlvr_landscape_analysis import figures as drawing
from rlvr_landscape_analysis.report.recipes import Recipe
from rlvr_landscape_analysis.results import RunAnalysis


def evidence_recipes(analysis: RunAnalysis) -> list[Recipe]:
    """What the claims rest on, in the order in which the claims need it."""
    found = analysis.evidence
    if found is None:
        return []
    level = f"{analysis.bootstrap.level:.0%}"
    recipes = []
    if found.census:
        recipes += [
            Recipe(
                "correlation_by_radius",
                "Correlation of KL and reward over random directions",
                "At each radius all policies are equally far away. Grey stripe: what counts as none. "
                f"{level} intervals over directions and prompts; T1 and T2 rest on it.",
                lambda: drawing.correlation_by_radius(found.census),
            ),
            Recipe(
                "density_by_radius",
                "Share of random directions that improve the reward",
                f"Normal model with {level} intervals; small ticks: what improves at the least, without a model.",
                lambda: drawing.density_by_radius(found.census),
            ),
            Recipe(
                "curvature",
                "KL per squared length over training",
                "Left: random directions. Right: the way that training came, by random directions at the same KL.",
                lambda: drawing.curvature_over_training(found.census, found.path),
            ),
        ]
    if found.boundary:
        recipes.append(
            Recipe(
                "boundary",
                "pass@k of the checkpoints to the number of rollouts",
                f"{level} intervals over prompts. Dotted: where the curve of a step falls below the first one; T3 "
                "rests on the largest k.",
                lambda: drawing.pass_at_k_by_step(found.boundary, found.change),
            )
        )
    return recipes
