"""All stages in turn: collect, train, evaluate, report. A stage whose output is there is kept, so that a run goes on.

A run's folder holds store.zarr, model/, evaluation/ and report/, each written by one stage; run.json, the settings that
the run was begun with; seconds.json, what each stage took; and, once all is there, a manifest.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tipl.collecting import collection
from tipl.collecting.env_checks import check_can_learn
from tipl.collecting.ppo_config import PPOConfig
from tipl.collecting.settings import NOTHING, changed_settings, is_complete
from tipl.files.manifest import write_manifest
from tipl.files.publishing import claimed, made_aside, remove_dead_claim, remove_left_behind
from tipl.files.schema import plain_json
from tipl.files.sealed import load_json, save_json
from tipl.forecasting import training
from tipl.forecasting.forecaster import Forecaster
from tipl.forecasting.train_config import TrainConfig
from tipl.judging import evaluation
from tipl.judging.evaluate_config import EvaluateConfig
from tipl.report import write_report
from tipl.stage_seconds import StageSeconds
from tipl.storing.store import Store, env_of

OnStage = Callable[[str, Path | str], object]
"""Called with "store", "model", "results" or "report" and its path, as soon as that is there."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Where a run's outputs lie."""

    path: Path

    @property
    def store(self) -> Path:
        return self.path / "store.zarr"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def results(self) -> Path:
        return self.evaluation / "results.json"

    @property
    def report(self) -> Path:
        return self.path / "report" / "report.html"


