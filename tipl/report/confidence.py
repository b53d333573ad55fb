"""The report's section on confidence: are the predicted probabilities calibrated, and what does following them cost?

Shapes  n held-out trials, H horizons of a prefix, C (prefix, horizon) cells, B bins.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from tipl.forecasting.confidence import expected_calibration_error
from tipl.report import page
from tipl.report.drawing import NBSP, THEME, Mark, Panel, Plot, percent
from tipl.report.intervals import Bootstrap, Estimate, mean
from tipl.report.page import Html, element, fmt, fmt_interval, fmt_percent, listed, with_interval
from tipl.report.predictor_info import predictor_info
from tipl.report.results import FloatArray, Results

NUM_BINS = 10
RELIABILITY_MARKS = Mark("TIPL", "tipl", 2.0, marker="o"), Mark("perfectly calibrated", "faint", 1.2)
NAMED_LOSSES = 3
Figure = Callable[[Plot, str], Html]


def confidence_section(results: Results, bootstrap: Bootstrap, figure: Figure) -> Html:
    """Return the section; `figure` puts a plot and its caption into the page."""
    found = reliability(results, bootstrap)
    if found is None:
        return element(
            "p", "These results hold no confidence: the forecaster was trained without one, or by an earlier tipl."
        )
    came_true = np.nansum(found.frequency * found.counts) / found.counts.sum()
    parts = [
        element("p", _gate_words(results, bootstrap), cls="lead"),
        element("h3", "Does it come true as often as it says?"),
        element(
            "p",
            f"Expected calibration error: {with_interval(found.error)}. Over {found.counts.sum():,} forecasts, the "
            f"mean predicted probability of beating the last policy seen is {fmt_percent(found.mean_probability)}; "
            f"{fmt_percent(float(came_true))} of the forecasts do beat it.",
        ),
        figure(
            reliability_plot(found),
            "Share of forecast policies with a higher return than the last policy seen, against the probability "
            "predicted for that, in bins of equal width, with 95 % intervals. On the diagonal the probabilities are "
            "calibrated. The calibration error is the mean distance from it, weighted by the counts; with few "
            "forecasts it exceeds zero even for perfect probabilities.",
        ),
        element("h3", "What does following it cost?"),
        _gain_table(
            results,
            bootstrap,
            [(f, None) for f in results.prefixes],
            "Return gained over the policy at the prefix's end: mean over horizons and held-out trials, with its 95 % "
            "interval below. The gated forecast follows TIPL where the confidence is at least "
            f"{fmt_percent(results.follow)}, and else keeps the last policy seen.",
        ),
        element(
            "details",
            element("summary", "At every horizon"),
            _gain_table(
                results,
                bootstrap,
                [(f, horizon) for f in results.prefixes for horizon in results.horizons[f].tolist()],
                "The same at each horizon.",
            ),
        ),
    ]
    return page.join(*parts)


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Predicted probabilities and the outcomes, in B bins of equal width; NaN where a bin is empty."""

    counts: NDArray[np.int64]
    """Number of forecasts, (B,)."""
    probability: FloatArray
    """Mean predicted probability, (B,)."""
    frequency: FloatArray
    """Share of forecasts that came true, (B,)."""
    low: FloatArray
    high: FloatArray
    """Bounds of the interval of `frequency`, (B,) each."""
    error: Estimate
    """Expected calibration error."""

    @property
    def mean_probability(self) -> float:
        return float(np.nansum(self.probability * self.counts) / self.counts.sum())


def reliability(results: Results, bootstrap: Bootstrap) -> Reliability | None:
    """Return the reliability of TIPL's confidence over all cells; None where no cell has a confidence and an outcome.

    The outcome is true where TIPL's return exceeds persistence's in the same (trial, prefix, horizon).
    """
    predicted, gained = (
        np.concatenate(columns, axis=1)  # (n, C)
        for columns in (
            [results.values("confidence", f, "tipl") for f in results.prefixes],
            [gains(results, "tipl", f) for f in results.prefixes],
        )
    )
    return reliability_of(predicted, np.where(np.isfinite(gained), gained > 0, np.nan), bootstrap)


