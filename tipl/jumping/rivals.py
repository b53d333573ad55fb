"""What a forecast must beat in live training: other ways to change a run's weights between iterations.

Each has the interface of `Jumps`: make it of a `Learner`, call `after_iteration` after each update. Rivals that are
settings of PPO (a higher learning rate, more epochs, annealing, target_kl) need no class.

Shapes  N runs that learn in lockstep; P weights of a run, actor and critic.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tipl.judging.predictors import Linear, Predictor, RankOne
from tipl.jumping.jump_config import JumpConfig
from tipl.jumping.jumps import At, Every, Jumps
from tipl.jumping.learner import Learner, Singles
from tipl.subspace.prefix import Prefix

UNTESTED = JumpConfig(tolerance=None)


class OuterSteps:
    """Outer-PPO (arXiv 2411.00666): what an iteration changes is a gradient for an outer optimiser.

    With delta the change of one iteration, v = momentum v + delta, the weights go on from before it by
    step (delta + momentum v), which is Nesterov's momentum; without momentum by step delta.
    """

    def __init__(self, learner: Learner, step: float, momentum: float = 0.0) -> None:
        if not 0.0 < step < np.inf or not 0.0 <= momentum < 1.0:
            raise ValueError(f"OuterSteps: step must be positive and momentum lie in [0, 1), got {step} and {momentum}")
        self.learner, self.step, self.momentum = learner, step, momentum
        self.jumps: list[object] = []
        self._before = learner.weights()
        self._velocity: Singles = np.zeros_like(self._before)

    def after_iteration(self, episodic_return: Sequence[float] | NDArray[np.float64], *, is_last: bool = False) -> None:
        """Take the outer step of every run; the returns do not matter."""
        delta = self.learner.weights() - self._before
        self._velocity *= np.float32(self.momentum)
        self._velocity += delta
        moved = delta + np.float32(self.momentum) * self._velocity
        weights: Singles = (self._before + np.float32(self.step) * moved).astype(np.float32, copy=False)
        for run, row in enumerate(weights):
            self.learner.replace(run, row)
        self._before = weights


@dataclasses.dataclass(frozen=True)
class WindowMean:
    """The mean of the last `window` checkpoints, whatever the horizon: averaged weights (LAWA, SWA)."""

    window: int

    def forecast(self, prefix: Prefix, horizons: NDArray[np.int64]) -> Singles:
        mean = prefix.weights[-self.window :].mean(0, dtype=np.float64).astype(np.float32)
        return np.repeat(mean[None], len(horizons), 0)


def linear_regrounding(learner: Learner, period: int, length: int) -> Jumps:
    """Train `period` iterations, go on along the line through their ends by `length` more, train again, and so on.

    RLVR-Linearity (arXiv 2601.04537), which has no test; actor and critic."""
    return Jumps(learner, Every(period, length), Linear(period), Linear(period), UNTESTED)


def rank_one(learner: Learner, start: int, length: int) -> Jumps:
    """One jump along the path's first singular direction by a fitted line (RELEX, arXiv 2605.21468); actor alone."""
    return Jumps(learner, At((start,), (length,)), RankOne(), None, UNTESTED)


def averaging(learner: Learner, window: int) -> Jumps:
    """Every `window` iterations go on from the mean of the last `window` checkpoints, actor and critic."""
    mean: Predictor = WindowMean(window)
    return Jumps(learner, Every(window, 1), mean, mean, UNTESTED)
