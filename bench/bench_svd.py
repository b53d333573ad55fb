"""Fitting a basis: `tipl.StreamingSVD`, from a memory-mapped file in the page cache, beside its peers.

Peers have the whole matrix in memory, and reading it there is not timed; tipl maps the file again for each fit. Every
result is checked first: its residual |A - A V^T V| against the smallest possible with k directions.

    pytest bench -k svd --svd-disk   # also 200,000 x 20,000 from disk: 16 GB, for which the folder of temporary files
                                     # must have room
"""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
import torch
from measure import Clock, Row, rows_of, side_by_side
from numpy.typing import NDArray
from record import Record
from roofs import Roofs

from tipl import GroupedSVD, PPOConfig, StreamingSVD, collect

K = 64
NOISE = 1e-5
Directions = NDArray[np.float32]

OPTIMUM = {(31296, 5708): 0.0256288, (8192, 73484): 0.0182495}
"""|A - A V^T V| / |A| at best, from the eigenvalues of the exact Gram matrix in float64."""


def write_matrix(path: Path, n: int, p: int) -> Path:
    """Write rows like a trajectory's: 200 directions of power-law strength, each a random walk in time, and noise.

    The same as in the script with which the peers were first measured, so that its figures can be compared.
    """
    rng, rank = np.random.default_rng(0), 200
    strength = (np.arange(1, rank + 1) ** -1.0).astype(np.float32)
    directions = (rng.standard_normal((rank, p), dtype=np.float32) / np.sqrt(p)).astype(np.float32)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, p))
    for start in range(0, n, 2048):
        count = min(2048, n - start)
        walks = np.cumsum(rng.standard_normal((count, rank), dtype=np.float32), 0) / np.sqrt(count)
        noise = NOISE * rng.standard_normal((count, p), dtype=np.float32)
        rows[start : start + count] = (walks * strength) @ directions + noise
    rows.flush()
    return path


@pytest.fixture(scope="module", params=list(OPTIMUM), ids=lambda shape: f"{shape[0]}x{shape[1]}")
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = write_matrix(tmp_path_factory.mktemp("svd") / "rows.npy", *request.param)
    yield path
    path.unlink()


def residual(rows: NDArray[np.float32], directions: Directions) -> float:
    """|A - A V^T V| / |A|, in float64 but for the products."""
    squares = left = 0.0
    for start in range(0, len(rows), 1024):
        block = np.asarray(rows[start : start + 1024])
        rest = block - (block @ directions.T) @ directions
        squares += float(np.sum(block.astype(np.float64) ** 2))
        left += float(np.sum(rest.astype(np.float64) ** 2))
    return math.sqrt(left / squares)


def ours(path: Path, passes: int) -> Directions:
    return StreamingSVD(K, passes=passes).fit(np.load(path, mmap_mode="r")).components_


def svd_lowrank(rows: torch.Tensor, k: int) -> Directions:
    torch.manual_seed(0)
    return torch.svd_lowrank(rows, q=min(k + 10, *rows.shape), niter=2)[2][:, :k].T.contiguous().numpy()


def randomized_svd(rows: torch.Tensor) -> Directions:
    from sklearn.utils.extmath import randomized_svd

    return np.asarray(randomized_svd(rows.numpy(), K, n_iter=2, random_state=0)[2], dtype=np.float32)


def dask_compressed(rows: torch.Tensor) -> Directions:
    """In blocks of 4,096 rows, shared by dask's threads, the most that gives both threads one of the smaller matrix.

    Larger blocks are at most 4 % faster, smaller ones are slower. Its default iterator, "power", leaves 21 to 40 % more
    error than the best directions in float32; a second iteration of "QR" takes some 20 % longer.
    """
    import dask.array
    from threadpoolctl import threadpool_limits

    blocks = dask.array.from_array(rows.numpy(), chunks=(4096, -1), name=False)  # a name would be a hash of all rows
    with threadpool_limits(1):
        *_, directions = dask.array.linalg.svd_compressed(blocks, K, iterator="QR", n_power_iter=1, seed=0)
        return np.asarray(directions.compute(), dtype=np.float32)


def incremental_pca(rows: torch.Tensor) -> Directions:
    """Centred, which the matrix hardly notices; in blocks of 512 rows, the fastest of those tried."""
    from sklearn.decomposition import IncrementalPCA

    pca = IncrementalPCA(K)
    for block in rows.split(512):
        pca.partial_fit(block.numpy(), check_input=False)
    return np.asarray(pca.components_, dtype=np.float32)


def clocks_of(fits: dict[str, Callable[[], Directions]], warm: Path | None = None) -> dict[str, Clock]:
    """Each one's clock; `warm` is read before it starts, since page caches give up what nobody has used for a while."""

    def clock(fit: Callable[[], Directions]) -> float:
        if warm is not None:
            read_through(warm)
        start = time.perf_counter()
        fit()
        return time.perf_counter() - start

    return {name: partial(clock, fit) for name, fit in fits.items()}


