"""Does our population PPO learn as Stable-Baselines3's PPO does? Learning curves of both on one task, same definition.

    python bench/compare_sb3_curves.py                                # HalfCheetah-v5, 5 SB3 seeds, 8 of our trials
    python bench/compare_sb3_curves.py --env-id Hopper-v5 --total-timesteps 300000

A curve's point is the mean return of the training episodes (stochastic actions) that ended in one window of steps. SB3
runs with its defaults, one thread a process. Writes curves.json and curves.png. Needs stable-baselines3.
"""

import dataclasses
import json
import math
import multiprocessing
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from tipl.envs import make_vec
from tipl.ppo import Population, PPOConfig

Curves = NDArray[np.float64]  # (runs, windows), NaN where no episode ended
PPO = PPOConfig()


@dataclasses.dataclass(frozen=True)
class Settings:
    """Compare learning curves of Stable-Baselines3's PPO and ours."""

    env_id: str = "HalfCheetah-v5"
    total_timesteps: int = 100_000
    """Environment steps of each run, rounded up to whole windows."""
    num_sb3: int = 5
    """Runs of Stable-Baselines3, with seeds 0, 1, ..."""
    num_trials: int = 8
    """Our trials, with seeds 0, 1, ..."""
    window: int = 5
    """PPO iterations (of 2048 steps) between two points of a curve."""
    num_processes: int = 2
    """SB3 runs at a time, and threads of ours."""
    output: Annotated[Path, tyro.conf.arg(help_behavior_hint="(default: runs/compare_sb3_curves/ENV_ID)")] = Path()
    """Folder for curves.json and curves.png."""

    @property
    def num_windows(self) -> int:
        return math.ceil(self.total_timesteps / self.window_steps)

    @property
    def window_steps(self) -> int:
        return self.window * PPO.num_steps


def sb3_curve(settings: Settings, seed: int) -> Curves:
    """Return one SB3 run's curve (windows,); meant for a process of its own."""
    torch.set_num_threads(1)
    from stable_baselines3 import PPO as SB3PPO
    from stable_baselines3.common.callbacks import BaseCallback

    returns: list[list[float]] = [[] for _ in range(settings.num_windows)]

    class Episodes(BaseCallback):
        def _on_step(self) -> bool:
            for info in self.locals["infos"]:
                if "episode" in info:
                    returns[(self.num_timesteps - 1) // settings.window_steps].append(info["episode"]["r"])
            return True

    model = SB3PPO("MlpPolicy", settings.env_id, seed=seed, device="cpu")
    model.learn(settings.num_windows * settings.window_steps, callback=Episodes())
    return np.array([np.mean(window) if window else np.nan for window in returns])


def our_curves(settings: Settings) -> Curves:
    """Return the curves (trials, windows) of one population."""
    torch.set_num_threads(settings.num_processes)
    seeds = range(settings.num_trials)
    env = make_vec(settings.env_id, settings.num_trials, seeds=seeds, num_threads=settings.num_processes)
    population = Population(env, PPO, seeds)
    curves = []
    for _ in range(settings.num_windows):
        total, count = np.zeros((2, settings.num_trials))
        for _ in range(settings.window):
            stats = population.iterate()
            ended = stats.num_episodes > 0
            total[ended] += stats.episodic_return[ended] * stats.num_episodes[ended]
            count += stats.num_episodes
        curves.append(np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0))
    env.close()
    return np.stack(curves, 1)


def summary(curves: Curves) -> list[dict[str, float | None]]:
    """Return mean, min, max and IQM over the runs for each window; None where no episode ended."""
    rows: list[dict[str, float | None]] = []
    for column in curves.T:
        known = np.sort(column[~np.isnan(column)])
        cut = len(known) // 4
        judges = {"mean": np.mean, "min": np.min, "max": np.max, "iqm": lambda x, c=cut: x[c : len(x) - c].mean()}
        rows.append({name: float(judge(known)) if len(known) else None for name, judge in judges.items()})
    return rows


