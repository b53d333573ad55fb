"""Normalised observations, as Stable-Baselines3's VecNormalize gives them.

Shapes  N trials of E environments each, numbered trial by trial; O = obs_dim.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

OBS_EPS, OBS_LIMIT = 1e-8, 10.0  # VecNormalize's epsilon and clip_obs


class ObservationScaler:
    """Running mean and variance of each trial's observations, and observations normalised with them.

    The statistics are those of SB3's RunningMeanStd, which starts at mean 0 and variance 1 with a weight of 1e-4.
    """

    def __init__(self, num_trials: int, obs_dim: int) -> None:
        self.mean, self.var = np.zeros((num_trials, 1, obs_dim)), np.ones((num_trials, 1, obs_dim))
        self.count = np.full((num_trials, 1, 1), 1e-4)

    def update(self, obs: Floats) -> None:
        """Add observations (N * E, O), E from each trial, to the statistics."""
        obs = obs.reshape(len(self.mean), -1, obs.shape[-1])
        added = obs.shape[1]
        total = self.count + added
        shift = obs.mean(1, keepdims=True) - self.mean
        squares = self.count * self.var + added * obs.var(1, keepdims=True) + shift**2 * self.count * added / total
        self.mean = self.mean + shift * added / total
        self.var, self.count = squares / total, total

    def scaled(self, obs: Floats) -> Floats:
        """Return observations (N * E, O), each normalised and clipped with its trial's statistics."""
        rows = obs.reshape(len(self.mean), -1, obs.shape[-1])
        scaled: Floats = np.clip((rows - self.mean) / np.sqrt(self.var + OBS_EPS), -OBS_LIMIT, OBS_LIMIT)
        return scaled.reshape(obs.shape)

    def fold_into(self, weight: NDArray[Any], bias: NDArray[Any]) -> None:
        """Change first layers, weight (N, out, O) and bias (N, out), in place so that they take raw observations.

        The clipping cannot be folded in and is lost.
        """
        scaled = weight / np.sqrt(self.var + OBS_EPS)
        bias -= (scaled @ self.mean.swapaxes(1, 2))[..., 0]
        weight[:] = scaled
