"""Streaming truncated SVD of rows that are never all in memory, and the Gram matrix of rows that are.

Shapes  n rows, p columns, k = n_components, l = k + n_oversamples, b rows of an internal block (64 or more).
`csrc/svd.h` has the method, its sources, its cost and its numerics.
"""

import operator
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from tipl import _core

_PARAMETERS = ("n_components", "n_oversamples", "center", "seed", "num_threads")


class NotFittedError(ValueError, AttributeError):
    """What a `StreamingSVD` that has seen no rows cannot answer."""


class _Factors(NamedTuple):
    components: NDArray[np.float32]
    singular_values: NDArray[np.float64]
    mean: NDArray[np.float64]
    residual_bound: float


class StreamingSVD:
    """The k leading right singular vectors of a matrix A whose rows come in blocks, each seen once.

    A scikit-learn estimator by its conventions, without depending on scikit-learn. Memory is O((k + n_oversamples) p)
    whatever the number of rows. Results have the same bits for any chunking of the rows and any number of threads, and
    reading them in between changes nothing. Calls from several threads wait for one another.

    What it can lose: a direction that is weak in every block of rows and strong only over many, while the rows keep
    bringing directions that are stronger and never come back. residual_bound_ tells, and n_oversamples helps.

    Parameters:
        n_components: k, at most p.
        n_oversamples: further directions carried along, so that one that is weak now can grow into the first k later.
        center: about the mean of all rows, as principal component analysis, and not about zero.
        seed: of the random directions that complete `components_` where A has fewer than k.
        num_threads: None for all cores of this process.

    Attributes, after the first row:
        components_: (k, p) float32, orthonormal rows, each one's largest entry in magnitude positive. Where A has only
            r < k directions above rounding (about 3e-7 of the largest singular value), the last k - r are random.
        singular_values_: (k,) float64, descending, 0 for those last k - r.
        mean_: (p,) float64, zero unless `center`.
        residual_bound_: at least |A - A V^T V|_F for V = components_ (A less its mean if `center`), and the best
            possible value where the stream lost nothing.
        n_samples_seen_, n_features_in_: n and p.
    """

    def __init__(
        self,
        n_components: int,
        *,
        n_oversamples: int = 10,
        center: bool = False,
        seed: int = 0,
        num_threads: int | None = None,
    ) -> None:
        self.n_components = n_components
        self.n_oversamples = n_oversamples
        self.center = center
        self.seed = seed
        self.num_threads = num_threads
        self._core: _core.StreamingSvd | None = None  # all that was seen
        self._built_with: dict[str, Any] = {}  # the parameters of _core
        self._factors: _Factors | None = None  # what was read from _core since its last row

    def __repr__(self) -> str:
        return f"StreamingSVD({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"

    def __sklearn_is_fitted__(self) -> bool:
        return self._core is not None

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

    def fit(self, X: NDArray[np.float32], y: None = None) -> Self:
        """Forget all rows, then take those of X (n, p) float32. `y` is scikit-learn's, and unused."""
        fresh = type(self)(**self.get_params()).partial_fit(X)
        self._core, self._built_with, self._factors = fresh._core, fresh._built_with, None
        return self

    def partial_fit(self, X: NDArray[np.float32], y: None = None) -> Self:
        """Take the rows of X (n, p), C-contiguous float32, any n >= 1. `y` is scikit-learn's, and unused.

        Raises TypeError for another dtype, and ValueError for another shape or for NaN or Inf, naming the row; then no
        row of X was taken. After Ctrl-C `n_samples_seen_` tells how many were.
        """
        core = self._core or self._build(_core.columns_of("partial_fit", X))
        self._check_unchanged("partial_fit")
        try:
            core.partial_fit(X)
        finally:
            if core.num_rows() > 0:
                self._core, self._factors = core, None
        return self

    def merge(self, other: "StreamingSVD") -> Self:
        """Take all that `other` has seen: rows that this estimator has not. `other` stays as it is.

        The order of merging matters only within rounding and what the sketches lose, which residual_bound_ tells.
        Raises ValueError where the two differ in p or in a parameter other than num_threads.
        """
        if not isinstance(other, StreamingSVD):
            raise TypeError(f"merge: other must be a StreamingSVD, got {type(other).__name__}")
        core = self._core or self._build(other.n_features_in_)
        self._check_unchanged("merge")
        core.merge(other._fitted("merge"))
        self._core, self._factors = core, None
        return self

    def transform(self, X: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return coordinates (n, k) of the rows of X (n, p) float32: (X - mean_) components_^T, summed in float64."""
        factors = self._read("transform")
        products = _core.cross_products(X, factors.components, self._threads())  # (n, k)
        return (products - factors.components.astype(np.float64) @ factors.mean).astype(np.float32)

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
    def mean_(self) -> NDArray[np.float64]:
        return self._read("mean_").mean

    @property
    def residual_bound_(self) -> float:
        return self._read("residual_bound_").residual_bound

    @property
    def n_samples_seen_(self) -> int:
        return self._fitted("n_samples_seen_").num_rows()

    @property
    def n_features_in_(self) -> int:
        return self._fitted("n_features_in_").num_features

    def _threads(self) -> int:
        return _core.available_cpus() if self.num_threads is None else _integer("num_threads", self.num_threads)

    def _build(self, num_features: int) -> _core.StreamingSvd:
        """Return an empty sketch with the present parameters. Raises TypeError or ValueError for a wrong one."""
        if not isinstance(self.center, bool):
            raise TypeError(f"StreamingSVD: center must be a bool, got {self.center!r}")
        seed = _integer("seed", self.seed)
        if not 0 <= seed < 2**64:
            raise ValueError(f"StreamingSVD: seed must lie in [0, 2**64), got {seed}")
        core = _core.StreamingSvd(
            num_features=num_features,
            n_components=_integer("n_components", self.n_components),
            n_oversamples=_integer("n_oversamples", self.n_oversamples),
            center=self.center,
            seed=seed,
            num_threads=self._threads(),
        )
        self._built_with = self.get_params()
        return core

    def _check_unchanged(self, where: str) -> None:
        for name, value in self._built_with.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{where}: {name} was {value!r} when the first row came and is {getattr(self, name)!r} now; "
                    "fit starts anew"
                )

    def _fitted(self, where: str) -> _core.StreamingSvd:
        if self._core is None:
            raise NotFittedError(f"{where}: this StreamingSVD has seen no rows; call fit or partial_fit first")
        return self._core

    def _read(self, where: str) -> _Factors:
        core = self._fitted(where)
        if self._factors is None:
            self._factors = _Factors(*core.factors())
        return self._factors


def gram(
    X: NDArray[np.float32], origin: NDArray[np.float32] | None = None, num_threads: int | None = None
) -> NDArray[np.float64]:
    """Return D D^T (T, T), D = X - origin, for rows X (T, p) and an optional row `origin` (p,), C-contiguous float32.

    Differences, products and sums are float64, so that rows close to the origin lose nothing. Same bits for any
    num_threads (None: all cores). Raises TypeError for another dtype, ValueError for another shape or for NaN or Inf.
    """
    threads = _core.available_cpus() if num_threads is None else _integer("num_threads", num_threads)
    return _core.gram(X, origin, threads)


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
