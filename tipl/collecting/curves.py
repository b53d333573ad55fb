"""TensorBoard curves of a collection, under CleanRL's tags: one TensorBoard run (folder) per trial, and their mean.

    mean/events.out.tfevents.1763935848.204518          one file for each time that the collection was started
    trial_0000/events.out.tfevents.1763935848.204518

The horizontal axis is the trial's environment steps. A file is open only while a record is appended to it; torch's
SummaryWriter would keep a thread and an open file for each trial.
"""

import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tipl.collecting.population_records import IterationStats
from tipl.files.locations import file_in_the_way
from tipl.storing.store_records import trial_name

LOSSES = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance")
TAGS = ("charts/episodic_return", "charts/SPS", "charts/learning_rate", *(f"losses/{name}" for name in LOSSES))


class Curves:
    """Appends the figures of each iteration to the event files of all trials and of their mean."""

    def __init__(self, folder: str | Path, trials: range, *, mean: bool = True, resumed: bool = False) -> None:
        """Make the folder; the first `write` makes the files. `mean` adds the mean of these trials.

        A `resumed` collection continues the curves in existing folders. Points that an earlier process wrote for
        iterations which did not reach the store are superseded, so that no iteration is shown twice.

        Raises FileExistsError where `folder` holds another collection's curves, another OSError where it is not a
        writable folder.
        """
        self.folder = Path(folder)
        self.runs = [*(self.folder / trial_name(i) for i in trials), *([self.folder / "mean"] if mean else [])]
        if file := file_in_the_way(self.folder):
            raise NotADirectoryError(f"tensorboard: {self.folder} must be a folder, but {file} is a file")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise PermissionError(f"tensorboard: the folder {self.folder} cannot be written")
        for run in self.runs:
            if run.exists() and not resumed:
                raise FileExistsError(f"tensorboard: {run} holds the curves of another collection; choose a new folder")
        self._files: list[EventFile] | None = None  # None until the first write, empty after a failure

    def write(self, env_steps: int, stats: IterationStats, num_steps: int, now: float | None = None) -> None:
        """Append a point at `env_steps` to every curve: figures of the last `num_steps` steps. NaN gets no point.

        `now` is when these steps ended, in seconds since the epoch, where that is not now.

        If writing fails, for example on a full disk, it warns and writes nothing more, so that learning continues.
        """
        values = _values(stats, num_steps)  # (tags, N)
        known = np.isfinite(values)
        sums, counts = values.sum(1, where=known), known.sum(1)
        means = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
        columns = np.column_stack([values, means])  # (tags, N + 1)
        if self._files is None:
            self._files = [EventFile(run, env_steps) for run in self.runs]
        for file, column in zip(
            self._files, columns.T.tolist(), strict=False
        ):  # without `mean`, the last one is unused
            if not file.write(env_steps, dict(zip(TAGS, column, strict=True)), now):
                self._files = []
                return


class EventFile:
    """A new TensorBoard event file in `folder`, whose points supersede those of earlier files from `first_step` on."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder, self._first_step = folder, first_step
        self._path: Path | None = None  # None until the first write

    def write(self, step: int, values: Mapping[str, float], now: float | None = None) -> bool:
        """Append a point to every curve whose value is not NaN; return whether that succeeded, and warn if not."""
        now = time.time() if now is None else now
        try:
            if self._path is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                begun = time.time()  # TensorBoard reads files in the order of their names
                self._path = self._folder / f"events.out.tfevents.{begun:017.6f}"
                _append(self._path, _opening(min(now, begun), self._first_step))
            _append(self._path, [_point(now, step, values)])
        except OSError as error:
            warnings.warn(f"no more curves are written to {self._folder}: {error.strerror or error}", stacklevel=2)
            return False
        return True


def _values(stats: IterationStats, num_steps: int) -> NDArray[np.float64]:
    """Return the trials' figures, (tags, N). charts/SPS is one trial's rate; the whole population's is N times that."""
    steps_per_second = np.full_like(stats.episodic_return, num_steps / sum(stats.seconds.values()))
    learning_rate = np.full_like(stats.episodic_return, stats.learning_rate)
    losses = [getattr(stats, name) for name in LOSSES]
    return np.stack([stats.episodic_return, steps_per_second, learning_rate, *losses])


# tensorboard is imported only where curves are written, because importing it takes half a second.


def _opening(now: float, env_steps: int) -> list[Any]:
    """Return the events that begin a file: the format, and that earlier files' points from `env_steps` on are void."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    start = SessionLog(status=SessionLog.START)
    return [Event(wall_time=now, file_version="brain.Event:2"), Event(wall_time=now, step=env_steps, session_log=start)]


def _point(now: float, step: int, values: Mapping[str, float]) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if np.isfinite(value)]
    return Event(wall_time=now, step=step, summary=Summary(value=scalars))


def _append(path: Path, events: list[Any]) -> None:
    """Append events to a file in one write, so that a killed process leaves no partial record."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    with open(path, "ab") as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())
