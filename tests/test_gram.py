"""The Gram matrix of rows against the float64 oracle, and the eigenvectors of small symmetric matrices."""

import numpy as np
import pytest
import reference
from test_svd import EPS64, SIZES, random_rows

from tipl import _core
from tipl.svd import gram

# ---- the Gram matrix of rows


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 31, 32, 33, 65])
@pytest.mark.parametrize("p", SIZES)
def test_gram_of_integers_is_exact(T, p):
    rng = np.random.default_rng(T)
    rows = rng.integers(-1000, 1001, (T, p)).astype(np.float32)
    assert np.array_equal(gram(rows), reference.gram(rows, None))
    assert np.array_equal(gram(rows, rows[0]), reference.gram(rows, rows[0]))


def test_gram_is_exact_to_float64_rounding_over_many_columns():
    rows = random_rows(40, 3000)
    exact = reference.gram(rows, None)
    norms = np.sqrt(np.diag(exact))
    assert (np.abs(gram(rows) - exact) <= 2 * 3000 * EPS64 * np.outer(norms, norms)).all()


def test_gram_keeps_rows_close_to_their_origin():
    """Displacements a hundred thousand times smaller than the rows lose nothing but the rows' own rounding."""
    rng = np.random.default_rng(13)
    origin = rng.standard_normal(2000).astype(np.float32)
    rows = (origin + 1e-5 * rng.standard_normal((9, 2000))).astype(np.float32)
    exact = reference.gram(rows, origin)
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert (np.abs(gram(rows, origin) - exact) <= 2 * 2000 * EPS64 * scale).all()


@pytest.mark.parametrize("with_origin", [False, True])
def test_gram_is_symmetric_with_the_same_bits_for_any_number_of_threads(with_origin):
    rows = random_rows(150, 777)
    origin = rows[0] if with_origin else None
    one, *others = (gram(rows, origin, num_threads=threads) for threads in (1, 2, 7))
    assert np.array_equal(one, one.T)
    for other in others:
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("rows", "origin", "error", "message"),
    [
        (np.zeros((2, 3)), None, TypeError, "X must be a NumPy array of float32, got float64"),
        (np.zeros(3, np.float32), None, ValueError, r"X must have shape \(T, p\), got \(3,\)"),
        (np.zeros((2, 3), np.float32), np.zeros(3), TypeError, "origin must be a NumPy array of float32, got float64"),
        (np.zeros((2, 3), np.float32), np.zeros(4, np.float32), ValueError, r"origin must have shape \(p,\) = \(3,\)"),
        (np.full((2, 3), np.inf, np.float32), None, ValueError, "X must be finite, got inf at row 0, column 0"),
        (np.zeros((2, 1), np.float32), np.full(1, np.nan, np.float32), ValueError, "origin must be finite, got nan"),
    ],
)
def test_gram_refuses_what_it_cannot_take(rows, origin, error, message):
    with pytest.raises(error, match=f"^gram: {message}"):
        gram(rows, origin)


def test_gram_of_no_rows_is_empty():
    assert gram(np.zeros((0, 3), np.float32)).shape == (0, 0)


# ---- the small eigenproblem


def eigen_matrices() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(14)
    q = np.linalg.qr(rng.standard_normal((60, 60)))[0]
    return {
        "one": np.array([[-2.0]]),
        "two": np.array([[0.0, 1.0], [1.0, 0.0]]),
        "zero": np.zeros((5, 5)),
        "diagonal": np.diag([3.0, -1.0, 7.0, 0.0]),
        "ones": np.ones((20, 20)),
        "random": q * rng.standard_normal(60) @ q.T,
        "graded": q * np.geomspace(1, 1e-30, 60) @ q.T,
        "graded by rows": np.outer(*[np.geomspace(1, 1e-12, 30)] * 2) * np.cov(rng.standard_normal((30, 60))),
        "repeated": q * np.repeat([5.0, 1.0, 0.0], 20) @ q.T,
        "blocks": np.kron(np.eye(4), np.array([[2.0, 1.0], [1.0, 2.0]])),
        "huge": 1e75 * (q * np.linspace(1, 2, 60) @ q.T),
        "tiny": 1e-80 * (q * np.linspace(1, 2, 60) @ q.T),
        "tridiagonal": np.diag(np.arange(40.0)) + np.diag(np.ones(39), 1) + np.diag(np.ones(39), -1),
    }


@pytest.mark.parametrize("name", eigen_matrices())
def test_eigenvalues_and_eigenvectors_of_symmetric_matrices(name):
    a = eigen_matrices()[name]
    a = (a + a.T) / 2
    n, size = len(a), np.linalg.norm(a, 2)
    values, vectors = _core.symmetric_eigen(a)
    assert (np.diff(values) <= 0).all()
    assert np.abs(vectors @ vectors.T - np.eye(n)).max() <= 8 * n * EPS64
    assert np.abs(values - np.linalg.eigvalsh(a)[::-1]).max() <= 8 * n * EPS64 * size
    assert np.abs(vectors @ a - values[:, None] * vectors).max() <= 8 * n * EPS64 * size


def test_symmetric_eigen_refuses_what_is_not_square():
    with pytest.raises(ValueError, match=r"^symmetric_eigen: a must be square, got \(2, 3\)$"):
        _core.symmetric_eigen(np.zeros((2, 3)))
