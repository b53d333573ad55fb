"""The SVD on CUDA devices: where rows lie, sketches of two devices, failing calls, the order of blocks. What it
computes is tested beside the CPU's, in test_gram.py, test_streaming_svd.py and test_streaming_svd_estimator.py.
"""

import copy
import pickle
import signal
from typing import Any

import numpy as np
import pytest
import reference
import torch
from cuda_devices import Foreign, emulator, needs_cuda, needs_emulator, on_device
from svd_checks import EPS, largest_angle, random_rows, results, stream

import tipl
from tipl.subspace.grouped_svd import GroupedSVD
from tipl.subspace.running_gram import gram
from tipl.subspace.streaming_svd import StreamingSVD

pytestmark = needs_cuda

N, P = 300, 130


@pytest.fixture(autouse=True)
def leaves_nothing_on_the_device(clean_device: None) -> None:
    """Every test here."""


def svd(k: int = 5, **params: Any) -> StreamingSVD:
    return StreamingSVD(k, **{"device": "cuda", **params})


# ---- rows where they are


@pytest.mark.parametrize("params", [{}, {"center": True}, {"passes": 2}, {"origin": np.ones(P, np.float32)}])
def test_rows_on_the_device_give_the_bits_of_rows_of_the_host(params):
    rows = random_rows(N, P)
    ours, theirs = svd(**params).fit(on_device(rows)), svd(**params).fit(rows)
    assert results(ours) == results(theirs)
    coordinates = ours.transform(on_device(rows))
    assert coordinates.__dlpack_device__() == (2, 0)
    assert np.array_equal(coordinates.numpy(), theirs.transform(rows))
    assert isinstance(theirs.transform(rows), np.ndarray)
    assert np.array_equal(gram(on_device(rows), rows[0], device="cuda"), gram(rows, rows[0], device="cuda"))


def test_rows_on_the_device_come_in_any_chunks():
    rows = random_rows(N, P)
    ours = svd()
    for start, stop in ((0, 1), (1, 2), (2, 259), (259, 260), (260, N)):
        ours.partial_fit(on_device(rows)[start:stop])
    assert results(ours) == results(svd().partial_fit(rows))


def test_rows_on_the_device_may_have_others_between_them():
    rows = random_rows(N, P)
    wide = on_device(np.concatenate([rows, rows + 1], axis=1))
    assert results(svd().fit(wide[:, :P])) == results(svd().fit(rows))
    assert results(svd().fit(on_device(rows)[::2])) == results(svd().fit(rows[::2]))


def test_the_stream_of_the_sketch_is_what_the_owner_of_rows_makes_wait():
    rows = Foreign(on_device(random_rows(N, P)))
    rows.shape, rows.dtype = (N, P), np.dtype(np.float32)
    ours = svd().partial_fit(rows)
    assert len(rows.streams) == 1
    assert rows.streams[0] > 2
    ours.transform(rows)
    assert rows.streams[1] > 2


def test_tensors_of_the_host_in_any_precision():
    rows = torch.from_numpy(random_rows(N, P))
    assert results(svd().fit(rows.double())) == results(svd().fit(rows.numpy()))
    assert results(svd().fit(rows.bfloat16())) == results(svd().fit(rows.bfloat16().float().numpy()))


def test_groups_of_columns_on_the_device():
    rows, groups = random_rows(N, P), {"a": (0, 40), "b": (50, 130)}
    ours, theirs = (GroupedSVD(groups, 4, device="cuda") for _ in range(2))
    for take in ("partial_fit", "fit"):
        getattr(ours, take)(on_device(rows))
        getattr(theirs, take)(rows)
        for name in groups:
            assert results(ours.estimators_[name]) == results(theirs.estimators_[name])
    assert np.array_equal(ours.transform(on_device(rows)).numpy(), theirs.transform(rows))


def test_rows_longer_than_a_pinned_buffer():
    """Each of a block's pieces begins and ends within a row."""
    rows = np.random.default_rng(0).integers(-5, 6, (258, 4200)).astype(np.float32)
    own = svd(1, n_oversamples=1).partial_fit(rows)._fitted.core.snapshot()
    assert np.array_equal(own.row_sum, rows.astype(np.float64).sum(0))
    assert own.squares == np.sum(rows.astype(np.float64) ** 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"type": (2, 64, 1)}, TypeError, "X must be an array of float32, got float64"),
        ({"strides": (1, 3)}, ValueError, "X must have contiguous rows"),
        ({"device": (2, 1)}, ValueError, "X must be on cuda:0, got cuda:1"),
        ({"device": (10, 0)}, ValueError, "X must be on cuda:0 or in the host's memory, got device type 10"),
    ],
)
def test_device_arrays_of_another_kind_are_refused(changes, error, message):
    rows = random_rows(N, P)
    ours = svd().partial_fit(rows[:3])
    wrong = Foreign(on_device(rows), **changes)
    wrong.shape, wrong.dtype = (N, P), np.dtype(np.float32)
    with pytest.raises(error, match=rf"^partial_fit: {message}$"):
        ours.partial_fit(wrong)
    assert ours.n_samples_seen_ == 3


