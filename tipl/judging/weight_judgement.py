"""Held-out trials in weight space: what each predictor forecasts, how far that is off, and which policies to run.

Shapes  T checkpoints, p weights, k = n_components, n horizons; h = prefix_end.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tipl.forecasting.forecast import Ahead, Forecast
from tipl.forecasting.forecaster import Forecaster
from tipl.forecasting.sources import Source
from tipl.judging.evaluate_config import EvaluateConfig
from tipl.judging.memorisation import future_leak, nearest_distances, training_futures
from tipl.judging.predictors import NearestPath, Predictor, fit_baselines
from tipl.judging.training_path import TrainingPath
from tipl.subspace.basis import Basis
from tipl.subspace.plane import Plane
from tipl.subspace.prefix import Prefix

COORDINATE_TRIALS = 4
"""Held-out trials whose coordinates are kept for the report."""

FOLLOW = 0.5
"""The confidence from which on the gated forecast follows TIPL; below, it stays with the last policy seen."""


@dataclass(frozen=True)
class Case:
    """What one predictor forecasts for one trial, prefix and horizon."""

    trial: int
    prefix: float
    """The share of the path that was observed."""
    horizon: int
    predictor: str
    wpe: float
    wpe_relative: float
    true: int
    """The number of the true policy in `Policies`."""
    predicted: int
    """That of the forecast one."""
    confidence: float | None
    """TIPL's, in its own cases, where it was calibrated."""


class Policies:
    """The policies to be run, each once, whatever number of cases want it."""

    def __init__(self) -> None:
        self.weights: list[NDArray[np.float32]] = []
        self.trials: list[int] = []
        """The trial that each policy belongs to, whose episodes it is run on."""
        self._known: dict[tuple[Any, ...], int] = {}

    def number_of(self, weights: NDArray[np.float32], trial: int, *name: Any) -> int:
        """Return the number of the policy of `trial` called `name`, adding it if it is new."""
        known = (trial, *name)
        if known not in self._known:
            self._known[known] = len(self.weights)
            self.weights.append(weights)
            self.trials.append(trial)
        return self._known[known]


@dataclass
class WeightJudgement:
    """What is known of the held-out trials before any policy is run."""

    cases: list[Case] = field(default_factory=list)
    policies: Policies = field(default_factory=Policies)
    memorisation: list[dict[str, Any]] = field(default_factory=list)
    """For each trial and prefix, distances to training paths: see `memorisation`."""
    leaks: list[float] = field(default_factory=list)
    """For each prefix, the most that a prediction changes where what follows it does."""
    coordinates: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Some held-out paths, true and forecast, for the report."""


def weight_errors(
    forecast: NDArray[np.float32], truth: NDArray[np.float32], initial: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return WPE (n,) and relative WPE (n,) of forecast (n, p) against truth (n, p), with theta_0 (p,)."""
    squared = ((forecast.astype(np.float64) - truth) ** 2).sum(1)
    walked = ((truth.astype(np.float64) - initial) ** 2).sum(1)
    return squared / truth.shape[1], np.sqrt(squared / walked)


def judge_weights(
    forecaster: Forecaster,
    source: Source,
    truth: Mapping[int, NDArray[np.float32]],
    config: EvaluateConfig,
    *,
    in_sample: bool,
    num_threads: int | None,
    device: str = "cpu",
) -> WeightJudgement:
    """Let the forecaster and every baseline continue the held-out paths `truth`, trial -> weights (T, p).

    Baselines learn from the training trials of `source`. `in_sample` says that the judged trials are among those.
    """
    n_components, teachers = forecaster.model.config.n_components, source.split.train
    # The floor of the basis that forecasts are not made in stands beside that of their own.
    shared = None
    if forecaster.shared_basis is None:
        shared = Basis.from_trials([source.store.trial(i) for i in teachers], n_components)
    training = [TrainingPath.of(source.path(i), source.store.policy, seed=i) for i in teachers]
    ends = config.prefix_ends(source.num_checkpoints)
    observed = [(path, Prefix(path[: end + 1])) for end in ends for path in truth.values()]
    # Every trial at every prefix, to the end of the path, decoded together.
    forecasts = forecaster.forecast(
        [prefix.weights for _, prefix in observed],
        [len(path) - 1 - prefix.end for path, prefix in observed],
        layout=source.store.policy,
        bases=[prefix.basis(n_components) for _, prefix in observed] if forecaster.shared_basis is None else None,
        num_threads=num_threads,
        device=device,
    )
    judgement, following = WeightJudgement(), iter(zip(forecasts, observed, strict=True))
    for share, end in zip(config.prefixes, ends, strict=True):
        horizons = config.horizon_grid(end, source.num_checkpoints)
        baselines = fit_baselines(training, end, horizons, n_components, path=lambda i: source.path(teachers[i]))
        nearest = baselines["nearest_path"]
        assert isinstance(nearest, NearestPath)
        if in_sample:
            del baselines["another_run"]  # it would be the run itself
        futures = training_futures(nearest.coordinates, end)
        for number, trial in enumerate(truth):
            forecast, (path, prefix) = next(following)
            future, ahead = path[end + horizons], forecast.at(horizons)
            predictions = _predictions(ahead, forecast.refiner is not None, baselines, prefix, horizons)
            predictions |= _floors(future, forecast.basis, prefix, shared, n_components)
            judgement.cases += _cases(judgement.policies, trial, share, end, horizons, path, predictions, ahead)
            reached = np.stack([predictions["tipl"][-1], future[-1]])
            (forecast_nearest, true_nearest), mean_nearest = nearest_distances(prefix, reached, futures)
            distances = {"forecast_nearest": float(forecast_nearest), "true_nearest": float(true_nearest)}
            judgement.memorisation.append({"trial": trial, "prefix": share, **distances, "mean_nearest": mean_nearest})
            if number == 0:
                judgement.leaks.append(future_leak(forecaster.model, forecast.basis.encode(path), end))
                judgement.coordinates |= _on_plane(forecast, baselines, prefix, path, _stem(trial, share))
            if number < COORDINATE_TRIALS:
                judgement.coordinates |= _coordinates(forecast, path, _stem(trial, share))
    return judgement


