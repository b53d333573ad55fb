"""StreamingSVD as an estimator: what it refuses and that nothing is lost by it, scikit-learn's conventions, threads."""

import copy
import re
import signal
import threading
from typing import Any

import numpy as np
import pytest
import reference
from test_svd import EPS, EPS64, assert_orthonormal, random_rows, results, stream

from tipl.svd import NotFittedError, StreamingSVD

# ---- what is refused, and that nothing is lost by it


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 7, 99])
def test_a_value_that_is_not_finite_is_refused_with_its_row_and_changes_nothing(bad, row):
    rows = random_rows(250, 33)
    estimator, clean = (stream(StreamingSVD(4), rows[:150], 70) for _ in range(2))
    spoilt = rows[150:].copy()
    spoilt[row, 17] = bad
    with pytest.raises(ValueError, match=rf"^partial_fit: X must be finite, got {bad} at row {row}, column 17$"):
        estimator.partial_fit(spoilt)
    assert results(estimator) == results(clean)
    assert results(estimator.partial_fit(rows[150:])) == results(clean.partial_fit(rows[150:]))


def test_an_estimator_whose_first_rows_are_refused_has_seen_none():
    estimator = StreamingSVD(2)
    with pytest.raises(ValueError, match=r"^partial_fit: X must be finite, got nan at row 1, column 0$"):
        estimator.partial_fit(np.array([[1, 2], [np.nan, 2]], np.float32))
    with pytest.raises(NotFittedError):
        _ = estimator.components_
    assert estimator.partial_fit(np.ones((1, 5), np.float32)).n_features_in_ == 5


def test_rows_too_large_for_float32_directions_are_refused_and_change_nothing():
    message = re.escape("X is too large for float32 directions: the squares of all rows seen sum to")
    estimator = StreamingSVD(1).fit(np.full((1, 2), 6e37, np.float32))
    before = results(estimator)
    with pytest.raises(ValueError, match=rf"^partial_fit: {message} 1.44e\+76, which must stay below 1e\+76$"):
        estimator.partial_fit(np.full((1, 2), 6e37, np.float32))
    with pytest.raises(ValueError, match=rf"^merge: {message}"):
        estimator.merge(StreamingSVD(1).fit(np.full((1, 2), 6e37, np.float32)))
    assert results(estimator) == before
    assert np.isfinite(estimator.components_).all()
    smaller = [StreamingSVD(1).fit(np.full((1, 2), 4e37, np.float32)) for _ in range(3)]
    for other in smaller[1:]:
        smaller[0].merge(other)  # what was merged counts: 9.6e75 now
    with pytest.raises(ValueError, match=rf"^partial_fit: {message}"):
        smaller[0].partial_fit(np.full((1, 2), 4e37, np.float32))


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (np.zeros((3, 4)), TypeError, "X must be a NumPy array of float32, got float64"),
        ([[1.0]], TypeError, "X must be a NumPy array of float32, got list"),
        (np.zeros(4, np.float32), ValueError, r"X must have shape \(n, p\).*, got \(4,\)"),
        (np.zeros((0, 4), np.float32), ValueError, "X must have at least one row, got 0"),
        (np.zeros((4, 3), np.float32).T, ValueError, "X must be C-contiguous"),
    ],
)
@pytest.mark.parametrize("fitted", [False, True])
def test_wrong_rows_are_refused(rows, error, message, fitted):
    estimator = StreamingSVD(2)
    if fitted:
        estimator.fit(random_rows(10, 4))
    with pytest.raises(error, match=f"^partial_fit: {message}"):
        estimator.partial_fit(rows)