@pytest.mark.parametrize("n", [10, N, 700])
def test_a_value_that_is_not_finite_is_found_on_the_device(n):
    rows = random_rows(n, P)
    rows[n - 2, 77] = np.inf
    ours = svd()
    message = rf"X must be finite, got inf at row {n - 2}, column 77$"
    for where, call in (("partial_fit", ours.partial_fit), ("fit", ours.fit)):
        with pytest.raises(ValueError, match=rf"^(partial_fit|{where}): {message}"):
            call(on_device(rows))
    with pytest.raises(ValueError, match=rf"^gram: {message}"):
        gram(on_device(rows), device="cuda")
    with pytest.raises(ValueError, match=rf"^partial_fit: {message}"):
        GroupedSVD({"all": (0, 50)}, 3, device="cuda").partial_fit(on_device(rows))


def test_the_cpu_refuses_rows_on_a_device():
    with pytest.raises(ValueError, match=r"^fit: X must be in the host's memory, as the estimator is on the CPU$"):
        StreamingSVD(5).fit(on_device(random_rows(N, P)))


def test_a_device_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"^fit: device must be 'cpu', 'cuda', 'cuda:0', 'cuda:1' ..., got 'gpu'$"):
        svd(device="gpu").fit(random_rows(N, P))
    with pytest.raises(RuntimeError, match=r"^partial_fit: device cuda:9 is not there: this process sees \d+ CUDA"):
        svd(device="cuda:9").partial_fit(random_rows(N, P))


# ---- beside the CPU


def test_both_devices_draw_the_same_omega():
    rows = np.eye(P, dtype=np.float32)
    cpu, cuda = (svd(seed=3, device=device).partial_fit(rows)._fitted.core for device in ("cpu", "cuda"))
    assert np.array_equal(cpu.apply(rows), cuda.apply(rows))


