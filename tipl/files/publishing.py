"""Outputs: claimed by one process while they are made, made aside, and published whole.

    .NAME.claim     locked by the process that makes NAME, and says which one that is; the lock ends with the process
    .NAME.partial   NAME before it is complete: then it is renamed

So nothing stands at its place before it is complete, no command that was cut off is in the way of its own rerun, and of
two that make the same output one is refused. Where the file system has no locks, a warning says so.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from tipl.files.locations import Location, make_folder, naming
from tipl.files.manifest import write_manifest

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF)  # EBADF: a folder on NFS
_LEFT_BEHIND = re.compile(r"\.(?P<name>.+)\.\d+\.partial")  # by `locations.written_aside`


class OutputInUse(RuntimeError):
    """Another process is making the output, or has the store open."""


@contextlib.contextmanager
def published(output: Path, command: str, *, manifest: bool = True, resumable: bool = False) -> Iterator[Path]:
    """Give the name under which `command` makes `output`, a file or a folder, and publish that when all is well.

    A folder gets a manifest, unless the caller sees to its checksums. What a failure leaves is removed or, if
    `resumable`, kept, and given to the next call.

    Raises FileExistsError where `output` exists, OutputInUse where another process is making it.
    """
    refuse_existing(output, command)
    make_folder(output.parent)
    with claimed(output, command):
        refuse_existing(output, command)  # another process may have been faster
        with made_aside(output, resumable=resumable) as aside:
            yield aside
            if manifest and aside.is_dir():
                write_manifest(aside)


@contextlib.contextmanager
def made_aside(output: Path, *, resumable: bool = False) -> Iterator[Path]:
    """Give the name under which to make `output`, which this process has claimed, and rename it when all is well."""
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
    """Raise FileExistsError where `output` exists."""
    if output.exists():
        remove_dead_claim(output)
        raise FileExistsError(f"{command}: output {output} exists already; choose another one or remove it")


def remove_dead_claim(output: Location) -> None:
    """Remove the claim of a process that died when it had published `output`."""
    if isinstance(output, Path) and _claim_of(output).exists():
        with contextlib.suppress(OSError, OutputInUse), claimed(output, "this one"):
            pass


@contextlib.contextmanager
def claimed(output: Location, command: str) -> Iterator[None]:
    """Keep all other processes from making `output` as long as the context lasts; behind a URL nothing can.

    Raises OutputInUse, which says who has it, where another process has claimed it.
    """
    if not isinstance(output, Path):
        yield
        return
    make_folder(output.parent)
    path = _claim_of(output)
    file = _locked_file(path, output, command)
    try:
        with contextlib.suppress(OSError):  # on a full disk a claim names nobody, and is one all the same
            os.ftruncate(file, 0)
            os.write(file, json.dumps({"pid": os.getpid(), "host": platform.node(), "command": command}).encode())
            remove_left_behind(output.parent, output.name)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before the lock is given up: nobody can have the file
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
        os.close(file)  # the claim was given up, and its file removed, between opening and locking


def lock(file: int, kind: int, output: Path) -> bool:
    """Lock an open file, shared or exclusive, and return True; where nothing can be locked, warn and return False.

    Raises BlockingIOError where another one has it.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)  # dropped by the system if the process dies
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
    """Return who has the claim; it says so some moments after it was locked."""
    for _ in range(50):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            owner = json.loads(os.pread(file, 4096, 0))
            return f"process {owner['pid']} on {owner['host']} (tipl {owner['command']})"
        time.sleep(0.01)
    return "another process"


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_left_behind(folder: Path, name: str | None = None) -> None:
    """Remove half-written files that dead processes left in a folder, all or those of the output `name`.

    This process must have claimed what they were to become.
    """
    for path in folder.glob(".*.partial"):
        found = _LEFT_BEHIND.fullmatch(path.name)
        if found and name in (None, found["name"], found["name"].removeprefix(".").removesuffix(".partial")):
            path.unlink(missing_ok=True)


def _claim_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.claim")
