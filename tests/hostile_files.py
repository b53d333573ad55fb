"""Files that nobody should have to trust, as checkpoints: what `tipl import` must refuse, each with what it must say.

`HOSTILE[kind]` is a maker and a pattern: `maker(folder, random)` makes one such file in an empty folder, other bytes
for another `random`, and returns what to import; the error matches the pattern. No file is large: what is dangerous is
what they ask for.
"""

import io
import json
import os
import pickle
import pickletools
import random
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

Maker = Callable[[Path, random.Random], Path]
HOSTILE: dict[str, tuple[Maker, str]] = {}


def mutated_pickles(whole: bytes, count: int) -> Iterator[bytes]:
    """Yield `count` mutations of a pickle: bytes and opcodes changed, left out, or put in."""
    rng, opcodes = random.Random(0), [ord(it.code) for it in pickletools.opcodes]
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                data[at] = rng.choice(opcodes)
            elif kind == 2:
                del data[at : at + rng.randrange(1, 9)]
            else:
                data[at:at] = bytes(rng.choice(opcodes) for _ in range(rng.randrange(1, 5)))
        yield bytes(data)


def hostile(kind: str, pattern: str) -> Callable[[Maker], Maker]:
    """Enter a maker into the table."""

    def enter(maker: Maker) -> Maker:
        HOSTILE[kind] = maker, pattern
        return maker

    return enter


def content(kind: str, pattern: str, make: Callable[[random.Random], bytes], name: str = "model_1.pt") -> None:
    """Enter a kind of file that is bad for what is in it."""

    def maker(folder: Path, random: random.Random) -> Path:
        (folder / name).write_bytes(make(random))
        return folder / name

    HOSTILE[kind] = maker, pattern


def torch_bytes(value: Any, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def weights(random: random.Random) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([random.random() for _ in range(random.randint(50, 100))])}


