"""rl-zoo3's settings of PPO for MuJoCo tasks, all of which `PPOConfig` can say."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from tipl.collecting.envs import make_vec
from tipl.collecting.population import Population
from tipl.collecting.ppo_config import PPOConfig

COLUMNS = ("n_steps", "batch_size", "gamma", "learning_rate", "ent_coef", "clip_range", "n_epochs", "gae_lambda")
COLUMNS += ("max_grad_norm", "vf_coef")
ROWS = {
    "HalfCheetah": (512, 64, 0.98, 2.0633e-05, 0.000401762, 0.1, 20, 0.92, 0.8, 0.58096),
    "Hopper": (512, 32, 0.999, 9.80828e-05, 0.00229519, 0.2, 5, 0.99, 0.7, 0.835671),
    "HumanoidStandup": (512, 32, 0.99, 2.55673e-05, 3.62109e-06, 0.3, 20, 0.9, 0.7, 0.430793),
    "Humanoid": (512, 256, 0.95, 3.56987e-05, 0.00238306, 0.3, 5, 0.9, 2.0, 0.431892),
    "InvertedDoublePendulum": (128, 512, 0.98, 0.000155454, 1.05057e-06, 0.4, 10, 0.8, 0.5, 0.695929),
    "InvertedPendulum": (32, 64, 0.999, 0.000222425, 1.37976e-07, 0.4, 5, 0.9, 0.3, 0.19816),
    "Reacher": (512, 32, 0.9, 0.000104019, 7.52585e-08, 0.3, 5, 1.0, 0.9, 0.950368),
    "Walker2d": (512, 32, 0.99, 5.05041e-05, 0.000585045, 0.1, 20, 0.95, 1.0, 0.871923),
}
SWIMMER = {"n_envs": 4, "n_steps": 1024, "batch_size": 256, "gamma": 0.9999, "learning_rate": 6e-4, "gae_lambda": 0.98}
SETTINGS: dict[str, dict[str, Any]] = {
    "Ant": {},
    "Swimmer": SWIMMER,
    **{task: dict(zip(COLUMNS, row, strict=True)) for task, row in ROWS.items()},
}
"""Those of hyperparams/ppo.yml in rl-baselines3-zoo (commit 208b6fd), under SB3's names; where one is missing, SB3's
default holds."""
LARGE = ("HalfCheetah", "Hopper", "HumanoidStandup", "Humanoid")
"""Tasks whose policy_kwargs are dict(log_std_init=-2, ortho_init=False, activation_fn=ReLU, net_arch=[256, 256])."""


def zoo_config(task: str) -> PPOConfig:
    """Return rl-zoo3's settings of a task; they normalise observations and rewards of every task."""
    given = {"n_envs": 1, "n_steps": 2048, "batch_size": 64} | SETTINGS[task]
    num_envs, num_steps, batch_size = (given.pop(name) for name in ("n_envs", "n_steps", "batch_size"))
    names = {"clip_range": "clip_coef", "n_epochs": "update_epochs"}
    large = {"log_std_init": -2.0, "ortho_init": False, "activation": "relu", "hidden_sizes": (256, 256)}
    return PPOConfig(
        num_envs=num_envs,
        num_steps=num_steps,
        num_minibatches=max(1, num_envs * num_steps // batch_size),  # SB3 cuts a minibatch to the steps that there are
        normalize_observations=True,
        normalize_rewards=True,
        **{names.get(name, name): value for name, value in given.items()},
        **(large if task in LARGE else {}),
    )


@pytest.mark.parametrize("task", SETTINGS)
def test_rl_zoo3s_settings_run(task: str) -> None:
    config = zoo_config(task)
    assert config.minibatch_size == min(SETTINGS[task].get("batch_size", 64), config.batch_size)
    assert PPOConfig.from_dict(dataclasses.asdict(config)) == config
    short = dataclasses.replace(config, update_epochs=1)
    env = make_vec(f"{task}-v5", 2 * config.num_envs, seeds=range(2 * config.num_envs), num_threads=1)
    trials = Population(env, short, [0, 1], num_threads=1)
    before = trials.params.copy()
    stats = trials.iterate()
    assert (trials.params != before).any(1).all()
    assert np.isfinite(stats.value_loss).all()
    assert trials.env_steps == config.batch_size
