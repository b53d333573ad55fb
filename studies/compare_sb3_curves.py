"""Does tipl's population PPO learn like Stable-Baselines3's PPO? Learning curves of both, defined in the same way.

    python studies/compare_sb3_curves.py                             # hours of SB3; continues where it was stopped
    python studies/compare_sb3_curves.py --env-ids Hopper-v5 --num-sb3 5 --output curves
    python studies/compare_sb3_curves.py --normalize --env-ids HalfCheetah-v5 Hopper-v5 --total-timesteps 102400 \
        --output docs/figures/learning_curves_normalized

A point of a curve is the mean return of the training episodes (with stochastic actions) that ended in one window of
steps, with rewards as the environment gives them. Both use SB3's default hyperparameters; SB3 runs with one thread per
process. With --normalize both also normalise observations and rewards, SB3 with VecNormalize. The figure shows the
interquartile mean (IQM) over runs with the 95 % interval of a percentile bootstrap, as Agarwal et al. 2021 (arXiv
2108.13264) recommend.

Writes all runs' curves to OUTPUT.json and the figure to OUTPUT.svg, and prints where the intervals do not overlap.
Needs stable-baselines3.
"""

import dataclasses
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from study import write_record

from tipl.collecting.envs import make_vec
from tipl.collecting.population import Population
from tipl.collecting.ppo_config import PPOConfig
from tipl.progress import progress_bar
from tipl.report.intervals import Bootstrap

Curves = NDArray[np.float64]  # (runs, windows), NaN where no episode ended


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compare learning curves of Stable-Baselines3's PPO and ours."""

    env_ids: tuple[str, ...] = ("InvertedPendulum-v5", "Hopper-v5", "HalfCheetah-v5")
    total_timesteps: int = 300_000
    """Environment steps of each run, rounded up to whole windows."""
    num_sb3: int = 10
    """Runs of Stable-Baselines3, with seeds 0, 1, ..."""
    num_trials: int = 32
    """Our trials, with seeds 0, 1, ..."""
    window: int = 5
    """PPO iterations (of 2048 steps) between two points of a curve."""
    normalize: bool = False
    """Normalise observations and rewards on both sides."""
    num_processes: int = 2
    """SB3 runs at a time, and threads of ours."""
    output: Path = Path("docs/figures/learning_curves")
    """Files, without .json and .svg."""

    @property
    def num_windows(self) -> int:
        return math.ceil(self.total_timesteps / self.window_steps)

    @property
    def window_steps(self) -> int:
        return self.window * self.ppo.num_steps

    @property
    def ppo(self) -> PPOConfig:
        return PPOConfig(normalize_observations=self.normalize, normalize_rewards=self.normalize)