def zip_bytes(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def torch_zip(pickled: bytes) -> bytes:
    """A zip as torch.save writes it, around any pickle."""
    return zip_bytes({"a/data.pkl": pickled, "a/byteorder": b"little", "a/version": b"3\n"})


def sb3_zip(random: random.Random, settings: bytes = b"{}") -> bytes:
    return zip_bytes({"data": settings, "policy.pth": torch_bytes(weights(random))}, zipfile.ZIP_DEFLATED)


def cut(data: bytes, random: random.Random) -> bytes:
    return data[: random.randint(20, len(data) - 30)]


def flipped(data: bytes, place: bytes, random: random.Random) -> bytes:
    """One bit of the first byte of `place` the other way round."""
    i = data.index(place)
    return data[:i] + bytes([data[i] ^ 1 << random.randrange(8)]) + data[i + 1 :]


class Calls:
    """A pickle that calls a function where it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


# No checkpoints at all.
content("empty", "is damaged, or no checkpoint: it has 0 bytes", lambda random: b"")
content(
    "noise", "is damaged, or no checkpoint: it has .* bytes and begins with", lambda random: b"n" + random.randbytes(99)
)
content(
    "git-lfs pointer", "is a pointer of git-lfs", lambda random: b"version https://git-lfs.github.com/spec/v1\noid 0\n"
)
content(
    "web page",
    "is damaged, or no checkpoint: .* begins with b'<!DOCTYPE html>",
    lambda random: b"<!DOCTYPE html><html>",
)
content("gzip", "is damaged, or no checkpoint", lambda random: b"\x1f\x8b\x08\x00" + random.randbytes(50))
content("pickle", "or a pickle not of torch.save", lambda random: pickle.dumps({"w": [random.random()]}))
content(
    "npz",
    r"is damaged: its member w\.npy is no array of NumPy's",
    lambda random: zip_bytes({"w.npy": random.randbytes(99)}),
)
content("other zip", "neither one of Stable-Baselines3", lambda random: zip_bytes({"a": b"b"}), "model_1.zip")
content("no state", "holds no state_dict but a list", lambda random: torch_bytes([1, random.random()]))

# Damaged ones.
content("cut", "is damaged", lambda random: cut(torch_bytes(weights(random)), random))
content(
    "cut, legacy", "is damaged|holds more than", lambda random: cut(torch_bytes(weights(random), legacy=True), random)
)
content("cut SB3", "is damaged", lambda random: cut(sb3_zip(random), random), "model_1.zip")


@hostile("flipped weight", "its member .*/data/0 fails its checksum")
def _(folder: Path, random: random.Random) -> Path:
    state = weights(random)
    data = flipped(torch_bytes(state), state["w"].numpy().tobytes(), random)
    (folder / "model_1.pt").write_bytes(data)
    return folder / "model_1.pt"


# Code.
content(
    "code", "a (posix|nt).system, and was not loaded", lambda random: torch_bytes({"w": Calls(os.system, "exit 1")})
)
content("code, legacy", "was not loaded", lambda random: torch_bytes({"w": Calls(os.system, "exit 1")}, legacy=True))
content("code, protocol 4", "protocol 4", lambda random: torch_zip(pickle.dumps(Calls(eval, "1"), 4)))
content(
    "NumPy array",
    "its entry mean may hold statistics of observations",
    lambda random: torch_bytes(weights(random) | {"mean": np.ones(3)}),
)
content(
    "NumPy array of objects",
    "a NumPy number is of no plain kind|is damaged",
    lambda random: torch_bytes(weights(random) | {"mean": np.array([None, 1.0])}),
)
content(
    "NumPy array of another shape",
    "is damaged|cannot reshape",
    lambda random: torch_bytes(weights(random) | {"mean": np.ones(3)}).replace(b"K\x03\x85", b"K\x04\x85"),
)
content(
    "NumPy scalar of another kind",
    "a NumPy number is of no plain kind|is damaged",
    lambda random: torch_bytes(weights(random) | {"when": np.datetime64(1, "s")}),
)


def torchscript_zip(pickled: bytes) -> bytes:
    """A zip as torch.jit.save writes it, around any pickle."""
    members = {"a/data.pkl": pickled, "a/constants.pkl": pickle.dumps((), 2), "a/code/__torch__.py": b"raise\n"}
    return zip_bytes(members | {"a/data/0": bytes(12)})


content("TorchScript, no module", "data.pkl holds no module", lambda random: torchscript_zip(pickle.dumps({}, 2)))
content(
    "TorchScript, code",
    r"with a (posix|nt)\.system at w",
    lambda random: torchscript_zip(
        b"\x80\x02c__torch__\nM\n)\x81}X\x01\0\0\0w" + pickle.dumps(Calls(os.system, "exit 1"), 2)[2:-1] + b"sb."
    ),
)
content(
    "TorchScript, shared modules",
    "more than 32,768 parts",
    lambda random: torchscript_zip(shared_modules(random.randint(20, 50))),
)
content(
    "TorchScript, storage that lies",
    r"its storage a/data/0 must have 8,589,934,588 bytes, got 12",
    lambda random: torchscript_zip(
        b"\x80\x02c__torch__\nM\n)\x81}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n"
        b"FloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuJ\xff\xff\xff\x7ftQK\0K\x03\x85K\x01\x85\x89ccollections\n"
        b"OrderedDict\n)RtRsb."
    ),
)
content(
    "TorchScript as SB3's policy",
    "holds a TorchScript export as its policy.pth, .*: import the export itself, or a zip that model.save",
    lambda random: zip_bytes({"policy.pth": torchscript_zip(pickle.dumps({}, 2)), "data": b"{}"}),
    "model_1.zip",
)


def shared_modules(depth: int) -> bytes:
    """The pickle of a module that has one module under two names, which has one under two names, and so on."""
    new = b"c__torch__\nM\n)\x81}"
    pickled = b"\x80\x02" + new + b"bq\x00"
    for i in range(depth):
        pickled += b"0" + new + b"(X\x01\0\0\0ah%cX\x01\0\0\0bh%cubq%c" % (i, i, i + 1)
    return pickled + b"."


# A little that asks for a lot.
LEGACY = torch_bytes({}, legacy=True).partition(b"\x80\x02}q\x00.")[0]  # what comes before the pickle of what is saved


def tuples(depth: int) -> bytes:
    """The pickle of {t: None}, where t is a tuple of a tuple twice, and so on: its hash visits 2^depth."""
    doubled = b"".join(b"q%ch%c\x86" % (i, i) for i in range(depth))
    return b"\x80\x02})" + doubled + b"Ns."


def dicts(depth: int) -> bytes:
    """The pickle of a dict in a dict, and so on."""
    return b"\x80\x02" + b"}K\x00" * depth + b"}" + b"s" * depth + b"."


def wide_dicts(width: int) -> bytes:
    """The pickle of dicts of `width` names each for the next one, four deep: walked by name, they have width^4."""
    level = b"}q%c(" + b"".join(b"J" + struct.pack("<i", i) + b"h%%c" for i in range(width)) + b"u"
    pickled = b"\x80\x02}q\x00"
    for i in range(1, 5):
        pickled += (level.replace(b"q%c", b"q" + bytes([i]), 1)).replace(b"h%%c", b"h" + bytes([i - 1]))
    return pickled + b"."


def brax(mean: bytes) -> bytes:
    """The pickle of parameters of Brax whose statistics have this mean, given as its opcodes, and no policy."""
    statistics = b"cbrax.training.acme.running_statistics\nRunningStatisticsState\n)\x81}X\x04\0\0\0mean"
    return b"\x80\x04" + statistics + mean + b"sb}\x86."


def brax_dicts(depth: int) -> bytes:
    """The opcodes of a dict that has one dict under two names, which has one under two names, and so on."""
    doubled = b"".join(b"0}(X\x01\0\0\0ah%cX\x01\0\0\0bh%cuq%c" % (i, i, i + 1) for i in range(depth))
    return b"}q\x00" + doubled


def called(name: str, argument: bytes) -> bytes:
    """The pickle of a call with one argument, given as its opcodes."""
    return b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n" + argument + b"\x85R."


content(
    "bytearray",
    r"a (builtins|__builtin__)\.bytearray",
    lambda random: torch_zip(called("builtins bytearray", b"\x8a\x06" + bytes(5) + b"\x01")),
)
content(
    "tensor class", r"a torch\.FloatTensor", lambda random: torch_zip(called("torch FloatTensor", b"J\xff\xff\xff\x7f"))
)
content(
    "punycode",
    r"calls _codecs\.encode for more than numbers",
    lambda random: torch_zip(b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x08\0\0\0punycode\x86R."),
)
content(
    "punycode, from the memo",
    r"calls _codecs\.encode for more than numbers",
    lambda random: torch_zip(
        b"\x80\x02c_codecs\nencode\nq\x00X\x01\0\0\0aq\x01X\x08\0\0\0punycodeq\x02\x86q\x030h\x00h\x03R."
    ),
)
content(
    "punycode, in a list",
    r"calls _codecs\.encode for more than numbers",
    lambda random: torch_zip(b"\x80\x02c_codecs\nencode\n](X\x01\0\0\0aX\x08\0\0\0punycodeeR."),
)
LATIN1 = b"X\x06\0\0\0latin1\x86R"


def long_text(length: int) -> bytes:
    return b"X" + struct.pack("<I", length) + b"a" * length


content(
    "a long text in latin1, time and again",
    "holds more than 262,144 objects",
    lambda random: torch_zip(
        b"\x80\x02c_codecs\nencode\nq\x00"
        + long_text(2**20)
        + b"q\x01"
        + LATIN1
        + (b"h\x00h\x01" + LATIN1) * 100
        + b"."
    ),
)


def array_set_again(length: int, times: int) -> bytes:
    """The pickle of an array of numbers of one byte, whose content is set time and again."""
    kind = b"cnumpy\ndtype\nX\x02\0\0\0u1\x85R"
    content = b"c_codecs\nencode\n" + long_text(length) + LATIN1
    state = b"(K\x01J" + struct.pack("<i", length) + b"\x85" + kind + b"\x89" + content + b"tq\x02b"
    return b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R" + state + b"h\x02b" * times + b"."


content(
    "array set time and again",
    "holds more than 262,144 objects",
    lambda random: torch_zip(array_set_again(random.randint(2**17, 2**19), 10_000)),
)
content(
    "array of any size",
    "is damaged",
    lambda random: torch_zip(b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R."),
)
content(
    "tuples in tuples", "holds more than 262,144 objects", lambda random: torch_zip(tuples(random.randint(40, 200)))
)
content(
    "Brax, code",
    "holds (posix|nt).system, and was not loaded, because loading it could run code",
    lambda random: brax(pickle.dumps(Calls(os.system, "exit 1"), 2)[2:-1]),
    "model_1.pkl",
)
content("Brax, no array", "holds NoneType at statistics.mean", lambda random: brax(b"N"), "model_1.pkl")
content("Brax, cut", "is damaged", lambda random: cut(brax(b"N"), random) + b".", "model_1.pkl")
content(
    "Brax, shared dicts",
    "holds more than 4,096 entries",
    lambda random: brax(brax_dicts(random.randint(20, 90))),
    "model_1.pkl",
)
content(
    "Brax, dicts in dicts",
    "holds more than 4,096 entries",
    lambda random: brax(b"}X\x06\0\0\0params" * 30_000 + b"N" + b"s" * 30_000),
    "model_1.pkl",
)
content(
    "Brax, a long name",
    "has the key a+ in statistics.mean, and no name of an array",
    lambda random: brax(b"}" + long_text(2**20) + b"Ns"),
    "model_1.pkl",
)
content("dicts in dicts", "holds no state_dict", lambda random: torch_zip(dicts(random.randint(10_000, 50_000))))
content("shared dicts", "holds no state_dict", lambda random: torch_zip(wide_dicts(random.randint(5_000, 10_000))))
content("many objects", "holds more than 262,144 objects", lambda random: torch_zip(b"\x80\x02" + b"\x8f" * 2**20))
content(
    "many objects, legacy",
    "holds more than 262,144 objects",
    lambda random: LEGACY + b"\x80\x02" + b"]" * 2**20,
)
content(
    "long pickle",
    "holds more than 4,194,304 bytes of pickle",
    lambda random: torch_zip(b"\x80\x02X" + struct.pack("<I", 2**23) + bytes(2**23) + b"."),
)
content("long key", "must be finite", lambda random: torch_bytes({"k" * 500_000: torch.tensor([1, float("nan")])}))
content("stack underflow", "is damaged", lambda random: torch_zip(b"\x80\x02RR."))
content("unknown memo", "is damaged", lambda random: torch_zip(b"\x80\x02h\x07."))


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    """The pickle in a torch zip with the last `old` replaced."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    head, _, tail = members[name].rpartition(old)
    return zip_bytes(members | {name: head + new + tail})


THREE = {"w": torch.arange(3.0)}
content(
    "storage that lies",
    "is damaged",
    lambda random: patched(torch_bytes(THREE), b"cpuq\x06K\x03", b"cpuq\x06J\xff\xff\xff\x7f"),
)
content(
    "shape that lies", "is damaged", lambda random: patched(torch_bytes(THREE), b"K\x03\x85", b"J\xff\xff\xff\x7f\x85")
)
content(
    "shape that lies, legacy",
    "is damaged",
    lambda random: torch_bytes(THREE, legacy=True).replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85"),
)
content(
    "storage that lies, legacy",
    "is damaged",
    lambda random: torch_bytes(THREE, legacy=True).replace(b"K\x03N", b"\x8a\x06" + bytes(5) + b"\x01N"),
)
content("stride 0", "has fewer numbers than its shape", lambda random: torch_bytes({"w": torch.ones(1).expand(10**15)}))
content("sparse", "w is sparse", lambda random: torch_bytes({"w": torch.eye(3).to_sparse()}))
content("meta", "w is on the device meta", lambda random: torch_bytes({"w": torch.empty(10**15, device="meta")}))
content("complex", "w is torch.complex64", lambda random: torch_bytes({"w": torch.ones(2, dtype=torch.complex64)}))
content(
    "beyond float32",
    "w must fit float32",
    lambda random: torch_bytes({"w": torch.full((2,), 1e300, dtype=torch.float64)}),
)
content("NaN", "w must be finite", lambda random: torch_bytes({"w": torch.full((3,), float("nan"))}))
content(
    "step beyond an int",
    r"says iter .*, which must lie in \[0, 2\^63\)",
    lambda random: torch_bytes({"state_dict": THREE, "iter": 2 ** random.randint(63, 99)}),
)
content(
    "two paths of one name",
    "two tensors under one name, a.b.c",
    lambda random: torch_bytes({"a": {"b.c": torch.ones(1)}, "a.b": {"c": torch.ones(2)}}),
)
content(
    "two keys of one name",
    "two tensors under one name, 0",
    lambda random: torch_bytes({0: torch.ones(1), "0": torch.ones(2)}),
)


# Zips.
def declared(size: int) -> bytes:
    """A zip whose member says that it unpacks to `size` bytes."""
    data = zip_bytes({"policy.pth": b"x" * 100, "data": b"{}"})
    i = data.index(b"PK\x01\x02")
    return data[: i + 24] + struct.pack("<I", size) + data[i + 28 :]


def overlapping(count: int) -> bytes:
    """A zip of `count` members that are one and the same megabyte."""
    data = zip_bytes({"policy.pth": bytes(2**20), "0000": bytes(2**20)}, zipfile.ZIP_DEFLATED)
    end = data.index(b"PK\x05\x06")
    entry = data[data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1) : end]
    start = data.index(b"PK\x01\x02")
    entries = data[start:end] + b"".join(entry.replace(b"0000", b"%04d" % i) for i in range(1, count))
    sizes = struct.pack("<HHIIH", count + 1, count + 1, len(entries), start, 0)
    return data[:start] + entries + b"PK\x05\x06\0\0\0\0" + sizes


