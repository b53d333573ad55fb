"""What a collection shows on stderr: a bar or lines with the rate and the mean return, and one line at the end."""

import time
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from tipl.files.locations import Location
from tipl.progress import SlowProgress
from tipl.storing.store import Store


class CollectionDisplay:
    """The progress with the rate and the mean return, and one line at the end."""

    def __init__(
        self,
        title: str,
        store: Store,
        shards: list[range],
        num_iterations: int,
        batch_size: int,
        *,
        path: Location,
        shown: bool,
    ) -> None:
        """Show the collection of `store`, which lies or will lie at `path`."""
        self._console = Console(stderr=True, quiet=not shown)
        self._progress = SlowProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            shown=shown,
            note="figures",
        )
        self._store, self._path, self._shards, self._batch_size = store, path, shards, batch_size
        self._task = self._progress.add_task(title, total=num_iterations * len(shards), figures="")
        self._num_iterations = num_iterations
        self._num_steps, self._steps_there = 0, 0
        self._start = time.perf_counter()

    def begin(self, trials: range, num_checkpoints: int, num_iterations: int) -> None:
        """Say that a shard with some checkpoints in the store continues after `num_iterations` iterations."""
        before = self._shards.index(trials) * self._num_iterations
        self._progress.update(self._task, completed=before + num_iterations)
        if num_checkpoints == 0:
            return
        which = "" if len(self._shards) == 1 else f" of the trials {trials.start} to {trials.stop - 1}"
        line = f"{self._path}: {num_checkpoints} checkpoints{which} are there; goes on after iteration {num_iterations}"
        if num_iterations == 0 and num_checkpoints > 1:
            line += ", since no state was saved: what is there is computed once more and compared"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def advance(self, trials: range, episodic_return: NDArray[np.float64]) -> None:
        """Show that a shard in this process has completed an iteration."""
        self._num_steps += len(trials) * self._batch_size
        known = episodic_return[~np.isnan(episodic_return)]
        mean = f"{known.mean():,.1f}" if len(known) else "-"
        self._progress.update(self._task, advance=1, figures=f"{self._rate()}, return {mean}")

    def poll(self, num_ended: int) -> None:
        """Show how many checkpoints shards in other processes have committed."""
        if not self._progress.is_shown:
            return
        iterations = [max(0, count - 1) for count in self._store.commits(shard.start for shard in self._shards)]
        steps = sum(n * len(shard) for n, shard in zip(iterations, self._shards, strict=True)) * self._batch_size
        if not self._steps_there:
            self._steps_there = steps
        self._num_steps = steps - self._steps_there
        figures = f"{self._rate()}, {num_ended} of {len(self._shards)} shards"
        self._progress.update(self._task, completed=sum(iterations), figures=figures)

    def finish(self, store: Store) -> None:
        """Print the line at the end: what is in the store, the time, the rate."""
        seconds = time.perf_counter() - self._start
        steps = f", {self._rate()}" if self._num_steps else ""
        line = f"{self._path}: {store.summary()}; {seconds:,.0f} s{steps}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _rate(self) -> str:
        return f"{self._num_steps / (time.perf_counter() - self._start):,.0f} env steps/s"

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
