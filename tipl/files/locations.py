"""Where a store lies: a local folder, or one behind a URL that fsspec knows, such as s3://bucket/cheetah.zarr.

Files are written whole or not at all. Locally they are written aside, flushed to disk and renamed; an object store puts
an object at once. What else differs is here too: object stores have no folders, and nothing that can be locked.
"""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from upath import UPath

Location: TypeAlias = Path | UPath

MAX_BYTES = 2**30
"""Of a file that is read whole although nothing says how large it should be."""


def location(path: "str | Location") -> Location:
    """Return where `path` points: a UPath for a URL, a Path for all else, file:// URLs among them.

    Raises ValueError where no file system for the URL's scheme is known, or its package is not installed; OSError where
    the URL's server does not answer, or refuses.
    """
    if isinstance(path, UPath) or "://" not in str(path):
        return path if isinstance(path, UPath) else Path(path)
    try:
        url = UPath(path, use_listings_cache=False)  # others write there too
        url.exists()
    except (ImportError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    except OSError:
        raise
    except Exception as error:  # of the library behind fsspec, which has its own kinds
        raise OSError(f"{path}: {error}") from error
    return Path(url.path) if url.protocol in ("file", "local") else url


def read_file(path: Location, *, max_bytes: int | None = MAX_BYTES) -> bytes:
    """Return what is in a file. Raises OSError where that cannot be read, or is more than `max_bytes`."""
    if not isinstance(path, Path):
        return bytes(path.read_bytes())
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # of a pipe, opening would wait for a writer
    with naming(path), open(file, "rb") as stream:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} must be a regular file")
        if max_bytes is not None and found.st_size > max_bytes:
            raise OSError(f"{path} must have at most {max_bytes:,} bytes, got {found.st_size:,}")
        data = stream.read(found.st_size)
        if len(data) != found.st_size or os.fstat(file).st_size != found.st_size:
            raise OSError(f"{path} changed while it was read")
    return data


@contextlib.contextmanager
def naming(path: Location) -> Iterator[None]:
    """Let an OSError of the system that names no file say that it is of `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or not (error.filename is None or isinstance(error.filename, int)):  # a file's number
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Location, data: bytes) -> None:
    """Write `data` to `path` whole or not at all."""
    if isinstance(path, Path):
        with written_aside(path) as aside:
            aside.write_bytes(data)
    else:
        path.write_bytes(data)


@contextlib.contextmanager
def written_aside(path: Location) -> Iterator[Path]:
    """Give the name of a local file to write, which then becomes `path`; removed on a failure."""
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
            path.fs.put_file(str(Path(folder) / path.name), path.path)
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with naming(path):
            yield aside
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def local_copy(path: Location) -> Iterator[Path]:
    """Give a local file with the content of `path`: itself, or a copy that is then removed."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        path.fs.get_file(path.path, str(Path(folder) / path.name))
        yield Path(folder) / path.name


def read_into(folder: Location, name: str, buffers: Sequence[Any]) -> int:
    """Fill `buffers` (contiguous, writable) with the file `name`, one after the other; return how many bytes it has."""
    if not isinstance(folder, Path):
        data = memoryview((folder / name).read_bytes())
        start = 0
        for view in (memoryview(buffer).cast("B") for buffer in buffers):
            part = data[start : start + len(view)]
            view[: len(part)] = part
            start += len(part)
        return len(data)
    path = f"{folder}/{name}"  # of many: a Path would take as long as a checksum
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(file)
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        if not stat.S_ISREG(found.st_mode) or found.st_size > sum(map(len, views)):
            return found.st_size
        try:
            num_bytes = _fill(file, views)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from error
        if num_bytes != found.st_size or os.fstat(file).st_size != num_bytes:
            raise OSError(f"{path} changed while it was read")
        return num_bytes
    finally:
        os.close(file)


def _fill(file: int, views: list[memoryview]) -> int:
    """Read an open file into `views`, one after the other, until it ends; return how many bytes came."""
    num_bytes = 0
    while views and (read := os.readv(file, views)):  # 2 GiB at most, in one call
        num_bytes += read
        while views and read >= len(views[0]):
            read -= len(views.pop(0))
        if read:
            views[0] = views[0][read:]
    return num_bytes


def make_folder(path: Location) -> None:
    """Make a folder and its parents, unless it is there. An object store has none to make."""
    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)


def remove_folder(path: Location) -> None:
    """Remove a folder with all that is in it."""
    if isinstance(path, Path):
        shutil.rmtree(path)
    else:
        path.fs.rm(path.path, recursive=True)


def num_bytes(path: Location) -> int:
    """Return the bytes of all files in a folder."""
    if isinstance(path, Path):
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return int(path.fs.du(path.path))
