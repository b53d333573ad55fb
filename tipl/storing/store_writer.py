"""How a store is written: whole files, a trial's chunks before its commit record, and one writer for each trial.

A writer of all trials has exclusive use of the store; a writer of some trials shares it with writers of others. In a
local store it holds locks on folders, which end with the process. Behind a URL nothing can be locked: the caller must
make sure that each trial has only one writer.
"""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from tipl.files.locations import make_folder, naming
from tipl.files.publishing import lock, remove, remove_left_behind
from tipl.storing.store_records import Commit, Trials, trial_name
from tipl.storing.zarr_files import ZarrArray, crc32c

WRITE_THREADS = 8  # more than cores, because they wait for the disk
URL_THREADS = 32  # more still, because they wait for the server

Result = TypeVar("Result")
ReadRows = Callable[[int, ZarrArray, int, int], NDArray[Any]]  # (trial, array, start, stop) -> rows [start, stop)


class StoreInUse(RuntimeError):
    """Another writer has the trials open."""


class Writer:
    """Appends to all trials in `writable` together, so that they have equally many checkpoints."""

    def __init__(self, trials: Trials, writable: range) -> None:
        self.trials, self.writable = trials, writable
        self.num_checkpoints = 0
        self.num_rows = 0  # in the arrays' documents; at least num_checkpoints
        self.commits: dict[int, Commit] = {}
        self.locks: list[int] = []
        if isinstance(trials.path, Path):
            self._lock_all(trials.path)
        num_threads = WRITE_THREADS if isinstance(trials.path, Path) else URL_THREADS
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tipl-store")

    def _lock_all(self, path: Path) -> None:
        try:
            if len(self.writable) == len(self.trials):
                self._lock(path, path, fcntl.LOCK_EX)
            elif self._lock(path, path, fcntl.LOCK_SH):
                for i in self.writable:
                    self._lock(path, path / trial_name(i), fcntl.LOCK_EX)
        except BaseException:
            self._unlock()
            raise

    def _lock(self, store: Path, folder: Path, kind: int) -> bool:
        """Lock a folder, and return False where the file system has no locks."""
        try:
            self.locks.append(os.open(folder, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            raise RuntimeError(f"store {store}: {folder} is missing") from None
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            with naming(folder):
                locked = lock(self.locks[-1], kind, store)
            if os.path.samestat(os.fstat(self.locks[-1]), os.stat(folder)):
                return locked
        raise StoreInUse(f"store {store}: another writer has it open")  # or has just renamed the folder

    def _unlock(self) -> None:
        while self.locks:
            with contextlib.suppress(OSError):
                os.close(self.locks.pop())

    def create_trials(self) -> None:
        """Make trials without checkpoints, after removing everything that a killed process left in the folder."""
        path = self.trials.path
        if isinstance(path, Path):
            for left_behind in path.iterdir():
                remove(left_behind)

        def create(i: int) -> None:
            for array in self.trials.arrays:
                folder = self.trials.folder(i) / array.name
                make_folder(folder)
                array.write_document(folder, 0)
            self._commit(i, Commit(0, {array.name: b"" for array in self.trials.arrays}))

        self.for_each_trial(create)

    def move_to(self, path: Path) -> None:
        """Rename the store's folder; the lock goes with it."""
        assert isinstance(self.trials.path, Path)
        try:
            self.trials.path.rename(path)
        except OSError:
            if path.exists():  # another process has made it in the meantime
                raise FileExistsError(f"create: {path} exists") from None
            raise
        self.trials = dataclasses.replace(self.trials, path=path)

    def load_trials(self, commits: list[Commit], read: ReadRows) -> None:
        """Undo an append committed in only some trials, remove killed writers' partial files, check the last chunks.

        `commits` are the writable trials' records; `read` returns their rows, checked.
        """
        self._remove_left_behind()
        self.num_checkpoints = n = min(commit.num_checkpoints for commit in commits)

        def load(i: int) -> int:
            before = commits[i - self.writable.start]
            commit = Commit(n, {array.name: _checksums_to(i, array, before, n, read) for array in self.trials.arrays})
            if commit == before:
                self.commits[i] = commit
            else:
                self._commit(i, commit)
            folder = self.trials.folder(i)
            return max(array.check_document(folder / array.name, f"trial {i}", n) for array in self.trials.arrays)

        self.num_rows = max(self.for_each_trial(load))
        self.trim()

    def _remove_left_behind(self) -> None:
        path = self.trials.path
        if not isinstance(path, Path):
            return
        folders = [path, path / "resume", path / "training_state"]
        for i in self.writable:
            folder = path / trial_name(i)
            folders += [folder, path / "resume" / trial_name(i), *(folder / array.name for array in self.trials.arrays)]
        for folder in folders:
            remove_left_behind(folder)

    def append(self, columns: tuple[NDArray[Any], ...]) -> None:
        """Append and commit rows; `columns` has one array (N, b, ...) for each of `Trials.arrays`."""
        stop = self.num_checkpoints + columns[0].shape[1]
        grow = stop > self.num_rows
        if grow:
            self.num_rows = max(stop, 2 * self.num_rows)  # doubled, so that documents are rarely rewritten

        def append(i: int) -> None:
            checksums = {}
            for array, column in zip(self.trials.arrays, columns, strict=True):
                if grow:
                    array.write_document(self.trials.folder(i) / array.name, self.num_rows)
                checksums[array.name] = self._append_to(i, array, column[i - self.writable.start])
            self._commit(i, Commit(stop, checksums))

        self.for_each_trial(append)
        self.num_checkpoints = stop

    def _append_to(self, i: int, array: ZarrArray, column: NDArray[Any]) -> bytes:
        """Append to one array of trial i and return the checksums of all its chunks."""
        folder, commit = self.trials.folder(i) / array.name, self.commits[i]
        assert commit.checksums is not None
        checksums = commit.checksums[array.name]
        start = self.num_checkpoints
        for chunk, in_chunk, in_column in array.chunks(start, start + len(column)):
            if in_chunk.start:  # read back: keeping the last chunks of all trials would take too much memory
                committed = commit.of_chunk(array, chunk)
                rows = array.read_chunk(folder, f"trial {i}", chunk, committed=committed)
                rows[in_chunk.stop :] = float(array.fill_value)  # erases rows that a killed writer left
            else:
                committed = None
                rows = array.empty_chunk()
            rows[in_chunk] = column[in_column]
            array.write_chunk(folder, chunk, rows)
            checksum = crc32c(rows[in_chunk], committed[1] if committed else 0)
            checksums = checksums[: 4 * chunk] + checksum.to_bytes(4, "little")
        return checksums

    def _commit(self, i: int, commit: Commit) -> None:
        self.trials.write_commit(i, commit)
        self.commits[i] = commit

    def trim(self) -> None:
        """Set the number of rows in the arrays' documents to that of the committed rows."""

        def trim(i: int) -> None:
            for array in self.trials.arrays:
                array.write_document(self.trials.folder(i) / array.name, self.num_checkpoints)

        if self.num_rows > self.num_checkpoints:
            self.num_rows = self.num_checkpoints
            self.for_each_trial(trim)

    def for_each_trial(self, work: Callable[[int], Result]) -> list[Result]:
        """Return work(i) for every trial, computed on the pool; a failure is raised after all calls have ended."""
        futures = [self.pool.submit(work, i) for i in self.writable]
        wait(futures)
        return [future.result() for future in futures]

    def release(self) -> None:
        """Wait for pending writes, and release the locks."""
        self.pool.shutdown()
        self._unlock()


@contextlib.contextmanager
def released_on_failure(writer: Writer) -> Iterator[Writer]:
    try:
        yield writer
    except BaseException:
        writer.release()
        raise


def _checksums_to(i: int, array: ZarrArray, commit: Commit, num_rows: int, read: ReadRows) -> bytes:
    """Return the checksums of trial i's chunks for its first `num_rows` rows, at most those committed.

    Checksums of full chunks come from the commit record, if it has them; for all others the rows are read.
    """
    full = num_rows // array.chunk_rows
    checksums = b"" if commit.checksums is None else commit.checksums[array.name][: 4 * full]
    for chunk in range(len(checksums) // 4, array.num_chunks(num_rows)):
        start = chunk * array.chunk_rows
        rows = read(i, array, start, min(start + array.chunk_rows, num_rows))
        checksums += crc32c(rows).to_bytes(4, "little")
    return checksums
