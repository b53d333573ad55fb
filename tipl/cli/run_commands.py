"""Commands that run every stage."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

import tipl
from tipl.cli.arguments import EnvKwargsArg, PathArg, RayArg, env_kwargs_of
from tipl.cli.printing import end_of_path_table, print_stage
from tipl.collecting.ppo_config import PPOConfig
from tipl.forecasting.train_config import TrainConfig
from tipl.judging.evaluate_config import EvaluateConfig
from tipl.stage_seconds import StageSeconds


@dataclasses.dataclass(frozen=True)
class Run:
    """Run every stage: collect, train, evaluate, report. Each writes into its own folder under `output`.

    Example: tipl run --env-id HalfCheetah-v4 --num-trials 32 --total-timesteps 300000 --output runs/cheetah
    """

    output: PathArg
    """The run's folder. It must not exist yet, or hold this same run unfinished, which then goes on."""
    env_id: str = "InvertedPendulum-v5"
    """A Gymnasium id with continuous or Discrete actions."""
    env_kwargs: EnvKwargsArg = None
    """Arguments for the environment, such as '{"ctrl_cost_weight": 0.05}'. With any, the environment is Gymnasium's
    own, which is slower."""
    num_trials: int = 48
    """PPO runs, each with its own initial weights and seeds."""
    total_timesteps: int = 100_000
    """Env steps for each trial."""
    seed: int = 0
    """The seed from which those of all trials derive; --train.seed chooses the split, --evaluate.seed the episodes."""
    shared_init: bool = False
    """Start all trials from the same weights (the paper's setting)."""
    num_threads: int | None = None
    """Cores to use, by default all; with --ray the cores of each worker, by default one."""
    ray: RayArg = None
    """Spread the work over the Ray cluster at this address; "local" starts a cluster on this machine."""
    resume: bool = False
    """Also go on in the folder of a run that is finished or was made by an older tipl, and make what is missing."""
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)

    def run(self) -> None:
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        settings["env_kwargs"] = env_kwargs_of("run", self.env_kwargs)
        tipl.pipeline.run(**settings, on_stage=partial(print_stage, tables=True))
        seconds = StageSeconds(self.output / "seconds.json").read()
        parts = ", ".join(f"{stage} {value:,.0f}" for stage, value in seconds.items())
        print(f"{'seconds':<10} {parts}: {sum(seconds.values()):,.0f} in all")


@dataclasses.dataclass(frozen=True)
class Demo:
    """See the whole thing in minutes: `run` on InvertedPendulum-v5 with settings that fit two cores."""

    output: PathArg = Path("runs/demo")
    resume: bool = False
    """Keep the stages that an earlier demo has finished."""

    def run(self) -> None:
        Run(
            self.output,
            env_id="InvertedPendulum-v5",
            num_trials=224,
            total_timesteps=50 * 512,
            resume=self.resume,
            ppo=PPOConfig(num_steps=512, num_minibatches=8),
            train=TrainConfig(heldout_fraction=0.12, confidence_trials=16),
            evaluate=EvaluateConfig(num_episodes=2),
        ).run()


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Repeat the paper's experiment and go past it: InvertedPendulum-v4 and HalfCheetah-v4, three regimes, one page.

    The regimes are independent initialisations, one shared initialisation, and the in-sample fit (arXiv 2503.04074). If
    it is interrupted, the same command goes on.

    Example: tipl reproduce --output runs/reproduction

    Example: tipl reproduce --stores HalfCheetah-v4=runs/cheetah/store.zarr --output runs/reproduction
    """

    output: PathArg = Path("runs/reproduction")
    stores: Annotated[tuple[str, ...], arg(metavar="ENV=PATH")] = ()
    """Complete stores of independently initialised trials, to use instead of collecting."""
    num_threads: int | None = None
    """Cores to use; by default all."""

    def run(self) -> None:
        from tipl.reproduction import experiments

        stores = {}
        for given in self.stores:
            env_id, _, path = given.partition("=")
            if not (env_id and path):
                raise ValueError(f"reproduce: --stores expects ENV=PATH, such as HalfCheetah-v4=c.zarr, got {given!r}")
            stores[env_id] = path

        page = tipl.reproduce(self.output, stores=stores, num_threads=self.num_threads, on_stage=print_stage)
        for it in experiments(self.output):
            print(f"\n{it.env_id}, {it.regime.name}: {end_of_path_table(it.folder.results)}")
        print(f"\nreport     {page}")
