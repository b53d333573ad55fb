"""Oracles in float64, slow and obvious; one section a concept."""

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tipl.collecting.ppo_config import PPOConfig
from tipl.forecasting.transformer import ModelConfig
from tipl.subspace.prefix import Prefix

# ---- the forecaster (tipl/forecasting/transformer.py, csrc/decode.cpp)

SMALL_MODEL = ModelConfig(n_components=5, n_layer=2, n_head=3, d_model=39, d_ff=50, max_len=90, out_scale=0.05)
"""Sizes none of which a vector register divides."""


def random_forecaster(config: ModelConfig, seed: int) -> dict[str, NDArray[np.float32]]:
    """Return a state_dict of random weights that keep activations near one, with non-zero biases everywhere."""
    rng = np.random.default_rng(seed)
    k, d, d_ff, width = config.n_components, config.d_model, config.d_ff, config.token_width
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (d, width), "embed.bias": (d,)}
    shapes["pos.weight"] = (config.max_len, d)
    for i in range(config.n_layer):
        for name, out, into in (("qkv", 3 * d, d), ("proj", d, d), ("fc1", d_ff, d), ("fc2", d, d_ff)):
            shapes |= {f"blocks.{i}.{name}.weight": (out, into), f"blocks.{i}.{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (d,), f"blocks.{i}.{name}.bias": (d,)}
    shapes |= {"norm.weight": (d,), "norm.bias": (d,), "head.weight": (k, d), "head.bias": (k,)}
    state = {}
    for name, shape in shapes.items():
        scale = 0.3 if len(shape) == 1 or name == "pos.weight" else shape[1] ** -0.5
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        state[name] = (centre + scale * rng.standard_normal(shape)).astype(np.float32)
    return state


def forecaster(
    config: ModelConfig, state: dict[str, NDArray[np.float32]], x: NDArray[np.floating], prefix_end: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Return the prediction (B, T, k) of x_{t+1} at every t, from x (B, T, k) and prefix_end (B,)."""
    w = {name: value.astype(np.float64) for name, value in state.items()}
    x = x.astype(np.float64)
    (B, T, _), d, H = x.shape, config.d_model, config.n_head
    difference = np.diff(x, axis=1, prepend=x[:, :1])
    since_prefix = (np.arange(T) - prefix_end[:, None]) / config.max_len
    u = np.concatenate([x, config.diff_scale * difference, since_prefix[..., None]], -1)

    def linear(name: str, z: NDArray[np.float64]) -> NDArray[np.float64]:
        return z @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def layer_norm(name: str, z: NDArray[np.float64]) -> NDArray[np.float64]:
        centred = z - z.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    z = linear("embed", u) + w["pos.weight"][:T]
    for i in range(config.n_layer):
        block = f"blocks.{i}"
        qkv = linear(f"{block}.qkv", layer_norm(f"{block}.norm1", z))
        q, key, value = qkv.reshape(B, T, 3, H, d // H).transpose(2, 0, 3, 1, 4)  # each (B, H, T, D)
        scores = np.where(np.tri(T, dtype=bool), q @ key.swapaxes(-1, -2) / np.sqrt(d // H), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = weights / weights.sum(-1, keepdims=True) @ value
        z = z + linear(f"{block}.proj", attended.transpose(0, 2, 1, 3).reshape(B, T, d))
        h = linear(f"{block}.fc1", layer_norm(f"{block}.norm2", z))
        z = z + linear(f"{block}.fc2", 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))))
    return x + config.out_scale * linear("head", layer_norm("norm", z))


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the nearest bfloat16 of each value, ties to even, as float32."""
    return torch.from_numpy(values).bfloat16().float().numpy()


def stored(state: dict[str, NDArray[np.float32]], dtype: str) -> dict[str, NDArray[np.float32]]:
    """Return the state_dict with its blocks' matrices as a decoder of this dtype stores them."""
    result = dict(state)
    for name, value in state.items():
        if not name.startswith("blocks.") or value.ndim == 1 or dtype == "float32":
            continue
        if dtype == "bfloat16":
            result[name] = to_bfloat16(value)
        else:
            scale = np.abs(value).max(1, keepdims=True) / np.float32(127)  # of a row
            result[name] = np.rint(value / np.maximum(scale, 1e-30)) * scale
    return result


# ---- streaming SVD (tipl/subspace/streaming_svd.py, csrc/svd.cpp)


@functools.cache
def _orthonormal(n: int, k: int, seed: int) -> NDArray[np.float64]:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, k)))[0]


def with_singular_values(singular_values: NDArray[np.float64], n: int, p: int, seed: int) -> NDArray[np.float32]:
    """Return a float32 matrix (n, p) with these singular values and random singular vectors."""
    left, right = (_orthonormal(size, len(singular_values), seed) for size in (n, p))
    return ((left * singular_values) @ right.T).astype(np.float32)


def singular_values(rows: NDArray[np.floating], center: bool) -> NDArray[np.float64]:
    """Return the singular values of the rows, about their mean if `center`."""
    exact = rows.astype(np.float64)
    return np.linalg.svd(exact - exact.mean(0) if center else exact, compute_uv=False)


def residual(rows: NDArray[np.floating], directions: NDArray[np.floating], center: bool) -> float:
    """Return |A - A V^T V|_F of the rows A, about their mean if `center`, and the directions V (k, p)."""
    exact, v = rows.astype(np.float64), directions.astype(np.float64)
    if center:
        exact = exact - exact.mean(0)
    return float(np.linalg.norm(exact - (exact @ v.T) @ v))


