"""Which part of what torch.load returns is the policy's state, and at which step that was saved.

    a state_dict                                CleanRL, TorchRL, plain
    (actor's state_dict, ...)                   CleanRL's SAC and TD3
    model_state_dict, actor_state_dict, iter    rsl_rl
    state_dict                                  plain
    model_weights, obs_rms                      CleanRL with Gymnasium's statistics, mean and var: tensors, arrays or
                                                lists, also as obs_rms_mean and obs_rms_var
    model, frame                                rl_games, whose keys begin with a2c_network.
    actor_network_params.<key>                  a loss of TorchRL's; the other networks are left out
    policy, value, <name>_preprocessor          skrl; the state's keys are policy.<key>, value.<key>, ...

The tensors are those of the content itself, so that writing to them changes what torch.save writes of it.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tipl.storing.actor_families import RUNNING
from tipl.storing.key_roles import CRITIC, names_critic, names_optimiser, names_return_statistics, words
from tipl.storing.not_readable import NotReadableError
from tipl.storing.statistic_names import is_entry, is_list_of, may_be_statistics
from tipl.storing.tensor_checks import shown

_SECTIONS = ("actor_state_dict", "model_state_dict", "state_dict", "model_weights")
_NORMALISER = "obs_norm_state_dict"
_OF_THE_CRITIC = "privileged_obs_norm_state_dict"
_RL_GAMES_CRITIC = "assymetric_vf_nets"
_SKRL = ("policy", "value", "observation_preprocessor", "state_preprocessor", "value_preprocessor")
_TORCHRL = "actor_network_params."
_COMPILED = "_orig_mod."
_MAX_DEPTH = 5


@dataclass(frozen=True)
class StateDict:
    """A policy's state in a file."""

    state: dict[str, Tensor]
    doubt: str = ""
    """Why it is not clear which part of the file is the policy's state; `state` then has all parts, as part.key."""
    step: int | None = None
    said_by: str = "iter"
    """The entry that says the step: "iter", rsl_rl's iteration, or "frame", rl_games' count of env steps."""
    step_in_name: str = ""
    """A regular expression whose group is the step, or what grows with it, in the names that the library gives."""
    unread: tuple[str, ...] = ()
    """Names, joined by dots, of what is not in `state` and may be statistics of observations, or other numbers of the
    policy's, that would be lost."""
    beside: tuple[str, ...] = ()
    """Names of the entries that are not in `state`."""


def is_clear(keys: Iterable[str]) -> bool:
    """Return whether keys, as they are named where there is a doubt, are all of one entry that can only be the
    policy's."""
    parts = {key.partition(".")[0] for key in keys}
    return len(parts) == 1 and parts <= set(_SECTIONS)


def find_state(content: Any, *, is_cleanrl: bool) -> StateDict:
    """Return the policy's state in the result of torch.load. Raises NotReadableError where there is none."""
    if isinstance(content, Mapping):
        if (state := _of_rl_games(content)) is not None:
            others = {name: it for name, it in content.items() if name not in ("model", "env_state", _RL_GAMES_CRITIC)}
            step, names = step_of(content.get("frame"), "frame"), tuple(map(str, others))
            unread = tuple(_unread(others, tensors=True))
            return StateDict(state, "", step, "frame", r"_ep_([0-9]+)_rew_", unread, names)
        if (state := _of_skrl(content)) is not None:
            return StateDict(state, step_in_name=r"^agent_([0-9]+)\.pt$")
        actor = {key: it for key, it in _tensors(content).items() if key.startswith(_TORCHRL)}
        if actor:
            state = {key.removeprefix(_TORCHRL): it for key, it in actor.items()}
            shapes = {key: tuple(it.shape) for key, it in _tensors(content).items() if key not in actor}
            lost = tuple(key for key in may_be_statistics(shapes) if max(shapes[key], default=1) > 1)
            return StateDict(state, unread=lost, beside=tuple(shapes))
    running, rest = _without_running(content) if isinstance(content, Mapping) else ({}, content)
    state, doubt = _state(rest, is_cleanrl=is_cleanrl)
    if not isinstance(content, Mapping) or not isinstance(rest, Mapping):
        return StateDict(state | running, doubt)
    return StateDict(
        state | running,
        doubt,
        step_of(content.get("iter"), "iter"),
        unread=tuple(_unread(rest, widths={it.shape[1] for it in state.values() if it.ndim == 2})),
        beside=tuple(str(name) for name, it in rest.items() if not isinstance(it, Tensor)),
    )


