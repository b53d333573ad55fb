"""What the tests of PPO share: environments whose steps can be told apart, and one update beside float64 autograd and
beside Stable-Baselines3's own."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import reference
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray

from tipl import _core
from tipl.collecting.action_noise import spec_of_actions
from tipl.collecting.population import Population, PPOConfig, Transitions
from tipl.collecting.population_records import UpdateStats
from tipl.collecting.vector_env import VectorEnv

SMALL = PPOConfig(num_steps=64, num_minibatches=4, update_epochs=3)


class ScriptedEnv(VectorEnv):
    """Identifiable steps: observation (seed, episode, step in the episode) / 10, reward 100 x (step overall) + action.

    Even episodes terminate after 5 steps, odd ones time out after 7. So nothing is random but a seed's own label.
    """

    def __init__(self, num_envs: int, act_dim: int = 1) -> None:
        super().__init__("Scripted-v0", num_envs, 3, Box(-np.inf, np.inf, (act_dim,), np.float32), None)
        self.labels = np.full(num_envs, -1.0)
        self.episode, self.elapsed, self.total = (np.zeros(num_envs, np.int64) for _ in range(3))

    def _seed(self, seeds: list[int]) -> None:
        self.labels[:] = seeds
        self.episode[:], self.total[:] = -1, 0

    def _observe(self, ids: NDArray[np.intp]) -> NDArray[np.float64]:
        return np.stack([self.labels[ids], self.episode[ids], self.elapsed[ids]], 1) / 10

    def _advance(
        self, actions: NDArray[np.float64], ids: NDArray[np.intp]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
        reward = 100.0 * self.total[ids] + actions[:, 0]
        self.total[ids] += 1
        self.elapsed[ids] += 1
        even = self.episode[ids] % 2 == 0
        return self._observe(ids), reward, even & (self.elapsed[ids] == 5), ~even & (self.elapsed[ids] == 7)

    def _restart(self, ids: NDArray[np.intp]) -> NDArray[np.float64]:
        self.episode[ids] += 1
        self.elapsed[ids] = 0
        return self._observe(ids)

    def close(self) -> None:
        pass


def population(seeds: Sequence[int], config: PPOConfig = SMALL, act_dim: int = 1, **kwargs: object) -> Population:
    return Population(ScriptedEnv(len(seeds) * config.num_envs, act_dim), config, seeds, **kwargs)


def value_is_third_observation(trials: Population) -> None:
    """Make critics without hidden layers say V(obs) = 10 obs[2], which is the step in the episode."""
    trials.params[:, trials.spec.num_params :] = [0.0, 0.0, 10.0, 0.0]


def random_update(
    config: PPOConfig, act_dim: int, obs_dim: int = 5, seed: int = 0, *, discrete: bool = False
) -> dict[str, np.ndarray]:
    """Arrays for one update of three trials: ratios on both sides of the clip range, advantages of both signs.

    With `discrete`, act_dim is the number of discrete actions.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    N, S, E = 3, config.batch_size, config.update_epochs
    spec = spec_of_actions(obs_dim, act_dim, act_dim if discrete else None, config)
    sizes = (*spec.layer_sizes[:-1], 1)
    P = spec.num_params + sum(out * (into + 1) for into, out in itertools.pairwise(sizes))
    arrays = {
        "params": 0.15 * normal(N, P),
        "observations": normal(N, S, obs_dim),
        "actions": normal(N, S, act_dim),
        "advantages": normal(N, S),
        "returns": normal(N, S),
        "values": normal(N, S),
        "order": np.stack([[rng.permutation(S) for _ in range(E)] for _ in range(N)]).astype(np.int32),
    }
    if discrete:
        arrays["actions"] = rng.integers(act_dim, size=(N, S, 1)).astype(np.float32)
    agents = [reference.Agent(torch.from_numpy(row), obs_dim, act_dim, config, discrete) for row in arrays["params"]]
    with torch.no_grad():
        log_probs = [
            agent.distribution(torch.from_numpy(obs)).log_prob(torch.from_numpy(action)).numpy()
            for agent, obs, action in zip(agents, arrays["observations"], arrays["actions"], strict=True)
        ]
    return arrays | {"log_probs": np.stack(log_probs) + 0.3 * normal(N, S)}


def updated(
    config: PPOConfig, arrays: dict[str, np.ndarray], num_threads: int = 2, num_actions: int | None = None
) -> dict[str, np.ndarray]:
    """What the native update makes of them: params, moments, num_updates and losses."""
    engine = _core.PpoUpdate(
        obs_dim=arrays["observations"].shape[-1],
        act_dim=num_actions or arrays["actions"].shape[-1],
        config=config,
        num_threads=num_threads,
        discrete=num_actions is not None,
    )
    params = arrays["params"].copy()
    state = {
        "params": params,
        "first_moments": np.zeros_like(params),
        "second_moments": np.zeros_like(params),
        "num_updates": np.zeros(len(params), np.int64),
    }
    losses = engine.update(**(arrays | state), learning_rate=config.learning_rate)
    return state | {"losses": losses}


