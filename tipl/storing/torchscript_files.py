"""TorchScript files, as torch.jit.save writes them: their tensors and the classes of their modules, no code.

    <name>/data.pkl                 the module: an object of objects, down to tensors
    <name>/data/<key>               the bytes of a storage, of which tensors are views
    <name>/constants.pkl, constants/<key>    tensors that the code uses and no module has
    <name>/code/...                 what forward does; not read here
    <name>/byteorder                "little" or "big"; older releases of torch write none

data.pkl is read without running anything (`inert_pickle.py`), and no function of torch.jit is used. From the file come
a state, `child.child.weight` -> tensor, and the class of each module, `child.child` -> torch.nn.modules.linear.Linear.
What is no module, tensor or plain value is refused, so that no weight is left out in silence. The number of parts and
their depth are limited, and a storage must have as many bytes as it declares before memory is taken for it.
"""

import io
import math
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tipl.storing.inert_pickle import Made, Name, PickleError, read_inert
from tipl.storing.not_readable import NotReadableError
from tipl.storing.tensor_checks import shown

_MAX_PARTS = 2**15  # modules, tensors and plain values, each counted at every name that it has
_MAX_DEPTH = 64  # of modules in modules
_MAX_DIMS = 16
_ALIGNMENT = 64  # torch writes a storage where it could be mapped into memory
_PADDING = b"FB"  # the kind of torch's own extra field in a member's header, which moves the member

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_TENSOR = Name("torch._utils", "_rebuild_tensor_v2")
_CONTAINERS = "torch.jit._pickle"  # functions that give a list its type, such as build_tensorlist
_OTHERS = ("torch.classes.", "__torch__.torch.classes.")  # such as the packed weights of quantised layers
_PLAIN = (type(None), bool, int, float, complex, str, bytes)


@dataclass
class TorchScript:
    """What is read of a TorchScript file. Writing to the tensors of `state` changes what `to_bytes` returns."""

    state: dict[str, Tensor] = field(default_factory=dict)
    """Views of the file's storages, by the path of the module and the name in it."""
    classes: dict[str, str] = field(default_factory=dict)
    """The class of each module, by its path; "" is the whole. In the order in which the modules have them."""
    numbers: dict[str, float] = field(default_factory=dict)
    """The modules' attributes that are floats, such as a normaliser's eps."""
    constants: int = 0
    """How many storages of several floating-point numbers the code has for itself, such as the weights of a frozen
    module. Single numbers are not counted: they are as other numbers in the code are."""
    _data: bytes = b""
    _storages: dict[str, Tensor] = field(default_factory=dict)
    """By the name of the zip's member; flat, (n,) each."""

    def to_bytes(self) -> bytes:
        """Return the file with the storages as they are now, and all other members as they were, byte for byte."""
        written = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(self._data)) as source, zipfile.ZipFile(written, "w") as target:
            for member in source.infolist():
                name = member.filename
                content = bytes_of(self._storages[name]) if name in self._storages else source.read(member)
                begin = written.tell() + len(member.FileHeader(zip64=False)) - len(member.extra) + 4
                padding = -begin % _ALIGNMENT
                member.extra = _PADDING + padding.to_bytes(2, "little") + bytes(padding)
                target.writestr(member, content)
        return written.getvalue()


def bytes_of(tensor: Tensor) -> bytes:
    """Return the memory of a flat tensor (n,)."""
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def is_torchscript(names: Iterable[str]) -> bool:
    """Return whether these are the names of the members of a TorchScript file, or of one that holds code in its way."""
    return any(name.endswith("/constants.pkl") or "/code/" in name for name in names)


