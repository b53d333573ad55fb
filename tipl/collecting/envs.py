"""Vectorised environments: Gymnasium's MuJoCo tasks over `mujoco.batch.Batch`, any other one of vectors one by one.

`make_vec(env_id, num_envs, seeds=...)` returns a `VectorEnv`. Environment i's randomness depends on seeds[i] alone and
equals Gymnasium's: its first episode is that of `env.reset(seed=seeds[i])`, later ones continue the same generator.

Shapes  N = num_envs; observations (N, obs_dim) and actions (N, act_dim) are float64. A discrete action, k of a
        Discrete(n, start=k), ..., k + n - 1, is a vector of one whole number.
"""

import difflib
import importlib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box
from mujoco.batch import Batch
from numpy.typing import NDArray

from tipl.collecting.gymnasium_env import GymnasiumVectorEnv
from tipl.collecting.mujoco_tasks import TASKS, Bools, Floats, MujocoTask, Rows
from tipl.collecting.simulator_warnings import simulator_warnings
from tipl.collecting.vector_env import Ids, VectorEnv, checked_seeds, kind_of

MAX_THREADS = 1024
"""As many as the engine takes."""


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

    def simulation(self) -> tuple[Any, float]:
        return self._rows.model, self._rows.dt

    def simulation_states(self) -> Floats:
        states: Floats = self._batch.state.copy()
        return states

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
        env_kwargs: further arguments of the environment, such as ctrl_cost_weight. With any but max_episode_steps it
            is Gymnasium's own, stepped on the caller's thread.

    Raises:
        TypeError: an argument that should be an int is not one.
        ValueError: Gymnasium does not know the id, or refuses it or env_kwargs; the observations are not a Box of
            vectors, or the actions neither that nor Discrete; there are not `num_envs` seeds.
    """
    kwargs = dict(env_kwargs or {})
    if "render_mode" in kwargs:
        raise ValueError("make_vec: env_kwargs must not say render_mode: nothing is drawn")
    if "max_episode_steps" in kwargs:
        max_episode_steps = kwargs.pop("max_episode_steps")
        if type(max_episode_steps) is not int:
            raise ValueError(f"make_vec: env_kwargs: max_episode_steps must be an int, got {max_episode_steps!r:.80}")
    num_envs = _checked_int("num_envs", num_envs, 1)
    if num_threads is not None:
        num_threads = _checked_int("num_threads", num_threads, 1, MAX_THREADS)
    if max_episode_steps is not None:
        max_episode_steps = _checked_int("max_episode_steps", max_episode_steps, 1)
    checked = checked_seeds("make_vec", seeds, num_envs)
    registered_limit = _spec(env_id).max_episode_steps
    limit = registered_limit if max_episode_steps is None else max_episode_steps
    task = TASKS.get(env_id)
    env: VectorEnv
    with simulator_warnings():
        if task is not None and limit is not None and is_batched(env_id, kwargs):
            env = MujocoVectorEnv(
                env_id, task, num_envs, seeds=checked, num_threads=num_threads, max_episode_steps=limit
            )
        else:
            env = GymnasiumVectorEnv(
                env_id, num_envs, seeds=checked, max_episode_steps=max_episode_steps, env_kwargs=kwargs
            )
    env.env_kwargs = dict(env_kwargs or {})
    return env


def is_batched(env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> bool:
    """Return whether `make_vec` steps this environment in a `MujocoVectorEnv`."""
    return env_id in TASKS and not set(env_kwargs or ()) - {"max_episode_steps"}


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


def _checked_int(name: str, value: int, low: int, high: int = 2**31 - 1) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"make_vec: {name} must be an int, got {kind_of(value)}") from None
    if value < low:
        raise ValueError(f"make_vec: {name} must be at least {low}, got {value}")
    if value > high:
        raise ValueError(f"make_vec: {name} must be at most {high}, got {value}")
    return value
