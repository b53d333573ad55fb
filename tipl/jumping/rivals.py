"""What a forecast must beat in live training: other ways to change a run's weights between iterations.

Each has the interface of `Jumps`: make it of a `Learner`, call `after_iteration` after each update. Rivals that are
settings of PPO (a higher learning rate, more epochs, annealing, target_kl) need no class.

Shapes  N runs that learn in lockstep; P weights of a run, actor and critic.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tipl.forecasting.forecaster import Forecaster
from tipl.judging.predictors import Linear, Predictor, RankOne
from tipl.jumping.jump_config import JumpConfig
from tipl.jumping.jumps import At, Every, Forecasts, Jump, Jumps, Test, Walk, rows_of
from tipl.jumping.learner import Learner, Singles
from tipl.subspace.prefix import Prefix

UNTESTED = JumpConfig(margin=None, log_std_drop=None)


class OuterSteps:
    """Outer-PPO (arXiv 2411.00666): what an iteration changes is a gradient for an outer optimiser.

    With delta the change of one iteration, v = momentum v + delta, the weights go on from before it by
    step (delta + momentum v), which is Nesterov's momentum; without momentum by step delta.
    """

    def __init__(self, learner: Learner, step: float, momentum: float = 0.0) -> None:
        if not 0.0 < step < np.inf or not 0.0 <= momentum < 1.0:
            raise ValueError(f"OuterSteps: step must be positive and momentum lie in [0, 1), got {step} and {momentum}")
        self.learner, self.step, self.momentum = learner, step, momentum
        self.jumps: list[Jump] = []
        self.tests: dict[int, Test] = {}
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


@dataclasses.dataclass(frozen=True)
class TrimmedAndBoosted:
    """The last checkpoint without what lies outside the path's major directions, further along the first of these.

    After policy path trimming and boosting (PPTB, arXiv 2303.01391). Coordinates are those of the prefix's temporal SVD
    from theta_0; each of the first `num_boosted` goes on by `boost` times its change over the last `window`
    checkpoints. The horizon does not matter.
    """

    n_components: int
    """Major directions, which are kept."""
    boost: float
    window: int
    num_boosted: int = 2

    def forecast(self, prefix: Prefix, horizons: NDArray[np.int64]) -> Singles:
        basis = prefix.basis(self.n_components).through(prefix.weights[0])
        coordinates = basis.encode(prefix.weights)  # (h+1, k)
        end = coordinates[-1].copy()
        change = end - coordinates[max(0, prefix.end - self.window)]
        end[: self.num_boosted] += np.float32(self.boost) * change[: self.num_boosted]
        return np.repeat(basis.decode(end[None]), len(horizons), 0)


@dataclasses.dataclass(frozen=True)
class Falling:
    """A jump every `period` iterations, whose length falls by a constant factor from `first` to 1 over `num_jumps`.

    That is how NiNo (arXiv 2409.04434) applies its forecasts, with 40 for `first`.
    """

    period: int
    first: int
    num_jumps: int

    def ahead(self, walk: Walk) -> int:
        number, rest = divmod(walk.iteration, self.period)
        if rest or not 1 <= number <= self.num_jumps:
            return 0
        length: float = self.first ** (1 - (number - 1) / max(1, self.num_jumps - 1))
        return max(1, round(length))


def trimming_and_boosting(learner: Learner, period: int, n_components: int, boost: float) -> Jumps:
    """Every `period` iterations trim the actor's path to its major directions and boost the first two of them."""
    return Jumps(learner, Every(period, 1), TrimmedAndBoosted(n_components, boost, period), None, UNTESTED)


def by_ninos_rule(learner: Learner, forecaster: Forecaster, period: int, first: int, num_jumps: int) -> Jumps:
    """Jump along a forecaster's forecasts as NiNo does: regularly, ever less far, and untested; actor and critic."""
    config = dataclasses.replace(UNTESTED, max_rows=rows_of(forecaster))
    critic = None if learner.critic is None else Forecasts(forecaster, learner.critic)
    return Jumps(learner, Falling(period, first, num_jumps), Forecasts(forecaster, learner.actor), critic, config)


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
