"""Runs that can be moved: what jumps read, replace, keep and put back.

Shapes  N runs that learn in lockstep; P weights of a run, the actor's p first, then the critic's.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tipl.collecting.population import Population
from tipl.policy import Layout, ParameterLayout
from tipl.storing.actor_families import Settings
from tipl.storing.foreign_actors import Actor, find_actor

Singles = NDArray[np.float32]


class Learner(Protocol):
    """One run, or several that learn in lockstep, between two iterations."""

    actor: Layout
    """Which of a run's weights is which, of the first p."""
    critic: Layout | None
    """The same of the weights behind them; None where a run has no more."""

    def weights(self) -> Singles:
        """Return a copy of all weights, (N, P); not finite where a run has diverged."""
        ...

    def replace(self, run: int, weights: Singles) -> None:
        """Set the weights (P,) of one run; the optimiser's state stays."""
        ...

    def keep(self, run: int) -> Any:
        """Return a copy of all that the run's next iteration depends on, as far as it can be kept."""
        ...

    def put_back(self, run: int, kept: Any) -> None:
        """Make the run what it was when it was kept."""
        ...


class PopulationLearner:
    """All trials of a population; what is kept of one is everything, down to its environments."""

    def __init__(self, population: Population) -> None:
        self.population = population
        self.actor: Layout = population.spec
        self.critic: Layout | None = population.critic_layout

    def weights(self) -> Singles:
        return self.population.params.copy()

    def replace(self, run: int, weights: Singles) -> None:
        self.population.params[run] = weights

    def keep(self, run: int) -> Any:
        return self.population.keep([run])

    def put_back(self, run: int, kept: Any) -> None:
        self.population.put_back(kept)


class TorchLearner:
    """One run of any training loop in torch: a policy with actor and critic, its optimiser, and whatever else learns.

    What is kept is the policy's and the optimiser's state_dict and copies of what `normalisers` hold. Environments and
    random numbers go on as they are.
    """

    def __init__(
        self,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        actor: str | Sequence[str] | None = None,
        activation: str | None = None,
        normalisers: Mapping[str, Any] | None = None,
    ) -> None:
        """Watch `policy`, whose parameters jumps will change in place.

        Args:
            actor, activation: where the actor's parameters are, as in `Recorder`.
            normalisers: objects by name whose attributes are restored when a jump is undone, such as the running mean
                and standard deviation of observations.

        Raises ValueError where it is not clear which of the policy's parameters are the actor's, or an observation
        normaliser is part of the policy.
        """
        self._policy, self._optimizer, self._normalisers = policy, optimizer, dict(normalisers or {})
        state = _parameters(policy)
        try:
            self._actor: Actor = find_actor(policy.state_dict(), Settings(activation), actor)
        except ValueError as error:
            raise ValueError(f"Jumper: policy: {error}") from error
        if self._actor.normaliser:
            raise ValueError("Jumper: policy: its observation normaliser is a module of its own: pass the actor-critic")
        own = {state[key].data_ptr() for key in self._actor.keys if key in state}
        critic = {key: tensor for key, tensor in state.items() if tensor.data_ptr() not in own}
        self._critic_keys = tuple(critic)
        self.actor: Layout = self._actor.policy
        self.critic: Layout | None = None
        if critic:
            self.critic = ParameterLayout(tuple((key, tuple(tensor.shape) or (1,)) for key, tensor in critic.items()))

    def weights(self) -> Singles:
        state = self._policy.state_dict()
        if not all(bool(torch.isfinite(it).all()) for it in _parameters(self._policy).values()):
            num_params = self.actor.num_params + (0 if self.critic is None else self.critic.num_params)
            return np.full((1, num_params), np.nan, np.float32)
        critic = [state[key].detach().reshape(-1).float().cpu().numpy() for key in self._critic_keys]
        return np.concatenate([self._actor.flatten(state), *critic])[None]

    def replace(self, run: int, weights: Singles) -> None:
        state, p = self._policy.state_dict(), self.actor.num_params
        self._actor.write(weights[:p], state)
        if self.critic is not None:
            parts = self.critic.unflatten(torch.from_numpy(weights[p:].copy()))
            with torch.no_grad():
                for key, part in zip(self._critic_keys, parts.values(), strict=True):
                    state[key].copy_(part.reshape(state[key].shape))

    def keep(self, run: int) -> Any:
        optimizer = None if self._optimizer is None else copy.deepcopy(self._optimizer.state_dict())
        held = {name: copy.deepcopy(vars(it)) for name, it in self._normalisers.items()}
        return copy.deepcopy(self._policy.state_dict()), optimizer, held

    def put_back(self, run: int, kept: Any) -> None:
        policy, optimizer, held = kept
        self._policy.load_state_dict(policy)
        if self._optimizer is not None:
            self._optimizer.load_state_dict(copy.deepcopy(optimizer))
        for name, attributes in held.items():
            vars(self._normalisers[name]).update(copy.deepcopy(attributes))


def _parameters(policy: nn.Module) -> dict[str, Tensor]:
    """Return the policy's floating-point parameters by name, each tensor once."""
    return {name: it.data for name, it in policy.named_parameters() if it.is_floating_point()}
