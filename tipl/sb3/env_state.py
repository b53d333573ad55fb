"""The state of the environments that Stable-Baselines3 trains in, as a tree, and back.

Gymnasium has no way to ask an environment for its state. What is kept of each environment, of each of its wrappers and
of SB3's own is every attribute that can change in an episode or between episodes: plain values, arrays, generators of
random numbers, MuJoCo's simulation, and objects with such attributes (a NormalizeObservation's running mean). Not kept
are spaces, functions, renderers and the like, which do not change. An environment that has `state_dict` and
`load_state_dict` is kept by these instead.
"""

import enum
import functools
import logging
import pathlib
import re
import types
from collections.abc import Iterator
from typing import Any

import gymnasium
import mujoco
import numpy as np
from google_crc32c import value as crc32c
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import PassiveEnvChecker
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from tipl.storing.state_tree import RANDOM_NUMBERS, is_tree, random_state, set_random_state

_CONSTANTS = (
    gymnasium.Space, EnvSpec, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType,
    functools.partial, pathlib.PurePath, np.dtype, logging.Logger, mujoco.MjModel,
)  # fmt: skip
_HOW_MADE = {"spec", "_cached_spec", "metadata", "_metadata", "_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs"}
_PICTURES = {"mujoco_renderer", "viewer", "window", "screen", "clock", "surf"}  # where they are no plain values
_OF_VEC_ENV = {  # what is kept for itself, or written anew in every step
    "envs", "venv", "actions", "keys", "buf_obs", "buf_dones", "buf_rews", "buf_infos", "reset_infos", "obs_spaces",
    "class_attributes", "results_writer",
}  # fmt: skip
_OF_MONITOR = {"results_writer", "episode_returns", "episode_lengths", "episode_times"}  # of all episodes before
_DEPTH = 3  # of objects in objects
_OF_CONTACTS = ("efc_", "iefc_", "ifrc_", "iacc", "efm_con")  # MuJoCo's arrays whose sizes change with the contacts
_OF_MODEL = ("body_", "geom_", "jnt_", "dof_", "actuator_", "tendon_", "site_")

Tree = dict[str, Any]


class Lost(Exception):
    """Something cannot be kept or put back; the message says what."""


def envs_state(vec_env: Any) -> tuple[Tree, list[str]]:
    """Return the state of a VecEnv as a tree, and in words what of it cannot be kept."""
    *wrappers, base = layers(vec_env)
    outer = [_snapshot_of(wrapper) for wrapper in wrappers]
    inner, lost = [], [it for _, problems in outer for it in problems]
    if "envs" not in vars(base):
        lost.append(f"the environments of {type(base).__name__} run outside this process")
    for env in vars(base).get("envs", []):
        found = [_snapshot_of(layer) for layer in layers(env)]
        inner.append([kept for kept, _ in found])
        lost += [it for _, problems in found for it in problems]
    tree = {"wrappers": [kept for kept, _ in outer], "base": _snapshot_of(base)[0], "envs": inner}
    return tree, list(dict.fromkeys(lost))


def set_wrappers_state(vec_env: Any, tree: Tree) -> None:
    """Put the state of SB3's wrappers back: the statistics of VecNormalize, running returns. Raises Lost."""
    for wrapper, kept in zip(list(layers(vec_env))[:-1], tree["wrappers"], strict=True):
        _put_back(wrapper, kept)


def set_envs_state(vec_env: Any, tree: Tree) -> None:
    """Put the state of the environments themselves back. Raises Lost."""
    *_, base = layers(vec_env)
    _put_back(base, tree["base"])
    for env, states in zip(base.envs, tree["envs"], strict=True):
        for layer, kept in zip(layers(env), states, strict=True):
            _put_back(layer, kept)


def described(vec_env: Any) -> list[Any]:
    """Return how the environments are made: classes, ids and arguments, as plain values."""
    *wrappers, base = layers(vec_env)
    envs = []
    for env in vars(base).get("envs", []):
        spec = env.spec
        made = "" if spec is None else f"{spec.id} {spec.max_episode_steps} {sorted(spec.kwargs.items())}"
        made = re.sub(r" at 0x[0-9a-f]+", "", made)  # where in memory a function was
        envs.append(" in ".join([made, *(type(layer).__name__ for layer in reversed(list(layers(env))))]).strip())
    return [*(type(it).__name__ for it in [*wrappers, base]), *envs]


def layers(env: Any) -> Iterator[Any]:
    """Yield an environment's wrappers from the outermost on, and last itself; so too for a VecEnv."""
    while True:
        yield env
        inner = vars(env).get("env", vars(env).get("venv"))
        if inner is None:
            return
        env = inner


def _snapshot_of(layer: Any) -> tuple[Tree, list[str]]:
    """Return {attribute: [kind, content]} of one environment or wrapper, and in words what is not in it."""
    if _has_own_state(layer):
        return {"": ["own", layer.state_dict()]}, []
    kept, lost = {}, []
    inside = {id(it) for it in layers(layer)}
    for name, value in _attributes(layer).items():
        if id(value) in inside:
            continue
        try:
            kept[name] = _snapshot(value, _DEPTH)
        except Lost as error:
            lost.append(f"{type(layer).__name__}.{name}{error}")
    return kept, lost


