"""The progress of slow stages: a bar on a terminal, and lines elsewhere. Steps done, rate, time remaining."""

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINE_SECONDS = 10.0
"""Where stderr is no terminal: least time between two lines of a stage."""


_hidden = False


def hide_progress() -> None:
    """Show no progress in this process from now on, neither bars nor lines."""
    global _hidden
    _hidden = True


class RateColumn(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f}/s")


class SlowProgress(Progress):
    """A bar on stderr where that is a terminal; elsewhere a line every LINE_SECONDS. Nothing unless `shown`."""

    def __init__(self, *columns: ProgressColumn, shown: bool, note: str) -> None:
        """Make the bar of `columns`; `note` is the name of the field that ends each task's line."""
        shown = shown and not _hidden
        console = Console(stderr=True)
        super().__init__(
            *columns,
            console=console,
            refresh_per_second=2,
            transient=True,
            disable=not (shown and console.is_terminal),
        )
        self.is_shown = shown
        self._writes_lines = shown and not console.is_terminal
        self._note = note
        self._written_at = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change a task, as `Progress.update` does, and write a line if it is time for one."""
        super().update(task_id, **changes)
        self._write_line_if_due(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Advance a task, as `Progress.advance` does, and write a line if it is time for one."""
        super().advance(task_id, advance)
        self._write_line_if_due(task_id)

    def _write_line_if_due(self, task_id: TaskID) -> None:
        now = time.monotonic()
        if not self._writes_lines or now - self._written_at < LINE_SECONDS:
            return
        self._written_at = now
        task = self._tasks[task_id]
        if not task.finished:
            self.console.print(line_of(task, self._note), markup=False, highlight=False, soft_wrap=True)


def line_of(task: Task, note: str) -> str:
    """Return "train: 300 of 1,200, 12.3/s, 0:01:13 to go, validation error 0.31" of a task with a field `note`."""
    total = "" if task.total is None else f" of {task.total:,.0f}"
    parts = [f"{task.description}: {task.completed:,.0f}{total}"]
    if task.speed is not None and "/s" not in task.fields[note]:
        parts.append(f"{task.speed:,.1f}/s")
    if task.time_remaining is not None:
        seconds = round(task.time_remaining)
        parts.append(f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} to go")
    return ", ".join([*parts, *([task.fields[note]] if task.fields[note] else [])])


def progress_bar(shown: bool) -> SlowProgress:
    """Return the progress of a stage on stderr, if `shown`.

    Each task has a field `note`, a text at the end of its line.
    """
    return SlowProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        shown=shown,
        note="note",
    )
