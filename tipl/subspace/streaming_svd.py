"""Temporal SVD: the leading directions of rows that come in blocks and are never all in memory.

Shapes  n rows seen, p columns, k = n_components, l = k + n_oversamples range directions.

`csrc/svd.h` has the sketch of the rows, `tipl/subspace/sketch_svd.py` how directions and errors follow from it.
"""

import copy
import dataclasses
import json
import mmap
import operator
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol, Self

import google_crc32c
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from tipl import _core
from tipl.files.locations import write_atomically
from tipl.files.sealed import sorted_metadata
from tipl.subspace.sketch_svd import SHARE_COMPONENTS, TEST_DIRECTIONS, Factors, factors_of, leading_directions

_PARAMETERS = ("n_components", "n_oversamples", "passes", "center", "origin", "seed", "num_threads")

_BLOCK_BYTES = 64 << 20  # of float32 rows that are converted, or asked for from disk, at once

_AHEAD_BYTES = 128 << 20  # that are asked for from disk before their turn

_SKETCH_ROWS = 256  # of a block in csrc/svd.h; also what groups of columns take in turn, so that caches still hold them

_FORMAT, _VERSION = "tipl.StreamingSVD", "1"


class Rows(Protocol):
    """What a matrix is read from: an array, a tensor, a memory-mapped file, a store's array."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...
    def __getitem__(self, rows: slice, /) -> Any: ...


class NotFittedError(ValueError, AttributeError):
    """What an estimator that has seen no rows cannot answer."""


@dataclasses.dataclass
class _Fitted:
    """What an estimator has seen, and what was last read from it."""

    core: _core.RowSketch
    built_with: dict[str, Any]  # the parameters then
    factors: tuple[int, Factors] | None = None  # and of how many rows


class StreamingSVD:
    """The k leading right singular vectors of a matrix A whose rows come in blocks.

    A scikit-learn estimator by its conventions (it works in a Pipeline, with clone and with get_params), without
    depending on scikit-learn. `fit` reads its rows `passes` times; `partial_fit` takes rows as they come, once.
    Memory: 8 (l + 9) p bytes whatever the number of rows, and 4 l bytes a row for `coordinates_`.

    Results have the same bits for any chunking of the rows (a `fit` that more rows follow counts for itself) and any
    number of threads, and are equal within rounding for any order of the rows and of merging. Reading in between
    changes nothing. Sums are float32 where rows are many: rows whose norm is above 1e15 are refused, and where the
    entries are below 1e-18 (root mean square) all singular values count as zero, which a RuntimeWarning says.

    Threads may share an estimator: a call waits for another one that fits, merges, saves or reads. A signal handler
    inside such a call, and a forked child if the call was another thread's, get a RuntimeError instead. Pickles and
    copies hold all that was seen.

    What one pass loses: singular values are found from their squares in float32 sums, which resolves about 3e-4 of the
    largest, and the directions of a spectrum that decays slowly come out mixed with others of nearly their strength.
    `residual_` tells how well they do. n_oversamples helps, and a second pass makes it near-exact.

    Parameters:
        n_components: k; or a share in (0, 1), for the fewest (up to 128) that explain this share of |A|_F^2.
        n_oversamples: further directions carried along. None: as many as n_components, at least 16.
        passes: of `fit` over its rows.
        center: about the mean of all rows, as principal component analysis.
        origin: a row (p,) that is taken off every row. With `center` it only serves the numbers: rows far from zero and
            close to one another lose nothing if it lies among them. None: zero, and with `center` one of the first 256
            rows, in their midst.
        seed: of the random directions.
        num_threads: None for all cores of this process.

    Attributes, after the first row (A: the rows less the origin, or about their mean):
        components_: (k, p) float32, orthonormal rows, each one's largest entry in magnitude positive. Where A has fewer
            than k directions above rounding the last ones are random.
        singular_values_: (k,) float64, descending, never above the true ones but for rounding; 0 for those last ones.
        explained_variance_ratio_: (k,) their squares over |A|_F^2.
        coordinates_: (n, k) float32, of all rows seen, in order, without looking at the rows again: as far as the
            sketch knows them, and so the less exact the more the directions come out mixed (see above). Of up to 256
            rows they are exact. `fit_transform` and `transform` look at the rows, and are exact always.
        mean_: (p,) float64, what transform takes off a row: the mean (to float32 rounding), the origin or zero.
        residual_: estimate of |A - A V^T V|_F for V = components_.
        residual_interval_: (low, high), 95 % of `residual_`'s uncertainty.
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
    ) -> None:
        self.n_components = n_components
        self.n_oversamples = n_oversamples
        self.passes = passes
        self.center = center
        self.origin = origin
        self.seed = seed
        self.num_threads = num_threads
        self._fitted: _Fitted | None = None  # may hold no row yet
        self._in_use = _core.InUse()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"

    def __sklearn_is_fitted__(self) -> bool:
        with _turns("check_is_fitted", [self]):
            return self._seen() is not None

    def __getstate__(self) -> dict[str, Any]:
        """Return all that `save` writes, and more, as arrays; pickle and copy call this."""
        with _turns("pickle", [self]):
            state = self.__dict__ | {"_in_use": None, "_fitted": None}
            if (fitted := self._seen()) is not None:
                state["_fitted"] = (_arrays_of(fitted.core), fitted.core.directions, fitted.built_with, fitted.factors)
            return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_in_use": _core.InUse(), "_fitted": None})
        if state["_fitted"] is not None:
            arrays, directions, built_with, factors = state["_fitted"]
            as_it_was = StreamingSVD(**built_with)
            self._fitted = as_it_was._restored(arrays, directions if directions.size else None)
            self._fitted.factors = factors

    def __sklearn_tags__(self) -> Any:
        """Return what scikit-learn wants to know; only scikit-learn calls this."""
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
        """Set constructor arguments; they hold from the next `fit` on. Raises ValueError for an unknown one."""
        for name in params:
            if name not in _PARAMETERS:
                raise ValueError(f"set_params: parameters are {', '.join(_PARAMETERS)}, got {name!r}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    # ---- rows in

    def fit(self, X: Rows, y: None = None) -> Self:
        """Forget all rows, then read those of X `passes` times. `y` is scikit-learn's, and unused.

        X (n, p) of float32, float64, float16 or bfloat16: an array or a tensor in memory, a memory-mapped file, or
        anything with `shape` and slices of rows, such as a Zarr array. float32 is read where it lies; the rest becomes
        float32 in blocks of 64 MB. Where X holds NaN or Inf the error names the row, and what was fitted before stays.
        """
        fit_together([(self, slice(None))], X)
        return self

    def fit_transform(self, X: Rows, y: None = None) -> NDArray[np.float32]:
        """Return `fit(X).transform(X)`, (n, k): the rows are read once more than `fit` reads them."""
        return self.fit(X).transform(X)

    def partial_fit(self, X: Rows, y: None = None) -> Self:
        """Take the rows of X (n, p), any n >= 1, of the types that `fit` takes. `y` is scikit-learn's, and unused.

        Raises TypeError for another dtype, and ValueError for another shape or for NaN or Inf, naming the row; then no
        row of X was taken. After Ctrl-C `n_samples_seen_` tells how many were.
        """
        with _turns("partial_fit", [self]):
            blocks = list(_blocks("partial_fit", X))
            self._fitted = fitted = self._ready("partial_fit", blocks[0].shape[1])
            _check_rows([fitted.core], [slice(None)], blocks)
            for first_row, block in _numbered(blocks):
                fitted.core.partial_fit(block, first_row=first_row, all_or_none=len(blocks) == 1)
        return self

    def merge(self, other: "StreamingSVD") -> Self:
        """Take all that `other` has seen: rows that this estimator has not, which come behind its own.

        The result is that of one run over all rows, within rounding, in whatever order sketches are merged. `other`
        stays as it is. Raises ValueError where the two differ in p or in a parameter that shapes the sketch.
        """
        if not isinstance(other, StreamingSVD):
            raise TypeError(f"merge: other must be a StreamingSVD, got {type(other).__name__}")
        with _turns("merge", [self, other]):
            self._fitted = self._merged(other)
        return self

    # ---- rows out

    def transform(self, X: Rows) -> NDArray[np.float32]:
        """Return coordinates (n, k) of the rows of X (n, p): (X - mean_) components_^T, summed in float64."""
        return _projected(self._factors("transform"), X, self._threads())

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
        with _turns("coordinates_", [self]):
            return self._coordinates()

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
        with _turns("n_samples_seen_", [self]):
            return self._seen_rows("n_samples_seen_").core.num_rows()

    @property
    def n_features_in_(self) -> int:
        with _turns("n_features_in_", [self]):
            return self._seen_rows("n_features_in_").core.num_features

    # ---- files

    def save(self, path: Path | str) -> None:
        """Write all that was seen to a safetensors file, whole or not at all; `load` goes on from it."""
        if self.passes != 1:
            raise ValueError(f"save: a sketch of one pass can be saved, this one has passes={self.passes}")
        with _turns("save", [self]):
            fitted = self._seen_rows("save")
            arrays = _arrays_of(fitted.core)
        params = {name: value for name, value in fitted.built_with.items() if name not in ("origin", "num_threads")}
        params["own_origin"] = fitted.built_with["origin"] is not None
        described = json.dumps(params, default=operator.index)  # integers may be NumPy's
        metadata = {"format": _FORMAT, "version": _VERSION, "params": described, "crc32c": _checksum(described, arrays)}
        write_atomically(Path(path), sorted_metadata(safetensors.numpy.save(arrays, metadata)))

    @classmethod
    def load(cls, path: Path | str, num_threads: int | None = None) -> Self:
        """Return the estimator in `path`, as it was saved.

        Raises FileNotFoundError, or RuntimeError where the file is damaged, of another version or no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"load: there is no file {path}")
        _threads(num_threads)
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in list(file.keys())}
            if metadata.get("format") != _FORMAT:
                raise RuntimeError(f"load: {path} holds no StreamingSVD")
            if metadata.get("version") != _VERSION:
                raise RuntimeError(f"load: {path} has version {metadata.get('version')}, this tipl reads {_VERSION}")
            if metadata["crc32c"] != _checksum(metadata["params"], arrays):
                raise ValueError("it fails its checksum")
            params = json.loads(metadata["params"])
            own_origin = params.pop("own_origin")
            origin = arrays["origin"] if own_origin else None
            estimator = cls(**params, origin=origin, num_threads=num_threads)
            if not all(np.isfinite(array).all() for array in arrays.values()):
                raise ValueError("its values must be finite")
            if arrays["squares"][0] < 0 or arrays["gram"][-1, -1] != len(arrays["range_rows"]):
                raise ValueError("its sums are not those of its rows")
            fitted = estimator._restored(arrays)
        except (safetensors.SafetensorError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise RuntimeError(f"load: {path} is damaged: {error}") from error
        estimator._fitted = fitted
        return estimator

    # ---- the sketch

    def _threads(self) -> int:
        return _threads(self.num_threads)

    def _build(
        self,
        num_features: int,
        *,
        origin: NDArray[np.float32] | None = None,
        directions: NDArray[np.float32] | None = None,
    ) -> _Fitted:
        """Return an empty sketch with the present parameters. Raises TypeError or ValueError for a wrong one.

        `origin` is one that `center` has chosen before; now and without it one is chosen again.
        """
        where = type(self).__name__
        if not isinstance(self.center, bool):
            raise TypeError(f"{where}: center must be a bool, got {self.center!r}")
        seed = _integer("seed", self.seed)
        if not 0 <= seed < 2**64:
            raise ValueError(f"{where}: seed must lie in [0, 2**64), got {seed}")
        if _integer("passes", self.passes) < 1:
            raise ValueError(f"{where}: passes must be >= 1, got {self.passes}")
        if isinstance(self.n_components, float):
            if not 0.0 < self.n_components < 1.0:
                raise ValueError(
                    f"{where}: n_components must be an integer, or a share of the energy in (0, 1), got "
                    f"{self.n_components}"
                )
            most = min(SHARE_COMPONENTS, num_features)
        else:
            most = _integer("n_components", self.n_components)
            if not 1 <= most <= num_features:
                raise ValueError(f"{where}: n_components must lie in [1, p] = [1, {num_features}], got {most}")
        oversamples = max(most, 16) if self.n_oversamples is None else _integer("n_oversamples", self.n_oversamples)
        if oversamples < 0:
            raise ValueError(f"{where}: n_oversamples must be >= 0, got {oversamples}")
        range_size = min(most + oversamples, num_features)
        if self.origin is not None:
            origin = np.ascontiguousarray(self.origin)
            if origin.dtype != np.float32 or origin.shape != (num_features,):
                raise ValueError(
                    f"{where}: origin must be float32 of shape (p,) = ({num_features},), got {origin.dtype} of shape "
                    f"{origin.shape}"
                )
        core = _core.RowSketch(
            num_features=num_features,
            range_size=range_size if directions is None else len(directions),
            test_size=TEST_DIRECTIONS if directions is None and range_size < num_features else 0,
            seed=seed,
            num_threads=self._threads(),
            origin=origin,
            directions=directions,
            choose_origin=self.center and origin is None,
        )
        return _Fitted(core, self.get_params())

    def _restored(self, arrays: dict[str, NDArray[Any]], directions: NDArray[np.float32] | None = None) -> _Fitted:
        """Return the sketch of these parameters that `_arrays_of` took the arrays from."""
        origin = arrays["origin"] if arrays["origin"].size else None
        fitted = self._build(arrays["co_range"].shape[1], origin=origin, directions=directions)
        fitted.core.restore(
            co_range=arrays["co_range"],
            gram=arrays["gram"],
            squares=float(arrays["squares"][0]),
            range_rows=arrays["range_rows"],
            pending=arrays["pending"],
        )
        return fitted

    def _merged(self, other: "StreamingSVD") -> _Fitted:
        """Return what `merge` makes of the two, which both stay as they are."""
        if other is self:
            raise ValueError("merge: other must be another estimator, with rows of its own")
        theirs = other._seen_rows("merge")
        for name in ("n_components", "center"):
            ours_is, theirs_is = getattr(self, name), getattr(other, name)
            if ours_is != theirs_is:
                raise ValueError(f"merge: other must have {name} = {ours_is!r}, got {theirs_is!r}")
        if not self.center and not _same(self.origin, other.origin):
            raise ValueError("merge: other must have the same origin")
        self._check_unchanged("merge")
        ours = self._seen()
        if ours is None:
            merged = self._build(theirs.core.num_features)
        else:
            merged = _Fitted(ours.core.snapshot(settled=False), ours.built_with)
        merged.core.merge(theirs.core)
        return merged

    def _ready(self, where: str, num_features: int) -> _Fitted:
        """Return what is to take rows of so many columns as they come: what was seen, or an empty sketch."""
        if self.passes != 1:
            raise ValueError(f"{where}: passes must be 1, since rows come once, got {self.passes!r}; use fit")
        self._check_unchanged(where)
        return self._seen() or self._build(num_features)

    def _next_directions(self, core: _core.RowSketch) -> NDArray[np.float32]:
        return leading_directions(core, self.n_components, self.center, self.seed, self._threads())

    def _check_unchanged(self, where: str) -> None:
        fitted = self._seen()
        for name, value in fitted.built_with.items() if fitted else ():
            if not _same(getattr(self, name), value):
                raise ValueError(
                    f"{where}: {name} was {value!r} when the first row came and is {getattr(self, name)!r} now; "
                    "fit starts anew"
                )

    def _seen(self) -> _Fitted | None:
        return self._fitted if self._fitted is not None and self._fitted.core.num_rows() > 0 else None

    def _seen_rows(self, where: str) -> _Fitted:
        fitted = self._seen()
        if fitted is None:
            raise NotFittedError(f"{where}: this {type(self).__name__} has seen no rows; call fit or partial_fit first")
        return fitted

    def _factors(self, where: str) -> Factors:
        with _turns(where, [self]):
            return self._read(self._seen_rows(where))

    def _coordinates(self) -> NDArray[np.float32]:
        fitted = self._seen_rows("coordinates_")
        factors = self._read(fitted)
        if factors.coordinates is not None:
            return factors.coordinates.astype(np.float32)
        mixed = fitted.core.range_rows() @ factors.mixing[:-1] + factors.mixing[-1]
        return np.asarray(mixed, dtype=np.float32)

    def _read(self, fitted: _Fitted) -> Factors:
        rows = fitted.core.num_rows()
        if fitted.factors is None or fitted.factors[0] != rows:
            built = fitted.built_with
            factors = factors_of(fitted.core, built["n_components"], built["center"], built["seed"], self._threads())
            fitted.factors = (rows, factors)
        return fitted.factors[1]


class GroupedSVD:
    """One `StreamingSVD` for each group of columns, such as the layers of a policy, in one pass over the rows.

    Parameters:
        groups: the columns [start, stop) of each group, by name.
        n_components: of every group, or a share of its energy; a group of fewer columns has as many as columns.
        params: the other arguments of `StreamingSVD`, but for `origin`.

    `estimators_` holds each group's StreamingSVD by its name. Errors name rows and columns within the group. Threads,
    pickles and copies are as those of `StreamingSVD`.
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
        return copy.deepcopy(self)  # with estimators of its own, so that rows go to one of the two

    def fit(self, X: Rows, y: None = None) -> Self:
        """Forget all rows, then read those of X (n, p) once a pass, for all groups together."""
        self._check_columns("fit", X)
        fit_together([(self.estimators_[name], slice(*ends)) for name, ends in self.groups.items()], X)
        return self

    def partial_fit(self, X: Rows, y: None = None) -> Self:
        """Take the rows of X (n, p). Raises as `StreamingSVD.partial_fit` does; then no group took any.

        After Ctrl-C all groups have taken equally many.
        """
        self._check_columns("partial_fit", X)
        estimators, columns = list(self.estimators_.values()), [slice(*ends) for ends in self.groups.values()]
        with _turns("partial_fit", estimators):
            blocks = list(_blocks("partial_fit", X))
            fitted = [
                estimator._ready("partial_fit", stop - start)
                for estimator, (start, stop) in zip(estimators, self.groups.values(), strict=True)
            ]
            cores, starts = [each.core for each in fitted], [start for start, _ in self.groups.values()]
            for first_row, block in _numbered(blocks):  # names the column of X, and looks at those of no group
                _core.check_finite("partial_fit", block, _core.available_cpus(), first_row)
            _check_rows(cores, columns, blocks)
            _set_fitted(estimators, fitted)
            for first_row, block in _numbered(blocks):
                _core.partial_fit_together(cores, starts, block, first_row=first_row, all_or_none=len(blocks) == 1)
        return self

    def merge(self, other: "GroupedSVD") -> Self:
        """Take all that `other`, with the same groups, has seen: every group, or none."""
        if not isinstance(other, GroupedSVD):
            raise TypeError(f"merge: other must be a GroupedSVD, got {type(other).__name__}")
        if self.groups != other.groups:
            raise ValueError(f"merge: other must have the groups {self.groups}, got {other.groups}")
        estimators, theirs = list(self.estimators_.values()), list(other.estimators_.values())
        with _turns("merge", estimators + theirs):
            _set_fitted(estimators, [ours._merged(other) for ours, other in zip(estimators, theirs, strict=True)])
        return self

    def transform(self, X: Rows) -> NDArray[np.float32]:
        """Return coordinates (n, sum of all k) of the rows of X (n, p), group after group."""
        self._check_columns("transform", X)
        estimators, columns = list(self.estimators_.values()), [slice(*ends) for ends in self.groups.values()]
        with _turns("transform", estimators):
            factors = [estimator._read(estimator._seen_rows("transform")) for estimator in estimators]
        threads = estimators[0]._threads()
        return np.concatenate(
            [
                np.concatenate(
                    [_projected(of, block[:, which], threads) for of, which in zip(factors, columns, strict=True)],
                    axis=1,
                )
                for block in _blocks("transform", X)
            ]
        )

    @property
    def coordinates_(self) -> NDArray[np.float32]:
        """Those of all rows seen, (n, sum of all k), group after group, as `StreamingSVD.coordinates_`."""
        estimators = list(self.estimators_.values())
        with _turns("coordinates_", estimators):
            return np.concatenate([estimator._coordinates() for estimator in estimators], axis=1)

    def _check_columns(self, where: str, X: Rows) -> None:
        needed, shape = max(stop for _, stop in self.groups.values()), np.shape(X)
        if len(shape) != 2 or shape[1] < needed:
            raise ValueError(f"{where}: X must have shape (n, p) with p >= {needed} for these groups, got {shape}")


class RunningGram:
    """The Gram matrix of a short trial's rows, exact in float64, row by row as they come.

    Keeps the rows: 4 p bytes each. `append` costs 2 T p flops for each new row at T rows, and the whole of a trial as
    much as `gram` of it.
    """

    def __init__(self, *, origin: NDArray[np.float32] | None = None, num_threads: int | None = None) -> None:
        self.origin = origin
        self.num_threads = num_threads
        self._in_use = _core.InUse()
        self._blocks: tuple[NDArray[np.float32], ...] = ()
        self._gram = np.zeros((0, 0))

    def append(self, X: NDArray[np.float32]) -> Self:
        """Take the rows of X, (n, p) or one row (p,), C-contiguous float32. Raises as `gram` does; takes none then."""
        rows = np.array(X, ndmin=2, copy=True, subok=False)
        threads = _threads(self.num_threads)
        with _core.Turn([self._in_use], "append", "the Gram matrix"):
            own = gram(rows, self.origin, threads)  # checks them
            across = [_core.products("append", block, rows, self.origin, threads) for block in self._blocks]
            old, new = len(self._gram), len(rows)
            grown = np.empty((old + new, old + new))
            grown[:old, :old], grown[old:, old:] = self._gram, own
            if across:
                grown[:old, old:] = np.concatenate(across)
                grown[old:, :old] = grown[:old, old:].T
            self._blocks, self._gram = (*self._blocks, rows), grown
        return self

    @property
    def gram(self) -> NDArray[np.float64]:
        """D D^T (T, T) of the T rows so far, D = rows - origin."""
        return self._gram


def gram(
    X: NDArray[np.float32], origin: NDArray[np.float32] | None = None, num_threads: int | None = None
) -> NDArray[np.float64]:
    """Return D D^T (T, T), D = X - origin, for rows X (T, p) and an optional row `origin` (p,), contiguous float32.

    Differences, products and sums are float64, so that rows close to the origin lose nothing. Same bits for any
    num_threads (None: all cores). Raises TypeError for another dtype, ValueError for another shape or for NaN or Inf.
    """
    return _core.products("gram", X, None, origin, _threads(num_threads))


# ---- reading rows


def fit_together(parts: Sequence[tuple[StreamingSVD, slice]], X: Rows) -> None:
    """Fit each estimator to its columns of X, reading X as often as the one with the most passes asks."""
    estimators = [estimator for estimator, _ in parts]
    max_rows = None if all(columns == slice(None) for _, columns in parts) else _SKETCH_ROWS
    with _turns("fit", estimators):
        fresh = [type(estimator)(**estimator.get_params()) for estimator in estimators]
        for number in range(max([1] + [_integer("passes", estimator.passes) for estimator in fresh])):
            # Those that this pass is for, each with the directions that the pass before has found.
            directions = {
                i: None if estimator._fitted is None else estimator._next_directions(estimator._fitted.core)
                for i, estimator in enumerate(fresh)
                if number == 0 or (number < estimator.passes and not _is_exact(estimator._seen_rows("fit").core))
            }
            now: dict[int, _Fitted] = {}
            blocks = _blocks("fit", X, max_rows=max_rows, read_ahead=True) if directions else ()
            for first_row, block in _numbered(blocks):
                for i in directions:
                    rows = block[:, parts[i][1]]
                    if i not in now:
                        now[i] = fresh[i]._build(rows.shape[1], directions=directions[i])
                    now[i].core.partial_fit(rows, first_row=first_row, all_or_none=False)
            for i, fitted in now.items():
                fitted.core.settle()
                fresh[i]._fitted = fitted
        _set_fitted(estimators, [estimator._fitted for estimator in fresh])


def _turns(where: str, estimators: Sequence[StreamingSVD]) -> _core.Turn:
    """Return a context in which a call has the estimators to itself."""
    return _core.Turn([estimator._in_use for estimator in estimators], where, "the estimator")


def _set_fitted(estimators: Sequence[StreamingSVD], fitted: Sequence[_Fitted | None]) -> None:
    # In one step of the interpreter: no signal handler raises when only some are set.
    deque(map(setattr, estimators, repeat("_fitted"), fitted), maxlen=0)


def _check_rows(
    cores: Sequence[_core.RowSketch], columns: Sequence[slice], blocks: Sequence[NDArray[np.float32]]
) -> None:
    """Raise ValueError where a sketch cannot take its columns of all blocks; one block is checked as it is taken."""
    for core, which in zip(cores, columns, strict=True) if len(blocks) > 1 else ():
        before = 0.0
        for first_row, block in _numbered(blocks):
            before = core.check_rows(block[:, which], first_row, before)


def _projected(factors: Factors, X: Rows, threads: int) -> NDArray[np.float32]:
    taken_off = factors.components.astype(np.float64) @ factors.mean
    parts = [
        _core.products("transform", block, factors.components, None, threads, first_row) - taken_off
        for first_row, block in _numbered(_blocks("transform", X, factors.components.shape[1]))
    ]
    return np.concatenate(parts).astype(np.float32)


def _arrays_of(core: _core.RowSketch) -> dict[str, NDArray[Any]]:
    """Return all that a sketch has seen."""
    seen = core.snapshot(settled=False)
    return {
        "co_range": seen.co_range,
        "gram": seen.gram,
        "squares": np.array([seen.squares]),
        "range_rows": seen.range_rows()[: seen.num_rows() - len(seen.pending)],
        "pending": seen.pending,
        "origin": seen.origin,
    }


def _is_exact(core: _core.RowSketch) -> bool:
    return core.exact or core.range_size == core.num_features


def _blocks(
    where: str, X: Rows, columns: int | None = None, max_rows: int | None = None, read_ahead: bool = False
) -> Iterator[NDArray[np.float32]]:
    """Yield the rows of X in order, as float32 blocks of contiguous rows; float32 memory as it lies.

    `read_ahead`: blocks of a memory-mapped file are read from disk before their turn.
    """
    shape = tuple(getattr(X, "shape", ()))
    if not shape or not hasattr(X, "dtype") or isinstance(X, np.ma.MaskedArray):
        raise TypeError(f"{where}: X must be an array of rows, got {type(X).__name__}")
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 1 or (columns is not None and shape[1] != columns):
        expected = "(n, p)" if columns is None else f"(n, p) = (n, {columns})"
        raise ValueError(f"{where}: X must have shape {expected}, at least one row and one column, got {shape}")
    as_it_lies = isinstance(X, np.ndarray) and X.dtype == np.float32 and _rows_are_contiguous(X)
    reader = _core.ReadAhead(X) if read_ahead and isinstance(X, np.ndarray) and _is_mapped_file(X) else None
    most = shape[0] if as_it_lies and reader is None else max(1, _BLOCK_BYTES // (4 * shape[1]))
    if as_it_lies and reader is not None:  # whole blocks of the sketch, which would copy the rows of others
        most = -(-most // (2 * _SKETCH_ROWS)) * 2 * _SKETCH_ROWS
    step = most if max_rows is None else min(most, max_rows)
    row_bytes = X.dtype.itemsize * shape[1]
    for start in range(0, shape[0], step):
        if reader is not None:
            reader.want((start + step) * row_bytes + _AHEAD_BYTES)
        block = X[start : start + step]
        yield block if as_it_lies else _as_float32(where, block)


def _numbered(blocks: Iterable[NDArray[np.float32]]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield each block and the number of its first row."""
    first_row = 0
    for block in blocks:
        yield first_row, block
        first_row += len(block)


def _is_mapped_file(X: NDArray[Any]) -> bool:
    """Return whether X lies in a memory-mapped file, row after row."""
    base: Any = X
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap.mmap) and X.flags.c_contiguous


def _rows_are_contiguous(X: NDArray[Any]) -> bool:
    size = X.itemsize
    return X.flags.aligned and (X.shape[1] == 1 or X.strides[1] == size) and X.strides[0] % size == 0


def _as_float32(where: str, block: Any) -> NDArray[np.float32]:
    tensor = hasattr(block, "detach")  # of torch, whose bfloat16 NumPy does not know
    block = block if tensor else np.asarray(block)
    name = str(block.dtype).removeprefix("torch.") if tensor else block.dtype.name
    if name not in ("float16", "bfloat16", "float32", "float64"):
        raise TypeError(f"{where}: X must be float32, float64, float16 or bfloat16, got {name}")
    if tensor:
        block = block.detach().float().cpu().numpy()
    with np.errstate(over="ignore"):  # what is too large becomes Inf, which is refused with its row
        return np.require(block.astype(np.float32, copy=False), requirements=["C", "ALIGNED"])


def _checksum(described: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    checksum = google_crc32c.value(described.encode())
    for name in sorted(arrays):
        checksum = google_crc32c.extend(checksum, np.ascontiguousarray(arrays[name]).tobytes())
    return f"{checksum:08x}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return a is b or (a is not None and b is not None and np.array_equal(a, b))
    return bool(a == b)


def _threads(num_threads: int | None) -> int:
    threads = _core.available_cpus() if num_threads is None else _integer("num_threads", num_threads)
    if not 1 <= threads <= 1024:
        raise ValueError(f"num_threads must lie in [1, 1024], got {threads}")
    return threads


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
