"""The subspace in which a LoRA adapter can move: the tangent space of the products L R at the adapter's own factors.

For one adapted matrix M = L R, a small change of both factors changes M by dL R + L dR. All such changes form a linear
space. With P_L the orthogonal projection onto the columns of L and P_R that onto the rows of R, the part of any Z in it
is

    inside(Z) = P_L Z + Z P_R − P_L Z P_R        outside(Z) = Z − inside(Z) = (1 − P_L) Z (1 − P_R)

so a random direction splits into two orthogonal parts, which do not depend on how the product is divided between L and
R. Its dimension is p·columns + q·rows − p·q with p, q the ranks of L and R: at step 0, where B is zero, only A's rows
count. A module that is trained as a whole (`modules_to_save`) lies inside, a tensor that is not trained lies outside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

import numpy as np

from rlvr_landscape_plugin.errors import SnapshotError
from rlvr_landscape_plugin.snapshot import Snapshot

INSIDE, OUTSIDE = "lora", "lora_complement"
"""The kinds of directions that stay in the subspace, and that avoid it."""


class Subspace:
    """Splits random directions around a snapshot that is an adapter."""

    def __init__(self, snapshot: Snapshot) -> None:
        """Raises `SnapshotError` for a snapshot that is a whole model: nothing tells what was trained."""
        if snapshot.adapter is None:
            raise SnapshotError(
                f"{snapshot.path} is a whole model; only a LoRA adapter (adapter_config.json) has a subspace of its own"
            )
        self._snapshot, self._adapter = snapshot, snapshot.adapter

    @cached_property
    def _bases(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Name → orthonormal columns that span L's columns, and R's rows; float64."""
        factors = {name: pair.factors() for name, pair in self._adapter.pairs.items()}
        return {name: (_column_basis(left), _column_basis(right.T)) for name, (left, right) in factors.items()}

    def dimensions(self, name: str) -> int:
        """Dimension of the subspace in one tensor."""
        size = math.prod(self._snapshot.shapes[name])
        if name in self._adapter.replaced:
            return size
        if name not in self._bases:
            return 0
        rows, columns = self._snapshot.shapes[name]
        p, q = (basis.shape[1] for basis in self._bases[name])
        return p * columns + q * rows - p * q

    def moves(self, kind: str, name: str) -> bool:
        """Whether a direction of this kind has a part in a tensor."""
        inside = self.dimensions(name)
        return inside > 0 if kind == INSIDE else inside < math.prod(self._snapshot.shapes[name])

    def described(self, kind: str, names: Iterable[str]) -> str:
        """The kind in words, with its dimensions among those of `names`.

        Raises `SnapshotError` where no tensor of `names` can move.
        """
        counts = [(self.dimensions(name), math.prod(self._snapshot.shapes[name])) for name in names]
        inside, total = sum(count[0] for count in counts), sum(count[1] for count in counts)
        left = inside if kind == INSIDE else total - inside
        if left == 0:
            raise SnapshotError(
                f"none of the tensors that move has a part {'in' if kind == INSIDE else 'outside'} the adapter's "
                "subspace; change slice.include and slice.exclude"
            )
        where = "in the adapter's subspace" if kind == INSIDE else "outside the adapter's subspace"
        return f"random {where} ({left:,} of {total:,} dimensions)"

    def part(self, kind: str, name: str, values: np.ndarray) -> np.ndarray:
        """The part of `values` in the subspace, or outside of it: float64, of the same shape."""
        values = values.astype(np.float64)
        if not self.moves(kind, name):
            return np.zeros_like(values)
        if not self.moves(OUTSIDE if kind == INSIDE else INSIDE, name):
            return values
        left, right = self._bases[name]
        outside = values - left @ (left.T @ values)
        outside -= (outside @ right) @ right.T
        return outside if kind == OUTSIDE else values - outside


def _column_basis(matrix: np.ndarray) -> np.ndarray:
    """Orthonormal columns that span those of `matrix`, up to what float32 factors can tell from zero."""
    basis, values, _ = np.linalg.svd(matrix, full_matrices=False)
    least = values[0] * max(matrix.shape) * np.finfo(np.float32).eps
    return np.ascontiguousarray(basis[:, values > least])


def subspace_of(snapshot: Snapshot) -> Subspace | None:
    """The subspace of an adapter; None for a whole model."""
    return None if snapshot.adapter is None else Subspace(snapshot)
