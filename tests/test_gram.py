"""Products and combinations of rows, and the sums of a sketch, against float64: the engine's part of the SVD."""

from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from svd_checks import EPS, EPS64, SIZES, random_rows

from tipl import _core
from tipl.device import cuda_engine, cuda_index
from tipl.subspace.running_gram import RunningGram, gram

ON_EACH_DEVICE = True
cpu_only = pytest.mark.cpu_only

COUNTS = [1, 2, 3, 4, 5, 31, 32, 33, 65]  # of rows, around the tiles and blocks of products


def integers(n: int, p: int, seed: int = 0, most: int = 1000) -> np.ndarray:
    """Rows whose products, and sums of products, are exact."""
    return np.random.default_rng(seed).integers(-most, most + 1, (n, p)).astype(np.float32)


# ---- the Gram matrix of rows


@pytest.mark.parametrize("T", COUNTS)
@pytest.mark.parametrize("p", SIZES)
def test_gram_of_integers_is_exact(T, p):
    rows = integers(T, p, seed=T)
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


def test_gram_takes_rows_wherever_each_of_them_lies():
    rows = integers(70, 90)
    for view in (rows[::2], rows[::-1], rows[:, 3:50], rows[5:6], rows[:, 7:8]):
        assert np.array_equal(gram(view), reference.gram(view, None))


@pytest.mark.parametrize(
    ("rows", "origin", "error", "message"),
    [
        (np.zeros((2, 3)), None, TypeError, "X must be a NumPy array of float32, got float64"),
        ([[1.0]], None, TypeError, "X must be a NumPy array of float32, got list"),
        (np.zeros(3, np.float32), None, ValueError, r"X must have shape \(n, p\), got \(3,\)"),
        (np.zeros((2, 6), np.float32)[:, ::2], None, ValueError, "X must have contiguous rows"),
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


# ---- the same, row by row


@pytest.mark.parametrize("with_origin", [False, True])
@pytest.mark.parametrize("p", [1, 17, 600])
def test_a_running_gram_of_integers_is_exact_row_by_row(p, with_origin):
    rows = integers(40, p)
    origin = integers(1, p, seed=1)[0] if with_origin else None
    running = RunningGram(origin=origin)
    assert running.gram.shape == (0, 0)
    for T, row in enumerate(rows, start=1):
        assert running.append(row) is running
        assert np.array_equal(running.gram, reference.gram(rows[:T], origin))


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 70), min_size=1, max_size=5), with_origin=st.booleans(), p=st.integers(1, 200))
def test_a_running_gram_in_blocks_is_that_of_all_rows(sizes, with_origin, p):
    rows = random_rows(sum(sizes), p)
    origin = rows[0] + np.float32(1e-3) if with_origin else None
    running = RunningGram(origin=origin)
    for block in np.split(rows, np.cumsum(sizes)[:-1]):
        running.append(block)
    exact = reference.gram(rows, origin)
    norms = np.sqrt(np.diag(exact))
    assert np.array_equal(running.gram, running.gram.T)
    assert (np.abs(running.gram - exact) <= 2 * p * EPS64 * np.outer(norms, norms)).all()
    assert (np.abs(running.gram - gram(rows, origin)) <= 4 * p * EPS64 * np.outer(norms, norms)).all()


def test_a_running_gram_has_the_same_bits_for_any_number_of_threads_and_keeps_what_it_gave():
    rows = random_rows(90, 300)
    one, *others = (RunningGram(num_threads=threads).append(rows[:50]) for threads in (1, 2, 7))
    before = one.gram
    kept = before.copy()
    for running in (one, *others):
        running.append(rows[50:])
    assert np.array_equal(before, kept)
    for other in others:
        assert np.array_equal(one.gram, other.gram)


def test_a_running_gram_keeps_its_own_copy_of_the_rows():
    rows = integers(20, 30)
    mine = rows.copy()
    running = RunningGram().append(mine[:10])
    mine[:] = 7
    assert np.array_equal(running.append(rows[10:]).gram, reference.gram(rows, None))


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (np.zeros((2, 3)), TypeError, "X must be a NumPy array of float32, got float64"),
        (np.zeros((2, 3), np.int32), TypeError, "X must be a NumPy array of float32, got int32"),
        (np.full((2, 3), np.nan, np.float32), ValueError, "X must be finite, got nan at row 0, column 0"),
        (np.full(3, np.inf, np.float32), ValueError, "X must be finite, got inf at row 0, column 0"),
        (np.zeros((2, 4), np.float32), ValueError, r"must have shape .*\(2, 4\)|origin must have shape"),
        (np.zeros((1, 2, 3), np.float32), ValueError, r"X must have shape \(n, p\), got \(1, 2, 3\)"),
    ],
)
@pytest.mark.parametrize("origin", [None, np.ones(3, np.float32)])
def test_refused_rows_leave_a_running_gram_as_it_was(rows, error, message, origin):
    running = RunningGram(origin=origin).append(integers(5, 3))
    before = running.gram.copy()
    with pytest.raises(error, match=message):
        running.append(rows)
    assert np.array_equal(running.gram, before)
    all_rows = np.concatenate([integers(5, 3), integers(4, 3, seed=1)])
    assert np.array_equal(running.append(all_rows[5:]).gram, reference.gram(all_rows, origin))


