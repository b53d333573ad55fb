"""From the sketch of a matrix's rows to its leading directions, and to the error that they leave.

Shapes  n rows seen, p columns, k components, l range directions, q test directions.

`csrc/svd.h` computes the sketch: C = Y^T A and G = Y^T Y, where A are the rows less their origin or their mean and
Y = A Omega. This module solves the small problem that is left. With G = W S^2 W^T, Q = Y W S^-1 has orthonormal
columns,

    Q^T A = S^-1 W^T C = U diag(sigma) V^T    (l, p),

and the leading k rows of V^T are `components_`: the randomised SVD of Halko, Martinsson and Tropp 2011
(doi:10.1137/090771806), in one pass over the rows because C and G are all that it needs.

Error   Q Q^T A is a projection of A. So by Pythagoras, without any estimate,
            |A - A V^T V|^2  =  |A|^2 - |Q^T A V^T|^2 - m,    m = |(I - Q Q^T) A V^T|^2 >= 0.
        With m = 0 this is `residual_bound_`. m is the trace of V R V^T for R = A^T A - A^T Q Q^T A, and R w is known
        for the q random test directions w. Hutchinson's estimator of this trace gives `residual_`, and the spread over
        the directions `residual_interval_`. (Tropp et al. 2019, arXiv:1902.08651, section 6, also test the error with
        fresh directions.)
Passes  Every further pass takes the directions of the pass before, k and a few more, as Omega: a step of subspace
        iteration. m is then too small to tell from rounding, and `residual_` equals the bound.
Exact   Up to 256 rows are kept as they are, and their Gram matrix in float64 gives the exact SVD. So does G for
        l = p.
"""

import contextlib
import dataclasses
import functools
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tipl import _core
from tipl.device import cuda_engine
from tipl.subspace.row_blocks import Rows, numbered, row_blocks

TEST_DIRECTIONS = 8
_TEST_SCALE = 4.0  # makes E[w w^T] = I, because each column of A has an entry in 2 of the 8 directions
_STUDENT_95 = 2.365  # quantile 0.975 of Student's t with 7 degrees of freedom

SHARE_COMPONENTS = 128
"""The most components that n_components as a share of the energy may select."""

_RESOLVED = 1e-7
"""Share of the largest squared singular value below which the float32 sums of C cannot tell values from rounding."""
_RESOLVED_LATER = 1e-13
"""The same after an earlier pass has separated the directions, so that the sums of each are of its own size."""
_HINTED = 1e-10
"""The same for the start of a later pass, where a direction that is only rounding does no harm."""

_SMALLEST = 1e-18
"""Root mean square of the entries below which their float32 products lose digits, and finally all of them."""

_ROUNDING = 8e-6
"""How far |A|^2 - |Q^T A V^T|^2 may be off by rounding, as a share of |A|^2 before the mean is subtracted, where all
columns are alike. The same holds for the sum of the squared singular values of Q^T A beyond the k-th.

A row much larger than the 127 rows that are summed with it rounds every entry of C by about 4e-7 of it. Over p
different columns these errors are random, and average out to a share of 1 / sqrt(p); equal columns are all rounded in
the same way. The worst of 80,000 random matrices, some with 99.9 % of all energy in one row, had an error of 7e-6.
"""
_ROUNDING_LATER = 3.2e-6
"""The same in a later pass, where the worst of 14,000 matrices had an error of 3e-6."""


@functools.cache
def _blas_libraries() -> Any:
    from threadpoolctl import ThreadpoolController  # takes 20 ms

    return ThreadpoolController().select(user_api="blas")


