"""Running mean and variance, as Stable-Baselines3's RunningMeanStd has them."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EPS, LIMIT = 1e-8, 10.0  # VecNormalize's epsilon, and its clip_obs and clip_reward


class RunningStatistics:
    """Running mean (N, 1, D), variance (N, 1, D) and number (N, 1, 1) of each of N trials' rows, D numbers each.

    As in RunningMeanStd, they start at mean 0 and variance 1 with a weight of 1e-4.
    """

    def __init__(self, num_trials: int, dim: int) -> None:
        self.mean, self.var = np.zeros((num_trials, 1, dim)), np.ones((num_trials, 1, dim))
        self.count = np.full((num_trials, 1, 1), 1e-4)

    def update(self, rows: Floats) -> None:
        """Add rows (N * E, D), E of each trial, to the statistics."""
        rows = rows.reshape(len(self.mean), -1, rows.shape[-1])
        added = rows.shape[1]
        total = self.count + added
        shift = rows.mean(1, keepdims=True) - self.mean
        squares = self.count * self.var + added * rows.var(1, keepdims=True) + shift**2 * self.count * added / total
        self.mean = self.mean + shift * added / total
        self.var, self.count = squares / total, total
