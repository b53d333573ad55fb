"""Read a pickle without running anything: classes and functions become names, and calls stay undone.

The opcodes are read one by one (`pickletools.genops`) and interpreted here. What is plain (numbers, text, bytes, lists,
tuples, dicts, sets) comes out as itself; whatever pickle would import is a `Name`, and whatever it would call or make
with one is a `Made`, which records name, arguments and state. NumPy's arrays and numbers can then be read from what was
recorded (`array_of`, `number_of`), and where their bytes lie in the file (`parts_of`). Opcodes that reach beyond the
file (extension codes, buffers of another stream) are refused by name; so are persistent ids, unless the caller says
what they stand for.
"""

import dataclasses
import math
import pickletools
from collections.abc import Callable, Container
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 2**26
MAX_OPCODES = 2**18  # some seconds
MAX_NUMBERS = 2**20  # of an array

_MARK = object()


class PickleError(Exception):
    """The bytes are no pickle, or one that this reader does not take."""


@dataclasses.dataclass(frozen=True)
class Name:
    """What pickle would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(eq=False)
class Made:
    """What pickle would make by calling `name`, or by making an object of that class, with `arguments`."""

    name: Name
    arguments: Any
    state: Any = None
    """What pickle would set on it."""


class Content(bytes):
    """Bytes that lie in the pickle as they are."""

    start: int
    """Where they begin in it."""


def read_inert(
    data: bytes, persistent: Callable[[Any], Any] | None = None, names: Container[Name] | None = None
) -> Any:
    """Return what the pickle holds, nothing of it run. Raises PickleError.

    `persistent` returns what stands for a persistent id, such as torch's ("storage", type, key, device, count), and
    raises PickleError for one that it does not take. By default all are refused. `names` are those that the pickle may
    use, by default any.
    """
    if len(data) > MAX_BYTES:
        raise PickleError(f"has {len(data):,} bytes, at most {MAX_BYTES:,} are read")
    machine = _Machine(persistent, names)
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            if count >= MAX_OPCODES:
                raise PickleError(f"has more than {MAX_OPCODES:,} parts")
            if opcode.name in _LENGTH_BYTES:
                argument = Content(argument or b"")
                argument.start = (position or 0) + 1 + _LENGTH_BYTES[opcode.name]  # of bytes it is never None
            machine.take(opcode.name, argument)
    except PickleError:
        raise
    except Exception as error:  # pickletools raises many kinds, the machine IndexError, KeyError and TypeError
        is_binary = data[:1] == b"\x80"  # as all of Python 3's are by default
        what = "is damaged" if is_binary else "is damaged, or no pickle"
        raise PickleError(f"{what}: {type(error).__name__}: {str(error)[:200]}") from error
    return machine.answer()


class _Machine:
    """Pickle's stack and memo."""

    def __init__(self, persistent: Callable[[Any], Any] | None, names: Container[Name] | None) -> None:
        self.persistent, self.names = persistent, names
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.stopped = False

    def answer(self) -> Any:
        if not self.stopped or len(self.stack) != 1:
            raise PickleError("is damaged: it ends too early")
        return self.pop()

    def take(self, name: str, argument: Any) -> None:
        """Carry out one opcode."""
        if name in _IGNORED:
            return
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _VALUES:
            self.stack.append(argument)
        elif name in _WORK:
            _WORK[name](self, argument)
        elif name == "BINPERSID" and self.persistent is not None:
            self.stack.append(self.persistent(self.pop()))
        else:
            raise PickleError(f"holds {name}, which reaches beyond the file")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleError("is damaged: a mark is where a value should be")
        return value

    def pop_to_mark(self) -> list[Any]:
        """Return all that lies above the last mark."""
        items = []
        while (value := self.stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def tuple_of(self, size: int) -> None:
        items = [self.pop() for _ in range(size)][::-1]
        self.stack.append(tuple(items))

    def remember(self, index: Any) -> None:
        self.memo[int(index)] = self.stack[-1]

    def recall(self, index: Any) -> None:
        self.stack.append(self.memo[int(index)])

    def make(self, keywords: bool = False) -> None:
        arguments = (self.pop(), self.pop())[::-1] if keywords else self.pop()
        name = self.pop()
        # What another call returned can be called too; its name is never asked for.
        self.stack.append(Made(name if isinstance(name, Name) else Name("", "a call's result"), arguments))

    def import_name(self, text: Any) -> None:
        """Replace module and name on the stack, or those in the opcode itself, by a Name."""
        if text is None:
            name, module = self.pop(), self.pop()
        else:
            module, _, name = text.partition(" ")
        if not (isinstance(module, str) and isinstance(name, str)):
            raise PickleError("is damaged: a name is no text")
        if self.names is not None and Name(module, name) not in self.names:
            raise PickleError(f"holds {Name(module, name)}, and was not loaded, because loading it could run code")
        self.stack.append(Name(module, name))

    def build(self) -> None:
        state, made = self.pop(), self.stack[-1]
        if not isinstance(made, Made):
            raise PickleError(f"sets a state on a {type(made).__name__}")
        made.state = state

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)  # of a subclass of list, an array's or a deque's, they are dropped
        elif not isinstance(target, Made):
            raise PickleError(f"appends to a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs = zip(items[::2], items[1::2], strict=True)
        if isinstance(target, dict):
            target.update((_key(key), value) for key, value in pairs)
        elif not isinstance(target, Made):
            raise PickleError(f"sets items of a {type(target).__name__}")

    def add_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, set):
            raise PickleError(f"adds to a {type(target).__name__}")
        target.update(map(_key, items))

    def dict_of(self, items: list[Any]) -> None:
        self.stack.append({})
        self.set_items(items)

    def stop(self) -> None:
        self.stopped = True


