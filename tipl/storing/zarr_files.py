"""The files of a trajectory store: Zarr v3 documents and chunks, written whole or not at all, checked when read.

The files are valid Zarr of one narrow kind: regular chunks of little-endian numbers, no compression, the crc32c codec,
chunk keys like c.3.0. A group's attributes carry a checksum, because JSON has none; an array's document is known in
advance except for its number of rows. Damage raises RuntimeError, whose text names the file. A chunk from another trial
or store is intact in itself, so readers pass the checksum that its rows must have (`store_records.py`).

Why not zarr-python: appending to 48 trials took twice the CPU time although it does not flush, it read chunks of
256 KiB at a fifth of the speed, and its errors do not say which chunk is damaged. A test reads these files with it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from tipl.files.hub_errors import Unreachable
from tipl.files.locations import Location, exists, read_file, read_into, write_atomically

MAX_DOCUMENT_BYTES = 2**26
MAX_ROWS = 2**40


def write_group(folder: Location, attributes: dict[str, Any]) -> None:
    """Write the document of the Zarr group in `folder`."""
    _write_json(folder / "zarr.json", _group_document(attributes))


def read_group(folder: Location, owner: str) -> dict[str, Any]:
    """Return the attributes of the Zarr group in `folder`. A RuntimeError's text begins with `owner`."""
    path = folder / "zarr.json"
    document = _read_json(path, owner)
    attributes = document.get("attributes")
    if isinstance(attributes, dict):
        attributes = {name: value for name, value in attributes.items() if name != "crc32c"}
        if document == _group_document(attributes):
            return attributes
    raise RuntimeError(f"{owner}: {path} is damaged: its attributes fail their checksum")


