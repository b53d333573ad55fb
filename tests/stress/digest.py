"""One short text for everything that a loaded object holds."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch


def digest(value: Any) -> str:
    """Return a digest of arrays, modules, dataclasses, mappings and sequences of them, and plain values."""
    state = hashlib.blake2b(digest_size=16)
    for part in _parts(value):
        state.update(part)
    return state.hexdigest()


def _parts(value: Any) -> Iterable[bytes]:
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, torch.nn.Module):
        public = {name: it for name, it in vars(value).items() if not name.startswith("_") and name != "training"}
        yield from _parts([type(value).__name__, dict(value.state_dict()), public])
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value).__name__.encode()
        yield from _parts({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        for key in value:
            yield f"{key!r}:".encode()
            yield from _parts(value[key])
        yield b"}"
    elif isinstance(value, list | tuple):
        for it in value:
            yield from _parts(it)
            yield b","
        yield b"]"
    elif isinstance(value, bytes):
        yield value
    else:
        yield repr(value).encode()
