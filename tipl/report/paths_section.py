"""The report's section on paths: held-out paths on a plane and in coordinates, and their singular spectra."""

from collections.abc import Callable, Sequence

from tipl.report import page, run_plots
from tipl.report.drawing import Plot
from tipl.report.forecast_plot import planes_plot
from tipl.report.page import Html, element
from tipl.report.paths import path_spectrum
from tipl.report.results import CoordinatePath, Results
from tipl.storing.store import Store

COORDINATE_TRIALS = 2


def paths_section(
    results: Results, store: Store, paths: Sequence[CoordinatePath], figure: Callable[[Plot, str], Html]
) -> Html:
    """Return the section; `figure` puts a plot and its caption into the page."""
    parts = []
    on_planes = [path for path in paths if path.plane]
    if on_planes:
        parts.append(element("h3", "In two dimensions"))
        parts.append(
            figure(
                planes_plot([path for path in on_planes if path.trial == on_planes[0].trial]),
                "One held-out path, projected on the two leading directions of its displacements from θ₀, at each "
                "prefix: what was observed, the true path after it, and the forecast, with a dot at each checkpoint. "
                "Unit: the distance from first to last checkpoint. The axes say which share of the path's squared "
                "displacement each direction holds. Forecasts may lie close together here and far apart in "
                "the directions that are not seen: the tables above judge all weights.",
            )
        )
    parts.append(element("h3", "Coordinates"))
    trials = sorted({path.trial for path in paths})[:COORDINATE_TRIALS]
    if trials:
        parts.append(
            figure(
                run_plots.coordinates_plot([path for path in paths if path.trial in trials]),
                f"The first {run_plots.COORDINATES_SHOWN} coordinates of held-out paths in the basis of each "
                "prefix, numbered at the right: the truth, and TIPL's forecast from the prefix's end (vertical "
                "line) on.",
            )
        )
    else:
        parts.append(element("p", "The evaluation left no coordinates of held-out paths."))
    spectra = [path_spectrum(store.trial(i)).singular_values for i in results.trials]
    spectra = [singular_values for singular_values in spectra if len(singular_values) > 2]
    if spectra:
        k = results.settings.get("n_components")
        parts.append(element("h3", "Singular spectrum"))
        parts.append(
            figure(
                run_plots.spectrum_plot(spectra, k if isinstance(k, int) else None),
                "Singular values of whole held-out paths, θₜ \N{MINUS SIGN} θ₀, and the relative error of "
                "projecting each path on its first k directions. A forecast has only the directions of its prefix, "
                "whose error the basis floor shows. Dotted: the forecaster's number of coordinates k.",
            )
        )
    return page.join(*parts)
