"""What the policies of Stable-Baselines3 say of themselves."""

import torch


def activation_of(policy: torch.nn.Module) -> str | None:
    """Return the name of the policy's activation: "tanh" for torch's Tanh, the full repr of a custom one, or None."""
    activation = getattr(policy, "activation_fn", None)
    if activation is None or getattr(activation, "__module__", "") != torch.nn.Tanh.__module__:
        return None if activation is None else repr(activation)
    return str(activation.__name__).lower()
