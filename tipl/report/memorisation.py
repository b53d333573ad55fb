"""The report's section on what a forecaster may do instead of learning dynamics: average, copy, collapse, or peek.

Each question is answered by numbers over held-out trials and a sentence computed from them. Shapes as in `intervals`.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tipl.report import page, plots
from tipl.report.drawing import Mark, Plot, percent
from tipl.report.intervals import Bootstrap, Estimate
from tipl.report.page import Html, element, fmt, fmt_interval, listed, with_interval
from tipl.report.plots import predictor_marks
from tipl.report.predictor_info import predictor_info
from tipl.report.results import FloatArray, Results

COPIED = 0.5
"""Forecasts count as copies if their distance to the nearest training path is below half that of the paths' mean."""
COLLAPSED = 0.5
"""Policies count as collapsed if they differ less than half as much as the true ones."""
ROUNDING = 1e-5
"""Rounding error of float32 predictions of coordinates around one."""

Figure = Callable[[Plot, str], Html]


def dynamics_section(results: Results, bootstrap: Bootstrap, figure: Figure) -> Html:
    """Return the section; `figure` puts a plot and its caption into the page."""
    if "tipl" not in results.names:
        return element("p", "These results hold no forecast of TIPL.")
    parts = [
        *_average(results, bootstrap),
        *_copies(results, bootstrap, figure),
        *_collapse(results, bootstrap, figure),
        *_causality(results),
    ]
    return page.join(*parts) if parts else element("p", "These results hold nothing to tell them apart.")


# ----------------------------------------------------------------------------------------------- the average path


def _average(results: Results, bootstrap: Bootstrap) -> list[Html]:
    forecasts = [n for n in ("tipl", "transformer") if results.has_values("wpe_relative", n)]
    references = [n for n in ("mean_path", "nearest_path") if results.has_values("wpe_relative", n)]
    pairs = [(name, reference) for name in forecasts for reference in references]
    if not pairs:
        return []
    words = " ".join(
        [_beyond_average(results, bootstrap, forecasts)] * ("mean_path" in references)
        + [_against(results, bootstrap, "tipl", reference) for reference in references]
    )
    rows = []
    for f in results.prefixes:
        lower = [_lower(results, bootstrap, name, reference, f) for name, reference in pairs]
        own = [bootstrap.estimate(results.at_end("wpe_relative", f, n)) for n in forecasts]
        row = [element("th", percent(f))]
        rows.append([*row, *(page.estimate_cell(fmt(it.value), fmt_interval(it)) for it in (*own, *lower))])
    head = ["prefix", *(predictor_info(n).label for n in forecasts)]
    head += [f"{predictor_info(r).label} less {predictor_info(n).label}" for n, r in pairs]
    caption = (
        "Relative weight error at the end of the path, and how much larger the errors of the mean path (the training "
        "trials' mean) and of the nearest path (the training trial with the nearest prefix) are: means over held-out "
        "trials of paired differences."
    )
    table = page.table(caption, [element("th", name) for name in head], rows)
    return [element("h3", "Is it the average path?"), element("p", words), table]


def _beyond_average(results: Results, bootstrap: Bootstrap, forecasts: Sequence[str]) -> str:
    """Return in words at how many prefixes each forecast beats the mean path with the whole interval."""
    counts = []
    for name in forecasts:
        lower = [_lower(results, bootstrap, name, "mean_path", f) for f in results.prefixes]
        often = f"{sum(_sign(it) > 0 for it in lower) or 'none'} of {len(lower)} prefixes"
        counts.append(f"{predictor_info(name).label} at {often}")
    return f"Nearer to the truth than the training trials' mean path, at the end of the path: {listed(counts)}."


def _lower(results: Results, bootstrap: Bootstrap, name: str, reference: str, prefix: float) -> Estimate:
    """Return the error of `reference` at the end of the path less that of `name`, paired by trial."""
    theirs, own = (results.at_end("wpe_relative", prefix, n) for n in (reference, name))
    return bootstrap.estimate(theirs - own)


def _against(results: Results, bootstrap: Bootstrap, name: str, reference: str) -> str:
    """Return in words at which prefixes the error of `name` at the end of the path is below that of `reference`."""
    lower = {f: _lower(results, bootstrap, name, reference, f) for f in results.prefixes}
    lower = {f: it for f, it in lower.items() if math.isfinite(it.value)}
    below = [f"by {with_interval(it)} at prefix {percent(f)}" for f, it in lower.items() if _sign(it) > 0]
    above = [
        f"by {with_interval(Estimate(-it.value, -it.high, -it.low))} at prefix {percent(f)}"
        for f, it in lower.items()
        if _sign(it) < 0
    ]
    same = [percent(f) for f, it in lower.items() if _sign(it) == 0]
    found = (("below it", below), ("above it", above), ("the same within the interval at", same))
    claims = [f"{where} {listed(which)}" for where, which in found if which]
    own, theirs = predictor_info(name).label, predictor_info(reference).label
    return f"{own} against the {theirs}: its error is {', '.join(claims)}." if claims else ""


