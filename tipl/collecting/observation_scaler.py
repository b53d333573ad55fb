"""Normalised observations, as Stable-Baselines3's VecNormalize gives them.

Shapes  N trials of E environments each, numbered trial by trial; O = obs_dim.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tipl.collecting.running_statistics import EPS, LIMIT, Floats, RunningStatistics


class ObservationScaler(RunningStatistics):
    """Running mean and variance of each trial's observations, and observations normalised with them."""

    def scaled(self, obs: Floats) -> Floats:
        """Return observations (N * E, O), each normalised and clipped with its trial's statistics."""
        rows = obs.reshape(len(self.mean), -1, obs.shape[-1])
        scaled: Floats = np.clip((rows - self.mean) / np.sqrt(self.var + EPS), -LIMIT, LIMIT)
        return scaled.reshape(obs.shape)

    def fold_into(self, weight: NDArray[Any], bias: NDArray[Any]) -> None:
        """Change first layers, weight (N, out, O) and bias (N, out), in place so that they take raw observations.

        The clipping cannot be folded in and is lost.
        """
        scaled = weight / np.sqrt(self.var + EPS)
        bias -= (scaled @ self.mean.swapaxes(1, 2))[..., 0]
        weight[:] = scaled
