"""How the forecaster is trained: the settings of `tipl train`."""

import dataclasses
import math
from typing import Literal

from tipl.subspace.prefix_end import MIN_PREFIX_END


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How the forecaster is trained."""

    basis: Literal["prefix", "shared"] = "prefix"
    """prefix: an SVD of each observed prefix, which carries over to new runs. shared: one SVD of all training
    trials."""
    n_components: int = 16
    """k, the number of coordinates that stand for a checkpoint."""
    n_layer: int = 2
    n_head: int = 4
    d_model: int = 64
    steps: int = 1200
    """Optimiser steps, at most."""
    teacher_forced: float = 0.25
    """Share of the steps that learn one-step predictions of true paths; the rest learn from the model's rollouts."""
    batch_size: int = 32
    """Examples in each optimiser step, each a random training trial cut at a random prefix."""
    learning_rate: float = 1e-3
    """Peak of a cosine schedule with 10 % warm-up."""
    weight_decay: float = 0.5
    dropout: float = 0.4
    noise: float = 0.0
    """Standard deviation of the noise on the inputs. It helps one-step training. With training on its own rollouts the
    model did not need it on InvertedPendulum (0.03 made it worse)."""
    flip_probability: float = 0.0
    """Share of coordinates whose sign is flipped over a whole trajectory. With 0.5 the model can only learn odd
    functions, which on InvertedPendulum left it at the mean path."""
    mixing: float = 1.0
    """Each example is the average of two training paths, with shares from Beta(mixing, mixing); 0 for no averaging."""
    ema_decay: float = 0.998
    """The forecaster is the running average of the weights over the last 1 / (1 - ema_decay) steps."""
    patience: int = 8
    """Training stops after this many validations (of 20 in all) without an improvement."""
    validation_fraction: float = 0.15
    """Share of the trials that choose when to stop."""
    heldout_fraction: float = 0.2
    """Share of the trials that training never reads."""
    in_sample: bool = False
    """Train on all trials and judge on the same: how well paths can be fitted, which says nothing about new runs.
    Nothing is held out then, and validation trials are training trials too."""
    max_prefixes: int = 64
    """How many prefixes of each trial to learn from, spread evenly over the path."""
    max_trials: int = 1024
    """How many training trials of each store to use at most, and a quarter as many validation trials."""
    num_checkpoints: int | None = None
    """Thin longer paths evenly to this many checkpoints, and drop what then remains at their ends. By default all
    checkpoints are taken, and all paths must have the same length."""
    refine_steps: int = 4000
    """Optimiser steps of the refiner, which corrects the Transformer's forecasts weight by weight; 0 for no refiner."""
    d_refine: int = 64
    """Width of the refiner."""
    trust: float = 1.0
    """The share of the predicted displacement that forecasts go; choose it below one for a forecaster that will be used
    on tasks it was not trained on."""
    confidence_trials: int = 32
    """For how many trials of each store forecasts are run in the simulator, to learn which forecasts are worth
    following and how far: first validation trials, then training trials; 0 for no confidence."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs matrix products under autocast, for GPUs. On two CPU cores a step took 1.6 times as long as in
    float32 at d_model 64, and about as long at 256."""
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("n_components", "n_layer", "n_head", "d_model", "d_refine")
        for name in (*counts, "steps", "batch_size", "patience", "max_prefixes", "max_trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("refine_steps", "confidence_trials"):
            if getattr(self, name) < 0:
                raise ValueError(f"TrainConfig: {name} must not be negative, got {getattr(self, name)}")
        if self.num_checkpoints is not None and self.num_checkpoints < MIN_PREFIX_END + 2:
            raise ValueError(
                f"TrainConfig: num_checkpoints must be at least {MIN_PREFIX_END + 2}, got {self.num_checkpoints}"
            )
        for name in ("validation_fraction", "heldout_fraction", "flip_probability", "dropout", "ema_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"TrainConfig: {name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("teacher_forced", "trust"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"TrainConfig: {name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:  # torch's generator takes no more bits
            raise ValueError(f"TrainConfig: seed must lie in [0, 2**63), got {self.seed}")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"TrainConfig: learning_rate must be positive and finite, got {self.learning_rate}")
        for name in ("weight_decay", "noise", "mixing"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"TrainConfig: {name} must be finite and not negative, got {getattr(self, name)}")
