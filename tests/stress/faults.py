"""The fault injector, `fault.c`: built, loaded before libc by running this program anew, and armed in a child."""

import ctypes
import errno
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("fault.c")

KINDS = {
    "o": "open",
    "w": "write",
    "s": "sync",
    "c": "close",
    "n": "rename",
    "u": "remove",
    "m": "mkdir",
    "t": "truncate",
    "l": "link",
    "k": "lock",
    "i": "open to read",
    "r": "read",
    "d": "list",
}
"""Kinds of operations, as `fault.c` names them."""

CHANGES = "owscnumtlk"
"""Those that change something."""

MODES = {"once": 0, "from then on": 1, "short": 2, "kill": 3, "trace": 4}


@dataclass(frozen=True)
class Fault:
    """What happens at the `nth` operation of `kinds` on a path that contains `under`."""

    kinds: str
    under: str
    nth: int
    mode: str
    error: int = 0

    def __str__(self) -> str:
        names = "/".join(KINDS[kind] for kind in self.kinds)
        name = {"kill": "SIGKILL", "short": "short write"}.get(self.mode) or errno.errorcode.get(self.error, "none")
        return f"{name} at {names} {self.nth}" + (", and all after it" if self.mode == "from then on" else "")

    def arm(self, report: int) -> None:
        """Let it happen in this process; `report` is a file descriptor for what was hit."""
        _library().fault_arm(self.kinds.encode(), self.under.encode(), self.nth, self.error, MODES[self.mode], report)


def ensure_loaded(build: Path) -> None:
    """Run this program anew with the injector loaded, unless it is; it is built in the folder `build`."""
    library = build / "fault.so"
    if os.environ.get("TIPL_FAULT_LIBRARY") == str(library) and library.exists():
        return
    build_library(library)
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    preloaded = {"LD_PRELOAD": str(library), "TIPL_FAULT_LIBRARY": str(library)}
    os.execve(sys.executable, sys.orig_argv, {**os.environ, **one_thread, **preloaded})


def build_library(library: Path) -> None:
    """Compile `fault.c` to the shared library `library`."""
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    library.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(library), str(SOURCE), "-ldl"], check=True)


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ["TIPL_FAULT_LIBRARY"])
    arguments = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    library.fault_arm.argtypes, library.fault_arm.restype = arguments, None
    return library
