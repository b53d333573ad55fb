"""The policy network on flat weights: its layers as views, and the mean actions of many policies at once.

Shapes  N networks, each one row of p weights; E inputs to each; a layer's weight is (out, in), as in torch.nn.Linear;
        A = act_dim; m = weights of the MLP from the observation to the mean action.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tipl import _core
from tipl.policy import PolicySpec

Singles: TypeAlias = NDArray[np.float32]

LOG_STD_RANGE = (-20.0, 2.0)
"""To what Stable-Baselines3 and sb3-contrib clip what a head `log_std` says."""


def mean_action(spec: PolicySpec, weights: Tensor, obs: Tensor) -> Tensor:
    """Return the mean actions (N, E, A) of N policies (N, p), each seeing its own E observations (N, E, obs_dim).

    These are the network's outputs, of A discrete actions one for each: `actions_of` makes of them what the
    deterministic policy does. No gradient flows through them. A mean's bits depend neither on the other policies and
    observations, nor on memory layout or the number of threads, because the engine sums in a fixed order, on the
    calling thread. Another instruction set (`tipl._core.isa()`) may change the last bit.

    Raises TypeError for tensors that are not float32 on the CPU, ValueError for another shape.
    """
    return mean_of_rows(spec, mlp_rows(spec, weights), obs)


def mlp_rows(spec: PolicySpec, weights: Tensor) -> Tensor:
    """Return the weights of the MLPs, (N, A + m) or more columns, as the engine takes them, of policies (N, p).

    The first A columns are not read. Where the policies' own rows are like that, they are returned as they are.
    Raises what `mean_action` raises for its weights.
    """
    _check_kind("weights", weights)
    N = len(weights) if weights.ndim else 0
    if weights.shape != (N, spec.num_params):
        raise ValueError(f"mean_action: weights must have shape (N, {spec.num_params}), got {tuple(weights.shape)}")
    spec, weights = without_halves(spec, weights)
    m = _mlp_size(spec)
    if spec.spread != "parameter":
        return torch.nn.functional.pad(weights[:, :m], (spec.act_dim, 0))
    return weights[:, spec.num_params - m - spec.act_dim :].contiguous()


def without_halves(spec: PolicySpec, weights: Tensor) -> tuple[PolicySpec, Tensor]:
    """Return policies (N, p) of a last layer of two halves with its first half alone, which is all that the mean uses.

    Policies of other kinds are returned as they are.
    """
    if spec.spread != "halves":
        return spec, weights
    of_means = dataclasses.replace(spec, spread="none")
    parts, shapes = spec.unflatten(weights), of_means.shapes
    return of_means, torch.cat([parts[name][:, : shape[0]].flatten(1) for name, shape in shapes.items()], 1)


def mean_of_rows(spec: PolicySpec, rows: Tensor, obs: Tensor) -> Tensor:
    """Return what `mean_action` returns, and raise what it raises for obs; `rows` come from `mlp_rows`."""
    _check_kind("obs", obs)
    N = len(rows)
    if obs.ndim != 3 or obs.shape[0] != N or obs.shape[2] != spec.obs_dim:
        expected = f"(N, E, obs_dim) = ({N}, E, {spec.obs_dim})"
        raise ValueError(f"mean_action: obs must have shape {expected}, got {tuple(obs.shape)}")
    means = _outputs(spec, rows.detach().contiguous().numpy(), obs.detach().contiguous().numpy())
    if spec.mean_limit is not None:
        np.clip(means, -spec.mean_limit, spec.mean_limit, out=means)
    return torch.from_numpy(means)


def _outputs(spec: PolicySpec, rows: Singles, obs: Singles) -> Singles:
    """Return the outputs (N, E, A) of MLPs whose rows (N, A + m) or longer are as the engine takes them."""
    if spec.activation != "silu":
        return _core.mean_actions(
            rows, obs, act_dim=spec.act_dim, hidden_sizes=spec.hidden_sizes, activation=spec.activation
        )
    x, begin = obs, spec.act_dim  # the engine has no silu, which is applied here between its layers
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(spec.layer_sizes)):
        end = begin + (fan_in + 1) * fan_out
        layer = np.pad(rows[:, begin:end], ((0, 0), (fan_out, 0)))
        x = _core.mean_actions(layer, _silu(x) if i else x, act_dim=fan_out, hidden_sizes=(), activation="tanh")
        begin = end
    return x


def _silu(x: Singles) -> Singles:
    """Return x sigmoid(x), x (...) float32. A number's bits do not depend on where in the array it lies."""
    with np.errstate(over="ignore"):  # exp(-x) is then infinite, and x sigmoid(x) 0, as it should be
        result: Singles = np.divide(x, 1 + np.exp(-x), dtype=np.float32)
    return result


