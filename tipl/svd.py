"""Temporal SVD: the leading directions of rows that come in blocks and are never all in memory.

Shapes  n rows seen, p columns, k = n_components, l = k + n_oversamples range directions.

`csrc/svd.h` has the sketch of the rows, `tipl/factors.py` how directions and errors follow from it.
"""

import json
import mmap
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import google_crc32c
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from tipl import _core
from tipl.factors import SHARE_COMPONENTS, TEST_DIRECTIONS, Factors, factors_of, leading_directions
from tipl.locations import write_atomically

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


class StreamingSVD:
    """The k leading right singular vectors of a matrix A whose rows come in blocks.

    A scikit-learn estimator by its conventions (it works in a Pipeline, with clone and with get_params), without
    depending on scikit-learn. `fit` reads its rows `passes` times; `partial_fit` takes rows as they come, once.
    Memory: 8 (l + 9) p bytes whatever the number of rows, and 4 l bytes a row for `coordinates_`.

    Results have the same bits for any chunking of the rows (a `fit` that more rows follow counts for itself) and any
    number of threads, and are equal within rounding for any order of the rows and of merging. Reading in between
    changes nothing. Sums are float32 where rows are many: values below 1e-15 in magnitude may count as zero, and rows
    whose norm is above 1e15 are refused.

    What one pass loses: singular values are found from their squares in float32 sums, which resolves about 3e-4 of the
    largest, and the directions of a spectrum that decays slowly come out mixed with others of nearly their strength.
    `residual_` tells how well they do. n_oversamples helps, and a second pass makes it near-exact.

    Parameters:
        n_components: k; or a share in (0, 1), for the fewest (up to 128) that explain this share of |A|_F^2.
        n_oversamples: further directions carried along. None: as many as n_components, at least 16.
        passes: of `fit` over its rows.
        center: about the mean of all rows, as principal component analysis.
        origin: a row (p,) that is taken off every row. With `center` it only serves the numbers: rows far from zero and
            close to one another lose nothing if it lies among them. None: zero, and with `center` the first row seen.
        seed: of the random directions.
        num_threads: None for all cores of this process.

    Attributes, after the first row (A: the rows less the origin, or about their mean):
        components_: (k, p) float32, orthonormal rows, each one's largest entry in magnitude positive. Where A has fewer
            than k directions above rounding the last ones are random.
        singular_values_: (k,) float64, descending, never above the true ones but for rounding; 0 for those last ones.
        explained_variance_ratio_: (k,) their squares over |A|_F^2.
        coordinates_: (n, k) float32, those of all rows seen, in order, without looking at the rows again.
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
        self._core: _core.RowSketch | None = None  # all that was seen
        self._built_with: dict[str, Any] = {}  # the parameters of _core
        self._factors: tuple[int, Factors] | None = None  # and of how many rows

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"

    def __sklearn_is_fitted__(self) -> bool:
        return self._core is not None

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
        """Return `fit(X).coordinates_`, (n, k)."""
        return self.fit(X).coordinates_

    def partial_fit(self, X: Rows, y: None = None) -> Self:
        """Take the rows of X (n, p), any n >= 1, of the types that `fit` takes. `y` is scikit-learn's, and unused.

        Raises TypeError for another dtype, and ValueError for another shape or for NaN or Inf, naming the row; then no
        row of X was taken. After Ctrl-C `n_samples_seen_` tells how many were.
        """
        if self.passes != 1:
            raise ValueError(f"partial_fit: passes must be 1, since rows come once, got {self.passes!r}; use fit")
        self._check_unchanged("partial_fit")
        blocks = list(_blocks("partial_fit", X))
        core = self._core or self._build(blocks[0].shape[1], _checked_row("partial_fit", blocks[0]))
        if len(blocks) > 1:  # all rows or none
            for first_row, block in _numbered(blocks):
                _core.check_finite("partial_fit", block, self._threads(), first_row)
        try:
            for first_row, block in _numbered(blocks):
                core.partial_fit(block, first_row=first_row, all_or_none=True)
        finally:
            if core.num_rows() > 0:
                self._core = core
        return self

    def merge(self, other: "StreamingSVD") -> Self:
        """Take all that `other` has seen: rows that this estimator has not, which come behind its own.

        The result is that of one run over all rows, within rounding, in whatever order sketches are merged. `other`
        stays as it is. Raises ValueError where the two differ in p or in a parameter that shapes the sketch.
        """
        if not isinstance(other, StreamingSVD):
            raise TypeError(f"merge: other must be a StreamingSVD, got {type(other).__name__}")
        theirs = other._fitted("merge")
        for name in ("n_components", "center"):
            ours_is, theirs_is = getattr(self, name), getattr(other, name)
            if ours_is != theirs_is:
                raise ValueError(f"merge: other must have {name} = {ours_is!r}, got {theirs_is!r}")
        if not self.center and not _same(self.origin, other.origin):
            raise ValueError("merge: other must have the same origin")
        self._check_unchanged("merge")
        core = self._core or self._build(theirs.num_features, theirs.origin if self.center else None)
        core.merge(theirs)
        self._core = core
        return self

    # ---- rows out

    def transform(self, X: Rows) -> NDArray[np.float32]:
        """Return coordinates (n, k) of the rows of X (n, p): (X - mean_) components_^T, summed in float64."""
        factors = self._read("transform")
        taken_off = factors.components.astype(np.float64) @ factors.mean
        parts = [
            _core.products("transform", block, factors.components, None, self._threads(), first_row) - taken_off
            for first_row, block in _numbered(_blocks("transform", X, factors.components.shape[1]))
        ]
        return np.concatenate(parts).astype(np.float32)

    def inverse_transform(self, X: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the rows (n, p) of coordinates X (n, k), X components_ + mean_."""
        factors = self._read("inverse_transform")
        if np.ndim(X) != 2 or np.shape(X)[1] != len(factors.components):
            raise ValueError(
                f"inverse_transform: X must have shape (n, k) = (n, {len(factors.components)}), got {np.shape(X)}"
            )
        rows = np.asarray(X, dtype=np.float32) @ factors.components
        rows += factors.mean.astype(np.float32)
        return rows

    @property
    def components_(self) -> NDArray[np.float32]:
        return self._read("components_").components

    @property
    def singular_values_(self) -> NDArray[np.float64]:
        return self._read("singular_values_").singular_values

    @property
    def explained_variance_ratio_(self) -> NDArray[np.float64]:
        factors = self._read("explained_variance_ratio_")
        return np.asarray(factors.singular_values**2 / (factors.energy or 1.0))

    @property
    def coordinates_(self) -> NDArray[np.float32]:
        factors = self._read("coordinates_")
        if factors.coordinates is not None:
            return factors.coordinates.astype(np.float32)
        range_rows = self._fitted("coordinates_").range_rows()
        return np.asarray(range_rows @ factors.mixing[:-1] + factors.mixing[-1], dtype=np.float32)

    @property
    def mean_(self) -> NDArray[np.float64]:
        return self._read("mean_").mean

    @property
    def residual_(self) -> float:
        return self._read("residual_").residual

    @property
    def residual_interval_(self) -> tuple[float, float]:
        return self._read("residual_interval_").residual_interval

    @property
    def residual_bound_(self) -> float:
        return self._read("residual_bound_").residual_bound

    @property
    def optimum_bound_(self) -> float:
        return self._read("optimum_bound_").optimum_bound

    @property
    def n_components_(self) -> int:
        return len(self._read("n_components_").components)

    @property
    def n_samples_seen_(self) -> int:
        return self._fitted("n_samples_seen_").num_rows()

    @property
    def n_features_in_(self) -> int:
        return self._fitted("n_features_in_").num_features

    # ---- files

    def save(self, path: Path | str) -> None:
        """Write all that was seen to a safetensors file, whole or not at all; `load` goes on from it."""
        if self.passes != 1:
            raise ValueError(f"save: a sketch of one pass can be saved, this one has passes={self.passes}")
        seen = self._fitted("save").snapshot(settled=False)
        arrays = {
            "co_range": seen.co_range,
            "gram": seen.gram,
            "squares": np.array([seen.squares]),
            "range_rows": seen.range_rows()[: seen.num_rows() - len(seen.pending)],
            "pending": seen.pending,
            "origin": seen.origin,
        }
        params = {name: value for name, value in self._built_with.items() if name not in ("origin", "num_threads")}
        params["own_origin"] = self._built_with["origin"] is not None
        described = json.dumps(params, default=operator.index)  # integers may be NumPy's
        metadata = {"format": _FORMAT, "version": _VERSION, "params": described, "crc32c": _checksum(described, arrays)}
        write_atomically(Path(path), safetensors.numpy.save(arrays, metadata))

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
            origin, squares = (arrays["origin"] if arrays["origin"].size else None), float(arrays["squares"][0])
            estimator = cls(**params, origin=origin if own_origin else None, num_threads=num_threads)
            if not all(np.isfinite(array).all() for array in arrays.values()):
                raise ValueError("its values must be finite")
            if squares < 0 or arrays["gram"][-1, -1] != len(arrays["range_rows"]):
                raise ValueError("its sums are not those of its rows")
            core = estimator._build(arrays["co_range"].shape[1], origin)
            core.restore(
                co_range=arrays["co_range"],
                gram=arrays["gram"],
                squares=squares,
                range_rows=arrays["range_rows"],
                pending=arrays["pending"],
            )
        except (safetensors.SafetensorError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise RuntimeError(f"load: {path} is damaged: {error}") from error
        estimator._core = core
        return estimator

    # ---- the sketch

    def _threads(self) -> int:
        return _threads(self.num_threads)

    def _build(
        self,
        num_features: int,
        first_row: NDArray[np.float32] | None,
        directions: NDArray[np.float32] | None = None,
    ) -> _core.RowSketch:
        """Return an empty sketch with the present parameters. Raises TypeError or ValueError for a wrong one."""
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
        origin = first_row if self.center else None
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
            origin=None if origin is None else np.ascontiguousarray(origin),
            directions=directions,
        )
        self._built_with = self.get_params()
        return core

    def _next_directions(self, core: _core.RowSketch) -> NDArray[np.float32]:
        return leading_directions(core, self.n_components, self.center, self.seed, self._threads())

    def _check_unchanged(self, where: str) -> None:
        for name, value in self._built_with.items() if self._core is not None else ():
            if not _same(getattr(self, name), value):
                raise ValueError(
                    f"{where}: {name} was {value!r} when the first row came and is {getattr(self, name)!r} now; "
                    "fit starts anew"
                )

    def _fitted(self, where: str) -> _core.RowSketch:
        if self._core is None:
            raise NotFittedError(f"{where}: this {type(self).__name__} has seen no rows; call fit or partial_fit first")
        return self._core

    def _read(self, where: str) -> Factors:
        core = self._fitted(where)
        rows = core.num_rows()
        if self._factors is None or self._factors[0] != rows:
            built = self._built_with
            self._factors = (
                rows,
                factors_of(core, built["n_components"], built["center"], built["seed"], self._threads()),
            )
        return self._factors[1]