def _floors(
    future: NDArray[np.float32], basis: Basis, prefix: Prefix, shared: Basis | None, n_components: int
) -> dict[str, NDArray[np.float32]]:
    """Return the true weights (n, p), and what is left of them in the forecast's basis and in that of the other kind:
    `shared`, or where there is none the prefix's own."""
    other = prefix.basis(n_components) if shared is None else shared
    return {
        "basis_floor": _projected(future, basis),
        "prefix_floor" if shared is None else "shared_floor": _projected(future, other.through(prefix.weights[-1])),
        "return_floor": future,
    }


def _predictions(
    ahead: Ahead, is_refined: bool, baselines: Mapping[str, Predictor], prefix: Prefix, horizons: NDArray[np.int64]
) -> dict[str, NDArray[np.float32]]:
    """Return the weights (n, p) that each predictor continues the prefix with."""
    predictions = {"tipl": ahead.weights}
    if is_refined:
        predictions["transformer"] = ahead.unrefined
    if ahead.confidence is not None:
        predictions["tipl_gated"] = np.where(ahead.confidence[:, None] >= FOLLOW, ahead.weights, prefix.weights[-1])
    if ahead.tuned is not None:
        predictions["tipl_tuned"] = ahead.tuned
    return predictions | {name: it.forecast(prefix, horizons) for name, it in baselines.items()}


def _projected(weights: NDArray[np.float32], basis: Basis) -> NDArray[np.float32]:
    return basis.decode(basis.encode(weights))


def _cases(
    policies: Policies,
    trial: int,
    share: float,
    prefix_end: int,
    horizons: NDArray[np.int64],
    path: NDArray[np.float32],
    predictions: Mapping[str, NDArray[np.float32]],
    ahead: Ahead,
) -> list[Case]:
    """Return a case for each predictor and horizon, whose two policies are then among `policies`."""
    future, cases = path[prefix_end + horizons], []
    for name, weights in predictions.items():
        wpe, relative = weight_errors(weights, future, path[0])
        for j, horizon in enumerate(horizons):
            true = policies.number_of(future[j], trial, int(prefix_end + horizon))
            if name == "return_floor":
                predicted = true
            elif name == "persistence":
                predicted = policies.number_of(weights[j], trial, prefix_end)
            elif name == "tipl_gated" and ahead.confidence is not None:  # one of two policies that are judged already
                followed = (share, "tipl", int(horizon)) if ahead.confidence[j] >= FOLLOW else (prefix_end,)
                predicted = policies.number_of(weights[j], trial, *followed)
            else:
                predicted = policies.number_of(weights[j], trial, share, name, int(horizon))
            confidence = None
            if name == "tipl" and ahead.confidence is not None:
                confidence = float(ahead.confidence[j])
            cases.append(
                Case(trial, share, int(horizon), name, float(wpe[j]), float(relative[j]), true, predicted, confidence)
            )
    return cases


def _stem(trial: int, share: float) -> str:
    return f"trial{trial}_prefix{round(100 * share)}"


def _coordinates(forecast: Forecast, path: NDArray[np.float32], stem: str) -> dict[str, NDArray[Any]]:
    """Return a held-out path (T, p) in coordinates, true and forecast, under the names that the report reads."""
    return {
        f"{stem}_true": forecast.basis.encode(path),
        f"{stem}_tipl": np.concatenate([forecast.observed, forecast.future]),
        f"{stem}_h": np.array([len(forecast.observed) - 1]),
    }


def _on_plane(
    forecast: Forecast, baselines: Mapping[str, Predictor], prefix: Prefix, path: NDArray[np.float32], stem: str
) -> dict[str, NDArray[Any]]:
    """Return a held-out path (T, p) and forecasts of all that follows the prefix as points of the path's plane, and how
    much that shows, under the names that the report reads."""
    plane, horizons = Plane.of(path), np.arange(1, len(path) - prefix.end)
    ahead = {"tipl": forecast.weights()}
    ahead |= {name: baselines[name].forecast(prefix, horizons) for name in ("linear", "mean_path")}
    return {
        f"{stem}_plane_true": plane.points(path),
        f"{stem}_plane_shares": np.array(plane.shares),
        **{f"{stem}_plane_{name}": plane.points(weights) for name, weights in ahead.items()},
    }
