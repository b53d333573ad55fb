"""Function calls on the machines of a Ray cluster (the extra `ray`), each in a worker process.

Calls must not depend on one another or on where they run. If its worker or machine dies, a call runs again elsewhere:
it must continue from what the first attempt left, or be harmless when repeated.
"""

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from tipl import _core

Result = TypeVar("Result")

MAX_RETRIES = 20  # for a call whose worker died; a call that raised an exception is not repeated
POLL_SECONDS = 2.0


@contextlib.contextmanager
def connected(address: str) -> Iterator["Cluster"]:
    """Yield the cluster at `address`, connected as long as the context lasts; "local" starts one on this machine.

    If this process is already connected to Ray, that connection is used and the address ignored.

    Raises ValueError where Ray is not installed or the address is malformed; ConnectionError where no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("ray: Ray is not installed: pip install 'tipl[ray]'") from None
    begun = not ray.is_initialized()
    if begun:
        _check(address)
        here = {"num_cpus": _core.available_cpus(), "include_dashboard": False} if address == "local" else {}
        ray.init(address=address, logging_level="WARNING", **here)
    try:
        yield Cluster()
    finally:
        if begun:
            ray.shutdown()


def _check(address: str) -> None:
    """Raise as `connected` documents, before Ray sees the address: without a cluster there, Ray ends the process."""
    host, colon, port = address.rpartition(":")
    if address in ("local", "auto") or "://" in address:
        return
    if not colon or not port.isdigit():
        raise ValueError(f'ray: the address must be HOST:PORT, "auto" or "local", got {address!r}')
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(f"ray: no cluster answers at {address}: {error}") from error


class Cluster:
    """The Ray cluster that this process is connected to."""

    def __init__(self) -> None:
        import ray

        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        self.num_cpus = sum(nodes)
        """Cores of all machines."""
        self.most_cpus = max(nodes, default=0)
        """Cores of the largest machine."""

    def check(self, num_cpus: int) -> None:
        """Raise ValueError where no machine has `num_cpus` cores."""
        if num_cpus > self.most_cpus:
            raise ValueError(f"ray: no machine of the cluster has {num_cpus} cores; the largest has {self.most_cpus}")

    def map(
        self,
        function: Callable[..., Result],
        calls: Sequence[tuple[Any, ...]],
        *,
        num_cpus: int = 1,
        poll: Callable[[int], None] | None = None,
    ) -> list[Result]:
        """Return [function(*call) for call in calls], each computed in a worker with `num_cpus` cores.

        `poll` is called at least every two seconds with the number of calls that have ended. The first exception that a
        call raises cancels all others and is raised here; Ctrl-C cancels all too.

        Raises ValueError where no machine has `num_cpus` cores; RuntimeError where workers keep dying.
        """
        import ray

        self.check(num_cpus)
        remote = ray.remote(num_cpus=num_cpus, max_retries=MAX_RETRIES)(function)
        results = [remote.remote(*call) for call in calls]
        waiting = list(results)
        try:
            while waiting:
                ended, waiting = ray.wait(waiting, timeout=POLL_SECONDS)
                ray.get(ended)  # raises what the call raised
                if poll is not None:
                    poll(len(results) - len(waiting))
            return list(ray.get(results))
        except BaseException as error:
            for call in waiting:
                ray.cancel(call, force=True)
            if isinstance(error, ray.exceptions.RayTaskError):
                raise (error.cause or RuntimeError(str(error))) from error
            if isinstance(error, ray.exceptions.RayError):
                raise RuntimeError(f"ray: workers died again and again: {error}") from error
            raise
