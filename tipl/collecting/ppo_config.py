"""PPO's hyperparameters. The native update in `csrc/ppo.cpp` reads its own by these names."""

import dataclasses
import math
from typing import Any, Literal, Self

from tipl.policy import PolicySpec

Optimizer = Literal["adam", "sgd"]
TrainedActivation = Literal["tanh", "relu", "elu"]

OPTIMIZERS = ("adam", "sgd")
TRAINED_ACTIVATIONS = ("tanh", "relu", "elu")  # those whose gradients the engine has


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """PPO's hyperparameters, under CleanRL's names with Stable-Baselines3's defaults."""

    num_envs: int = 1
    """Environments per trial, E."""
    num_steps: int = 2048
    """Steps of each environment per iteration, T."""
    update_epochs: int = 10
    """Passes over these steps per iteration."""
    num_minibatches: int = 32
    """Minibatches per pass; must divide num_envs * num_steps."""
    learning_rate: float = 3e-4
    anneal_lr: bool = False
    """Decrease the learning rate linearly with the iterations, to 0 after the last one."""
    gamma: float = 0.99
    """Discount factor of the rewards."""
    gae_lambda: float = 0.95
    clip_coef: float = 0.2
    """The surrogate objective clips the probability ratio to [1 - clip_coef, 1 + clip_coef]."""
    clip_coef_vf: float | None = None
    """The value loss clips the change of a value to +-clip_coef_vf (SB3's clip_range_vf); None: no clipping."""
    vf_coef: float = 0.5
    """Weight of the mean squared error of the values, as in SB3; CleanRL multiplies it by a further 1/2."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 0.5
    """Limit on the norm of a trial's gradient, actor and critic together."""
    target_kl: float | None = None
    """A trial's update stops at the first minibatch whose approx_kl exceeds 1.5 * target_kl, before the step on it."""
    optimizer: Optimizer = "adam"
    """sgd has no momentum, like SB3 with policy_kwargs=dict(optimizer_class=torch.optim.SGD)."""
    adam_eps: float = 1e-5
    normalize_advantage: bool = True
    """Normalise the advantages of each minibatch."""
    normalize_observations: bool = False
    """Subtract the running mean from observations, divide by the running standard deviation and clip to +-10, as SB3's
    VecNormalize does. In checkpoints this is folded into the first layer, without the clipping."""
    normalize_rewards: bool = False
    """Divide rewards by the running standard deviation of the discounted returns and clip to +-10, as SB3's
    VecNormalize does. Only learning uses these: recorded episodic returns are sums of the original rewards."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers, the same for actor and critic, which share no layers."""
    activation: TrainedActivation = "tanh"
    ortho_init: bool = True
    """Orthogonal initial weights and biases of 0; False: torch.nn.Linear's defaults, as SB3 with ortho_init=False."""
    log_std_init: float = 0.0
    """Initial value of log_std, the logarithm of the actions' standard deviation. Discrete actions have none."""
    learn_log_std: bool = True
    """False: log_std stays at log_std_init, and its gradient does not count in the norm that max_grad_norm limits."""

    def __post_init__(self) -> None:
        for name in ("num_envs", "num_steps", "update_epochs", "num_minibatches"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"PPOConfig: {name} must be a positive int, got {value!r}")
        if self.batch_size % self.num_minibatches:
            batch, got = self.batch_size, self.num_minibatches
            raise ValueError(f"PPOConfig: num_minibatches must divide num_envs * num_steps = {batch}, got {got}")
        optional = [name for name in ("clip_coef_vf", "target_kl") if getattr(self, name) is not None]
        for name in ("learning_rate", "clip_coef", "max_grad_norm", "adam_eps", *optional):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"PPOConfig: {name} must be positive and finite, got {getattr(self, name)}")
        for name in ("vf_coef", "ent_coef"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"PPOConfig: {name} must be finite and not negative, got {getattr(self, name)}")
        for name in ("gamma", "gae_lambda"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"PPOConfig: {name} must lie in [0, 1], got {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"PPOConfig: optimizer must be one of {OPTIMIZERS}, got {self.optimizer!r}")
        if not math.isfinite(self.log_std_init):
            raise ValueError(f"PPOConfig: log_std_init must be finite, got {self.log_std_init}")
        for name in ("normalize_rewards", "ortho_init", "learn_log_std"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"PPOConfig: {name} must be a bool, got {getattr(self, name)!r}")
        if self.activation not in TRAINED_ACTIVATIONS:
            raise ValueError(f"PPOConfig: activation must be one of {TRAINED_ACTIVATIONS}, got {self.activation!r}")
        PolicySpec(1, 1, self.hidden_sizes, self.activation)  # raises on bad sizes

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Self:
        """Return the configuration that a store keeps as plain JSON; fields missing from it have their defaults."""
        return cls(**settings | {"hidden_sizes": tuple(settings["hidden_sizes"])})

    @property
    def batch_size(self) -> int:
        """Environment steps per trial and iteration."""
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches
