"""Where the native engine computes: on the CPU, or on a CUDA device.

`tipl._core`, the engine on the CPU, is in every wheel; `tipl._cuda` in those that were built where nvcc is. It is
imported when a device is first asked for, and needs NVIDIA's driver then.
"""

import dataclasses
import importlib
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Device:
    """A CUDA device."""

    index: int
    name: str
    capability: tuple[int, int]
    """Compute capability, (major, minor)."""
    num_sms: int
    shared_bytes: int
    """Shared memory that one block can use."""
    memory_bytes: int

    def __str__(self) -> str:
        major, minor = self.capability
        return (
            f"cuda:{self.index}: {self.name}, sm_{major}{minor}, {self.num_sms} SMs, {self.memory_bytes / 1e9:.0f} GB"
        )


def devices() -> list[Device]:
    """Return the CUDA devices that the engine can use: none without a driver, or where tipl was built without CUDA."""
    try:
        found = cuda_engine().devices()
    except RuntimeError:
        return []
    return [Device(index, name, (major, minor), *rest) for index, name, major, minor, *rest in found]


def cuda_engine() -> Any:
    """Return the module tipl._cuda. Raises RuntimeError where this tipl has none, or it cannot be loaded."""
    try:
        return importlib.import_module("tipl._cuda")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        reason = "was built without CUDA (nvcc >= 12.4 makes it)" if missing else f"cannot load its engine: {error}"
        raise RuntimeError(f"device: this tipl {reason}") from None


def cuda_index(where: str, device: str) -> int | None:
    """Return the index of a CUDA device from "cuda" or "cuda:1", and None for "cpu".

    Raises ValueError for another name, RuntimeError where there is no such device.
    """
    if device == "cpu":
        return None
    match = re.fullmatch(r"cuda(?::(\d{1,4}))?", device) if isinstance(device, str) else None
    if match is None:
        raise ValueError(f"{where}: device must be 'cpu', 'cuda', 'cuda:0', 'cuda:1' ..., got {device!r}")
    index = int(match[1] or 0)
    engine = cuda_engine()
    count = len(engine.devices())
    if index >= count:
        raise RuntimeError(f"{where}: device {device} is not there: this process sees {count} CUDA devices")
    return index
