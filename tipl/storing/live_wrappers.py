"""What lies between a live environment and the policy that acts in it: Gymnasium's wrappers, SB3's, a user's own.

A wrapper that normalises observations by a running mean and variance has `obs_rms`: Gymnasium's NormalizeObservation
and SB3's VecNormalize. Those statistics can be folded into a policy; what other wrappers change is not recorded.
"""

import dataclasses
import dis
from collections.abc import Callable, Collection, Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import VectorActionWrapper, VectorEnv, VectorObservationWrapper, VectorWrapper

_HARMLESS = {
    "Monitor", "RecordEpisodeStatistics", "RecordVideo", "HumanRendering", "VecMonitor", "VecCheckNan",
    "VecVideoRecorder", "VecTransposeImage", "ClipAction",
}  # fmt: skip
"""By name, wrappers that change neither observations nor actions; the simulator clips actions too."""
_KEEP_SPACES = {"DelayObservation", "StickyAction", "RepeatAction", "MaxAndSkipObservation", "MaxAndSkipEnv"}
"""By name, wrappers that change one of these and none of the spaces."""


@dataclasses.dataclass(frozen=True)
class Wrapping:
    """What the wrappers of an environment, or of a vector of environments, do to observations and actions."""

    normaliser: Any = None
    """The wrapper, with `obs_rms`, whose statistics all observations were normalised by; None without one."""
    clips: tuple[str, ...] = ()
    """In words, what clips the normalised observations."""
    changes: tuple[str, ...] = ()
    """In words, all other wrappers that change observations or actions."""
    names: tuple[str, ...] = ()
    """Class names of the wrappers in `normaliser` and `clips`."""


def is_wrapping(thing: Any) -> bool:
    """Return whether `thing` is an environment of Gymnasium's or SB3's, or a vector of them."""
    return isinstance(thing, gymnasium.Env | VectorEnv) or bool({"venv", "envs", "remotes"} & vars_of(thing).keys())


def vars_of(thing: Any) -> dict[str, Any]:
    """Return the attributes that an object has itself; SB3's wrappers pass those of others on."""
    return getattr(thing, "__dict__", {})


def wrapping_of(env: Any, registered: Collection[str] = ()) -> Wrapping:
    """Return what the wrappers around and within `env` do, but for those named in `registered`."""
    outer = list(_chain(env))
    inside = vars_of(outer[-1]).get("envs")
    rows = [[*outer, *_chain(it)] for it in inside] if inside else [outer]
    normalisers: list[Any] = []
    clips: dict[str, None] = {}
    changes: dict[str, None] = {}
    names: dict[str, None] = {}
    for row in rows:
        layers = [(layer, _effect_of(layer)) for layer in row if type(layer).__name__ not in registered]
        found = [i for i, (_, effect) in enumerate(layers) if effect == "normalises"]
        for i, (layer, effect) in enumerate(layers):
            name = type(layer).__name__
            clip = _clip_of(layer) if found and i < found[0] else ""
            if clip:
                clips[f"what {name} clips, normalised observations beyond {clip}, is not clipped"] = None
                names[name] = None
            elif effect not in ("", "normalises"):
                changes[f"{name}, which changes {effect}"] = None
        if len(found) > 1:
            changes[" over ".join(type(layers[i][0]).__name__ for i in found) + ", which normalise twice"] = None
        normalisers += [layers[i][0] for i in found[:1]]
    if normalisers and not _is_one([it.obs_rms for it in normalisers], normalisers, len(rows)):
        name = type(normalisers[0]).__name__
        changes[f"{name}, of which each of the {len(rows)} environments has one with other statistics"] = None
    if normalisers:
        names[type(normalisers[0]).__name__] = None
    return Wrapping(normalisers[0] if normalisers else None, tuple(clips), tuple(changes), tuple(names))


def normaliser_in(env: Any) -> tuple[Any, str]:
    """Return the wrapper with `obs_rms` through which all observations of `env` come, and in words what clips them.

    Raises ValueError where there is none, or not one alone, or other wrappers change observations too.
    """
    found = wrapping_of(env)
    names = " of ".join(type(it).__name__ for it in _chain(env))
    if found.normaliser is None:
        elsewhere = vars_of(list(_chain(env))[-1]).keys() & {"parent_pipes", "remotes"}
        if elsewhere:
            raise ValueError(
                f"normaliser: the environments of {names} run in other processes, where no statistics are seen: pass "
                "an object with their mean and var, or wrap them in gymnasium.wrappers.vector.NormalizeObservation"
            )
        raise ValueError(
            f"normaliser must have obs_rms, or mean and var, and so must an environment's wrapper, got {names} without"
        )
    if found.changes:
        raise ValueError(
            f"normaliser: {names} has {'; '.join(found.changes)}: pass the one {type(found.normaliser).__name__} whose "
            "statistics these policies are to be run with, which is then all that is recorded"
        )
    return found.normaliser, "; ".join(found.clips)