def by_autograd(
    config: PPOConfig, arrays: dict[str, np.ndarray], trial: int, dtype: torch.dtype, num_actions: int | None = None
) -> tuple[torch.Tensor, dict[str, float]]:
    """The trial's parameters after torch's update in `dtype`, and what it logged."""
    data = {name: torch.from_numpy(x[trial]) for name, x in arrays.items()}
    A, O = num_actions or arrays["actions"].shape[-1], arrays["observations"].shape[-1]  # noqa: E741
    agent = reference.Agent(data["params"].to(dtype), O, A, config, discrete=num_actions is not None)
    names = {"obs": "observations", "action": "actions", "log_prob": "log_probs", "advantage": "advantages"}
    names |= {"target": "returns", "value": "values"}
    transitions = {name: data[ours].to(dtype) for name, ours in names.items()}
    return agent, reference.ppo_update(agent, transitions, list(data["order"].long()), config)


def assert_updates_as_autograd(
    config: PPOConfig, arrays: dict[str, np.ndarray], ours: dict[str, np.ndarray], num_actions: int | None = None
) -> None:
    for i in range(len(arrays["params"])):
        oracle, logs = by_autograd(config, arrays, i, torch.float64, num_actions)
        in_float32, _ = by_autograd(config, arrays, i, torch.float32, num_actions)
        row = torch.from_numpy(ours["params"][i]).double()
        bound = 4 * (in_float32.row() - oracle.row()).abs().max() + 8 * torch.finfo(torch.float32).eps
        assert (row - oracle.row()).abs().max() <= bound
        assert (row - torch.from_numpy(arrays["params"][i])).abs().max() > 1e-3  # it did move
        assert ours["num_updates"][i] == logs["steps"]
        names = ["policy_loss", "value_loss", "clipfrac", "approx_kl", *(["entropy"] if num_actions else [])]
        for name, value in zip(names, ours["losses"][i], strict=True):
            assert value == pytest.approx(logs[name], rel=1e-3, abs=1e-5), name


UPDATES: dict[str, dict[str, object]] = {
    "as by default": {},
    "relu": {"activation": "relu"},
    "elu": {"activation": "elu"},
    "no hidden layer": {"hidden_sizes": ()},
    "one hidden layer": {"hidden_sizes": (7,)},
    "three wide ones": {"hidden_sizes": (70, 33, 129)},
    "minibatches of 10": {"num_steps": 60, "num_minibatches": 6},
    "minibatches of 1": {"num_steps": 8, "num_minibatches": 8},
    "one minibatch": {"num_minibatches": 1},
    "several environments": {"num_envs": 3},
    "entropy": {"ent_coef": 0.1},
    "values weigh more": {"vf_coef": 2.0},
    "clipped values": {"clip_coef_vf": 0.05},
    "narrow clip": {"clip_coef": 0.01},
    "small gradients": {"max_grad_norm": 0.01},
    "large gradients": {"max_grad_norm": 1e9},
    "advantages as they are": {"normalize_advantage": False},
    "target KL reached": {"target_kl": 0.08},
    "target KL at once": {"target_kl": 1e-9, "learning_rate": 1e-3},
    "SGD": {"optimizer": "sgd", "learning_rate": 0.1},
    "SGD, large gradients": {"optimizer": "sgd", "learning_rate": 0.01, "max_grad_norm": 1e9},
    "fixed log_std": {"learn_log_std": False},
    # The entropy's gradient is the largest by far, and would show in the norm.
    "SGD, fixed log_std": {"optimizer": "sgd", "learning_rate": 0.1, "learn_log_std": False, "ent_coef": 10.0},
}


def row_of(model: Any) -> NDArray[np.float32]:
    """The parameters of SB3's policy (P,), in our order."""
    state = model.policy.state_dict()
    order = [name for name in state if "value_net" not in name] + [name for name in state if "value_net" in name]
    return np.concatenate([state[name].numpy().ravel() for name in order])


def updated_beside_sb3(
    model: Any, trials: Population, transitions: Transitions, learning_rate: float
) -> tuple[UpdateStats, dict[str, Any]]:
    """Update both on transitions whose last step was truncated before an observation of ones; return the trial's
    statistics, and what SB3 logs."""
    buffer, obs = model.rollout_buffer, transitions.observations
    buffer.observations[:, 0], buffer.actions[:, 0] = obs[0], transitions.actions[0]
    buffer.rewards[:], buffer.log_probs[:, 0] = transitions.rewards, transitions.log_probs[0]
    buffer.episode_starts[1:] = transitions.terminated[:-1]
    with torch.no_grad():
        buffer.values[:, 0] = model.policy.predict_values(torch.from_numpy(obs[0]))[:, 0]
        last_value = model.policy.predict_values(torch.ones(1, obs.shape[2]))
    buffer.compute_returns_and_advantage(last_value, transitions.terminated[-1])
    buffer.full = True
    model.train()
    return trials.update(transitions, learning_rate), model.logger.name_to_value


def assert_logged(stats: UpdateStats, logged: dict[str, Any]) -> None:
    """Assert that a trial's statistics are those that SB3 logs; the entropy is not among them."""
    for name, theirs in (
        ("policy_loss", "policy_gradient_loss"),
        ("value_loss", "value_loss"),
        ("clipfrac", "clip_fraction"),
        ("approx_kl", "approx_kl"),
        ("explained_variance", "explained_variance"),
    ):
        assert getattr(stats, name)[0] == pytest.approx(logged[f"train/{theirs}"], rel=1e-3, abs=1e-6), name
