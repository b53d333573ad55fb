"""Which parameters in another library's state are the actor's, and their conversion to flat weights and back.

A state is what `torch.nn.Module.state_dict()` returns: key -> tensor. Its *actor* is every floating-point tensor except
those of critics and target networks; a tensor under two keys counts once. Where the actor is an MLP of one of the
libraries that `actor_families.py` lists, it gets the layout of a `PolicySpec`, so that the simulator can run it. Any
other actor keeps its names, order and shapes, as a `ParameterLayout`. Rows are float32; float64 parameters are rounded.

Nothing is guessed. A prefix that all keys share changes nothing. A state is refused if some of its tensors may belong
to another network (by the words of their names, `key_roles.py`, or by their containers and shapes, `network_groups.py`)
or to statistics of observations, until the caller gives the prefixes of the actor's keys or ignores some. It is also
refused if the actor has tensors that no row can hold (sparse, complex, integer weights).

rsl_rl, rl_games and skrl save the statistics with which they normalise observations: the network sees
(obs - mean) / divisor. The row holds the first layer with that folded in, W / divisor and b - W mean / divisor, so that
each checkpoint is complete and its path consists of weights alone. Writing a row into a state takes that state's own
statistics out again. rsl_rl's `std` becomes log_std. Both are computed in float64 and rounded once, so that a state is
recovered to within rounding; everything else is recovered exactly. The same is done with statistics that another file
or object holds, such as those of VecNormalize, where they are put beside the state under `STATISTICS`
(`observation_statistics.py`).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tipl.policy import Layout, ParameterLayout, PolicySpec, layout_from_dict
from tipl.storing.actor_families import (
    FAMILIES,
    NORMALISERS,
    STATISTICS,
    Settings,
    families,
    layers_of,
    match,
    normaliser_of,
)
from tipl.storing.key_roles import (
    ACTOR,
    CRITIC,
    Q,
    is_attention,
    left_out,
    left_out_anywhere,
    may_be_anothers,
    of_return_statistics,
    words,
)
from tipl.storing.network_groups import several_networks
from tipl.storing.statistic_names import may_be_statistics
from tipl.storing.tensor_checks import check_apart, is_parameter, shown, to_float32

State = Mapping[str, Tensor]

_ROLES = {
    "critic": "a critic's",
    "target": "a target network's",
    "optimiser": "an optimiser's",
    "returns": "statistics of returns or rewards",
    "doubt": "unknown, not chosen",
}


@dataclasses.dataclass(frozen=True)
class Actor:
    """An actor's keys in states of one kind, and the layout of its p flat weights."""

    kind: str
    """The kind of its `Family` where `policy` is a PolicySpec, else "other"."""
    policy: Layout
    keys: tuple[str, ...]
    """The key of each parameter of `policy`, in the order of the layout."""
    std_is_log: bool = True
    """False where the state holds the standard deviation and the row its logarithm."""
    normaliser: str = ""
    """Prefix of the keys of the observation normaliser that is folded into the first layer; "" for none."""

    def flatten(self, state: State) -> NDArray[np.float32]:
        """Return a copy of the actor's flat weights, (p,).

        Raises ValueError where a parameter is missing, has another shape, or holds NaN or Inf.
        """
        parts = [to_float32(key, tensor) for key, tensor in zip(self.keys, self._find(state), strict=True)]
        if not self.std_is_log:
            key, std = self.keys[0], parts[0]
            if not (std > 0).all():
                raise ValueError(f"{shown(key)} must be positive, a standard deviation, got {float(std.min()):g}")
            parts[0] = state[key].detach().reshape(-1).cpu().double().log().float()
        if self.normaliser:
            mean, std = self._statistics(state)
            first = self._first_layer
            weight, bias = (state[key].detach().cpu().double() for key in self.keys[first])
            weight = weight / std
            folded = weight.reshape(-1), bias - weight @ mean
            parts[first] = (
                to_float32(f"{key}, normalised,", it) for key, it in zip(self.keys[first], folded, strict=True)
            )
        return torch.cat(parts).numpy()

    def write(self, weights: NDArray[np.float32], state: State) -> None:
        """Write flat weights (p,) into the actor's tensors in `state`, in place; other tensors are not changed.

        Raises ValueError where a parameter is missing, has another shape, or has a dtype that cannot hold the weights.
        """
        targets = self._find(state)
        parts = list(self.policy.unflatten(torch.tensor(weights)).values())
        if not self.std_is_log:
            parts[0] = parts[0].double().exp()
        if self.normaliser:
            mean, std = self._statistics(state)
            weight, bias = (part.double() for part in parts[self._first_layer])
            parts[self._first_layer] = weight * std, bias + weight @ mean
        with torch.no_grad():
            for key, target, part in zip(self.keys, targets, parts, strict=True):
                target.copy_(part.reshape(target.shape))
                if not torch.isfinite(target.float()).all():
                    raise ValueError(f"{shown(key)} is {target.dtype}, which cannot hold {float(part.abs().max()):g}")

    def fits(self, state: State) -> bool:
        """Return whether `state` has all parameters of the actor, with the right shapes."""
        try:
            return bool(self._find(state))
        except ValueError:
            return False

    @property
    def _first_layer(self) -> slice:
        """Where the layout has weight and bias of the layer that a normaliser is folded into."""
        if not isinstance(self.policy, PolicySpec):
            raise ValueError(f"a normaliser, {shown(self.normaliser)}, must come before an MLP, got other parameters")
        return slice(self.policy.first_layer, self.policy.first_layer + 2)

    def _find(self, state: State) -> list[Tensor]:
        """Return the actor's tensors, in the order of the row."""
        for key, (name, shape) in zip(self.keys, self.policy.shapes.items(), strict=True):
            if key not in state:
                raise ValueError(f"{shown(key)} ({shown(name)} of the policy) is missing")
            if tuple(state[key].shape) not in (shape, (1, *shape)):  # CleanRL's log_std is a matrix with one row
                raise ValueError(f"{shown(key)} must have shape {shape}, got {tuple(state[key].shape)}")
        return [state[key] for key in self.keys]

    def _statistics(self, state: State) -> tuple[Tensor, Tensor]:
        """Return the mean that the normaliser subtracts and the number it divides by, (obs_dim,) float64 each."""
        known = normaliser_of(self.normaliser)
        keys = [f"{self.normaliser}{name}" for name in (known.mean, known.spread)]
        obs_dim = state[self.keys[self._first_layer][0]].shape[1]
        for key in keys:
            if key not in state or state[key].numel() != obs_dim:
                raise ValueError(f"{key}, of the observation normaliser, must exist with {obs_dim} numbers")
        mean, spread = (state[key].detach().reshape(-1).cpu().double() for key in keys)
        if not (mean.isfinite().all() and spread.isfinite().all()):
            raise ValueError(f"{shown(keys[0])} and {shown(keys[1])} must be finite")
        if (spread < 0).any():
            raise ValueError(f"{shown(keys[1])} must not be negative, got {float(spread.min()):g}")
        return mean, ((spread + known.in_root).sqrt() if known.is_variance else spread) + known.outside

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, from which `from_dict` makes an equal actor."""
        return {
            "kind": self.kind,
            "policy": self.policy.to_dict(),
            "keys": list(self.keys),
            "std_is_log": self.std_is_log,
            "normaliser": self.normaliser,
        }

    @classmethod
    def from_dict(cls, actor: dict[str, Any]) -> Self:
        return cls(**actor | {"policy": layout_from_dict(actor["policy"]), "keys": tuple(actor["keys"])})


def find_actor(state: State, settings: Settings = Settings(), actor: str | Sequence[str] | None = None) -> Actor:
    """Return the actor in `state`, a dict of tensors.

    No state says which activation lies between the layers: `settings` do, by default that of the library whose names
    the keys have. `actor` is the prefix of the actor's keys, or several, with or without a * at the end; "" takes all
    tensors but those of critics, target networks and optimisers.
    Raises ValueError where there is no tensor of an actor, one cannot go into a row, or it is not clear which tensors
    are the actor's.
    """
    prefixes = None if actor is None else prefixes_of(actor)
    start = prefixes[0][: prefixes[0].rfind(".") + 1] if prefixes is not None and len(prefixes) == 1 else ""
    names = {key: key for key in state} if prefixes is None else _chosen(state, prefixes, start)
    roots = [start + it for it in _shared_prefixes(names.values())]
    for root in roots:
        shapes = _shapes(_places(state, {key: it[len(root) - len(start) :] for key, it in names.items()}))
        found = None
        if prefixes == (root,) and root.endswith("actor."):  # the whole key is what the library names
            found = _known(root.removesuffix("actor."), {_longer(name): it for name, it in shapes.items()}, settings)
        if found is None:
            found = _known(root, shapes, settings)
        if found is not None:
            check_apart({key: state[key] for key in found.keys})
            _check_statistics(state, found)
            return found
    places = _places(state, {key: it[len(root) - len(start) :] for key, it in names.items()})
    if not places:
        wanted = "" if prefixes is None else f" whose key begins with {' or '.join(map(shown, prefixes))}"
        raise ValueError(f"no floating-point tensor of an actor{wanted} is there, got the keys {_some(state)}")
    check_apart(places)
    shapes = _shapes(places)
    keys = [name if name.startswith(STATISTICS) else root + name for name in shapes]
    _check_said(shapes, keys, settings)
    doubt = _doubt(shapes, root, settings) if prefixes is None else ""
    if doubt:
        raise ValueError(f"{doubt}: {how_to_choose(keys)}")
    if settings.outputs is not None:
        raise ValueError(
            f"discrete says that the outputs are {settings.outputs} of discrete actions, but {_some(keys)} are not "
            "the layers of one MLP alone, with two actions or more, which the simulator could run: leave discrete out"
        )
    other_kind = Actor("other", ParameterLayout(tuple(zip(keys, shapes.values(), strict=True))), tuple(keys))
    _check_statistics(state, other_kind)
    return other_kind


def prefixes_of(actor: str | Sequence[str]) -> tuple[str, ...]:
    """Return the prefixes that the caller gives of the actor's keys, each with or without a * at its end."""
    return tuple(it.removesuffix("*") for it in ((actor,) if isinstance(actor, str) else actor))