@dataclass(frozen=True)
class ZarrArray:
    """The format of all trials' arrays of one name: their document, and how chunks are written and read.

    In the methods, `folder` is the folder of one such array, and the text of a RuntimeError begins with `owner`.
    """

    name: str
    data_type: str
    """Zarr's name for the dtype."""
    fill_value: str | int
    """As in JSON. A value that no real row contains, so that a row that was never written is recognised."""
    chunk_rows: int
    row_shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.data_type).newbyteorder("<")

    def write_document(self, folder: Location, num_rows: int) -> None:
        _write_json(folder / "zarr.json", self._document(num_rows))

    def check_document(self, folder: Location, owner: str, min_rows: int) -> int:
        """Return the number of rows in the document in `folder`.

        Raises RuntimeError unless the document describes this array with at least `min_rows` rows.
        """
        path = folder / "zarr.json"
        document = _read_json(path, owner)
        shape = document.get("shape")
        num_rows = shape[0] if isinstance(shape, list) and shape else None
        if type(num_rows) is not int or not min_rows <= num_rows <= MAX_ROWS:
            expected = f"{min_rows} rows or more of {list(self.row_shape)}"
            raise RuntimeError(f"{owner}: {path} is damaged: shape must be {expected}, got {shape!r:.80}")
        described = self._document(num_rows)
        for name in (*described, *document):
            wanted, found = described.get(name), document.get(name)
            if found != wanted:
                difference = f"{name} must be {wanted!r:.80}, got {found!r:.80}"
                raise RuntimeError(
                    f"{owner}: {path} is damaged: it does not describe {self.name} of this store: {difference}"
                )
        return num_rows

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, slice, slice]]:
        """Yield (chunk, slice of its rows, slice of [start, stop)) for each chunk with rows in [start, stop)."""
        for chunk in range(start // self.chunk_rows, -(-stop // self.chunk_rows)):
            base = chunk * self.chunk_rows
            first, end = max(start, base), min(stop, base + self.chunk_rows)
            yield chunk, slice(first - base, end - base), slice(first - start, end - start)

    def num_chunks(self, num_rows: int) -> int:
        """Return how many chunks hold the rows [0, num_rows)."""
        return -(-num_rows // self.chunk_rows)

    def empty_chunk(self) -> NDArray[Any]:
        return np.full((self.chunk_rows, *self.row_shape), float(self.fill_value), self.dtype)

    def write_chunk(self, folder: Location, chunk: int, rows: NDArray[Any]) -> None:
        """Write a whole chunk, (chunk_rows, *row_shape)."""
        write_atomically(folder / self.key(chunk), rows.tobytes() + crc32c(rows).to_bytes(4, "little"))

    def read_chunk(
        self,
        folder: Location,
        owner: str,
        chunk: int,
        out: NDArray[Any] | None = None,
        *,
        committed: tuple[int, int] | None = None,
    ) -> NDArray[Any]:
        """Return a whole chunk, (chunk_rows, *row_shape), in `out` (contiguous) if given.

        `committed`, if known, is the number of committed rows and their crc32c; an intact chunk that is not the one
        committed then raises RuntimeError too.
        """
        rows: Any = np.empty((self.chunk_rows, *self.row_shape), self.dtype) if out is None else out
        checksum = bytearray(5)  # one byte more than the checksum has, to detect a file that is too long
        path = f"{folder}/{self.key(chunk)}"
        try:
            num_bytes = read_into(folder, self.key(chunk), (rows, checksum))
        except FileNotFoundError:
            raise RuntimeError(f"{self._place(owner, chunk)}: {path} is missing") from None
        if num_bytes != rows.nbytes + 4:
            raise RuntimeError(
                f"{self._place(owner, chunk)}: {path} has {num_bytes} bytes instead of {rows.nbytes + 4}"
            )
        found = crc32c(rows)
        if found != int.from_bytes(checksum[:4], "little"):
            raise RuntimeError(f"{self._place(owner, chunk)}: {path} fails its checksum")
        if committed is not None:
            num_rows, expected = committed
            if (found if num_rows == self.chunk_rows else crc32c(rows[:num_rows])) != expected:
                raise RuntimeError(
                    f"{self._place(owner, chunk)}: {path} is not the chunk that the commit record names: damaged, "
                    "older, or of another place, trial or run"
                )
        return rows  # type: ignore[no-any-return]

    def has_chunk(self, folder: Location, chunk: int) -> bool:
        """Return whether the chunk's file exists, whatever its contents."""
        return exists(folder / self.key(chunk))

    def _place(self, owner: str, chunk: int) -> str:
        return f"{owner}: {self.name} rows {chunk * self.chunk_rows}:{(chunk + 1) * self.chunk_rows}"

    def holds_fill(self, rows: NDArray[Any]) -> bool:
        """Return whether any number in `rows` is the fill value."""
        if self.fill_value == "NaN":
            return bool(np.isnan(rows.min()))  # the minimum is NaN if any number is; isnan(rows) would take memory
        return bool(np.any(rows == float(self.fill_value)))

    def key(self, chunk: int) -> str:
        """Return the name of a chunk's file."""
        return ".".join(["c", str(chunk), *("0" for _ in self.row_shape)])

    def _document(self, num_rows: int) -> dict[str, Any]:
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [num_rows, *self.row_shape],
            "data_type": self.data_type,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.chunk_rows, *self.row_shape]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": self.fill_value,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "attributes": {},
            "dimension_names": ["checkpoint", "weight"][: 1 + len(self.row_shape)],
        }


def _group_document(attributes: dict[str, Any]) -> dict[str, Any]:
    checksum = google_crc32c.value(json.dumps(attributes, sort_keys=True, separators=(",", ":")).encode())
    return {"zarr_format": 3, "node_type": "group", "attributes": {**attributes, "crc32c": checksum}}


def _write_json(path: Location, document: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def crc32c(rows: NDArray[Any], before: int = 0) -> int:
    """Return the crc32c of contiguous rows; given `before`, that of earlier rows, the crc32c of both together."""
    data = rows.reshape(-1).view(np.uint8)
    data.flags.writeable = False  # google_crc32c requires it
    return int(google_crc32c.extend(before, data))


def _read_json(path: Location, owner: str) -> dict[str, Any]:
    try:
        document = json.loads(read_file(path, max_bytes=MAX_DOCUMENT_BYTES))
    except FileNotFoundError:
        raise RuntimeError(f"{owner}: {path} is missing") from None
    except OSError as error:
        if error.errno is not None or isinstance(error, Unreachable):  # not from `read_file` itself
            raise
        raise RuntimeError(f"{owner}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"{owner}: {path} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise RuntimeError(f"{owner}: {path} is damaged: it holds no JSON object")
    return document
