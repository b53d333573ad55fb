"""StreamingSVD as an estimator: the matrices it reads, what it refuses, files, scikit-learn, groups, threads."""

import copy
import json
import re
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
import safetensors
import safetensors.numpy
import scipy.sparse
import sklearn.base
import torch
import zarr
from processes import run_python, stopped
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted
from svd_checks import EPS, assert_orthonormal, largest_angle, random_rows, results, stream

from tipl import _core
from tipl.files import locations
from tipl.subspace import row_blocks
from tipl.subspace.grouped_svd import GroupedSVD
from tipl.subspace.saved_sketch import checksum
from tipl.subspace.streaming_svd import NotFittedError, StreamingSVD

ON_EACH_DEVICE = True
cpu_only = pytest.mark.cpu_only

LEARNED = (
    "components_",
    "singular_values_",
    "explained_variance_ratio_",
    "coordinates_",
    "mean_",
    "residual_",
    "residual_interval_",
    "residual_bound_",
    "optimum_bound_",
    "n_components_",
    "n_samples_seen_",
    "n_features_in_",
)


class Watched:
    """A matrix that is nothing but `shape`, `dtype` and slices of rows, and that remembers which were read."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        self.shape, self.dtype = rows.shape, rows.dtype
        self.read: list[tuple[int, int]] = []

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, step = rows.indices(len(self.rows))
        assert step == 1
        self.read.append((start, stop))
        return self.rows[rows]


# ---- what rows may be read from


def rounded(rows: np.ndarray, dtype: Any) -> np.ndarray:
    """The rows as they are after one round trip through a type."""
    return rows.astype(dtype).astype(np.float32)


def zarr_array(rows: np.ndarray, folder: Path) -> Any:
    array = zarr.create_array(folder / "rows.zarr", shape=rows.shape, dtype=rows.dtype, chunks=(100, 20))
    array[:] = rows
    return array


def memmap(rows: np.ndarray, folder: Path) -> np.ndarray:
    np.save(folder / "rows.npy", rows)
    return np.load(folder / "rows.npy", mmap_mode="r")


def overlapping(rows: np.ndarray, folder: Path) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(rows.ravel(), 60)[:400]


SOURCES: dict[str, Callable[[np.ndarray, Path], Any]] = {
    "float32": lambda rows, folder: rows,
    "float64": lambda rows, folder: rows.astype(np.float64),
    "float16": lambda rows, folder: rows.astype(np.float16),
    "bfloat16": lambda rows, folder: rows.astype(ml_dtypes.bfloat16),
    "int64": lambda rows, folder: rows.astype(np.int64),
    "uint8": lambda rows, folder: np.abs(rows).astype(np.uint8),
    "bool": lambda rows, folder: rows > 5,
    "objects": lambda rows, folder: rows.astype(object),
    "list": lambda rows, folder: rows.tolist(),
    "big-endian": lambda rows, folder: rows.astype(">f4"),
    "tensor of float32": lambda rows, folder: torch.from_numpy(rows),
    "tensor of float64": lambda rows, folder: torch.from_numpy(rows).double(),
    "tensor of float16": lambda rows, folder: torch.from_numpy(rows).half(),
    "tensor of bfloat16": lambda rows, folder: torch.from_numpy(rows).bfloat16(),
    "tensor of int64": lambda rows, folder: torch.from_numpy(rows).long(),
    "tensor with gradient": lambda rows, folder: torch.from_numpy(rows).requires_grad_(),
    "memory map": memmap,
    "zarr": zarr_array,
    "only slices": lambda rows, folder: Watched(rows),
    "every other column": lambda rows, folder: rows[:, ::2],
    "columns in reverse": lambda rows, folder: rows[:, ::-1],
    "column slice": lambda rows, folder: rows[:, 3:40],
    "one column": lambda rows, folder: rows[:, 3:4],
    "rows in reverse": lambda rows, folder: rows[::-1],
    "every third row": lambda rows, folder: rows[::3],
    "Fortran order": lambda rows, folder: np.asfortranarray(rows),
    "overlapping rows": overlapping,
    "the same row": lambda rows, folder: np.broadcast_to(rows[0], (300, 60)),
    "unaligned": lambda rows, folder: (
        np.frombuffer(b"x" + rows.tobytes(), np.uint8)[1:].view(np.float32).reshape(-1, 60)
    ),
    "read-only": lambda rows, folder: np.frombuffer(rows.tobytes(), np.float32).reshape(rows.shape),
}


def plain(X: Any) -> np.ndarray:
    """What the source stands for: C-contiguous float32."""
    if isinstance(X, Watched):
        X = X.rows
    if isinstance(X, torch.Tensor):
        X = X.detach().float().numpy()
    return np.ascontiguousarray(np.asarray(X[:]).astype(np.float32))


@cpu_only
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("n", [100, 700])
def test_any_source_of_rows_gives_the_bits_of_its_values_in_float32(source, n, tmp_path):
    X = SOURCES[source](random_rows(n, 60), tmp_path)
    rows = plain(X)
    k = min(4, rows.shape[1])
    whole = StreamingSVD(k, center=True).fit(rows)
    assert results(StreamingSVD(k, center=True).fit(X)) == results(whole)
    assert results(StreamingSVD(k, center=True).partial_fit(X)) == results(whole)
    assert np.array_equal(whole.transform(X), whole.transform(rows))
    assert results(StreamingSVD(k, passes=2).fit(X)) == results(StreamingSVD(k, passes=2).fit(rows))


@cpu_only
@pytest.mark.parametrize("source", ["float64", "tensor of bfloat16", "zarr", "every other column"])
@pytest.mark.parametrize("block_rows", [7, 100, 256, 300])
def test_rows_that_are_converted_in_several_blocks_give_the_same_bits(source, block_rows, tmp_path, monkeypatch):
    X = SOURCES[source](random_rows(700, 60), tmp_path)
    rows = plain(X)
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 4 * rows.shape[1] * block_rows)
    whole = StreamingSVD(4).fit(rows)
    assert results(StreamingSVD(4).fit(X)) == results(whole)
    assert results(StreamingSVD(4).partial_fit(X)) == results(whole)
    assert np.array_equal(whole.transform(X), whole.transform(rows))


@cpu_only
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_mapped_file_is_read_ahead_in_steps_and_gives_the_same_bits(dtype, passes, tmp_path, monkeypatch):
    rows = random_rows(2000, 60)
    mapped = memmap(rows.astype(dtype), tmp_path)
    whole = results(StreamingSVD(3, passes=passes).fit(rows))
    part = results(StreamingSVD(3, passes=passes).fit(rows[3:]))
    monkeypatch.setattr("tipl.subspace.row_blocks.BLOCK_BYTES", 4 * 60 * 300)
    for ahead in (0, 1, 10**9):
        monkeypatch.setattr("tipl.subspace.row_blocks.AHEAD_BYTES", ahead)
        assert results(StreamingSVD(3, passes=passes).fit(mapped)) == whole
        assert results(StreamingSVD(3, passes=passes).fit(mapped[3:])) == part  # begins within a page


def test_reading_ahead_stops_with_its_reader(tmp_path):
    mapped = memmap(random_rows(2000, 60), tmp_path)
    for wanted in ([], [0], [1], [mapped.nbytes, 5], [2**62]):
        reader = _core.ReadAhead(mapped)
        for size in wanted:
            reader.want(size)
        del reader
    assert np.isfinite(mapped).all()


@cpu_only
@pytest.mark.parametrize("source", ["float32", "column slice", "memory map", "rows in reverse"])
def test_float32_rows_are_read_where_they_lie(source, tmp_path):
    X = SOURCES[source](np.ones((4000, 600), np.float32), tmp_path)
    tracemalloc.start()
    try:
        estimator = StreamingSVD(2).fit(X)
        assert tracemalloc.get_traced_memory()[1] < X.nbytes / 8  # of all NumPy arrays
    finally:
        tracemalloc.stop()
    assert estimator.n_samples_seen_ == 4000


def test_rows_are_read_in_order_and_once_a_pass(monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 4 * 60 * 300)
    once = [(0, 300), (300, 600), (600, 700)]
    for passes in (1, 2, 3):
        X = Watched(random_rows(700, 60))
        StreamingSVD(4, passes=passes).fit(X)
        assert X.read == once * passes
    X = Watched(random_rows(700, 60))
    StreamingSVD(4).partial_fit(X)
    assert X.read == once
    X = Watched(random_rows(700, 60))
    GroupedSVD({"a": (0, 20), "b": (10, 60)}, 3).fit(X)
    read = np.concatenate([np.arange(*ends) for ends in X.read])
    assert np.array_equal(read, np.arange(700))


@pytest.mark.parametrize("n", [100, 700])
def test_values_beyond_float32_are_refused_with_their_row(n):
    rows = np.ones((n, 4))
    rows[n - 1, 2] = 1e39
    with pytest.raises(ValueError, match=rf"X must be finite, got inf at row {n - 1}, column 2$"):
        StreamingSVD(2).partial_fit(rows)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (np.zeros((3, 4), "U5"), TypeError, "X must hold numbers, got <U5"),
        (np.zeros((3, 4), "M8[s]"), TypeError, r"X must hold numbers, got datetime64\[s\]"),
        (np.full((3, 4), {}), TypeError, r"X must hold numbers: float\(\) argument must be .*, not 'dict'"),
        (np.full((3, 4), "a", object), ValueError, "X must hold numbers: could not convert string to float: 'a'"),
        (np.zeros((3, 4), complex), ValueError, "Complex data not supported: X must be real, got complex128"),
        (torch.zeros((3, 4), dtype=torch.complex64), ValueError, "Complex data not supported: .*, got complex64"),
        (np.ma.zeros((3, 4)), TypeError, "X must be an array of rows, got MaskedArray"),
        (
            scipy.sparse.csr_array((3, 4)),
            TypeError,
            r"X must be dense, got sparse csr_array; X.toarray\(\) makes it so",
        ),
        ([[1.0, 2.0], [3.0]], ValueError, r"X must have shape \(n, p\): .* inhomogeneous"),
        (None, TypeError, "X must be an array of rows, got NoneType"),
        (np.zeros(4, np.float32), ValueError, r"X must have shape \(n, p\).*, got \(4,\)\. Reshape your data: "),
        (np.zeros((2, 3, 4), np.float32), ValueError, r"X must have shape \(n, p\).*, got \(2, 3, 4\)"),
        (
            np.zeros((0, 4), np.float32),
            ValueError,
            r"X must have shape .*one row.*, got 0 sample\(s\) \(shape=\(0, 4\)\)",
        ),
        (
            np.zeros((4, 0), np.float32),
            ValueError,
            r"X must have shape .*column, got 0 feature\(s\) \(shape=\(4, 0\)\)",
        ),
    ],
)
@pytest.mark.parametrize("fitted", [False, True])
def test_wrong_rows_are_refused_and_change_nothing(rows, error, message, fitted):
    estimator, clean = StreamingSVD(2), StreamingSVD(2)
    for each in (estimator, clean) if fitted else ():
        each.fit(random_rows(10, 4))
    with pytest.raises(error, match=f"^partial_fit: {message}"):
        estimator.partial_fit(rows)
    with pytest.raises(error, match=f"^fit: {message}"):
        estimator.fit(rows)
    if not fitted:
        assert not hasattr(estimator, "components_")
        return
    with pytest.raises(error, match=f"^transform: {message}"):
        estimator.transform(rows)
    assert results(estimator) == results(clean)


def test_rows_with_another_number_of_columns_are_refused():
    estimator = StreamingSVD(2).fit(random_rows(10, 4))
    expected = "X has 5 features, but StreamingSVD is expecting 4 features as input$"
    with pytest.raises(ValueError, match=rf"^partial_fit: X must have shape .*\(n, 4\), got \(3, 5\): {expected}"):
        estimator.partial_fit(np.zeros((3, 5), np.float32))
    with pytest.raises(ValueError, match=rf"^transform: X must have shape .*\(n, 4\), got \(1, 5\): {expected}"):
        estimator.transform(np.zeros((1, 5), np.float32))
    with pytest.raises(ValueError, match=r"^inverse_transform: X must have shape \(n, k\) = \(n, 2\), got \(1, 3\)$"):
        estimator.inverse_transform(np.zeros((1, 3), np.float32))
    assert estimator.fit(random_rows(10, 5)).n_features_in_ == 5


# ---- bad values, and that nothing is lost by them


@cpu_only
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 7, 99, 300, 699])
@pytest.mark.parametrize("center", [False, True])
def test_partial_fit_refuses_a_value_that_is_not_finite_with_its_row_and_takes_none(bad, row, center):
    rows = random_rows(850, 33)
    estimator, clean = (stream(StreamingSVD(4, center=center), rows[:150], 70) for _ in range(2))
    spoilt = rows[150:].copy()
    spoilt[row, 17] = bad
    with pytest.raises(
        ValueError,
        match=rf"^partial_fit: X must be finite, got {str(bad).replace('nan', 'NaN')} at row {row}, column 17$",
    ):
        estimator.partial_fit(spoilt)
    assert results(estimator) == results(clean)
    assert results(estimator.partial_fit(rows[150:])) == results(clean.partial_fit(rows[150:]))


@pytest.mark.parametrize("row", [0, 7, 255, 256, 300, 699])
@pytest.mark.parametrize("passes", [1, 2])
def test_fit_on_a_value_that_is_not_finite_names_its_row_and_leaves_the_earlier_fit(row, passes):
    rows = random_rows(700, 33)
    estimator, clean = (StreamingSVD(4, passes=passes).fit(rows[:500]) for _ in range(2))
    spoilt = rows.copy()
    spoilt[row, 17] = np.nan
    with pytest.raises(ValueError, match="X must be finite, got NaN") as raised:
        estimator.fit(spoilt)
    assert results(estimator) == results(clean)
    assert estimator.n_samples_seen_ == 500
    assert str(raised.value).endswith(f"at row {row}, column 17")


@pytest.mark.parametrize("block_rows", [50, 300])
@pytest.mark.parametrize("method", ["fit", "partial_fit", "transform"])
def test_a_bad_value_among_rows_that_are_converted_is_refused_alike(method, block_rows, monkeypatch):
    rows = random_rows(700, 33)
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 4 * 33 * block_rows)
    estimator, clean = (StreamingSVD(4).fit(rows) for _ in range(2))
    spoilt = rows.astype(np.float64)
    spoilt[650, 17] = np.nan
    with pytest.raises(ValueError, match="X must be finite, got NaN") as raised:
        getattr(estimator, method)(spoilt)
    assert results(estimator) == results(clean)
    assert str(raised.value).endswith("at row 650, column 17")


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_a_first_row_that_is_not_finite_is_not_taken_for_an_origin(method):
    """With `center` it would be the origin, which the caller has not given."""
    rows = random_rows(700, 33)
    rows[0, 17] = np.nan
    with pytest.raises(ValueError, match=r"X must be finite, got NaN at row 0, column 17$"):
        getattr(StreamingSVD(4, center=True), method)(rows)


def test_an_estimator_whose_first_rows_are_refused_has_seen_none():
    estimator = StreamingSVD(2)
    with pytest.raises(ValueError, match=r"^partial_fit: X must be finite, got NaN at row 1, column 0$"):
        estimator.partial_fit(np.array([[1, 2], [np.nan, 2]], np.float32))
    with pytest.raises(NotFittedError):
        _ = estimator.components_
    assert estimator.partial_fit(np.ones((1, 5), np.float32)).n_features_in_ == 5


TOO_LARGE = r"is too large for float32 sums: the squares of "


def test_a_row_too_large_for_float32_sums_is_refused_and_changes_nothing():
    estimator = StreamingSVD(1).fit(np.full((3, 2), 1e14, np.float32))
    before = results(estimator)
    for bad in (1e15, 3e38):
        rows = np.ones((3, 2), np.float32)
        rows[1] = bad
        with pytest.raises(
            ValueError, match=rf"^partial_fit: X {TOO_LARGE}row 1 sum to .*, which must stay below 1e\+30$"
        ):
            estimator.partial_fit(rows)
        with pytest.raises(ValueError, match=rf"X {TOO_LARGE}row 1 sum to "):
            estimator.fit(rows)
    assert results(estimator) == before


@pytest.mark.parametrize("pending", [0, 100])
def test_rows_too_large_together_are_refused_and_none_is_taken(pending):
    """5e27 a row: 200 of them are the limit."""
    loud = np.full((600, 2), 5e13, np.float32)
    estimator = StreamingSVD(1, n_oversamples=0).partial_fit(np.ones((256 + pending, 2), np.float32))
    before = results(estimator)
    with pytest.raises(ValueError, match=r"^partial_fit: all rows together are too large for float32 sums: "):
        estimator.partial_fit(loud)
    assert results(estimator) == before
    assert estimator.partial_fit(np.ones((600, 2), np.float32)).n_samples_seen_ == 856 + pending


@pytest.mark.parametrize("dtype", [np.float32, np.float64])  # in one block, and in two
def test_rows_too_large_in_a_later_group_or_block_are_taken_by_no_group(dtype, monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 300 * 50 * 4)
    X = random_rows(400, 50).astype(dtype)
    grouped = GroupedSVD({"a": (0, 2), "b": (4, 50)}, 1).partial_fit(X)
    whole = StreamingSVD(3).partial_fit(X)
    blown = X.copy()
    blown[390, 45] = 3e16
    for estimator in (grouped, whole, fresh := GroupedSVD({"a": (0, 2), "b": (4, 50)}, 1)):
        with pytest.raises(ValueError, match=rf"^partial_fit: X {TOO_LARGE}row 390 sum to "):
            estimator.partial_fit(blown)
    assert [estimator.n_samples_seen_ for estimator in grouped.estimators_.values()] == [400, 400]
    assert whole.n_samples_seen_ == 400
    assert grouped.coordinates_.shape == (400, 2)
    with pytest.raises(NotFittedError):
        _ = fresh.coordinates_


def test_groups_of_which_one_does_not_merge_do_not_merge():
    X = random_rows(300, 20)
    grouped, other = (GroupedSVD({"a": (0, 5), "b": (5, 20)}, 2).fit(X) for _ in range(2))
    other.estimators_["b"].set_params(seed=1).fit(X[:, 5:])
    with pytest.raises(ValueError, match="merge: other must have seed = 0, got 1"):
        grouped.merge(other)
    assert [estimator.n_samples_seen_ for estimator in grouped.estimators_.values()] == [300, 300]


def test_sketches_too_large_together_do_not_merge():
    rows = np.full((256, 2), 3e13, np.float32)  # 4.6e29 in all
    estimator, other, third = (StreamingSVD(1).fit(np.concatenate([rows, rows[:1]])) for _ in range(3))
    estimator.merge(other)
    before = results(estimator)
    with pytest.raises(ValueError, match=r"^merge: .* too large for float32 sums: "):
        estimator.merge(third)
    assert results(estimator) == before
    assert results(third) == results(other)


# ---- wrong parameters


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"n_components": 0}, ValueError, r"StreamingSVD: n_components must lie in \[1, p\] = \[1, 4\], got 0"),
        ({"n_components": 5}, ValueError, r"StreamingSVD: n_components must lie in \[1, p\] = \[1, 4\], got 5"),
        ({"n_components": 2.0}, ValueError, r"StreamingSVD: n_components must be an integer, or a share .*, got 2\.0"),
        ({"n_components": "2"}, TypeError, "n_components must be an integer, got '2'"),
        ({"n_oversamples": -1}, ValueError, "StreamingSVD: n_oversamples must be >= 0, got -1"),
        ({"n_oversamples": 1.0}, TypeError, r"n_oversamples must be an integer, got 1\.0"),
        ({"passes": 0}, ValueError, "StreamingSVD: passes must be >= 1, got 0"),
        ({"passes": 1.5}, TypeError, r"passes must be an integer, got 1\.5"),
        ({"center": 1}, TypeError, "StreamingSVD: center must be a bool, got 1"),
        ({"origin": np.zeros(4)}, ValueError, r"StreamingSVD: origin must be float32 of shape \(p,\) = \(4,\), got .*"),
        ({"origin": np.zeros(3, np.float32)}, ValueError, r"StreamingSVD: origin must be float32 of shape .*\(3,\)"),
        ({"origin": np.full(4, np.nan, np.float32)}, ValueError, "RowSketch: origin must be finite, got nan .*"),
        ({"seed": -1}, ValueError, r"StreamingSVD: seed must lie in \[0, 2\*\*64\), got -1"),
        ({"seed": 2**64}, ValueError, r"StreamingSVD: seed must lie in \[0, 2\*\*64\), got 18446744073709551616"),
        ({"seed": "0"}, TypeError, "seed must be an integer, got '0'"),
        ({"num_threads": 0}, ValueError, r"num_threads must lie in \[1, 1024\], got 0"),
        ({"num_threads": 1.5}, TypeError, r"num_threads must be an integer, got 1\.5"),
    ],
)
def test_wrong_parameters_are_refused_with_the_first_row(params, error, message):
    estimator = StreamingSVD(**{"n_components": 2, **params})
    with pytest.raises(error, match=f"^{message}$"):
        estimator.fit(np.ones((3, 4), np.float32))
    if "passes" not in params:
        with pytest.raises(error, match=f"^{message}$"):
            estimator.partial_fit(np.ones((3, 4), np.float32))
    assert not hasattr(estimator, "n_samples_seen_")


def test_rows_that_come_once_cannot_be_passed_over_twice():
    estimator = StreamingSVD(2, passes=2)
    with pytest.raises(ValueError, match=r"^partial_fit: passes must be 1, since rows come once, got 2; use fit$"):
        estimator.partial_fit(random_rows(10, 4))
    assert not hasattr(estimator, "components_")


@pytest.mark.parametrize("attribute", LEARNED)
def test_learned_attributes_do_not_exist_before_the_first_row(attribute):
    estimator = StreamingSVD(2)
    assert not hasattr(estimator, attribute)
    with pytest.raises(NotFittedError, match=r"^\w+_: this StreamingSVD has seen no rows; call fit or partial_fit"):
        getattr(estimator, attribute)
    assert hasattr(estimator.fit(np.ones((1, 3), np.float32)), attribute)


def test_what_needs_rows_is_refused_before_the_first(tmp_path):
    rows = np.ones((1, 3), np.float32)
    for method, argument in (("transform", rows), ("inverse_transform", rows), ("save", tmp_path / "file")):
        with pytest.raises(NotFittedError, match=f"^{method}: this StreamingSVD has seen no rows"):
            getattr(StreamingSVD(2), method)(argument)
    assert not list(tmp_path.iterdir())


# ---- coordinates in and out


@pytest.mark.parametrize("params", [{}, {"center": True}, {"origin": True}])
@pytest.mark.parametrize("n", [200, 600])
def test_transform_gives_coordinates_and_inverse_transform_goes_back(n, params):
    rows = reference.with_singular_values(np.array([9.0, 4.0, 1.0]), n, 70, seed=12) + np.float32(3)
    if "origin" in params:
        params = {"origin": np.full(70, 3, np.float32)}
    estimator = StreamingSVD(4, **params).fit(rows)
    coordinates = estimator.transform(rows)
    exact = (rows.astype(np.float64) - estimator.mean_) @ estimator.components_.T.astype(np.float64)
    assert coordinates.dtype == np.float32
    assert np.abs(coordinates - exact).max() <= EPS * np.abs(exact).max()
    back = estimator.inverse_transform(coordinates)
    assert back.dtype == np.float32
    left = np.linalg.norm(back.astype(np.float64) - rows)
    assert left <= estimator.residual_bound_ + 2 * EPS * np.linalg.norm(rows)


# ---- files


def saved(estimator: StreamingSVD, path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the arrays of the file that it writes."""
    estimator.save(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in list(file.keys())}