def _chosen(state: State, prefixes: tuple[str, ...], start: str) -> dict[str, str]:
    """Return what remains of the keys of the caller's choice without `start`, by key.

    Those of critics, target networks and optimisers behind a prefix are left out. Raises ValueError where one may be.
    """
    chosen = {key: key if key.startswith(STATISTICS) else key[len(start) :] for key in state}
    chosen = {key: name for key, name in chosen.items() if key.startswith((*prefixes, STATISTICS))}
    for prefix in sorted(prefixes, key=len):  # the longest one that fits a key decides
        behind = {key[len(prefix) :]: tuple(it.shape) for key, it in state.items() if key.startswith(prefix)}
        roles = left_out_anywhere(behind)
        is_critic = any(may_be_anothers(part) for part in prefix.split("."))
        own = [name for name in behind if roles.get(name) in (None, "critic", "doubt")]
        if is_critic or (own and all(words(name.partition(".")[0]) & Q for name in own)):  # DQN's policy
            roles = {name: role for name, role in roles.items() if role not in ("critic", "doubt")}
        for name, role in roles.items():
            key = prefix + name
            if any(len(it) > len(prefix) and key.startswith(it) for it in prefixes):
                continue
            if role == "doubt":
                raise ValueError(
                    f"{shown(key)} may be a critic's or another network's: choose with actor (--actor) longer "
                    "beginnings of the actor's keys, or leave keys out with ignore (--ignore)"
                )
            chosen.pop(key, None)
    return chosen