# ---- products and combinations in the engine


@cpu_only
@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 5), (4, 33), (32, 31), (33, 64), (70, 2)])
@pytest.mark.parametrize("p", SIZES)
@pytest.mark.parametrize("with_origin", [False, True])
def test_products_of_two_sets_of_integers_are_exact(n, m, p, with_origin):
    x, y, origin = integers(n, p), integers(m, p, seed=1), integers(1, p, seed=2)[0]
    if with_origin:
        exact = (x.astype(np.float64) - origin) @ (y.astype(np.float64) - origin).T
        assert np.array_equal(_core.products("test", x, y, origin, 2), exact)
    else:
        assert np.array_equal(_core.products("test", x, y, None, 2), x.astype(np.float64) @ y.astype(np.float64).T)


@cpu_only
def test_products_of_a_matrix_with_itself_are_those_of_its_copy():
    x = random_rows(70, 1500)
    both = [_core.products("test", x, other, x[3], 2) for other in (None, x.copy())]
    assert np.allclose(*both, rtol=0, atol=2 * 1500 * EPS64 * np.abs(both[0]).max())


@cpu_only
def test_products_refuse_rows_of_another_length_and_what_is_not_finite():
    x = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match=r"^test: Y must have shape \(n, 4\), got \(3, 5\)$"):
        _core.products("test", x, np.ones((3, 5), np.float32), None, 1)
    with pytest.raises(ValueError, match=r"^test: X must be finite, got inf at row 2, column 1$"):
        spoilt = x.copy()
        spoilt[2, 1] = np.inf
        _core.products("test", spoilt, x, None, 1)


@cpu_only
@pytest.mark.parametrize("p", [*SIZES, 127, 128, 130, 300])
@pytest.mark.parametrize("r", [1, 3, 4, 5, 8, 9, 17])
def test_combinations_of_rows_are_exact_but_for_their_last_rounding(p, r):
    rng = np.random.default_rng(r)
    x, weights = random_rows(11, p), rng.standard_normal((11, r))
    exact = weights.T @ x.astype(np.float64)
    ours = _core.combine(x, weights, 2)
    assert ours.shape == (r, p)
    assert ours.dtype == np.float32
    summed = np.abs(weights.T) @ np.abs(x.astype(np.float64))
    assert (np.abs(ours - exact) <= EPS / 2 * np.abs(exact) + 16 * EPS64 * summed).all()
    assert np.array_equal(
        _core.combine(x[::2], np.ascontiguousarray(weights[::2]), 1),
        _core.combine(np.ascontiguousarray(x[::2]), np.ascontiguousarray(weights[::2]), 7),
    )


@cpu_only
def test_combinations_of_nothing_are_zero_and_no_combinations_are_none():
    assert not _core.combine(np.zeros((0, 20), np.float32), np.zeros((0, 3)), 1).any()
    assert _core.combine(np.ones((4, 20), np.float32), np.zeros((4, 0)), 1).shape == (0, 20)
    with pytest.raises(ValueError, match=r"^combine: weights must have shape \(n, r\) = \(4, r\), got \(3, 2\)$"):
        _core.combine(np.ones((4, 20), np.float32), np.zeros((3, 2)), 1)


@cpu_only
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(threads):
    for row, column, p in ((0, 0, 1), (69, 0, 65), (13, 64, 65), (42, 300, 301)):
        rows = random_rows(70, p)
        _core.check_finite("test", rows, threads)
        rows[row, column] = -np.inf
        with pytest.raises(ValueError, match=rf"^test: X must be finite, got -inf at row {row}, column {column}$"):
            _core.check_finite("test", rows, threads)
        with pytest.raises(
            ValueError, match=rf"^test: X must be finite, got -inf at row {row + 300}, column {column}$"
        ):
            _core.check_finite("test", rows, threads, first_row=300)


