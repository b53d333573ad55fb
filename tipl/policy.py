"""The policy network, and the flat layout in which a checkpoint stores it.

A policy is the actor of Stable-Baselines3's MlpPolicy for Box actions: an MLP gives the mean action, and a vector of
parameters `log_std` the standard deviations of a diagonal Gaussian around it. Imported actors of SAC, TD3 and Brax
differ in where their standard deviations come from, and take the tanh of the MLP's output; those of discrete actions
have one output for each action, and take the action with the greatest. The critic is not stored. One checkpoint is one
row of p float32 numbers, in the order in which SB3 registers the actor's parameters; `PolicySpec` gives p and the
position of each parameter in the row. Imported policies of any other kind have a `ParameterLayout`, which gives the
same, but such policies cannot be run.
"""

import dataclasses
import functools
import itertools
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the command line's settings need a layout, and torch takes seconds to load
    from torch import Tensor

Activation = Literal["tanh", "relu", "elu", "silu"]
ACTIVATIONS = ("tanh", "relu", "elu", "silu")
Spread = Literal["parameter", "head", "halves", "none"]
SPREADS = ("parameter", "head", "halves", "none")
Outputs = Literal["means", "logits", "values"]
OUTPUTS = ("means", "logits", "values")


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

    def unflatten(self, weights: "Tensor") -> "dict[str, Tensor]":
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
    """Sizes, activation and kind of a policy, which determine the layout of its flat weights and how it acts.

    Raises ValueError for a size, an activation or a kind that does not exist, or does not go with the others.
    """

    obs_dim: int
    act_dim: int
    """Numbers of a continuous action, or how many discrete actions there are."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    activation: Activation = "tanh"
    """Between the layers; "silu" is x sigmoid(x), which JAX also calls swish."""
    gsde: bool = False
    """Whether the standard deviations depend on the state (generalised state-dependent exploration, arXiv 2005.05719):
    log_std is then a matrix, one number for each unit of the last hidden layer and each action. The mean action is the
    same MLP's."""
    spread: Spread = "parameter"
    """Where the logarithms of the standard deviations come from: the parameter log_std; "head", a second linear layer
    log_std on the last hidden layer, as in SAC; "halves", the last layer itself, which has two outputs for each action,
    first all means and then what the library makes standard deviations of, as in Brax; or "none", for a policy without
    noise of its own, as in TD3."""
    squash: bool = False
    """Whether an action is the tanh of the mean, rescaled from [-1, 1] to the action space, and not the mean itself."""
    mean_limit: float | None = None
    """The mean is clipped to [-mean_limit, mean_limit], as in SAC with gSDE; None: it is not."""
    outputs: Outputs = "means"
    """What the MLP gives: the mean of a continuous action; "logits" of discrete actions, whose softmax is the
    probability of each, as in PPO; or "values" of discrete actions, as in DQN. The deterministic policy takes the
    discrete action with the greatest output, the first of several."""
    rescale: bool = False
    """Whether an action is the mean, clipped to [-1, 1] (mean_limit), rescaled from there to the action space, as in
    rl_games."""

    def __post_init__(self) -> None:
        for name in ("obs_dim", "act_dim"):
            value = getattr(self, name)
            if not _is_positive_int(value):
                raise ValueError(f"PolicySpec: {name} must be a positive int, got {value!r}")
        if not isinstance(self.hidden_sizes, tuple) or not all(map(_is_positive_int, self.hidden_sizes)):
            raise ValueError(f"PolicySpec: hidden_sizes must be a tuple of positive ints, got {self.hidden_sizes!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"PolicySpec: activation must be one of {ACTIVATIONS}, got {self.activation!r}")
        for name in ("gsde", "squash", "rescale"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"PolicySpec: {name} must be a bool, got {getattr(self, name)!r}")
        if self.spread not in SPREADS:
            raise ValueError(f"PolicySpec: spread must be one of {SPREADS}, got {self.spread!r}")
        if self.gsde and self.spread != "parameter":
            raise ValueError(f"PolicySpec: spread must be 'parameter' with gsde, got {self.spread!r}")
        limit = self.mean_limit
        if limit is not None and not (isinstance(limit, float) and 0.0 < limit < math.inf):
            raise ValueError(f"PolicySpec: mean_limit must be a finite positive float or None, got {limit!r}")
        if self.rescale and (self.squash or limit != 1.0):
            raise ValueError(
                f"PolicySpec: squash and mean_limit must be False and 1.0 with rescale, got {self.squash} and {limit}"
            )
        if self.outputs not in OUTPUTS:
            raise ValueError(f"PolicySpec: outputs must be one of {OUTPUTS}, got {self.outputs!r}")
        if self.discrete and (self.spread, self.squash, limit) != ("none", False, None):
            raise ValueError(
                "PolicySpec: spread, squash and mean_limit must be 'none', False and None with discrete actions, got "
                f"{self.spread!r}, {self.squash} and {limit}"
            )

    def __str__(self) -> str:
        """Return the layers and what tells the policy from one of plain PPO, in words."""
        words = [f"layers {' -> '.join(map(str, self.layer_sizes))}", self.activation]
        if self.discrete:
            return ", ".join([*words, f"discrete actions, the greatest of {self.act_dim} {self.outputs}"])
        words += _SPREAD_IN_WORDS[self.spread]
        words += ["gSDE"] if self.gsde else []
        words += [] if self.mean_limit is None else [f"mean clipped to +-{self.mean_limit:g}"]
        words += ["actions are tanh of the mean, rescaled to the action space"] if self.squash else []
        words += ["rescaled to the action space"] if self.rescale else []
        return ", ".join(words)

    @property
    def discrete(self) -> bool:
        """Whether the policy takes one of `act_dim` discrete actions."""
        return self.outputs != "means"

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """Widths of the policy's MLP from the observation to the mean action, or the outputs of discrete actions."""
        return (self.obs_dim, *self.hidden_sizes, self.act_dim)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each parameter, in SB3's order."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.spread == "parameter":
            shapes["log_std"] = self.layer_sizes[-2:] if self.gsde else (self.act_dim,)
        *hidden, head = itertools.pairwise(self.layer_sizes)
        for i, (fan_in, fan_out) in enumerate(hidden):
            shapes[f"policy_net.{2 * i}.weight"] = (fan_out, fan_in)  # odd indices are the activations
            shapes[f"policy_net.{2 * i}.bias"] = (fan_out,)
        num_outputs = head[1] * (2 if self.spread == "halves" else 1)
        for name in ("action_net", "log_std") if self.spread == "head" else ("action_net",):
            shapes[f"{name}.weight"] = (num_outputs, head[0])
            shapes[f"{name}.bias"] = (num_outputs,)
        return shapes

    @property
    def first_layer(self) -> int:
        """Index, in the layout, of the weight of the layer that sees the observation; its bias follows."""
        return 1 if self.spread == "parameter" else 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, from which `from_dict` makes an equal spec."""
        spec = dataclasses.asdict(self) | {"hidden_sizes": list(self.hidden_sizes)}
        # A store whose policy is plain has the same bytes as one by a tipl that knew no others.
        return {name: value for name, value in spec.items() if name not in _LATER or value != _LATER[name]}

    @classmethod
    def from_dict(cls, spec: dict[str, Any]) -> "PolicySpec":
        """Return the spec whose `to_dict` returned `spec`. Raises ValueError for other keys or values."""
        expected = {field.name for field in dataclasses.fields(cls)} - set(_LATER)
        if set(spec) - set(_LATER) != expected:
            raise ValueError(f"PolicySpec.from_dict: expected the keys {sorted(expected)}, got {sorted(spec)}")
        return cls(**spec | {"hidden_sizes": tuple(spec["hidden_sizes"])})


_SPREAD_IN_WORDS: dict[Spread, list[str]] = {
    "parameter": [],
    "head": ["log_std by a layer of its own"],
    "halves": ["standard deviations by the second half of the last layer"],
    "none": ["no log_std"],
}

_LATER: dict[str, Any] = {
    field.name: field.default for field in dataclasses.fields(PolicySpec)[4:]
}  # from gsde on: written only where they differ from these


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
