"""Temporal SVD of groups of columns, such as the layers of a policy, in one pass over the rows."""

import copy
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tipl import _core
from tipl.device import cuda_engine, cuda_index
from tipl.subspace.joint_calls import check_rows, fit_together, saying_nan, set_fitted, turns
from tipl.subspace.row_blocks import Rows, numbered, row_blocks, where_it_was
from tipl.subspace.streaming_svd import StreamingSVD


class GroupedSVD:
    """One `StreamingSVD` for each group of columns, such as the layers of a policy, in one pass over the rows.

    Parameters:
        groups: the columns [start, stop) of each group, by name.
        n_components: for each group, or a share of its energy. A group with fewer columns gets as many as it has
            columns.
        params: the other arguments of `StreamingSVD`, except `origin`.

    `estimators_` holds the StreamingSVD of each group by name. Errors name rows, and columns within the group. Threads,
    pickles and copies work as with `StreamingSVD`.
    """

    def __init__(self, groups: Mapping[str, tuple[int, int]], n_components: int | float, **params: Any) -> None:
        if not groups:
            raise ValueError("GroupedSVD: groups must name at least one group of columns, got none")
        for name, (start, stop) in groups.items():
            if not 0 <= start < stop:
                raise ValueError(
                    f"GroupedSVD: group {name!r} must be [start, stop) with 0 <= start < stop, got [{start}, {stop})"
                )
        self.groups = dict(groups)
        self.estimators_ = {
            name: StreamingSVD(
                n_components if isinstance(n_components, float) else min(n_components, stop - start), **params
            )
            for name, (start, stop) in groups.items()
        }

    def __copy__(self) -> Self:
        return copy.deepcopy(self)  # with its own estimators, so that later rows go to one of the two only

    def fit(self, X: Rows, y: None = None) -> Self:
        """Forget all rows, then read those of X (n, p) once for each pass, for all groups together."""
        self._check_columns("fit", X)
        fit_together([(self.estimators_[name], slice(*ends)) for name, ends in self.groups.items()], X)
        return self

    @saying_nan()
    def partial_fit(self, X: Rows, y: None = None) -> Self:
        """Take the rows of X (n, p). Raises as `StreamingSVD.partial_fit` does; then no group took any row.

        After Ctrl-C all groups have taken equally many rows.
        """
        self._check_columns("partial_fit", X)
        estimators, columns = list(self.estimators_.values()), [slice(*ends) for ends in self.groups.values()]
        with turns("partial_fit", estimators):
            index = cuda_index("partial_fit", estimators[0].device)
            blocks = list(row_blocks("partial_fit", X, cuda_index=index))
            fitted = [
                estimator._ready("partial_fit", stop - start)
                for estimator, (start, stop) in zip(estimators, self.groups.values(), strict=True)
            ]
            cores, starts = [each.core for each in fitted], [start for start, _ in self.groups.values()]
            engine: Any = _core if index is None else cuda_engine()
            for first_row, block in numbered(blocks):  # names the column of X, and checks columns outside all groups
                engine.check_finite("partial_fit", block, _core.available_cpus() if index is None else index, first_row)
            check_rows(cores, columns, blocks)
            set_fitted(estimators, fitted)
            for first_row, block in numbered(blocks):
                engine.partial_fit_together(cores, starts, block, first_row=first_row, all_or_none=len(blocks) == 1)
        return self

    def merge(self, other: "GroupedSVD") -> Self:
        """Take everything that `other`, with the same groups, has seen: all groups, or none of them."""
        if not isinstance(other, GroupedSVD):
            raise TypeError(f"merge: other must be a GroupedSVD, got {type(other).__name__}")
        if self.groups != other.groups:
            raise ValueError(f"merge: other must have the groups {self.groups}, got {other.groups}")
        estimators, theirs = list(self.estimators_.values()), list(other.estimators_.values())
        with turns("merge", estimators + theirs):
            set_fitted(estimators, [ours._merged(other) for ours, other in zip(estimators, theirs, strict=True)])
        return self

    @saying_nan()
    def transform(self, X: Rows) -> Any:
        """Return coordinates (n, sum of all k) of the rows of X (n, p), group after group."""
        self._check_columns("transform", X)
        estimators, columns = list(self.estimators_.values()), [slice(*ends) for ends in self.groups.values()]
        with turns("transform", estimators):
            factors = [estimator._seen_rows("transform").read(estimator._threads()) for estimator in estimators]
        threads, index = estimators[0]._threads(), cuda_index("transform", estimators[0].device)
        coordinates = np.concatenate(
            [
                np.concatenate(
                    [of.project(block[:, which], threads, index) for of, which in zip(factors, columns, strict=True)],
                    axis=1,
                )
                for block in row_blocks("transform", X, cuda_index=index)
            ]
        )
        return where_it_was(X, coordinates, index)

    @property
    def coordinates_(self) -> NDArray[np.float32]:
        """The coordinates (n, sum of all k) of all rows seen, group after group; see `StreamingSVD`."""
        estimators = list(self.estimators_.values())
        with turns("coordinates_", estimators):
            return np.concatenate(
                [estimator._seen_rows("coordinates_").coordinates(estimator._threads()) for estimator in estimators],
                axis=1,
            )

    def _check_columns(self, where: str, X: Rows) -> None:
        needed, shape = max(stop for _, stop in self.groups.values()), np.shape(X)
        if len(shape) != 2 or shape[1] < needed:
            raise ValueError(f"{where}: X must have shape (n, p) with p >= {needed} for these groups, got {shape}")
