"""How many threads torch computes with."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """Let torch's operations run on `num_threads` threads for a while.

    With one, results have the same bits on any machine of a kind, and small operations do not wait for threads that
    another process keeps from running.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