def _key(value: Any) -> Any:
    """Return a key of a dict. Others could be nested so deeply that hashing them overflows the stack."""
    if value is not None and not isinstance(value, str | int | float | bytes):
        raise PickleError(f"has a key of type {type(value).__name__}; only plain values are read")
    return value


_LENGTH_BYTES = {"SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8}
"""How many bytes say the length of the content, between the opcode and the content."""
_IGNORED = {"PROTO", "FRAME"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_VALUES |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_VALUES |= {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_WORK: dict[str, Callable[[_Machine, Any], Any]] = {
    "POP": lambda it, _: it.stack.pop(),
    "POP_MARK": lambda it, _: it.pop_to_mark(),
    "DUP": lambda it, _: it.stack.append(it.stack[-1]),
    "TUPLE": lambda it, _: it.stack.append(tuple(it.pop_to_mark())),
    "TUPLE1": lambda it, _: it.tuple_of(1),
    "TUPLE2": lambda it, _: it.tuple_of(2),
    "TUPLE3": lambda it, _: it.tuple_of(3),
    "LIST": lambda it, _: it.stack.append(it.pop_to_mark()),
    "DICT": lambda it, _: it.dict_of(it.pop_to_mark()),
    "FROZENSET": lambda it, _: it.stack.append(frozenset(map(_key, it.pop_to_mark()))),
    "APPEND": lambda it, _: it.append([it.pop()]),
    "APPENDS": lambda it, _: it.append(it.pop_to_mark()),
    "SETITEM": lambda it, _: it.set_items([it.pop(), it.pop()][::-1]),
    "SETITEMS": lambda it, _: it.set_items(it.pop_to_mark()),
    "ADDITEMS": lambda it, _: it.add_items(it.pop_to_mark()),
    "MEMOIZE": lambda it, _: it.remember(len(it.memo)),
    "PUT": lambda it, index: it.remember(index),
    "BINPUT": lambda it, index: it.remember(index),
    "LONG_BINPUT": lambda it, index: it.remember(index),
    "GET": lambda it, index: it.recall(index),
    "BINGET": lambda it, index: it.recall(index),
    "LONG_BINGET": lambda it, index: it.recall(index),
    "GLOBAL": lambda it, text: it.import_name(text),
    "STACK_GLOBAL": lambda it, _: it.import_name(None),
    "REDUCE": lambda it, _: it.make(),
    "NEWOBJ": lambda it, _: it.make(),
    "NEWOBJ_EX": lambda it, _: it.make(keywords=True),
    "BUILD": lambda it, _: it.build(),
    "STOP": lambda it, _: it.stop(),
}

# ---- NumPy

_NUMPY = ("numpy.core", "numpy._core")  # before NumPy 2, and from then on
_FUNCTIONS = ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
NUMPY_NAMES = frozenset(
    {Name("numpy", "dtype"), Name("numpy", "ndarray"), Name("_codecs", "encode")}
    | {Name(f"{core}.{it.partition('.')[0]}", it.partition(".")[2]) for core in _NUMPY for it in _FUNCTIONS}
)
"""What pickles of NumPy's numbers and arrays use."""


def _made_by(value: Any, module: str, name: str) -> Made | None:
    """Return the value where a function of NumPy's core made it, of any release, else None."""
    names = [Name(f"{core}.{module}", name) for core in _NUMPY]
    return value if isinstance(value, Made) and value.name in names else None


class ArrayParts(NamedTuple):
    """An array of numbers as a pickle describes it; `content` has as many bytes as shape and dtype need."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    content: bytes
    order: Literal["C", "F"]

    def array(self) -> NDArray[Any]:
        """Return the array, which cannot be written."""
        return np.frombuffer(self.content, self.dtype).reshape(self.shape, order=self.order)


def array_of(value: Any) -> NDArray[Any] | None:
    """Return the array of numbers that a part of a pickle describes, or None where it is none. Raises PickleError."""
    parts = parts_of(value)
    if parts is not None and (count := math.prod(parts.shape)) > MAX_NUMBERS:
        raise PickleError(f"holds an array of {count:,} numbers, at most {MAX_NUMBERS:,} are read")
    return None if parts is None else parts.array()


def parts_of(value: Any) -> ArrayParts | None:
    """Return what a part of a pickle says of an array of numbers, or None where it is none. Raises PickleError."""
    if rebuilt := _made_by(value, "multiarray", "_reconstruct"):
        if not isinstance(rebuilt.state, tuple) or len(rebuilt.state) != 5:
            raise PickleError("is damaged: an array has no state")
        _, shape, dtype, in_columns, content = rebuilt.state
        return _parts(shape, dtype, content, "F" if in_columns else "C")
    if from_buffer := _made_by(value, "numeric", "_frombuffer"):
        content, dtype, shape, order = _arguments(from_buffer, 4)
        return _parts(shape, dtype, content, order)
    return None


def number_of(value: Any) -> float | None:
    """Return the number that a part of a pickle describes, Python's or NumPy's, or None. Raises PickleError."""
    if scalar := _made_by(value, "multiarray", "scalar"):
        dtype, content = _arguments(scalar, 2)
        return float(_parts((), dtype, content, "C").array())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError as error:
        raise PickleError("holds a number that is too large") from error


def _arguments(made: Made, count: int) -> tuple[Any, ...]:
    if not isinstance(made.arguments, tuple) or len(made.arguments) != count:
        raise PickleError(f"is damaged: {made.name} must have {count} arguments")
    return made.arguments


def _parts(shape: Any, dtype: Any, content: Any, order: Any) -> ArrayParts:
    if isinstance(content, Made) and content.name == Name("_codecs", "encode"):  # as protocol 2 writes bytes
        content = _arguments(content, 2)[0]
    elif isinstance(content, Made) and content.name == Name("__builtin__", "bytes"):  # and none at all
        content = b"".join(_arguments(content, 0))
    if isinstance(content, str):
        content = content.encode("latin1")
    is_shape = isinstance(shape, tuple) and all(type(size) is int and 0 <= size < 2**32 for size in shape[:9])
    if not is_shape or len(shape) > 8 or not isinstance(content, bytes) or order not in ("C", "F"):
        raise PickleError("is damaged: an array's shape or content is none")
    kind = _dtype(dtype)
    if math.prod(shape) * kind.itemsize != len(content):
        raise PickleError(f"is damaged: an array of shape {shape} of {kind} has {len(content)} bytes")
    return ArrayParts(shape, kind, content, order)


def _dtype(value: Any) -> np.dtype[Any]:
    """Return a plain numeric dtype."""
    made = isinstance(value, Made) and value.name == Name("numpy", "dtype") and isinstance(value.arguments, tuple)
    code = value.arguments[0] if made and value.arguments else None
    order = value.state[1] if made and isinstance(value.state, tuple) and len(value.state) > 1 else "="
    kind = plain_dtype(code, order)
    if kind is None:
        raise PickleError("holds an array that is not of plain numbers")
    return kind


def plain_dtype(code: Any, order: Any) -> np.dtype[Any] | None:
    """Return the dtype that a pickle of NumPy's describes, such as "f4" and "<"; None where it is no plain number's."""
    if not (isinstance(code, str) and isinstance(order, str)):
        return None
    is_plain = code in {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"} and order in set("<>=|")
    return np.dtype(f"{order}{code}") if is_plain else None