def compare(steps: NDArray[np.int64], sb3: Curves, ours: Curves) -> list[dict[str, Any]]:
    """Print a line a window and the verdict; return the lines."""
    names = ("mean", "min", "max", "iqm")
    print(" " * 9, "|", f"{'Stable-Baselines3':>39}", "|", f"{'tipl':>39}", "|")
    print(f"{'steps':>9}", "|", *(f"{name:>9}" for name in names), "|", *(f"{name:>9}" for name in names), "|")
    points: list[dict[str, Any]] = []
    for at, theirs, mine in zip(steps.tolist(), summary(sb3), summary(ours), strict=True):
        known = theirs["mean"] is not None and mine["mean"] is not None
        verdict = "no episode"
        if known:
            verdict = "above" if mine["mean"] > theirs["max"] else "below" if mine["mean"] < theirs["min"] else "within"
        points.append({"env_steps": at, "sb3": theirs, "tipl": mine, "verdict": verdict})
        cells = [" ".join(f"{math.nan if row[n] is None else row[n]:9.1f}" for n in names) for row in (theirs, mine)]
        print(f"{at:9d}", "|", " | ".join(cells), "|", verdict)
    count = Counter(point["verdict"] for point in points)
    print(f"tipl's mean against the range of SB3's runs: {', '.join(f'{n} {verdict}' for verdict, n in count.items())}")
    return points


def plot(settings: Settings, steps: NDArray[np.int64], curves: dict[str, Curves], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (name, runs), colour in zip(curves.items(), ("tab:gray", "tab:blue"), strict=True):
        rows = summary(runs)
        low, high, iqm = (np.array([row[key] for row in rows], float) for key in ("min", "max", "iqm"))  # None -> NaN
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(steps, iqm, color=colour, label=f"{name}, {len(runs)} runs: IQM and range")
        axes.plot(steps, runs.T, color=colour, alpha=0.3, linewidth=0.7)
    axes.set(title=settings.env_id, xlabel="environment steps", ylabel="mean return of training episodes")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(settings: Settings) -> None:
    if find_spec("stable_baselines3") is None:
        raise SystemExit("compare_sb3_curves: stable-baselines3 is not installed (the extra `dev` has it)")
    output = settings.output if settings.output != Path() else Path("runs/compare_sb3_curves") / settings.env_id
    output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    ours = our_curves(settings)
    middle = time.perf_counter()
    context = multiprocessing.get_context("spawn")  # a fork would inherit the state of torch's threads
    with ProcessPoolExecutor(settings.num_processes, context) as processes:
        sb3 = np.stack(list(processes.map(sb3_curve, [settings] * settings.num_sb3, range(settings.num_sb3))))
    seconds = {"tipl": middle - start, "sb3": time.perf_counter() - middle}
    steps = settings.window_steps * np.arange(1, settings.num_windows + 1)
    print(
        f"{settings.env_id}, training episodes' returns: {settings.num_sb3} runs of SB3, {settings.num_trials} of tipl"
    )
    points = compare(steps, sb3, ours)
    for name, curves in (("tipl", ours), ("sb3", sb3)):
        rate = len(curves) * steps[-1] / seconds[name]
        print(
            f"{name}: {seconds[name]:.0f} s, {rate:,.0f} env steps/s in {settings.num_processes} threads or processes"
        )
    record: dict[str, Any] = {
        "settings": dataclasses.asdict(settings) | {"output": str(output)},
        "versions": {name: version(name) for name in ("stable-baselines3", "gymnasium", "mujoco", "torch", "numpy")},
        "seconds": seconds,
        "points": points,
        "curves": {name: np.where(np.isnan(c), None, c).tolist() for name, c in (("tipl", ours), ("sb3", sb3))},
    }
    (output / "curves.json").write_text(json.dumps(record, indent=1))
    plot(settings, steps, {"Stable-Baselines3": sb3, "tipl": ours}, output / "curves.png")
    print(f"wrote {output}/curves.json and curves.png")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
