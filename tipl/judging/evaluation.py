"""Judge forecasts on held-out trials: in weight space (WPE) and in the simulator (REPW), beside baselines and floors.

Shapes  E episodes a policy, T checkpoints, p weights, n horizons; h = prefix_end.

WPE   mean squared error over the weights; relative: |forecast - truth| / |truth - theta_0|.
REPW  |return of the true policy - return of the forecast one|, mean over the same E episodes (same seeds) of both.
Both as in Tang 2025, arXiv 2503.04074. Policies act deterministically: the mean action, clipped to the action space.
All policies of a held-out trial run on the same episodes, and every trial on its own: with episodes that all trials
share, an easy one would move them all together, and an interval over trials would not know.

action_difference, kl   how far the forecast policy acts from the true one, on states that the true one visits
action_variance         between the held-out trials' policies at one checkpoint, on one set of states: do they collapse?
All three as in `behaviour`.

memorisation            how far forecast and true futures lie from the nearest training path's
causality               the most that a prediction changes where what follows it does
Both as in `dynamics`.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tipl import _core
from tipl.cluster import connected
from tipl.collecting.episodes import Episodes, run_episodes
from tipl.files.locations import write_atomically
from tipl.files.publishing import published
from tipl.files.sealed import save_arrays
from tipl.forecasting.forecaster import Forecast, Forecaster, source_to_judge
from tipl.forecasting.sources import Source, Split
from tipl.judging.action_metrics import FloatArray, action_bounds, action_differences, action_variance, kl_divergences
from tipl.judging.evaluate_config import EvaluateConfig
from tipl.judging.memorisation import future_leak, nearest_distances, training_futures
from tipl.judging.predictors import NearestPath, Predictor, fit_baselines
from tipl.judging.training_path import TrainingPath
from tipl.policy import PolicySpec
from tipl.progress import progress_bar
from tipl.storing.store import Store
from tipl.subspace.basis import Basis

COORDINATE_TRIALS = 4
"""Held-out trials whose coordinates are kept for the report."""

FOLLOW = 0.5
"""The confidence from which on the gated forecast follows TIPL; below, it stays with the last policy seen."""

NUM_STATES = 256
"""States on which actions are compared, at most: an error in a mean over them of some percent, for a few MB."""


def weight_errors(
    forecast: NDArray[np.float32], truth: NDArray[np.float32], initial: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return WPE (n,) and relative WPE (n,) of forecast (n, p) against truth (n, p), with theta_0 (p,)."""
    squared = ((forecast.astype(np.float64) - truth) ** 2).sum(1)
    walked = ((truth.astype(np.float64) - initial) ** 2).sum(1)
    return squared / truth.shape[1], np.sqrt(squared / walked)


def episode_seeds(config: EvaluateConfig, trial: int) -> NDArray[np.int64]:
    """Return the seeds (2, E) of a trial's episodes: those that policies are judged on, and others for the floor."""
    return np.random.default_rng((config.seed, trial)).integers(2**31, size=(2, config.num_episodes))


class _Judged:
    """The policies to be run, each once, and the rows that wait for their returns."""

    def __init__(self) -> None:
        self.weights: list[NDArray[np.float32]] = []
        self.trials: list[int] = []  # whose each is
        self.known: dict[tuple[Any, ...], int] = {}
        self.rows: list[dict[str, Any]] = []

    def policy(self, weights: NDArray[np.float32], trial: int, *name: Any) -> int:
        """Return the number of the policy of `trial` called `name`, adding it if it is new."""
        known = (trial, *name)
        if known not in self.known:
            self.known[known] = len(self.weights)
            self.weights.append(weights)
            self.trials.append(trial)
        return self.known[known]


def evaluate(
    store: Store,
    forecaster: Forecaster,
    output: str | Path,
    config: EvaluateConfig = EvaluateConfig(),
    *,
    fresh: Store | None = None,
    num_threads: int | None = None,
    ray: str | None = None,
    seconds: Mapping[str, float] | None = None,
    progress: bool = True,
) -> Path:
    """Judge `forecaster` and every baseline on the held-out trials of `store`; return the path of results.json.

    With `fresh`, a store of the same task under other seeds, all its trials are judged instead: as many as one cares to
    collect. What the baselines learn they learn from the training trials of `store` as ever.

    Writes results.json (tidy rows, one a trial, prefix, horizon and predictor) and coordinates.safetensors (some
    held-out paths, true and forecast) into the folder `output`. With `ray`, policies run on the Ray cluster at that
    address ("local": one that is started here). `seconds` is what earlier stages took, for the report.

    Raises FileExistsError where `output` exists; OutputInUse where another process is making it; ValueError where the
    model was not trained on this store, `fresh` is not of its kind, a prefix is too short for a basis, or the policies
    are of a kind that the simulator cannot run.
    """
    output = Path(output)
    with published(output, "evaluate") as aside:
        results, coordinates = _judged_results(
            store, forecaster, config, fresh=fresh, num_threads=num_threads, ray=ray, seconds=seconds, progress=progress
        )
        aside.mkdir()
        save_arrays(aside / "coordinates.safetensors", coordinates)
        data = (json.dumps(results, indent=1, allow_nan=False) + "\n").encode()
        write_atomically(aside / "results.json", data)
    return output / "results.json"