def _sign(difference: Estimate) -> int:
    """Return 1 if the whole interval (or the value, where there is none) is above zero, -1 if below, else 0."""
    low, high = (difference.low, difference.high) if difference.has_interval else (difference.value,) * 2
    return int(low > 0) - int(high < 0)


# ----------------------------------------------------------------------------------------------- copies


def _copies(results: Results, bootstrap: Bootstrap, figure: Figure) -> list[Html]:
    if not any(np.isfinite(results.nearest("forecast_nearest", f)).any() for f in results.prefixes):
        return []
    return [
        element("h3", "Does it copy training paths?"),
        element("p", _copy_words(results, bootstrap)),
        figure(
            memorisation_plot(results),
            "Distance to the nearest training path, of the forecast and of the true future, one point per held-out "
            "trial. Compared are the displacements from the prefix's end to the path's end, within the prefix's span, "
            "in units of the distance from the start to the prefix's end. Copies would lie at the bottom, at zero, as "
            "the nearest path predictor does by construction. Dotted: the mean of the training paths, the best "
            "forecast that ignores the prefix.",
        ),
    ]


def _copy_words(results: Results, bootstrap: Bootstrap) -> str:
    """Return in words how close the forecasts come to a training path, and whether they copy it."""
    if results.in_sample:
        return "The judged trials are training trials, whose paths the forecasts should follow."
    zero_shot = "The forecaster never saw this task's training trials: it could not copy them. "
    start = zero_shot if results.settings.get("is_zero_shot") else ""
    ratios, copied = [], []
    for f in results.prefixes:
        forecast, true, average = (
            results.nearest(which, f) for which in ("forecast_nearest", "true_nearest", "mean_nearest")
        )
        ratio = bootstrap.ratio(forecast, true)
        if math.isnan(ratio.value):
            continue
        of_average = bootstrap.ratio(forecast, average)
        if (of_average.high if of_average.has_interval else of_average.value) < COPIED:
            copied.append(percent(f))
        mean_ratio = fmt(float(np.nanmean(average) / np.nanmean(true)))
        ratios.append(f"{with_interval(ratio)} ({mean_ratio}) at prefix {percent(f)}")
    if not ratios:
        return f"{start}The true futures are training paths themselves, so there is nothing to compare."
    end = (
        f"Copies at prefix {listed(copied)}: there the forecasts' distance is less than half of that mean's."
        if copied
        else "No copies: nowhere is the forecasts' distance less than half of that mean's."
    )
    what = (
        "Distance of the forecasts to the nearest training path, as a multiple of the true futures' distance, and in "
        "round brackets the same for the mean of the training paths"
    )
    return f"{start}{what}: {listed(ratios)}. {end}"


def memorisation_plot(results: Results) -> Plot:
    """Return a scatter plot of the distances to the nearest training path, forecasts against true futures."""
    forecast = Mark("TIPL's forecasts", "tipl", 0.0, marker="o")
    equal = Mark("as far as the truth", "faint", 1.2)
    average = Mark("mean of the training paths", "mean_path", 1.6, (1.5, 2.0))

    def draw(ax: Axes, prefix: float) -> None:
        own, true, center = (
            results.nearest(which, prefix) for which in ("forecast_nearest", "true_nearest", "mean_nearest")
        )
        shown = np.concatenate([own, true, center])
        high = 1.08 * float(np.nanmax(shown)) if np.isfinite(shown).any() else 1.0
        limits = -0.03 * high, high or 1.0
        ax.plot(limits, limits, color=equal.rgb, linewidth=equal.width, zorder=1)
        if np.isfinite(center).any():
            ax.axhline(float(np.nanmean(center)), color=average.rgb, linewidth=average.width, linestyle=":", zorder=2)
        ax.scatter(true, own, s=30, color=forecast.rgb, alpha=0.8, linewidths=0, zorder=3)
        ax.set(xlim=limits, ylim=limits, xlabel="distance of the true future", ylabel="distance of the forecast")
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_locator(MaxNLocator(5))

    return Plot("memorisation", plots.prefix_panels(results, draw), (forecast, equal, average))


# ----------------------------------------------------------------------------------------------- collapse


