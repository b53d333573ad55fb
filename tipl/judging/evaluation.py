"""Judge forecasts on held-out trials: in weight space (WPE) and in the simulator (REPW), beside baselines and floors.

Shapes  E episodes for each policy, T checkpoints, p weights, n horizons; h = prefix_end.

WPE   mean squared error over the weights; relative: |forecast - truth| / |truth - theta_0|.
REPW  |return of the true policy - return of the forecast one|, mean over the same E episodes (same seeds) of both.
Both as in Tang 2025, arXiv 2503.04074. Policies act deterministically: the mean action, clipped to the action space.
All policies of one held-out trial run on the same episodes, and each trial has its own: if all trials shared their
episodes, an easy one would move all returns together, and an interval over trials would not show it.

action_difference, kl   how far the forecast policy acts from the true one, on states that the true one visits
action_variance         between the held-out trials' policies at one checkpoint, on one set of states: do they collapse?
All three as in `action_metrics`.

memorisation            how far forecast and true futures lie from the nearest training path's
causality               the most that a prediction changes where what follows it does
Both as in `memorisation`.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tipl import _core
from tipl.cluster import connected
from tipl.collecting.episodes import policy_to_run, run_episodes
from tipl.files.locations import write_atomically
from tipl.files.publishing import published
from tipl.files.sealed import save_arrays
from tipl.forecasting.forecaster import Forecaster, source_to_judge
from tipl.forecasting.sources import Source, Split, warn_if_unfinished
from tipl.judging.action_metrics import action_bounds
from tipl.judging.evaluate_config import EvaluateConfig
from tipl.judging.return_judgement import NUM_STATES, ReturnJudgement, episode_seeds, judge_returns
from tipl.judging.weight_judgement import FOLLOW, Case, judge_weights
from tipl.progress import progress_bar
from tipl.storing.store import Store


def evaluate(
    store: Store,
    forecaster: Forecaster,
    output: str | Path,
    config: EvaluateConfig = EvaluateConfig(),
    *,
    fresh: Store | None = None,
    num_threads: int | None = None,
    ray: str | None = None,
    device: str = "cpu",
    seconds: Mapping[str, float] | None = None,
    progress: bool = True,
) -> Path:
    """Judge `forecaster` and every baseline on the held-out trials of `store`; return the path of results.json.

    With `fresh`, a store of the same task under other seeds, all of its trials are judged instead, however many were
    collected. Baselines still learn from the training trials of `store` alone.

    Writes results.json (tidy rows, one for each trial, prefix, horizon and predictor) and coordinates.safetensors (some
    held-out paths, true and forecast) into the folder `output`. With `ray`, policies run on the Ray cluster at that
    address ("local" starts one). `device` is where the forecaster's Transformer runs, as in `rollout`. `seconds` is how
    long earlier stages took, for the report.

    Raises FileExistsError where `output` exists; OutputInUse where another process is making it; ValueError where the
    model was not trained on this store, `fresh` is not of its kind, a prefix is too short for a basis, or the policies
    are of a kind that the simulator cannot run, or saw normalised observations whose statistics the store lacks.
    """
    output = Path(output)
    with published(output, "evaluate") as aside:
        warn_if_unfinished("evaluate", store)
        results, coordinates = _judged_results(
            store,
            forecaster,
            config,
            fresh=fresh,
            num_threads=num_threads,
            ray=ray,
            device=device,
            seconds=seconds,
            progress=progress,
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
    device: str,
    seconds: Mapping[str, float] | None,
    progress: bool,
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return what `evaluate` writes: results.json and coordinates.safetensors."""
    policy = policy_to_run("evaluate", store)
    source, started = source_to_judge(store, forecaster), time.perf_counter()
    judges = source if fresh is None else _all_of(fresh, source, forecaster)
    if fresh is not None:
        warn_if_unfinished("evaluate", fresh)
    config.prefix_ends(source.num_checkpoints)  # refuses what could not be judged, before anything is read
    heldout = judges.split.heldout[: config.max_trials]
    in_weights = judge_weights(
        forecaster,
        source,
        {i: judges.path(i) for i in heldout},
        config,
        in_sample=fresh is None and not set(heldout).isdisjoint(source.split.train),
        num_threads=num_threads,
        device=device,
    )
    seeds = {trial: episode_seeds(config, trial) for trial in heldout}
    with contextlib.nullcontext() if ray is None else connected(ray) as cluster, progress_bar(progress) as bar:
        where: dict[str, Any] = {"num_threads": num_threads, "cluster": cluster, "bar": bar}
        run = functools.partial(run_episodes, store.env_id, policy, env_kwargs=store.env_kwargs, **where)
        bounds = action_bounds(store.env_id, store.env_kwargs)
        in_returns, diversity = judge_returns(policy, bounds, in_weights.cases, in_weights.policies, seeds, run)
    results = {
        "format": "tipl-results",
        "version": 1,
        "env_id": store.env_id,
        "tipl_version": importlib.metadata.version("tipl"),
        "settings": {
            **_who_judges(source, judges, heldout, forecaster),
            "episode_seeds": {trial: judged_on.tolist() for trial, (judged_on, _) in seeds.items()},
            "num_states": NUM_STATES,
            "follow": FOLLOW,
            **dataclasses.asdict(config),
            "train": forecaster.config["train"],
            "collect": judges.store.config,
        },
        "machine": machine_record(),
        "seconds": {**(seconds or {}), "evaluate": time.perf_counter() - started},
        "rows": [_row(store.env_id, *judged) for judged in zip(in_weights.cases, in_returns, strict=True)],
        "diversity": diversity,
        "memorisation": in_weights.memorisation,
        "causality": max(in_weights.leaks),
    }
    return results, in_weights.coordinates