@pytest.mark.parametrize("params", [{}, {"center": True}, {"passes": 2}])
def test_both_devices_find_the_same(params):
    rows = random_rows(600, P)
    cpu, cuda = (svd(device=device, **params).fit(rows) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(cuda.singular_values_, cpu.singular_values_, rtol=1e-5)
    assert largest_angle(cuda.components_, cpu.components_) < 1e-3
    np.testing.assert_allclose(cuda.mean_, cpu.mean_, rtol=0, atol=4 * EPS * np.abs(rows).max())
    np.testing.assert_allclose(cuda.residual_, cpu.residual_, rtol=1e-3)


@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("cut", [100, 300])
def test_sketches_of_two_devices_merge(first, second, center, cut):
    rows = random_rows(700, P)
    ours = svd(device=first, center=center).partial_fit(rows[:cut])
    theirs = svd(device=second, center=center).partial_fit(rows[cut:])
    before = results(theirs)
    ours.merge(theirs)
    assert results(theirs) == before
    assert ours.n_samples_seen_ == 700
    whole = svd(device=first, center=center).partial_fit(rows)
    np.testing.assert_allclose(ours.singular_values_, whole.singular_values_, rtol=1e-4)
    np.testing.assert_allclose(ours.mean_, whole.mean_, rtol=0, atol=1e-5)
    ours.partial_fit(rows)  # goes on, on its own device
    assert ours.n_samples_seen_ == 1400


@pytest.mark.parametrize("n", [100, 600])
def test_files_are_of_any_device(n, tmp_path):
    rows = random_rows(n, P)
    for first, second in (("cuda", "cpu"), ("cpu", "cuda")):
        saved = svd(device=first, center=True).partial_fit(rows)
        saved.save(tmp_path / first)
        loaded = StreamingSVD.load(tmp_path / first, device=second)
        assert loaded.device == second
        for name, array in saved._fitted.arrays().items():
            assert np.array_equal(loaded._fitted.arrays()[name], array), name
        loaded.partial_fit(rows)
        assert loaded.n_samples_seen_ == 2 * n


def test_copies_and_pickles_stay_on_the_device():
    rows = random_rows(600, P)
    ours = svd(center=True).partial_fit(rows)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.device == "cuda"
        assert results(twin) == results(ours)
        twin.partial_fit(rows)
        assert (twin.n_samples_seen_, ours.n_samples_seen_) == (1200, 600)


def test_a_snapshot_does_not_change_with_its_sketch():
    rows = random_rows(900, P)
    own = svd().partial_fit(rows[:600])._fitted.core
    snapshots = [own.snapshot(), own.snapshot(settled=False)]
    before = [(it.gram, it.co_range) for it in snapshots]
    own.partial_fit(rows[600:], first_row=600, all_or_none=True)
    snapshots[1].partial_fit(rows[:300], first_row=0, all_or_none=True)
    assert np.array_equal(snapshots[0].gram, before[0][0])
    assert np.array_equal(snapshots[0].co_range, before[0][1])
    assert snapshots[1].num_rows() == 900
    assert own.snapshot().num_rows() == 900


# ---- Ctrl-C


def test_ctrl_c_stops_a_fit_between_blocks_and_changes_nothing():
    rows = np.lib.stride_tricks.sliding_window_view(random_rows(1, 100_000)[0], 100)
    ours = svd().partial_fit(rows[:300])
    before = results(ours)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        for take in (ours.fit, ours.partial_fit):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                take(rows)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert results(ours) == before  # partial_fit was still looking at the rows


# ---- on the emulator: failing calls, and the order of blocks

CALLS = (
    "cudaMalloc",
    "cudaMemGetInfo",
    "cudaGetDevice",
    "cudaSetDevice",
    "cudaStreamCreateWithFlags",
    "cudaEventCreateWithFlags",
    "cudaEventRecord",
    "cudaEventSynchronize",
    "cudaStreamWaitEvent",
    "cudaHostAlloc",
    "cudaMemcpyAsync",
    "cudaMemcpy2DAsync",
    "cudaMemsetAsync",
    "cudaLaunchKernel",
    "cudaStreamSynchronize",
)


@needs_emulator
@pytest.mark.parametrize("api", CALLS)
def test_a_cuda_call_that_fails_is_an_error_and_leaves_nothing(api, no_faults):
    """Every call of each kind, one after the other, from the first sketch to the last result."""
    rows = random_rows(260, 9)
    expected = results(svd(2, center=True, n_oversamples=2).partial_fit(rows).partial_fit(rows))
    before = emulator.ptxrunLiveBytes()
    for number in range(1, 400):
        ours = svd(2, center=True, n_oversamples=2)
        assert emulator.ptxrunFail(f"{api}:{number}".encode()) == 0
        message = None
        try:
            ours.partial_fit(rows).partial_fit(rows)
            said = results(ours)
        except RuntimeError as error:
            message = str(error)
        calls = emulator.ptxrunCalls(api.encode())
        emulator.ptxrunFail(None)
        emulator.ptxrunClearError()
        if message is not None:
            goes_on_or_says_why_not(ours, rows)
        ours = None
        assert emulator.ptxrunLiveBytes() == before, f"{api}:{number}"
        if message is None and number > calls:
            break
        # What fails as a call ends, after its results are there, changes nothing: the device that was current before.
        assert api == "cudaSetDevice" if message is None else message.startswith(("cuda", "device: ", *KERNELS))
        assert message is not None or said == expected
    assert number > 1
    assert said == expected


KERNELS = (
    "map_signs",
    "add_shares",
    "add_co_range",
    "add_gram",
    "sum_squares",
    "multiply_rows",
    "add_product_shares",
    "combine_rows",
)


def goes_on_or_says_why_not(ours: StreamingSVD, rows: np.ndarray) -> None:
    """The rows of whole blocks count once, or the sketch is lost and says so, or nothing was seen."""
    try:
        seen = ours.n_samples_seen_
        ours.partial_fit(rows)
        sums = ours._fitted.core.snapshot()
        together = sums.gram[-1, -1]
    except (ValueError, RuntimeError) as error:
        if "has seen no rows" not in str(error) and "the sketch is lost; fit anew" not in str(error):
            raise
        return
    assert together == sums.num_rows() == ours.n_samples_seen_ == seen + len(rows)


@needs_emulator
def test_the_order_of_blocks_does_not_change_a_bit():
    rows, found = random_rows(700, P), []
    for seed in range(4):
        emulator.ptxrunSeed(seed)
        found.append([results(svd(**params).fit(rows)) for params in ({"center": True}, {"passes": 2})])
    emulator.ptxrunSeed(0)
    assert all(it == found[0] for it in found)


@needs_emulator
def test_blocks_do_not_race():
    """With the emulator's check of all accesses to global memory."""
    rows = random_rows(300, P)
    emulator.ptxrunCheck(b"all")
    try:
        for params in ({"center": True}, {"passes": 2}):
            results(svd(**params).fit(rows).fit(rows))
        svd().partial_fit(rows).merge(svd().partial_fit(rows))
        gram(rows, rows[0], device="cuda")
    finally:
        emulator.ptxrunCheck(b"memory,init,races,sync,host")
    assert emulator.ptxrunLastMessage() == b""


@pytest.mark.parametrize(("n", "p"), [(1, 1), (33, 70), (70, 1100)])
def test_the_gram_matrix_is_that_of_float64(n, p):
    rows = np.random.default_rng(n).integers(-100, 101, (n, p)).astype(np.float32)
    assert np.array_equal(gram(rows, rows[0], device="cuda"), reference.gram(rows, rows[0]))
    running = tipl.RunningGram(device="cuda")
    for block in (rows[:1], rows[1:30], rows[30:]):
        if len(block):
            running.append(block)
    assert np.array_equal(running.gram, reference.gram(rows, None))


def test_a_sketch_of_single_rows_is_that_of_all_at_once():
    rows = random_rows(600, 40)
    assert results(stream(svd(), rows, 1)) == results(svd().partial_fit(rows))
