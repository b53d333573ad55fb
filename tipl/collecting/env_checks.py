"""Whether PPO can learn in an environment with its settings."""

import contextlib
from collections.abc import Mapping
from typing import Any

import gymnasium

from tipl.collecting.envs import make_vec
from tipl.collecting.ppo_config import PPOConfig
from tipl.collecting.vector_env import VectorEnv

OF_CONTINUOUS_ACTIONS = ("log_std_init", "learn_log_std")
"""Settings without effect on discrete actions."""


def check_can_learn(owner: str, env_id: str, config: PPOConfig, env_kwargs: Mapping[str, Any] | None = None) -> None:
    """Raise ValueError where PPO cannot learn in an environment, or there is none; texts begin with `owner`."""
    with contextlib.closing(make_vec(env_id, 1, seeds=[0], env_kwargs=env_kwargs)) as env:
        check_settings(owner, env, config)


def check_env_kwargs(env_id: str, env_kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError where an environment that is installed here refuses its arguments."""
    if env_id in gymnasium.registry:
        make_vec(env_id, 1, seeds=[0], env_kwargs=env_kwargs).close()


def check_settings(owner: str, env: VectorEnv, config: PPOConfig) -> None:
    """Raise ValueError where a setting that only continuous actions have is given for discrete ones."""
    if env.num_actions is None:
        return
    for name in OF_CONTINUOUS_ACTIONS:
        value, default = getattr(config, name), getattr(PPOConfig(), name)
        if value != default:
            raise ValueError(
                f"{owner}: {name} must stay {default} for the discrete actions of {env.env_id}, which have no log_std, "
                f"got {value}"
            )
