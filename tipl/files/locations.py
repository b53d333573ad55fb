"""Local paths and URLs that fsspec knows, such as s3://bucket/cheetah.zarr, behind one set of functions.

Files are written whole or not at all. A local file is written under a temporary name, flushed to disk and renamed; an
object store writes an object atomically. Object stores have no folders to make, and nothing that can be locked.
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

from tipl.files.hub_errors import check_token, means_absence, read_error

Location: TypeAlias = Path | UPath

MAX_BYTES = 2**30
"""Largest file that is read whole when nothing says how large it should be."""
_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def location(path: "str | Location") -> Location:
    """Return a UPath for a URL, a Path for anything else and for file:// URLs.

    Raises ValueError where fsspec has no file system for the URL's scheme, or its package is not installed; OSError
    where the URL's server does not answer or refuses.
    """
    if isinstance(path, UPath) or "://" not in str(path):
        return path if isinstance(path, UPath) else Path(path)
    if str(path).startswith("hf://"):
        with contextlib.suppress(ImportError):  # which is said below
            check_token(str(path))
    try:
        url = UPath(path, use_listings_cache=False)  # other processes write there too
        url.fs.invalidate_cache()  # huggingface_hub's file system has a cache of its own
        exists(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return Path(url.path) if url.protocol in ("file", "local") else url


@contextlib.contextmanager
def _reached(path: UPath) -> Iterator[None]:
    """Raise what the library that reads a URL raises, which may be anything, as an OSError of one line with the URL."""
    try:
        yield
    except (FileNotFoundError, ImportError, ValueError):
        raise
    except Exception as error:
        is_told = isinstance(error, OSError) and not (isinstance(error, PermissionError) and error.errno is None)
        if is_told and path.protocol != "hf":
            raise
        raise read_error(error, str(path)) from error


def exists(path: Location) -> bool:
    """Return whether there is a file or a folder. Raises OSError where the server of a URL does not answer.

    Behind https:// and hf:// it is false also where the server refuses access, as some do to folders and to what is not
    there; `check_access` tells one from the other.
    """
    if isinstance(path, Path):
        return path.exists()
    with _reached(path):
        return path.exists() or (path.protocol in ("http", "https") and _is_served(path))


def _is_served(path: UPath) -> bool:
    """Return whether a web server has the file; fsspec says that it has not also where the server fails or is away."""
    try:
        path.fs.cat_file(path.path, start=0, end=1)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise read_error(error, str(path)) from error
    except Exception as error:
        if getattr(error, "status", 500) < 500:  # S3 answers 403 for what is not there
            return False
        raise
    return True


def check_access(path: Location) -> None:
    """Raise `Unreachable` where the server of a URL refuses access to a file, or does not answer; else do nothing."""
    if isinstance(path, Path):
        return
    with _reached(path):
        try:
            path.fs.info(path.path)
        except FileNotFoundError as error:
            if not means_absence(error):
                raise read_error(error, str(path)) from error


def local_path(path: "str | Location", name: str) -> Path:
    """Return a local path, perhaps given as a file:// URL. Raises ValueError, beginning with `name`, for other URLs."""
    found = location(path) if str(path).startswith("file://") else Path(str(path))
    assert isinstance(found, Path)
    if found.parts and found.parts[0].endswith(":"):
        raise ValueError(f"{name} must be a local path, and {found.parts[0]}//... is a URL")
    return found


def read_file(path: Location, *, max_bytes: int | None = MAX_BYTES) -> bytes:
    """Return the contents of a file.

    Raises OSError where it cannot be read, `Unreachable` where the server of a URL does not answer, and an OSError
    without an errno where a local path is no regular file, has more than `max_bytes` (by None, more than the machine's
    memory), or changes while it is read.
    """
    if not isinstance(path, Path):
        with _reached(path):
            return bytes(path.read_bytes())
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a blocking open of a pipe waits for a writer
    with naming(path), open(file, "rb") as stream:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} must be a regular file")
        limit = _MEMORY if max_bytes is None else max_bytes
        if found.st_size > limit:
            raise OSError(f"{path} must have at most {limit:,} bytes, got {found.st_size:,}")
        data = stream.read(found.st_size + 1)  # one more, to see whether the file grows
        after = os.fstat(file)
        if (len(data), after.st_size, after.st_mtime_ns) != (found.st_size, found.st_size, found.st_mtime_ns):
            raise OSError(f"{path} changed while it was read")
    return data


@contextlib.contextmanager
def naming(path: Location) -> Iterator[None]:
    """Add `path` to an OSError from the system that names no file."""
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
        with _reached(path):
            path.write_bytes(data)


@contextlib.contextmanager
def written_aside(path: Location) -> Iterator[Path]:
    """Yield the name of a local file to write; on leaving it replaces `path`, on a failure it is removed."""
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
            with _reached(path):
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
    """Yield a local file with the contents of `path`: `path` itself, or a copy that is removed on leaving."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        with _reached(path):
            path.fs.get_file(path.path, str(Path(folder) / path.name))
        yield Path(folder) / path.name


def read_into(folder: Location, name: str, buffers: Sequence[Any]) -> int:
    """Read the file `name` into `buffers` (contiguous, writable), one after the other; return the file's size in bytes.

    A file larger than the buffers together is not read completely, or not at all.
    """
    if not isinstance(folder, Path):
        data = memoryview(read_file(folder / name))
        start = 0
        for view in (memoryview(buffer).cast("B") for buffer in buffers):
            part = data[start : start + len(view)]
            view[: len(part)] = part
            start += len(part)
        return len(data)
    path = f"{folder}/{name}"  # called for every chunk: making a Path would take as long as the chunk's checksum
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
    """Read an open file into `views`, one after the other, until either ends; return the number of bytes read."""
    num_bytes = 0
    while views and (read := os.readv(file, views)):  # one call reads at most 2 GiB
        num_bytes += read
        while views and read >= len(views[0]):
            read -= len(views.pop(0))
        if read:
            views[0] = views[0][read:]
    return num_bytes


def make_folder(path: Location) -> None:
    """Make a local folder and its parents unless they exist; at a URL, do nothing.

    Raises NotADirectoryError where a file is in the way.
    """
    if isinstance(path, Path):
        if file := file_in_the_way(path):
            raise NotADirectoryError(f"{file} is a file, not a folder")
        path.mkdir(parents=True, exist_ok=True)


def file_in_the_way(folder: Path) -> Path | None:
    """Return the file that stands in the place of a folder or of one above it; None where there is none."""
    for path in (folder, *folder.parents):
        if os.path.lexists(path):
            return None if path.is_dir() else path
    return None


def remove_folder(path: Location) -> None:
    """Remove a folder with everything in it."""
    if not isinstance(path, Path):
        path.fs.rm(path.path, recursive=True)
        return
    try:
        shutil.rmtree(path)
    except OSError as error:  # which before Python 3.13 names a file without its folder
        if error.errno is None or os.path.dirname(str(error.filename)):
            raise
        raise OSError(error.errno, f"{error.filename}: {error.strerror}", str(path)) from error


def num_bytes(path: Location) -> int:
    """Return the total size of all files in a folder, in bytes."""
    if isinstance(path, Path):
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    with _reached(path):
        return int(path.fs.du(path.path))