def run(
    output: str | Path,
    *,
    env_id: str = "InvertedPendulum-v5",
    env_kwargs: Mapping[str, Any] | None = None,
    num_trials: int = 48,
    total_timesteps: int = 100_000,
    seed: int = 0,
    shared_init: bool = False,
    ppo: PPOConfig | None = None,
    train: TrainConfig = TrainConfig(),
    evaluate: EvaluateConfig = EvaluateConfig(),
    num_threads: int | None = None,
    ray: str | None = None,
    resume: bool = False,
    on_stage: OnStage = lambda kind, path: None,
    progress: bool = True,
) -> Path:
    """Collect, train, evaluate and report into the folder `output`; return the path of the report's page.

    The same call goes on with a run that was cut off. The arguments are those of `tipl.collect`, `tipl.train` and
    `tipl.evaluate`, and:

    Args:
        resume: go on in the folder of a finished run, or of one without run.json, and make what is missing there.
        on_stage: see `OnStage`.

    Raises:
        FileExistsError: `output` exists and holds no unfinished run, and `resume` is false.
        ValueError: a wrong argument, or the run in `output` was begun with other settings; nothing is written.
        OutputInUse: another process is at work on `output`.
        RuntimeError: a file of an earlier stage is damaged.
    """
    folder, ppo = RunFolder(Path(output)), ppo or PPOConfig()
    num_checkpoints = -(-total_timesteps // ppo.batch_size) + 1
    evaluate.prefix_ends(num_checkpoints)  # refuses now what could not be judged after an hour
    asked = {"num_trials": num_trials, "total_timesteps": total_timesteps, "seed": seed, "shared_init": shared_init}
    collected = {"env_id": env_id, "env_kwargs": plain_json("run: env_kwargs", env_kwargs or {}), **asked}
    configs = {name: dataclasses.asdict(it) for name, it in (("ppo", ppo), ("train", train), ("evaluate", evaluate))}
    if not folder.store.exists():
        check_can_learn("run", env_id, ppo, env_kwargs)  # before run.json is there
    with claimed(folder.path, "run"):
        _begin(folder, collected | configs, resume=resume)
        seconds = StageSeconds(folder.path / "seconds.json")
        store = Store.open(folder.store) if folder.store.exists() else None
        if store is not None and is_complete(store):
            _check_store(store, collected, num_checkpoints)
        else:
            with seconds.of("collect"):
                store = collection.collect(
                    folder.store, **collected, ppo=ppo, num_threads=num_threads, ray=ray, progress=progress
                )
        on_stage("store", folder.store)
        page = run_stages(
            "run", folder, store, train, evaluate, seconds, num_threads=num_threads, ray=ray, on_stage=on_stage,
            progress=progress,
        )  # fmt: skip
        write_manifest(folder.path)
        on_stage("report", page)
    return page


def run_stages(
    command: str,
    folder: RunFolder,
    store: Store,
    train: TrainConfig,
    evaluate: EvaluateConfig,
    seconds: StageSeconds,
    *,
    names: str = "{}",
    collected_as: str = "collect",
    num_threads: int | None = None,
    ray: str | None = None,
    on_stage: OnStage,
    progress: bool = True,
) -> Path:
    """Train on `store`, evaluate and report, each where its output is missing; return the path of the report's page.

    `on_stage` hears of model and results. `seconds` knows a stage as `names.format(stage)`, and what collecting took as
    `collected_as`. Errors name the `command`.

    Raises ValueError where the model is of other settings or of another store; FileExistsError where the evaluation of
    a model is there and the model is gone.
    """
    for output in (store.path, folder.model, folder.evaluation, folder.report.parent):
        remove_dead_claim(output)  # of a call that was killed just after publishing a stage, which is now kept
    forecaster = _trained(command, folder, store, train, seconds, names, num_threads, ray, progress)
    on_stage("model", folder.model)

    if not folder.results.exists():
        folder.report.unlink(missing_ok=True)  # it described an evaluation that is gone
        known = seconds.read()
        earlier = {"collect": collected_as, "train": names.format("train")}
        with seconds.of(names.format("evaluate")):
            evaluation.evaluate(
                store, forecaster, folder.evaluation, evaluate, num_threads=num_threads, ray=ray, progress=progress,
                seconds={stage: known[name] for stage, name in earlier.items() if name in known},
            )  # fmt: skip
    on_stage("results", folder.results)

    if not folder.report.exists():
        with seconds.of(names.format("report")):
            write_report(
                folder.report.parent, evaluation=folder.evaluation, store=store, overwrite=True,
                training=folder.model / "training.json",
            )  # fmt: skip
    return folder.report


def _trained(
    command: str,
    folder: RunFolder,
    store: Store,
    train: TrainConfig,
    seconds: StageSeconds,
    names: str,
    num_threads: int | None,
    ray: str | None,
    progress: bool,
) -> Forecaster:
    """Return the forecaster in the run's model folder, trained where it is missing."""
    if not folder.model.exists():
        if folder.evaluation.exists():
            raise FileExistsError(
                f"{command}: the model of {folder.evaluation} is gone: remove that folder to train again"
            )
        with seconds.of(names.format("train")):
            training.train(
                store, folder.model, train, num_threads=num_threads, progress=progress,
                ray=ray if train.basis == "shared" else None,
            )  # fmt: skip
    forecaster = Forecaster.load(folder.model)
    if changed := _changed(forecaster.config["train"], dataclasses.asdict(train)):
        raise ValueError(
            f"{command}: {folder.model} was trained with other settings: {changed}; choose another output, or remove it"
        )
    if forecaster.source_of(store) is None:
        raise ValueError(
            f"{command}: {folder.model} was trained on another store than {store.path}: remove one of them"
        )
    return forecaster


def _changed(began: dict[str, Any], asked: dict[str, Any]) -> str:
    """Return which settings differ from those that something was begun with, in words; "" where none does.

    A setting that an older version of tipl did not have is not compared.
    """
    changed = [it for it in changed_settings(began, asked) if NOTHING not in it[1:]]
    return ", ".join(f"{name} = {before}, got {now}" for name, before, now in changed)


def _begin(folder: RunFolder, settings: dict[str, Any], *, resume: bool) -> None:
    """Make the run's folder with run.json, or go on in the one that is there."""
    record = folder.path / "run.json"
    kwargs = json.dumps(settings["env_kwargs"], sort_keys=True)  # one setting, as runs may have others or none
    settings = settings | {"env_kwargs": kwargs}
    if not folder.path.exists():
        with made_aside(folder.path) as aside:
            aside.mkdir()
            save_json(aside / record.name, json.loads(json.dumps(settings)))
        return
    if not resume and (folder.report.exists() or not record.exists()):
        raise FileExistsError(f"run: output {folder.path} exists already; choose another folder or pass --resume")
    remove_left_behind(folder.path)
    began = load_json(record, "run") if record.exists() else {}
    if changed := _changed(began, settings):
        raise ValueError(
            f"run: {folder.path} was begun with {changed}: give its settings to go on, or choose another output"
        )


def _check_store(store: Store, collected: dict[str, Any], num_checkpoints: int) -> None:
    """Raise ValueError unless a complete store is the one that this run would collect."""
    env, num_trials = env_of(collected["env_id"], collected["env_kwargs"]), collected["num_trials"]
    found = (store.env, store.num_trials, store.num_checkpoints)
    if found != (env, num_trials, num_checkpoints):
        raise ValueError(
            f"run: expected {num_checkpoints} checkpoints of {num_trials} trials of {env} in {store.path}, which "
            f"holds {found[2]} of {found[1]} trials of {found[0]}: remove it, or go on from what it holds with "
            "`tipl train`"
        )
