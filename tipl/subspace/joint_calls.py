"""Calls in which several `StreamingSVD` estimators take part: they change together, or none of them does."""

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

from tipl import _core
from tipl.device import cuda_index
from tipl.subspace.fitted_sketch import FittedSketch
from tipl.subspace.parameters import checked_integer
from tipl.subspace.row_blocks import SKETCH_ROWS, Rows, as_matrix, numbered, row_blocks
from tipl.subspace.scikit_conventions import column_names

if TYPE_CHECKING:
    from tipl.subspace.streaming_svd import StreamingSVD


def turns(where: str, estimators: Sequence["StreamingSVD"]) -> _core.Turn:
    """Return a context in which a call has the estimators to itself."""
    return _core.Turn([estimator._in_use for estimator in estimators], where, "the estimator")


def set_fitted(estimators: Sequence["StreamingSVD"], fitted: Sequence[FittedSketch | None]) -> None:
    """Give each estimator its new sketch."""
    # In one step of the interpreter, so that no signal handler can raise when only some are set.
    deque(map(setattr, estimators, repeat("_fitted"), fitted), maxlen=0)


@contextlib.contextmanager
def saying_nan() -> Iterator[None]:
    """Write NaN as scikit-learn does where the engine, in C++, refuses a row for its nan."""
    try:
        yield
    except ValueError as error:
        if "X must be finite, got nan" not in str(error):
            raise
        raise ValueError(str(error).replace("got nan", "got NaN")) from None


@saying_nan()
def fit_together(parts: Sequence[tuple["StreamingSVD", slice]], X: Rows) -> None:
    """Fit each estimator to its columns of X, reading X as often as the one with the most passes asks."""
    estimators = [estimator for estimator, _ in parts]
    max_rows = None if all(columns == slice(None) for _, columns in parts) else SKETCH_ROWS
    index = cuda_index("fit", estimators[0].device)
    matrix, names = as_matrix("fit", X), column_names(X)
    with turns("fit", estimators):
        fresh = [type(estimator)(**estimator.get_params()) for estimator in estimators]
        for number in range(max([1] + [checked_integer("passes", estimator.passes) for estimator in fresh])):
            # The estimators that need this pass, each with the directions that its pass before has found.
            directions = {
                i: None if estimator._fitted is None else estimator._fitted.next_directions(estimator._threads())
                for i, estimator in enumerate(fresh)
                if number == 0 or (number < estimator.passes and not estimator._seen_rows("fit").is_exact)
            }
            now: dict[int, FittedSketch] = {}
            blocks = (
                row_blocks("fit", matrix, max_rows=max_rows, read_ahead=True, cuda_index=index) if directions else ()
            )
            for first_row, block in numbered(blocks):
                for i in directions:
                    rows = columns_of(block, parts[i][1])
                    if i not in now:
                        now[i] = fresh[i]._build(rows.shape[1], directions=directions[i])
                    now[i].core.partial_fit(rows, first_row=first_row, all_or_none=False)
            for i, fitted in now.items():
                fitted.core.settle()
                if parts[i][1] == slice(None):
                    fitted.feature_names = names
                fresh[i]._fitted = fitted
        set_fitted(estimators, [estimator._fitted for estimator in fresh])


def check_rows(cores: Sequence[_core.RowSketch], columns: Sequence[slice], blocks: Sequence[Any]) -> None:
    """Raise ValueError where a sketch cannot take its columns of all blocks.

    A single block is left alone: the sketch checks all of it before it takes any row.
    """
    for core, which in zip(cores, columns, strict=True) if len(blocks) > 1 else ():
        before = 0.0
        for first_row, block in numbered(blocks):
            before = core.check_rows(columns_of(block, which), first_row, before)


def columns_of(block: Any, which: slice) -> Any:
    """Return some columns of a block of rows; all of them of any array, even of one that cannot be sliced."""
    return block if which == slice(None) else block[:, which]
