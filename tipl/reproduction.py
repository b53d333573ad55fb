"""The experiment of TIPL (Tang 2025, arXiv 2503.04074), reproduced and extended: two tasks, three regimes, one page.

*independent*  Trials from initial weights of their own, judged on trials held out whole: the question that matters.
*shared-init*  All trials start from the same weights, and one basis serves them all; judged on held-out trials.
*in-sample*    One basis over all trials, trained on all, judged on the same. That is all that the claim "fits the
               implicit dynamics" needs, and it says nothing about new runs.

A stage whose output is there is kept, so that the same call goes on after an interruption.
"""

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tipl.collecting.collection import collect
from tipl.collecting.ppo_config import PPOConfig
from tipl.collecting.settings import is_complete
from tipl.files.locations import write_atomically
from tipl.files.manifest import NAME as MANIFEST
from tipl.files.manifest import read_listed, write_manifest
from tipl.files.publishing import claimed, remove, remove_left_behind
from tipl.files.schema import parse_json
from tipl.forecasting.train_config import TrainConfig
from tipl.judging.evaluate_config import EvaluateConfig
from tipl.pipeline import OnStage, RunFolder, run_stages
from tipl.report.reproduction import Part, write_reproduction
from tipl.report.results import read_results
from tipl.stage_seconds import StageSeconds
from tipl.storing.store import Store

IN_SAMPLE_TRIALS = 12
"""How many trials are judged in-sample, where all could be: enough to show a fit, in a quarter of the time."""


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """How many trials of a task are collected, and how they are trained on and judged."""

    num_trials: int
    total_timesteps: int
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    shared_components: int = 128
    """Coordinates in a shared basis. With 64 trials of InvertedPendulum 16 leave as large an error as persistence has,
    even for the trials that the basis was fitted on (0.56 of the path after a fifth of it); 128 leave 0.13."""


TASKS: dict[str, TaskSettings] = {
    "InvertedPendulum-v4": TaskSettings(num_trials=64, total_timesteps=50 * 2048),
    # Every 4th of 246 checkpoints: training goes through rollouts of the whole path.
    "HalfCheetah-v4": TaskSettings(
        num_trials=48,
        total_timesteps=500_000,
        train=TrainConfig(num_checkpoints=62),
    ),
}


@dataclasses.dataclass(frozen=True)
class Regime:
    """Where trials start, which basis they are written in, and which trials judge."""

    name: str
    title: str
    description: str
    shared_init: bool = False
    shared_basis: bool = False
    in_sample: bool = False

    def train_config(self, task: TaskSettings) -> TrainConfig:
        if not self.shared_basis:
            return task.train
        shared = dataclasses.replace(task.train, basis="shared", n_components=task.shared_components)
        if not self.in_sample:
            return shared
        return dataclasses.replace(shared, in_sample=True, confidence_trials=0)  # a confidence is for new runs

    def evaluate_config(self, task: TaskSettings) -> EvaluateConfig:
        return dataclasses.replace(task.evaluate, max_trials=IN_SAMPLE_TRIALS) if self.in_sample else task.evaluate


REGIMES = (
    Regime(
        "independent",
        "Independent initialisations",
        "Every trial starts from weights of its own, each observed prefix has its own basis, and whole trials are held "
        "out: basis, scaling, model and selection see nothing of them.",
    ),
    Regime(
        "shared-init",
        "One shared initialisation",
        "All trials start from the same weights and one basis of the training trials serves all, as in the paper; "
        "whole trials are held out: basis, scaling, model and selection see nothing of them.",
        shared_init=True,
        shared_basis=True,
    ),
    Regime(
        "in-sample",
        "In-sample fit",
        "One basis of all trials with independent initialisations; the model is trained on all of them and judged on "
        "the same. Nothing is held out: this is all that the claim “fits the implicit dynamics” needs, and it says "
        "nothing of new runs.",
        shared_basis=True,
        in_sample=True,
    ),
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One regime on one task, and where its files lie."""

    env_id: str
    regime: Regime
    output: Path

    @property
    def task(self) -> TaskSettings:
        return TASKS[self.env_id]

    @property
    def name(self) -> str:
        """The folder's, relative to the output."""
        return f"{self.env_id}/{self.regime.name}"

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.output / self.env_id / self.regime.name)

    @property
    def store(self) -> Path:
        """Where the trials are collected; regimes that start alike share them."""
        return self.output / self.env_id / ("shared-init.zarr" if self.regime.shared_init else "independent.zarr")


def experiments(output: str | Path) -> list[Experiment]:
    """Return every task's regimes, in the order in which they are run."""
    return [Experiment(env_id, regime, Path(output)) for env_id in TASKS for regime in REGIMES]


