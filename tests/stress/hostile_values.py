"""Hostile content: JSON documents, safetensors files and special files that no tipl wrote, by the name of a kind."""

import copy
import json
import os
import random
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

VALUES: dict[str, Any] = {
    "null": None,
    "text": "text",
    "empty text": "",
    "list": [],
    "object": {},
    "true": True,
    "-1": -1,
    "0": 0,
    "0.5": 0.5,
    "10^9": 10**9,
    "2^62": 2**62,
    "10^30": 10**30,
    "1e308": 1e308,
    "Infinity": float("inf"),
    "NaN": float("nan"),
    "long text": "x" * 10**6,
    "escapes": "\x1b[2J\x07\r\nerror",
    "lone surrogate": "\ud800",
    "path": "../../../../etc/passwd",
    "long list": [0] * 10**5,
}
"""Values for a place of a JSON document."""


def _places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return where something stands in a document; of a list the first and last entries."""
    found = [path] if path else []
    if isinstance(document, dict):
        for key, value in document.items():
            found += _places(value, (*path, key))
    elif isinstance(document, list):
        for i in {0, len(document) - 1} if document else ():
            found += _places(document[i], (*path, i))
    return found


def with_value(document: Any, value: Any, rng: random.Random) -> Any:
    """Return the document with `value` at a random place."""
    document = copy.deepcopy(document)
    *path, last = rng.choice(_places(document))
    inner = document
    for key in path:
        inner = inner[key]
    inner[last] = value
    return document


def without_key(document: Any, rng: random.Random) -> Any:
    document = copy.deepcopy(document)
    *path, last = rng.choice([place for place in _places(document) if isinstance(place[-1], str)])
    inner = document
    for key in path:
        inner = inner[key]
    del inner[last]
    return document


Text = Callable[[str], bytes]
TEXTS: dict[str, Text] = {
    "nothing": lambda text: b"",
    "null alone": lambda text: b"null",
    "a list": lambda text: b"[]",
    "a number": lambda text: b"17",
    "UTF-16": lambda text: text.encode("utf-16"),
    "no UTF-8": lambda text: b"\xff\xfe\xfd" + text.encode(),
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "NUL bytes": lambda text: bytes(4096),
    "half": lambda text: text.encode()[: len(text) // 2],
    "more behind": lambda text: text.encode() + b"{}",
    "nested deep": lambda text: b"[" * 200_000,
    "number of 5000 digits": lambda text: b'{"format": ' + b"9" * 5000 + b"}",
    "unknown key": lambda text: text.encode().replace(b"{", b'{"unknown": 1, ', 1),
    "keys twice": lambda text: text.encode().replace(b"{", b'{"format": 1, "version": 2, "model": 3, "rows": 4, ', 1),
    "200 MB of spaces": lambda text: b" " * 200_000_000 + text.encode(),
}
"""Whole texts in place of a JSON document."""

Tensors = dict[str, np.ndarray[Any, Any]]


def _with_header(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _lie(change: Callable[[dict[str, Any], str], object]) -> Callable[[bytes], bytes]:
    """Return a maker that changes the header's entry of the first tensor."""

    def changed(whole: bytes) -> bytes:
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length])
        first = next(name for name in header if name != "__metadata__")
        change(header, first)
        return _with_header(header, whole[8 + length :])

    return changed


def _arrays(change: Callable[[Tensors], Tensors]) -> Callable[[bytes], bytes]:
    """Return a maker that changes the arrays."""

    def changed(whole: bytes) -> bytes:
        header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
        return safetensors.numpy.save(change(dict(safetensors.numpy.load(whole))), header.get("__metadata__"))

    return changed


def _filled(value: float) -> Callable[[bytes], bytes]:
    return _arrays(lambda arrays: {name: np.full_like(it, value) for name, it in arrays.items()})


