"""The spaces of observations and actions that environments may have here."""

from typing import Any, TypeAlias

import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

ActionSpace: TypeAlias = "Box[Any] | Discrete[Any]"


def flat_box(env_id: str, name: str, space: Any) -> "Box[Any]":
    """Return `space`. Raises ValueError where it is no Box of vectors; `name` says what it is the space of."""
    if not isinstance(space, Box):
        raise ValueError(f"make_vec: the {name} of {env_id} must be a Box, got {space}")
    if len(space.shape) != 1:
        raise ValueError(f"make_vec: the {name} of {env_id} must be vectors, got shape {space.shape}")
    return space


def checked_actions(env_id: str, space: Any) -> ActionSpace:
    """Return `space`. Raises ValueError where it is neither Discrete nor a Box of continuous vectors."""
    if isinstance(space, Discrete):
        return space
    if not isinstance(space, Box):
        raise ValueError(f"make_vec: the actions of {env_id} must be a Box or Discrete, got {space}")
    if not np.issubdtype(flat_box(env_id, "actions", space).dtype, np.floating):
        raise ValueError(f"make_vec: the actions of {env_id} must be continuous, got {space.dtype}")
    return space


def bounds(space: ActionSpace) -> NDArray[np.float64]:
    """Return the least and the greatest action, (2, act_dim); a discrete action is a vector of one number."""
    if isinstance(space, Discrete):
        return np.array([[space.start], [space.start + space.n - 1]], np.float64)
    return np.stack([space.low, space.high]).astype(np.float64)
