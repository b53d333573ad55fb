"""Commands that train, calibrate, use and judge a forecaster."""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from numpy.typing import NDArray
from tyro.conf import OmitArgPrefixes

import tipl
from tipl.cli.arguments import EnvKwargsArg, FreshArg, PathArg, RayArg, StoreArg, env_kwargs_of
from tipl.cli.printing import end_of_path_table, training_line
from tipl.cli.trial_forecast import TrialForecast, check_prefix
from tipl.files.publishing import published, refuse_existing
from tipl.files.sealed import save_arrays
from tipl.forecasting.train_config import TrainConfig
from tipl.judging.evaluate_config import EvaluateConfig

if TYPE_CHECKING:
    from tipl.report.intervals import Estimate


@dataclasses.dataclass(frozen=True)
class Train:
    """Train the forecaster on the trials of one store or several; a share of the trials is held out and never read.

    Example: tipl train --store runs/cheetah/store.zarr --output runs/cheetah/model
    """

    store: tuple[StoreArg, ...]
    """One store or several, of any tasks, as `tipl collect` or `tipl import` writes them. If their paths differ in
    length, --num-checkpoints thins them to one length."""
    output: PathArg
    """The model folder; must not exist."""
    num_threads: int | None = None
    """Cores that run policies to calibrate the confidence; by default all."""
    ray: RayArg = None
    """Fit a shared basis on the Ray cluster at this address; "local" starts a cluster on this machine."""
    train: OmitArgPrefixes[TrainConfig] = dataclasses.field(default_factory=TrainConfig)

    def run(self) -> None:
        tipl.train(
            [tipl.Store.open(path) for path in self.store],
            self.output,
            self.train,
            num_threads=self.num_threads,
            ray=self.ray,
        )
        print(f"model      {self.output}: {training_line(self.output)}")


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """Learn from your own runs when to trust a forecaster, and how far to go along its forecasts.

    Forecasts of up to --num-trials trials of each store are run in the simulator, but never of the trials that `tipl
    evaluate` judges. The forecaster that comes with tipl learnt its confidence on other tasks; such a confidence says
    little about yours.

    Example: tipl calibrate --store runs/own/store.zarr --output runs/own/model
    """

    store: tuple[StoreArg, ...]
    """Runs of your task. With several stores, one confidence serves all, and there is no `tuned` forecast."""
    output: PathArg
    """The new model folder; must not exist."""
    model: PathArg | None = None
    """A model folder written by `tipl train`; by default the forecaster that comes with tipl."""
    num_trials: int = 32
    """Trials of each store whose forecasts are run, at most."""
    num_threads: int | None = None
    """Cores that run policies; by default all."""

    def run(self) -> None:
        tipl.recalibrate(
            [tipl.Store.open(path) for path in self.store],
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

    Example: tipl rollout --store runs/own/store.zarr --output f.safetensors --plot path.svg
    """

    store: StoreArg
    output: PathArg
    """A .safetensors file: `weights` (horizon, p) float32; `checkpoint` (horizon,), the index in the path of each row;
    and, if the model was calibrated, `confidence` (horizon,), the probability that the row's policy beats the last one
    observed."""
    model: PathArg | None = None
    """A model folder written by `tipl train`; by default the forecaster that comes with tipl."""
    trial: int = 0
    prefix: float = 0.4
    """Share of the trial's path that is observed."""
    every: int | None = None
    """Take every n-th checkpoint; by default the smallest n with which the path fits the model."""
    horizon: int | None = None
    """How many checkpoints to forecast; by default to the end of the path."""
    device: str = "cpu"
    """Where the Transformer runs: cpu, cuda, cuda:1 ..., or auto, the faster of these."""
    plot: PathArg | None = None
    """Draw the observed path, the true one, the forecast and simple rivals into this .svg or .png file, all projected
    on the two leading directions of the path."""
    overwrite: bool = False
    """Replace the plot if it exists."""

    def run(self) -> None:
        from tipl.report.drawing import percent
        from tipl.report.plot_file import plot_path

        check_prefix("rollout", self.prefix)
        if self.plot is not None:
            plot_path("rollout", self.plot, overwrite=self.overwrite)
            if self.plot == self.output:
                raise ValueError(f"rollout: output and plot must be two files, got {self.plot} for both")
        with published(self.output, "rollout") as aside:
            found = self._forecast(aside)
        print(f"forecast   {self.output}: {_words(found)}")
        if self.plot is not None:
            tipl.plot_forecast(
                self.plot,
                found.observed,
                found.ahead.weights,
                truth=found.truth if len(found.truth) else None,
                rivals=found.rivals(),
                title=f"{found.store.env_id}, trial {self.trial}, {percent(self.prefix)} of the path observed",
                overwrite=self.overwrite,
            )
            print(f"plot       {self.plot}")

    def _forecast(self, path: Path) -> TrialForecast:
        """Write the forecast to `path`, and return it."""
        from tipl.storing.exporter import layout_record

        found = TrialForecast.of(
            "rollout",
            self.store,
            self.model,
            trial=self.trial,
            prefix=self.prefix,
            every=self.every,
            horizon=self.horizon,
            device=self.device,
        )
        arrays: dict[str, NDArray[Any]] = {"weights": found.ahead.weights, "checkpoint": found.checkpoints}
        if found.ahead.confidence is not None:
            arrays["confidence"] = found.ahead.confidence
        save_arrays(path, arrays, layout_record(found.store))
        return found


def _words(found: TrialForecast) -> str:
    """Return in words which checkpoints are forecast, and how far the last is to be trusted."""
    trusted = ""
    if found.ahead.confidence is not None:
        last, p = found.every * found.prefix_end, found.ahead.confidence[-1]
        trusted = f"; the last beats the policy at {last} with p = {p:.2f}"
    thinned = f", every {found.every}," if found.every > 1 else ""
    checkpoint = found.checkpoints
    return f"checkpoints {checkpoint[0]} to {checkpoint[-1]}{thinned} of trial {found.trial}{trusted}"


@dataclasses.dataclass(frozen=True)
class Video:
    """Film policies of one trial side by side, from the same start: the last one observed, the forecast, the true one.

    It needs the extra `video` (pip install 'tipl[video]'), and OpenGL through EGL or OSMesa, but no screen.

    Example: tipl video --model runs/demo/model --store runs/demo/store.zarr --trial 3 --output trial3.mp4
    """

    store: StoreArg
    """Runs of a MuJoCo task."""
    output: PathArg
    """An .mp4 file; must not exist."""
    model: PathArg | None = None
    """A model folder written by `tipl train`; by default the forecaster that comes with tipl."""
    trial: int = 0
    prefix: float = 0.4
    """Share of the trial's path that is observed."""
    every: int | None = None
    """Take every n-th checkpoint; by default the smallest n with which the path fits the model."""
    horizon: int | None = None
    """How many checkpoints ahead the forecast and the true policy are; by default at the end of the path."""
    seed: int | None = None
    """The episode's seed; by default that of the first episode on which `tipl evaluate`, with its own default seed,
    judges this trial."""
    seconds: float = 10.0
    """How much of the episode is shown, in seconds of the simulation."""
    width: int = 400
    """The width of one policy's picture, in pixels."""
    height: int = 300

    def run(self) -> None:
        from tipl.collecting.offscreen import offscreen_platform

        offscreen_platform()  # before mujoco is imported: see there
        from tipl.judging.return_judgement import episode_seeds
        from tipl.report.video import simulation_of

        simulation_of(tipl.Store.open(self.store))  # a task that cannot be filmed is refused before the forecast
        found = TrialForecast.of(
            "video",
            self.store,
            self.model,
            trial=self.trial,
            prefix=self.prefix,
            every=self.every,
            horizon=self.horizon,
        )
        policies = {
            f"last observed, checkpoint {found.every * found.prefix_end}": found.observed[-1],
            f"TIPL's forecast of {found.checkpoints[-1]}": found.ahead.weights[-1],
        }
        if len(found.truth) == len(found.ahead.weights):
            policies[f"true policy, checkpoint {found.checkpoints[-1]}"] = found.truth[-1]
        seed = int(episode_seeds(EvaluateConfig(), self.trial)[0, 0]) if self.seed is None else self.seed
        returns = tipl.record_video(
            self.output,
            found.store,
            policies,
            seed=seed,
            seconds=self.seconds,
            width=self.width,
            height=self.height,
        )
        for name, it in returns.items():
            print(f"return     {it:,.1f}: {name}")
        print(f"video      {self.output}: the episode of seed {seed}")


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
    """Judge all trials of this store instead of the held-out ones. It must have been collected like --store, under
    another --seed."""
    num_threads: int | None = None
    """Cores to use, by default all; with --ray the cores of each worker, by default one."""
    ray: RayArg = None
    """Run the policies on the Ray cluster at this address; "local" starts a cluster on this machine."""
    device: str = "cpu"
    """Where the Transformer runs: cpu, cuda, cuda:1 ..., or auto, the faster of these. Policies run on the CPU."""
    evaluate: OmitArgPrefixes[EvaluateConfig] = dataclasses.field(default_factory=EvaluateConfig)

    def run(self) -> None:
        forecaster = tipl.Forecaster.load(self.model)
        target = tipl.evaluate(
            tipl.Store.open(self.store),
            forecaster,
            self.output,
            self.evaluate,
            fresh=None if self.fresh is None else tipl.Store.open(self.fresh),
            num_threads=self.num_threads,
            ray=self.ray,
            device=self.device,
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
    """The model folder; adds the training curve."""
    video: tuple[PathArg, ...] = ()
    """Files written by `tipl video`, which the page shows."""
    overwrite: bool = False
    """Replace the report if it exists."""

    def run(self) -> None:
        page = tipl.write_report(
            self.output,
            evaluation=self.evaluation,
            store=tipl.Store.open(self.store),
            training=None if self.model is None else self.model / "training.json",
            videos=self.video,
            overwrite=self.overwrite,
        )
        print(f"report     {page}")


@dataclasses.dataclass(frozen=True)
class Score:
    """Run every checkpoint of every run in the simulator: which one is a run's best, and does it beat the last?

    The best and the last checkpoint of each run are then run again on new episodes, so that luck is not taken for
    skill; brackets are 95 % intervals over these episodes.

    Example: tipl score runs/own/store.zarr --output runs/own/scores.json --plot runs/own/scores.svg
    """

    store: tyro.conf.Positional[StoreArg]
    """A store that `tipl collect`, `tipl import` or a recorder wrote."""
    output: PathArg | None = None
    """Write all returns into this JSON file; must not exist."""
    filled: PathArg | None = None
    """Write a copy of the store, with these returns where it holds none, as of imported runs; must not exist."""
    num_episodes: int = 5
    """Episodes of each checkpoint."""
    every: int = 1
    """Take every n-th checkpoint, counted back from the last."""
    seed: int = 0
    """The seed of the episodes."""
    sampled: bool = False
    """Run the stochastic policies, as in training, instead of the deterministic ones."""
    env_kwargs: EnvKwargsArg = None
    """Arguments for the environment, such as '{"ctrl_cost_weight": 0.05}', in place of those that the store says. With
    any, the environment is Gymnasium's own, which is slower."""
    num_threads: int | None = None
    """Cores to use; by default all."""
    plot: PathArg | None = None
    """Draw the returns into this .svg or .png file."""
    overwrite: bool = False
    """Replace the plot if it exists."""

    def run(self) -> None:
        from tipl.report.plot_file import plot_path

        if self.plot is not None:
            plot_path("score", self.plot, overwrite=self.overwrite)
            if self.plot == self.output:
                raise ValueError(f"score: output and plot must be two files, got {self.plot} for both")
        if self.filled is not None:
            refuse_existing(self.filled, "score")
            if self.every != 1:
                raise ValueError(f"score: filled needs the returns of every checkpoint, got every = {self.every}")
        with contextlib.nullcontext() if self.output is None else published(self.output, "score") as aside:
            store = tipl.Store.open(self.store)
            scores = tipl.score(
                store,
                num_episodes=self.num_episodes,
                every=self.every,
                seed=self.seed,
                sampled=self.sampled,
                env_kwargs=env_kwargs_of("score", self.env_kwargs),
                num_threads=self.num_threads,
            )
            if aside is not None:
                scores.save(aside)
        last = scores.checkpoints[-1]
        for it, means in zip(scores.best, scores.returns.mean(2), strict=True):
            where = f"checkpoint {it.checkpoint} of {last}, env step {it.env_steps:,}"
            gain = "the last" if it.checkpoint == last else _gain(it.gain)
            best = means[scores.checkpoints.index(it.checkpoint)]
            print(f"{'trial ' + str(it.trial):<10} best {best:,.1f}: {where}, {gain}; last {means[-1]:,.1f}")
        for trial, at in scores.diverged:
            print(f"{'diverged':<10} trial {trial}, checkpoint {at}: its actions are not finite, and it is left out")
        earlier = sum(it.beats_last for it in scores.best)
        print(f"{'scores':<10} {earlier} of {len(scores.best)} runs had a policy that beats their last beyond chance")
        if note := (tipl.Store.open(self.store).config.get("source") or {}).get("note"):
            print(f"{'note':<10} {note}")
        if self.output is not None:
            print(f"{'output':<10} {self.output}")
        if self.filled is not None:
            scores.fill(store, self.filled)
            print(f"{'filled':<10} {self.filled}")
        if self.plot is not None:
            tipl.plot_scores(scores, self.plot, overwrite=self.overwrite)
            print(f"{'plot':<10} {self.plot}")


def _gain(gain: "Estimate") -> str:
    """Return in words what the best checkpoint returns more than the last, on new episodes."""
    if math.isnan(gain.value):
        return "the last one diverged"
    return f"{gain.value:+,.1f} [{gain.low:+,.1f}, {gain.high:+,.1f}] beside the last on new episodes"
