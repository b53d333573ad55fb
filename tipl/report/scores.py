"""Score every checkpoint of every run in the simulator: which one is a run's best, and is it better than its last?

Shapes  N trials, C checkpoints of each that are run, E episodes.

The checkpoint with the highest mean return of many is partly the one with the luckiest episodes. So it is run once more
beside the last checkpoint, both on the same new episodes, and only the difference on these says by how much it is
better.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from tipl.collecting.episodes import policy_to_run, run_episodes
from tipl.collecting.policy_network import can_sample
from tipl.files.publishing import refuse_existing
from tipl.files.sealed import save_json
from tipl.progress import progress_bar
from tipl.report.drawing import Mark, Panel, Plot, short_count
from tipl.report.intervals import Bootstrap, Estimate
from tipl.report.plot_file import plot_path, write_plot
from tipl.report.results import FloatArray
from tipl.storing.imported_runs import Rows, StoredRun
from tipl.storing.importer import write_store
from tipl.storing.store import UNKNOWN, Store

MAX_BYTES = 2**28  # of weights that are run together


@dataclasses.dataclass(frozen=True)
class BestCheckpoint:
    """The checkpoint of a trial with the highest mean return, beside the last one."""

    trial: int
    checkpoint: int
    """Its index in the path."""
    env_steps: int
    gain: Estimate
    """Its mean return less the last checkpoint's, on new episodes that both run: a mean over episodes and its 95 %
    interval; zero where the best checkpoint is the last."""

    @property
    def beats_last(self) -> bool:
        """Whether it returns more than the last checkpoint beyond chance."""
        return self.gain.low > 0.0


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the checkpoints of a store return."""

    env_id: str
    checkpoints: list[int]
    """The indices of the checkpoints that were run, (C,); the last is the path's last."""
    env_steps: NDArray[np.int64]
    """(N, C)"""
    returns: FloatArray
    """(N, C, E), each trial on E episodes of its own, the same for all its checkpoints; NaN for a policy that diverged:
    whose network gave numbers that are not finite."""
    best: list[BestCheckpoint]
    """One for each trial."""
    sampled: bool = False
    """Whether the policies were stochastic, as in training."""
    env_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of the environment."""

    @property
    def diverged(self) -> list[tuple[int, int]]:
        """Trial and checkpoint of each policy that diverged."""
        lost = np.isnan(self.returns).any(2)
        return [(int(i), self.checkpoints[at]) for i, at in np.argwhere(lost)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "env_id": self.env_id,
            "env_kwargs": dict(self.env_kwargs),
            "sampled": self.sampled,
            "checkpoints": self.checkpoints,
            "env_steps": self.env_steps.tolist(),
            "returns": [[[_number(it) for it in row] for row in trial] for trial in self.returns.tolist()],
            "best": [
                {
                    **{name: getattr(it, name) for name in ("trial", "checkpoint", "env_steps", "beats_last")},
                    **{name: _number(getattr(it.gain, name)) for name in ("value", "low", "high")},
                }
                for it in self.best
            ],
        }

    def save(self, path: Path) -> None:
        """Write the scores as JSON with a checksum to `path`, whole or not at all."""
        save_json(path, self.to_dict())

    def fill(self, store: Store, output: str | Path) -> Store:
        """Return a new store at `output`: `store`, with the mean returns of these scores where it has none.

        Imported runs have no returns; with these, reports and plots have learning curves. The new store's config says
        where they come from ("filled_returns"). Raises FileExistsError where `output` exists; ValueError where these
        scores are not of every checkpoint of this store.
        """
        output = Path(output)
        refuse_existing(output, "score")
        trials = [store.trial(i) for i in range(store.num_trials)]
        if store.env_id != self.env_id or [it.env_steps.tolist() for it in trials] != self.env_steps.tolist():
            raise ValueError(f"score: the scores are not of every checkpoint of the store {store.path}")
        made = {"by": "tipl score", "num_episodes": self.returns.shape[2], "sampled": self.sampled}
        runs = [StoredRun(store, trial) for trial in trials]

        def read(i: int, start: int, stop: int) -> Rows:
            weights, env_steps, known = runs[i].read(start, stop)
            return weights, env_steps, np.where(np.isnan(known), self.returns[i, start:stop].mean(1), known)

        return write_store(
            output,
            "score",
            [functools.partial(read, i) for i in range(store.num_trials)],
            store.num_checkpoints,
            env_id=store.env_id,
            env_kwargs=store.env_kwargs,
            policy=store.policy,
            seeds=[trial.seed for trial in trials],
            config=store.config | {"filled_returns": made},
        )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def score(
    store: Store,
    *,
    num_episodes: int = 5,
    every: int = 1,
    seed: int = 0,
    sampled: bool = False,
    env_kwargs: Mapping[str, Any] | None = None,
    num_threads: int | None = None,
    progress: bool = True,
) -> Scores:
    """Run the deterministic policies of all trials in the simulator, and find the best of each.

    Args:
        num_episodes: episodes of each checkpoint; the best and the last are run on four times as many new ones.
        every: take every n-th checkpoint, counted back from the last.
        seed: the episodes derive from it and from the trial's index.
        sampled: run the stochastic policies instead, as in training; what they draw follows from the episodes' seeds.
        env_kwargs: further arguments of the environment, such as {"ctrl_cost_weight": 0.05}, instead of the store's.
        num_threads: cores that step the simulator, by default all; results do not depend on it.

    A policy that diverged, whose network gives numbers that are not finite, is never the best; where the last one did,
    the gain over it is NaN. Raises ValueError where an argument is out of range, the simulator cannot run the policies
    as they were, or all of a trial diverged.
    """
    policy = policy_to_run("score", store)
    if store.env_id == UNKNOWN:
        raise ValueError(
            f"score: {store.path} does not know its environment: import the runs again with env_id (--env-id)"
        )
    for name, value in (("num_episodes", num_episodes), ("every", every)):
        if value < 1:
            raise ValueError(f"score: {name} must be at least 1, got {value}")
    if seed < 0:
        raise ValueError(f"score: seed must not be negative, got {seed}")
    if sampled and not can_sample(policy):
        raise ValueError(f"score: sampled needs policies with a distribution of their own, got {policy}")
    env_kwargs = dict(store.env_kwargs if env_kwargs is None else env_kwargs)
    last = store.num_checkpoints - 1
    if last < 0 or not store.num_trials:
        raise ValueError(f"score: {store.path} holds no checkpoint")
    checkpoints = list(range(last % every, last + 1, every))
    N, C = store.num_trials, len(checkpoints)
    seeds = [np.random.default_rng((seed, i)).integers(2**31, size=5 * num_episodes) for i in range(N)]
    at_once = max(1, MAX_BYTES // (4 * policy.num_params * C))
    returns, best = np.empty((N, C, num_episodes)), []
    with progress_bar(progress) as bar:
        simulate = functools.partial(run_episodes, store.env_id, policy, num_threads=num_threads, bar=bar)
        run = functools.partial(simulate, keep_diverged=True, sampled=sampled, env_kwargs=env_kwargs)
        for start in range(0, N, at_once):
            trials = range(start, min(start + at_once, N))
            rows = [store.trial(i).weights()[last % every :: every] for i in trials]
            episodes = np.repeat([seeds[i][:num_episodes] for i in trials], C, axis=0)
            returns[start : trials.stop] = run(np.concatenate(rows), episodes).returns.reshape(len(trials), C, -1)
            chosen = _best_of(returns[start : trials.stop], start)
            pairs = np.concatenate([weights[[at, -1]] for weights, at in zip(rows, chosen, strict=True)])
            fresh = np.repeat([seeds[i][num_episodes:] for i in trials], 2, axis=0)
            again = run(pairs, fresh).returns.reshape(len(trials), 2, -1)
            best += [
                BestCheckpoint(i, checkpoints[at], int(store.trial(i).env_steps[checkpoints[at]]), _gain(*both))
                for i, at, both in zip(trials, chosen, again, strict=True)
            ]
    env_steps = np.array([store.trial(i).env_steps[last % every :: every] for i in range(N)], np.int64)
    return Scores(store.env_id, checkpoints, env_steps, returns, best, sampled, env_kwargs)


def _best_of(returns: FloatArray, first: int) -> NDArray[np.intp]:
    """Return the index (N,) of each trial's best checkpoint by returns (N, C, E); `first` is the first trial's own."""
    means = returns.mean(2)
    lost = np.flatnonzero(np.isnan(means).all(1))
    if lost.size:
        raise ValueError(
            f"score: all policies of trial {first + lost[0]} give actions that are not finite: it diverged"
        )
    best: NDArray[np.intp] = np.nanargmax(means, 1)
    return best


def _gain(best: FloatArray, last: FloatArray) -> Estimate:
    """Return the mean of best - last over episodes (E,) and its interval, NaN where the last diverged."""
    if not (np.isfinite(best) & np.isfinite(last)).all():
        return Estimate(math.nan)
    return Bootstrap(len(best)).estimate(best - last)


def plot_scores(scores: Scores, path: str | Path, *, overwrite: bool = False) -> None:
    """Draw what each checkpoint returns, a line for each trial and their mean, into `path`, an .svg or .png file.

    Raises ValueError for another suffix, FileExistsError where `path` exists and `overwrite` is not set.
    """
    path = plot_path("plot_scores", path, overwrite=overwrite)
    runs, mean = Mark("each run", "faint"), Mark("mean", "tipl")

    def draw(ax: Axes) -> None:
        means = scores.returns.mean(2)
        ax.plot(scores.env_steps.T, means.T, color=runs.rgb, linewidth=0.8)
        ax.plot(scores.env_steps.mean(0), means.mean(0), color=mean.rgb, linewidth=2.0)
        ax.xaxis.set_major_formatter(lambda value, _: short_count(value))
        ax.set(xlabel="env steps", ylabel=f"return of the {'stochastic' if scores.sampled else 'deterministic'} policy")

    write_plot(Plot("scores", (Panel(scores.env_id, draw),), (runs, mean), columns=1, panel_inches=(8.0, 4.2)), path)
