"""A command in a forked child, as if it were a process of its own, without the seconds that its imports take.

The parent has imported all that commands import and runs no threads. The child has standard streams of its own, a
fault armed or a limit set, and ends like an interpreter does: threads joined, what runs at exit run.
"""

import atexit
import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from .faults import Fault

GIB = 2**30
PR_SET_PDEATHSIG = 1  # of sys/prctl.h


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    status: int
    """Its exit status; of a signal the negative number."""
    out: str
    err: str
    hit: str
    """The operations that the injector hit, or traced, one "kind path" a line."""
    seconds: float
    at: float
    """When its work was done, by the monotonic clock; 0 where it was killed."""
    cpu_seconds: float
    peak_bytes: int
    """Memory that it came to hold beyond what it was forked with."""
    timed_out: bool = False

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL and not self.timed_out

    @property
    def crashed(self) -> bool:
        """Whether it died of a signal, or showed a traceback."""
        return not self.timed_out and (self.status < 0 or "Traceback (most recent call last)" in self.err)

    @property
    def message(self) -> str:
        """The last line on stderr."""
        return (self.err.strip().splitlines() or [""])[-1]


@dataclass(frozen=True)
class Setting:
    """What a child is given besides its work."""

    fault: Fault | None = None
    timeout: float = 120.0
    kill_after: float | None = None
    """Seconds after which it is killed."""
    room_bytes: int | None = None
    """Memory that it may take beyond what it was forked with."""
    folder: Path | None = None
    """Its working folder, home and folder for temporary files."""
    heeds_permissions: bool = False
    """Whether even root may only read and write what its permissions allow."""
    gate: tuple[int, int] | None = None
    """A pipe; it begins when the parent closes its end for writing."""
    delay: float = 0.0
    """Seconds after that."""


@dataclass
class Child:
    """A child under way."""

    pid: int
    pidfd: int
    streams: tuple[int, ...]
    started: float
    kept_bytes: int

    def wait(self, setting: Setting) -> Ended:
        limit = setting.timeout if setting.kill_after is None else setting.kill_after
        try:
            ended = self._ends_within(limit)
            if not ended:
                os.kill(self.pid, signal.SIGKILL)
        except BaseException:
            os.kill(self.pid, signal.SIGKILL)
            raise
        finally:
            _, status, usage = os.wait4(self.pid, 0)
            os.close(self.pidfd)
        out, err, hit, at = (_content(stream) for stream in self.streams)
        return Ended(
            status=os.waitstatus_to_exitcode(status),
            out=out,
            err=err,
            hit=hit.strip(),
            seconds=time.monotonic() - self.started,
            at=float(at or 0),
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_bytes=max(0, 1024 * usage.ru_maxrss - self.kept_bytes),
            timed_out=not ended and setting.kill_after is None,
        )

    def _ends_within(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(1000 * seconds))


def run(work: Callable[[], object], setting: Setting) -> Ended:
    """Call `work` in a child, and return how that ended."""
    return start(work, setting).wait(setting)


def start(work: Callable[[], object], setting: Setting) -> Child:
    """Call `work` in a child."""
    streams = tuple(os.memfd_create(name) for name in ("out", "err", "hit", "at"))
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _be_the_child(work, setting, streams)
    return Child(pid, os.pidfd_open(pid), streams, started, _resident_bytes())


def _be_the_child(work: Callable[[], object], setting: Setting, streams: tuple[int, ...]) -> NoReturn:
    status = 1
    try:
        os.setpgid(0, 0)  # Ctrl-C is the parent's alone, which ends its child
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        out, err, report, at = streams
        nothing = os.open(os.devnull, os.O_RDONLY)
        for fd, stream in enumerate((nothing, out, err)):
            os.dup2(stream, fd)
        if setting.gate is not None:
            os.close(setting.gate[1])
            os.read(setting.gate[0], 1)
            time.sleep(setting.delay)
        if setting.folder is not None:
            os.chdir(setting.folder)
            os.environ |= {"HOME": str(setting.folder), "TMPDIR": str(setting.folder)}
        if setting.room_bytes is not None:
            limit = data_bytes() + setting.room_bytes
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if setting.heeds_permissions:
            _heed_permissions()
        if setting.fault is not None:
            setting.fault.arm(report)
        status = _status_of(work)
        threading._shutdown()  # type: ignore[attr-defined]  # joins threads, as an interpreter's end does
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(at, str(time.monotonic()).encode())
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
            sys.stderr.flush()
        status = 1
    os._exit(status)


def _status_of(work: Callable[[], object]) -> int:
    try:
        work()
    except SystemExit as ending:
        if ending.code is None or isinstance(ending.code, int):
            return ending.code or 0
        print(ending.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _heed_permissions() -> None:
    """Give up root's capabilities to pass over the permissions of files, CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, of 32 capabilities and then of 32 more
    if libc.capget(header, sets) == 0:
        sets[0] &= ~0b110
        if libc.capset(header, sets) == 0:
            return
    raise OSError(ctypes.get_errno(), "capabilities cannot be given up")


def _content(stream: int) -> str:
    os.lseek(stream, 0, os.SEEK_SET)
    with open(stream, "rb") as file:
        return file.read(2**22).decode(errors="backslashreplace")


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def data_bytes() -> int:
    """Return the memory that RLIMIT_DATA counts."""
    return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
