"""Vectorised environments: Gymnasium's MuJoCo tasks over `mujoco.batch.Batch`, any other one of vectors one by one.

`make_vec(env_id, num_envs, seeds=...)` returns a `VectorEnv`. Environment i's randomness depends on seeds[i] alone and
equals Gymnasium's: its first episode is that of `env.reset(seed=seeds[i])`, later ones continue the same generator.

Shapes  N = num_envs; observations (N, obs_dim) and actions (N, act_dim) are float64. A discrete action, k of a
        Discrete(n, start=k), ..., k + n - 1, is a vector of one whole number.
"""

import difflib
import importlib
import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Discrete
from mujoco.batch import Batch
from numpy.typing import NDArray

from tipl.collecting.mujoco_tasks import TASKS, Bools, Floats, MujocoTask, Rows
from tipl.collecting.spaces import ActionSpace, bounds, checked_actions, flat_box

Ids = NDArray[np.intp]


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
            self._seed(_checked_seeds("reset", seeds, self.num_envs))
        self._obs[:] = self._restart(self._all)
        self._started = True
        return self._obs.copy()

    def step(self, actions: Floats, active: Bools | None = None) -> Step:
        """Step the environments with actions (N, act_dim), clipped to the action space, and reset those that ended.

        Where active (N,) is False an environment is not stepped, costs nothing and its action is ignored; its outputs
        are its current observation, reward 0, False, False. The arrays returned are not reused by later steps.

        Raises RuntimeError before the first reset, TypeError for a wrong dtype, ValueError for a wrong shape, actions
        that are not finite, or discrete actions that are not whole.
        """
        ids = self._checked_ids(actions, active)
        index = slice(None) if ids is self._all else ids
        reward = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, np.bool_), np.zeros(self.num_envs, np.bool_)
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
            raise TypeError(f"step: actions must be a float64 array, got {_kind(actions)}")
        if actions.shape != (self.num_envs, self.act_dim):
            expected = (self.num_envs, self.act_dim)
            raise ValueError(f"step: actions must have shape (num_envs, act_dim) = {expected}, got {actions.shape}")
        ids = self._all
        if active is not None:
            if not isinstance(active, np.ndarray) or active.dtype != np.bool_:
                raise TypeError(f"step: active must be a bool array, got {_kind(active)}")
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

    @abstractmethod
    def close(self) -> None:
        """Release the environments' resources; they cannot be used afterwards."""


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
        except Exception as error:
            if not env_kwargs:
                raise
            # What an environment raises for arguments that it does not take may be anything.
            raise ValueError(f"make_vec: {env_id} refuses env_kwargs {env_kwargs}: {error}") from error
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
            obs[row], reward[row], terminated[row], truncated[row], _ = self._envs[i].step(action)
        return obs, reward, terminated, truncated

    def _restart(self, ids: Ids) -> Floats:
        obs = np.empty((len(ids), self.obs_dim))
        for row, i in enumerate(ids):
            obs[row], _ = self._envs[i].reset(seed=self._seeds[i])
            self._seeds[i] = None
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
    checked_seeds = _checked_seeds("make_vec", seeds, num_envs)
    registered_limit = _spec(env_id).max_episode_steps
    limit = registered_limit if max_episode_steps is None else max_episode_steps
    task = TASKS.get(env_id)
    if task is not None and limit is not None and not env_kwargs:
        return MujocoVectorEnv(
            env_id, task, num_envs, seeds=checked_seeds, num_threads=num_threads, max_episode_steps=limit
        )
    return GymnasiumVectorEnv(
        env_id, num_envs, seeds=checked_seeds, max_episode_steps=max_episode_steps, env_kwargs=env_kwargs or {}
    )


def _spec(env_id: str) -> EnvSpec:
    """Return Gymnasium's specification of exactly this id; "module:id" imports the module first."""
    if not isinstance(env_id, str):
        raise TypeError(f"make_vec: env_id must be a string, got {_kind(env_id)}")
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
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
        raise TypeError(f"make_vec: {name} must be an int, got {_kind(value)}") from None
    if value < low:
        raise ValueError(f"make_vec: {name} must be at least {low}, got {value}")
    return value


def _checked_seeds(caller: str, seeds: Sequence[int], num_envs: int) -> list[int]:
    try:
        checked = [operator.index(seed) for seed in seeds]
    except TypeError:
        raise TypeError(f"{caller}: seeds must be a sequence of ints, got {seeds!r}") from None
    if len(checked) != num_envs:
        raise ValueError(f"{caller}: seeds must have num_envs = {num_envs} entries, got {len(checked)}")
    if min(checked) < 0:
        raise ValueError(f"{caller}: seeds must not be negative, got {min(checked)}")
    return checked


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, np.ndarray) else type(value).__name__
