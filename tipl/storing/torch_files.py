"""Zips and torch files from untrusted sources: checked before they are unpacked, then loaded with weights_only=True.

torch.load(weights_only=True) runs no code, but a few bytes of a pickle can make it use any amount of memory or time, by
a huge array of zeros or by tuples of tuples of tuples. So the pickles in the file are first read opcode by opcode,
without executing any: their length, the number of objects they make and the names they use are limited to what
torch.save writes for tensors and plain values. The number of a zip's members and their unpacked size are limited too,
and their checksums are compared, which torch does not do.
"""

import contextlib
import io
import pickletools
import re
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from tipl.storing import numpy_values
from tipl.storing.not_readable import NotReadableError
from tipl.storing.torchscript_files import is_torchscript

MAX_BYTES = 2**30
"""Largest file, and largest unpacked size of a zip, unless the caller allows more."""

_SLACK_BYTES = 2**26  # a zip that unpacks to at most this plus four times its size is not taken for a bomb
_PICKLE_BYTES = 2**22  # a tensor takes about 200
_PICKLE_OBJECTS = 2**18  # a tensor takes about 35; an object costs about a hundred bytes and a microsecond
_ENCODED_BYTES = 16  # of an array of NumPy's: as many count as an object
_ZIP_MEMBERS = 20_000  # torch writes one for each tensor
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first bytes of files that torch wrote before release 1.6
_LEGACY_PICKLES = 5  # magic number, protocol, machine, content, keys of the storages; the storages follow
_HARMLESS = re.compile(
    r"collections\.OrderedDict|(builtins|__builtin__)\.(set|complex)|torch\.(storage\.)?\w+Storage|torch\.(Size|device)"
    r"|torch\.(q?u?int|b?float|complex|bool)\w*|torch\.per_\w+|torch\.nn\.parameter\.Parameter"
    r"|torch\.serialization\._get_layout"
    r"|torch\._utils\._rebuild_(tensor(_v2|_v3)?|parameter(_with_state)?|sparse_tensor|qtensor|meta_tensor_no_storage)"
)
"""The names that a pickle may use. torch.load allows others too, such as bytearray(10**12)."""


def open_zip(data: bytes, max_bytes: int | None = None) -> zipfile.ZipFile:
    """Return the zip in `data`, whose members are safe to read: not too many or too large, with distinct names, intact.

    Raises NotReadableError, or what zipfile raises, where they are not. `max_bytes` limits the unpacked size.
    """
    if (
        data.count(b"PK\x01\x02") > _ZIP_MEMBERS
    ):  # each member's entry begins so: counted before objects are made of them
        raise NotReadableError(f"is a zip of more than {_ZIP_MEMBERS:,} members, and was not unpacked")
    archive = zipfile.ZipFile(io.BytesIO(data))
    members = archive.infolist()
    names = Counter(member.filename.lower() for member in members)  # torch ignores case in names
    if len(names) < len(members):
        raise NotReadableError(f"is a zip with two members named {names.most_common(1)[0][0]}")
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise NotReadableError(f"is a zip whose member {member.filename} is neither stored nor deflated")
    limit = min(MAX_BYTES, _SLACK_BYTES + 4 * len(data)) if max_bytes is None else max_bytes
    num_bytes = sum(member.file_size for member in members)
    if num_bytes > limit:
        raise NotReadableError(
            f"is a zip of {len(data):,} bytes that unpacks to {num_bytes:,}, and was not unpacked; max_bytes, "
            f"{limit:,} now, allows more"
        )
    damaged = archive.testzip()
    if damaged is not None:
        raise NotReadableError(f"is damaged: its member {damaged} fails its checksum")
    return archive


def check_directory(archive: zipfile.ZipFile, data: bytes) -> None:
    """Raise NotReadableError where zipfile and torch would look for the zip's directory in different places of `data`,
    and see different members."""
    if data[-22:-18] != b"PK\x05\x06" or int.from_bytes(data[-6:-2], "little") != archive.start_dir:
        raise NotReadableError("is a zip with bytes before its beginning or behind its end, and was not loaded")


