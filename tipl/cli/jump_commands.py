"""Commands that train runs which jump along forecasts of their own weights, and compare them with others."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tyro

import tipl
from tipl.cli.arguments import EnvKwargsArg, PathArg, env_kwargs_of
from tipl.collecting.ppo_config import PPOConfig
from tipl.jumping.jump_config import JumpConfig

if TYPE_CHECKING:
    from tipl.report.intervals import Estimate


@dataclasses.dataclass(frozen=True)
class Accelerate:
    """Train many PPO trials at once that jump along forecasts of their own weights, and undo jumps that do not hold.

    A jump replaces a trial's weights, after a few iterations, by a forecast of them. The trial's next two iterations
    test it: if their episodes return no more than the trial's trend leads to expect without a jump, the trial is put
    back bit for bit, and the iterations are lost and counted. With --jumps.max-jumps 0 the same trials train without
    jumps, for comparison. If it is interrupted, the same command goes on from there.

    Example: tipl accelerate --env-id InvertedPendulum-v5 --total-timesteps 25600 --ppo.num-steps 512
    --ppo.num-minibatches 8 --ppo.learning-rate 0.0024 --output runs/faster
    """

    output: PathArg
    """A folder for the trials' checkpoints (store.zarr) and their returns, jumps and env steps (ledger.json); must not
    exist."""
    env_id: str = "InvertedPendulum-v5"
    """A Gymnasium id with continuous or Discrete actions."""
    env_kwargs: EnvKwargsArg = None
    """Arguments for the environment, such as '{"ctrl_cost_weight": 0.05}'. With any, the environment is Gymnasium's
    own, which is slower."""
    num_trials: int = 32
    """PPO runs, each with its own initial weights and seeds."""
    total_timesteps: int = 100_000
    """Env steps for each trial, including those that jumps cost."""
    model: PathArg | None = None
    """The forecaster's folder, written by `tipl train`; by default the one that comes with tipl."""
    seed: int = 0
    """The seed from which those of all trials derive."""
    num_threads: int | None = None
    """Cores to use, by default all."""
    tensorboard: PathArg | None = None
    """A folder for TensorBoard curves of every trial and their mean; none by default."""
    jumps: JumpConfig = dataclasses.field(default_factory=JumpConfig)
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)

    def run(self) -> None:
        ledger = tipl.accelerate(
            self.output,
            env_id=self.env_id,
            env_kwargs=env_kwargs_of("accelerate", self.env_kwargs),
            num_trials=self.num_trials,
            total_timesteps=self.total_timesteps,
            model=self.model,
            jumps=self.jumps,
            seed=self.seed,
            ppo=self.ppo,
            num_threads=self.num_threads,
            tensorboard=self.tensorboard,
        )
        held = sum(jump.held is True for jump in ledger.jumps)
        undone = sum(jump.held is False for jump in ledger.jumps)
        steps = ledger.env_steps
        share = steps["undone"] / sum(steps.values())
        last = ledger.curves()[:, -1]
        print(f"output     {self.output}")
        print(f"jumps      {held} held, {undone} undone, which cost {share:.1%} of {sum(steps.values()):,} env steps")
        print(f"return     {np.nanmean(last):.1f}, mean of {len(last)} trials in the last iteration")


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare runs of `tipl accelerate`: after which share of the plain runs' env steps do others return as much?

    All must have the same seeds, so that runs are compared in pairs; brackets are 95 % bootstrap intervals over seeds.

    Example: tipl compare runs/faster/plain runs/faster/jumps --plot runs/faster/curves.svg
    """

    plain: tyro.conf.Positional[PathArg]
    """The output folder of the plain runs, with which the others are compared."""
    others: tyro.conf.Positional[tuple[PathArg, ...]]
    """The output folders of the other runs."""
    plot: PathArg | None = None
    """Draw the learning curves into this .svg or .png file."""
    overwrite: bool = False
    """Replace the plot if it exists."""

    def run(self) -> None:
        ledgers = {str(path): tipl.Ledger.load(_ledger_of(path)) for path in (self.plain, *self.others)}
        for name, arm in tipl.compare(ledgers, str(self.plain)).items():
            spent = ledgers[name].env_steps
            print(
                f"{name}: the plain runs' final return after {_shown(arm.steps, 2)} of their env steps; final return "
                f"{arm.final_return:.1f}, {_shown(arm.gain, 1)} more; {spent['undone'] / sum(spent.values()):.1%} of "
                "the steps undone"
            )
        if self.plot is not None:
            tipl.plot_ledgers(ledgers, self.plot, overwrite=self.overwrite)
            print(f"plot       {self.plot}")


def _ledger_of(path: Path) -> Path:
    from tipl.jumping.accelerate import LEDGER

    return path / LEDGER if path.is_dir() else path


def _shown(estimate: "Estimate", digits: int) -> str:
    """Return "value [low, high]", with "never" for infinity."""
    value, low, high = (
        "never" if math.isinf(it) else f"{it:.{digits}f}" for it in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"