FILED: dict[str, dict[str, Any]] = {
    "plain": {},
    "centred": {"center": True},
    "origin": {"origin": np.full(60, 5, np.float32)},
    "centred with an origin": {"center": True, "origin": np.full(60, 4, np.float32)},
    "share": {"n_components": 0.9, "n_oversamples": 4},
    "seed": {"seed": 2**64 - 1, "n_oversamples": 3},
}


@pytest.mark.parametrize("filed", FILED)
@pytest.mark.parametrize("n", [1, 200, 512, 600])
def test_an_estimator_comes_back_from_its_file_to_the_bit_and_goes_on(filed, n, tmp_path):
    rows = random_rows(1000, 60)
    params = {"n_components": 3, **FILED[filed]}
    estimator = stream(StreamingSVD(**params), rows[:n], 70)
    before = results(estimator)
    estimator.save(tmp_path / "svd.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["svd.safetensors"]
    assert results(estimator) == before
    loaded = StreamingSVD.load(str(tmp_path / "svd.safetensors"), num_threads=1)
    assert results(loaded) == before
    theirs, ours = loaded.get_params(), estimator.get_params()
    assert theirs.pop("num_threads") == 1
    assert np.array_equal(theirs.pop("origin"), ours.pop("origin"))
    assert theirs == {name: value for name, value in ours.items() if name != "num_threads"}
    assert results(loaded.partial_fit(rows[n:])) == results(estimator.partial_fit(rows[n:]))
    assert results(loaded) == results(StreamingSVD(**params).fit(rows))


def test_a_loaded_estimator_merges_and_is_saved_again(tmp_path):
    rows = random_rows(1000, 60)
    first, second = (StreamingSVD(3, center=True).fit(part) for part in (rows[:400], rows[400:]))
    first.save(tmp_path / "first")
    second.save(tmp_path / "second")
    merged = StreamingSVD.load(tmp_path / "first").merge(StreamingSVD.load(tmp_path / "second"))
    merged.save(tmp_path / "first")
    assert results(merged) == results(StreamingSVD.load(tmp_path / "first")) == results(first.merge(second))


@pytest.mark.parametrize("params", [{"n_components": np.int64(3)}, {"n_components": 3, "seed": np.uint64(7)}])
def test_parameters_that_are_integers_of_numpy_are_saved_too(params, tmp_path):
    estimator = StreamingSVD(**params).fit(random_rows(300, 60))
    estimator.save(tmp_path / "svd")
    assert results(StreamingSVD.load(tmp_path / "svd")) == results(estimator)


def test_files_hold_numbers_and_json_alone(tmp_path):
    metadata, arrays = saved(StreamingSVD(3, center=True).fit(random_rows(300, 60)), tmp_path / "svd")
    assert {array.dtype.name for array in arrays.values()} == {"float32", "float64"}
    assert json.loads(metadata["params"])["center"] is True
    assert (metadata["format"], metadata["version"]) == ("tipl.StreamingSVD", "1")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    rows = random_rows(300, 60)
    StreamingSVD(3).fit(rows[:100]).save(tmp_path / "svd")
    before = (tmp_path / "svd").read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(locations.os, "fsync", full)
    for name in ("svd", "new"):
        with pytest.raises(OSError, match="no space left"):
            StreamingSVD(3).fit(rows).save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["svd"]
    assert (tmp_path / "svd").read_bytes() == before


def test_two_passes_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"^save: a sketch of one pass can be saved, this one has passes=2$"):
        StreamingSVD(3, passes=2).fit(random_rows(300, 60)).save(tmp_path / "svd")
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_exist_is_not_found(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(f"load: there is no file {path}")):
            StreamingSVD.load(path)


