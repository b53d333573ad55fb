"""The trajectory store: the checkpoints of many trials on disk, as a Zarr v3 hierarchy that survives crashes.

    zarr.json                     group: what was run (env_id, env_kwargs, policy, ...); written once, after all trials
    trial_0000/zarr.json          group: the commit record, num_checkpoints = T (`store_records.py`)
    trial_0000/weights            (T, p) float32, in chunks of about 256 KiB; not compressed, as weights are noise
    trial_0000/env_steps          (T,) int64
    trial_0000/episodic_return    (T,) float64, NaN before the first episode has ended
    resume/                       saved states of an unfinished collection (`resume.py`)
    training_state/               what a recorded run's training needs to go on (`run_state.py`)

Every file is written under a temporary name, flushed to disk and renamed. Chunks and groups carry checksums
(`zarr_files.py`), and a commit record has the checksums of its trial's chunks, so that a misplaced chunk is detected.
An append (`store_writer.py`) writes a trial's chunks first and its commit record last. Rows beyond num_checkpoints do
not count, and the next append overwrites them. So a killed process or a full disk loses only the current append. A new
store is made as .NAME.partial and then renamed. Directories are not flushed: after a power failure the last appends may
be lost on a file system that keeps renames in order (ext4, XFS); on others committed rows may be lost as well, which
reading them reports.

A store may lie behind a URL (`locations.py`): objects are written whole, and the root's group is written last, which
makes the store complete. Several writers may append to one store at once, each to trials of its own.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray

from tipl.files.locations import Location, check_access, exists, location, make_folder, remove_folder
from tipl.files.schema import plain_json
from tipl.policy import Layout
from tipl.storing.store_records import FORMAT, VERSION, StoreRecord, Trials, read_store_record, store_digest, trial_name
from tipl.storing.store_writer import URL_THREADS, Writer, released_on_failure
from tipl.storing.zarr_files import ZarrArray, write_group

CHUNK_BYTES = 2**18

Result = TypeVar("Result")

UNKNOWN = "unknown"
"""The env_id of runs whose task nobody has said."""

UNNORMALISED = "unnormalised"
"""Entry of the config's "source": True where the policies saw observations through VecNormalize and the store lacks the
statistics, or in words what else lay between them and the environment, so that they cannot be run."""


class Store:
    """A store open for reading and, from `create` or `open(writable=True)`, for appending: one writer at a time."""

    def __init__(self, path: Location, record: StoreRecord, digest: str) -> None:
        """Not for callers: use `create` or `open`."""
        self.path = path
        self.env_id, self.seeds, self.config, self.policy = record.env_id, record.seeds, record.config, record.layout
        self.env_kwargs = record.env_kwargs
        """Arguments with which the runs' environment was made, beside its id; plain JSON."""
        self.digest = digest
        """Digest of the root's attributes, by which other files say that they belong to this store."""
        self.trials = Trials(path, record.seeds, digest, record.arrays)
        self._writer: Writer | None = None

    @classmethod
    def create(
        cls,
        path: str | Location,
        *,
        env_id: str,
        policy: Layout,
        seeds: Sequence[int],
        config: dict[str, Any],
        env_kwargs: Mapping[str, Any] | None = None,
    ) -> "Store":
        """Return a new store at `path` with one empty trial for each seed, open for appending.

        `config`, and `env_kwargs`, further arguments of the environment, are plain JSON.

        Raises FileExistsError, and changes nothing, where `path` exists; ValueError or TypeError for other arguments.
        """
        path = location(path)
        if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
            raise ValueError(f"create: seeds must be one non-negative int a trial, got {seeds!r}")
        if not isinstance(env_id, str) or not isinstance(config, dict):
            kinds = f"{type(env_id).__name__} and {type(config).__name__}"
            raise TypeError(f"create: env_id must be a str and config a dict, got {kinds}")
        attributes = {
            "format": FORMAT,
            "version": VERSION,
            "env_id": env_id,
            "policy": policy.to_dict(),
            "seeds": list(seeds),
            "config": config,
            "chunk_rows": max(1, CHUNK_BYTES // (4 * policy.num_params)),
            **({"env_kwargs": dict(env_kwargs)} if env_kwargs else {}),
        }
        attributes = plain_json("create: env_kwargs and config", attributes)  # with the types that a reader will see
        store = cls(path, StoreRecord(**attributes), store_digest(attributes))
        if path.exists():
            raise FileExistsError(f"create: {path} exists")
        # Renamed when complete, so that a killed process leaves a whole store or none; behind a URL the group, written
        # last, has the same effect.
        aside = path.with_name(f".{path.name}.partial") if isinstance(path, Path) else path
        make_folder(aside)
        trials = dataclasses.replace(store.trials, path=aside)
        with released_on_failure(Writer(trials, range(len(seeds)))) as writer:
            try:
                writer.create_trials()
                write_group(aside, attributes)
                if isinstance(path, Path):
                    writer.move_to(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    remove_folder(aside)
                raise
        store._writer = writer
        return store

    @classmethod
    def open(cls, path: str | Location, *, writable: bool | range = False) -> "Store":
        """Return the store at `path`. A damaged trial raises only when it is read; the other trials can still be read.

        With `writable`, all trials or those of a range are open for appending. An append that a crash left committed in
        only some of these trials is undone, so that all of them have equally many checkpoints.

        Raises FileNotFoundError where there is no store; ConnectionError where the server of a URL does not answer or
        refuses access; RuntimeError where the store is damaged or of another version; StoreInUse, a RuntimeError, where
        another writer has the writable trials open.
        """
        path = location(path)
        if not exists(path / "zarr.json") and not exists(path / trial_name(0)):
            check_access(path / "zarr.json")
            raise FileNotFoundError(f"open: there is no trajectory store at {path}")
        store = cls(path, *read_store_record(path))
        if writable:
            trials = range(store.num_trials) if writable is True else writable
            if not 0 <= trials.start < trials.stop <= store.num_trials or trials.step != 1:
                raise ValueError(f"open: writable must be a range of the {store.num_trials} trials, got {writable}")
            with released_on_failure(Writer(store.trials, trials)) as writer:
                opened = {i: store.trial(i) for i in trials}
                writer.load_trials([trial.commit for trial in opened.values()], lambda i, *rows: opened[i]._read(*rows))
            store._writer = writer
        return store

    @property
    def is_unnormalised(self) -> bool:
        """Whether the policies saw other observations than the environment's, or their actions were changed, in ways
        that the store does not hold: none can be run."""
        return bool((self.config.get("source") or {}).get(UNNORMALISED))

    @property
    def env(self) -> str:
        """The environment in words: its id and, as JSON, the arguments that it was made with."""
        return env_of(self.env_id, self.env_kwargs)

    @property
    def num_trials(self) -> int:
        return len(self.seeds)

    def __len__(self) -> int:
        return self.num_trials

    @property
    def num_checkpoints(self) -> int:
        """Checkpoints that every trial has. After a crash some trials may have more, by one append."""
        return min(self.commits(range(self.num_trials)))

    def commits(self, trials: Iterable[int]) -> list[int]:
        """Return the number of committed checkpoints of each of these trials."""
        return self._for_trials(lambda i: self.trials.read_commit(i).num_checkpoints, trials)

    def _for_trials(self, read: Callable[[int], Result], trials: Iterable[int]) -> list[Result]:
        """Return read(i) for each trial; behind a URL many at a time, because each call waits for the server."""
        if isinstance(self.path, Path):
            return [read(i) for i in trials]
        with ThreadPoolExecutor(URL_THREADS, thread_name_prefix="tipl-store") as pool:
            return list(pool.map(read, trials))

    def trial(self, i: int) -> "Trial":
        """Return trial i as it is now; it does not show later appends. Raises RuntimeError where it is damaged."""
        if not 0 <= i < self.num_trials:
            raise IndexError(f"trial: i must lie in [0, {self.num_trials}), got {i}")
        return Trial(self.trials, i)

    def append(
        self, weights: NDArray[np.float32], env_steps: NDArray[np.int64], episodic_return: NDArray[np.float64]
    ) -> None:
        """Append b checkpoints to each of the N trials that are open for appending.

        weights (N, b, p), env_steps (N, b), episodic_return (N, b).

        When this returns, they are on disk and committed. TypeError or ValueError refuses wrong or non-finite input;
        then nothing is written. OSError while writing closes the store: `open` it again to continue from the last
        commit.
        """
        if self._writer is None:
            raise ValueError(f"append: {self.path} is not open for appending")
        columns, trials = (weights, env_steps, episodic_return), self._writer.writable
        b = weights.shape[1] if isinstance(weights, np.ndarray) and weights.ndim == 3 else 1
        for array, column in zip(self.trials.arrays, columns, strict=True):
            if not isinstance(column, np.ndarray) or column.dtype != array.dtype:
                kind = column.dtype if isinstance(column, np.ndarray) else type(column).__name__
                raise TypeError(f"append: {array.name} must be an array of {array.data_type}, got {kind}")
            if column.shape != (len(trials), b, *array.row_shape):
                expected = f"{'(N, b, p)' if array.row_shape else '(N, b)'} = {(len(trials), b, *array.row_shape)}"
                raise ValueError(f"append: {array.name} must have shape {expected}, got {column.shape}")
        for name, valid, rule in (
            ("weights", np.isfinite(weights).all(-1), "finite"),
            ("env_steps", env_steps >= 0, "non-negative"),
            ("episodic_return", ~np.isinf(episodic_return), "finite or NaN"),
        ):
            if not valid.all():
                i, row = np.argwhere(~valid)[0]
                raise ValueError(f"append: {name} must be {rule}, but row {row} of trial {trials[i]} is not")
        with released_on_failure(self._writer) as writer:
            self._writer = None
            writer.append(columns)
            self._writer = writer

    def close(self) -> None:
        """Cut the arrays to the committed rows, and let another writer open the store. It can still be read."""
        if self._writer is not None:
            with released_on_failure(self._writer) as writer:
                self._writer = None
                writer.trim()
            writer.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}: {self.num_trials} trials of {self.env}, p = {self.policy.num_params})"

    def fingerprint(self) -> str:
        """Return a hash of the store's contents: its settings and the committed checksums of each trial's chunks.

        For trials that an older tipl wrote, without checksums, only the number of checkpoints counts.
        """
        commits = self._for_trials(self.trials.read_commit, range(len(self)))
        sums = [[name, data.hex()] for commit in commits for name, data in (commit.checksums or {}).items()]
        document = [self.digest, [commit.num_checkpoints for commit in commits], sums]
        return hashlib.sha256(json.dumps(document).encode()).hexdigest()

    def summary(self) -> str:
        """Return one line: numbers of trials, checkpoints and weights, megabytes, and the trials' mean last return."""
        p = self.policy.num_params
        found = self._for_trials(lambda i: _last_return(self.trial(i)), range(self.num_trials))
        counts = [count for count, _ in found]
        low, high = min(counts), max(counts)
        returns = [value for _, value in found if not np.isnan(value)]
        return (
            f"{self.env}: {self.num_trials} trials x {low if low == high else f'{low} to {high}'} checkpoints x {p} "
            f"weights, {sum(counts) * p * 4 / 1e6:.1f} MB, "
            f"mean last return {f'{np.mean(returns):.1f}' if returns else 'unknown'}"
        )

    def zarr_group(self) -> zarr.Group:
        """Return the same data as a read-only zarr-python group, for tools that work with Zarr.

        While the store is being written, or after a crash, its arrays have rows of fill values after num_checkpoints.
        """
        if isinstance(self.path, Path):
            return zarr.open_group(self.path, mode="r", zarr_format=3)
        options = dict(self.path.storage_options)
        return zarr.open_group(str(self.path), mode="r", zarr_format=3, storage_options=options)


