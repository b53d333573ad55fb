"""The report's figures of predictors: errors, gains and diversity against the horizon, one panel per prefix."""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from tipl.report.drawing import NBSP, PANEL_INCHES, THEME, Mark, Panel, Plot, note, percent
from tipl.report.intervals import Bootstrap, Estimate, Gain, Statistic, mean
from tipl.report.predictor_info import BASIS_FLOORS, PREDICTORS, predictor_info
from tipl.report.results import FloatArray, Results

Curve = tuple[FloatArray, FloatArray, FloatArray]  # mean, lower and upper bound (H,)


def predictor_marks(names: Sequence[str]) -> dict[str, Mark]:
    """Return the mark of each predictor; equal `names` give equal marks, so that all figures of a report agree."""
    markers = {  # only markers that `page.py` can draw; related predictors share one and differ in colour
        "tipl": "o",
        "tipl_gated": "o",
        "tipl_tuned": "^",
        "transformer": "o",
        "persistence": "s",
        "linear": "^",
        "quadratic": "^",
        "rank1": "D",
        "autoregression": "X",
        "mean_path": "v",
        "nearest_path": "v",
        "ridge": "P",
        "nowcaster": "D",
        "another_run": "X",
    }
    marks = {}
    unknown = 0
    for name in names:
        info = predictor_info(name)
        if name in PREDICTORS:
            color, marker = name, markers.get(name, "")
        else:
            color, marker = f"unknown-{unknown % 3}", "XP"[unknown // 3 % 2]
            unknown += 1
        dashes: tuple[float, ...] = ()
        if name == "basis_floor":
            dashes = (5.0, 2.5)
        elif name in BASIS_FLOORS:
            dashes = (7.0, 2.0, 1.5, 2.0)
        elif info.is_floor:
            dashes = (1.5, 2.0)
        marks[name] = Mark(info.label, color, {"tipl": 3.0, "persistence": 2.0}.get(name, 1.5), dashes, marker)
    return marks


def error_plot(
    name: str,
    results: Results,
    bootstrap: Bootstrap,
    measure: str,
    label: str,
    floors: Sequence[str],
    *,
    statistic: Statistic = "mean",
    is_log: bool = False,
) -> Plot:
    """Return the mean or IQM of `measure` against the horizon, one panel per prefix, floors dashed.

    Only TIPL, persistence and the floors have 95 % bands; bands of all predictors would hide each other.
    """
    marks = predictor_marks(results.names)
    shown = [n for n in results.names if n in floors or n in results.predictors]
    shown = [n for n in shown if results.has_values(measure, n)]
    main = [n for n in shown if n in ("tipl", "persistence", *floors)]
    bands = {f: {n: bootstrap.curve(results.values(measure, f, n), statistic) for n in shown} for f in results.prefixes}

    def draw(ax: Axes, prefix: float) -> None:
        curves, x = bands[prefix], results.horizons[prefix]
        for rank, n in enumerate(reversed(shown)):  # TIPL last, on top
            center, low, high = curves[n]
            marks[n].line(ax, x, center, zorder=3 + rank)
            if n in main:
                alpha = 0.2 if n == "tipl" else 0.1
                ax.fill_between(x, low, high, color=marks[n].rgb, alpha=alpha, linewidth=0, zorder=2)
        bottom = None if is_log else 0.0
        _frame(ax, [(marks[n].label, curves[n]) for n in shown], [curves[n] for n in main], bottom, is_log=is_log)
        _horizon_axis(ax, x)
        ax.set_ylabel(label)

    return Plot(name, prefix_panels(results, draw), tuple(marks[n] for n in shown))


def gain_plot(results: Results, bootstrap: Bootstrap) -> Plot:
    """Return a plot of the return gained since the prefix's end, by the true future and each forecast, by horizon."""
    marks = predictor_marks(results.names)
    truth = Mark("true future", "ink", 2.4)
    noise = Mark("return noise", "return_floor", 1.5, (1.5, 2.0))
    shown = [n for n in results.names if n != "return_floor"]

    def curves(prefix: float) -> list[tuple[Mark, Curve]]:
        start = results.values("return_predicted", prefix, "persistence")  # (n, H): R(prefix end) at every horizon
        gains = [(truth, results.values("return_true", prefix, "persistence") - start)]
        gains += [(marks[n], results.values("return_predicted", prefix, n) - start) for n in shown]
        return [(mark, bootstrap.curve(gain)) for mark, gain in gains]

    bands = {prefix: curves(prefix) for prefix in results.prefixes}

    def draw(ax: Axes, prefix: float) -> None:
        x = results.horizons[prefix]
        main = []
        for rank, (mark, (center, low, high)) in enumerate(reversed(bands[prefix])):
            mark.line(ax, x, center, zorder=3 + rank)
            if mark.color in ("ink", "tipl"):
                ax.fill_between(x, low, high, color=mark.rgb, alpha=0.15, linewidth=0, zorder=2)
                main.append((center, low, high))
        spread = mean(results.values("repw", prefix, "return_floor"))
        for sign in (-1, 1):
            noise.line(ax, x, sign * spread, zorder=2.5)
        _frame(ax, [(mark.label, curve) for mark, curve in bands[prefix]], [*main, (0 * spread, -spread, spread)])
        _horizon_axis(ax, x)
        ax.set_ylabel("return gained")

    has_noise = "return_floor" in results.names
    return Plot("return_gain", prefix_panels(results, draw), (truth, *(marks[n] for n in shown), *[noise] * has_noise))


def gain_share_plot(results: Results, gains: Mapping[float, Sequence[Gain]]) -> Plot:
    """Return the IQM of each forecast's share of the future gain; `gains` has one entry per horizon of each prefix."""
    marks = predictor_marks(results.names)
    truth = Mark("true future", "ink", 2.4)
    shown = [n for n in results.names if any(n in gain.iqm_shares for row in gains.values() for gain in row)]

    def curve(prefix: float, name: str) -> Curve:
        shares = [gain.iqm_shares.get(name, Estimate(math.nan)) for gain in gains[prefix]]
        center, low, high = np.array([[share.value, share.low, share.high] for share in shares]).T
        return center, low, high

    def draw(ax: Axes, prefix: float) -> None:
        x = results.horizons[prefix]
        curves = {n: curve(prefix, n) for n in shown}
        one = np.ones(len(x))
        truth.line(ax, x, one, zorder=2.5)
        ax.axhline(0.0, color=THEME["faint"][0], linewidth=1.0, zorder=1)
        for rank, (n, (center, low, high)) in enumerate(reversed(curves.items())):  # TIPL last, on top
            marks[n].line(ax, x, center, zorder=3 + rank)
            if n == "tipl":
                ax.fill_between(x, low, high, color=marks[n].rgb, alpha=0.2, linewidth=0, zorder=2)
        main = [curves[n] for n in ("tipl", "basis_floor") if n in curves]
        _frame(ax, [(marks[n].label, curves[n]) for n in shown], [*main, (one, 0 * one, one)])
        _horizon_axis(ax, x)
        ax.set_ylabel("share of the future gain")

    return Plot("gain_share", prefix_panels(results, draw), (truth, *(marks[n] for n in shown)))


def diversity_plot(results: Results) -> Plot:
    """Return the variance of action between held-out trials' policies against the horizon, true and forecast."""
    truth = Mark("true policies", "ink", 2.4)
    marks = {"truth": truth} | predictor_marks([n for n in results.names if n != "return_floor"])

    def draw(ax: Axes, prefix: float) -> None:
        x = results.horizons[prefix]
        centers = {n: results.spread("action_variance", prefix, n) for n in marks}
        for rank, (n, center) in enumerate(reversed(centers.items())):
            marks[n].line(ax, x, center, zorder=3 + rank)
        curves = {n: (center, center, center) for n, center in centers.items()}
        main = [curve for n, curve in curves.items() if n in ("truth", "tipl", "persistence", "basis_floor")]
        _frame(ax, [(marks[n].label, curve) for n, curve in curves.items()], main, bottom=0.0)
        _horizon_axis(ax, x)
        ax.set_ylabel("action variance")

    return Plot("action_variance", prefix_panels(results, draw), tuple(marks.values()))


def returns_plot(results: Results) -> Plot:
    """Return a scatter plot of forecast policies' returns against the true policies', for TIPL and persistence.

    Where neither has returns, all other predictors are shown; at least one predictor must have returns.
    """
    marks = {n: dataclasses.replace(m, width=0.0) for n, m in predictor_marks(results.names).items()}
    known = [n for n in results.names if results.has_values("return_predicted", n)]
    shown = [n for n in known if n in ("persistence", "tipl")] or known

    def points(prefix: float, name: str, get: Callable[[str, float, str], FloatArray]) -> tuple[FloatArray, FloatArray]:
        return get("return_true", prefix, name).ravel(), get("return_predicted", prefix, name).ravel()

    returns = np.concatenate([np.concatenate(points(f, n, results.values)) for f in results.prefixes for n in shown])
    low, high = float(np.nanmin(returns)), float(np.nanmax(returns))
    margin = 0.06 * (high - low) or 1.0

    def draw(ax: Axes, prefix: float) -> None:
        limits = low - margin, high + margin
        ax.plot(limits, limits, color=THEME["faint"][0], linewidth=1.0, zorder=1)
        for n in reversed(shown):  # TIPL last, on top
            for get, size, alpha in ((results.values, 12, 0.3), (results.at_end, 42, 0.9)):
                x, y = points(prefix, n, get)
                marker = marks[n].marker or "o"
                ax.scatter(x, y, s=size, color=marks[n].rgb, alpha=alpha, marker=marker, linewidths=0, zorder=3)
        ax.set(xlim=limits, ylim=limits, xlabel="return of the true policy", ylabel="return of the forecast policy")
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_locator(MaxNLocator(5))

    return Plot("returns", prefix_panels(results, draw), tuple(marks[n] for n in shown))


def prefix_panels(results: Results, draw: Callable[[Axes, float], None]) -> tuple[Panel, ...]:
    def panel(prefix: float) -> Panel:
        return Panel(f"prefix {percent(prefix)}", lambda ax: draw(ax, prefix))

    return tuple(panel(prefix) for prefix in results.prefixes)


def _horizon_axis(ax: Axes, horizons: NDArray[np.int64]) -> None:
    ax.set_xlim(0, 1.02 * float(horizons[-1]))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel("horizon (checkpoints)")


def _frame(
    ax: Axes,
    curves: Sequence[tuple[str, Curve]],
    main: Sequence[Curve],
    bottom: float | None = None,
    *,
    is_log: bool = False,
) -> None:
    """Fit the vertical axis to the `main` curves; a note lists curves that leave it, with their last values.

    Other curves widen the axis by up to three quarters on each side; a diverging one would flatten all the rest.
    """
    if is_log:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        curves, main = [(label, _log10(curve)) for label, curve in curves], [_log10(curve) for curve in main]
    low, high = _extent(main or [curve for _, curve in curves])
    lowest, highest = _extent([curve for _, curve in curves])
    room = 0.75 * (high - low)
    low, high = (
        (min(low, lowest) if lowest > low - room else low),
        (max(high, highest) if highest < high + room else high),
    )
    margin = 0.08 * (high - low) or 1.0
    high += margin
    low = low - margin if bottom is None else bottom - 0.02 * (high - bottom)  # keeps a line at the bottom visible
    ax.set_ylim(*((10**low, 10**high) if is_log else (low, high)))
    away = [(label, center[-1]) for label, (center, _, _) in curves if ((center > high) | (center < low)).any()]
    away = [(label, 10**end if is_log else end) for label, end in away]
    if away:
        numbers = [f"{end:,.0f}" if abs(end) >= 1000 else f"{end:.3g}" for _, end in away]
        ends = [f"{label} {number}" for (label, _), number in zip(away, numbers, strict=True)]
        ends = [end.replace(" -", " \N{MINUS SIGN}").replace(" ", NBSP) for end in ends]
        width = round(46 * _panel_width_inches(ax) / PANEL_INCHES[0])  # characters that fit beside the title
        lines = textwrap.wrap(f"off the scale: {', '.join(ends)}", width, break_on_hyphens=False)
        note(ax, "\n".join(lines))


def _panel_width_inches(ax: Axes) -> float:
    place, figure = ax.get_subplotspec(), ax.get_figure(root=True)
    columns = 1 if place is None else place.get_gridspec().ncols
    return PANEL_INCHES[0] if figure is None else figure.get_figwidth() / columns


def _log10(curve: Curve) -> Curve:
    with np.errstate(divide="ignore", invalid="ignore"):
        center, low, high = (np.log10(part) for part in curve)
    return center, low, high


def _extent(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return the smallest and largest finite value of curves and their bands; 0 and 1 where there are none."""
    values = np.concatenate([part for curve in curves for part in curve])
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
