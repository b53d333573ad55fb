"""Calibrate a forecaster: run its forecasts of validation trials, and learn which of them were worth it, and how far.

Shapes  S samples, one a (trial, prefix, horizon); h = prefix_end, p weights.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tipl.basis import MIN_PREFIX_END
from tipl.confidence import STRIDES, Confidence, FloatArray, Strides, features_of
from tipl.policy import PolicySpec
from tipl.progress import progress_bar
from tipl.returns import can_run, episodic_returns
from tipl.rollout import Forecaster
from tipl.training_data import Source, TrainConfig, prefix_end_of

PREFIXES = (0.2, 0.4, 0.6, 0.8)
HORIZONS = (0.1, 0.2, 0.4, 1.0)
"""Shares of the path; what lies beyond its end is its end."""
STRIDE_HORIZON = 0.2
NUM_EPISODES = 5


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What the simulator taught."""

    confidence: Confidence
    strides: Strides | None
    """Of one store; returns of several tasks have no common unit."""


def calibrate(
    forecaster: Forecaster,
    sources: Sequence[Source],
    config: TrainConfig,
    *,
    num_threads: int | None = None,
    progress: bool = True,
) -> Calibration | None:
    """Return what `config.confidence_trials` of each source teach, or None where there are no policies to run."""
    outcomes = []
    for source in sources:
        chosen = (source.split.validation + source.split.train)[: config.confidence_trials]
        if chosen and isinstance(source.store.policy, PolicySpec) and can_run(source.store.env_id, source.store.policy):
            outcomes.append(_run(forecaster, source, chosen, config.seed, num_threads, progress))
    if not outcomes:
        return None
    confidence = Confidence.fit(*(np.concatenate(parts) for parts in zip(*(it[:2] for it in outcomes), strict=True)))
    strides = Strides.fit([share for share, _ in outcomes[0][2]], [gains for _, gains in outcomes[0][2]])
    return Calibration(confidence, strides if len(sources) == 1 else None)


def _run(
    forecaster: Forecaster,
    source: Source,
    trials: Sequence[int],
    seed: int,
    num_threads: int | None,
    progress: bool,
) -> tuple[FloatArray, NDArray[np.bool_], list[tuple[float, FloatArray]]]:
    """Return features (S, F) of forecasts, which of them beat the policy at the prefix's end (S,), and strides' gains.

    Gains are, a prefix, its end as a share of the path and (trials, len(STRIDES)) at the horizon STRIDE_HORIZON.
    """
    policy, last = source.store.policy, source.num_checkpoints - 1
    assert isinstance(policy, PolicySpec)
    ends = sorted({max(MIN_PREFIX_END, prefix_end_of(share, source.num_checkpoints)) for share in PREFIXES})
    max_len = forecaster.model.config.max_len
    features: list[FloatArray] = []
    weights: list[NDArray[np.float32]] = []
    for trial in trials:
        path = source.path(trial)
        forecasts = forecaster.forecast([path[: h + 1] for h in ends], [last - h for h in ends], layout=policy)
        for h, forecast in zip(ends, forecasts, strict=True):
            horizons, step = _horizons(h, last)
            refined = forecast.weights(horizons)
            features.append(features_of(path[: h + 1], refined, forecast.in_basis(horizons), horizons, max_len))
            strides = path[h] + np.array(STRIDES, np.float32)[:, None] * (refined[step] - path[h])
            weights += [*strides, *refined]
    seeds = np.random.default_rng(seed).integers(2**31, size=NUM_EPISODES)
    with progress_bar(progress) as bar:
        run = episodic_returns(source.store.env_id, policy, np.array(weights), seeds, num_threads=num_threads, bar=bar)
    returns, beats = iter(run.mean(1)), []
    gains: dict[int, list[FloatArray]] = {h: [] for h in ends}
    for _ in trials:
        for h in ends:
            tried = np.array([next(returns) for _ in STRIDES])  # the first is the policy at the prefix's end
            gains[h].append(tried - tried[0])
            beats += [next(returns) > tried[0] for _ in _horizons(h, last)[0]]
    return np.concatenate(features), np.array(beats), [(h / max_len, np.array(gain)) for h, gain in gains.items()]


def _horizons(prefix_end: int, last: int) -> tuple[NDArray[np.int64], int]:
    """Return the horizons that are run (n,), and which of them the strides are tried at."""
    ahead = [min(last - prefix_end, max(1, round(share * last))) for share in HORIZONS]
    horizons = sorted(set(ahead))
    return np.array(horizons, np.int64), horizons.index(ahead[HORIZONS.index(STRIDE_HORIZON)])