def test_rows_with_another_number_of_columns_are_refused():
    estimator = StreamingSVD(2).fit(random_rows(10, 4))
    with pytest.raises(ValueError, match=r"^partial_fit: X must have shape \(n, p\) = \(n, 4\), got \(3, 5\)$"):
        estimator.partial_fit(np.zeros((3, 5), np.float32))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"n_components": 0}, ValueError, r"StreamingSVD: n_components must lie in \[1, p\] = \[1, 4\], got 0"),
        ({"n_components": 5}, ValueError, r"StreamingSVD: n_components must lie in \[1, p\] = \[1, 4\], got 5"),
        ({"n_components": 2.0}, TypeError, r"n_components must be an integer, got 2\.0"),
        ({"n_oversamples": -1}, ValueError, "StreamingSVD: n_oversamples must be >= 0, got -1"),
        ({"n_oversamples": None}, TypeError, "n_oversamples must be an integer, got None"),
        ({"center": 1}, TypeError, "StreamingSVD: center must be a bool, got 1"),
        ({"seed": -1}, ValueError, r"StreamingSVD: seed must lie in \[0, 2\*\*64\), got -1"),
        ({"seed": "0"}, TypeError, "seed must be an integer, got '0'"),
        ({"num_threads": 0}, ValueError, r"num_threads must lie in \[1, 1024\], got 0"),
        ({"num_threads": 1.5}, TypeError, r"num_threads must be an integer, got 1\.5"),
    ],
)
def test_wrong_parameters_are_refused_with_the_first_row(params, error, message):
    estimator = StreamingSVD(**{"n_components": 2, **params})
    with pytest.raises(error, match=f"^{message}$"):
        estimator.partial_fit(np.ones((3, 4), np.float32))
    with pytest.raises(error, match=f"^{message}$"):
        estimator.fit(np.ones((3, 4), np.float32))


@pytest.mark.parametrize(
    "attribute",
    ["components_", "singular_values_", "mean_", "residual_bound_", "n_samples_seen_", "n_features_in_"],
)
def test_learned_attributes_do_not_exist_before_the_first_row(attribute):
    estimator = StreamingSVD(2)
    assert not hasattr(estimator, attribute)
    with pytest.raises(
        NotFittedError, match=f"^{attribute}: this StreamingSVD has seen no rows; call fit or partial_fit"
    ):
        getattr(estimator, attribute)
    assert hasattr(estimator.fit(np.ones((1, 3), np.float32)), attribute)


def test_transform_before_fit_is_refused():
    rows = np.ones((1, 3), np.float32)
    for method in ("transform", "inverse_transform"):
        with pytest.raises(NotFittedError, match=f"^{method}: this StreamingSVD has seen no rows"):
            getattr(StreamingSVD(2), method)(rows)


# ---- scikit-learn's conventions


def test_transform_gives_coordinates_and_inverse_transform_goes_back():
    rows = reference.with_singular_values(np.array([9.0, 4.0, 1.0]), 200, 70, seed=12) + np.float32(3)
    estimator = StreamingSVD(3, center=True).fit(rows)
    coordinates = estimator.transform(rows)
    exact = (rows.astype(np.float64) - estimator.mean_) @ estimator.components_.T.astype(np.float64)
    assert coordinates.dtype == np.float32
    assert np.abs(coordinates - exact).max() <= EPS * np.abs(exact).max()
    back = estimator.inverse_transform(coordinates)
    assert back.dtype == np.float32
    assert np.abs(back - rows).max() <= 16 * EPS * np.abs(rows).max()


