"""NumPy's numbers in a torch file, such as the mean reward that rl_games saves, made without calling NumPy by name.

torch.load(weights_only=True) refuses them unless it is told what their names stand for. Here the names stand for
functions that make one plain number and nothing else. torch itself knows `_codecs.encode`, with which pickles write
bytes; what a file may do with it is limited by the length of its texts (`MAX_TEXT`).
"""

import contextlib
from typing import Any

import numpy as np
import torch

NAMES = frozenset({"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "_codecs.encode"})
"""What pickles of NumPy's numbers use, beside what those of tensors do."""
MAX_TEXT = 255
"""Longest text in a pickle that uses `_codecs.encode`: some codecs take seconds for long ones."""

_KINDS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


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