def _judged_results(
    store: Store,
    forecaster: Forecaster,
    config: EvaluateConfig,
    *,
    fresh: Store | None,
    num_threads: int | None,
    ray: str | None,
    seconds: Mapping[str, float] | None,
    progress: bool,
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return what `evaluate` writes: results.json and coordinates.safetensors."""
    policy = store.policy
    if not isinstance(policy, PolicySpec):
        raise ValueError(
            f"evaluate: the simulator can run only MLPs with a Gaussian, and the store {store.path} "
            "holds others; `tipl.judging.evaluation.weight_errors` judges their weights"
        )
    source = source_to_judge(store, forecaster)
    started = time.perf_counter()
    split, num_checkpoints = source.split, source.num_checkpoints
    judges = source if fresh is None else _all_of(fresh, source, forecaster)
    prefix_ends = config.prefix_ends(num_checkpoints)
    n_components = forecaster.model.config.n_components
    heldout = judges.split.heldout[: config.max_trials]
    truth = np.array([judges.path(i) for i in heldout])  # (trials, T, p)

    def training_path(i: int) -> NDArray[np.float32]:
        return source.path(split.train[i])

    in_sample = fresh is None and not set(heldout).isdisjoint(split.train)
    # The floor of the basis that forecasts are not made in stands beside that of their own.
    shared = None
    if forecaster.shared_basis is None:
        shared = Basis.from_trials([store.trial(i) for i in split.train], n_components)
    training = [TrainingPath.of(source.path(i), policy, seed=i) for i in split.train]

    judged = _Judged()
    coordinates: dict[str, NDArray[Any]] = {}
    memorisation: list[dict[str, Any]] = []
    leaks: list[float] = []
    # Every trial at every prefix, to the end of the path, decoded together.
    cases = [(end, path) for end in prefix_ends for path in truth]
    forecasts = iter(
        forecaster.forecast(
            [path[: end + 1] for end, path in cases],
            [num_checkpoints - 1 - end for end, _ in cases],
            layout=policy,
            num_threads=num_threads,
        )
    )
    for share, prefix_end in zip(config.prefixes, prefix_ends, strict=True):
        horizons = config.horizon_grid(prefix_end, num_checkpoints)
        baselines = fit_baselines(training, prefix_end, horizons, n_components, path=training_path)
        if in_sample:
            del baselines["another_run"]  # it would be the run itself
        nearest = baselines["nearest_path"]
        assert isinstance(nearest, NearestPath)
        futures = training_futures(nearest.coordinates, prefix_end)
        for number, (trial, path) in enumerate(zip(heldout, truth, strict=True)):
            forecast = next(forecasts)
            seen, future = path[: prefix_end + 1], path[prefix_end + horizons]  # (h + 1, p), (n, p)
            predictions, confidence = _predictions(forecast, baselines, seen, horizons)
            other = Basis.from_prefix(seen, n_components) if shared is None else shared
            predictions |= {
                "basis_floor": _projected(future, forecast.basis),
                "prefix_floor" if shared is None else "shared_floor": _projected(future, other.through(seen[-1])),
                "return_floor": future,
            }
            _add_rows(judged, store.env_id, trial, share, prefix_end, horizons, path, predictions, confidence)
            ends = np.stack([predictions["tipl"][-1], future[-1]])
            (forecast_nearest, true_nearest), mean_nearest = nearest_distances(seen, ends, futures)
            memorisation.append({
                "trial": trial, "prefix": share, "forecast_nearest": float(forecast_nearest),
                "true_nearest": float(true_nearest), "mean_nearest": mean_nearest,
            })  # fmt: skip
            if number == 0:
                leaks.append(future_leak(forecaster.model, forecast.basis.encode(path), prefix_end))
            if number < COORDINATE_TRIALS:
                coordinates |= _coordinates(forecast, path, f"trial{trial}_prefix{round(100 * share)}")

    seeds = {trial: episode_seeds(config, trial) for trial in heldout}
    with contextlib.nullcontext() if ray is None else connected(ray) as cluster, progress_bar(progress) as bar:
        run = functools.partial(run_episodes, store.env_id, policy, num_threads=num_threads, cluster=cluster, bar=bar)
        diversity = _run(judged, store.env_id, policy, seeds, run)

    results = {
        "format": "tipl-results",
        "version": 1,
        "env_id": store.env_id,
        "tipl_version": importlib.metadata.version("tipl"),
        "settings": {
            "num_trials": judges.store.num_trials,
            "train_trials": split.train,
            "validation_trials": split.validation,
            "trained_on": [it["env_id"] for it in forecaster.config["stores"]],
            "is_zero_shot": forecaster.source_of(store) is None,
            "is_fresh": fresh is not None,
            "heldout_trials": heldout,
            "num_checkpoints": num_checkpoints,
            "num_params": store.policy.num_params,
            "n_components": n_components,
            "episode_seeds": {trial: judged_on.tolist() for trial, (judged_on, _) in seeds.items()},
            "num_states": NUM_STATES,
            "follow": FOLLOW,
            **dataclasses.asdict(config),
            "train": forecaster.config["train"],
            "collect": judges.store.config,
        },
        "machine": machine_record(),
        "seconds": {**(seconds or {}), "evaluate": time.perf_counter() - started},
        "rows": judged.rows,
        "diversity": diversity,
        "memorisation": memorisation,
        "causality": max(leaks),
    }
    return results, coordinates


def _all_of(fresh: Store, source: Source, forecaster: Forecaster) -> Source:
    """Return `fresh` as a source whose trials all judge. Raises ValueError unless it is of the kind of `source`'s store
    and none of its seeds was there, nor in any store of this task that the forecaster was trained on.
    """
    store = source.store
    for name in ("env_id", "policy", "num_checkpoints"):
        found, expected = getattr(fresh, name), getattr(store, name)
        if found != expected:
            raise ValueError(f"evaluate: fresh must have {name} = {expected}, as {store.path} has, got {found}")
    of_training = [it["seeds"] for it in forecaster.config["stores"] if it["env_id"] == store.env_id]
    if common := sorted(set(fresh.seeds).intersection(itertools.chain(store.seeds, *of_training))):
        raise ValueError(
            f"evaluate: fresh must hold trials under other seeds than those of training, got {len(common)} that were "
            f"there, such as {common[0]}: collect with another --seed"
        )
    return Source(fresh, Split([], [], list(range(fresh.num_trials))), source.num_checkpoints)


def machine_record() -> dict[str, Any]:
    """Return what the figures were measured on, as plain JSON."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    packages = ("torch", "mujoco", "gymnasium", "numpy")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "isa": _core.isa(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _predictions(
    forecast: Forecast, baselines: Mapping[str, Predictor], seen: NDArray[np.float32], horizons: NDArray[np.int64]
) -> tuple[dict[str, NDArray[np.float32]], FloatArray | None]:
    """Return the weights (n, p) that each predictor continues `seen` (h + 1, p) with, and TIPL's confidence (n,)."""
    predictions = {"tipl": forecast.weights(horizons)}
    if forecast.refiner is not None:
        predictions["transformer"] = forecast.in_basis(horizons)
    confidence = None if forecast.calibrated is None else forecast.confidence(horizons)
    if confidence is not None:
        predictions["tipl_gated"] = np.where(confidence[:, None] >= FOLLOW, predictions["tipl"], seen[-1])
    if forecast.strides is not None:
        predictions["tipl_tuned"] = forecast.tuned(horizons)
    return predictions | {name: it.forecast(seen, horizons) for name, it in baselines.items()}, confidence


