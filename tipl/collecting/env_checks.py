"""Whether PPO can learn in an environment."""

import contextlib

from tipl.collecting.envs import VectorEnv, make_vec


def check_can_learn(owner: str, env_id: str) -> None:
    """Raise ValueError where PPO cannot learn in an environment, or there is none; texts begin with `owner`."""
    with contextlib.closing(make_vec(env_id, 1, seeds=[0])) as env:
        check_continuous(owner, env)


def check_continuous(owner: str, env: VectorEnv) -> None:
    """Raise ValueError where actions are discrete."""
    if env.num_actions is not None:
        raise ValueError(
            f"{owner}: env must have continuous actions to learn in, but {env.env_id} has {env.num_actions} discrete "
            "ones; runs of other libraries there can be imported"
        )
