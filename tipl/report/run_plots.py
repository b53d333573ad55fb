"""The report's figures of runs: paths in coordinates, spectra, learning curves, and the forecaster's training."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from tipl.report.drawing import NBSP, THEME, Mark, Panel, Plot, note, short_count
from tipl.report.intervals import Bootstrap
from tipl.report.results import CoordinatePath, FloatArray, Training

COORDINATES_SHOWN = 3
MAX_CURVES = 128


def coordinates_plot(paths: Sequence[CoordinatePath]) -> Plot:
    """Return the first coordinates of held-out paths, true and forecast, one panel per (trial, prefix)."""
    truth, forecast = Mark("true path", "ink", 1.5), Mark("TIPL's forecast", "tipl", 2.4, (3.0, 1.2))

    def draw(ax: Axes, path: CoordinatePath) -> None:
        t = np.arange(len(path.true))
        shown = range(min(COORDINATES_SHOWN, path.true.shape[1]))
        for i in shown:
            truth.line(ax, t, path.true[:, i])
            forecast.line(ax, t[path.prefix_end :], path.forecast[path.prefix_end :, i], zorder=3)
        ax.axvline(path.prefix_end, color=THEME["faint"][0], linewidth=1.0, zorder=1)
        low, high = ax.get_ylim()
        ends = _apart(path.true[-1, : len(shown)].astype(float), 0.06 * (high - low))
        for i, y in enumerate(ends):
            ax.annotate(
                f"{i + 1}",
                (1.0, y),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        ax.set_xlim(0, len(path.true) - 1)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set(xlabel="checkpoint", ylabel="coordinate")

    def panel(path: CoordinatePath) -> Panel:
        return Panel(f"trial {path.trial}, prefix {path.percent}{NBSP}%", lambda ax: draw(ax, path))

    columns = max(2, len({path.percent for path in paths}))
    return Plot("coordinates", tuple(panel(path) for path in paths), (truth, forecast), columns)


def spectrum_plot(singular_values: Sequence[FloatArray], n_components: int | None) -> Plot:
    """Return the singular spectrum of each held-out path, and its error when projected on its first k directions."""

    def draw(ax: Axes, curves: Sequence[FloatArray], label: str, xlabel: str) -> None:
        length = min(len(curve) for curve in curves)
        x = np.arange(1, length + 1)
        for curve in curves:
            ax.plot(x, curve[:length], color=THEME["faint"][0], linewidth=0.9)
        ax.plot(x, np.median([curve[:length] for curve in curves], 0), color=THEME["ink"][0], linewidth=2.2)
        if n_components is not None and n_components <= length:
            ax.axvline(n_components, color=THEME["muted"][0], linewidth=1.0, linestyle=":")
            note(ax, f"dotted: k = {n_components}")
        ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=label)
        ax.xaxis.set_major_locator(LogLocator(2.0))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())

    spectra = [s / s[0] for s in singular_values]
    tails = [np.sqrt(np.maximum(0.0, 1 - np.cumsum(s**2) / np.sum(s**2)))[:-1] for s in singular_values]
    panels = (
        Panel("Singular values", lambda ax: draw(ax, spectra, "relative to the first", "direction")),
        Panel("Error with k directions", lambda ax: draw(ax, tails, "relative error", "number of directions, k")),
    )
    return Plot("spectrum", panels, (Mark("median path", "ink", 2.2), Mark("each held-out path", "faint", 0.9)))


def learning_plot(
    env_steps: NDArray[np.int64],
    returns: FloatArray,
    is_heldout: NDArray[np.bool_],
    prefixes: Sequence[float],
    bootstrap: Bootstrap,
) -> Plot:
    """Return the learning curves (n, T) of all trials against their env steps (T,), with the mean and its interval."""
    center, low, high = bootstrap.curve(returns)

    def draw(ax: Axes) -> None:
        for heldout, color in ((False, "faint"), (True, "muted")):
            curves = returns[is_heldout == heldout][:MAX_CURVES]
            lines = [np.column_stack([env_steps, curve])[np.isfinite(curve)] for curve in curves]
            ax.add_collection(LineCollection(lines, colors=THEME[color][0], linewidths=0.7, alpha=0.6, zorder=2))
        ax.fill_between(env_steps, low, high, color=THEME["ink"][0], alpha=0.2, linewidth=0, zorder=3)
        ax.plot(env_steps, center, color=THEME["ink"][0], linewidth=2.4, zorder=4)
        for prefix in prefixes:
            x = float(np.interp(prefix, np.linspace(0, 1, len(env_steps)), env_steps))
            ax.axvline(x, color=THEME["muted"][0], linewidth=0.8, linestyle=":", zorder=1)
        ax.autoscale_view()
        ax.set_xlim(0, float(env_steps[-1]))
        ax.xaxis.set_major_locator(MaxNLocator(6))
        ax.xaxis.set_major_formatter(FuncFormatter(short_count))
        ax.set(xlabel="environment steps", ylabel="episodic return in training")

    legend = (Mark("mean", "ink", 2.4), Mark("held-out trials", "muted", 0.9), Mark("other trials", "faint", 0.9))
    return Plot("learning_curves", (Panel("Learning curves", draw),), legend)


def training_plot(training: Training) -> Plot:
    """Return the forecaster's training and validation errors against optimiser steps."""
    train, validation = Mark("training (one step ahead, then rollouts)", "faint", 1.4), Mark("validation", "ink", 2.2)

    def draw(ax: Axes) -> None:
        train.line(ax, training.steps, training.train_loss)
        validation.line(ax, training.steps, training.validation_error)
        ax.axvline(training.best_step, color=THEME["muted"][0], linewidth=1.0, linestyle=":")
        note(ax, f"kept: step {training.best_step:,}")
        ax.set(xlabel="optimiser step", ylabel="relative error", ylim=(0, None))
        ax.xaxis.set_major_formatter(FuncFormatter(short_count))

    return Plot("training", (Panel("Training of the forecaster", draw),), (train, validation))


def _apart(positions: FloatArray, gap: float) -> FloatArray:
    """Return `positions` (n,) of labels, spread so that neighbours are at least `gap` apart, about the same mean."""
    order = np.argsort(positions)
    spread = positions[order].copy()
    for i in range(1, len(spread)):
        spread[i] = max(spread[i], spread[i - 1] + gap)
    spread -= np.mean(spread - positions[order])
    moved = np.empty_like(spread)
    moved[order] = spread
    return moved