def _projected(weights: NDArray[np.float32], basis: Basis) -> NDArray[np.float32]:
    return basis.decode(basis.encode(weights))


def _add_rows(
    judged: _Judged,
    env_id: str,
    trial: int,
    share: float,
    prefix_end: int,
    horizons: NDArray[np.int64],
    path: NDArray[np.float32],
    predictions: dict[str, NDArray[np.float32]],
    confidence: FloatArray | None,
) -> None:
    """Add a row for every predictor and horizon; its two policies wait in `judged` for their returns.

    TIPL's rows hold its `confidence` (n,).
    """
    future = path[prefix_end + horizons]
    for name, weights in predictions.items():
        wpe, relative = weight_errors(weights, future, path[0])
        for j, horizon in enumerate(horizons):
            true = judged.policy(future[j], trial, int(prefix_end + horizon))
            if name == "return_floor":
                predicted = true
            elif name == "persistence":
                predicted = judged.policy(weights[j], trial, prefix_end)
            elif name == "tipl_gated" and confidence is not None:  # one of two policies that are judged already
                followed = (share, "tipl", int(horizon)) if confidence[j] >= FOLLOW else (prefix_end,)
                predicted = judged.policy(weights[j], trial, *followed)
            else:
                predicted = judged.policy(weights[j], trial, share, name, int(horizon))
            row = {
                "env_id": env_id,
                "trial": trial,
                "prefix": share,
                "horizon": int(horizon),
                "predictor": name,
                "wpe": float(wpe[j]),
                "wpe_relative": float(relative[j]),
                "true": true,
                "predicted": predicted,
            }
            if name == "tipl" and confidence is not None:
                row["confidence"] = float(confidence[j])
            judged.rows.append(row)


