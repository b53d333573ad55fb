"""Vectorised environments: Gymnasium's MuJoCo tasks over `mujoco.batch.Batch`, any other one of vectors one by one.

`make_vec(env_id, num_envs, seeds=...)` returns a `VectorEnv`. Environment i's randomness depends on seeds[i] alone and
equals Gymnasium's: its first episode is that of `env.reset(seed=seeds[i])`, later ones continue the same generator.
"""

import contextlib
import difflib
import importlib
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box
from mujoco.batch import Batch
from numpy.typing import NDArray

from tipl.collecting.mujoco_tasks import TASKS, Bools, Floats, MujocoTask, Rows
from tipl.collecting.spaces import checked_actions, flat_box
from tipl.collecting.vector_env import Ids, VectorEnv, checked_seeds, kind_of


@dataclass(frozen=True)
class MujocoState:
    """Everything that the next steps of a `MujocoVectorEnv` depend on."""

    simulations: Floats
    """(N, nstate): MuJoCo's mjSTATE_INTEGRATION of each simulation."""
    elapsed: NDArray[np.int64]
    """(N,): steps taken in the current episode."""
    obs: Floats
    """(N, obs_dim)"""
    before: Floats
    """(N,): the value before the next step that its reward needs (see `MujocoTask.before`)."""
    rngs: list[Any]
    """(N,): `np.random.Generator.bit_generator.state` of each environment, plain dicts."""


