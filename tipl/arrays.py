"""Arrays of other libraries, without a copy: what comes in as an argument, and what goes out as its like.

Whatever is in the host's memory is a NumPy array to the engine (torch's CPU tensors by DLPack); arrays on a device it
reads by DLPack itself (`csrc/bind_device_array.h`).
"""

import dataclasses
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_CPU = 1  # DLPack's device types
_CUDA_HOST = 3


@dataclasses.dataclass(frozen=True)
class Kind:
    """Whose array came in, and where it was: a result is of the same kind."""

    library: Literal["numpy", "torch", "another"] = "numpy"
    on_host: bool = True


def as_input(name: str, array: Any, cuda_index: int | None) -> tuple[Kind, Any]:
    """Return the kind of an array, and the array as the engine of this device takes it.

    Raises ValueError where the array is on a device and the engine on the CPU, or where its library does not give it
    out.
    """
    if isinstance(array, np.ndarray) or not hasattr(array, "__dlpack_device__"):
        return Kind(), array  # whatever else it is, the engine says what it should be
    library: Literal["torch", "another"] = "torch" if type(array).__module__.split(".")[0] == "torch" else "another"
    try:
        if on_a_device(array):
            if cuda_index is None:
                raise ValueError(f"{name} must be in the host's memory, as the engine is on the CPU")
            return Kind(library, on_host=False), array
        return Kind(library), np.from_dlpack(array)
    except (BufferError, RuntimeError) as error:  # a tensor that requires grad, or is sparse
        raise ValueError(f"{name}: {error}") from None


def on_a_device(array: Any) -> bool:
    """Return whether an array is in a device's memory, by DLPack."""
    if isinstance(array, np.ndarray) or not hasattr(array, "__dlpack_device__"):
        return False
    return int(array.__dlpack_device__()[0]) not in (_CPU, _CUDA_HOST)


def as_host_integers(name: str, array: Any) -> NDArray[np.int64]:
    """Return an integer array of any library as int64 in the host's memory. Raises TypeError for other numbers."""
    numbers = np.asarray(array.cpu() if hasattr(array, "cpu") else array)
    if not np.issubdtype(numbers.dtype, np.integer):
        raise TypeError(f"{name} must be integers, got {numbers.dtype}")
    return np.ascontiguousarray(numbers, dtype=np.int64)


def as_result(kind: Kind, array: Any) -> Any:
    """Return what the engine gave, a NumPy array or one on a device, as the kind that came in.

    Nothing is copied, unless the engine is on a device and the array came from the host. A device array of another
    library than torch stays as it is: it speaks DLPack.
    """
    if kind.on_host and not isinstance(array, np.ndarray):
        array = array.numpy()
    if kind.library == "torch":
        import torch
        from torch.utils.dlpack import from_dlpack

        return torch.from_numpy(array) if kind.on_host else from_dlpack(array)
    return array
