"""Temporal SVD: the leading directions of rows that come in blocks and are never all in memory.

Shapes  n rows seen, p columns, k = n_components, l = k + n_oversamples range directions.

`csrc/svd.h` explains the sketch of the rows, `tipl/subspace/sketch_svd.py` how directions and errors follow from it.
"""

from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tipl import _core
from tipl.device import cuda_index
from tipl.subspace.fitted_sketch import FittedSketch
from tipl.subspace.joint_calls import check_rows, fit_together, saying_nan, turns
from tipl.subspace.parameters import checked_threads, same_value
from tipl.subspace.row_blocks import Rows, as_matrix, numbered, row_blocks, where_it_was
from tipl.subspace.saved_sketch import load_sketch, save_sketch
from tipl.subspace.scikit_conventions import (
    ScikitTransformer,
    check_same_columns,
    checked_names_in,
    column_names,
    table,
)
from tipl.subspace.sketch_svd import Factors


class NotFittedError(ValueError, AttributeError):
    """Raised where an estimator that has seen no rows is asked for a result."""


class StreamingSVD(ScikitTransformer):
    """The k leading right singular vectors of a matrix A whose rows come in blocks.

    Passes scikit-learn's `check_estimator` without depending on scikit-learn: it works in a Pipeline, with
    GridSearchCV, clone and `set_output`. `fit` reads its rows `passes` times; `partial_fit` takes rows as they come,
    once. Memory: 8 (l + 9) p bytes whatever the number of rows, and 4 l bytes for each row, for `coordinates_`.

    Results have the same bits for any number of threads and any chunking of the rows, except that rows which follow a
    `fit` begin a new chunk. They are equal within rounding for any order of the rows and of merging. Reading results
    between rows changes nothing. With many rows, sums are float32: rows whose norm is above 1e15 are refused, and where
    the entries are below 1e-18 (root mean square) all singular values count as zero, with a RuntimeWarning.

    Threads may share an estimator: a call waits until another thread's call has ended. A call from a signal handler
    that interrupts a call, or from a child process that was forked during another thread's call, gets a RuntimeError
    instead. Pickles and copies hold everything that was seen.

    What one pass loses: singular values are computed from their squares in float32 sums, which resolves them down to
    about 3e-4 of the largest, and where the spectrum decays slowly the directions come out mixed with others of nearly
    the same strength. `residual_` tells how well they do. A larger n_oversamples helps; a second pass is near-exact.

    Parameters:
        n_components: k; or a share in (0, 1): the fewest components, up to 128, that explain this share of |A|_F^2.
        n_oversamples: further range directions. None: as many as n_components, at least 16.
        passes: how often `fit` reads its rows.
        center: whether to subtract the mean of all rows, as principal component analysis does.
        origin: a row (p,) that is subtracted from every row. With `center` it only improves accuracy: rows far from
            zero and close to one another lose nothing if the origin lies among them. None: zero, or with `center` a
            central row of the first 256.
        seed: for the random directions.
        num_threads: None for all cores of this process.
        device: "cpu", or "cuda", "cuda:0" ... for an NVIDIA GPU, where the sums then stay. Rows may lie there (anything
            that speaks DLPack, as torch and CuPy do) or in the host's memory, from which they are streamed. What is
            derived from the sums is computed on the CPU, and attributes are NumPy arrays. The random directions, and
            with them files, are the same on all devices, the bits of the sums are not.

    Attributes, after the first row (A: the rows less the origin, or about their mean):
        components_: (k, p) float32, orthonormal rows; the entry of largest magnitude in each row is positive. Where A
            has fewer than k directions above rounding the last ones are random.
        singular_values_: (k,) float64, descending, never above the true ones except by rounding; 0 for random
            directions.
        explained_variance_ratio_: (k,) their squares over |A|_F^2.
        coordinates_: (n, k) float32, of all rows seen, in order, from the sketch alone: the more the directions come
            out mixed (see above), the less exact. For up to 256 rows they are exact. `fit_transform` and `transform`
            read the rows, and are always exact.
        mean_: (p,) float64, what transform subtracts from a row: the mean (to float32 rounding), the origin or zero.
        residual_: estimate of |A - A V^T V|_F for V = components_.
        residual_interval_: (low, high), the 95 % confidence interval of `residual_`.
        residual_bound_: |A - A V^T V|_F is at most this. Not an estimate.
        optimum_bound_: no k directions leave less than this. Not an estimate.
        n_components_, n_samples_seen_, n_features_in_: k, n and p.
        feature_names_in_: (p,) the columns' names, where the first rows were a table (a DataFrame of pandas or polars)
            whose columns are named by strings; tables that follow must have the same. Files of `save` do not keep them.
    """

    _parameters = ("n_components", "n_oversamples", "passes", "center", "origin", "seed", "num_threads", "device")

    def __init__(
        self,
        n_components: int | float,
        *,
        n_oversamples: int | None = None,
        passes: int = 1,
        center: bool = False,
        origin: NDArray[np.float32] | None = None,
        seed: int = 0,
        num_threads: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.n_components = n_components
        self.n_oversamples = n_oversamples
        self.passes = passes
        self.center = center
        self.origin = origin
        self.seed = seed
        self.num_threads = num_threads
        self.device = device
        self._fitted: FittedSketch | None = None  # may be a sketch without rows
        self._in_use = _core.InUse()

    def __sklearn_is_fitted__(self) -> bool:
        with turns("check_is_fitted", [self]):
            return self._seen() is not None

    def __getstate__(self) -> dict[str, Any]:
        """Return everything that `save` writes, and more, as arrays; pickle and copy call this."""
        with turns("pickle", [self]):
            state = self.__dict__ | {"_in_use": None, "_fitted": None}
            if (fitted := self._seen()) is not None:
                arrays, directions = fitted.arrays(), fitted.core.directions
                state["_fitted"] = (arrays, directions, fitted.parameters, fitted.factors, fitted.feature_names)
            return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_in_use": _core.InUse(), "_fitted": None})
        if state["_fitted"] is not None:
            arrays, directions, parameters, factors, names = state["_fitted"]
            self._fitted = FittedSketch.restore(
                parameters, arrays, owner=type(self).__name__, directions=directions if directions.size else None
            )
            self._fitted.factors, self._fitted.feature_names = factors, names

    # ---- rows in

    def fit(self, X: Rows, y: None = None) -> Self:
        """Forget all rows, then read those of X `passes` times. `y` is ignored; scikit-learn passes it.

        X (n, p) of real numbers: an array or a tensor in memory, a memory-mapped file, anything with `shape`, `dtype`
        and slices of rows, such as a Zarr array, or a table or list, which is first copied to an array. float32 arrays
        are read in place; the rest becomes float32 in blocks of 64 MB. After an error the previous fit is kept.

        Raises TypeError where X holds no numbers or is sparse; ValueError for another shape, complex numbers, or NaN or
        Inf, naming the row.
        """
        fit_together([(self, slice(None))], X)
        return self

    def fit_transform(self, X: Rows, y: None = None) -> NDArray[np.float32]:
        """Return `fit(X).transform(X)`, (n, k): the rows are read once more than `fit` reads them."""
        coordinates: NDArray[np.float32] = self.fit(X).transform(X)
        return coordinates

    @saying_nan()
    def partial_fit(self, X: Rows, y: None = None) -> Self:
        """Take the rows of X (n, p), any n >= 1, of the types that `fit` takes. `y` is ignored; scikit-learn passes it.

        Raises as `fit` does, and ValueError where the columns are not those of the first rows; then no row of X was
        taken. After Ctrl-C `n_samples_seen_` tells how many were.
        """
        with turns("partial_fit", [self]):
            rows = self._same_columns("partial_fit", X)
            blocks = list(row_blocks("partial_fit", rows, cuda_index=cuda_index("partial_fit", self.device)))
            self._fitted = fitted = self._ready("partial_fit", blocks[0].shape[1], column_names(X))
            check_rows([fitted.core], [slice(None)], blocks)
            for first_row, block in numbered(blocks):
                fitted.core.partial_fit(block, first_row=first_row, all_or_none=len(blocks) == 1)
        return self

    def merge(self, other: "StreamingSVD") -> Self:
        """Take everything that `other` has seen, as rows that come after those of this estimator.

        The result equals that of one run over all rows, within rounding, in whatever order sketches are merged. `other`
        does not change. Raises ValueError where the two differ in p or in a parameter that shapes the sketch.
        """
        if not isinstance(other, StreamingSVD):
            raise TypeError(f"merge: other must be a StreamingSVD, got {type(other).__name__}")
        with turns("merge", [self, other]):
            self._fitted = self._merged(other)
        return self

    # ---- rows out

    @saying_nan()
    def transform(self, X: Rows) -> Any:
        """Return coordinates (n, k) of the rows of X (n, p): (X - mean_) components_^T, summed in float64.

        Of an array on a device they are there too: as a torch tensor, or an array that speaks DLPack. After
        `set_output` they are a table. Raises as `partial_fit` does.
        """
        index = cuda_index("transform", self.device)
        factors = self._factors("transform")
        coordinates = factors.project(self._same_columns("transform", X), self._threads(), index)
        library = self._table_library()
        if library is not None:
            return table(library, coordinates, self.get_feature_names_out(), X)
        return where_it_was(X, coordinates, index)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Return the names (k,) of what `transform` returns: streamingsvd0, streamingsvd1, ...

        Raises ValueError where `input_features` are given and are not the p columns that were seen.
        """
        k = len(self._factors("get_feature_names_out").components)
        if input_features is not None:
            checked_names_in(input_features, getattr(self, "feature_names_in_", None), self.n_features_in_)
        return np.array([f"{type(self).__name__.lower()}{i}" for i in range(k)], dtype=object)

    def inverse_transform(self, X: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the rows (n, p) of coordinates X (n, k), X components_ + mean_."""
        factors = self._factors("inverse_transform")
        if np.ndim(X) != 2 or np.shape(X)[1] != len(factors.components):
            raise ValueError(
                f"inverse_transform: X must have shape (n, k) = (n, {len(factors.components)}), got {np.shape(X)}"
            )
        rows = np.asarray(X, dtype=np.float32) @ factors.components
        rows += factors.mean.astype(np.float32)
        return rows

    @property
    def components_(self) -> NDArray[np.float32]:
        return self._factors("components_").components

    @property
    def singular_values_(self) -> NDArray[np.float64]:
        return self._factors("singular_values_").singular_values

    @property
    def explained_variance_ratio_(self) -> NDArray[np.float64]:
        factors = self._factors("explained_variance_ratio_")
        return np.asarray(factors.singular_values**2 / (factors.energy or 1.0))

    @property
    def coordinates_(self) -> NDArray[np.float32]:
        with turns("coordinates_", [self]):
            return self._seen_rows("coordinates_").coordinates(self._threads())

    @property
    def mean_(self) -> NDArray[np.float64]:
        return self._factors("mean_").mean

    @property
    def residual_(self) -> float:
        return self._factors("residual_").residual

    @property
    def residual_interval_(self) -> tuple[float, float]:
        return self._factors("residual_interval_").residual_interval

    @property
    def residual_bound_(self) -> float:
        return self._factors("residual_bound_").residual_bound

    @property
    def optimum_bound_(self) -> float:
        return self._factors("optimum_bound_").optimum_bound

    @property
    def n_components_(self) -> int:
        return len(self._factors("n_components_").components)

    @property
    def n_samples_seen_(self) -> int:
        with turns("n_samples_seen_", [self]):
            return self._seen_rows("n_samples_seen_").core.num_rows()

    @property
    def n_features_in_(self) -> int:
        with turns("n_features_in_", [self]):
            return self._seen_rows("n_features_in_").core.num_features

    @property
    def feature_names_in_(self) -> NDArray[np.object_]:
        with turns("feature_names_in_", [self]):
            names = self._seen_rows("feature_names_in_").feature_names
        if names is None:
            raise AttributeError("feature_names_in_: the first rows had no names of columns")
        return names

    # ---- files

    def save(self, path: Path | str) -> None:
        """Write everything that was seen to a safetensors file, completely or not at all, for `load`."""
        if self.passes != 1:
            raise ValueError(f"save: a sketch of one pass can be saved, this one has passes={self.passes}")
        with turns("save", [self]):
            fitted = self._seen_rows("save")
            arrays = fitted.arrays()
        save_sketch(Path(path), arrays, fitted.parameters)

    @classmethod
    def load(cls, path: Path | str, num_threads: int | None = None, *, device: str = "cpu") -> Self:
        """Return the estimator in `path`, as it was saved.

        Raises FileNotFoundError, or RuntimeError where the file is damaged, of another version or of another kind.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"load: there is no file {path}")
        checked_threads(num_threads)
        cuda_index("load", device)

        def restored(parameters: dict[str, Any], arrays: dict[str, NDArray[Any]], kind: type[Self] = cls) -> Self:
            estimator = kind(**parameters, num_threads=num_threads, device=device)
            estimator._fitted = FittedSketch.restore(estimator.get_params(), arrays, owner=kind.__name__)
            return estimator

        return load_sketch(path, restored)

    # ---- the sketch

    def _threads(self) -> int:
        return checked_threads(self.num_threads)

    def _build(self, num_features: int, directions: NDArray[np.float32] | None = None) -> FittedSketch:
        """Return an empty sketch with the present parameters. Raises TypeError or ValueError for a wrong one."""
        owner = type(self).__name__
        return FittedSketch.build(self.get_params(), num_features, owner=owner, directions=directions)

    def _merged(self, other: "StreamingSVD") -> FittedSketch:
        """Return the merged sketch of the two estimators, neither of which changes."""
        if other is self:
            raise ValueError("merge: other must be another estimator, with rows of its own")
        theirs = other._seen_rows("merge")
        for name in ("n_components", "center"):
            ours_is, theirs_is = getattr(self, name), getattr(other, name)
            if ours_is != theirs_is:
                raise ValueError(f"merge: other must have {name} = {ours_is!r}, got {theirs_is!r}")
        if not self.center and not same_value(self.origin, other.origin):
            raise ValueError("merge: other must have the same origin")
        self._check_unchanged("merge")
        ours = self._seen()
        if ours is None:
            merged = self._build(theirs.core.num_features)
        else:
            merged = FittedSketch(ours.core.snapshot(settled=False), ours.parameters)
        names = (theirs if ours is None else ours).feature_names
        if names is not None and theirs.feature_names is not None and not np.array_equal(names, theirs.feature_names):
            raise ValueError("merge: other must have the same feature_names_in_")
        merged.feature_names = names
        if theirs.cuda_index != merged.cuda_index:  # brings what they have seen to our device
            theirs = FittedSketch.restore(merged.parameters, theirs.arrays(), owner=type(self).__name__)
        merged.core.merge(theirs.core)
        return merged

    def _same_columns(self, where: str, X: Any) -> Any:
        """Return X as a matrix. Raises ValueError where its columns are not those that were seen first."""
        rows, fitted = as_matrix(where, X), self._seen()
        if fitted is not None:
            shape, names = tuple(rows.shape), fitted.feature_names
            check_same_columns(where, type(self).__name__, X, shape, names, fitted.core.num_features)
        return rows

    def _ready(self, where: str, num_features: int, names: NDArray[np.object_] | None = None) -> FittedSketch:
        """Return the sketch that is to take rows of `num_features` columns: the present one, or an empty one."""
        if self.passes != 1:
            raise ValueError(f"{where}: passes must be 1, since rows come once, got {self.passes!r}; use fit")
        self._check_unchanged(where)
        fitted = self._seen()
        if fitted is None:
            fitted = self._build(num_features)
            fitted.feature_names = names
        return fitted

    def _check_unchanged(self, where: str) -> None:
        fitted = self._seen()
        for name, value in fitted.parameters.items() if fitted else ():
            if not same_value(getattr(self, name), value):
                raise ValueError(
                    f"{where}: {name} was {value!r} when the first row came and is {getattr(self, name)!r} now; "
                    "fit starts anew"
                )

    def _seen(self) -> FittedSketch | None:
        return self._fitted if self._fitted is not None and self._fitted.core.num_rows() > 0 else None

    def _seen_rows(self, where: str) -> FittedSketch:
        fitted = self._seen()
        if fitted is None:
            raise NotFittedError(f"{where}: this {type(self).__name__} has seen no rows; call fit or partial_fit first")
        return fitted

    def _factors(self, where: str) -> Factors:
        with turns(where, [self]):
            return self._seen_rows(where).read(self._threads())
