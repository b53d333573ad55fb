"""NumPy's numbers and arrays in a torch file, made without calling NumPy by name.

Such are the mean reward that rl_games saves, and statistics that were saved as Gymnasium keeps them. torch.load(
weights_only=True) refuses them unless it is told what their names stand for. Here the names stand for functions and
classes that make numbers of plain kinds and nothing else. torch itself knows `_codecs.encode`, with which pickles write
bytes: a file may call it in latin1 alone, as some codecs take hours for a long text.
"""

import contextlib
from typing import Any

import numpy as np
import torch

from tipl.storing.inert_pickle import plain_dtype
from tipl.storing.not_readable import NotReadableError

ENCODE = "_codecs.encode"
_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")  # before NumPy 2, and from then on
NAMES = frozenset(
    {"numpy.dtype", "numpy.ndarray", ENCODE, *(f"{it}.{name}" for it in _CORES for name in ("scalar", "_reconstruct"))}
)
"""What pickles of NumPy's numbers and arrays use, beside what those of tensors do."""


def encoded_length(arguments: Any) -> int:
    """Return how many bytes a pickle's call of `_codecs.encode` makes. Raises NotReadableError unless it is in
    latin1."""
    is_pair = isinstance(arguments, tuple) and len(arguments) == 2 and isinstance(arguments[0], str)
    if not (is_pair and arguments[1] == "latin1"):
        raise NotReadableError(f"calls {ENCODE} for more than numbers of NumPy's, and was not loaded")
    return len(arguments[0])


class _Kind:
    """Stands for numpy.dtype."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def dtype(self) -> np.dtype[Any]:
        """Return the kind of number. Raises ValueError where it is not a plain one."""
        dtype = plain_dtype(self.code, self.order)
        if dtype is None:
            raise ValueError("a NumPy number is of no plain kind")
        return dtype


class _ArrayClass:
    """Stands for numpy.ndarray where it is only named: the class itself would make an array of any size."""


class _Array(np.ndarray[Any, np.dtype[Any]]):
    """An array that is empty until its state is set, and is saved as a plain one again."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("a NumPy array has no state")
        _, shape, kind, in_columns, content = state
        if not isinstance(kind, _Kind) or not isinstance(content, bytes):
            raise ValueError("a NumPy array is not one of plain numbers")
        array = np.frombuffer(content, kind.dtype()).reshape(shape, order="F" if in_columns else "C")
        super().__setstate__(array.__reduce__()[2])  # type: ignore[arg-type]  # as NumPy itself writes it

    def __reduce__(self) -> Any:
        return np.asarray(self).__reduce__()


def _empty(*_: Any) -> _Array:
    """Stands for numpy's function that makes an empty array, which then gets a state."""
    return np.empty(0).view(_Array)


def _scalar(kind: Any, content: Any) -> Any:
    """Stands for numpy's function that makes a number of one kind from its bytes."""
    if not isinstance(kind, _Kind):
        raise ValueError("a NumPy number is of no plain kind")
    return np.frombuffer(content, kind.dtype(), count=1)[0]


def allowed() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which torch.load(weights_only=True) reads NumPy's numbers and arrays. It needs torch 2.6."""
    stand_ins: list[Any] = [(_Kind, "numpy.dtype"), (_ArrayClass, "numpy.ndarray")]
    stand_ins.append((_Array, "an array"))  # so that torch sets its state; no file may name it
    for core in _CORES:
        stand_ins += [(_scalar, f"{core}.scalar"), (_empty, f"{core}._reconstruct")]
    return torch.serialization.safe_globals(stand_ins)