def _one_blas_thread() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which NumPy's linear algebra runs on one thread.

    The idle threads of OpenBLAS wait busily for the next call, for some 25 ms, on the cores that the engine's next pass
    wants; and a second thread saves nothing where there are a few hundred unknowns.
    """
    limited: contextlib.AbstractContextManager[Any] = _blas_libraries().limit(limits=1)
    return limited


@dataclasses.dataclass(frozen=True)
class Factors:
    components: NDArray[np.float32]  # (k, p)
    singular_values: NDArray[np.float64]  # (k)
    mean: NDArray[np.float64]  # (p), which transform subtracts
    energy: float  # |A|^2
    residual: float
    residual_bound: float
    residual_interval: tuple[float, float]
    optimum_bound: float
    rank: int
    coordinates: NDArray[np.float64] | None  # (n, k) where the rows are exact
    mixing: NDArray[np.float64]  # (l + 1, k): coordinates = [Y, 1] mixing, elsewhere

    def project(self, X: Rows, num_threads: int, cuda_index: int | None = None) -> NDArray[np.float32]:
        """Return the coordinates (n, k) of the rows of X (n, p): (X - mean) components^T, summed in float64."""
        with _one_blas_thread():
            mean_coordinates = self.components.astype(np.float64) @ self.mean
        blocks = row_blocks("transform", X, cuda_index=cuda_index)
        parts = [
            products("transform", block, self.components, None, num_threads, first_row, cuda_index) - mean_coordinates
            for first_row, block in numbered(blocks)
        ]
        return np.concatenate(parts).astype(np.float32)


def products(
    where: str,
    X: Any,
    Y: Any,
    origin: NDArray[np.float32] | None,
    num_threads: int,
    first_row: int = 0,
    cuda_index: int | None = None,
) -> NDArray[np.float64]:
    """Return (X - origin) (Y - origin)^T in float64, in the host's memory; without Y, of X with itself.

    On the CPU, or on a CUDA device, where X and Y may lie; errors number the rows of X from `first_row` on.
    """
    if cuda_index is None:
        return _core.products(where, X, Y, origin, num_threads, first_row)
    return np.asarray(cuda_engine().products(where, X, Y, origin, cuda_index, first_row))


def factors_of(core: _core.RowSketch, n_components: int | float, center: bool, seed: int, num_threads: int) -> Factors:
    with _one_blas_thread():
        rows = core.exact_rows()
        if len(rows):
            return _of_rows(rows, core.exact_origin(), n_components, center, seed, num_threads)
        settled = core.snapshot()
        if settled.range_size == settled.num_features:
            return _of_all_columns(settled, n_components, center, seed, num_threads)
        return _of_sketch(settled, n_components, center, seed, num_threads)


def leading_directions(
    core: _core.RowSketch, n_components: int | float, center: bool, seed: int, num_threads: int
) -> NDArray[np.float32]:
    """Return the leading directions and a few more, (more than k, p): the start of the next pass."""
    with _one_blas_thread():
        settled = core.snapshot()
        projection = _Projection(settled, center, _resolved(settled, _HINTED), num_threads)
        k = projection.number_of(n_components)
        more = min(k + max(8, k // 4), core.range_size)
        return projection.directions(more, seed)[: max(k, projection.rank)]


def _of_rows(
    rows: NDArray[np.float32],
    origin: NDArray[np.float32],
    n_components: int | float,
    center: bool,
    seed: int,
    num_threads: int,
) -> Factors:
    """Return the SVD of a few rows less their origin, from their Gram matrix."""
    n, p = rows.shape
    products = _core.products("fit", rows, None, None, num_threads)
    mean = np.zeros(p)
    if center:
        means = products.mean(axis=0)
        products = products - means - means[:, None] + means.mean()
        mean = rows.mean(axis=0, dtype=np.float64)
    squares, left = _descending(products)
    rank = int(np.sum(squares > 8 * n * np.finfo(np.float64).eps * squares[0])) if squares[0] > 0 else 0
    energy = float(np.trace(products)) if rank else 0.0
    k = _number_of_components(n_components, squares[:rank] / (energy or 1.0), p)
    kept = min(k, rank)
    weights = left[:, :kept] / np.sqrt(squares[:kept])
    components = _completed(_core.combine(rows, weights, num_threads), k, seed, num_threads)
    coordinates = _core.products("fit", rows, components, None, num_threads) - components @ mean
    return _exact_factors(squares[:rank], energy, components, mean + (origin if origin.size else 0.0), coordinates)


def _of_all_columns(
    core: _core.RowSketch, n_components: int | float, center: bool, seed: int, num_threads: int
) -> Factors:
    """Return the SVD where l = p: Omega is the identity, and G is A^T A in float64."""
    sums, p = core.gram, core.num_features
    n = sums[-1, -1]
    mean = sums[-1, :-1] / n if center else np.zeros(p)
    squares, right = _descending(sums[:-1, :-1] - n * np.outer(mean, mean))
    rank = int(np.sum(squares > 8 * p * np.finfo(np.float64).eps * sums[:-1, :-1].trace())) if squares[0] > 0 else 0
    energy = float(np.sum(squares[:rank]))
    k = _number_of_components(n_components, squares[:rank] / (energy or 1.0), p)
    found = np.ascontiguousarray(right[:, : min(k, rank)].T, dtype=np.float32)
    components = _completed(found, k, seed, num_threads)
    factors = _exact_factors(squares[:rank], energy, components, mean + (core.origin if core.origin.size else 0.0))
    mixing = components.T.astype(np.float64)  # Y = A
    return dataclasses.replace(factors, mixing=np.concatenate([mixing, -(mean @ mixing)[None]]))


def _exact_factors(
    squares: NDArray[np.float64],
    energy: float,
    components: NDArray[np.float32],
    mean: NDArray[np.float64],
    coordinates: NDArray[np.float64] | None = None,
) -> Factors:
    """Return the factors, given all squared singular values above rounding."""
    k = len(components)
    optimum = float(np.sum(squares[k:]))
    rounding = float(4 * np.finfo(np.float32).eps) ** 2 * energy  # of the components
    residual = float(np.sqrt(optimum + rounding))
    return Factors(
        components=components,
        singular_values=np.r_[np.sqrt(squares[:k]), np.zeros(max(0, k - len(squares)))],
        mean=mean,
        energy=energy,
        residual=residual,
        residual_bound=residual,
        residual_interval=(residual, residual),
        optimum_bound=float(np.sqrt(optimum)),
        rank=min(k, len(squares)),
        coordinates=coordinates,
        mixing=np.zeros((0, k)),
    )


class _Projection:
    """Q^T A = U diag(sigma) V^T for a sketch without pending rows."""

    def __init__(self, core: _core.RowSketch, center: bool, resolved: float, num_threads: int) -> None:
        """Keep the squared singular values above `resolved` times the largest one."""
        sums, size = core.gram, core.range_size  # (l + q + 1, l + q + 1)
        self.core, self.num_threads, self.energy = core, num_threads, core.squares
        self.mean = np.zeros(core.num_features)  # of the rows
        self.mean_y = np.zeros(len(sums) - 1)
        self.gram = sums[:-1, :-1]  # about the mean, like everything below
        if center:
            n = sums[-1, -1]
            self.mean, self.mean_y = core.row_sum / n, sums[-1, :-1] / n
            self.gram = self.gram - n * np.outer(self.mean_y, self.mean_y)
            self.energy = max(self.energy - float(n * self.mean @ self.mean), 0.0)
        squares, vectors = _descending(self.gram[:size, :size])
        largest = max(squares[0], np.max(np.diag(sums)[:size]))  # or those before the mean was subtracted
        kept = squares > resolved * largest
        self.whitening = np.zeros((len(self.gram), int(kept.sum())))  # [W S^-1; 0]: Q = Y whitening
        self.whitening[:size] = vectors[:, kept] / np.sqrt(squares[kept])
        self.rows = self.combined(self.whitening)  # Q^T A (r, p)
        self.squares, self.left = _descending(_core.products("fit", self.rows, None, None, num_threads))
        self.rank = int(np.sum(self.squares > resolved * self.squares[0])) if len(self.squares) else 0

    def combined(self, weights: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return weights^T C, (r, p), for weights (l + q, r)."""
        return self.core.combine(np.concatenate([weights, -(self.mean_y @ weights)[None]]))

    def number_of(self, n_components: int | float) -> int:
        return _number_of_components(
            n_components, self.squares[: self.rank] / (self.energy or 1.0), self.core.num_features
        )

    def directions(self, k: int, seed: int) -> NDArray[np.float32]:
        """Return the k leading rows of V^T; where V^T has fewer, the last ones are random."""
        found = min(k, self.rank)
        weights = self.left[:, :found] / np.sqrt(self.squares[:found])
        return _completed(_core.combine(self.rows, weights, self.num_threads), k, seed, self.num_threads)

    def missed(self, components: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return an estimate of |(I - Q Q^T) A V^T|^2 from each test direction, (q,)."""
        size = self.core.range_size
        # R w = A^T A w - A^T Q Q^T A w for the test directions w, then w^T V^T V R w.
        tests = np.eye(len(self.gram))[:, size:] - self.whitening @ (self.whitening.T @ self.gram[:, size:])
        products = _core.products("fit", components, self.combined(tests), None, self.num_threads)  # V R w (k, q)
        return np.asarray(_TEST_SCALE * np.sum(products * self.core.apply(components)[:, size:], axis=0))


def _resolved(core: _core.RowSketch, otherwise: float) -> float:
    """Return the share of the largest squared singular value above which values exceed rounding; 2 if none does."""
    if 0.0 < core.squares < _SMALLEST**2 * core.num_rows() * core.num_features:
        return 2.0
    return _RESOLVED_LATER if core.directed else otherwise


def _of_sketch(core: _core.RowSketch, n_components: int | float, center: bool, seed: int, num_threads: int) -> Factors:
    resolved = _resolved(core, _RESOLVED)
    projection = _Projection(core, center, resolved, num_threads)
    if resolved > 1.0:
        size = np.sqrt(core.squares / core.num_rows() / core.num_features)
        warnings.warn(
            f"the rows are too small for float32 sums: their entries, of {size:.1g} (root mean square), count as zero "
            f"below {_SMALLEST:.0g}; scale them",
            RuntimeWarning,
            stacklevel=5,
        )
    k = projection.number_of(n_components)
    components = projection.directions(k, seed)
    inside = _core.products("fit", projection.rows, components, None, num_threads)  # Q^T A V^T (r, k)
    # The components have unit length only up to float32 rounding, which would count as energy.
    lengths = _core.products("fit", components, None, None, num_threads)
    captured = float(np.sum(inside.T * np.linalg.solve(lengths, inside.T)))
    alike = float(np.sum(components[0], dtype=np.float64)) ** 2 / core.num_features  # 1 where all columns are
    share = _ROUNDING_LATER if core.directed else _ROUNDING
    rounding = share * float(np.sqrt(max(alike, 1.0 / core.num_features))) * core.squares
    left = max(projection.energy - captured, 0.0)
    rest = left + rounding
    optimum = float(np.clip(np.sum(projection.squares[k : projection.rank]) - rounding, 0.0, rest))
    low, best, high = rest, rest, rest
    if core.test_size and projection.rank:
        missed = projection.missed(components)
        spread = _STUDENT_95 * float(np.std(missed, ddof=1)) / np.sqrt(len(missed))
        low, best, high = (
            float(np.clip(left - np.mean(missed) - step, optimum, rest)) for step in (spread, 0.0, -spread)
        )
    mixing = projection.whitening[: core.range_size] @ inside  # coordinates = (Y - mean of Y) mixing
    return Factors(
        components=components,
        singular_values=np.sqrt(np.r_[projection.squares[: projection.rank], np.zeros(k)][:k]),
        mean=projection.mean + (core.origin if core.origin.size else 0.0),
        energy=projection.energy,
        residual=float(np.sqrt(best)),
        residual_bound=float(np.sqrt(rest)),
        residual_interval=(float(np.sqrt(low)), float(np.sqrt(high))),
        optimum_bound=float(np.sqrt(optimum)),
        rank=min(k, projection.rank),
        coordinates=None,
        mixing=np.concatenate([mixing, -(projection.mean_y[: core.range_size] @ mixing)[None]]),
    )


def _descending(matrix: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the eigenvalues (m,), descending, and the eigenvectors (m, m), as columns, of a symmetric matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return values[::-1], vectors[:, ::-1]


def _number_of_components(n_components: int | float, shares: NDArray[np.float64], p: int) -> int:
    """Return k, given the share of the energy that each direction explains."""
    if not isinstance(n_components, float):
        return int(n_components)
    explained = np.cumsum(shares)
    k = int(np.searchsorted(explained, n_components)) + 1
    most = min(SHARE_COMPONENTS, p)
    if k > min(len(shares), most):
        k = max(1, min(len(shares), most))
        reached = explained[k - 1] if len(explained) else 1.0
        if reached < n_components - 1e-9:
            warnings.warn(
                f"n_components={n_components}: {k} directions of one pass explain {reached:.4f} of the energy, and "
                f"there are no more than {most}; n_oversamples or passes=2 may find better ones",
                RuntimeWarning,
                stacklevel=5,
            )
    return k


def _completed(components: NDArray[np.float32], k: int, seed: int, num_threads: int) -> NDArray[np.float32]:
    """Return k orthonormal rows with fixed signs: the given ones (r, p), then random ones orthogonal to them."""
    r, p = components.shape
    if r < k:
        random = np.random.Generator(np.random.Philox(seed)).standard_normal((k - r, p), dtype=np.float32)
        random /= np.float32(np.sqrt(p))
        random -= (random @ components.T) @ components
        components = np.concatenate([components, random])
    for _ in range(2):  # CholeskyQR2 (Yamamoto et al. 2015): one step squares the condition number
        products = _core.products("fit", components, None, None, num_threads)
        if np.abs(products - np.eye(k)).max() <= np.finfo(np.float32).eps:
            break
        try:
            inverse = np.linalg.inv(np.linalg.cholesky(products))
        except np.linalg.LinAlgError:  # linearly dependent, up to rounding
            q, r = np.linalg.qr(components.T.astype(np.float64))
            components = np.ascontiguousarray((q * np.where(np.diag(r) < 0, -1, 1)).T, dtype=np.float32)
            break
        components = _core.combine(components, np.ascontiguousarray(inverse.T), num_threads)
    largest = components[np.arange(k), np.argmax(np.abs(components), axis=1)]
    components *= np.where(largest < 0, np.float32(-1), np.float32(1))[:, None]
    return components