def reseal(path: Path, metadata: dict[str, str], arrays: dict[str, np.ndarray]) -> None:
    """Write the file with a checksum that holds, so that what else is wrong shows."""
    if "params" in metadata:
        metadata["crc32c"] = checksum(metadata["params"], arrays)
    path.write_bytes(safetensors.numpy.save(arrays, metadata))


def with_nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flat[-1] = np.nan
    return array


ALTERED: dict[str, tuple[str, Callable[[dict[str, str], dict[str, np.ndarray]], Any]]] = {
    "format": ("holds no StreamingSVD", lambda metadata, arrays: metadata.update(format="tipl.Decoder")),
    "no format": ("holds no StreamingSVD", lambda metadata, arrays: metadata.pop("format")),
    "version": ("has version 2, this tipl reads 1", lambda metadata, arrays: metadata.update(version="2")),
    "no parameters": ("is damaged", lambda metadata, arrays: metadata.pop("params")),
    "parameters": ("is damaged", lambda metadata, arrays: metadata.update(params='{"n_components": 3')),
    "parameters that are a text": ("is damaged", lambda metadata, arrays: metadata.update(params='"three"')),
    "a parameter that is wrong": (
        "is damaged",
        lambda metadata, arrays: metadata.update(params=metadata["params"].replace("3", "-3")),
    ),
    "an unknown parameter": (
        "is damaged",
        lambda metadata, arrays: metadata.update(params=metadata["params"].replace("passes", "parses")),
    ),
    "NaN in C": ("is damaged", lambda metadata, arrays: arrays.update(co_range=with_nan(arrays["co_range"]))),
    "NaN in G": ("is damaged", lambda metadata, arrays: arrays.update(gram=with_nan(arrays["gram"]))),
    "NaN in the rows": ("is damaged", lambda metadata, arrays: arrays.update(pending=with_nan(arrays["pending"]))),
    "NaN in Y": ("is damaged", lambda metadata, arrays: arrays.update(range_rows=with_nan(arrays["range_rows"]))),
    "Inf": ("is damaged", lambda metadata, arrays: arrays.update(squares=np.array([np.inf]))),
    "no G": ("is damaged", lambda metadata, arrays: arrays.pop("gram")),
    "no squares": ("is damaged", lambda metadata, arrays: arrays.update(squares=np.zeros(0))),
    "G of another shape": ("is damaged", lambda metadata, arrays: arrays.update(gram=arrays["gram"][1:])),
    "C of another type": (
        "is damaged",
        lambda metadata, arrays: arrays.update(co_range=arrays["co_range"].astype(np.float32)),
    ),
    "C of one row": ("is damaged", lambda metadata, arrays: arrays.update(co_range=arrays["co_range"][0])),
    "fewer rows in Y than in G": (
        "is damaged",
        lambda metadata, arrays: arrays.update(range_rows=arrays["range_rows"][1:]),
    ),
    "squares below zero": ("is damaged", lambda metadata, arrays: arrays.update(squares=np.array([-1.0]))),
    "an origin of another size": (
        "is damaged",
        lambda metadata, arrays: arrays.update(origin=np.zeros(3, np.float32)),
    ),
}


