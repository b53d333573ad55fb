"""The report's figures, and those of predictors: each a `Plot` of panels.

Drawn by matplotlib without touching its global state.
A plot is rendered twice. As one PNG file with all panels and a legend, for papers and slides; and as one inline SVG a
panel, whose colours are CSS variables and whose text is text, so that the page can lay the panels out for a wide or a
narrow screen and follow the reader's light or dark theme.
"""

import dataclasses
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from PIL import Image

from tipl.report.intervals import Bootstrap, Estimate, Gain, Statistic, mean
from tipl.report.results import BASIS_FLOORS, PREDICTORS, FloatArray, Results, predictor_info

# Name -> colour on a light page, colour on a dark page. Predictors are told apart with any common colour blindness
# (after Okabe and Ito), and by their markers; floors are grey. Every light colour occurs once, for an SVG's colours are
# found by it.
THEME: dict[str, tuple[str, str]] = {
    "surface": ("#fffffe", "#161b22"),
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9aa4af"),
    "faint": ("#b4bcc6", "#525c67"),
    "grid": ("#e4e8ec", "#2b323b"),
    "tipl": ("#d55e00", "#ff7a1a"),
    "tipl_gated": ("#a03c00", "#ff9d5c"),
    "tipl_tuned": ("#cc3311", "#ff6f4d"),
    "transformer": ("#f2a65a", "#ffc08a"),
    "persistence": ("#0b4f9e", "#5a82e6"),
    "linear": ("#00875f", "#2fc79b"),
    "quadratic": ("#ac9d53", "#e5e600"),
    "rank1": ("#97246e", "#c985e0"),
    "autoregression": ("#400da5", "#8a1cff"),
    "mean_path": ("#4aa3d9", "#a6dcff"),
    "nearest_path": ("#d91aff", "#6b7a1f"),
    "ridge": ("#661100", "#c23a68"),
    "nowcaster": ("#0000ff", "#33ff77"),
    "another_run": ("#7a5cff", "#b0a0ff"),
    "basis_floor": ("#77808a", "#8d97a3"),
    "shared_floor": ("#86755f", "#a8977f"),
    "prefix_floor": ("#87765e", "#a9967e"),
    "return_floor": ("#9098a1", "#7b8591"),
    "unknown-0": ("#8a6d00", "#d8c24a"),
    "unknown-1": ("#6b5b95", "#b7a6e3"),
    "unknown-2": ("#5f4b32", "#c9ac86"),
}
NBSP = "\N{NO-BREAK SPACE}"
Curve = tuple[FloatArray, FloatArray, FloatArray]  # mean, lower and upper bound (H,)

PANEL_INCHES = (4.8, 3.45)
PNG_DPI = 150

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "axes.edgecolor": THEME["faint"][0],
    "axes.labelcolor": THEME["muted"][0],
    "axes.titlecolor": THEME["ink"][0],
    "xtick.color": THEME["faint"][0],
    "ytick.color": THEME["faint"][0],
    "xtick.labelcolor": THEME["muted"][0],
    "ytick.labelcolor": THEME["muted"][0],
    "grid.color": THEME["grid"][0],
    "grid.linewidth": 0.8,
    "text.color": THEME["ink"][0],
    "text.parse_math": False,  # a name out of a file may hold a dollar sign
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "tipl",
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # of an SVG: it would hold the date


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes: its title, and what draws on it."""

    title: str
    draw: Callable[[Axes], None]


@dataclasses.dataclass(frozen=True)
class Mark:
    """How a series looks in the plot and in its legend; `color` is a name in THEME."""

    label: str
    color: str
    width: float = 1.6
    dashes: tuple[float, ...] = ()
    marker: str = ""

    @property
    def rgb(self) -> str:
        return THEME[self.color][0]

    @property
    def marker_size(self) -> float:
        return 3.5 + self.width / 2 if self.width else 6.0

    def line(self, ax: Axes, x: NDArray[np.generic], y: NDArray[np.generic], *, zorder: float = 2.0) -> None:
        markers = self.marker if len(x) <= 30 else ""  # further ones would hide the line
        ax.plot(
            x,
            y,
            color=self.rgb,
            linewidth=self.width,
            dashes=self.dashes or (None, None),
            marker=markers,
            markersize=self.marker_size,
            markeredgewidth=0,
            zorder=zorder,
        )

    def handle(self) -> Line2D:
        line = Line2D([], [], color=self.rgb, linewidth=self.width, label=self.label)
        line.set(marker=self.marker, markersize=self.marker_size, markeredgewidth=0)
        if self.dashes:
            line.set_dashes(self.dashes)
        return line


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure of the report; `name` is the stem of its PNG file."""

    name: str
    panels: tuple[Panel, ...]
    legend: tuple[Mark, ...] = ()
    columns: int = 2
    panel_inches: tuple[float, float] = PANEL_INCHES

    def png(self, dpi: int = PNG_DPI, num_colors: int | None = None) -> bytes:
        """Return all panels and the legend as one PNG picture on white, in `num_colors` colours at most."""
        with matplotlib.style.context(["default", _STYLE]):
            file = io.BytesIO()
            self._figure().savefig(file, format="png", dpi=dpi)
        if num_colors is not None:
            with Image.open(file) as picture:
                few = picture.convert("RGB").quantize(num_colors, dither=Image.Dither.NONE)
            file = io.BytesIO()
            few.save(file, format="png", optimize=True)
        return file.getvalue()

    def svg(self) -> bytes:
        """Return the same as one SVG file, whose bytes depend on the data alone."""
        with matplotlib.style.context(["default", _STYLE]):
            file = io.BytesIO()
            self._figure().savefig(file, format="svg", metadata=_NO_METADATA)
        # A tenth of a point is fine enough for lines, and makes half the file.
        return re.sub(rb' d="[^"]*"', lambda line: re.sub(rb"(\.\d)\d+", rb"\1", line[0]), file.getvalue())

    def _figure(self) -> Figure:
        columns = min(self.columns, len(self.panels))
        rows = math.ceil(len(self.panels) / columns)
        entries = min(len(self.legend), 2 * columns + 1)  # of the legend, in a row
        height = rows * self.panel_inches[1] + (0.3 * math.ceil(len(self.legend) / entries) if entries else 0.0)
        figure = Figure(figsize=(columns * self.panel_inches[0], height), layout=_layout())
        for i, panel in enumerate(self.panels):
            panel.draw(figure.add_subplot(rows, columns, i + 1, title=panel.title))
        if entries:
            handles = [mark.handle() for mark in self.legend]
            figure.legend(handles=handles, loc="outside upper center", ncols=entries)
        return figure

    def svgs(self) -> list[str]:
        """Return each panel as an SVG element to put into a page that defines the colours as CSS variables."""
        elements = []
        for i, panel in enumerate(self.panels):
            with matplotlib.style.context(["default", _STYLE]):
                figure = Figure(figsize=self.panel_inches, layout=_layout())
                panel.draw(figure.add_subplot(title=panel.title))
                file = io.StringIO()
                figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
            elements.append(_inline(file.getvalue(), f"{self.name}-{i}"))
        return elements


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)


