"""Code in interpreters of its own, and work in this one that a signal stops."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tipl import _core

LANES = {"baseline": 4, "avx2": 8, "avx512": 16, "avx512bf16": 16}
ISAS = tuple(LANES)

# Imports the engine alone: the package would import torch, and take seconds.
IMPORT_CORE = f"""
import importlib.util, os
spec = importlib.util.spec_from_file_location("_core", {_core.__file__!r})
_core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_core)
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter that finds the same modules, warnings being errors there too."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def run_on(isa: str, code: str) -> None:
    """Run `code`, which must succeed, on this instruction set; skip the test where the CPU lacks it."""
    done = run_python(code, TIPL_ISA=isa)
    if f"this CPU lacks {isa}" in done.stderr:
        pytest.skip(f"this CPU lacks {isa}")
    assert done.returncode == 0, done.stderr


class Stopped(Exception):
    pass


def stopped(work: Callable[[], Any], seconds: float) -> None:
    """Raise Stopped in the middle of the work, as Ctrl-C would raise KeyboardInterrupt."""

    def stop(*_: Any) -> None:
        raise Stopped

    previous = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with pytest.raises(Stopped):
            work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
