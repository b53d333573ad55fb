"""How a population's policies draw their actions: all in which continuous and discrete actions differ while PPO acts.

Shapes  N trials of E environments each, numbered trial by trial; T = num_steps; A outputs of an actor, W numbers in an
        action: A of them, or the index of a discrete one; P = number of parameters of a trial.

A trial's noise comes from its own generator, before the iteration's first step, and is the same for any other trials.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tipl.collecting.ppo_config import PPOConfig
from tipl.collecting.transitions import log_prob
from tipl.policy import PolicySpec

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]


def spec_of_actions(obs_dim: int, act_dim: int, num_actions: int | None, config: PPOConfig) -> PolicySpec:
    """Return the policy that learns to give actions of `act_dim` numbers, or to choose one of `num_actions`."""
    if num_actions is None:
        return PolicySpec(obs_dim, act_dim, config.hidden_sizes, config.activation)
    return PolicySpec(obs_dim, num_actions, config.hidden_sizes, config.activation, spread="none", outputs="logits")


class Actions(ABC):
    """The actions of one iteration, which `take` draws one step after the other."""

    actions: Singles
    """(N * E, T, W), as the update takes them: continuous ones not clipped, discrete ones counted from 0."""
    log_probs: Singles
    """(N * E, T)"""

    @abstractmethod
    def take(self, t: int, outputs: Singles) -> Floats:
        """Draw the actions of step t, given the actors' outputs (N * E, A); return what the environments take."""


class GaussianActions(Actions):
    """Outputs are means; to them comes noise with the standard deviations exp(log_std)."""

    def __init__(self, log_std: Singles, generators: Sequence[torch.Generator], num_envs: int, num_steps: int) -> None:
        """Draw the noise of all steps; log_std (N, A)."""
        N, A = log_std.shape
        noise = np.empty((N, num_envs, num_steps, A), np.float32)
        for row, generator in zip(noise, generators, strict=True):
            torch.randn(num_envs, num_steps, A, generator=generator, out=torch.from_numpy(row))
        # Actions are not clipped yet, so the noise decides.
        self.log_probs = log_prob(noise, log_std[:, None, None]).reshape(N * num_envs, num_steps)
        noise *= np.exp(log_std)[:, None, None]
        self.actions = noise.reshape(N * num_envs, num_steps, A)  # each step adds its mean

    def take(self, t: int, outputs: Singles) -> Floats:
        action = self.actions[:, t]
        action += outputs
        return action.astype(np.float64)


class CategoricalActions(Actions):
    """Outputs are logits; the greatest of logits + Gumbel noise has the probabilities of their softmax."""

    def __init__(
        self, num_actions: int, start: float, generators: Sequence[torch.Generator], num_envs: int, num_steps: int
    ) -> None:
        """Draw the noise of all steps; the environments count actions from `start`."""
        J, self.start = len(generators) * num_envs, start
        noise = np.empty((len(generators), num_envs, num_steps, num_actions))
        for row, generator in zip(noise, generators, strict=True):
            torch.rand(row.shape, generator=generator, dtype=torch.float64, out=torch.from_numpy(row))
            with np.errstate(divide="ignore"):  # of a zero, one in 2^53 numbers: it becomes -inf, and is not chosen
                row[:] = -np.log(-np.log(row))
        self._noise = noise.reshape(J, num_steps, num_actions)
        self.actions = np.empty((J, num_steps, 1), np.float32)
        self.log_probs = np.empty((J, num_steps), np.float32)

    def take(self, t: int, outputs: Singles) -> Floats:
        index = (outputs + self._noise[:, t]).argmax(1, keepdims=True)  # (J, 1)
        shifted = outputs - outputs.max(1, keepdims=True)
        self.log_probs[:, t] = np.take_along_axis(shifted, index, 1)[:, 0] - np.log(np.exp(shifted).sum(1))
        self.actions[:, t] = index
        taken: Floats = self.start + index
        return taken
