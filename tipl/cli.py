"""The command line: one command a stage, `run` for all of them, `demo` for a first look.

Every command prints one line a result on stdout. A user's mistake ends in one line on stderr and exit status 2; Ctrl-C
in one line and 130.
"""

import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray
from tyro.conf import OmitArgPrefixes, arg
from tyro.constructors import PrimitiveConstructorSpec

from tipl.collecting.collection import collect
from tipl.collecting.description import describe_store
from tipl.collecting.ppo_config import PPOConfig
from tipl.collecting.settings import flat_config, is_complete
from tipl.files.locations import location
from tipl.files.manifest import read_listed, write_manifest
from tipl.files.publishing import claimed, made_aside, published, remove_left_behind
from tipl.files.schema import parse_json
from tipl.files.sealed import load_json, save_arrays, save_json
from tipl.forecasting.calibration import recalibrate
from tipl.forecasting.forecaster import Forecaster, check_and_forecast, load_pretrained
from tipl.forecasting.sources import prefix_end_of
from tipl.forecasting.train_config import TrainConfig
from tipl.forecasting.training import train
from tipl.judging.evaluation import EvaluateConfig, evaluate
from tipl.policy import Activation
from tipl.report import plot_store, write_report
from tipl.reproduction import experiments, reproduce
from tipl.stage_seconds import StageSeconds
from tipl.storing.exporter import export_checkpoint, layout_record
from tipl.storing.importer import import_checkpoints
from tipl.storing.store import Store
from tipl.verification import Verification, verify, verify_store


def _local_path(texts: list[str]) -> Path:
    """Return the path that was given, perhaps as a file:// URL."""
    path = location(texts[0]) if texts[0].startswith("file://") else Path(texts[0])
    assert isinstance(path, Path)
    return path


PathArg = Annotated[
    Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=_local_path,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    ),
]
StoreArg = Annotated[str, arg(metavar="PATH|URL")]  # s3://bucket/name, or whatever else fsspec knows
FreshArg = Annotated[str | None, arg(metavar="PATH|URL")]
RayArg = Annotated[str | None, arg(metavar="ADDRESS|local")]


@dataclasses.dataclass(frozen=True)
class Collect:
    """Train many PPO trials at once on a MuJoCo task and store a checkpoint of each after every iteration.

    Cut off at whatever moment, it goes on with the same command, and the store comes out as if nothing had happened.

    Example: tipl collect --env-id HalfCheetah-v5 --num-trials 32 --total-timesteps 300000 --output cheetah.zarr

    Example: tipl collect --num-trials 1000 --ray 10.0.0.1:6379 --output s3://bucket/pendulum.zarr
    """

    output: StoreArg
    """Where the store goes; must not exist, or be cut off in the middle of this very collection, which then goes on."""
    env_id: str = "InvertedPendulum-v5"
    """A Gymnasium id with continuous actions."""
    num_trials: int = 48
    """PPO runs, each with its own initial weights and seeds."""
    total_timesteps: int = 100_000
    """Env steps a trial."""
    seed: int = 0
    """All trials' seeds derive from it."""
    shared_init: bool = False
    """Start all trials from the same weights (the paper's setting)."""
    init_seed: int | None = None
    """Start all from the initial weights of this trial seed: of another store with a shared start, the first that
    `tipl store info` shows."""
    num_threads: int | None = None
    """Cores to use, of a worker with --ray; by default all, of a worker one."""
    ray: RayArg = None
    """Collect on the Ray cluster at this address, whose workers must all reach `output`; local: on one started here."""
    trials_per_shard: int | None = None
    """Trials that learn together, in one process; by default all, with --ray at most 16."""
    tensorboard: Annotated[Path | None, arg(metavar="DIR")] = None
    """A folder for TensorBoard curves of every trial and their mean, under CleanRL's tags; none by default."""
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)

    def run(self) -> None:
        self.collect()
        print(f"store      {self.output}")

    def collect(self) -> Store:
        return collect(
            self.output,
            env_id=self.env_id,
            num_trials=self.num_trials,
            total_timesteps=self.total_timesteps,
            seed=self.seed,
            ppo=self.ppo,
            shared_init=self.shared_init,
            init_seed=self.init_seed,
            num_threads=self.num_threads,
            ray=self.ray,
            trials_per_shard=self.trials_per_shard,
            tensorboard=self.tensorboard,
        )


