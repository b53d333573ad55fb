"""Timing of alternatives side by side, and the rows of results."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Clock = Callable[[], float]
"""Does the work once and returns the seconds that it took, per step or in total."""


def clock(work: Callable[[], object]) -> Clock:
    """Return the clock of a piece of work."""

    def run() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return run


@dataclass(frozen=True)
class Row:
    """One case of tipl beside one peer; ratio > 1 where tipl is faster."""

    suite: str
    case: str
    ours: float
    unit: str
    peer: str
    peer_value: float
    ratio: float
    percent_of_roof: float | None = None
    binds: str | None = None
    """The roof of percent_of_roof: L2, L3 or DRAM (bytes read), flops, or another name."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.suite, self.case, self.peer

    def __str__(self) -> str:
        roof = "" if self.percent_of_roof is None else f"{self.percent_of_roof:4.0f} % of {self.binds}"
        return (
            f"{self.suite:8}{self.case:22}{self.ours:>11,.1f} {self.unit:14}"
            f"{self.peer:26}{self.peer_value:>11,.1f}{self.ratio:>8.2f} x   {roof}"
        )


def rows_of(
    suite: str,
    case: str,
    unit: str,
    ours: float,
    peers: Mapping[str, float],
    roof: tuple[float, str] | tuple[None, None] = (None, None),
) -> list[Row]:
    """Return one row for each peer. In units of time less is better, in anything per second more."""
    rate = unit.endswith("/s")
    return [Row(suite, case, ours, unit, peer, p, ours / p if rate else p / ours, *roof) for peer, p in peers.items()]


def side_by_side(
    clocks: Mapping[str, Clock], *, budget_s: float = 20, rounds: tuple[int, int] = (3, 20), slow_s: float = 15
) -> dict[str, float]:
    """Return the median seconds of each clock. All take turns, round by round, and so see the machine's noise alike.

    There are at least `rounds[0]` rounds, more while the budget lasts, at most `rounds[1]`. A clock that takes `slow_s`
    seconds runs only once.
    """
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    slow: set[str] = set()
    start = time.perf_counter()
    for round in range(rounds[1]):
        if round >= rounds[0] and time.perf_counter() - start > budget_s:
            break
        for name in [name for name in clocks if name not in slow]:
            before = time.perf_counter()
            seconds[name].append(clocks[name]())
            if time.perf_counter() - before > slow_s:
                slow.add(name)
    return {name: statistics.median(times) for name, times in seconds.items()}
