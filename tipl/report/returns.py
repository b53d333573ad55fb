"""The report's section on returns: their error, and the share of the future gain that forecasts capture."""

import math
from collections.abc import Callable, Mapping, Sequence

from tipl.report import page, plots, verdict
from tipl.report.drawing import Plot, percent
from tipl.report.intervals import Bootstrap, Estimate, Gain, captured_gain, leaders
from tipl.report.page import Html, element, fmt, fmt_interval, fmt_percent
from tipl.report.predictor_info import BASIS_FLOORS
from tipl.report.results import Results
from tipl.report.tables import error_table, predictor_cell

Figure = Callable[[Plot, str], Html]


def returns_section(results: Results, bootstrap: Bootstrap, gains: Mapping[float, Gain], figure: Figure) -> Html:
    """Return the section; `gains` are `captured_gain` by prefix, `figure` puts a plot and its caption into the page."""
    if not any(results.has_values("return_predicted", name) for name in results.names):
        return element("p", "These results hold no returns.")
    parts = [
        element("h3", "Return error"),
        error_table(
            results,
            bootstrap,
            "REPW at the end of the path: the absolute difference in mean episodic return between the forecast and the "
            "true policy. Mean over held-out trials, with its 95 % interval below; the best predictor is marked.",
            "repw",
            results.names,
        ),
        figure(
            plots.error_plot(
                "repw", results, bootstrap, "repw", "return error (REPW)", [*BASIS_FLOORS, "return_floor"]
            ),
            "Return error against the horizon: means over held-out trials, with 95 % bands for TIPL, persistence and "
            "the floors. A difference below the dotted line comes from the choice of episodes, not from the policy.",
        ),
    ]
    if any(gain.is_measured for gain in gains.values()):
        parts += [
            element("h3", "Share of the future gain"),
            _gain_table(results, gains),
            *_gain_shares(results, bootstrap, gains, figure),
            figure(
                plots.gain_plot(results, bootstrap),
                "Return gained over the policy at the prefix's end (persistence, zero by definition) by the true "
                "future and by each forecast: means over held-out trials, with 95 % bands for the truth and TIPL. "
                "Gains between the dotted lines are within the return noise.",
            ),
        ]
    parts += [
        element("h3", "Returns, true against forecast"),
        figure(
            plots.returns_plot(results),
            "Return of each forecast policy against that of the true policy at the same checkpoint. Large marks: the "
            "end of the path; small marks: nearer horizons. On the diagonal the forecast is as good as the truth.",
        ),
    ]
    return page.join(*parts)


def _gain_table(results: Results, gains: Mapping[float, Gain]) -> Html:
    """Return the ratios of means at the end of the path, one row per prefix and one column per predictor."""
    names = [n for n in results.names if n not in ("persistence", "return_floor")]
    rows = []
    for f, gain in gains.items():
        row = [element("th", percent(f)), page.estimate_cell(fmt(gain.future.value), fmt_interval(gain.future))]
        if not gain.shares:
            row.append(Html(f'<td colspan="{len(names)}" class="quiet">{page.escape(verdict.no_gain(gain))}</td>'))
        else:
            row += _share_cells(names, gain.shares, leaders(gain.ranking))
        rows.append(row)
    caption = (
        "Ratio of means at the end of the path: the return that the forecast gains over the policy at the prefix's "
        "end, divided by what the true future gains, each summed over held-out trials. Persistence captures nothing, "
        "by definition."
    )
    head = [element("th", "prefix"), element("th", "future gain"), *map(page.column_head, names)]
    return page.table(caption, head, rows)


def _gain_shares(results: Results, bootstrap: Bootstrap, gains: Mapping[float, Gain], figure: Figure) -> list[Html]:
    """Return the IQM of each trial's own share: a table for the end of the path, a figure, and a table of all horizons.

    The list is empty where no trial's own gain exceeds the return noise.
    """
    every = {
        f: [captured_gain(results, bootstrap, f, horizon) for horizon in results.horizons[f].tolist()]
        for f in results.prefixes
    }
    if not any(gain.iqm_shares for row in every.values() for gain in row):
        return []
    ends = [(f, int(results.horizons[f][-1]), gain) for f, gain in gains.items()]
    each = [
        (f, horizon, gain)
        for f in results.prefixes
        for horizon, gain in zip(results.horizons[f].tolist(), every[f], strict=True)
    ]
    caption = (
        "Interquartile mean (IQM) at the end of the path: the share that a forecast captures of each trial's own gain, "
        "over the trials whose gain exceeds the return noise; the mean of the middle half of them, so that no trial "
        "outweighs the others."
    )
    return [
        _share_table(results, caption, ends),
        figure(
            plots.gain_share_plot(results, every),
            "Share of the future gain (IQM) against the horizon: 0 is the policy at the prefix's end, 1 the true "
            "future; with a 95 % band for TIPL.",
        ),
        element(
            "details",
            element("summary", "Share of the future gain (IQM) at every horizon"),
            _share_table(results, "The same at every horizon.", each),
        ),
    ]


def _share_table(results: Results, caption: str, gains: Sequence[tuple[float, int, Gain]]) -> Html:
    """Return the IQMs, one row per (prefix, horizon) and one column per predictor."""
    names = [n for n in results.names if n not in ("persistence", "return_floor")]
    rows = [
        [
            element("th", percent(f), element("small", f"{horizon} ahead")),
            element("td", f"{gain.num_gained} of {len(results.trials)}"),
            *_share_cells(names, gain.iqm_shares, leaders(gain.iqm_ranking)),
        ]
        for f, horizon, gain in gains
    ]
    head = [element("th", "prefix"), element("th", "trials that gain"), *map(page.column_head, names)]
    return page.table(caption, head, rows)


def _share_cells(names: Sequence[str], shares: Mapping[str, Estimate], best: set[str]) -> list[Html]:
    """Return the table cell of each predictor's share, as a percentage with its interval."""
    cells = []
    for n in names:
        share = shares.get(n, Estimate(math.nan))
        cells.append(predictor_cell(n, fmt_percent(share.value), fmt_interval(share, as_percent=True), best))
    return cells