@dataclasses.dataclass(frozen=True)
class StoreVerify:
    """Check every checksum of every file of a store: prints ok, or what is wrong where, with exit status 1.

    Example: tipl store verify runs/cheetah/store.zarr
    """

    store: tyro.conf.Positional[StoreArg]
    """The store's folder or URL."""

    def run(self) -> None:
        _print_verification(self.store, verify_store(self.store, progress=True))


@dataclasses.dataclass(frozen=True)
class StoreInfo:
    """Show what is inside a store: trials, checkpoints, layout, hyperparameters, returns, how far it is.

    Example: tipl store info runs/cheetah/store.zarr --plot cheetah.svg
    """

    store: tyro.conf.Positional[StoreArg]
    """The store's folder or URL."""
    plot: Annotated[Path | None, arg(metavar="FILE")] = None
    """Draw learning curves, dimensionality and detour ratios of the trials' paths into this .svg or .png file."""
    overwrite: bool = False
    """Replace a plot that is there."""

    def run(self) -> None:
        for label, text in describe_store(Store.open(self.store)).items():
            for i, line in enumerate(text.splitlines()):
                print(f"{label if i == 0 else '':<11} {line}")
        if self.plot is not None:
            plot_store(Store.open(self.store), self.plot, overwrite=self.overwrite)
            print(f"{'plot':<11} {self.plot}")


@dataclasses.dataclass(frozen=True)
class Verify:
    """Check every checksum of whatever tipl wrote: a store, a model, an evaluation, a report, a forecast, a whole run.

    Prints ok, or what is wrong where, with exit status 1.

    Example: tipl verify runs/cheetah
    """

    path: tyro.conf.Positional[StoreArg]
    """A folder, a file, or the URL of a store."""

    def run(self) -> None:
        _print_verification(self.path, verify(self.path, progress=True))


@dataclasses.dataclass(frozen=True)
class StoreCommands:
    """Look into a store, or check that it is whole."""

    command: tyro.conf.OmitSubcommandPrefixes[
        Annotated[StoreVerify, tyro.conf.subcommand("verify")] | Annotated[StoreInfo, tyro.conf.subcommand("info")]
    ]

    def run(self) -> None:
        self.command.run()


@dataclasses.dataclass(frozen=True)
class Train:
    """Train the forecaster on a store's trials, or on several stores'; a share of them is held out and never read.

    Example: tipl train --store runs/cheetah/store.zarr --output runs/cheetah/model
    """

    store: tuple[StoreArg, ...]
    """A store written by `tipl collect`, or several, of any tasks: --num-checkpoints brings their paths to one
    length."""
    output: PathArg
    """The model folder; must not exist."""
    num_threads: int | None = None
    """Cores on which policies are run to calibrate the confidence; by default all."""
    ray: RayArg = None
    """Fit a shared basis on the Ray cluster at this address; local: on one started here."""
    train: OmitArgPrefixes[TrainConfig] = dataclasses.field(default_factory=TrainConfig)

    def run(self) -> None:
        train(
            [Store.open(path) for path in self.store],
            self.output,
            self.train,
            num_threads=self.num_threads,
            ray=self.ray,
        )
        print(f"model      {self.output}: {_training_line(self.output)}")


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """Learn anew from runs of yours when a forecaster can be trusted, and how far to go along its forecasts.

    Forecasts of up to --num-trials runs of each store are run in the simulator, never of those that `tipl evaluate`
    judges. The confidence of a forecaster that learnt it elsewhere, such as the one that comes with tipl, says little
    of another task.

    Example: tipl calibrate --store runs/own/store.zarr --output runs/own/model
    """

    store: tuple[StoreArg, ...]
    """Runs of your task; of several tasks the confidence serves all, and there is no `tuned` forecast."""
    output: PathArg
    """The new model folder; must not exist."""
    model: PathArg | None = None
    """A model folder written by `tipl train`; by default the forecaster that comes with tipl."""
    num_trials: int = 32
    num_threads: int | None = None
    """Cores on which policies are run; by default all."""

    def run(self) -> None:
        recalibrate(
            [Store.open(path) for path in self.store],
            self.output,
            self.model,
            num_trials=self.num_trials,
            num_threads=self.num_threads,
        )
        print(f"model      {self.output}")


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Forecast the weights that follow the observed part of one trial, and write them as safetensors.

    Example: tipl rollout --model runs/demo/model --store runs/demo/store.zarr --trial 3 --output f.safetensors

    Example: tipl rollout --store runs/own/store.zarr --output f.safetensors
    """

    store: StoreArg
    output: PathArg
    """A .safetensors file: `weights` (horizon, p) float32, `checkpoint` (horizon,), the index of each row, and, where
    the model knows, `confidence` (horizon,): the probability that the policy beats the last one observed."""
    model: PathArg | None = None
    """A model folder written by `tipl train`; by default the forecaster that comes with tipl."""
    trial: int = 0
    prefix: float = 0.4
    """Share of the trial's path that is observed."""
    every: int | None = None
    """Take every so-many-th checkpoint; by default as many as fit the model."""
    horizon: int | None = None
    """Checkpoints to forecast; to the end of the path by default."""

    def run(self) -> None:
        if not 0.0 < self.prefix <= 1.0:
            raise ValueError(f"rollout: prefix must be a share of the path in (0, 1], got {self.prefix}")
        with published(self.output, "rollout") as aside:
            said = self._forecast(aside)
        print(f"forecast   {self.output}: {said}")

    def _forecast(self, path: Path) -> str:
        """Write the forecast to `path`; return what is to be said of it."""
        store = Store.open(self.store)
        if not 0 <= self.trial < store.num_trials:
            raise ValueError(f"rollout: trial must lie in [0, {store.num_trials}), got {self.trial}")
        forecaster = load_pretrained() if self.model is None else Forecaster.load(self.model)
        trial, max_len = store.trial(self.trial), forecaster.model.config.max_len
        every = -(-(trial.num_checkpoints - 1) // (max_len - 1)) if self.every is None else self.every
        if every < 1:
            raise ValueError(f"rollout: every must be at least 1, got {every}")
        weights = trial.weights()[::every]
        prefix_end = prefix_end_of(self.prefix, len(weights))
        horizon = len(weights) - 1 - prefix_end if self.horizon is None else self.horizon
        forecast = check_and_forecast(forecaster, weights[: prefix_end + 1], horizon, layout=store.policy)[0]
        checkpoint = every * np.arange(prefix_end + 1, prefix_end + 1 + horizon)
        arrays: dict[str, NDArray[Any]] = {"weights": forecast.weights(), "checkpoint": checkpoint}
        trusted = ""
        if forecast.calibrated is not None:
            arrays["confidence"] = forecast.confidence()
            trusted = f"; the last beats the policy at {every * prefix_end} with p = {arrays['confidence'][-1]:.2f}"
        save_arrays(path, arrays, layout_record(store))
        thinned = f", every {every}," if every > 1 else ""
        return f"checkpoints {checkpoint[0]} to {checkpoint[-1]}{thinned} of trial {self.trial}{trusted}"


@dataclasses.dataclass(frozen=True)
class Import:
    """Make a store of your own runs: checkpoints of Stable-Baselines3, CleanRL, rsl_rl, or any state_dict.

    Example: tipl import logs/seed0 logs/seed1 --output store.zarr --env-id Hopper-v5 --pattern 'rl_model_*.zip'
    """

    sources: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of checkpoint files (.zip .cleanrl_model .pt .pth .safetensors), one a trial; or files, together one
    trial; or stores, whose trials are put together."""
    output: PathArg
    """Where the store goes; must not exist."""
    env_id: str = "unknown"
    """The Gymnasium id, which checkpoint files do not know; `tipl evaluate` needs it."""
    pattern: str = "*"
    """Of the names to take in each folder. Files are ordered by the steps in their names."""
    activation: Activation | None = None
    """Of the policy, where the files do not say it; by default the library's own."""
    actor: tuple[str, ...] | None = None
    """The beginnings of the actor's keys, where a file holds more networks, such as "policy.", or "" for all but the
    critics'."""
    step_pattern: str | None = None
    """A regular expression that finds the step in each name, such as 'iter_([0-9]+)', where there are more numbers."""
    num_checkpoints: int | None = None
    """Take the first so many of each trial; by default all, and all trials must hold equally many."""
    max_bytes: int | None = None
    """Of each file, and of what a zip unpacks to; by default 1 GiB, and less of a zip that unpacks to many times its
    size."""

    def run(self) -> None:
        store = import_checkpoints(
            self.sources,
            self.output,
            env_id=self.env_id,
            pattern=self.pattern,
            activation=self.activation,
            actor=self.actor,
            step_pattern=self.step_pattern,
            num_checkpoints=self.num_checkpoints,
            max_bytes=self.max_bytes,
        )
        print(f"store      {self.output}: {store.summary()}")
        note = store.config["source"].get("note")
        if note:
            print(f"note       {note}")


@dataclasses.dataclass(frozen=True)
class Export:
    """Write weights, of a forecast or a store, as a checkpoint file that your own library loads.

    Example: tipl export forecast.safetensors --like logs/seed0/rl_model_100000_steps.zip --output forecast.zip
    """

    weights: tyro.conf.Positional[Path]
    """A forecast written by `tipl rollout`, or a store."""
    like: PathArg
    """A checkpoint file of the same policy; the actor's weights are replaced, all else is kept."""
    output: PathArg
    """The new file; must not exist."""
    checkpoint: int | None = None
    """Its index in the path; the last one by default."""
    trial: int = 0
    """Of a store."""
    actor: tuple[str, ...] | None = None
    """The beginnings of the actor's keys in --like, where it holds more networks and the weights do not know theirs."""
    max_bytes: int | None = None
    """Of --like, and of what a zip unpacks to, as in `tipl import`."""

    def run(self) -> None:
        export_checkpoint(
            self.weights,
            self.like,
            self.output,
            checkpoint=self.checkpoint,
            trial=self.trial,
            actor=self.actor,
            max_bytes=self.max_bytes,
        )
        print(f"checkpoint {self.output}")


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Judge the forecasts of held-out trials in weight space and in the simulator, beside baselines and floors.

    Example: tipl evaluate --store runs/demo/store.zarr --model runs/demo/model --output runs/demo/evaluation
    """

    store: StoreArg
    model: PathArg
    output: PathArg
    """The folder of results.json; must not exist."""
    fresh: FreshArg = None
    """Judge all trials of this store instead, collected like --store under another --seed."""
    num_threads: int | None = None
    """Cores to use, of a worker with --ray; by default all, of a worker one."""
    ray: RayArg = None
    """Run the policies on the Ray cluster at this address; local: on one started here."""
    evaluate: OmitArgPrefixes[EvaluateConfig] = dataclasses.field(default_factory=EvaluateConfig)

    def run(self) -> None:
        forecaster = Forecaster.load(self.model)
        target = evaluate(
            Store.open(self.store),
            forecaster,
            self.output,
            self.evaluate,
            fresh=None if self.fresh is None else Store.open(self.fresh),
            num_threads=self.num_threads,
            ray=self.ray,
        )
        print(f"results    {target}")
        print(end_of_path_table(target))


@dataclasses.dataclass(frozen=True)
class Report:
    """Draw the report: one HTML page that needs no network, and its plots as PNG files.

    Example: tipl report --store runs/demo/store.zarr --evaluation runs/demo/evaluation --output report
    """

    store: StoreArg
    evaluation: PathArg
    output: PathArg
    model: PathArg | None = None
    """Adds the training curve."""
    overwrite: bool = False
    """Replace a report that is there."""

    def run(self) -> None:
        page = write_report(
            self.output,
            evaluation=self.evaluation,
            store=Store.open(self.store),
            training=None if self.model is None else self.model / "training.json",
            overwrite=self.overwrite,
        )
        print(f"report     {page}")


@dataclasses.dataclass(frozen=True)
class Run:
    """Run every stage: collect, train, evaluate, report. Each writes into its own folder under `output`.

    Example: tipl run --env-id HalfCheetah-v4 --num-trials 32 --total-timesteps 300000 --output runs/cheetah
    """

    output: PathArg
    """The run folder; must not exist, or be of this very run cut off, which then goes on."""
    env_id: str = "InvertedPendulum-v5"
    """A Gymnasium id with continuous actions."""
    num_trials: int = 48
    """PPO runs, each with its own initial weights and seeds."""
    total_timesteps: int = 100_000
    """Env steps a trial."""
    seed: int = 0
    """All trials' seeds derive from it; --train.seed chooses the split, --evaluate.seed the episodes."""
    shared_init: bool = False
    """Start all trials from the same weights (the paper's setting)."""
    num_threads: int | None = None
    """Cores to use, of a worker with --ray; by default all, of a worker one."""
    ray: RayArg = None
    """Spread the work over the Ray cluster at this address; local: over one started here."""
    resume: bool = False
    """Go on in the folder of a finished run too, or of an older tipl's, and make what is missing there."""
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)

    def run(self) -> None:
        num_checkpoints = -(-self.total_timesteps // self.ppo.batch_size) + 1
        self.evaluate.prefix_ends(num_checkpoints)  # refuses now what could not be judged after an hour
        with claimed(self.output, "run"):
            self._begin()
            self._run_stages(num_checkpoints)

    def _begin(self) -> None:
        """Make the run folder with run.json, the run's settings, or go on in the one that is there."""
        left_out = ("output", "resume", "num_threads", "ray")
        settings = {name: x for name, x in dataclasses.asdict(self).items() if name not in left_out}
        settings = json.loads(json.dumps(settings))
        record = self.output / "run.json"
        if not self.output.exists():
            with made_aside(self.output) as aside:
                aside.mkdir()
                save_json(aside / record.name, settings)
            return
        is_finished = (self.output / "report" / "report.html").exists()
        if not self.resume and (is_finished or not record.exists()):
            raise FileExistsError(f"run: output {self.output} exists already; choose another folder or pass --resume")
        remove_left_behind(self.output)
        began = flat_config(load_json(record, "run")) if record.exists() else {}
        for name, value in flat_config(settings).items():
            if name in began and began[name] != value:
                raise ValueError(
                    f"run: {self.output} was begun with {name} = {began[name]}, got {value}: give its settings to "
                    "go on, or choose another output"
                )

    def _run_stages(self, num_checkpoints: int) -> None:
        """Make what is missing of store, model, evaluation and report."""
        store_path, model, evaluation = (self.output / name for name in ("store.zarr", "model", "evaluation"))
        seconds = StageSeconds(self.output / "seconds.json")

        if store_path.exists() and is_complete(Store.open(store_path)):
            store = self._complete_store(store_path, num_checkpoints)
        else:
            with seconds.of("collect"):
                store = Collect(
                    str(store_path),
                    env_id=self.env_id,
                    num_trials=self.num_trials,
                    total_timesteps=self.total_timesteps,
                    seed=self.seed,
                    shared_init=self.shared_init,
                    num_threads=self.num_threads,
                    ray=self.ray,
                    ppo=self.ppo,
                ).collect()
        print(f"store      {store_path}: {store.summary()}")

        if not (model / "config.json").exists():
            with seconds.of("train"):
                ray = self.ray if self.train.basis == "shared" else None
                train(store, model, self.train, num_threads=self.num_threads, ray=ray)
        print(f"model      {model}: {_training_line(model)}")

        results = evaluation / "results.json"
        if not results.exists():
            evaluate(
                store,
                Forecaster.load(model),
                evaluation,
                self.evaluate,
                num_threads=self.num_threads,
                ray=self.ray,
                seconds=seconds.read(),
            )
        print(f"results    {results}")
        print(end_of_path_table(results))

        page = write_report(
            self.output / "report",
            evaluation=evaluation,
            store=store,
            training=model / "training.json",
            overwrite=True,
        )
        write_manifest(self.output)
        print(f"report     {page}")

    def _complete_store(self, path: Path, expected: int) -> Store:
        """Return the store of an earlier run, if it is the one that this run would collect."""
        store = Store.open(path)
        found = (store.env_id, store.num_trials, store.num_checkpoints)
        if found != (self.env_id, self.num_trials, expected):
            raise ValueError(
                f"run: --resume expects {expected} checkpoints of {self.num_trials} trials of {self.env_id} in {path}, "
                f"which holds {found[2]} of {found[1]} trials of {found[0]}: remove it, or go on from what it holds "
                "with `tipl train`"
            )
        return store


@dataclasses.dataclass(frozen=True)
class Demo:
    """See the whole thing in minutes: `run` on InvertedPendulum-v5 with settings that fit two cores."""

    output: PathArg = Path("runs/demo")
    resume: bool = False
    """Keep the stages that an interrupted demo has finished."""

    def run(self) -> None:
        Run(
            self.output,
            env_id="InvertedPendulum-v5",
            num_trials=256,
            total_timesteps=50 * 512,
            resume=self.resume,
            ppo=PPOConfig(num_steps=512, num_minibatches=8),
            train=TrainConfig(heldout_fraction=0.15),
            evaluate=EvaluateConfig(num_episodes=2),
        ).run()


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Repeat the paper's experiment and go past it: InvertedPendulum-v4 and HalfCheetah-v4, three regimes, one page.

    Independent initialisations, one shared initialisation, and the in-sample fit; arXiv 2503.04074. Cut off at whatever
    moment, it goes on with the same command.

    Example: tipl reproduce --output runs/reproduction

    Example: tipl reproduce --stores HalfCheetah-v4=runs/cheetah/store.zarr --output runs/reproduction
    """

    output: PathArg = Path("runs/reproduction")
    stores: Annotated[tuple[str, ...], arg(metavar="ENV=PATH")] = ()
    """Complete stores of independently initialised trials to take instead of collecting."""
    num_threads: int | None = None
    """Cores to use; by default all."""

    def run(self) -> None:
        stores = {}
        for given in self.stores:
            env_id, _, path = given.partition("=")
            if not (env_id and path):
                raise ValueError(f"reproduce: --stores expects ENV=PATH, such as HalfCheetah-v4=c.zarr, got {given!r}")
            stores[env_id] = path

        def announce(kind: str, path: Path | str) -> None:
            note = ""
            if kind == "store":
                note = f": {Store.open(path).summary()}"
            elif kind == "model":
                note = f": {_training_line(Path(path))}"
            print(f"{kind:<10} {path}{note}", flush=True)

        page = reproduce(self.output, stores=stores, num_threads=self.num_threads, on_stage=announce)
        for it in experiments(self.output):
            print(f"\n{it.env_id}, {it.regime.name}: {end_of_path_table(it.results)}")
        print(f"\nreport     {page}")


Command = (
    Annotated[Collect, tyro.conf.subcommand("collect")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[StoreCommands, tyro.conf.subcommand("store")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Calibrate, tyro.conf.subcommand("calibrate")]
    | Annotated[Rollout, tyro.conf.subcommand("rollout")]
    | Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
)


def main() -> None:
    """Parse the command line and run the command; the exit status is 0, 2 for a user's mistake, 130 for Ctrl-C."""
    warnings.showwarning = _print_warning  # type: ignore[assignment]
    try:
        command = tyro.cli(
            Command,
            prog="tipl",
            description="Forecast where PPO takes a policy's weights. Start with `tipl demo`.",
        )
        for name, value in vars(command).items():
            if isinstance(value, Path) and value.parts and value.parts[0].endswith(":"):
                raise ValueError(f"{name} must be a local path, and {value.parts[0]}//... is a URL")
        command.run()
    except KeyboardInterrupt as interrupt:
        print(f"tipl: interrupted. {interrupt}".rstrip(), file=sys.stderr)
        sys.exit(130)
    except (ValueError, RuntimeError, OSError, FloatingPointError, MemoryError) as error:
        print(f"tipl: error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _one_line(error: Exception) -> str:
    """Return what an error says, the file first that the system refused; control characters are escaped."""
    text = str(error) or f"{type(error).__name__}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _print_warning(message: Warning | str, *place: Any) -> None:
    """Print a warning as one line, without the line of code that it came from."""
    print(f"tipl: warning: {_one_line(message) if isinstance(message, Exception) else message}", file=sys.stderr)


def _print_verification(path: str, found: Verification) -> None:
    """Print what was found, and exit with status 1 where something is wrong."""
    for problem in found.problems:
        print(problem)
    if found.problems:
        number = len(found.problems)
        print(f"damaged    {path}: {number} problem{'s' if number > 1 else ''}")
        sys.exit(1)
    print(f"ok         {path}: {found.summary()}")


def end_of_path_table(results: Path) -> str:
    """Return the mean relative weight error at the end of the path, a line a predictor and a column a prefix."""
    document = parse_json(read_listed(results), results)
    rows, train = document["rows"], document["settings"]["train"]
    judged = "trials that it was trained on" if train.get("in_sample") else "held-out trials"
    prefixes = sorted({row["prefix"] for row in rows})
    names = list(dict.fromkeys(row["predictor"] for row in rows if row["predictor"] != "return_floor"))
    last = {prefix: max(row["horizon"] for row in rows if row["prefix"] == prefix) for prefix in prefixes}
    lines = [f"relative weight error at the end of the path, mean over {judged}"]
    lines.append(f"{'prefix':<14}" + "".join(f"{prefix:>8.0%}" for prefix in prefixes))
    for name in names:
        errors = [
            np.mean(
                [
                    row["wpe_relative"]
                    for row in rows
                    if (row["predictor"], row["prefix"], row["horizon"]) == (name, prefix, last[prefix])
                ]
            )
            for prefix in prefixes
        ]
        lines.append(f"{name:<14}" + "".join(f"{error:>8.3f}" for error in errors))
    return "\n".join(lines)


def _training_line(model: Path) -> str:
    training = parse_json(read_listed(model / "training.json"), model / "training.json")
    return (
        f"{training['num_parameters'] / 1e6:.2f} M parameters, validation error {training['best_error']:.3f} at step "
        f"{training['best_step']}, {training['seconds']:.0f} s"
    )