@pytest.mark.parametrize("altered", ALTERED)
def test_a_file_that_is_not_as_it_was_saved_is_refused_with_its_path(altered, tmp_path):
    metadata, arrays = saved(StreamingSVD(3, center=True).partial_fit(random_rows(300, 60)), tmp_path / "svd")
    message, alter = ALTERED[altered]
    alter(metadata, arrays)
    reseal(tmp_path / "svd", metadata, arrays)
    with pytest.raises(RuntimeError, match=rf"^load: {re.escape(str(tmp_path / 'svd'))} .*{message}"):
        StreamingSVD.load(tmp_path / "svd")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_file_that_was_cut_off_is_refused(keep, tmp_path):
    StreamingSVD(3).fit(random_rows(300, 60)).save(tmp_path / "svd")
    (tmp_path / "svd").write_bytes((tmp_path / "svd").read_bytes()[:keep])
    with pytest.raises(RuntimeError, match=rf"^load: {re.escape(str(tmp_path / 'svd'))} is damaged: "):
        StreamingSVD.load(tmp_path / "svd")


@pytest.mark.parametrize("place", [0.0, 0.001, 0.003, 0.3, 0.6, 0.9])
def test_a_file_with_a_flipped_bit_is_refused(place, tmp_path):
    StreamingSVD(3).partial_fit(random_rows(300, 60)).save(tmp_path / "svd")
    data = bytearray((tmp_path / "svd").read_bytes())
    data[int(place * len(data))] ^= 1
    (tmp_path / "svd").write_bytes(data)
    with pytest.raises(RuntimeError, match=rf"^load: {re.escape(str(tmp_path / 'svd'))} "):
        StreamingSVD.load(tmp_path / "svd")