def reliability_of(predicted: FloatArray, outcomes: FloatArray, bootstrap: Bootstrap) -> Reliability | None:
    """Return the reliability of probabilities (n, C) for outcomes 0 or 1 (n, C), without NaN; None if nothing is left.

    Intervals resample trials, because the cells of one trial are correlated.
    """
    is_there = np.isfinite(predicted) & np.isfinite(outcomes)
    if not is_there.any():
        return None
    bins = np.where(is_there, np.minimum(NUM_BINS * predicted, NUM_BINS - 1), NUM_BINS).astype(int)
    members = (bins[:, :, None] == np.arange(NUM_BINS)).astype(float)  # (n, C, B)
    counts, sums, hits = (
        np.einsum("nc,ncb->nb", np.where(is_there, values, 0.0), members)
        for values in (np.ones_like(predicted), predicted, outcomes)
    )
    shares = [bootstrap.ratio(*pair) for pair in zip(hits.T, counts.T, strict=True)]
    total = counts.sum(0)
    error = expected_calibration_error(predicted[is_there].tolist(), outcomes[is_there].astype(bool).tolist(), NUM_BINS)
    # In a resample's error, every trial's gap in a bin counts as often as the trial was drawn. A mean of absolute
    # values is biased upwards in a sample, and more so in a resample of it, so that percentiles would count the bias
    # twice; mirrored at the estimate (the basic bootstrap) they correct for it. In simulations of 10 trials with a true
    # error of about 0.1, these intervals contained it in 89 % of 200 cases, percentile intervals in 49 %.
    gaps, drawn = bootstrap.counts @ (hits - sums), bootstrap.counts @ counts.sum(1)
    errors = np.abs(gaps).sum(1)[drawn > 0] / drawn[drawn > 0]
    high, low = np.maximum(2 * error - np.percentile(errors, [2.5, 97.5]), 0.0)
    if (counts.sum(1) > 0).sum() < 2:
        low = high = np.nan
    return Reliability(
        counts=total.astype(np.int64),
        probability=np.divide(sums.sum(0), total, out=np.full(NUM_BINS, np.nan), where=total > 0),
        frequency=np.array([share.value for share in shares]),
        low=np.array([share.low for share in shares]),
        high=np.array([share.high for share in shares]),
        error=Estimate(error, float(low), float(high)),
    )


def reliability_plot(found: Reliability) -> Plot:
    """Return the reliability diagram, and beside it a histogram of the predicted probabilities."""

    def diagram(ax: Axes) -> None:
        draw_reliability(ax, found)

    def histogram(ax: Axes) -> None:
        edges, color = np.arange(NUM_BINS) / NUM_BINS, RELIABILITY_MARKS[0].rgb
        ax.bar(edges, found.counts, width=0.92 / NUM_BINS, align="edge", color=color, alpha=0.75, linewidth=0)
        for edge, count in zip(edges, found.counts, strict=True):
            if count:
                ax.annotate(
                    f"{count}", (edge + 0.46 / NUM_BINS, count), xytext=(0, 2), textcoords="offset points",
                    ha="center", fontsize=8, color=THEME["muted"][0],
                )  # fmt: skip
        ax.set(xlim=(-0.02, 1.02), xlabel="predicted probability", ylabel="forecasts")
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    panels = (Panel("Reliability", diagram), Panel("How often each probability is predicted", histogram))
    return Plot("reliability", panels, RELIABILITY_MARKS)


def draw_reliability(ax: Axes, found: Reliability) -> None:
    """Draw the share that came true against the predicted probability, and the diagonal of perfect calibration."""
    tipl, perfect = RELIABILITY_MARKS
    ax.plot((0, 1), (0, 1), color=perfect.rgb, linewidth=perfect.width, zorder=1)
    ax.vlines(found.probability, found.low, found.high, color=tipl.rgb, alpha=0.4, linewidth=2.0)
    is_there = found.counts > 0
    tipl.line(ax, found.probability[is_there], found.frequency[is_there], zorder=3)
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.03, 1.03), xlabel="predicted probability", ylabel="share that came true")


