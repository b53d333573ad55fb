"""Do runs that jump, or train otherwise, train faster than plain ones? Ledgers of the same seeds, compared.

Shapes  N runs, T iterations, R resamples. All intervals are 95 % bootstraps over runs, paired: the same resamples of
seeds for every arm.
"""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from tipl.jumping.ledger import Ledger
from tipl.report.drawing import Mark, Panel, Plot, short_count
from tipl.report.intervals import Bootstrap, Estimate
from tipl.report.plot_file import plot_path, write_plot
from tipl.report.results import FloatArray

LAST = 5
"""Iterations whose mean is a run's final return."""
COLORS = (
    *("persistence", "linear", "rank1", "mean_path", "ridge", "nearest_path", "quadratic", "autoregression"),
    *("nowcaster", "shared_floor"),
)
"""Of arms in their order, but for TIPL's, which differ in their dashes."""
DASHES: tuple[tuple[float, ...], ...] = ((), (4.0, 1.5), (1.5, 1.5))


@dataclasses.dataclass(frozen=True)
class Arm:
    """How runs did beside plain ones. A number of env steps is infinite where the return is never reached."""

    steps: Estimate
    """Share of the plain runs' env steps after which the mean return reaches their final return."""
    final_return: float
    """Mean over the last LAST iterations and all runs."""
    gain: Estimate
    """Final return less the plain runs'."""
    mean_return: float
    """Mean over all iterations and runs, which is what the area under the curve says."""
    improvement: float
    """Probability that a run's mean return is higher than that of a plain run (Agarwal et al. 2021)."""


def compare(ledgers: Mapping[str, Ledger], plain: str) -> dict[str, Arm]:
    """Return how each arm did beside the arm `plain`, by name.

    Raises ValueError where they are not of one task, the same seeds and equally many env steps, in iterations of which
    the longest are a multiple of all others.
    """
    curves = curves_of(ledgers)
    base, means = curves[plain], _resampled_means(curves)
    targets = means[plain][:, -LAST:].mean(1)
    arms = {}
    for name, it in curves.items():
        areas, others = it.mean(1), base.mean(1)
        higher = (areas[:, None] > others).mean() + 0.5 * (areas[:, None] == others).mean()
        arms[name] = Arm(
            steps=_estimate(crossing(means[name], targets) / it.shape[1]),
            final_return=float(means[name][0, -LAST:].mean()),
            gain=_estimate(means[name][:, -LAST:].mean(1) - targets),
            mean_return=float(it.mean()),
            improvement=float(higher),
        )
    return arms


def ratios_of_steps(ledgers: Mapping[str, Ledger], plain: str, other: str) -> dict[str, Estimate]:
    """Return for each arm after how many env steps it reaches the final return of `plain`, over after how many `other`
    does. Raises what `compare` does."""
    means = _resampled_means(curves_of(ledgers))
    targets = means[plain][:, -LAST:].mean(1)
    steps = {name: crossing(it, targets) for name, it in means.items()}
    never = np.full(len(targets), math.inf)
    return {
        name: _estimate(np.divide(mine, steps[other], out=never.copy(), where=np.isfinite(mine)))
        for name, mine in steps.items()
    }