# ---- the sums of a sketch


def sketch(p: int, l: int, q: int = 8, **params: Any) -> _core.RowSketch:  # noqa: E741
    params = {"seed": 3, "num_threads": 2, "origin": None, "directions": None, **params}
    index = cuda_index("sketch", gram.__kwdefaults__["device"])
    if index is None:
        return _core.RowSketch(num_features=p, range_size=l, test_size=q, **params)
    del params["num_threads"]
    return cuda_engine().RowSketch(num_features=p, range_size=l, test_size=q, device=index, **params)


def take(own: _core.RowSketch, rows: Any) -> None:
    own.partial_fit(rows, first_row=0, all_or_none=True)


def orthonormal(l: int, p: int) -> np.ndarray:  # noqa: E741
    return np.linalg.qr(np.random.default_rng(l).standard_normal((p, l)))[0].T.astype(np.float32).copy()


@pytest.mark.parametrize("num_rows", [257, 300, 511, 513, 600])
def test_sums_that_are_read_hold_whole_blocks_and_change_nothing(num_rows):
    """Rows come one by one, and a block of them is added to the sums step by step; reading ends that."""
    rows = np.random.default_rng(num_rows).standard_normal((num_rows, 60), dtype=np.float32)
    read, unread, at_once = (sketch(60, 4) for _ in range(3))
    for row in rows:
        for one in (read, unread):
            take(one, row[None])
        before = read.gram, read.co_range, read.row_sum, read.squares
    take(at_once, rows)
    for got, expected in zip(before, (at_once.gram, at_once.co_range, at_once.row_sum, at_once.squares), strict=True):
        np.testing.assert_array_equal(got, expected)
    for one in (read, unread, at_once):
        one.settle()
    np.testing.assert_array_equal(read.gram, unread.gram)
    np.testing.assert_array_equal(read.co_range, at_once.co_range)


