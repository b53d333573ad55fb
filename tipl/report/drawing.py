"""How the report draws: colours, marks, panels, and plots rendered as PNG, as SVG, and as SVG inside a page.

matplotlib draws, without a change to its global state. A plot can be rendered as one PNG or SVG file with all panels
and a legend, for papers and slides; and as one inline SVG for each panel, whose colours are CSS variables and whose
text is text, so that the page can arrange the panels for a wide or a narrow screen and follow the reader's light or
dark theme.
"""

import dataclasses
import io
import math
import re
from collections.abc import Callable

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image

# Name -> colour on a light page, colour on a dark page. Predictors can be told apart with any common colour blindness
# (after Okabe and Ito), and by their markers; floors are grey. No two light colours are equal, because `_inline` finds
# a colour's name by it.
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
    "text.parse_math": False,  # a name from a file may contain a dollar sign
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "tipl",
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # an SVG would contain the date


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes: its title, and the function that draws on it."""

    title: str
    draw: Callable[[Axes], None]


@dataclasses.dataclass(frozen=True)
class Mark:
    """The look of a series in a plot and its legend; `color` is a name in THEME."""

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
        size = 3.5 + self.width / 2 if self.width else 6.0
        return 2 * size if self.marker == "*" else size  # a star's points are thin

    def line(self, ax: Axes, x: NDArray[np.generic], y: NDArray[np.generic], *, zorder: float = 2.0) -> None:
        markers = self.marker if len(x) <= 30 else ""  # more would hide the line
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
        """Return all panels and the legend as one PNG picture on white, with at most `num_colors` colours."""
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
        """Return all panels and the legend as one SVG file, whose bytes depend on the data alone."""
        with matplotlib.style.context(["default", _STYLE]):
            file = io.BytesIO()
            self._figure().savefig(file, format="svg", metadata=_NO_METADATA)
        # Coordinates are cut to a tenth of a point, which is fine enough for lines and halves the file.
        return re.sub(rb' d="[^"]*"', lambda line: re.sub(rb"(\.\d)\d+", rb"\1", line[0]), file.getvalue())

    def _figure(self) -> Figure:
        columns = min(self.columns, len(self.panels))
        rows = math.ceil(len(self.panels) / columns)
        entries = min(len(self.legend), 2 * columns + 1)  # legend entries per line
        height = rows * self.panel_inches[1] + (0.3 * math.ceil(len(self.legend) / entries) if entries else 0.0)
        figure = Figure(figsize=(columns * self.panel_inches[0], height), layout=_layout())
        for i, panel in enumerate(self.panels):
            panel.draw(figure.add_subplot(rows, columns, i + 1, title=panel.title))
        if entries:
            handles = [mark.handle() for mark in self.legend]
            figure.legend(handles=handles, loc="outside upper center", ncols=entries)
        return figure

    def svgs(self) -> list[str]:
        """Return each panel as an SVG element, for a page that defines the colours of THEME as CSS variables."""
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
    """Return the <svg> element of an SVG file for use in a page: unique ids, no namespaces, colours as variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\s(?:xmlns(?::xlink)?|width|height|version)="[^"]*"', "", svg, count=5)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)  # would apply to the page
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'xlink:href="#', rf'href="#{prefix}-', svg)
    svg = re.sub(r"url\(#", rf"url(#{prefix}-", svg)
    for name, (light, _) in THEME.items():
        svg = svg.replace(light, f"var(--{name})")
    return svg


def percent(prefix: float) -> str:
    return f"{100 * prefix:.3g}{NBSP}%"


def note(ax: Axes, text: str) -> None:
    """Write a small note above the axes, on the right."""
    ax.set_title(text, loc="right", fontsize=8.5, weight="normal")


def short_count(value: float, _: int | None = None) -> str:
    """Return 2500000 as 2.5M, 20000 as 20k."""
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}"