class Trial:
    """The trajectory of one trial, T = num_checkpoints rows, read from disk on demand.

    Every method raises RuntimeError, naming the rows and the file, where the data to return is damaged.
    """

    def __init__(self, trials: Trials, index: int) -> None:
        """Not for callers: use `Store.trial`."""
        self.index, self.seed = index, trials.seeds[index]
        self.folder = trials.folder(index)
        self.commit = trials.read_commit(index)
        self._weights, self._env_steps, self._episodic_return = trials.arrays
        self._last_chunk: dict[str, tuple[int, NDArray[Any]]] = {}  # so that small blocks read a chunk once
        for array in trials.arrays:
            array.check_document(self.folder / array.name, f"trial {index}", self.num_checkpoints)

    @property
    def num_checkpoints(self) -> int:
        return self.commit.num_checkpoints

    @property
    def chunk_rows(self) -> int:
        """Checkpoints in one chunk, the smallest unit read from disk."""
        return self._weights.chunk_rows

    def weights(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Return the checkpoints [start, stop), (stop - start, p)."""
        stop = self.num_checkpoints if stop is None else stop
        if not 0 <= start <= stop <= self.num_checkpoints:
            bounds = f"0 <= start <= stop <= {self.num_checkpoints}"
            raise ValueError(f"weights: must have {bounds}, got start = {start}, stop = {stop}")
        return self._read(self._weights, start, stop)

    def blocks(self, rows: int) -> Iterator[NDArray[np.float32]]:
        """Yield all weights in order, (rows, p) at a time; the last block may be shorter. Every chunk is read once."""
        if rows < 1:
            raise ValueError(f"blocks: rows must be positive, got {rows}")
        for start in range(0, self.num_checkpoints, rows):
            yield self._read(self._weights, start, min(start + rows, self.num_checkpoints))

    @property
    def env_steps(self) -> NDArray[np.int64]:
        """Environment steps before each checkpoint, (T,)."""
        return self._read(self._env_steps, 0, self.num_checkpoints)

    @property
    def episodic_return(self) -> NDArray[np.float64]:
        """Mean return of the last episodes that ended before each checkpoint, (T,); NaN before the first has ended."""
        return self._read(self._episodic_return, 0, self.num_checkpoints)

    def __repr__(self) -> str:
        return f"Trial({self.index}: {self.num_checkpoints} checkpoints, seed {self.seed})"

    def _read(self, array: ZarrArray, start: int, stop: int) -> NDArray[Any]:
        out = np.empty((stop - start, *array.row_shape), array.dtype)
        folder, owner = self.folder / array.name, f"trial {self.index}"
        for index, in_chunk, in_out in array.chunks(start, stop):
            rows = out[in_out]
            last, chunk = self._last_chunk.get(array.name, (-1, rows))
            committed = self.commit.of_chunk(array, index)
            if last != index and len(rows) == array.chunk_rows:
                array.read_chunk(folder, owner, index, rows, committed=committed)
            else:
                if last != index:
                    chunk = array.read_chunk(folder, owner, index, committed=committed)
                    self._last_chunk[array.name] = index, chunk
                rows[:] = chunk[in_chunk]
            if committed is None and array.holds_fill(rows):
                which = f"{start + in_out.start}:{start + in_out.stop}"
                raise RuntimeError(f"{owner}: {array.name} rows {which} are committed but not on disk")
        return out


def env_of(env_id: str, env_kwargs: Mapping[str, Any]) -> str:
    """Return an environment in words: its id and, as JSON, the arguments that it was made with."""
    return env_id + (f" {json.dumps(env_kwargs, sort_keys=True)}" if env_kwargs else "")


def _last_return(trial: Trial) -> tuple[int, float]:
    """Return the number of checkpoints and the last one's return, NaN where that is not known."""
    return trial.num_checkpoints, float(trial.episodic_return[-1]) if trial.num_checkpoints else np.nan
