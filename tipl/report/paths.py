"""A store in one picture: how its trials learned, and the shape of their paths through weight space.

A path is theta_t - theta_0; its directions and coordinates are those of its own singular value decomposition. Temporal
SVD (Tang et al. 2023, arXiv 2303.01391) asks how many directions explain a path, and how straight it is in each.

Shapes  T checkpoints of a trial, K = T - 1 directions, N trials.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from tipl.progress import progress_bar
from tipl.report.drawing import NBSP, THEME, Mark, Panel, Plot, short_count
from tipl.report.plot_file import plot_path, write_plot
from tipl.report.results import FloatArray
from tipl.report.run_plots import MAX_CURVES
from tipl.storing.store import Store, Trial
from tipl.subspace.running_gram import gram

SHARES = (0.9, 0.95, 0.99)
"""Shares of a path's energy; the figure shows how many directions explain each share."""
MAX_CHECKPOINTS = 1024
"""A longer path is thinned to every n-th checkpoint; detours within n checkpoints are then missed."""
MAX_BYTES = 1 << 30  # most memory for float32 weights

_NUM_DETOURS = 16  # number of directions whose detour ratio is shown
_NOISE = 1e-6  # singular values below this share of the first are rounding errors of float32 weights


@dataclasses.dataclass(frozen=True)
class PathSpectrum:
    """The singular value decomposition of one path theta_t - theta_0. A path that does not move has no directions."""

    singular_values: FloatArray
    """(K,), descending; the sum of their squares is the path's energy, the sum of |theta_t - theta_0|^2."""
    coordinates: FloatArray
    """The path's coordinates on its first directions, (T, k), without directions that are rounding errors."""

    @property
    def explained(self) -> FloatArray:
        """Share of the energy in the first 1, 2, ... K directions, (K,)."""
        energy = np.cumsum(self.singular_values**2)
        return np.asarray(energy / energy[-1:])

    def dimensionality(self, share: float) -> int:
        """Return the least number of directions with at least this share, in (0, 1], of the energy."""
        if not 0.0 < share <= 1.0:
            raise ValueError(f"dimensionality: share must lie in (0, 1], got {share}")
        return int(np.searchsorted(self.explained, share)) + 1 if len(self.singular_values) else 0

    @property
    def detour_ratios(self) -> FloatArray:
        """Path length in each coordinate over its net displacement, (k,): 1 if it never turns, inf if it returns."""
        length = np.abs(np.diff(self.coordinates, axis=0)).sum(0)
        displacement = np.abs(self.coordinates[-1] - self.coordinates[0])
        ratios = np.full(len(length), np.inf)
        return np.asarray(np.divide(length, displacement, out=ratios, where=displacement > 0))


def path_spectrum(trial: Trial, n_components: int = _NUM_DETOURS) -> PathSpectrum:
    """Return the spectrum of a trial's path, and its coordinates on the first `n_components` directions.

    Exact, from the Gram matrix of the checkpoints in float64. Paths of more than MAX_CHECKPOINTS checkpoints, or
    MAX_BYTES of weights, are thinned to every n-th checkpoint. Raises RuntimeError where the trial is damaged,
    ValueError where it has no checkpoint.
    """
    weights = np.concatenate([trial.weights(t, t + 1) for t in range(0, trial.num_checkpoints, _stride(trial))])
    path_gram = gram(weights, origin=weights[0])  # (T, T)
    squares, left = np.linalg.eigh(path_gram)  # ascending
    squares, left = np.maximum(squares[:0:-1], 0.0), left[:, :0:-1]  # theta_0 - theta_0 adds no direction
    if not squares.any():
        return PathSpectrum(np.zeros(0), np.zeros((len(weights), 0)))
    singular_values = np.sqrt(squares)
    k = int(np.sum(singular_values[:n_components] > _NOISE * singular_values[0]))
    return PathSpectrum(singular_values, path_gram @ left[:, :k] / singular_values[:k])  # D V = D D^T U / S


