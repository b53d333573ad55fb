"""A forecast in two dimensions: the observed path, the true one after it, the forecast, and what rivals say.

All are projected on one plane, which cannot show everything: the picture says what share lies outside, and how far the
forecasts end from the truth in all weights.

Shapes  p weights, h = prefix_end, n and m checkpoints after it.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from tipl.judging.predictors import Linear
from tipl.report.drawing import NBSP, THEME, Mark, Panel, Plot, note, percent
from tipl.report.plot_file import plot_path, write_plot
from tipl.report.plots import predictor_marks
from tipl.report.results import CoordinatePath
from tipl.subspace.plane import Plane
from tipl.subspace.prefix import Prefix
from tipl.subspace.prefix_end import MIN_PREFIX_END

Weights = NDArray[np.float32]
Points = NDArray[np.floating]

MAX_DOTS = 60
"""Of a longer path, every n-th checkpoint has a dot."""
INCHES = (7.6, 5.4)
_LINE_CHARACTERS = 122  # of the notes under the axes


def plot_forecast(
    path: str | Path,
    observed: Weights,
    forecast: Weights,
    *,
    truth: Weights | None = None,
    rivals: Mapping[str, Weights] | None = None,
    title: str = "",
    overwrite: bool = False,
) -> None:
    """Draw a forecast on the plane of the path's two leading directions into `path`, an .svg or .png file.

    The plane is that of the true path, `observed` and `truth` together; without a truth, that of the observed path and
    the forecast. The axes say what share of the squared displacement from the first checkpoint each direction holds,
    and a note says what share lies outside the plane and how far each forecast ends from the truth in all weights. The
    file is written whole or not at all.

    Args:
        observed: the prefix (h+1, p) float32, the run's initial weights first, at least four checkpoints.
        forecast: what `tipl.rollout` returns of one trial, (n, p) float32.
        truth: the checkpoints that followed, as far as they are known, (m, p) float32.
        rivals: other forecasts (m, p) by name; by default linear extrapolation at the mean speed over the last quarter
            of the prefix. Persistence, the last checkpoint observed, is always marked.
        title: stands above the picture.

    Raises TypeError for weights that are not float32; ValueError for another shape, NaN or Inf, another suffix, or a
    path that ends where it began; FileExistsError where `path` exists and `overwrite` is not set.
    """
    path = plot_path("plot_forecast", path, overwrite=overwrite)
    observed = _checked("observed", observed, MIN_PREFIX_END + 1)
    num_params = observed.shape[1]
    forecast = _checked("forecast", forecast, 1, num_params)
    truth = None if truth is None else _checked("truth", truth, 1, num_params)
    if rivals is None:
        prefix = Prefix(observed)
        linear = Linear(max(1, prefix.end // 4))
        rivals = {"linear": linear.forecast(prefix, np.arange(1, len(forecast) + 1))}
    rivals = {name: _checked(f"rivals[{name!r}]", it, 1, num_params) for name, it in rivals.items()}
    write_plot(forecast_plot(observed, {"tipl": forecast, **rivals}, truth, title), path)


def _checked(name: str, weights: Weights, least: int, num_params: int | None = None) -> Weights:
    """Return weights (m, p) of at least `least` checkpoints; raise what `plot_forecast` does."""
    weights = np.asarray(weights)
    if weights.dtype != np.float32:
        raise TypeError(f"plot_forecast: {name} must be float32, got {weights.dtype}")
    p = "p" if num_params is None else str(num_params)
    if weights.ndim != 2 or len(weights) < least or weights.shape[1] != (num_params or weights.shape[1]):
        raise ValueError(f"plot_forecast: {name} must have shape (m, {p}) with m >= {least}, got {weights.shape}")
    if not np.isfinite(weights).all():
        raise ValueError(f"plot_forecast: {name} must be finite, got NaN or Inf")
    return weights


def forecast_plot(observed: Weights, forecasts: Mapping[str, Weights], truth: Weights | None, title: str) -> Plot:
    """Return the figure of `plot_forecast`; `forecasts` (m, p) are by the names of predictors, "tipl" among them."""
    plane = Plane.of(np.concatenate([observed, forecasts["tipl"] if truth is None else truth]))
    points = {name: plane.points(weights) for name, weights in forecasts.items()}
    what_came = None if truth is None else plane.points(truth)
    legend = _legend(list(forecasts), has_truth=truth is not None)
    notes = textwrap.fill(_notes(plane, observed, forecasts, truth), _LINE_CHARACTERS)

    def draw(ax: Axes) -> None:
        _draw_forecast(ax, plane.points(observed), points, what_came, legend)
        first, second = (f"{percent(round(share, 4))} of the squared displacement" for share in plane.shares)
        ax.set(xlabel=f"direction 1: {first}", ylabel=f"direction 2: {second}")
        ax.figure.supxlabel(notes, x=0.02, ha="left", fontsize=8.5, color=THEME["muted"][0])

    return Plot("forecast", (Panel(title, draw),), tuple(legend.values()), panel_inches=INCHES)


def planes_plot(paths: Sequence[CoordinatePath]) -> Plot:
    """Return the report's figure: held-out paths and their forecasts on each path's plane, one panel for each."""
    names = [name for name in paths[0].plane if name not in ("true", "shares")]
    names.sort(key=lambda name: name != "tipl")
    legend = _legend(names, has_truth=True)

    def draw(ax: Axes, path: CoordinatePath) -> None:
        true = path.plane["true"]
        ahead = {name: path.plane[name] for name in names if name in path.plane}
        _draw_forecast(ax, true[: path.prefix_end + 1], ahead, true[path.prefix_end + 1 :], legend)
        first, second = path.plane["shares"]
        ax.set(xlabel=f"direction 1 ({percent(round(first, 4))})", ylabel=f"direction 2 ({percent(round(second, 4))})")
        note(ax, f"outside the plane: {percent(round(max(0.0, 1.0 - first - second), 4))}")

    def panel(path: CoordinatePath) -> Panel:
        return Panel(f"trial {path.trial}, prefix {path.percent}{NBSP}%", lambda ax: draw(ax, path))

    return Plot("plane", tuple(map(panel, paths)), tuple(legend.values()))


def _legend(names: Sequence[str], *, has_truth: bool) -> dict[str, Mark]:
    """Return the mark of each path that is drawn, "observed", "truth" and "persistence" among them, by name."""
    marks = {"observed": Mark("observed", "ink", 2.0, marker="o")}
    if has_truth:
        marks["truth"] = Mark("true path", "muted", 2.0, marker="*")
    return marks | predictor_marks(["persistence", *names])


def _draw_forecast(
    ax: Axes, observed: Points, forecasts: Mapping[str, Points], truth: Points | None, marks: Mapping[str, Mark]
) -> None:
    """Draw what was observed (h+1, 2), and what is true and was forecast after it, (m, 2) each."""
    last = observed[-1:]
    for name, points in reversed([*forecasts.items()]):  # the first is drawn over the others
        _draw_path(ax, np.concatenate([last, points]), marks[name], 4 if name == "tipl" else 3)
    if truth is not None:
        _draw_path(ax, np.concatenate([last, truth]), marks["truth"], 2.5)
    _draw_path(ax, observed, marks["observed"], 3.5, has_end=False)
    persistence = marks["persistence"]
    _draw_point(ax, observed[0], "o", THEME["ink"][0], 7.5, 6)
    _draw_point(ax, observed[-1], persistence.marker, persistence.rgb, 7, 5.5)
    ax.annotate("θ₀", observed[0], xytext=(-6, 6), textcoords="offset points", ha="right", zorder=6)
    ax.set_aspect("equal", adjustable="datalim")  # an angle in the picture is an angle in the plane


def _draw_path(ax: Axes, points: Points, mark: Mark, zorder: float, *, has_end: bool = True) -> None:
    """Draw a path (m, 2) with a dot at each checkpoint and, if `has_end`, the mark's own shape at the last."""
    ax.plot(*points.T, color=mark.rgb, linewidth=0.6 * mark.width, zorder=zorder)
    dots = points[:: -(-len(points) // MAX_DOTS)]
    ax.plot(*dots.T, color=mark.rgb, linewidth=0, marker="o", markersize=3.2, markeredgewidth=0, zorder=zorder)
    if has_end:
        _draw_point(ax, points[-1], mark.marker, mark.rgb, 12 if mark.marker == "*" else 7.5, zorder + 2)


def _draw_point(ax: Axes, point: Points, shape: str, color: str, size: float, zorder: float) -> None:
    """Draw one marker with a rim in the colour of the page, which parts it from what lies below."""
    (drawn,) = ax.plot(*point, color=color, linewidth=0, marker=shape, markersize=size, zorder=zorder)
    drawn.set(markeredgecolor=THEME["surface"][0], markeredgewidth=0.9)


def _notes(plane: Plane, observed: Weights, forecasts: Mapping[str, Weights], truth: Weights | None) -> str:
    """Return in words what the picture hides."""
    whole = "observed path and forecast together" if truth is None else "true path"
    text = f"Outside this plane: {percent(round(plane.hidden, 4))} of the squared displacement of the {whole}. "
    text += f"Unit: the distance from first to last checkpoint of the {whole}. "
    if truth is None:
        return text + "What really came is not known."
    step = min(len(truth), len(forecasts["tipl"]))
    ends = {name: it[step - 1] for name, it in forecasts.items() if len(it) >= step} | {"persistence": observed[-1]}
    marks, found = predictor_marks(list(ends)), []
    for name, weights in ends.items():
        everywhere, seen = plane.distances(weights, truth[step - 1])
        found.append(f"{marks[name].label} {everywhere:.2f} ({seen:.2f})".replace(" ", NBSP))
    counted = f"{step} checkpoint{'s' if step > 1 else ''} ahead"
    return text + f"Distance from the truth {counted}, in all weights (in this plane): {', '.join(found)}."
