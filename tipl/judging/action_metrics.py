"""How differently two policies act, whatever their weights: metrics on states that the true policy visits.

Shapes  N policies, S states, A = act_dim, p weights. Actions are computed in float32 as the simulator gets them; all
else is in float64.

A continuous action is the policy's mean, clipped or squashed to the action space, in units of half the action range:
every action space is 2 wide, so that tasks can be compared. A dimension without bounds keeps its unit. Discrete actions
have no order: it only counts whether two are the same.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tipl.collecting.envs import make_vec
from tipl.collecting.policy_network import actions_of, log_stds, mean_action, unclipped
from tipl.policy import PolicySpec

FloatArray = NDArray[np.float64]


def action_bounds(env_id: str, env_kwargs: Mapping[str, Any] | None = None) -> FloatArray:
    """Return the lowest and the highest action (2, A) of an environment."""
    with contextlib.closing(make_vec(env_id, 1, seeds=[0], env_kwargs=env_kwargs)) as env:
        return np.stack([env.action_low, env.action_high])


def unit_actions(
    policy: PolicySpec, weights: NDArray[np.float32], states: NDArray[np.float32], bounds: FloatArray
) -> FloatArray:
    """Return the deterministic actions (N, S, A) of policies (N, p) in states (S, obs_dim), in half action ranges.

    Discrete actions (N, S, 1) are the environment's whole numbers.
    """
    low, high = bounds
    if policy.discrete:
        return actions_of(policy, mean_action(policy, *_each(weights, states)).numpy(), low, high)
    half_range = np.where(np.isfinite(high - low), (high - low) / 2, 1.0)
    means = mean_action(policy, *_each(weights, states)).numpy()
    actions: FloatArray = np.clip(actions_of(policy, means, low, high), low, high) / half_range
    return actions


def action_differences(
    policy: PolicySpec,
    true: NDArray[np.float32],
    forecasts: NDArray[np.float32],
    states: NDArray[np.float32],
    bounds: FloatArray,
) -> FloatArray:
    """Return the root mean square difference (N,) in action of forecasts (N, p) from the true policy (p,).

    Of discrete actions, the share of states in which the two differ.
    """
    actions = unit_actions(policy, np.concatenate([true[None], forecasts]), states, bounds)  # (1 + N, S, A)
    if policy.discrete:
        shares: FloatArray = (actions[1:] != actions[0]).mean((1, 2))
        return shares
    differences: FloatArray = np.sqrt(((actions[1:] - actions[0]) ** 2).mean((1, 2)))
    return differences


def kl_divergences(
    policy: PolicySpec, true: NDArray[np.float32], forecasts: NDArray[np.float32], states: NDArray[np.float32]
) -> FloatArray:
    """Return KL(true || forecast) (N,) of the stochastic policies (p,) and (N, p), mean over states, in nats.

    They are Gaussians, or the softmax of logits. The tanh of a policy that squashes does not change it. NaN where
    policies have no distribution of their own: those of TD3 and DQN, and with gSDE. Not finite where a forecast's
    spread is so small that float64 overflows (log_std below about -350).
    """
    each = _each(np.concatenate([true[None], forecasts]), states)
    if policy.outputs == "logits":
        log_p = mean_action(policy, *each).double().log_softmax(-1).numpy()  # (1 + N, S, A)
        of_logits: FloatArray = (np.exp(log_p[0]) * (log_p[0] - log_p[1:])).sum(2).mean(1)
        return np.maximum(of_logits, 0.0)
    found = log_stds(policy, *each)
    if found is None:
        return np.full(len(forecasts), np.nan)
    log_std = found.numpy().astype(np.float64)  # (1 + N, S, A)
    means = mean_action(unclipped(policy), *each).numpy().astype(np.float64)  # (1 + N, S, A)
    log_ratio = log_std[1:] - log_std[0]
    with np.errstate(over="ignore", invalid="ignore"):
        shift = ((means[1:] - means[0]) * np.exp(-log_std[1:])) ** 2  # in standard deviations of the forecast
        kl: FloatArray = (log_ratio + (np.expm1(-2 * log_ratio) + shift) / 2).sum(2).mean(1)
    return np.maximum(kl, 0.0)  # rounding can take it below


def action_variance(
    policy: PolicySpec, weights: NDArray[np.float32], states: NDArray[np.float32], bounds: FloatArray
) -> float:
    """Return the variance of action between policies (N, p), mean over states and dimensions; 0 where all are equal.

    Of discrete actions, the probability that two of the policies, drawn at random, differ in a state.
    """
    actions = unit_actions(policy, weights, states, bounds)  # (N, S, A)
    if policy.discrete:
        low, high = bounds[:, 0]
        is_taken = actions == np.arange(low, high + 1)  # (N, S, n)
        return float(is_taken.var(0, ddof=1).sum(1).mean())  # N / (N - 1) (1 - sum of squared shares)
    return float(actions.var(0, ddof=1).mean())


def _each(weights: NDArray[np.float32], states: NDArray[np.float32]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return policies (N, p) and what each of them sees (N, S, obs_dim): all the same states."""
    each = torch.from_numpy(states.copy()).expand(len(weights), -1, -1)  # what came through Ray cannot be written
    return torch.from_numpy(weights), each
