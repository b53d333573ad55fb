"""NumPy's numbers in a torch file, such as the mean reward that rl_games saves, made without calling NumPy by name.

torch.load(weights_only=True) refuses them unless it is told what their names stand for. Here the names stand for
functions that make one plain number and nothing else. torch itself knows `_codecs.encode`, with which pickles write
bytes: a file may call it for the few bytes of a number alone, in latin1, as some codecs take hours for a long text.
"""

import contextlib
from typing import Any

import numpy as np
import torch

from tipl.storing.not_readable import NotReadableError

ENCODE = "_codecs.encode"
NAMES = frozenset({"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", ENCODE})
"""What pickles of NumPy's numbers use, beside what those of tensors do."""

_MAX_BYTES = 16  # of a number
_KINDS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


def check_encoding(arguments: Any) -> None:
    """Raise NotReadableError where a pickle calls `_codecs.encode` for more than a number's bytes."""
    is_pair = isinstance(arguments, tuple) and len(arguments) == 2 and isinstance(arguments[0], str)
    if not (is_pair and len(arguments[0]) <= _MAX_BYTES and arguments[1] == "latin1"):
        raise NotReadableError(f"calls {ENCODE} for more than a number of NumPy's, and was not loaded")


class _Kind:
    """Stands for numpy.dtype."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


def _scalar(kind: Any, content: Any) -> Any:
    """Stands for numpy's function that makes a number of one kind from its bytes."""
    if not isinstance(kind, _Kind) or kind.code not in _KINDS or kind.order not in ("<", ">", "=", "|"):
        raise ValueError("a NumPy number is of no plain kind")
    return np.frombuffer(content, np.dtype(f"{kind.order}{kind.code}"), count=1)[0]


def scalars_allowed() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which torch.load(weights_only=True) reads NumPy's numbers. It needs torch 2.6."""
    stand_ins = [
        (_scalar, "numpy.core.multiarray.scalar"),
        (_scalar, "numpy._core.multiarray.scalar"),
        (_Kind, "numpy.dtype"),
    ]
    return torch.serialization.safe_globals(stand_ins)  # type: ignore[arg-type]  # pairs are documented, not annotated
