"""Rows for the tests of the streaming SVD, estimators that are fed with them, and how their results are compared."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tipl import _core
from tipl.subspace.streaming_svd import StreamingSVD

EPS = float(np.finfo(np.float32).eps)
EPS64 = float(np.finfo(np.float64).eps)

# Sizes around the vector width, and around the register tiles and blocks of the kernels.
SIZES = sorted({1, 3, 7, *(_core.lanes() * i + j for i in (1, 2, 8) for j in (-1, 0, 1, 2))})


def chunks(rows: np.ndarray, sizes: list[int]) -> Iterator[np.ndarray]:
    """The rows in chunks of these sizes, again and again."""
    start, i = 0, 0
    while start < len(rows):
        yield rows[start : start + sizes[i % len(sizes)]]
        start, i = start + sizes[i % len(sizes)], i + 1


def stream(estimator: StreamingSVD, rows: np.ndarray, *sizes: int) -> StreamingSVD:
    for chunk in chunks(rows, list(sizes)):
        estimator.partial_fit(chunk)
    return estimator


def random_rows(n: int, p: int, seed: int = 0) -> np.ndarray:
    """Rows with singular values that decay, far from zero."""
    rng = np.random.default_rng(seed)
    scales = 1.0 / np.arange(1, min(n, p) + 1)
    return (rng.standard_normal((n, min(n, p))) * scales @ rng.standard_normal((min(n, p), p)) + 5).astype(np.float32)


def results(estimator: StreamingSVD) -> tuple[Any, ...]:
    """All that an estimator says, to be compared to the bit."""
    return (
        estimator.n_samples_seen_,
        estimator.n_features_in_,
        estimator.n_components_,
        estimator.components_.tobytes(),
        estimator.singular_values_.tobytes(),
        estimator.explained_variance_ratio_.tobytes(),
        estimator.coordinates_.tobytes(),
        estimator.mean_.tobytes(),
        estimator.residual_,
        estimator.residual_interval_,
        estimator.residual_bound_,
        estimator.optimum_bound_,
    )


def largest_angle(a: np.ndarray, b: np.ndarray) -> float:
    """The sine of the largest angle between the spans of a and b, both with orthonormal rows."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - (a @ b.T) @ b, 2))


def assert_orthonormal(components: np.ndarray) -> None:
    """Each product of two rows is off by their rounding to float32 alone: eps / 2 of every entry of either."""
    v = components.astype(np.float64)
    assert np.abs(v @ v.T - np.eye(len(v))).max() <= 2 * EPS
