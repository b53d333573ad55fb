"""Checks of the parameters of this package's estimators."""

import operator
from typing import Any

import numpy as np

from tipl import _core


def checked_threads(num_threads: int | None) -> int:
    """Return the number of threads, all cores of this process for None. Raises TypeError or ValueError."""
    threads = _core.available_cpus() if num_threads is None else checked_integer("num_threads", num_threads)
    if not 1 <= threads <= 1024:
        raise ValueError(f"num_threads must lie in [1, 1024], got {threads}")
    return threads


def checked_integer(name: str, value: Any) -> int:
    """Return `value` as an int. Raises TypeError where it is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def same_value(a: Any, b: Any) -> bool:
    """Return whether two values of a parameter are equal: arrays by what they hold."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return a is b or (a is not None and b is not None and np.array_equal(a, b))
    return bool(a == b)
