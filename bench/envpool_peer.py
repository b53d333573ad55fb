"""EnvPool with CleanRL's PPO, the fastest way to train one policy on MuJoCo's CPU simulator, written again in torch.

One policy learns from many environments at once, with the defaults of CleanRL's ppo_continuous_action.py at the commit
of its paper (two networks of 64 x 64, tanh, 10 epochs of 32 minibatches, clipped values, gradients clipped to 0.5):
the more environments, the larger the minibatches and the less an update costs per env step. EnvPool steps its
simulations on all cores; it has MuJoCo 3.6 inside, whatever version is installed.
"""

import envpool
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from tipl import _core

GAMMA, GAE_LAMBDA, CLIP_COEF, VF_COEF, MAX_GRAD_NORM, LEARNING_RATE = 0.99, 0.95, 0.2, 0.5, 0.5, 3e-4
UPDATE_EPOCHS, NUM_MINIBATCHES = 10, 32


def mlp(num_inputs: int, num_outputs: int, last_gain: float) -> nn.Sequential:
    layers = [nn.Linear(num_inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, num_outputs)]
    for layer, gain in zip(layers[::2], (2**0.5, 2**0.5, last_gain), strict=True):
        assert isinstance(layer, nn.Linear)
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class EnvPoolPPO:
    """PPO of one policy in `num_envs` environments of EnvPool; an iteration is `num_steps` steps of each."""

    def __init__(self, env_id: str, num_envs: int, num_steps: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.env = envpool.make_gymnasium(env_id, num_envs=num_envs, num_threads=_core.available_cpus(), seed=seed)
        space = self.env.action_space
        self.low, self.high = space.low, space.high
        obs_dim, act_dim = self.env.observation_space.shape[0], space.shape[0]
        self.actor, self.critic = mlp(obs_dim, act_dim, 0.01), mlp(obs_dim, 1, 1.0)
        self.log_std = nn.Parameter(torch.zeros(act_dim))
        self.params = [*self.actor.parameters(), *self.critic.parameters(), self.log_std]
        self.optimizer = torch.optim.Adam(self.params, lr=LEARNING_RATE, eps=1e-5)
        self.obs = torch.zeros(num_steps, num_envs, obs_dim)
        self.actions = torch.zeros(num_steps, num_envs, act_dim)
        self.log_probs, self.rewards, self.dones, self.values = torch.zeros(4, num_steps, num_envs)
        self.next_obs = self._tensor(self.env.reset()[0])
        self.next_done = torch.zeros(num_envs)

    @staticmethod
    def _tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.float32))

    def iterate(self) -> None:
        """Collect `num_steps` steps of every environment, and learn from them."""
        with torch.no_grad():
            self._collect()
            advantages = self._advantages()
        self._update(advantages)

    def _collect(self) -> None:
        std = self.log_std.exp()
        for t in range(len(self.obs)):
            self.obs[t], self.dones[t] = self.next_obs, self.next_done
            policy = Normal(self.actor(self.next_obs), std)
            self.actions[t] = policy.sample()
            self.log_probs[t] = policy.log_prob(self.actions[t]).sum(1)
            self.values[t] = self.critic(self.next_obs)[:, 0]
            action = np.clip(self.actions[t].numpy(), self.low, self.high)
            obs, reward, terminated, truncated, _ = self.env.step(action.astype(np.float64))
            self.rewards[t] = self._tensor(reward)
            self.next_obs, self.next_done = self._tensor(obs), self._tensor(terminated | truncated)

    def _advantages(self) -> Tensor:
        advantages, last = torch.zeros_like(self.rewards), torch.zeros(self.rewards.shape[1])
        next_value, alive = self.critic(self.next_obs)[:, 0], 1 - self.next_done
        for t in reversed(range(len(self.rewards))):
            delta = self.rewards[t] + GAMMA * next_value * alive - self.values[t]
            advantages[t] = last = delta + GAMMA * GAE_LAMBDA * alive * last
            next_value, alive = self.values[t], 1 - self.dones[t]
        return advantages

    def _update(self, advantages: Tensor) -> None:
        obs, actions = self.obs.flatten(0, 1), self.actions.flatten(0, 1)
        log_probs, values, advantages = self.log_probs.flatten(), self.values.flatten(), advantages.flatten()
        returns = advantages + values
        for _ in range(UPDATE_EPOCHS):
            for rows in torch.randperm(len(obs)).chunk(NUM_MINIBATCHES):
                policy = Normal(self.actor(obs[rows]), self.log_std.exp())
                ratio = (policy.log_prob(actions[rows]).sum(1) - log_probs[rows]).exp()
                advantage = advantages[rows]
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                clipped = ratio.clamp(1 - CLIP_COEF, 1 + CLIP_COEF)
                value = self.critic(obs[rows])[:, 0]
                near = values[rows] + (value - values[rows]).clamp(-CLIP_COEF, CLIP_COEF)
                errors = torch.maximum((value - returns[rows]) ** 2, (near - returns[rows]) ** 2)
                loss = VF_COEF * 0.5 * errors.mean() - torch.minimum(ratio * advantage, clipped * advantage).mean()
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM)
                self.optimizer.step()
