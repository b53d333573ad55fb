"""PPO's buffer, the steps of one iteration, and the arithmetic on it: advantages, log-probabilities and the like.

Shapes  N trials of E environments each, numbered trial by trial; T = num_steps; O = obs_dim, A = act_dim.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

LOG_2PI = math.log(2 * math.pi)


class FinalStep(NamedTuple):
    """A step whose next value is not that of row t + 1: it ended by a time limit, or is the iteration's last."""

    env: int
    t: int
    final_obs: Singles
    """(O,): the observation after the step, before any reset."""


@dataclasses.dataclass(frozen=True)
class Transitions:
    """The steps of one iteration. Every row is a real step: environments reset in the step that ends an episode."""

    observations: Singles
    """(N * E, T, O), normalised where the networks see them so."""
    actions: Singles
    """(N * E, T, A), not clipped to the action space; of discrete actions (N * E, T, 1), counted from 0."""
    log_probs: Singles
    """(N * E, T)"""
    rewards: Singles
    """(T, N * E), normalised if the settings say so."""
    terminated: NDArray[np.bool_]
    """(T, N * E)"""
    truncated: NDArray[np.bool_]
    """(T, N * E)"""
    final_steps: list[FinalStep]


def gae(
    rewards: Singles,
    values: Singles,
    next_values: Singles,
    terminated: NDArray[np.bool_],
    done: NDArray[np.bool_],
    *,
    gamma: float,
    gae_lambda: float,
) -> Singles:
    """Return GAE advantages (T, J); every input is (T, J), J environments. Schulman et al. 2016, arXiv:1506.02438.

    `next_values` are the values of the observations after each step; where a time limit ended the episode, of its final
    observation. `terminated` cuts the bootstrap; `done` (terminated or truncated) cuts only the running sum.
    """
    deltas = rewards + np.float32(gamma) * ~terminated * next_values - values  # (T, J)
    decay = np.float32(gamma * gae_lambda) * ~done  # (T, J)
    advantages, running = np.empty_like(deltas), np.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):  # backwards, because A_t needs A_{t+1}
        running *= decay[t]
        running += deltas[t]
        advantages[t] = running
    return advantages


def log_prob(noise: Singles, log_std: Singles) -> Singles:
    """Return the log-probabilities (...) of continuous actions mean + exp(log_std) noise, both (..., A)."""
    A = noise.shape[-1]
    result: Singles = -0.5 * np.square(noise).sum(-1) - (log_std.sum(-1) + np.float32(0.5 * LOG_2PI * A))
    return result


def entropy(log_std: Singles) -> Floats:
    """Return the entropies (N,) of the distributions of continuous actions; log_std (N, A)."""
    result: Floats = (log_std.astype(np.float64) + 0.5 * (1 + LOG_2PI)).sum(1)
    return result


def explained_variance(returns: Singles, errors: Singles) -> Floats:
    """Return 1 - Var(errors) / Var(returns) over the S steps, (N,); NaN where all returns (N, S) are equal."""
    variance: Floats = returns.var(1, dtype=np.float64)
    variance[variance == 0] = np.nan
    explained: Floats = 1 - errors.var(1, dtype=np.float64) / variance
    return explained
