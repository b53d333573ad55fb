"""Flax's parameters in msgpack, and arrays by name in .npz: read without JAX, and written back as the same kind.

A parameter's name is its path joined by dots, Dense_0.kernel, without the outer "params" that all names may share. The
kernels of Dense layers are (in, out) there; here they are views (out, in), as in torch.nn.Linear. Optimiser states are
left out. What a file can make this allocate is limited by its own size and by the number of its entries.

    flax.serialization.to_bytes(params)                 {"params": {"Dense_0": {"kernel": ..., "bias": ...}}}
    flax.serialization.to_bytes(train_state)            {"step": ..., "params": {...}, "opt_state": {...}}
    flax.serialization.to_bytes([actor, critic, ...])   {"0": {...}, "1": {...}}, as CleanRL's DDPG and TD3 for JAX
    numpy.savez(path, **flat)                           "params/Dense_0/kernel" -> array
"""

import io
import math
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tipl.storing.not_readable import NotReadableError
from tipl.storing.tensor_checks import shown

_ARRAY = 1  # flax.serialization's code for an array; its other codes stay as they are
_MAX_ENTRIES = 2**18  # of all dicts and lists of a file together
_MAX_LENGTH = 2**12  # of one dict or list
_DTYPES = {str(it).removeprefix("torch."): it for it in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_DTYPES |= {str(it).removeprefix("torch."): it for it in (torch.int8, torch.int16, torch.int32, torch.int64)}
_DTYPES |= {str(it).removeprefix("torch."): it for it in (torch.uint8, torch.bool)}
_CHUNKED = "__msgpack_chunked_array__"
_BESIDE = "opt_state."
_PARAMS = "params."


def is_flax(data: bytes) -> bool:
    """Return whether the bytes can be a dict in msgpack; 0x80, an empty one, begins a pickle."""
    return 0x81 <= data[0] <= 0x8F or data[0] in (0xDE, 0xDF) if data else False


def read_flax(data: bytes) -> tuple[dict[str, Tensor], str, Any]:
    """Return the state in a file of Flax's, any doubt about it as in `StateDict`, and the file's tree for `flax_bytes`.

    Raises NotReadableError where it holds anything else, or the package msgpack is not installed.
    """
    entries = 0

    def counted(items: Any) -> Any:
        nonlocal entries
        entries += len(items) + 1
        if entries > _MAX_ENTRIES:
            raise NotReadableError(f"holds more than {_MAX_ENTRIES:,} entries, and was not read")
        if isinstance(items, dict) and _CHUNKED in items:
            raise NotReadableError("holds an array in chunks, as Flax writes those of a gigabyte, which is not read")
        return items

    tree = _msgpack().unpackb(
        data,
        ext_hook=_tensor,
        object_hook=counted,
        list_hook=counted,
        strict_map_key=False,
        max_array_len=_MAX_LENGTH,
        max_map_len=_MAX_LENGTH,
    )
    named = [(name.removeprefix("."), it) for name, it in _leaves(tree, "")]
    return *_state(named), tree


def flax_bytes(tree: Any) -> bytes:
    """Return the bytes of a tree that `read_flax` returned, with its tensors as they are now."""
    written: bytes = _msgpack().packb(tree, default=_packed, strict_types=True)
    return written


def read_npz(archive: zipfile.ZipFile) -> tuple[dict[str, Tensor], str, dict[str, Tensor]]:
    """Return the state in a .npz file, any doubt about it, and its arrays by their own names for `npz_bytes`.

    Raises NotReadableError where it holds anything but arrays of plain numbers.
    """
    arrays = {
        name.removesuffix(".npy"): torch.from_numpy(_npy(archive.read(name), name)) for name in archive.namelist()
    }
    return *_state([(name.replace("/", "."), it) for name, it in arrays.items()]), arrays


def npz_bytes(arrays: Mapping[str, Tensor]) -> bytes:
    """Return the bytes of a .npz file with these arrays, as numpy.savez writes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, tensor in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(tensor.numpy()), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
    return file.getvalue()


def _state(named: list[tuple[str, Tensor]]) -> tuple[dict[str, Tensor], str]:
    """Return the tensors by name as torch would have them, and any doubt about which part is the policy's."""
    named = [(name, tensor) for name, tensor in named if name != "step" and not name.startswith(_BESIDE)]
    while named and all(name.startswith(_PARAMS) for name, _ in named):
        named = [(name.removeprefix(_PARAMS), tensor) for name, tensor in named]
    state = {name: it.T if name.endswith("kernel") and it.ndim == 2 else it for name, it in named}
    if not state:
        raise NotReadableError("holds no arrays with names")
    if len(state) < len(named):
        raise NotReadableError("holds two arrays under one name, if its parts are joined by dots")
    parts = dict.fromkeys(name.partition(".")[0] for name in state)
    if len(parts) > 1 and any(part.isdigit() or part == "params" for part in parts):
        return state, f"it holds {', '.join(map(shown, list(parts)[:8]))}, and it is not clear which is the policy's"
    return state, ""


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for each tensor in a tree of dicts and lists."""
    if isinstance(tree, Tensor):
        yield name, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, part in items:
        yield from _leaves(part, f"{name}.{key}")


def _tensor(code: int, data: bytes) -> Any:
    """Return the tensor that an extension of msgpack's holds, or the extension where it is none of Flax's arrays."""
    if code != _ARRAY:
        return _msgpack().ExtType(code, data)
    content = _msgpack().unpackb(data, max_array_len=32, max_map_len=0)
    if not (isinstance(content, list) and len(content) == 3 and isinstance(content[0], list)):
        raise NotReadableError("is damaged: an array of it has no shape, type and content")
    shape, name, numbers = content
    dtype = _DTYPES.get(str(name))
    if dtype is None or not isinstance(numbers, bytes):
        raise NotReadableError(f"holds an array of {shown(name)}, which is not read")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise NotReadableError("is damaged: an array's shape is none")
    if math.prod(shape) * dtype.itemsize != len(numbers):
        raise NotReadableError(f"is damaged: an array of shape {tuple(shape)} of {name} has {len(numbers)} bytes")
    flat = torch.frombuffer(bytearray(numbers), dtype=dtype) if numbers else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


def _packed(value: Any) -> Any:
    """Return what msgpack writes in the place of a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"a {type(value).__name__} cannot be written")
    numbers = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    name = str(value.dtype).removeprefix("torch.")
    return _msgpack().ExtType(_ARRAY, _msgpack().packb((list(value.shape), name, numbers), use_bin_type=True))


def _npy(data: bytes, name: str) -> NDArray[Any]:
    """Return the array in a .npy file. numpy.load would allocate whatever its header says."""
    file = io.BytesIO(data)
    if not data.startswith(b"\x93NUMPY"):
        raise NotReadableError(f"is damaged: its member {shown(name)} is no array of NumPy's")
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, in_columns, dtype = read(file)
    if dtype.kind not in "fiub":
        raise NotReadableError(f"holds {shown(name)}, an array of {dtype}: only arrays of plain numbers are read")
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise NotReadableError(f"is damaged: its array {shown(name)} has another size than its shape {shape}")
    flat = np.frombuffer(data, dtype, offset=file.tell())
    return flat.astype(dtype.newbyteorder("=")).reshape(shape, order="F" if in_columns else "C")


def _msgpack() -> Any:
    try:
        import msgpack
    except ModuleNotFoundError as error:
        raise NotReadableError("is of Flax: to read it, pip install 'tipl[flax]'") from error
    return msgpack
