"""Fitting a basis: `tipl.StreamingSVD` in blocks of rows beside `torch.svd_lowrank` on the whole matrix in memory.

The matrix has a power-law spectrum; each is judged first by its residual against the exact optimum (float64).
"""

import time
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from measure import Row, rows_of, side_by_side
from numpy.typing import NDArray
from record import Record

from tipl import StreamingSVD

N, P, K = 4096, 5708, 64


@cache
def matrix() -> tuple[NDArray[np.float32], float]:
    """Return rows (N, P) and the least residual |A - A V^T V| that K directions can leave."""
    rng = np.random.default_rng(0)
    rank = 256
    left = np.linalg.qr(rng.standard_normal((N, rank)))[0]
    right = np.linalg.qr(rng.standard_normal((P, rank)))[0]
    spectrum = np.arange(1, rank + 1) ** -1.0
    return ((left * spectrum) @ right.T).astype(np.float32), float(np.sqrt((spectrum[K:] ** 2).sum()))


def streamed() -> NDArray[np.float32]:
    svd = StreamingSVD(K)
    for start in range(0, N, 512):
        svd.partial_fit(matrix()[0][start : start + 512])
    return svd.components_


def svd_lowrank(niter: int) -> Callable[[], NDArray[np.float32]]:
    def fit() -> NDArray[np.float32]:
        torch.manual_seed(0)
        return torch.svd_lowrank(torch.from_numpy(matrix()[0]), q=K + 10, niter=niter)[2][:, :K].T.numpy()

    return fit


def seconds(fit: Callable[[], NDArray[np.float32]]) -> float:
    start = time.perf_counter()
    fit()
    return time.perf_counter() - start


def bench_basis(record: Record) -> None:
    fits = {"tipl": streamed, "torch.svd_lowrank niter=1": svd_lowrank(1), "torch.svd_lowrank niter=2": svd_lowrank(2)}
    tolerated = {"tipl": 1.05, "torch.svd_lowrank niter=1": 1.5, "torch.svd_lowrank niter=2": 1.05}
    rows, optimum = matrix()
    for name, fit in fits.items():
        directions = fit().astype(np.float64)
        residual = float(np.linalg.norm(rows - (rows @ directions.T) @ directions))
        assert residual < tolerated[name] * optimum, f"{name}: {residual / optimum:.3f} times the optimum"
    clocks = {name: partial(seconds, fit) for name, fit in fits.items()}

    def measure() -> list[Row]:
        ms = {name: 1e3 * s for name, s in side_by_side(clocks).items()}
        return rows_of("svd", f"{N} x {P} k{K}", "ms", ms.pop("tipl"), ms)

    record(measure)
