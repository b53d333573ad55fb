"""Normalised rewards, beside Stable-Baselines3's VecNormalize."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Box
from numpy.typing import NDArray
from ppo_checks import SMALL, population, value_is_third_observation

from tipl.collecting.envs import make_vec
from tipl.collecting.population import Population, environment_seeds
from tipl.collecting.reward_scaler import RewardScaler
from tipl.collecting.vector_env import Step, VectorEnv

pytest.importorskip("stable_baselines3", reason="compares with stable-baselines3, which is not installed")
import gymnasium
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

GAMMA = 0.9
NORMALIZED = dataclasses.replace(SMALL, normalize_rewards=True, gamma=GAMMA)


class Replayed(VecEnv):
    """Environments that return given rewards and dones, (T, E) each, whatever is done in them."""

    def __init__(self, rewards: NDArray[np.float64], dones: NDArray[np.bool_]) -> None:
        super().__init__(rewards.shape[1], Box(-1, 1, (1,)), Box(-1, 1, (1,)))
        self.steps = iter(zip(rewards, dones, strict=True))

    def reset(self) -> NDArray[np.float32]:
        return np.zeros((self.num_envs, 1), np.float32)

    def step_async(self, actions: NDArray[np.float32]) -> None:
        pass

    def step_wait(self) -> tuple[Any, ...]:
        reward, done = next(self.steps)
        return self.reset(), reward, done, [{} for _ in done]

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[None]:
        return [None] * self.num_envs

    set_attr = env_method = env_is_wrapped = None  # type: ignore[assignment]


def vec_normalize(rewards: NDArray[np.float64], dones: NDArray[np.bool_], gamma: float = GAMMA) -> VecNormalize:
    env = VecNormalize(Replayed(rewards, dones), norm_obs=False, gamma=gamma)
    env.reset()
    return env


def by_vec_normalize(rewards: NDArray[np.float64], dones: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return what VecNormalize makes of the rewards (T, E) of one trial."""
    env = vec_normalize(rewards, dones)
    return np.stack([env.step(np.zeros((env.num_envs, 1)))[1] for _ in rewards])


class Watched:
    """The steps that an environment returned, as it returned them."""

    def __init__(self, env: VectorEnv) -> None:
        self.made: list[Step] = []
        step = env.step

        def watched(actions: NDArray[np.float64]) -> Step:
            self.made.append(step(actions))
            return self.made[-1]

        env.step = watched  # type: ignore[method-assign]

    def column(self, name: str) -> NDArray[Any]:
        return np.stack([getattr(step, name) for step in self.made])


@pytest.mark.parametrize("num_envs", [1, 2, 9, 150])
@pytest.mark.parametrize("gamma", [0.0, 0.98, 1.0])
def test_scaled_rewards_are_stable_baselines3s_to_the_bit(num_envs: int, gamma: float) -> None:
    """The two trials differ a thousandfold in their rewards, and each has the statistics of its own rewards alone."""
    T, rng = 200, np.random.default_rng(0)
    rewards = np.repeat([1.0, 1000.0], num_envs) * rng.normal(0.5, 1, (T, 2 * num_envs))
    rewards[-1, ::num_envs] *= 1e4  # clipped
    dones = rng.random(rewards.shape) < 0.1
    scaler = RewardScaler(2, num_envs, gamma)
    parts = [slice(i * num_envs, (i + 1) * num_envs) for i in range(2)]
    theirs = [vec_normalize(rewards[:, part], dones[:, part], gamma) for part in parts]
    largest = 0.0
    for reward, done in zip(rewards, dones, strict=True):
        given = reward.copy()
        scaled = scaler.step(reward, done)
        np.testing.assert_array_equal(reward, given)
        largest = max(largest, abs(scaled).max())
        for i, (part, env) in enumerate(zip(parts, theirs, strict=True)):
            expected = env.step(np.zeros((num_envs, 1)))[1]
            np.testing.assert_array_equal(scaled[part].astype(np.float32), expected)
            np.testing.assert_array_equal(scaler.discounted_return[part], env.returns)
            own = [float(x[i].item()) for x in (scaler.mean, scaler.var, scaler.count)]
            assert own == [env.ret_rms.mean, env.ret_rms.var, env.ret_rms.count]
    assert largest == 10
    assert scaler.var[1].item() > 1e5 * scaler.var[0].item()