def test_a_file_with_more_pending_rows_than_a_block_is_refused(tmp_path):
    """In a process of its own: a block's memory lies behind them."""
    metadata, arrays = saved(StreamingSVD(3).fit(random_rows(300, 60)), tmp_path / "svd")
    arrays["pending"] = np.ones((5000, 60), np.float32)
    reseal(tmp_path / "svd", metadata, arrays)
    done = run_python(
        "from tipl.subspace.streaming_svd import StreamingSVD\n"
        "try:\n"
        f"    StreamingSVD.load({str(tmp_path / 'svd')!r})\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"load: {tmp_path / 'svd'} is damaged: ")


def test_a_wrong_number_of_threads_is_not_the_files_fault(tmp_path):
    StreamingSVD(3).fit(random_rows(300, 60)).save(tmp_path / "svd")
    with pytest.raises(ValueError, match=r"num_threads must lie in \[1, 1024\], got 0$"):
        StreamingSVD.load(tmp_path / "svd", num_threads=0)


# ---- scikit-learn's conventions, and scikit-learn


def test_parameters_are_stored_untouched_and_learned_attributes_are_not_set_by_the_constructor():
    params = {
        "n_components": "five",
        "n_oversamples": -3,
        "passes": "many",
        "center": None,
        "origin": [1],
        "seed": 1.5,
        "num_threads": "all",
        "device": None,
    }
    estimator = StreamingSVD(**params)
    assert estimator.get_params() == params
    assert not [name for name in vars(estimator) if name.endswith("_") and not name.startswith("_")]
    assert repr(estimator) == (
        "StreamingSVD(n_components='five', n_oversamples=-3, passes='many', center=None, origin=[1], seed=1.5, "
        "num_threads='all', device=None)"
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
        estimator.set_params(n_iter=2, seed=5)
    assert estimator.seed == 0


@pytest.mark.parametrize("params", [{"n_components": 3}, {"center": True}, {"seed": 5}, {"origin": np.ones(60, "f4")}])
@pytest.mark.parametrize("n", [3, 300])
def test_set_params_changes_nothing_of_what_was_fitted(n, params):
    rows = random_rows(n, 60)
    estimator = StreamingSVD(4).fit(rows)
    assert results(estimator.set_params(**params)) == results(StreamingSVD(4).fit(rows))


def test_methods_return_the_estimator_and_fit_forgets():
    rows = random_rows(700, 40)
    estimator = StreamingSVD(4)
    assert estimator.partial_fit(rows[:10]) is estimator
    assert estimator.merge(StreamingSVD(4).fit(rows[10:20])) is estimator
    assert estimator.fit(rows[20:], None) is estimator
    assert results(estimator) == results(StreamingSVD(4).fit(rows[20:]))
    assert np.array_equal(estimator.fit_transform(rows, None), StreamingSVD(4).fit(rows).transform(rows))


def test_copies_before_the_first_row_are_equal():
    assert copy.deepcopy(StreamingSVD(4, seed=3)).get_params() == StreamingSVD(4, seed=3).get_params()


def test_scikit_learn_clones_it_unfitted():
    origin = np.ones(40, np.float32)
    estimator = StreamingSVD(4, center=True, origin=origin, passes=2, seed=5).fit(random_rows(300, 40))
    clone = sklearn.base.clone(estimator)
    params = clone.get_params()
    assert params["origin"] is not origin
    assert np.array_equal(params.pop("origin"), origin)
    assert params == {name: value for name, value in estimator.get_params().items() if name != "origin"}
    check_is_fitted(estimator)
    with pytest.raises(sklearn.exceptions.NotFittedError):
        check_is_fitted(clone)


def test_it_works_in_a_pipeline():
    rows = random_rows(400, 40)
    pipeline = Pipeline([("scale", StandardScaler()), ("svd", StreamingSVD(3))])
    coordinates = pipeline.set_params(svd__n_components=4).fit_transform(rows)
    scaled = StandardScaler().fit_transform(rows)
    assert np.array_equal(coordinates, StreamingSVD(4).fit(scaled).transform(scaled))
    assert np.array_equal(pipeline.transform(rows), StreamingSVD(4).fit(scaled).transform(scaled))
    assert np.abs(pipeline.inverse_transform(coordinates) - rows).max() < np.abs(rows).max()
    assert sklearn.base.clone(pipeline).fit(rows).named_steps["svd"].n_features_in_ == 40


@pytest.mark.parametrize("n", [200, 600])
def test_it_finds_what_scikit_learn_finds(n):
    """A matrix with gaps between its singular values. TruncatedSVD's own ratio is of variances, and another thing."""
    rows = reference.with_singular_values(np.r_[9.0, 5.0, 3.0, np.full(50, 1e-3)], n, 80, seed=13) + np.float32(0.5)
    centred, theirs = StreamingSVD(3, center=True).fit(rows), PCA(3, svd_solver="full").fit(rows.astype(np.float64))
    assert np.allclose(centred.singular_values_, theirs.singular_values_, rtol=0, atol=16 * EPS * 9)
    assert np.allclose(centred.explained_variance_ratio_, theirs.explained_variance_ratio_, rtol=0, atol=16 * EPS)
    assert np.allclose(centred.mean_, theirs.mean_, rtol=0, atol=4 * EPS)
    assert largest_angle(centred.components_, theirs.components_) <= 64 * EPS
    plain, theirs = StreamingSVD(3).fit(rows), TruncatedSVD(3, algorithm="arpack").fit(rows.astype(np.float64))
    largest = theirs.singular_values_[0]
    assert np.allclose(plain.singular_values_, theirs.singular_values_, rtol=0, atol=16 * EPS * largest)
    assert largest_angle(plain.components_, theirs.components_) <= 64 * EPS * largest / theirs.singular_values_[2]
    ratio = theirs.singular_values_**2 / np.linalg.norm(rows.astype(np.float64)) ** 2
    assert np.allclose(plain.explained_variance_ratio_, ratio, rtol=0, atol=16 * EPS)


# ---- groups of columns


GROUPS = {"a": (0, 30), "b": (25, 100), "c": (99, 100), "d": (3, 7)}  # they may overlap, and be narrower than k


def separate(X: np.ndarray, **params: Any) -> dict[str, StreamingSVD]:
    return {
        name: StreamingSVD(min(5, stop - start), **params).fit(np.ascontiguousarray(X[:, start:stop]))
        for name, (start, stop) in GROUPS.items()
    }


def assert_separate(grouped: GroupedSVD, apart: dict[str, StreamingSVD], X: np.ndarray) -> None:
    assert list(grouped.estimators_) == list(apart)
    for name, estimator in apart.items():
        assert results(grouped.estimators_[name]) == results(estimator)
    columns = [estimator.transform(X[:, slice(*GROUPS[name])]) for name, estimator in apart.items()]
    assert np.array_equal(grouped.transform(X), np.concatenate(columns, axis=1))
    coordinates = [estimator.coordinates_ for estimator in apart.values()]
    assert np.array_equal(grouped.coordinates_, np.concatenate(coordinates, axis=1))


@pytest.mark.parametrize("params", [{}, {"center": True}, {"passes": 2}, {"n_oversamples": 3, "seed": 4}])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 200, 700])
def test_groups_are_estimators_of_their_columns_to_the_bit(n, dtype, params):
    X = random_rows(n, 110)
    assert_separate(GroupedSVD(GROUPS, 5, **params).fit(X.astype(dtype)), separate(X, **params), X)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_groups_take_rows_as_they_come_and_merge(dtype):
    X = random_rows(900, 110)
    grouped = GroupedSVD(GROUPS, 5, center=True)
    for part in (X[:150], X[150:151], X[151:500]):
        assert grouped.partial_fit(part.astype(dtype)) is grouped
    assert_separate(grouped, separate(X[:500], center=True), X)
    assert grouped.merge(GroupedSVD(GROUPS, 5, center=True).fit(X[500:].astype(dtype))) is grouped
    merged = separate(X[:500], center=True)
    for name, other in separate(X[500:], center=True).items():
        merged[name].merge(other)
    assert_separate(grouped, merged, X)


