"""What the policies and environments of Stable-Baselines3 say of themselves."""

import math

import torch
from gymnasium.spaces import Discrete
from stable_baselines3.common.vec_env import VecEnv

from tipl.storing.actor_families import Settings
from tipl.storing.store import UNKNOWN


def settings_of(policy: torch.nn.Module) -> Settings:
    """Return what the policy's parameters do not say of how it acts."""
    limit = getattr(getattr(policy, "actor", None), "clip_mean", None)
    is_limit = isinstance(limit, float) and 0.0 < limit < math.inf
    return Settings(
        activation_of(policy),
        bool(getattr(policy, "squash_output", False)),
        limit if is_limit else None,
        # Masks, which no weights hold, decide with sb3-contrib's MaskablePPO which actions there are.
        isinstance(policy.action_space, Discrete) and ".maskable." not in f"{type(policy).__module__}.",
    )


def activation_of(policy: torch.nn.Module) -> str | None:
    """Return the name of the policy's activation: "tanh" for torch's Tanh, the full repr of a custom one, or None."""
    activation = getattr(policy, "activation_fn", None)
    if activation is None or getattr(activation, "__module__", "") != torch.nn.Tanh.__module__:
        return None if activation is None else repr(activation)
    return str(activation.__name__).lower()


def env_id_of(env: VecEnv) -> str:
    """Return the Gymnasium id of the environments, UNKNOWN where gymnasium.make did not make them."""
    spec = env.get_attr("spec")[0]
    return UNKNOWN if spec is None else str(spec.id)
