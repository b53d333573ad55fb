"""What a population hands out: diagnostics of an iteration, and all that its next iterations depend on.

Shapes  N trials of E environments each, K of them kept; P parameters of a trial, O observations.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class UpdateStats:
    """Diagnostics of one iteration's update for each trial, (N,), with CleanRL's names and SB3's averages."""

    policy_loss: Floats
    value_loss: Floats
    """Mean squared error of the values. Like policy_loss and clipfrac, a mean over all minibatches."""
    entropy: Floats
    """Entropy of the action distribution after the update; of discrete actions a mean over all minibatches."""
    approx_kl: Floats
    """Mean of (r - 1) - log r over the last epoch, where r is the probability ratio, new policy over old."""
    clipfrac: Floats
    """Share of the steps whose r lay outside the clip range."""
    explained_variance: Floats
    """1 - Var(returns - values) / Var(returns), before the update; NaN where all returns are equal."""


@dataclasses.dataclass(frozen=True)
class IterationStats(UpdateStats):
    """Returns, losses and timings of one iteration; arrays have one entry per trial, (N,)."""

    episodic_return: Floats
    """Mean return of the episodes that ended in this iteration; where none did, the last iteration's value; NaN before
    the first episode has ended."""
    num_episodes: NDArray[np.int64]
    """Episodes that ended in this iteration."""
    learning_rate: float
    seconds: dict[str, float]
    """Wall-clock time of "env" (the environments' steps), "policy" (the rest of acting) and "update"."""


@dataclasses.dataclass(frozen=True)
class PopulationState:
    """Everything that the next iterations of a population depend on."""

    env_steps: int
    arrays: dict[str, NDArray[Any]]
    """One row per trial: params (N, P), optimizer.step (N,), optimizer.exp_avg and optimizer.exp_avg_sq (N, P),
    generators (N, bytes), episodic_return (N,) and, where observations are normalised, obs.mean and obs.var (N, 1, O)
    and obs.count (N, 1, 1); where rewards are normalised, reward.mean, reward.var and reward.count (N, 1, 1). One row
    per environment: running_return (N * E,), where rewards are normalised discounted_return (N * E,), and env.*, the
    fields of `MujocoState` except rngs."""
    env_rngs: list[Any]
    """(N * E,): `MujocoState.rngs`, plain dicts."""


@dataclasses.dataclass(frozen=True)
class KeptTrials:
    """Some trials of a population as they were between two iterations."""

    trials: Sequence[int]
    """Their indices in the population, (K,)."""
    arrays: dict[str, NDArray[Any]]
    """Their rows of `PopulationState.arrays`."""
    env_rngs: list[Any] | None
    """(K * E,): `MujocoState.rngs`; None where the environments' state could not be saved, as in Gymnasium's own."""
