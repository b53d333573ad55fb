"""The smallest configuration of each stage, and synthetic paths, stores and models that need no training."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from reference import random_forecaster

from tipl.collecting.ppo_config import PPOConfig
from tipl.forecasting.forecaster import Forecaster
from tipl.forecasting.train_config import TrainConfig
from tipl.forecasting.transformer import ModelConfig, TrajectoryTransformer
from tipl.judging.evaluate_config import EvaluateConfig
from tipl.judging.training_path import TrainingPath
from tipl.policy import ParameterLayout, PolicySpec
from tipl.storing.store import Store

ENV_ID = "InvertedPendulum-v5"
SPEC = PolicySpec(obs_dim=4, act_dim=1, hidden_sizes=(16, 16))
"""The policy of ENV_ID that TINY_PPO trains."""

TINY_PPO = PPOConfig(num_steps=32, num_minibatches=2, update_epochs=1, hidden_sizes=SPEC.hidden_sizes)
TINY_TRAIN = TrainConfig(
    n_components=4,
    n_layer=1,
    n_head=2,
    d_model=16,
    steps=5,
    batch_size=8,
    max_prefixes=4,
    refine_steps=5,
    d_refine=8,
    confidence_trials=2,
)
TINY_EVALUATE = EvaluateConfig(prefixes=(0.5,), horizons=(0.2,), num_episodes=1)


def flags(config: Any, prefix: str = "") -> list[str]:
    """Return the arguments of the command line that make this configuration of the default one."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != getattr(type(config)(), field.name):
            words.append(f"--{prefix}{field.name.replace('_', '-')}")
            words += [str(it) for it in value] if isinstance(value, tuple) else [str(value)]
    return words


def make_store(
    path: Path,
    num_trials: int,
    num_checkpoints: int,
    env_id: str = ENV_ID,
    *,
    seed: int = 0,
    config: dict[str, Any] | None = None,
) -> Store:
    """A store of paths that settle along a few directions, jittered, with returns that rise to about 1000."""
    rng = np.random.default_rng(seed + 1)
    t = np.linspace(0, 1, num_checkpoints)
    shapes = np.stack([1 - np.exp(-3 * t), t**1.5, np.sin(2 * t), t * (1 - t)], 1)  # (T, 4)
    seeds = range(seed, seed + num_trials)
    config = {"total_timesteps": 100_000} if config is None else config
    store = Store.create(path, env_id=env_id, policy=SPEC, seeds=seeds, config=config)
    weights, returns = [], []
    for _ in range(num_trials):
        directions = rng.normal(size=(4, SPEC.num_params)) * np.array([1.0, 0.6, 0.4, 0.2])[:, None]
        jitter = np.cumsum(rng.normal(size=(num_checkpoints, SPEC.num_params)), 0) * 0.01
        weights.append(rng.normal(size=SPEC.num_params) + shapes @ directions + jitter - jitter[0])
        returns.append(policy_return(t, rng.uniform(0.25, 0.75)) + rng.normal(size=num_checkpoints) * 20)
    steps = np.tile(2048 * np.arange(num_checkpoints, dtype=np.int64), (num_trials, 1))
    episodic_return = np.stack(returns)
    episodic_return[:, 0] = np.nan  # no episode has ended yet
    store.append(np.stack(weights).astype(np.float32), steps, episodic_return)
    return store


def everything(store: Store) -> list[np.ndarray]:
    """Return all weights, env steps and returns of a store, trial by trial."""
    trials = [store.trial(i) for i in range(len(store))]
    return [column for trial in trials for column in (trial.weights(), trial.env_steps, trial.episodic_return)]


def policy_return(t: Any, middle: float) -> Any:
    return 1000 / (1 + np.exp(-12 * (np.asarray(t) - middle)))


def random_path(num_checkpoints: int, num_params: int, seed: int) -> NDArray[np.float32]:
    """A path that bends through a few directions, with noise in all."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, num_checkpoints)[:, None]
    shapes = np.concatenate([t, t**2, np.sin(3 * t), t**0.5], 1)
    noise = np.cumsum(rng.standard_normal((num_checkpoints, num_params)), 0) * 0.02
    return (rng.standard_normal(num_params) + shapes @ rng.standard_normal((4, num_params)) + noise).astype(np.float32)


LAYOUT = ParameterLayout((("log_std", (4,)), ("net.weight", (5, 6)), ("net.bias", (6,))))


def paths_of(*weights: NDArray[np.floating]) -> list[TrainingPath]:
    """Paths of the parameters of LAYOUT, as the baselines are fitted on them."""
    return [TrainingPath.of(path.astype(np.float32), LAYOUT, seed) for seed, path in enumerate(weights)]


MODEL_CONFIG = ModelConfig(n_components=5, n_layer=2, n_head=2, d_model=16, d_ff=40, max_len=24, dropout=0.1)


def random_model(config: ModelConfig = MODEL_CONFIG, seed: int = 0) -> TrajectoryTransformer:
    """A Transformer with the random weights of the float64 oracle."""
    model = TrajectoryTransformer(config)
    model.load_state_dict({name: torch.from_numpy(w) for name, w in random_forecaster(config, seed).items()})
    return model.eval()


def bare_forecaster(num_checkpoints: int) -> Forecaster:
    """A Transformer that has learned nothing: its forecast is persistence."""
    return Forecaster(
        TrajectoryTransformer(
            ModelConfig(n_components=6, n_layer=1, d_model=16, d_ff=32, max_len=num_checkpoints)
        ).eval()
    )
