"""Environments that Gymnasium steps one by one: any that is registered, with arguments of its own."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv

from tipl.collecting.mujoco_tasks import Bools, Floats
from tipl.collecting.spaces import checked_actions, flat_box
from tipl.collecting.vector_env import Ids, VectorEnv


class GymnasiumVectorEnv(VectorEnv):
    """Any registered environment of vector observations and of vector or Discrete actions, stepped one by one."""

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        *,
        seeds: list[int],
        max_episode_steps: int | None,
        env_kwargs: Mapping[str, Any],
    ) -> None:
        limits: dict[str, Any] = {} if max_episode_steps is None else {"max_episode_steps": max_episode_steps}
        try:
            with warnings.catch_warnings():  # an older version of a task, named explicitly, is no mistake
                warnings.filterwarnings("ignore", message=".*is out of date", category=DeprecationWarning)
                if env_kwargs:
                    _try_out(env_id, env_kwargs)
                vec: Any = gymnasium.make_vec(
                    env_id, num_envs=num_envs, vectorization_mode="sync", **limits, **env_kwargs
                )
        except (ImportError, gymnasium.error.Error) as error:
            raise ValueError(f"make_vec: Gymnasium refuses {env_id}: {error}") from error
        except Exception as error:  # an environment may raise anything, as for arguments that it needs or does not take
            did = f"refuses env_kwargs {dict(env_kwargs)!r:.200}" if env_kwargs else "cannot be made"
            raise ValueError(f"make_vec: {env_id} {did}: {type(error).__name__}: {error}") from error
        try:
            action_space = checked_actions(env_id, vec.single_action_space)
            observation_space = flat_box(env_id, "observations", vec.single_observation_space)
        except ValueError:
            vec.close()
            raise
        limit = vec.envs[0].spec.max_episode_steps
        super().__init__(env_id, num_envs, observation_space.shape[0], action_space, limit)
        self._vec = vec
        self._envs = vec.envs  # stepped here one by one, because the vector environment's step() takes no mask
        self._action_dtype = action_space.dtype
        self._seed(seeds)

    def _seed(self, seeds: list[int]) -> None:
        self._seeds: list[int | None] = [*seeds]  # used, and then set to None, by each environment's next reset

    def _advance(self, actions: Floats, ids: Ids) -> tuple[Floats, Floats, Bools, Bools]:
        n = len(ids)
        obs, reward = np.empty((n, self.obs_dim)), np.empty(n)
        terminated, truncated = np.empty(n, np.bool_), np.empty(n, np.bool_)
        taken: Any = actions.astype(self._action_dtype)
        if self.num_actions is not None:
            taken = taken[:, 0]
        for row, (i, action) in enumerate(zip(ids, taken, strict=True)):
            with self._failing("step"):
                seen, reward[row], terminated[row], truncated[row], _ = self._envs[i].step(action)
            obs[row] = self._checked("step", seen)
        if not np.isfinite(reward).all():
            raise ValueError(f"step: {self.env_id} gave a reward that is not finite, {reward[~np.isfinite(reward)][0]}")
        return obs, reward, terminated, truncated

    def _restart(self, ids: Ids) -> Floats:
        obs = np.empty((len(ids), self.obs_dim))
        for row, i in enumerate(ids):
            with self._failing("reset"):
                seen, _ = self._envs[i].reset(seed=self._seeds[i])
            obs[row] = self._checked("reset", seen)
            self._seeds[i] = None
        return obs

    @contextlib.contextmanager
    def _failing(self, caller: str) -> Iterator[None]:
        """Raise RuntimeError, which names the environment, for whatever its code raises."""
        try:
            yield
        except Exception as error:
            raise RuntimeError(f"{caller}: {self.env_id} failed: {type(error).__name__}: {error}") from error

    def _checked(self, caller: str, obs: Any) -> Any:
        """Return an environment's observation. Raises ValueError where it has another shape than the observation space
        (which NumPy might stretch), or is not finite (which would look as if the policy had diverged).
        """
        if np.shape(obs) != (self.obs_dim,):
            expected = f"its observation space has {(self.obs_dim,)}"
            raise ValueError(f"{caller}: {self.env_id} gave an observation of shape {np.shape(obs)}; {expected}")
        if not np.isfinite(obs).all():
            raise ValueError(f"{caller}: {self.env_id} gave an observation that is not finite, {obs}")
        return obs

    def simulation(self) -> tuple[Any, float]:
        env = self._envs[0].unwrapped
        return (env.model, float(env.dt)) if isinstance(env, MujocoEnv) else super().simulation()

    def simulation_states(self) -> Floats:
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        states = np.empty((self.num_envs, mujoco.mj_stateSize(self.simulation()[0], kind)))
        for env, state in zip(self._envs, states, strict=True):
            mujoco.mj_getState(env.unwrapped.model, env.unwrapped.data, state, kind)
        return states

    def close(self) -> None:
        """Close the environments."""
        self._vec.close()


def _try_out(env_id: str, env_kwargs: Mapping[str, Any]) -> None:
    """Begin an episode, where an environment may fail on arguments that it took when it was made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the environments that are used warn themselves
        with contextlib.closing(gymnasium.make(env_id, **env_kwargs)) as env:
            env.reset(seed=0)
            env.action_space.seed(0)
            env.step(env.action_space.sample())
