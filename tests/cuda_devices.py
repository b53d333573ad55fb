"""CUDA devices for the tests: a GPU where there is one, else the emulator ptxrun where TIPL_PTXRUN names its folder.

The emulator replaces the CUDA runtime, runs the kernels' PTX on the CPU, and reports what is out of bounds, never
written, racing or not synchronised. It needs a tipl that was built with TIPL_CUDA_SHARED=ON.
"""

import ctypes
import os

import pytest


def load_emulator() -> ctypes.CDLL | None:
    """Load the emulator in the place of the CUDA runtime, here and in all processes that are started from here."""
    folder = os.environ.get("TIPL_PTXRUN")
    if not folder:
        return None
    paths = [f"{folder}/cudart", *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
    # A grid as small as an old card's: every block is a thread's work here.
    os.environ.setdefault("PTXRUN_SMS", "24")
    os.environ.setdefault("PTXRUN_MAX_INSTRUCTIONS", "1e10")
    library = ctypes.CDLL(f"{folder}/cudart/libcudart.so.13", mode=ctypes.RTLD_GLOBAL)
    library.ptxrunLastMessage.restype = ctypes.c_char_p
    library.ptxrunLiveBytes.restype = ctypes.c_size_t
    library.ptxrunCalls.restype = ctypes.c_long
    return library


emulator = load_emulator()


def why_not() -> str | None:
    """The reason why no test can use a device, or None."""
    from tipl import device

    try:
        device.cuda_index("tests", "cuda")
    except RuntimeError as error:
        return str(error)
    return None


needs_cuda = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
CUDA = pytest.param("cuda", marks=needs_cuda)
