"""What forecasts are judged on: the settings of `tipl evaluate`."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from tipl.subspace.prefix_end import MIN_PREFIX_END, prefix_end_of


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What forecasts are judged on."""

    prefixes: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    """Shares of the path that are observed."""
    horizons: tuple[float, ...] = (0.1, 0.2, 0.4, 0.6)
    """How far ahead to judge, as shares of the path. Those beyond its end are dropped; the end is always judged."""
    num_episodes: int = 5
    """Episodes for each policy, the same for all policies of one trial."""
    max_trials: int | None = None
    """How many held-out trials are judged, at most; by default all."""
    seed: int = 0
    """The seed of the episodes."""

    def __post_init__(self) -> None:
        for name in ("prefixes", "horizons"):
            shares = getattr(self, name)
            if not shares or not all(0.0 < share < 1.0 for share in shares):
                raise ValueError(f"EvaluateConfig: {name} must be shares of the path in (0, 1), got {shares}")
        if self.num_episodes < 1:
            raise ValueError(f"EvaluateConfig: num_episodes must be at least 1, got {self.num_episodes}")
        if self.max_trials is not None and self.max_trials < 1:
            raise ValueError(f"EvaluateConfig: max_trials must be at least 1, got {self.max_trials}")
        if self.seed < 0:
            raise ValueError(f"EvaluateConfig: seed must not be negative, got {self.seed}")

    def prefix_ends(self, num_checkpoints: int) -> list[int]:
        """Return the index h at which each prefix ends.

        Raises ValueError where a prefix is too short for a basis, or leaves nothing to forecast.
        """
        ends = [prefix_end_of(share, num_checkpoints) for share in self.prefixes]
        for share, end in zip(self.prefixes, ends, strict=True):
            if not MIN_PREFIX_END <= end < num_checkpoints - 1:
                raise ValueError(
                    f"evaluate: prefix {share:g} of a path of {num_checkpoints} checkpoints ends at checkpoint {end}, "
                    f"which must lie in [{MIN_PREFIX_END}, {num_checkpoints - 2}]: collect longer paths (a larger "
                    "total_timesteps) or choose other prefixes"
                )
        return ends

    def horizon_grid(self, prefix_end: int, num_checkpoints: int) -> NDArray[np.int64]:
        """Return the horizons (n,) after `prefix_end`, ascending; the last reaches the end of the path."""
        to_end = num_checkpoints - 1 - prefix_end
        steps = {max(1, round(share * (num_checkpoints - 1))) for share in self.horizons}
        return np.array(sorted({step for step in steps if step < to_end} | {to_end}), dtype=np.int64)
