"""Read the rows of a matrix in blocks of float32, wherever the matrix lies: in memory, in a file or in a store."""

import mmap
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tipl import _core
from tipl.arrays import as_input, as_result, on_a_device
from tipl.device import cuda_engine

BLOCK_BYTES = 64 << 20
"""Size of the blocks, as float32, in which rows are converted or requested from disk."""

AHEAD_BYTES = 128 << 20
"""How far beyond the current block rows are requested from disk."""

SKETCH_ROWS = 256
"""Rows of a block in csrc/sketch_math.h. Groups of columns take turns after so many, still in the caches."""


class Rows(Protocol):
    """A matrix that rows are read from: an array, a tensor, a memory-mapped file or the array of a store."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...
    def __getitem__(self, rows: slice, /) -> Any: ...


def row_blocks(
    where: str,
    X: Rows,
    max_rows: int | None = None,
    read_ahead: bool = False,
    cuda_index: int | None = None,
) -> Iterator[Any]:
    """Yield the rows of X (n, p) in order, as float32 blocks with contiguous rows. float32 arrays are not copied.

    `max_rows`: the most rows of one block. `read_ahead`: read a memory-mapped file from disk before its blocks are due.
    `cuda_index`: the device that takes the blocks; an array on a device is one block, where it lies. Raises TypeError
    where X holds no numbers, ValueError for complex ones and for another shape, naming `where`.
    """
    X = as_matrix(where, X)
    shape = tuple(X.shape)
    if len(shape) != 2 or 0 in shape:
        what = "sample" if shape and shape[0] == 0 else "feature"
        got = f"0 {what}(s) (shape={shape}) while a minimum of 1 is required." if len(shape) == 2 else f"{shape}"
        if len(shape) == 1:
            got += ". Reshape your data: X.reshape(1, -1) if it is one row, X.reshape(-1, 1) if it is one column"
        raise ValueError(f"{where}: X must have shape (n, p), at least one row and one column, got {got}")
    if cuda_index is not None and on_a_device(X):
        tensor: Any = X
        yield tensor.float() if hasattr(tensor, "is_complex") and not tensor.is_complex() else tensor
        return
    usable_in_place = isinstance(X, np.ndarray) and X.dtype == np.float32 and _rows_are_contiguous(X)
    reader = _core.ReadAhead(X) if read_ahead and isinstance(X, np.ndarray) and _is_mapped_file(X) else None
    most = shape[0] if usable_in_place and reader is None else max(1, BLOCK_BYTES // (4 * shape[1]))
    if usable_in_place and reader is not None:  # the sketch uses whole blocks in place, and copies the rows of others
        most = -(-most // (2 * SKETCH_ROWS)) * 2 * SKETCH_ROWS
    step = most if max_rows is None else min(most, max_rows)
    row_bytes = X.dtype.itemsize * shape[1]
    for start in range(0, shape[0], step):
        if reader is not None:
            reader.want((start + step) * row_bytes + AHEAD_BYTES)
        block = X[start : start + step]
        yield block if usable_in_place else _as_float32(where, block)


def as_matrix(where: str, X: Any) -> Any:
    """Return X as it is, if rows can be read from it; a table or a list of rows as a NumPy array.

    Raises TypeError for anything else, naming `where`.
    """
    if hasattr(X, "tocoo"):
        raise TypeError(f"{where}: X must be dense, got sparse {type(X).__name__}; X.toarray() makes it so")
    is_masked = isinstance(X, np.ma.MaskedArray)
    if hasattr(X, "shape") and hasattr(X, "dtype") and not is_masked:
        return X
    if is_masked or not (isinstance(X, list | tuple) or hasattr(X, "__array__")):
        raise TypeError(f"{where}: X must be an array of rows, got {type(X).__name__}")
    try:
        return np.asarray(X)
    except ValueError as error:  # rows of several lengths
        raise ValueError(f"{where}: X must have shape (n, p): {error}") from None


def where_it_was(argument: Any, result: NDArray[np.float32], cuda_index: int | None) -> Any:
    """Return a result, which is in the host's memory, where the argument is, as an array of its kind."""
    if cuda_index is None or not on_a_device(argument):
        return result
    kind, _ = as_input("X", argument, cuda_index)
    return as_result(kind, cuda_engine().DeviceArray.from_numpy(result, cuda_index))


def numbered(blocks: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Yield each block together with the index of its first row in the matrix."""
    first_row = 0
    for block in blocks:
        yield first_row, block
        first_row += block.shape[0]


def _is_mapped_file(X: NDArray[Any]) -> bool:
    """Return whether X is a C-contiguous view of a memory-mapped file."""
    base: Any = X
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap.mmap) and X.flags.c_contiguous


def _rows_are_contiguous(X: NDArray[Any]) -> bool:
    size = X.itemsize
    return X.flags.aligned and (X.shape[1] == 1 or X.strides[1] == size) and X.strides[0] % size == 0


def _as_float32(where: str, block: Any) -> NDArray[np.float32]:
    is_tensor = hasattr(block, "detach")  # a torch tensor: NumPy does not know its bfloat16
    if not is_tensor and on_a_device(block):
        raise ValueError(f"{where}: X must be in the host's memory, as the estimator is on the CPU")
    if is_tensor and not block.is_complex():
        block = block.detach().float().cpu().numpy()
    block = np.asarray(block)
    if block.dtype.kind == "c":
        raise ValueError(f"{where}: Complex data not supported: X must be real, got {block.dtype}")
    if block.dtype.kind == "O":
        try:
            block = block.astype(np.float64)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{where}: X must hold numbers: {error}") from None
    if block.dtype.kind not in "biuf" and block.dtype.name != "bfloat16":
        raise TypeError(f"{where}: X must hold numbers, got {block.dtype}")
    with np.errstate(over="ignore"):  # values too large for float32 become Inf, which the engine refuses by row
        return np.require(block.astype(np.float32, copy=False), requirements=["C", "ALIGNED"])