def load_torch(data: bytes, max_bytes: int | None = None) -> Any:
    """Return the object that torch.save wrote into `data`.

    Raises NotReadableError where it holds more than tensors and plain values, or torch.save did not write it; torch
    raises other errors for damaged files. `max_bytes` is as in `open_zip`.
    """
    names: set[str] = set()
    if data.startswith(_LEGACY):
        start = 0
        for _ in range(_LEGACY_PICKLES):
            start += _check_pickle(data[start : start + _PICKLE_BYTES + 1], names)
    elif data.startswith(b"PK\x03\x04") and zipfile.is_zipfile(io.BytesIO(data)):
        with open_zip(data, max_bytes) as archive:
            check_directory(archive, data)
            _check_zip(archive, names)
    else:
        raise NotReadableError(_what_else(data))
    numbers = numpy_values.allowed() if names & numpy_values.NAMES else contextlib.nullcontext()
    with numbers, warnings.catch_warnings(action="ignore"):  # torch warns of deprecated formats
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _check_zip(archive: zipfile.ZipFile, used: set[str]) -> None:
    """Raise NotReadableError unless torch may load the zip. The names that its pickles use are added to `used`."""
    names = archive.namelist()
    if is_torchscript(names):  # in a zip of Stable-Baselines3, whose own load could not read it either
        raise NotReadableError(
            "holds a TorchScript export as its policy.pth, where Stable-Baselines3 saves a state_dict, and was not "
            "read: import the export itself, or a zip that model.save() wrote"
        )
    pickles = [name for name in names if name.lower().endswith(".pkl")]
    if not any(name.endswith("/data.pkl") for name in pickles):
        raise NotReadableError(
            "is a zip, but neither one of Stable-Baselines3 (no member policy.pth) nor of torch.save (no data.pkl)"
        )
    for name in pickles:
        with archive.open(name) as file:
            _check_pickle(file.read(_PICKLE_BYTES + 1), used)


@dataclass(frozen=True)
class _Item:
    """What stands for an object on a pickle's stack."""

    size: int = 1
    """Its number of objects. The items of a tuple count again whenever the tuple is used, because hashing it as a key
    of a dict visits them all."""
    value: Any = None
    """A text, the name of something imported, or a tuple of such; else None."""


def _check_pickle(data: bytes, used: set[str]) -> int:
    """Return the length of the pickle at the beginning of `data`; raise NotReadableError if it is not safe to load.

    `data` must be cut off one byte after the longest pickle allowed. The names that it uses are added to `used`.
    """
    left = _PICKLE_OBJECTS
    stack: list[_Item | None] = []  # None is a mark
    memo: dict[Any, _Item] = {}
    file = io.BytesIO(data)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            name = opcode.name
            if name == "PROTO" and argument != 2:
                raise NotReadableError(f"is a pickle of protocol {argument}, which torch.save writes only if told to")
            if name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1] or _Item()
            elif name == "MARK":
                stack.append(None)
            else:
                taken = _pop(stack, opcode)
                item = memo[argument] if name in ("GET", "BINGET", "LONG_BINGET") else _made(name, argument, taken)
                if name in ("GLOBAL", "INST", "STACK_GLOBAL"):
                    _check_name(str(item.value))
                    used.add(str(item.value))
                stack += [item] * len(opcode.stack_after)
                left -= item.size
                if left < 0:
                    raise NotReadableError(
                        f"holds more than {_PICKLE_OBJECTS:,} objects besides its tensors, and was not loaded"
                    )
    except ValueError as error:
        if len(data) > _PICKLE_BYTES:
            raise NotReadableError(
                f"holds more than {_PICKLE_BYTES:,} bytes of pickle besides its tensors, and was not loaded"
            ) from error
        raise
    return file.tell()


def _made(name: str, argument: Any, taken: list[_Item]) -> _Item:
    """Return what an opcode makes of the items that it takes from the stack, the lowest first."""
    if name in ("GLOBAL", "INST", "STACK_GLOBAL"):
        return _Item(value=str(argument or name).replace(" ", "."))
    if name == "REDUCE" and taken[0].value == numpy_values.ENCODE:
        return _Item(1 + numpy_values.encoded_length(taken[1].value) // _ENCODED_BYTES)
    if name.startswith("TUPLE"):
        return _Item(1 + sum(it.size for it in taken), tuple(it.value for it in taken))
    return _Item(value=argument if isinstance(argument, str) else None)


def _check_name(name: str) -> None:
    """Raise NotReadableError where a pickle uses a name that no state_dict needs."""
    if not _HARMLESS.fullmatch(name) and name not in numpy_values.NAMES:
        raise NotReadableError(
            f"holds more than tensors and plain values, a {name}, and was not loaded, because loading it could run "
            "code: save a state_dict, and arrays of NumPy's as tensors"
        )


def _pop(stack: list[_Item | None], opcode: pickletools.OpcodeInfo) -> list[_Item]:
    """Remove from the stack the items that the opcode takes, and return them, the lowest first."""
    taken: list[_Item] = []
    before = list(opcode.stack_before)
    if pickletools.stackslice in before:  # all items above the last mark, and those that the opcode takes below it
        while (item := stack.pop()) is not None:
            taken.append(item)
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        taken.append(stack.pop() or _Item())
    return taken[::-1]


def _what_else(data: bytes) -> str:
    """Return, as the end of a sentence, what is known about a file that is neither a zip nor torch's."""
    if data.startswith(b"version https://git-lfs"):
        return "is a pointer of git-lfs, not the file itself: `git lfs pull` fetches that"
    if data.startswith(b"PK\x03\x04"):
        return "is damaged: it begins as a zip, but the end of one is missing"
    if data.startswith(b"\x80"):
        return "is damaged, or a pickle not of torch.save, and was not loaded, because loading it could run code"
    return f"is damaged, or no checkpoint: it has {len(data):,} bytes and begins with {data[:16]!r}"