def test_groups_with_a_share_of_the_energy_have_as_many_components_as_each_needs():
    rng = np.random.default_rng(0)
    X = np.concatenate(
        [rng.standard_normal((400, 1)) @ rng.standard_normal((1, 30)), rng.standard_normal((400, 30))], 1
    )
    grouped = GroupedSVD({"one": (0, 30), "many": (30, 60)}, 0.9).fit(X)
    assert grouped.estimators_["one"].n_components_ == 1
    assert grouped.estimators_["many"].n_components_ > 15
    assert grouped.coordinates_.shape == (400, 1 + grouped.estimators_["many"].n_components_)


@pytest.mark.parametrize("column", [4, 60])
def test_a_nan_is_taken_by_no_group(column):
    X = random_rows(700, 110)
    grouped, clean = (GroupedSVD(GROUPS, 5).partial_fit(X[:300]) for _ in range(2))
    spoilt = X[300:].copy()
    spoilt[350, column] = np.nan
    with pytest.raises(ValueError, match=rf"^partial_fit: X must be finite, got NaN at row 350, column {column}$"):
        grouped.partial_fit(spoilt)
    with pytest.raises(ValueError, match="X must be finite, got NaN"):
        grouped.fit(spoilt)
    for name, estimator in clean.estimators_.items():
        assert results(grouped.estimators_[name]) == results(estimator)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({}, "groups must name at least one group of columns, got none"),
        ({"a": (3, 3)}, r"group 'a' must be \[start, stop\) with 0 <= start < stop, got \[3, 3\)"),
        ({"a": (0, 2), "b": (5, 3)}, r"group 'b' must be \[start, stop\) with 0 <= start < stop, got \[5, 3\)"),
        ({"a": (-2, 3)}, r"group 'a' must be \[start, stop\) with 0 <= start < stop, got \[-2, 3\)"),
    ],
)
def test_wrong_groups_are_refused(groups, message):
    with pytest.raises(ValueError, match=f"^GroupedSVD: {message}$"):
        GroupedSVD(groups, 2)