class Record:
    """The curves so far, in one JSON file: env_id -> {"sb3": {seed: curve}, "tipl": {seed: curve}}."""

    def __init__(self, settings: Settings) -> None:
        self.path = settings.output.with_suffix(".json")
        fixed: dict[str, Any] = {"total_timesteps": settings.total_timesteps, "window": settings.window}
        if settings.normalize:
            fixed["normalize"] = True
        packages = ("stable-baselines3", "gymnasium", "mujoco", "torch", "numpy")
        self.content: dict[str, Any] = {"settings": fixed, "versions": {name: version(name) for name in packages}}
        if self.path.exists():
            self.content = json.loads(self.path.read_text())
            if self.content["settings"] != fixed:
                raise SystemExit(f"{self.path} holds curves of {self.content['settings']}: choose another --output")

    def missing(self, env_id: str, who: str, number: int) -> list[int]:
        """Return the seeds below `number` that have no curve."""
        there = self._runs(env_id, who)
        return [seed for seed in range(number) if str(seed) not in there]

    def add(self, env_id: str, who: str, seed: int, curve: Curves) -> None:
        self._runs(env_id, who)[str(seed)] = [None if math.isnan(x) else round(x, 3) for x in curve.tolist()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_record(self.path, self.content)

    def curves(self, env_id: str, who: str) -> Curves:
        """Return the curves (runs, windows)."""
        return np.array(list(self._runs(env_id, who).values()), float)  # None -> NaN

    def _runs(self, env_id: str, who: str) -> dict[str, Any]:
        runs: dict[str, Any] = self.content.setdefault("curves", {}).setdefault(env_id, {}).setdefault(who, {})
        return runs


def sb3_curve(settings: Settings, env_id: str, seed: int) -> Curves:
    """Return one SB3 run's curve (windows,); meant for a process of its own."""
    torch.set_num_threads(1)
    from stable_baselines3 import PPO as SB3PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    returns: list[list[float]] = [[] for _ in range(settings.num_windows)]

    class Episodes(BaseCallback):
        def _on_step(self) -> bool:
            for info in self.locals["infos"]:
                if "episode" in info:
                    returns[(self.num_timesteps - 1) // settings.window_steps].append(info["episode"]["r"])
            return True

    env = make_vec_env(env_id, seed=seed)  # whose Monitor sees rewards as they are
    model = SB3PPO("MlpPolicy", VecNormalize(env) if settings.normalize else env, seed=seed, device="cpu")
    model.learn(settings.num_windows * settings.window_steps, callback=Episodes())
    return np.array([np.mean(window) if window else np.nan for window in returns])


def our_curves(settings: Settings, env_id: str, seeds: list[int]) -> Curves:
    """Return the curves (trials, windows) of one population."""
    env = make_vec(env_id, len(seeds), seeds=seeds, num_threads=settings.num_processes)
    population = Population(env, settings.ppo, seeds, num_threads=settings.num_processes)
    curves = np.empty((len(seeds), settings.num_windows))
    with progress_bar(True) as bar:
        task = bar.add_task(f"{env_id}: tipl", total=settings.num_windows, note="")
        for window in range(settings.num_windows):
            total, count = np.zeros((2, len(seeds)))
            for _ in range(settings.window):
                stats = population.iterate()
                ended = stats.num_episodes > 0
                total[ended] += stats.episodic_return[ended] * stats.num_episodes[ended]
                count += stats.num_episodes
            curves[:, window] = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
            bar.advance(task)
    env.close()
    return curves


def collect(settings: Settings, record: Record) -> None:
    """Add the runs that the record lacks."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit the state of torch's threads
    for env_id in settings.env_ids:
        seeds = record.missing(env_id, "tipl", settings.num_trials)
        if seeds:
            for seed, curve in zip(seeds, our_curves(settings, env_id, seeds), strict=True):
                record.add(env_id, "tipl", seed, curve)
        seeds = record.missing(env_id, "sb3", settings.num_sb3)
        with ProcessPoolExecutor(settings.num_processes, context) as processes, progress_bar(True) as bar:
            task = bar.add_task(f"{env_id}: SB3", total=len(seeds), note="")
            runs = {processes.submit(sb3_curve, settings, env_id, seed): seed for seed in seeds}
            for run in as_completed(runs):
                record.add(env_id, "sb3", runs[run], run.result())
                bar.advance(task)


def compare(settings: Settings, record: Record) -> None:
    """Print each task's verdict, and draw the figure."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter

    steps = settings.window_steps * np.arange(1, settings.num_windows + 1)
    figure, axes = plt.subplots(
        1, len(settings.env_ids), figsize=(4 * len(settings.env_ids), 3.2), layout="constrained", squeeze=False
    )
    for env_id, ax in zip(settings.env_ids, axes[0], strict=True):
        sides = {}
        for who, name, colour in (("sb3", "Stable-Baselines3", "tab:gray"), ("tipl", "tipl", "tab:blue")):
            curves = record.curves(env_id, who)
            centre, low, high = sides[who] = Bootstrap(len(curves)).curve(curves, "iqm")
            ax.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
            ax.plot(steps, centre, color=colour, label=f"{name}, {len(curves)} runs")
        (theirs, their_low, their_high), (ours, our_low, our_high) = sides["sb3"], sides["tipl"]
        known = np.isfinite(theirs) & np.isfinite(ours)
        overlap = (our_low <= their_high) & (their_low <= our_high)
        print(
            f"{env_id}: intervals overlap in {np.sum(overlap[known])} of {np.sum(known)} windows; at the end SB3 "
            f"{theirs[-1]:.1f} [{their_low[-1]:.1f}, {their_high[-1]:.1f}], "
            f"tipl {ours[-1]:.1f} [{our_low[-1]:.1f}, {our_high[-1]:.1f}]"
        )
        for at in np.flatnonzero(known & ~overlap):
            print(
                f"  not at {steps[at]:,} steps: SB3 {theirs[at]:.1f} [{their_low[at]:.1f}, {their_high[at]:.1f}], "
                f"tipl {ours[at]:.1f} [{our_low[at]:.1f}, {our_high[at]:.1f}]"
            )
        ax.set(title=env_id, xlabel="environment steps")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.legend(frameon=False, fontsize="small")
    axes[0, 0].set_ylabel("training return: IQM, 95 %")
    path = settings.output.with_suffix(".svg")
    with plt.rc_context({"svg.hashsalt": "tipl", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(f"wrote {record.path} and {path}")


def main(settings: Settings) -> None:
    if find_spec("stable_baselines3") is None:
        raise SystemExit("compare_sb3_curves: stable-baselines3 is not installed (the extra `dev` has it)")
    record = Record(settings)
    collect(settings, record)
    compare(settings, record)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
