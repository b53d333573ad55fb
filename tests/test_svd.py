"""The streaming SVD against the exact one: its error, its bound, its invariances, merging, and degenerate rows."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import ISAS, run_python

from tipl import _core
from tipl.svd import NotFittedError, StreamingSVD, gram

EPS = float(np.finfo(np.float32).eps)
EPS64 = float(np.finfo(np.float64).eps)
N, P, K = 2000, 3000, 32  # of the matrices on which the error is measured

# Sizes around the vector width, and around the register tiles and blocks of the kernels.
SIZES = sorted({1, 3, 7, *(_core.lanes() * i + j for i in (1, 2, 8) for j in (-1, 0, 1, 2))})


def low_rank() -> np.ndarray:
    """24 directions from 1 to 0.1, and a flat tail 1000 times below."""
    return reference.with_singular_values(np.r_[np.linspace(1, 0.1, 24), np.full(N - 24, 1e-4)], N, P, seed=1)


def power_law() -> np.ndarray:
    return reference.with_singular_values(1.0 / np.arange(1, N + 1), N, P, seed=1)


def flat_with_gap() -> np.ndarray:
    """K equal singular values, and all others equal, 3 times below."""
    return reference.with_singular_values(np.r_[np.ones(K), np.full(N - K, 1 / 3)], N, P, seed=1)


def weak_among_loud() -> np.ndarray:
    """The flat spectrum at its worst: K equal directions spread thinly over every other row, and in between 1000 rows
    that are each a direction of their own, sqrt(10) times below: louder than all of a block's share of the first K."""
    rng = np.random.default_rng(4)
    directions = np.linalg.qr(rng.standard_normal((P, K + N // 2)))[0].T
    rows = np.empty((N, P), np.float32)
    rows[::2] = np.sqrt(0.1) * directions[K:]
    rows[1::2] = np.linalg.qr(rng.standard_normal((N // 2, K)))[0] @ directions[:K]
    return rows


@functools.cache
def matrix(make: Callable[[], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The matrix, and its exact singular values. Squared they are known to 1e-12 of the largest, and in the tails that
    matter here they are 1e-8 of it at least."""
    rows = make()
    return rows, np.sqrt(np.maximum(np.linalg.eigvalsh(reference.gram(rows, None))[::-1], 0.0))


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
        estimator.components_.tobytes(),
        estimator.singular_values_.tobytes(),
        estimator.mean_.tobytes(),
        estimator.residual_bound_,
    )


def largest_angle(a: np.ndarray, b: np.ndarray) -> float:
    """The sine of the largest angle between the spans of a and b, both with orthonormal rows."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - (a @ b.T) @ b, 2))


def assert_orthonormal(components: np.ndarray) -> None:
    """Each product of two rows is off by their rounding to float32 alone: eps / 2 of every entry of either."""
    v = components.astype(np.float64)
    assert np.abs(v @ v.T - np.eye(len(v))).max() <= 2 * EPS


# ---- error


@pytest.mark.parametrize("make", [low_rank, power_law, flat_with_gap])
def test_the_residual_is_within_5_percent_of_the_optimum(make):
    rows, exact = matrix(make)
    optimum = float(np.linalg.norm(exact[K:]))
    estimator = stream(StreamingSVD(K), rows, 100, 37, 211)
    assert_orthonormal(estimator.components_)
    error = reference.residual(rows, estimator.components_, center=False)
    assert optimum * (1 - EPS) <= error <= 1.05 * optimum
    # What it says of itself is true, and within 5 % too.
    assert error <= estimator.residual_bound_ <= 1.05 * optimum + EPS * np.linalg.norm(exact)


@pytest.mark.parametrize("make", [low_rank, power_law, flat_with_gap])
def test_singular_values_are_never_too_large_and_lack_only_what_the_bound_admits(make):
    rows, exact = matrix(make)
    estimator = stream(StreamingSVD(K), rows, 64)
    ours = estimator.singular_values_
    assert (ours <= exact[:K] + EPS * exact[0]).all()
    missing = estimator.residual_bound_**2 - np.sum(exact[K:] ** 2)  # >= the sum of exact^2 - ours^2
    assert (ours**2 >= exact[:K] ** 2 - missing - EPS * exact[0] ** 2).all()


@pytest.mark.parametrize("n_oversamples", [0, 10])
def test_too_few_oversamples_miss_the_5_percent_on_a_flat_spectrum_and_the_bound_says_so(n_oversamples):
    rows, exact = matrix(weak_among_loud)
    optimum = float(np.linalg.norm(exact[K:]))
    estimator = StreamingSVD(K, n_oversamples=n_oversamples).fit(rows)
    error = reference.residual(rows, estimator.components_, center=False)
    assert error > 1.05 * optimum
    assert estimator.residual_bound_ >= error


def test_enough_oversamples_meet_the_5_percent_on_the_same_spectrum():
    rows, exact = matrix(weak_among_loud)
    estimator = StreamingSVD(K, n_oversamples=96).fit(rows)
    error = reference.residual(rows, estimator.components_, center=False)
    assert error <= 1.05 * np.linalg.norm(exact[K:])
    assert error <= estimator.residual_bound_ <= 1.05 * np.linalg.norm(exact[K:])


@pytest.mark.parametrize("center", [False, True])
def test_rows_that_fit_into_one_block_give_the_exact_svd(center):
    rows = random_rows(64, 200)
    estimator = StreamingSVD(8, center=center).fit(rows)
    exact = rows.astype(np.float64) - (rows.astype(np.float64).mean(0) if center else 0)
    _, singular, directions = np.linalg.svd(exact, full_matrices=False)
    assert np.allclose(estimator.singular_values_, singular[:8], rtol=0, atol=64 * EPS * singular[0])
    projector = estimator.components_.T.astype(np.float64) @ estimator.components_
    gap = singular[7] - singular[8]
    assert np.linalg.norm(projector - directions[:8].T @ directions[:8], 2) <= 64 * EPS * singular[0] / gap


def test_the_largest_entry_of_each_component_is_positive():
    components = StreamingSVD(8).fit(random_rows(100, 50)).components_
    assert (components[np.arange(8), np.abs(components).argmax(1)] > 0).all()


def test_small_singular_values_survive_float32():
    """A tail a million times below the first direction is found, because all sums are float64."""
    exact = np.r_[1.0, np.geomspace(1e-4, 1e-6, 20)]
    rows = reference.with_singular_values(exact, 300, 400, seed=5)
    estimator = stream(StreamingSVD(12), rows, 30)
    exact = reference.singular_values(rows, center=False)  # of the rows as rounded
    assert np.abs(estimator.singular_values_ / exact[:12] - 1).max() < 0.01
    assert_orthonormal(estimator.components_)
    assert reference.residual(rows, estimator.components_, center=False) <= 1.05 * np.linalg.norm(exact[12:])


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 200),
    p=st.integers(1, 40),
    decay=st.floats(0, 3),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
    center=st.booleans(),
    n_oversamples=st.integers(0, 3),
    data=st.data(),
)
def test_the_bound_of_the_residual_holds(n, p, decay, offset, center, n_oversamples, data):
    k = data.draw(st.integers(1, p))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows = rng.standard_normal((n, p)) * np.arange(1.0, p + 1) ** -decay @ rng.standard_normal((p, p)) + offset
    rows = (rows * rng.pareto(1.0, (n, 1))).astype(np.float32)  # some rows much louder than others
    estimator = stream(StreamingSVD(k, n_oversamples=n_oversamples, center=center), rows, 17)
    assert_orthonormal(estimator.components_)
    assert reference.residual(rows, estimator.components_, center) <= estimator.residual_bound_


# ---- the mean


def test_a_mean_far_larger_than_the_deviations_is_taken_off():
    rng = np.random.default_rng(6)
    mean = 1000 * rng.standard_normal(300)
    deviations = reference.with_singular_values(np.r_[3, 2, 1, np.full(100, 0.01)] * 30, 500, 300, seed=7)
    rows = (mean + deviations).astype(np.float32)
    estimator = stream(StreamingSVD(3, center=True), rows, 41)
    assert np.allclose(estimator.mean_, rows.astype(np.float64).mean(0), rtol=1000 * EPS64, atol=0)
    exact = reference.singular_values(rows, center=True)
    assert np.allclose(estimator.singular_values_, exact[:3], rtol=0, atol=8 * EPS * exact[0])
    assert reference.residual(rows, estimator.components_, center=True) <= 1.05 * np.linalg.norm(exact[3:])


def test_the_mean_is_that_of_all_rows_and_zero_without_center():
    rows = random_rows(333, 21)
    exact = rows.astype(np.float64).mean(0)
    assert np.allclose(stream(StreamingSVD(2, center=True), rows, 50).mean_, exact, rtol=333 * EPS64)
    assert not StreamingSVD(2).fit(rows).mean_.any()


# ---- the same bits


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=8),
    read=st.lists(st.booleans(), min_size=1, max_size=8),
    center=st.booleans(),
    k=st.sampled_from([1, 5, 70]),
)
def test_any_chunking_of_the_rows_and_any_reading_in_between_give_the_same_bits(sizes, read, center, k):
    rows = random_rows(300, 90)
    whole = StreamingSVD(k, center=center).fit(rows)
    streamed = StreamingSVD(k, center=center)
    for i, chunk in enumerate(chunks(rows, sizes)):
        streamed.partial_fit(chunk)
        if read[i % len(read)]:
            assert streamed.components_.shape == (k, 90)
    assert results(streamed) == results(whole)


@pytest.mark.parametrize("center", [False, True])
def test_any_number_of_threads_gives_the_same_bits(center):
    rows = random_rows(400, 1001)
    one, *others = (StreamingSVD(6, center=center, num_threads=threads).fit(rows) for threads in (1, 2, 7))
    for other in others:
        assert results(other) == results(one)
        assert np.array_equal(other.transform(rows), one.transform(rows))


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_the_same_directions(isa, tmp_path):
    rows = reference.with_singular_values(np.r_[3.0, 2.0, 1.0, np.full(50, 0.1)], 300, 131, seed=8)
    np.save(tmp_path / "rows.npy", rows)
    done = run_python(
        "import sys, numpy as np\n"
        "from tipl.svd import StreamingSVD, gram\n"
        "folder = sys.path.pop()\n"
        "rows = np.load(folder + '/rows.npy')\n"
        "svd = StreamingSVD(3, center=True).fit(rows)\n"
        "np.savez(folder + '/svd.npz', components=svd.components_, values=svd.singular_values_, mean=svd.mean_,\n"
        "         gram=gram(rows, rows[0]), coordinates=svd.transform(rows))\n".replace(
            "sys.path.pop()", repr(str(tmp_path))
        ),
        TIPL_ISA=isa,
    )
    if f"this CPU lacks {isa}" in done.stderr:
        pytest.skip(f"this CPU lacks {isa}")
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "svd.npz")
    here = StreamingSVD(3, center=True).fit(rows)
    assert np.allclose(theirs["values"], here.singular_values_, rtol=0, atol=8 * EPS * here.singular_values_[0])
    assert np.abs(theirs["components"] - here.components_).max() <= 8 * EPS
    assert np.array_equal(theirs["mean"], here.mean_)
    assert np.allclose(theirs["gram"], gram(rows, rows[0]), rtol=0, atol=131 * EPS64 * 36)
    assert np.allclose(theirs["coordinates"], here.transform(rows), rtol=0, atol=32 * EPS * 3)


# ---- merging


@pytest.mark.parametrize("center", [False, True])
def test_merged_sketches_of_low_rank_rows_equal_one_run_over_all_rows(center):
    """Where nothing is truncated, only rounding tells the parts from the whole, in whatever order they are merged."""
    rows = reference.with_singular_values(np.array([5.0, 4.0, 3.0, 2.0]), 700, 120, seed=9) + np.float32(0.25)
    whole = StreamingSVD(4, center=center).fit(rows)
    exact = reference.singular_values(rows, center)
    cuts = [slice(0, 5), slice(5, 300), slice(300, 301), slice(301, 700)]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        merged = StreamingSVD(4, center=center)
        for part in order:
            merged.merge(stream(StreamingSVD(4, center=center), rows[cuts[part]], 40))
        assert merged.n_samples_seen_ == 700
        assert np.allclose(merged.mean_, whole.mean_, rtol=0, atol=700 * EPS64)
        assert np.allclose(merged.singular_values_, exact[:4], rtol=0, atol=32 * EPS * exact[0])
        assert largest_angle(merged.components_, whole.components_) <= 32 * EPS * exact[0] / exact[3]


@pytest.mark.parametrize("center", [False, True])
def test_merged_sketches_keep_the_error_of_one_run_in_any_order(center):
    rows = reference.with_singular_values(1.0 / np.arange(1, 301), 900, 300, seed=10) + np.float32(0.01)
    optimum = float(np.linalg.norm(reference.singular_values(rows, center)[16:]))
    parts = [stream(StreamingSVD(16, center=center), part, 64) for part in np.split(rows, 3)]
    merged = []
    for order in ([0, 1, 2], [2, 0, 1]):
        both = StreamingSVD(16, center=center)
        for part in order:
            both.merge(parts[part])
        error = reference.residual(rows, both.components_, center)
        assert error <= both.residual_bound_ <= 1.05 * optimum
        merged.append(both)
    # Two sets of directions that each lose at most x of the squares can differ by no more than x in each square.
    lost = merged[0].residual_bound_ ** 2 - optimum**2
    assert np.abs(merged[0].singular_values_ ** 2 - merged[1].singular_values_ ** 2).max() <= 2 * lost


def test_a_merged_estimator_goes_on_and_the_other_one_stays_as_it_was():
    rows = random_rows(500, 80)
    first = stream(StreamingSVD(5, center=True), rows[:150], 33)
    other = stream(StreamingSVD(5, center=True), rows[150:330], 33)
    before = results(other)
    first.merge(other)
    assert results(other) == before
    other.partial_fit(rows[330:])
    first.partial_fit(rows[330:])
    assert first.n_samples_seen_ == 500
    exact = reference.singular_values(rows, center=True)
    assert np.allclose(first.mean_, rows.astype(np.float64).mean(0), rtol=500 * EPS64)
    assert reference.residual(rows, first.components_, center=True) <= 1.05 * np.linalg.norm(exact[5:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_components": 4}, "n_components = 5, got 4"),
        ({"n_oversamples": 3}, "n_oversamples = 10, got 3"),
        ({"center": True}, "center = 0, got 1"),
        ({"seed": 9}, "seed = 0, got 9"),
    ],
)
def test_merge_refuses_other_parameters(change, message):
    rows = random_rows(20, 30)
    estimator = StreamingSVD(5).fit(rows)
    before = results(estimator)
    with pytest.raises(ValueError, match=re.escape(f"merge: other must have {message}")):
        estimator.merge(StreamingSVD(**{"n_components": 5, **change}).fit(rows))
    assert results(estimator) == before


def test_merge_refuses_other_columns_itself_no_rows_and_other_things():
    estimator = StreamingSVD(5).fit(random_rows(20, 30))
    with pytest.raises(ValueError, match="merge: other must have n_features_in_ = 30, got 31"):
        estimator.merge(StreamingSVD(5).fit(random_rows(20, 31)))
    with pytest.raises(ValueError, match="merge: other must be another estimator, with rows of its own"):
        estimator.merge(estimator)
    with pytest.raises(NotFittedError, match="merge: this StreamingSVD has seen no rows"):
        estimator.merge(StreamingSVD(5))
    with pytest.raises(TypeError, match="merge: other must be a StreamingSVD, got list"):
        estimator.merge([])
    estimator.merge(StreamingSVD(5, num_threads=1).fit(random_rows(20, 30)))  # threads may differ


# ---- rows with fewer directions than components


def assert_completed(estimator: StreamingSVD, rank: int) -> None:
    """`rank` directions carry the rows; the others are orthonormal, with singular value 0."""
    assert_orthonormal(estimator.components_)
    assert (estimator.singular_values_[:rank] > 0).all()
    assert not estimator.singular_values_[rank:].any()


@pytest.mark.parametrize("n", [1, 30, 300])
def test_a_zero_matrix_has_zero_singular_values_and_orthonormal_components(n):
    estimator = StreamingSVD(4).fit(np.zeros((n, 9), np.float32))
    assert_completed(estimator, 0)
    assert estimator.residual_bound_ == 0


@pytest.mark.parametrize("n", [1, 30, 300])
def test_repeated_rows_have_one_direction_and_none_about_their_mean(n):
    row = np.arange(1, 10, dtype=np.float32)
    rows = np.tile(row, (n, 1))
    estimator = StreamingSVD(4).fit(rows)
    assert_completed(estimator, 1)
    assert np.allclose(estimator.components_[0], row / np.linalg.norm(row), rtol=4 * EPS)
    assert np.isclose(estimator.singular_values_[0], np.sqrt(n) * np.linalg.norm(row), rtol=n * EPS)
    centred = StreamingSVD(4, center=True).fit(rows)
    assert_completed(centred, 0)
    assert np.array_equal(centred.mean_, row)


@pytest.mark.parametrize("center", [False, True])
def test_fewer_rows_than_components(center):
    rows = random_rows(5, 40)
    estimator = StreamingSVD(8, center=center).fit(rows)
    assert_completed(estimator, 4 if center else 5)
    assert reference.residual(rows, estimator.components_, center) <= estimator.residual_bound_
    assert estimator.residual_bound_ <= 8 * EPS * np.linalg.norm(rows)


def test_rank_below_n_components_over_many_blocks():
    rows = reference.with_singular_values(np.array([3.0, 2.0, 1.0]), 500, 60, seed=11)
    rows = np.rint(rows * 2**12).astype(np.float32)  # integers: the rows' rounding is a fourth direction, and many more
    basis = np.rint(rows[:3])
    rows = (np.random.default_rng(0).integers(-8, 9, (500, 3)) @ basis).astype(np.float32)  # exact: rank 3
    estimator = stream(StreamingSVD(6), rows, 77)
    assert_completed(estimator, 3)
    assert reference.residual(rows, estimator.components_, center=False) <= 4 * EPS * np.linalg.norm(rows)


def test_repeated_singular_values():
    """Which directions is open, but not their span or their values."""
    rows = np.zeros((200, 50), np.float32)
    rows[np.arange(200), np.arange(200) % 10] = 3.0  # ten directions of singular value 3 sqrt(20)
    estimator = stream(StreamingSVD(10), rows, 9)
    assert np.allclose(estimator.singular_values_, 3 * np.sqrt(20), rtol=8 * EPS)
    assert np.abs(estimator.components_.T @ estimator.components_ - np.diag(np.arange(50) < 10)).max() <= 16 * EPS
    few = stream(StreamingSVD(4), rows, 9)
    assert_orthonormal(few.components_)
    assert np.allclose(few.singular_values_, 3 * np.sqrt(20), rtol=8 * EPS)


@pytest.mark.parametrize("p", SIZES)
def test_as_many_components_as_columns(p):
    rows = random_rows(3 * p + 70, p)
    estimator = stream(StreamingSVD(p, n_oversamples=0), rows, 50)
    assert_orthonormal(estimator.components_)
    exact = reference.singular_values(rows, center=False)
    assert np.allclose(estimator.singular_values_, exact, rtol=0, atol=32 * EPS * exact[0])
    assert reference.residual(rows, estimator.components_, center=False) <= estimator.residual_bound_


def test_the_seed_chooses_the_directions_that_complete_the_components_and_nothing_else():
    rows = random_rows(3, 40)
    one, same, other = (StreamingSVD(6, seed=seed).fit(rows).components_ for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert np.array_equal(one[:3], other[:3])
    assert np.abs(one[3:] - other[3:]).min(axis=1).max() > 0
    assert np.array_equal(StreamingSVD(3, seed=1).fit(rows).components_, StreamingSVD(3, seed=2).fit(rows).components_)