@pytest.mark.parametrize("method", ["fit", "partial_fit", "transform"])
def test_groups_refuse_rows_without_their_columns(method):
    grouped = GroupedSVD({"a": (0, 3), "b": (2, 8)}, 2).fit(random_rows(20, 8))
    message = rf"^{method}: X must have shape \(n, p\) with p >= 8 for these groups, got "
    with pytest.raises(ValueError, match=rf"{message}\(20, 7\)$"):
        getattr(grouped, method)(random_rows(20, 7))
    with pytest.raises(ValueError, match=rf"{message}\(8,\)$"):
        getattr(grouped, method)(random_rows(20, 8)[0])
    assert grouped.estimators_["a"].n_samples_seen_ == 20


def test_groups_merge_with_the_same_groups_alone():
    grouped = GroupedSVD({"a": (0, 3)}, 2).fit(random_rows(20, 8))
    with pytest.raises(
        ValueError, match=r"^merge: other must have the groups \{'a': \(0, 3\)\}, got \{'b': \(0, 3\)\}$"
    ):
        grouped.merge(GroupedSVD({"b": (0, 3)}, 2).fit(random_rows(20, 8)))
    assert grouped.estimators_["a"].n_samples_seen_ == 20


def test_a_group_without_rows_has_nothing_to_say():
    with pytest.raises(NotFittedError, match=r"^coordinates_: this StreamingSVD has seen no rows"):
        _ = GroupedSVD(GROUPS, 5).coordinates_


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
    all_rows = np.concatenate([rows[:1], rows])
    exact = reference.singular_values(all_rows, center=True)
    assert np.allclose(estimator.mean_, all_rows.astype(np.float64).mean(0), rtol=0, atol=16 * EPS)
    assert reference.residual(all_rows, estimator.components_, center=True) <= 1.05 * np.linalg.norm(exact[5:])
    assert len(estimator.coordinates_) == 1201


@cpu_only
@pytest.mark.slow
def test_a_signal_stops_between_blocks_and_the_rest_can_follow():
    numbers = np.random.default_rng(0).standard_normal(2_000_000, dtype=np.float32)
    rows = np.lib.stride_tricks.sliding_window_view(numbers, 500)  # 4 GB, had each row memory of its own
    estimator = StreamingSVD(8, num_threads=1).partial_fit(rows[:300])
    before = results(estimator)
    stopped(lambda: estimator.fit(rows), 0.05)
    assert results(estimator) == before
    seconds, taken = 0.05, 300
    while taken == 300:  # so far it has only looked at the rows
        stopped(lambda: estimator.partial_fit(rows[300:]), seconds)
        taken = estimator.n_samples_seen_
        seconds *= 2
    assert taken < len(rows)
    assert results(estimator) == results(StreamingSVD(8).fit(rows[:taken]))
    estimator.partial_fit(rows[taken : taken + 1000])
    assert results(estimator) == results(StreamingSVD(8).fit(rows[: taken + 1000]))