TENSOR_FILES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda whole: b"",
    "seven bytes": lambda whole: whole[:7],
    "header of 2^63 bytes": lambda whole: _with_header(b"{}", b"", 2**63),
    "header of 2^40 bytes": lambda whole: _with_header(b"{}", b"", 2**40),
    "header beyond the end": lambda whole: _with_header(b"{}", b"", len(whole)),
    "header of 100 MB": lambda whole: _with_header(b"{" + b" " * 99_999_998 + b"}", b""),
    "header no JSON": lambda whole: _with_header(b"\xff" * 64, b""),
    "header nested deep": lambda whole: _with_header(b'{"a":' * 100_000, b""),
    "no tensors": lambda whole: _with_header({}, b""),
    "shape of 2^62": _lie(lambda header, name: header[name].update(shape=[2**62])),
    "shape that overflows": _lie(lambda header, name: header[name].update(shape=[2**33, 2**33])),
    "shape of 10^9 zeros": _lie(lambda header, name: header[name].update(shape=[10**9, 0], data_offsets=[0, 0])),
    "negative shape": _lie(lambda header, name: header[name].update(shape=[-1])),
    "shape of 64 dimensions": _lie(lambda header, name: header[name].update(shape=[1] * 64)),
    "offsets beyond the end": _lie(lambda header, name: header[name].update(data_offsets=[0, 2**50])),
    "offsets backwards": _lie(lambda header, name: header[name].update(data_offsets=[64, 0])),
    "offsets of 2^64": _lie(lambda header, name: header[name].update(data_offsets=[2**64 - 1, 2**64])),
    "unknown type": _lie(lambda header, name: header[name].update(dtype="F7")),
    "booleans": _lie(lambda header, name: header[name].update(dtype="BOOL")),
    "metadata of numbers": _lie(lambda header, name: header.update(__metadata__={"crc32c": 17})),
    "metadata nested": _lie(lambda header, name: header.update(__metadata__={"a": {"b": "c"}})),
    "name with escapes": _lie(lambda header, name: header.update({"\x1b[2J\nname": header.pop(name)})),
    "a tensor less": _arrays(lambda arrays: dict(list(arrays.items())[1:])),
    "a tensor more": _arrays(lambda arrays: {**arrays, "more": np.zeros(3, np.float32)}),
    "float64": _arrays(lambda arrays: {name: it.astype(np.float64) for name, it in arrays.items()}),
    "int8": _arrays(lambda arrays: {name: it.astype(np.int8) for name, it in arrays.items()}),
    "scalars": _arrays(lambda arrays: {name: np.zeros((), it.dtype) for name, it in arrays.items()}),
    "empty arrays": _arrays(
        lambda arrays: {name: np.zeros((0, *it.shape[1:]), it.dtype) for name, it in arrays.items()}
    ),
    "one row more": _arrays(lambda arrays: {name: np.concatenate([it, it[-1:]]) for name, it in arrays.items()}),
    "NaN": _filled(np.nan),
    "Inf": _filled(np.inf),
    "huge numbers": _filled(3e38),
    "negative numbers": _filled(-1e9),
}
"""Files in place of a safetensors file, made of it."""


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**40)


def _zero_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def _unreadable(path: Path) -> None:
    path.write_bytes(b"{}")
    path.chmod(0)


SPECIAL_FILES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "fifo": lambda path: os.mkfifo(path),
    "socket": _socket,
    "endless device": _zero_device,
    "device that is full": lambda path: path.symlink_to("/dev/full"),
    "terminal device": lambda path: path.symlink_to("/dev/tty"),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to its folder": lambda path: path.symlink_to("."),
    "sparse terabyte": _sparse,
    "unreadable": _unreadable,
}
"""What stands in place of a file; called with its name, where nothing is."""


Foreign = Callable[[Path, random.Random], Path]


def _zip_bomb(folder: Path, rng: random.Random) -> Path:
    """Write a zip of Stable-Baselines3's form whose member is 1.5 GB of zeros."""
    path = folder / "policy_0.zip"
    archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
    with archive, archive.open("policy.pth", "w", force_zip64=True) as member:
        for _ in range(24):
            member.write(bytes(2**26))
    return path


def _pickle_that_runs(folder: Path, rng: random.Random) -> Path:
    """Write a torch file that makes a file beside itself where it is unpickled freely."""
    path = folder / "policy_0.pt"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(folder / "ran").encode() + b"'\ntR.")
    return path


def _written(name: str, data: bytes) -> Foreign:
    def write(folder: Path, rng: random.Random) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


FOREIGN_FILES: dict[str, Foreign] = {
    "zip bomb": _zip_bomb,
    "pickle that runs": _pickle_that_runs,
    "zip of nothing": _written("policy_0.zip", b"PK\5\6" + bytes(18)),
    "empty torch file": _written("policy_0.pth", b""),
    "text": _written("policy_0.pt", b"not a checkpoint"),
    "name with escapes": _written("policy_\x1b[2J\n0.pt", b"not a checkpoint"),
    "name of no UTF-8": _written(os.fsdecode(b"policy_\xff0.pt"), b"not a checkpoint"),
}
"""Checkpoint files of other libraries: each makes one in an empty folder and returns what to import."""
