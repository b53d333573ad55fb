"""Outputs: claimed by one process, made under a temporary name, and renamed once they are complete.

    .NAME.claim     locked by the process that makes NAME, and names that process; the lock ends with the process
    .NAME.partial   NAME until it is complete

So a NAME made this way never exists in part, a command that was interrupted can simply run again, and of two processes
that make the same output one is refused. A collection's store and a run's folder are filled in place instead. Where the
file system has no locks, a warning says so."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from tipl.files.locations import Location, file_in_the_way, make_folder, naming, remove_folder
from tipl.files.manifest import write_manifest

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF)  # EBADF: a folder on NFS
_LEFT_BEHIND = re.compile(r"\.(?P<name>.+)\.\d+\.partial")  # names that `locations.written_aside` gives


class OutputInUse(RuntimeError):
    """Another process is making the output, or has the store open."""


@contextlib.contextmanager
def published(output: Path, command: str, *, manifest: bool = True, resumable: bool = False) -> Iterator[Path]:
    """Yield the temporary name under which `command` makes `output`, a file or a folder; on success, rename it.

    A folder gets a manifest, unless `manifest` is False because its files have checksums of their own. After a failure
    the partial output is removed or, if `resumable`, kept for the next call.

    Raises FileExistsError where `output` exists, OutputInUse where another process is making it.
    """
    refuse_existing(output, command)
    with claimed(output, command):
        refuse_existing(output, command)  # another process may have made it since the first check
        with made_aside(output, resumable=resumable) as aside:
            yield aside
            if manifest and aside.is_dir():
                write_manifest(aside)


@contextlib.contextmanager
def made_aside(output: Path, *, resumable: bool = False) -> Iterator[Path]:
    """Yield the temporary name under which to make `output`, which this process has claimed; on success, rename it."""
    aside = output.with_name(f".{output.name}.partial")
    if resumable:
        remove_left_behind(aside)
    else:
        remove(aside)
    try:
        yield aside
        aside.rename(output)
    except BaseException:
        if not resumable:
            with contextlib.suppress(OSError):
                remove(aside)
        raise


def refuse_existing(output: Location, command: str) -> None:
    """Raise FileExistsError where `output` exists, and what `check_output` does."""
    check_output(output, command)
    if output.exists():
        remove_dead_claim(output)
        raise FileExistsError(f"{command}: output {output} exists already; choose another one or remove it")


def check_output(output: Location, command: str, name: str = "output") -> None:
    """Raise ValueError where an output, the argument `name`, is no path to something new, as . and / are not;
    NotADirectoryError where a file is in the place of a folder above it.
    """
    if not isinstance(output, Path):
        return
    if output.name in ("", ".."):
        raise ValueError(f"{command}: {name} must end in the name of what is made, such as runs/new, got '{output}'")
    if file := file_in_the_way(output.parent):
        raise NotADirectoryError(f"{command}: {name} {output} cannot be made: {file} is a file, not a folder")


def remove_dead_claim(output: Location) -> None:
    """Remove the claim file of a process that died after publishing `output`."""
    if isinstance(output, Path) and _claim_of(output).exists():
        with contextlib.suppress(OSError, OutputInUse), claimed(output, "this one"):
            pass


@contextlib.contextmanager
def claimed(output: Location, command: str) -> Iterator[None]:
    """Keep other processes from making `output` as long as the context lasts. At a URL this has no effect.

    Folders above it are made, and removed again if nothing has been made in them.

    Raises OutputInUse, which names the other process, where one has claimed it, and what `check_output` does.
    """
    if not isinstance(output, Path):
        yield
        return
    check_output(output, command)
    with _folders_above(output), _claim(output, command):
        yield


@contextlib.contextmanager
def _folders_above(output: Path) -> Iterator[None]:
    """Make the folders above `output`; in the end remove those that were made here and are empty."""
    missing = [folder for folder in output.parents if not folder.exists()]
    try:
        make_folder(output.parent)
        yield
    finally:
        with contextlib.suppress(OSError):  # of the first that is not empty
            for folder in missing:
                folder.rmdir()


@contextlib.contextmanager
def _claim(output: Path, command: str) -> Iterator[None]:
    path = _claim_of(output)
    file = _locked_file(path, output, command)
    try:
        with contextlib.suppress(OSError):  # on a full disk the claim is valid, but names no process
            os.ftruncate(file, 0)
            os.write(file, json.dumps({"pid": os.getpid(), "host": platform.node(), "command": command}).encode())
            remove_left_behind(output.parent, output.name)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while the lock is still held, so that no other process can have claimed this file
        with contextlib.suppress(OSError):
            os.close(file)


def _locked_file(path: Path, output: Path, command: str) -> int:
    """Return the open, locked file of the claim at `path`."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OSError(error.errno, f"{command}: cannot write here: {error.strerror}", str(output)) from error
        try:
            with naming(output):
                has_locks = lock(file, fcntl.LOCK_EX, output)
            if not has_locks:
                return file
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    return file
        except BlockingIOError:
            holder = _holder(file)
            os.close(file)
            raise OutputInUse(
                f"{command}: {output} is being written by {holder}; wait for it, or choose another"
            ) from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # between opening and locking, the claim ended and its file was removed: try again


def lock(file: int, kind: int, output: Path) -> bool:
    """Lock an open file, shared or exclusive, and return True; where the file system has no locks, warn, return False.

    Raises BlockingIOError where another process holds the lock.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)  # the system releases it if the process dies
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"{output} lies on a file system without locks: nothing keeps two processes from writing it at once",
            stacklevel=1,
        )
        return False
    return True


def _holder(file: int) -> str:
    """Return the process that holds the claim, in words. The claim names it shortly after it was locked."""
    for _ in range(50):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            owner = json.loads(os.pread(file, 4096, 0))
            return f"process {owner['pid']} on {owner['host']} (tipl {owner['command']})"
        time.sleep(0.01)
    return "another process"


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        remove_folder(path)
    else:
        path.unlink(missing_ok=True)


def remove_left_behind(folder: Path, name: str | None = None) -> None:
    """Remove half-written files of dead processes from a folder: all of them, or those of the output `name`.

    This process must have claimed the outputs.
    """
    for path in folder.glob(".*.partial"):
        found = _LEFT_BEHIND.fullmatch(path.name)
        if found and name in (None, found["name"], found["name"].removeprefix(".").removesuffix(".partial")):
            path.unlink(missing_ok=True)


def _claim_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.claim")