def _inline(svg: str, prefix: str) -> str:
    """Return the <svg> element of an SVG file fit for a page: unique ids, no namespaces, colours by variable."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\s(?:xmlns(?::xlink)?|width|height|version)="[^"]*"', "", svg, count=5)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)  # it would style the page
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'xlink:href="#', rf'href="#{prefix}-', svg)
    svg = re.sub(r"url\(#", rf"url(#{prefix}-", svg)
    for name, (light, _) in THEME.items():
        svg = svg.replace(light, f"var(--{name})")
    return svg


def predictor_marks(names: Sequence[str]) -> dict[str, Mark]:
    """Return the mark of each predictor, the same in every figure of a report that knows the same `names`."""
    markers = {  # of those that `page.py` can draw; relatives share one and differ in colour
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


def percent(prefix: float) -> str:
    return f"{100 * prefix:.3g}{NBSP}%"


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
    """Return the mean or IQM of `measure` against the horizon, a panel a prefix, floors dashed.

    TIPL, persistence and the floors have 95 % bands: ten of them would hide each other.
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
    """Return the return gained over the prefix's end against the horizon, by the true future and by each forecast."""
    marks = predictor_marks(results.names)
    truth = Mark("true future", "ink", 2.4)
    noise = Mark("return noise", "return_floor", 1.5, (1.5, 2.0))
    shown = [n for n in results.names if n != "return_floor"]

    def curves(prefix: float) -> list[tuple[Mark, Curve]]:
        start = results.values("return_predicted", prefix, "persistence")  # (n, H): R(prefix end), at every horizon
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
    """Return the IQM of each forecast's share of the future gain against the horizon; `gains` are one a horizon."""
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
    """Return the scatter of the return of the forecast policy against the true policy's, persistence beside TIPL.

    Where the results hold neither's returns, all others are shown; some predictor must have returns.
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
    """Fit the vertical axis to the `main` curves, and name those that leave it above, with their value at the end.

    Others widen the frame where that costs little; one that runs away would flatten all the rest.
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
    low = low - margin if bottom is None else bottom - 0.02 * (high - bottom)  # so that a line at the bottom shows
    ax.set_ylim(*((10**low, 10**high) if is_log else (low, high)))
    away = [(label, center[-1]) for label, (center, _, _) in curves if ((center > high) | (center < low)).any()]
    away = [(label, 10**end if is_log else end) for label, end in away]
    if away:
        numbers = [f"{end:,.0f}" if abs(end) >= 1000 else f"{end:.3g}" for _, end in away]
        ends = [f"{label} {number}" for (label, _), number in zip(away, numbers, strict=True)]
        ends = [end.replace(" -", " \N{MINUS SIGN}").replace(" ", NBSP) for end in ends]
        width = round(46 * _panel_width_inches(ax) / PANEL_INCHES[0])  # characters that leave room for a title
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


def note(ax: Axes, text: str) -> None:
    """Write a small note above the axes, at the right."""
    ax.set_title(text, loc="right", fontsize=8.5, weight="normal")


def _extent(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return the smallest and largest finite value of curves and their bands, 0 and 1 where there is none."""
    values = np.concatenate([part for curve in curves for part in curve])
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)


def short_count(value: float, _: int | None = None) -> str:
    """Return 2500000 as 2.5M, 20000 as 20k."""
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}"
