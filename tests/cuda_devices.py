"""CUDA devices for the tests: a GPU where there is one, else the emulator ptxrun where TIPL_PTXRUN names its folder.

The emulator replaces the CUDA runtime, runs the kernels' PTX on the CPU, and reports what is out of bounds, never
written, racing or not synchronised. It needs a tipl that was built with TIPL_CUDA_SHARED=ON.
"""

import ctypes
import os
from typing import Any

import numpy as np
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

needs_emulator = pytest.mark.skipif(emulator is None, reason="TIPL_PTXRUN does not name the folder of the emulator")


class Foreign:
    """An array of another library on a device, which notes for which stream it is asked."""

    def __init__(self, array: Any, **changes: Any) -> None:
        self.array, self.changes, self.streams = array, changes, []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.changes.get("device", self.array.__dlpack_device__())

    def __dlpack__(self, stream: int | None = None) -> Any:
        self.streams.append(stream)
        capsule = self.array.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        tensor = Tensor.from_address(pointer(capsule, b"dltensor"))
        if "type" in self.changes:
            tensor.code, tensor.bits, tensor.lanes = self.changes["type"]
        if "strides" in self.changes:
            self.strides = (ctypes.c_int64 * tensor.ndim)(*self.changes["strides"])
            tensor.strides = ctypes.addressof(self.strides)
        return capsule


class Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


def on_device(x: np.ndarray) -> Any:
    from tipl.device import cuda_engine

    return cuda_engine().DeviceArray.from_numpy(x)