def test_transform_refuses_what_it_cannot_take():
    estimator = StreamingSVD(2).fit(random_rows(10, 4))
    with pytest.raises(ValueError, match=r"^transform: X must have shape \(n, p\) = \(n, 4\), got \(1, 5\)$"):
        estimator.transform(np.zeros((1, 5), np.float32))
    with pytest.raises(TypeError, match=r"^transform: X must be a NumPy array of float32, got float64$"):
        estimator.transform(np.zeros((1, 4)))
    with pytest.raises(ValueError, match=r"^transform: X must be finite, got nan at row 0, column 0$"):
        estimator.transform(np.full((1, 4), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"^inverse_transform: X must have shape \(n, k\) = \(n, 2\), got \(1, 3\)$"):
        estimator.inverse_transform(np.zeros((1, 3), np.float32))
    assert estimator.transform(np.zeros((0, 4), np.float32)).shape == (0, 2)


def test_parameters_are_stored_untouched_and_learned_attributes_are_not_set_by_the_constructor():
    params = {"n_components": "five", "n_oversamples": -3, "center": None, "seed": 1.5, "num_threads": "all"}
    estimator = StreamingSVD(**params)
    assert estimator.get_params() == params
    assert not [name for name in vars(estimator) if name.endswith("_") and not name.startswith("_")]
    assert repr(estimator) == (
        "StreamingSVD(n_components='five', n_oversamples=-3, center=None, seed=1.5, num_threads='all')"
    )
    assert type(estimator)(**estimator.get_params()).get_params() == params  # as sklearn.base.clone does


def test_set_params_holds_from_the_next_fit_on():
    estimator = StreamingSVD(2).fit(random_rows(10, 6))
    assert estimator.set_params(n_components=3) is estimator
    with pytest.raises(ValueError, match=r"^partial_fit: n_components was 2 when the first row came and is 3 now"):
        estimator.partial_fit(random_rows(10, 6))
    with pytest.raises(ValueError, match=r"^merge: n_components was 2 when the first row came and is 3 now"):
        estimator.merge(StreamingSVD(3).fit(random_rows(10, 6)))
    assert estimator.fit(random_rows(10, 6)).components_.shape == (3, 6)
    with pytest.raises(ValueError, match=r"^set_params: parameters are n_components, .*, got 'n_iter'$"):
        estimator.set_params(n_iter=2)


def test_methods_return_the_estimator_and_fit_forgets():
    rows = random_rows(100, 20)
    estimator = StreamingSVD(4)
    assert estimator.partial_fit(rows[:10]) is estimator
    assert estimator.merge(StreamingSVD(4).fit(rows[10:20])) is estimator
    assert estimator.fit(rows[20:]) is estimator
    assert results(estimator) == results(StreamingSVD(4).fit(rows[20:]))
    with pytest.raises(ValueError, match="got inf at row 0"):
        estimator.fit(np.full((1, 20), np.inf, np.float32))
    assert estimator.n_samples_seen_ == 80  # a fit that is refused leaves the estimator as it was


def test_copies_before_the_first_row_are_equal():
    assert copy.deepcopy(StreamingSVD(4, seed=3)).get_params() == StreamingSVD(4, seed=3).get_params()


# ---- threads and signals of Python


def test_threads_that_share_an_estimator_wait_for_one_another():
    rows = random_rows(1200, 50)
    estimator = StreamingSVD(5, center=True)
    threads = [threading.Thread(target=stream, args=(estimator, part, 7)) for part in np.split(rows, 4)]
    estimator.partial_fit(rows[:1])  # the first rows set it up; they are its caller's to order
    for thread in threads:
        thread.start()
    for _ in range(20):
        assert_orthonormal(estimator.components_)
    for thread in threads:
        thread.join()
    assert estimator.n_samples_seen_ == 1201
    exact = np.concatenate([rows[:1], rows]).astype(np.float64).mean(0)
    assert np.allclose(estimator.mean_, exact, rtol=1201 * EPS64)


def test_a_signal_stops_between_blocks_and_the_rest_can_follow():
    class Stopped(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stopped

    rows = np.random.default_rng(0).standard_normal((20_000, 500), dtype=np.float32)
    estimator = StreamingSVD(8, num_threads=1)
    previous = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.03)
        with pytest.raises(Stopped):
            estimator.fit(rows)
            estimator.partial_fit(rows)  # not reached
        signal.setitimer(signal.ITIMER_REAL, 0.03)
        with pytest.raises(Stopped):
            estimator.partial_fit(rows)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    taken = estimator.n_samples_seen_
    assert 0 < taken < len(rows)
    assert results(estimator) == results(StreamingSVD(8).fit(rows[:taken]))
