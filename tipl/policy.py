"""The policy network, the flat layout in which a checkpoint stores it, and the mean actions of many policies at once.

A policy is the actor of Stable-Baselines3's MlpPolicy for Box actions: an MLP gives the mean action, and a vector of
parameters `log_std` the standard deviations of a diagonal Gaussian around it. The critic is not stored. One checkpoint
is one row of p float32 numbers, in the order in which SB3 registers the actor's parameters; `PolicySpec` gives p and
the position of each parameter in the row. Imported policies of any other kind have a `ParameterLayout`, which gives the
same, but such policies cannot be run.

Shapes  N networks, each one row of weights; E inputs to each; a layer's weight is (out, in), as in torch.nn.Linear.
"""

import dataclasses
import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tipl import _core

Activation = Literal["tanh", "relu", "elu"]
ACTIVATIONS = ("tanh", "relu", "elu")


class Layout(ABC):
    """The position and shape of each parameter in a policy's flat weights."""

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each parameter, in the order of the flat weights."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, from which `layout_from_dict` makes an equal layout."""

    @functools.cached_property
    def layout(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Name -> (offset in the flat weights, shape) of each parameter."""
        shapes = self.shapes
        offsets = itertools.accumulate(map(math.prod, shapes.values()), initial=0)
        return {name: (offset, shape) for (name, shape), offset in zip(shapes.items(), offsets, strict=False)}

    @functools.cached_property
    def num_params(self) -> int:
        """Length p of the flat weights."""
        return sum(map(math.prod, self.shapes.values()))

    def unflatten(self, weights: Tensor) -> dict[str, Tensor]:
        """Return name -> view (..., *shape) of flat weights (..., p); writing to a view changes `weights`.

        Raises ValueError for another last dimension than p.
        """
        if weights.ndim < 1 or weights.shape[-1] != self.num_params:
            raise ValueError(f"unflatten: weights must have shape (..., {self.num_params}), got {tuple(weights.shape)}")
        return {
            name: weights[..., offset : offset + math.prod(shape)].view((*weights.shape[:-1], *shape))
            for name, (offset, shape) in self.layout.items()
        }


@dataclasses.dataclass(frozen=True)
class ParameterLayout(Layout):
    """Names and shapes only: the layout of a policy that only its own library can run."""

    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    """(name, shape) of each parameter, in the order of the flat weights."""

    def __post_init__(self) -> None:
        names = [name for name, _ in self.parameters]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"ParameterLayout: parameters must be some, of different names, got {names}")
        for name, shape in self.parameters:
            if not all(map(_is_positive_int, shape)):
                raise ValueError(f"ParameterLayout: the shape of {name} must be of positive ints, got {shape!r}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self.parameters)

    def to_dict(self) -> dict[str, Any]:
        return {"parameters": [[name, list(shape)] for name, shape in self.parameters]}


def layout_from_dict(layout: dict[str, Any]) -> Layout:
    """Return the layout whose `to_dict` returned `layout`. Raises ValueError for anything else."""
    if set(layout) == {"parameters"}:
        return ParameterLayout(tuple((name, tuple(shape)) for name, shape in layout["parameters"]))
    return PolicySpec.from_dict(layout)


@dataclasses.dataclass(frozen=True)
class PolicySpec(Layout):
    """Sizes and activation of a policy, which determine the layout of its flat weights."""

    obs_dim: int
    act_dim: int
    hidden_sizes: tuple[int, ...] = (64, 64)
    activation: Activation = "tanh"
    gsde: bool = False
    """Whether the standard deviations depend on the state (generalised state-dependent exploration, arXiv 2005.05719):
    log_std is then a matrix, one number for each unit of the last hidden layer and each action. The mean action is the
    same MLP's."""

    def __post_init__(self) -> None:
        for name in ("obs_dim", "act_dim"):
            value = getattr(self, name)
            if not _is_positive_int(value):
                raise ValueError(f"PolicySpec: {name} must be a positive int, got {value!r}")
        if not isinstance(self.hidden_sizes, tuple) or not all(map(_is_positive_int, self.hidden_sizes)):
            raise ValueError(f"PolicySpec: hidden_sizes must be a tuple of positive ints, got {self.hidden_sizes!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"PolicySpec: activation must be one of {ACTIVATIONS}, got {self.activation!r}")
        if not isinstance(self.gsde, bool):
            raise ValueError(f"PolicySpec: gsde must be a bool, got {self.gsde!r}")

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """Widths of the policy's MLP from the observation to the mean action."""
        return (self.obs_dim, *self.hidden_sizes, self.act_dim)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each parameter, in SB3's order."""
        shapes: dict[str, tuple[int, ...]] = {"log_std": self.layer_sizes[-2:] if self.gsde else (self.act_dim,)}
        *hidden, head = itertools.pairwise(self.layer_sizes)
        for i, (fan_in, fan_out) in enumerate(hidden):
            shapes[f"policy_net.{2 * i}.weight"] = (fan_out, fan_in)  # odd indices are the activations
            shapes[f"policy_net.{2 * i}.bias"] = (fan_out,)
        shapes["action_net.weight"] = (head[1], head[0])
        shapes["action_net.bias"] = (head[1],)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, from which `from_dict` makes an equal spec."""
        spec = dataclasses.asdict(self) | {"hidden_sizes": list(self.hidden_sizes)}
        return spec if self.gsde else {name: value for name, value in spec.items() if name != "gsde"}

    @classmethod
    def from_dict(cls, spec: dict[str, Any]) -> "PolicySpec":
        expected = {field.name for field in dataclasses.fields(cls)} - {"gsde"}  # which others than gSDE's lack
        if set(spec) - {"gsde"} != expected:
            raise ValueError(f"PolicySpec.from_dict: expected the keys {sorted(expected)}, got {sorted(spec)}")
        return cls(**spec | {"hidden_sizes": tuple(spec["hidden_sizes"])})


def mean_action(spec: PolicySpec, weights: Tensor, obs: Tensor) -> Tensor:
    """Return the mean actions (N, E, act_dim) of N policies (N, p), each seeing its own E observations (N, E, obs_dim).

    The actions are not clipped (the deterministic policy is `mean_action` clipped to the action space), and no gradient
    flows through them. An action's bits depend neither on the other policies and observations, nor on memory layout or
    the number of threads, because the engine sums in a fixed order, on the calling thread. Another instruction set
    (`tipl._core.isa()`) may change the last bit.

    Raises TypeError for tensors that are not float32 on the CPU, ValueError for another shape.
    """
    for name, tensor in (("weights", weights), ("obs", obs)):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            got = f"{tensor.dtype} on {tensor.device}"
            raise TypeError(f"mean_action: {name} must be torch.float32 on the CPU, got {got}")
    N = len(weights) if weights.ndim else 0
    if weights.shape != (N, spec.num_params):
        raise ValueError(f"mean_action: weights must have shape (N, {spec.num_params}), got {tuple(weights.shape)}")
    if obs.ndim != 3 or obs.shape[0] != N or obs.shape[2] != spec.obs_dim:
        expected = f"(N, E, obs_dim) = ({N}, E, {spec.obs_dim})"
        raise ValueError(f"mean_action: obs must have shape {expected}, got {tuple(obs.shape)}")
    first_layer = spec.num_params - sum((fan_in + 1) * out for fan_in, out in itertools.pairwise(spec.layer_sizes))
    actions = _core.mean_actions(
        weights.detach()[:, first_layer - spec.act_dim :].contiguous().numpy(),  # as if log_std were a vector
        obs.detach().contiguous().numpy(),
        act_dim=spec.act_dim,
        hidden_sizes=spec.hidden_sizes,
        activation=spec.activation,
    )
    return torch.from_numpy(actions)


def layer_views(params: Tensor, layer_sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Return (weight (N, out, in), bias (N, 1, out)) of each layer, as views of the rows of `params`.

    The layers begin with each row's first number; rows may be longer than the layers.
    """
    views, offset = [], 0
    for fan_in, fan_out in itertools.pairwise(layer_sizes):
        weight = params[:, offset : offset + fan_out * fan_in].view(-1, fan_out, fan_in)
        offset += fan_out * fan_in
        views.append((weight, params[:, None, offset : offset + fan_out]))
        offset += fan_out
    return views


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