def step_of(value: Any, name: str) -> int | None:
    """Return a file's env steps or iteration, None where the value is not an int."""
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    if not 0 <= value < 2**63:
        raise NotReadableError(f"says {name} {value}, which must lie in [0, 2^63)")
    return value


def _of_rl_games(content: Mapping[Any, Any]) -> dict[str, Tensor] | None:
    """Return the state of rl_games' model, without the prefix of torch.compile, or None where it is none."""
    state = _tensors_only(content.get("model"))
    if state is None:
        return None
    plain = {key.removeprefix(_COMPILED): tensor for key, tensor in state.items()}
    if len(plain) < len(state) or not any(key.startswith("a2c_network.") for key in plain):
        return None
    return plain


def _of_skrl(content: Mapping[Any, Any]) -> dict[str, Tensor] | None:
    """Return the states of skrl's policy, value network and preprocessors together, or None where it is not skrl's."""
    names = [name for name in content if not names_optimiser(str(name))]
    parts = {name: _tensors_only(content[name]) for name in names}
    is_skrl = "policy" in parts and len(parts) > 1 and set(parts) <= set(_SKRL) and None not in parts.values()
    if not is_skrl:
        return None
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in (part or {}).items()}


def _without_running(content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], Mapping[Any, Any]]:
    """Return mean and variance of the observations, as `RUNNING` names them, and the entries beside them.

    The first is empty, and the second the content as it is, where there are none.
    """
    name = RUNNING.removesuffix(".")
    nested = content.get(name)
    parts = nested if isinstance(nested, Mapping) else {it: content.get(f"{name}_{it}") for it in ("mean", "var")}
    running = {f"{RUNNING}{it}": _numbers(parts.get(it)) for it in ("mean", "var")}
    found = {key: value for key, value in running.items() if value is not None}
    if len(found) < len(running):
        return {}, content
    own = {name, *(f"{name}_{it}" for it in ("mean", "var", "count"))}
    return found, {key: value for key, value in content.items() if key not in own}


def _is_beside(name: str, value: Any) -> bool:
    """Return whether an entry is one that libraries save beside a state, none of it the actor's."""
    is_optimisers = isinstance(value, Mapping) and value.keys() == {"state", "param_groups"}
    is_critics = bool(words(name) & CRITIC) and names_critic(name)
    is_random = bool(words(name) & {"rng", "rngs"}) or name.startswith("rnd_")  # rsl_rl's random network distillation
    known = is_random or name == _OF_THE_CRITIC or names_return_statistics(name)
    return known or is_optimisers or is_critics or names_optimiser(name)


def _unread(
    content: Mapping[Any, Any], *, tensors: bool = False, widths: Container[int] | None = None
) -> Iterator[str]:
    """Yield the names of what is in no layout known here and may hold statistics of observations, or other numbers of
    the policy's, that would be lost: arrays, lists of numbers or tensors, and with `tensors` also other tensors.

    `widths` are the numbers of inputs that the layers have, None for any: lists of other lengths are logs.
    """
    todo: list[tuple[tuple[str, ...], Any]] = [
        ((str(name),), value) for name, value in content.items() if not _is_beside(str(name), value)
    ]
    seen: set[int] = set()
    while todo:
        path, value = todo.pop(0)
        if isinstance(value, Mapping | list | tuple):
            if id(value) in seen or len(path) > _MAX_DEPTH:
                continue
            seen.add(id(value))
        if isinstance(value, Mapping):
            todo += [((*path, str(name)), part) for name, part in value.items()]
        elif isinstance(value, list | tuple):
            if _is_lost(path, value) and (widths is None or len(value) in widths or _is_named(path)):
                yield ".".join(path)
            else:
                todo += [((*path, str(i)), it) for i, it in enumerate(value) if isinstance(it, Mapping | list | tuple)]
        elif isinstance(value, np.ndarray) or (tensors and isinstance(value, Tensor) and value.ndim):
            yield ".".join(path)


def _is_named(path: Sequence[str]) -> bool:
    """Return whether a name says that what it names are statistics of observations."""
    return any(map(is_entry, path))


def _is_lost(path: tuple[str, ...], values: Sequence[Any]) -> bool:
    """Return whether a list of these names may hold numbers of the policy's."""
    if any(isinstance(it, Tensor | np.ndarray) for it in values):
        return True
    is_statistics = _is_named(path) or (any(type(it) is float for it in values) and is_list_of(path))
    return is_statistics and _numbers(values) is not None