@pytest.mark.parametrize("num_envs", [1, 3])
def test_learning_sees_the_rewards_of_vec_normalize(num_envs: int) -> None:
    """Over two iterations, so that discounted returns and statistics are carried from the first to the second."""
    trials = population([7, 2], dataclasses.replace(NORMALIZED, num_envs=num_envs))
    env = Watched(trials.env)
    seen = np.concatenate([trials.act()[0].rewards for _ in range(2)])  # (128, 2 * E)
    rewards, dones = env.column("reward"), env.column("terminated") | env.column("truncated")
    assert dones.any()
    for part in (slice(0, num_envs), slice(num_envs, None)):
        np.testing.assert_array_equal(seen[:, part], by_vec_normalize(rewards[:, part], dones[:, part]))
    assert seen.max() < 11 < rewards.max()


def test_a_time_out_adds_the_value_to_the_normalised_reward() -> None:
    """As SB3 does, which adds gamma V(final_obs) to what VecNormalize returned; V is 10 times the third observation."""
    trials = population([3], dataclasses.replace(NORMALIZED, hidden_sizes=()), num_threads=1)
    env = Watched(trials.env)
    transitions, _, _ = trials.act()
    value_is_third_observation(trials)
    _, advantages = trials.estimate(transitions)
    terminated, truncated = env.column("terminated"), env.column("truncated")
    assert truncated.sum() == 5
    final_values = 10 * env.column("final_obs")[..., 2].astype(np.float32)
    buffer = RolloutBuffer(64, Box(-1, 1, (1,)), Box(-1, 1, (1,)), gamma=GAMMA, gae_lambda=0.95, n_envs=1)
    buffer.rewards[:] = by_vec_normalize(env.column("reward"), terminated | truncated)
    buffer.rewards += np.float32(GAMMA) * final_values * truncated
    buffer.values[:] = 10 * transitions.observations[..., 2].T
    buffer.episode_starts[1:] = (terminated | truncated)[:-1]
    buffer.compute_returns_and_advantage(torch.from_numpy(final_values[-1]), (terminated | truncated)[-1])
    np.testing.assert_allclose(advantages, buffer.advantages, rtol=0, atol=1e-5)


def test_a_simulated_trial_is_that_of_stable_baselines3() -> None:
    """The same actions in the same Hoppers: SB3 keeps rewards in float32 before it normalises them."""
    seeds, num_envs = [3, 8], 2
    config = dataclasses.replace(NORMALIZED, num_envs=num_envs, normalize_observations=True, gamma=0.999)
    env = make_vec("Hopper-v5", 2 * num_envs, seeds=environment_seeds(seeds, num_envs), num_threads=1)
    transitions, num_episodes, _ = Population(env, config, seeds, num_threads=1).act()
    assert num_episodes.min() > 0
    for i, seed in enumerate(seeds):
        part = slice(i * num_envs, (i + 1) * num_envs)
        hoppers = DummyVecEnv([lambda: gymnasium.make("Hopper-v5")] * num_envs)
        hoppers._seeds = environment_seeds([seed], num_envs)
        theirs = VecNormalize(hoppers, gamma=config.gamma)
        obs = theirs.reset()
        for t in range(config.num_steps):
            np.testing.assert_allclose(transitions.observations[part, t], obs, rtol=1e-6, atol=1e-6)
            actions = np.clip(transitions.actions[part, t], -1, 1)
            obs, rewards, dones, _ = theirs.step(actions)
            np.testing.assert_allclose(transitions.rewards[t, part], rewards, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal((transitions.terminated | transitions.truncated)[t, part], dones)
        theirs.close()
