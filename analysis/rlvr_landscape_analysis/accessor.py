"""`ds.landscape`: the functions of this package as methods. It only forwards calls; it caches nothing and checks a
dataset when it is used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import xarray as xr

from rlvr_landscape_analysis import landscape as _landscape
from rlvr_landscape_analysis.datasets import check_landscape


@xr.register_dataset_accessor("landscape")
class LandscapeAccessor:
    """Methods of a landscape dataset, raw or reduced."""

    def __init__(self, data: xr.Dataset) -> None:
        self._data = data

    def per_prompt(self, *, threshold: float | None = None) -> xr.Dataset:
        """Call `rlvr_landscape_analysis.landscape.per_prompt` on this dataset."""
        return _landscape.per_prompt(self._data, threshold=threshold)

    def mean(self, name: str = "reward") -> xr.Dataset:
        """Call `rlvr_landscape_analysis.landscape.point_mean` on one variable."""
        return _landscape.point_mean(self._variable(name))

    def difference(self, name: str = "reward") -> xr.Dataset:
        """Call `rlvr_landscape_analysis.landscape.difference_from_origin` on one variable."""
        return _landscape.difference_from_origin(self._variable(name))

    @property
    def radius(self) -> xr.DataArray:
        """`rlvr_landscape_analysis.landscape.radius` of this dataset."""
        return _landscape.radius(self._data)

    def kl(self, *, estimator: str = "k1") -> xr.Dataset:
        """Call `rlvr_landscape_analysis.landscape.kl` on this dataset."""
        return _landscape.kl(self._data, estimator=estimator)

    def surrogate(self) -> xr.Dataset:
        """Call `rlvr_landscape_analysis.landscape.surrogate` on this dataset."""
        return _landscape.surrogate(self._data)

    def pass_at_k(self, k: int, *, threshold: float | None = None) -> xr.Dataset:
        """Call `rlvr_landscape_analysis.landscape.pass_at_k` on this dataset."""
        return _landscape.pass_at_k(self._data, k, threshold=threshold)

    def entropy(self, quantiles: Iterable[float] = (0.1, 0.5, 0.9)) -> xr.Dataset:
        """Call `rlvr_landscape_analysis.landscape.entropy` on this dataset."""
        return _landscape.entropy(self._data, quantiles)

    def ray(self, name: str = "reward", angle: float = 0.0) -> xr.DataArray:
        """Call `rlvr_landscape_analysis.landscape.ray` on one variable."""
        return _landscape.ray(self._variable(name), angle)

    def radial_profile(self, name: str = "reward") -> xr.Dataset:
        """Call `rlvr_landscape_analysis.landscape.radial_profile` on one variable."""
        return _landscape.radial_profile(self._variable(name))

    def correlations(self, **options: Any) -> xr.Dataset:
        """Call `rlvr_landscape_analysis.statistics.correlation.correlations` on this dataset."""
        from rlvr_landscape_analysis.statistics.correlation import correlations

        return correlations(self._data, **options)

    def better_than_origin(self, **options: Any) -> xr.Dataset:
        """Call `rlvr_landscape_analysis.statistics.improvement.better_than_origin` on this dataset."""
        from rlvr_landscape_analysis.statistics.improvement import better_than_origin

        return better_than_origin(self._data, **options)

    def best_point(self, **options: Any) -> xr.Dataset:
        """Call `rlvr_landscape_analysis.statistics.improvement.best_point` on this dataset."""
        from rlvr_landscape_analysis.statistics.improvement import best_point

        return best_point(self._data, **options)

    def overlap(self, **options: Any) -> xr.Dataset:
        """Call `rlvr_landscape_analysis.statistics.improvement.overlap` on this dataset."""
        from rlvr_landscape_analysis.statistics.improvement import overlap

        return overlap(self._data, **options)

    def quadratic_fit(self, **options: Any) -> xr.Dataset:
        """Call `rlvr_landscape_analysis.statistics.curvature.quadratic_fit` on this dataset."""
        from rlvr_landscape_analysis.statistics.curvature import quadratic_fit

        return quadratic_fit(self._data, **options)

    def _variable(self, name: str) -> xr.DataArray:
        check_landscape(self._data)
        if name not in self._data:
            from rlvr_landscape_analysis.errors import AnalysisError

            known = ", ".join(sorted(map(str, self._data.data_vars)))
            raise AnalysisError(f"the dataset has no variable {name!r}; it has {known}")
        return self._data[name]