def gains(results: Results, name: str, prefix: float) -> FloatArray:
    """Return the gain in return (n, H) of predictor `name`, or of the "truth", over the policy at the prefix's end."""
    start = results.values("return_predicted", prefix, "persistence")
    if name == "truth":
        return results.values("return_true", prefix, "persistence") - start
    return results.values("return_predicted", prefix, name) - start


def _gate_words(results: Results, bootstrap: Bootstrap) -> str:
    """Return in words at which prefixes and horizons following the gated forecast loses return, beyond the interval."""
    if not results.has_values("return_predicted", "tipl_gated"):
        return "These results hold no returns of the gated forecast."
    losses, blind = (_losses(results, bootstrap, name) for name in ("tipl_gated", "tipl"))
    num_cells = sum(len(results.horizons[f]) for f in results.prefixes)
    if losses:
        worst = sorted(losses, key=lambda loss: loss[2].value)
        named = listed(
            f"{with_interval(Estimate(-cost.value, -cost.high, -cost.low))} at prefix {percent(f)}, {horizon} ahead"
            for f, horizon, cost in worst[:NAMED_LOSSES]
        )
        more = f"; at {len(losses)} of {num_cells} prefixes and horizons in all" * (len(losses) > NAMED_LOSSES)
        claim = f"Following the gated forecast loses return: {named}{more}."
    else:
        noise = "" if len(results.trials) == 1 else " beyond the interval"
        claim = f"Following the gated forecast never loses return{noise}, at any of {num_cells} prefixes and horizons."
    followed = np.concatenate([_followed(results, f).ravel() for f in results.prefixes])
    share = np.nanmean(followed)
    if share == 0:
        return f"{claim} It follows TIPL nowhere, so that it gains nothing either."
    often = f"at {len(blind)} of them" if blind else "nowhere"
    return f"{claim} It follows TIPL in {fmt_percent(float(share))} of cases; followed always, TIPL loses {often}."


def _losses(results: Results, bootstrap: Bootstrap, name: str) -> list[tuple[float, int, Estimate]]:
    """Return (prefix, horizon, mean gain) wherever the gain's whole interval lies below zero."""
    found = []
    for f in results.prefixes:
        for horizon, column in zip(results.horizons[f].tolist(), gains(results, name, f).T, strict=True):
            gain = bootstrap.estimate(column)
            if (gain.high if gain.has_interval else gain.value) < 0:
                found.append((f, horizon, gain))
    return found


def _followed(results: Results, prefix: float) -> FloatArray:
    """Return 1 where the gated forecast follows TIPL, else 0, (n, H); NaN where there is no confidence."""
    confidence = results.values("confidence", prefix, "tipl")
    return np.where(np.isfinite(confidence), confidence >= results.follow, np.nan)


def _gain_table(
    results: Results, bootstrap: Bootstrap, cells: Sequence[tuple[float, int | None]], caption: str
) -> Html:
    """Return a table of the mean return gained, one row per (prefix, horizon); horizon None is the mean over all."""
    names = [n for n in ("tipl", "tipl_gated") if results.has_values("return_predicted", n)]
    rows = []
    for f, horizon in cells:
        chosen = slice(None) if horizon is None else results.horizons[f] == horizon
        head = f"{len(results.horizons[f])}{NBSP}horizons" if horizon is None else f"{horizon}{NBSP}ahead"
        followed = float(mean(_followed(results, f)[:, chosen].reshape(-1, 1))[0])
        row = [element("th", percent(f), element("small", head)), element("td", fmt_percent(followed))]
        for n in (*names, "truth"):
            gain = bootstrap.estimate(mean(gains(results, n, f)[:, chosen].T))  # each trial's mean over horizons
            row.append(page.estimate_cell(fmt(gain.value), fmt_interval(gain), is_quiet=n == "truth"))
        rows.append(row)
    labels = ["prefix", "followed", *(predictor_info(n).label for n in names)]
    return page.table(caption, [*(element("th", label) for label in labels), element("th", "truth", cls="quiet")], rows)
