"""When a run jumps, how far, and what a jump must hold against: the settings of `tipl accelerate`."""

import dataclasses
import math

from tipl.subspace.prefix_end import MIN_PREFIX_END

START, LATE_START = 6, 12  # iterations before the first jump: with a forecaster of this task alone, and with any other
MIN_ROWS = 2 * (MIN_PREFIX_END + 1)
"""The least number of checkpoints that a path is thinned to: half of them still make a prefix basis."""


@dataclasses.dataclass(frozen=True)
class JumpConfig:
    """When a run jumps, how far, what a jump changes, and what it must hold against."""

    start: int | None = None
    """Iterations before the first jump. By default 6 with a forecaster that was trained on runs of this task alone, and
    12 with any other, such as the one that comes with tipl: it needs to see more of a run. Each jump, whether it holds
    or not, doubles the wait for the next one."""
    reach: float = 5.0
    """A jump goes this many times as far ahead as the run has walked since the last one."""
    max_jumps: int = 1
    """A run stops jumping when this many jumps have held."""
    max_undone: int = 4
    """A run stops jumping when this many jumps were undone."""
    critic: bool = True
    """Forecast the critic too. Without it only the actor jumps, and the critic has to catch up."""
    log_std_drop: float | None = 0.5
    """The most by which a jump may lower each log_std, where it is a parameter; None: as far as it is forecast. Where
    actions have hardly any noise left, the same learning rate tears the policy apart some iterations later."""
    margin: float | None = 2.0
    """A jump holds if the mean return of each iteration that tests it exceeds what the run's own trend leads to expect
    by at least this many deviations of an iteration's mean return; None: every jump holds."""
    test_iterations: int = 2
    """Iterations that test a jump. A test of one lets some jumps pass that return more at once but learn worse; a
    longer test costs more where a jump fails."""
    max_rows: int = 32
    """The most checkpoints of a run's path that a forecast sees, an even number; a longer path is thinned."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("start", START if self.start is None else self.start, MIN_PREFIX_END),
            ("max_jumps", self.max_jumps, 0),
            ("max_undone", self.max_undone, 0),
            ("test_iterations", self.test_iterations, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"JumpConfig: {name} must be an int of at least {least}, got {value!r}")
        if not 0.0 < self.reach < math.inf:
            raise ValueError(f"JumpConfig: reach must be positive and finite, got {self.reach}")
        if self.log_std_drop is not None and not 0.0 <= self.log_std_drop < math.inf:
            raise ValueError(f"JumpConfig: log_std_drop must be finite and not negative, got {self.log_std_drop}")
        if self.margin is not None and not math.isfinite(self.margin):
            raise ValueError(f"JumpConfig: margin must be finite, got {self.margin}")
        if self.max_rows < MIN_ROWS or self.max_rows % 2:
            raise ValueError(f"JumpConfig: max_rows must be even and at least {MIN_ROWS}, got {self.max_rows}")

    def with_start(self, *, late: bool) -> "JumpConfig":
        """Return these settings with the default of `start` filled in, the one for any other forecaster if `late`."""
        return self if self.start is not None else dataclasses.replace(self, start=LATE_START if late else START)