def actions_of(
    spec: PolicySpec, means: NDArray[np.float32], low: NDArray[np.float64], high: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the actions (..., A) that deterministic policies take, of their mean actions (..., A).

    The action space lies between `low` and `high`, (A,) each. Where the policy squashes, an action is tanh(mean),
    rescaled to the action space, in float32 and in the order in which Stable-Baselines3 computes it, and its bits
    depend on this mean alone. Where it rescales, the same is done with the mean in the place of its tanh. Of n
    discrete actions, the outputs (..., n) become actions (..., 1): `low` (1,) plus the index of the greatest output,
    the first of several. Elsewhere it is the mean, which the caller clips to the action space.

    Raises ValueError where the policy squashes or rescales and the action space has no bounds.
    """
    if spec.discrete:
        chosen: NDArray[np.float64] = low + means.argmax(-1, keepdims=True)
        return chosen
    if not (spec.squash or spec.rescale):
        return means.astype(np.float64)
    least, most = low.astype(np.float32), high.astype(np.float32)
    if not np.isfinite(most - least).all():
        kind = "squashes" if spec.squash else "rescales"
        raise ValueError(f"a policy that {kind} needs an action space with bounds, got {low} to {high}")
    unit = np.ascontiguousarray(means, np.float32)  # in [-1, 1]
    if spec.squash:
        unit = np.tanh(unit)  # which has the same bits wherever in an array a number lies
    actions: NDArray[np.float32] = least + np.float32(0.5) * (unit + np.float32(1.0)) * (most - least)
    return actions.astype(np.float64)


def can_sample(spec: PolicySpec) -> bool:
    """Return whether the policy has a distribution of its own that is known: not TD3's or DQN's, nor with gSDE, whose
    noise lasts, nor one of "halves", which libraries make standard deviations of in ways that no file names."""
    return spec.outputs == "logits" or (not spec.discrete and not spec.gsde and spec.spread in ("parameter", "head"))


def sampled_means(
    spec: PolicySpec, weights: Tensor, obs: Tensor, means: NDArray[np.float32], noise: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return what stochastic policies (N, p) put in the place of their means (N, E, A), for `actions_of`.

    `noise` (N, E, A) is standard normal, and of discrete actions standard Gumbel: the greatest of logits + noise has
    the probabilities of their softmax. `means` are not clipped (`unclipped`); raises what `log_stds` raises.
    """
    if spec.discrete:
        return means + noise
    spread = log_stds(spec, weights, obs)
    if spread is None:
        raise ValueError("a policy without standard deviations of its own cannot be sampled")
    sampled: NDArray[np.float32] = (means + spread.exp().numpy() * noise).astype(np.float32)
    return sampled if spec.mean_limit is None else sampled.clip(-spec.mean_limit, spec.mean_limit)


def unclipped(spec: PolicySpec) -> PolicySpec:
    """Return the policy without the clipping of its mean: where rl_games samples, it clips what the Gaussian gives."""
    return dataclasses.replace(spec, mean_limit=None, rescale=False)


def log_stds(spec: PolicySpec, weights: Tensor, obs: Tensor) -> Tensor | None:
    """Return the logarithms of the standard deviations (N, E, A) of N policies (N, p) that see obs (N, E, obs_dim).

    Where the policy squashes, they are those of the Gaussian before the tanh. None for policies that have no standard
    deviations (TD3), that draw them from the last hidden layer's units (gSDE), or that make them of the last layer's
    second half ("halves") in a way that no file names.

    Raises what `mean_action` raises for a head of its own.
    """
    if spec.gsde or spec.spread in ("halves", "none"):
        return None
    if spec.spread == "parameter":
        return weights[:, None, : spec.act_dim].expand(-1, obs.shape[1], -1)
    head = spec.num_params - _mlp_size(spec)  # as large as the mean's, whose place it takes
    hidden = spec.num_params - 2 * head
    one_head = torch.cat([weights[:, : spec.act_dim], weights[:, :hidden], weights[:, -head:]], 1)
    plain = PolicySpec(spec.obs_dim, spec.act_dim, spec.hidden_sizes, spec.activation)
    return mean_action(plain, one_head, obs).clamp(*LOG_STD_RANGE)


def _check_kind(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise TypeError(f"mean_action: {name} must be torch.float32 on the CPU, got {tensor.dtype} on {tensor.device}")


def _mlp_size(spec: PolicySpec) -> int:
    return sum((fan_in + 1) * out for fan_in, out in itertools.pairwise(spec.layer_sizes))


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