class GroupedSVD:
    """One `StreamingSVD` for each group of columns, such as the layers of a policy, in one pass over the rows.

    Parameters:
        groups: the columns [start, stop) of each group, by name.
        n_components: of every group, or a share of its energy; a group of fewer columns has as many as columns.
        params: the other arguments of `StreamingSVD`, but for `origin`.

    `estimators_` holds each group's StreamingSVD by its name. Errors name rows and columns within the group.
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

    def fit(self, X: Rows, y: None = None) -> Self:
        """Forget all rows, then read those of X (n, p) once a pass, for all groups together."""
        self._check_columns("fit", X)
        fit_together([(self.estimators_[name], slice(*ends)) for name, ends in self.groups.items()], X)
        return self

    def partial_fit(self, X: Rows, y: None = None) -> Self:
        """Take the rows of X (n, p). Raises as `StreamingSVD.partial_fit` does; then no group took any."""
        self._check_columns("partial_fit", X)
        blocks = list(_blocks("partial_fit", X))
        for first_row, block in _numbered(blocks):
            _core.check_finite("partial_fit", block, _core.available_cpus(), first_row)
        for block in blocks:
            for name, (start, stop) in self.groups.items():
                self.estimators_[name].partial_fit(block[:, start:stop])
        return self

    def merge(self, other: "GroupedSVD") -> Self:
        """Take all that `other`, with the same groups, has seen."""
        if not isinstance(other, GroupedSVD):
            raise TypeError(f"merge: other must be a GroupedSVD, got {type(other).__name__}")
        if self.groups != other.groups:
            raise ValueError(f"merge: other must have the groups {self.groups}, got {other.groups}")
        for name, estimator in self.estimators_.items():
            estimator.merge(other.estimators_[name])
        return self

    def transform(self, X: Rows) -> NDArray[np.float32]:
        """Return coordinates (n, sum of all k) of the rows of X (n, p), group after group."""
        self._check_columns("transform", X)
        return np.concatenate(
            [
                np.concatenate(
                    [
                        self.estimators_[name].transform(block[:, start:stop])
                        for name, (start, stop) in self.groups.items()
                    ],
                    axis=1,
                )
                for block in _blocks("transform", X)
            ]
        )

    @property
    def coordinates_(self) -> NDArray[np.float32]:
        """Those of all rows seen, (n, sum of all k), group after group."""
        return np.concatenate([estimator.coordinates_ for estimator in self.estimators_.values()], axis=1)

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
        self._blocks: list[NDArray[np.float32]] = []
        self._gram = np.zeros((0, 0))

    def append(self, X: NDArray[np.float32]) -> Self:
        """Take the rows of X, (n, p) or one row (p,), C-contiguous float32. Raises as `gram` does; takes none then."""
        rows = np.array(X, ndmin=2, copy=True, subok=False)
        threads = _threads(self.num_threads)
        own = gram(rows, self.origin, threads)  # checks them
        across = [_core.products("append", block, rows, self.origin, threads) for block in self._blocks]
        old, new = len(self._gram), len(rows)
        grown = np.empty((old + new, old + new))
        grown[:old, :old], grown[old:, old:] = self._gram, own
        if across:
            grown[:old, old:] = np.concatenate(across)
            grown[old:, :old] = grown[:old, old:].T
        self._blocks.append(rows)
        self._gram = grown
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
    fresh = [type(estimator)(**estimator.get_params()) for estimator, _ in parts]
    max_rows = None if all(columns == slice(None) for _, columns in parts) else _SKETCH_ROWS
    for number in range(max([1] + [_integer("passes", estimator.passes) for estimator in fresh])):
        # Those that this pass is for, each with the directions that the pass before has found.
        directions = {
            i: None if estimator._core is None else estimator._next_directions(estimator._core)
            for i, estimator in enumerate(fresh)
            if number == 0 or (number < estimator.passes and not _is_exact(estimator._fitted("fit")))
        }
        cores: dict[int, _core.RowSketch] = {}
        for first_row, block in _numbered(_blocks("fit", X, max_rows=max_rows, read_ahead=True)) if directions else ():
            for i in directions:
                rows = block[:, parts[i][1]]
                if i not in cores:
                    cores[i] = fresh[i]._build(rows.shape[1], _checked_row("fit", rows), directions[i])
                cores[i].partial_fit(rows, first_row=first_row, all_or_none=False)
        for i, core in cores.items():
            core.settle()
            fresh[i]._core = core
    for (estimator, _), fitted in zip(parts, fresh, strict=True):
        estimator._core, estimator._built_with, estimator._factors = fitted._core, fitted._built_with, None


def _checked_row(where: str, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the first row, which may become the origin. Raises ValueError where it holds NaN or Inf."""
    _core.check_finite(where, rows[:1], 1)
    return np.ascontiguousarray(rows[0])


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