def _collapse(results: Results, bootstrap: Bootstrap, figure: Figure) -> list[Html]:
    parts = []
    if any(np.isfinite(spread).any() for spread in results.spreads.values()):
        names = [n for n in results.names if n != "return_floor"]  # the true policy acts as the true policy does
        parts += [
            element("p", _collapse_words(results)),
            _diversity_table(results, names),
            figure(
                plots.diversity_plot(results),
                "Variance of the actions of held-out trials' policies at the same checkpoint, on one set of states, "
                "against the horizon: below the true policies' line forecasts are more alike than the true policies; "
                "at zero they are all the same.",
            ),
        ]
    if len(results.trials) > 1 and results.has_values("return_predicted", "tipl"):
        parts.append(
            figure(
                return_distribution_plot(results),
                "Sorted returns of all held-out trials' policies at the end of the path: equal curves mean equal "
                "distributions; a flatter curve means returns that are more alike.",
            )
        )
    return [element("h3", "Do the forecast policies collapse to one?"), *parts] if parts else []


def _collapse_words(results: Results) -> str:
    """Return in words how much the forecast policies differ in action and return, relative to the true ones."""
    shares = {which: {f: _spread_share(results, which, f, "tipl") for f in results.prefixes} for which in _SPREADS}
    sentences = []
    for which, (what, _) in _SPREADS.items():
        known = {f: share for f, share in shares[which].items() if math.isfinite(share)}
        if known:
            last = {f: fmt(_spread_share(results, which, f, "persistence")) for f in known}
            ratios = listed(f"{fmt(share)} ({last[f]}) at prefix {percent(f)}" for f, share in known.items())
            sentences.append(
                f"{what} of TIPL's policies at the end of the path, in units of the true ones' (in round brackets "
                f"persistence's): {ratios}."
            )
    for which, (_, verb) in _SPREADS.items():
        collapsed = [percent(f) for f, share in shares[which].items() if share < COLLAPSED]
        if collapsed:
            sentences.append(f"After {listed(collapsed)} of the path they {verb} less than half as differently.")
        elif any(math.isfinite(share) for share in shares[which].values()):
            sentences.append(f"Nowhere do they {verb} less than half as differently.")
    return " ".join(sentences)


_SPREADS = {
    "action_variance": ("The variance of action between trials", "act"),
    "return_std": ("The standard deviation of the return", "score"),
}


def _spread_share(results: Results, which: str, prefix: float, name: str) -> float:
    """Return how much the policies of predictor `name` differ at the end of the path, divided by the true ones'."""
    forecast, true = (float(results.spread(which, prefix, n)[-1]) for n in (name, "truth"))
    return forecast / true if true > 0 else math.nan


def _diversity_table(results: Results, names: Sequence[str]) -> Html:
    rows = []
    for f in results.prefixes:
        row = [element("th", percent(f), element("small", f"{results.horizons[f][-1]} ahead"))]
        for n in ("truth", *names):
            variance, std = (float(results.spread(which, f, n)[-1]) for which in ("action_variance", "return_std"))
            quiet = predictor_info(n).is_floor
            row.append(page.estimate_cell(fmt(variance), f"return ± {fmt(std)}", is_quiet=quiet))
        rows.append(row)
    caption = (
        "Variance of the actions of the held-out trials' policies at the end of the path, mean over one set of "
        "states that their true policies visit, in units of half the action range, or the probability that two of "
        "them take different discrete actions; below it the standard deviation of their returns. Both would be zero if "
        "all forecasts were one average policy."
    )
    head = [element("th", "prefix"), element("th", "true policies"), *map(page.column_head, names)]
    return page.table(caption, head, rows)


def return_distribution_plot(results: Results) -> Plot:
    """Return a plot of the policies' sorted returns at the end of the path: true, TIPL's and persistence's."""
    truth = Mark("true policies", "ink", 2.4)
    marks = predictor_marks(results.names)
    shown = [n for n in ("tipl", "persistence") if results.has_values("return_predicted", n)]

    def draw(ax: Axes, prefix: float) -> None:
        series = [(marks[n], results.at_end("return_predicted", prefix, n)) for n in reversed(shown)]
        series.insert(0, (truth, results.at_end("return_true", prefix, "tipl")))
        for rank, (mark, returns) in enumerate(series):
            known: FloatArray = np.sort(returns[np.isfinite(returns)])
            mark.line(ax, (np.arange(len(known)) + 0.5) / max(len(known), 1), known, zorder=2 + rank)
        ax.set(xlim=(0, 1), xlabel="share of the held-out trials", ylabel="return")
        ax.yaxis.set_major_locator(MaxNLocator(5))

    return Plot("return_distribution", plots.prefix_panels(results, draw), (truth, *(marks[n] for n in shown)))


# ----------------------------------------------------------------------------------------------- causality


def _causality(results: Results) -> list[Html]:
    if math.isnan(results.causality):
        return []
    size = "do not change at all" if results.causality == 0 else f"change by {fmt(results.causality)} at most"
    is_causal = results.causality <= ROUNDING
    verdict = "it sees no future" if is_causal else "it SEES THE FUTURE, and its scores mean nothing"
    words = (
        f"The model's predictions along the prefix {size} where noise replaces all that follows it (first held-out "
        f"trial, every prefix): {verdict}."
    )
    return [element("h3", "Does it see the future?"), element("p", words)]
