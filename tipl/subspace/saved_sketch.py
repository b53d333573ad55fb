"""Files of sketches: what a `StreamingSVD` has seen as one safetensors file with a checksum."""

import json
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from tipl.files.locations import write_atomically
from tipl.files.sealed import sorted_metadata

Restored = TypeVar("Restored")

_FORMAT, _VERSION = "tipl.StreamingSVD", "1"


def save_sketch(path: Path, arrays: dict[str, NDArray[Any]], parameters: Mapping[str, Any]) -> None:
    """Write the arrays of a sketch, and the parameters it was built with, to a file: whole or not at all."""
    stored = {name: value for name, value in parameters.items() if name not in ("origin", "num_threads", "device")}
    stored["own_origin"] = parameters["origin"] is not None  # which `arrays` holds
    params = json.dumps(stored, default=operator.index)  # integers may be NumPy's
    metadata = {"format": _FORMAT, "version": _VERSION, "params": params, "crc32c": checksum(params, arrays)}
    write_atomically(path, sorted_metadata(safetensors.numpy.save(arrays, metadata)))


def load_sketch(path: Path | str, restore: Callable[[dict[str, Any], dict[str, NDArray[Any]]], Restored]) -> Restored:
    """Return what `restore` makes of the parameters and the arrays in a file that `save_sketch` wrote.

    Raises RuntimeError where the file is damaged, of another version or another kind, or where `restore` refuses it.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in list(file.keys())}
        if metadata.get("format") != _FORMAT:
            raise RuntimeError(f"load: {path} holds no StreamingSVD")
        if metadata.get("version") != _VERSION:
            raise RuntimeError(f"load: {path} has version {metadata.get('version')}, this tipl reads {_VERSION}")
        if metadata["crc32c"] != checksum(metadata["params"], arrays):
            raise ValueError("it fails its checksum")
        parameters = json.loads(metadata["params"])
        parameters["origin"] = arrays["origin"] if parameters.pop("own_origin") else None
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("its values must be finite")
        if arrays["squares"][0] < 0 or arrays["gram"][-1, -1] != len(arrays["range_rows"]):
            raise ValueError("its sums are not those of its rows")
        return restore(parameters, arrays)
    except (safetensors.SafetensorError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RuntimeError(f"load: {path} is damaged: {error}") from error


def checksum(params: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    """Return the CRC-32C of the parameters, as they are stored, and of the arrays in the order of their names."""
    value = google_crc32c.value(params.encode())
    for name in sorted(arrays):
        value = google_crc32c.extend(value, np.ascontiguousarray(arrays[name]).tobytes())
    return f"{value:08x}"
