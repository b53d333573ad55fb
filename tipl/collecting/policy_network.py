"""The policy network on flat weights: its layers as views, and the mean actions of many policies at once.

Shapes  N networks, each one row of weights; E inputs to each; a layer's weight is (out, in), as in torch.nn.Linear.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from tipl import _core
from tipl.policy import PolicySpec


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