def _shared_prefixes(names: Iterable[str]) -> list[str]:
    """Return "" and every longer prefix, up to a dot, that all names share; none of a critic or another network."""
    keys = [name for name in names if not name.startswith(STATISTICS)]
    found = [""]
    first = keys[0].split(".")[:-1] if keys else []
    for part in first:
        prefix = f"{found[-1]}{part}."
        is_both = words(part) & ACTOR and words(part) & CRITIC
        if not all(name.startswith(prefix) for name in keys) or (may_be_anothers(part) and not is_both):
            break
        found.append(prefix)
    return found


def _places(state: State, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the parameters by what remains of their keys, without those of critics and targets; one under two keys
    counts once."""
    others = left_out({name: tuple(state[key].shape) for key, name in names.items()})
    places: dict[str, Tensor] = {}
    seen = set()
    for key, name in names.items():
        tensor = state[key]
        if name not in others and is_parameter(key, tensor):
            place = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if place not in seen:
                seen.add(place)
                places[name] = tensor
    return places


def _shapes(places: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in places.items()}


def _check_said(shapes: Mapping[str, tuple[int, ...]], keys: Sequence[str], settings: Settings) -> None:
    """Raise ValueError where the actor is of no library, and the caller says what can be said of a library's only."""
    if f"{STATISTICS}_mean" in shapes:
        raise ValueError(
            "observation statistics can be folded into the first layer of an MLP of Stable-Baselines3's, of CleanRL's "
            f"PPO or of one with names of its own, and this is none: {_some(keys)}"
        )
    if settings.halves:
        raise ValueError(
            "halves says that the last layer has two outputs for each action, but the keys are not those of such an "
            f"actor of TorchRL, rsl_rl or Brax: {_some(keys)}"
        )
    unsaid = dataclasses.replace(settings, outputs=None, discrete=True)
    starts = ("", *_shared_prefixes(keys)) if settings.outputs is not None else ()
    for start in starts:
        behind = {key[len(start) :]: shape for key, shape in zip(keys, shapes.values(), strict=True)}
        if (other := match(behind, unsaid)) is not None:
            raise ValueError(
                f"discrete says that the outputs are {settings.outputs} of discrete actions, but the keys are those of "
                f"a policy of {other.family.kind} whose outputs are {other.policy.outputs}"
            )


def _check_statistics(state: State, actor: Actor) -> None:
    """Raise ValueError where `state` holds statistics of observations and the actor, as it was chosen, lacks them."""
    known = [it for it in NORMALISERS if it.prefix != STATISTICS]
    beside = [
        key.removesuffix(it.mean)
        for it in known
        for key in state
        if f".{key}".endswith(f".{it.prefix}{it.mean}") and f"{key.removesuffix(it.mean)}{it.spread}" in state
    ]
    if beside and not actor.normaliser:
        prefix = shown(beside[0].rstrip("."))
        raise ValueError(
            f"it holds statistics of observations, {prefix}, which the actor chosen leaves out: choose the whole file, "
            f"without actor, or pass '{prefix}.*' as ignore if observations were not normalised"
        )


def statistics_left_out(state: State, found: Actor, actor: str | Sequence[str] | None) -> str:
    """Return the key of a tensor that the actor as the caller chose it leaves out, and that may be of statistics by
    which its observations were normalised; "" for none."""
    if actor is None or found.normaliser:
        return ""
    outside = {
        key: tuple(it.shape)
        for key, it in state.items()
        if it.numel() > 1 and key not in found.keys and not key.startswith((*prefixes_of(actor), STATISTICS))
    }
    for key in may_be_statistics(outside):
        if not of_return_statistics(key) and not any(may_be_anothers(part) for part in key.split(".")):
            return key
    return ""


def _longer(name: str) -> str:
    """Return the name of a parameter whose key's "actor." was taken for the root."""
    return name if name.startswith(STATISTICS) else f"actor.{name}"


def _known(root: str, shapes: Mapping[str, tuple[int, ...]], settings: Settings) -> Actor | None:
    """Return the actor if the keys <root><name of `shapes`> are those of a library's MLP, else None."""
    found = match(shapes, settings)
    if found is None:
        return None
    in_state = found.normaliser not in ("", STATISTICS)
    normaliser = root + found.normaliser if in_state else found.normaliser
    keys = tuple(root + key for key in found.keys)
    return Actor(found.family.kind, found.policy, keys, found.family.std_is_log, normaliser)


def roles_of(state: State, actor: Actor | None) -> list[tuple[str, tuple[int, ...], str]]:
    """Return key, shape and part in words of each tensor of a state and its actor, if found."""
    names = {} if actor is None else dict(zip(actor.keys, actor.policy.shapes, strict=True))
    kind, normaliser = ("", "") if actor is None else (actor.kind, actor.normaliser)
    taken = {(state[key].data_ptr(), state[key].shape) for key in names if key in state}
    critics = tuple({prefix for it in FAMILIES if it.kind == kind for prefix in it.others})
    root = _shared_prefixes(state)[-1]
    shapes = {key[len(root) :]: tuple(tensor.shape) for key, tensor in state.items()}
    others, statistics = left_out_anywhere(shapes), set(may_be_statistics(shapes))
    roles = []
    for key, tensor in state.items():
        name = key[len(root) :]
        if not tensor.is_floating_point() or not tensor.numel():
            role = "a buffer's, such as a counter"
        elif key in names:
            role = "the actor's" if names[key] == key else f"the actor's {names[key]}"
        elif normaliser and key.startswith(normaliser):
            role = "the observation normaliser's, folded into the first layer"
        elif (tensor.data_ptr(), tensor.shape) in taken:
            role = "the actor's once more"
        elif key.startswith(critics):
            role = "a critic's"
        elif name in statistics and name not in others:
            role = "statistics or a temperature, not chosen"
        else:
            role = _ROLES.get(others.get(name, ""), "not chosen")
        roles.append((key, tuple(tensor.shape), role))
    return roles


def how_to_choose(keys: Iterable[str]) -> str:
    """Return the end of a message that tells the caller how to choose the actor's keys among these."""
    keys = list(keys)
    root = _shared_prefixes(keys)[-1]
    groups = dict.fromkeys(root + (key[len(root) : key.find(".", len(root)) + 1] or key[len(root) :]) for key in keys)
    return (
        f'choose with actor (--actor) the beginnings of its keys, some of {_some(groups)}, or "" for all but the '
        "critics', or leave keys out with ignore (--ignore)"
    )


def differences(one: Layout, other: Layout) -> str:
    """Return in words how the second layout differs from the first, or "" where they are equal."""
    first, second = one.shapes, other.shapes
    found = [f"{shown(name)} {shape} is missing" for name, shape in first.items() if name not in second]
    found += [f"{shown(name)} {shape} is new" for name, shape in second.items() if name not in first]
    found += [
        f"{shown(name)} has shape {second[name]} instead of {shape}"
        for name, shape in first.items()
        if second.get(name, shape) != shape
    ]
    if not found and one != other:
        if isinstance(one, PolicySpec) and isinstance(other, PolicySpec):
            settings = {"the activation": "activation", "squashing": "squash", "the limit of the mean": "mean_limit"}
            settings |= {"the kind of the outputs": "outputs", "rescaling": "rescale"}
            settings |= {"the number of actions": "act_dim", "where the standard deviations come from": "spread"}
            both = {words: (getattr(one, name), getattr(other, name)) for words, name in settings.items()}
            return "; ".join(f"{words} is {new} instead of {old}" for words, (old, new) in both.items() if old != new)
        return "the parameters have another order"
    return "; ".join(found[:3]) + ("; ..." if len(found) > 3 else "")


def _doubt(shapes: Mapping[str, tuple[int, ...]], root: str, settings: Settings) -> str:
    """Return in words why some of `shapes` may not be the actor's, or "" where there is no reason to doubt it."""
    parts = {part for key in shapes for part in key.split(".")}
    others = [
        key for key in shapes if any(may_be_anothers(it) and not is_attention(it, parts) for it in key.split("."))
    ]
    statistics = may_be_statistics(shapes)
    is_dqn = all(words(key.partition(".")[0]) & Q for key in shapes)  # its Q network is its policy
    if others and not is_dqn:
        why = "may be a critic's or another network's"
    else:
        others, why = statistics, "may be statistics or a temperature: pass such keys as ignore"
    if others and match(shapes, dataclasses.replace(settings, outputs="logits")) is not None:  # as of skrl's
        here = _some(root + it for it in others)
        return f"{here} may be a critic's or statistics, beside a policy of discrete actions, which discrete would say"
    if others and others != statistics:
        return f"{_some(root + it for it in others)} {why}"
    for family in families(settings):
        layers, keys = layers_of(family, shapes)
        known = (*family.encoders, *family.normalisers, *family.others)
        beside = [key for key in shapes if key not in keys and not key.startswith(known)]
        if layers and beside and set(keys) <= set(shapes):
            here = _some(root + it for it in beside)
            return f"beside the actor of {family.kind} ({_some(root + it for it in keys)}) lies {here}"
    if statistics:
        return f"{_some(root + it for it in statistics)} {why}"
    return several_networks(shapes, root=root, also=Q if is_dqn else frozenset(), is_mlp=settings.outputs is not None)


def _some(keys: Iterable[str]) -> str:
    """Return the first few keys, as text."""
    names = [shown(key) for key in keys]
    return f"[{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}]"