def read_through(path: Path) -> None:
    buffer = bytearray(16 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def ms(seconds: dict[str, float]) -> dict[str, float]:
    return {name: 1e3 * s for name, s in seconds.items()}


def bench_fit(matrix: Path, record: Record, roofs: Roofs) -> None:
    rows = torch.from_numpy(np.load(matrix))
    n, p = rows.shape
    fits = {
        "one-pass": partial(ours, matrix, 1),
        "two-pass": partial(ours, matrix, 2),
        "torch.svd_lowrank niter=2": partial(svd_lowrank, rows, K),
        "sklearn randomized_svd": partial(randomized_svd, rows),
        "sklearn IncrementalPCA": partial(incremental_pca, rows),
    }
    if find_spec("dask"):
        fits["dask svd_compressed"] = partial(dask_compressed, rows)
    clocks = clocks_of(fits, warm=matrix)
    excess: dict[str, float] = {}
    tolerances = {"one-pass": 1.03, "two-pass": 1.005, "torch.svd_lowrank niter=2": 1.01, "dask svd_compressed": 1.03}
    for name, tolerated in tolerances.items():
        if name not in fits:
            continue
        excess[name] = residual(rows.numpy(), fits[name]()) / OPTIMUM[n, p]
        assert excess[name] < tolerated, f"{name}: {excess[name]:.4f} times the optimum"
    record.say(f"svd {n}x{p}, residual over the optimum: {', '.join(f'{k} {v:.4f}' for k, v in excess.items())}")

    def measure() -> list[Row]:
        seconds = side_by_side(clocks, rounds=(3, 10), budget_s=60)
        reading_s, table = roofs.reading_s(4.0 * n * p), []
        for name, passes in {"one-pass": 1, "two-pass": 2}.items():
            carried = [2 * K, K + K // 4][:passes]  # directions of each pass: C, and Y too where they are dense
            flops = sum(2.0 * n * p * size * (1 if i == 0 else 2) for i, size in enumerate(carried))
            roof = roofs.share(seconds[name], passes * reading_s, 4.0 * n * p, flops, "float32")
            peers = {peer: s for peer, s in ms(seconds).items() if peer not in ("one-pass", "two-pass")}
            table += rows_of("svd", f"{n}x{p} {name}", "ms", 1e3 * seconds[name], peers, roof)
        reading = 100 * reading_s / seconds["one-pass"]
        record.say(f"svd {n}x{p}: reading it once takes {1e3 * reading_s:.0f} ms, {reading:.0f} % of one pass")
        return table

    record(measure)


# ---- what a process needs

FITTED_ALONE = """
import sys, threading, time
import numpy as np
from tipl import StreamingSVD

def anonymous_kb():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])

most, done = [0], threading.Event()
def watch():
    while not done.wait(0.002):
        most[0] = max(most[0], anonymous_kb())
watcher = threading.Thread(target=watch)
watcher.start()
estimator = StreamingSVD(64).fit(np.load(sys.argv[1], mmap_mode="r"))
estimator.components_, estimator.coordinates_, estimator.residual_interval_
done.set()
watcher.join()
print(most[0] / 1024)
"""


def bench_memory(matrix: Path, record: Record) -> None:
    """Peak memory of a process that fits and reads all results, beyond the mapped file; Python and NumPy included."""
    said = subprocess.run([sys.executable, "-c", FITTED_ALONE, matrix], capture_output=True, text=True, check=True)
    megabytes = float(said.stdout)
    record.say(f"svd {np.load(matrix, mmap_mode='r').shape}: {megabytes:.0f} MB beyond the mapped file")
    assert megabytes < 400


# ---- a run in the making


START: list[Barrier] = []
"""In a process of many, where they wait for one another."""


def add_rows(seconds: float) -> list[float]:
    """Add one row at a time to a basis; return the seconds that each took."""
    rows = np.random.default_rng(0).standard_normal((64, 100_000), dtype=np.float32)
    svd, taken = StreamingSVD(32), []
    for _ in range(10):  # two blocks and more: what is used for the first time, the system has to clear
        svd.partial_fit(rows)
    for barrier in START:
        barrier.wait()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        before = time.perf_counter()
        svd.partial_fit(rows[len(taken) % len(rows)][None])
        taken.append(time.perf_counter() - before)
    return taken


def bench_live(record: Record) -> None:
    """A row of p = 100,000 at k = 32, alone and in ten processes at once, which share the machine."""
    context = get_context("spawn")

    def measure() -> list[Row]:
        alone = [1e3 * s for s in add_rows(3.0)]
        with ProcessPoolExecutor(10, context, START.append, (context.Barrier(10),)) as processes:
            counts = sorted(len(taken) for taken in processes.map(add_rows, [5.0] * 10))
        record.say(
            f"svd live: a row alone takes {np.median(alone):.3f} ms (median), {np.mean(alone):.3f} ms (mean), "
            f"{np.quantile(alone, 0.999):.2f} ms (99.9 % of {len(alone)}), {max(alone):.2f} ms at most; ten at once "
            f"took {counts[0]} to {counts[-1]} rows each in 5 s"
        )
        assert min(counts) > 0.5 * np.mean(counts), f"ten runs at once do not share fairly: {counts}"
        return rows_of("svd", "live row p=100000 k=32", "ms", float(np.mean(alone)), {"wanted: 2 ms": 2.0})

    record(measure)


# ---- real trajectories


def trajectories(folder: str) -> tuple[list[NDArray[np.float32]], dict[str, tuple[int, int]]]:
    """Return the weights of 16 trials of `tipl collect` on HalfCheetah, 121 checkpoints each, and the layers."""
    ppo = PPOConfig(num_steps=256, num_minibatches=4)
    store = collect(
        Path(folder) / "cheetah",
        env_id="HalfCheetah-v5",
        num_trials=16,
        total_timesteps=120 * 256,
        ppo=ppo,
        progress=False,
    )
    layers = {name: (at, at + math.prod(shape)) for name, (at, shape) in store.policy.layout.items()}
    return [store.trial(i).weights() for i in range(store.num_trials)], layers


def bench_trajectories(record: Record, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The shared basis of all trials, a basis for each trial, and one for each layer; k = 16."""
    trials, layers = trajectories(str(tmp_path_factory.mktemp("store")))
    shared, k = np.concatenate(trials), 16

    def lowrank(rows: NDArray[np.float32]) -> Directions:
        return svd_lowrank(torch.from_numpy(rows), k)

    paths = [np.ascontiguousarray(trial - trial[0]) for trial in trials]
    wide = {name: slice(*ends) for name, ends in layers.items() if ends[1] - ends[0] > 2 * k}
    cases: dict[
        str, tuple[Callable[[], list[Directions]], Callable[[], list[Directions]], list[NDArray[np.float32]]]
    ] = {
        "shared one-pass": (lambda: [StreamingSVD(k).fit(shared).components_], lambda: [lowrank(shared)], [shared]),
        "shared two-pass": (
            lambda: [StreamingSVD(k, passes=2).fit(shared).components_],
            lambda: [lowrank(shared)],
            [shared],
        ),
        "per-trial": (
            lambda: [StreamingSVD(k).fit(path).components_ for path in paths],
            lambda: [lowrank(path) for path in paths],
            paths,
        ),
        "per-layer": (
            lambda: [
                svd.components_
                for svd in GroupedSVD({name: layers[name] for name in wide}, k).fit(shared).estimators_.values()
            ],
            lambda: [lowrank(np.ascontiguousarray(shared[:, columns])) for columns in wide.values()],
            [shared[:, columns] for columns in wide.values()],
        ),
    }

    def measure() -> list[Row]:
        table = []
        for case, (fit, peer, matrices) in cases.items():
            left = [
                math.sqrt(sum(residual(rows, v) ** 2 for rows, v in zip(matrices, fitted, strict=True)) / len(matrices))
                for fitted in (fit(), peer())
            ]
            assert left[0] < 1.03 * left[1], f"{case}: residual {left[0]:.4f}, svd_lowrank's {left[1]:.4f}"
            seconds = side_by_side(clocks_of({"tipl": fit, "peer": peer}), budget_s=4, rounds=(5, 20))
            record.say(f"svd cheetah {case}: residual {left[0]:.4f} of |A|, svd_lowrank niter=2 leaves {left[1]:.4f}")
            table += rows_of(
                "svd",
                f"cheetah {case}",
                "ms",
                1e3 * seconds["tipl"],
                {"torch.svd_lowrank niter=2": 1e3 * seconds["peer"]},
            )
        return table

    record(measure)


# ---- more than memory holds


def forget_pages(path: Path) -> None:
    """Drop the file from the page cache, so that it is read from disk again."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def bench_disk(pytestconfig: pytest.Config, record: Record, tmp_path: Path) -> None:
    if not pytestconfig.getoption("--svd-disk"):
        pytest.skip("writes 16 GB: asked for with --svd-disk")
    path = write_matrix(tmp_path / "rows.npy", 200_000, 20_000)

    def read() -> float:
        forget_pages(path)
        start = time.perf_counter()
        read_through(path)
        return time.perf_counter() - start

    def fit() -> float:
        forget_pages(path)
        start = time.perf_counter()
        ours(path, 1)
        return time.perf_counter() - start

    def measure() -> list[Row]:
        seconds = side_by_side({"reading the file": read, "tipl": fit}, rounds=(3, 3), budget_s=200)
        reading, fitting = seconds["reading the file"], seconds["tipl"]
        return rows_of(
            "svd", "200000x20000 disk", "s", fitting, {"reading the file": reading}, (100 * reading / fitting, "disk")
        )

    record(measure)
    path.unlink()