def _has_own_state(layer: Any) -> bool:
    return hasattr(type(layer), "state_dict") and hasattr(type(layer), "load_state_dict")


def _attributes(layer: Any) -> Tree:
    """Return what may be state among the attributes of an environment, a wrapper or an object within one."""
    without = _HOW_MADE
    if isinstance(layer, VecEnv):
        without = without | _OF_VEC_ENV
    elif isinstance(layer, Monitor):
        without = without | _OF_MONITOR
    elif isinstance(layer, PassiveEnvChecker):
        without = without | {"_previous_data"}  # for its first checks
    return {
        name: value
        for name, value in vars(layer).items()
        if name not in without and not _is_constant(value) and (name not in _PICTURES or is_tree(value))
    }


def _is_constant(value: Any) -> bool:
    if type(value) in (list, tuple, dict) and value:
        return all(map(_is_constant, value.values() if isinstance(value, dict) else value))
    return isinstance(value, _CONSTANTS)


def _snapshot(value: Any, depth: int) -> list[Any]:
    if is_tree(value):
        return ["value", value]
    if isinstance(value, RANDOM_NUMBERS):
        return ["random", random_state(value)]
    if isinstance(value, enum.Enum):
        return ["enum", value.name]
    if isinstance(value, mujoco.MjData):
        return ["mujoco", _simulation(value)]
    if _has_own_state(value):
        return ["own", value.state_dict()]
    if depth and hasattr(value, "__dict__") and not isinstance(value, gymnasium.Env):
        inner = {}
        for name, it in _attributes(value).items():
            try:
                inner[name] = _snapshot(it, depth - 1)
            except Lost as error:
                raise Lost(f".{name}{error}") from None
        return ["object", inner]
    raise Lost(f" (a {type(value).__name__})")


def _put_back(thing: Any, kept: Tree) -> None:
    """Put attributes back into an environment, a wrapper or an object within one."""
    for name, (kind, content) in kept.items():
        place = f"{type(thing).__name__}.{name}"
        now = vars(thing).get(name)
        try:
            if kind == "own":
                (now if name else thing).load_state_dict(content)
            elif kind == "value" and isinstance(now, np.ndarray) and now.base is not None:
                now[...] = content  # a view, say of MuJoCo's memory, must stay one
            elif kind == "value":
                setattr(thing, name, content)
            elif kind == "enum":
                setattr(thing, name, type(now)[content])
            elif kind == "random":
                _put_back_random(thing, name, now, content)
            elif kind == "mujoco":
                _set_simulation(now, content)
            else:
                _put_back(now, content)
        except (AttributeError, LookupError, TypeError, ValueError, mujoco.FatalError) as error:
            raise Lost(f"{place} ({error})") from error


def _put_back_random(thing: Any, name: str, now: Any, state: Any) -> None:
    if now is None:  # Gymnasium makes it in the first reset
        now = np.random.default_rng(0)
        setattr(thing, name, now)
    set_random_state(now, state)


def _simulation(data: mujoco.MjData) -> Tree:
    """Return MuJoCo's state, and what the last step computed from the state before it, which the next step may read:
    Ant's reward takes the torso's position (`xpos`) before it steps."""
    state = np.empty(mujoco.mj_stateSize(data.model, mujoco.mjtState.mjSTATE_INTEGRATION))
    mujoco.mj_getState(data.model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    computed = np.concatenate([array.ravel() for array in _computed(data)])
    return {"state": state, "computed": computed, "model": _model_digest(data.model)}


def _set_simulation(data: mujoco.MjData, kept: Tree) -> None:
    if _model_digest(data.model) != kept["model"]:
        raise ValueError("its MuJoCo model is not the one that the run had, as where it is changed between episodes")
    mujoco.mj_setState(data.model, data, kept["state"], mujoco.mjtState.mjSTATE_INTEGRATION)
    mujoco.mj_forward(data.model, data)  # for contacts and constraints
    arrays = _computed(data)
    for array, part in zip(arrays, np.split(kept["computed"], np.cumsum([it.size for it in arrays])[:-1]), strict=True):
        array[...] = part.reshape(array.shape)
    mujoco.mj_setState(data.model, data, kept["state"], mujoco.mjtState.mjSTATE_INTEGRATION)


def _computed(data: mujoco.MjData) -> list[NDArray[np.float64]]:
    return _floats(data, [name for name in _names(mujoco.MjData) if not name.startswith(_OF_CONTACTS)])


def _model_digest(model: mujoco.MjModel) -> int:
    """Return a checksum of what environments change in a model: bodies, joints, actuators, gravity, the time step."""
    arrays = _floats(model, [name for name in _names(mujoco.MjModel) if name.startswith(_OF_MODEL)])
    parts = [*arrays, model.opt.gravity, np.float64(model.opt.timestep)]
    return int(crc32c(b"".join(part.tobytes() for part in parts)))


@functools.cache
def _names(kind: type) -> list[str]:
    return [name for name in dir(kind) if not name.startswith("_")]


def _floats(thing: Any, names: list[str]) -> list[NDArray[np.float64]]:
    """Return the arrays of floats among these attributes."""
    found = [getattr(thing, name) for name in names]
    return [it for it in found if isinstance(it, np.ndarray) and it.dtype == np.float64]
