"""Normalised rewards, as Stable-Baselines3's VecNormalize gives them.

Shapes  N trials of E environments each, numbered trial by trial.
"""

import numpy as np
from numpy.typing import NDArray

from tipl.collecting.running_statistics import EPS, LIMIT, Floats, RunningStatistics


class RewardScaler(RunningStatistics):
    """Running variance of each trial's discounted returns, and rewards divided by its root.

    An environment's discounted return is the sum of its rewards since the last reset, in which a reward counts
    gamma**k after k further steps. The mean is not subtracted from rewards, so their signs stay.
    """

    def __init__(self, num_trials: int, num_envs: int, gamma: float) -> None:
        super().__init__(num_trials, 1)
        self.gamma = gamma
        self.discounted_return = np.zeros(num_trials * num_envs)

    def step(self, reward: Floats, done: NDArray[np.bool_]) -> Floats:
        """Add one step of every environment to the statistics and return its rewards (N * E,), scaled and clipped.

        Where an episode is `done` (N * E,), its discounted return still counts and is 0 afterwards.
        """
        self.discounted_return = self.discounted_return * self.gamma + reward
        self.update(self.discounted_return[:, None])
        self.discounted_return[done] = 0.0
        rows = reward.reshape(len(self.var), -1)
        scaled: Floats = np.clip(rows / np.sqrt(self.var[..., 0] + EPS), -LIMIT, LIMIT)
        return scaled.reshape(reward.shape)
