"""What training holds, as JSON with arrays beside it, and back: trees of plain values, arrays and tensors. No pickle.

None, bool, int, float, str and lists stand for themselves. Everything else is an object with an entry that names it:

    {"tuple": [...]}   {"deque": [...], "maxlen": 100}   {"dict": [[key, value], ...]}
    {"array": "3"}     {"scalar": "4"}, a NumPy scalar   {"tensor": "5", "dtype": "bfloat16"}
    {"texts": "6", "dtype": "<U2", "shape": [3]}, an array of texts, kept as bytes; {"text": ...}, a NumPy text

"3" is the name of the array among those beside the JSON. Reading makes nothing but these types.
"""

import random
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tipl.files.sealed import Arrays

_PLAIN = (type(None), bool, int, float, str)
_DTYPES = {"bool"} | {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
_DTYPES |= {"float16", "float32", "float64"}
_TEXTS = "SU"  # kinds of dtype
_KINDS = ("tuple", "deque", "dict", "array", "scalar", "texts", "text", "tensor")
_VIEWED = {1: torch.uint8, 2: torch.int16}
"""Bytes of a dtype that NumPy lacks, such as bfloat16 or float8, and the dtype as which its bits are kept."""


def is_tree(value: Any) -> bool:
    """Return whether `encode` takes the value."""
    kind = type(value)
    if kind in _PLAIN:
        return True
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.name in _DTYPES or value.dtype.kind in _TEXTS
    if isinstance(value, Tensor):
        return str(value.dtype).removeprefix("torch.") in _DTYPES or value.element_size() in _VIEWED
    if kind in (list, tuple, deque):
        return all(map(is_tree, value))
    return kind in (dict, OrderedDict) and all(type(key) in _PLAIN and is_tree(it) for key, it in value.items())


def encode(value: Any, arrays: Arrays, where: str) -> Any:
    """Return the value as JSON, and add its arrays to `arrays`, without copying those that lie on the CPU in order.

    Raises TypeError where it holds anything else; the message begins with `where`, followed by the place in the tree.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, (np.ndarray, np.generic, Tensor)) and is_tree(value):
        return _encode_array(value, arrays)
    if kind is list:
        return [encode(it, arrays, f"{where}[{i}]") for i, it in enumerate(value)]
    if kind in (tuple, deque):
        entries = [encode(it, arrays, f"{where}[{i}]") for i, it in enumerate(value)]
        return {"tuple": entries} if kind is tuple else {"deque": entries, "maxlen": value.maxlen}
    if kind in (dict, OrderedDict) and all(type(key) in _PLAIN for key in value):
        return {"dict": [[key, encode(it, arrays, f"{where}[{key!r}]")] for key, it in value.items()]}
    raise TypeError(f"{where} must be a tensor, an array, a plain value or a tree of these, got {kind.__name__}")


def _encode_array(value: Any, arrays: Arrays) -> dict[str, Any]:
    name = str(len(arrays))
    if not isinstance(value, Tensor):
        arrays[name] = array = _in_order(np.asarray(value))
        if array.dtype.kind in _TEXTS:
            arrays[name] = np.frombuffer(array.tobytes(), np.uint8)
            kind = "texts" if isinstance(value, np.ndarray) else "text"
            return {kind: name, "dtype": array.dtype.str, "shape": list(array.shape)}
        return {"array" if isinstance(value, np.ndarray) else "scalar": name}
    dtype = str(value.dtype).removeprefix("torch.")
    cpu = value.detach().cpu()
    arrays[name] = _in_order((cpu if dtype in _DTYPES else cpu.view(_VIEWED[cpu.element_size()])).numpy())
    return {"tensor": name, "dtype": dtype}


def _in_order(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array C-contiguous and in the machine's byte order, which safetensors takes for granted."""
    return np.asarray(array, array.dtype.newbyteorder("="), order="C")


def decode(node: Any, arrays: Arrays) -> Any:
    """Return what `encode` made into `node` and `arrays`. Raises LookupError, TypeError or ValueError for others."""
    if isinstance(node, list):
        return [decode(it, arrays) for it in node]
    if not isinstance(node, dict):
        return node
    (kind,) = (kind for kind in _KINDS if kind in node)
    content = node[kind]
    if kind == "tuple":
        return tuple(decode(it, arrays) for it in content)
    if kind == "deque":
        return deque((decode(it, arrays) for it in content), maxlen=node["maxlen"])
    if kind == "dict":
        return {key: decode(it, arrays) for key, it in content}
    array = arrays[content]
    if kind in ("texts", "text"):
        texts = np.frombuffer(array.tobytes(), np.dtype(node["dtype"])).reshape(node["shape"])
        return texts.copy() if kind == "texts" else texts[()]
    if kind == "scalar":
        return array[()]
    if kind == "array":
        return array.copy()  # those of a file cannot be written
    dtype = getattr(torch, node["dtype"])
    tensor = torch.from_numpy(array.copy())
    return tensor if node["dtype"] in _DTYPES else tensor.view(dtype)


RANDOM_NUMBERS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)
"""Generators of random numbers whose states are kept."""


def random_state(generator: Any) -> Any:
    """Return the state of one of RANDOM_NUMBERS, as a tree."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    if isinstance(generator, random.Random):
        return _with_words(generator.getstate())
    return generator.get_state()


def set_random_state(generator: Any, state: Any) -> None:
    """Put back what `random_state` returned. Raises ValueError or TypeError where it is of another generator."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(_without_words(state))
    else:
        generator.set_state(state)


def global_random_states() -> dict[str, Any]:
    """Return the states of the generators that Python, NumPy and torch share in a process, as a tree."""
    states: dict[str, Any] = {
        "python": _with_words(random.getstate()),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_global_random_states(states: dict[str, Any]) -> None:
    """Put back what `global_random_states` returned."""
    random.setstate(_without_words(states["python"]))
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])


def _with_words(state: tuple[int, tuple[int, ...], float | None]) -> dict[str, Any]:
    """Return the state of Python's generator with its 625 words as an array."""
    version, words, gauss = state
    return {"version": version, "words": np.array(words, np.uint32), "gauss": gauss}


def _without_words(state: dict[str, Any]) -> tuple[int, tuple[int, ...], float | None]:
    return state["version"], tuple(map(int, state["words"])), state["gauss"]