def gram(rows: NDArray[np.float32], origin: NDArray[np.float32] | None) -> NDArray[np.float64]:
    """Return the products of all pairs of rows less the origin."""
    exact = rows.astype(np.float64) - (0.0 if origin is None else origin.astype(np.float64))
    return exact @ exact.T


# ---- baselines (tipl/judging/predictors.py, tipl/judging/regression.py, tipl/judging/nowcaster.py)


def relative_error(predictor: Any, path: NDArray[np.float32], prefix_end: int, horizon: int) -> float:
    """Return how far a forecast is from the truth, in lengths of the way that the path has gone by then."""
    forecast = predictor.forecast(Prefix(path[: prefix_end + 1]), np.array([horizon]))[0]
    truth = path[prefix_end + horizon].astype(np.float64)
    return float(np.linalg.norm(forecast - truth) / np.linalg.norm(truth - path[0]))


# ---- PPO (tipl/collecting/population.py): one trial as ordinary torch modules, with autograd and torch's own clipping
# and optimizers


class Agent(torch.nn.Module):
    """One trial, filled from a row (P,) of a population's parameters, in the row's dtype."""

    def __init__(
        self, row: torch.Tensor, obs_dim: int, act_dim: int, config: PPOConfig, discrete: bool = False
    ) -> None:
        super().__init__()
        if not discrete:
            self.log_std = torch.nn.Parameter(torch.zeros(act_dim), requires_grad=config.learn_log_std)
        self.discrete = discrete
        self.actor, self.critic = (self._mlp(obs_dim, out, config) for out in (act_dim, 1))
        self.to(row.dtype)
        size = sum(parameter.numel() for parameter in self.parameters())
        torch.nn.utils.vector_to_parameters(row[:size].clone(), self.parameters())

    @staticmethod
    def _mlp(fan_in: int, fan_out: int, config: PPOConfig) -> torch.nn.Sequential:
        modules: list[torch.nn.Module] = []
        for width in config.hidden_sizes:
            modules += [
                torch.nn.Linear(fan_in, width),
                {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU, "elu": torch.nn.ELU}[config.activation](),
            ]
            fan_in = width
        return torch.nn.Sequential(*modules, torch.nn.Linear(fan_in, fan_out))

    def distribution(self, obs: torch.Tensor) -> torch.distributions.Independent:
        outputs = self.actor(obs)
        if self.discrete:  # actions are vectors of one index
            return torch.distributions.Independent(torch.distributions.Categorical(logits=outputs[..., None, :]), 1)
        return torch.distributions.Independent(torch.distributions.Normal(outputs, self.log_std.exp()), 1)

    def row(self) -> torch.Tensor:
        return torch.nn.utils.parameters_to_vector(self.parameters()).detach()


def ppo_losses(
    agent: Agent,
    obs: torch.Tensor,
    action: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantage: torch.Tensor,
    target: torch.Tensor,
    old_value: torch.Tensor,
    config: PPOConfig,
) -> dict[str, torch.Tensor]:
    """Return "loss" and the parts that are logged, of one trial's minibatch, inputs (B, ...)."""
    distribution = agent.distribution(obs)
    log_ratio = distribution.log_prob(action) - old_log_prob
    ratio = log_ratio.exp()
    policy_loss = -torch.min(
        ratio * advantage, ratio.clamp(1 - config.clip_coef, 1 + config.clip_coef) * advantage
    ).mean()
    value = agent.critic(obs)[:, 0]
    if config.clip_coef_vf is not None:
        value = old_value + (value - old_value).clamp(-config.clip_coef_vf, config.clip_coef_vf)
    value_loss = (value - target).square().mean()
    return {
        "loss": policy_loss + config.vf_coef * value_loss - config.ent_coef * distribution.entropy().mean(),
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "clipfrac": ((ratio - 1).abs() > config.clip_coef).double().mean(),
        "entropy": distribution.entropy().mean(),
    }


def ppo_update(
    agent: Agent, transitions: dict[str, torch.Tensor], orders: list[torch.Tensor], config: PPOConfig
) -> dict[str, float]:
    """Run one epoch for each order (T,) over one trial's transitions (T, ...), as Stable-Baselines3 does.

    Returns the means of what is logged, and "steps", how many the optimizer took.
    """
    optimizer: torch.optim.Optimizer = torch.optim.SGD(agent.parameters(), lr=config.learning_rate)
    if config.optimizer == "adam":
        optimizer = torch.optim.Adam(agent.parameters(), lr=config.learning_rate, eps=config.adam_eps)
    logs: dict[str, list[float]] = {}
    steps = 0
    for order in orders:
        last_epoch: list[float] = []
        for rows in order.split(config.minibatch_size):
            obs, action, old_log_prob, advantage, target, old_value = (
                transitions[name][rows] for name in ("obs", "action", "log_prob", "advantage", "target", "value")
            )
            if config.normalize_advantage and len(rows) > 1:
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            losses = ppo_losses(agent, obs, action, old_log_prob, advantage, target, old_value, config)
            for name, loss in losses.items():
                logs.setdefault(name, []).append(loss.item())
            last_epoch.append(losses["approx_kl"].item())
            if config.target_kl is not None and last_epoch[-1] > 1.5 * config.target_kl:
                break
            optimizer.zero_grad()
            losses["loss"].backward()
            torch.nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm)
            optimizer.step()
            steps += 1
        else:
            continue
        break
    means = {name: float(np.mean(values)) for name, values in logs.items()}
    return means | {"approx_kl": float(np.mean(last_epoch)), "steps": steps}
