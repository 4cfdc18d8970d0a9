"""Principal components of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from rlvr_landscape_plugin.errors import ConfigurationError
from rlvr_landscape_plugin.schedule import format_schedule
from rlvr_landscape_plugin.snapshot import Snapshot

_BLOCK = 2**20
"""Elements of each snapshot that the principal components' products handle at once."""


def principal_terms(
    snapshots: Sequence[Snapshot], names: Iterable[str], component: int
) -> tuple[list[tuple[float, Snapshot]], float]:
    """A principal component of a run as Σ coefficient · θ over its `snapshots`, and its share of the squared length.

    Li et al. 2018 (arXiv 1712.09913, §7): the right singular vectors of M = [θ_0 − θ_n; …; θ_{n−1} − θ_n], not centred
    again, over the tensors `names`; θ_0 and θ_n are the first and the last of `snapshots`. The vector points the way
    training went (θ_n − θ_0 has no negative part along it) and is as long as ‖θ_n − θ_0‖. Raises
    `ConfigurationError` if M has fewer components: singular values below 1e-5 of the largest count as zero.
    """
    *earlier, last = snapshots
    gram = np.zeros((len(earlier), len(earlier)))
    for name in names:
        size = math.prod(last.tensors[name].shape)
        for start in range(0, size, _BLOCK):
            count = min(_BLOCK, size - start)
            end = last.tensors[name].read(start, count).astype(np.float64)
            rows = np.stack([snapshot.tensors[name].read(start, count) - end for snapshot in earlier])
            gram += rows @ rows.T
    squares, vectors = np.linalg.eigh(gram)
    squares, vectors = squares[::-1], vectors[:, ::-1]
    rank = int(np.sum(squares > 1e-10 * squares[0])) if squares[0] > 0 else 0
    if component > rank:
        raise ConfigurationError(
            f"component = {component} is beyond the rank {rank} of the run's {len(snapshots)} snapshots "
            f"(steps {format_schedule(snapshot.step for snapshot in snapshots)}); lower it or keep more snapshots"
        )
    vector = vectors[:, component - 1]
    pivot = vector[0] if abs(vector[0]) > 1e-9 else vector[np.argmax(np.abs(vector))]
    # Row 0 is θ_0 − θ_n, so training went against a direction on which it has a positive part.
    factors = -np.sign(pivot) * vector * math.sqrt(gram[0, 0] / squares[component - 1])
    terms = [(float(factor), snapshot) for factor, snapshot in zip(factors, earlier, strict=True)]
    return [*terms, (float(-factors.sum()), last)], float(squares[component - 1] / np.trace(gram))
