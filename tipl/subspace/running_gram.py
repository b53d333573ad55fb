"""The Gram matrix of rows that are in memory, exact in float64: at once, or row by row as they come."""

from typing import Self

import numpy as np
from numpy.typing import NDArray

from tipl import _core
from tipl.subspace.parameters import checked_threads


class RunningGram:
    """The Gram matrix of the rows of a short trial, exact in float64, row by row as they come.

    Keeps the rows, 4 p bytes each. Appending a row to T others costs 2 T p flops; appending a whole trial row by row
    costs as much as one call of `gram`.
    """

    def __init__(self, *, origin: NDArray[np.float32] | None = None, num_threads: int | None = None) -> None:
        self.origin = origin
        self.num_threads = num_threads
        self._in_use = _core.InUse()
        self._blocks: tuple[NDArray[np.float32], ...] = ()
        self._gram = np.zeros((0, 0))

    def append(self, X: NDArray[np.float32]) -> Self:
        """Take the rows of X, (n, p) or one row (p,), C-contiguous float32. Raises as `gram` does, then takes none."""
        rows = np.array(X, ndmin=2, copy=True, subok=False)
        threads = checked_threads(self.num_threads)
        with _core.Turn([self._in_use], "append", "the Gram matrix"):
            own = gram(rows, self.origin, threads)  # checks the rows
            across = [_core.products("append", block, rows, self.origin, threads) for block in self._blocks]
            old, new = len(self._gram), len(rows)
            grown = np.empty((old + new, old + new))
            grown[:old, :old], grown[old:, old:] = self._gram, own
            if across:
                grown[:old, old:] = np.concatenate(across)
                grown[old:, :old] = grown[:old, old:].T
            self._blocks, self._gram = (*self._blocks, rows), grown
        return self

    @property
    def gram(self) -> NDArray[np.float64]:
        """D D^T (T, T) of the T rows so far, D = rows - origin."""
        return self._gram


def gram(
    X: NDArray[np.float32], origin: NDArray[np.float32] | None = None, num_threads: int | None = None
) -> NDArray[np.float64]:
    """Return D D^T (T, T), D = X - origin, for rows X (T, p) and an optional row `origin` (p,), contiguous float32.

    Differences, products and sums are float64, so that rows close to the origin lose nothing. The bits are the same for
    any num_threads (None: all cores). Raises TypeError for another dtype, ValueError for another shape, NaN or Inf.
    """
    return _core.products("gram", X, None, origin, checked_threads(num_threads))
