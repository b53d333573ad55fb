"""From another library's parameters to a row of flat weights and back: which are the actor's, and where each goes.

A state is what `torch.nn.Module.state_dict()` returns: key -> tensor. Its *actor* is every floating-point tensor but
the critics' and the target networks', and a tensor that two keys share counts once. Where the actor is an MLP with a
free Gaussian of Stable-Baselines3 (PPO, A2C), CleanRL or rsl_rl, it goes into the layout of a `PolicySpec`, so that the
simulator can run it; any other keeps its own names, order and shapes, a `ParameterLayout`. Rows are float32: float64
parameters are rounded.

rsl_rl normalises observations inside the actor, (obs - mean) / (std + 0.01). The row holds the first layer with that
folded in, W / (std + 0.01) and b - W mean / (std + 0.01), so that a checkpoint is whole by itself and its path is one
of weights alone. Writing a row into a state takes that state's own mean and std out again. rsl_rl's `std` becomes
log_std. Both are computed in float64 and rounded once, so that a state comes back to within rounding; all else to the
bit.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tipl.policy import ACTIVATIONS, Layout, ParameterLayout, PolicySpec, layout_from_dict

State = Mapping[str, Tensor]

NORMALISER_EPS = 1e-2  # rsl_rl's default; its files do not say it

_NOT_THE_ACTORS = re.compile(r"critic|value_net\.|vf_features_extractor\.|mlp_extractor\.value_net\.|[^.]*_target\.")
"""Beginnings of the keys of critics and target networks."""


@dataclasses.dataclass(frozen=True)
class _Family:
    """How one library names the parameters of an MLP actor: keys <hidden><2 i>.weight, and a head."""

    kind: str
    log_std: str
    hidden: str
    head: str | None = None
    """None where the head is the last of the hidden ones."""
    activation: str = "tanh"
    """The library's default."""
    std_is_log: bool = True
    normalisers: tuple[str, ...] = ()
    """Beginnings of the keys of an observation normaliser, any of which may be there."""


_OLD_NORMALISERS = ("actor_obs_normalizer.", "obs_norm_state_dict.")  # of rsl_rl 3 and 2
_FAMILIES = (
    _Family("sb3", "log_std", "mlp_extractor.policy_net.", "action_net."),
    _Family("cleanrl", "actor_logstd", "actor_mean."),
    _Family("rsl_rl", "distribution.log_std_param", "mlp.", None, "elu", True, ("obs_normalizer.",)),
    _Family("rsl_rl", "distribution.std_param", "mlp.", None, "elu", False, ("obs_normalizer.",)),
    _Family("rsl_rl", "log_std", "actor.", None, "elu", True, _OLD_NORMALISERS),
    _Family("rsl_rl", "std", "actor.", None, "elu", False, _OLD_NORMALISERS),
)


@dataclasses.dataclass(frozen=True)
class Actor:
    """Where the parameters of an actor lie in states of one kind, and where in a row of p flat weights."""

    kind: str
    """sb3, cleanrl or rsl_rl where `policy` is a PolicySpec, else other."""
    policy: Layout
    keys: tuple[str, ...]
    """The key in a state of each parameter of `policy`, in its order."""
    std_is_log: bool = True
    """False where the state holds the standard deviation and the row its logarithm."""
    normaliser: str = ""
    """Beginning of the keys of the observation normaliser that is folded into the first layer; "" for none."""

    def flatten(self, state: State) -> NDArray[np.float32]:
        """Return the actor's flat weights (p,), a copy.

        Raises ValueError where the state lacks a parameter, or one has another shape or holds NaN or Inf.
        """
        parts = [tensor.detach().reshape(-1).to("cpu", torch.float32) for tensor in self._find(state)]
        if not self.std_is_log:
            parts[0] = state[self.keys[0]].detach().reshape(-1).cpu().double().log().float()
        if self.normaliser:
            mean, std = self._statistics(state)
            weight, bias = (state[key].detach().cpu().double() for key in self.keys[1:3])
            weight = weight / std
            parts[1:3] = weight.reshape(-1).float(), (bias - weight @ mean).float()
        row = torch.cat(parts).numpy()
        if not np.isfinite(row).all():
            finite = [bool(part.isfinite().all()) for part in parts]
            raise ValueError(f"{self.keys[finite.index(False)]} must be finite, got NaN or Inf")
        return row

    def write(self, weights: NDArray[np.float32], state: State) -> None:
        """Write flat weights (p,) into the actor's tensors of `state`, in place; nothing else is touched.

        Raises ValueError where the state lacks a parameter, or one has another shape.
        """
        targets = self._find(state)
        parts = list(self.policy.unflatten(torch.tensor(weights)).values())
        if not self.std_is_log:
            parts[0] = parts[0].double().exp()
        if self.normaliser:
            mean, std = self._statistics(state)
            weight, bias = parts[1].double(), parts[2].double()
            parts[1:3] = weight * std, bias + weight @ mean
        with torch.no_grad():
            for target, part in zip(targets, parts, strict=True):
                target.copy_(part.reshape(target.shape))

    def fits(self, state: State) -> bool:
        """Return whether `state` has all the actor's parameters, in their shapes."""
        try:
            return bool(self._find(state))
        except ValueError:
            return False

    def _find(self, state: State) -> list[Tensor]:
        """Return the actor's tensors, in the order of the row."""
        for key, (name, shape) in zip(self.keys, self.policy.shapes.items(), strict=True):
            if key not in state:
                raise ValueError(f"{key} ({name} of the policy) is missing")
            if tuple(state[key].shape) not in (shape, (1, *shape)):  # CleanRL's log std is a matrix of one row
                raise ValueError(f"{key} must have shape {shape}, got {tuple(state[key].shape)}")
        return [state[key] for key in self.keys]

    def _statistics(self, state: State) -> tuple[Tensor, Tensor]:
        """Return the normaliser's mean and divisor, (obs_dim,) float64."""
        keys = [f"{self.normaliser}{name}" for name in ("_mean", "_std")]
        obs_dim = state[self.keys[1]].shape[1]
        for key in keys:
            if key not in state or state[key].numel() != obs_dim:
                raise ValueError(f"{key}, of the observation normaliser, must be there with {obs_dim} numbers")
        mean, std = (state[key].detach().reshape(-1).cpu().double() for key in keys)
        return mean, std + NORMALISER_EPS

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


