"""The Gram matrix of rows that are in memory, exact in float64: at once, or row by row as they come."""

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tipl import _core
from tipl.device import cuda_index
from tipl.subspace.parameters import checked_threads
from tipl.subspace.sketch_svd import products


class RunningGram:
    """The Gram matrix of the rows of a short trial, exact in float64, row by row as they come.

    Keeps the rows, 4 p bytes each, in the host's memory, where they must come from. Appending a row to T others costs
    2 T p flops, on the CPU or on the CUDA device `device`; appending a whole trial row by row costs as much as one call
    of `gram`.
    """

    def __init__(
        self, *, origin: NDArray[np.float32] | None = None, num_threads: int | None = None, device: str = "cpu"
    ) -> None:
        self.origin = origin
        self.num_threads = num_threads
        self.device = device
        self._in_use = _core.InUse()
        self._blocks: tuple[NDArray[np.float32], ...] = ()
        self._gram = np.zeros((0, 0))

    def append(self, X: NDArray[np.float32]) -> Self:
        """Take the rows of X, (n, p) or one row (p,), C-contiguous float32. Raises as `gram` does, then takes none."""
        rows = np.array(X, ndmin=2, copy=True, subok=False)
        threads, index = checked_threads(self.num_threads), cuda_index("append", self.device)
        with _core.Turn([self._in_use], "append", "the Gram matrix"):
            own = gram(rows, self.origin, threads, device=self.device)  # checks the rows
            across = [products("append", block, rows, self.origin, threads, cuda_index=index) for block in self._blocks]
            old, new = len(self._gram), len(rows)
            grown = np.empty((old + new, old + new))
            grown[:old, :old], grown[old:, old:] = self._gram, own
            if across:
                grown[:old, old:] = np.concatenate(across)
                grown[old:, :old] = grown[:old, old:].T
            blocks = [*self._blocks, rows]
            while len(blocks) > 1 and len(blocks[-1]) >= len(blocks[-2]):  # a row meets few blocks, whatever T
                blocks[-2:] = [np.concatenate(blocks[-2:])]
            self._blocks, self._gram = tuple(blocks), grown
        return self

    @property
    def gram(self) -> NDArray[np.float64]:
        """D D^T (T, T) of the T rows so far, D = rows - origin."""
        return self._gram


def gram(
    X: Any, origin: NDArray[np.float32] | None = None, num_threads: int | None = None, *, device: str = "cpu"
) -> NDArray[np.float64]:
    """Return D D^T (T, T), D = X - origin, for rows X (T, p) and an optional row `origin` (p,), contiguous float32.

    Differences, products and sums are float64, so that rows close to the origin lose nothing. The bits are the same for
    any num_threads (None: all cores). With device="cuda", "cuda:0" ... they are computed there, and X may lie there
    (anything that speaks DLPack); the result is a NumPy array. Raises TypeError for another dtype, ValueError for
    another shape, NaN or Inf.
    """
    return products("gram", X, None, origin, checked_threads(num_threads), cuda_index=cuda_index("gram", device))