def many_members(count: int) -> bytes:
    entries = b"PK\x01\x02" * count
    return b"PK\x03\x04" + entries + b"PK\x05\x06\0\0\0\0" + struct.pack("<HHIIH", 65535, 65535, len(entries), 4, 0)


def twice() -> bytes:
    data = zip_bytes({"policy.pth": b"x", "policy.ptX": b"y"})
    return data.replace(b"policy.ptX", b"policy.PTH")


content(
    "zip bomb",
    "unpacks to 68,157,442, and was not unpacked",
    lambda random: zip_bytes({"policy.pth": bytes(65 * 2**20), "data": b"{}"}, zipfile.ZIP_DEFLATED),
    "model_1.zip",
)
content(
    "torch zip bomb",
    "unpacks to .*, and was not unpacked",
    lambda random: zip_bytes({"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(65 * 2**20)}, zipfile.ZIP_DEFLATED),
)
content("zip that says too much", "unpacks to 4,000,000,002", lambda random: declared(4_000_000_000), "model_1.zip")
content(
    "zip that says a little too much", "is damaged", lambda random: declared(random.randint(101, 10**6)), "model_1.zip"
)
content("overlapping members", "unpacks to", lambda random: overlapping(random.randint(100, 500)), "model_1.zip")
content(
    "many members",
    "is a zip of more than 20,000 members",
    lambda random: many_members(random.randint(20_001, 10**6)),
    "model_1.zip",
)
content("one member twice", r"two members named policy\.pth", lambda random: twice(), "model_1.zip")
content(
    "bzip2",
    "is neither stored nor deflated",
    lambda random: zip_bytes({"policy.pth": b"x"}, zipfile.ZIP_BZIP2),
    "model_1.zip",
)
content(
    "encrypted", "is damaged: .*encrypted", lambda random: encrypted(zip_bytes({"policy.pth": b"x"})), "model_1.zip"
)
content(
    "large settings",
    "settings, its member data; at most 33,554,432",
    lambda random: sb3_zip(random, b"[" + b"[]," * 12_000_000 + b"1]"),
    "model_1.zip",
)
content(
    "nested settings", "is damaged", lambda random: sb3_zip(random, b"[" * random.randint(10**5, 10**6)), "model_1.zip"
)
content(
    "settings of another kind", "the settings, is no JSON object", lambda random: sb3_zip(random, b"[1]"), "model_1.zip"
)
content(
    "long number in settings",
    "is damaged",
    lambda random: sb3_zip(random, b'{"num_timesteps": ' + b"9" * 5000 + b"}"),
    "model_1.zip",
)


def two_directories() -> bytes:
    """A zip with another one before it, in which torch finds other members than zipfile does."""
    behind = torch_bytes(THREE)
    return torch_zip(called("builtins bytearray", b"K\x01"))[:-22] + behind


def encrypted(data: bytes) -> bytes:
    """The zip with the flag of an encrypted member."""
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        i = data.index(signature) + offset
        data = data[:i] + b"\x01" + data[i + 1 :]
    return data


# safetensors.
def safe(header: Any, data: bytes = bytes(12)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one_tensor(**changes: Any) -> bytes:
    return safe({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]} | changes})


for kind, make in {
    "header that lies": lambda random: struct.pack("<Q", random.randint(2**26, 2**63)) + b"{}",
    "header cut": lambda random: struct.pack("<Q", 1000) + b'{"w":',
    "header no JSON": lambda random: safe(b"{" + random.randbytes(50)),
    "header nested": lambda random: safe(b'{"w":' + b"[" * random.randint(10**5, 10**6)),
    "offsets beyond the end": lambda random: one_tensor(shape=[2**40], data_offsets=[0, 2**42]),
    "shape that overflows": lambda random: one_tensor(shape=[2**40, 2**40]),
    "shape that lies": lambda random: one_tensor(shape=[random.randint(4, 2**40)]),
    "dtype of no kind": lambda random: one_tensor(dtype="F33"),
    "hole": lambda random: safe({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}),
    "eight bytes": lambda random: random.randbytes(8),
}.items():
    content(f"safetensors, {kind}", "is damaged", make, "model_1.safetensors")
content(
    "safetensors, NaN",
    "w must be finite",
    lambda random: safe({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, struct.pack("<f", float("nan"))),
    "model_1.safetensors",
)


# What is no file, or no file that stays the same.
@hostile("folder", "model_1.pt is no file but a folder")
def _(folder: Path, random: random.Random) -> Path:
    (folder / "model_1.pt").mkdir()
    return folder


@hostile("pipe", "is no file but a pipe")
def _(folder: Path, random: random.Random) -> Path:
    os.mkfifo(folder / "model_1.pt")
    return folder / "model_1.pt"


@hostile("pipe in a folder", "is no file but a pipe")
def _(folder: Path, random: random.Random) -> Path:
    os.mkfifo(folder / "model_1.pt")
    return folder


@hostile("socket", "is no file but a socket")
def _(folder: Path, random: random.Random) -> Path:
    here = os.getcwd()
    os.chdir(folder)  # a socket's address is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("model_1.pt")
    os.chdir(here)
    return folder


def link(kind: str, pattern: str, target: str) -> None:
    """Enter a link, in a folder that is imported."""

    def maker(folder: Path, random: random.Random) -> Path:
        (folder / "model_1.pt").symlink_to(target)
        return folder

    HOSTILE[kind] = maker, pattern


link("device", "is no file but a device", "/dev/zero")
link("link to nothing", "there is no checkpoint file .*model_1.pt", "nowhere")
link("link to itself", "model_1.pt: Too many levels of symbolic links", "model_1.pt")
link("file that grows", "model_1.pt changed while it was read", "/proc/self/maps")  # it has 0 bytes until it is read
link("file that fails", "model_1.pt", "/proc/self/mem")  # reading its first byte does


@hostile("sparse file", "has 1,099,511,627,776 bytes, and was not read")
def _(folder: Path, random: random.Random) -> Path:
    (folder / "model_1.pt").touch()
    os.truncate(folder / "model_1.pt", 2**40)
    return folder / "model_1.pt"


# Names, of files and keys, that do not print.
for kind, name in {
    "new line": "model\n_1.pt",
    "terminal escape": "model\x1b[31m_1.pt",
    "not UTF-8": os.fsdecode(b"model_\xff_1.pt"),
    "right to left": "model_\u202etp.1.pt",
    "long": "m" * 240 + "_1.pt",
}.items():
    content(f"name: {kind}", "model|m{240}", lambda random: random.randbytes(50), name)
content(
    "key: terminal escape",
    r"\\x1b\[2J\\nw must be finite",
    lambda random: torch_bytes({"\x1b[2J\nw": torch.tensor([float("nan")])}),
)
content(
    "key: surrogate", r"\\ud800 must be finite", lambda random: torch_bytes({"\ud800": torch.tensor([float("nan")])})
)


def make(kind: str, folder: Path, seed: int = 0) -> Path:
    """Make one file of a kind in an empty folder, and return what to import."""
    return HOSTILE[kind][0](folder, random.Random(seed))