def _numbers(value: Any) -> Tensor | None:
    """Return a tensor, or a tensor of the numbers of an array or list, in float64; None for anything else."""
    if isinstance(value, Tensor):
        return value
    is_list = isinstance(value, list | tuple) and value and all(type(it) in (int, float) for it in value)
    if not is_list and not (isinstance(value, np.ndarray) and value.dtype.kind in "fiu"):
        return None
    return torch.from_numpy(np.array(value, np.float64))


def _tensors_only(part: Any) -> dict[str, Tensor] | None:
    """Return a dict of tensors by name, None for anything else."""
    if not isinstance(part, Mapping) or not part:
        return None
    return dict(part) if all(isinstance(it, Tensor) and type(key) is str for key, it in part.items()) else None


def _state(content: Any, *, is_cleanrl: bool) -> tuple[dict[str, Tensor], str]:
    """Return the policy's state, where no library's layout tells it, and any doubt about it, as in `StateDict`."""
    if is_cleanrl and isinstance(content, tuple) and content:
        content = content[0]  # CleanRL's SAC, TD3 and DDPG: (actor, critic, ...)
    if not isinstance(content, Mapping | tuple):
        raise NotReadableError(f"holds no state_dict but a {type(content).__name__}")
    parts = dict(content) if isinstance(content, Mapping) else dict(enumerate(content))
    loose = _tensors(parts)
    seen: set[int] = set()
    nested = {
        name: list(_nested(part, str(name), seen))
        for name, part in parts.items()
        if not isinstance(part, Tensor) and not _is_beside(str(name), part)
    }
    states = {name: inside for name, inside in nested.items() if any(it.ndim or name != "infos" for _, it in inside)}
    sections = [name for name in _SECTIONS if name in states and isinstance(parts[name], Mapping)]
    if not states and loose:
        return loose, ""
    weights = [name for name, tensor in loose.items() if tensor.is_floating_point() and tensor.ndim]
    normaliser = parts.get(_NORMALISER)  # rsl_rl 2 saves it beside model_state_dict
    is_normalised = sections == ["model_state_dict"] and isinstance(normaliser, Mapping)
    if len(sections) == 1 and not weights and states.keys() - ({_NORMALISER} if is_normalised else ()) == set(sections):
        state = _tensors(parts[sections[0]])
        is_whole = len(state) == len(states[sections[0]])
        if is_normalised and isinstance(normaliser, Mapping):
            state |= {f"{_NORMALISER}.{key}": value for key, value in _tensors(normaliser).items()}
        if state and is_whole:
            return state, ""
    if not states:
        names = ", ".join(_SECTIONS)
        raise NotReadableError(f"holds no state_dict: neither tensors nor one of {names}, but {list(parts)[:8]}")
    found = [f"{shown(name)} ({len(state)} tensors)" for name, state in states.items()]
    found += [f"the loose tensor {shown(name)}" for name in loose]
    everything = [*loose.items(), *(tensor for state in states.values() for tensor in state)]
    state = _by_name(everything)
    doubt = f"it holds {', '.join(found[:8])}, and it is not clear which is the policy's"
    others = [key for key in state if key.partition(".")[0] not in _SECTIONS]
    if sections and (statistics := may_be_statistics({key: tuple(state[key].shape) for key in others})):
        entry = statistics[0].partition(".")[0]
        doubt += f" ({shown(entry)} may be statistics of observations: pass '{shown(entry)}*' as ignore if they do not "
        doubt += "matter)"
    return state, doubt


def _nested(content: Any, name: str, seen: set[int], depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    """Yield (name.key, tensor) for the tensors in nested dicts; a dict that occurs again is skipped."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, Mapping) and depth and id(content) not in seen:
        seen.add(id(content))
        for key, part in content.items():
            yield from _nested(part, f"{name}.{key}", seen, depth - 1)


def _tensors(mapping: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the values of a dict that are tensors."""
    return _by_name([(str(key), value) for key, value in mapping.items() if isinstance(value, Tensor)])


def _by_name(tensors: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return name -> tensor. Raises NotReadableError where two have the same name, as keys 0 and "0" do."""
    named = dict(tensors)
    if len(named) < len(tensors):
        names = [name for name, _ in tensors]
        raise NotReadableError(f"holds two tensors under one name, {next(it for it in named if names.count(it) > 1)}")
    return named
