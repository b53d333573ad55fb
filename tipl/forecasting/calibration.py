"""Calibrate a forecaster: run forecasts in the simulator, and learn which are worth following, and how far.

Shapes  N trials, P prefixes, C forecasts for each trial, F features; h = prefix_end.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tipl.collecting.episodes import can_run, episodic_returns
from tipl.files.locations import read_file, write_atomically
from tipl.files.publishing import published
from tipl.forecasting.confidence import STRIDES, Confidence, FloatArray, Strides, features_of
from tipl.forecasting.forecaster import PRETRAINED, Forecaster, source_to_judge
from tipl.forecasting.sources import Source, warn_if_unfinished
from tipl.forecasting.train_config import TrainConfig
from tipl.policy import PolicySpec
from tipl.progress import progress_bar
from tipl.storing.store import Store
from tipl.subspace.prefix_end import MIN_PREFIX_END, prefix_end_of

CALIBRATION_PREFIXES = (0.2, 0.4, 0.6, 0.8)
CALIBRATION_HORIZONS = (0.1, 0.2, 0.4, 1.0)
"""Shares of the path; a horizon beyond its end becomes its end."""
STRIDE_HORIZON = 0.2
"""The horizon at which strides are tried."""
NUM_EPISODES = 5
BYTES_AT_ONCE = 2**28
"""How much weights may take that are run together, about: trials side by side keep the simulator busy to their end."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was learned in the simulator."""

    confidence: Confidence
    strides: Strides | None
    """None where there are several stores: returns of different tasks have no common unit."""


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """The features of forecasts for N trials, and how those forecasts did in the simulator.

    There are C forecasts for each trial, ordered by prefix and horizon.
    """

    features: FloatArray
    """(N, C, F)"""
    beats: NDArray[np.bool_]
    """Whether a forecast's return exceeds that of the policy at its prefix's end, on the same episodes, (N, C)."""
    prefix_ends: NDArray[np.int64]
    """(P,)"""
    gains: FloatArray
    """By how much the return exceeds that at the prefix's end, at each of STRIDES along the forecast that reaches
    STRIDE_HORIZON ahead, (N, P, strides)."""


def calibrate(
    forecaster: Forecaster,
    sources: Sequence[Source],
    config: TrainConfig,
    *,
    num_threads: int | None = None,
    progress: bool = True,
) -> Calibration | None:
    """Return what `config.confidence_trials` trials of each source teach; None where no policies can be run."""
    outcomes = []
    for source in sources:
        chosen = _trials_of(source, config)
        if chosen and _can_run(source.store):
            outcomes.append(
                run_forecasts(forecaster, source, chosen, seed=config.seed, num_threads=num_threads, progress=progress)
            )
    if not outcomes:
        return None
    features = np.concatenate([it.features.reshape(-1, it.features.shape[2]) for it in outcomes])
    confidence = Confidence.fit(features, np.concatenate([it.beats.ravel() for it in outcomes]))
    seen = outcomes[0].prefix_ends / forecaster.model.config.max_len
    strides = Strides.fit(seen, outcomes[0].gains.swapaxes(0, 1))
    return Calibration(confidence, strides if len(sources) == 1 else None)


def recalibrate(
    stores: Sequence[Store],
    output: str | Path,
    model: str | Path | None = None,
    *,
    num_trials: int = 32,
    num_threads: int | None = None,
    progress: bool = True,
) -> Path:
    """Calibrate a forecaster anew on trials of `stores`, write it to the model folder `output`, and return `output`.

    Runs forecasts for up to `num_trials` trials of each store in the simulator, and for none that `evaluate` judges. By
    default the forecaster is the one that comes with tipl. The new folder is a copy of `model` with another confidence
    and, for a single store, other strides; its config.json names the seeds under "calibrated_on".

    Raises FileExistsError where `output` exists; OutputInUse where another process is making it; ValueError where
    num_trials is less than 1, the simulator cannot run the policies, or the forecaster does not fit a store, as
    `evaluate` says.
    """
    output, folder = Path(output), PRETRAINED if model is None else Path(model)
    if num_trials < 1:
        raise ValueError(f"calibrate: num_trials must be at least 1, got {num_trials}")
    with published(output, "calibrate", manifest=False) as aside:
        forecaster = Forecaster.load(folder)
        aside.mkdir()
        if (folder / "training.json").exists():
            write_atomically(aside / "training.json", read_file(folder / "training.json"))  # checked by load
        _recalibrated(forecaster, stores, num_trials, num_threads, progress).save(aside)
    return output