def changing_wrappers(env: Any) -> set[str]:
    """Return the class names of the wrappers that change an environment's observations or actions."""
    return {type(layer).__name__ for layer in _chain(env) if _effect_of(layer)}


def effect_of_class(kind: type) -> str:
    """Return what a wrapper of this class changes, as far as its class shows it: "observations", "actions" or ""."""
    if kind.__name__ in _HARMLESS:
        return ""
    if issubclass(kind, gymnasium.ObservationWrapper | VectorObservationWrapper):
        return "observations"
    return "actions" if issubclass(kind, gymnasium.ActionWrapper | VectorActionWrapper) else ""


def _chain(env: Any) -> Iterator[Any]:
    """Yield the wrappers from the outermost on, and last what they wrap."""
    while True:
        yield env
        is_wrapper = isinstance(env, gymnasium.Wrapper | VectorWrapper)
        inner = vars_of(env).get("env" if is_wrapper else "venv")
        if inner is None:
            return
        env = inner


def _effect_of(layer: Any) -> str:
    """Return what a wrapper does: "normalises", or changes "observations" or "actions", or "" for neither."""
    name, attributes = type(layer).__name__, vars_of(layer)
    if name in _HARMLESS or (name == "VecNormalize" and not attributes.get("norm_obs")):
        return ""
    if not isinstance(layer, gymnasium.Wrapper | VectorWrapper) and "venv" not in attributes:
        return ""  # the environment itself
    if "obs_rms" in attributes:
        return "normalises"
    if "venv" in attributes:
        return "observations" if name.startswith("Vec") else "observations or actions, as far as is known"
    if effect := effect_of_class(type(layer)):
        return "" if _keeps_vectors(layer) else effect
    of_one = "single_" if isinstance(layer, VectorWrapper) else ""
    for what in ("observation", "action"):
        outside, inside = (getattr(it, f"{of_one}{what}_space", None) for it in (layer, layer.env))
        if outside != inside:
            return f"{what}s"
    return "observations or actions" if name in _KEEP_SPACES else ""


def _keeps_vectors(layer: Any) -> bool:
    """Return whether a wrapper of observations leaves vectors as they are."""
    of_one = "single_observation_space" if isinstance(layer, VectorWrapper) else "observation_space"
    space, before = getattr(layer, of_one), getattr(layer.env, of_one)
    kinds = {it.__name__ for it in type(layer).__mro__}
    if "FlattenObservation" in kinds:
        return isinstance(before, gymnasium.spaces.Box) and len(before.shape) == 1
    return "DtypeObservation" in kinds and space.dtype in (np.float32, np.float64)


def _is_one(statistics: list[Any], normalisers: list[Any], num_envs: int) -> bool:
    """Return whether the statistics are the same for all environments, and stay so."""
    if len(statistics) != num_envs:
        return False
    if len({id(it) for it in statistics}) == 1:
        return True
    first = statistics[0]
    return all(
        vars_of(layer).get("_update_running_mean") is False
        and np.array_equal(it.mean, first.mean)
        and np.array_equal(it.var, first.var)
        for layer, it in zip(normalisers, statistics, strict=True)
    )


def _clip_of(layer: Any) -> str:
    """Return the limits, as text, to which a wrapper clips observations and does nothing else; "" for any other one."""
    function = vars_of(layer).get("func")
    is_transform = "TransformObservation" in {it.__name__ for it in type(layer).__mro__}
    return _limits_of(function) if is_transform and callable(function) else ""


def _limits_of(function: Callable[..., Any]) -> str:
    """Return the limits of a function `lambda obs: np.clip(obs, low, high)`, as text; "" for any other function.

    Its code is compared and not run: a user's function may have effects.
    """
    code = getattr(function, "__code__", None)
    if code is None or code.co_argcount != 1 or code.co_freevars:
        return ""
    steps = [
        (it.opname, it.argval)
        for it in dis.get_instructions(code)
        if it.opname not in ("RESUME", "PRECALL", "PUSH_NULL", "CACHE", "NOP")
    ]
    loaded = [value for name, value in steps[:-2] if name.startswith("LOAD_")]
    calls = [(name.partition("_")[0], value) for name, value in steps[-2:]]
    (argument,) = code.co_varnames[:1]
    if len(loaded) != len(steps) - 2 or [name for name, _ in calls] != ["CALL", "RETURN"] or len(loaded) < 4:
        return ""
    module = loaded[0]
    of_numpy = loaded[1:3] == ["clip", argument] and calls[0][1] == 3 and len(loaded) == 5
    of_numpy = of_numpy and isinstance(module, str) and function.__globals__.get(module) is np
    of_array = loaded[:2] == [argument, "clip"] and calls[0][1] == 2 and len(loaded) == 4
    low, high = loaded[-2:]
    if not (of_numpy or of_array) or not all(isinstance(it, int | float) for it in (low, high)):
        return ""
    return f"[{low:g}, {high:g}]"
