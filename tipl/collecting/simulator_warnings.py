"""MuJoCo's warnings as Python's, each kind once. MuJoCo itself would write them into a MUJOCO_LOG.TXT in the current
folder, and to stderr.
"""

import contextlib
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator

import mujoco

_lock = threading.Lock()
_depth = 0  # blocks that are running, on all threads: MuJoCo has one handler for the whole process
_previous: Callable[[str], None] | None = None
_said: deque[str] = deque(maxlen=1000)


@contextlib.contextmanager
def simulator_warnings() -> Iterator[None]:
    """Give what MuJoCo warns of in this block, on any thread, to the handler that was set before, else to Python.

    That a model's file uses a deprecated attribute is not said: several of Gymnasium's do, which no user can change.
    """
    global _depth, _previous
    with _lock:
        if _depth == 0:
            _previous = mujoco.get_mju_user_warning()
            # No function of Python's: where it raised, as upon Ctrl-C, MuJoCo would abort the process.
            mujoco.set_mju_user_warning(_said.append)
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                mujoco.set_mju_user_warning(_previous)
        if _said:
            _pass_on()


def _pass_on() -> None:
    with contextlib.suppress(IndexError):  # several threads take from it
        while True:
            text = _said.popleft()
            if "is deprecated" in text:
                continue
            if _previous is not None:
                _previous(text)
            else:
                what, _, _ = text.partition(" Time = ")  # so that Python takes all of a kind for one
                warnings.warn(f"MuJoCo: {what}", RuntimeWarning, stacklevel=1)