def _recalibrated(
    forecaster: Forecaster, stores: Sequence[Store], num_trials: int, num_threads: int | None, progress: bool
) -> Forecaster:
    """Return the forecaster with the confidence that the stores teach."""
    for store in stores:
        if not _can_run(store):
            raise ValueError(f"calibrate: the simulator cannot run the policies of {store.path}")
        warn_if_unfinished("calibrate", store)
    sources = [source_to_judge(store, forecaster) for store in stores]
    config = TrainConfig(**{**forecaster.config["train"], "confidence_trials": num_trials})
    calibration = calibrate(forecaster, sources, config, num_threads=num_threads, progress=progress)
    if calibration is None:
        raise ValueError("calibrate: stores must hold trials that are not held out")
    seen = [
        {"env_id": it.store.env_id, "seeds": [it.store.seeds[trial] for trial in _trials_of(it, config)]}
        for it in sources
    ]
    changed = {**vars(calibration), "config": {**forecaster.config, "calibrated_on": seen}}
    return dataclasses.replace(forecaster, **changed)


def _can_run(store: Store) -> bool:
    if store.is_unnormalised or not isinstance(store.policy, PolicySpec):
        return False
    return can_run(store.env_id, store.policy, store.env_kwargs)


def _trials_of(source: Source, config: TrainConfig) -> list[int]:
    """Return the trials that calibration uses: validation trials first, then training trials."""
    return (source.split.validation + source.split.train)[: config.confidence_trials]


def run_forecasts(
    forecaster: Forecaster,
    source: Source,
    trials: Sequence[int],
    *,
    seed: int,
    num_threads: int | None = None,
    progress: bool = True,
) -> Outcomes:
    """Return how forecasts for some trials do in the simulator; each trial has its own NUM_EPISODES episodes.

    If all trials shared their episodes, an easy one would move all returns together.
    """
    store, last = source.store, source.num_checkpoints - 1
    assert isinstance(store.policy, PolicySpec)
    ends = sorted({max(MIN_PREFIX_END, prefix_end_of(share, source.num_checkpoints)) for share in CALIBRATION_PREFIXES})
    at_once = max(1, BYTES_AT_ONCE // (8 * len(ends) * store.policy.num_params * 4))
    features: list[FloatArray] = []
    returns: list[FloatArray] = []
    with progress_bar(progress) as bar:
        for first in range(0, len(trials), at_once):
            some = trials[first : first + at_once]
            said, tried = zip(*(_tried(forecaster, source, trial, ends, last) for trial in some), strict=True)
            seeds = [np.random.default_rng((seed, trial)).integers(2**31, size=NUM_EPISODES) for trial in some]
            run = functools.partial(episodic_returns, num_threads=num_threads, env_kwargs=store.env_kwargs, bar=bar)
            of_each = np.repeat(seeds, [len(it) for it in tried], axis=0)
            returns.append(run(store.env_id, store.policy, np.concatenate(tried), of_each).mean(1))
            features += said
    return _outcomes(features, np.concatenate(returns), ends, last)


def _tried(
    forecaster: Forecaster, source: Source, trial: int, ends: Sequence[int], last: int
) -> tuple[FloatArray, NDArray[np.float32]]:
    """Return the features of a trial's forecasts (C, F) and the weights to run: strides of each prefix, then them."""
    path = source.path(trial)
    forecasts = forecaster.forecast([path[: h + 1] for h in ends], [last - h for h in ends], layout=source.store.policy)
    said, strides, ahead = [], [], []
    for h, forecast in zip(ends, forecasts, strict=True):
        horizons, step = _horizons(h, last)
        refined = forecast.weights(horizons)
        in_basis = forecast.in_basis(horizons)
        said.append(features_of(path[: h + 1], refined, in_basis, horizons, forecaster.model.config.max_len))
        strides.append(path[h] + np.array(STRIDES, np.float32)[:, None] * (refined[step] - path[h]))
        ahead.append(refined)
    return np.concatenate(said), np.concatenate(strides + ahead)


def _outcomes(features: Sequence[FloatArray], returns: FloatArray, ends: Sequence[int], last: int) -> Outcomes:
    """Return the outcomes of each trial's forecasts, of the mean returns of all weights of `_tried`, in order."""
    of_trials = returns.reshape(len(features), -1)
    num_along = len(ends) * len(STRIDES)
    along = of_trials[:, :num_along].reshape(len(features), len(ends), -1)  # the first is the prefix's end
    lengths = [len(_horizons(h, last)[0]) for h in ends]
    beats = of_trials[:, num_along:] > np.repeat(along[:, :, 0], lengths, axis=1)
    return Outcomes(np.array(features), beats, np.array(ends), along - along[:, :, :1])


def _horizons(prefix_end: int, last: int) -> tuple[NDArray[np.int64], int]:
    """Return the horizons that are run (n,), and which of them the strides are tried at."""
    ahead = [min(last - prefix_end, max(1, round(share * last))) for share in CALIBRATION_HORIZONS]
    horizons = sorted(set(ahead))
    return np.array(horizons, np.int64), horizons.index(ahead[CALIBRATION_HORIZONS.index(STRIDE_HORIZON)])