@pytest.mark.parametrize("p", [5, 17, 255, 256, 257, 300, 700])
@pytest.mark.parametrize(("l", "q"), [(1, 8), (3, 2), (4, 0), (20, 8), (40, 8)])
def test_omega_has_four_signs_a_column_one_in_each_stratum_and_two_in_the_tests(p, l, q):  # noqa: E741
    l = min(l, p)  # noqa: E741
    omega = sketch(p, l, q).apply(np.eye(p, dtype=np.float32))
    if l == p:
        assert np.array_equal(omega[:, :l], np.eye(p))
        return
    assert set(np.unique(omega)) <= {-1.0, 0.0, 1.0}
    strata = min(4, l)
    for i in range(strata):
        assert (np.abs(omega[:, l * i // strata : l * (i + 1) // strata]).sum(1) == 1).all()
    for i in range(min(2, q)):
        assert (np.abs(omega[:, l + q * i // 2 : l + q * (i + 1) // 2]).sum(1) == 1).all()
    if p > 200:  # signs are fair, and no output is left out
        assert np.abs(omega.sum()) <= 6 * np.sqrt(np.abs(omega).sum())
        assert np.abs(omega).sum(0).min() > 0


def test_omega_depends_on_the_seed_alone():
    eye = np.eye(300, dtype=np.float32)
    one, same, other = (sketch(300, 20, seed=seed, num_threads=seed % 3 + 1).apply(eye) for seed in (4, 4, 5))
    assert np.array_equal(one, same)
    assert np.array_equal(one, sketch(300, 20, seed=4, num_threads=7).apply(eye))
    assert not np.array_equal(one, other)
    high = sketch(300, 20, seed=4 + 2**32).apply(eye)  # all 64 bits count
    assert not np.array_equal(one, high)


@pytest.mark.parametrize("p", SIZES)
@pytest.mark.parametrize("n", [1, 3, 15, 16, 17, 40])
def test_apply_is_the_product_with_omega(n, p):
    for l in sorted({1, (p + 1) // 2, p}):  # noqa: E741
        own = sketch(p, l, 0 if l == p else 8)
        omega = own.apply(np.eye(p, dtype=np.float32)).astype(np.float64)
        exact = integers(n, p)
        assert np.array_equal(own.apply(exact), exact @ omega)
        rows = random_rows(n, p)
        summed = np.abs(rows) @ np.abs(omega)
        assert (np.abs(own.apply(rows) - rows @ omega) <= 8 * EPS * summed).all()
        wide = np.concatenate([rows, rows], axis=1)[:, p // 2 : p // 2 + p]
        assert np.array_equal(own.apply(wide), own.apply(wide.copy()))


@pytest.mark.parametrize("p", [*SIZES, 511, 512, 513, 530, 1100])
def test_apply_in_given_directions_is_the_product_with_them(p):
    for l in sorted({1, min(p, 5), min(p, 33)}):  # noqa: E741
        directions = orthonormal(l, p)
        own = sketch(p, l, 0, directions=directions)
        assert own.directed
        rows = random_rows(70, p)
        exact = rows.astype(np.float64) @ directions.T.astype(np.float64)
        summed = np.abs(rows) @ np.abs(directions.T)
        assert (np.abs(own.apply(rows) - exact) <= np.sqrt(p) * EPS * summed).all()


def assert_sums(own: _core.RowSketch, rows: np.ndarray, origin: np.ndarray | None) -> None:
    """C = Y^T D in float32 over 128 rows, G = Y^T Y in float64, of Y = [D Omega, 1], as apply() gives it."""
    d = rows if origin is None else rows - origin  # rounded to float32, as the kernels do
    y = np.concatenate([own.apply(d), np.ones((len(d), 1), np.float32)], axis=1).astype(np.float64)
    d = d.astype(np.float64)
    settled = own.snapshot()
    assert settled.num_rows() == len(rows)
    assert (np.abs(settled.gram - y.T @ y) <= 2 * len(rows) * EPS64 * (np.abs(y).T @ np.abs(y))).all()
    assert np.array_equal(settled.gram, settled.gram.T)
    assert (np.abs(settled.co_range - y.T @ d) <= 16 * EPS * (np.abs(y).T @ np.abs(d))).all()
    assert np.array_equal(settled.row_sum, settled.co_range[-1])
    assert np.isclose(settled.squares, np.sum(d**2), rtol=8 * EPS, atol=0)
    assert np.array_equal(own.range_rows(), y[:, : own.range_size])
    weights = np.random.default_rng(0).standard_normal((len(settled.gram), 5))
    exact = weights.T @ settled.co_range
    summed = np.abs(weights.T) @ np.abs(settled.co_range)
    assert (np.abs(settled.combine(weights) - exact) <= EPS / 2 * np.abs(exact) + 200 * EPS64 * summed).all()


@pytest.mark.parametrize("n", [1, 127, 128, 129, 255, 256, 257, 511, 513])
@pytest.mark.parametrize("p", [30, 64, 65, 256, 300])
@pytest.mark.parametrize("with_origin", [False, True])
def test_the_sums_of_a_sketch_are_those_of_its_rows(n, p, with_origin):
    rows = random_rows(n, p)
    origin = rows[0] + np.float32(1) if with_origin else None
    own = sketch(p, 20, origin=origin)
    take(own, rows)
    assert_sums(own, rows, origin)


@pytest.mark.parametrize("p", sorted({*SIZES, 63, 127, 191, 257, 513}))
@pytest.mark.parametrize("kind", ["signs", "identity", "directions"])
def test_the_sums_of_a_sketch_of_any_width_are_those_of_its_rows(p, kind, device):
    if device != "cpu" and p > 191:
        pytest.skip("no other code there, and seconds on the emulator")
    rows, origin = random_rows(300, p), random_rows(1, p, seed=1)[0]
    for l in sorted({1, min(p, 7), min(p, 40)}) if kind != "identity" else (p,):  # noqa: E741
        params = {"directions": orthonormal(l, p)} if kind == "directions" else {}
        for about in (None, origin):
            own = sketch(p, l, 8 if kind == "signs" and l < p else 0, origin=about, **params)
            take(own, rows)
            assert_sums(own, rows, about)


@pytest.mark.parametrize("p", [7, 300])
def test_the_sums_of_integers_are_exact(p):
    rows, origin = integers(600, p, most=5), integers(1, p, seed=1, most=5)[0]
    own = sketch(p, min(p, 20), 8 if p > 20 else 0, origin=origin)
    take(own, rows)
    d = (rows - origin).astype(np.float64)
    y = np.concatenate([own.apply(rows - origin), np.ones((600, 1))], axis=1).astype(np.float64)
    settled = own.snapshot()
    assert np.array_equal(settled.gram, y.T @ y)
    assert np.array_equal(settled.co_range, y.T @ d)
    assert settled.squares == np.sum(d**2)


def test_the_sums_of_merged_sketches_of_integers_are_exact():
    """Integers, so that moving one sketch's sums to the other's origin rounds nothing either."""
    rows, origins = integers(900, 70, most=5), integers(2, 70, seed=1, most=5)
    whole, own, other = (sketch(70, 20, origin=origins[i].copy()) for i in (0, 0, 1))
    take(whole, rows)
    take(own, rows[:400])
    take(other, rows[400:])
    own.merge(other)
    one, two = whole.snapshot(), own.snapshot()
    assert np.array_equal(one.gram, two.gram)
    assert np.array_equal(one.co_range, two.co_range)
    assert one.squares == two.squares
    assert np.array_equal(whole.range_rows(), own.range_rows())
    assert other.num_rows() == 500


def test_a_snapshot_is_settled_and_stays_as_it_was():
    rows = random_rows(900, 70)
    own = sketch(70, 20)
    take(own, rows[:300])
    assert len(own.pending) == 44
    settled = own.snapshot()
    assert (len(settled.pending), settled.num_rows()) == (0, 300)
    before = settled.gram.copy(), settled.co_range.copy(), settled.range_rows().copy()
    take(own, rows[300:])
    for now, then in zip((settled.gram, settled.co_range, settled.range_rows()), before, strict=True):
        assert np.array_equal(now, then)
    assert np.array_equal(own.pending, rows[768:])
    assert own.num_rows() == 900


def test_the_first_rows_are_kept_as_they_are_less_the_origin():
    rows, origin = random_rows(257, 70), random_rows(1, 70, seed=1)[0]
    own = sketch(70, 20, origin=origin)
    assert own.exact
    assert own.exact_rows().shape == (0, 70)
    take(own, rows[:256])
    assert own.exact
    assert np.array_equal(own.exact_rows(), rows[:256] - origin)
    own.settle()
    assert own.exact
    take(own, rows[256:])
    assert not own.exact
    assert own.exact_rows().shape == (0, 70)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"p": 0, "l": 1}, ValueError, "RowSketch: X must have at least one column, got 0"),
        ({"l": 0}, ValueError, r"RowSketch: range_size must lie in \[1, p\] = \[1, 9\], got 0"),
        ({"l": 10}, ValueError, r"RowSketch: range_size must lie in \[1, p\] = \[1, 9\], got 10"),
        ({"q": -1}, ValueError, r"RowSketch: test_size must lie in \[0, 1024\], got -1"),
        ({"origin": np.zeros(8, np.float32)}, ValueError, r"RowSketch: origin must have shape \(p,\) = \(9,\)"),
        ({"origin": np.zeros(9)}, TypeError, "RowSketch: origin must be a NumPy array of float32, got float64"),
        ({"directions": np.zeros((3, 9), np.float32)}, ValueError, "RowSketch: directions must have shape"),
        ({"directions": orthonormal(4, 9)}, ValueError, "beside given directions test_size must be 0, got 2"),
        ({"q": 0, "directions": np.full((4, 9), np.nan, np.float32)}, ValueError, "directions must be finite, got nan"),
        ({"num_threads": 0}, ValueError, r"num_threads must lie in \[1, 1024\], got 0"),
    ],
)
def test_a_wrong_sketch_is_refused(change, error, message, device):
    if device != "cpu" and "num_threads" in change:
        pytest.skip("a device has no threads to choose")
    with pytest.raises(error, match=message):
        sketch(**{"p": 9, "l": 4, "q": 2, **change})


def test_a_sketch_refuses_rows_that_are_not_float32_and_contiguous():
    own = sketch(9, 4)
    for method in (own.apply, lambda rows: take(own, rows)):
        with pytest.raises(TypeError, match="X must be a NumPy array of float32, got float64"):
            method(np.zeros((3, 9)))
        with pytest.raises(TypeError, match="X must be a NumPy array of float32, got list"):
            method([[1.0]])
        with pytest.raises(ValueError, match=r"X must have shape \(n, 9\), got \(3, 8\)"):
            method(np.zeros((3, 8), np.float32))
        with pytest.raises(ValueError, match="X must have contiguous rows"):
            method(np.zeros((3, 18), np.float32)[:, ::2])
    assert own.num_rows() == 0


@pytest.mark.parametrize("all_or_none", [False, True])
def test_a_sketch_names_the_row_that_it_refuses_by_its_place_in_the_whole(all_or_none):
    rows = random_rows(700, 9)
    rows[600, 5] = np.nan
    own = sketch(9, 4)
    take(own, rows[:300])
    with pytest.raises(ValueError, match=r"^partial_fit: X must be finite, got nan at row 1600, column 5$"):
        own.partial_fit(rows[300:], first_row=1300, all_or_none=all_or_none)
    assert (own.num_rows() == 300) == all_or_none