def _resampled_means(curves: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Return each arm's mean curve over all runs, and below it those over resamples of the runs, (1 + R, T)."""
    bootstrap = Bootstrap(len(next(iter(curves.values()))))
    return {name: np.vstack([it.mean(0), bootstrap.means(it)]) for name, it in curves.items()}


def curves_of(ledgers: Mapping[str, Ledger]) -> dict[str, FloatArray]:
    """Return the learning curves (N, T) of each arm; 0 where no episode has ended yet. Raises what `compare` does.

    T are the iterations of the arm with the longest ones, `coarsest_steps` env steps each; shorter ones are averaged.
    """
    first, steps = next(iter(ledgers)), coarsest_steps(ledgers)
    length = len(ledgers[first].returns) * ledgers[first].steps_per_iteration
    curves = {}
    for name, it in ledgers.items():
        for what in ("env_id", "env_kwargs", "seeds"):
            if getattr(it, what) != getattr(ledgers[first], what):
                raise ValueError(
                    f"compare: {name} must have the same {what} as {first}, "
                    f"{getattr(ledgers[first], what)!r:.60}, got {getattr(it, what)!r:.60}"
                )
        if len(it.returns) * it.steps_per_iteration != length:
            raise ValueError(
                f"compare: {name} must have {length:,} env steps a run, as {first}, "
                f"got {len(it.returns) * it.steps_per_iteration:,}"
            )
        if steps % it.steps_per_iteration or length % steps:
            raise ValueError(
                f"compare: {name} must have iterations that divide {steps} env steps, got {it.steps_per_iteration}"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a mean of nothing, which is NaN
            means = np.nanmean(it.curves().reshape(len(it.seeds), length // steps, -1), axis=2)
        curves[name] = np.nan_to_num(means, nan=0.0)
    return curves


def coarsest_steps(ledgers: Mapping[str, Ledger]) -> int:
    """Return the env steps of an iteration in the arm with the longest iterations."""
    return max(it.steps_per_iteration for it in ledgers.values())


def crossing(means: FloatArray, targets: FloatArray) -> FloatArray:
    """Return after how many iterations mean curves (R, T) reach their targets (R,), inf where they never do."""
    reached = means >= targets[:, None]
    return np.where(reached.any(1), reached.argmax(1) + 1.0, math.inf)


def _estimate(values: FloatArray) -> Estimate:
    """Return the first value with the interval of the others, which may be infinite."""
    low, high = np.quantile(np.where(np.isnan(values[1:]), math.inf, values[1:]), [0.025, 0.975], method="nearest")
    return Estimate(float(values[0]), float(low), float(high))


def plot_ledgers(ledgers: Mapping[str, Ledger], path: str | Path, *, overwrite: bool = False) -> None:
    """Draw the learning curves of arms with their intervals into `path`, an .svg or .png file.

    Raises ValueError for another suffix and what `compare` raises, FileExistsError where `path` exists and `overwrite`
    is not set.
    """
    path = plot_path("plot_ledgers", path, overwrite=overwrite)
    write_plot(ledger_plot([ledgers]), path)


def ledger_plot(tasks: list[Mapping[str, Ledger]], arms: Iterable[str] = ()) -> Plot:
    """Return a figure with a panel for each task.

    `arms` names the arms of several figures, so that each has the same colour in all of them.
    """
    names = list(dict.fromkeys(name for ledgers in tasks for name in ledgers))
    every = list(dict.fromkeys([*arms, *names]))
    colors, dashes = itertools.cycle(COLORS), itertools.cycle(DASHES)
    looks = {
        name: Mark(name, "tipl", dashes=next(dashes)) if name.startswith("TIPL") else Mark(name, next(colors))
        for name in every
    }
    marks = {name: looks[name] for name in names}

    def draw(ax: Axes, ledgers: Mapping[str, Ledger]) -> None:
        steps = coarsest_steps(ledgers)
        for name, it in curves_of(ledgers).items():
            x = steps * np.arange(1, it.shape[1] + 1)
            low, high = np.quantile(Bootstrap(len(it)).means(it), [0.025, 0.975], axis=0)
            ax.fill_between(x, low, high, color=marks[name].rgb, alpha=0.15, linewidth=0)
            marks[name].line(ax, x, it.mean(0))
        ax.xaxis.set_major_formatter(lambda value, _: short_count(value))
        ax.set(xlabel="env steps of a run, undone ones included", ylabel="mean return in training")

    panels = tuple(
        Panel(next(iter(it.values())).env_id, lambda ax, it=it: draw(ax, it))  # type: ignore[misc]
        for it in tasks
    )
    return Plot("train_faster", panels, tuple(marks.values()), columns=1, panel_inches=(8.0, 4.2))
