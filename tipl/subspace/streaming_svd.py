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
from tipl.subspace.joint_calls import check_rows, fit_together, turns
from tipl.subspace.parameters import checked_threads, same_value
from tipl.subspace.row_blocks import Rows, numbered, row_blocks, where_it_was
from tipl.subspace.saved_sketch import load_sketch, save_sketch
from tipl.subspace.sketch_svd import Factors

_PARAMETERS = ("n_components", "n_oversamples", "passes", "center", "origin", "seed", "num_threads", "device")


class NotFittedError(ValueError, AttributeError):
    """Raised where an estimator that has seen no rows is asked for a result."""


class StreamingSVD:
    """The k leading right singular vectors of a matrix A whose rows come in blocks.

    Follows the conventions of scikit-learn's estimators (it works in a Pipeline, with clone and with get_params)
    without depending on scikit-learn. `fit` reads its rows `passes` times; `partial_fit` takes rows as they come, once.
    Memory: 8 (l + 9) p bytes whatever the number of rows, and 4 l bytes for each row, for `coordinates_`.

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
    """

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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"

    def __sklearn_is_fitted__(self) -> bool:
        with turns("check_is_fitted", [self]):
            return self._seen() is not None

    def __getstate__(self) -> dict[str, Any]:
        """Return everything that `save` writes, and more, as arrays; pickle and copy call this."""
        with turns("pickle", [self]):
            state = self.__dict__ | {"_in_use": None, "_fitted": None}
            if (fitted := self._seen()) is not None:
                state["_fitted"] = (fitted.arrays(), fitted.core.directions, fitted.parameters, fitted.factors)
            return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_in_use": _core.InUse(), "_fitted": None})
        if state["_fitted"] is not None:
            arrays, directions, parameters, factors = state["_fitted"]
            self._fitted = FittedSketch.restore(
                parameters, arrays, owner=type(self).__name__, directions=directions if directions.size else None
            )
            self._fitted.factors = factors

    def __sklearn_tags__(self) -> Any:
        """Return scikit-learn's tags; only scikit-learn calls this."""
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type="transformer",
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(),
            input_tags=InputTags(),
        )

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the constructor's arguments. `deep` is scikit-learn's: no parameter here is an estimator."""
        return {name: getattr(self, name) for name in _PARAMETERS}

    def set_params(self, **params: Any) -> Self:
        """Set constructor arguments, for the next `fit`. Raises ValueError for an unknown one."""
        for name in params:
            if name not in _PARAMETERS:
                raise ValueError(f"set_params: parameters are {', '.join(_PARAMETERS)}, got {name!r}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    # ---- rows in

    def fit(self, X: Rows, y: None = None) -> Self:
        """Forget all rows, then read those of X `passes` times. `y` is ignored; scikit-learn passes it.

        X (n, p) of float32, float64, float16 or bfloat16: an array or a tensor in memory, a memory-mapped file, or
        anything with `shape` and slices of rows, such as a Zarr array. float32 arrays are read in place; the rest
        becomes float32 in blocks of 64 MB. Where X holds NaN or Inf the error names the row, and the previous fit is
        kept.
        """
        fit_together([(self, slice(None))], X)
        return self

    def fit_transform(self, X: Rows, y: None = None) -> NDArray[np.float32]:
        """Return `fit(X).transform(X)`, (n, k): the rows are read once more than `fit` reads them."""
        coordinates: NDArray[np.float32] = self.fit(X).transform(X)
        return coordinates

    def partial_fit(self, X: Rows, y: None = None) -> Self:
        """Take the rows of X (n, p), any n >= 1, of the types that `fit` takes. `y` is ignored; scikit-learn passes it.

        Raises TypeError for another dtype, and ValueError for another shape or for NaN or Inf, naming the row; then no
        row of X was taken. After Ctrl-C `n_samples_seen_` tells how many were.
        """
        with turns("partial_fit", [self]):
            blocks = list(row_blocks("partial_fit", X, cuda_index=cuda_index("partial_fit", self.device)))
            self._fitted = fitted = self._ready("partial_fit", blocks[0].shape[1])
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

    def transform(self, X: Rows) -> Any:
        """Return coordinates (n, k) of the rows of X (n, p): (X - mean_) components_^T, summed in float64.

        Of an array on a device they are there too: as a torch tensor, or an array that speaks DLPack.
        """
        index = cuda_index("transform", self.device)
        coordinates = self._factors("transform").project(X, self._threads(), index)
        return where_it_was(X, coordinates, index)

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
        if theirs.cuda_index != merged.cuda_index:  # brings what they have seen to our device
            theirs = FittedSketch.restore(merged.parameters, theirs.arrays(), owner=type(self).__name__)
        merged.core.merge(theirs.core)
        return merged

    def _ready(self, where: str, num_features: int) -> FittedSketch:
        """Return the sketch that is to take rows of `num_features` columns: the present one, or an empty one."""
        if self.passes != 1:
            raise ValueError(f"{where}: passes must be 1, since rows come once, got {self.passes!r}; use fit")
        self._check_unchanged(where)
        return self._seen() or self._build(num_features)

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