def _who_judges(source: Source, judges: Source, heldout: list[int], forecaster: Forecaster) -> dict[str, Any]:
    """Return what results.json says of the trials that taught and of those that judge."""
    return {
        "env_kwargs": source.store.env_kwargs,
        "num_trials": judges.store.num_trials,
        "train_trials": source.split.train,
        "validation_trials": source.split.validation,
        "trained_on": [it["env_id"] for it in forecaster.config["stores"]],
        "is_zero_shot": forecaster.source_of(source.store) is None,
        "is_fresh": judges is not source,
        "heldout_trials": heldout,
        "num_checkpoints": source.num_checkpoints,
        "num_params": source.store.policy.num_params,
        "n_components": forecaster.model.config.n_components,
    }


def _row(env_id: str, case: Case, judgement: ReturnJudgement) -> dict[str, Any]:
    """Return a row of results.json."""
    return {
        "env_id": env_id,
        "trial": case.trial,
        "prefix": case.prefix,
        "horizon": case.horizon,
        "predictor": case.predictor,
        "wpe": case.wpe,
        "wpe_relative": case.wpe_relative,
        **({} if case.confidence is None else {"confidence": case.confidence}),
        **dataclasses.asdict(judgement),
        "repw": abs(judgement.return_true - judgement.return_predicted),
    }


def _all_of(fresh: Store, source: Source, forecaster: Forecaster) -> Source:
    """Return `fresh` as a source all of whose trials judge. Raises ValueError unless it is of the same kind as
    `source`'s store and shares no seed with it, nor with any store of this task that the forecaster was trained on."""
    store = source.store
    for name in ("env_id", "env_kwargs", "policy", "num_checkpoints"):
        found, expected = getattr(fresh, name), getattr(store, name)
        if found != expected:
            raise ValueError(f"evaluate: fresh must have {name} = {expected}, as {store.path} has, got {found}")
    of_training = [it["seeds"] for it in forecaster.config["stores"] if it["env_id"] == store.env_id]
    if common := sorted(set(fresh.seeds).intersection(itertools.chain(store.seeds, *of_training))):
        raise ValueError(
            f"evaluate: fresh must hold trials under other seeds than those of training, got {len(common)} that were "
            f"there, such as {common[0]}: collect with another --seed"
        )
    split = Split([], [], list(range(fresh.num_trials)))
    return Source(fresh, split, source.num_checkpoints, store.num_checkpoints)


def machine_record() -> dict[str, Any]:
    """Return what machine and which versions the figures were measured with, as plain JSON."""
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