def _stride(trial: Trial) -> int:
    kept = max(2, min(MAX_CHECKPOINTS, MAX_BYTES // trial.weights(0, 1).nbytes))
    return -(-trial.num_checkpoints // kept)


def plot_store(store: Store, path: str | Path, *, overwrite: bool = False, progress: bool = True) -> None:
    """Draw learning curves, dimensionality and detour ratios of a store's trials into `path`, an .svg or .png file.

    The file is written whole or not at all, and its bytes depend on the store alone.

    Raises ValueError for another suffix or where no trial has moved yet, FileExistsError where `path` exists and
    `overwrite` is not set, RuntimeError where a trial is damaged.
    """
    path = plot_path("plot_store", path, overwrite=overwrite)
    trials = [trial for i in range(store.num_trials) if (trial := store.trial(i)).num_checkpoints]
    with progress_bar(progress) as bar:
        task = bar.add_task("spectra of paths", total=len(trials), note="")
        spectra = []
        for trial in trials:
            spectra.append(path_spectrum(trial))
            bar.advance(task)
    moved = [spectrum for spectrum in spectra if len(spectrum.singular_values)]
    write_plot(store_plot(store.env_id, trials, moved), path)


def store_plot(env_id: str, trials: Sequence[Trial], spectra: Sequence[PathSpectrum]) -> Plot:
    """Return the figure of `plot_store`. Raises ValueError where there is no spectrum to draw."""
    if not spectra:
        raise ValueError("plot_store: no trial has moved from its first checkpoint yet: there is no path to draw")
    env_steps = max((trial.env_steps for trial in trials), key=len)
    env_steps = env_steps[:: -(-len(env_steps) // MAX_CHECKPOINTS)]
    returns = np.stack([_returns_at(env_steps, trial) for trial in trials])
    explained = _rows([spectrum.explained for spectrum in spectra])
    detours = _rows([spectrum.detour_ratios[:_NUM_DETOURS] for spectrum in spectra])
    detours[np.isinf(detours)] = np.nan  # coordinates that end where they began cannot be drawn
    dimensionalities = [[spectrum.dimensionality(share) for spectrum in spectra] for share in SHARES]

    def learning(ax: Axes) -> None:
        _draw_trials(ax, env_steps, returns)
        ax.set_xlim(0, max(1.0, float(env_steps[-1])))
        ax.xaxis.set_major_locator(MaxNLocator(6))
        ax.xaxis.set_major_formatter(FuncFormatter(short_count))
        ax.set(xlabel="environment steps", ylabel="episodic return in training")

    def energy(ax: Axes) -> None:
        _draw_trials(ax, np.arange(1, explained.shape[1] + 1), explained)
        for share in SHARES:
            ax.axhline(share, color=THEME["muted"][0], linewidth=0.8, linestyle=":", zorder=1)
        lowest = float(explained[:, 0].min())
        ax.set(xscale="log", xlabel="number of directions, k", ylabel="share of the path's energy")
        ax.set_ylim(min(lowest, SHARES[0]) - 0.01, 1.002)
        _plain_ticks(ax, "x")

    def dimensionality(ax: Axes) -> None:
        for y, counts in enumerate(dimensionalities):
            k, trials_at_k = np.unique(counts, return_counts=True)
            ax.scatter(k, np.full(len(k), y), s=240 * trials_at_k / len(spectra), color=THEME["faint"][0], linewidths=0)
            median = float(np.median(counts))
            ax.plot([median], [y], marker="|", markersize=22, markeredgewidth=2.2, color=THEME["ink"][0])
            ax.annotate(f"{median:g}", (median, y), xytext=(0, 15), textcoords="offset points", ha="center")
        ax.set(xscale="log", xlabel="directions needed (median marked)", ylim=(-0.5, len(SHARES) - 0.3))
        ax.set_yticks(range(len(SHARES)), [f"{100 * share:g}{NBSP}%" for share in SHARES])
        _plain_ticks(ax, "x")

    def detour(ax: Axes) -> None:
        _draw_trials(ax, np.arange(1, detours.shape[1] + 1), detours)
        ax.set(yscale="log", xlabel="direction", ylabel="length / net displacement")
        ax.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 4, 10], integer=True))
        _plain_ticks(ax, "y")

    panels = (
        Panel(f"{env_id}: learning curves", learning),
        Panel("Detour ratio of each direction", detour),
        Panel("Energy explained by k directions", energy),
        Panel("Dimensionality by explained energy", dimensionality),
    )
    median = Mark(f"median of {len(trials)} trials, band: the middle half", "ink", 2.2)
    return Plot("store", panels, (median, Mark("each trial", "faint", 0.9)))


def _returns_at(env_steps: NDArray[np.int64], trial: Trial) -> FloatArray:
    """Return the trial's returns interpolated at `env_steps` (T,); NaN before the first and after the last known."""
    returns = trial.episodic_return
    known = ~np.isnan(returns)
    if not known.any():
        return np.full(len(env_steps), np.nan)
    return np.interp(env_steps, trial.env_steps[known], returns[known], left=np.nan, right=np.nan)


def _rows(curves: Sequence[NDArray[np.float64]]) -> FloatArray:
    """Return curves of any lengths as the rows of one array, NaN after their ends."""
    rows = np.full((len(curves), max(len(curve) for curve in curves)), np.nan)
    for row, curve in zip(rows, curves, strict=True):
        row[: len(curve)] = curve
    return rows


def quartiles(curves: FloatArray) -> FloatArray:
    """Return the lower quartile, median and upper quartile (3, T) of the known values (not NaN) of curves (N, T)."""
    out = np.full((3, curves.shape[1]), np.nan)
    for t, column in enumerate(curves.T):
        known = column[~np.isnan(column)]
        if len(known):
            out[:, t] = np.quantile(known, (0.25, 0.5, 0.75))
    return out


def _draw_trials(ax: Axes, x: NDArray[np.generic], curves: FloatArray) -> None:
    """Draw curves (N, T) as thin lines, and their median and quartiles over them."""
    lines = [np.column_stack([x, curve])[~np.isnan(curve)] for curve in curves[:MAX_CURVES]]
    ax.add_collection(LineCollection(lines, colors=THEME["faint"][0], linewidths=0.7, alpha=0.6, zorder=2))
    low, center, high = quartiles(curves)
    ax.fill_between(x, low, high, color=THEME["ink"][0], alpha=0.2, linewidth=0, zorder=3)
    ax.plot(x, center, color=THEME["ink"][0], linewidth=2.2, zorder=4)
    ax.autoscale_view()


def _plain_ticks(ax: Axes, name: Literal["x", "y"]) -> None:
    """Label a logarithmic axis 1, 2, 4, ... in plain numbers."""
    axis = ax.xaxis if name == "x" else ax.yaxis
    axis.set_major_locator(LogLocator(2.0))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
