"""Single files that contain their own checksum: safetensors with metadata, and JSON documents.

Equal contents give equal bytes, which safetensors alone does not ensure: it writes metadata in random order.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from tipl.files.locations import Location, read_file, write_atomically

Arrays = dict[str, NDArray[Any]]


class UncheckedWarning(UserWarning):
    """A file or folder has no checksum, because an older tipl wrote it: damage in it cannot be found."""

    def __init__(self, path: Location) -> None:
        super().__init__(f"{path} has no checksum (an older tipl wrote it): damage in it cannot be found")


def save_arrays(path: Location, arrays: Mapping[str, NDArray[Any]], record: Mapping[str, Any] | None = None) -> None:
    """Write arrays and a record of plain JSON as one safetensors file."""
    text = json.dumps(record or {}, sort_keys=True)
    metadata = {"tipl": text, "sha256": _digest(text, arrays)}
    write_atomically(path, sorted_metadata(safetensors.numpy.save(dict(arrays), metadata)))


def load_arrays(path: Location, owner: str) -> tuple[Arrays, dict[str, Any]]:
    """Return the arrays and the record of a file that `save_arrays` wrote; error texts begin with `owner`.

    A file without a checksum, written by an older tipl, is read with a warning. Raises FileNotFoundError; RuntimeError
    where the file is damaged.
    """
    try:
        arrays, metadata = parse_safetensors(read_file(path, max_bytes=None))
        if "sha256" not in metadata:
            warnings.warn(UncheckedWarning(path), stacklevel=1)
        elif metadata["sha256"] != _digest(metadata["tipl"], arrays):
            raise ValueError("it fails its checksum")
        record = json.loads(metadata["tipl"]) if "tipl" in metadata else metadata
        if not isinstance(record, dict):
            raise ValueError("its record must be a JSON object")
    except (LookupError, ValueError, RecursionError) as error:
        raise RuntimeError(f"{owner}: {path} is damaged: {error}") from error
    return arrays, record


def parse_safetensors(data: bytes) -> tuple[Arrays, dict[str, str]]:
    """Return arrays and metadata from the bytes of a safetensors file. Raises ValueError where they are not one."""
    try:
        arrays = safetensors.numpy.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (safetensors.SafetensorError, LookupError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from error
    return arrays, dict(metadata)


def sorted_metadata(data: bytes) -> bytes:
    """Return the bytes of a safetensors file with its metadata sorted, so that equal contents give equal bytes."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(data)[8 + length :]])


def save_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum as the last entry."""
    write_atomically(path, (json.dumps({**document, "sha256": json_digest(document)}, indent=1) + "\n").encode())


def load_json(path: Path, owner: str) -> dict[str, Any]:
    """Return the object that `save_json` wrote, without its checksum; error texts begin with `owner`.

    A file without a checksum, written by an older tipl, is read with a warning. Raises FileNotFoundError; RuntimeError
    where it is damaged.
    """
    try:
        document = json.loads(read_file(path))
        if not isinstance(document, dict):
            raise ValueError("it must hold a JSON object")
        if "sha256" not in document:
            warnings.warn(UncheckedWarning(path), stacklevel=1)
        elif document.pop("sha256") != json_digest(document):
            raise ValueError("it fails its checksum")
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"{owner}: {path} is damaged: {error}") from error
    return document


def _digest(text: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def json_digest(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain JSON; the order of its entries does not matter."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
