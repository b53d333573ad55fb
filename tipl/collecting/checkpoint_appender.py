"""Appends a learning population's checkpoints to its store on a separate thread, while the next iteration runs."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from tipl.collecting.curves import Curves
from tipl.collecting.population import Population
from tipl.collecting.population_records import IterationStats, PopulationState
from tipl.collecting.resume import Unfinished
from tipl.storing.store import Store, Trial

KEPT_BACK = 32 * 2**20  # bytes of rows that are kept back at most, for all trials together

Columns = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]  # weights, env_steps, episodic_return


class Row(NamedTuple):
    """A checkpoint on its way to the stores."""

    number: int
    columns: list[Columns]
    """For each store."""
    stats: IterationStats | None
    """Figures of the iteration before it."""
    now: float
    """When it was made, in seconds since the epoch."""


class CheckpointAppender:
    """Appends a population's checkpoints on a separate thread; a failure is raised by the next append, or on exit.

    Where the store already has a checkpoint, because it came after the last saved state, the two are compared instead,
    and a difference raises RuntimeError. With a `critic_store` the critics' weights are appended to that one.

    A population's state is saved every `save_seconds`, at first more often, so that a run that is cut off early goes on
    too. Rows are kept back until then, until they fill a chunk or take `KEPT_BACK` bytes: an append writes every
    trial's last chunk whole, and what was appended after the last saved state would be computed again in any case.
    Behind a URL, where writing a file takes a request, they are kept back until they fill a chunk.
    """

    def __init__(
        self,
        store: Store,
        trials: range,
        batch_size: int,
        curves: Curves | None,
        save_seconds: float,
        critic_store: Store | None = None,
    ) -> None:
        self._stores = [store] if critic_store is None else [store, critic_store]
        self._batch_size, self._curves = batch_size, curves
        self._save_seconds = save_seconds
        self._there = [[it.trial(i) for i in trials] for it in self._stores]  # as they were at the start
        self._states = Unfinished(store).states(trials)
        self._begun_at = self._saved_at = time.monotonic()
        self._chunk_rows, self._is_local = self._there[0][0].chunk_rows, isinstance(store.path, Path)
        self._rows: list[Row] = []  # not yet passed to the thread
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tipl-append")
        self._pending: Future[None] | None = None

    def append(self, population: Population, stats: IterationStats | None) -> None:
        """Append the population's checkpoint, with the figures of the iteration before it; None before the first."""
        self._finish()
        parts = [population.weights(), population.critic_weights()][: len(self._stores)]  # copies: it learns on
        N = len(parts[0])
        env_steps = np.full((N, 1), population.env_steps, np.int64)
        episodic_return = np.full((N, 1), np.nan) if stats is None else stats.episodic_return[:, None]
        k = population.env_steps // self._batch_size
        self._rows.append(Row(k, [(part[:, None], env_steps, episodic_return) for part in parts], stats, time.time()))
        # The initial state need not be saved: the seeds give it again.
        wait = min(self._save_seconds, self._saved_at - self._begun_at)
        is_due = k > 0 and time.monotonic() - self._saved_at >= wait
        is_much = len(self._rows) * sum(part.nbytes for part in parts) >= KEPT_BACK
        if (k + 1) % self._chunk_rows == 0 or (self._is_local and (is_due or is_much)):
            state = None
            if is_due:
                state, self._saved_at = population.get_state(), time.monotonic()
            self._hand_over(state)

    def _hand_over(self, state: PopulationState | None) -> None:
        rows, self._rows = self._rows, []
        self._pending = self._thread.submit(self._append, rows, state)

    def _append(self, rows: list[Row], state: PopulationState | None) -> None:
        """Append or compare the checkpoints; then save the state after the last of them, if any."""
        for j, (store, there) in enumerate(zip(self._stores, self._there, strict=True)):
            new = []
            for row in rows:
                if row.number < there[0].num_checkpoints:
                    _compare(row.number, row.columns[j], there)
                else:
                    new.append(row.columns[j])
            if new:
                store.append(*(new[0] if len(new) == 1 else (np.concatenate(x, 1) for x in zip(*new, strict=True))))
        for row in rows:
            if self._curves is not None and row.stats is not None:
                self._curves.write(row.number * self._batch_size, row.stats, self._batch_size, row.now)
        if state is not None:
            self._states.save(state, rows[-1].number + 1)

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._finish()
            if self._rows:
                self._hand_over(None)
                self._finish()
        finally:
            self._thread.shutdown()
            for store in self._stores:
                store.close()


def _compare(k: int, columns: Columns, there: list[Trial]) -> None:
    """Raise RuntimeError where a checkpoint is another one than that in the store."""
    for i, trial in enumerate(there):
        weights, env_steps, episodic_return = (column[i, 0] for column in columns)
        if not (
            np.array_equal(weights, trial.weights(k, k + 1)[0])
            and env_steps == trial.env_steps[k]
            and np.array_equal(episodic_return, trial.episodic_return[k], equal_nan=True)
        ):
            raise RuntimeError(
                f"checkpoint {k} of trial {trial.index} comes out otherwise than it is in the store, which was "
                "made with other versions or on another kind of processor: continue there, or choose another output"
            )