def reproduce(
    output: str | Path,
    *,
    stores: Mapping[str, str | Path] | None = None,
    num_threads: int | None = None,
    on_stage: OnStage = lambda kind, path: None,
    progress: bool = True,
) -> Path:
    """Run all regimes on all TASKS and write one page of them; return the path of `output`/reproduction.html.

    The folder `output` holds each task's stores, `<task>/<regime>/` with model, evaluation and report, the figures of
    the page, results.json (all rows, with their `regime`) and seconds.json (what each stage took).

    Args:
        stores: env_id -> a complete store of independently initialised trials, taken instead of collecting one.
        on_stage: as in `tipl.pipeline.run`, for each experiment.

    Raises:
        ValueError: a store is not what its task needs, or the folder's files are of other settings.
        FileExistsError: something in the way that is not of this function; it is left alone.
        KeyboardInterrupt: on Ctrl-C, with a text that says how to go on.
    """
    output = Path(output)
    given = {env_id: _given_store(env_id, path) for env_id, path in (stores or {}).items()}
    seconds = StageSeconds(output / "seconds.json")
    runs = experiments(output)
    with claimed(output, "reproduce"):
        remove_left_behind(output)
        try:
            for it in runs:
                store = None if it.regime.shared_init else given.get(it.env_id)
                if store is None:
                    store = _collected(it, runs, seconds, num_threads, progress)
                on_stage("store", str(store.path))
                run_stages(
                    "reproduce", it.folder, store, it.regime.train_config(it.task), it.regime.evaluate_config(it.task),
                    seconds, names=f"{it.name}/{{}}", collected_as=f"{it.env_id}/{it.store.stem}/collect",
                    num_threads=num_threads, on_stage=on_stage, progress=progress,
                )  # fmt: skip
                on_stage("report", it.folder.report)
        except KeyboardInterrupt:
            kept = f"reproduce: what is finished is kept in {output}; the same command goes on"
            raise KeyboardInterrupt(kept) from None
        return _write_joint(output, runs, seconds.read())


def _given_store(env_id: str, path: str | Path) -> Store:
    """Return the user's store of a task. Raises ValueError where it is not what the task needs."""
    if env_id not in TASKS:
        raise ValueError(f"reproduce: stores must be of {' or '.join(TASKS)}, got {env_id!r}")
    store = Store.open(path)
    wanted = f"reproduce: expected a complete store of at least 3 trials of {env_id} with initial weights of their own"
    if store.env != env_id or store.num_trials < 3:
        raise ValueError(f"{wanted}, got {store.num_trials} of {store.env} in {path}")
    if not is_complete(store):
        raise ValueError(f"{wanted}, got an unfinished one in {path}: the same `tipl collect` goes on with it")
    first = np.concatenate([store.trial(i).weights(0, 1) for i in range(store.num_trials)])
    if len(np.unique(first, axis=0)) < len(first):
        raise ValueError(f"{wanted}, got trials that start from the same weights in {path}")
    task = TASKS[env_id]
    wanted_length = task.train.num_checkpoints or store.num_checkpoints
    if store.num_checkpoints < wanted_length:
        raise ValueError(f"{wanted} and {wanted_length} checkpoints, got {store.num_checkpoints} in {path}")
    task.evaluate.prefix_ends(wanted_length)  # refuses now what could not be judged later
    return store


def _collected(
    it: Experiment, runs: list[Experiment], seconds: StageSeconds, num_threads: int | None, progress: bool
) -> Store:
    """Return the experiment's store, collected or gone on with where it is not complete."""
    task = it.task
    if it.store.exists() and is_complete(Store.open(it.store)):
        store = Store.open(it.store)
        expected = {
            "env_id": it.env_id,
            "num_trials": task.num_trials,
            "total_timesteps": task.total_timesteps,
            "shared_init": it.regime.shared_init,
        }
        found = {name: {"env_id": store.env_id, **store.config}.get(name) for name in expected}
        if found != expected:
            raise ValueError(f"reproduce: expected {expected} in {it.store}, got {found}; choose another output")
        return store
    orphans = [run.folder.model for run in runs if run.store == it.store and run.folder.model.exists()]
    if orphans and not it.store.exists():
        raise ValueError(
            f"reproduce: {orphans[0]} was trained on a store that is not in {it.output}: give it again with "
            f"--stores {it.env_id}=PATH, or remove the model"
        )
    with seconds.of(f"{it.env_id}/{it.store.stem}/collect"):
        return collect(
            it.store,
            env_id=it.env_id,
            num_trials=task.num_trials,
            total_timesteps=task.total_timesteps,
            ppo=task.ppo,
            shared_init=it.regime.shared_init,
            num_threads=num_threads,
            progress=progress,
        )


def _write_joint(output: Path, runs: list[Experiment], seconds: dict[str, float]) -> Path:
    """Write the page, its figures and results.json, unless they are there already; return the path of the page.

    The manifest comes last: where it is there and results.json holds what it should, the page is of it.
    """
    documents = {it.name: parse_json(read_listed(it.folder.results), it.folder.results) for it in runs}
    first = documents[runs[0].name]
    joint: dict[str, Any] = {
        "format": "tipl-reproduction",
        "version": 1,
        "tipl_version": importlib.metadata.version("tipl"),
        "settings": {name: document["settings"] for name, document in documents.items()},
        "machine": first["machine"],
        "seconds": seconds,
        "rows": [{"regime": it.regime.name, **row} for it in runs for row in documents[it.name]["rows"]],
    }
    data = (json.dumps(joint, allow_nan=False) + "\n").encode()
    page, target = output / "reproduction.html", output / "results.json"
    if page.exists() and (output / MANIFEST).exists() and read_listed(target) == data:
        return page
    parts = [
        Part(
            regime=it.regime.name,
            title=it.regime.title,
            description=it.regime.description,
            results=read_results(it.folder.results),
            report=f"{it.name}/report/report.html",
        )
        for it in runs
    ]
    remove(output / MANIFEST)  # until all that it lists is there
    write_reproduction(page, parts, seconds=seconds)
    write_atomically(target, data)
    write_manifest(output)
    return page
