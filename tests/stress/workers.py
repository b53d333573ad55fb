"""Many trials side by side, in forked workers: a worker that dies or hangs costs the trial that it was at."""

import contextlib
import os
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from .rows import Table, Trial

PROGRESS_SECONDS = 10.0


@dataclass
class _Worker:
    """A process that makes the trials `rank`, `rank` + step, ... and writes a line before and after each."""

    rank: int
    pid: int
    pipe: int
    began: float
    trial: int | None = None
    rest: bytes = b""


class Workers:
    """Makes trials with `work` on so many processes and counts what they come to in `table`.

    `name` says which row a trial belongs to whose worker died. Ctrl-C ends the work; what is there is kept.
    """

    def __init__(
        self,
        table: Table,
        work: Callable[[int], Trial],
        name: Callable[[int], str],
        *,
        limit: float,
        processes: int = 2,
    ) -> None:
        self.table, self.work, self.name, self.limit, self.processes = table, work, name, limit, processes
        self.num_done, self.num_failed = 0, 0

    def make(self, count: int) -> None:
        """Make `count` trials. Raises KeyboardInterrupt once workers have ended."""
        self.count, self.started = count, time.monotonic()
        told = self.started
        workers = [self._begun(rank, rank) for rank in range(min(self.processes, count))]
        try:
            while workers:
                ready, _, _ = select.select([it.pipe for it in workers], [], [], 1.0)
                for worker in [it for it in workers if it.pipe in ready]:
                    workers.remove(worker)
                    workers += self._read(worker)
                for worker in [it for it in workers if it.trial is not None and self._is_late(it)]:
                    os.kill(worker.pid, signal.SIGKILL)
                    workers.remove(worker)
                    workers += self._after_death(worker, "hung", f"no end within {self.limit:g} s")
                if time.monotonic() - told > PROGRESS_SECONDS:
                    told = time.monotonic()
                    self._tell()
        finally:
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGTERM)
                os.waitpid(worker.pid, 0)
                os.close(worker.pipe)
            self._tell()

    def _is_late(self, worker: _Worker) -> bool:
        return time.monotonic() - worker.began > self.limit

    def _begun(self, rank: int, first: int) -> _Worker:
        reading, writing = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            os.close(writing)
            return _Worker(rank, pid, reading, time.monotonic())
        status = 1
        try:
            os.close(reading)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's
            for number in range(first, self.count, self.processes):
                os.write(writing, f"{number}\n".encode())
                line = f"{number} {self.work(number).to_json()}\n".encode()
                while line:  # longer than a pipe holds
                    line = line[os.write(writing, line) :]
            status = 0
        except SystemExit:
            pass
        except BaseException:
            traceback.print_exc()
        os._exit(status)

    def _read(self, worker: _Worker) -> list[_Worker]:
        """Take what a worker wrote; return it, or its successor, or none where all is done."""
        data = os.read(worker.pipe, 2**16)
        *lines, worker.rest = (worker.rest + data).split(b"\n")
        for line in lines:
            number, _, trial = line.decode().partition(" ")
            if trial:
                self._add(int(number), Trial.from_json(trial))
                worker.trial = None
            else:
                worker.trial, worker.began = int(number), time.monotonic()
        if data:
            return [worker]
        return self._after_death(worker, "crashed", "the process that did it died")

    def _after_death(self, worker: _Worker, mark: str, message: str) -> list[_Worker]:
        os.close(worker.pipe)
        status = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
        if worker.trial is None:
            return []
        if status == 1:
            raise RuntimeError(f"stress: trial {worker.trial} of {self.table.campaign} failed in the harness itself")
        lost = Trial(self.name(worker.trial), Counter())
        lost.add(mark, f"{message}, status {status}")
        self._add(worker.trial, lost)
        following = worker.trial + self.processes
        return [self._begun(worker.rank, following)] if following < self.count else []

    def _add(self, number: int, trial: Trial) -> None:
        self.table.add(number, trial)
        self.num_done += 1
        self.num_failed += trial.failed

    def _tell(self) -> None:
        seconds = time.monotonic() - self.started
        rate = self.num_done / max(seconds, 1e-9)
        left = (self.count - self.num_done) / max(rate, 1e-9)
        print(
            f"{self.table.campaign:<10} {self.num_done} of {self.count}, {rate:.1f}/s, {self.num_failed} failed, "
            f"{seconds:.0f} s" + (f", {left:.0f} s to go" if self.num_done < self.count else ""),
            flush=True,
        )
