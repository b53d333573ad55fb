"""What all vectorised environments have in common: checked actions, and a reset in the step that ends an episode.

Shapes  N = num_envs; observations (N, obs_dim) and actions (N, act_dim) are float64. A discrete action, k of a
        Discrete(n, start=k), ..., k + n - 1, is a vector of one whole number.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from gymnasium.spaces import Discrete
from numpy.typing import NDArray

from tipl.collecting.mujoco_tasks import Bools, Floats
from tipl.collecting.simulator_warnings import simulator_warnings
from tipl.collecting.spaces import ActionSpace, bounds

Ids = NDArray[np.intp]
_NO_SIMULATION = "env_id must be a MuJoCo task of Gymnasium's, whose state can be read, got {!r}"


@dataclass(frozen=True)
class Step:
    """Results of one step of N environments. Where an episode ended, the next one has begun (same-step autoreset)."""

    obs: Floats
    """(N, obs_dim): the observation for the next action; where an episode ended, the new episode's first."""
    reward: Floats
    """(N,)"""
    terminated: Bools
    """(N,): the task ended the episode, in a state without a future."""
    truncated: Bools
    """(N,): the time limit was reached. If the task ends the episode on that same step, both are true."""
    final_obs: Floats
    """(N, obs_dim): the observation that the action led to; differs from `obs` only where an episode ended."""


class VectorEnv(ABC):
    """N environments of one kind, stepped together, each reset in the step that ends its episode."""

    env_id: str
    env_kwargs: Mapping[str, Any] = MappingProxyType({})
    """Further arguments that it was made with."""
    num_envs: int
    obs_dim: int
    act_dim: int
    action_low: Floats
    """(act_dim,)"""
    action_high: Floats
    """(act_dim,)"""
    num_actions: int | None
    """How many discrete actions there are; None where actions are continuous."""
    max_episode_steps: int | None
    """None where Gymnasium registers no time limit."""

    def __init__(
        self, env_id: str, num_envs: int, obs_dim: int, action_space: ActionSpace, max_episode_steps: int | None
    ) -> None:
        self.env_id, self.num_envs, self.obs_dim = env_id, num_envs, obs_dim
        self.action_low, self.action_high = bounds(action_space)
        self.act_dim = len(self.action_low)
        self.num_actions = int(action_space.n) if isinstance(action_space, Discrete) else None
        self.max_episode_steps = max_episode_steps
        self._all: Ids = np.arange(num_envs)
        self._obs = np.zeros((num_envs, obs_dim))  # the current observations
        self._started = False

    def reset(self, seeds: Sequence[int] | None = None) -> Floats:
        """Start a new episode in every environment and return the observations (N, obs_dim).

        With seeds (N,), every environment's generator starts again from its seed. Without, the generators continue; at
        first they start from the seeds given to `make_vec`. Raises TypeError and ValueError for wrong seeds.
        """
        if seeds is not None:
            self._seed(checked_seeds("reset", seeds, self.num_envs))
        with simulator_warnings():
            self._obs[:] = self._restart(self._all)
        self._started = True
        return self._obs.copy()

    def step(self, actions: Floats, active: Bools | None = None) -> Step:
        """Step the environments with actions (N, act_dim), clipped to the action space, and reset those that ended.

        Where active (N,) is False an environment is not stepped, costs nothing and its action is ignored; its outputs
        are its current observation, reward 0, False, False. The arrays returned are not reused by later steps.

        Raises RuntimeError before the first reset, and where the environment's own code raises anything; TypeError for
        a wrong dtype; ValueError for a wrong shape, actions that are not finite, discrete actions that are not whole,
        or where the environment gives observations or rewards that it should not.
        """
        ids = self._checked_ids(actions, active)
        index = slice(None) if ids is self._all else ids
        reward = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, np.bool_), np.zeros(self.num_envs, np.bool_)
        with simulator_warnings():
            if ids.size:
                clipped = np.clip(actions[index], self.action_low, self.action_high)
                self._obs[index], reward[index], terminated[index], truncated[index] = self._advance(clipped, ids)
            final_obs = self._obs.copy()
            ended = np.flatnonzero(terminated | truncated)
            if ended.size:
                self._obs[ended] = self._restart(ended)
        return Step(self._obs.copy(), reward, terminated, truncated, final_obs)

    def _checked_ids(self, actions: Floats, active: Bools | None) -> Ids:
        """Check the arguments of `step`; return the indices of the environments to step, `self._all` for all."""
        if not self._started:
            raise RuntimeError("step: call reset() first")
        if not isinstance(actions, np.ndarray) or actions.dtype != np.float64:
            raise TypeError(f"step: actions must be a float64 array, got {kind_of(actions)}")
        if actions.shape != (self.num_envs, self.act_dim):
            expected = (self.num_envs, self.act_dim)
            raise ValueError(f"step: actions must have shape (num_envs, act_dim) = {expected}, got {actions.shape}")
        ids = self._all
        if active is not None:
            if not isinstance(active, np.ndarray) or active.dtype != np.bool_:
                raise TypeError(f"step: active must be a bool array, got {kind_of(active)}")
            if active.shape != (self.num_envs,):
                raise ValueError(f"step: active must have shape (num_envs,) = ({self.num_envs},), got {active.shape}")
            if not active.all():
                ids = np.flatnonzero(active)
        finite = np.isfinite(actions)
        if not finite.all():
            bad = [int(i) for i in ids if not finite[i].all()]
            if bad:
                raise ValueError(f"step: actions must be finite, got {actions[bad[0]]} in row {bad[0]}")
        if self.num_actions is not None and (actions[ids] != np.rint(actions[ids])).any():
            raise ValueError(f"step: actions must be whole numbers, got {actions[ids, 0]}")
        return ids

    @abstractmethod
    def _seed(self, seeds: list[int]) -> None:
        """Start environment i's generator from seeds[i]."""

    @abstractmethod
    def _advance(self, actions: Floats, ids: Ids) -> tuple[Floats, Floats, Bools, Bools]:
        """Step the n environments `ids` with actions (n, act_dim) -> observations, rewards, terminated, truncated."""

    @abstractmethod
    def _restart(self, ids: Ids) -> Floats:
        """Start a new episode in the n environments `ids`; return its first observations (n, obs_dim)."""

    def simulation(self) -> tuple[Any, float]:
        """Return MuJoCo's model and the seconds of a step. Raises ValueError where this is no task of MuJoCo."""
        raise ValueError(_NO_SIMULATION.format(self.env_id))

    def simulation_states(self) -> Floats:
        """Return MuJoCo's mjSTATE_INTEGRATION of each environment (N, nstate). Raises ValueError as `simulation`."""
        raise ValueError(_NO_SIMULATION.format(self.env_id))

    @abstractmethod
    def close(self) -> None:
        """Release the environments' resources; they cannot be used afterwards."""


def checked_seeds(caller: str, seeds: Sequence[int], num_envs: int) -> list[int]:
    """Return one int for each environment. Raises TypeError and ValueError where `seeds` are not that."""
    try:
        checked = [operator.index(seed) for seed in seeds]
    except TypeError:
        raise TypeError(f"{caller}: seeds must be a sequence of ints, got {seeds!r}") from None
    if len(checked) != num_envs:
        raise ValueError(f"{caller}: seeds must have num_envs = {num_envs} entries, got {len(checked)}")
    if min(checked) < 0:
        raise ValueError(f"{caller}: seeds must not be negative, got {min(checked)}")
    return checked


def kind_of(value: object) -> str:
    """Return of which type a value is, in words."""
    return str(value.dtype) if isinstance(value, np.ndarray) else type(value).__name__
