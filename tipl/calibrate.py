"""Calibrate a forecaster's confidence: run its forecasts of validation trials, and learn which of them were worth it.

Shapes  S samples, one a (trial, prefix, horizon); h = prefix_end, p weights.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tipl.basis import MIN_PREFIX_END
from tipl.confidence import Confidence, features_of
from tipl.policy import PolicySpec
from tipl.progress import progress_bar
from tipl.returns import can_run, episodic_returns
from tipl.rollout import Forecaster
from tipl.training_data import Source, TrainConfig, prefix_end_of

PREFIXES = (0.2, 0.4, 0.6, 0.8)
HORIZONS = (0.1, 0.2, 0.4, 1.0)
"""Shares of the path; what lies beyond its end is its end."""
NUM_EPISODES = 5


def calibrate(
    forecaster: Forecaster,
    sources: Sequence[Source],
    config: TrainConfig,
    *,
    num_threads: int | None = None,
    progress: bool = True,
) -> Confidence | None:
    """Return the confidence that `config.confidence_trials` of each source teach, or None without policies to run."""
    features, beats = [], []
    for source in sources:
        policy, last = source.store.policy, source.num_checkpoints - 1
        chosen = (source.split.validation + source.split.train)[: config.confidence_trials]
        if not chosen or not isinstance(policy, PolicySpec) or not can_run(source.store.env_id, policy):
            continue
        ends = sorted({max(MIN_PREFIX_END, prefix_end_of(share, source.num_checkpoints)) for share in PREFIXES})
        weights: list[NDArray[np.float32]] = []
        before: list[int] = []
        for trial in chosen:
            path = source.path(trial)
            forecasts = forecaster.forecast([path[: h + 1] for h in ends], [last - h for h in ends], layout=policy)
            for h, forecast in zip(ends, forecasts, strict=True):
                ahead = sorted({min(last - h, max(1, round(share * last))) for share in HORIZONS})
                horizons = np.array(ahead, np.int64)
                refined, unrefined = forecast.weights(horizons), forecast.in_basis(horizons)
                features.append(features_of(path[: h + 1], refined, unrefined, horizons, last + 1))
                before += [len(weights)] * len(horizons)
                weights += [path[h], *refined]
        seeds = np.random.default_rng(config.seed).integers(2**31, size=NUM_EPISODES)
        with progress_bar(progress) as bar:
            returns = episodic_returns(
                source.store.env_id, policy, np.array(weights), seeds, num_threads=num_threads, bar=bar
            ).mean(1)
        is_forecast = np.ones(len(weights), bool)
        is_forecast[before] = False
        beats.append(returns[is_forecast] > returns[before])
    return Confidence.fit(np.concatenate(features), np.concatenate(beats)) if beats else None