def find_actor(state: State, activation: str | None = None) -> Actor:
    """Return the actor in `state`, a dict of tensors.

    No state says which activation lies between the layers: `activation` does, by default that of the library which the
    names are from. Raises ValueError where no tensor of an actor is there.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    seen = set()
    for key, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.is_floating_point() and tensor.numel() and place not in seen and not _NOT_THE_ACTORS.match(key):
            seen.add(place)
            shapes[key] = tuple(tensor.shape)
    if not shapes:
        raise ValueError(f"no floating-point tensor of an actor is there, got the keys {_some(state)}")
    for family in _FAMILIES:
        actor = _match(family, shapes, activation)
        if actor is not None:
            return actor
    return Actor("other", ParameterLayout(tuple(shapes.items())), tuple(shapes))


def differences(one: Layout, other: Layout) -> str:
    """Return in words how the second layout differs from the first, or "" where they are equal."""
    first, second = one.shapes, other.shapes
    found = [f"{name} {shape} is missing" for name, shape in first.items() if name not in second]
    found += [f"{name} {shape} is new" for name, shape in second.items() if name not in first]
    found += [
        f"{name} has shape {second[name]} instead of {shape}"
        for name, shape in first.items()
        if second.get(name, shape) != shape
    ]
    if not found and one != other:
        if isinstance(one, PolicySpec) and isinstance(other, PolicySpec):
            return f"the activation is {other.activation} instead of {one.activation}"
        return "the parameters have another order"
    return "; ".join(found[:3]) + ("; ..." if len(found) > 3 else "")


def _match(family: _Family, shapes: Mapping[str, tuple[int, ...]], activation: str | None) -> Actor | None:
    """Return the actor if all of `shapes` are parameters of an MLP as the family names them."""
    layers, i = [], 0
    while f"{family.hidden}{2 * i}.weight" in shapes:
        layers.append(f"{family.hidden}{2 * i}.")
        i += 1
    layers += [family.head] if family.head else []
    keys = (family.log_std, *(layer + name for layer in layers for name in ("weight", "bias")))
    normaliser = next((prefix for prefix in family.normalisers if f"{prefix}_mean" in shapes), "")
    if {key for key in shapes if not (normaliser and key.startswith(normaliser))} != set(keys) or not layers:
        return None
    weights = [shapes[f"{layer}weight"] for layer in layers]
    if activation is None:
        activation = family.activation
    if activation not in ACTIVATIONS or any(len(shape) != 2 for shape in weights):
        return None
    sizes = (weights[0][1], *(shape[0] for shape in weights))
    policy = PolicySpec(sizes[0], sizes[-1], sizes[1:-1], activation)  # type: ignore[arg-type]  # checked above
    if any(shapes[key] not in (shape, (1, *shape)) for key, shape in zip(keys, policy.shapes.values(), strict=True)):
        return None
    return Actor(family.kind, policy, keys, family.std_is_log, normaliser)


def _some(state: State) -> str:
    """Return the first few keys of a state, as text."""
    keys = list(state)
    return f"[{', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}]"