def _run(
    judged: _Judged,
    env_id: str,
    policy: PolicySpec,
    seeds: Mapping[int, NDArray[np.int64]],
    run: Callable[..., Episodes],
) -> list[dict[str, Any]]:
    """Give all rows their returns and actions, on the episodes of their trial, `seeds` (2, E); return the diversity.

    `run` takes weights (N, p) and episode seeds (N, E).
    """
    weights = np.array(judged.weights)
    of_policy = np.array([seeds[trial] for trial in judged.trials])  # (N, 2, E)
    true_policies = sorted({row["true"] for row in judged.rows})
    returns = run(weights, of_policy[:, 0]).returns.mean(1)
    again = run(weights[true_policies], of_policy[true_policies, 1], num_states=NUM_STATES)
    on_other_seeds = dict(zip(true_policies, again.returns.mean(1), strict=True))
    states = dict(zip(true_policies, again.states, strict=True))
    bounds = action_bounds(env_id)
    diversity = _diversity(judged.rows, policy, weights, returns, states, bounds)
    _compare_actions(judged.rows, policy, weights, states, bounds)
    for row in judged.rows:
        true, predicted = row.pop("true"), row.pop("predicted")
        row["return_true"] = float(returns[true])
        row["return_predicted"] = float(
            on_other_seeds[true] if row["predictor"] == "return_floor" else returns[predicted]
        )
        row["repw"] = abs(row["return_true"] - row["return_predicted"])
    return diversity


def _compare_actions(
    rows: list[dict[str, Any]],
    policy: PolicySpec,
    weights: NDArray[np.float32],
    states: Mapping[int, NDArray[np.float32]],
    bounds: FloatArray,
) -> None:
    """Add action_difference and kl to every row, null for the return floor, whose policy is the true one."""
    of_truth: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        row["action_difference"] = row["kl"] = None
        if row["predictor"] != "return_floor":
            of_truth.setdefault(row["true"], []).append(row)
    for true, forecasts in of_truth.items():
        pair = weights[true], weights[[row["predicted"] for row in forecasts]]
        differences = action_differences(policy, *pair, states[true], bounds)
        divergences = kl_divergences(policy, *pair, states[true])
        for row, difference, kl in zip(forecasts, differences, divergences, strict=True):
            row["action_difference"], row["kl"] = float(difference), _finite(kl)


def _diversity(
    rows: list[dict[str, Any]],
    policy: PolicySpec,
    weights: NDArray[np.float32],
    returns: NDArray[np.float64],
    states: Mapping[int, NDArray[np.float32]],
    bounds: FloatArray,
) -> list[dict[str, Any]]:
    """Return how much the held-out trials' policies differ, an entry a (prefix, horizon, predictor) and the "truth".

    Of a prefix and horizon all act on the same states, drawn from those of its true policies. Null where one trial is
    held out.
    """
    policies: dict[tuple[float, int], dict[str, list[int]]] = {}
    for row in rows:
        found = policies.setdefault((row["prefix"], row["horizon"]), {})
        name = "truth" if row["predictor"] == "return_floor" else row["predictor"]
        found.setdefault(name, []).append(row["predicted"])
    entries = []
    for (prefix, horizon), found in policies.items():
        pool = np.concatenate([states[true] for true in found["truth"]])
        chosen = pool[np.random.default_rng(horizon).permutation(len(pool))[:NUM_STATES]]
        for name, members in found.items():
            variance, std = math.nan, math.nan
            if len(members) > 1:
                variance = action_variance(policy, weights[members], chosen, bounds)
                std = float(returns[members].std(ddof=1))
            entries.append({
                "prefix": prefix, "horizon": horizon, "predictor": name,
                "action_variance": _finite(variance), "return_std": _finite(std),
            })  # fmt: skip
    return entries


def _finite(value: float) -> float | None:
    """Return what JSON can hold."""
    return float(value) if math.isfinite(value) else None


def _coordinates(forecast: Forecast, path: NDArray[np.float32], stem: str) -> dict[str, NDArray[Any]]:
    """Return a held-out path (T, p) in coordinates, true and forecast, under the names that the report reads."""
    return {
        f"{stem}_true": forecast.basis.encode(path),
        f"{stem}_tipl": np.concatenate([forecast.observed, forecast.future]),
        f"{stem}_h": np.array([len(forecast.observed) - 1]),
    }