class MujocoVectorEnv(VectorEnv):
    """One of the tasks in `TASKS`, bit for bit Gymnasium's, in simulations that MuJoCo steps on its own threads."""

    def __init__(
        self,
        env_id: str,
        task: MujocoTask,
        num_envs: int,
        *,
        seeds: list[int],
        num_threads: int | None,
        max_episode_steps: int,
    ) -> None:
        model = task.load_model()
        contact_forces = "cfrc_ext" in task.derived
        self._task = task
        # Contact forces need each simulation's MjData, which a Batch keeps only when it is persistent.
        self._batch = Batch(model, num_envs, num_threads or 0, persistent=contact_forces)
        # These arrays are views. They are bound before the first step, because a field bound later is zero until the
        # step after.
        self._qpos, self._qvel, self._ctrl = (self._batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
        fields = {name: self._batch.bind(name) for name in task.derived if name != "cfrc_ext"}
        self._num_contacts = self._batch.bind("ncon")
        self._data = mujoco.MjData(model)
        self._cfrc_ext = np.zeros((num_envs, model.nbody, 6)) if contact_forces else None
        if self._cfrc_ext is not None:
            fields["cfrc_ext"] = self._cfrc_ext
        fields |= {"qpos": self._qpos, "qvel": self._qvel}
        self._rows = Rows(model, model.opt.timestep * task.frame_skip, fields, slice(None))
        self._initial_state = self._batch.state[0].copy()  # the model's defaults, as mj_resetData leaves them
        self._qpos0 = model.qpos0.copy()
        self._elapsed = np.zeros(num_envs, np.int64)
        self._before = np.zeros(num_envs)
        self._limit = max_episode_steps
        low, high = model.actuator_ctrlrange.astype(np.float32).T  # rounded to float32, as in Gymnasium's spaces
        obs_dim = task.observe(self._rows).shape[1]
        super().__init__(env_id, num_envs, obs_dim, Box(low, high, dtype=np.float32), max_episode_steps)
        self._seed(seeds)

    def _seed(self, seeds: list[int]) -> None:
        self._rngs = [np.random.default_rng(seed) for seed in seeds]

    def _advance(self, actions: Floats, ids: Ids) -> tuple[Floats, Floats, Bools, Bools]:
        rows = self._rows_of(ids)
        self._ctrl[rows.index] = actions
        self._batch.step(None if ids is self._all else ids, nstep=self._task.frame_skip)
        if self._cfrc_ext is not None:
            self._compute_contact_forces(ids, self._cfrc_ext)
        reward, terminated = self._task.score(rows, actions, self._before[rows.index])
        if self._task.before is not None:
            self._before[rows.index] = self._task.before(rows)
        self._elapsed[rows.index] += 1
        return self._task.observe(rows), reward, terminated, self._elapsed[rows.index] >= self._limit

    def _restart(self, ids: Ids) -> Floats:
        rows = self._rows_of(ids)
        self._batch.state[ids] = self._initial_state
        for i in ids:
            self._qpos[i], self._qvel[i] = self._task.reset(self._rngs[i], self._qpos0, self._qvel.shape[1])
        self._batch.forward(ids)
        if self._cfrc_ext is not None:
            self._cfrc_ext[ids] = 0.0  # as mj_resetData sets them; mj_forward does not compute them
        if self._task.before is not None:
            self._before[ids] = self._task.before(rows)
        self._elapsed[ids] = 0
        return self._task.observe(rows)

    def _rows_of(self, ids: Ids) -> Rows:
        if ids is self._all:
            return self._rows
        return Rows(self._rows.model, self._rows.dt, self._rows.fields, ids)

    def _compute_contact_forces(self, ids: Ids, cfrc_ext: Floats) -> None:
        """Compute cfrc_ext (N, nbody, 6) with mj_rnePostConstraint, which Gymnasium too calls after mj_step."""
        cfrc_ext[ids] = 0.0
        # Without contacts it is zero: these models have no equality constraints, and no external forces are applied.
        for i in ids[self._num_contacts[ids] > 0].tolist():
            self._batch.get_data(i, self._data)
            mujoco.mj_rnePostConstraint(self._rows.model, self._data)
            cfrc_ext[i] = self._data.cfrc_ext

    def get_state(self) -> MujocoState:
        """Return a copy of the state. Any environment made with the same arguments can continue from it."""
        rngs = [rng.bit_generator.state for rng in self._rngs]
        return MujocoState(self._batch.state.copy(), self._elapsed.copy(), self._obs.copy(), self._before.copy(), rngs)

    def set_state(self, state: MujocoState) -> None:
        """Continue from `state`. Raises ValueError where it comes from another task or number of environments."""
        if state.simulations.shape != self._batch.state.shape or state.obs.shape != self._obs.shape:
            expected, got = (self._batch.state.shape, self._obs.shape), (state.simulations.shape, state.obs.shape)
            raise ValueError(f"set_state: state must hold simulations and obs of shapes {expected}, got {got}")
        self._batch.state[:] = state.simulations
        self._elapsed[:], self._obs[:], self._before[:] = state.elapsed, state.obs, state.before
        for rng, rng_state in zip(self._rngs, state.rngs, strict=True):
            rng.bit_generator.state = rng_state
        self._started = True

    def close(self) -> None:
        """Do nothing: memory and threads of the simulations are freed with this object."""


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
        kwargs = (
            dict(env_kwargs) if max_episode_steps is None else {"max_episode_steps": max_episode_steps, **env_kwargs}
        )
        try:
            with warnings.catch_warnings():  # an older version of a task, named explicitly, is no mistake
                warnings.filterwarnings("ignore", message=".*is out of date", category=DeprecationWarning)
                vec: Any = gymnasium.make_vec(env_id, num_envs=num_envs, vectorization_mode="sync", **kwargs)
        except (ImportError, gymnasium.error.Error) as error:
            raise ValueError(f"make_vec: Gymnasium refuses {env_id}: {error}") from error
        except Exception as error:  # an environment may raise anything, as for arguments that it needs or does not take
            did = f"refuses env_kwargs {env_kwargs}" if env_kwargs else "cannot be made"
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

    def close(self) -> None:
        """Close the environments."""
        self._vec.close()


def make_vec(
    env_id: str,
    num_envs: int,
    *,
    seeds: Sequence[int],
    num_threads: int | None = None,
    max_episode_steps: int | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
) -> VectorEnv:
    """Return `num_envs` environments of a registered Gymnasium id; call `reset` before the first `step`.

    Args:
        seeds: one non-negative int for each environment, whose randomness depends on it alone.
        num_threads: threads that step a MuJoCo task of `TASKS`, by default one per CPU; results do not depend on it.
            Any other environment is stepped on the caller's thread.
        max_episode_steps: a time limit in place of the registered one.
        env_kwargs: further arguments of the environment, such as ctrl_cost_weight. With any it is Gymnasium's own,
            stepped on the caller's thread.

    Raises:
        TypeError: an argument that should be an int is not one.
        ValueError: Gymnasium does not know the id, or refuses it or env_kwargs; the observations are not a Box of
            vectors, or the actions neither that nor Discrete; there are not `num_envs` seeds.
    """
    num_envs = _checked_int("num_envs", num_envs, 1)
    if num_threads is not None:
        num_threads = _checked_int("num_threads", num_threads, 1)
    if max_episode_steps is not None:
        max_episode_steps = _checked_int("max_episode_steps", max_episode_steps, 1)
    own_seeds = checked_seeds("make_vec", seeds, num_envs)
    registered_limit = _spec(env_id).max_episode_steps
    limit = registered_limit if max_episode_steps is None else max_episode_steps
    task = TASKS.get(env_id)
    if task is not None and limit is not None and not env_kwargs:
        return MujocoVectorEnv(
            env_id, task, num_envs, seeds=own_seeds, num_threads=num_threads, max_episode_steps=limit
        )
    return GymnasiumVectorEnv(
        env_id, num_envs, seeds=own_seeds, max_episode_steps=max_episode_steps, env_kwargs=env_kwargs or {}
    )


def _spec(env_id: str) -> EnvSpec:
    """Return Gymnasium's specification of exactly this id; "module:id" imports the module first."""
    if not isinstance(env_id, str):
        raise TypeError(f"make_vec: env_id must be a string, got {kind_of(env_id)}")
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except Exception as error:  # the module may raise anything
            raise ValueError(f"make_vec: env_id {env_id!r} names a module that cannot be imported: {error}") from error
    spec = gymnasium.registry.get(name)
    if spec is None:
        close = difflib.get_close_matches(name, list(gymnasium.registry), n=2)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"make_vec: unknown env_id {env_id!r}{hint}")
    return spec


def _checked_int(name: str, value: int, low: int) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"make_vec: {name} must be an int, got {kind_of(value)}") from None
    if value < low:
        raise ValueError(f"make_vec: {name} must be at least {low}, got {value}")
    return value