def read_torchscript(archive: zipfile.ZipFile, data: bytes) -> TorchScript:
    """Return what the TorchScript file `data` holds, of which `archive`, from `open_zip`, is the zip.

    Raises NotReadableError where it is damaged, holds what is neither module, tensor nor plain value, has too many
    parts, is of the other byte order, or has no weights but those in its code.
    """
    names = archive.namelist()
    root = next((name.removesuffix("data.pkl") for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)), "")
    if not root or f"{root}constants.pkl" not in names or not all(name.startswith(root) for name in names):
        raise NotReadableError("is a zip with code, as of TorchScript, but not one that torch.jit.save wrote")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder").strip() != sys.byteorder.encode():
        raise NotReadableError(
            f"is a TorchScript file of another byte order than this machine's, {sys.byteorder}: save it on such a one"
        )
    script = TorchScript(_data=data)
    try:
        script.constants = _count_constants(archive.read(f"{root}constants.pkl"))
        module = read_inert(archive.read(f"{root}data.pkl"), _declared)
        _Walk(script, archive, root).module("", module)
    except PickleError as error:
        raise NotReadableError(f"is a TorchScript file that cannot be read: its pickle {error}") from error
    if script.constants and not any(it.is_floating_point() and it.numel() for it in script.state.values()):
        raise NotReadableError(
            "is a frozen TorchScript module (torch.jit.freeze), whose weights are constants of its code, which is not "
            "read: save the module before it is frozen, or its state_dict()"
        )
    return script


@dataclass(frozen=True)
class _Declared:
    """A storage, as a pickle declares it."""

    key: str
    dtype: torch.dtype
    count: int
    """Of its numbers."""


def _declared(persistent_id: Any) -> _Declared:
    """Return the storage that a persistent id stands for. Raises PickleError where it is none."""
    match persistent_id:
        case ("storage", Name(module="torch" | "torch.storage", name=kind), str(key), str(device), int(count)):
            if kind in _DTYPES and device != "meta" and type(count) is int and count >= 0:
                return _Declared(key, _DTYPES[kind], count)
            raise PickleError(
                f"holds a storage of a kind that is not read: {shown(kind)} of {count} numbers on {shown(device)}"
            )
    raise PickleError("is damaged: a storage is described in another way than torch does")


def _count_constants(data: bytes) -> int:
    """Return how many storages of several floating-point numbers constants.pkl declares. Raises PickleError."""
    found = []

    def declared(persistent_id: Any) -> None:
        found.append(_declared(persistent_id))

    read_inert(data, declared)
    return sum(it.dtype.is_floating_point and it.count > 1 for it in found)


