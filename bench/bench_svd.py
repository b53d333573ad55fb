"""Fitting a basis: `tipl.StreamingSVD` in blocks of rows beside `torch.svd_lowrank` on the whole matrix in memory.

The matrix has a power-law spectrum; each is judged first by its residual against the exact optimum (float64).
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

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


@pytest.mark.parametrize(
    ("fit", "tolerance"),
    [
        pytest.param(streamed, 1.05, id="tipl one pass"),
        pytest.param(svd_lowrank(1), 1.5, id="torch.svd_lowrank niter=1"),
        pytest.param(svd_lowrank(2), 1.05, id="torch.svd_lowrank niter=2"),
    ],
)
def bench_basis(benchmark: BenchmarkFixture, fit: Callable[[], NDArray[np.float32]], tolerance: float) -> None:
    rows, optimum = matrix()
    directions = fit().astype(np.float64)
    residual = float(np.linalg.norm(rows - (rows @ directions.T) @ directions))
    assert residual < tolerance * optimum
    benchmark.group = f"basis {N} x {P}, k = {K}"
    benchmark.pedantic(fit, rounds=5, warmup_rounds=1)
    benchmark.extra_info["residual_over_optimum"] = residual / optimum
