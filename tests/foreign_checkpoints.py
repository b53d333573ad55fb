"""Checkpoints as CleanRL, rsl_rl and Stable-Baselines3 save them, made by hand, for the tests of import and export."""

import io
import json
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

OBS_DIM, ACT_DIM, HIDDEN = 4, 2, 8


def mlp(activation: type[nn.Module], num_outputs: int) -> nn.Sequential:
    first, second, head = nn.Linear(OBS_DIM, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, num_outputs)
    return nn.Sequential(first, activation(), second, activation(), head)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


class CleanRL(nn.Module):
    """The agent of CleanRL's ppo_continuous_action.py."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.critic = mlp(nn.Tanh, 1)
        self.actor_mean = mlp(nn.Tanh, ACT_DIM)
        self.actor_logstd = nn.Parameter(torch.randn(1, ACT_DIM))

    def act(self, obs: Tensor) -> Tensor:
        return self.actor_mean(obs)


class RslRl:
    """An actor of rsl_rl with its observation normaliser, and the checkpoints that its releases save of it."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.actor, self.critic = mlp(nn.ELU, ACT_DIM), mlp(nn.ELU, 1)
        self.std = torch.rand(ACT_DIM) + 0.5
        self.mean, self.divisor = torch.randn(1, OBS_DIM), 3 * torch.rand(1, OBS_DIM) + 0.1
        self.seed = seed

    def act(self, obs: Tensor) -> Tensor:
        return self.actor((obs - self.mean) / (self.divisor + 0.01))

    def normaliser(self) -> dict[str, Tensor]:
        return {"_mean": self.mean, "_var": self.divisor**2, "_std": self.divisor, "count": torch.tensor(4096)}

    def rest(self) -> dict[str, Any]:
        return {"optimizer_state_dict": {"state": {}, "param_groups": []}, "iter": 50 * self.seed, "infos": None}

    def release_5(self, spread: str = "std_param", normalised: bool = True) -> dict[str, Any]:
        std = self.std if spread == "std_param" else self.std.log()
        actor = {f"distribution.{spread}": std, **prefixed("mlp.", self.actor.state_dict())}
        if normalised:
            actor |= prefixed("obs_normalizer.", self.normaliser())
        critic = prefixed("mlp.", self.critic.state_dict())
        return {"actor_state_dict": OrderedDict(actor), "critic_state_dict": OrderedDict(critic), **self.rest()}

    def release_3(self) -> dict[str, Any]:
        model = {
            "std": self.std,
            **prefixed("actor.", self.actor.state_dict()),
            **prefixed("actor_obs_normalizer.", self.normaliser()),
            **prefixed("critic.", self.critic.state_dict()),
            **prefixed("critic_obs_normalizer.", self.normaliser()),
        }
        return {"model_state_dict": OrderedDict(model), **self.rest()}

    def release_2(self) -> dict[str, Any]:
        model = {
            "log_std": self.std.log(),
            **prefixed("actor.", self.actor.state_dict()),
            **prefixed("critic.", self.critic.state_dict()),
        }
        return {
            "model_state_dict": OrderedDict(model),
            "obs_norm_state_dict": OrderedDict(self.normaliser()),
            "privileged_obs_norm_state_dict": OrderedDict(self.normaliser()),
            **self.rest(),
        }


def sb3_zip(path: Path, state: dict[str, Tensor], **data: Any) -> Path:
    """A zip as SB3's `save` lays it out: policy.pth, an optimiser that nothing reads, and plain JSON in `data`."""
    file = io.BytesIO()
    torch.save(state, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", json.dumps({"num_timesteps": 0, "policy_kwargs": {}} | data))
        archive.writestr("policy.pth", file.getvalue())
        archive.writestr("actor.optimizer.pth", b"never read")
    return path


def ppo_zip(path: Path, num_timesteps: Any = 0, **settings: Any) -> Path:
    """A zip of a PPO that sees three numbers and takes one action."""
    torch.manual_seed(0)
    sizes = {
        "mlp_extractor.policy_net.0": (3, 8),
        "mlp_extractor.policy_net.2": (8, 8),
        "action_net": (8, 1),
        "mlp_extractor.value_net.0": (3, 8),
        "mlp_extractor.value_net.2": (8, 8),
        "value_net": (8, 1),
    }
    state = {"log_std": torch.zeros(1)}
    for name, (fan_in, fan_out) in sizes.items():
        state |= prefixed(f"{name}.", nn.Linear(fan_in, fan_out).state_dict())
    return sb3_zip(path, state, num_timesteps=num_timesteps, **settings)


def damaged(whole: dict[str, Tensor], random: Any, changes: int) -> dict[str, Tensor]:
    """Return a state some of whose keys are lost or renamed, or have tensors of other shapes."""
    state, others = dict(whole), list(whole.values())
    for _ in range(changes):
        key = random.choice(list(state))
        tensor = state.pop(key)
        change = random.choice(["lost", "renamed", "longer", "another's"])
        if change == "renamed":
            state[key.replace("weight", "scale").replace(".0.", ".1.")] = tensor
        elif change == "longer":
            state[key] = torch.cat([tensor, tensor])
        elif change == "another's":
            state[key] = torch.randn(random.choice(others).shape)
    return state