class _Walk:
    """Goes through the objects of data.pkl, and enters what it finds into a TorchScript."""

    def __init__(self, script: TorchScript, archive: zipfile.ZipFile, root: str) -> None:
        self.script, self.archive, self.root = script, archive, root
        self.parts = 0
        self.tensors: dict[int, Tensor] = {}  # by the identity of what describes them: shared ones are one tensor
        self.members = {member.filename: member.file_size for member in archive.infolist()}

    def module(self, path: str, value: Any) -> None:
        """Enter the whole module. Raises NotReadableError."""
        if not (isinstance(value, Made) and _is_module(value)):
            raise NotReadableError("is a TorchScript file whose data.pkl holds no module")
        self._part(path, value, 0)

    def _part(self, path: str, value: Any, depth: int) -> None:
        """Enter one part, by its kind."""
        self.parts += 1
        if self.parts > _MAX_PARTS or depth > _MAX_DEPTH:
            raise NotReadableError(
                f"is a TorchScript file of more than {_MAX_PARTS:,} parts, or modules more than {_MAX_DEPTH} deep, and "
                "was not read"
            )
        if isinstance(value, Made) and value.name == _TENSOR:
            if path in self.script.state:
                raise NotReadableError(f"holds two tensors under one name, {shown(path)}")
            self.script.state[path] = self._tensor(path, value)
        elif isinstance(value, Made):
            if _is_module(value):
                self.script.classes[path] = _class_of(value.name)
            for name, part in _inside(path, value):
                self._part(f"{path}.{name}" if path and name else path or name, part, depth + 1)
        elif isinstance(value, Mapping | list | tuple):
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, part in items:
                self._part(f"{path}.{key}", part, depth + 1)
        elif isinstance(value, _Declared) or not isinstance(value, (*_PLAIN, set, frozenset, Name)):
            raise NotReadableError(f"is a TorchScript file with a {type(value).__name__} at {shown(path)}: not read")
        elif type(value) is float:
            self.script.numbers[path] = value

    def _tensor(self, path: str, made: Made) -> Tensor:
        """Return the tensor that a call of _rebuild_tensor_v2 describes: a view of its storage, of any strides."""
        if id(made) in self.tensors:
            return self.tensors[id(made)]
        match made.arguments:
            case (_Declared() as declared, int(offset), tuple(shape), tuple(strides), bool(), Made(), *rest):
                pass
            case _:
                raise NotReadableError(f"is damaged: its tensor {shown(path)} is described in another way than torch's")
        if made.state is not None or any(rest):  # the conjugate or the negative of what the storage has
            raise NotReadableError(f"holds a tensor {shown(path)} that is more than a view of its memory: not read")
        numbers = (offset, *shape, *strides)
        if not (len(shape) == len(strides) <= _MAX_DIMS and all(type(it) is int and it >= 0 for it in numbers)):
            raise NotReadableError(f"is damaged: its tensor {shown(path)} has no possible shape, strides and offset")
        last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        if last >= declared.count if math.prod(shape) else offset > declared.count:
            raise NotReadableError(
                f"is damaged: its tensor {shown(path)} reaches beyond its storage of {declared.count:,} numbers"
            )
        tensor = self._storage(declared).as_strided(shape, strides, offset)
        self.tensors[id(made)] = tensor
        return tensor

    def _storage(self, declared: _Declared) -> Tensor:
        """Return a storage, flat, which is read when it is first asked for."""
        name = f"{self.root}data/{declared.key}"
        known = self.script._storages.get(name)
        if known is not None and (known.dtype, known.numel()) != (declared.dtype, declared.count):
            raise NotReadableError(f"is damaged: its storage {shown(name)} is declared in two ways")
        if known is None:
            wanted = declared.count * declared.dtype.itemsize
            if self.members.get(name) != wanted:
                raise NotReadableError(
                    f"is damaged: its storage {shown(name)} must have {wanted:,} bytes, got {self.members.get(name)}"
                )
            content = bytearray(self.archive.read(name))
            known = torch.frombuffer(content, dtype=declared.dtype) if content else torch.empty(0, dtype=declared.dtype)
            self.script._storages[name] = known
        return known


def _is_module(made: Made) -> bool:
    """Return whether it is an object of a class that the file has code of."""
    return f"{made.name.module}.".startswith("__torch__.") and not f"{made.name}".startswith(_OTHERS)


def _class_of(name: Name) -> str:
    """Return "torch.nn.modules.linear.Linear" for the name that TorchScript gives to that class."""
    return re.sub(r"(^__torch__\.|___torch_mangle_\d+\.)", "", str(name))


def _inside(path: str, made: Made) -> Iterator[tuple[str, Any]]:
    """Yield name and value of what is inside a module or a list with a type. Raises NotReadableError for any other."""
    if _is_module(made) and isinstance(made.state, dict) and made.arguments == ():
        for name, part in made.state.items():
            if not isinstance(name, str) or not name or "." in name:
                raise NotReadableError(f"is damaged: the module {shown(path)} has an attribute named {shown(name)}")
            yield name, part
    elif made.name.module == _CONTAINERS and isinstance(made.arguments, tuple) and made.arguments:
        yield "", made.arguments[0]
    elif made.name != Name("torch", "device"):
        raise NotReadableError(
            f"is a TorchScript file with a {shown(made.name)} at {shown(path)}, which is no plain tensor, and was not "
            "read: save the module's state_dict(), without quantised or packed weights"
        )
